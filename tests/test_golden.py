"""Golden values: with one seed the code draws, orders and trains as when golden.json was recorded.

    python tests/test_golden.py        records golden.json anew, from the code at hand

The numbers hold within a tolerance on other CPUs and other versions of torch. Nothing here has
dropout: its draws differ between builds of torch.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import import_stage, read_log, run_main
from PIL import Image
from safetensors.torch import load_file

import common
import dataset
import runs

GOLDEN = Path(__file__).with_name("golden.json")
TEXT = {"text_dim": 16, "tokens": 5, "clip": "x"}
EDITS = {"dark": lambda x: x // 3, "inverted": lambda x: 255 - x, "warm": lambda x: x[..., ::-1]}
# a seed at which no choice of channels hangs by rounding
ALL = "--pairs pairs --device cpu --precision fp32 --fid off --save-every 1 --seed 4"
ALL = f"{ALL} --fm 0 --perceptual 0"
BASE = "--concept dark --concept inverted --width 8"
CYCLEGAN = (
    "--task cyclegan --concept dark --width 4 --batch 28 --search-epochs 2 --start-from paper"
)
DCGAN = (
    "--task dcgan --data pairs/train --size 32 --width 4 --prune-discriminator --start-from paper"
)
SLOW = "--lr 2e-5 --lr-d 2e-5"  # a step of Adam magnifies rounding
SEARCH = f"{SLOW} --lr-search 1e-5 --lr-z 1e-3"
FILE = "base/generator.safetensors --new-discriminator"
RUNS = {
    "base": f"03 {BASE} --batch 4 --epochs 1 {SLOW}",
    "dcgan": f"05 {DCGAN} --batch 7 --keep 0.5 --search-epochs 1 --epochs 2 --lr-z 1e-2",
    "cyclegan": f"05 {CYCLEGAN} --keep 0.5 --epochs 1 {SEARCH}",
    "lora": f"04 --base {FILE} --concept warm --samples all --batch 4 --steps 3 {SLOW}",
    "pruned": f"05 --generator {FILE} --batch 4 --keep 0.5 --search-epochs 1 --epochs 1 {SEARCH}",
}


def make_pairs(folder):
    """Stage 1's folder: three concepts, 6 + 2 photos of coarse squares, prompts' features."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 6), ("test", 2)):
        coarse = rng.randint(0, 256, (count, 4, 4, 3), np.uint8)
        noise = rng.randint(0, 128, (count, 32, 32, 3), np.uint8)
        photos = coarse.repeat(8, 1).repeat(8, 2) // 2 + noise
        for name, edit in {"source": lambda x: x, **EDITS}.items():
            (folder / split / name).mkdir(parents=True)
            for i, photo in enumerate(photos):
                Image.fromarray(edit(photo)).save(folder / split / name / f"{i}.png")
    prompts = {name: {"prompt": f"make it {name}"} for name in EDITS}
    runs.write_json(folder / "concepts.json", prompts)
    clip = import_stage("01").Clip("ViT-S-32:random", torch.device("cpu"))
    tokens = {f"tokens/{name}": clip.text(prompts[name]["prompt"])[1] for name in EDITS}
    about = {"kind": "features", "clip": clip.name}
    runs.write_tensors(folder / "features.safetensors", tokens, about)
    return folder


def numbers(tensor):
    """What is kept of a tensor: its first value, its mean, the sum of its absolute values."""
    x = tensor.detach().double().flatten()
    return [x[0].item(), x.mean().item(), x.abs().sum().item()]


def parameters(network):
    """The numbers of all parameters but those that are 0 throughout."""
    return {name: numbers(p) for name, p in network.named_parameters() if p.any()}


def build(arch, blocks=None, **text):
    """A small generator of one seed."""
    torch.manual_seed(3)
    concepts = [{"name": "dark", "prompt": "make it dark"}]
    return common.build_network(common.generator_config(arch, 8, 32, concepts, blocks, **text))


def networks(folder):
    """The weights that every network starts from, and so the order in which its layers draw."""
    made = {name: build(name) for name in ("e2gan", "resnet9", "unet256")}
    made["e2gan with text"] = build("e2gan", **TEXT)
    for name in ("unet256", "resnet9", "e2gan with text"):
        torch.manual_seed(4)
        made[f"{name}, D"] = common.new_discriminator(made[name], photo=name != "resnet9")
    torch.manual_seed(3)
    dcgan = common.dcgan_networks(8, 32)
    torch.manual_seed(4)
    made["dcgan, D"] = common.build_network(dcgan["discriminator"].config)
    made["dcgan"] = dcgan["generator"]
    return {name: parameters(network) for name, network in made.items()}


