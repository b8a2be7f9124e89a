"""Stage 1: data distillation. A teacher edits photos, and its edits become the training pairs of every later stage.

E2GAN (arXiv 2401.06127), section 3: a diffusion editor makes about 1,000 pairs (photo, edited photo) per concept; a
concept is a short name and a prompt. Any diffusers pipeline that takes a photo and a prompt can be the teacher; a
text-to-image checkpoint is used image-to-image. Photos become squares of --size pixels; --train and --test of them are
drawn in an order that --seed fixes. A command with more concepts adds them to the same folder.

    in   --images DIR        photos in any format, subfolders too (`sklearn`: crops of the two it installs)
    out  {train,test}/source/00000.png, {train,test}/<concept>/00000.png: the photo, and its edit of equal name and size
         {train,test}/metadata.jsonl: a row per edit; rejected/: the same for edits that fail --min-...-similarity
         concepts.json: prompt and teacher of each concept; samples.png: photos and edits to look at; result.json

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch" --preview 6
    torchrun --nproc_per_node=8 01_distill_pairs.py --images photos --concepts concepts.json --batch 32
"""

import argparse
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, distributed
from tqdm import tqdm

import common
from common import UserError

CONCEPTS = dict(
    sketch="turn it into a pencil sketch",
    oil="turn it into an oil painting",
    watercolour="turn it into a watercolour painting",
    sepia="make it a sepia photograph",
    poster="turn it into a posterised print",
    neon="make its edges glow like neon lights",
    night="make it night",
    emboss="turn it into an embossed relief",
)
PAPER = dict(
    images="photos",
    teacher="timbrooks/instruct-pix2pix",
    size=256,
    train=1000,
    test=100,
    batch=8,
    clip="ViT-B-32:openai",
    save_memory="none",
    preview=0,
    out=Path("runs/pairs"),
)
DEMO = dict(
    images="sklearn",
    teacher="filters",
    size=64,
    train=96,
    test=24,
    clip="none",
    out=Path("runs/demo/pairs"),
)
SPLITS = ("train", "test")
THREADS = 4  # decode photos and encode PNGs while the teacher works
PIPELINE_FLAGS = dict(
    steps="num_inference_steps",
    guidance="guidance_scale",
    image_guidance="image_guidance_scale",
    strength="strength",
)
GATE = ("min_image_similarity", "min_directional_similarity")
SCORES = dict(
    psnr="photo unchanged PSNR dB",
    image_similarity="image similarity",
    directional_similarity="directional similarity",
)
SEVERAL_REFERENCES = (
    "Flux2",
    "QwenImageEditPlus",
    "ZImageOmni",
)  # a list of images there is one edit's references


# ---------------------------------------------------------------------------------------------------------------------
# The built-in teacher: eight edits of x (1, 3, H, W) in [0, 1]. Lengths are in `px`, 1/256 of the picture's side, so an
# edit looks the same at any size. Each edit depends on a pixel's neighbourhood alone: a small network can learn it.


def grey(x: Tensor) -> Tensor:
    return (x * tint(0.299, 0.587, 0.114)).sum(1, keepdim=True)  # (1, 1, H, W)


