"""Makes tables of RESULTS.md anew: runs their commands, then prints them.

    python tests/tables.py diffusion --data data    all claims on an edit of a diffusion model
    python tests/tables.py text                     whether its base tells prompts apart
    python tests/tables.py pruning                  that base, pruned by four methods
    python tests/tables.py scratch --data data      pruned while it trains, at two sizes
    python tests/tables.py keyframes --data data    a clip learned from ten of its frames
    python tests/tables.py clips --data data        a clip of which no frame was learned
    python tests/tables.py kinds --data data        what an artist drew; facades from maps
    python tests/tables.py strokes --data data      which loss paints: three styles in one base
    python tests/tables.py styles --data data       ten styles in one base, six by adapters
    python tests/tables.py papers --data data       CoroNetGAN's own kinds of data, small

What was run before is not run again, so a table that was interrupted goes on where it stopped.
`text`, `pruning` and `clips` go on from what `diffusion` left. --data holds these folders;
RESULTS.md says where they come from:
    photos/                     photographs (BSDS500)
    clips/photos/<name>/        frames of videos: autumn, watercolor
    clips/edits/<name>/         the same frames, edited by a diffusion model, under equal names
    sketches/photos/ sketches/edits/sketch/ portraits and drawings of them (CUFS), equal names
    facades/ edges2shoes/ horse2zebra/ cifar10/     as stage 5's --data takes them
"""

import argparse
import itertools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found by the line above)
import dataset  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402
from runs import UserError  # noqa: E402

SEEDS = (0, 1, 2)
SMALL = "--batch 1 --fid off --save-every 1000000"
PAINTED = ("popart", "woodcut", "crayon")
TEN = (*PAINTED, "shards", "rust", "expressionist", "lithograph", "nocturne", "fauvist", "strokes")
SIX = ("starry", "mosaic", "wave", "charcoal", "impasto", "weave")
RANDOM_CLIP = "--clip ViT-S-32:random"  # nothing is downloaded; the prompts need only differ


def stage(number: str, flags: str) -> None:
    """Runs a stage with one thread, and shows its command line. SystemExit if it fails."""
    script = next(ROOT.glob(f"{number}_*.py"))
    print(f"python {script.name} {flags}", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *shlex.split(flags)], env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def result(folder: Path, concept: str | None = None) -> dict:
    """All columns of the tables that a run left, in one row: of its only concept, or of the one
    given and of none."""
    row = {}
    for rows in runs.read_json(folder / "result.json")["tables"].values():
        for found in rows:
            if concept is None or found.get("concept", concept) == concept:
                row.update(found)
    return row


def seconds(run: dict) -> float:
    """Of training."""
    return run.get("training s") or run["search s"] + run["converge s"]


def measured(name: str, folders: list[Path], concept: str | None = None) -> dict:
    """A row of a table: PSNR and perceptual distance of each seed's run, means of SWD."""
    found = [result(folder, concept) for folder in folders]
    row = {"network": name, "seeds": len(found)}
    row["seconds"] = f"{min(map(seconds, found)):.0f} to {max(map(seconds, found)):.0f}"
    row["PSNR dB"] = ", ".join(f"{run['PSNR dB']:.2f}" for run in found)
    row["perceptual"] = ", ".join(f"{run['perceptual']:.2f}" for run in found)
    row["SWD"] = swd(found)
    return row


def swd(found: list[dict]) -> str:
    """Of runs' rows: the mean at each size, from fine to coarse."""
    sizes = [key for key in found[0] if key.startswith("SWD ")]
    return " ".join(f"{statistics.mean(run[key] for run in found):.0f}" for key in sizes)


def mean_over_concepts(folders: list[Path], concepts: Sequence[str]) -> dict:
    """Columns of a table: for each seed's run the means over its concepts; means of SWD."""
    found = [[result(folder, concept) for concept in concepts] for folder in folders]
    row = {}
    for key in ("PSNR dB", "perceptual", "L1 (0-255)"):
        means = [statistics.mean(of_concept[key] for of_concept in run) for run in found]
        row[key] = ", ".join(f"{mean:.2f}" for mean in means)
    row["SWD"] = swd([of_concept for run in found for of_concept in run])
    return row


