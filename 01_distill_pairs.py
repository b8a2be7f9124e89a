"""Stage 1: data distillation. A teacher edits photos, and its edits become the training pairs of every later stage.

E2GAN (arXiv 2401.06127), section 3: a diffusion editor makes about 1,000 pairs (photo, edited photo) per concept; a concept
is a short name and a prompt. Photos become squares of --size pixels; --train and --test of them are drawn in a random
order that depends on --seed alone. A command with more concepts adds them to the same folder, beside those it holds.

    in   --images DIR        photos in any format, subfolders too (`sklearn`: crops of the two photos scikit-learn installs)
    out  {train,test}/source/00000.png, {train,test}/<concept>/00000.png: the photo, and its edit of the same name and size
         {train,test}/metadata.jsonl: a row per edit; concepts.json: prompt and teacher of each concept; result.json
         samples.png: photos and edits side by side

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch"
"""
import hashlib
import json
import math
import re
import time
from collections import deque
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import common
from common import UserError

CONCEPTS = dict(sketch="turn it into a pencil sketch", oil="turn it into an oil painting",
                watercolour="turn it into a watercolour painting", sepia="make it a sepia photograph",
                poster="turn it into a posterised print", neon="make its edges glow like neon lights",
                night="make it night", emboss="turn it into an embossed relief")
PAPER = dict(images="photos", teacher="timbrooks/instruct-pix2pix", size=256, train=1000, test=100, batch=8,
             out=Path("runs/pairs"))
