"""Flags, one-line errors, whole files, run folders, and the tables of many runs.

    python runs.py [folder]      prints the tables of all complete runs below a folder (runs/)

A run's folder holds settings.json first, its files, and result.json last. Nothing here knows a
network or a picture.
"""

import argparse
import atexit
import codecs
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

# OpenMP's threads wait for each other at each of a thousand operators a step. They do so in a loop
# that does nothing, unless told otherwise, also when another process needs the core. Read when
# torch is imported, so stages import this file before it.
# 3,000 turns are some 40 microseconds: with nothing beside it a step is as fast as with any number,
# and beside other work threads sleep soon. OMP_WAIT_POLICY=PASSIVE sleeps at once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import filelock
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


class UserError(Exception):
    """Bad input. `run` prints it as one line that begins `error:` and exits with status 2."""


@contextlib.contextmanager
def explain(words: str) -> Iterator[None]:
    """Turns whatever is raised inside into a UserError: these words, then the error's own. For
    files and numbers from outside, and libraries that read them, which raise anything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if not reason or isinstance(error, KeyError):  # a key alone does not say what is wrong
            reason = repr(error)
        raise UserError(f"{words}: {reason}") from error


# ---- The command line ----------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and after each flag's sentence its default, if it has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the flags of all stages."""

    def __init__(self, doc: str, out: str):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)
        flag = self.add_argument
        flag("--demo", action="store_true", help="small defaults, no model hub, in runs/demo/")
        flag("--out", type=Path, default=out, help="the folder that this stage writes")
        flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="equal seeds, equal files")
        flag("--device", default="auto", help="auto (CUDA, MPS, CPU) or a torch device: cuda:1")
        flag("--overwrite", action="store_true", help="delete the run in --out and start again")

    def parse(self, demo: dict) -> argparse.Namespace:
        """The flags, and `stage`, the script's name. With --demo the defaults in `demo` hold
        instead of the usual ones, and folders in runs/ become folders in runs/demo/."""
        self.set_defaults(stage=Path(self.prog).stem)
        if "--demo" in sys.argv[1:]:
            for key, value in vars(self.parse_args([])).items():
                if isinstance(value, Path) and value.parts[:1] == ("runs",):
                    self.set_defaults(**{key: Path("runs/demo", *value.parts[1:])})
            self.set_defaults(**demo)
        return self.parse_args()

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def number(convert: type, low: float, high: float = 10**9, above: bool = False) -> Callable:
    """A type for argparse: an int or a float (`convert`) from `low` to `high`; with `above`, not
    `low` itself."""

    def parse_number(text: str):
        value = convert(text)
        if not low <= value <= high or (above and value == low):
            limits = f"{'above' if above else 'from'} {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give a number {limits}")
        return value

    return parse_number


count = number(int, 1)
positive = number(float, 0, above=True)
weight = number(float, 0)  # of a loss: 0 leaves it out


def run(main: Callable[[], None]) -> None:
    """Calls a stage's main(). Bad input, a full disk, a missing permission or too little memory end
    in one `error:` line and status 2; Ctrl-C and SIGTERM in one line that says how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that has no letter for a file's name
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = Output(sys.stdout)
    try:
        main()
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            leave()
        return
    except (UserError, OSError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = "a smaller --batch, --crop, --size or --width, where the stage has them"
        fail(f"not enough memory: give {flags} ({error!s:.200})")
    except KeyboardInterrupt:
        close_bars()
        undoing = [flag for flag in ("--overwrite", "--redo") if flag in sys.argv]
        without = f" without {' and '.join(undoing)}" if undoing else ""
        if rank() == 0:  # torchrun's processes stop together
            print(f"\nstopped: the same command{without} continues", file=sys.stderr)
        sys.exit(130)


def leave() -> NoReturn:
    """Ends a process of torchrun's whose work is done, without Python's clearing up. Networks under
    DDP keep gloo's threads alive, and one that lets go of a tensor while Python clears up aborts
    the process."""
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)


class Output:
    """Standard output, which nobody may read to its end, such as `| head`: what is written after
    that is lost, but never the run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with self.reader_may_leave():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.reader_may_leave():
            self.stream.flush()

    @contextlib.contextmanager
    def reader_may_leave(self):
        try:
            yield
        except BrokenPipeError:  # what is written from now on goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def fail(message: str) -> NoReturn:
    """Ends the process with status 2 and one line."""
    close_bars()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was not enough. Of PyTorch's only CUDA's has a type."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    on_cpu = "can't allocate memory", "not enough memory"  # Linux and macOS, Windows
    elsewhere = "out of memory", "ALLOC_FAILED"  # MPS, cuDNN and cuBLAS
    return any(words in str(error) for words in (*on_cpu, *elsewhere))