def tint(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def vivid(x: Tensor, saturation: float) -> Tensor:
    return grey(x) + saturation * (x - grey(x))


def blur(x: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(2.5 * sigma)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).repeat(x.shape[1], 1, 1, 1)  # (C, 1, 1, 2·reach + 1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="reflect"), bell, groups=x.shape[1])
    return F.conv2d(
        F.pad(x, (0, 0, reach, reach), mode="reflect"), bell.transpose(2, 3), groups=x.shape[1]
    )


def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical change over about `sigma` pixels, the same at any size for the same scene."""
    x = F.pad(blur(x, sigma), (1, 1, 1, 1), mode="replicate")
    return sigma / 2 * (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]), sigma / 2 * (
        x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    )


def daub(x: Tensor, radius: float) -> Tensor:
    """Kuwahara's filter, softened: the mean of the four windows that touch at a pixel, the flattest counting most."""
    r, (h, w) = max(1, round(radius)), x.shape[-2:]
    padded = F.pad(x, (r, r, r, r), mode="reflect")
    mean = F.avg_pool2d(padded, r + 1, stride=1)  # (1, 3, H + r, W + r)
    variance = (
        (F.avg_pool2d(padded**2, r + 1, stride=1) - mean**2).sum(1, keepdim=True).clamp(min=0)
    )
    weight = (variance + 1e-4) ** -3
    corners = [(..., slice(dy, dy + h), slice(dx, dx + w)) for dy in (0, r) for dx in (0, r)]
    return sum(weight[c] * mean[c] for c in corners) / sum(weight[c] for c in corners)


def sketch(x: Tensor, px: float) -> Tensor:
    lines = (grey(x) + 0.06) / (
        blur(grey(x), 5 * px) + 0.06
    )  # under 1 where darker than its surroundings
    return (lines.clamp(max=1) ** 3 * (0.72 + 0.28 * grey(x).sqrt())).expand_as(x)


def oil(x: Tensor, px: float) -> Tensor:
    paint = daub(daub(x, 4 * px), 3 * px)
    dx, dy = slope(grey(paint), 1.5 * px)  # light from the upper left on thick paint
    colour = torch.sigmoid(7 * (vivid(paint, 2) - 0.42)) * tint(0.86, 0.74, 0.46)
    return tint(0.18, 0.12, 0.06) + colour + 1.5 * (dx + dy)


def watercolour(x: Tensor, px: float) -> Tensor:
    wash = daub(blur(x, 1.5 * px), 5 * px)
    dx, dy = slope(wash, 2 * px)
    rim = (dx**2 + dy**2).sum(1, keepdim=True).sqrt()  # pigment gathers where a wash ends
    return (0.45 + 0.6 * vivid(wash, 1.7)) * (1 - (3 * rim).clamp(max=0.45))


def sepia(x: Tensor, px: float) -> Tensor:
    g = grey(x)
    return torch.cat([0.22 + 0.80 * g, 0.12 + 0.74 * g**1.15, 0.05 + 0.57 * g**1.4], dim=1)


def poster(x: Tensor, px: float) -> Tensor:
    """Four inks, by brightness: navy, red, amber, cream."""
    y, g = tint(0.05, 0.14, 0.32).expand_as(x), grey(blur(x, 2 * px))
    for level, ink in (
        (0.22, tint(0.84, 0.12, 0.14)),
        (0.45, tint(0.98, 0.68, 0.20)),
        (0.68, tint(1.0, 0.95, 0.80)),
    ):
        y = torch.lerp(y, ink, torch.sigmoid(60 * (g - level)))
    return y


def neon(x: Tensor, px: float) -> Tensor:
    dx, dy = slope(x, 1.5 * px)
    line = (dx**2 + dy**2).sqrt().amax(1, keepdim=True)
    hue = vivid(blur(x, 4 * px), 4).clamp(0.02, 1)
    return (6 * line + 2 * blur(line, 4 * px)) * hue / hue.amax(1, keepdim=True) + 0.6 * (
        5 * line - 0.7
    ).clamp(0, 1)


def night(x: Tensor, px: float) -> Tensor:
    lamp = (4 * grey(x) - 2.8).clamp(0, 1)  # what is brightest becomes warm light with a halo
    return 0.42 * grey(x) ** 1.3 * tint(0.4, 0.7, 1.5) + (
        0.45 * lamp + 0.4 * blur(lamp, 6 * px)
    ) * tint(1, 0.75, 0.3)


def emboss(x: Tensor, px: float) -> Tensor:
    dx, dy = slope(grey(x), 1.3 * px)
    return (0.5 + 3.5 * (dx + dy)).expand_as(x)


FILTERS = {
    edit.__name__: edit for edit in (sketch, oil, watercolour, sepia, poster, neon, night, emboss)
}


def filters_teacher(
    images: list[Image.Image], name: str, prompt: str, seeds: list[int]
) -> list[Image.Image]:
    """Edits each picture with the filter called `name`; prompt and seeds change nothing."""
    edits = []
    for image in images:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        y = FILTERS[name](x, min(image.size) / 256).clamp(0, 1)
        edits.append(Image.fromarray((y[0].permute(1, 2, 0) * 255).round().byte().numpy()))
    return edits


# ---------------------------------------------------------------------------------------------------------------------
# Any diffusers pipeline as the teacher


def load_teacher(args) -> Callable:
    """teacher(images, name, prompt, seeds) -> edits, lists of PIL images; an edit that the pipeline's safety checker
    blanked has info["unsafe"]. UserError if it cannot be loaded, edits no photos, or does not take a flag given."""
    if args.teacher == "filters":
        torch.set_num_threads(
            1
        )  # a filter's tensors are small: threads would mostly wait for one another
        return filters_teacher
    if Path(args.teacher).is_dir() and not (Path(args.teacher) / "model_index.json").is_file():
        raise UserError(
            f"--teacher {args.teacher} is no diffusers pipeline: it has no model_index.json"
        )
    device = common.pick_device(args.device)
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    dtype = (
        torch.float32
        if device.type == "cpu"
        else torch.bfloat16
        if common.has_bf16(device)
        else torch.float16
    )
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        pipe = DiffusionPipeline.from_pretrained(args.teacher, dtype=dtype, use_safetensors=True)
        if "image" not in inspect.signature(pipe.__call__).parameters:
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    except Exception as error:  # loaders raise anything, from missing keys to network errors
        offline = " (a hub id needs the network once; without it give a pipeline's folder)"
        hint = "" if Path(args.teacher).exists() else offline
        trouble = str(error).split(". ")[0] or type(error).__name__
        raise UserError(f"--teacher {args.teacher} cannot be loaded{hint}: {trouble}")
    finally:
        logging.set_verbosity(verbosity)
    kind, parameters = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    takes = {
        name
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    if not {"image", "prompt"} <= takes:
        raise UserError(f"--teacher {args.teacher}: a {kind} does not edit a photo by a prompt")
    given = {
        f"--{flag.replace('_', '-')}": (name, getattr(args, flag))
        for flag, name in PIPELINE_FLAGS.items()
    }
    given |= {f"--argument {name}": (name, value) for name, value in args.arguments.items()}
    given = {flag: (name, value) for flag, (name, value) in given.items() if value is not None}
    if refused := [flag for flag, (name, _) in given.items() if name not in takes]:
        raise UserError(
            f"{kind} does not take {', '.join(refused)}; it takes {', '.join(sorted(takes))}"
        )
    size = args.teacher_size
    wanted = dict(height=size, width=size, max_area=size**2, _auto_resize=False, output_type="pil")
    options = {name: value for name, value in wanted.items() if name in takes} | dict(
        given.values()
    )
    if {"strength", "num_inference_steps"} <= takes:
        steps, strength = (
            options.get(name, parameters[name].default)
            for name in ("num_inference_steps", "strength")
        )
        if steps and strength and steps * strength < 1:
            raise UserError(
                f"{kind}: {steps} steps at strength {strength} leave none; raise --steps or --strength"
            )
    if args.save_memory == "offload" and device.type == "cpu":
        raise UserError(
            "--save-memory offload moves the pipeline's parts to a GPU and back: there is none"
        )
    if args.save_memory == "offload":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if args.save_memory != "none":
        pipe.enable_attention_slicing()
        if hasattr(getattr(pipe, "vae", None), "enable_slicing"):
            pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    at_once = 1 if kind.startswith(SEVERAL_REFERENCES) else args.batch

    def teacher(images, name, prompt, seeds):
        edits = []
        for i in range(0, len(images), at_once):
            part = images[i : i + at_once]
            noise = [
                torch.Generator().manual_seed(seed) for seed in seeds[i : i + at_once]
            ]  # the same on any device
            try:
                output = pipe(image=part, prompt=[prompt] * len(part), generator=noise, **options)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"out of memory at {len(part)} photos of {size} pixels: lower --batch or --save-memory"
                )
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(f"{kind} fails on concept {name!r}: {error}") from error
            if len(output.images) != len(part):
                raise UserError(
                    f"{kind} made {len(output.images)} pictures of {len(part)}: use --batch 1"
                )
            flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(part)
            for edit, unsafe in zip(output.images, flagged):
                edit.info["unsafe"] = bool(unsafe)
                edits.append(edit)
        return edits

    return teacher


# ---------------------------------------------------------------------------------------------------------------------
# Photos

BOXES = {
    "train": {
        "china.jpg": (190, 0, 640, 427),
        "flower.jpg": (30, 0, 330, 427),
    },  # left, top, right, bottom
    "test": {"china.jpg": (0, 30, 190, 427), "flower.jpg": (330, 70, 530, 427)},
}  # half of either subject


@functools.cache
def sklearn_photo(file: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(file))


def sklearn_crop(name: str, size: int) -> Image.Image:
    """Random crop number i of scikit-learn's two photographs (640x427), from "train i" or "test i": the two splits are
    cut from parts of the pictures that do not overlap."""
    split, number = name.split()
    file = ("china.jpg", "flower.jpg")[int(number) % 2]
    left, top, right, bottom = BOXES[split][file]
    draw = np.random.default_rng(list(name.encode()))
    side = int(draw.integers(80, min(right - left, bottom - top, 300) + 1))
    x, y = int(draw.integers(left, right - side + 1)), int(draw.integers(top, bottom - side + 1))
    return (
        sklearn_photo(file)
        .crop((x, y, x + side, y + side))
        .resize((size, size), Image.Resampling.LANCZOS)
    )


def list_photos(folder: Path) -> tuple[list[str], str]:
    """Sorted names, relative to `folder`, of the image files in it and its subfolders, hidden ones left out; and a
    digest of names and sizes in bytes."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the photos' with --images")
    sizes = {}
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in common.SUFFIXES and not name.startswith("."):
                file = Path(path, name)
                sizes[file.relative_to(folder).as_posix()] = (
                    file.stat().st_size if file.exists() else None
                )
    if not sizes:
        raise UserError(f"{folder} holds no image files ({' '.join(sorted(common.SUFFIXES))})")
    return sorted(sizes), hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def read_photo(path: Path, size: int, at_least: int) -> Image.Image:
    """The middle square of a photo, RGB, upright, resized to `size`. ValueError if a side has under `at_least` pixels; what
    Pillow raises if broken."""
    with Image.open(path) as photo:
        if min(photo.size) < at_least:
            raise ValueError(f"{photo.width}x{photo.height} is smaller than {at_least} pixels")
        photo.draft(
            None, (2 * size, 2 * size)
        )  # JPEG decodes several times faster at 1/2, 1/4, 1/8
        return ImageOps.fit(common.upright(photo), (size, size), Image.Resampling.LANCZOS)


def readable(name: str) -> str:
    """A file's name as text, also where its bytes are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def save(path: Path, image: Image.Image, about: dict) -> None:
    """Writes a PNG that carries its own row of metadata: what is finished, and how it was made, is known from the files
    alone, whichever process made them, and whenever one was stopped."""
    text = PngImagePlugin.PngInfo()
    text.add_text("about", json.dumps(about))
    common.replace_file(
        path, lambda aside: image.save(aside, format="PNG", compress_level=4, pnginfo=text)
    )


def load(path: Path) -> tuple[Image.Image, dict]:
    """A picture that `save` wrote, RGB, and what it says of itself."""
    return common.to_pil(common.read_image(path)), about(path)


def about(path: Path) -> dict:
    """The same without decoding the pixels. UserError where it says nothing."""
    try:
        with Image.open(path) as image:
            told = json.loads(image.info["about"])
        return {**told, "photo": str(told["photo"])}
    except Exception as error:  # a decoder may raise anything
        raise UserError(f"{path} is no picture that this stage wrote ({error!r}): delete it")


def numbered(folder: Path) -> Iterator[Path]:
    return folder.glob("[0-9]*.png")


def usable(
    names: list[str], read: Callable, skipped: dict[str, str], finished: frozenset = frozenset()
) -> Iterator:
    """Yields (name, image) of the photos that can be read, in order, decoded ahead in threads; image is None where the
    name is in `finished`. The others' names and what is wrong with them go to `skipped`."""

    def attempt(name):
        try:
            return name, None if name in finished else read(name), None
        except (
            Exception
        ) as error:  # a decoder may raise anything; the photo is skipped, listed and counted
            return name, None, str(error) or type(error).__name__

    with ThreadPoolExecutor(THREADS) as pool:
        for name, image, trouble in common.ahead(pool, attempt, names):
            if trouble:
                skipped[readable(name)] = trouble
            else:
                yield name, image


def make_sources(
    out: Path, names: list[str], read: Callable, test: int, train: int
) -> dict[str, str]:
    """Fills test/source, then train/source, with the photos that can be read. Returns {name: what is wrong}."""
    places = (
        (split, i) for split, count in (("test", test), ("train", train)) for i in range(count)
    )
    finished = frozenset(
        about(path)["photo"] for split in SPLITS for path in numbered(out / split / "source")
    )
    skipped = {}
    chosen = zip(places, usable(names, read, skipped, finished))
    jobs = (
        (out / split / "source" / f"{i:05}.png", image, {"photo": name})
        for (split, i), (name, image) in chosen
        if image
    )
    with ThreadPoolExecutor(THREADS) as writers:
        for _ in common.ahead(writers, lambda job: save(*job), jobs):
            pass
    return skipped


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def seed_of(*parts: object) -> int:
    """A number under 2^48 from (seed, concept, photo): a picture's noise depends on nothing else, neither on the batch
    it is in nor on which process makes it, nor on what was made before."""
    text = "/".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; 99 where they are equal."""
    error = np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2)
    return round(min(99.0, 10 * math.log10(255**2 / max(error, 1e-9))), 2)


def clip_scores(
    clip: common.Clip, photos: list[Image.Image], edits: list[Image.Image], prompt: str
) -> list[dict]:
    """InstructPix2Pix's two measures (arXiv 2211.09800, 3.1.2), cosines in [-1, 1]: of photo and edit; and of the
    change in the picture and the change in text, here from "a photo" to the prompt, as the edit has no caption."""

    def embed(images):  # (B, D) unit vectors
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return clip.images(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    before, after = embed(photos), embed(edits)
    start, goal = clip.texts(["a photo", prompt])
    similar, directed = (
        (before * after).sum(1),
        F.cosine_similarity(after - before, (goal - start)[None]),
    )
    return [
        dict(image_similarity=round(a, 4), directional_similarity=round(b, 4))
        for a, b in zip(similar.tolist(), directed.tolist())
    ]


def missing_edits(
    out: Path, counts: dict[str, int], names: Iterable[str], rank: int, world: int
) -> Iterator[tuple]:
    """(concept, split, file name) of each edit that is not there yet and that this process has to make."""
    for name, split in itertools.product(names, SPLITS):
        made = {
            path.name
            for folder in (out, out / "rejected")
            for path in numbered(folder / split / name)
        }
        files = (f"{i:05}.png" for i in range(rank, counts[split], world))
        yield from ((name, split, file) for file in files if file not in made)


def make_edits(
    out: Path,
    jobs: Iterable[tuple[str, str, str]],
    concepts: dict[str, dict],
    read: Callable,
    teacher: Callable,
    clip: common.Clip | None,
    args,
) -> Iterator[Path]:
    """Yields each edit's file as it is written; reading ahead and writing happen in threads while the teacher works."""

    def fetch(job):
        name, split, file = job
        source, told = load(out / split / "source" / file)
        given = source if args.teacher_size == args.size else read(told["photo"], args.teacher_size)
        return name, out / split / name / file, told["photo"], source, given

    def edited(readers):
        jobs_ready = common.ahead(readers, fetch, jobs, max(32, 2 * args.batch))
        for name, group in itertools.groupby(jobs_ready, key=lambda job: job[0]):
            prompt = concepts[name]["prompt"]
            while batch := list(itertools.islice(group, args.batch)):
                _, paths, photos, sources, given = zip(*batch)
                seeds = [seed_of(args.seed, name, photo) for photo in photos]
                edits = teacher(list(given), name, prompt, seeds)
                scores = clip_scores(clip, given, edits, prompt) if clip else [{}] * len(edits)
                rows = [
                    dict(concept=name, prompt=prompt, photo=photo, seed=seed, **score)
                    for photo, seed, score in zip(photos, seeds, scores)
                ]
                yield from zip(paths, sources, edits, rows)

    def write(job):
        path, source, edit, row = job
        edit = edit.convert("RGB").resize(source.size, Image.Resampling.LANCZOS)
        save(
            path,
            edit,
            {
                **row,
                "psnr": psnr(source, edit),
                **({"unsafe": True} if edit.info.get("unsafe") else {}),
            },
        )
        return path

    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        yield from common.ahead(writers, write, edited(readers))


# ---------------------------------------------------------------------------------------------------------------------
# What the folder says of itself


def why_rejected(row: dict, concept: dict) -> str | None:
    if row.get("unsafe"):
        return "safety checker"
    for limit in GATE:
        if concept.get(limit) is not None and row[limit.removeprefix("min_")] < concept[limit]:
            return limit.removeprefix("min_").replace("_", " ")
    return None


def sorted_edits(
    out: Path, split: str, counts: dict[str, int], concepts: dict[str, dict]
) -> Iterator[tuple]:
    """Yields (row, why it is rejected or None) of each edit, after moving it to or from rejected/ as thresholds say."""
    for name, concept in concepts.items():
        for file in (f"{i:05}.png" for i in range(counts[split])):
            kept, aside = out / split / name / file, out / "rejected" / split / name / file
            path = kept if kept.exists() else aside
            if path.exists():
                row = about(path)
                row["photo"], reason = readable(row["photo"]), why_rejected(row, concept)
                home = aside if reason else kept
                if path != home:
                    home.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, home)
                source = f"source/{file}"  # `source_file_name` makes it a picture for datasets.load_dataset
                yield (
                    {
                        "file_name": f"{name}/{file}",
                        "source": source,
                        "source_file_name": source,
                        **row,
                    },
                    reason,
                )