def diffusion(args) -> tuple[str, list[dict]]:
    """The edit `watercolor`, 30 frames to learn from and 40 held out: from scratch, then by a base
    that never saw it, of one diffusion edit and three painterly ones, each with photos of its
    own."""
    pairs = args.out / "pairs"
    shared = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL}"
    frames = f"--teacher {args.data / 'clips/edits'} {RANDOM_CLIP} --train 30 --test 40"
    painted = " ".join(f"--concept {name}" for name in PAINTED)
    autumn = "--concept autumn='turn it into autumn'"
    watercolor = "--concept watercolor='paint it in watercolors'"
    photos = f"--images {args.data / 'photos'} --train 100 --test 40"
    stage("01", f"{photos} --teacher styles {RANDOM_CLIP} {painted} --out {pairs}")
    for name, concept in (("autumn", autumn), ("watercolor", watercolor)):
        images = args.data / "clips/photos" / name
        stage("01", f"--images {images} {frames} {concept} --out {pairs}")

    ways = {}
    bases = []
    for seed in SEEDS:
        runs_of = args.out / f"seed{seed}"
        base = runs_of / "base"
        alone = runs_of / "alone"
        flags = f"{shared} --seed {seed} --lr 1e-3"
        width = "--width 16"
        stage("03", f"{flags} {width} --concept autumn {painted} --steps 2400 --out {base}")
        fresh = f"{flags} {width} --no-text --concept watercolor"
        stage("03", f"{fresh} --steps 1050 --out {alone}")
        stage("03", f"{fresh} --steps 330 --out {runs_of / 'short'}")
        if seed == 0:
            stage("03", f"{fresh} --steps 2950 --out {runs_of / 'long'}")
            plain = "--perceptual 0 --steps 1640"  # as many seconds as 1,050 steps with it
            stage("03", f"{fresh} {plain} --out {runs_of / 'plain'}")
        prune = f"--generator {alone / 'generator.safetensors'} --keep 0.25 --lr-search 2e-4"
        phases = "--search-epochs 1 --epochs 3 --steps 840"
        stage("05", f"{flags} {prune} {phases} --out {runs_of / 'pruned'}")

        tune = f"{shared} --seed {seed} --base {base / 'generator.safetensors'}"
        tune = f"{tune} --concept watercolor --steps 330"
        adapter = "--lr 3e-3 --rank 8"
        stage("04", f"{tune} {adapter} --samples all --out {runs_of / 'lora'}")
        stage("04", f"{tune} {adapter} --samples random:10 --out {runs_of / 'lora10'}")
        of_all = f"{adapter} --layers all --samples all"
        stage("04", f"{tune} {of_all} --out {runs_of / 'lora-all'}")
        stage("04", f"{tune} --mode full --lr 1e-3 --samples all --out {runs_of / 'full'}")
        names = {
            "from scratch": alone,
            "from scratch, as many steps as an adapter": runs_of / "short",
            "adapter, rank 8": runs_of / "lora/watercolor",
            "adapter, rank 8, ten of the frames": runs_of / "lora10/watercolor",
            "adapter of all layers, rank 8": runs_of / "lora-all/watercolor",
            "all weights of the base": runs_of / "full/watercolor",
            "from scratch (the first row), then pruned to a quarter": runs_of / "pruned",
        }
        for name, folder in names.items():
            ways.setdefault(name, []).append(folder)
        bases.append(base)
    ways["from scratch, longer"] = [args.out / "seed0/long"]
    ways["from scratch, no perceptual term"] = [args.out / "seed0/plain"]
    rows = [measured(name, folders) for name, folders in ways.items()]
    for concept in ("autumn", *PAINTED):
        rows.append(measured(f"the base: {concept}", bases, concept))
    return "watercolor, and what the base learned before", rows


