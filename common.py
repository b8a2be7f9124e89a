"""What the six stages share: run folders, pairs, networks, LoRA, hypernetworks, checkpoints, measures, tables.

    python common.py [runs]      print the tables of every result.json below a folder (default: runs)

Images in memory are float tensors (B, 3, H, W) with values in [-1, 1], or uint8 (N, 3, H, W) while they wait for their
batch. Networks are ordinary torch modules. A checkpoint is one safetensors file whose metadata says how to rebuild it.
"""

import argparse
import bisect
import contextlib
import copy
import dataclasses
import datetime
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator, NoReturn, Sequence

import filelock
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = (
    50_000_000  # Pillow refuses twice as many, 1.4 GB once decoded, and warns from here on
)
warnings.filterwarnings("ignore", module="PIL")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class UserError(Exception):
    """Bad input. `run` prints it as one line that begins `error:` and exits with status 2."""


def run(main: Callable[[], None]) -> None:
    """Calls a stage's main(). Bad input, a full disk or a missing permission end in one `error:` line and status 2;
    Ctrl-C and SIGTERM in one line that says how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        if (
            torch.distributed.is_initialized()
        ):  # its threads must end before Python does, or it may abort
            gc.collect()  # networks under DDP, which hold the group
            torch.distributed.destroy_process_group()
        return
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        message = None
    for bar in list(tqdm._instances):  # a bar's last line comes before the message, not into it
        bar.close()
    if message is not None:
        fail(message)
    if os.environ.get("RANK", "0") == "0":  # torchrun's processes stop together
        print(
            f"\nstopped: the same command{' without --overwrite' if '--overwrite' in sys.argv else ''} continues",
            file=sys.stderr,
        )
    sys.exit(130)


def until_stopped(steps: Iterable, save: Callable[[], None], world: int) -> Iterator:
    """The items of `steps`. SIGINT and SIGTERM wait until the loop's body has done with one; then save() is called and the run ends.
    Of several processes all stop after the same step once any has caught one, as a step of some needs the others, and the first
    saves (its own losses since the log's last row). A second signal doesn't wait; of several processes it is left to torchrun,
    which sends everyone one, and SIGKILL after 30 seconds."""
    caught = []

    def catch(number, frame):
        if caught and world == 1:
            raise KeyboardInterrupt
        caught.append(number)

    def anyone(value: bool) -> bool:  # on the CPU: nothing waits for a GPU
        flag = torch.tensor(float(value))
        try:
            average(flag, world)
        except RuntimeError:  # its connection is gone
            raise UserError("another process ended; its message is above or below")
        return flag.item() > 0

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for item in steps:
            yield item
            if anyone(bool(caught)):
                if world == 1 or torch.distributed.get_rank() == 0:
                    save()
                anyone(
                    False
                )  # none ends before the first has saved: torchrun would take it for a failure
                raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


POSITIVE = {
    "batch",
    "epochs",
    "search_epochs",
    "width",
    "save_every",
    "eval_every",
    "probe_steps",
    "lr",
    "lr_d",
    "lr_z",
    "lr_search",
    "alpha",
}  # flags of several stages that make no sense at 0 or below
WEIGHTS = {"l1", "cycle", "identity"}  # of losses: 0 leaves one out
FID_HELP = (
    "auto: FID on held-out photos if Inception's weights are in torch hub's cache or can be downloaded there (96 MB); "
    "a run that is done is not measured again"
)


class StageParser(argparse.ArgumentParser):
    """argparse with two dictionaries of defaults: the paper's, and the demo's where `--demo` is given. A flag given explicitly
    always wins, and `given` names it. A flag that can be repeated (action="append") replaces a default list, not extends it."""

    def __init__(self, doc: str, paper: dict, demo: dict):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.paper, self.demo = paper, {**paper, **demo}
        self.add_argument(
            "--demo",
            action="store_true",
            help="small defaults, no download, folders under runs/demo/",
        )
        self.add_argument("--out", type=Path, help="the folder that this stage writes")
        self.add_argument(
            "--seed", type=int, help="the same seed gives the same files on the same machine"
        )
        self.add_argument(
            "--device", help="auto (CUDA, else MPS, else CPU) or a torch device such as cuda:1"
        )
        self.add_argument(
            "--overwrite",
            action="store_true",
            help="delete the run that --out holds and start again",
        )

    def add_argument(self, *names, **options):
        key = names[0].lstrip("-").replace("-", "_")
        if key in getattr(self, "paper", {}):
            paper, demo = (
                " ".join(map(str, d[key])) if isinstance(d[key], list) else d[key]
                for d in (self.paper, self.demo)
            )
            default = (
                f" (default: {paper}{f'; demo: {demo}' if demo != paper else ''})"
                if paper or demo
                else ""
            )
            options["help"] = (options["help"] + default).replace("%", "%%")
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")

    def parse(self) -> argparse.Namespace:
        defaults = {
            "seed": 0,
            "device": "auto",
            **(self.demo if "--demo" in sys.argv[1:] else self.paper),
        }
        args = self.parse_args()
        self.given = {
            key for key, value in vars(args).items() if value is not None and value is not False
        }
        for key, value in defaults.items():
            if key not in self.given:
                setattr(args, key, value)
        for key in POSITIVE & vars(args).keys():
            value = getattr(args, key)
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise UserError(f"--{key.replace('_', '-')} {value}: give a number above 0")
        for key in WEIGHTS & vars(args).keys():
            if not 0 <= getattr(args, key) < math.inf:
                raise UserError(f"--{key} {getattr(args, key)}: give a number from 0 on")
        if not 0 <= args.seed < 2**31:
            raise UserError(f"--seed {args.seed}: give a number from 0 to {2**31 - 1}")
        return args


# ---------------------------------------------------------------------------------------------------------------------
# Files: whole or not at all


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type = dict, maker: str = ""):
    """The JSON in a file, which must be a dict (or `kind`). UserError if it is missing (`maker` makes it), broken or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist" + (f"; {maker} makes it" if maker else ""))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}")
    if not isinstance(value, kind):
        raise UserError(f"{path} should hold a JSON {kind.__name__}, not a {type(value).__name__}")
    return value


def check_name(name: object, where: object) -> None:
    """UserError unless a concept's name, which becomes a file's, can lead nowhere else."""
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not 0 < len(name.encode()) <= 200
        or name[0] in ".- "
        or set(name) & set('/\\:*?"<>|')
    ):
        raise UserError(
            f"{where}: concept {str(name)[:80]!r} cannot be a file's name: use letters, digits, - and _"
        )


def write_png(path: Path, image: Image.Image) -> None:
    replace_file(path, lambda aside: image.save(aside, format="PNG", compress_level=4))


def begin_run(out: Path, settings: dict, overwrite: bool) -> bool:
    """Makes `out` this run's folder; call it once all input is known to be good. True: the run there is complete.

    settings.json holds what the result depends on: the stage's name and its flags, and the hashes of what it reads.
    A folder that holds other settings is an error; `overwrite` deletes it, but never a folder that is not a run.
    Of several processes the first does this for all.
    """
    if not torch.distributed.is_initialized():
        return prepare_folder(out, settings, overwrite)
    verdict = torch.zeros(1)
    error = None
    if torch.distributed.get_rank() == 0:
        try:
            verdict += prepare_folder(out, settings, overwrite)
        except (UserError, OSError) as caught:
            error, verdict = caught, verdict - 1
    torch.distributed.broadcast(verdict, 0)
    if error:
        raise error
    if verdict < 0:
        sys.exit(2)  # the first process says why
    return bool(verdict)


def prepare_folder(out: Path, settings: dict, overwrite: bool) -> bool:
    """begin_run in one process. The folder is looked at again under its lock: another process may have had it until then."""
    settings = json.loads(json.dumps(settings, default=str))
    done = is_complete(out, settings, overwrite)
    if not done:
        lock_folder(out)
        done = is_complete(out, settings, overwrite)
    if done:
        print(f"done already: {out / 'result.json'} (--overwrite does it again)")
        return True
    for path in out.rglob(
        ".*.part"
    ):  # of a process that was killed while it wrote; in .fid, of one that may be at work
        path.unlink(missing_ok=True)
    if overwrite:  # settings.json last: the same command can go on deleting
        for path in sorted(
            out.iterdir(),
            key=lambda path: (path.name == "settings.json", path.name != "result.json"),
        ):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(out / "settings.json", settings)
    return False


def is_complete(out: Path, settings: dict, overwrite: bool) -> bool:
    """Whether the folder holds this run, complete. UserError if it holds something else."""
    names = (
        {path.name for path in out.iterdir() if not path.match(".*.part")} - {LOCK}
        if out.is_dir()
        else set()
    )
    if not names - {"settings.json"}:  # alone: a run that never began
        return False
    if "settings.json" not in names:
        raise UserError(f"{out} holds files that no stage made; give another --out")
    if overwrite:
        return False
    there = read_json(out / "settings.json")
    differ = [
        f"{key} {there.get(key)!r} there, {settings.get(key)!r} here"
        for key in sorted({*there, *settings})
        if there.get(key) != settings.get(key)
    ]
    if differ:
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(differ[:3])}); "
            "give another --out, or --overwrite to delete it"
        )
    return "result.json" in names


LOCK = ".lock"
LOCKS: dict[Path, filelock.FileLock] = {}