def close_bars() -> None:
    """Ends progress bars, so that a message does not land inside one."""
    for bar in list(tqdm._instances):
        bar.close()


# ---- Processes of torchrun -----------------------------------------------------------------------


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def average(tensor: torch.Tensor) -> torch.Tensor:
    """Replaces a tensor by its mean over the processes."""
    if world() > 1:
        with explain_lost_process():
            torch.distributed.all_reduce(tensor)
        tensor /= world()
    return tensor


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Around what all processes do together: UserError if one of them is gone."""
    try:
        yield
    except (RuntimeError, ValueError):  # a connection is gone, or was never made
        raise UserError("another process ended; its message is above or below") from None


def from_first(number: float) -> float:
    """Tells all processes the first one's number: the mean of `world() * number` and zeros."""
    mine = torch.tensor(world() * float(number)) if rank() == 0 else torch.tensor(0.0)
    return average(mine).item()


def gather(value: object) -> list:
    """What each process gives, in the order of their ranks; told to all."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        with explain_lost_process():
            torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Returns when all processes have come here."""
    from_first(0.0)


# ---- Files: whole or not at all ------------------------------------------------------------------


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then gives it that name. Others may read it if the
    umask lets them: safetensors' own writer would keep its files to their owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. A path's bytes that are not UTF-8 become question marks."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_png(path: Path, image: Image.Image) -> None:
    replace_file(path, lambda part: image.save(part, format="PNG", compress_level=4))


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 if it begins so, as PowerShell writes it. A byte order
    mark is left out, and Windows' line ends become ours."""
    data = Path(path).read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n")


def read_json(path: Path, maker: str = "") -> dict:
    """The JSON object in a file. UserError if it is missing (`maker` makes it) or broken."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist{maker and f'; {maker} makes it'}")
    with explain(f"{path} cannot be read as JSON"):
        value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON dict, not a {type(value).__name__}")
    return value


def files_below(folder: Path, name: str) -> list[Path]:
    """All files of this name. Left out are runs that --overwrite was deleting when it was killed,
    which lie in folders named .*.old."""
    return [path for path in sorted(folder.rglob(name)) if not path.parent.match(".*.old")]


def check_name(name: object, where: object) -> None:
    """Concepts' names become file names. UserError where one could lead to another folder, hide a
    file or be no file name on some system."""
    good = (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode()) <= 200
        and name[0] not in ".- "
        and not set(name) & set('/\\:*?"<>|')
    )
    if not good:
        raise UserError(f"{where}: {name!s:.80} is no name for a file: use letters, digits, - _")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes: how an adapter names the base that it belongs to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes a safetensors file. metadata: a JSON object, stored as text under the one key "about",
    as several keys would be written in random order and equal runs would not give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"about": json.dumps(metadata, ensure_ascii=False)}
    with explain(f"{path} cannot be written"):  # a full disk, among others
        replace_file(path, lambda part: save_file(tensors, part, about))


def read_tensors(path: Path, file_kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a file that write_tensors wrote with metadata["kind"] = file_kind.
    UserError for anything else, and for numbers that are not finite."""
    path = Path(path)
    if not path.is_file():
        maker = "; 01_distill_pairs.py makes it" if file_kind == "features" else ""
        raise UserError(f"{path} does not exist{maker}")
    with explain(f"{path} is no {file_kind} of ours, or truncated"):
        size = path.stat().st_size  # what the tensors take in memory
        if size > 2**31 and file_kind != "state":  # only a state, with hypernetworks, is so large
            raise ValueError(f"{size / 1e9:.1f} GB")
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("about", "{}"))
            if metadata.get("kind") != file_kind:
                raise ValueError(f"it says that it is a {metadata.get('kind')!s:.80}")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        for name, tensor in tensors.items():
            if file_kind != "state" and not tensor.float().isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
    return tensors, metadata