def text(args) -> tuple[str, list[dict]]:
    """PSNR in dB to each concept's edits (rows) under each prompt (columns), of the base that the
    table `diffusion` trained with seed 0."""
    diffusion_runs = args.out.parent / "diffusion"
    generator = common.load_generator(diffusion_runs / "seed0/base/generator.safetensors").eval()
    names = [concept["name"] for concept, _ in generator.known_concepts()]
    pairs = dataset.find_pairs(diffusion_runs / "pairs", "test", names)
    pairs = pairs.cache(diffusion_runs / "cache")
    rows = []
    for index, name in enumerate(names):
        photos, edits = pairs.pictures(index)
        row = {"edits": name}
        for prompt, other in enumerate(names):
            learned = training.run_generator(generator, photos, prompt)
            row[f"prompt of {other}"] = training.mean_psnr(learned, edits)
        rows.append(row)
    return "PSNR dB", rows


def pruning(args) -> tuple[str, list[dict]]:
    """The bases that the table `diffusion` trained (one concept of a diffusion model, three
    painterly ones), pruned: the search, and three ways that cut first and train what is left for as
    many steps."""
    diffusion_runs = args.out.parent / "diffusion"
    shared = f"--pairs {diffusion_runs / 'pairs'} --cache {diffusion_runs / 'cache'} {SMALL}"
    concepts = ("autumn", *PAINTED)
    bases = [diffusion_runs / f"seed{seed}/base" for seed in SEEDS]
    rows = [{"MACs to keep": "all", "method": "none"} | mean_over_concepts(bases, concepts)]
    methods = ("coronet", "uniform", "magnitude", "random")
    for keep, method in itertools.product(("0.25", "0.12", "0.06"), methods):
        folders = []
        for seed in SEEDS:
            base = bases[seed] / "generator.safetensors"
            out = args.out / f"{method}-{keep}/seed{seed}"
            how = f"--method {method} --keep {keep} --lr 1e-3 --lr-search 2e-4"
            # 100 steps of search; the others train in both phases, of 200 and 400 steps
            phases = f"--search-epochs 1 --epochs {5 if method == 'coronet' else 2} --steps 600"
            stage("05", f"{shared} --seed {seed} --generator {base} {how} {phases} --out {out}")
            folders.append(out)
        found = [result(folder, "generator") for folder in folders]
        row = {"MACs to keep": keep, "method": method, "seeds": len(folders)}
        row["seconds"] = f"{min(map(seconds, found)):.0f} to {max(map(seconds, found)):.0f}"
        row["M parameters"] = ", ".join(f"{run['parameters M']:.3f}" for run in found)
        row |= mean_over_concepts(folders, concepts)
        rows.append(row)
    return "mean over four concepts", rows


def scratch(args) -> tuple[str, list[dict]]:
    """edges2shoes, a U-Net pruned while it trains from scratch, beside networks that are narrow
    from the first step."""
    kept = ("0.25", "0.06")
    ways = {"coronet": "--lr-search 2e-4", "uniform": "--method uniform"}
    rows = []
    for keep, (way, how) in itertools.product(kept, ways.items()):
        folders = [args.out / f"{way}-{keep}/seed{seed}" for seed in SEEDS]
        for seed, out in zip(SEEDS, folders, strict=True):
            flags = f"--data {args.data / 'edges2shoes'} --generator unet256 --width 16 --lr 1e-3"
            phases = "--search-epochs 1 --epochs 4 --steps 500"
            flags = f"{flags} {how} --keep {keep} {phases} {SMALL} --seed {seed}"
            stage("05", f"{flags} --cache {args.out / 'cache'} --out {out}")
        row = {"MACs to keep": keep} | measured(way, folders)
        row["L1"] = ", ".join(f"{result(folder)['L1 (0-255)']:.1f}" for folder in folders)
        rows.append(row)
    return "edges2shoes, from scratch", rows


