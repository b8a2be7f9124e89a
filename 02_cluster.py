"""Stage 2: chooses the data to train on, by K-means over stage 1's CLIP vectors.

E2GAN (arXiv 2401.06127, section 3). Concepts: each is represented by the mean vector of its edits,
and these are clustered. The concept nearest to a cluster's centre trains the base (stage 3); the
others are new concepts for fine-tuning (stage 4). Photos: they are clustered into as many clusters
as samples are wanted, and the photo nearest to each centre is chosen. A concept's samples are
chosen among the photos of which it has an edit.

Reads   runs/pairs                              features.safetensors, the names of training edits
Writes  runs/clusters/concepts.json             {"base": [...], "new": [...]}
        runs/clusters/samples/<concept>.txt     chosen training photos, a file name a line
        runs/clusters/concepts.png, photos.png  each cluster: the chosen one, then the others
        runs/clusters/result.json               what `python runs.py` prints

    python 02_cluster.py --demo
    python 02_cluster.py --pairs runs/pairs --base 10 --samples 400       (a second)
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

import dataset

DEMO = {"base": 4, "samples": 16, "edits": 24}


def vectors_of(pairs: Path, name: str, files: list[str], features: dict) -> torch.Tensor:
    """CLIP's unit vectors (n, D) of training pictures. name: a concept, or "source". features: of
    stage 1's file, where a picture's row is its file's number."""
    path = pairs / "features.safetensors"
    with runs.explain(f"{path} lacks pictures of {name!r} (run stage 1 again)"):
        return features[f"train/{name}"][[int(Path(file).stem) for file in files]]


def cluster(points: torch.Tensor, wanted: int, seed: int, what: str = "") -> list[list[int]]:
    """K-means of points (N, D) into `wanted` clusters, or as many as there are different points.
    Returns lists of indices, the largest cluster first; in each the point nearest to the centre,
    its pick, comes first and the farthest last. what: the points' name, for a message."""
    from sklearn.cluster import KMeans  # takes a second, which a run that is done does not need

    points = points.double().numpy()
    count = min(wanted, len(np.unique(points.round(5), axis=0)))
    if count < wanted:
        print(f"{wanted} {what} wanted, but only {count} differ: going on with {count}")
    kmeans = KMeans(count, n_init=4, random_state=seed).fit(points)
    distance = np.linalg.norm(points - kmeans.cluster_centers_[kmeans.labels_], axis=1).round(6)
    found = []
    for c in range(count):
        members = np.flatnonzero(kmeans.labels_ == c)
        found.append(sorted(members.tolist(), key=lambda i: distance[i]))  # stable
    return sorted(found, key=lambda members: (-len(members), members))


def contact_sheet(path: Path, clusters, labels: list[str], shown: int, strips: int, cell: int):
    """Writes a picture of clusters, lists of picture files: of each its pick and up to `shown`
    others, with `strips` clusters side by side, `cell` pixels a picture."""
    rows = []
    for i in range(0, len(clusters), strips):
        row = []
        for paths in clusters[i : i + strips]:
            pictures = [dataset.read_image(path) for path in paths[: shown + 1]]
            row += pictures + [None] * (shown + 2 - len(pictures))
        rows.append(row[:-1])
    columns = (["pick", "members", *[""] * shown] * strips)[:-1]
    runs.write_png(path, dataset.picture_grid(rows, columns, labels or [""] * len(rows), cell))


def cluster_concepts(points: dict[str, torch.Tensor], args) -> tuple[list[list[str]], list[dict]]:
    """(clusters of concepts' names, each beginning with its pick, a table's rows). points:
    {concept: vectors (n, D) of some of its edits}."""
    names = list(points)
    rows = []
    means = torch.stack([part.mean(0) for part in points.values()])
    clusters = [[i] for i in range(len(names))]
    if args.base < len(names):
        clusters = cluster(means, args.base, args.seed, "base concepts")
    else:
        print(f"--base {args.base} of {len(names)} concepts: all train the base, none is new")
    unit = F.normalize(means, dim=1)
    for number, members in enumerate(clusters, 1):
        for i in members:
            rows.append(
                {
                    "concept": names[i],
                    "role": "base" if i == members[0] else "new",
                    "cluster": number,
                    "edits": len(points[names[i]]),
                    "cosine to the cluster's pick": (unit[i] @ unit[members[0]]).item(),
                }
            )
    return [[names[i] for i in members] for members in clusters], rows


