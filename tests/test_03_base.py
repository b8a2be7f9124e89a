"""Stage 3 on pairs that take seconds: it learns, tells prompts apart, stops where training
collapses, and trains on two processes as on one, as does stage 5."""

import os
import shutil
import signal
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import read_log, run_main, table, torchrun

import common
import dataset
import runs
import training

EDITS = {"inverted": lambda x: 1 - x, "dark": lambda x: 0.25 * x}
BASE = "--width 8 --batch 8 --lr 2e-3 --seed 1 --fid off"
TRAIN = f"{BASE} --epochs 24 --eval-every 6"


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_pairs):
    """Pairs of two concepts, clusters, and a base that learned both."""
    root = tmp_path_factory.mktemp("world")
    write_pairs(root / "pairs", EDITS)
    runs.write_json(root / "clusters/concepts.json", {"base": list(EDITS)})
    run_main("03", *f"{files(root)} {TRAIN} --out {root}/base".split())
    return root


def files(root) -> str:
    return f"--pairs {root}/pairs --clusters {root}/clusters --cache {root}/cache"


def test_base_learns_its_concepts(world, capsys):
    rows = table(world / "base", "Base concepts, held-out photos")
    assert [row["concept"] for row in rows] == ["inverted", "dark"]
    for row in rows:
        assert row["PSNR dB"] > row["photo unchanged dB"] + 3, row
        assert row["PSNR dB"] > row["wrong prompt dB"] + 3, row
    assert (world / "base/samples").is_dir() and not list(world.rglob("*.part"))
    run_main("03", *f"{files(world)} {TRAIN} --out {world}/base".split())
    assert "done already" in capsys.readouterr().out


def test_the_best_model_and_the_curve_are_kept(world):
    log = read_log(world / "base/log.jsonl")
    means = [statistics.mean(row["error"].values()) for row in log if "error" in row]
    assert len(means) == 4  # 24 epochs, every 6
    test = dataset.find_pairs(world / "pairs", "test", ["inverted", "dark"])
    test.cache(world / "cache")
    for file, wanted in (("best", min(means)), ("generator", means[-1])):
        generator = common.load_generator(world / f"base/{file}.safetensors")
        rows = training.evaluate(generator, test)
        found = statistics.mean(training.error(row) for row in rows)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert dataset.read_image(world / "base/curve.png").shape[1] > 100


def test_the_table_says_how_long_pictures_were_waited_for_and_what_memory_was_used(world):
    [row] = table(world / "base", "Base generator")
    assert 0 < row["waited for pictures s"] < row["training s"]
    assert 0.1 < row["peak memory GB"] < 30


def test_tensorboard_shows_the_log(world, tmp_path, monkeypatch, error_of):
    """Written by PyTorch, if TensorBoard is there; here by something that remembers."""
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 1 and folder == tmp_path / "run/tensorboard"

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def flush(self):
            pass

    flags = f"{files(world)} {BASE} --epochs 2 --tensorboard --out {tmp_path}/run".split()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not to be imported
    assert "pip install tensorboard" in error_of("03", *flags)
    module = Namespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run_main("03", *flags)
    losses, measures = read_log(tmp_path / "run/log.jsonl")
    assert written["G/loss", 6] == losses["G"]
    assert written["PSNR dB/dark", 6] == measures["PSNR dB"]["dark"]


