"""What every stage does around its work: flags, one-line errors, whole files, run folders.

    python runs.py [folder]      prints the tables of all complete runs below a folder (runs/)

A run's folder holds settings.json first, its files, and result.json last. Nothing here knows a
network or a picture.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
    """Turns whatever is raised inside into a UserError: these words, then the error's own.
    Damaged files, strangers' numbers and libraries that read them raise anything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        bare = isinstance(error, KeyError) or not reason  # nothing but a key says nothing
        raise UserError(f"{words}: {repr(error) if bare else reason}") from error


# ---- The command line ----------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and after each flag's sentence its default, if it has one."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the flags of all stages. Defaults are the paper's."""

    def __init__(self, doc: str, out: str):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)
        flag = self.add_argument
        flag("--demo", action="store_true", help="small defaults, no model hub, in runs/demo/")
        flag("--out", type=Path, default=out, help="the folder that this stage writes")
        flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="equal seeds, equal files")
        flag("--device", default="auto", help="auto (CUDA, MPS, CPU) or a torch device: cuda:1")
        flag("--overwrite", action="store_true", help="delete the run in --out and start again")

    def parse(self, demo: dict) -> argparse.Namespace:
        """The flags, and the stage's name. With --demo its defaults hold instead, and runs/ becomes
        runs/demo/."""
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
    """A type for argparse: an int or a float from `low` on (or `above` it) up to `high`."""

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
    """Calls a stage's main(). Bad input, a full disk or a missing permission end in one `error:`
    line and status 2; Ctrl-C and SIGTERM in one line that says how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        if torch.distributed.is_initialized():  # its threads must end before Python does
            gc.collect()  # networks under DDP, which hold the group
            torch.distributed.destroy_process_group()
        return
    except (UserError, OSError) as error:
        status, message = 2, "error: " + " ".join(str(error).split())
    except KeyboardInterrupt:
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        status, message = 130, f"\nstopped: the same command{without} continues"
    for bar in list(tqdm._instances):  # a bar's last line comes before the message, not into it
        bar.close()
    if status == 2 or rank() == 0:  # torchrun's processes stop together
        print(message, file=sys.stderr)
    sys.exit(status)


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
        try:
            torch.distributed.all_reduce(tensor)
        except (RuntimeError, ValueError):  # a connection is gone, or was never made
            raise UserError("another process ended; its message is above or below") from None
        tensor /= world()
    return tensor


def from_first(number: float) -> float:
    """The first process's number, told to all of them."""
    return average(torch.tensor(float(number) * world() if rank() == 0 else 0.0)).item()


def barrier() -> None:
    """Returns when all processes have come here."""
    from_first(0.0)


# ---- Files: whole or not at all ------------------------------------------------------------------


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then gives it that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """In UTF-8, with ? for the bytes of a path that are none."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_png(path: Path, image: Image.Image) -> None:
    replace_file(path, lambda part: image.save(part, format="PNG", compress_level=4))


def read_json(path: Path, maker: str = "") -> dict:
    """The JSON object in a file. UserError if it is missing (`maker` makes it) or broken."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist{maker and f'; {maker} makes it'}")
    with explain(f"{path} cannot be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON dict, not a {type(value).__name__}")
    return value


def files_below(folder: Path, name: str) -> list[Path]:
    """All files of a name, but those of runs that --overwrite was deleting when it was killed."""
    return [path for path in sorted(folder.rglob(name)) if not path.parent.match(".*.old")]


def check_name(name: object, where: object) -> None:
    """UserError unless a concept's name, which becomes a file's, can lead nowhere else."""
    good = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= 200
    if not good or name[0] in ".- " or set(name) & set('/\\:*?"<>|'):
        raise UserError(f"{where}: {name!s:.80} is no name for a file: use letters, digits, - _")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes: how an adapter names the base that it belongs to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """A safetensors file whose metadata has one key, "about": a JSON object. (Several keys are
    written in random order, and the same run would not give the same bytes.)"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"about": json.dumps(metadata, ensure_ascii=False)}
    with explain(f"{path} cannot be written"):  # a full disk, among others
        replace_file(path, lambda part: save_file(tensors, part, about))


def read_tensors(path: Path, file_kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a file that write_tensors wrote with this metadata["kind"];
    UserError for anything else, such as weights that are not finite."""
    path = Path(path)
    if not path.is_file():
        maker = "; 01_distill_pairs.py makes it" if file_kind == "features" else ""
        raise UserError(f"{path} does not exist{maker}")
    with explain(f"{path} is no {file_kind} of ours, or truncated"):
        size = path.stat().st_size  # what it takes in memory; a state holds hypernetworks
        if size > 2**31 and file_kind != "state":
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

LOCKS: dict[Path, filelock.FileLock] = {}


