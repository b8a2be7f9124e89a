"""Picture files of any kind, stage 1's pairs folder, and batches.

Pictures are uint8 (N, 3, H, W) in files and caches, and float (B, 3, H, W) in [-1, 1] in batches. A
batch is a function of (seed, step) alone, so a run that was killed continues with the same ones.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import runs
from runs import UserError, explain, rank, world

with contextlib.suppress(ImportError):  # only phones' HEIC files need it
    import pillow_heif

    pillow_heif.register_heif_opener()

MAX_PIXELS = 50_000_000  # twice as many are refused: 1.4 GB once decoded
Image.MAX_IMAGE_PIXELS = None  # read_picture has its own limit
warnings.filterwarnings("ignore", module="PIL")


# ---- Picture files -------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES += (".jp2", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".tga")
HEIC = (".heic", ".heif")
# Folders of thumbnails and deleted files, which file servers and packers leave beside photos.
NOT_PHOTOS = ("@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "__MACOSX")


def list_pictures(folder: Path, subfolders: bool = False) -> list[Path]:
    """The picture files of a folder, sorted; with `subfolders` also those below it.

    Hidden files and folders are left out, and folders named in NOT_PHOTOS. Links to folders are
    followed, but no folder is read twice, so that a link to a folder above it makes no loop."""
    found = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in files:
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and path.is_file() and not name.startswith("."):
                found.append(path)
        below = []
        # folders before links, so that a folder that is reached both ways keeps its own path
        for name in sorted(folders, key=lambda name: (Path(parent, name).is_symlink(), name)):
            real = os.path.realpath(Path(parent, name))
            if real in seen or name.startswith(".") or name in NOT_PHOTOS:
                continue
            seen.add(real)
            below.append(name)
        folders[:] = below if subfolders else []  # where os.walk goes from here
    return sorted(found)


def named_pictures(folder: Path) -> dict[str, Path]:
    """{name: file} of the pictures in a folder and below it. The name is the path below the folder,
    with ? for bytes that are not UTF-8, and more at its start where two paths would be alike."""
    files = {}
    for path in list_pictures(folder, subfolders=True):
        name = path.relative_to(folder).as_posix().encode(errors="replace").decode()
        while name in files:
            name = f"?{name}"
        files[name] = path
    return files


def match_names(photos: Collection[str], edits: dict[str, Path]) -> dict[str, Path]:
    """{photo: its edit's file} of the photos that have an edit. photos: names; edits: {name: file}.

    Equal names come first, then names that differ in their suffix, then those that also differ in
    case or in how accents are encoded (macOS encodes them apart): IMG_0.JPG finds img_0.png. No
    edit is taken twice."""

    def without_suffix(name: str) -> str:
        return name.rpartition(".")[0]

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", without_suffix(name)).casefold()

    found = {}
    left = dict(edits)
    for key in (str, without_suffix, folded):
        edit_of = {}
        for name in left:
            edit_of.setdefault(key(name), name)
        for photo in photos:
            if photo not in found and key(photo) in edit_of:
                found[photo] = left.pop(edit_of.pop(key(photo)))
    return found


def reads_heic() -> bool:
    """Whether HEIC files can be read, which needs the package pillow-heif."""
    return "HEIF" in Image.OPEN


def read_picture(path: Path, shrink_to: int = 0, alpha: bool = False) -> Image.Image:
    """A picture file's first frame in sRGB, turned as EXIF says; UserError if it cannot be read.

    Transparent parts become white; with `alpha` a picture that has some is returned as RGBA.
    shrink_to: a JPEG may be decoded at a smaller size, with sides of at least 2 * shrink_to, which
    is several times faster."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix.lower() in HEIC and not reads_heic():
        raise UserError(f"{path} is a HEIC file: `pip install pillow-heif` reads them")
    with explain(f"{path} is not a picture that can be read"), Image.open(path) as picture:
        if shrink_to:
            picture.draft(None, (2 * shrink_to, 2 * shrink_to))
        if picture.width * picture.height > 2 * MAX_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} are too many pixels")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I") or picture.mode == "F":
            picture = grey_to_bytes(picture)
        transparent = picture.has_transparency_data
        picture = to_srgb(picture, "RGBA" if transparent else "RGB", path)
        if alpha or not transparent:
            return picture
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")


