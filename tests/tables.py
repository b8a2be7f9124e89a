"""Makes tables of RESULTS.md anew: runs their commands, then prints them.

    python tests/tables.py diffusion --data data    all claims on an edit of a diffusion model
    python tests/tables.py text                     whether its base tells prompts apart
    python tests/tables.py pruning                  that base, pruned by four methods
    python tests/tables.py keyframes --data data    a clip learned from ten of its frames
    python tests/tables.py strokes --data data      which loss paints: three styles in one base
    python tests/tables.py styles --data data       ten styles in one base, six by adapters
    python tests/tables.py papers --data data       CoroNetGAN's own kinds of data, small

What was run before is not run again, so a table that was interrupted goes on where it stopped.
`text` and `pruning` go on from what `diffusion` left. --data holds these folders; RESULTS.md says
where they come from:
    photos/                     photographs (BSDS500)
    clips/photos/<name>/        frames of videos: autumn, watercolor
    clips/edits/<name>/         the same frames, edited by a diffusion model, under equal names
    edges2shoes/ horse2zebra/ cifar10/      as stage 5's --data takes them
"""

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found by the line above)
import dataset  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

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
        stage("04", f"{tune} --mode full --lr 1e-3 --samples all --out {runs_of / 'full'}")
        names = {
            "from scratch": alone,
            "from scratch, as many steps as an adapter": runs_of / "short",
            "adapter": runs_of / "lora/watercolor",
            "adapter, ten of the frames": runs_of / "lora10/watercolor",
            "all weights of the base": runs_of / "full/watercolor",
            "from scratch, pruned to a quarter": runs_of / "pruned",
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
    methods = ("coronet", "uniform", "magnitude")
    ways = [("0.12", method) for method in (*methods, "random")]
    ways += [("0.06", method) for method in methods]
    for keep, method in ways:
        folders = []
        for seed in SEEDS:
            base = bases[seed] / "generator.safetensors"
            out = args.out / f"{method}-{keep}/seed{seed}"
            how = f"--method {method} --keep {keep} --lr 1e-3 --lr-search 2e-4"
            phases = "--search-epochs 1 --epochs 2 --steps 600"
            stage("05", f"{shared} --seed {seed} --generator {base} {how} {phases} --out {out}")
            folders.append(out)
        found = [result(folder, "generator") for folder in folders]
        row = {"MACs to keep": keep, "method": method, "seeds": len(folders)}
        row["seconds"] = f"{min(map(seconds, found)):.0f} to {max(map(seconds, found)):.0f}"
        row["M parameters"] = ", ".join(f"{run['parameters M']:.3f}" for run in found)
        row |= mean_over_concepts(folders, concepts)
        rows.append(row)
    return "mean over four concepts", rows


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


def keyframes(args) -> tuple[str, list[dict]]:
    """Each clip of `watercolor`: ten of its frames, evenly spread, are learned from scratch, then
    all frames are edited by what was learned. PSNR on the frames between, and steadiness: how much
    edits of frames that follow each other differ on average (0 to 255), beside the teacher's own
    and the photos'."""
    photos = args.data / "clips/photos/watercolor"
    edits = args.data / "clips/edits/watercolor"
    clips = {}
    for path in sorted(photos.iterdir()):
        clips.setdefault(path.stem.rstrip("0123456789").rstrip("_-"), []).append(path)
    return "keyframes", [clip_row(args, name, paths, edits) for name, paths in clips.items()]


def clip_row(args, name: str, paths: list[Path], edits: Path) -> dict:
    """A row of keyframes: one clip, whose frames are `paths`, in order."""
    here = args.out / name
    keys = set(np.linspace(0, len(paths) - 1, 10).round().astype(int).tolist())
    (here / "frames").mkdir(parents=True, exist_ok=True)
    (here / "edits/look").mkdir(parents=True, exist_ok=True)
    (here / "squares").mkdir(exist_ok=True)
    truth = []
    for i, path in enumerate(paths):
        [edit] = edits.glob(f"{path.stem}.*")
        shutil.copy(path, here / "frames")
        if i in keys:
            shutil.copy(edit, here / "edits/look")
        dataset.read_square(path, 256).save(here / "squares" / f"{path.stem}.png")
        truth.append(dataset.to_pixels(dataset.read_square(edit, 256)))
    teacher = f"--teacher {here / 'edits'} --concept look='paint it in watercolors'"
    pairs = here / "pairs"
    split = "--train 9 --test 1"
    stage("01", f"--images {here / 'frames'} {teacher} {RANDOM_CLIP} {split} --out {pairs}")
    flags = f"--pairs {pairs} --cache {args.out / 'cache'} {SMALL} --lr 1e-3 --width 16"
    network = here / "base"
    stage("03", f"{flags} --no-text --concept look --steps {args.steps} --out {network}")
    exported = here / "onnx"
    file = network / "generator.safetensors"
    stage("06", f"--pairs {pairs} --generator {file} --merged --dynamic --out {exported}")
    apply = f"--model {exported / 'look.onnx'} --apply {here / 'squares'}"
    stage("06", f"{apply} --out {here / 'edited'}")
    edited = here / "edited-applied/look"
    learned = [dataset.read_image(edited / f"{path.stem}.png") for path in paths]
    between = [i for i in range(len(paths)) if i not in keys]
    learned, truth = torch.stack(learned), torch.stack(truth)
    originals = torch.stack([dataset.read_image(here / f"squares/{p.stem}.png") for p in paths])
    return {
        "clip": name,
        "frames": len(paths),
        "training s": result(network)["training s"],
        "PSNR between dB": training.mean_psnr(learned[between], truth[between]),
        "change, learned": change(learned),
        "change, teacher": change(truth),
        "change, photos": change(originals),
    }


def change(frames: torch.Tensor) -> float:
    """Mean absolute difference (0 to 255) of frames (N, 3, H, W) that follow each other."""
    return (frames[1:].float() - frames[:-1].float()).abs().mean().item()


TABLES = {
    "diffusion": diffusion,
    "text": text,
    "pruning": pruning,
    "keyframes": keyframes,
    "strokes": strokes,
    "styles": styles,
    "papers": papers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    flag = parser.add_argument
    flag("name", choices=TABLES, help="which table")
    flag("--data", type=Path, default="data", help="see above")
    flag("--steps", type=int, default=1050, help="keyframes: of training")
    flag("--out", type=Path, default="runs/tables", help="holds a folder for each table")
    args = parser.parse_args()
    args.out = args.out / args.name
    print(runs.markdown(*TABLES[args.name](args)), flush=True)


if __name__ == "__main__":
    runs.run(main)
