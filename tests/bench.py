"""What the stages cost, measured: each sub-command prints one Markdown table.

    python tests/bench.py lora          stage 4's training step: adapter, all weights; edits merged, loaded and swapped
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
# Stage 4

def bench_lora(rounds: int = 3, steps: int = 2) -> tuple[str, list[dict]]:
    """Time of a step of stage 4's loop, by mode, taking turns, least of the rounds; then swapping adapters, and an edit
    by the base and with an adapter merged. Random weights and pictures; processor time of one thread on a CPU, so that
    whatever else the machine does counts little, else wall time."""
    import common
    torch.set_num_threads(1)
    stage, device = load_stage("04"), common.pick_device("auto")
    return "Stage 4", [row for width, size in ((32, 64), (64, 128)) for row in lora_rows(stage, common, device, width, size, rounds, steps)]


def lora_rows(stage, common, device, width: int, size: int, rounds: int, steps: int, batch: int = 4) -> list[dict]:
    what, concept = f"width {width}, {size} pixels, batch {batch}", {"name": "a", "prompt": "a"}
    pictures = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    pairs = common.Pairs([concept], [f"{i}.png" for i in range(batch)], pictures, [pictures.flip(0)], [torch.arange(batch)])
    config = common.generator_config("e2gan", width, size, [concept], text_dim=512, tokens=9, clip="")
    args = argparse.Namespace(lr=1e-3, lr_d=2e-4, l1=100.0, seed=0, batch=batch, epochs=1, steps=steps, precision="auto", save_every=10 ** 6)

    def network(mode):
        generator = common.build_generator(config).to(device)
        if mode == "lora":
            groups = stage.group_sizes(generator)
            ranks = {group: stage.PAPER_RANKS[group] for group in stage.CRUCIAL}
            common.add_lora(generator, stage.layer_ranks(groups, ranks), 16.0)
        return generator

    networks = {mode: network(mode) for mode in ("full", "lora")}
    took: dict[str, list[float]] = {mode: [] for mode in networks}
    for _ in range(rounds):
        for mode, generator in networks.items():
            took[mode].append(best(lambda: stage.finetune(generator, pairs, None, args, None, device, 0, 1), 1) / steps)
    ms = {mode: 1000 * min(times) for mode, times in took.items()}
    rows = [{"what": f"training step, {what}", "full ms": round(ms["full"], 1), "lora ms": round(ms["lora"], 1),
             "lora / full": round(ms["lora"] / ms["full"], 3)}]

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base.safetensors"), Path(folder, "adapter.safetensors")
        common.save_generator(base, network("full"))
        common.save_adapter(adapter, networks["lora"], "a", common.sha256(base), 16.0)
        plain, swapped, merged = (common.load_generator(base, device).requires_grad_(False) for _ in range(3))
        swap = best(lambda: (common.load_adapter(swapped, adapter), common.unload_adapters(swapped)), rounds)
        common.load_adapter(merged, adapter)
        common.remove_parametrizations(merged)
        edit = {name: best(lambda: common.run_generator(generator, pictures, 0), 2 * rounds)
                for name, generator in (("full", plain), ("lora", merged))}
    return rows + [{"what": f"edits, base and merged, {what}", **{f"{name} ms": round(1000 * s, 1) for name, s in edit.items()},
                    "lora / full": round(edit["lora"] / edit["full"], 3)},
                   {"what": f"load and unload an adapter, width {width}", "lora ms": round(1000 * swap, 1)}]


def best(call, rounds: int) -> float:
    """Least seconds of some calls, as bench_lora says."""
    clock, times = time.perf_counter if torch.cuda.is_available() else time.process_time, []
    for _ in range(rounds):
        start = clock()
        call()                              # ends in numbers on the CPU: nothing is left to wait for on a GPU
        times.append(clock() - start)
    return min(times)


# ---------------------------------------------------------------------------------------------------------------------

def markdown(title: str, rows: list[dict]) -> str:
    """A table with a column for every key that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows])


BENCHMARKS = {"distill": bench_distill, "lora": bench_lora}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    print(markdown(*BENCHMARKS[parser.parse_args().name]()))
