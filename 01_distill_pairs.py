"""Stage 1: data distillation. A teacher edits photos; its edits become the training pairs.

E2GAN (arXiv 2401.06127), section 3: a diffusion editor makes about 1,000 pairs (photo, edit) per
concept, which is a short name and a prompt. Any diffusers pipeline that takes a photo and a prompt
can teach; a text-to-image checkpoint is used image-to-image. Photos become squares of --size
pixels, in an order that --seed fixes. A command with more concepts adds them to the same folder;
to look first: --train 1 --test 6 --out runs/look.

Reads   --images DIR                                photos in any format, subfolders too
Writes  runs/pairs/{train,test}/source/00000.png    a photo; <concept>/00000.png is its edit
        runs/pairs/{train,test}/metadata.jsonl      a row per edit: prompt, photo, seed, scores
        runs/pairs/rejected/{train,test}/           the same for edits that fail the gate
        runs/pairs/features.safetensors             CLIP: pictures' vectors, prompts' tokens
        runs/pairs/concepts.json  photos.json  samples.png  result.json

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch"
    torchrun --nproc_per_node=8 01_distill_pairs.py --images photos --concepts concepts.json
"""

import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import training
from common import UserError, rank, world

STAGE = "01_distill_pairs"
CONCEPTS = {
    "sketch": "turn it into a pencil sketch",
    "oil": "turn it into an oil painting",
    "watercolour": "turn it into a watercolour painting",
    "sepia": "make it a sepia photograph",
    "poster": "turn it into a posterised print",
    "neon": "make its edges glow like neon lights",
    "night": "make it night",
    "emboss": "turn it into an embossed relief",
}
DEMO = {"images": "sklearn", "teacher": "filters", "clip": "ViT-S-32:random"}
DEMO |= {"size": 64, "train": 96, "test": 24}
SPLITS = ("test", "train")  # the first photos are held out
MADE = ("teacher", "teacher_size", "arguments")  # what an edit depends on, beside its prompt
GATE = ("image_similarity", "directional_similarity")
THREADS = 4  # decode photos and encode PNGs while the teacher works
BATCH = 64  # pictures that CLIP embeds at a time

# ---- The built-in teacher: eight edits -----------------------------------------------------------
# Each depends on a pixel's neighbourhood alone, so that a small
# network can learn it. Lengths are in `px`, 1/256 of the picture's side: the same at any size.


def tint(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def grey(x: Tensor) -> Tensor:
    return (x * tint(0.299, 0.587, 0.114)).sum(1, keepdim=True)  # (1, 1, H, W)


def vivid(x: Tensor, saturation: float) -> Tensor:
    return grey(x) + saturation * (x - grey(x))


def blur(x: Tensor, sigma: float) -> Tensor:
    reach, channels = math.ceil(2.5 * sigma), x.shape[1]
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).repeat(channels, 1, 1, 1)  # (C, 1, 1, 2 * reach + 1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "reflect"), bell, groups=channels)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), "reflect"), bell.mT, groups=channels)


