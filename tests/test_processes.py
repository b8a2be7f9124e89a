"""Two processes train as one: in every stage the gradients of a step of torchrun's two processes,
who share out its batch, are those of one process."""

import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import run_main, torchrun
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser
from torch.optim.optimizer import register_optimizer_step_pre_hook

import runs
import training

# Rates so small that what is rounded otherwise in one step does not show in the next.
EVERY = "--device cpu --precision fp32 --fid off --perceptual 0 --lr 1e-6 --lr-d 1e-6"
NEW = "--base W/base.safetensors --concept inverted --samples all --batch 4 --steps 1"
PRUNE = "--keep 0.5 --steps 2 --search-epochs 1 --epochs 1 --lr-search 1e-6 --prune-discriminator"
CASES = {
    "03": "03 --pairs W/pairs --clusters W/clusters --width 8 --batch 4 --steps 1",
    "04-adapter": f"04 --pairs W/pairs {NEW}",
    "04-full": f"04 --pairs W/pairs {NEW} --mode full",
    "05-pix2pix": f"05 --pairs W/pairs --generator W/base.safetensors --batch 4 {PRUNE}",
    "05-cyclegan": "05 --pairs W/pairs --task cyclegan --concept dark --generator e2gan --width 8 "
    f"--batch 2 {PRUNE}",
    "05-dcgan": f"05 --task dcgan --data W/pairs/train --size 32 --width 4 --batch 6 {PRUNE}",
}


def run_case(name: str, folder: Path, out: Path, file: Path) -> None:
    """Runs a stage, and writes the gradients that its optimizers step down, in their order."""
    gradients = {}

    def keep(optimizer, args, options):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        gradients[str(len(gradients))] = vector.clone()

    number, *flags = f"{CASES[name]} {EVERY} --cache W/cache".replace("W/", f"{folder}/").split()
    hook = register_optimizer_step_pre_hook(keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_curve", lambda path, rows: None)  # longer than a step
        run_main(number, *flags, "--out", out / name)
    hook.remove()
    save_file(gradients, file)


def main() -> None:
    """What torchrun's processes run: all cases, one after the other. They meet in the first."""
    folder, out = map(Path, sys.argv[1:])
    for name in CASES:
        run_case(name, folder, out, out / f"{name}-{runs.rank()}.safetensors")
        training.distributed.init_process_group = lambda *_, **__: None


@pytest.fixture(scope="module")
def two(good, tmp_path_factory):
    """A folder with the gradients that each of two processes had."""
    out = tmp_path_factory.mktemp("two")
    torchrun(__file__, good, out)
    return out


def assert_near(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and found
    for step, gradient in wanted.items():
        assert gradient.abs().max() > 0
        off = (found[step] - gradient).abs().max() / gradient.abs().max()
        assert off < 1e-3, (step, off)


@pytest.mark.parametrize("name", [name for name in CASES if name != "05-dcgan"])
def test_two_processes_have_the_gradients_of_one(good, two, tmp_path, name):
    run_case(name, good, tmp_path, tmp_path / "one.safetensors")
    wanted = load_file(tmp_path / "one.safetensors")
    for rank in (0, 1):
        assert_near(load_file(two / f"{name}-{rank}.safetensors"), wanted)


def test_two_processes_of_dcgan_have_the_mean_gradients_of_their_shares(
    good, two, tmp_path, monkeypatch
):
    """Not those of one process: each draws its own noise, and a batch norm sees one share. Here
    each share is trained on alone. Of the first steps of generator and discriminator; later ones
    depend on the other process."""
    monkeypatch.setattr(training, "data_parallel", lambda network: network)
    monkeypatch.setattr(training.distributed, "init_process_group", lambda *_, **__: None)
    for module in (training, runs):
        monkeypatch.setattr(module, "average", lambda tensor: tensor)
    monkeypatch.setattr(runs, "gather", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run_case("05-dcgan", good, tmp_path / rank, tmp_path / f"{rank}.safetensors")
        shares.append(load_file(tmp_path / f"{rank}.safetensors"))
    wanted = {step: (shares[0][step] + shares[1][step]) / 2 for step in ("0", "1")}
    for rank in (0, 1):
        found = load_file(two / f"05-dcgan-{rank}.safetensors")
        assert_near({step: found[step] for step in ("0", "1")}, wanted)


def test_a_gpu_of_ones_own_is_asked_for_without_its_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(runs.UserError, match="all processes on one GPU: leave it out"):
        training.start(Namespace(device="cuda:1", seed=0))


@pytest.mark.parametrize("number", ["01", "03", "04", "05"])
def test_torchrun_takes_no_flag_for_an_abbreviation_of_its_own(
    load_stage, number, capsys, monkeypatch
):
    """It refuses one that could be two of its own, though it stands after the script's name."""
    monkeypatch.setattr(sys, "argv", ["stage", "--help"])
    with pytest.raises(SystemExit):
        load_stage(number).parse()
    flags = re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    theirs = get_args_parser()._option_string_actions
    assert len(flags) > 10
    assert not [flag for flag in flags if any(name.startswith(flag) for name in theirs)]


if __name__ == "__main__":
    runs.run(main)