DEMO = dict(images="sklearn", teacher="filters", size=64, train=96, test=24, out=Path("runs/demo/pairs"))
SUFFIXES = set(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .jp2 .avif .heic .ppm .pgm .tga".split())
THREADS = 4         # decode and encode PNGs while the teacher works


# ---------------------------------------------------------------------------------------------------------------------
# The built-in teacher: eight edits of x (1, 3, H, W) in [0, 1]. Lengths are in `px`, 1/256 of the picture's side, so an
# edit looks the same at any size. Each edit depends on a pixel's neighbourhood alone: a small network can learn it.

def grey(x: Tensor) -> Tensor:
    return (x * tint(0.299, 0.587, 0.114)).sum(1, keepdim=True)     # (1, 1, H, W)


def tint(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def vivid(x: Tensor, saturation: float) -> Tensor:
    return grey(x) + saturation * (x - grey(x))


def blur(x: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(2.5 * sigma)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).repeat(x.shape[1], 1, 1, 1)          # (C, 1, 1, 2·reach + 1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), bell, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="reflect"), bell.transpose(2, 3), groups=x.shape[1])


def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical change over about `sigma` pixels, the same at any size for the same scene."""
    x = F.pad(blur(x, sigma), (1, 1, 1, 1), mode="replicate")
    return sigma / 2 * (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]), sigma / 2 * (x[..., 2:, 1:-1] - x[..., :-2, 1:-1])


def daub(x: Tensor, radius: float) -> Tensor:
    """Kuwahara's filter, softened: the mean of the four square windows that touch at a pixel, the flattest counting most."""
    r, (h, w) = max(1, round(radius)), x.shape[-2:]
    padded = F.pad(x, (r, r, r, r), mode="reflect")
    mean = F.avg_pool2d(padded, r + 1, stride=1)                     # (1, 3, H + r, W + r)
    variance = (F.avg_pool2d(padded ** 2, r + 1, stride=1) - mean ** 2).sum(1, keepdim=True).clamp(min=0)
    weight = (variance + 1e-4) ** -3
    corners = [(..., slice(dy, dy + h), slice(dx, dx + w)) for dy in (0, r) for dx in (0, r)]
    return sum(weight[c] * mean[c] for c in corners) / sum(weight[c] for c in corners)


def sketch(x: Tensor, px: float) -> Tensor:
    lines = (grey(x) + 0.06) / (blur(grey(x), 5 * px) + 0.06)       # under 1 where darker than its surroundings
    return (lines.clamp(max=1) ** 3 * (0.72 + 0.28 * grey(x).sqrt())).expand_as(x)


def oil(x: Tensor, px: float) -> Tensor:
    paint = daub(daub(x, 4 * px), 3 * px)
    dx, dy = slope(grey(paint), 1.5 * px)                           # light from the upper left on thick paint
    return tint(0.18, 0.12, 0.06) + torch.sigmoid(7 * (vivid(paint, 2) - 0.42)) * tint(0.86, 0.74, 0.46) + 1.5 * (dx + dy)


def watercolour(x: Tensor, px: float) -> Tensor:
    wash = daub(blur(x, 1.5 * px), 5 * px)
    dx, dy = slope(wash, 2 * px)
    rim = (dx ** 2 + dy ** 2).sum(1, keepdim=True).sqrt()           # pigment gathers where a wash ends
    return (0.45 + 0.6 * vivid(wash, 1.7)) * (1 - (3 * rim).clamp(max=0.45))


def sepia(x: Tensor, px: float) -> Tensor:
    g = grey(x)
    return torch.cat([0.22 + 0.80 * g, 0.12 + 0.74 * g ** 1.15, 0.05 + 0.57 * g ** 1.4], dim=1)


def poster(x: Tensor, px: float) -> Tensor:
    """Four inks, by brightness: navy, red, amber, cream."""
    y, g = tint(0.05, 0.14, 0.32).expand_as(x), grey(blur(x, 2 * px))
    for level, ink in (0.22, tint(0.84, 0.12, 0.14)), (0.45, tint(0.98, 0.68, 0.20)), (0.68, tint(1.0, 0.95, 0.80)):
        y = torch.lerp(y, ink, torch.sigmoid(60 * (g - level)))
    return y


def neon(x: Tensor, px: float) -> Tensor:
    dx, dy = slope(x, 1.5 * px)
    line = (dx ** 2 + dy ** 2).sqrt().amax(1, keepdim=True)
    hue = vivid(blur(x, 4 * px), 4).clamp(0.02, 1)
    return (6 * line + 2 * blur(line, 4 * px)) * hue / hue.amax(1, keepdim=True) + 0.6 * (5 * line - 0.7).clamp(0, 1)


def night(x: Tensor, px: float) -> Tensor:
    lamp = (4 * grey(x) - 2.8).clamp(0, 1)                          # what is brightest turns into warm light with a halo
    return 0.42 * grey(x) ** 1.3 * tint(0.4, 0.7, 1.5) + (0.45 * lamp + 0.4 * blur(lamp, 6 * px)) * tint(1, 0.75, 0.3)


def emboss(x: Tensor, px: float) -> Tensor:
    dx, dy = slope(grey(x), 1.3 * px)
    return (0.5 + 3.5 * (dx + dy)).expand_as(x)


FILTERS = {edit.__name__: edit for edit in (sketch, oil, watercolour, sepia, poster, neon, night, emboss)}


def filters_teacher(images: list[Image.Image], name: str, prompt: str, seeds: list[int]) -> list[Image.Image]:
    """Edits each picture with the filter called `name`; prompt and seeds change nothing."""
    edits = []
    for image in images:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        y = FILTERS[name](x, min(image.size) / 256).clamp(0, 1)
        edits.append(Image.fromarray((y[0].permute(1, 2, 0) * 255).round().byte().numpy()))
    return edits


# ---------------------------------------------------------------------------------------------------------------------
# Photos

BOXES = {"train": {"china.jpg": (190, 0, 640, 427), "flower.jpg": (30, 0, 330, 427)},        # left, top, right, bottom
         "test": {"china.jpg": (0, 30, 190, 427), "flower.jpg": (330, 70, 530, 427)}}         # half a temple, half a flower


def sklearn_crop(name: str, size: int) -> Image.Image:
    """Random crop number i of scikit-learn's two photographs (640x427), from "train i" or "test i": the two splits are cut
    from parts of the pictures that do not overlap."""
    from sklearn.datasets import load_sample_image
    split, number = name.split()
    file = ("china.jpg", "flower.jpg")[int(number) % 2]
    left, top, right, bottom = BOXES[split][file]
    draw = np.random.default_rng(list(name.encode()))
    side = int(draw.integers(80, min(right - left, bottom - top, 300) + 1))
    x, y = int(draw.integers(left, right - side + 1)), int(draw.integers(top, bottom - side + 1))
    crop = Image.fromarray(load_sample_image(file)[y:y + side, x:x + side])
    return crop.resize((size, size), Image.Resampling.LANCZOS)


def list_photos(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all image files in it and its subfolders, sorted; hidden ones left out."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the photos' with --images")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    names = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise UserError(f"{folder} holds no image files")
    return names


def read_photo(path: Path, size: int) -> Image.Image:
    """The middle square of a photo, RGB, resized to `size`. ValueError if it is smaller than that."""
    with Image.open(path) as photo:
        photo.draft(None, (2 * size, 2 * size))                     # JPEG decodes several times faster at 1/2, 1/4, 1/8
        if min(photo.size) < size:
            raise ValueError(f"{photo.width}x{photo.height} is smaller than {size}")
        photo = ImageOps.exif_transpose(photo).convert("RGB")
    return ImageOps.fit(photo, (size, size), Image.Resampling.LANCZOS)


def ahead(pool: Executor, function: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """Maps in threads and in order like pool.map, but holds `depth` items at most: memory does not grow with their number."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def save(path: Path, image: Image.Image, about: dict) -> None:
    """Writes a PNG that carries its own row of metadata: what is finished, and how it was made, is known from the files
    alone, whichever process made them, and whenever one was stopped."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("about", json.dumps(about, ensure_ascii=False))
    common.replace_file(path, lambda aside: image.save(aside, format="PNG", compress_level=4, pnginfo=text))


def about(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["about"])


def make_sources(out: Path, names: list[str], read: Callable[[str], Image.Image], test: int, train: int) -> dict[str, str]:
    """Fills test/source, then train/source, with the photos of `names` that can be read. Returns {name: why not}."""
    finished = {about(path)["photo"] for split in ("train", "test") for path in (out / split / "source").glob("*.png")}
    skipped = {}

    def load(name):
        if name in finished:
            return name, None, None
        try:
            return name, read(name), None
        except Exception as error:          # a decoder may raise anything; the photo is skipped, listed and counted
            return name, None, str(error) or type(error).__name__

    def chosen(readers):
        places = [*(("test", i) for i in range(test)), *(("train", i) for i in range(train))][::-1]
        for name, image, trouble in ahead(readers, load, names):
            if trouble:
                skipped[name] = trouble
            else:
                split, index = places.pop()
                if image:
                    yield out / split / "source" / f"{index:05}.png", image, {"photo": name}
            if not places:
                return

    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        for _ in ahead(writers, lambda job: save(*job), chosen(readers)):
            pass
    return skipped


# ---------------------------------------------------------------------------------------------------------------------
# Edits

def seed_of(*parts: object) -> int:
    """A number under 2^48 from (seed, concept, photo): a picture's noise depends on nothing else, neither on the batch it
    is in nor on which process makes it, nor on what was made before."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; 99 where they are equal."""
    error = np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2)
    return round(min(99.0, 10 * math.log10(255 ** 2 / max(error, 1e-9))), 2)


def make_edits(out: Path, split: str, name: str, prompt: str, teacher: Callable, batch: int, seed: int) -> Iterator[Path]:
    """Edits every photo of a split that has no edit yet; yields each file as it is written."""
    def load(path):
        with Image.open(path) as image:
            return path.name, image.convert("RGB"), about(path)["photo"]

    def edited(readers):
        missing = (path for path in sorted((out / split / "source").glob("*.png"))
                   if not (out / split / name / path.name).exists())
        photos = ahead(readers, load, missing)
        while group := list(islice(photos, batch)):
            files, images, names = zip(*group)
            seeds = [seed_of(seed, name, photo) for photo in names]
            yield from zip(files, images, names, seeds, teacher(list(images), name, prompt, seeds))

    def write(job):
        file, image, photo, noise, edit = job
        save(out / split / name / file, edit, dict(concept=name, prompt=prompt, photo=photo, seed=noise,
                                                   psnr=psnr(image, edit)))
        return file

    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        yield from ahead(writers, write, edited(readers))


def write_metadata(out: Path, concepts: dict[str, dict]) -> list[dict]:
    """Writes {train,test}/metadata.jsonl from what the files say of themselves. Returns the table's rows."""
    rows = {name: {"concept": name, "train": 0, "test": 0, "photo unchanged PSNR dB": 0.0} for name in concepts}
    for split in ("train", "test"):
        def lines(aside):
            with aside.open("w", encoding="utf-8") as file:
                for name in concepts:
                    for path in sorted((out / split / name).glob("*.png")):
                        row = about(path)
                        rows[name][split] += 1
                        if split == "test":
                            rows[name]["photo unchanged PSNR dB"] += row["psnr"]
                        file.write(json.dumps({"file_name": f"{name}/{path.name}", "source": f"source/{path.name}", **row},
                                              ensure_ascii=False) + "\n")
        common.replace_file(out / split / "metadata.jsonl", lines)
    for row in rows.values():
        row["photo unchanged PSNR dB"] = round(row["photo unchanged PSNR dB"] / max(1, row["test"]), 2)
    return list(rows.values())


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], tile: int) -> Image.Image:
    """Rows of pictures, each under its label."""
    sheet = Image.new("RGB", (tile * max(len(images) for _, images in rows), (tile + 14) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows):
        draw.text((2, y * (tile + 14) + 1), label, fill="black")
        for x, image in enumerate(images):
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x * tile, y * (tile + 14) + 14))
    return sheet