def write_metadata(
    out: Path, counts: dict[str, int], concepts: dict
) -> tuple[list[dict], dict[str, Counter]]:
    """Writes metadata.jsonl of what is kept and rejected/{train,test}.jsonl of what is not, from what the files say of
    themselves. Returns the table's rows, and each concept's reasons for rejection with their counts."""
    sums, reasons = {name: Counter() for name in concepts}, {name: Counter() for name in concepts}

    def write(aside):
        refused = out / "rejected" / f"{split}.jsonl"
        with aside.open("w", encoding="utf-8") as kept, refused.open("w", encoding="utf-8") as rest:
            for row, reason in sorted_edits(out, split, counts, concepts):
                if reason:
                    reasons[row["concept"]][reason] += 1
                    rest.write(json.dumps({**row, "reason": reason}, ensure_ascii=False) + "\n")
                else:
                    sums[row["concept"]].update(
                        {split: 1, **{key: row[key] for key in SCORES if key in row}}
                    )
                    kept.write(json.dumps(row, ensure_ascii=False) + "\n")

    (out / "rejected").mkdir(exist_ok=True)
    for split in SPLITS:
        common.replace_file(out / split / "metadata.jsonl", write)
    rows = [
        {
            "concept": name,
            "train": own["train"],
            "test": own["test"],
            "rejected": reasons[name].total(),
            **{
                head: round(own[key] / (own["train"] + own["test"]), 3)
                for key, head in SCORES.items()
                if key in own
            },
        }
        for name, own in sums.items()
    ]
    return rows, reasons