# ---- A run's folder: settings.json, the product, result.json last, and a lock beside it ----------

LOCKS: dict[Path, filelock.FileLock] = {}  # held by this process until it ends


def begin_run(out: Path, settings: dict, overwrite: bool, renew: bool = False) -> bool:
    """Makes `out` this run's folder; call it once all input is known to be good.

    settings: what the result depends on, flags and the hashes of what is read. A folder with other
    settings is an error; `overwrite` deletes it, but never a folder that is not a run. Returns True
    if the run there is complete already, unless it is to be renewed (`renew`)."""
    done = rank() == 0 and claim_folder(out.resolve(), settings, overwrite, renew)
    return bool(from_first(done))


def claim_folder(out: Path, settings: dict, overwrite: bool, renew: bool) -> bool:
    """begin_run in the first process."""
    settings = json.loads(json.dumps(settings, default=str))  # as they will be read again
    if overwrite or renew or not (out / "result.json").exists():
        lock_folder(out)
    names = check_folder(out, settings, overwrite)
    if "result.json" in names and not overwrite and not renew:
        print(f"done already: {out / 'result.json'} (--overwrite does it again)")
        return True
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # left where a process was killed before the last rmtree
    if overwrite and names:
        out.rename(old)
        shutil.rmtree(old)
    (out / "result.json").unlink(missing_ok=True)
    write_json(out / "settings.json", settings)
    return False