def cluster_photos(files: dict[str, list[str]], features: dict, args) -> tuple[dict, list[dict]]:
    """({file names: clusters of them, each beginning with its pick}, a table's rows). Concepts with
    edits of the same photos share a clustering, whose key is these photos' names. files: {concept:
    file names of its edits}."""
    clusters = {}
    rows = []
    for group, sharing in Counter(map(tuple, files.values())).most_common():
        points = vectors_of(args.pairs, "source", list(group), features)
        found = cluster(points, args.samples, args.seed, "samples")
        rng = torch.Generator().manual_seed(args.seed)
        random = torch.randperm(len(group), generator=rng)[: len(found)].tolist()
        clusters[group] = [[group[i] for i in members] for members in found]
        picks = [members[0] for members in found]
        rows.append(
            {
                "concepts": sharing,
                "photos": len(group),
                "samples": len(found),
                "largest cluster": len(found[0]),
                "mean cosine to the nearest sample": nearest_cosine(points, picks),
                "same for random samples": nearest_cosine(points, random),
            }
        )
    return clusters, rows


def nearest_cosine(points: torch.Tensor, picks: list[int]) -> float:
    """Mean over all points, unit vectors (N, D), of the cosine to the nearest of the picks, which
    are indices of points."""
    return (points @ points[picks].T).max(1).values.mean().item()


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, out="runs/clusters")
    flag = parser.add_argument
    flag("--pairs", type=Path, default="runs/pairs", help="the pairs folder that stage 1 wrote")
    flag("--base", type=runs.count, default=10, help="how many concepts train the base")
    flag("--samples", type=runs.count, default=400, help="how many photos each concept trains on")
    flag(
        "--edits",
        type=runs.count,
        default=200,
        help="how many of a concept's edits, at most, its mean vector is computed from",
    )
    return parser.parse(DEMO)


def draw_concepts(args, concepts: list[list[str]], files: dict[str, list[str]]) -> None:
    """Writes concepts.png: a row per cluster, with the first training edit of each concept, the
    pick's first."""
    rows = []
    labels = []
    for members in concepts:
        rows.append([args.pairs / "train" / name / files[name][0] for name in members])
        labels.append(", ".join(members[:3]) + (" ..." if len(members) > 3 else ""))
    shown = min(8, max(map(len, concepts))) - 1
    contact_sheet(args.out / "concepts.png", rows, labels, shown, strips=1, cell=112)


def draw_photos(args, clusters: list[list[str]]) -> None:
    """Writes photos.png: each cluster's pick, then some others."""
    folder = args.pairs / "train/source"
    rows = [[folder / name for name in members] for members in clusters]
    strips = 4 if len(rows) > 16 else 1
    contact_sheet(args.out / "photos.png", rows, [], 3, strips, cell=56)


def main() -> None:
    args = parse()
    features, _ = runs.read_tensors(args.pairs / "features.safetensors", "features")
    known = dataset.read_concepts(args.pairs)
    files = dataset.edit_names(args.pairs, "train", known)  # {concept: its training edits}
    points = {}  # {concept: CLIP's vectors of some of its training edits}
    for name in known:
        count = min(args.edits, len(files[name]))
        even = np.linspace(0, len(files[name]) - 1, count).round().astype(int)
        some = [files[name][i] for i in even]
        points[name] = vectors_of(args.pairs, name, some, features)
    names_hash = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    data = [runs.sha256(args.pairs / "features.safetensors")[:16], names_hash]
    if runs.begin_run(args.out, runs.settings_of(args, data=data), args.overwrite):
        return

    concepts, concept_rows = cluster_concepts(points, args)
    photos, photo_rows = cluster_photos(files, features, args)
    for name, group in files.items():
        picks = sorted(members[0] for members in photos[tuple(group)])
        runs.write_text(args.out / "samples" / f"{name}.txt", "\n".join(picks) + "\n")
    base = [members[0] for members in concepts]
    new = [name for members in concepts for name in members[1:]]
    runs.write_json(args.out / "concepts.json", {"base": base, "new": new})
    draw_concepts(args, concepts, files)
    draw_photos(args, next(iter(photos.values())))  # of the most concepts
    tables = {"Concepts, clustered": concept_rows, "Training photos, clustered": photo_rows}
    runs.write_result(args, tables, reads=[args.pairs])


if __name__ == "__main__":
    runs.run(main)
