"""Nothing lost, nothing let in: no code from files, one process a folder, signals, edges."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import filelock
import psutil
import pytest
import torch
import torch.multiprocessing
from conftest import ROOT, run_main, script, table

import runs
import training


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, write_pairs):
    folder = tmp_path_factory.mktemp("robust") / "pairs"
    return write_pairs(folder, {"dark": lambda x: 0.3 * x}, train=4, test=2)


def train(pairs, out, more="") -> list[str]:
    """Flags of a small stage 3."""
    flags = f"--pairs {pairs} --concept dark --arch resnet9 --width 8 --batch 4 --fid off"
    return f"{flags} --cache {pairs}/cache --device cpu --out {out} {more}".split()


# ---- No code from files --------------------------------------------------------------------------

FORBIDDEN = {
    "torch.load without weights_only=True": r"\btorch\.load\((?![^\n]*weights_only=True)",
    "pickle": r"\b(?:c?[Pp]ickle|dill|joblib|shelve|marshal)\b\s*(?:\.|import|$)|allow_pickle=True",
    "an import of pickle": r"import (?:pickle|dill|joblib|shelve|marshal)",
    "code from a hub or a file": r"trust_remote_code|torch\.hub\.load\(",
    "eval or exec": r"(?<![\w.])(?:eval|exec|compile)\(",
    "YAML that makes objects": r"yaml\.(?:unsafe_)?load\(",
    "a shell": r"os\.system\(|shell=True",
}


def test_no_file_is_run_or_unpickled():
    for path in {*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")} - {Path(__file__).resolve()}:
        for what, pattern in FORBIDDEN.items():
            found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path.name}: {what}: {found.group()}"
    for line in ("torch.load(path)", "import pickle", "eval(text)", "trust_remote_code=True"):
        assert any(re.search(pattern, line) for pattern in FORBIDDEN.values()), line


# ---- Run folders: one process each, whole files, --overwrite -------------------------------------


def test_a_second_process_is_kept_out_until_the_first_is_dead(pairs, error_of, tmp_path):
    out, settings = tmp_path / "out", {"stage": "x"}
    first = os.fork()
    if first == 0:
        runs.begin_run(out, settings, False)
        time.sleep(600)
        os._exit(0)
    try:
        while not (out / "settings.json").exists():
            assert os.waitpid(first, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        for more in ("", "--overwrite"):
            line = error_of("03", *train(pairs, out, more))
            assert f"another process is at work in {out}" in line
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert runs.begin_run(out, settings, False) is False  # nothing is left to clean up
    assert (tmp_path / ".out.lock").exists()


def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    path = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        runs.write_tensors(path, {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "w.safetensors"
    runs.write_tensors(path, {"a": torch.zeros(10)}, {})
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(runs.UserError, match="too large"):
            runs.write_tensors(path, {"a": torch.zeros(100_000)}, {})
        with pytest.raises(OSError, match="too large"):
            runs.write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["pathlib.Path.rename", "shutil.rmtree", "runs.write_json"])
def test_overwrite_that_was_killed_can_be_given_again(tmp_path, monkeypatch, where):
    out = tmp_path / "out"
    assert runs.begin_run(out, {"stage": "x"}, False) is False
    runs.write_text(out / "samples/a.txt", "a")
    runs.write_json(out / "result.json", {})
    assert runs.begin_run(out, {"stage": "x"}, False) is True

    def killed(*args, **options):
        if where != "shutil.rmtree" or not out.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, killed)
        runs.begin_run(out, {"stage": "y"}, True)
    assert not out.exists() or (out / "samples/a.txt").exists()  # nothing in between
    assert runs.begin_run(out, {"stage": "y"}, True) is False
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".out.lock", "out", "out/settings.json"]


# ---- Signals -------------------------------------------------------------------------------------


@pytest.fixture
def run_stage(monkeypatch, capsys):
    """run_stage(flags) runs stage 3, logging every 5 steps: (exit status, standard error)."""
    monkeypatch.setattr(training, "LOG_EVERY", 5)

    def call(flags):
        capsys.readouterr()
        try:
            runs.run(lambda: run_main("03", *flags))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def test_sigterm_saves_the_step_and_the_same_command_continues(
    pairs, run_stage, monkeypatch, tmp_path
):
    length = "--epochs 14"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_stage(train(pairs, whole, f"{length} --eval-every 100"))[0] == 0
    set_lr, seen = training.set_lr, []

    def signal_in_step_7(optimizer, lr, step, steps):
        if step == 6 and 6 not in seen:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(step)
        set_lr(optimizer, lr, step, steps)

    monkeypatch.setattr(training, "set_lr", signal_in_step_7)
    status, words = run_stage(train(pairs, stopped, f"{length} --eval-every 100"))
    assert status == 130 and words.splitlines()[-1] == "stopped: the same command continues"
    assert runs.read_tensors(stopped / "state.safetensors", "state")[1]["step"] == 7
    assert run_stage(train(pairs, stopped, f"{length} --eval-every 100"))[0] == 0
    steps = table(whole, "Base generator")[0]["steps"]
    assert 12 <= steps <= 18 and {*seen} == {*range(steps)} and seen.count(6) == seen.count(7)
    for file in ("generator.safetensors", "state.safetensors", "log.jsonl", "settings.json"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


MEASURES_LAST = {
    "04": ("--concept inverted --samples all", "inverted/state.safetensors"),
    "05": ("--keep 0.5", "converge-state.safetensors"),
}


@pytest.mark.parametrize("number", MEASURES_LAST)
def test_a_signal_while_the_result_is_measured_loses_no_step(
    good, tmp_path, monkeypatch, capsys, number
):
    monkeypatch.setattr(training, "write_curve", lambda path, rows: None)  # longer than a step
    more, last_state = MEASURES_LAST[number]
    flag = "--base" if number == "04" else "--generator"
    flags = f"--pairs {good}/pairs --cache {tmp_path}/cache --batch 2 --steps 2 --device cpu "
    flags += f"--fid off --perceptual 0 {flag} {good}/base.safetensors {more}"
    flags = [*flags.split(), "--out", tmp_path / number]
    swd = training.swd

    def swd_and_signal(*pictures):
        if (tmp_path / number / last_state).exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return swd(*pictures)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(training, "swd", swd_and_signal)
        runs.run(lambda: run_main(number, *flags))
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("stopped: the same command continues\n")
    monkeypatch.setattr(training.Loop, "record", lambda *_: pytest.fail("a step was taken again"))
    run_main(number, *flags)
    assert runs.files_below(tmp_path / number, "result.json")


def stop_in_step_3(rank, out):
    """One of two processes, of which the second gets signals: from Slurm and torchrun at once."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = f"file://{out}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    args = Namespace(batch=2, crop=0, seed=0, save_every=100, no_flip=False, tensorboard=False)
    args.accumulate, args.precision = 1, "fp32"
    network = torch.nn.Linear(2, 2)
    data = Namespace(batches=lambda *_, **__: [torch.rand(2, 3, 8, 8)] * 6)
    loop = training.Loop(args, data, 6, {"g": network}, out)
    try:
        for _ in loop:
            for _signal in range(2 if (rank, loop.step) == (1, 2) else 0):
                os.kill(os.getpid(), signal.SIGTERM)
            loop.record({"L": network.weight.sum()})
    except KeyboardInterrupt:
        (out / f"stopped-{rank}").write_text(str(loop.step))
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_first_saves(tmp_path):
    torch.multiprocessing.start_processes(stop_in_step_3, (tmp_path,), 2, start_method="fork")
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert runs.read_tensors(tmp_path / "state.safetensors", "state")[1]["step"] == 3


