"""Stage 1: the pairs it writes, the built-in edits, photos as people have them, resuming, bad input."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

DEMO = ("--demo", "--train", 6, "--test", 2)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def psnr(a, b):
    return min(99, 10 * math.log10(255 ** 2 / max(1e-9, np.mean((a - b) ** 2))))


def contents(folder):
    """{relative path: bytes} of every file but result.json, which says how long it took."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "result.json"}


def rows(folder, split):
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "pairs"
    stage("01", *DEMO, "--out", folder)
    return folder


def scene(width=300, height=200, seed=0):
    """A smooth random picture with a few hard edges, as a photo has."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 2:, width // 4:width // 2] = draw.integers(0, 256, 3)
    return Image.fromarray(image)


# ---------------------------------------------------------------------------------------------------------------------
# What it writes

def test_layout(pairs):
    concepts = json.loads((pairs / "concepts.json").read_text())
    assert len(concepts) == 8 and all(entry["prompt"] and entry["teacher"] == "filters" for entry in concepts.values())
    for split, count in ("train", 6), ("test", 2):
        names = [f"{i:05}.png" for i in range(count)]
        for folder in ("source", *concepts):
            assert sorted(path.name for path in (pairs / split / folder).iterdir()) == names
            assert {Image.open(pairs / split / folder / name).size for name in names} == {(64, 64)}
        table = rows(pairs, split)
        assert [row["file_name"] for row in table] == [f"{concept}/{name}" for concept in concepts for name in names]
        for row in table:
            assert row["source"] == "source/" + row["file_name"].split("/")[1] and (pairs / split / row["source"]).exists()
            assert row["prompt"] == concepts[row["concept"]]["prompt"] and isinstance(row["seed"], int)
    result = json.loads((pairs / "result.json").read_text())
    assert "demo" in result["marks"] and "built-in filters as teacher" in result["marks"]
    assert [row["concept"] for row in result["tables"]["Pairs"]] == list(concepts)


def test_repeatable_and_done(stage, pairs, tmp_path):
    stage("01", *DEMO, "--out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(pairs)
    before = {path: path.stat().st_mtime_ns for path in pairs.rglob("*.png")}
    assert "done already" in stage("01", *DEMO, "--out", pairs).stdout
    assert {path: path.stat().st_mtime_ns for path in pairs.rglob("*.png")} == before


def test_adding_concepts_is_the_same_as_all_at_once(stage, pairs, tmp_path):
    prompts = {name: entry["prompt"] for name, entry in json.loads((pairs / "concepts.json").read_text()).items()}
    first, rest = ("sketch", "oil", "sepia"), [name for name in prompts if name not in ("sketch", "oil", "sepia")]
    for names in first, rest:
        stage("01", *DEMO, "--out", tmp_path / "pairs", *(x for name in names for x in ("--concept", f"{name}={prompts[name]}")))
    added, at_once = contents(tmp_path / "pairs"), contents(pairs)
    edits = [name for name in at_once if name.endswith(".png") and name != "samples.png"]
    assert added.keys() == at_once.keys() and all(added[name] == at_once[name] for name in edits)


def test_demo_splits_do_not_overlap(load_stage):
    boxes = load_stage("01").BOXES
    for name in boxes["train"]:
        (l0, t0, r0, b0), (l1, t1, r1, b1) = boxes["train"][name], boxes["test"][name]
        assert r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0


# ---------------------------------------------------------------------------------------------------------------------
# The built-in teacher

@pytest.mark.parametrize("size", [64, 512])
def test_edits_are_decisive_and_deterministic(load_stage, size):
    """Each differs from the photo and from each other edit; the same photo gives the same pixels, alone or in a batch."""
    stage = load_stage("01")
    photos = [stage.sklearn_crop(name, size) for name in ("train 0", "train 1", "test 2", "test 3")]
    edits = {name: stage.filters_teacher(photos, name, "", []) for name in stage.FILTERS}
    for name, made in edits.items():
        assert np.mean([stage.psnr(photo, edit) for photo, edit in zip(photos, made)]) < 18, name
        assert made[1].tobytes() == stage.filters_teacher(photos[1:2], name, "", [])[0].tobytes()
        assert all(np.mean([stage.psnr(a, b) for a, b in zip(made, edits[other])]) < 22 for other in edits if other != name)


def test_edits_look_the_same_at_any_size(load_stage):
    """An edit at 512 pixels, shrunk, is near the edit of the shrunk photo: strengths scale with size."""
    stage = load_stage("01")
    for name in stage.FILTERS:
        for crop in ("train 0", "train 1"):
            large, small = stage.sklearn_crop(crop, 256), stage.sklearn_crop(crop, 128)
            shrunk = stage.filters_teacher([large], name, "", [])[0].resize((128, 128), Image.Resampling.BOX)
            assert stage.psnr(shrunk, stage.filters_teacher([small], name, "", [])[0]) > 14, (name, crop)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_bad_input(error_of, pairs, tmp_path):
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir(), texts.mkdir()
    (texts / "notes.txt").write_text("no picture")
    (texts / "fake.png").write_text("no picture either")
    out = ("--out", tmp_path / "out")
    assert "absent" in error_of("01", *DEMO, "--images", tmp_path / "absent", *out)
    assert "holds no image files" in error_of("01", *DEMO, "--images", empty, *out)
    assert "too few" in error_of("01", *DEMO, "--images", texts, "--out", tmp_path / "texts-out")
    assert "has no prompt" in error_of("01", *DEMO, "--concept", "sketch", *out)
    assert "has no prompt" in error_of("01", *DEMO, "--concept", "sketch= ", *out)
    assert "multiple of 8" in error_of("01", *DEMO, "--size", 60, *out)
    assert "knows sketch" in error_of("01", *DEMO, "--concept", "vampire=make them vampires", *out)
    for name in "../up", "a/b", "source", "Rejected", "x" * 200, "a\nb", ".hidden", "":
        assert "folder" in error_of("01", *DEMO, "--concept", f"{name}=do it", *out)
    assert not (tmp_path / "out").exists()
    before = contents(pairs)
    assert "other settings" in error_of("01", *DEMO, "--size", 32, "--out", pairs)
    assert "made otherwise" in error_of("01", *DEMO, "--concept", "sketch=draw it", "--out", pairs)
    assert contents(pairs) == before
