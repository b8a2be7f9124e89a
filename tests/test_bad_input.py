"""Bad input to stages 3 to 5 ends in one `error:` line that names the file, with status 2; even
with --overwrite it leaves what an earlier run made."""

import shutil

import pytest
import torch

import dataset
import runs

SOURCE = {
    "03": "--clusters W/clusters --width 8",
    "04": "--clusters W/clusters --base W/base.safetensors",
    "05": "--generator W/base.safetensors",
}


@pytest.fixture
def refused(good, error_of, tmp_path):
    """refused("03 --lr 0", change) -> the error line, after change(root) of good input."""
    root, earlier = tmp_path / "w", []
    shutil.copytree(good, root)
    for folder in ("out", "out/dark", "out/inverted"):
        earlier += [root / folder / "result.json", root / folder / "settings.json"]
    for path in earlier:
        runs.write_json(path, {})

    def call(text, change=None):
        if change:
            change(root)
        number, *flags = text.split()
        data = "--pairs W/pairs --cache W/cache --epochs 1 --batch 4 --fid off --out W/out"
        command = f"{data} {SOURCE[number]} --overwrite".replace("W/", f"{root}/").split()
        line = error_of(number, *command, *flags)
        assert sorted(root.glob("out/**/*.*")) == sorted(earlier)
        return line

    return call


def rewrite(name, text):
    """Of a file: other bytes, or none at all."""

    def change(root):
        for path in root.glob(name):
            path.unlink() if text is None else path.write_bytes(text)

    return change


def resize(name, size):
    def change(root):
        for path in root.glob(name):
            runs.write_png(path, dataset.to_pil(dataset.read_image(path)).resize((size, size)))

    return change


TRAIN, CONCEPTS = "pairs/train", "pairs/concepts.json"
BAD_PAIRS = {
    "concepts.json does not exist; 01_distill_pairs.py makes it": rewrite(CONCEPTS, None),
    "concepts.json cannot be read as JSON": rewrite(CONCEPTS, b"{'a': 1"),
    "should hold a JSON dict": rewrite(CONCEPTS, b"[]"),
    "names no concept": rewrite(CONCEPTS, b"{}"),
    "has no prompt": rewrite(CONCEPTS, b'{"dark": {"prompt": " "}, "inverted": {}}'),
    "holds no edits": rewrite("pairs/test/[di]*/*", None),
    "source lacks 00002.png": rewrite(f"{TRAIN}/source/00002.png", None),
    "00003.png is not a picture": rewrite(f"{TRAIN}/*/00003.png", b"GIF89a"),
    "00003.png is 40x40": resize(f"{TRAIN}/*/00003.png", 40),
    "36 pixels; the networks need a multiple of 8": resize(f"{TRAIN}/*/*.png", 36),
}


@pytest.mark.parametrize("number", SOURCE)
@pytest.mark.parametrize("words", BAD_PAIRS)
def test_bad_pairs(refused, number, words):
    assert words in refused(number, BAD_PAIRS[words])


@pytest.mark.parametrize("number", ["03", "04"])
def test_bad_features(refused, number):
    def empty(root):
        path = root / "pairs/features.safetensors"
        runs.write_tensors(path, {}, runs.read_tensors(path, "features")[1])

    gone = "features.safetensors does not exist; 01_distill_pairs.py makes it"
    assert "features.safetensors lacks" in refused(number, empty)
    assert gone in refused(number, rewrite("pairs/features.safetensors", None))


BAD_FLAGS = [
    ("03 --concept nosuch", "no concept 'nosuch'; it has dark, inverted"),
    ("04 --concept nosuch", "no concept 'nosuch'"),
    ("05 --concept inverted", "unknown concept 'inverted'; this generator knows dark"),
    ("03 --clusters nowhere", "nowhere/concepts.json does not exist; 02_cluster.py makes it"),
    ("03 --arch unet256 --concept dark --concept inverted", "learns one --concept"),
    ("03 --no-text --concept dark --concept inverted", "learns one --concept"),
    ("03 --arch vgg", "argument --arch: invalid choice"),
    ("03 --batch 0", "argument --batch: 0: give a number from 1"),
    ("03 --batch 3 --accumulate 2", "--batch 3 cannot be shared evenly by 1 processes, --acc"),
    ("04 --batch 3 --accumulate 2", "--batch 3 cannot be shared evenly"),
    ("05 --batch 3 --accumulate 2", "--batch 3 cannot be shared evenly"),
    ("03 --epochs x", "argument --epochs: invalid"),
    ("03 --lr nan", "argument --lr: nan: give a number above 0"),
    ("03 --l1 -1", "argument --l1: -1: give a number from 0"),
    ("03 --seed 99999999999", "argument --seed: 99999999999: give a number from 0 to 2147483647"),
    ("03 --device cuda:99", "--device cuda:99 cannot be used"),
    ("03 --blocks rb,tb,tb", "--blocks rb,tb,tb: e2gan and resnet9 take rb and"),
    ("03 --wdith 8", "unrecognized arguments: --wdith 8 (--help lists the flags)"),
    ("04 --rank \u00b2", "--rank"),
    ("04 --base nowhere.safetensors", "nowhere.safetensors does not exist"),
    ("04 --samples nowhere.txt", "nowhere.txt"),
    (
        "04 --mode full --start-from gradient",
        "--mode full trains all weights: --start-from is for --mode",
    ),
    ("04 --layers all --l1 0 --perceptual 0", "--start-from gradient needs --l1 or --perceptual"),
    ("04 --layers down1,nosuch", "this generator's stem, down1"),
    ("04 --samples random:99", "--samples random:99: give a number from 1 to 4"),
    ("04 --samples random:0", "from 1 to 4"),
    ("05 --keep 1.5", "--keep"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(refused, flags, words):
    assert words in refused(flags)


@pytest.mark.parametrize("number", ["03", "04"])
def test_missing_pairs_are_named_before_missing_clusters(error_of, tmp_path, number):
    nowhere = [f"--{name}={tmp_path / name}" for name in ("pairs", "clusters", "base", "out")]
    if number == "03":
        nowhere.pop(2)
    assert "pairs/concepts.json does not exist; 01_distill" in error_of(number, *nowhere)


def rewrite_base(tensors=None, **config):
    def change(root):
        path = root / "base.safetensors"
        found, metadata = runs.read_tensors(path, "generator")
        metadata["config"] |= config
        runs.write_tensors(path, tensors or found, metadata if tensors is None else {})

    return change


BAD_CHECKPOINTS = {
    "or truncated": rewrite("base.safetensors", (200).to_bytes(8, "little") + b"{}"),
    "is no generator": rewrite_base({"weight": torch.zeros(3)}),
    "unknown architecture 'vgg'": rewrite_base(arch="vgg"),
}


@pytest.mark.parametrize("number", ["04", "05"])
@pytest.mark.parametrize("words", BAD_CHECKPOINTS)
def test_bad_checkpoints(refused, number, words):
    line = refused(number, BAD_CHECKPOINTS[words])
    assert words in line and "base.safetensors" in line


@pytest.mark.parametrize("number", ["04", "05"])
def test_a_base_without_its_discriminator(refused, number):
    line = refused(number, rewrite("discriminator.safetensors", None))
    assert "discriminator.safetensors does not exist: --new-discriminator starts one" in line