def begin_run(out: Path, settings: dict, overwrite: bool, renew: bool = False) -> bool:
    """Makes `out` this run's folder; call it once all input is known to be good. True: the run
    there is complete, and not to be renewed. settings: what the result depends on, flags and the
    hashes of what is read. A folder with other settings is an error; `overwrite` deletes it, but
    never a folder that is not a run."""
    done = rank() == 0 and claim_folder(out.resolve(), settings, overwrite, renew)
    return bool(from_first(done))


def claim_folder(out: Path, settings: dict, overwrite: bool, renew: bool) -> bool:
    """begin_run in the first process."""
    settings = json.loads(json.dumps(settings, default=str))
    path = out.with_name(f".{out.name}.lock")  # held by the operating system, until this ends
    if overwrite or renew or not (out / "result.json").exists():
        try:
            LOCKS.setdefault(path, filelock.FileLock(path)).acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"another process is at work in {out}: wait until it ends") from None
    names = check_folder(out, settings, overwrite)
    if "result.json" in names and not overwrite and not renew:
        print(f"done already: {out / 'result.json'} (--overwrite does it again)")
        return True
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed two lines below
    if overwrite and names:
        out.rename(old)
        shutil.rmtree(old)
    (out / "result.json").unlink(missing_ok=True)
    write_json(out / "settings.json", settings)
    return False


def check_folder(out: Path, settings: dict, overwrite: bool) -> set[str]:
    """The names of the files in a run's folder. UserError if it is not this run's."""
    names = {path.name for path in out.glob("*") if not path.match(".*.part")}
    saved = read_json(out / "settings.json") if "settings.json" in names else {}
    if out.is_file() or names and "stage" not in saved:
        raise UserError(f"{out} holds files that no stage made; give another --out")
    for key in sorted({*saved, *settings}) if names and not overwrite else ():
        if saved.get(key) != settings.get(key):
            differ = f"other settings ({key} {saved.get(key)!r} there, {settings.get(key)!r} here)"
            raise UserError(f"{out} holds a run with {differ}: give another --out or --overwrite")
    return names


def settings_of(args: argparse.Namespace, **more: object) -> dict:
    """What begin_run compares: every flag that changes the result, and what the stage adds, such as
    hashes of what it reads; no paths, so that a run may be moved."""
    left_out = ("device", "overwrite", "demo", "fid")
    flags = {key: x for key, x in vars(args).items() if not isinstance(x, Path)}
    return {**{key: flags[key] for key in flags if key not in left_out}, **more}


def write_result(args, tables: dict[str, list[dict]], reads=(), marks=(), out=None) -> None:
    """Prints the tables {title: rows} and ends the run in `out` (default: args.out) with them.
    marks: what a reader of the numbers must know; "demo", and the marks of the runs whose folders
    this one reads, are added. Its seconds are those since begin_run wrote settings.json."""
    out = out or args.out
    marks = [*(["demo"] if args.demo else []), *marks]
    for path in [folder / "result.json" for folder in reads]:
        found = read_json(path).get("marks") if path.exists() else None
        marks += map(str, found) if isinstance(found, list) else []
    for title, rows in tables.items():
        print("\n" + markdown(title, rows))
    seconds = round(time.time() - (out / "settings.json").stat().st_mtime, 1)
    result = {"stage": args.stage, "marks": list(dict.fromkeys(marks)), "seconds": seconds}
    write_json(out / "result.json", {**result, "tables": tables})


# ---- Tables: python runs.py [folder] -------------------------------------------------------------


def markdown(title: str, rows: Sequence[dict]) -> str:
    """Rows of dicts as a Markdown table, marks last; a measure that a row lacks is left blank."""
    columns = sorted(dict.fromkeys(key for row in rows for key in row), key="marks".__eq__)
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")


def merge_seeds(rows: Sequence[dict]) -> dict:
    """Rows as one: numbers that vary as mean ± sample standard deviation, blank what one lacks."""
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


def main() -> None:
    """Rows share a line if but for the seed their settings, marks, place and words are equal."""
    parser = argparse.ArgumentParser(description="Prints the tables of all runs below a folder.")
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"))
    folder, tables = parser.parse_args().runs, {}  # {(stage, title): {what is equal: rows}}
    for path in files_below(folder, "result.json"):
        result, settings = read_json(path), read_json(path.with_name("settings.json"))
        run = {"run": path.parent.relative_to(folder).as_posix()}
        with explain(f"{path} is no stage's result"):
            run["marks"] = ", ".join(result["marks"])
            for title, rows in result["tables"].items():
                table = tables.setdefault((str(result["stage"]), title), {})
                for place, row in enumerate(rows):
                    words = [value for value in row.values() if isinstance(value, str)]
                    same = [{**settings, "seed": None}, run["marks"], place, words]
                    equal = table.setdefault(json.dumps(same, sort_keys=True), [])
                    equal.append({**run, **row})
    if not tables:
        raise UserError(f"no run below {folder} is complete")
    for (stage, title), table in sorted(tables.items(), key=lambda x: x[0][0]):
        print(markdown(f"{stage}.py: {title}", [*map(merge_seeds, table.values())]))


if __name__ == "__main__":
    run(main)
