"""Bad input to stages 3 to 5 ends in one `error:` line that names the file, with status 2 and nothing written."""

import re
import shutil

import pytest
import torch

import common


@pytest.fixture
def world(good, tmp_path):
    shutil.copytree(good, tmp_path / "w")
    return tmp_path / "w"


def flags(world, number):
    """A complete command for each stage, to be made bad in one way."""
    source = {
        "03": ["--clusters", world / "clusters", "--width", 8, "--clip", "ViT-S-32:random"],
        "04": ["--clusters", world / "clusters", "--base", world / "base.safetensors"],
        "05": ["--generator", world / "base.safetensors"],
    }[number]
    return [
        "--pairs",
        world / "pairs",
        *source,
        "--epochs",
        1,
        "--batch",
        4,
        "--out",
        world / "out",
    ]


def rewrite_concepts(world, text):
    (world / "pairs/concepts.json").write_text(text)


def resize_all(world, size):
    for path in world.rglob("*.png"):
        common.write_png(path, common.to_pil(common.read_image(path)).resize((size, size)))


BAD_PAIRS = {
    "no folder": (lambda w: shutil.rmtree(w / "pairs"), "pairs does not exist"),
    "no concepts.json": (
        lambda w: (w / "pairs/concepts.json").unlink(),
        "concepts.json does not exist",
    ),
    "broken concepts.json": (lambda w: rewrite_concepts(w, "{'a': 1"), "concepts.json is not JSON"),
    "a list for concepts.json": (lambda w: rewrite_concepts(w, "[]"), "should hold a JSON dict"),
    "no concept": (lambda w: rewrite_concepts(w, "{}"), "names no concept"),
    "a concept without prompt": (
        lambda w: rewrite_concepts(w, '{"dark": {"prompt": " "}, "inverted": {}}'),
        "'dark' has no prompt",
    ),
    "an edit missing": (
        lambda w: (
            (w / "pairs/train/dark/00001.png").unlink()
            or (w / "pairs/train/inverted/00001.png").unlink()
        ),
        "photos and edits do not match.*00001.png",
    ),
    "an edit too many": (
        lambda w: [
            shutil.copy(w / f"pairs/train/{c}/00001.png", w / f"pairs/train/{c}/x.png")
            for c in ("dark", "inverted")
        ],
        "photos and edits do not match.*x.png",
    ),
    "a photo missing": (
        lambda w: (w / "pairs/train/source/00002.png").unlink(),
        "photos and edits do not match.*source lacks 00002.png",
    ),
    "a picture that is none": (
        lambda w: [
            (w / f"pairs/test/{c}/00000.png").write_bytes(b"GIF89a") for c in ("dark", "inverted")
        ],
        "00000.png is not a picture",
    ),
    "a picture of another size": (
        lambda w: [
            common.write_png(
                w / f"pairs/train/{c}/00000.png",
                common.to_pil(torch.zeros(3, 40, 40, dtype=torch.uint8)),
            )
            for c in ("dark", "inverted")
        ],
        "00000.png is 40x40",
    ),
    "no metadata": (
        lambda w: (w / "pairs/train/metadata.jsonl").unlink(),
        "metadata.jsonl does not exist",
    ),
    "broken metadata": (
        lambda w: (w / "pairs/train/metadata.jsonl").write_text('{"file": 1}\n'),
        "metadata.jsonl is broken",
    ),
    "a size that is no multiple of 8": (lambda w: resize_all(w, 36), "36x36.*multiple of 8"),
}