def samples(out: Path, names: Iterable[str], count: int) -> Image.Image:
    """The contact sheet: a row of test photos, and under it a row of edits per concept."""
    files = [f"{i:05}.png" for i in range(count)]
    paths = [[out / "test" / name / file for file in files] for name in ("source", *names)]
    rows = [[common.read_image(path) if path.exists() else None for path in row] for row in paths]
    return common.picture_grid(rows, files, ["photo", *names], cell=160)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_concepts(args) -> dict[str, dict]:
    """{name: its entry in concepts.json} from --concept and --concepts, or the eight built-in prompts."""
    prompts = {}
    if args.concepts:
        prompts |= {
            name: entry.get("prompt") if isinstance(entry, dict) else entry
            for name, entry in common.read_json(args.concepts).items()
        }
    for text in args.concept or []:
        name, _, prompt = text.partition("=")
        prompts[name.strip()] = prompt
    prompts = prompts or CONCEPTS
    for name, prompt in prompts.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) or name.lower() in (
            "source",
            "rejected",
            *SPLITS,
        ):
            raise UserError(
                f"concept {name!r} cannot be a folder's name: use letters, digits, - and _"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f'concept {name!r} has no prompt: write --concept {name}="what to do with the photo"'
            )
        if args.teacher == "filters" and name not in FILTERS:
            raise UserError(f"--teacher filters cannot do {name!r}: it knows {', '.join(FILTERS)}")
    if len({name.lower() for name in prompts}) < len(prompts):
        raise UserError(
            "two concepts' names differ in case alone, which not every file system tells apart"
        )
    flags = ("teacher", "teacher_size", *PIPELINE_FLAGS, "arguments", "clip", *GATE)
    used = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) not in (None, {})}
    return {name: {"prompt": " ".join(prompt.split()), **used} for name, prompt in prompts.items()}


