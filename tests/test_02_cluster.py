"""Stage 2: the clusters are K-means', the picks are nearest to the centres, and only what exists is chosen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import common

COLOURS = dict(
    red=(200, 20, 20),
    crimson=(180, 30, 40),
    rose=(210, 40, 30),
    blue=(20, 20, 200),
    navy=(30, 40, 180),
)


class ColourClip:
    """Embeds a picture as the direction of its mean colour: clusters that a reader can predict."""

    def __init__(self, spec, device):
        pass

    def images(self, pixels):
        return torch.nn.functional.normalize(pixels.float().mean((2, 3)), dim=1)


@pytest.fixture
def pairs(tmp_path):
    """12 photos in 4 colours, 5 concepts of plain colour: three reds, two blues. `navy` has edits of photos 0..4."""
    rng = np.random.default_rng(0)
    rows, shades = [], [(250, 10, 10), (10, 250, 10), (10, 10, 250), (150, 150, 150)]
    for folder in ("source", *COLOURS):
        (tmp_path / "pairs/train" / folder).mkdir(parents=True)
    for i in range(12):

        def write(folder, colour):
            pixels = np.clip(rng.normal(colour, 4, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pairs/train/{folder}/{i:05}.png")

        write("source", shades[i % 4])
        for name in COLOURS if i < 5 else list(COLOURS)[:-1]:
            write(name, COLOURS[name])
            rows.append(
                {"file_name": f"{name}/{i:05}.png", "source": f"source/{i:05}.png", "concept": name}
            )
    (tmp_path / "pairs/train/metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    common.write_json(
        tmp_path / "pairs/concepts.json", {name: {"prompt": f"paint it {name}"} for name in COLOURS}
    )
    return tmp_path / "pairs"


@pytest.fixture
def run_stage(load_stage, monkeypatch, capsys, pairs):
    """Runs the stage in this process with ColourClip; returns its folder and what it printed."""

    def call(*flags, name="clusters"):
        monkeypatch.setattr(common, "Clip", ColourClip)
        out = pairs.parent / name
        monkeypatch.setattr(
            "sys.argv", ["02", "--pairs", str(pairs), "--out", str(out), *map(str, flags)]
        )
        load_stage("02").main()
        return out, capsys.readouterr().out

    return call


def chosen(out, concept):
    return (out / "samples" / f"{concept}.txt").read_text().split()


def test_cluster_is_kmeans_and_picks_the_nearest_to_the_centre(load_stage):
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = torch.cat([centre + torch.randn(n, 2) for centre, n in zip(centres, (9, 7, 5))])
    clusters = load_stage("02").cluster(points, 3, seed=0)
    assert [sorted(c) for c in clusters] == [
        list(range(9)),
        list(range(9, 16)),
        list(range(16, 21)),
    ]
    for members in clusters:
        distances = (points[members] - points[members].mean(0)).norm(dim=1)
        assert (
            distances.diff() >= -1e-5
        ).all()  # sorted from the centre outwards: the pick is the nearest


def test_fewer_distinct_points_than_clusters(load_stage):
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert load_stage("02").cluster(points, 4, seed=0) == [[0, 2], [1, 3]]


def test_one_concept_of_each_kind_trains_the_base(run_stage):
    out, printed = run_stage("--base", 2, "--samples", 4)
    concepts = common.read_json(out / "concepts.json")
    assert sorted(concepts["base"] + concepts["new"]) == sorted(COLOURS)
    assert (
        len(concepts["base"]) == 2
        and len({name in ("blue", "navy") for name in concepts["base"]}) == 2
    )
    assert {int(name[:5]) % 4 for name in chosen(out, "red")} == {
        0,
        1,
        2,
        3,
    }  # a photo of each shade
    assert (
        set(chosen(out, "navy")) <= {f"{i:05}.png" for i in range(5)}
        and len(chosen(out, "navy")) == 4
    )
    rows = common.read_json(out / "result.json")["tables"]["Training photos, clustered"]
    assert [(row["concepts"], row["photos"], row["samples"]) for row in rows] == [
        (4, 12, 4),
        (1, 5, 4),
    ]
    assert rows[0]["mean cosine to the nearest sample"] > 0.99 >= rows[0]["same for random samples"]
    for sheet in ("concepts.png", "photos.png"):
        assert min(common.read_image(out / sheet).shape[1:]) > 100


def test_more_wanted_than_there_is(run_stage):
    out, printed = run_stage("--base", 9, "--samples", 400)
    assert common.read_json(out / "concepts.json") == {"base": list(COLOURS), "new": []}
    assert "none is new" in printed and "400 samples wanted, but only 12 differ" in printed
    assert len(chosen(out, "red")) == 12 and len(chosen(out, "navy")) == 5


def test_sheet_of_many_clusters_stays_small(load_stage, pairs):
    photo = pairs / "train/source/00000.png"
    sheet = load_stage("02").contact_sheet([[photo] * 3] * 400, [], shown=3, strips=4, cell=56)
    assert sheet.width < 1300 and sheet.height < 6500


def test_run_as_users_do(stage, run_stage, pairs, tmp_path):
    flags = ("--pairs", pairs, "--base", 3, "--samples", 4, "--clip", "ViT-S-32:random")
    stage("02", *flags, "--out", tmp_path / "clusters")
    assert common.read_json(tmp_path / "clusters/result.json")["marks"] == [
        "stand-in CLIP (random weights)"
    ]
    assert len(chosen(tmp_path / "clusters", "red")) == 4
    assert "done already" in run_stage(*flags)[1]


def test_same_seed_same_files(run_stage):
    a, b = (run_stage("--base", 2, "--samples", 5, name=name)[0] for name in "ab")
    names = sorted(
        path.relative_to(a)
        for path in a.rglob("*")
        if path.is_file() and path.name != "result.json"
    )
    assert len(names) == 10 and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def test_bad_input(error_of, run_stage, pairs, tmp_path):
    assert "01_distill_pairs.py" in error_of("02", "--pairs", tmp_path / "none")
    assert "1 or more" in error_of("02", "--pairs", pairs, "--samples", 0)
    assert "MODEL:WEIGHTS" in error_of(
        "02", "--pairs", pairs, "--clip", "ViT-Z", "--out", tmp_path / "a"
    )
    out, _ = run_stage("--base", 2)
    before = (out / "concepts.json").read_bytes()
    assert "other settings" in error_of("02", "--pairs", pairs, "--base", 3, "--out", out)
    (pairs / "train/source/00011.png").write_text("no picture")
    assert "00011.png is not a picture" in error_of("02", "--pairs", pairs, "--out", tmp_path / "b")
    (pairs / "train/rose/00003.png").unlink()
    assert "rose lacks 00003.png" in error_of("02", "--pairs", pairs, "--out", tmp_path / "d")
    common.write_json(pairs / "concepts.json", {"red": {"prompt": " "}})
    assert "has no prompt" in error_of("02", "--pairs", pairs, "--out", out)
    assert (out / "concepts.json").read_bytes() == before
