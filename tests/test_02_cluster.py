"""Stage 2: the clusters are K-means', the picks are nearest to the centres, and only what exists is
chosen."""

import numpy as np
import pytest
import torch
from conftest import run_main
from PIL import Image

import dataset
import runs

COLOURS = {"red": (200, 20, 20), "crimson": (180, 30, 40), "rose": (210, 40, 30)}
COLOURS |= {"blue": (20, 20, 200), "navy": (30, 40, 180)}


@pytest.fixture
def pairs(tmp_path):
    """12 photos in 4 colours, 5 concepts of plain colour: three reds, two blues. `navy` has edits
    of photos 0..4. A vector is the direction of its picture's mean colour: clusters that a reader
    can predict."""
    rng, folder, features = np.random.default_rng(0), tmp_path / "pairs", {}
    shades = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (150, 150, 150)]
    for name in ("source", *COLOURS):
        vectors = torch.zeros(12, 3)
        for i in range(5 if name == "navy" else 12):
            colour = COLOURS.get(name, shades[i % 4])
            pixels = np.clip(rng.normal(colour, 4, (16, 16, 3)), 0, 255).astype(np.uint8)
            runs.write_png(folder / f"train/{name}/{i:05}.png", Image.fromarray(pixels))
            vectors[i] = torch.from_numpy(pixels.mean((0, 1)))
        features[f"train/{name}"] = torch.nn.functional.normalize(vectors, dim=1)
    about = {"kind": "features", "clip": "ViT-S-32:random"}
    runs.write_tensors(folder / "features.safetensors", features, about)
    prompts = {name: {"prompt": f"paint it {name}"} for name in COLOURS}
    runs.write_json(folder / "concepts.json", prompts)
    runs.write_json(folder / "result.json", {"marks": ["stand-in CLIP (random weights)"]})
    return folder


@pytest.fixture
def run_stage(capsys, pairs):
    """Runs the stage in this process; returns its folder and what it printed."""

    def call(*flags):
        out = pairs.parent / "clusters"
        run_main("02", "--pairs", pairs, "--out", out, *flags)
        return out, capsys.readouterr().out

    return call


def chosen(out, concept):
    return (out / "samples" / f"{concept}.txt").read_text().split()


def test_cluster_is_kmeans_and_picks_the_nearest_to_the_centre(load_stage):
    rng = torch.Generator().manual_seed(0)
    centres, counts = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), torch.tensor([9, 7, 5])
    points = centres.repeat_interleave(counts, dim=0) + torch.randn(21, 2, generator=rng)
    clusters = load_stage("02").cluster(points, 3, seed=0)
    assert [sorted(c) for c in clusters] == [[*range(9)], [*range(9, 16)], [*range(16, 21)]]
    for members in clusters:
        distances = (points[members] - points[members].mean(0)).norm(dim=1)
        assert (distances.diff() >= -1e-5).all()  # from the centre outwards: the pick is nearest


def test_one_concept_of_each_kind_trains_the_base(run_stage):
    out, _ = run_stage("--base", 2, "--samples", 4)
    concepts = runs.read_json(out / "concepts.json")
    assert sorted(concepts["base"] + concepts["new"]) == sorted(COLOURS)
    assert sorted(name in ("blue", "navy") for name in concepts["base"]) == [False, True]
    assert {int(name[:5]) % 4 for name in chosen(out, "red")} == {0, 1, 2, 3}  # one of each shade
    assert set(chosen(out, "navy")) <= {f"{i:05}.png" for i in range(5)}
    assert len(chosen(out, "navy")) == 4
    result = runs.read_json(out / "result.json")
    rows = result["tables"]["Training photos, clustered"]
    counts = [(row["concepts"], row["photos"], row["samples"]) for row in rows]
    assert counts == [(4, 12, 4), (1, 5, 4)] and "stand-in CLIP" in result["marks"][0]
    assert rows[0]["mean cosine to the nearest sample"] > 0.99 >= rows[0]["same for random samples"]
    for sheet in ("concepts.png", "photos.png"):
        assert min(dataset.read_image(out / sheet).shape[1:]) > 100


def test_more_wanted_than_there_is(run_stage):
    out, printed = run_stage("--base", 9, "--samples", 400)
    assert runs.read_json(out / "concepts.json") == {"base": list(COLOURS), "new": []}
    assert "none is new" in printed and "400 samples wanted, but only 12 differ" in printed
    assert len(chosen(out, "red")) == 12 and len(chosen(out, "navy")) == 5
    assert "done already" in run_stage("--base", 9, "--samples", 400)[1]


def test_bad_input(error_of, run_stage, pairs, tmp_path):
    flags = ("02", "--pairs", pairs, "--out")
    assert "01_distill_pairs.py" in error_of("02", "--pairs", tmp_path / "none")
    out, _ = run_stage("--base", 2)
    before = (out / "concepts.json").read_bytes()
    assert "other settings" in error_of(*flags, out, "--base", 3)
    Image.new("RGB", (16, 16)).save(pairs / "train/navy/00005.png")
    Image.new("RGB", (16, 16)).save(pairs / "train/navy/extra.png")
    assert "lacks extra.png" in error_of(*flags, tmp_path / "b")
    Image.new("RGB", (16, 16)).save(pairs / "train/source/extra.png")
    assert "run stage 1 again" in error_of(*flags, tmp_path / "b")
    (pairs / "features.safetensors").unlink()
    assert "features.safetensors does not exist" in error_of(*flags, tmp_path / "b")
    assert (out / "concepts.json").read_bytes() == before