def grey_to_bytes(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, 32 bits or floats scaled to 8 bits, where Pillow's convert would
    clip.

    A file does not say which value is white. It is taken to be the smallest of 1 (for floats), 255,
    65535 and 2^31 - 1 that no pixel exceeds. If there are values below 0, the lowest becomes black
    and the highest white."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds numbers that are not finite")
    if picture.mode.startswith("I;16"):
        black, white = 0, 65535
    else:
        usual = [255, 65535, 2**31 - 1]
        if picture.mode == "F":
            usual.insert(0, 1)
        enough = [value for value in usual if values.max() <= value]
        if values.min() >= 0 and enough:
            black, white = 0, enough[0]
        else:
            black, white = values.min(), values.max()
    scaled = (values - black) * 255 / max(white - black, 1e-30)
    return Image.fromarray(scaled.round().astype(np.uint8))


def to_srgb(picture: Image.Image, mode: str, path: Path) -> Image.Image:
    """The picture in this mode, RGB or RGBA, with colours converted from its ICC profile to sRGB,
    as phones and cameras write Display P3 and Adobe RGB. path: for a message."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture.convert(mode)
    if picture.mode not in ("RGB", "RGBA", "CMYK", "L"):  # a palette, among others
        picture = picture.convert(mode)
    if picture.mode == "L" and mode == "RGBA":
        picture = picture.convert(mode)
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(theirs):  # most files: nothing to convert
            return picture.convert(mode)
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, theirs, srgb, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        tell_of_profile(path, str(error))
        converted = picture.convert(mode)
    converted.info.pop("icc_profile", None)
    return converted


@functools.cache  # once a file, though it is read several times
def tell_of_profile(path: Path, reason: str) -> None:
    tqdm.write(f"{path}: its colour profile cannot be used and is left out ({reason})")


def read_square(path: Path, size: int) -> Image.Image:
    """The middle square of a picture, RGB, scaled to size x size."""
    return ImageOps.fit(read_picture(path, size), (size, size), Image.Resampling.LANCZOS)


def picture_size(path: Path) -> tuple[int, int]:
    """A picture's width and height, turned as EXIF says, without decoding it; UserError if its file
    does not say."""
    with explain(f"{path} is not a picture that can be read"), Image.open(path) as picture:
        width, height = picture.size
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def read_edit(path: Path, photo_size: tuple[int, int], size: int) -> Image.Image:
    """The part of an edit that shows its photo's middle square, scaled to size x size. photo_size:
    the photo's width and height.

    The edit may be smaller or larger than its photo. Its aspect ratio may differ by 7 per cent, as
    tools round both sides to multiples of 8 or 64. UserError beyond that, as it may show another
    part."""
    edit = read_picture(path)
    width, height = photo_size
    ratio = edit.width * height / (edit.height * width)  # of the aspect ratios
    if not 0.93 <= ratio <= 1 / 0.93:
        what = f"{path} is {edit.width}x{edit.height}, but its photo {width}x{height}"
        raise UserError(f"{what}: give the edit its photo's shape")
    side = min(width, height)
    x = edit.width / width
    y = edit.height / height
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left * x, top * y, (left + side) * x, (top + side) * y)
    return edit.resize((size, size), Image.Resampling.LANCZOS, box)


def read_image(path: Path, size: int | None = None) -> torch.Tensor:
    """A picture file as uint8 (3, H, W). UserError if it cannot be read or, where `size` is given,
    if it is not size x size."""
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


@functools.cache
def letters_of(font: str) -> frozenset[int]:
    """The Unicode numbers of all letters in a font's file."""
    from matplotlib.ft2font import FT2Font  # takes a second, and is seldom needed

    with explain(f"{font} is no font"):
        return frozenset(FT2Font(font).get_charmap())


