"""Nothing lost, nothing let in: no code from files, one process a folder, and what strangers' files may hold."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest
import torch
import torch.multiprocessing

import common
from conftest import ROOT, script


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, write_pairs):
    return write_pairs(
        tmp_path_factory.mktemp("robust") / "pairs", {"dark": lambda x: 0.3 * x}, train=4, test=2
    )


def train(pairs, *flags):
    """Flags of a stage 3 that needs no CLIP."""
    return [
        "--pairs",
        pairs,
        "--concept",
        "dark",
        "--arch",
        "resnet9",
        "--width",
        8,
        "--batch",
        4,
        "--fid",
        "off",
        "--device",
        "cpu",
        *flags,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# No code from files

FORBIDDEN = {
    "torch.load without weights_only=True": r"\btorch\.load\((?![^\n]*weights_only=True)",
    "pickle": r"\b(?:c?[Pp]ickle|dill|joblib|shelve|marshal)\b\s*(?:\.|import|$)|import (?:pickle|dill|joblib|shelve|marshal)|allow_pickle=True",
    "code from a hub or a file": r"trust_remote_code|torch\.hub\.load\(",
    "eval or exec": r"(?<![\w.])(?:eval|exec|compile)\(",
    "YAML that makes objects": r"yaml\.(?:unsafe_)?load\(",
    "a shell": r"os\.system\(|shell=True",
}


def test_no_file_is_run_or_unpickled():
    exempt = {
        ROOT / "tests/test_robust.py",
        ROOT / "tests/test_data.py",
    }  # the latter writes CIFAR-10's files
    for path in {*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")} - exempt:
        for what, pattern in FORBIDDEN.items():
            found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path.name}: {what}: {found.group()}"
    for line in (
        "x = torch.load(path)",
        "import pickle",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "pickle.loads(b)",
        "from_pretrained(x, trust_remote_code=True)",
    ):
        assert any(re.search(pattern, line) for pattern in FORBIDDEN.values()), line


# ---------------------------------------------------------------------------------------------------------------------
# One process a folder


def test_a_second_process_is_kept_out_until_the_first_is_dead(pairs, error_of, tmp_path):
    out, flags = (
        tmp_path / "out",
        list(map(str, train(pairs, "--out", tmp_path / "out", "--epochs", 100_000))),
    )
    first = subprocess.Popen(
        [sys.executable, script("03"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.time() + 60
        while not (out / "settings.json").exists() and time.time() < deadline:
            time.sleep(0.05)
        for more in ([], ["--overwrite"]):
            assert f"another process is at work in {out}" in error_of("03", *flags, *more)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    settings = common.read_json(out / "settings.json")
    assert common.prepare_folder(out, settings, False) is False  # nothing is left to clean up


def test_half_a_crucial_json_goes_unless_a_live_process_writes_it(load_stage, tmp_path):
    part = tmp_path / ".crucial.json.1.part"
    part.touch()

    def write():
        rows = [{"layers": "stem", "crucial": "yes"}, {"layers": "out", "crucial": "no"}]
        load_stage("04").write_crucial(
            argparse.Namespace(out=tmp_path), ["dark"], {"stem": {}, "out": {}}, "sha", rows
        )

    with (
        filelock.FileLock(tmp_path / common.LOCK),
        pytest.raises(common.UserError, match="another process is at work"),
    ):
        write()
    assert part.exists()
    write()
    assert common.read_json(tmp_path / "crucial.json")["groups"] == ["stem"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "crucial.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture
def run_stage(load_stage, monkeypatch, capsys):
    """run_stage("03", flags) runs a stage in this process, logging every 5 steps: (exit status, standard error)."""

    def call(number, flags, status=0):
        monkeypatch.setattr(sys, "argv", [str(script(number)), *map(str, flags)])
        module = load_stage(number)
        module.LOG_EVERY = 5
        capsys.readouterr()
        try:
            common.run(module.main)
            found = 0
        except SystemExit as stop:
            found = stop.code
        words = capsys.readouterr().err
        assert found == status, words
        return words

    return call


@pytest.mark.parametrize(
    "number, name, folder, product",
    [
        ("03", "SIGTERM", "", "generator.safetensors"),
        ("04", "SIGINT", "dark", "adapter.safetensors"),
    ],
)
def test_a_signal_saves_the_step_and_the_same_command_continues(
    pairs, run_stage, monkeypatch, tmp_path, number, name, folder, product
):
    flags = {
        "03": train(pairs, "--epochs", 14, "--eval-every", 100),
        "04": [
            "--pairs",
            pairs,
            "--base",
            tmp_path / "base.safetensors",
            "--concept",
            "dark",
            "--samples",
            "all",
            "--batch",
            4,
            "--epochs",
            14,
            "--fid",
            "off",
            "--device",
            "cpu",
        ],
    }[number]
    common.save_network(
        tmp_path / "base.safetensors",
        common.build_network(
            common.generator_config("resnet9", 8, 32, [{"name": "dark", "prompt": "make it dark"}])
        ),
    )
    run_stage(number, [*flags, "--out", tmp_path / "whole"])
    stopped, set_lr, calls = [*flags, "--out", tmp_path / "stopped"], common.set_lr, []

    def signal_in_step_7(*args):
        calls.append(1)
        if len(calls) == 2 * 7:  # once a step for each of the two networks
            os.kill(os.getpid(), getattr(signal, name))
        set_lr(*args)

    monkeypatch.setattr(common, "set_lr", signal_in_step_7)
    assert run_stage(number, stopped, 130).splitlines()[-1] == "stopped: the same command continues"
    assert (
        common.read_tensors(tmp_path / "stopped" / folder / "state.safetensors", "state")[1]["step"]
        == 7
    )
    run_stage(number, stopped)
    assert len(calls) == 2 * 14
    for file in (product, "state.safetensors", "log.jsonl"):
        assert (tmp_path / "stopped" / folder / file).read_bytes() == (
            tmp_path / "whole" / folder / file
        ).read_bytes(), file


def stop_in_step_3(rank, world, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world
    )
    try:
        for step in common.until_stopped(
            range(6), lambda: (out / f"saved-{rank}").write_text(f"{step}"), world
        ):
            (out / f"step-{rank}").write_text(f"{step}")
            for _ in range(
                2 if (rank, step) == (1, 3) else 0
            ):  # as from Slurm and torchrun at once
                os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        (out / f"stopped-{rank}").touch()
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_first_saves(tmp_path):
    torch.multiprocessing.spawn(stop_in_step_3, (2, tmp_path), nprocs=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "meet"} == {
        "step-0": "3",
        "step-1": "3",
        "saved-0": "3",
        "stopped-0": "",
        "stopped-1": "",
    }


@pytest.mark.parametrize("rank, said", [("0", True), ("1", False)])
def test_one_process_says_that_all_have_stopped(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.run(main)
    assert (
        stop.value.code == 130 and ("stopped: the same command" in capsys.readouterr().err) == said
    )


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, and data at the edge


def test_a_loss_that_is_not_finite_is_named_by_its_step(pairs, error_of, monkeypatch, tmp_path):
    to_float, calls = common.to_float, []

    def break_step_9(pixels):
        calls.append(1)
        return to_float(pixels) * (float("nan") if len(calls) == 9 else 1)

    monkeypatch.setattr(common, "to_float", break_step_9)
    line = error_of(
        "03",
        *train(
            pairs,
            "--out",
            tmp_path / "out",
            "--epochs",
            30,
            "--save-every",
            12,
            "--eval-every",
            100,
        ),
    )
    assert "a loss is not finite in step 9" in line and not list(
        (tmp_path / "out").glob("*.safetensors")
    )


EDGES = {
    "all black": (lambda x: 0 * x, 4, 2, 0),
    "edits all alike": (lambda x: 0 * x + 0.5, 4, 2, None),
    "one photo": (lambda x: 0.3 * x, 1, 1, None),
    "all photos alike": (lambda x: 0.3 * x, 4, 2, 0.7),
}


@pytest.mark.parametrize("edit, train_photos, test_photos, level", EDGES.values(), ids=EDGES)
def test_data_at_the_edge_train_or_say_why_not(
    write_pairs, run_stage, tmp_path, edit, train_photos, test_photos, level
):
    write_pairs(tmp_path / "pairs", {"dark": edit}, train=train_photos, test=test_photos)
    if level is not None:
        for path in (tmp_path / "pairs").glob("*/*/*.png"):
            image = torch.full(
                (3, 32, 32),
                round(255 * level * (0.3 if path.parent.name == "dark" else 1)),
                dtype=torch.uint8,
            )
            common.write_png(path, common.to_pil(image))
    run_stage(
        "03",
        train(tmp_path / "pairs", "--out", tmp_path / "base", "--epochs", 4, "--eval-every", 100),
    )
    [row] = common.read_json(tmp_path / "base/result.json")["tables"][
        "Base concepts, held-out photos"
    ]
    assert all(isinstance(value, (str, float)) and value == value for value in row.values())
    if level is None and train_photos > 1:
        return
    run_stage(
        "02",
        [
            "--pairs",
            tmp_path / "pairs",
            "--clip",
            "ViT-S-32:random",
            "--base",
            1,
            "--samples",
            3,
            "--out",
            tmp_path / "clusters",
        ],
    )
    chosen = (tmp_path / "clusters/samples/dark.txt").read_text().split()
    assert len(chosen) == 1  # of 3 wanted


def test_fewer_distinct_photos_than_clusters(load_stage, capsys):
    found = load_stage("02").cluster(
        torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])), 3, 0
    )
    assert found == [[0, 1], [2, 3]]
    load_stage("02").say_fewer(len(found), 3, "samples")
    assert "3 samples wanted, but only 2 differ: going on with 2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full, files that go


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "w.safetensors"
    common.write_tensors(path, {"a": torch.zeros(10)}, {})
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        for write in (
            lambda: common.write_tensors(path, {"a": torch.zeros(100_000)}, {}),
            lambda: common.write_text(path, "x" * 100_000),
        ):
            with pytest.raises(OSError, match="too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_picture_that_goes_while_it_trains(pairs, error_of, monkeypatch, tmp_path):
    shutil.copytree(pairs, tmp_path / "pairs")
    hold = common.Pairs.hold

    def lose(found, *args):
        (tmp_path / "pairs/train/dark/00002.png").unlink()
        hold(found, *args)

    monkeypatch.setattr(common.Pairs, "hold", lose)
    assert "dark/00002.png does not exist" in error_of(
        "03", *train(tmp_path / "pairs", "--out", tmp_path / "out", "--epochs", 2)
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "settings.json"]


def test_overwrite_that_was_killed_can_be_given_again(tmp_path):
    out = tmp_path / "out"
    common.prepare_folder(out, {"stage": "x"}, False)
    common.write_text(out / "samples/a.txt", "a")
    common.write_json(out / "result.json", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            common.prepare_folder(out, {"stage": "y"}, True)
    assert (out / "settings.json").exists() and not (out / "result.json").exists()
    assert common.prepare_folder(out, {"stage": "y"}, True) is False
    assert sorted(path.name for path in out.iterdir()) == [".lock", "settings.json"]