def write_samples(out: Path, concepts: dict[str, dict], count: int = 6) -> None:
    def read(name):
        return [Image.open(path).convert("RGB") for path in sorted((out / "test" / name).glob("*.png"))[:count]]
    rows = [("photo", read("source")), *((f"{name}: {about['prompt']}", read(name)) for name, about in concepts.items())]
    common.write_png(out / "samples.png", contact_sheet(rows, tile=128))


# ---------------------------------------------------------------------------------------------------------------------

def read_concepts(args) -> dict[str, dict]:
    """{name: its entry in concepts.json} from --concept and --concepts, or the eight built-in prompts."""
    prompts = {}
    if args.concepts:
        prompts |= {name: entry["prompt"] if isinstance(entry, dict) and "prompt" in entry else entry
                    for name, entry in common.read_json(args.concepts).items()}
    for text in args.concept or []:
        name, _, prompt = text.partition("=")
        prompts[name.strip()] = prompt
    for name, prompt in prompts.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) or name.lower() in ("source", "rejected", "train", "test"):
            raise UserError(f"concept {name!r} cannot be a folder's name: use letters, digits, - and _")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"concept {name!r} has no prompt: write --concept {name}=\"what to do with the photo\"")
        if args.teacher == "filters" and name not in FILTERS:
            raise UserError(f"--teacher filters cannot do {name!r}: it knows {', '.join(FILTERS)}")
    return {name: {"prompt": " ".join(prompt.split()), "teacher": args.teacher} for name, prompt in (prompts or CONCEPTS).items()}


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--images", help="a folder of photos, or `sklearn` for crops of the two that it installs")
    parser.add_argument("--concept", action="append", metavar="NAME=PROMPT", help="an edit to make; can be repeated "
                        "(default: eight styles)")
    parser.add_argument("--concepts", type=Path, metavar="FILE.json", help="more of them: {name: prompt}")
    parser.add_argument("--teacher", help="a diffusers editing pipeline by hub id or folder, or `filters`: eight built-in edits")
    parser.add_argument("--size", type=int, help="pixels per side; a multiple of 8")
    parser.add_argument("--train", type=int, help="photos for training")
    parser.add_argument("--test", type=int, help="photos held out")
    parser.add_argument("--batch", type=int, help="photos per call of the teacher")
    args, start = parser.parse(), time.time()
    if args.size < 16 or args.size % 8:
        raise UserError(f"--size {args.size}: use a multiple of 8, 16 or more")
    if min(args.train, args.test, args.batch) < 1:
        raise UserError("--train, --test and --batch must be 1 or more")
    if args.teacher != "filters":
        raise UserError("only --teacher filters is built in so far")
    concepts = read_concepts(args)

    test, train = args.test, args.train
    if args.images == "sklearn":
        names, photos = [*(f"test {i}" for i in range(test)), *(f"train {i}" for i in range(train))], "sklearn"
        read = lambda name: sklearn_crop(name, args.size)
    else:
        names = sorted(list_photos(Path(args.images)), key=lambda name: seed_of(args.seed, name))
        photos = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        read = lambda name: read_photo(Path(args.images) / name, args.size)
        if len(names) < train + test:       # keep the proportion
            test = max(1, round(len(names) * test / (train + test)))
            train = len(names) - test
            print(f"{args.images} holds {len(names)} photos: {train} for training, {test} for testing")
    settings = dict(stage="01_distill_pairs", photos=photos, size=args.size, train=args.train, test=args.test, seed=args.seed)

    known = {}
    if (args.out / "concepts.json").exists() and not args.overwrite:
        known = common.read_json(args.out / "concepts.json")
        for name in known.keys() & concepts.keys():
            if known[name] != concepts[name]:
                raise UserError(f"{args.out} holds {name!r} made otherwise ({known[name]} there, {concepts[name]} here); give "
                                "it another name, or another --out")
        if concepts.keys() - known.keys() and common.read_json(args.out / "settings.json") == settings:
            (args.out / "result.json").unlink(missing_ok=True)      # complete no longer: there are concepts to add
    if common.begin_run(args.out, settings, args.overwrite):
        return
    torch.set_num_threads(1)                # a filter's tensors are small: threads would mostly wait for one another
    concepts = known | concepts
    common.write_json(args.out / "concepts.json", concepts)

    skipped = make_sources(args.out, names, read, test, train)
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    counts = {split: len(list((args.out / split / "source").glob("*.png"))) for split in ("train", "test")}
    if not all(counts.values()):
        raise UserError(f"{args.images} has too few photos that can be used: {len(skipped)} skipped, {sum(counts.values())} left")
    with tqdm(total=sum(counts.values()) * len(concepts), unit="edit", smoothing=0.05) as bar:
        for name, concept in concepts.items():
            for split in ("train", "test"):
                finished = sum(1 for _ in (args.out / split / name).glob("*.png"))
                bar.update(finished)
                for _ in make_edits(args.out, split, name, concept["prompt"], filters_teacher, args.batch, args.seed):
                    bar.update()

    rows = write_metadata(args.out, concepts)
    write_samples(args.out, concepts)
    common.write_json(args.out / "result.json", {
        "stage": "01_distill_pairs",
        "marks": [*(["demo"] if args.demo else []), *(["built-in filters as teacher"] if args.teacher == "filters" else [])],
        "seconds": round(time.time() - start, 1), "photos": counts, "skipped": skipped, "tables": {"Pairs": rows}})
    print(f"{args.out}: {counts['train']} + {counts['test']} photos, {len(concepts)} concepts; look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    common.run(main)
