"""Bad input to stages 3 to 5 ends in one `error:` line that names the file, with status 2 and
nothing overwritten."""

import shutil

import pytest
import torch

import common


@pytest.fixture
def world(good, tmp_path):
    shutil.copytree(good, tmp_path / "w")
    return tmp_path / "w"


def command(number: str, root) -> list[str]:
    """A complete command of each stage, to be made bad in one way."""
    source = {
        "03": f"--clusters {root}/clusters --width 8",
        "04": f"--clusters {root}/clusters --base {root}/base.safetensors",
        "05": f"--generator {root}/base.safetensors",
    }[number]
    data = f"--pairs {root}/pairs --cache {root}/cache --epochs 1 --batch 4 --fid off"
    return f"{data} {source} --out {root}/out".split()


def change_all(root, name: str, change):
    """Calls change(path) for this picture of every folder, or of `source` alone."""
    for path in root.glob(f"pairs/train/{name}"):
        change(path)


def resize(path, size):
    common.write_png(path, common.to_pil(common.read_image(path)).resize((size, size)))


def write_concepts(text):
    return lambda root: (root / "pairs/concepts.json").write_text(text)


BAD_PAIRS = {
    "concepts.json does not exist; 01_distill_pairs.py makes it": lambda w: shutil.rmtree(
        w / "pairs"
    ),
    "concepts.json is not JSON": write_concepts("{'a': 1"),
    "should hold a JSON dict": write_concepts("[]"),
    "names no concept": write_concepts("{}"),
    "has no prompt": write_concepts('{"dark": {"prompt": " "}, "inverted": {}}'),
    "holds no edits": lambda w: [
        shutil.rmtree(w / f"pairs/test/{c}") for c in ("dark", "inverted")
    ],
    "source lacks 00002.png": lambda w: change_all(w, "source/00002.png", lambda p: p.unlink()),
    "00003.png is not a picture": lambda w: change_all(
        w, "*/00003.png", lambda p: p.write_bytes(b"GIF89a")
    ),
    "00003.png is 40x40": lambda w: change_all(w, "*/00003.png", lambda p: resize(p, 40)),
    "36 pixels; the networks need a multiple of 8": lambda w: change_all(
        w, "*/*.png", lambda p: resize(p, 36)
    ),
}


@pytest.mark.parametrize("number", ["03", "04", "05"])
@pytest.mark.parametrize("words", BAD_PAIRS)
def test_bad_pairs(world, error_of, number, words):
    BAD_PAIRS[words](world)
    assert words in error_of(number, *command(number, world))
    assert not list(world.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("number", ["03", "04"])
def test_bad_features(world, error_of, number):
    path = world / "pairs/features.safetensors"
    tensors, metadata = common.read_tensors(path, "features")
    for tensors, words in ({}, "lacks"), (None, "does not exist; 01_distill_pairs.py makes it"):
        if tensors is None:
            path.unlink()
        else:
            common.write_tensors(path, tensors, metadata)
        assert f"features.safetensors {words}" in error_of(number, *command(number, world))
        assert not (world / "out").exists()


BAD_FLAGS = [
    ("03 --concept nosuch", "no concept 'nosuch'; it has dark, inverted"),
    ("04 --concept nosuch", "no concept 'nosuch'"),
    ("05 --concept inverted", "unknown concept 'inverted'; this generator knows dark"),
    ("03 --clusters nowhere", "nowhere/concepts.json does not exist; 02_cluster.py makes it"),
    ("03 --arch vgg", "argument --arch: invalid choice"),
    ("03 --batch 0", "argument --batch: 0: give a number from 1"),
    ("03 --epochs -1", "argument --epochs: -1: give a number from 1"),
    ("03 --epochs x", "argument --epochs: invalid"),
    ("03 --lr nan", "argument --lr: nan: give a number above 0"),
    ("03 --l1 -1", "argument --l1: -1: give a number from 0"),
    ("03 --seed 99999999999", "argument --seed: 99999999999: give a number from 0 to 2147483647"),
    ("03 --device cuda:99", "--device cuda:99 cannot be used"),
    ("03 --blocks rb,tb,tb", "--blocks rb,tb,tb: e2gan and resnet9 take rb and"),
    ("03 --wdith 8", "unrecognized arguments: --wdith 8 (--help lists the flags)"),
    ("04 --steps -5", "--steps"),
    ("04 --rank \u00b2", "--rank"),
    ("04 --rank 0", "--rank"),
    ("04 --base nowhere.safetensors", "nowhere.safetensors does not exist"),
    ("04 --samples nowhere.txt", "nowhere.txt"),
    ("04 --layers down1,nosuch", "this generator's stem, down1"),
    ("04 --samples random:99", "--samples random:99: give a number from 1 to 4"),
    ("05 --generator nowhere.safetensors", "nowhere.safetensors"),
    ("05 --keep 1.5", "--keep"),
    ("05 --search-epochs 0", "--search-epochs"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(world, error_of, flags, words):
    number, *flags = flags.split()
    assert words in error_of(number, *command(number, world), *flags)
    assert not (world / "out").exists()


def rewrite(path, tensors=None, **config):
    found, metadata = common.read_tensors(path, "generator")
    metadata["config"] |= config
    common.write_tensors(path, tensors or found, metadata if tensors is None else {})


BAD_CHECKPOINTS = {
    "or truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "is no generator": lambda path: rewrite(path, {"weight": torch.zeros(3)}),
    "unknown architecture 'vgg'": lambda path: rewrite(path, arch="vgg"),
}


@pytest.mark.parametrize("number", ["04", "05"])
@pytest.mark.parametrize("words", BAD_CHECKPOINTS)
def test_bad_checkpoints(world, error_of, number, words):
    BAD_CHECKPOINTS[words](world / "base.safetensors")
    line = error_of(number, *command(number, world))
    assert words in line and "base.safetensors" in line and not (world / "out").exists()


def test_a_folder_that_holds_another_run_is_kept(world, error_of):
    common.write_json(world / "out/settings.json", {"stage": "03_train_base", "lr": 0.5})
    common.write_text(world / "out/precious.txt", "x")
    line = error_of("03", *command("03", world))
    assert f"{world}/out holds" in line and "--overwrite" in line
    assert {path.name for path in (world / "out").iterdir()} == {"precious.txt", "settings.json"}
