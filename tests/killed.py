"""Runs the stages in forks of one process that has imported everything: undisturbed; then disturbed at chosen moments, followed by
the same command once more, which must leave the undisturbed run's bytes.

    python tests/killed.py FOLDER --times 20 --seed 0 [--stages 03 06]      prints a JSON report

A moment is the n-th change of a file below --out (opened for writing, renamed, removed; a folder made), told by Python's audit
events. At a moment the process is killed with SIGKILL, or gets SIGINT or SIGTERM, or the disk is full from then on, or read-only;
and some kills come at a moment of the clock. Where the file about to be renamed is killed, half of it is cut off first: what a kill
in the middle of a write leaves. Nothing here is a pytest test; test_killed.py reads the report.
"""

import argparse
import errno
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import torch  # noqa: E402

import common  # noqa: E402
from conftest import script  # noqa: E402

CONCEPTS = [
    "--concept",
    "sepia=make it sepia",
    "--concept",
    "night=make it night",
    "--concept",
    "poster=make it a poster",
]
CLOCKS = {
    "images/s",
    "ms",
    "FPS",
    "of resnet9's time",
    "search steps",
}  # a table's columns that only a run in one go knows
STATUS = {
    "kill": -signal.SIGKILL,
    "clock": -signal.SIGKILL,
    "int": 130,
    "term": 130,
    "full": 2,
    "read-only": 2,
}


def flags_of(root: Path) -> dict[str, list]:
    """A small run of each stage, on what the one before left; they train in fp32, without Inception."""
    pairs, clusters, clip = (
        ["--pairs", root / "01"],
        ["--clusters", root / "02"],
        ["--clip", "ViT-S-32:random"],
    )
    small = ["--batch", 4, "--save-every", 2, "--precision", "fp32", "--fid", "off"]
    return {
        "01": ["--demo", "--size", 32, "--train", 6, "--test", 2, *CONCEPTS],
        "02": [*pairs, *clip, "--base", 2, "--samples", 4, "--edits", 4],
        "03": [*pairs, *clusters, *clip, *small, "--width", 8, "--epochs", 3, "--eval-every", 1],
        "04": [
            *pairs,
            *clusters,
            *small,
            "--base",
            root / "03/generator.safetensors",
            "--steps",
            5,
            "--rank",
            "auto",
            "--layers",
            "down1,up2",
            "--probe-steps",
            1,
            "--cache-gb",
            0,
        ],
        "05": [
            *pairs,
            *small,
            "--generator",
            root / "03/generator.safetensors",
            "--keep",
            0.5,
            "--search-epochs",
            2,
            "--epochs",
            1,
        ],
        "06": [
            *pairs,
            "--generator",
            root / "03/generator.safetensors",
            "--adapter",
            root / "04",
            "--size",
            32,
            "--threads",
            1,
        ],
    }


def load_stages() -> dict[str, object]:
    """The stages as modules; what takes seconds and writes nothing is done once, here, or not at all."""
    import matplotlib.figure  # noqa: F401
    import sklearn.cluster  # noqa: F401

    modules = {}
    for number in ("01", "02", "03", "04", "05", "06"):
        spec = importlib.util.spec_from_file_location(f"stage_{number}", script(number))
        modules[number] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[number])
    common.Clip = functools.cache(common.Clip)
    common.Clip("ViT-S-32:random", torch.device("cpu"))
    export, graphs = modules["06"], {}
    trace = export.trace

    def trace_once(generator, *options):
        key = generator.sha256, *options
        graphs[key] = graphs.get(key) or trace(generator, *options)
        return graphs[key]

    export.trace = trace_once
    export.export_reference = lambda *_: (None, {"concept": "none"})
    export.median_ms = lambda runs: [1.0] * len(runs)
    feed = export.feed
    export.feed = lambda session, *pictures: feed(session, *pictures) if session else {}
    return modules


def changes(event: str, args: tuple, out: str) -> Path | None:
    """The path below `out` that an audit event is about to change."""
    if event == "open":
        path = (
            args[0]
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else None
        )
    else:
        path = (
            args[0]
            if event
            in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
            else None
        )
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return Path(path) if path == out or path.startswith(out + os.sep) else None


def hook_of(out: Path, how: str, at: int, log: Path):
    """An audit hook that counts moments in `log`'s size and disturbs at number `at`."""
    count, file, busy = itertools.count(1), os.open(log, os.O_WRONLY | os.O_CREAT), []

    def hook(event, args):
        if busy or (path := changes(event, args, str(out))) is None:
            return
        number = next(count)
        os.write(file, b".")
        if how in ("kill", "int", "term") and number == at:
            busy.append(True)
            if how == "kill" and event == "os.rename" and at % 2:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(
                os.getpid(),
                {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}[how],
            )
            busy.clear()
        if (
            how in ("full", "read-only")
            and number >= at
            and event not in ("os.remove", "os.rmdir", "shutil.rmtree")
        ):
            code = errno.ENOSPC if how == "full" else errno.EROFS
            raise OSError(code, os.strerror(code), str(path))

    return hook


