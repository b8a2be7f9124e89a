"""How tests run a stage: as a user does, in a process of its own, or in this process where start-up time would dominate."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    """Tests marked slow are left out unless -m speaks of them."""
    if "slow" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)


def script(number: str) -> Path:
    return next(ROOT.glob(f"{number}_*.py"))


@pytest.fixture(scope="session")
def stage():
    """stage("03", "--demo", ..., cwd=folder) runs a stage and returns its CompletedProcess; status 0 unless told otherwise."""

    def call(number, *flags, cwd=None, status=0, **environment):
        done = subprocess.run(
            [sys.executable, str(script(number)), *map(str, flags)],
            cwd=cwd,
            text=True,
            capture_output=True,
            env={**os.environ, **environment},
            timeout=600,
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def load_stage():
    """load_stage("01") imports a numbered script as a module."""

    def load(number):
        spec = importlib.util.spec_from_file_location(f"stage_{number}", script(number))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def error_of(load_stage, monkeypatch, capsys):
    """error_of("03", "--pairs", folder) runs a stage in this process, asserts that it ends in one `error:` line and
    status 2 without a traceback, and returns that line."""

    def call(number, *flags):
        import common

        monkeypatch.setattr(sys, "argv", [str(script(number)), *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(load_stage(number).main)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2
        assert (
            lines
            and lines[-1].startswith("error: ")
            and not any("Traceback" in line for line in lines)
        ), lines
        return lines[-1]

    return call


@pytest.fixture(scope="session")
def write_pairs():
    """write_pairs(folder, {concept: edit}, train=12, test=4, size=32) writes a pairs folder as stage 1 does: smooth random
    photos, and `edit` (H, W, 3 floats in 0..1) of each."""

    def write(folder, edits, train=12, test=4, size=32):
        import common

        rng = np.random.default_rng(0)
        for split, n in (("train", train), ("test", test)):
            rows = []
            for i in range(n):
                coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
                photo = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
                for name, edit in {"source": lambda x: x, **edits}.items():
                    pixels = (np.clip(edit(photo), 0, 1) * 255).round().astype(np.uint8)
                    common.write_png(folder / split / name / f"{i:05}.png", Image.fromarray(pixels))
                    if name != "source":
                        rows.append(
                            {
                                "file_name": f"{name}/{i:05}.png",
                                "source": f"source/{i:05}.png",
                                "concept": name,
                            }
                        )
            common.write_text(
                folder / split / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
            )
        common.write_json(
            folder / "concepts.json", {name: {"prompt": f"make it {name}"} for name in edits}
        )
        return folder

    return write


@pytest.fixture(scope="session")
def good(tmp_path_factory, write_pairs):
    """Pairs of two concepts, clusters, a base that knows the first, an adapter for the second."""
    import common
    import torch

    root = tmp_path_factory.mktemp("good")
    write_pairs(
        root / "pairs", {"dark": lambda x: 0.3 * x, "inverted": lambda x: 1 - x}, train=4, test=2
    )
    common.write_json(root / "clusters/concepts.json", {"base": ["dark"], "new": ["inverted"]})
    torch.manual_seed(0)
    config = common.generator_config(
        "e2gan",
        8,
        32,
        [{"name": "dark", "prompt": "make it dark"}],
        tokens=4,
        text_dim=16,
        clip="ViT-S-32:random",
    )
    common.save_network(root / "base.safetensors", common.build_network(config))
    base = common.load_generator(root / "base.safetensors")
    common.add_concept(base, "inverted", "invert it", torch.randn(3, 16))
    common.add_lora(base, {"down1.conv": 2, "up1.conv": 2}, 16.0)
    common.save_adapter(root / "adapter.safetensors", base, "inverted", base.sha256, 16.0)
    return root