def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical change over about `sigma` pixels."""
    x = F.pad(blur(x, sigma), (1, 1, 1, 1), "replicate")
    dx = sigma / 2 * (x[..., 1:-1, 2:] - x[..., 1:-1, :-2])
    return dx, sigma / 2 * (x[..., 2:, 1:-1] - x[..., :-2, 1:-1])


def daub(x: Tensor, radius: float) -> Tensor:
    """Kuwahara's filter, softened: the mean of the four windows that touch at a pixel, the
    flattest counting most."""
    r, (h, w) = max(1, round(radius)), x.shape[-2:]
    x = F.pad(x, (r, r, r, r), "reflect")
    mean, square = (F.avg_pool2d(part, r + 1, stride=1) for part in (x, x**2))
    weight = ((square - mean**2).sum(1, keepdim=True).clamp(min=0) + 1e-4) ** -3
    corners = [
        (..., slice(y, y + h), slice(x, x + w)) for y, x in itertools.product((0, r), (0, r))
    ]
    return sum(weight[c] * mean[c] for c in corners) / sum(weight[c] for c in corners)


def edited(image: Image.Image, name: str) -> Image.Image:
    x, px = common.to_pixels(image)[None].float() / 255, min(image.size) / 256
    g = grey(x)
    if name == "sketch":
        lines = (g + 0.06) / (blur(g, 5 * px) + 0.06)  # under 1 where darker than around it
        y = lines.clamp(max=1) ** 3 * (0.72 + 0.28 * g.sqrt())
    elif name == "oil":
        paint = daub(daub(x, 4 * px), 3 * px)
        dx, dy = slope(grey(paint), 1.5 * px)  # light from the upper left on thick paint
        colour = torch.sigmoid(7 * (vivid(paint, 2) - 0.42)) * tint(0.86, 0.74, 0.46)
        y = tint(0.18, 0.12, 0.06) + colour + 1.5 * (dx + dy)
    elif name == "watercolour":
        wash = daub(blur(x, 1.5 * px), 5 * px)
        dx, dy = slope(wash, 2 * px)
        rim = (dx**2 + dy**2).sum(1, keepdim=True).sqrt()  # pigment gathers where a wash ends
        y = (0.45 + 0.6 * vivid(wash, 1.7)) * (1 - (3 * rim).clamp(max=0.45))
    elif name == "sepia":
        y = torch.cat([0.22 + 0.80 * g, 0.12 + 0.74 * g**1.15, 0.05 + 0.57 * g**1.4], dim=1)
    elif name == "poster":  # four inks, by brightness: navy, red, amber, cream
        y, g = tint(0.05, 0.14, 0.32).expand_as(x), grey(blur(x, 2 * px))
        inks = {0.22: (0.84, 0.12, 0.14), 0.45: (0.98, 0.68, 0.20), 0.68: (1.0, 0.95, 0.80)}
        for level, ink in inks.items():
            y = torch.lerp(y, tint(*ink), torch.sigmoid(60 * (g - level)))
    elif name == "neon":
        dx, dy = slope(x, 1.5 * px)
        line = (dx**2 + dy**2).sqrt().amax(1, keepdim=True)
        hue = vivid(blur(x, 4 * px), 4).clamp(0.02, 1)
        glow = (6 * line + 2 * blur(line, 4 * px)) * hue / hue.amax(1, keepdim=True)
        y = glow + 0.6 * (5 * line - 0.7).clamp(0, 1)
    elif name == "night":
        lamp = (4 * g - 2.8).clamp(0, 1)  # what is brightest becomes warm light with a halo
        light = (0.45 * lamp + 0.4 * blur(lamp, 6 * px)) * tint(1, 0.75, 0.3)
        y = 0.42 * g**1.3 * tint(0.4, 0.7, 1.5) + light
    else:  # emboss
        dx, dy = slope(g, 1.3 * px)
        y = 0.5 + 3.5 * (dx + dy)
    return common.to_pil((y.clamp(0, 1).expand_as(x)[0] * 255).round().byte())


# ---- Any diffusers pipeline as the teacher -------------------------------------------------------


def load_teacher(args, device: torch.device) -> Callable:
    """teacher(images, name, prompt, seeds) -> edits, lists of PIL pictures. UserError if it cannot
    be loaded, edits no photos by a prompt, or does not take an argument given."""
    if args.teacher == "filters":
        return lambda images, name, *_: [edited(image, name) for image in images]
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    half = torch.bfloat16 if training.has_bf16(device) else torch.float16
    dtype = torch.float32 if device.type == "cpu" else half
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(args.teacher, dtype=dtype, use_safetensors=True)
        if "image" not in inspect.signature(pipe.__call__).parameters:
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        pipe.enable_model_cpu_offload(device=device) if args.offload else pipe.to(device)
    except Exception as error:  # loaders raise anything, from missing keys to network errors
        hint = "a hub id needs the network once, a folder model_index.json and safetensors"
        raise UserError(f"--teacher {args.teacher} cannot be loaded ({hint}): {error}") from None
    pipe.set_progress_bar_config(disable=True)
    kind, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if refused := {"image", "prompt", *args.arguments} - takes.keys():
        refused, takes = (", ".join(sorted(names)) for names in (refused, takes))
        raise UserError(f"{kind} does not take {refused}; it takes {takes}")
    size = args.teacher_size
    options = {"height": size, "width": size, "max_area": size**2, "_auto_resize": False}
    options = {key: value for key, value in options.items() if key in takes} | args.arguments

    def teacher(images, name, prompt, seeds):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same on any device
        given = {"image": images, "prompt": [prompt] * len(images), "generator": noise}
        try:
            edits = pipe(**given, **options).images
        except (ValueError, TypeError, RuntimeError) as error:  # a GPU's memory, among others
            what = f"{len(images)} photos of {size} pixels (--batch, --offload)"
            raise UserError(f"{kind} fails on {name!r}, {what}: {error}") from error
        if len(edits) != len(images):  # some take several as one edit's references
            raise UserError(f"{kind} makes {len(edits)} edits of {len(images)}: use --batch 1")
        return edits

    return teacher


# ---- Photos --------------------------------------------------------------------------------------

BOXES = {  # left, top, right, bottom: half of either subject
    "train": {"china.jpg": (190, 0, 640, 427), "flower.jpg": (30, 0, 330, 427)},
    "test": {"china.jpg": (0, 30, 190, 427), "flower.jpg": (330, 70, 530, 427)},
}


def sklearn_crop(name: str, size: int) -> Image.Image:
    """Random crop number i of scikit-learn's two photographs (640x427), from "train i" or "test i":
    the two splits are cut from parts of the pictures that do not overlap."""
    from sklearn.datasets import load_sample_image

    split, number = name.split()
    file = ("china.jpg", "flower.jpg")[int(number) % 2]
    left, top, right, bottom = BOXES[split][file]
    rng = np.random.default_rng(list(name.encode()))
    side = int(rng.integers(80, min(right - left, bottom - top, 300) + 1))
    x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(top, bottom - side + 1))
    crop = Image.fromarray(load_sample_image(file)).crop((x, y, x + side, y + side))
    return crop.resize((size, size), Image.Resampling.LANCZOS)


def find_photos(args) -> tuple[list[str], str, Callable]:
    """Photo names in the order that --seed draws, a hash of names and lengths, and read(name, size)
    -> PIL picture, which raises UserError."""
    if args.images == "sklearn":
        names = [f"{split} {i}" for split in SPLITS for i in range(getattr(args, split))]
        return names, "sklearn", sklearn_crop
    folder, paths, digest = Path(args.images), {}, hashlib.sha256()
    if args.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {args.out} lies in the photos' folder {folder}: choose another")
    for path in common.list_pictures(folder, "**/*"):
        name = path.relative_to(folder).as_posix().encode(errors="replace").decode()
        paths[name] = path  # a name that is not UTF-8 has ? in it
        digest.update(f"{name} {path.stat().st_size}".encode())

    if not paths:
        raise UserError(f"--images {folder} holds no image files")

    def read(name: str, size: int) -> Image.Image:
        picture = common.read_square(paths[name], size)
        with Image.open(paths[name]) as photo:
            if min(photo.size) < args.size:
                raise UserError(f"{photo.width}x{photo.height} is smaller than {args.size} pixels")
        return picture

    names = sorted(paths, key=lambda name: seed_of(args.seed, name))
    return names, digest.hexdigest()[:16], read


def make_sources(out: Path, names: list[str], read: Callable, args) -> None:
    """The first photos that can be read, in the proportion asked for where they are too few, and
    photos.json: {"test": names, "train": names, "skipped": {name: what is wrong}}."""
    test = max(1, round(args.test * min(1, len(names) / (args.train + args.test))))
    photos = {"test": [], "train": [], "skipped": {}}

    def attempt(name: str) -> Image.Image | str:
        try:
            return read(name, args.size)
        except UserError as error:
            return str(error).encode(errors="replace").decode()

    with ThreadPoolExecutor(THREADS) as pool:
        found = training.prefetch(pool, attempt, names)
        for name, photo in zip(names, found, strict=True):
            if isinstance(photo, str):
                photos["skipped"][name] = photo
                continue
            split = "test" if len(photos["test"]) < test else "train"
            path = out / split / "source" / f"{len(photos[split]):05}.png"
            if not path.exists():
                common.write_png(path, photo)
            photos[split].append(name)
            if len(photos["train"]) == args.train:
                break
    if not photos["train"]:
        raise UserError(f"--images {args.images} holds too few photos that can be used")
    common.write_json(out / "photos.json", photos)


# ---- Edits ---------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    """A number under 2^48 from (seed, concept, photo): a picture's noise depends on nothing else,
    neither on its batch nor on which process makes it, nor on what was made before."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def find_edits(out: Path, split: str, name: str) -> list[Path]:
    """A concept's edits in order, rejected ones too; with the name "source" the photos."""
    paths = [*(out / split / name).glob("[0-9]*.png")]
    paths += (out / "rejected" / split / name).glob("[0-9]*.png")
    paths = [path for path in paths if path.stem.isdecimal()]  # no copy that a person made
    return sorted(paths, key=lambda path: path.name)


