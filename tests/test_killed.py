"""Disturbed at any moment (SIGKILL, SIGINT, SIGTERM, a full disk), the same command run again ends
in the bytes of a run that was not.

    python tests/test_killed.py FOLDER 20 0      twenty kills a stage, seed 0; prints a JSON report

runs the stages in forks of one process that has imported everything. A moment is the n-th change of
a file (opened for writing, renamed, removed; a folder made), told by Python's audit events. At a
moment the process is killed, or gets a signal, or the disk is full from then on. Half of a file
about to be renamed may be cut off before the kill, as by one in the middle of a write."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from conftest import Tower, import_stage, run_main

import common
import runs
import training

SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}
STATUS = {"kill": -9, "int": 130, "term": 130, "full": 2}
# columns that only a run in one go has, or that no two runs have alike
CLOCKS = {"images/s", "ms", "FPS", "search steps", "peak memory GB"}
FREES = {"os.remove", "os.rmdir", "shutil.rmtree"}
EVENTS = {*FREES, "os.rename", "os.mkdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def flags_of(root: Path) -> dict[str, str]:
    """A small run of each stage on what the one before left; they train in fp32, without FID."""
    pairs, base = f"--pairs {root}/01/out", f"{root}/03/out/generator.safetensors"
    small = f"{pairs} --batch 4 --save-every 2 --precision fp32 --fid off"
    later = f"{small} --clusters {root}/02/out"
    concepts = "--concept starry --concept wave --concept popart"
    return {
        "01": f"--demo --size 32 --train 4 --test 2 {concepts}",
        "02": f"{pairs} --base 2 --samples 4 --edits 4",
        "03": f"{later} --width 8 --epochs 4 --eval-every 1",
        "04": f"{later} --base {base} --steps 5 --rank auto --layers down1,up2 --probe-steps 1",
        "05": f"{small} --generator {base} --keep 0.5 --search-epochs 2 --epochs 1",
        "06": f"{pairs} --generator {base} --size 32 --threads 1 --cdn",
    }


def load_stages(numbers) -> dict[str, object]:
    """The stages as modules; what takes seconds and writes nothing is done once, or not at all."""
    import matplotlib.figure  # noqa: F401
    import sklearn.cluster  # noqa: F401

    modules = {number: import_stage(number) for number in numbers}
    modules["01"].Clip, training.write_curve = Tower, runs.write_json
    modules["06"].median_ms = lambda *_: 1.0
    return modules


def changes(event: str, args: tuple, home: Path) -> bool:
    """Whether an audit event is about to change something below `home`."""
    opens = event == "open" and isinstance(args[2], int) and args[2] & WRITES
    if not (opens or event in EVENTS) or not isinstance(args[0], str | os.PathLike):
        return False
    return Path(args[0]).is_relative_to(home)


def hook_of(home: Path, how: str, at: int):
    """An audit hook that counts moments in a file's size and disturbs at number `at`."""
    count, file = itertools.count(1), os.open(home.parent / "moments", os.O_WRONLY)

    def hook(event, args):
        if not changes(event, args, home):
            return
        number, path = next(count), Path(args[0])
        os.write(file, b".")
        if how in SIGNALS and number == at:
            if how == "kill" and event == "os.rename" and at % 2 and path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), SIGNALS[how])
        if how == "full" and number >= at and event not in FREES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return hook


def run(module, number, flags, home: Path, how="", at=0) -> tuple[int, str, int]:
    """Exit status, standard error and moments of one run in a fork, which writes below `home`."""
    home.mkdir(parents=True, exist_ok=True)
    for name in ("moments", "stdout", "stderr"):
        (home.parent / name).write_bytes(b"")
    cache = f"--cache {home}/cache" if number in ("03", "04", "05") else ""
    command = f"{flags} {cache} --out {home}/out --device cpu"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            torch.set_num_threads(1)  # makes the pool of threads that the fork lost
            for fd, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(home.parent / name, os.O_WRONLY), fd)
            sys.addaudithook(hook_of(home, how, at))
            runs.run(lambda: run_main(module, *command.split()))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            threading._shutdown()  # as Python's end does: a pool's thread may be writing a file
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    moments = (home.parent / "moments").stat().st_size
    return status, (home.parent / "stderr").read_text()[-3000:], moments


def contents(home: Path) -> dict[str, object]:
    """{path: bytes} of what a run left; of result.json what no clock decided."""
    found = {}
    for path in home.rglob("*"):
        name = str(path.relative_to(home))
        if path.name == "result.json":
            result = runs.read_json(path)
            for row in itertools.chain(*result["tables"].values()):
                for column in [key for key in row if key in CLOCKS or key.endswith(" s")]:
                    del row[column]
            found[name] = {**result, "seconds": 0}
        elif path.is_file() and path.suffix != ".lock":
            found[name] = path.read_bytes()
    return found


def disturb(module, number, flags, root: Path, whole: dict, how, at) -> str:
    """What is wrong after a disturbed run and the same command once more; "" if nothing is."""
    home = root / "disturbed" / number
    shutil.rmtree(home.parent, ignore_errors=True)
    status, words, _ = run(module, number, flags, home, how, at)
    lines = [line for line in words.split("\n") if line.strip() and "\r" not in line]
    if status != STATUS[how] and (how == "kill" or status != 0):  # the others may come too late
        return f"status {status}: {words}"
    expected = {2: "error: ", 130: "stopped: the same command"}.get(status, "")
    if "Traceback" in words or (expected and not lines[-1].startswith(expected)):
        return f"no line that says what happened: {words}"
    if expected and list(home.rglob("*.part")):
        return "half a file is left"
    status, words, _ = run(module, number, flags, home)
    if status:
        return f"cannot continue: {words}"
    found = contents(home)
    differ = [name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)]
    return f"other bytes: {sorted(differ)}" if differ else ""


def report(root: Path, times: int, seed: int) -> dict[str, dict]:
    """Of each stage: moments, disturbed runs, problems. A third of `times` is not killed."""
    torch.set_num_threads(1)
    commands, found = flags_of(root), {}
    modules = load_stages(commands)
    for number, flags in commands.items():
        if number == "06":  # its concepts share one base, traced here once
            source = common.load_generator(root / "03/out/generator.safetensors")
            graph = modules[number].trace(source, 32, "uint8", True)
            modules[number].trace = lambda *_, graph=graph: graph
        status, words, moments = run(modules[number], number, flags, root / number)
        if status:
            sys.exit(f"stage {number}, undisturbed: status {status}\n{words}")
        whole, draw = contents(root / number), random.Random(f"{seed} {number}")
        kills = draw.sample(range(1, moments + 1), min(moments, times))
        plan = [("kill", at) for at in sorted(kills)]
        for how in ("int", "term", "full"):
            plan += [(how, draw.randint(1, moments)) for _ in range(max(1, times // 3))]
        problems = []
        for how, at in plan:
            if problem := disturb(modules[number], number, flags, root, whole, how, at):
                problems.append(f"{how} at {at} of {moments}: {problem}")
        found[number] = {"moments": moments, "disturbed": len(plan), "problems": problems}
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, __file__, folder, *request.param.split()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06"])
@pytest.mark.parametrize(
    "reports", ["2 0", pytest.param("20 1", marks=pytest.mark.slow)], indirect=True
)
def test_a_disturbed_run_loses_nothing(reports, number):
    assert reports[number]["disturbed"] >= 5
    assert not reports[number]["problems"], "\n".join(reports[number]["problems"])


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:])), indent=1))