def parse() -> argparse.Namespace:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument(
        "--images", help="a folder of photos, or `sklearn` for crops of the two that it installs"
    )
    parser.add_argument(
        "--concept",
        action="append",
        metavar="NAME=PROMPT",
        help="an edit to make; can be repeated (default: eight styles)",
    )
    parser.add_argument(
        "--concepts", type=Path, metavar="FILE.json", help="more of them: {name: prompt}"
    )
    parser.add_argument(
        "--teacher", help="a diffusers pipeline by hub id or folder, or `filters`: 8 built-in edits"
    )
    parser.add_argument("--size", type=int, help="pixels per side; a multiple of 8")
    parser.add_argument(
        "--teacher-size",
        type=int,
        help="pixels per side at which the teacher works, best the "
        "size that it was trained at (default: --size)",
    )
    parser.add_argument("--train", type=int, help="photos for training")
    parser.add_argument("--test", type=int, help="photos held out")
    parser.add_argument(
        "--steps",
        type=int,
        help="denoising steps (default, as of the next three: the pipeline's own)",
    )
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance towards the prompt"
    )
    parser.add_argument(
        "--image-guidance", type=float, help="guidance towards the photo (InstructPix2Pix)"
    )
    parser.add_argument(
        "--strength", type=float, help="image-to-image: share of the noise that is added, 0 to 1"
    )
    parser.add_argument(
        "--argument",
        action="append",
        metavar="NAME=VALUE",
        help="anything else that the pipeline's "
        "call takes, such as true_cfg_scale=4 or negative_prompt=blurry; can be repeated",
    )
    parser.add_argument(
        "--batch", type=int, help="photos per call of the teacher; the edits do not depend on it"
    )
    parser.add_argument(
        "--save-memory",
        choices=("none", "slicing", "offload"),
        help="slicing: attention and VAE in "
        "slices; offload: also keep the pipeline's parts in main memory until they are needed",
    )
    parser.add_argument(
        "--clip", metavar="MODEL:WEIGHTS", help="open_clip model to score edits with, or `none`"
    )
    parser.add_argument(
        "--min-image-similarity",
        type=float,
        help="reject edits less like their photo, by CLIP "
        "(InstructPix2Pix's filter with ViT-L-14: 0.7; default: keep all)",
    )
    parser.add_argument(
        "--min-directional-similarity",
        type=float,
        help="reject edits that change otherwise than the "
        "text (InstructPix2Pix's filter, on captions: 0.2; default: keep all)",
    )
    parser.add_argument(
        "--preview", type=int, metavar="N", help="only make samples.png, of N photos"
    )
    args = parser.parse()
    args.teacher_size = args.teacher_size or args.size
    if args.size < 16 or args.size % 8 or args.teacher_size < 16 or args.teacher_size % 8:
        raise UserError(
            f"--size {args.size}, --teacher-size {args.teacher_size}: use a multiple of 8, 16 or more"
        )
    if (
        min(args.train, args.test, args.batch) < 1
        or args.preview < 0
        or (args.steps is not None and args.steps < 1)
    ):
        raise UserError(
            "--train, --test, --batch and --steps must be 1 or more, --preview 0 or more"
        )
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength}: over 0, up to 1")
    if args.clip == "none" and any(getattr(args, limit) is not None for limit in GATE):
        raise UserError(
            "--min-image-similarity and --min-directional-similarity need a --clip model"
        )
    args.arguments = {}
    for text in args.argument or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--argument {text}: write NAME=VALUE")
        try:
            args.arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            args.arguments[name] = value  # a string needs no quotes
    unused = [flag for flag in (*PIPELINE_FLAGS, "argument") if getattr(args, flag) is not None]
    if args.teacher == "filters" and unused:
        raise UserError(f"--teacher filters does not take --{unused[0].replace('_', '-')}")
    return args