def make_edits(concepts: dict, photos: dict, read: Callable, teacher: Callable, args) -> None:
    """Makes the edits that are missing, of several processes each its share; threads read ahead
    and write behind while the teacher works."""
    jobs = []
    for name, split in itertools.product(concepts, SPLITS):
        made = {path.name for path in find_edits(args.out, split, name)}
        for i in range(rank(), len(photos[split]), world()):
            path = args.out / split / name / f"{i:05}.png"
            if path.name not in made:
                jobs.append((name, photos[split][i], path))

    def edits(pool) -> Iterator[tuple[Path, Image.Image]]:
        given = training.prefetch(pool, lambda job: read(job[1], args.teacher_size), jobs)
        for name, group in itertools.groupby(jobs, key=lambda job: job[0]):
            while batch := list(itertools.islice(group, args.batch)):
                seeds = [seed_of(args.seed, name, photo) for _, photo, _ in batch]
                images = list(itertools.islice(given, len(batch)))
                made = teacher(images, name, concepts[name]["prompt"], seeds)
                yield from zip([path for *_, path in batch], made, strict=True)

    def write(item: tuple[Path, Image.Image]) -> None:
        edit = item[1].convert("RGB").resize((args.size, args.size), Image.Resampling.LANCZOS)
        common.write_png(item[0], edit)

    sys.setswitchinterval(0.0005)  # the teacher must not wait 5 ms for a thread that encodes
    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        written = training.prefetch(writers, write, edits(readers))
        for _ in tqdm(written, total=len(jobs), unit="edit", disable=rank() > 0):
            pass