def run(
    module, number: str, flags: list, out: Path, how: str = "", at: int = 0, after: float = 0
) -> tuple[int, str, int]:
    """(exit status, standard error, moments) of one run in a fork."""
    log = out.parent / "moments"
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            torch.set_num_threads(
                1
            )  # makes the thread pool that the fork lost, before threads of this process ask for it at once
            for fd, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(out.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.argv = [str(script(number)), *map(str, flags), "--out", str(out), "--device", "cpu"]
            sys.addaudithook(hook_of(out, how, at, log))
            common.run(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            threading._shutdown()  # what Python does at its end: a pool's thread may be writing a file
            sys.stderr.flush()
            os._exit(code)
    if how == "clock":
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, (out.parent / "stderr").read_text(), log.stat().st_size if log.exists() else 0


def contents(out: Path) -> dict[str, object]:
    """{path: bytes} of a run's folder; of result.json what no clock decided."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != common.LOCK
    }
    for name in [name for name in found if name.endswith("result.json")]:
        result = json.loads(found[name])
        for row in itertools.chain(*result["tables"].values()):
            for column in [column for column in row if column in CLOCKS or column.endswith(" s")]:
                del row[column]
        found[name] = {**result, "seconds": 0}
    return found


def disturb(
    module, number: str, flags: list, root: Path, whole: dict, how: str, at: int, after: float
) -> str:
    """What is wrong after a disturbed run and the same command once more; "" if nothing is."""
    out = root / "disturbed" / number
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    status, words, _ = run(module, number, flags, out, how, at, after)
    lines = [line for line in words.split("\n") if line.strip() and "\r" not in line]
    if status != STATUS[how] and not (
        how in ("clock", "int", "term", "full") and status == 0
    ):  # came too late
        return f"status {status}: {words[-1500:]}"
    if (
        "Traceback" in words
        or status == 2
        and not lines[-1].startswith("error: ")
        or status == 130
        and "same command" not in lines[-1]
    ):
        return f"no line that says what happened: {words[-1500:]}"
    if status in (2, 130) and (parts := [path for path in out.rglob("*.part")]):
        return f"half a file: {parts}"
    early = (
        {name for name, data in contents(out).items() if name.endswith("result.json")}
        if how != "clock"
        else set()
    )
    status, words, _ = run(module, number, flags, out)
    if status:
        return f"cannot continue ({sorted(early)}): {words[-1500:]}"
    found = contents(out)
    differ = sorted(
        name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)
    )
    if differ and differ[0].endswith("result.json"):
        return f"{differ}: {found.get(differ[0])} instead of {whole.get(differ[0])}"[:3000]
    return f"other bytes: {differ}" if differ else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument(
        "--times",
        type=int,
        default=3,
        help="kills a stage; a third as many of each other disturbance",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", help="to disturb (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, modules, report = args.root.resolve(), load_stages(), {}
    root.mkdir(parents=True, exist_ok=True)
    for number, flags in flags_of(root).items():
        began = time.time()
        status, words, moments = run(modules[number], number, flags, root / number)
        took = time.time() - began
        if status:
            sys.exit(f"stage {number}, undisturbed: status {status}\n{words}")
        if number == "04":  # for stage 6
            for source in modules["06"].load_sources([root / "03/generator.safetensors"], []):
                modules["06"].trace(source, 32, "float32", False)
        if args.stages and number not in args.stages:
            continue
        whole, draw = contents(root / number), random.Random(f"{args.seed} {number}")
        few = max(1, args.times // 3)
        plan = [
            ("kill", at)
            for at in sorted(
                draw.sample(range(1, moments + 1), min(moments, args.times - args.times // 5))
            )
        ]
        plan += [("clock", 0)] * (args.times // 5)
        plan += [
            (how, draw.randint(1, moments)) for how in ("int", "term", "full") for _ in range(few)
        ] + [("read-only", 1)]
        problems = []
        for how, at in plan:
            after = draw.uniform(0, took)
            if problem := disturb(modules[number], number, flags, root, whole, how, at, after):
                problems.append(f"{how} at {at or after} of {moments}: {problem}")
        report[number] = {
            "moments": moments,
            "disturbed": len(plan),
            "killed": sum(how in ("kill", "clock") for how, _ in plan),
            "seconds": round(time.time() - began, 1),
            "problems": problems,
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