def photo_source(args) -> tuple[list[str], str, Callable]:
    """Photo names in the order that --seed draws, a digest of them, and read(name, size) -> PIL image."""
    if args.images == "sklearn":
        names = [f"{split} {i}" for split in ("test", "train") for i in range(getattr(args, split))]
        return names, "sklearn", sklearn_crop
    folder = Path(args.images)
    if args.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {args.out} lies in the photos' folder {folder}: choose one outside")
    names, digest = list_photos(folder)
    return (
        sorted(names, key=lambda name: seed_of(args.seed, name)),
        digest,
        lambda name, size: read_photo(folder / name, size, at_least=args.size),
    )


def is_done(args, settings: dict, concepts: dict[str, dict]) -> bool:
    """Whether the folder holds all that is asked for. UserError if it holds another run or a concept made otherwise."""
    if args.overwrite or not args.out.is_dir() or not set(os.listdir(args.out)) - {"samples.png"}:
        return False
    if (
        not (args.out / "concepts.json").exists()
        or common.read_json(args.out / "settings.json") != settings
    ):
        return common.prepare_folder(args.out, settings, overwrite=False)
    known = common.read_concepts(args.out)
    for name in concepts.keys() & known.keys():
        for key in sorted((concepts[name].keys() | known[name].keys()) - set(GATE)):
            there, here = known[name].get(key), concepts[name].get(key)
            if there != here:
                raise UserError(
                    f"{args.out} holds {name!r} made otherwise ({key} {there!r} there, {here!r} here): "
                    "give it another name, or give another --out; --overwrite deletes all that is there"
                )
    if known | concepts != known:
        (args.out / "result.json").unlink(
            missing_ok=True
        )  # complete no longer: concepts or thresholds are new
    return common.prepare_folder(args.out, settings, overwrite=False)