# ---- CLIP ----------------------------------------------------------------------------------------


class Clip:
    """open_clip's MODEL:WEIGHTS. WEIGHTS `random` is an explicit stand-in for machines that cannot
    download any: seeded random weights, which tell colours and textures apart but not meanings."""

    def __init__(self, name: str, device: torch.device):
        import open_clip  # 2 seconds

        model, _, weights = name.partition(":")
        weights = None if weights == "random" else weights or "no WEIGHTS"
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.model = open_clip.create_model(model, weights).to(device).eval()
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # whatever its downloader raises
            hint = "give open_clip's MODEL:WEIGHTS or, offline, the stand-in ViT-S-32:random"
            raise UserError(f"--clip {name} cannot be loaded: {hint} ({error!s:.200})") from None
        self.name, self.device = name, device
        self.config = open_clip.get_model_preprocess_cfg(self.model)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> unit vectors (B, D) on the CPU."""
        x = pixels.to(self.device).float() / 255
        x = F.interpolate(x, self.config["size"], mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(self.config[key]).view(3, 1, 1) for key in ("mean", "std"))
        with training.autocast(self.device):
            vectors = self.model.encode_image((x - mean) / std)
        return F.normalize(vectors.float(), dim=-1).cpu()

    @torch.no_grad()
    def text(self, text: str) -> tuple[Tensor, Tensor]:
        """Unit vector (D,), and the text tower's last features (T, D) from the start to the end
        token, on the CPU."""
        ids = self.tokenizer([text]).to(self.device)  # (1, 77), padded with 0
        vector = F.normalize(self.model.encode_text(ids).float(), dim=-1)[0]
        options = {"text_indices": 1, "normalize_intermediates": True, "intermediates_only": True}
        last = self.model.forward_intermediates(text=ids, **options)["text_intermediates"][0]
        return vector.cpu(), last[0, : int((ids != 0).sum())].float().cpu()


def feature_hashes(out: Path, concepts: dict, tower: str) -> dict[str, str]:
    """{a tensor of features.safetensors: hash of the tower and of its prompt or pictures}."""
    hashes = {}
    for name, concept in concepts.items():
        prompt = hashlib.sha256(f"{tower} {concept['prompt']}".encode())
        hashes[f"tokens/{name}"] = prompt.hexdigest()[:16]
    for split, name in itertools.product(SPLITS, ("source", *concepts)):
        pictures = training.Pictures(find_edits(out, split, name), 0, [], tower)
        hashes[f"{split}/{name}"] = pictures.data_hash
    return dict(sorted(hashes.items()))


def saved_features(out: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """features.safetensors and the hashes it was made with; nothing if it is missing or broken."""
    try:
        tensors, metadata = common.read_tensors(out / "features.safetensors", "features")
        return tensors, metadata.get("hashes", {})
    except UserError:
        return {}, {}


def write_features(concepts: dict, photos: dict, clip: Clip, args) -> dict[str, Tensor]:
    """features.safetensors: unit vectors (n, D) of "train/source", "test/sketch", ..., a row a file
    number, 0 where an edit is missing or black, and the prompts' features (T, D), "tokens/sketch".
    Whatever has another hash than before is made anew, whole: its bytes depend on nothing else."""
    (saved, before), tensors, lacking = saved_features(args.out), {}, {}
    hashes = feature_hashes(args.out, concepts, clip.name)
    for key in hashes:
        folder, name = key.split("/")
        if hashes[key] == before.get(key):
            tensors[key] = saved[key]
        elif folder == "tokens":
            tensors[key] = clip.text(concepts[name]["prompt"])[1]
        else:
            lacking[key] = find_edits(args.out, folder, name)
            tensors[key] = torch.zeros(len(photos[folder]), len(clip.text("")[0]))
    read = functools.partial(common.read_image, size=args.size)
    bar = tqdm(desc="embedding", total=sum(map(len, lacking.values())), unit="picture")
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for key, paths in lacking.items():
            pictures = training.prefetch(pool, read, paths, depth=2 * BATCH)
            for start in range(0, len(paths), BATCH):
                rows = [int(path.stem) for path in paths[start : start + BATCH]]
                pixels = torch.stack(list(itertools.islice(pictures, BATCH)))
                tensors[key][rows] = clip.images(pixels) * pixels.flatten(1).any(1, keepdim=True)
                bar.update(len(rows))
    metadata = {"kind": "features", "clip": clip.name, "hashes": hashes}
    common.write_tensors(args.out / "features.safetensors", tensors, metadata)
    return tensors


# ---- The gate ------------------------------------------------------------------------------------


def clip_scores(before: Tensor, after: Tensor, start: Tensor, goal: Tensor) -> list[list[float]]:
    """InstructPix2Pix's two measures (arXiv 2211.09800, 3.1.2), cosines in [-1, 1]: of photo and
    edit (n, D); and of the change in the picture and the change in text (D,), here from "a photo"
    to the prompt, as the edit has no caption."""
    direction = F.cosine_similarity(after - before, (goal - start)[None])
    return torch.stack([(before * after).sum(1), direction], 1).double().round(decimals=4).tolist()


def sort_edits(concepts: dict, photos: dict, features: dict, clip: Clip, args) -> list[dict]:
    """Moves each edit to or from rejected/ as the gate says, and writes metadata.jsonl beside them.
    Returns the table: how many are kept, why the others are not, and the kept ones' mean scores."""
    homes, table = (args.out, args.out / "rejected"), []
    lines = {home / split: [] for home in homes for split in SPLITS}
    for name, concept in concepts.items():
        counts, kept = Counter(), []
        for split in SPLITS:
            before, after = features[f"{split}/source"], features[f"{split}/{name}"]
            texts = clip.text("a photo")[0], clip.text(concept["prompt"])[0]
            scores = clip_scores(before, after, *texts)
            for path in find_edits(args.out, split, name):
                i, photo = int(path.stem), photos[split][int(path.stem)]
                score = dict(zip(GATE, scores[i], strict=True))
                low = [key for key in GATE if score[key] < concept.get(f"min_{key}", -1)]
                reason = "".join(low[:1]) if after[i].any() else "black (a safety checker?)"
                folder = homes[reason != ""] / split
                if path.parent != folder / name:
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    path.replace(folder / name / path.name)
                source = f"source/{path.name}"
                row = {"file_name": f"{name}/{path.name}", "source": source}
                row |= {"source_file_name": source, "concept": name, "prompt": concept["prompt"]}
                row |= {"photo": photo, "seed": seed_of(args.seed, name, photo), **score}
                lines[folder].append(json.dumps({**row, "reason": reason}, ensure_ascii=False))
                counts[reason or split] += 1
                if not reason:
                    kept.append(scores[i])
        row = {"concept": name, "train": counts.pop("train", 0), "test": counts.pop("test", 0)}
        row |= {"rejected": ", ".join(f"{n} {reason}" for reason, n in counts.items())}
        means = np.mean(kept or [[0, 0]], axis=0).tolist()
        table.append(row | dict(zip(GATE, means, strict=True)))
    for folder, own in lines.items():
        common.write_text(folder / "metadata.jsonl", "".join(f"{line}\n" for line in own))
    return table