def hypernetworks(folder):
    """Both starts of hypernetworks, for given latents: their numbers, the weights they make."""
    found = {}
    for trained in (True, False):
        network = build("e2gan", ["tb"], **TEXT)
        widths = common.all_widths(network.config)
        latents = {group: torch.linspace(0.2, 1, n) for group, n in widths.items()}
        common.add_hypernetwork(network, latents, trained)
        made = {name: numbers(layer.weight) for name, layer in common.named_layers(network)}
        found[f"trained {trained}"] = {"parameters": parameters(network), "made": made}
    return found


def lora(folder):
    """LoRA's start, row by row of A and without signs, which the SVD leaves open; B is 0."""
    generator = build("e2gan", **TEXT)
    ranks = {"stem.conv": 4, "down2.conv": 2, "blocks.tb.feed1": 2, "up1.conv": 3, "films.up1": 1}
    starts = import_stage("04").add_lora(generator, ranks, 16.0)
    return [[list(map(abs, numbers(row))) for row in matrix] for matrix in starts if matrix.any()]


def picks(folder):
    """The order of batches: rows of concept, photo, and whether it is mirrored."""
    drawn = [dataset.draw_picks([7], 2, 5, 3), dataset.draw_picks([5, 3], 4, 1, 0)]
    drawn.append(dataset.draw_picks([4, 9, 2], 8, 2, 7))
    return [torch.cat([chosen, flips[:, None]], 1).tolist() for chosen, flips in drawn]


def batches(folder):
    """Three steps across an epoch's end, in one process and in two: both halves of each picture."""
    pairs = dataset.find_pairs(make_pairs(folder / "pairs"), "train", ["dark", "inverted"])
    pairs.cache(folder)
    device, found = torch.device("cpu"), {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        found[f"process {rank} of {world}"] = steps = []
        for *pictures, concept in pairs.batches(4, range(1, 4), 3, device):
            halves = torch.stack(pictures).unflatten(4, (2, 16)).mean((2, 3, 5))
            steps.append([concept.tolist(), halves.tolist()])
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return found


def run(name, folder):
    """A stage. The losses of its steps, and its MACs while it prunes."""
    with contextlib.chdir(folder):
        run_main(*f"{RUNS[name]} --out {name} {ALL}".split())
    found = {}
    for path in sorted((folder / name).rglob("*.jsonl")):
        rows = [row for row in read_log(path) if "error" not in row]
        rows = [{k: v for k, v in row.items() if k != "FM"} for row in rows]
        found[path.stem.removesuffix("-log")] = rows
    return found


def training(folder):
    """The first steps of stages 3, 4 and 5 (the second fills CycleGAN's pools), and two files.

    No biases of the files: a norm erases most, and rounding alone trains those."""
    make_pairs(folder / "pairs")
    found = {name: run(name, folder) for name in RUNS}
    for name in ("base", "pruned"):
        tensors = load_file(folder / name / "generator.safetensors").items()
        found[f"{name} weights"] = {key: numbers(x) for key, x in tensors if "bias" not in key}
    return found


PARTS = {part.__name__: part for part in (networks, hypernetworks, lora, picks, batches, training)}


def near(key, number):
    """A recorded number with what it may be off by: one channel in the MACs, rounding elsewhere."""
    rel, off = (1e-3, 1e-4) if key.startswith(("training", "lora")) else (1e-5, 1e-7)
    return pytest.approx(number, rel=0.02 if "MACs %" in key else rel, abs=off)


def flat(value, prefix):
    """Nested dictionaries and lists as {"a/b/0": number}."""
    if not isinstance(value, dict | list):
        return {prefix: value}
    found = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found |= flat(part, f"{prefix}/{key}")
    return found


@pytest.mark.parametrize("part", PARTS)
def test_golden(part, tmp_path):
    """Each part's docstring says what it fixes."""
    wanted = flat(json.loads(GOLDEN.read_text())[part], part)
    found = flat(PARTS[part](tmp_path), part)
    assert found == {key: near(key, number) for key, number in wanted.items()}


def record():
    """Writes golden.json, seven digits a number."""
    found = {}
    for name, part in PARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = part(Path(folder))
    found = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}"))
    GOLDEN.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    record()