def lock_folder(out: Path) -> None:
    """Takes the lock beside a run's folder, which the operating system frees when this process
    ends. UserError if another process has it."""
    path = out.with_name(f".{out.name}.lock")
    lock = LOCKS.setdefault(path, filelock.FileLock(path))
    try:
        take_lock(lock, "--out", timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is at work in {out}: wait until it ends") from None


def take_lock(lock: filelock.FileLock, flag: str, timeout: float = -1):
    """Acquires a lock; what this returns frees it at the end of a `with`. UserError where that
    cannot be done, as on network shares without locks. flag: names the lock's folder."""
    try:
        return lock.acquire(timeout=timeout)
    except filelock.Timeout:  # an OSError too
        raise
    except (NotImplementedError, OSError) as error:
        where = f"give {flag} on a disk that you may write to, and which has locks"
        raise UserError(f"{lock.lock_file} cannot be locked: {where} ({error})") from None


def check_folder(out: Path, settings: dict, overwrite: bool) -> set[str]:
    """The names of the files in a run's folder. UserError if it is another run's, or none."""
    names = {path.name for path in out.glob("*") if not path.match(".*.part")}
    saved = read_json(out / "settings.json") if "settings.json" in names else {}
    if out.is_file() or (names and "stage" not in saved):
        raise UserError(f"{out} holds files that no stage made; give another --out")
    if not names or overwrite:
        return names
    for key in sorted({*saved, *settings}):
        if saved.get(key) != settings.get(key):
            differ = f"other settings ({key} {saved.get(key)!r} there, {settings.get(key)!r} here)"
            advice = "give another --out or --overwrite"
            if key in ("epochs", "steps") and "init" in settings:  # stage 3, whose rates fall to 0
                advice += f"; to train longer, --init {out}/generator.safetensors --out another"
            raise UserError(f"{out} holds a run with {differ}: {advice}")
    return names


# Flags that leave the result as it is, or change what is rounded. --accumulate is none of these: a
# U-Net's dropout, DCGAN's batch norms and CycleGAN's pools see micro-batches.
NO_SETTINGS = ("device", "compile", "overwrite", "demo", "fid", "tensorboard")


def settings_of(args: argparse.Namespace, **more: object) -> dict:
    """What begin_run compares: every flag that changes the result, and `more`, such as hashes of
    what is read. Paths are left out, so that a run may be moved."""
    settings = {}
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        has_paths = any(isinstance(each, Path) for each in values)
        if name not in NO_SETTINGS and not has_paths:
            settings[name] = value
    return {**settings, **more}


def write_result(args, tables: dict[str, list[dict]], reads=(), marks=(), out=None) -> None:
    """Prints the tables {title: rows} and ends the run in `out` (default: args.out) with
    result.json, which holds them.

    marks: what a reader of the numbers must know, such as a stand-in for CLIP. "demo" is added, and
    the marks of the runs in the folders `reads`. The seconds are those since begin_run wrote
    settings.json."""
    out = out or args.out
    all_marks = ["demo"] if args.demo else []
    all_marks.extend(marks)
    for folder in reads:
        if (folder / "result.json").exists():
            found = read_json(folder / "result.json").get("marks")
            all_marks.extend(map(str, found) if isinstance(found, list) else [])
    seconds = time.time() - (out / "settings.json").stat().st_mtime
    result = {
        "stage": args.stage,
        "marks": list(dict.fromkeys(all_marks)),
        "seconds": round(seconds, 1),
        "tables": tables,
    }
    write_json(out / "result.json", result)  # before anything is printed, which may fail
    for title, rows in tables.items():
        print("\n" + markdown(title, rows))


# ---- Tables: python runs.py [folder] -------------------------------------------------------------


def markdown(title: str, rows: Sequence[dict]) -> str:
    """Rows of dicts as a Markdown table. A cell that a row lacks is blank; marks come last."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "marks" in columns:
        columns.remove("marks")
        columns.append("marks")
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """A value as a table shows it: floats with four digits, None blank."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def merge_seeds(rows: Sequence[dict]) -> dict:
    """One row for runs that differ in their seed alone: a number that varies becomes its mean and
    sample standard deviation, a cell that one of them lacks is blank."""
    merged = dict(rows[0])
    if len(rows) > 1:
        merged["run"] = ", ".join(row["run"] for row in rows) + " (mean ± sd)"
    for column in merged.keys() - {"run"}:
        values = [row.get(column) for row in rows]
        if None in values:
            merged[column] = None
        elif len(set(map(str, values))) > 1:
            merged[column] = f"{cell(float(np.mean(values)))} ± {np.std(values, ddof=1):.2g}"
    return merged


def read_tables(folder: Path) -> dict[tuple[str, str], list[list[dict]]]:
    """{(stage, title): groups of rows} of all complete runs below a folder. A group holds the rows
    of equal runs of different seeds: settings, marks, words and position in the table are equal."""
    tables = {}
    for path in files_below(folder, "result.json"):
        result = read_json(path)
        settings = {**read_json(path.with_name("settings.json")), "seed": None}
        with explain(f"{path} is no stage's result"):
            run = path.parent.relative_to(folder).as_posix()
            marks = ", ".join(result["marks"])
            for title, rows in result["tables"].items():
                groups = tables.setdefault((str(result["stage"]), title), {})
                for position, row in enumerate(rows):
                    words = [value for value in row.values() if isinstance(value, str)]
                    same = json.dumps([settings, marks, position, words], sort_keys=True)
                    groups.setdefault(same, []).append({"run": run, "marks": marks, **row})
    return {key: list(groups.values()) for key, groups in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"))
    folder = parser.parse_args().runs
    tables = read_tables(folder)
    if not tables:
        raise UserError(f"no run below {folder} is complete")
    for stage, title in sorted(tables, key=lambda key: key[0]):
        rows = [merge_seeds(group) for group in tables[stage, title]]
        print(markdown(f"{stage}.py: {title}", rows))


if __name__ == "__main__":
    run(main)