def test_stopped_between_concepts_it_measures_again_when_continued(world, tmp_path, monkeypatch):
    """And ends in the files of an undisturbed run."""
    evaluate, measured = training.evaluate_concept, []

    def and_stop(generator, pairs, c, with_fid):
        measured.append(c)
        os.kill(os.getpid(), signal.SIGTERM)  # heard when this concept is measured
        return evaluate(generator, pairs, c, with_fid)

    flags = f"{files(world)} {BASE} --epochs 4 --eval-every 1".split()
    run_main("03", *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate_concept", and_stop)
        run_main("03", *flags, "--out", tmp_path / "stopped")
    assert measured == [0]
    run_main("03", *flags, "--out", tmp_path / "stopped")
    for name in ("generator.safetensors", "best.safetensors", "state.safetensors", "log.jsonl"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), name


def test_evaluations_are_a_tenth_of_the_run_at_most(load_stage):
    """24 pairs and 10 held-out ones, 8 a step: three steps an epoch, at least 13 between."""
    between = load_stage("03").steps_between_evaluations
    train, test = Namespace(counts=[12, 12]), Namespace(counts=[5, 5])
    steps = [between(train, test, Namespace(batch=8, eval_every=n)) for n in (1, 4, 5, 20)]
    assert steps == [13, 13, 15, 60]


# ---- From a generator of one's own ---------------------------------------------------------------


def test_init_goes_on_where_another_run_ended(world, error_of, tmp_path, capsys):
    """A longer run in the same folder is refused, and the message names --init. Its first losses
    are those that the other ended with, while those of a new network are larger."""
    base = world / "base/generator.safetensors"
    longer = f"{files(world)} {TRAIN} --epochs 26 --out {world}/base"
    assert f"--init {base} --out another" in error_of("03", *longer.split())
    assert "lies in --out" in error_of("03", *f"{longer} --init {base}".split())
    small = f"{files(world)} {BASE} --arch resnet9 --width 64 --epochs 2 --save-every 1 --lr 1e-9"
    first = {}
    for name, more in (("on", f"--init {base}"), ("new", "--arch e2gan --width 8")):
        run_main("03", *f"{small} {more} --lr-d 1e-9 --out {tmp_path}/{name}".split())
        first[name] = read_log(tmp_path / name / "log.jsonl")[0]
    assert first["on"]["L1"] < 0.6 * first["new"]["L1"]
    assert first["on"]["D"] < 0.6 * first["new"]["D"]  # it knows real from fake, too
    [row] = table(tmp_path / "on", "Base generator")
    assert row["arch"] == "e2gan" and row["width"] == 8
    settings = runs.read_json(tmp_path / "on/settings.json")
    assert settings["init"] == runs.sha256(base) and settings["half_size"] == 0
    assert settings["discriminator"] == runs.sha256(base.with_name("discriminator.safetensors"))


def test_init_learns_other_concepts_and_needs_no_discriminator(world, error_of, tmp_path, capsys):
    shutil.copy(world / "base/generator.safetensors", tmp_path / "own.safetensors")
    flags = f"{files(world)} {BASE} --epochs 1 --init {tmp_path}/own.safetensors"
    run_main("03", *f"{flags} --concept dark --out {tmp_path}/dark".split())
    assert "no discriminator.safetensors: a new one is trained" in capsys.readouterr().out
    made = common.load_generator(tmp_path / "dark/generator.safetensors")
    assert [concept["name"] for concept in made.config["concepts"]] == ["dark"]
    line = error_of("03", *f"{flags} --init {tmp_path}/none --out {tmp_path}/x".split())
    assert "none does not exist" in line


# ---- Collapse ------------------------------------------------------------------------------------


def test_a_huge_gradient_is_one_step_and_no_more():
    """Such as flat crops bring about: Adam remembers their squares."""
    x, seen = torch.nn.Parameter(torch.zeros(())), [0.0]
    optimizer = training.adam([x], 0.1)
    scaler = training.grad_scaler(x.device, "fp32")  # does nothing
    for step in range(60):
        (x * (1e8 if step == 30 else 50.0)).backward()
        training.descend(optimizer, scaler)
        seen.append(x.item())
    assert seen[30] - seen[31] < 0.5 and seen[59] - seen[60] > 0.07


def test_a_collapse_stops_the_run_and_keeps_the_last_good_checkpoint(
    world, error_of, tmp_path, monkeypatch
):
    """The weights are broken in the 25th step, between the second checkpoint and the third."""
    out, kept, steps = tmp_path / "base", {}, []
    micro_batches = training.Loop.micro_batches

    def count_and_break(loop, batch):
        steps.append(1)
        if len(steps) == 22:
            kept.update({path: path.read_bytes() for path in out.glob("*.safetensors")})
        if len(steps) == 25:
            next(loop.modules.parameters()).data.fill_(float("nan"))
        return micro_batches(loop, batch)

    monkeypatch.setattr(training.Loop, "micro_batches", count_and_break)
    flags = f"{files(world)} {BASE} --save-every 10 --eval-every 100 --epochs 40 --out {out}"
    line = error_of("03", *flags.split())
    assert line.startswith("error: training diverged shortly before step 30: a loss or a weight")
    assert {path.stem for path in kept} == {"generator", "discriminator", "state"}
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not (out / "result.json").exists()


# ---- Half-size steps -----------------------------------------------------------------------------


def test_the_first_steps_see_photo_and_edit_at_half_the_size(world, tmp_path):
    pairs = dataset.find_pairs(world / "pairs", "train", ["dark"]).cache(tmp_path)
    args = Namespace(batch=2, crop=0, no_flip=False, seed=0, save_every=100, tensorboard=False)
    args.accumulate, args.precision = 1, "fp32"
    network = torch.nn.Linear(2, 2)
    loop = training.Loop(args, pairs, 3, {"g": network}, half_size_steps=2)
    seen = []
    for photo, edit, _ in loop:
        seen.append((photo, edit))
        loop.record({"L": network.weight.sum()})
    whole = list(pairs.batches(2, range(3), 0, torch.device("cpu")))
    for step, (photo, edit) in enumerate(seen):
        for found, full in zip((photo, edit), whole[step][:2], strict=True):
            wanted = full
            if step < 2:
                corners = [full[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
                wanted = sum(corners) / 4
            assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "size, steps", [(256, 4), (48, 4), (40, 0), (32, 0)], ids=lambda value: str(value)
)
def test_half_size_steps_only_where_half_is_a_size_for_the_networks(size, steps):
    assert training.half_size_steps(0.4, 10, size) == steps


# ---- Two processes -------------------------------------------------------------------------------

RANKS = """
import sys, torch
sys.path[:0] = [{tests!r}]
import conftest, runs, training
stage, adam, trained = conftest.import_stage({number!r}), training.adam, []
training.adam = lambda parameters, lr: trained.append(adam(parameters, lr)) or trained[-1]

def main():
    stage.main()
    mine = [p.detach().flatten() for x in trained for p in x.param_groups[0]["params"]]
    mine = torch.cat(mine)
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert len(trained) > 1 and torch.equal(*both), "the ranks' weights differ"

runs.run(main)
"""

STAGES = {
    "03": "--clusters W/clusters --width 8 --seed 1 --epochs 1 --batch 8",
    "05": "--generator W/base/generator.safetensors --new-discriminator --keep 0.5 --batch 8 "
    "--search-epochs 2 --epochs 1 --lr 2e-5 --lr-search 2e-5 --lr-d 2e-5",
}

MEASURED = {"03": "Base concepts, held-out photos", "05": "Pruned pix2pix, held-out pictures"}


@pytest.mark.parametrize("number", STAGES)
def test_two_processes_train_as_one(world, tmp_path, number):
    """Few and short steps: Adam magnifies what is rounded otherwise; one of equal channels goes."""
    flags = f"{STAGES[number]} --pairs W/pairs --cache W/cache --fid off --precision fp32"
    flags = f"{flags} --device cpu".replace("W/", f"{world}/").split()
    run_main(number, *flags, "--out", tmp_path / "one")
    file = tmp_path / "ranks.py"
    file.write_text(RANKS.format(tests=str(Path(__file__).parent), number=number))
    torchrun(file, *flags, "--out", tmp_path / "two")
    logs = {"one": [], "two": []}
    for name, rows in logs.items():
        for path in sorted((tmp_path / name).rglob("*log.jsonl")):
            rows.extend(row for row in read_log(path) if "D" in row)
    assert logs["one"]
    for one, two in zip(*logs.values(), strict=True):
        assert one == pytest.approx(two, rel=3e-3)
    # the processes share out the concepts to measure
    tables = [table(tmp_path / name, MEASURED[number]) for name in logs]
    assert len(tables[0]) > 1
    for one, two in zip(*tables, strict=True):
        assert one.pop("concept") == two.pop("concept")
        assert one == pytest.approx(two, rel=0.02)