def strokes(args) -> tuple[str, list[dict]]:
    """Three painterly styles in one base, each way of training for about 210 seconds of one thread:
    means over the styles."""
    pairs = args.out / "pairs"
    concepts = " ".join(f"--concept {name}" for name in PAINTED)
    photos = f"--images {args.data / 'photos'} --train 100 --test 40"
    stage("01", f"{photos} --teacher styles {RANDOM_CLIP} {concepts} --out {pairs}")
    ways = {
        "the default": "--steps 1050",
        "no perceptual term": "--steps 1640 --perceptual 0",
        "the same on crops of 128, discriminator at 5e-4": "--steps 2700 --perceptual 0 --crop 128 "
        "--half-size 0 --lr-d 5e-4",
        "the papers' loss": "--steps 1240 --fm 0 --perceptual 0 --half-size 0",
    }
    rows = []
    for name, flags in ways.items():
        folders = []
        for seed in SEEDS[:2]:
            out = args.out / name.replace(" ", "-").replace("'", "") / f"seed{seed}"
            flags_of_all = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL} --seed {seed}"
            stage("03", f"{flags_of_all} {concepts} --width 16 --lr 1e-3 {flags} --out {out}")
            folders.append(out)
        found = [result(folder, PAINTED[0]) for folder in folders]
        row = {"training": name, "flags": flags, "seeds": len(folders)}
        row["seconds"] = f"{min(map(seconds, found)):.0f} to {max(map(seconds, found)):.0f}"
        rows.append(row | mean_over_concepts(folders, PAINTED))
    return "mean over three styles", rows


def styles(args) -> tuple[str, list[dict]]:
    """Ten painterly styles in one base, and six that it never saw: adapters and all weights; of
    three of them adapters of another rank and of ten photos, and networks from scratch."""
    pairs = args.out / "pairs"
    shared = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL}"
    ten = " ".join(f"--concept {name}" for name in TEN)
    six = " ".join(f"--concept {name}" for name in SIX)
    photos = f"--images {args.data / 'photos'} --train 100 --test 40"
    stage("01", f"{photos} --teacher styles {RANDOM_CLIP} {ten} {six} --out {pairs}")
    base = args.out / "base"
    stage("03", f"{shared} {ten} --width 16 --lr 1e-3 --steps 4800 --out {base}")

    tune = f"{shared} --base {base / 'generator.safetensors'}"
    adapter = "--steps 240 --lr 3e-3"
    all_weights = "--lr 1e-3 --samples all"
    ways = {
        "adapter": (SIX, f"{adapter} --samples all"),
        "all weights of the base": (SIX, f"{all_weights} --steps 240 --mode full"),
        "adapter of all layers, rank 8": (SIX, f"{adapter} --samples all --rank 8 --layers all"),
        "adapter, rank 8": (SIX[:3], f"{adapter} --samples all --rank 8"),
        "adapter, ten photos": (SIX[:3], f"{adapter} --samples random:10"),
        "from scratch": (SIX[:3], f"{all_weights} --steps 240 --mode scratch"),
        "from scratch, longer": (SIX[:3], f"{all_weights} --steps 1050 --mode scratch"),
    }
    rows = [{"network": "base", "style": name} | one_run(base, name) for name in TEN]
    for name, (concepts, flags) in ways.items():
        out = args.out / name.replace(",", "").replace(" ", "-")
        new = " ".join(f"--concept {concept}" for concept in concepts)
        stage("04", f"{tune} {new} {flags} --out {out}")
        for concept in concepts:
            rows.append({"network": name, "style": concept} | one_run(out / concept))
    return "ten styles in one base, six new ones", rows


def one_run(folder: Path, concept: str | None = None) -> dict:
    """Columns of a table: of a run's only concept, or of the one given."""
    run = result(folder, concept)
    return {
        "seconds": round(seconds(run)),
        "PSNR dB": round(run["PSNR dB"], 2),
        "wrong prompt dB": run.get("wrong prompt dB"),
        "perceptual": round(run["perceptual"], 2),
        "SWD": swd([run]),
    }


