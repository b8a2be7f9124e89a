"""Command lines, one-line errors, torchrun's processes, whole files, run folders and tables.

    python runs.py [folder]      prints the tables of all complete runs below a folder (runs/)

A run's folder gets settings.json first, then the run's files, and result.json last. Nothing here
knows a network or a picture.
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

# OpenMP's threads wait for each other at each of a thousand operators a step. Unless told otherwise
# they wait in a busy loop, even when another process needs the core. With GOMP_SPINCOUNT they sleep
# after 3,000 turns, some 40 microseconds: alone, a step is as fast as with any other number.
# OMP_WAIT_POLICY=PASSIVE lets them sleep at once. torch reads the variables when it is imported, so
# stages import this file first.
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
    """Turns whatever is raised inside into a UserError of these words and the error's own. It is
    for files and numbers from outside, and for libraries that read them, which raise anything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if not reason or isinstance(error, KeyError):  # a key alone does not say what is wrong
            reason = repr(error)
        raise UserError(f"{words}: {reason}") from error


# ---- The command line ----------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows the docstring as it is written, and after each flag's help its default, if it
    has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse's parser, with the flags that all stages have, and errors as UserError. doc: the
    stage's docstring; out: default of --out."""

    def __init__(self, doc: str, out: str):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)
        flag = self.add_argument
        flag(
            "--demo",
            action="store_true",
            help="use defaults of a small example in runs/demo/, which downloads no models",
        )
        flag("--out", type=Path, default=out, help="the folder that this stage writes")
        flag(
            "--seed",
            type=number(int, 0, 2**31 - 1),
            default=0,
            help="number that all random choices depend on; on a CPU equal seeds give equal files "
            "(default: 0)",
        )
        flag(
            "--device",
            default="auto",
            help="auto (CUDA if there is a GPU, else MPS, else the CPU) or a torch device: cuda:1",
        )
        flag("--overwrite", action="store_true", help="delete the run in --out and start again")

    def parse(self, demo: dict) -> argparse.Namespace:
        """The parsed flags, and the script's name as .stage. demo: defaults that hold with --demo;
        then folders in runs/ become folders in runs/demo/, too."""
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
    """A type for argparse: numbers, int or float (`convert`), from `low` to `high`. above: `low`
    itself is not allowed."""

    def parse_number(text: str):
        value = convert(text)
        if not low <= value <= high or (above and value == low):
            limits = f"{'above' if above else 'from'} {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give a number {limits}")
        return value

    return parse_number


count = number(int, 1)
positive = number(float, 0, above=True)
weight = number(float, 0)


def run(main: Callable[[], None]) -> None:
    """Calls a stage's main(). Bad input, a full disk, a missing permission or too little memory end
    in one `error:` line and status 2; Ctrl-C and SIGTERM in one line that says how to continue."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names with letters that a console lacks
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
    """Ends one of torchrun's processes when its work is done, without Python's clean-up. Networks
    under DDP keep gloo's threads alive, and the process aborts if one of these frees a tensor
    during the clean-up."""
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)


class Output:
    """Standard output whose reader may leave, such as `| head`. What is written after that is lost,
    but the run goes on."""

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
        except BrokenPipeError:  # from now on write to nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def fail(message: str) -> NoReturn:
    """Ends the process with one `error:` line and status 2."""
    close_bars()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory was not enough. PyTorch has an error type of its own for
    CUDA only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    phrases = [
        "can't allocate memory",  # the CPU on Linux and macOS
        "not enough memory",  # the CPU on Windows
        "out of memory",  # MPS
        "ALLOC_FAILED",  # cuDNN and cuBLAS
    ]
    return any(phrase in str(error) for phrase in phrases)


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
    """Sets a tensor, in place, to its mean over the processes. Returns it."""
    if world() > 1:
        with explain_lost_process():
            torch.distributed.all_reduce(tensor)
        tensor /= world()
    return tensor


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """For what all processes do together: UserError if one of them has ended."""
    try:
        yield
    except (RuntimeError, ValueError):  # a connection was lost, or never made
        raise UserError("another process ended; its message is above or below") from None


def from_first(number: float) -> float:
    """The first process's number, in all processes: the mean of `world() * number` and zeros."""
    mine = torch.tensor(world() * float(number)) if rank() == 0 else torch.tensor(0.0)
    return average(mine).item()


def gather(value: object) -> list:
    """The values of all processes in the order of their ranks, in all processes."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        with explain_lost_process():
            torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until all processes have called it."""
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
    """Writes text in UTF-8. Surrogates, which stand for a path's bytes that are not UTF-8, become
    question marks."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_png(path: Path, image: Image.Image) -> None:
    replace_file(path, lambda part: image.save(part, format="PNG", compress_level=4))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 if it begins with its byte order mark, as
    PowerShell's do. The mark is left out, and Windows' line ends become \\n."""
    data = Path(path).read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n")