# ---- Data at the edge ----------------------------------------------------------------------------

EDGES = {"all black": (lambda x: 0 * x, 4, 2), "one photo": (lambda x: 0.3 * x, 1, 1)}
EDGES |= {"edits all alike": (lambda x: 0 * x + 0.5, 4, 2)}


@pytest.mark.parametrize("edit, photos, held_out", EDGES.values(), ids=EDGES)
def test_data_at_the_edge_trains(write_pairs, run_stage, tmp_path, edit, photos, held_out):
    write_pairs(tmp_path / "pairs", {"dark": edit}, train=photos, test=held_out)
    assert run_stage(train(tmp_path / "pairs", tmp_path / "base", "--epochs 4"))[0] == 0
    [row] = table(tmp_path / "base", "Base concepts, held-out photos")
    assert all(isinstance(value, str | float) and value == value for value in row.values())


# ---- Too little memory, disks without locks ------------------------------------------------------


def test_memory_that_is_not_enough_is_one_line(pairs, error_of, tmp_path):
    line = error_of("03", *train(pairs, tmp_path / "out", "--width 100000"))  # 720 GB
    assert "--batch" in line and "--crop" in line and "--width" in line, line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_devices_say_in_other_words_that_memory_is_not_enough(error, capsys):
    with pytest.raises(SystemExit) as stop:
        runs.run(lambda: throw(error))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: not enough memory: give a smaller --batch")


