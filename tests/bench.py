"""What the stages cost, measured: each sub-command prints one Markdown table.

python tests/bench.py               the ratios of those below, in one table, for the machine at hand (minutes)
python tests/bench.py distill       stage 1's own time beside a diffusion pipeline's; memory with 100,000 photos
python tests/bench.py size          parameters and MACs of each architecture at the papers' size
python tests/bench.py train         stage 3's images/s beside a plain loop's, and how long it waits for its batches
python tests/bench.py train --size 256 --width 64 --batch 4 --batch 8 --steps 10
python tests/bench.py train --memory 100000         (minutes, and 30 GB of disk) peak memory with so many pairs at 256 pixels
python tests/bench.py prune         time and peak memory of a search step of stage 5 beside a plain training step's
python tests/bench.py lora          stage 4's training step with an adapter and with all weights; edits with it merged
python tests/bench.py onnx          exported files beside resnet9's at 256 pixels on two threads; untrained networks unless
python tests/bench.py onnx --generator runs/base/generator.safetensors --generator runs/coronet/generator.safetensors
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
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
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402  (found by the line above)


def load_stage(number: str):
    script = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1


def bench_distill(_) -> tuple[str, list[dict]]:
    """Wall time of the edits beside that of the pipeline's calls, with a pipeline of a few thousand weights whose calls
    are slowed to 50 ms by sleeping, as the CPU does while a GPU works (it works at 32 pixels, whatever the pairs'
    size); then the peak memory by the number of photos."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            overhead(Path(folder), size, batch) for size, batch in ((64, 1), (256, 1), (256, 4))
        ]
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
    flags = [
        "--demo",
        "--teacher",
        teacher,
        "--steps",
        1,
        "--size",
        size,
        "--teacher-size",
        32,
        "--batch",
        batch,
        "--train",
        200 * batch,
        "--test",
        4 * batch,
        "--concept",
        "sketch=draw it",
        "--concept",
        "night=darken it",
        "--overwrite",
        "--out",
        folder / "pairs",
    ]
    sys.argv = ["01_distill_pairs.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            stage.main()
    finally:
        kind.__call__ = plain
    return {
        "what": f"{size} pixels, batch {batch}",
        "calls": len(in_calls),
        "in the pipeline s": round(sum(in_calls), 2),
        "in all s": round(spans[0], 2),
        "own share %": round(100 * (1 - sum(in_calls) / spans[0]), 1),
    }


def memory(folder: Path, count: int) -> dict:
    """Peak memory of a run that takes 200 of `count` photos."""
    photos = folder / f"photos {count}"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(photos / "000000.jpg")
    for i in range(1, count):  # file systems limit the links to one file
        link = os.link if i % 10_000 else shutil.copy
        link(photos / f"{(i - 1) // 10_000 * 10_000:06}.jpg", photos / f"{i:06}.jpg")
    start = time.perf_counter()
    flags = [
        "--demo",
        "--images",
        photos,
        "--train",
        180,
        "--test",
        20,
        "--concept",
        "sepia=make it sepia",
        "--out",
        folder / f"pairs {count}",
    ]
    subprocess.run(
        [sys.executable, str(ROOT / "01_distill_pairs.py"), *map(str, flags)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "what": f"200 of {count:,} photos",
        "in all s": round(time.perf_counter() - start, 1),
        "peak memory MiB": round(peak / 1024),
    }


# ---------------------------------------------------------------------------------------------------------------------

# Stage 3

CONCEPTS = ["sepia", "sketch"]
WARM = 3  # steps before the clock starts


def call_stage(number: str, *flags) -> None:
    """A stage in this process, its own output on standard error."""
    stage, threads = load_stage(number), torch.get_num_threads()
    sys.argv = [f"stage {number}", "--demo", *map(str, flags)]
    with contextlib.redirect_stdout(sys.stderr):
        stage.main()
    torch.set_num_threads(threads)  # stage 1 leaves one


def make_pairs(folder: Path, size: int, count: int) -> Path:
    """`count` pairs of two concepts: 16 photos of the demo and their edits, linked to as many names as that takes."""
    concepts = [flag for name in CONCEPTS for flag in ("--concept", f"{name}=make it {name}")]
    call_stage("01", "--size", size, "--train", 16, "--test", 2, *concepts, "--out", folder)
    rows = []
    for i in range(max(16, -(-count // len(CONCEPTS)))):
        for name in ("source", *CONCEPTS):
            if i >= 16:
                os.link(
                    folder / "train" / name / f"{i % 16:05}.png",
                    folder / "train" / name / f"{i:05}.png",
                )
        rows += [
            {"file_name": f"{name}/{i:05}.png", "source": f"source/{i:05}.png", "concept": name}
            for name in CONCEPTS
        ]
    common.write_text(
        folder / "train/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
    )
    return folder


def train_flags(pairs: Path, args, batch: int) -> list:
    concepts = [flag for name in CONCEPTS for flag in ("--concept", name)]
    return [
        "--pairs",
        pairs,
        *concepts,
        "--width",
        args.width,
        "--batch",
        batch,
        "--epochs",
        1,
        "--save-every",
        10**9,
        "--precision",
        args.precision,
        "--device",
        args.device,
        "--overwrite",
        "--out",
        pairs.parent / "run",
    ]


@contextlib.contextmanager
def homes(home: str):
    """The flags that make stage 3 hold its pictures there; as if the disk were full, for PNGs."""
    plain = shutil.disk_usage
    if home == "PNGs":
        shutil.disk_usage = lambda _: plain("/")._replace(free=0)
    try:
        yield ["--cache-gb", 1000 if home == "memory" else 0]
    finally:
        shutil.disk_usage = plain


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def stage_3(pairs: Path, args, batch: int, home: str) -> tuple[float, float]:
    """Seconds a step of the stage's own loop, and the seconds of it that pass until it is given its batch."""
    plain, asked, waited = common.Pairs.batches, [], []

    def timed(self, batch, steps, *more, **options):
        batches = plain(self, batch, steps, *more, **options)
        for step in steps:
            if step in (WARM, steps[-1]):
                synchronize(common.pick_device(args.device))
            asked.append(time.perf_counter())
            given = next(batches)
            waited.append(time.perf_counter() - asked[-1])
            yield given

    common.Pairs.batches = timed
    try:
        with homes(home) as flags:
            call_stage("03", *train_flags(pairs, args, batch), *flags)
    finally:
        common.Pairs.batches = plain
    steps = len(asked) - 1 - WARM  # the last step saves a checkpoint; it is not counted
    return (asked[-1] - asked[WARM]) / steps, sum(waited[WARM:-1]) / steps


@contextlib.contextmanager
def pytorchs_layers():
    """Networks as one would write them first, also on a CPU."""
    ours, common.for_cpu, common.by_rows = (
        (common.for_cpu, common.by_rows),
        lambda x: False,
        lambda x: False,
    )
    try:
        yield
    finally:
        common.for_cpu, common.by_rows = ours


def plain_loop(pairs: Path, args, batch: int) -> tuple[float, float]:
    """The same two times of what one would write first: PNGs decoded in the loop, fp32, a pass of the discriminator each for
    real and fake, Adam as it comes."""
    device = common.pick_device(args.device)
    data = common.find_pairs(pairs, "train", CONCEPTS)
    torch.manual_seed(0)
    generator = common.new_generator(
        "e2gan", args.width, data.size, data.concepts, "ViT-S-32:random", device
    )
    discriminator = common.new_discriminator(generator)
    opt_g, opt_d = (
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999))
        for network in (generator, discriminator)
    )
    asked, waited = [], []
    for step in range(args.steps):
        if step in (WARM, args.steps - 1):
            synchronize(device)
        asked.append(time.perf_counter())
        picks, flips = common.draw_picks(data.counts, batch, step, seed=0)
        photos, edits = [], []
        for (c, i), flip in zip(picks.tolist(), flips.tolist()):
            for images, name in ((photos, "source"), (edits, CONCEPTS[c])):
                image = common.to_float(
                    common.read_image(data.folder / name / data.names[data.rows[c][i]])
                )
                images.append(image.flip(-1) if flip else image)
        photo, edit, concept = (
            torch.stack(photos).to(device),
            torch.stack(edits).to(device),
            picks[:, 0].to(device),
        )
        waited.append(time.perf_counter() - asked[-1])
        text = common.text_of(generator, concept)
        fake = generator(photo, concept)
        real_score, fake_score = (
            discriminator(photo, edit, text),
            discriminator(photo, fake.detach(), text),
        )
        opt_d.zero_grad()
        (((real_score - 1).square().mean() + fake_score.square().mean()) / 2).backward()
        opt_d.step()
        discriminator.requires_grad_(False)
        opt_g.zero_grad()
        (
            (discriminator(photo, fake, text) - 1).square().mean()
            + 100 * (fake - edit).abs().mean()
        ).backward()
        opt_g.step()
        discriminator.requires_grad_(True)
    steps = args.steps - 1 - WARM
    return (asked[-1] - asked[WARM]) / steps, sum(waited[WARM:-1]) / steps


def bench_train(args) -> tuple[str, list[dict]]:
    """Stage 3 with its pictures in each of their homes beside the plain loop with PyTorch's layers, at each batch, and that loop
    with the networks as stage 3 computes them; or the memory that it takes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            pairs = make_pairs(Path(folder, "pairs"), 256, args.memory)
            return f"Stage 3, {args.memory:,} pairs at 256 pixels", [
                train_memory(pairs, args, home) for home in ("file", "PNGs")
            ]
        for batch in args.batch or [16]:
            pairs = make_pairs(Path(folder, f"{batch}/pairs"), args.size, args.steps * batch)
            loops = {
                "plain loop": pytorchs_layers()(plain_loop),
                "plain loop, stage 3's networks": plain_loop,
            }
            loops = {
                name: functools.partial(loop, pairs, args, batch) for name, loop in loops.items()
            } | {
                f"stage 3, {home}": functools.partial(stage_3, pairs, args, batch, home)
                for home in ("memory", "file", "PNGs")
            }
            slowest = None
            for name, loop in loops.items():
                step, wait = loop()
                slowest = slowest or step
                rows.append(
                    {
                        "loop": name,
                        "batch": batch,
                        "step ms": 1000 * step,
                        "images/s": batch / step,
                        "x plain": slowest / step,
                        "waits for its batch ms": 1000 * wait,
                        "waits %": 100 * wait / step,
                    }
                )
    return f"Stage 3, {args.size} pixels, width {args.width}, {args.precision}, {args.device}", rows


def train_memory(pairs: Path, args, home: str) -> dict:
    """Five steps in a process of their own."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=few_steps, args=(pairs, args, home, answer))
    process.start()
    process.join()
    return answer.get()


def few_steps(pairs: Path, args, home: str, answer) -> None:
    common.steps_per_epoch = lambda counts, batch: 5
    start = time.perf_counter()
    with homes(home) as flags:
        call_stage("03", *train_flags(pairs, args, args.batch[0] if args.batch else 16), *flags)
    answer.put(
        {
            "pictures": home,
            "in all s": round(time.perf_counter() - start, 1),
            "peak memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4


def bench_lora(args, rounds: int = 3, steps: int = 2) -> tuple[str, list[dict]]:
    """Time of a step of stage 4's loop, by mode, taking turns, least of the rounds; then swapping adapters, and an edit
    by the base and with an adapter merged. Random weights; processor time of one thread on a CPU, so that
    whatever else the machine does counts little, else wall time."""
    torch.set_num_threads(1)
    device = common.pick_device(args.device)
    return f"Stage 4, {device}", [
        row
        for width, size in ((32, 64), (64, 128))
        for row in lora_rows(width, size, device, rounds, steps)
    ]


def lora_rows(
    width: int, size: int, device: torch.device, rounds: int, steps: int, batch: int = 4
) -> list[dict]:
    stage, what = load_stage("04"), f"width {width}, {size} pixels, batch {batch}"
    with tempfile.TemporaryDirectory() as folder:
        pairs = common.load_pairs(
            make_pairs(Path(folder, "pairs"), size, 32), "train", CONCEPTS[:1]
        )
    concept, pictures = pairs.concepts[0], pairs.photos[:batch]
    config = common.generator_config(
        "e2gan", width, size, [concept], text_dim=512, tokens=9, clip=""
    )
    args = argparse.Namespace(
        lr=1e-3,
        lr_d=2e-4,
        l1=100.0,
        seed=0,
        batch=batch,
        steps=steps,
        precision="auto",
        save_every=10**6,
        out=None,
    )

    def network(mode):
        generator = common.build_network(config).to(device)
        if mode == "lora":
            groups = stage.group_sizes(generator)
            ranks = {group: stage.PAPER_RANKS[group] for group in stage.CRUCIAL}
            common.add_lora(generator, stage.layer_ranks(groups, ranks), 16.0)
        return generator

    networks = {mode: network(mode) for mode in ("full", "lora")}
    took: dict[str, list[float]] = {mode: [] for mode in networks}
    for _ in range(rounds):
        for mode, generator in networks.items():
            took[mode].append(
                best(lambda: stage.finetune(generator, pairs, None, args, None, device, 0, 1), 1)
                / steps
            )
    ms = {mode: 1000 * min(times) for mode, times in took.items()}
    rows = [
        {
            "what": f"training step, {what}",
            "full ms": round(ms["full"], 1),
            "lora ms": round(ms["lora"], 1),
            "lora / full": round(ms["lora"] / ms["full"], 3),
        }
    ]

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base.safetensors"), Path(folder, "adapter.safetensors")
        common.save_network(base, network("full"))
        common.save_adapter(adapter, networks["lora"], concept["name"], common.sha256(base), 16.0)
        plain, swapped, merged = (
            common.load_generator(base, device).requires_grad_(False) for _ in range(3)
        )
        swap = best(
            lambda: (common.load_adapter(swapped, adapter), common.unload_adapters(swapped)), rounds
        )
        common.load_adapter(merged, adapter)
        common.remove_parametrizations(merged)
        edit = {
            name: best(lambda: common.run_generator(generator, pictures, 0), 2 * rounds)
            for name, generator in (("full", plain), ("lora", merged))
        }
    return rows + [
        {
            "what": f"edits, base and merged, {what}",
            **{f"{name} ms": round(1000 * s, 1) for name, s in edit.items()},
            "lora / full": round(edit["lora"] / edit["full"], 3),
        },
        {"what": f"load and unload an adapter, width {width}", "lora ms": round(1000 * swap, 1)},
    ]


def best(call, rounds: int) -> float:
    """Least seconds of some calls, as bench_lora says."""
    clock, times = time.perf_counter if torch.cuda.is_available() else time.process_time, []
    for _ in range(rounds):
        start = clock()
        call()  # ends in numbers on the CPU: nothing is left to wait for on a GPU
        times.append(clock() - start)
    return min(times)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 5


def bench_prune(args) -> tuple[str, list[dict]]:
    """A training step of e2gan as it is, of one whose weights hypernetworks make, and of one cut to a quarter of its MACs. The step
    here has what costs something in stage 5's (both networks' passes, least squares + L1, Adam) and leaves out what does not
    (data, schedule, thresholds). Each in a process of its own, one thread on a CPU: the least time of the steps, the most memory."""
    context, rows = multiprocessing.get_context("spawn"), []
    for name in ("plain", "search", "converge"):
        answer = context.SimpleQueue()
        process = context.Process(target=prune_steps, args=(name, args, answer))
        process.start()
        process.join()
        rows.append({"step": name, **answer.get()})
    for row in rows:
        row |= {
            "x plain time": row["step ms"] / rows[0]["step ms"],
            "x plain memory": row["peak MiB"] / rows[0]["peak MiB"],
        }
    return (
        f"Stage 5, {args.size} pixels, width {args.width}, batch {(args.batch or [4])[0]}, {args.precision}, {args.device}",
        rows,
    )


def prune_steps(name: str, args, answer) -> None:
    torch.set_num_threads(1)
    device, size, batch = common.pick_device(args.device), args.size, (args.batch or [4])[0]
    torch.manual_seed(0)
    config = common.generator_config(
        "e2gan", args.width, size, [{"name": "a", "prompt": "a"}], text_dim=512, tokens=9, clip=""
    )
    generator = common.build_network(config).to(device)
    discriminator = common.new_discriminator(generator)
    latents = torch.nn.ParameterDict()
    if name == "converge":
        order = {g: torch.arange(n, 0, -1.0) / n for g, n in config["widths"].items()}
        generator = common.slice_network(
            generator, load_stage("05").Target(generator, 0.25).kept(order, 0.25)
        )
    if name == "search":
        latents = torch.nn.ParameterDict(
            {g: torch.randn(n) for g, n in config["widths"].items()}
        ).to(device)
        ones = {
            g: torch.ones(n, device=device)
            for g, n in common.all_widths(config).items()
            if g not in latents
        }
        common.add_hypernetwork(generator, {**latents, **ones}, trained=False)
    opt_g, opt_d = (
        common.adam(parameters, 2e-4)
        for parameters in (
            [*generator.parameters(), *latents.parameters()],
            discriminator.parameters(),
        )
    )
    photo, concept = generator.example(batch=batch, device=device)
    edit, text = torch.randn_like(photo), common.text_of(generator, concept)

    def step():
        discriminator.requires_grad_(False)
        with parametrize.cached():
            with common.autocast(device, args.precision):
                fake = generator(photo, concept)
                score = discriminator(photo, fake, text).float()
            ((score - 1).square().mean() + 100 * (fake.float() - edit).abs().mean()).backward()
        opt_g.step()
        opt_g.zero_grad()
        discriminator.requires_grad_(True)
        with common.autocast(device, args.precision):
            score_real, score_fake = (
                discriminator(
                    photo.repeat(2, 1, 1, 1), torch.cat([edit, fake.detach()]), text.repeat(2, 1)
                )
                .float()
                .chunk(2)
            )
        ((score_real - 1).square().mean() + score_fake.square().mean()).backward()
        opt_d.step()
        opt_d.zero_grad()
        synchronize(device)

    step()
    ms, cuda = 1000 * min(best(step, 1) for _ in range(args.steps)), device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    answer.put(
        {"parameters M": common.count_parameters(generator) / 1e6, "step ms": ms, "peak MiB": peak}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Networks, and stage 6


def untrained(arch: str, width: int, size: int) -> common.Generator:
    """With random weights; e2gan's as for the text features of CLIP ViT-B/32 (512 numbers a token)."""
    text = dict(text_dim=512, tokens=8, clip="none") if arch == "e2gan" else {}
    return common.build_network(
        common.generator_config(arch, width, size, [{"name": "a", "prompt": "a"}], **text)
    )


def bench_onnx(args) -> tuple[str, list[dict]]:
    """Median wall time of one picture by stage 6's fp32 files, which take turns, so that other work hits all alike: resnet9's, and those of
    --generator or of the untrained architectures, e2gan also with all groups narrowed alike to a share of its MACs."""
    stage, pruning = load_stage("06"), load_stage("05")
    networks = {"resnet9": untrained("resnet9", args.width, args.size)}
    if args.generator:
        networks |= {str(path): common.load_generator(path) for path in args.generator}
    else:
        networks |= {arch: untrained(arch, args.width, args.size) for arch in ("unet256", "e2gan")}
        order = {g: 1 - torch.arange(n) / n for g, n in networks["e2gan"].config["widths"].items()}
        networks |= {
            f"e2gan, {100 * share:g} % of the MACs": common.slice_network(
                networks["e2gan"], pruning.Target(networks["e2gan"], share).kept(order, share)
            )
            for share in (0.25, 0.08)
        }
    runs, photo = [], torch.randint(256, (1, 3, args.size, args.size), dtype=torch.uint8)
    for network in networks.values():
        concept = network.config["concepts"][0]["name"]
        data = stage.bake(
            stage.trace(network.eval(), args.size), network, stage.prompt_of(network, concept)[1]
        ).SerializeToString()
        runs.append((session := stage.open_file(data, args.threads), stage.feed(session, photo)))
    times = stage.median_ms(runs, 30)
    return f"ONNX Runtime, {args.size} pixels, width {args.width}, {args.threads} threads", [
        {
            "generator": name,
            "GMACs": common.count_macs(network, args.size) / 1e9,
            "ms": ms,
            "FPS": 1000 / ms,
            "/ resnet9": ms / times[0],
        }
        for (name, network), ms in zip(networks.items(), times)
    ]


def bench_size(_) -> tuple[str, list[dict]]:
    """The generators at 256 pixels and width 64."""
    rows = []
    for arch in common.ARCHITECTURES:
        with torch.device("meta"):
            generator = untrained(arch, 64, 256)
        rows.append(
            {
                "generator": arch,
                "parameters M": common.count_parameters(generator) / 1e6,
                "GMACs": common.count_macs(generator, 256) / 1e9,
            }
        )
    return "Generators at 256 pixels, width 64", rows


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def bench_all(args) -> tuple[str, list[dict]]:
    """A row per ratio, each at its sub-command's default setting, and what this project wants of it."""
    train, onnx, lora, prune = (
        BENCHMARKS[name](with_defaults(args, name))[1]
        for name in ("train", "onnx", "lora", "prune")
    )
    with tempfile.TemporaryDirectory() as folder:
        share = overhead(Path(folder), 64, 1)["own share %"] / 100
    stage_3_row = next(row for row in train if row["loop"] == "stage 3, memory")
    ratios = [
        (
            "stage 1: own share of the time beside a pipeline's calls of 50 ms",
            share,
            "0.03 at most",
        ),
        (
            "stage 3: images/s, x a plain loop's",
            stage_3_row["x plain"],
            "2.3 or more, on a CPU with bf16 units",
        ),
        (
            "stage 3: share of a step spent waiting for pictures",
            stage_3_row["waits %"] / 100,
            "0.05 at most",
        ),
        *(
            (f"stage 4: {row['what']}, adapter / all weights", row["lora / full"], "1 at most")
            for row in lora
            if "lora / full" in row
        ),
        (
            "stage 5: time of a search step / a plain one's",
            prune[1]["x plain time"],
            "1.25 at most",
        ),
        (
            "stage 5: memory of a search step / a plain one's",
            prune[1]["x plain memory"],
            "1.5 at most",
        ),
        *(
            (
                f"stage 6: latency of {row['generator']} / resnet9's",
                row["/ resnet9"],
                "0.5 at most" if row["generator"] == "e2gan" else None,
            )
            for row in onnx
            if row["generator"].startswith("e2gan")
        ),
    ]
    return f"Ratios, {common.pick_device(args.device)}, {os.cpu_count()} cores", [
        dict(zip(("what", "ratio", "wanted"), row)) for row in ratios
    ]


def with_defaults(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The flags as given, the others as the sub-command has them."""
    defaults = {"prune": dict(size=256, width=64, steps=3), "onnx": dict(size=256, width=64)}.get(
        name, dict(size=64, width=32, steps=30)
    )
    return argparse.Namespace(
        **{
            **vars(args),
            **{key: value for key, value in defaults.items() if getattr(args, key) is None},
        }
    )


BENCHMARKS = {
    "distill": bench_distill,
    "size": bench_size,
    "train": bench_train,
    "prune": bench_prune,
    "lora": bench_lora,
    "onnx": bench_onnx,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", nargs="?", choices=BENCHMARKS, help="what to measure (default: the ratios of all)"
    )
    train = parser.add_argument_group("train, prune, onnx")
    train.add_argument("--size", type=int, help="pixels (default: 64; prune, onnx: 256)")
    train.add_argument(
        "--width", type=int, help="channels of the first layer (default: 32; prune, onnx: 64)"
    )
    train.add_argument(
        "--batch",
        type=int,
        action="append",
        help="can be repeated for train (default: 16; prune: 4)",
    )
    train.add_argument(
        "--steps",
        type=int,
        help=f"the first {WARM} of train are not counted, nor is the last (default: 30; prune: 3)",
    )
    train.add_argument("--precision", default="auto", help="as stage 3's")
    train.add_argument("--device", default="auto", help="as stage 3's")
    train.add_argument(
        "--memory",
        type=int,
        metavar="PAIRS",
        help="measure the peak memory with so many pairs instead",
    )
    exported = parser.add_argument_group("onnx")
    exported.add_argument(
        "--generator", type=Path, action="append", help="a generator's file; can be repeated"
    )
    exported.add_argument("--threads", type=int, default=2, help="ONNX Runtime's (default: 2)")
    args = parser.parse_args()
    print(
        common.markdown(
            *(
                BENCHMARKS[args.name](with_defaults(args, args.name))
                if args.name
                else bench_all(args)
            )
        )
    )