def papers(args) -> tuple[str, list[dict]]:
    """CoroNetGAN's kinds of data, small: GANs pruned to a quarter while they train from scratch,
    beside plain ones of as many MACs."""
    kinds = {
        "edges2shoes, U-Net": "--generator unet256 --width 16 --batch 1 --steps 500 --lr 1e-3 "
        "--search-epochs 1 --epochs 4",
        "horse2zebra, CycleGAN": "--task cyclegan --width 16 --batch 1 --crop 128 --steps 420 "
        "--lr 1e-3 --search-epochs 1 --epochs 5",
        "cifar10, DCGAN": "--task dcgan --size 32 --width 32 --batch 32 --steps 900 "
        "--search-epochs 5 --epochs 25",
    }
    ways = {
        "coronet": "--lr-search 2e-4",
        "coronet, discriminator too": "--lr-search 2e-4 --prune-discriminator",
        "uniform": "--method uniform",
    }
    rows = []
    for kind, flags in kinds.items():
        data = args.data / kind.split(",")[0]
        for way, how in ways.items():
            out = args.out / f"{kind} {way}".replace(",", "").replace(" ", "-")
            stage("05", f"--data {data} {flags} {how} --keep 0.25 --fid off --out {out}")
            tables = runs.read_json(out / "result.json")["tables"]
            [measures] = [found for title, found in tables.items() if title.startswith("Pruned ")]
            for found in (*tables["Pruning"], *measures):  # sizes of networks, then what they make
                rows.append({"data, GAN": kind, "way": way} | found)
    return "small runs on the papers' data", rows


def clips(args) -> dict[str, list[Path]]:
    """{clip: its frames of `watercolor`, in order}, by the letters that their names begin with."""
    found = {}
    for path in sorted((args.data / "clips/photos/watercolor").iterdir()):
        found.setdefault(path.stem.rstrip("0123456789").rstrip("_-"), []).append(path)
    return found


def evenly(count: int, items: Sequence) -> list:
    """`count` of the items, evenly spread, with the first and the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def square(path: Path) -> torch.Tensor:
    """A picture as stage 1 crops and scales it: uint8 (3, 256, 256)."""
    return dataset.to_pixels(dataset.read_square(path, 256))


def edit_of(args, frame: Path) -> Path:
    """The teacher's edit of a frame of `watercolor`."""
    for path in (args.data / "clips/edits/watercolor").glob(f"{frame.stem}.*"):
        return path
    raise UserError(f"{frame} has no edit in {args.data / 'clips/edits/watercolor'}")


def squares(args, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of `watercolor` and the teacher's edits of them: uint8 (N, 3, 256, 256) each."""
    photos = [square(path) for path in paths]
    truth = [square(edit_of(args, path)) for path in paths]
    return torch.stack(photos), torch.stack(truth)


def keyframes(args) -> tuple[str, list[dict]]:
    """Each clip of `watercolor`: ten of its frames, evenly spread, are learned from scratch, then
    all frames are edited by what was learned. PSNR and perceptual distance on the frames between,
    and steadiness: how much edits of frames that follow each other differ on average (0 to 255).

    To compare with: the nearest keyframe's edit as it is; EbSynth's (--ebsynth), which puts each
    frame together from patches of that edit; the teacher's own edits and the photos."""
    rows = []
    for clip, paths in clips(args).items():
        rows += clip_rows(args, clip, paths)
    return "keyframes", rows


def clip_rows(args, clip: str, paths: list[Path]) -> list[dict]:
    """Rows of keyframes: one clip, whose frames are `paths`, in order."""
    here = args.out / clip
    keys = evenly(10, range(len(paths)))
    nearest = [min(keys, key=lambda key: abs(key - i)) for i in range(len(paths))]
    between = [i for i in range(len(paths)) if i not in keys]
    photos, truth = squares(args, paths)
    (here / "frames").mkdir(parents=True, exist_ok=True)
    (here / "squares").mkdir(exist_ok=True)
    for path, photo in zip(paths, photos, strict=True):
        shutil.copy(path, here / "frames")
        dataset.to_pil(photo).save(here / "squares" / f"{path.stem}.png")
    (here / "edits/look").mkdir(parents=True, exist_ok=True)
    for key in keys:
        shutil.copy(edit_of(args, paths[key]), here / "edits/look")
    teacher = f"--teacher {here / 'edits'} --concept look='paint it in watercolors'"
    pairs = here / "pairs"
    split = "--train 9 --test 1"
    stage("01", f"--images {here / 'frames'} {teacher} {RANDOM_CLIP} {split} --out {pairs}")
    flags = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL} --lr 1e-3 --width 16"
    network = here / "base"
    stage("03", f"{flags} --no-text --concept look --steps 1050 --out {network}")
    exported = here / "onnx"
    file = network / "generator.safetensors"
    stage("06", f"--pairs {pairs} --generator {file} --merged --dynamic --out {exported}")
    apply = f"--model {exported / 'look.onnx'} --apply {here / 'squares'}"
    stage("06", f"{apply} --out {here / 'edited'}")
    edited = here / "edited-applied/look"
    ways = {"learned": torch.stack([square(edited / f"{path.stem}.png") for path in paths])}
    if args.ebsynth:
        ways["EbSynth"] = ebsynth(args, here, photos, truth, nearest)
    ways |= {"the nearest keyframe's edit": truth[nearest], "the teacher": truth, "photos": photos}
    rows = []
    for way, frames in ways.items():
        row = {"clip": clip, "frames": len(paths), "edits": way}
        if way not in ("the teacher", "photos"):
            row["PSNR between dB"] = training.mean_psnr(frames[between], truth[between])
            row["perceptual"] = training.mean_perceptual(frames[between], truth[between])
        rows.append({**row, "change": change(frames)})
    return rows


