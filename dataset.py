"""Pictures: files of any kind read as pixels, stage 1's pairs folder, and the batches of a step.

Pictures in memory are float (B, 3, H, W) in [-1, 1], or uint8 (N, 3, H, W) while they wait. Every
batch is a function of (seed, step) alone, so a run that was killed continues with the same ones.
"""

import functools
import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import runs
from runs import UserError, explain, rank, world

Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many, 1.4 GB once decoded
warnings.filterwarnings("ignore", module="PIL")


# ---- Picture files -------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2"}
SUFFIXES |= {".avif", ".heic", ".ppm", ".pgm", ".tga"}


def list_pictures(folder: Path, pattern: str = "*") -> list[Path]:
    """Sorted picture files, hidden ones left out; with the pattern "**/*" those of subfolders."""
    found = []
    for path in folder.glob(pattern):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            found.append(path)
    return sorted(found)


def read_picture(path: Path, shrink_to: int = 0, alpha: bool = False) -> Image.Image:
    """A picture file's first frame, turned as its EXIF says: RGB, white where it is transparent, or
    RGBA there, with `alpha` (colour profiles are ignored). A JPEG may come out smaller, its sides
    at least 2 * shrink_to: it decodes several times faster so. UserError if it cannot be read."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    with explain(f"{path} is not a picture that can be read"), Image.open(path) as picture:
        if shrink_to:
            picture.draft(None, (2 * shrink_to, 2 * shrink_to))
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert would clip
            picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return picture if alpha else Image.alpha_composite(white, picture).convert("RGB")


def read_square(path: Path, size: int) -> Image.Image:
    """The middle square of a picture, RGB, scaled to size x size."""
    return ImageOps.fit(read_picture(path, size), (size, size), Image.Resampling.LANCZOS)


def read_image(path: Path, size: int | None = None) -> torch.Tensor:
    """A picture file as uint8 (3, H, W); UserError if it cannot be read, or is not `size` x `size`
    where that is given."""
    picture = read_picture(path)
    if size and picture.size != (size, size):
        width, height = picture.size
        raise UserError(f"{path} is {width}x{height}; its folder's others are {size}x{size}")
    return to_pixels(picture)


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """RGB PIL -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1, any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """float -1..1 (clamped) -> uint8 0..255, any shape."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture_grid(rows, columns: Sequence[str], labels: Sequence[str], cell=160) -> Image.Image:
    """A labelled grid: rows of uint8 (3, H, W) pictures (None leaves a gap), a heading per column,
    a label per row."""
    left, top, step = 8 + 8 * max(map(len, ["", *labels])), 22, cell + 4
    sheet = Image.new("RGB", (left + len(columns) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        draw.text((left + x * step + 2, 5), column, fill="black", font_size=13)
    for y, (label, row) in enumerate(zip(labels, rows, strict=True)):
        draw.text((4, top + y * step + cell // 2), label, fill="black", font_size=13)
        for x, pixels in enumerate(row):
            if pixels is not None:
                how = Image.Resampling.NEAREST if pixels.shape[-1] < cell else None
                picture = to_pil(pixels).resize((cell, cell), how)  # bicubic where it shrinks
                sheet.paste(picture, (left + x * step, top + y * step))
    return sheet


# ---- Decoded once into one file, which all stages, seeds and processes share ---------------------


class Pictures:
    """Pictures of one size, numbered. After `cache`, pixels (pictures, 3, S, S) uint8 are
    there. A subclass has plan(step, batch, seed), a function of these alone: the indices (B, k) of
    a batch's rows of k pictures, whether each is mirrored (B, k) bool, and concepts (B,) long."""

    def __init__(self, files: Sequence[Path], size: int, concepts: list[dict], about: object = ""):
        self.files, self.size, self.concepts = list(files), size, concepts
        digest = hashlib.sha256(json.dumps([size, about]).encode())
        with ThreadPoolExecutor() as pool:
            for end in pool.map(self.end, self.files):
                digest.update(end)
        self.cache_hash = digest.hexdigest()[:16]  # which other prompts leave as it is
        digest.update(json.dumps(concepts).encode())
        self.data_hash = digest.hexdigest()[:16]

    def end(self, path: Path) -> bytes:
        """A file's name, length and end, enough to tell pictures apart: that of stage 1's PNGs
        holds the checksum of all pixels."""
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 4096))
            return f"{path.name} {length}".encode() + file.read()

    def load(self, index: int) -> torch.Tensor:
        """uint8 (3, S, S), decoded from the picture's file; UserError if that is broken."""
        return read_image(self.files[index], self.size)

    def cache(self, folder: Path):
        """Decodes every picture into <folder>/<hash>.u8, unless that is there, and maps it: the
        page cache decides what stays in memory. It is never written through the mapping, where a
        full disk would be SIGBUS and no error. Returns self."""
        path, count = folder / f"{self.cache_hash}.u8", len(self.files) * 3 * self.size**2
        with filelock.FileLock(path.with_suffix(".lock")):  # one process decodes for all
            if not path.exists() or path.stat().st_size != count:
                runs.replace_file(path, self.write_pixels)
        pixels = torch.from_file(str(path), size=count, dtype=torch.uint8)
        self.pixels = pixels.view(-1, 3, self.size, self.size)
        return self

    def write_pixels(self, path: Path) -> None:
        indices = range(len(self.files))
        with open(path, "wb") as file, ThreadPoolExecutor() as pool:
            done = prefetch(pool, self.load, indices)  # pool.map would fill memory on a slow disk
            for pixels in tqdm(done, "decoding", len(indices), leave=False, delay=2):
                file.write(pixels.numpy())

    def batches(self, batch, steps: range, seed, device: torch.device, crop=0) -> Iterator[tuple]:
        """Yields for each step this process's share of the plan, on the device: k tensors
        (B / world, 3, S, S) in [-1, 1] (of pairs: photo and edit), and concept (B / world,) long.
        S: the pictures' size, or that of random crops, one corner a row of the batch. A thread
        gathers and pins two steps ahead, so that nothing here waits on CUDA."""
        if batch % world():
            raise UserError(f"--batch {batch} cannot be shared evenly by {world()} processes")
        side, share = crop or self.size, slice(rank(), None, world())

        def gather(step: int) -> list[torch.Tensor]:
            indices, flips, concept = (x[share] for x in self.plan(step, batch, seed))
            rng, cuts = np.random.default_rng([seed, step]), []
            corners = rng.integers(self.size - side + 1, size=(batch, 2))[share].tolist()
            source = self.pixels.numpy()  # torch's copies would start a second team of threads
            for column in indices.T.tolist():
                for index, (y, x) in zip(column, corners, strict=True):
                    cuts.append(source[index, :, y : y + side, x : x + side])
            parts = [torch.from_numpy(np.stack(cuts)), flips.T.flatten(), concept.clone()]
            return [part.pin_memory() for part in parts] if device.type == "cuda" else parts

        with ThreadPoolExecutor(1) as thread:
            for parts in prefetch(thread, gather, steps, depth=2):
                pixels, flips, concept = (part.to(device, non_blocking=True) for part in parts)
                pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
                yield *to_float(pixels).split(len(concept)), concept