def read_json(path: Path, maker: str = "") -> dict:
    """The JSON object in a file. UserError if the file is missing or broken. maker: the script that
    makes it, for the message."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist{maker and f'; {maker} makes it'}")
    with explain(f"{path} cannot be read as JSON"):
        value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON dict, not a {type(value).__name__}")
    return value


def files_below(folder: Path, name: str) -> list[Path]:
    """All files of this name in a folder and below it, except in folders .*.old: runs that
    --overwrite was deleting when it was killed."""
    return [path for path in sorted(folder.rglob(name)) if not path.parent.match(".*.old")]


def check_name(name: object, where: object) -> None:
    """UserError unless a concept's name can be a file's name on all systems, and one that neither
    leads to another folder nor hides the file. where: the file or flag that gave it, for the
    message."""
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
    """SHA-256 of a file's bytes, in hexadecimal. An adapter names its base by it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes a safetensors file. metadata: a JSON object, stored as text under the one key "about",
    as several keys would be written in random order and equal runs would not give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"about": json.dumps(metadata, ensure_ascii=False)}
    with explain(f"{path} cannot be written"):  # a full disk, among others
        replace_file(path, lambda part: save_file(tensors, part, about))


def read_tensors(path: Path, file_kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata) of a file that write_tensors wrote with metadata["kind"] = file_kind.
    UserError for any other file, and for numbers that are not finite."""
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

LOCKS: dict[Path, filelock.FileLock] = {}  # {path: lock}, held by this process until it ends


def begin_run(out: Path, settings: dict, overwrite: bool, renew: bool = False) -> bool:
    """Makes `out` this run's folder. Call it once all input is known to be good. Returns True if
    the run there is complete already.

    settings: all that the result depends on, flags and hashes of what is read. UserError if the
    folder holds a run with other settings; `overwrite` deletes that, but never a folder that is no
    run. renew: a complete run is continued, too."""
    done = rank() == 0 and claim_folder(out.resolve(), settings, overwrite, renew)
    return bool(from_first(done))


def claim_folder(out: Path, settings: dict, overwrite: bool, renew: bool) -> bool:
    """What begin_run does in the first process."""
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
    """Takes the lock beside a run's folder, which the operating system releases when this process
    ends. UserError if another process has it."""
    path = out.with_name(f".{out.name}.lock")
    lock = LOCKS.setdefault(path, filelock.FileLock(path))
    try:
        take_lock(lock, "--out", timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is at work in {out}: wait until it ends") from None


def take_lock(lock: filelock.FileLock, flag: str, timeout: float = -1):
    """Acquires a lock, which a `with` of the result releases. UserError where that is impossible,
    as on network shares without locks. flag: the flag that names the lock's folder."""
    try:
        return lock.acquire(timeout=timeout)
    except filelock.Timeout:  # an OSError too, but the caller's to handle
        raise
    except (NotImplementedError, OSError) as error:
        where = f"give {flag} on a disk that you may write to, and which has locks"
        raise UserError(f"{lock.lock_file} cannot be locked: {where} ({error})") from None


def check_folder(out: Path, settings: dict, overwrite: bool) -> set[str]:
    """The names of the files in a run's folder. UserError if it holds another run, or files that no
    stage made."""
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


# Flags that do not change the result, except by rounding. --accumulate is not among them, as it
# changes a U-Net's dropout, DCGAN's batch norms and CycleGAN's pools.
NO_SETTINGS = ("device", "compile", "overwrite", "demo", "fid", "tensorboard")


def settings_of(args: argparse.Namespace, **more: object) -> dict:
    """The settings for begin_run: all flags that change the result, and `more`, such as hashes of
    what is read. Flags that are paths are left out, so that folders may be moved."""
    settings = {}
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        has_paths = any(isinstance(each, Path) for each in values)
        if name not in NO_SETTINGS and not has_paths:
            settings[name] = value
    return {**settings, **more}


def write_result(args, tables: dict[str, list[dict]], reads=(), marks=(), out=None) -> None:
    """Writes result.json, by which the run in `out` (default: args.out) is complete, and prints its
    tables, {title: rows}.

    marks: what a reader of the numbers must know, such as that CLIP was a stand-in. The marks of
    the runs in the folders `reads` are added, and "demo" with --demo. The result's seconds are
    those since begin_run wrote settings.json."""
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
    """Rows, dicts by column, as a Markdown table. A cell that a row lacks is blank; the column
    "marks" comes last."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "marks" in columns:
        columns.remove("marks")
        columns.append("marks")
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """A value as text for a table: floats with four digits, None blank."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def merge_seeds(rows: Sequence[dict]) -> dict:
    """One row for the rows of runs that differ only in their seed: a number that varies becomes its
    mean ± sample standard deviation; a cell that one of them lacks becomes blank."""
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
    of runs that differ only in their seed, which have equal settings, marks, words and positions in
    the table."""
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
    parser.add_argument(
        "runs", nargs="?", type=Path, default=Path("runs"), help="folder of runs (default: runs)"
    )
    folder = parser.parse_args().runs
    tables = read_tables(folder)
    if not tables:
        raise UserError(f"no run below {folder} is complete")
    for stage, title in sorted(tables, key=lambda key: key[0]):
        rows = [merge_seeds(group) for group in tables[stage, title]]
        print(markdown(f"{stage}.py: {title}", rows))


if __name__ == "__main__":
    run(main)