@functools.cache
def font_with(text: str) -> str | None:
    """The file of a font on this machine that has all letters of a text; None if there is none."""
    from matplotlib import font_manager

    needed = {ord(letter) for letter in text if not letter.isspace()}
    usual = font_manager.findfont("DejaVu Sans")  # matplotlib brings it
    for font in (usual, *(entry.fname for entry in font_manager.fontManager.ttflist)):
        if "LastResort" in font:  # matplotlib's, which writes boxes
            continue
        try:
            if needed <= letters_of(font):
                return font
        except UserError:  # a broken font is passed over
            continue
    return None


def writable(texts: Sequence[str]) -> list[str]:
    """Labels that this machine can write: one whose letters no font has is replaced by its number,
    counted from 1 among the different labels."""
    numbers = {}
    for text in texts:
        numbers.setdefault(text, len(numbers) + 1)
    return [text if text.isascii() or font_with(text) else str(numbers[text]) for text in texts]


def label_font(text: str) -> ImageFont.FreeTypeFont:
    """The font in which picture_grid writes a label."""
    if text.isascii():
        return ImageFont.load_default(13)
    return ImageFont.truetype(font_with(text), 13)


def picture_grid(
    rows: Iterable[Sequence[torch.Tensor | None]],
    columns: Sequence[str],
    labels: Sequence[str],
    cell: int = 160,
) -> Image.Image:
    """A sheet of rows of pictures, uint8 (3, S, S), each scaled to cell x cell pixels; None leaves
    a gap. columns: the headings above columns; labels: the words left of rows."""
    rows = list(rows)
    columns = writable(columns)
    labels = writable(labels)
    widths = [max(8 * len(label), label_font(label).getlength(label)) for label in labels]
    left = 8 + math.ceil(max([0, *widths]))
    top = 22
    step = cell + 4
    sheet = Image.new("RGB", (left + len(columns) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for x, heading in enumerate(columns):
        draw.text((left + x * step + 2, 5), heading, "black", label_font(heading))
    for y, (label, row) in enumerate(zip(labels, rows, strict=True)):
        draw.text((4, top + y * step + cell // 2), label, "black", label_font(label))
        for x, pixels in enumerate(row):
            if pixels is None:
                continue
            enlarged = pixels.shape[-1] < cell
            resampling = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
            picture = to_pil(pixels).resize((cell, cell), resampling)
            sheet.paste(picture, (left + x * step, top + y * step))
    return sheet


# ---- Decoded once into one file, which all stages, seeds and processes share ---------------------


class Pictures:
    """Numbered square pictures of one size S, from which batches are drawn.

    `cache` decodes them into self.pixels, uint8 (pictures, 3, S, S). A subclass defines plan(),
    which pictures make up the batch of a step."""

    def __init__(self, files: Sequence[Path], size: int, concepts: list[dict], about: object = ""):
        """size: S, in pixels. concepts: [{"name", "prompt"}, ...], which batches refer to by index.
        about: what else the pixels depend on, for the hashes.

        Only the first of torchrun's processes reads the files for the hashes. Those of the others
        mean nothing; `cache` tells them the first one's."""
        self.files = list(files)
        self.size = size
        self.concepts = concepts
        digest = hashlib.sha256(json.dumps([size, about]).encode())
        with ThreadPoolExecutor() as pool:
            to_read = self.files if rank() == 0 else []
            for fingerprint in prefetch(pool, file_fingerprint, to_read):
                digest.update(fingerprint)
        self.cache_hash = digest.hexdigest()[:16]  # of the pixels alone
        digest.update(json.dumps(concepts).encode())
        self.data_hash = digest.hexdigest()[:16]  # of pixels and concepts

    def plan(
        self, step: int, batch: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch of a step, as a function of the arguments alone: indices (B, k) long, each
        row's k pictures (of a pair: photo and edit), flips (B, k) bool, whether each is mirrored,
        and concepts (B,) long."""
        raise NotImplementedError

    def load(self, index: int) -> torch.Tensor:
        """A picture decoded from its file, uint8 (3, S, S); UserError if the file is broken."""
        return read_image(self.files[index], self.size)

    def cache(self, folder: Path):
        """Decodes every picture into the file <folder>/<cache_hash>.u8, unless it exists, and maps
        that into memory as self.pixels. Returns self. All of torchrun's processes call it together.

        The file may be larger than memory, as the operating system decides how much of it stays
        there. The mapping is read-only: writing to it crashes with SIGSEGV."""
        self.cache_hash = runs.gather(self.cache_hash)[0]
        path = folder / f"{self.cache_hash}.u8"
        shape = len(self.files), 3, self.size, self.size
        lock = filelock.FileLock(path.with_suffix(".lock"))
        with runs.take_lock(lock, "--cache"):  # one process decodes for all
            if not path.exists() or path.stat().st_size != math.prod(shape):
                runs.replace_file(path, self.write_pixels)
        mapped = np.memmap(path, np.uint8, "r", shape=shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.pixels = torch.from_numpy(mapped)
        return self

    def write_pixels(self, path: Path) -> None:
        """Writes all pictures, decoded, one after the other."""
        indices = range(len(self.files))
        with open(path, "wb") as file, ThreadPoolExecutor() as pool:
            decoded = prefetch(pool, self.load, indices)  # pool.map would fill memory on slow disks
            for pixels in tqdm(decoded, "decoding", len(indices), leave=False, delay=2):
                file.write(pixels.numpy())

    def batches(
        self,
        batch: int,
        steps: range,
        seed: int,
        device: torch.device,
        crop: int = 0,
        flip: bool = True,
    ) -> Iterator[tuple]:
        """Yields, for each step, this process's share of its batch, on the device: k tensors
        (B / world, 3, S, S) in [-1, 1] (of pairs: photos and edits), and concepts (B / world,)
        long. crop: S, of random crops; 0: the pictures' size. flip: whether pictures are mirrored
        at random.

        A thread gathers batches two steps ahead, in pinned memory, so that nothing here waits for
        CUDA."""
        if batch % world():
            raise UserError(f"--batch {batch} cannot be shared evenly by {world()} processes")

        def gather(step: int) -> list[torch.Tensor]:
            parts = self.gather(step, batch, seed, crop or self.size)
            if device.type == "cuda":
                return [part.pin_memory() for part in parts]
            return parts

        with ThreadPoolExecutor(1) as thread:
            for parts in prefetch(thread, gather, steps, depth=2):
                pixels, flips, concepts = [part.to(device, non_blocking=True) for part in parts]
                if flip:
                    pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
                yield *to_float(pixels).split(len(concepts)), concepts

    def gather(self, step: int, batch: int, seed: int, side: int) -> list[torch.Tensor]:
        """[crops, flips, concepts] of this process's share of a step's batch: uint8 copies out of
        self.pixels (k * B / world, 3, side, side), whether each is to be mirrored, and the concept
        of each row.

        The first B / world crops are the rows' first pictures, the next their second ones. The
        crops of a row have the same corner."""
        share = slice(rank(), None, world())
        indices, flips, concepts = self.plan(step, batch, seed)
        rng = np.random.default_rng([seed, step])
        corners = rng.integers(self.size - side + 1, size=(batch, 2))[share].tolist()
        pixels = self.pixels.numpy()  # copying with torch would start more threads
        crops = []
        for column in indices[share].T.tolist():
            for index, (y, x) in zip(column, corners, strict=True):
                crops.append(pixels[index, :, y : y + side, x : x + side])
        mirrored = flips[share].T.flatten()
        return [torch.from_numpy(np.stack(crops)), mirrored, concepts[share].clone()]


def file_fingerprint(path: Path) -> bytes:
    """A file's name, length and last 4 KB, which tell pictures apart: a PNG of stage 1 ends in a
    checksum of all its pixels."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 4096))
        return f"{path.name} {length}".encode() + file.read()


class Pairs(Pictures):
    """Pairs of photo and edit, by concept. indices: for each concept a tensor (n, 2) long, which
    pictures are each pair's photo and edit."""

    def __init__(
        self,
        files: Sequence[Path],
        size: int,
        concepts: list[dict],
        indices: list[torch.Tensor],
        about: object = "",
    ):
        super().__init__(files, size, concepts, about)
        self.indices = indices

    @property
    def counts(self) -> list[int]:
        """How many pairs each concept has."""
        return [len(indices) for indices in self.indices]

    def plan(
        self, step: int, batch: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        picks, flips = draw_picks(self.counts, batch, step, seed)
        indices = torch.stack([self.indices[concept][i] for concept, i in picks.tolist()])
        flips_of_both = flips[:, None].expand(-1, 2)  # photo and edit alike
        return indices, flips_of_both, picks[:, 0]

    def pictures(self, concept: int, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A concept's first `count` photos and their edits (default: all), uint8 (count, 3, S, S)
        each. concept: its index."""
        photos, edits = self.indices[concept][:count].T
        return self.pixels[photos], self.pixels[edits]


def prefetch(pool, function: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """Like pool.map, in threads and in order, but at most `depth` items ahead of the reader."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


# ---- The order of batches ------------------------------------------------------------------------


def draw_picks(
    counts: Sequence[int], batch: int, step: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step: picks (B, 2) long, a concept and the number of one of its pairs, and
    flips (B,) bool, whether that pair is mirrored. counts: how many pairs each concept has."""
    epoch, batch_index = divmod(step, steps_per_epoch(counts, batch))
    picks, flips = epoch_order(tuple(counts), epoch_length(counts, batch), epoch, seed)
    rows = slice(batch_index * batch, (batch_index + 1) * batch)
    return picks[rows], flips[rows]


@functools.lru_cache(maxsize=1)  # computed once per epoch: for 600,000 pairs it takes some steps
def epoch_order(
    counts: tuple[int, ...], longest: int, epoch: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All picks and flips of an epoch, with `longest` pairs of each concept.

    Concepts take turns, so that a batch holds equally many pairs (+-1) of each. Each epoch goes
    through a concept's pairs in a new order; a concept with fewer pairs than `longest` starts over
    in another new order."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    orders = []
    for count in counts:
        passes = []
        for _ in range(math.ceil(longest / count)):
            passes.append(torch.randperm(count, generator=rng))
        orders.append(torch.cat(passes)[:longest])
    flips = torch.rand(longest * len(counts), generator=rng) < 0.5
    concepts = torch.arange(len(counts)).repeat(longest)  # 0 1 2  0 1 2  ...
    numbers = torch.stack(orders, 1).flatten()  # the first of each concept, then the second ...
    return torch.stack([concepts, numbers], 1), flips


def epoch_length(counts: Sequence[int], batch: int) -> int:
    """Pairs of each concept in an epoch: as many as the largest concept has, but enough for a
    batch."""
    share_of_a_batch = math.ceil(batch / len(counts))
    return max(*counts, share_of_a_batch)


def steps_per_epoch(counts: Sequence[int], batch: int) -> int:
    """Whole batches in an epoch."""
    return epoch_length(counts, batch) * len(counts) // batch


# ---- The pairs folder, as stage 1 writes it ------------------------------------------------------


def read_concepts(pairs: Path) -> dict[str, dict]:
    """concepts.json of a pairs folder, {name: {"prompt": ...}}. UserError if it is missing, or a
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


def edit_names(pairs: Path, split: str, concepts: Iterable[str]) -> dict[str, list[str]]:
    """{concept: sorted file names of its edits}. UserError if a concept has none, or an edit has no
    photo."""
    photos = {path.name for path in list_pictures(pairs / split / "source")}
    found = {}
    for concept in concepts:
        folder = pairs / split / concept
        names = [path.name for path in list_pictures(folder)]
        if not names:
            raise UserError(f"{folder} holds no edits; 01_distill_pairs.py makes them")
        lacking = set(names) - photos
        if lacking:
            lost = f"{pairs / split / 'source'} lacks {min(lacking)}"
            raise UserError(f"{lost}, of which {folder} has an edit: delete that, or put it back")
        found[concept] = names
    return found


def find_pairs(
    pairs: Path, split: str, names: Sequence[str], samples: Iterable[str] | None = None
) -> Pairs:
    """The pairs of the concepts `names`, not decoded yet. samples: the file names to which the
    first concept's pairs are reduced."""
    known = read_concepts(pairs)
    for name in names:
        if name not in known:
            raise UserError(f"{pairs} has no concept {name!r}; it has {', '.join(known)}")
    edits = edit_names(pairs, split, names)
    photos = sorted(set().union(*edits.values()))
    photo_index = {photo: index for index, photo in enumerate(photos)}
    files = [pairs / split / "source" / photo for photo in photos]
    size = read_image(files[0]).shape[-1]
    if size % 8 or size < 24:
        raise UserError(f"{pairs}: {size} pixels; the networks need a multiple of 8 from 24 on")
    indices = []
    for name in names:
        rows = []
        for edit in edits[name]:
            rows.append([photo_index[edit], len(files)])
            files.append(pairs / split / name / edit)
        indices.append(torch.tensor(rows))
    concepts = [{"name": name, "prompt": known[name]["prompt"]} for name in names]
    found = Pairs(files, size, concepts, indices)
    if samples is not None:
        choose_samples(found, edits[names[0]], samples, pairs / split / names[0])
    return found


def choose_samples(found: Pairs, edits: list[str], samples: Iterable[str], folder: Path) -> None:
    """Reduces the first concept's pairs to those whose file names are `samples`. edits: the file
    names of all its pairs, in order, in the folder."""
    samples = sorted(set(samples))
    absent = sorted(set(samples) - set(edits))
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} of the samples, such as {absent[0]}")
    row_of = {name: row for row, name in enumerate(edits)}
    rows = [row_of[name] for name in samples]
    found.indices[0] = found.indices[0][rows]
    digest = hashlib.sha256(f"{found.data_hash} {samples}".encode())
    found.data_hash = digest.hexdigest()[:16]


def prompt_tokens(
    pairs: Path, concepts: list[dict], clip: str = ""
) -> tuple[list[torch.Tensor], str]:
    """(each concept's prompt features (T, D), the name of the CLIP that made them). UserError if
    that is not `clip`, where it is given."""
    path = pairs / "features.safetensors"
    tensors, metadata = runs.read_tensors(path, "features")
    found = str(metadata.get("clip"))
    if clip and found != clip:
        differ = f"{pairs} has prompts of {found}, and the generator was trained on {clip}"
        raise UserError(f"{differ}: run stage 1 with --clip {clip}")
    with explain(f"{path} lacks a prompt (run stage 1)"):
        return [tensors[f"tokens/{concept['name']}"] for concept in concepts], found


def chosen_concepts(args, role: str) -> list[str]:
    """The concepts to train, each once: --concept or, without it, those to which stage 2 gave this
    role, "base" or "new"."""
    read_concepts(args.pairs)  # where there are no pairs, its error is the one that helps
    path = args.clusters / "concepts.json"
    names = args.concept or runs.read_json(path, maker="02_cluster.py").get(role)
    is_list_of_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list_of_names or not names:
        raise UserError(f"{path} lists no {role} concepts: name some with --concept")
    return list(dict.fromkeys(names))  # each once