def preview(args, concepts: dict[str, dict], names: list[str], read: Callable) -> None:
    """Writes samples.png alone, made of the photos and the noise that the run will use for its first test pictures."""
    there = set(os.listdir(args.out)) if args.out.is_dir() else set()
    if there and not there & {"settings.json", "samples.png", common.LOCK}:
        raise UserError(f"{args.out} holds files that no stage made; give another --out")
    with tempfile.TemporaryDirectory() as folder:
        skipped = make_sources(
            Path(folder), names, lambda name: read(name, args.size), test=args.preview, train=0
        )
        counts = {"train": 0, "test": sum(1 for _ in numbered(Path(folder, "test/source")))}
        if not counts["test"]:
            raise UserError(f"{args.images} has no photo that can be used: {skipped}")
        jobs = missing_edits(Path(folder), counts, concepts, rank=0, world=1)
        for _ in tqdm(
            make_edits(Path(folder), jobs, concepts, read, load_teacher(args), None, args),
            unit="edit",
        ):
            pass
        common.write_png(args.out / "samples.png", samples(Path(folder), concepts, counts["test"]))
    print(f"look at {args.out / 'samples.png'}")


def meet(value: bool = False) -> bool:
    """Process 0's value, once all processes have come here."""
    flag = torch.tensor(value)
    if distributed.is_initialized():
        try:
            distributed.broadcast(flag, 0)
            distributed.barrier()
        except RuntimeError:
            raise UserError("another process stopped: its message says why")
    return bool(flag)


