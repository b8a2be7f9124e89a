"""How tests run a stage: as a user does, in a process of its own, or in this process where
start-up time would dominate. And the small inputs that they run it on."""

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in every process: another number rounds sums otherwise

import numpy as np  # noqa: E402  (torch and numpy read the line above)
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found through the path above)
import runs  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")
    config.option.loadscopereorder = False  # xdist would begin with the files of many short tests


def pytest_collection_modifyitems(items):
    """The longest files first, so that xdist's processes, which take whole files, end together."""
    longest = {"test_05_prune", "test_06_export", "test_killed"}
    items.sort(key=lambda item: item.path.stem not in longest)


def pytest_runtest_setup(item):
    """Tests marked slow are skipped unless -m speaks of them."""
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("slow: run it with -m slow")


def script(number: str) -> str:
    return str(next(ROOT.glob(f"{number}_*.py")))


def run_python(*command, cwd=None) -> str:
    """Runs Python in a process of its own. command: a script or -m and a module, then flags.
    Returns what it wrote to standard error."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def import_stage(number):
    """A numbered script as a module."""
    spec = importlib.util.spec_from_file_location(f"stage_{number}", script(number))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_stage():
    return import_stage


def run_main(stage, *flags) -> None:
    """Runs a stage in this process. stage: its module or its number."""
    module = import_stage(stage) if isinstance(stage, str) else stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        module.main()


def read_log(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(folder, title) -> list[dict]:
    """The rows of a table in a run's result.json."""
    return runs.read_json(folder / "result.json")["tables"][title]


def torchrun(file, *flags) -> None:
    """Runs a program in two processes that meet at a free port. DDP must not warn in each."""
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", file)
    assert "broadcast_buffers" not in run_python(*command, *flags)


@pytest.fixture
def error_of(capsys):
    """error_of("03", "--pairs", folder) runs a stage in this process and returns the `error:` line
    in which it must end, with status 2 and no traceback."""

    def call(number, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runs.run(lambda: run_main(number, *flags))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
        assert not any("Traceback" in line for line in lines), lines
        return lines[-1]

    return call


class Tower:
    """A stand-in for stage 1's Clip, whose vectors have two numbers that a reader can predict: how
    red a picture is, and how blue."""

    embedded = 0

    def __init__(self, name, device):
        self.name = name

    def check_prompts(self, concepts):
        pass

    def images(self, part):
        Tower.embedded += len(part)
        return torch.nn.functional.normalize(part[:, ::2].float().mean((2, 3)) + 1, dim=1)

    def text(self, text):
        return torch.tensor([0.6, 0.8]), torch.ones(len(text.split()), 2)


@pytest.fixture
def run_stage_1(load_stage, monkeypatch):
    """run_stage_1("--demo", ...) runs stage 1 in this process, with Tower as its CLIP and any other
    replacements."""

    def call(*flags, **patches):
        module = load_stage("01")
        for name, value in {"Clip": Tower, **patches}.items():
            monkeypatch.setattr(module, name, value)
        run_main(module, *flags)

    return call


def random_rows(key: str, rows: int) -> torch.Tensor:
    """(rows, 16) unit vectors, a function of the key alone."""
    rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=rng), dim=1)


@pytest.fixture(scope="session")
def write_pairs():
    """write_pairs(folder, {concept: edit}, train=12, test=4, size=32) writes a pairs folder as
    stage 1 does: smooth random photos, `edit` (H, W, 3 floats in 0..1) of each, and random
    features, the same for a concept's name in every folder. Returns the folder."""

    def write(folder, edits, train=12, test=4, size=32):
        rng, features = np.random.default_rng(0), {}
        for split, n in (("train", train), ("test", test)):
            for i in range(n):
                coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
                photo = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
                for name, edit in {"source": lambda x: x, **edits}.items():
                    pixels = (np.clip(edit(photo), 0, 1) * 255).round().astype(np.uint8)
                    runs.write_png(folder / split / name / f"{i:05}.png", Image.fromarray(pixels))
            for name in ("source", *edits):
                features[f"{split}/{name}"] = random_rows(f"{split}/{name}", n)
        features |= {f"tokens/{name}": random_rows(f"tokens/{name}", 4) for name in edits}
        path, metadata = folder / "features.safetensors", {"clip": "ViT-S-32:random"}
        runs.write_tensors(path, features, {"kind": "features", **metadata})
        prompts = {name: {"prompt": f"make it {name}"} for name in edits}
        runs.write_json(folder / "concepts.json", prompts)
        runs.write_json(folder / "result.json", {"marks": ["stand-in CLIP (random weights)"]})
        return folder

    return write


def write_adapter(path, base, name, ranks) -> None:
    """An adapter of random numbers {layer: rank}, as stage 4 writes it."""
    tensors = {"tokens": random_rows(f"tokens/{name}", 4).half()}
    for layer, rank in ranks.items():
        module, rng = base.get_submodule(layer), torch.Generator().manual_seed(rank)
        out = len(module.bias)
        a = torch.randn(rank, module.weight.numel() // out, generator=rng)
        b = 0.1 * torch.randn(out, rank, generator=rng)
        tensors |= {f"{layer}.lora_A": a.half(), f"{layer}.lora_B": b.half()}
    about = {"kind": "adapter", "base": base.sha256, "alpha": 16.0, "ranks": ranks}
    runs.write_tensors(path, tensors, {**about, "name": name, "prompt": f"make it {name}"})


@pytest.fixture(scope="session")
def good(tmp_path_factory, write_pairs):
    """Pairs of two concepts, clusters, a base that knows the first, an adapter for the second."""
    root = tmp_path_factory.mktemp("good")
    edits = {"dark": lambda x: 0.3 * x, "inverted": lambda x: 1 - x}
    write_pairs(root / "pairs", edits, train=4, test=2)
    runs.write_json(root / "clusters/concepts.json", {"base": ["dark"], "new": ["inverted"]})
    torch.manual_seed(0)
    dark, tokens = [{"name": "dark", "prompt": "make it dark"}], [random_rows("tokens/dark", 4)]
    base = common.new_generator("e2gan", 8, 32, dark, tokens, "ViT-S-32:random")
    common.save_network(root / "base.safetensors", base)
    common.save_network(root / "discriminator.safetensors", common.new_discriminator(base))
    base = common.load_generator(root / "base.safetensors")
    write_adapter(root / "adapter.safetensors", base, "inverted", {"down1.conv": 2, "up1.conv": 2})
    return root