class Pairs(Pictures):
    """Photos and edits. indices: per concept (n, 2) long, where each pair's photo and edit are."""

    def __init__(self, files, size, concepts, indices: list[torch.Tensor], about: object = ""):
        super().__init__(files, size, concepts, about)
        self.indices = indices

    @property
    def counts(self) -> list[int]:
        return [len(indices) for indices in self.indices]

    def plan(self, step, batch, seed):
        picks, flips = draw_picks(self.counts, batch, step, seed)
        indices = torch.stack([self.indices[c][i] for c, i in picks.tolist()])
        return indices, flips[:, None].expand(-1, 2), picks[:, 0]

    def pictures(self, concept: int, count: int | None = None) -> tuple:
        """A concept's first photos and edits, or all, uint8 (count, 3, S, S) each."""
        photos, edits = self.indices[concept][:count].T
        return self.pixels[photos], self.pixels[edits]


def prefetch(pool, function: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """Maps in threads and in order like pool.map, but at most `depth` items ahead."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def draw_picks(counts: Sequence[int], batch: int, step: int, seed: int) -> tuple:
    """The batch of a step: picks (B, 2) [concept, i] and flips (B,)."""
    epoch, batch_index = divmod(step, steps_per_epoch(counts, batch))
    order = epoch_order(tuple(counts), epoch_length(counts, batch), epoch, seed)
    return tuple(part[batch_index * batch : (batch_index + 1) * batch] for part in order)


@functools.lru_cache(maxsize=1)  # once an epoch: with 600,000 pairs it takes as long as some steps
def epoch_order(counts: tuple[int, ...], longest: int, epoch: int, seed: int) -> tuple:
    """All of an epoch's picks and flips. Concepts take turns, so a batch holds each equally often
    (+-1); each epoch passes over every concept in a new order, and a concept with fewer pairs than
    `longest` starts over within the epoch."""
    rng, orders = torch.Generator().manual_seed(seed * 1_000_003 + epoch), []
    for n in counts:
        passes = [torch.randperm(n, generator=rng) for _ in range(-(-longest // n))]
        orders.append(torch.cat(passes)[:longest])
    flips = torch.rand(longest * len(counts), generator=rng) < 0.5
    concepts = torch.arange(len(counts)).repeat(longest)
    return torch.stack([concepts, torch.stack(orders, 1).flatten()], 1), flips


def epoch_length(counts: Sequence[int], batch: int) -> int:
    """Pairs of each concept in an epoch: as many as the largest has, and enough for one batch."""
    return max(*counts, -(-batch // len(counts)))


def steps_per_epoch(counts: Sequence[int], batch: int) -> int:
    return epoch_length(counts, batch) * len(counts) // batch


# ---- The pairs folder, as stage 1 writes it ------------------------------------------------------


def read_concepts(pairs: Path) -> dict[str, dict]:
    """concepts.json of a pairs folder: {name: {"prompt": ...}}; UserError where it is missing or a
    concept has no prompt."""
    path = pairs / "concepts.json"
    concepts = runs.read_json(path, maker="01_distill_pairs.py")
    for name, entry in concepts.items():
        runs.check_name(name, path)
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}: concept {name!r} has no prompt")
    if not concepts:
        raise UserError(f"{path} names no concept")
    return concepts


def edit_names(pairs: Path, split: str, concept: str) -> list[str]:
    """Sorted file names of a concept's edits. UserError unless there are some, each of a photo."""
    names = [path.name for path in list_pictures(pairs / split / concept)]
    photos = {path.name for path in list_pictures(pairs / split / "source")}
    if not names:
        raise UserError(f"{pairs / split / concept} holds no edits; 01_distill_pairs.py makes them")
    if set(names) - photos:
        raise UserError(f"{pairs / split / 'source'} lacks {min(set(names) - photos)}")
    return names


def find_pairs(pairs: Path, split: str, names: Sequence[str], samples=None) -> Pairs:
    """The pairs of some concepts, not decoded yet; `samples` restricts the first concept's to
    these photos' file names."""
    known = read_concepts(pairs)
    for name in names:
        if name not in known:
            raise UserError(f"{pairs} has no concept {name!r}; it has {', '.join(known)}")
    edits = {name: edit_names(pairs, split, name) for name in names}
    photos = sorted(set().union(*edits.values()))
    files = [pairs / split / "source" / photo for photo in photos]
    size, indices = read_image(files[0]).shape[-1], []
    if size % 8 or size < 24:
        raise UserError(f"{pairs}: {size} pixels; the networks need a multiple of 8 from 24 on")
    for name in names:
        photo = torch.from_numpy(np.searchsorted(photos, edits[name]))
        indices.append(torch.stack([photo, len(files) + torch.arange(len(photo))], 1))
        files += [pairs / split / name / edit for edit in edits[name]]
    concepts = [{"name": name, "prompt": known[name]["prompt"]} for name in names]
    found = Pairs(files, size, concepts, indices)
    if samples is not None:
        samples = sorted(set(samples))
        if absent := sorted(set(samples) - set(edits[names[0]])):
            raise UserError(f"{pairs / split / names[0]} has no {absent[0]} ({len(absent)} such)")
        found.indices[0] = indices[0][np.searchsorted(edits[names[0]], samples)]
        found.data_hash = hashlib.sha256(f"{found.data_hash} {samples}".encode()).hexdigest()[:16]
    return found


def prompt_tokens(pairs: Path, concepts: list[dict], clip: str = "") -> tuple[list, str]:
    """The token features (T, D) of these concepts' prompts, and the tower that made them, which
    must be `clip` where that is given."""
    tensors, metadata = runs.read_tensors(pairs / "features.safetensors", "features")
    tower = str(metadata.get("clip"))
    if clip and tower != clip:
        raise UserError(f"{pairs} has prompts of {tower}, and the generator was trained on {clip}")
    with explain(f"{pairs / 'features.safetensors'} lacks a prompt (run stage 1)"):
        return [tensors[f"tokens/{concept['name']}"] for concept in concepts], tower


def chosen_concepts(args, role: str) -> list[str]:
    """--concept, or the "base" or "new" concepts that stage 2 found."""
    path = args.clusters / "concepts.json"
    names = args.concept or runs.read_json(path, maker="02_cluster.py").get(role)
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise UserError(f"{path} lists no {role} concepts: name some with --concept")
    return list(dict.fromkeys(names))