def lock_folder(out: Path) -> None:
    """Keeps other processes out of a run's folder until this one ends. The operating system holds the lock (flock; msvcrt on
    Windows), so nothing is left to clean up after SIGKILL; the empty file stays. NFS passes flock on to its server; on a file
    system that knows no locks filelock warns and goes by the file's existence."""
    out.mkdir(parents=True, exist_ok=True)
    lock = LOCKS.setdefault(out.resolve(), filelock.FileLock(out / LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"another process is at work in {out}: wait until it ends, or give another --out"
        )


def settings_of(args: argparse.Namespace, stage: str, **more: object) -> dict:
    """What begin_run compares: every flag that changes the result, and what the stage adds. Paths are left out: a stage adds
    a hash of what it reads, so a run may be moved, and notices that its input changed."""
    flags = {
        key: value
        for key, value in vars(args).items()
        if not isinstance(value, Path)
        and key not in ("device", "overwrite", "demo", "cache_gb", "fid")
    }
    return {"stage": stage, **flags, **more}


def write_result(
    out: Path, stage: str, began: float, marks: Sequence[str], tables: dict[str, list[dict]], **more
) -> None:
    """result.json, a stage's last file: it says that the run is complete, and holds the tables (title -> rows) that
    `python common.py` prints. marks: what a reader of the numbers must know, such as "demo"."""
    for title, rows in tables.items():
        print("\n" + markdown(title, rows))
    for raw in out.glob("pixels-*"):  # Pictures.hold made it; no step is left that would read it
        raw.unlink()
    write_json(
        out / "result.json",
        {
            "stage": stage,
            "marks": list(dict.fromkeys(marks)),
            "seconds": round(time.time() - began, 1),
            **more,
            "tables": tables,
        },
    )


def marks_of(args: argparse.Namespace, *folders: Path, clip: str = "") -> list[str]:
    """This run's marks and those of the runs whose folders it reads. clip: the text or image tower that had a part in it."""
    marks = ["demo"] if args.demo else []
    for folder in folders:
        if (folder / "result.json").exists():
            found = read_json(folder / "result.json").get("marks", [])
            if not isinstance(found, list) or not all(isinstance(mark, str) for mark in found):
                raise UserError(
                    f"{folder / 'result.json'} is no stage's result: marks {str(found)[:80]!r}"
                )
            marks += found
    return marks + clip_mark(clip)


def read_log(path: Path, step: int) -> list[dict]:
    """The rows of a log.jsonl up to the step from which a run continues."""
    if not step or not path.exists():
        return []
    try:
        rows = [
            row
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if row["step"] <= step
        ]
        for value in (
            value for row in rows for value in row.values()
        ):  # numbers, or a measure's by concept
            for number in value.values() if isinstance(value, dict) else [value]:
                if not isinstance(number, (int, float, type(None))):
                    raise ValueError(f"{number!r} is no number")
        return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is broken ({error!r}): --overwrite starts the run again")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes: how an adapter names the base that it belongs to."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and pairs

SUFFIXES = set(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .jp2 .avif .heic .ppm .pgm .tga".split()
)  # of picture files


def list_pictures(folder: Path, pattern: str = "*") -> list[Path]:
    """Sorted picture files, hidden ones left out; with the pattern "**/*" those of subfolders too."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file for a `with` block; UserError where it, or what the block does with it, fails."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist")
    except UserError:  # the block's own
        raise
    except Exception as error:  # a decoder may raise anything
        raise UserError(f"{path} is not a picture that can be read: {error}")


def turned(photo: Image.Image) -> Image.Image:
    """An opened picture's first frame, turned as its EXIF says, with 8 bits a channel."""
    photo = ImageOps.exif_transpose(photo)
    if (
        photo.mode.startswith("I") or photo.mode == "F"
    ):  # 16 or 32 bits of grey, which convert would clip
        values = np.asarray(photo, dtype=np.float32)
        top = (
            65535
            if photo.mode != "F"
            else next(top for top in (1, 255, 65535, values.max()) if values.max() <= top)
        )
        photo = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    return photo


def upright(photo: Image.Image) -> Image.Image:
    """The same as RGB (colour profiles are ignored), on white where it is transparent. Raises what Pillow raises if it is broken."""
    photo = turned(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def read_image(path: Path, size: int | None = None) -> torch.Tensor:
    """A picture file as uint8 (3, H, W); UserError if it cannot be read, or is not `size` x `size` where that is given."""
    with opened(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if size and tuple(pixels.shape[1:]) != (size, size):
        raise UserError(
            f"{path} is {pixels.shape[2]}x{pixels.shape[1]}; its folder's other pictures are {size}x{size}"
        )
    return pixels.contiguous()


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1, any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """float -1..1 (clamped) -> uint8 0..255, any shape."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def picture_grid(
    rows: Sequence[Sequence[torch.Tensor | None]],
    columns: Sequence[str],
    labels: Sequence[str],
    cell: int = 160,
) -> Image.Image:
    """A labelled grid: rows of uint8 (3, H, W) pictures (None leaves a gap), a heading per column, a label per row."""
    left, top, gap = 8 + 8 * max([len(label) for label in labels] + [0]), 22, 4
    sheet = Image.new(
        "RGB", (left + len(columns) * (cell + gap), top + len(rows) * (cell + gap)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        draw.text((left + x * (cell + gap) + 2, 5), column, fill="black", font_size=13)
    for y, (label, row) in enumerate(zip(labels, rows)):
        draw.text((4, top + y * (cell + gap) + cell // 2), label, fill="black", font_size=13)
        for x, pixels in enumerate(row):
            if pixels is not None:
                picture = to_pil(pixels)
                resample = (
                    Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
                )
                sheet.paste(
                    picture.resize((cell, cell), resample),
                    (left + x * (cell + gap), top + y * (cell + gap)),
                )
    return sheet


def ahead(pool: Executor, function: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """Maps in threads and in order like pool.map, but holds `depth` items: memory does not grow with their number."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def fingerprint(about: object, part: Callable[..., bytes], items: Iterable) -> str:
    """A hash of `about` (JSON) and part(item) of each item, called in threads: runs on different data have different settings."""
    digest = hashlib.sha256(json.dumps(about).encode())
    with ThreadPoolExecutor() as pool:
        for found in ahead(pool, part, items):
            digest.update(found)
    return digest.hexdigest()[:16]


def file_ends(path: Path, tail: int) -> bytes:
    """A file's first 24 bytes, its last `tail`, and its length in 8: enough to tell most pictures apart."""
    with open(path, "rb") as file:
        head, length = file.read(24), file.seek(0, os.SEEK_END)
        file.seek(max(0, length - tail))
        return head + file.read() + length.to_bytes(8, "big")


@dataclasses.dataclass(kw_only=True)
class Pictures:
    """Pictures in numbered places, read from their files until `decoded` or `hold` gives them a faster home. A subclass sets
    `places` (how many), `counts` (as steps_per_epoch takes them) and `fingerprint`, and has `load` and `plan`."""

    size: int  # S
    concepts: list[dict]  # [{"name": "sketch", "prompt": "..."}, ...]
    pixels: torch.Tensor | None = None  # (places, 3, S, S) uint8, where they are held in memory
    raw: Path | None = None  # a file of the same bytes, where they are held on disk

    def load(self, place: int) -> torch.Tensor:
        """uint8 (3, S, S), decoded from the place's own file; UserError if that is broken."""
        raise NotImplementedError

    def plan(
        self, step: int, batch: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of a step, a function of its arguments alone: the places (B, k) of its rows of k pictures, whether each is
        mirrored (B, k) bool, and the rows' concepts (B,) long."""
        raise NotImplementedError

    def read(self, place: int) -> torch.Tensor:
        """uint8 (3, S, S) from disk. Read, not mapped: pages of a mapping count as the process's memory. UserError if broken."""
        if self.raw is None:
            return self.load(place)
        count = 3 * self.size**2
        return torch.from_numpy(np.fromfile(self.raw, np.uint8, count, offset=place * count)).view(
            3, self.size, self.size
        )

    def take(self, places: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, S, S) on the CPU, of places (N,), wherever they are held."""
        if self.pixels is not None:
            return self.pixels[places.to(self.pixels.device)].cpu()
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self.read, places.tolist())))

    def decode(self, keep: Callable[[int, torch.Tensor], None], places: range) -> None:
        """Calls keep(place, uint8 (3, S, S)) for each place, from threads."""
        with ThreadPoolExecutor() as pool:
            done = ahead(pool, lambda place: keep(place, self.load(place)), places)
            for _ in tqdm(
                done, "decoding", len(places), leave=False, delay=2, disable=places.start > 0
            ):
                pass

    def decoded(self):
        """The same, held in the process's memory."""
        self.pixels = torch.empty(self.places, 3, self.size, self.size, dtype=torch.uint8)
        self.decode(self.pixels.__setitem__, range(self.places))
        return self

    def hold(
        self, cache_gb: float, folder: Path, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        """Decodes every picture once, into the first of these that has room: the device's memory (`cache_gb` for each process,
        and no more than half of what is free), a file in `folder`, which all processes read, and which a continued run finds
        there. Where neither has room, `batches` decodes files. The batches are the same bytes in each case."""
        places, picture = self.places, 3 * self.size**2
        raw = folder / f"pixels-{self.fingerprint}.u8"
        free = (
            torch.cuda.mem_get_info(device)[0]
            if device.type == "cuda"
            else psutil.virtual_memory().available / world
        )
        in_memory = places * picture <= min(cache_gb * 1e9, free / 2)
        there = raw.exists() and raw.stat().st_size == places * picture
        on_disk = (
            there or places * picture + 2e9 < shutil.disk_usage(folder).free
        )  # 2 GB stay free for checkpoints
        verdict = torch.tensor(
            [not in_memory, not on_disk, not there], dtype=torch.uint8, device=device
        )
        if world > 1:
            torch.distributed.all_reduce(
                verdict, torch.distributed.ReduceOp.MAX
            )  # what some process lacks, all lack
        in_memory, on_disk, there = (verdict == 0).tolist()
        bounds = [places * r // world for r in range(world + 1)]  # each process decodes its part
        if in_memory:
            self.pixels = torch.empty(
                places, 3, self.size, self.size, dtype=torch.uint8, device=device
            )
            self.decode(self.pixels.__setitem__, range(*bounds[rank : rank + 2]))
            for r in range(world if world > 1 else 0):
                torch.distributed.broadcast(self.pixels[bounds[r] : bounds[r + 1]], r)
            return
        if rank == 0:
            how = (
                f"held in {raw} until the run is complete"
                if on_disk
                else f"there is too little room in {folder} too, so files are decoded in each step"
            )
            print(
                f"{places:,} pictures, {places * picture / 1e9:.1f} GB, are more than --cache-gb or memory allows: {how}"
            )
        if on_disk and not there:
            self.write_raw(raw, range(*bounds[rank : rank + 2]), rank, world)
        self.raw = raw if on_disk else None

    def write_raw(self, raw: Path, places: range, rank: int, world: int) -> None:
        """All processes fill one file, which gets its name once it is whole."""
        part, picture = raw.with_suffix(".part"), 3 * self.size**2

        def keep(place: int, pixels: torch.Tensor) -> None:
            with open(part, "r+b") as file:
                file.seek(place * picture)
                file.write(pixels.numpy())

        barrier = torch.distributed.barrier if world > 1 else lambda: None
        try:
            if rank == 0:
                with open(part, "wb") as file:
                    file.truncate(self.places * picture)
            barrier()
            self.decode(keep, places)
            with open(part, "r+b") as file:
                os.fsync(file.fileno())
            barrier()
            if rank == 0:
                os.replace(part, raw)
            barrier()
        finally:
            if rank == 0:
                part.unlink(missing_ok=True)

    def batches(
        self, batch: int, steps: range, seed: int, rank: int, world: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields for each step this process's share of the plan, on the device: k tensors (B / world, 3, S, S) in [-1, 1] (of
        pairs: photo and edit), and concept (B / world,) long. Pictures that are not in memory are read by threads, two steps
        ahead: PIL, zlib and file reads let other threads run. On CUDA nothing here waits for the device. UserError if the
        shares are uneven."""
        if batch % world:
            raise UserError(f"--batch {batch} cannot be shared evenly by {world} processes")
        cuda = device.type == "cuda"

        def ask(step: int):
            rows, flips, concept = (part[rank::world] for part in self.plan(step, batch, seed))
            k, concept, flips, places = (
                rows.shape[1],
                concept.clone(),
                flips.T.flatten(),
                rows.T.flatten(),
            )  # (k B / world,)
            if self.pixels is not None:
                return k, concept, flips, places, ()
            pixels = torch.empty(
                len(places), 3, self.size, self.size, dtype=torch.uint8, pin_memory=cuda
            )
            return (
                k,
                concept,
                flips,
                pixels,
                pool.map(functools.partial(fill, pixels), range(len(places)), places.tolist()),
            )

        def fill(pixels: torch.Tensor, i: int, place: int) -> None:
            pixels[i] = self.read(place)

        def send(
            tensor: torch.Tensor,
        ) -> torch.Tensor:  # only a copy from pinned memory lets the program run on
            return (
                tensor.pin_memory().to(device, non_blocking=True)
                if cuda and not tensor.is_cuda
                else tensor.to(device)
            )

        with ThreadPoolExecutor() as pool:
            waiting = deque(map(ask, steps[:2]))
            for step in steps:
                if step + 2 in steps:
                    waiting.append(ask(step + 2))
                k, concept, flips, pixels, reading = waiting.popleft()
                for _ in reading:  # wait for the threads; what one of them raised is raised here
                    pass
                if self.pixels is not None:  # pixels are places: gathered where the pictures are
                    at_home = self.pixels.device.type == device.type
                    pixels = self.pixels[send(pixels)] if at_home else self.pixels[pixels]
                pixels, flips = send(pixels), send(flips).view(-1, 1, 1, 1)
                yield *to_float(torch.where(flips, pixels.flip(-1), pixels)).chunk(k), send(concept)


@dataclasses.dataclass(kw_only=True)
class Pairs(Pictures):
    """One split of a pairs folder. First come the photos' places, then concept by concept its edits', so that one index gathers
    both halves of a batch."""

    folder: Path  # <pairs>/train or <pairs>/test
    names: list[str]  # file names of the photos, and of their edits
    rows: list[torch.Tensor]  # per concept (n_c,) long: which photo each of its edits shows

    def __post_init__(self):
        self.counts = [len(rows) for rows in self.rows]
        self.starts = np.cumsum(
            [len(self.names), *self.counts]
        ).tolist()  # each concept's first place, and the end
        self.places = self.starts[-1]
        self.photo_of = torch.cat(
            [torch.arange(len(self.names)), *self.rows]
        )  # (places,): the photo's place
        self.fingerprint = self.check()

    @property
    def photos(self) -> torch.Tensor:
        """(N, 3, S, S) uint8, of decoded pairs."""
        return self.pixels[: len(self.names)]

    @property
    def edits(self) -> Sequence[torch.Tensor]:
        """Per concept (n_c, 3, S, S) uint8, of decoded pairs: edits[c][i] is made of photos[rows[c][i]]."""
        return self.pixels[len(self.names) :].split(self.counts)

    def parts(self, concept: int, count: int = 32) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A concept's photos and edits in order, uint8 (count, 3, S, S) each."""
        for start in range(0, self.counts[concept], count):
            photos = self.rows[concept][start : start + count]
            yield (
                self.take(photos),
                self.take(self.starts[concept] + start + torch.arange(len(photos))),
            )

    def statistics(self, concept: int) -> Path | None:
        """Where Inception's statistics of a concept's edits are kept, in stage 1's folder."""
        return (
            self.folder.parent
            / ".fid"
            / f"{self.folder.name}-{self.concepts[concept]['name']}.safetensors"
        )

    def plan(self, step, batch, seed):
        picks, flips = draw_picks(self.counts, batch, step, seed)
        edits = torch.tensor(self.starts)[picks[:, 0]] + picks[:, 1]
        return (
            torch.stack([self.photo_of[edits], edits], 1),
            flips[:, None].expand(-1, 2),
            picks[:, 0],
        )

    def path(self, place: int) -> Path:
        concept = bisect.bisect(self.starts, place) - 1
        return (
            self.folder
            / ("source" if concept < 0 else self.concepts[concept]["name"])
            / self.names[self.photo_of[place]]
        )

    def load(self, place):
        return read_image(self.path(place), self.size)

    def check(self) -> str:
        """A hash of names, prompts, and each PNG's ends and length. The ends hold the size and zlib's checksum of all pixels, so
        a PNG of other pixels shows without being decoded; damage in the middle of a file does not. UserError where a picture
        is cut short or of another size."""

        def ends(place: int) -> bytes:
            found = file_ends(
                self.path(place), 20
            )  # Adler-32 of the pixels, CRC-32 of their last chunk, end chunk
            if (
                found[16:24] != 2 * self.size.to_bytes(4, "big")
                or found[-16:-8] != b"IEND\xaeB`\x82"
            ):
                self.load(place)  # says what is wrong, if anything is
            return found

        return fingerprint([self.names, self.concepts], ends, range(self.places))


def read_concepts(pairs: Path) -> dict[str, dict]:
    """concepts.json of a pairs folder: {name: {"prompt": ...}}; UserError where it is missing or a concept has no prompt."""
    if not pairs.is_dir():
        raise UserError(f"{pairs} does not exist; 01_distill_pairs.py makes it")
    concepts = read_json(pairs / "concepts.json", maker="01_distill_pairs.py")
    for name, entry in concepts.items():
        check_name(name, pairs / "concepts.json")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("prompt"), str)
            or not entry["prompt"].strip()
        ):
            raise UserError(f"{pairs / 'concepts.json'}: concept {name!r} has no prompt")
    if not concepts:
        raise UserError(f"{pairs / 'concepts.json'} names no concept")
    return concepts


def edit_names(pairs: Path, split: str, concept: str) -> list[str]:
    """Sorted file names of a concept's edits, as metadata.jsonl lists them. UserError unless photos and edits match it."""
    folder = pairs / split / concept
    try:
        lines = (pairs / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        listed = sorted(
            Path(row["file_name"]).name
            for row in map(json.loads, lines)
            if row["concept"] == concept
        )
    except FileNotFoundError:
        raise UserError(
            f"{pairs / split / 'metadata.jsonl'} does not exist; 01_distill_pairs.py makes it"
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{pairs / split / 'metadata.jsonl'} is broken: {error!r}")
    for there, what in (
        ({p.name for p in folder.glob("*.png")}, folder),
        ({p.name for p in (pairs / split / "source").glob("*.png")}, pairs / split / "source"),
    ):
        missing = sorted(set(listed) - there)
        if missing:
            raise UserError(
                f"photos and edits do not match: {what} lacks {missing[0]} and {len(missing) - 1} more that "
                f"metadata.jsonl lists for {concept!r}"
            )
    extra = sorted({p.name for p in folder.glob("*.png")} - set(listed))
    if extra:
        raise UserError(
            f"photos and edits do not match: metadata.jsonl lists no {folder / extra[0]} ({len(extra)} such)"
        )
    if not listed:
        raise UserError(f"{folder} holds no edits")
    return listed


def find_pairs(
    pairs: Path, split: str, names: Sequence[str], samples: Sequence[str] | None = None
) -> Pairs:
    """The pairs of some concepts, not decoded yet; `samples` restricts them to these photo file names."""
    known = read_concepts(pairs)
    for name in names:
        if name not in known:
            raise UserError(f"{pairs} has no concept {name!r}; it has {', '.join(known)}")
    files = {name: edit_names(pairs, split, name) for name in names}
    if samples is not None:
        for name in names:
            absent = sorted(set(samples) - set(files[name]))
            if absent:
                raise UserError(
                    f"{pairs / split / name} has no {absent[0]} ({len(absent)} of the chosen samples missing)"
                )
            files[name] = sorted(samples)
    photo_names = sorted(set().union(*files.values()))
    row_of = {name: row for row, name in enumerate(photo_names)}
    size = read_image(pairs / split / "source" / photo_names[0]).shape[-1]
    if size % 8 or size < 24:
        raise UserError(
            f"{pairs} holds {size}x{size} pictures; the networks need a multiple of 8 from 24 on"
        )
    return Pairs(
        folder=pairs / split,
        concepts=[{"name": name, "prompt": known[name]["prompt"]} for name in names],
        names=photo_names,
        rows=[torch.tensor([row_of[file] for file in files[name]]) for name in names],
        size=size,
    )


def load_pairs(
    pairs: Path, split: str, names: Sequence[str], samples: Sequence[str] | None = None
) -> Pairs:
    """The same, decoded into the process's memory."""
    return find_pairs(pairs, split, names, samples).decoded()


def draw_picks(
    counts: Sequence[int], batch: int, step: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step: picks (B, 2) [concept, i] and flips (B,), a function of seed and step alone, so that a resumed
    run needs no generator state."""
    epoch, place = divmod(step, steps_per_epoch(counts, batch))
    return tuple(
        part[place * batch : (place + 1) * batch]
        for part in epoch_order(tuple(counts), epoch_length(counts, batch), epoch, seed)
    )


@functools.lru_cache(maxsize=1)  # once an epoch: with 600,000 pairs it takes as long as some steps
def epoch_order(
    counts: tuple[int, ...], longest: int, epoch: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of an epoch's picks and flips. Concepts take turns, so a batch holds each equally often (+-1); each epoch passes over
    every concept in a new order, and a concept with fewer pairs than `longest` starts over within the epoch."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    orders = [
        torch.cat([torch.randperm(n, generator=rng) for _ in range(-(-longest // n))])[:longest]
        for n in counts
    ]
    flips = torch.rand(longest * len(counts), generator=rng) < 0.5
    picks = torch.stack(
        [torch.arange(len(counts)).repeat(longest), torch.stack(orders, 1).flatten()], 1
    )
    return picks, flips


def epoch_length(counts: Sequence[int], batch: int) -> int:
    """Pairs of each concept in an epoch: as many as the largest has, and enough for one batch."""
    return max(*counts, -(-batch // len(counts)))


def steps_per_epoch(counts: Sequence[int], batch: int) -> int:
    return epoch_length(counts, batch) * len(counts) // batch


# ---------------------------------------------------------------------------------------------------------------------
# Networks whose channels have names
#
# Every layer says which channel groups it reads and which it writes. A group is a set of channels that must be kept or
# dropped together (a residual stream is one); a concatenation is a tuple of groups; attention's projections repeat their
# group once a head, so that every head keeps the same dimensions. Widths live in config["widths"] = {group: channels}; a
# pruned network is the same class built from smaller numbers. config["full"] keeps the numbers it started from.

FIXED = {
    "rgb": 3,
    "photo": 3,
    "edit": 3,
    "noise": 100,
    "score": 1,
}  # never pruned; nor is "text", as wide as config says


def all_widths(config: dict) -> dict:
    """config["widths"] with the groups that are never pruned."""
    return {**config["widths"], **FIXED, "text": config.get("text_dim", 0)}


def layer(kind: type, widths: dict, reads, writes, *args, **options) -> nn.Module:
    """kind(in, out, ...) for a Conv2d, ConvTranspose2d or Linear from the groups it reads and writes (a name or a tuple of
    names), which it carries as .reads and .writes. Weights start as N(0, 0.02) (pix2pix), biases as 0."""
    reads, writes = (
        (groups,) if isinstance(groups, str) else tuple(groups) for groups in (reads, writes)
    )
    module = kind(sum(widths[g] for g in reads), sum(widths[g] for g in writes), *args, **options)
    nn.init.normal_(module.weight, 0.0, 0.02)
    nn.init.zeros_(module.bias)
    module.reads, module.writes = reads, writes
    return module


def batch_norm(widths: dict, group: str) -> nn.BatchNorm2d:
    """Batch norm of a group's channels, scales starting as N(1, 0.02) (DCGAN). It carries .writes alone: no hypernetwork makes
    its numbers, but they are sliced with the group."""
    module = nn.BatchNorm2d(widths[group])
    nn.init.normal_(module.weight, 1.0, 0.02)
    module.writes = (group,)
    return module


def named_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every convolution and linear layer with named channels, in the order of definition."""
    return ((name, module) for name, module in network.named_modules() if hasattr(module, "reads"))


class Network(nn.Module):
    """What generators and discriminators share: a config to be rebuilt from, and inputs to be tried with.

    config: arch, width, size (pixels it is trained at), widths and full ({group: channels} now and unpruned), and whatever else
    the class reads. text_dim is there only in a network that sees prompts."""

    kind: str  # what its file says it holds

    def __init__(self, config: dict):
        super().__init__()
        self.config = config

    def example(
        self, size: int | None = None, batch: int = 1, device: str | torch.device = "meta"
    ) -> tuple:
        """Random inputs of its forward, at `size` pixels (default: config["size"])."""
        raise NotImplementedError


def for_cpu(x: torch.Tensor) -> bool:
    """Whether x is in a training step on a CPU. There instance_norm and Attention reach the same numbers by another way than
    PyTorch's own layers, whose kernels are slow; tests/bench.py train has a plain loop with both."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def by_rows(x: torch.Tensor) -> bool:
    """Whether ToRGB goes its own way: on a CPU, also in the files that are traced there."""
    return x.device.type == "cpu"


def instance_norm(x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, x.shape[1]) if for_cpu(x) else F.instance_norm(x)


def reflect(x: torch.Tensor, dim: int, reach: int) -> torch.Tensor:
    """x with `reach` more values at both ends of a dimension, mirrored at the outermost: in x's dtype, and faster than F.pad."""
    after = x.narrow(dim, x.shape[dim] - 1 - reach, reach)
    return torch.cat([x.narrow(dim, 1, reach).flip(dim), x, after.flip(dim)], dim)


class ToRGB(nn.Conv2d):
    """A 7x7 convolution to 3 channels, reflecting at the borders. A CPU's kernels dislike so few channels: there it is a 1x7
    convolution to 21, whose rows are then shifted and added, the same sums in another order."""

    def forward(self, *features):
        """Feature maps (B, ., H, W), taken as one -> (B, 3, H, W)."""
        if not by_rows(features[0]):
            return super().forward(torch.cat(features, 1))
        reach, height, dtype = self.padding[0], features[0].shape[2], features[0].dtype
        weight = self.weight.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]  # (21, C, 1, 7)
        ends = [0, *itertools.accumulate(x.shape[1] for x in features)]
        parts = [
            F.conv2d(reflect(x.to(dtype), 3, reach), weight[:, i:j])
            for x, i, j in zip(features, ends, ends[1:])
        ]
        rows = reflect(sum(parts), 2, reach).to(self.bias.dtype)  # bf16 would add another error
        return self.bias[:, None, None] + sum(
            row[:, :, i : i + height] for i, row in enumerate(rows.chunk(2 * reach + 1, 1))
        )


class ConvNorm(nn.Module):
    """Convolution (transposed: doubling), instance norm, ReLU, the latter two unless told otherwise. No affine parameters:
    the norm works channel by channel, so dropping a channel leaves the others as they were."""

    def __init__(
        self,
        widths,
        reads,
        writes,
        kernel=3,
        stride=1,
        up=False,
        norm=True,
        relu=True,
        padding_mode="zeros",
    ):
        super().__init__()
        self.norm, self.relu = norm, relu
        if up:
            self.conv = layer(
                nn.ConvTranspose2d, widths, reads, writes, 3, 2, padding=1, output_padding=1
            )
        else:
            self.conv = layer(
                nn.Conv2d,
                widths,
                reads,
                writes,
                kernel,
                stride,
                padding=kernel // 2,
                padding_mode=padding_mode,
            )

    def forward(self, x, film=None, skip=None):
        """film (B, 2C): what to scale by (less 1) and to add after the norm; skip (B, C, H, W): features to add before the ReLU."""
        x = self.conv(x)
        x = instance_norm(x) if self.norm else x
        if film is not None:
            scale, shift = film[..., None, None].chunk(2, 1)
            x = x * (1 + scale) + shift
        x = x if skip is None else x + skip
        return F.relu(x) if self.relu else x


class ResidualBlock(nn.Module):
    def __init__(self, widths, stream, inner, padding_mode):
        super().__init__()
        self.conv1 = ConvNorm(widths, stream, inner, padding_mode=padding_mode)
        self.conv2 = ConvNorm(widths, inner, stream, padding_mode=padding_mode, relu=False)

    def forward(self, x):
        return x + self.conv2(self.conv1(x))


class Attention(nn.Module):
    """Multi-head attention with linear projections. Its groups hold one head's dimensions; `scale` stays the unpruned one."""

    def __init__(self, widths, full, heads, stream, source, prefix):
        super().__init__()
        self.heads, self.scale = heads, full[f"{prefix}_qk"] ** -0.5
        self.q = layer(nn.Linear, widths, stream, (f"{prefix}_qk",) * heads)
        self.k = layer(nn.Linear, widths, source, (f"{prefix}_qk",) * heads)
        self.v = layer(nn.Linear, widths, source, (f"{prefix}_v",) * heads)
        self.out = layer(nn.Linear, widths, (f"{prefix}_v",) * heads, stream)

    def forward(self, x, source, mask=None):
        """x (B, N, C), source (B, M, D), mask (B, M) True where a token counts -> (B, N, C)"""
        q, k, v = (
            p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, y in ((self.q, x), (self.k, source), (self.v, source))
        )  # (B, heads, N or M, d)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
        if for_cpu(x):
            scores = q @ k.mT * self.scale  # (B, heads, N, M)
            y = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """E2GAN's block at half the trunk's resolution: self-attention, cross-attention to the prompt's tokens, feed-forward,
    each pre-normed and residual; the way down, around and up again is added to the trunk. The paper leaves heads (here
    4), the feed-forward ratio (4) and the skips open.

    The norm is RMS over a token's channels: it keeps what cross-attention adds to all tokens alike, which an instance
    norm would erase. It divides by the unpruned number of channels, so dropped channels equal channels that are 0."""

    def __init__(self, widths, full, heads):
        super().__init__()
        self.channels = full["tb"]
        self.down = ConvNorm(widths, "trunk", "tb", stride=2)
        self.self_attention = Attention(widths, full, heads, "tb", "tb", "self")
        self.cross_attention = (
            Attention(widths, full, heads, "tb", "text", "cross") if widths["text"] else None
        )
        self.feed1 = layer(nn.Linear, widths, "tb", "feed")
        self.feed2 = layer(nn.Linear, widths, "feed", "tb")
        self.up = layer(
            nn.ConvTranspose2d, widths, "tb", "trunk", 3, 2, padding=1, output_padding=1
        )

    def norm(self, t):
        return t * torch.rsqrt(t.float().square().sum(-1, keepdim=True) / self.channels + 1e-6).to(
            t.dtype
        )

    def forward(self, x, tokens=None, mask=None):
        h = self.down(x)  # (B, C, H/8, W/8)
        t = h.flatten(2).transpose(1, 2)  # (B, N, C)
        n = self.norm(t)
        t = t + self.self_attention(n, n)
        t = (
            t
            if self.cross_attention is None
            else t + self.cross_attention(self.norm(t), tokens, mask)
        )
        t = t + self.feed2(F.gelu(self.feed1(self.norm(t))))
        return x + self.up(t.transpose(1, 2).unflatten(2, h.shape[2:]))


class Generator(Network):
    """What edits a photo, and the prompts of the concepts it knows: config["concepts"] = [{"name", "prompt"}].

    Text-conditioned ones have config["clip"] (the text tower's name) too; tokens (concepts, T, D) and mask (concepts, T) hold the
    prompts' text features, so using a trained generator needs no CLIP.
    """

    kind = "generator"

    def __init__(self, config: dict):
        super().__init__(config)
        if "text_dim" in config:
            self.register_buffer(
                "tokens", torch.zeros(len(config["concepts"]), config["tokens"], config["text_dim"])
            )
            self.register_buffer(
                "mask", torch.ones(len(config["concepts"]), config["tokens"], dtype=torch.bool)
            )

    def forward(self, photo: torch.Tensor, concept: torch.Tensor | None = None) -> torch.Tensor:
        """photo (B, 3, H, W) in [-1, 1], concept (B,) long, the concept's place in config["concepts"] (a generator without text
        needs none) -> like photo."""
        return (
            self.edit(photo, self.tokens[concept], self.mask[concept])
            if "text_dim" in self.config
            else self.edit(photo)
        )

    def example(self, size=None, batch=1, device="meta"):
        size = size or self.config["size"]
        return torch.randn(batch, 3, size, size, device=device), torch.zeros(
            batch, dtype=torch.long, device=device
        )

    def concept(self, name: str) -> int:
        names = [concept["name"] for concept in self.config["concepts"]]
        if name not in names:
            raise UserError(f"unknown concept {name!r}; this generator knows {', '.join(names)}")
        return names.index(name)


class ResnetGenerator(Generator):
    """`resnet9`: pix2pix's generator with 9 residual blocks (11.378 M parameters at width 64). `e2gan`: 3 residual blocks and
    a transformer block before the last (E2GAN), and what the paper leaves open, chosen by measuring:

    Instance norm hides how bright a photo is, which an edit such as `night` must know: no norm after the stem, and the last
    layer sees the photo beside the features. It also erases what a prompt adds to a channel everywhere: so the two upsamplings
    are scaled and shifted from the prompt's mean token after their norms (FiLM), which costs nothing once a file holds one
    prompt. (Without text, for one concept, it has neither FiLM nor cross-attention.) And fine lines pass round the quarter-size
    trunk: the stem's features are added to those of the same size on the way up, where FiLM decides by concept which of them
    get through the ReLU."""

    def __init__(self, config):
        super().__init__(config)
        widths, full, self.ours = all_widths(config), config["full"], config["arch"] == "e2gan"
        up2 = "stem" if self.ours else "up2"  # what is added together is one group
        self.stem = ConvNorm(
            widths, "rgb", "stem", kernel=7, norm=not self.ours, padding_mode="reflect"
        )
        self.down1 = ConvNorm(widths, "stem", "down1", stride=2)
        self.down2 = ConvNorm(widths, "down1", "trunk", stride=2)
        padding = (
            "zeros" if self.ours else "reflect"
        )  # pix2pix reflects; zeros train 1.2 times faster
        self.blocks = nn.ModuleDict()
        for name in config["blocks"]:
            self.blocks[name] = (
                TransformerBlock(widths, full, config["heads"])
                if name == "tb"
                else ResidualBlock(widths, "trunk", name, padding)
            )
        self.up1 = ConvNorm(widths, "trunk", "up1", up=True)
        self.up2 = ConvNorm(widths, "up1", up2, up=True)
        if widths["text"]:
            self.film1 = layer(nn.Linear, widths, "text", ("up1", "up1"))
            self.film2 = layer(nn.Linear, widths, "text", (up2, up2))
        self.out = layer(
            ToRGB,
            widths,
            (up2, "rgb") if self.ours else up2,
            "rgb",
            7,
            padding=3,
            padding_mode="reflect",
        )

    def edit(self, photo, tokens=None, mask=None):
        stem = self.stem(photo)  # (B, C, H, W)
        x = self.down2(self.down1(stem))  # (B, 4C, H/4, W/4)
        for block in self.blocks.values():
            x = block(x, tokens, mask) if isinstance(block, TransformerBlock) else block(x)
        if not self.ours:
            return torch.tanh(self.out(self.up2(self.up1(x))))
        text = None if tokens is None else mean_token(tokens, mask)
        x = self.up1(x, None if text is None else self.film1(text))  # (B, 2C, H/2, W/2)
        x = self.up2(x, None if text is None else self.film2(text), stem)
        return torch.tanh(self.out(x, photo))


class UNetGenerator(Generator):
    """pix2pix's U-Net: as many halvings as fit the size it is trained at (8 at 256), skips by concatenation, dropout in the
    three levels above the innermost while training (off at inference). Instance norm; none where a map is 1x1."""

    def __init__(self, config):
        super().__init__(config)
        widths, depth = all_widths(config), config["depth"]
        self.downs = nn.ModuleList(
            [
                layer(nn.Conv2d, widths, f"d{i - 1}" if i else "rgb", f"d{i}", 4, 2, padding=1)
                for i in range(depth)
            ]
        )
        reads = [
            f"d{depth - 1}" if i == depth - 1 else (f"u{i + 1}", f"d{i}") for i in range(depth)
        ]
        self.ups = nn.ModuleList(
            [
                layer(
                    nn.ConvTranspose2d, widths, reads[i], f"u{i}" if i else "rgb", 4, 2, padding=1
                )
                for i in range(depth)
            ]
        )

    def edit(self, photo, tokens=None, mask=None):
        depth, x, skips = len(self.downs), photo, []
        for i, down in enumerate(self.downs):
            x = down(F.leaky_relu(x, 0.2) if i else x)
            if 0 < i < depth - 1:
                x = instance_norm(x)
            skips.append(x)
        for i in reversed(range(depth)):
            x = self.ups[i](F.relu(x if i == depth - 1 else torch.cat([x, skips[i]], 1)))
            if i:
                x = instance_norm(x)
                x = F.dropout(x, 0.5, self.training and depth - 4 <= i < depth - 1)
        return torch.tanh(x)


class DcganGenerator(Network):
    """DCGAN's generator (arXiv 1511.06434): noise to a 4x4 map, which transposed convolutions double until it is config["size"]
    pixels; batch norm and ReLU, tanh at the end. The convolutions keep their biases, which the norms erase, as pix2pix's do."""

    kind = "dcgan generator"

    def __init__(self, config):
        super().__init__(config)
        widths, depth = all_widths(config), len(config["widths"])
        groups = ["noise", *(f"u{i}" for i in range(depth)), "rgb"]
        self.ups = nn.ModuleList(
            [
                layer(nn.ConvTranspose2d, widths, reads, writes, 4, *((2, 1) if i else ()))
                for i, (reads, writes) in enumerate(zip(groups, groups[1:]))
            ]
        )
        self.norms = nn.ModuleList([batch_norm(widths, group) for group in groups[1:-1]])

    def forward(self, noise):
        """noise (B, 100) of N(0, 1) -> (B, 3, S, S) in [-1, 1]"""
        x = noise[..., None, None]
        for up, norm in zip(self.ups, self.norms):
            x = F.relu(norm(up(x)))  # (B, C, 4 * 2^i, 4 * 2^i)
        return torch.tanh(self.ups[-1](x))

    def example(self, size=None, batch=1, device="meta"):
        return (torch.randn(batch, FIXED["noise"], device=device),)


BLOCKS = {
    "e2gan": ("rb", "rb", "tb", "rb"),
    "resnet9": ("rb",) * 9,
}  # residual and transformer blocks of the trunk


def generator_config(
    arch: str,
    width: int,
    size: int,
    concepts: list[dict],
    blocks: Sequence[str] | None = None,
    **text,
) -> dict:
    """The config of an unpruned generator. `width` is the stem's channels (the paper's: 64); dcgan's: those of the last map
    before the picture. `blocks`, of e2gan and resnet9: "rb" or "tb" each, in order, if not the usual ones. `text`, for e2gan
    only: tokens (length of the longest prompt), text_dim, clip."""
    if blocks is not None and (
        arch not in BLOCKS or not blocks or {*blocks} - {"rb", "tb"} or blocks.count("tb") > 1
    ):
        raise UserError(
            f"--blocks {','.join(blocks)}: {' and '.join(BLOCKS)} take rb and at most one tb, such as rb,rb,tb,rb"
        )
    if arch == "dcgan":
        depth = (size // 4).bit_length() - 1
        if depth < 1 or size != 4 * 2**depth:
            raise UserError(f"dcgan makes pictures of 8, 16, 32, 64, ... pixels, not {size}")
        widths, shape = {f"u{i}": width * min(2 ** (depth - 1 - i), 8) for i in range(depth)}, {}
    elif arch == "unet256":
        depth = min(8, (size & -size).bit_length() - 1)  # how often the size can be halved
        widths = {f"d{i}": width * min(2**i, 8) for i in range(depth)}
        widths |= {f"u{i}": width * min(2 ** (i - 1), 8) for i in range(1, depth)}
        shape = {"depth": depth}
    else:
        blocks = blocks or BLOCKS[arch]
        shape = {
            "blocks": [
                kind if kind == "tb" else f"rb{blocks[:i].count('rb')}"
                for i, kind in enumerate(blocks)
            ]
        }
        widths = {"stem": width, "down1": 2 * width, "trunk": 4 * width, "up1": 2 * width}
        widths |= {name: 4 * width for name in shape["blocks"]}
        if arch == "resnet9":
            widths |= {"up2": width}
        if "tb" in blocks:
            shape["heads"] = 4
            attentions = ("self", "cross") if text else ("self",)
            widths |= {f"{a}_{b}": 4 * width // 4 for a in attentions for b in ("qk", "v")} | {
                "feed": 16 * width
            }
    return {
        "arch": arch,
        "width": width,
        "size": size,
        "widths": widths,
        "full": widths,
        "concepts": concepts,
        **shape,
        **text,
    }


def new_generator(
    arch: str,
    width: int,
    size: int,
    concepts: list[dict],
    clip: str,
    device: torch.device,
    blocks: Sequence[str] | None = None,
) -> Generator:
    """An untrained generator for some concepts; for e2gan their prompts go through CLIP's text tower once, here. With clip
    "none" it takes no prompt, like the others."""
    if arch != "e2gan" or clip == "none":
        if len(concepts) > 1:
            raise UserError(
                f"{arch} {'without CLIP ' if arch == 'e2gan' else ''}takes no prompt and learns one concept: "
                f"give it one --concept, not {len(concepts)}"
            )
        return build_network(generator_config(arch, width, size, concepts, blocks)).to(device)
    tower = Clip(clip, device)
    tokens = [tower.tokens(concept["prompt"]) for concept in concepts]
    generator = build_network(
        generator_config(
            arch,
            width,
            size,
            concepts,
            blocks,
            text_dim=tokens[0].shape[1],
            clip=clip,
            tokens=max(map(len, tokens)),
        )
    )
    set_tokens(generator, tokens)
    return generator.to(device)


class Discriminator(Network):
    """pix2pix's PatchGAN on photo and edit (70x70 patches with 3 strided layers), scores without sigmoid; on the picture alone
    where config["photo"] is False (CycleGAN). For several concepts the prompt's mean token, as a unit vector, is projected and
    multiplied with the last features (a choice of ours, after the projection discriminator): score = conv(h) + <P text, h>. At
    CLIP's own length, about 18, that product drowned the rest, and the discriminator learned to give everything one half."""

    kind = "discriminator"

    def __init__(self, config):
        super().__init__(config)
        widths, strided = all_widths(config), config["strided"]
        first = ("photo", "edit") if config["photo"] else "edit"
        self.convs = nn.ModuleList(
            [
                layer(
                    nn.Conv2d,
                    widths,
                    f"d{i - 1}" if i else first,
                    f"d{i}",
                    4,
                    2 if i < strided else 1,
                    padding=1,
                )
                for i in range(strided + 1)
            ]
        )
        self.project = layer(nn.Linear, widths, "text", f"d{strided}") if widths["text"] else None
        self.score = layer(nn.Conv2d, widths, f"d{strided}", "score", 4, padding=1)
        self.score.reset_parameters()  # PyTorch's, a third as large: scores start near 0

    def forward(self, photo, edit, text=None):
        """photo (B, 3, H, W), None where config["photo"] is False; edit (B, 3, H, W), text (B, D) or None -> (B, 1, h, w)"""
        x = torch.cat([photo, edit], 1) if self.config["photo"] else edit
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(instance_norm(x) if i else x, 0.2)
        score = self.score(x)
        if self.project is not None:
            match = (self.project(F.normalize(text))[:, :, None, None] * x).sum(1, keepdim=True)
            score = score + F.avg_pool2d(match, 2, 1)  # as many as scores
        return score

    def example(self, size=None, batch=1, device="meta"):
        size, text_dim = size or self.config["size"], self.config.get("text_dim")
        photo, edit = (torch.randn(batch, 3, size, size, device=device) for _ in range(2))
        return (
            photo if self.config["photo"] else None,
            edit,
            torch.randn(batch, text_dim, device=device) if text_dim else None,
        )


class DcganDiscriminator(Network):
    """DCGAN's discriminator: strided convolutions down to 4x4, batch norm but after the first, leaky ReLU, one score."""

    kind = "discriminator"

    def __init__(self, config):
        super().__init__(config)
        widths, depth = all_widths(config), len(config["widths"])
        groups = ["rgb", *(f"d{i}" for i in range(depth))]
        self.convs = nn.ModuleList(
            [
                layer(nn.Conv2d, widths, reads, writes, 4, 2, 1)
                for reads, writes in zip(groups, groups[1:])
            ]
        )
        self.norms = nn.ModuleList([batch_norm(widths, group) for group in groups[2:]])
        self.score = layer(nn.Conv2d, widths, groups[-1], "score", 4)

    def forward(self, picture):
        """picture (B, 3, S, S) in [-1, 1] -> (B, 1, 1, 1), without sigmoid"""
        x = F.leaky_relu(self.convs[0](picture), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)

    def example(self, size=None, batch=1, device="meta"):
        return (torch.randn(batch, 3, self.config["size"], self.config["size"], device=device),)


def new_discriminator(
    generator: Network, text: bool = True, photo: bool = True, strided: int = 3
) -> Network:
    """An untrained discriminator of a generator's unpruned width, on its device: DCGAN's for DCGAN's, else a PatchGAN, which sees
    the prompt if the generator does and `text`, and the photo if `photo`."""
    config = {key: generator.config[key] for key in ("width", "size")}
    if isinstance(generator, DcganGenerator):
        config, depth = {"arch": "dcgan-d", **config}, len(generator.config["widths"])
    else:
        config, depth = (
            {"arch": "patchgan", **config, "strided": strided, "photo": photo},
            strided + 1,
        )
        if text and "text_dim" in generator.config:
            config["text_dim"] = generator.config["text_dim"]
    widths = {f"d{i}": config["width"] * min(2**i, 8) for i in range(depth)}
    return build_network({**config, "widths": widths, "full": widths}).to(
        next(generator.parameters()).device
    )


ARCHITECTURES = {
    "e2gan": ResnetGenerator,
    "resnet9": ResnetGenerator,
    "unet256": UNetGenerator,
}  # what edits photos
NETWORKS = {
    **ARCHITECTURES,
    "dcgan": DcganGenerator,
    "patchgan": Discriminator,
    "dcgan-d": DcganDiscriminator,
}


def build_network(config: dict) -> Network:
    if config.get("arch") not in NETWORKS:
        raise UserError(
            f"unknown architecture {config.get('arch')!r}; known: {', '.join(NETWORKS)}"
        )
    return NETWORKS[config["arch"]](config)


def mean_token(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """tokens (B, T, D), mask (B, T) True where a token counts, None for all -> (B, D)"""
    return (
        tokens.mean(1)
        if mask is None
        else (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    )


def text_of(generator: Generator, concept: torch.Tensor) -> torch.Tensor | None:
    """What the discriminator sees of the prompts of concept (B,): (B, D), or None for a generator without text."""
    return (
        mean_token(generator.tokens[concept], generator.mask[concept])
        if "text_dim" in generator.config
        else None
    )


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def count_macs(network: Network, size: int | None = None) -> int:
    """Multiply-accumulates of one `size` x `size` picture (default: config["size"]), by torch.utils.flop_counter (convolutions,
    linear, attention)."""
    twin = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(*twin.example(size))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file each


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """A safetensors file whose metadata has one key, "about": a JSON object. (Several keys are written in random order, and
    the same run would not give the same bytes.)"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about, ensure_ascii=False)}

    def write(aside: Path) -> None:
        try:
            save_file(tensors, aside, metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} cannot be written: {error}")

    replace_file(path, write)


LARGEST = 2**31  # bytes of a checkpoint: a file says how much memory it takes to look at


def read_tensors(path: Path, *kinds: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and about of a file that write_tensors wrote with about["kind"] one of the kinds; UserError for anything else, such as
    weights that are no finite fp32 or fp16 numbers."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    kind = " or ".join(kinds)
    if (
        kind != "state" and Path(path).stat().st_size > LARGEST
    ):  # a state holds hypernetworks and their optimizers
        raise UserError(f"{path} is no {kind} of ours: {Path(path).stat().st_size / 1e9:.1f} GB")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            there = about.get("kind") if isinstance(about, dict) else None
            tensors = (
                {name: file.get_tensor(name) for name in file.keys()} if there in kinds else {}
            )
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OSError,
    ) as error:
        raise UserError(f"{path} is truncated or no checkpoint of ours: {error}")
    if there not in kinds:
        raise UserError(
            f"{path} is no {kind} of ours" + (f" but a {str(there)[:80]}" if there else "")
        )
    for name, tensor in tensors.items() if kind != "state" else ():
        if (
            kind != "fid"
            and tensor.dtype not in (torch.float32, torch.float16, torch.bool)
            and not name.endswith("num_batches_tracked")
        ):
            raise UserError(f"{path}: {name} holds {tensor.dtype} numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    return tensors, about


def save_network(path: Path, network: Network) -> None:
    write_tensors(path, network.state_dict(), {"kind": network.kind, "config": network.config})


def load_generator(path: Path, device: torch.device = torch.device("cpu")) -> Generator:
    """The generator in a file, any architecture that edits photos, full or pruned, in eval mode."""
    return load_network(path, device, Generator.kind)


def load_network(path: Path, device: torch.device, *kinds: str) -> Network:
    """The network of one of these kinds in a file, full or pruned, in eval mode; .sha256 is the file's hash."""
    tensors, about = read_tensors(path, *kinds)
    try:
        missing = {
            "width",
            "size",
            "widths",
            "full",
            *(["concepts"] if about["kind"] == Generator.kind else []),
        } - about["config"].keys()
        if missing:
            raise KeyError(f"config lacks {', '.join(sorted(missing))}")
        check_config(about["config"])
        with torch.device(
            "meta"
        ):  # no memory until the shapes are known to match the tensors that the file holds
            network = build_network(about["config"])
        dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        if wrong := [
            name for name in dtypes.keys() & tensors.keys() if tensors[name].dtype != dtypes[name]
        ]:
            raise ValueError(f"{min(wrong)} holds {tensors[min(wrong)].dtype} numbers")
        network.load_state_dict(tensors, assign=True)
        if not getattr(network, "mask", torch.ones(1, 1)).any(1).all():
            raise ValueError("a prompt has no token")
        count_macs(network)  # raises where the layers do not fit each other
    except UserError as error:
        raise UserError(f"{path}: {error}")
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        IndexError,
        ArithmeticError,
    ) as error:
        raise UserError(
            f"{path} does not hold the weights that its config describes: {str(error).splitlines()[0]}"
        )
    network.sha256 = sha256(path)
    return network.to(device).eval()


def check_config(config: dict) -> None:
    """ValueError or UserError where a stranger's config is no network's: a count that is none, or a name that is none."""
    counts = {
        key: config[key]
        for key in ("width", "size", "depth", "heads", "tokens", "text_dim")
        if key in config
    }
    for name, count in [*counts.items(), *config["widths"].items(), *config["full"].items()]:
        if type(count) is not int or not 0 < count < 2**16:
            raise ValueError(f"its {name} is {str(count)[:80]}")
    if config["widths"].keys() != config["full"].keys() or any(
        n > config["full"][g] for g, n in config["widths"].items()
    ):
        raise ValueError("its widths are none of a network pruned from the full ones")
    concepts = config.get("concepts", [])
    if not isinstance(concepts, list) or len(config.get("blocks", ())) > 100:
        raise ValueError("its concepts or blocks are no list of sane length")
    if not isinstance(config.get("clip", ""), str):
        raise ValueError("its text tower is no name")
    for concept in concepts:
        check_name(concept["name"], "config")
        if not isinstance(concept["prompt"], str):
            raise ValueError(f"the prompt of {concept['name']!r} is no text")


def save_state(path: Path, step: int, **parts) -> None:
    """What a run needs to continue after `step` steps: modules, optimizers and lists of tensors by name."""
    tensors = {}
    for part, value in parts.items():
        state = (
            {f"{i:06}": x for i, x in enumerate(value)}
            if isinstance(value, list)
            else value.state_dict()
        )
        if isinstance(value, torch.optim.Optimizer):
            state = {
                f"{i}.{key}": torch.as_tensor(x)
                for i, entry in state["state"].items()
                for key, x in entry.items()
                if x is not None
            }
        tensors |= {f"{part}/{key}": x for key, x in state.items()}
    write_tensors(path, tensors, {"kind": "state", "step": step})


def load_state(path: Path, **parts) -> int:
    """Puts a saved state back into the same modules, optimizers and lists; returns the steps done, 0 without a file."""
    if not path.exists():
        return 0
    tensors, about = read_tensors(path, "state")
    try:
        for part, value in parts.items():
            state = {
                key.removeprefix(f"{part}/"): x
                for key, x in tensors.items()
                if key.startswith(f"{part}/")
            }
            if isinstance(value, torch.optim.Optimizer):
                entries: dict[int, dict] = {}
                for key, x in state.items():
                    index, name = key.split(".", 1)
                    entries.setdefault(int(index), {})[name] = x
                state = {"state": entries, "param_groups": value.state_dict()["param_groups"]}
            if isinstance(value, list):
                value[:] = [state[key] for key in sorted(state)]
            else:
                value.load_state_dict(state)
        if type(about["step"]) is not int or about["step"] < 0:
            raise ValueError(f"step {about['step']}")
        return about["step"]
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} is no state of this run ({str(error).splitlines()[0]}): --overwrite starts the run again"
        )


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: W + (alpha / rank) B A as a parametrization (E2GAN)


class LoRA(nn.Module):
    """Adds scale * B A to a weight: A (rank, in * k * k), B (out, rank), fp32 under autocast too, so that training sees the
    weights that merging leaves. A transposed convolution's weight (in, out, k, k) is taken as out x in * k * k as well."""

    def __init__(self, module: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float):
        super().__init__()
        self.transposed, self.scale = isinstance(module, nn.ConvTranspose2d), scale
        self.lora_A, self.lora_B = (
            nn.Parameter(x.float().to(module.weight.device)) for x in (lora_A, lora_B)
        )

    def forward(self, weight):
        device = "cpu" if weight.is_meta else weight.device.type
        with torch.autocast(device, enabled=False):
            delta = self.scale * (self.lora_B @ self.lora_A)  # (out, in * k * k)
        if self.transposed:
            return weight + delta.view(
                weight.shape[1], weight.shape[0], *weight.shape[2:]
            ).transpose(0, 1)
        return weight + delta.view_as(weight)


def layer_group(name: str) -> str:
    """The group of layers that a layer's name belongs to: "blocks.tb.feed1" -> "tb", "down1.conv" -> "down1"."""
    return name.removeprefix("blocks.").split(".")[0]


def named_layer(generator: Generator, name: str) -> nn.Module:
    modules = dict(named_layers(generator))
    if name not in modules:
        raise UserError(f"unknown layer {name!r}; the generator has {', '.join(modules)}")
    return modules[name]


def add_lora(generator: Generator, ranks: dict[str, int], alpha: float) -> list[nn.Parameter]:
    """Freezes the generator and puts an adapter on each layer in `ranks` (layer name -> rank); returns what is to train.

    B starts at 0, so the adapted layer starts unchanged; A as the weight's leading right singular vectors (a choice of
    ours: the inputs that count most; random rows learned less in as many steps)."""
    generator.requires_grad_(False)
    for name, rank in ranks.items():
        module = named_layer(generator, name)
        weight = (
            module.weight.transpose(0, 1)
            if isinstance(module, nn.ConvTranspose2d)
            else module.weight
        )
        right = torch.linalg.svd(weight.detach().cpu().flatten(1), full_matrices=False).Vh
        lora = LoRA(module, right[:rank].contiguous(), torch.zeros(len(weight), rank), alpha / rank)
        parametrize.register_parametrization(module, "weight", lora)
    return [p for p in generator.parameters() if p.requires_grad]


def lora_layers(generator: Generator) -> dict[str, LoRA]:
    """{layer name: the LoRA that was added to it last}."""
    return {
        name: module.parametrizations.weight[-1]
        for name, module in named_layers(generator)
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[-1], LoRA)
    }


def remove_parametrizations(network: nn.Module, keep_weights: bool = True) -> None:
    """Leaves plain weights: the computed ones (LoRA's merge; the hypernetwork's result), or, without keep_weights, the
    original ones."""
    for _, module in named_layers(network):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_weights)


def save_adapter(
    path: Path, generator: Generator, concept: str, base_sha256: str, alpha: float
) -> None:
    """fp16 A and B of every adapted layer and the prompt's token features; needs the base, but no CLIP, to be used. A
    reader without this module adds (alpha / rank) B A to the base's <layer>.weight, seen as (out, in * k * k)."""
    tensors, layers, index = {}, lora_layers(generator), generator.concept(concept)
    for name, lora in layers.items():
        tensors |= {f"{name}.lora_A": lora.lora_A.half(), f"{name}.lora_B": lora.lora_B.half()}
    if "text_dim" in generator.config:
        tensors["tokens"] = generator.tokens[index][generator.mask[index]].half()
    write_tensors(
        path,
        tensors,
        {
            "kind": "adapter",
            "base": base_sha256,
            "alpha": alpha,
            **generator.config["concepts"][index],
            "ranks": {name: lora.lora_A.shape[0] for name, lora in layers.items()},
        },
    )


def load_adapter(generator: Generator, path: Path, strength: float = 1.0) -> int:
    """Puts an adapter on the base that it was trained for; returns the index of its concept, which the generator now knows.

    strength (0 to 1.5) scales the change of the weights; the prompt stays the concept's. A second adapter's change is
    added to the first's, and the edit follows the prompt of whichever concept is asked for. If the file does not fit,
    the generator is left as it was. unload_adapters takes all of them off again."""
    tensors, about = read_tensors(path, "adapter")
    if about.get("base") != generator.sha256:
        raise UserError(
            f"{path} belongs to another base (SHA-256 {str(about.get('base'))[:12]}..., this one is "
            f"{generator.sha256[:12]}...); give --generator the base it was trained on"
        )
    try:
        adapters = {}
        check_name(about["name"], path)
        if (
            not isinstance(about["prompt"], str)
            or type(about["alpha"]) not in (int, float)
            or not 0 < about["alpha"] < 1e6
        ):
            raise ValueError(f"prompt {about['prompt']!r}, alpha {about['alpha']!r}")
        for name, rank in about["ranks"].items():
            module = named_layer(generator, name)
            a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            if (
                type(rank) is not int
                or not 0 < rank <= min(a.shape[1], len(b))
                or a.shape[0] != rank
            ):
                raise ValueError(
                    f"{name} has rank {rank!r}, and A {tuple(a.shape)}, B {tuple(b.shape)}"
                )
            lora = LoRA(module, a, b, strength * about["alpha"] / rank)
            lora(module.weight)  # raises where the shapes differ
            adapters[name] = module, lora.requires_grad_(False)
        prompts = {
            key: getattr(generator, key)
            for key in ("config", "tokens", "mask")
            if hasattr(generator, key)
        }
        index = add_concept(generator, about["name"], about["prompt"], tensors.get("tokens"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{path} does not fit the generator: {str(error).splitlines()[0]}")
    generator.unadapted = getattr(generator, "unadapted", None) or prompts
    for module, lora in adapters.values():
        parametrize.register_parametrization(module, "weight", lora)
    return index


def unload_adapters(generator: Generator) -> None:
    """The base as it was before load_adapter: its own weights, bit for bit, and the concepts that it knew."""
    remove_parametrizations(generator, keep_weights=False)
    for key, value in (getattr(generator, "unadapted", None) or {}).items():
        setattr(generator, key, value)
    generator.unadapted = None


def add_concept(generator: Generator, name: str, prompt: str, tokens: torch.Tensor | None) -> int:
    """Teaches the generator a concept's prompt: tokens (T, D), its text features. A concept of that name is replaced."""
    concepts = [c for c in generator.config["concepts"] if c["name"] != name] + [
        {"name": name, "prompt": prompt}
    ]
    if "text_dim" in generator.config:
        if (
            tokens is None
            or tokens.dim() != 2
            or tokens.shape[1] != generator.config["text_dim"]
            or not 0 < len(tokens) < 2**16
        ):
            raise UserError(
                f"the prompt's text features do not fit the generator, which takes {generator.config['text_dim']} a token"
            )
        kept = [
            generator.tokens[i][generator.mask[i]]
            for i, c in enumerate(generator.config["concepts"])
            if c["name"] != name
        ]
        set_tokens(generator, [*kept, tokens.to(generator.tokens)])
    generator.config = {**generator.config, "concepts": concepts}
    return len(concepts) - 1


def keep_concept(generator: Generator, name: str) -> None:
    """Makes the generator forget the prompts of all other concepts."""
    index = generator.concept(name)
    if "text_dim" in generator.config:
        set_tokens(generator, [generator.tokens[index][generator.mask[index]]])
    generator.config = {**generator.config, "concepts": [generator.config["concepts"][index]]}


def set_tokens(generator: Generator, tokens: Sequence[torch.Tensor]) -> None:
    """Stores the concepts' text features, each (T, D), padded to the longest with the mask that says where they end."""
    device = generator.tokens.device
    generator.tokens = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True).to(device)
    lengths = torch.tensor([len(t) for t in tokens])
    generator.mask = (torch.arange(generator.tokens.shape[1]) < lengths[:, None]).to(device)
    generator.config = {**generator.config, "tokens": generator.tokens.shape[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Hypernetwork: a weight made from the latents of the channels that it joins (CoroNetGAN; DHP)


class Hypernetwork(nn.Module):
    """The parametrization that makes a layer's weight from the latents of its channel groups, for output channel o, input
    channel i, kernel position k and embedding e:

        Z[o,i] = z_out[o] z_in[i] + b0[o,i]
        E[o,i,e] = Z[o,i] w1[o,i,e] + b1[o,i,e]
        W[o,i,k] = sum_e w2[o,i,k,e] E[o,i,e] + b2[o,i,k]

    b2 is the weight that the layer owned before (parametrize calls it `original`), now 0. w1 and w2 start as in DHP or, with
    `trained=True` (a choice of ours), from the weight V that the layer has, trained or not: w1 = 1 / (z_out z_in) and w2 = V for
    e = 0, the other w2 0. Then the layer starts out computing V, and a latent that shrinks fades its channel out, so the
    latent's gradient is the channel's first-order importance. There b0 stays 0: divided by small latents, a step of it would
    be a leap of W.

    The embedding size is 8, but no more than a layer has k (a choice of ours: a linear layer, which the paper's networks lack, has
    1; with 8 numbers to make one of, a search at width 64 held 29 million more parameters).

    In memory o and i come last, (K, E, O, I): sums over short axes are faster when these come first.
    """

    def __init__(
        self, module: nn.Module, latents: dict[str, torch.Tensor], trained: bool, size: int = 8
    ):
        super().__init__()
        self.transposed = isinstance(module, nn.ConvTranspose2d)
        self.z_out = lambda: torch.cat(
            [latents[g] for g in module.writes]
        )  # lambdas: the latents are shared, not owned
        self.z_in = lambda: torch.cat([latents[g] for g in module.reads])
        with torch.no_grad():
            weight = self.out_first(module.weight)
            weight = weight.reshape(*weight.shape[:2], -1).movedim(-1, 0)
            k, o, i = weight.shape
            size = min(size, k)
            self.b0 = nn.Parameter(torch.zeros(o, i, device=weight.device))
            self.b1 = nn.Parameter(torch.zeros(size, o, i, device=weight.device))
            self.w1 = nn.Parameter(
                torch.empty(size, o, i, device=weight.device).uniform_(-(3**0.5), 3**0.5)
            )
            self.w2 = nn.Parameter(torch.zeros(k, size, o, i, device=weight.device))
            if trained:
                self.w1[0] = 1 / (self.z_out()[:, None] * self.z_in())
                self.w2[:, 0] = weight
                self.b0.requires_grad_(False)
            else:
                bound = (3 / (size * i * k)) ** 0.5  # hyperfan-in: Var W = 1 / fan_in
                self.w2.uniform_(-bound, bound)
            module.weight.zero_()

    def out_first(self, weight):
        return weight.transpose(0, 1) if self.transposed else weight

    def forward(self, b2):
        z = self.z_out()[:, None] * self.z_in() + self.b0  # (O, I)
        e = z * self.w1 + self.b1  # (E, O, I)
        made = torch.stack((self.w2 * e).sum(1).unbind(), -1)  # (O, I, K)
        return b2 + self.out_first(made.view(self.out_first(b2).shape))


def add_hypernetwork(network: nn.Module, latents: dict[str, torch.Tensor], trained: bool) -> None:
    """Puts a hypernetwork on every layer with named channels. latents: {group: (channels,)}, ones for groups never pruned."""
    for _, module in named_layers(network):
        parametrize.register_parametrization(
            module, "weight", Hypernetwork(module, latents, trained)
        )


def slice_network(network: Network, kept: dict[str, torch.Tensor]) -> Network:
    """The dense, smaller network with only the channels `kept` = {group: sorted indices}; other groups stay whole."""
    widths = all_widths(network.config)
    kept = {**{g: torch.arange(n) for g, n in widths.items()}, **kept}
    small = type(network)(
        {**network.config, "widths": {g: len(kept[g]) for g in network.config["widths"]}}
    )
    state = network.state_dict()
    for name, module in network.named_modules():
        if not hasattr(module, "writes"):
            continue
        out = channel_indices(module.writes, kept, widths)
        for key, tensor in module.state_dict(prefix=f"{name}.").items():
            if tensor.dim() == 1:  # biases, batch norm's numbers
                state[key] = tensor[out]
            elif tensor.dim() > 1:
                into = channel_indices(module.reads, kept, widths)
                first, second = (
                    (into, out) if isinstance(module, nn.ConvTranspose2d) else (out, into)
                )
                state[key] = tensor[first][:, second]
    small.load_state_dict(state)
    return small.to(next(network.parameters()).device)


def channel_indices(
    groups: Sequence[str], kept: dict[str, torch.Tensor], widths: dict[str, int]
) -> torch.Tensor:
    """Positions of the kept channels in a layer that reads or writes these groups, one after the other."""
    offsets = np.cumsum([0] + [widths[g] for g in groups])
    return torch.cat([kept[g].cpu() + int(offset) for g, offset in zip(groups, offsets)])


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class Clip:
    """open_clip's MODEL:WEIGHTS, such as ViT-B-32:openai. WEIGHTS `random` is an explicit stand-in for machines that cannot
    download any: the same model with seeded random weights, which knows colours and textures apart but not meanings."""

    def __init__(self, spec: str, device: torch.device):
        import open_clip  # 2 seconds; only the stages that embed something pay them

        model, _, weights = spec.partition(":")
        if model not in open_clip.list_models() or not weights:
            raise UserError(
                f"--clip {spec}: not MODEL:WEIGHTS; open_clip's models are listed by open_clip.list_pretrained()"
            )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                logging.disable(
                    logging.ERROR
                )  # its words on random weights, and beside its exceptions
                self.model = (
                    open_clip.create_model(model, None if weights == "random" else weights)
                    .to(device)
                    .eval()
                )
        except Exception as error:  # open_clip raises whatever its downloader does
            raise UserError(
                f"--clip {spec} cannot be loaded ({str(error).splitlines()[0]}). open_clip downloads weights once; "
                "offline, --clip ViT-S-32:random is a stand-in with random weights"
            )
        finally:
            logging.disable(logging.NOTSET)
        self.spec, self.device, self.tokenizer = spec, device, open_clip.get_tokenizer(model)
        config = open_clip.get_model_preprocess_cfg(self.model)
        self.size = (
            config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        )
        self.mean, self.std = (
            torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std")
        )

    @torch.no_grad()
    def images(self, pixels: torch.Tensor, batch: int = 64) -> torch.Tensor:
        """uint8 (N, 3, H, W) -> unit vectors (N, D) on the CPU."""
        parts = []
        for part in pixels.split(batch):
            x = F.interpolate(
                part.to(self.device).float() / 255,
                (self.size, self.size),
                mode="bicubic",
                antialias=True,
            )
            with autocast(self.device):
                parts.append(self.model.encode_image((x.clamp(0, 1) - self.mean) / self.std))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """N texts -> unit vectors (N, D) on the CPU."""
        return F.normalize(
            self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float(), dim=-1
        ).cpu()

    @torch.no_grad()
    def tokens(self, text: str) -> torch.Tensor:
        """A prompt -> the text tower's last features (T, D) on the CPU, from the start token to the end token."""
        ids = self.tokenizer([text])  # (1, 77), padded with 0
        out = self.model.forward_intermediates(
            text=ids.to(self.device),
            text_indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
        )
        return out["text_intermediates"][0][0, : int((ids[0] != 0).sum())].float().cpu()


def clip_mark(spec: str) -> list[str]:
    return ["stand-in CLIP (random weights)"] if spec.endswith(":random") else []


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA (one GPU a process under torchrun), else MPS, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = (
            True  # shapes do not change: let it choose the fastest convolutions
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 has units of its own there; without them it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        torch.cpu.get_capabilities().get(unit, False) for unit in ("amx_bf16", "avx512_bf16")
    )


def autocast(device: torch.device, precision: str = "auto"):
    """The context of a forward pass: bf16 where `precision` says so, or where it is `auto` and the hardware has bf16."""
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=precision == "bf16" or (precision == "auto" and has_bf16(device)),
    )


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); joins torchrun's processes where there are several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(hours=1),
        )  # the others wait while the first evaluates
    return int(os.environ.get("RANK", 0)), world


def average(tensor: torch.Tensor, world: int) -> None:
    """Replaces a tensor by its mean over the processes."""
    if world > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= world


def data_parallel(network: nn.Module, device: torch.device, world: int) -> nn.Module:
    """The network under DDP, whose backward pass averages the gradients over the processes; itself where there is one."""
    if world == 1:
        return network
    return nn.parallel.DistributedDataParallel(
        network, [device] if device.type == "cuda" else None, broadcast_buffers=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training's small parts, and its measures


def adam(parameters, lr: float) -> torch.optim.Adam:
    """pix2pix's optimizer, all parameters in one kernel."""
    return torch.optim.Adam(parameters, lr, (0.5, 0.999), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """pix2pix's schedule: constant for the first half of the steps, then linear to 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, 2 * (1 - step / steps))


class Collapse(UserError):
    """Training that can't be saved."""


def check_health(
    losses: Sequence[torch.Tensor],
    fake: torch.Tensor,
    edit: torch.Tensor,
    score: torch.Tensor,
    generator: nn.Module,
    step: int,
    out: Path,
    world: int,
    rate: str = "--lr",
    vary: bool = True,
) -> dict:
    """losses, G, D and L1 (3,) of each step since the last check -> the log's row, their means, averaged over the processes.
    Collapse, before anything is saved, if a loss or a weight is not finite (named by its step) or, in the last batch, a network has
    collapsed: fakes (B, 3, H, W) that differ less than 2 % as much as the edits (a process with one photo a step can't tell), or
    a score that is the same everywhere. A discriminator that is beaten, at D = 0.25, is no collapse, nor are equal fakes where `vary`
    is False. rate: the flag of the generator's learning rate."""
    losses = torch.stack([loss.to(fake.device) for loss in losses]).view(
        -1, 3
    )  # those of a saved state lie on the CPU
    spreads = [
        fake.float().std(0, correction=0).mean(),
        edit.std(0, correction=0).mean(),
        score.std(correction=0) if score.numel() > 1 else score.new_ones(()),
    ]
    means = torch.cat([losses.mean(0), torch.stack(spreads).detach()])
    average(means, world)  # all processes must come to the same verdict
    loss_g, loss_d, l1, fakes, edits, scores = means.tolist()
    finite = torch.stack([parameter.isfinite().all() for parameter in generator.parameters()]).all()
    broken = (~losses.isfinite().all(1)).nonzero()  # of this process's steps
    first = f" in step {step - len(losses) + 1 + broken[0].item()}" if len(broken) else ""
    reason = (
        f"a loss is not finite{first}"
        if not all(map(math.isfinite, (loss_g, loss_d)))
        else "a weight is not finite"
        if not finite
        else "the generator makes the same picture of every photo"
        if vary and edits > 1 / 255 and fakes < 0.02 * edits
        else "the discriminator gives everything the same score"
        if scores < 1e-4
        else ""
    )
    if reason:
        raise Collapse(
            f"training collapsed shortly before step {step}: {reason}. {out} keeps the last good checkpoint, if there "
            f"was one; lower {rate} or --lr-d and start again with --overwrite or another --out"
        )
    return {"step": step, "G": loss_g, "D": loss_d, "L1": l1}


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images (B, 3, H, W) in [-1, 1] -> (B,). Peak: 2, the range's width."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


@torch.no_grad()
def run_generator(
    generator: Generator,
    photos: torch.Tensor,
    concept: int,
    precision: str = "fp32",
    batch: int = 32,
) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> uint8 edits, on the CPU."""
    device = next(generator.parameters()).device
    edits = []
    for part in photos.split(batch):
        with autocast(device, precision):
            edits.append(
                to_uint8(
                    generator(
                        to_float(part.to(device)), torch.full((len(part),), concept, device=device)
                    )
                ).cpu()
            )
    return torch.cat(edits)


FID_DIMS = 2048  # pytorch-fid's default: Inception's last pooling layer


def evaluate(generator: Generator, pairs: Pairs, with_fid: bool = False) -> list[dict]:
    """A row per concept of `pairs`: mean PSNR in dB and mean absolute error (0..255) against the teacher's edits of its photos, the
    PSNR of the photo left as it is and, if asked for, the FID to the teacher's edits. Pictures come and go in parts: the memory
    does not grow with their number. The generator is left in eval mode."""
    generator.eval()
    rows = []
    for c, concept in enumerate(pairs.concepts):
        measures: dict[str, list[torch.Tensor]] = {}

        def edits() -> Iterator[torch.Tensor]:  # uint8 (3, S, S), measured on their way
            for photos, truth in pairs.parts(c):
                made = run_generator(generator, photos, generator.concept(concept["name"]))
                yield from made
                a, b, photo = to_float(made), to_float(truth), to_float(photos)
                for name, values in (
                    ("PSNR dB", psnr(a, b)),
                    ("photo unchanged dB", psnr(photo, b)),
                    ("L1 (0-255)", (a - b).abs().mean((1, 2, 3)) * 127.5),
                ):
                    measures.setdefault(name, []).append(values)

        made, row = edits(), {"concept": concept["name"], "PSNR dB": None}
        if with_fid:
            row["FID"] = fid(
                made,
                TeachersEdits(pairs, c),
                next(generator.parameters()).device,
                pairs.statistics(c),
            )
        deque(made, maxlen=0)  # all of them, where FID asked for none
        rows.append(
            row | {name: torch.cat(values).mean().item() for name, values in measures.items()}
        )
    return rows


@dataclasses.dataclass
class TeachersEdits:
    """A concept's edits, uint8 (3, S, S) each, read whenever they are iterated over."""

    pairs: Pairs
    concept: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (edit for _, edits in self.pairs.parts(self.concept) for edit in edits)


def fid(
    edits: Iterable[torch.Tensor],
    truth: Iterable[torch.Tensor],
    device: torch.device,
    file: Path | None = None,
) -> float | None:
    """Frechet Inception distance between two sets of uint8 pictures (3, H, W), the second the teacher's, which is iterated over
    twice: what `python -m pytorch_fid` prints for two folders of their PNGs. It falls as the sets grow, so compare only values of
    equal numbers. None where Inception's weights cannot be had, or for a single picture, which has no covariance. `file` is
    where teacher_statistics keeps the second's."""
    network = inception(device)
    if network is None:
        return None
    teacher, made = (
        teacher_statistics(truth, network, device, file),
        inception_statistics(edits, network, device),
    )
    return frechet_distance(*made, *teacher) if made and teacher else None


TEACHERS: dict[
    str, tuple[np.ndarray, np.ndarray] | None
] = {}  # of the teacher's pictures, which are measured many times a run


def teacher_statistics(
    truth: Iterable[torch.Tensor], network: nn.Module, device: torch.device, file: Path | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """inception_statistics, kept in this process and for others in `file`, as fp64 so that FID stays the same; not kept there where its
    folder cannot be written to. A file of other pictures, other weights or another kind of device, or a broken one, is made anew."""
    digest = hashlib.sha256(f"{network.sha256} {device.type}".encode())
    for picture in truth:
        digest.update(picture.contiguous().numpy())
    key = digest.hexdigest()
    if key not in TEACHERS and file:
        with contextlib.suppress(UserError):  # missing, truncated, not finite
            tensors, about = read_tensors(file, "fid")
            if about.get("key") == key and {n: x.shape for n, x in tensors.items()} == {
                "mu": (FID_DIMS,),
                "sigma": (FID_DIMS, FID_DIMS),
            }:
                TEACHERS[key] = tensors["mu"].numpy(), tensors["sigma"].numpy()
    if key not in TEACHERS:
        TEACHERS[key] = found = inception_statistics(truth, network, device)
        if found and file:
            with contextlib.suppress(
                OSError
            ):  # read-only, or a full disk: the next run measures again
                write_tensors(
                    file,
                    dict(zip(("mu", "sigma"), map(torch.from_numpy, found))),
                    {"kind": "fid", "key": key},
                )
    return TEACHERS[key]


@functools.cache
def inception(device: torch.device) -> nn.Module | None:
    """pytorch-fid's network, once a process, its weights from torch hub's cache or downloaded there by the library. None, and
    one line that says how to get them, where that fails: FID is left blank then."""
    from pytorch_fid import inception as library

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that drops packets should not hold up a run
    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their initial weights
            network = library.InceptionV3([library.InceptionV3.BLOCK_INDEX_BY_DIM[FID_DIMS]])
    except Exception as error:  # whatever urllib and torch.load raise
        print(
            f"FID is left blank: Inception's weights cannot be loaded ({' '.join(str(error).split())[:200]}); "
            f"put {library.FID_WEIGHTS_URL} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    network.sha256 = digest.hexdigest()
    return network.to(device).eval()


def inception_statistics(
    pictures: Iterable[torch.Tensor], network: nn.Module, device: torch.device
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean (2048,) and covariance (2048, 2048) of Inception's features of uint8 pictures (3, H, W), which the library reads as PNGs.
    None for fewer than two."""
    from pytorch_fid.fid_score import compute_statistics_of_path

    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
    ):  # a DataLoader draws a seed
        count = 0
        for count, picture in enumerate(pictures, 1):
            write_png(Path(folder) / f"{count:05}.png", to_pil(picture))
        if count < 2:
            return None
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for every folder
            return compute_statistics_of_path(
                folder, network, min(50, count), FID_DIMS, device, num_workers=0
            )


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S2 positive semidefinite like S1 = R R': S1 S2 has the eigenvalues of the symmetric
    R' S2 R. pytorch-fid takes the root of S1 S2 as a general matrix: the same to six digits, for 25 seconds instead of 2, and
    an exception at times, as covariances of fewer than 2048 pictures are singular."""
    values, vectors = np.linalg.eigh(sigma1)
    kept = values > 1e-12 * values[-1]
    root = vectors[:, kept] * np.sqrt(values[kept])  # (2048, rank)
    mixed = np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)
    return float(
        ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(mixed).sum()
    )


def progress_picture(generator: Generator, pairs: Pairs, per_concept: int = 2) -> Image.Image:
    """source | teacher | model for the first photos of every concept."""
    rows, labels = [], []
    for c, concept in enumerate(pairs.concepts):
        photos, edits = (part[:per_concept] for part in next(pairs.parts(c)))
        made = run_generator(generator.eval(), photos, generator.concept(concept["name"]))
        rows += [list(row) for row in zip(photos, edits, made)]
        labels += [concept["name"]] * len(photos)
    return picture_grid(rows, ["photo", "teacher", "model"], labels)


def write_curve(path: Path, rows: Sequence[dict]) -> None:
    """Draws a log over its steps: one panel for the losses, and one for each measure per concept, as in the rows
    {"step": 50, "G": 9.1, "D": 0.2, "L1": 0.08} and {"step": 288, "PSNR dB": {"sketch": 16.2, "night": 24.9}}."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple]]] = {}  # title -> line -> [(step, value)]
    for row in rows:
        for key, value in row.items():
            title, lines = (key, value) if isinstance(value, dict) else ("loss", {key: value})
            for line, number in lines.items():
                if line != "step" and number is not None:
                    panels.setdefault(title, {}).setdefault(line, []).append((row["step"], number))
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        for line, points in lines.items():
            axes.plot(*zip(*points), marker="." if len(points) < 30 else "", label=line)
        axes.set(title=title, xlabel="step", yscale="log" if title == "loss" else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=110))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(title: str, rows: Sequence[dict]) -> str:
    """Rows of dicts as a Markdown table; a measure that a row lacks is left blank."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")


def merge_seeds(runs: Sequence[tuple[str, list[dict]]]) -> list[dict]:
    """The rows [(run, rows), ...] of runs that differ in their seed alone: numbers that vary as mean ± sample standard deviation.
    A row's partners stand at its place in the other runs and hold the same words."""
    partners: dict[tuple, list[tuple[str, dict]]] = {}
    for run, rows in runs:
        for place, row in enumerate(rows):
            words = (
                (column, str(value))
                for column, value in row.items()
                if not isinstance(value, (int, float, type(None)))
            )
            partners.setdefault((place, *words), []).append((run, row))
    merged = []
    for found in partners.values():
        seeds = f" (mean ± sd, {len(found)} seeds)" if len(found) > 1 else ""
        row = {"run": ", ".join(run for run, _ in found) + seeds}
        for column in dict.fromkeys(column for _, part in found for column in part):
            values = [part[column] for _, part in found if part.get(column) is not None]
            row[column] = values[0] if values else None
            if len(set(map(str, values))) > 1:
                row[column] = f"{cell(float(np.mean(values)))} ± {np.std(values, ddof=1):.2g}"
            if values and len(values) < len(found):
                row[column] = f"{cell(row[column])} (n = {len(values)})"
        merged.append(row)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prints the tables of every result.json below a folder as Markdown, stage by stage; "
        "runs that differ in their seed alone share their rows."
    )
    parser.add_argument(
        "runs", nargs="?", type=Path, default=Path("runs"), help="folder to search (default: runs)"
    )
    folder = parser.parse_args().runs
    tables: dict[
        tuple, dict
    ] = {}  # (stage, title, first column) -> settings but the seed, and marks -> marks, [(run, rows)]
    notes: dict[str, int] = {}  # mark -> the number under which it stands below the tables
    copies: Counter = Counter()  # a run that was copied is no second seed
    for path in sorted(folder.rglob("result.json")):
        result, settings = read_json(path), path.with_name("settings.json")
        settings = read_json(settings) if settings.exists() else {"run": str(path)}
        twin = copies[json.dumps(settings, sort_keys=True)]
        copies[json.dumps(settings, sort_keys=True)] += 1
        try:
            marks = [notes.setdefault(mark, len(notes) + 1) for mark in result.get("marks", [])]
            alike, run = (
                json.dumps([{**settings, "seed": None}, twin, marks], sort_keys=True),
                path.parent.relative_to(folder),
            )
            data = (
                {"data": str(result["data"])} if "data" in result else {}
            )  # what stage 5 pruned on
            for title, rows in result["tables"].items():
                first = list(next(iter(rows), {}))[
                    :1
                ]  # what the rows are of: other tasks, other tables
                groups = tables.setdefault((result["stage"], title, *first), {})
                groups.setdefault(alike, (marks, []))[1].append(
                    (run.as_posix(), [{**data, **row} for row in rows])
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no stage's result: {error!r}")
    unfinished = [
        path.parent
        for path in sorted(folder.rglob("settings.json"))
        if not path.with_name("result.json").exists()
    ]
    if not tables and not unfinished:
        raise UserError(f"no result.json below {folder}")
    titles = list(dict.fromkeys(key[:2] for key in tables))
    for (stage, title, *_), groups in sorted(
        tables.items(), key=lambda item: (item[0][0], titles.index(item[0][:2]))
    ):
        rows = [
            {**row, "run": f"{row['run']} {marks or ''}".strip()}
            for marks, runs in groups.values()
            for row in merge_seeds(runs)
        ]
        names = dict.fromkeys(
            ("run", "data") if any("data" in row for row in rows) else ()
        )  # the first columns
        print(markdown(f"{stage}.py: {title}", [names | row for row in rows]))
    print(
        "\n".join(
            [
                *(f"- [{number}] {mark}" for mark, number in notes.items()),
                *(
                    f"- unfinished, no measures yet: {path.relative_to(folder).as_posix()}"
                    for path in unfinished
                ),
            ]
        )
    )


if __name__ == "__main__":
    run(main)
