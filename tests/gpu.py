"""What training costs on the GPU at hand, as Markdown tables with its name: stage 3's steps at 256
pixels and width 64, an adapter's and a search's, eager and compiled; and two ways of padding.

    python tests/gpu.py        meant to fit into ten minutes; compiling takes most of them

This script has never been run on a GPU. Without one it ends in one line, status 2. Its pictures are
noise: they take as long as others. A row that does not fit into the memory or the time says so."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import bench  # noqa: E402  (found by the line above)

import common  # noqa: E402
import dataset  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

SIZE = 256
WIDTH = 64
PAIRS = 128
WARM_UP = 10  # steps: cuDNN chooses its algorithms, torch.compile compiles
STEPS = 40
MINUTES = 8  # after which no row is begun
ROWS = [  # (stage, batch, --compile)
    ("03", 16, False),
    ("03", 128, False),
    ("04", 16, False),
    ("05", 16, False),
    ("03", 16, True),
    ("03", 128, True),
]
NAMES = {"03": "stage 3", "04": "stage 4, adapter", "05": "stage 5, searching"}
# Dense bf16 of NVIDIA's data sheets, in 10^12 operations a second, by a part of the card's name.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}


class Enough(Exception):
    """Raised after the steps that are to be measured."""


class Measured:
    """A stage's data, which counts one step's operations and takes the time of others, and then
    ends the training. What the stage does after its training is not done."""

    def __init__(self, pairs: dataset.Pairs, batch: int):
        self.pairs = pairs
        self.batch = batch
        self.size = pairs.size
        self.counts = pairs.counts
        self.concepts = pairs.concepts

    def batches(self, batch: int, steps: range, *args, **options):
        batches = self.pairs.batches(batch, range(WARM_UP + STEPS), *args, **options)
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                self.waited = 0.0
                began = time.perf_counter()
            asked = time.perf_counter()
            pictures = next(batches)
            if step >= WARM_UP:
                self.waited += time.perf_counter() - asked
            yield pictures
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - began
        raise Enough


class OneStep(Measured):
    """Data for one step."""

    def batches(self, *args, **options):
        yield next(self.pairs.batches(*args, **options))
        raise Enough


def write_pairs(folder: Path) -> dataset.Pairs:
    """Photos of noise and edits, their negatives, as stage 1 leaves them."""
    rng = np.random.default_rng(0)
    for i in range(PAIRS):
        photo = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        runs.write_png(folder / f"train/source/{i:05}.png", Image.fromarray(photo))
        runs.write_png(folder / f"train/negative/{i:05}.png", Image.fromarray(255 - photo))
    runs.write_json(folder / "concepts.json", {"negative": {"prompt": "a negative"}})
    return dataset.find_pairs(folder, "train", ["negative"]).cache(folder / "cache")


def train(number: str, data: Measured, device: torch.device, wants_compile: bool) -> None:
    """A stage's own training on this data, until that raises Enough."""
    stage = bench.load_stage(number)
    sys.argv = [f"{number}.py", "--batch", str(data.batch), "--steps", "100000"]
    sys.argv += ["--save-every", "100000", "--precision", "bf16"]
    sys.argv += ["--compile"] if wants_compile else []
    args = stage.parse()
    args.out = None
    args.half_size = 0.0
    args.l1 = training.l1_weight(args)
    generator = bench.untrained("e2gan", WIDTH, SIZE)
    try:
        if number == "03":
            generator = generator.to(device)
            discriminator = common.new_discriminator(generator)
            stage.train_base(generator, discriminator, data, data, args)
        elif number == "04":
            generator.config["concepts"] = data.concepts
            generator = generator.to(device)
            ranks = stage.layer_ranks(stage.layer_shapes(generator), stage.PAPER_RANKS)
            stage.add_lora(generator, ranks, args.alpha)
            discriminator = common.new_discriminator(generator, text=False)
            stage.finetune(args, generator, discriminator, data, args.steps)
        else:
            generator.config["concepts"] = data.concepts
            args.generator = "the untrained one"
            args.new_discriminator = True
            task = stage.TASKS["pix2pix"](args, data, generator).to(device)
            targets = {"generator": stage.Target(generator, args.keep)}
            stage.search(task, targets, data, data, args, args.steps)
    except Enough:
        return


def peak_of(card: str) -> float | None:
    """Operations a second that the card is sold with; None where PEAKS does not know it."""
    for part, peak in PEAKS.items():
        if part in card:
            return peak * 1e12
    return None


def measure(number: str, batch: int, wants_compile: bool, pairs, device) -> dict:
    """A row of the table."""
    row = {"training": NAMES[number], "batch": batch, "compiled": "yes" if wants_compile else "no"}
    try:
        with FlopCounterMode(display=False) as counter:
            train(number, OneStep(pairs, 2), device, wants_compile=False)
        data = Measured(pairs, batch)
        train(number, data, device, wants_compile)
    except torch.OutOfMemoryError:
        return {**row, "images/s": "does not fit"}
    images = STEPS * batch / data.seconds
    peak = peak_of(torch.cuda.get_device_name(device))
    operations = counter.get_total_flops() / 2  # of one picture
    return {
        **row,
        "images/s": images,
        "ms a step": 1000 * data.seconds / STEPS,
        "% of the card's peak": 100 * images * operations / peak if peak else None,
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30,
        "waited for pictures s": data.waited,
        "of s": data.seconds,
    }


def padding_rows(device: torch.device) -> list[dict]:
    """F.pad's reflection, whose backward pass adds with atomics, beside common.reflect's slices."""

    def padded_slices(x, reach):
        return common.reflect(common.reflect(x, 3, reach), 2, reach)

    def padded_by_torch(x, reach):
        return F.pad(x, (reach,) * 4, "reflect")

    rows = []
    for channels, side, reach in ((64, 256, 3), (128, 128, 1), (256, 64, 1)):
        shape = 16, channels, side, side
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        row = {"map": "x".join(map(str, shape)), "pixels a side": reach}
        for name, pad in (("F.pad ms", padded_by_torch), ("slices ms", padded_slices)):

            def forward_and_back(pad=pad, x=x, reach=reach):
                x.grad = None
                pad(x, reach).sum().backward()
                torch.cuda.synchronize()

            forward_and_back()
            row[name] = 1000 * bench.least(forward_and_back, 20)
        rows.append(row)
    return rows


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not torch.cuda.is_available():
        raise runs.UserError("no GPU here: this script measures what training costs on one")
    device = training.start(argparse.Namespace(device="cuda", seed=0))
    card = torch.cuda.get_device_name(device)
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder))
        for number, batch, wants_compile in ROWS:
            if time.perf_counter() - began > 60 * MINUTES:
                tqdm.write(f"left out for time: {NAMES[number]}, batch {batch}")
                continue
            rows.append(measure(number, batch, wants_compile, pairs, device))
            tqdm.write(str(rows[-1]))
            torch.cuda.empty_cache()
    title = f"{card}, torch {torch.__version__}, {SIZE} pixels, width {WIDTH}, bf16"
    print(runs.markdown(title, rows))
    print(runs.markdown(f"{card}: reflecting borders, there and back", padding_rows(device)))


if __name__ == "__main__":
    runs.run(main)
