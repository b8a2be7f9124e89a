"""Stage 1: the pairs it writes, the built-in edits, photos as people have them, resuming, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the edits' tensors are small
DEMO = ("--demo", "--train", 6, "--test", 2)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def psnr(a, b):
    return min(99, 10 * math.log10(255**2 / max(1e-9, np.mean((a - b) ** 2))))


def contents(folder):
    """{relative path: bytes} of every file but result.json, which says how long it took."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "result.json"
    }


def rows(folder, split):
    return [
        json.loads(line)
        for line in (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def pairs(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "pairs"
    stage("01", *DEMO, "--out", folder)
    return folder


@pytest.fixture
def here(load_stage, monkeypatch):
    """here("--demo", ...) runs the stage in this process and returns its module."""

    def call(*flags, **patches):
        module = load_stage("01")
        for name, value in patches.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(sys, "argv", ["01_distill_pairs.py", *map(str, flags)])
        module.main()
        return module

    return call


def scene(width=300, height=200, seed=0):
    """A smooth random picture with a few hard edges, as a photo has."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 2 :, width // 4 : width // 2] = draw.integers(0, 256, 3)
    return Image.fromarray(image)


# ---------------------------------------------------------------------------------------------------------------------
# What it writes


def test_layout(pairs):
    concepts = json.loads((pairs / "concepts.json").read_text())
    assert len(concepts) == 8 and all(
        entry["prompt"] and entry["teacher"] == "filters" for entry in concepts.values()
    )
    for split, count in ("train", 6), ("test", 2):
        names = [f"{i:05}.png" for i in range(count)]
        for folder in ("source", *concepts):
            assert sorted(path.name for path in (pairs / split / folder).iterdir()) == names
            assert {Image.open(pairs / split / folder / name).size for name in names} == {(64, 64)}
        table = rows(pairs, split)
        assert [row["file_name"] for row in table] == [
            f"{concept}/{name}" for concept in concepts for name in names
        ]
        for row in table:
            assert row["source"] == "source/" + row["file_name"].split("/")[1]
            assert (pairs / split / row["source"]).exists()
            assert row["prompt"] == concepts[row["concept"]]["prompt"] and isinstance(
                row["seed"], int
            )
    result = json.loads((pairs / "result.json").read_text())
    assert "demo" in result["marks"] and "built-in filters as teacher" in result["marks"]
    assert [row["concept"] for row in result["tables"]["Pairs"]] == list(concepts)


def test_repeatable_and_done(here, pairs, tmp_path, capsys):
    here(*DEMO, "--out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(pairs)
    before = {path: path.stat().st_mtime_ns for path in pairs.rglob("*.png")}
    here(*DEMO, "--out", pairs)
    assert "done already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in pairs.rglob("*.png")} == before


def test_adding_concepts_is_the_same_as_all_at_once(here, pairs, tmp_path):
    prompts = {
        name: entry["prompt"]
        for name, entry in json.loads((pairs / "concepts.json").read_text()).items()
    }
    first, rest = (
        ("sketch", "oil", "sepia"),
        [name for name in prompts if name not in ("sketch", "oil", "sepia")],
    )
    for names in first, rest:
        flags = [flag for name in names for flag in ("--concept", f"{name}={prompts[name]}")]
        here(*DEMO, "--out", tmp_path / "pairs", *flags)
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
    """Each differs from the photo and from any other edit; a photo gives the same pixels alone and in a batch."""
    stage = load_stage("01")
    photos = [stage.sklearn_crop(name, size) for name in ("train 0", "train 1", "test 2", "test 3")]
    edits = {name: stage.filters_teacher(photos, name, "", []) for name in stage.FILTERS}
    for name, made in edits.items():
        assert np.mean([stage.psnr(photo, edit) for photo, edit in zip(photos, made)]) < 18, name
        assert made[1].tobytes() == stage.filters_teacher(photos[1:2], name, "", [])[0].tobytes()
        for other in edits.keys() - {name}:
            assert np.mean([stage.psnr(a, b) for a, b in zip(made, edits[other])]) < 22, (
                name,
                other,
            )


def test_edits_look_the_same_at_any_size(load_stage):
    """An edit at 512 pixels, shrunk, is near the edit of the shrunk photo: strengths scale with size."""
    stage = load_stage("01")
    for name in stage.FILTERS:
        for crop in ("train 0", "train 1"):
            large, small = stage.sklearn_crop(crop, 256), stage.sklearn_crop(crop, 128)
            shrunk = stage.filters_teacher([large], name, "", [])[0].resize(
                (128, 128), Image.Resampling.BOX
            )
            assert stage.psnr(shrunk, stage.filters_teacher([small], name, "", [])[0]) > 14, (
                name,
                crop,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers pipelines


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        scene(160, 120, seed=i).save(folder / f"photo {i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """{name: folder} of saved pipelines with a few thousand random weights."""
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("pipelines")
    return {
        make.__name__: make(folder / make.__name__)
        for make in (
            tiny_pipelines.instruct_pix2pix,
            tiny_pipelines.text_to_image,
            tiny_pipelines.flux_kontext,
        )
    }


def edit(photos, teacher, out, *flags):
    """Flags of a small run with a diffusers teacher."""
    return (
        "--demo",
        "--images",
        photos,
        "--teacher",
        teacher,
        "--train",
        4,
        "--test",
        2,
        "--size",
        32,
        "--steps",
        2,
        "--concept",
        "sketch=turn it into a sketch",
        "--concept",
        "night=make it night",
        "--out",
        out,
        *flags,
    )


@pytest.fixture(scope="module")
def one_by_one(stage, photos, pipelines, tmp_path_factory):
    """InstructPix2Pix, one photo a call, one process."""
    out = tmp_path_factory.mktemp("one") / "pairs"
    stage(
        "01", *edit(photos, pipelines["instruct_pix2pix"], out, "--batch", 1), OMP_NUM_THREADS="1"
    )
    return out


def test_edits_do_not_depend_on_the_batch(here, one_by_one, photos, pipelines, tmp_path):
    here(*edit(photos, pipelines["instruct_pix2pix"], tmp_path / "four", "--batch", 4))
    for split, count in ("train", 4), ("test", 2):
        tables = [
            [{**row, "psnr": 0} for row in rows(folder, split)]
            for folder in (one_by_one, tmp_path / "four")
        ]
        assert tables[0] == tables[1] and len(tables[0]) == 2 * count
        for row in tables[0]:
            one, four = (
                pixels(folder / split / row["file_name"])
                for folder in (one_by_one, tmp_path / "four")
            )
            assert psnr(one, four) >= 45
    made = [pixels(one_by_one / "train" / row["file_name"]) for row in rows(one_by_one, "train")]
    assert all(
        psnr(a, b) < 40 for i, a in enumerate(made) for b in made[:i]
    )  # photo, prompt and noise matter


def test_two_processes_make_the_same_files(one_by_one, photos, pipelines, tmp_path, request):
    script = request.config.rootpath / "01_distill_pairs.py"
    flags = edit(photos, pipelines["instruct_pix2pix"], tmp_path / "pairs", "--batch", 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*torchrun, str(script), *map(str, flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert contents(tmp_path / "pairs") == contents(one_by_one)


def test_text_to_image_checkpoint_edits_image_to_image(here, error_of, photos, pipelines, tmp_path):
    line = error_of(
        "01", *edit(photos, pipelines["text_to_image"], tmp_path / "none", "--strength", 0.3)
    )
    assert "2 steps at strength 0.3 leave none" in line and not (tmp_path / "none").exists()
    far = {}
    for strength in (0.3, 1.0):
        out = tmp_path / str(strength)
        here(*edit(photos, pipelines["text_to_image"], out, "--strength", strength, "--steps", 10))
        assert json.loads((out / "concepts.json").read_text())["night"]["strength"] == strength
        far[strength] = [pixels(out / "train" / row["file_name"]) for row in rows(out, "train")]
    assert all(psnr(a, b) < 45 for a, b in zip(far[0.3], far[1.0]))


def test_flow_matching_editor(here, error_of, photos, pipelines, tmp_path):
    flags = edit(
        photos,
        pipelines["flux_kontext"],
        tmp_path / "pairs",
        "--teacher-size",
        48,
        "--save-memory",
        "slicing",
        "--argument",
        "max_sequence_length=16",
    )
    here(*flags, "--guidance", 2.5)
    assert Image.open(tmp_path / "pairs/train/night/00003.png").size == (32, 32)
    assert "guidance 2.5 there, 3.0 here" in error_of("01", *flags, "--guidance", 3)
    line = error_of(
        "01",
        *edit(
            photos,
            pipelines["flux_kontext"],
            tmp_path / "new",
            "--image-guidance",
            2,
            "--argument",
            "colour=1",
        ),
    )
    assert (
        "FluxKontextPipeline does not take --image-guidance, --argument colour" in line
        and "guidance_scale" in line
    )
    assert not (tmp_path / "new").exists()


def test_teachers_that_cannot_be_loaded(error_of, photos, pipelines, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in error_of("01", *edit(photos, tmp_path / "empty", tmp_path / "out"))
    line = error_of("01", *edit(photos, "nobody/no-such-model", tmp_path / "out"))
    assert "nobody/no-such-model cannot be loaded (a hub id needs the network once" in line
    pickled = tmp_path / "pickled"
    subprocess.run(["cp", "-r", pipelines["instruct_pix2pix"], pickled], check=True)
    (pickled / "unet/diffusion_pytorch_model.safetensors").rename(
        pickled / "unet/diffusion_pytorch_model.bin"
    )
    assert "safetensors" in error_of("01", *edit(photos, pickled, tmp_path / "out"))
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", pipelines["instruct_pix2pix"], broken], check=True)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be loaded" in error_of("01", *edit(photos, broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_safety_checker_and_wrong_counts(here, error_of, photos, tmp_path):
    """What the pipeline's safety checker blanked is kept aside."""

    def careful(images, name, prompt, seeds):
        edits = [image.copy() for image in images]
        for edit, seed in zip(edits, seeds):
            edit.info["unsafe"] = name == "night" and seed % 2 == 0
        return edits

    here(
        "--demo",
        "--train",
        12,
        "--test",
        6,
        "--out",
        tmp_path / "pairs",
        load_teacher=lambda args: careful,
    )
    result = json.loads((tmp_path / "pairs/result.json").read_text())
    refused = [
        row
        for split in ("train", "test")
        for row in map(
            json.loads, (tmp_path / f"pairs/rejected/{split}.jsonl").read_text().splitlines()
        )
    ]
    assert result["rejected"] == {"night": {"safety checker": len(refused)}} and refused
    assert all(row["seed"] % 2 == 0 and row["concept"] == "night" for row in refused)
    assert all(
        row["seed"] % 2 for row in rows(tmp_path / "pairs", "train") if row["concept"] == "night"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, and going on


def test_continues_after_kill(here, tmp_path, request):
    flags = ["--demo", "--size", "192", "--train", "16", "--test", "4"]
    here(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    script = request.config.rootpath / "01_distill_pairs.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *flags, "--out", str(out)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while len(list(out.glob("train/oil/*.png"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    (out / "train/oil/.00009.png.1.part").write_bytes(b"half a picture")
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(finished) > 20 and all(pixels(path).shape == (192, 192, 3) for path in finished)
    here(*flags, "--out", out)
    assert contents(out) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


def test_gate_moves_edits_without_making_them_anew(here, tmp_path):
    flags = (
        "--demo",
        "--train",
        8,
        "--test",
        4,
        "--clip",
        "ViT-S-32:random",
        "--out",
        tmp_path / "pairs",
        "--concept",
        "sepia=make it sepia",
        "--concept",
        "night=make it night",
    )
    here(*flags)
    before = contents(tmp_path / "pairs")
    scores = sorted(
        row["image_similarity"]
        for split in ("train", "test")
        for row in rows(tmp_path / "pairs", split)
    )
    assert len(scores) == 24 and all(-1 <= score <= 1 for score in scores)
    made = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "pairs/train/sepia").glob("*.png")
    }
    result = json.loads((tmp_path / "pairs/result.json").read_text())
    assert "stand-in CLIP (random weights)" in result["marks"] and not result["rejected"]

    limit = scores[3]
    here(*flags, "--min-image-similarity", limit)
    kept = [row for split in ("train", "test") for row in rows(tmp_path / "pairs", split)]
    result = json.loads((tmp_path / "pairs/result.json").read_text())
    assert sorted(row["image_similarity"] for row in kept) == [
        score for score in scores if score >= limit
    ]
    assert sum(row["image similarity"] for row in result["rejected"].values()) == 24 - len(kept) > 0
    aside = [path for path in (tmp_path / "pairs/rejected").rglob("*.png")]
    assert len(aside) == 24 - len(kept)
    for path in aside:
        assert not (tmp_path / "pairs" / path.relative_to(tmp_path / "pairs/rejected")).exists()
    folders = [tmp_path / "pairs/train/sepia", tmp_path / "pairs/rejected/train/sepia"]
    assert {
        path.name: path.stat().st_mtime_ns for folder in folders for path in folder.glob("*.png")
    } == made
    here(*flags)
    assert contents(tmp_path / "pairs") == before


def test_directional_similarity_is_that_of_the_changes(load_stage):
    """A stand-in CLIP whose pictures and texts are known vectors."""

    class Clip:
        def images(self, pixels):
            return pixels[:, :2, 0, 0].float() / 255

        def texts(self, texts):
            return torch.tensor([[0.0, 1.0] if text == "a photo" else [1.0, 1.0] for text in texts])

    photo, right, up = (
        Image.new("RGB", (8, 8), colour) for colour in ((0, 255, 0), (255, 255, 0), (0, 0, 0))
    )
    scores = load_stage("01").clip_scores(Clip(), [photo] * 3, [right, up, photo], "to the right")
    assert [score["directional_similarity"] for score in scores] == [1, 0, 0]
    assert [score["image_similarity"] for score in scores] == [1, 0, 1]


def test_preview_makes_only_the_sheet(here, error_of, tmp_path):
    here(*DEMO, "--preview", 3, "--out", tmp_path / "pairs")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["samples.png"]
    here(*DEMO, "--out", tmp_path / "pairs")  # the sheet is no obstacle
    assert (tmp_path / "pairs/result.json").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("...")
    for flags in (), ("--preview", 1), ("--overwrite",):
        assert "no stage made" in error_of("01", *DEMO, *flags, "--out", tmp_path / "foreign")
    assert os.listdir(tmp_path / "foreign") == ["thesis.tex"]


# ---------------------------------------------------------------------------------------------------------------------
# Photos as people have them


def test_photos_of_every_kind(here, tmp_path):
    folder, picture = tmp_path / "photos", scene(200, 120)
    (folder / "sub folder/.thumbnails").mkdir(parents=True)
    sideways = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    sideways.save(folder / "rotated.jpg", exif=exif, quality=98)
    picture.save(folder / "plain.JPG", quality=98)
    picture.save(folder / "plain.png")  # the same stem
    picture.save(folder / "sub folder/plain.webp", quality=98)
    picture.save(folder / "Фото 1 été.bmp")
    picture.convert("CMYK").save(folder / "print.jpg", quality=98)
    picture.quantize(256).save(folder / "palette.png")
    grey = picture.convert("L")
    grey.save(folder / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(np.asarray(grey).astype(np.float32) / 255).save(folder / "float.tif")
    glass = picture.convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(picture.size))
    glass.save(folder / "glass.png")
    picture.save(
        folder / "moving.gif", save_all=True, append_images=[scene(200, 120, seed=9)], duration=100
    )
    names = {
        "rotated.jpg",
        "plain.JPG",
        "plain.png",
        "sub folder/plain.webp",
        "Фото 1 été.bmp",
        "print.jpg",
        "palette.png",
        "grey.png",
        "grey16.png",
        "float.tif",
        "glass.png",
        "moving.gif",
    }
    bad = {"tiny.png", "cut.jpg", "text.png"}
    picture.resize((50, 30)).save(folder / "tiny.png")
    (folder / "cut.jpg").write_bytes((folder / "plain.JPG").read_bytes()[:3000])
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("left out without a word")
    picture.save(folder / "sub folder/.thumbnails/plain.png")
    raw = os.fsencode(folder) + b"/caf\xe9.png"  # a name in Latin-1
    try:
        picture.save(raw.decode(errors="surrogateescape"), format="PNG")
        names.add("caf\ufffd.png")
    except OSError:
        pass  # a file system that takes UTF-8 alone

    here(
        "--demo",
        "--images",
        folder,
        "--concept",
        "sepia=make it sepia",
        "--train",
        100,
        "--test",
        20,
        "--size",
        64,
        "--out",
        tmp_path / "pairs",
    )
    result = json.loads((tmp_path / "pairs/result.json").read_text())
    assert result["skipped"].keys() == bad and "smaller than 64" in result["skipped"]["tiny.png"]
    table = [(split, row) for split in ("train", "test") for row in rows(tmp_path / "pairs", split)]
    assert {row["photo"] for _, row in table} == names and len(table) == len(names)
    assert result["photos"]["test"] >= 2  # fewer than asked for, in the proportion of 5 to 1
    middle = picture.crop((40, 0, 160, 120)).resize((64, 64), Image.Resampling.LANCZOS)
    alpha = Image.linear_gradient("L").resize(picture.size).crop((40, 0, 160, 120)).resize((64, 64))
    alpha = np.asarray(alpha)[..., None] / 255
    for split, row in table:
        grey = row["photo"].startswith(("grey", "float"))
        wanted = np.asarray(middle.convert("L").convert("RGB") if grey else middle).astype(float)
        if row["photo"] == "glass.png":
            wanted = alpha * wanted + (1 - alpha) * 255
        assert psnr(pixels(tmp_path / "pairs" / split / row["source"]), wanted) > 25, row["photo"]


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
