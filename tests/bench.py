"""What the stages cost, measured: each sub-command prints one Markdown table.

    python tests/bench.py distill       stage 1's own time beside a diffusion pipeline's; memory with 100,000 photos
"""
import argparse
import contextlib
import functools
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def load_stage(number: str):
    script = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1

def bench_distill() -> tuple[str, list[dict]]:
    """Wall time of the edits beside that of the pipeline's calls, with a pipeline of a few thousand weights whose calls
    are slowed to 50 ms by sleeping, as the CPU does while a GPU works (it works at 32 pixels, whatever the pairs'
    size); then the peak memory by the number of photos."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [overhead(Path(folder), size, batch) for size, batch in ((64, 1), (256, 1), (256, 4))]
        return "Stage 1", rows + [memory(Path(folder), count) for count in (1_000, 100_000)]


def overhead(folder: Path, size: int, batch: int, seconds: float = 0.05) -> dict:
    import diffusers
    import tiny_pipelines
    torch.set_num_threads(1)
    stage = load_stage("01")
    teacher = tiny_pipelines.instruct_pix2pix(folder / "pipeline")
    kind, in_calls, spans = diffusers.StableDiffusionInstructPix2PixPipeline, [], []
    plain, make_edits = kind.__call__, stage.make_edits

    @functools.wraps(plain)
    def slow(*args, **options):
        start = time.perf_counter()
        output = plain(*args, **options)
        time.sleep(max(0, seconds - (time.perf_counter() - start)))
        in_calls.append(time.perf_counter() - start)
        return output

    def timed(*args):
        start = time.perf_counter()
        yield from make_edits(*args)
        spans.append(time.perf_counter() - start)

    kind.__call__, stage.make_edits = slow, timed
    flags = ["--demo", "--teacher", teacher, "--steps", 1, "--size", size, "--teacher-size", 32, "--batch", batch,
             "--train", 200 * batch, "--test", 4 * batch, "--concept", "sketch=draw it", "--concept", "night=darken it",
             "--overwrite", "--out", folder / "pairs"]
    sys.argv = ["01_distill_pairs.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            stage.main()
    finally:
        kind.__call__ = plain
    return {"what": f"{size} pixels, batch {batch}", "calls": len(in_calls),
            "in the pipeline s": round(sum(in_calls), 2), "in all s": round(spans[0], 2),
            "own share %": round(100 * (1 - sum(in_calls) / spans[0]), 1)}


def memory(folder: Path, count: int) -> dict:
    """Peak memory of a run that takes 200 of `count` photos."""
    photos = folder / f"photos {count}"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(photos / "000000.jpg")
    for i in range(1, count):               # file systems limit the links to one file
        link = os.link if i % 10_000 else shutil.copy
        link(photos / f"{(i - 1) // 10_000 * 10_000:06}.jpg", photos / f"{i:06}.jpg")
    start = time.perf_counter()
    flags = ["--demo", "--images", photos, "--train", 180, "--test", 20, "--concept", "sepia=make it sepia",
             "--out", folder / f"pairs {count}"]
    subprocess.run([sys.executable, str(ROOT / "01_distill_pairs.py"), *map(str, flags)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"what": f"200 of {count:,} photos", "in all s": round(time.perf_counter() - start, 1),
            "peak memory MiB": round(peak / 1024)}


# ---------------------------------------------------------------------------------------------------------------------

def markdown(title: str, rows: list[dict]) -> str:
    """A table with a column for every key that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows])


BENCHMARKS = {"distill": bench_distill}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    print(markdown(*BENCHMARKS[parser.parse_args().name]()))