def throw(error):
    raise error


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"):
        runs.run(lambda: throw(RuntimeError("shapes differ")))


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(37, "No locks available")])
@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_a_disk_without_locks_is_one_line(pairs, error_of, tmp_path, monkeypatch, error, flag):
    plain = filelock.FileLock.acquire
    folder = tmp_path / "no locks"

    def acquire(lock, *more, **options):
        if Path(lock.lock_file).parent == folder:
            raise error
        return plain(lock, *more, **options)

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", acquire)
    folder.mkdir()
    flags = [*train(pairs, tmp_path / "out"), flag, folder / "out" if flag == "--out" else folder]
    line = error_of("03", *flags)
    assert f"give {flag} on a disk" in line and str(error) in line, line


# ---- Beside other work ---------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_sleep_soon_while_they_wait_unless_the_user_says_otherwise(asked):
    """OpenMP itself prints what it read when torch was imported."""
    env = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE", **asked}
    command = [sys.executable, script("03"), "--help"]
    printed = subprocess.run(command, env=env, text=True, capture_output=True).stderr
    counts = re.findall(r"GOMP_SPINCOUNT *= *'?(\w+)", printed)
    assert counts, printed
    if "OMP_WAIT_POLICY" in asked:
        assert "3000" not in counts
    else:
        assert set(counts) == {asked.get("GOMP_SPINCOUNT", "3000")}


CPU = torch.device("cpu")


@pytest.fixture
def free_threads(monkeypatch):
    """A machine of four cores whose user did not choose a number of threads. Yields what sets how
    many of its cores are there, and how many of them other programs keep busy."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")

    def machine(cores: int, busy: float):
        monkeypatch.setattr(training, "CORES", cores)
        monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * busy / cores)

    machine(cores=4, busy=0)
    yield machine
    torch.set_num_threads(before)


def first_layer(width: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 7))


@pytest.mark.parametrize(
    ("width", "side", "batch", "threads"),
    [(16, 128, 1, 1), (32, 128, 1, 1), (64, 128, 1, 2), (64, 256, 16, 4), (16, 32, 16, 1)],
)
def test_small_steps_take_fewer_threads(free_threads, tmp_path, width, side, batch, threads):
    training.set_threads(CPU, first_layer(width), batch, side, tmp_path)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("cores", "busy", "threads"),
    [(2, 0, 2), (2, 0.2, 2), (2, 1, 1), (2, 2, 1), (16, 0.4, 16), (16, 1.1, 15), (16, 20, 1)],
)
def test_busy_cores_take_threads_away(free_threads, tmp_path, capsys, cores, busy, threads):
    free_threads(cores, busy)
    training.set_threads(CPU, first_layer(64), 16, 256, tmp_path)
    assert torch.get_num_threads() == threads
    assert (f"takes {threads} of {cores} threads" in capsys.readouterr().out) == (threads < cores)


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(free_threads, tmp_path):
    for began, later, cores in ((0, 1, 4), (3, 0, 4), (0, 0, 2)):
        out = tmp_path / f"{began}-{later}-{cores}"
        free_threads(4, busy=began)
        training.set_threads(CPU, first_layer(64), 16, 256, out)
        assert torch.get_num_threads() == 4 - began
        free_threads(cores, busy=later)
        training.set_threads(CPU, first_layer(64), 16, 256, out)
        assert torch.get_num_threads() == min(4 - began, cores)  # as many as there are
    runs.write_json(out / "threads.json", {"threads": "many"})
    with pytest.raises(runs.UserError, match="threads.json tells no number of threads"):
        training.set_threads(CPU, first_layer(64), 16, 256, out)


def test_the_user_s_number_of_threads_wins(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: pytest.fail("it was measured"))
    before = torch.get_num_threads()
    runs.write_json(tmp_path / "threads.json", {"threads": 2})
    training.set_threads(CPU, first_layer(64), 16, 256, tmp_path)
    assert torch.get_num_threads() == before == int(os.environ["OMP_NUM_THREADS"])


def test_stages_keep_the_number_with_the_run(good, tmp_path, free_threads, monkeypatch):
    monkeypatch.setattr(training, "write_curve", lambda path, rows: None)  # longer than a step
    every = f"--pairs {good}/pairs --cache {tmp_path}/cache --batch 2 --steps 2 --device cpu "
    every += "--fid off --perceptual 0"
    flags = {
        "03": f"--clusters {good}/clusters --width 8",
        "04": f"--base {good}/base.safetensors --concept inverted --samples all",
        "05": f"--generator {good}/base.safetensors --keep 0.5",
    }
    for number, more in flags.items():
        run_main(number, *f"{every} {more}".split(), "--out", tmp_path / number)
    for out in ("03", "04/inverted", "05"):
        assert runs.read_json(tmp_path / out / "threads.json") == {"threads": 1}


def test_stages_import_runs_before_torch():
    for path in ROOT.glob("0?_*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.index("\nimport runs") < text.index("\nimport torch"), path.name
