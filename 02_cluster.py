"""Stage 2: which data to train on. K-means over CLIP embeddings chooses the base's concepts and each concept's photos.

E2GAN (arXiv 2401.06127), section 3. Concepts: the mean embedding of a concept's edits stands for it; of each cluster
the concept nearest to the centre trains the base (stage 3), the others are the new ones that fine-tuning is judged on
(stage 4). Photos: as many clusters as samples are wanted, of each the photo nearest to the centre; a concept's are
chosen among those that it has an edit of.

Reads   runs/pairs (stage 1), its training photos and edits
Writes  runs/clusters/concepts.json             {"base": [...], "new": [...]}
        runs/clusters/samples/<concept>.txt     chosen training photos, a file name a line
        runs/clusters/concepts.png, photos.png  each cluster: its pick, then its members      result.json

    python 02_cluster.py --demo
    python 02_cluster.py --pairs runs/pairs --base 10 --samples 400
    python 02_cluster.py --pairs runs/pairs --device cuda:1         (seconds on one GPU; it uses no more than one)
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common

PAPER = dict(
    pairs=Path("runs/pairs"),
    out=Path("runs/clusters"),
    base=10,
    samples=400,  # of about 1,000 photos
    edits=200,  # a mean of unit vectors moves little after that
    clip="ViT-B-32:openai",
)
DEMO = dict(
    pairs=Path("runs/demo/pairs"),
    out=Path("runs/demo/clusters"),
    base=6,
    samples=48,
    edits=24,
    clip="ViT-S-32:random",
)
BATCH = 64  # pictures decoded and embedded at a time


def embed(clip: common.Clip, paths: Sequence[Path], what: str) -> torch.Tensor:
    """Unit vectors (N, D) of N picture files, which need not have one size."""
    parts = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc=what, unit="picture") as bar:
        for start in range(0, len(paths), BATCH):
            pictures = list(pool.map(common.read_image, paths[start : start + BATCH]))
            square = {picture.shape for picture in pictures}
            groups = (
                [torch.stack(pictures)]
                if len(square) == 1
                else [picture[None] for picture in pictures]
            )
            parts += [clip.images(group) for group in groups]
            bar.update(len(pictures))
    return torch.cat(parts)


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, evenly spaced."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))]


def cluster(points: torch.Tensor, wanted: int, seed: int) -> list[list[int]]:
    """K-means of points (N, D) with `wanted` clusters, fewer where there are fewer distinct points: lists of indices,
    the largest cluster first, each list from the nearest to its cluster's centre (the pick) to the farthest."""
    from sklearn.cluster import KMeans  # a second; a run that is done already does not pay it

    points = points.double().numpy()
    count = min(wanted, len(np.unique(points.round(5), axis=0)))
    kmeans = KMeans(count, n_init=4, random_state=seed).fit(points)
    distance = np.linalg.norm(points - kmeans.cluster_centers_[kmeans.labels_], axis=1).round(
        6
    )  # ties: the first
    members = [
        sorted(np.flatnonzero(kmeans.labels_ == c).tolist(), key=lambda i: distance[i])
        for c in range(count)
    ]
    return sorted(members, key=lambda indices: (-len(indices), indices))


def say_fewer(found: int, wanted: int, what: str) -> None:
    if found < wanted:
        print(f"{wanted} {what} wanted, but only {found} differ: going on with {found}")


def nearest(points: torch.Tensor, chosen: Sequence[int]) -> float:
    """Mean cosine of each point (N, D) to the nearest chosen one: how well the chosen stand for all."""
    return (points @ points[list(chosen)].T).max(1).values.mean().item()


def contact_sheet(
    clusters: Sequence[Sequence[Path]], labels: Sequence[str], shown: int, strips: int, cell: int
) -> Image.Image:
    """The pick of each cluster and up to `shown` of its members, `strips` clusters side by side."""
    cells = [
        [*map(common.read_image, paths[: shown + 1]), *[None] * (shown + 1 - len(paths))]
        for paths in clusters
    ]
    rows = [
        sum((strip + [None] for strip in cells[i : i + strips]), [])[:-1]
        for i in range(0, len(cells), strips)
    ]
    columns = (["pick", "members", *[""] * shown] * strips)[:-1]
    return common.picture_grid(rows, columns, labels or [""] * len(rows), cell)