def ebsynth(args, here: Path, photos, truth, nearest: list[int]) -> torch.Tensor:
    """A clip's edits, uint8 (N, 3, 256, 256): keyframes' are the teacher's; --ebsynth puts each
    frame between together from patches of the nearest keyframe's edit, guided by both photos and,
    as most of a frame hardly moves, by where a pixel is."""
    folder = here / "ebsynth"
    folder.mkdir(exist_ok=True)
    x, y = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="xy")
    place = folder / "place.png"
    dataset.to_pil(torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)).save(place)
    for i in range(len(photos)):
        dataset.to_pil(photos[i]).save(folder / f"photo{i}.png")
        dataset.to_pil(truth[i]).save(folder / f"edit{i}.png")
    edits = truth.clone()
    for i, key in enumerate(nearest):
        out = folder / f"out{i}.png"
        if i == key:
            continue
        if not out.exists():
            photo_guide = ("-guide", folder / f"photo{key}.png", folder / f"photo{i}.png")
            guides = (*photo_guide, "-weight", "2", "-guide", place, place, "-weight", "1.5")
            style = ("-style", folder / f"edit{key}.png", "-backend", "cpu")
            subprocess.run([args.ebsynth, *style, *guides, "-output", out], check=True)
        edits[i] = dataset.read_image(out)
    return edits


def other_clips(args) -> tuple[str, list[dict]]:
    """`watercolor` on a clip that nothing was learned from: 30 frames of the two other clips are
    learned, then 36 frames of it are edited. The base is that of the table `diffusion`, seed 0."""
    base = args.out.parent / "diffusion/seed0/base/generator.safetensors"
    if not base.exists():
        raise UserError(f"{base} does not exist: run `tables.py diffusion` first")
    rows = []
    for clip, paths in clips(args).items():
        here = args.out / clip
        (here / "frames").mkdir(parents=True, exist_ok=True)
        for other, frames in clips(args).items():
            if other != clip:
                for path in evenly(16, frames):  # 32: stage 1 holds out two of them
                    shutil.copy(path, here / "frames")
        pairs = here / "pairs"
        teacher = f"--teacher {args.data / 'clips/edits'} {RANDOM_CLIP} --train 30 --test 2"
        concept = "--concept watercolor='paint it in watercolors'"
        stage("01", f"--images {here / 'frames'} {teacher} {concept} --out {pairs}")
        shared = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL} --concept watercolor"
        alone = here / "alone"
        stage("03", f"{shared} --no-text --width 16 --lr 1e-3 --steps 1050 --out {alone}")
        tune = f"{shared} --base {base} --samples all --steps 330"
        of_all = "--lr 3e-3 --rank 8 --layers all"
        stage("04", f"{tune} {of_all} --out {here / 'lora'}")
        stage("04", f"{tune} --lr 1e-3 --mode full --out {here / 'full'}")

        generators = {
            "from scratch": common.load_generator(alone / "generator.safetensors"),
            "adapter of all layers": common.load_generator(base),
            "all weights of the base": common.load_generator(
                here / "full/watercolor/generator.safetensors"
            ),
        }
        adapter = here / "lora/watercolor/adapter.safetensors"
        common.load_adapter(generators["adapter of all layers"], adapter)
        photos, truth = squares(args, evenly(36, paths))
        rows.append({"clip": clip, "network": "none: the photos"} | measures(photos, truth))
        for name, generator in generators.items():
            index = generator.concept_index("watercolor")
            edits = training.run_generator(generator.eval(), photos, index)
            rows.append({"clip": clip, "network": name} | measures(edits, truth))
    return "watercolor on clips that were not learned from", rows