def main() -> None:
    args, start = parse(), time.time()
    concepts = read_concepts(args)
    names, digest, read = photo_source(args)
    if args.preview:
        return preview(args, concepts, names, read)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # one process may wait for another's last hours
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    settings = dict(
        stage="01_distill_pairs",
        photos=digest,
        size=args.size,
        train=args.train,
        test=args.test,
        seed=args.seed,
    )
    if meet(rank == 0 and is_done(args, settings, concepts)):
        return
    clip = None if args.clip == "none" else common.Clip(args.clip, common.pick_device(args.device))
    teacher = load_teacher(args)
    if rank == 0:
        skipped = {}
        if (
            len(
                list(
                    itertools.islice(usable(names, lambda name: read(name, args.size), skipped), 2)
                )
            )
            < 2
        ):
            raise UserError(
                f"{args.images} has too few photos that can be used: {dict(list(skipped.items())[:3])}"
            )
        if args.out.is_dir() and os.listdir(args.out) == ["samples.png"]:
            (args.out / "samples.png").unlink()  # a preview's
        common.prepare_folder(args.out, settings, args.overwrite)
        known = common.read_concepts(args.out) if (args.out / "concepts.json").exists() else {}
        common.write_json(args.out / "concepts.json", known | concepts)
        share = min(
            1, len(names) / (args.train + args.test)
        )  # of what is asked for; the proportion stays
        test = max(1, round(share * args.test))
        train = min(args.train, len(names) - test)
        skipped = make_sources(args.out, names, lambda name: read(name, args.size), test, train)
        for name, trouble in skipped.items():
            print(f"skipped {name}: {trouble}")
    meet()
    counts = {split: sum(1 for _ in numbered(args.out / split / "source")) for split in SPLITS}
    if not all(counts.values()):
        raise UserError(f"{args.images} has too few photos that can be used: {counts}")
    jobs = missing_edits(args.out, counts, concepts, rank, world)
    total = sum(1 for _ in missing_edits(args.out, counts, concepts, rank, world))
    sys.setswitchinterval(
        0.0005
    )  # the teacher must not wait 5 ms whenever a thread is busy encoding
    with tqdm(total=total, unit="edit", mininterval=0.5, disable=rank > 0) as bar:
        for _ in make_edits(args.out, jobs, concepts, read, teacher, clip, args):
            bar.update()
    meet()
    if rank == 0:
        finish(args, counts, skipped, start)


def finish(args, counts: dict[str, int], skipped: dict[str, str], start: float) -> None:
    """metadata.jsonl, samples.png and result.json, of all concepts in the folder."""
    concepts = common.read_concepts(args.out)
    rows, reasons = write_metadata(args.out, counts, concepts)
    common.write_png(args.out / "samples.png", samples(args.out, concepts, min(6, counts["test"])))
    for row in rows:
        if not row["train"] or not row["test"]:
            raise UserError(
                f"too few edits of {row['concept']!r} pass ({dict(reasons[row['concept']])}): look at "
                f"{args.out / 'rejected'}; other thresholds make no edit anew"
            )
    marks = ["demo"] if args.demo else []
    if any(concept["teacher"] == "filters" for concept in concepts.values()):
        marks.append("built-in filters as teacher")
    marks += sorted(
        {mark for concept in concepts.values() for mark in common.clip_mark(concept["clip"])}
    )
    marks += [
        f"partial: {row['concept']}"
        for row in rows
        if row["train"] + row["test"] + row["rejected"] < sum(counts.values())
    ]
    common.write_json(
        args.out / "result.json",
        {
            "stage": "01_distill_pairs",
            "marks": marks,
            "seconds": round(time.time() - start, 1),
            "photos": counts,
            "skipped": skipped,
            "rejected": {name: why for name, why in reasons.items() if why},
            "tables": {"Pairs": rows},
        },
    )
    print(
        f"{args.out}: {counts['train']} + {counts['test']} photos ({len(skipped)} skipped), {len(concepts)} concepts "
        f"({sum(row['rejected'] for row in rows)} edits rejected); look at {args.out / 'samples.png'}"
    )


if __name__ == "__main__":
    common.run(main)