def cluster_concepts(
    pairs: Path, files: dict[str, list[str]], clip: common.Clip, args
) -> tuple[list[list[str]], list[dict]]:
    """Clusters of concept names, each from its pick on, and the table's rows."""
    names = list(files)
    edits = {name: spread(files[name], args.edits) for name in names}
    points = embed(
        clip, [pairs / "train" / name / file for name in names for file in edits[name]], "edits"
    )
    means = torch.stack(
        [part.mean(0) for part in points.split([len(edits[name]) for name in names])]
    )
    if args.base >= len(names):
        print(
            f"--base {args.base}, and {pairs} holds {len(names)} concepts: all train the base, none is new"
        )
        clusters = [[i] for i in range(len(names))]
    else:
        clusters = cluster(means, args.base, args.seed)
        say_fewer(len(clusters), args.base, "base concepts")
    unit = F.normalize(means, dim=1)
    rows = [
        {
            "concept": names[i],
            "role": "new" if i != members[0] else "base",
            "cluster": c,
            "edits": len(edits[names[i]]),
            "cosine to the cluster's pick": (unit[i] @ unit[members[0]]).item(),
        }
        for c, members in enumerate(clusters, 1)
        for i in members
    ]
    return [[names[i] for i in members] for members in clusters], rows


def cluster_photos(
    pairs: Path, files: dict[str, list[str]], clip: common.Clip, args
) -> tuple[dict, list[dict]]:
    """{file names: clusters of them, each from its pick on} for every set of photos that some concept has edits of, and
    the table's rows."""
    names = sorted(set().union(*files.values()))
    row_of = {name: row for row, name in enumerate(names)}
    points = embed(clip, [pairs / "train" / "source" / name for name in names], "photos")
    clusters, rows = {}, []
    for group, sharing in Counter(map(tuple, files.values())).most_common():
        part = points[[row_of[name] for name in group]]
        found = cluster(part, args.samples, args.seed)
        say_fewer(len(found), args.samples, "samples")
        random = torch.randperm(len(group), generator=torch.Generator().manual_seed(args.seed))[
            : len(found)
        ]
        clusters[group] = [[group[i] for i in members] for members in found]
        rows.append(
            {
                "concepts": sharing,
                "photos": len(group),
                "samples": len(found),
                "largest cluster": len(found[0]),
                "mean cosine to the nearest sample": nearest(
                    part, [members[0] for members in found]
                ),
                "same for random samples": nearest(part, random.tolist()),
            }
        )
    return clusters, rows


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote")
    parser.add_argument("--base", type=int, help="concepts that train the base")
    parser.add_argument("--samples", type=int, help="photos to choose for each concept")
    parser.add_argument(
        "--edits", type=int, help="edits, evenly spaced, whose mean embedding stands for a concept"
    )
    parser.add_argument(
        "--clip", help="open_clip's MODEL:WEIGHTS; WEIGHTS `random` is an offline stand-in"
    )
    args, began = parser.parse(), time.time()
    if min(args.base, args.samples, args.edits) < 1:
        raise common.UserError("--base, --samples and --edits must be 1 or more")

    files = {
        name: common.edit_names(args.pairs, "train", name)
        for name in common.read_concepts(args.pairs)
    }
    data = [
        common.sha256(args.pairs / name)[:16] for name in ("concepts.json", "train/metadata.jsonl")
    ]
    device = common.pick_device(args.device)
    if common.begin_run(
        args.out, common.settings_of(args, "02_cluster", data=data), args.overwrite
    ):
        return
    clip = common.Clip(args.clip, device)
    concepts, concept_rows = cluster_concepts(args.pairs, files, clip, args)
    photos, photo_rows = cluster_photos(args.pairs, files, clip, args)

    for name, group in files.items():
        picks = sorted(members[0] for members in photos[tuple(group)])
        common.write_text(
            args.out / "samples" / f"{name}.txt", "".join(f"{pick}\n" for pick in picks)
        )
    common.write_json(
        args.out / "concepts.json",
        {
            "base": [members[0] for members in concepts],
            "new": [name for members in concepts for name in members[1:]],
        },
    )
    train = args.pairs / "train"
    common.write_png(
        args.out / "concepts.png",
        contact_sheet(
            [[train / name / files[name][0] for name in members] for members in concepts],
            [", ".join(members[:3]) + " ..." * (len(members) > 3) for members in concepts],
            shown=min(8, max(map(len, concepts))) - 1,
            strips=1,
            cell=112,
        ),
    )
    shared = next(iter(photos.values()))  # the photos that most concepts have edits of
    common.write_png(
        args.out / "photos.png",
        contact_sheet(
            [[train / "source" / name for name in members] for members in shared],
            [],
            shown=3,
            strips=4 if len(shared) > 16 else 1,
            cell=56,
        ),
    )
    common.write_result(
        args.out,
        "02_cluster",
        began,
        common.marks_of(args, args.pairs, clip=args.clip),
        {"Concepts, clustered": concept_rows, "Training photos, clustered": photo_rows},
    )


if __name__ == "__main__":
    common.run(main)