def measures(edits: torch.Tensor, truth: torch.Tensor) -> dict:
    """Columns of a table: how near edits are to the teacher's, uint8 (N, 3, H, W) both."""
    row = {"PSNR dB": training.mean_psnr(edits, truth)}
    row["perceptual"] = training.mean_perceptual(edits, truth)
    return {**row, "SWD": swd([training.swd(edits, truth)])}


def change(frames: torch.Tensor) -> float:
    """Mean absolute difference (0 to 255) of frames (N, 3, H, W) that follow each other."""
    return (frames[1:].float() - frames[:-1].float()).abs().mean().item()


def kinds(args) -> tuple[str, list[dict]]:
    """Edits that neither a style network nor a diffusion model made, from scratch at two lengths:
    portraits as an artist drew them (30 to learn from), and photographs of facades from maps of
    their parts (260), which hold less than the photographs do."""
    prompts = {"sketch": "a pencil drawing", "facade": "a photograph of a facade"}
    halves(args.data / "facades", args.out / "facades")
    folders = {
        "sketch": (args.data / "sketches/photos", args.data / "sketches/edits", 30, 192),
        "facade": (args.out / "facades/maps", args.out / "facades/edits", 260, 256),
    }
    rows = []
    for name, (photos, edits, count, size) in folders.items():
        pairs = args.out / f"pairs-{name}"
        teacher = f"--teacher {edits} {RANDOM_CLIP} --concept {name}='{prompts[name]}'"
        split = f"--train {count} --test 40 --size {size}"
        stage("01", f"--images {photos} {teacher} {split} --out {pairs}")
        flags = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL} --concept {name} --no-text"
        for steps in (1050, 2950):
            out = args.out / f"{name}-{steps}"
            stage("03", f"{flags} --width 16 --lr 1e-3 --steps {steps} --out {out}")
            rows.append({"edit": name, "steps": steps} | one_run(out))
    return "sketches and facades", rows


def halves(combined: Path, out: Path) -> None:
    """Cuts pictures (photo left, map right) of all folders below `combined` into two: out/maps and
    out/edits/facade, which is how stage 1 takes pairs that are there already."""
    (out / "maps").mkdir(parents=True, exist_ok=True)
    (out / "edits/facade").mkdir(parents=True, exist_ok=True)
    for path in sorted(combined.glob("*/*.jpg")):
        name = f"{path.parent.name}-{path.stem}.png"
        with Image.open(path) as picture:
            middle = picture.width // 2
            picture.crop((middle, 0, picture.width, picture.height)).save(out / "maps" / name)
            picture.crop((0, 0, middle, picture.height)).save(out / "edits/facade" / name)


TABLES = {
    "diffusion": diffusion,
    "text": text,
    "pruning": pruning,
    "scratch": scratch,
    "keyframes": keyframes,
    "clips": other_clips,
    "kinds": kinds,
    "strokes": strokes,
    "styles": styles,
    "papers": papers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    flag = parser.add_argument
    flag("name", choices=TABLES, help="which table")
    flag("--data", type=Path, default="data", help="see above")
    flag("--ebsynth", help="keyframes: EbSynth's program (jamriska/ebsynth), to compare with")
    flag("--out", type=Path, default="runs/tables", help="holds a folder for each table")
    args = parser.parse_args()
    args.out = args.out / args.name
    print(runs.markdown(*TABLES[args.name](args)), flush=True)


if __name__ == "__main__":
    runs.run(main)