def finish(concepts: dict, photos: dict, clip: Clip, start: float, args) -> None:
    """Features, gate, samples.png and result.json, of all concepts in the folder."""
    features, out, cells = write_features(concepts, photos, clip, args), args.out, []
    table = sort_edits(concepts, photos, features, clip, args)
    files = [f"{i:05}.png" for i in range(min(6, len(photos["test"])))]
    for name in ("source", *concepts):
        paths = [out / "test" / name / file for file in files]
        cells.append([common.read_image(path) if path.exists() else None for path in paths])
    common.write_png(out / "samples.png", common.picture_grid(cells, files, ["photo", *concepts]))
    for row in table:
        if not row["train"] or not row["test"]:
            raise UserError(f"too few edits of {row['concept']!r} pass ({row['rejected']})")
    marks = common.marks_of(args, clip=clip.name)
    if any(concept.get("teacher") == "filters" for concept in concepts.values()):
        marks.append("built-in filters as teacher")
    for name, trouble in photos["skipped"].items():
        print(f"skipped {name}: {trouble}")
    common.write_result(out, STAGE, time.time() - start, marks, {"Pairs": table})


# ---- The command ---------------------------------------------------------------------------------


def parse():
    parser = common.Parser(__doc__, out="runs/pairs")
    flag, size, cosine = parser.add_argument, common.number(int, 16), common.number(float, -1, 1)
    flag("--images", default="photos", help="a folder, or `sklearn`: crops of its two photographs")
    flag("--concept", action="append", default=[], metavar="NAME=PROMPT", help="can be repeated")
    flag("--concepts", type=Path, metavar="FILE.json", help="{name: prompt}; or eight are built in")
    flag("--teacher", default="timbrooks/instruct-pix2pix", help="a hub id, a folder or `filters`")
    flag("--size", type=size, default=256, help="pixels per side, a multiple of 8")
    flag("--teacher-size", type=size, help="what the teacher was trained at (default: --size)")
    flag("--train", type=common.count, default=1000, help="photos for training")
    flag("--test", type=common.count, default=100, help="photos held out")
    flag("--steps", type=common.count, help="of denoising (default: the pipeline's own)")
    flag("--arguments", type=json.loads, default="{}", help='JSON: {"image_guidance_scale": 1.5}')
    flag("--batch", type=common.count, default=8, help="photos per call; edits do not depend on it")
    flag("--offload", action="store_true", help="the teacher's parts wait in main memory")
    flag("--clip", default="ViT-B-32:openai", help="open_clip's MODEL:WEIGHTS, for all stages")
    what = "reject edits below (InstructPix2Pix, ViT-L-14: {})"
    flag("--min-image-similarity", type=cosine, default=-1, help=what.format(0.7))
    flag("--min-directional-similarity", type=cosine, default=-1, help=what.format(0.2))
    args = parser.parse(DEMO)
    args.teacher_size = args.teacher_size or args.size
    if args.size % 8 or args.teacher_size % 8 or not isinstance(args.arguments, dict):
        raise UserError("--size and --teacher-size: a multiple of 8; --arguments: a JSON object")
    args.arguments |= {"num_inference_steps": args.steps} if args.steps else {}
    if args.teacher == "filters" and args.arguments:
        raise UserError(f"--teacher filters does not take {', '.join(args.arguments)}")
    return args