@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize("change, words", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs(world, error_of, number, change, words):
    change(world)
    line = error_of(number, *flags(world, number))
    assert re.search(words, line), line
    assert not (world / "out").exists()


BAD_FLAGS = [
    ("03", ["--concept", "nosuch"], "no concept 'nosuch'; it has dark, inverted"),
    ("04", ["--concept", "nosuch"], "no concept 'nosuch'"),
    ("05", ["--concept", "inverted"], "unknown concept 'inverted'; this generator knows dark"),
    ("03", ["--clusters", "nowhere"], "nowhere/concepts.json does not exist"),
    ("03", ["--arch", "vgg"], "invalid choice"),
    ("03", ["--batch", "0"], "--batch 0: give a number above 0"),
    ("03", ["--epochs", "-1"], "--epochs -1: give a number above 0"),
    ("03", ["--save-every", "0"], "--save-every 0"),
    ("03", ["--eval-every", "0"], "--eval-every 0"),
    ("03", ["--lr", "nan"], "--lr nan"),
    ("03", ["--width", "0"], "--width 0"),
    ("03", ["--seed", str(10**20)], "--seed 1000"),
    ("04", ["--steps", "-5"], "--steps -5"),
    ("04", ["--probe-steps", "0"], "--probe-steps 0"),
    ("04", ["--rank", "\u00b2"], "give a number from 1 on"),
    (
        "04",
        ["--mode", "full", "--rank", "auto"],
        "--rank auto and --layers search are for --mode lora",
    ),
    ("05", ["--search-epochs", "0"], "--search-epochs 0"),
    ("03", ["--epochs", "x"], "invalid int"),
    ("03", ["--clip", "ViT-S-32"], "not MODEL:WEIGHTS"),
    ("03", ["--clip", "NoSuchModel:random"], "not MODEL:WEIGHTS"),
    ("03", ["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ("04", ["--base", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ("04", ["--samples", "nowhere.txt"], "nowhere.txt does not exist"),
    ("04", ["--layers", "down1,nosuch"], "no layer group 'nosuch'; this generator has stem, down1"),
    ("04", ["--rank", "0"], "--rank 0"),
    ("04", ["--samples", "random:99"], "--samples random:99: give a number from 1 to 4"),
    (
        "05",
        ["--generator", "nowhere.safetensors"],
        "nowhere.safetensors: neither a file nor one of",
    ),
    ("05", ["--keep", "1.5"], "--keep 1.5"),
]


@pytest.mark.parametrize("number, more, words", BAD_FLAGS)
def test_bad_flags(world, error_of, number, more, words):
    assert words in error_of(number, *flags(world, number), *more)
    assert not (world / "out").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def other_architecture(path):
    tensors, metadata = common.read_tensors(path, "generator")
    common.write_tensors(
        path, tensors, {**metadata, "config": {**metadata["config"], "arch": "vgg"}}
    )


def not_ours(path):
    common.write_tensors(path, {"weight": torch.zeros(3)}, {})


@pytest.mark.parametrize("number", ["04", "05"])
@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, "base.safetensors is truncated"),
        (not_ours, "base.safetensors is no generator"),
        (other_architecture, "base.safetensors: unknown architecture 'vgg'"),
    ],
)
def test_bad_checkpoints(world, error_of, number, damage, words):
    damage(world / "base.safetensors")
    assert words in error_of(number, *flags(world, number))
    assert not (world / "out").exists()


def test_a_folder_that_holds_another_run_is_kept(world, error_of):
    common.write_json(world / "out/settings.json", {"stage": "03_train_base", "lr": 0.5})
    common.write_text(world / "out/precious.txt", "x")
    line = error_of("03", *flags(world, "03"))
    assert "other settings" in line and "--overwrite" in line
    assert sorted(path.name for path in (world / "out").iterdir()) == [
        "precious.txt",
        "settings.json",
    ]


def test_clip_without_network_names_the_stand_in(world, error_of, monkeypatch):
    monkeypatch.setattr(
        "open_clip.create_model", lambda *_: (_ for _ in ()).throw(RuntimeError("no route to host"))
    )
    line = error_of("03", *flags(world, "03"), "--clip", "ViT-B-32:openai")
    assert "no route to host" in line and "ViT-S-32:random" in line