def wanted_concepts(args) -> dict[str, dict]:
    """{name: its entry in concepts.json}, what its edits and their selection depend on."""
    prompts, concepts = common.read_json(args.concepts) if args.concepts else {}, {}
    for text in args.concept:
        name, _, prompt = text.partition("=")
        prompts[name.strip()] = prompt
    entry = {key: vars(args)[key] for key in (*MADE, *(f"min_{score}" for score in GATE))}
    for name, prompt in (prompts or CONCEPTS).items():
        common.check_name(name, "--concept")
        if name.lower() in ("source", *map(str.lower, concepts)):
            raise UserError(f"concept {name!r}: another folder has that name")
        prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"concept {name!r} has no prompt: write --concept {name}=PROMPT")
        if args.teacher == "filters" and name not in CONCEPTS:
            raise UserError(f"--teacher filters cannot do {name!r}: it knows {', '.join(CONCEPTS)}")
        concepts[name] = {"prompt": " ".join(prompt.split()), **entry}
    return concepts


def is_done(args, settings: dict, concepts: dict) -> bool:
    """Whether the folder holds all that is asked for. UserError if it holds another run, or one of
    the concepts made otherwise; another gate or tower makes no edit anew."""
    complete = common.is_complete(args.out, settings, args.overwrite)
    if args.overwrite or not (args.out / "concepts.json").exists():
        return False
    known = training.read_concepts(args.out)
    for name, key in itertools.product(concepts.keys() & known.keys(), ("prompt", *MADE)):
        if known[name].get(key) != concepts[name][key]:
            differ = f"{key} {known[name].get(key)!r} there, {concepts[name][key]!r} here"
            raise UserError(f"{args.out} has another {name!r} ({differ}): give it another name")
    hashes = feature_hashes(args.out, known, args.clip)
    return complete and known | concepts == known and saved_features(args.out)[1] == hashes


def main() -> None:
    args, start, first = parse(), time.time(), rank() == 0
    logging.disable(logging.ERROR)  # libraries' words beside their exceptions
    concepts = wanted_concepts(args)
    names, digest, read = find_photos(args)
    device = training.start(args)
    settings = {"stage": STAGE, "photos": digest, "seed": args.seed}
    settings |= {"size": args.size, "train": args.train, "test": args.test}
    done = torch.tensor(float(first and is_done(args, settings, concepts)))
    if training.average(done) > 0:
        common.begin_run(args.out, settings, overwrite=False)  # says so
        return
    clip = Clip(args.clip, device) if first else None  # its troubles come before hours of teaching
    teacher = load_teacher(args, device)
    if first:  # no longer complete: concepts, gate, tower or pictures differ
        common.lock_folder(args.out)
        (args.out / "result.json").unlink(missing_ok=True)
    common.begin_run(args.out, settings, args.overwrite)
    if first:
        path = args.out / "concepts.json"
        known = training.read_concepts(args.out) if path.exists() else {}
        common.write_json(path, known | concepts)
        make_sources(args.out, names, read, args)
    training.barrier()
    photos = common.read_json(args.out / "photos.json")
    make_edits(concepts, photos, read, teacher, args)
    training.barrier()
    if first:
        finish(training.read_concepts(args.out), photos, clip, start, args)


if __name__ == "__main__":
    common.run(main)
