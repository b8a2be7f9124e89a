"""Measures what the stages cost on this machine, which should do nothing else. Each benchmark
prints one Markdown table.

    python tests/bench.py busy        a step of stage 3 beside processes that are never idle
    python tests/bench.py distill     time that stage 1 adds to a diffusion pipeline's; its memory
    python tests/bench.py speedrun    seconds to a given quality: stages 3, 4, 5 and plain pix2pix
    python tests/bench.py prune       time and memory of a step of stage 5's search
    python tests/bench.py onnx        milliseconds of stage 6's files, of untrained networks
    python tests/bench.py onnx --generator runs/base/generator.safetensors    (of a trained one)
    python tests/bench.py browser     milliseconds of an edit by exported folders in Chromium
    python tests/bench.py steady      how far noise and a pan change edits of a base and its teacher
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import math
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils import parametrize
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found by the line above)
import dataset  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

L1 = "L1 (0-255)"


def script(number: str) -> Path:
    return next(ROOT.glob(f"{number}_*.py"))


def load_stage(number: str):
    return importlib.import_module(script(number).stem)


def run_stage(path: Path, folder: Path, *flags, threads: int | None = None) -> None:
    """Runs a stage in a process of its own."""
    command = [sys.executable, str(path), *map(str, flags)]
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{path} failed:\n{done.stderr}")


def least(call, rounds: int) -> float:
    """The fewest seconds that one of some calls takes. A call must wait for a GPU's results."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def untrained(arch: str, width: int, size: int) -> common.Generator:
    """An untrained generator; an e2gan's prompt has 9 tokens of ViT-B/32 (512 numbers each)."""
    concepts = [{"name": "a", "prompt": "a"}]
    tokens = [torch.randn(9, 512)] if arch == "e2gan" else None
    return common.new_generator(arch, width, size, concepts, tokens)


# ---- Stage 1 -------------------------------------------------------------------------------------


def bench_distill(_) -> tuple[str, list[dict]]:
    """Stage 1 with a tiny pipeline, each of whose calls sleeps until it has taken 50 ms, as if a
    GPU worked. Stage 1's own time is that between the calls (wanted: 3 % at most)."""
    with tempfile.TemporaryDirectory() as name:
        rows = [own_time(Path(name), *each) for each in ((64, 1), (256, 1), (256, 4))]
        rows += [memory(Path(name), count) for count in (1_000, 100_000)]
    return "Stage 1", rows


def own_time(folder: Path, size: int, batch: int) -> dict:
    """A row: the seconds of a run of stage 1 inside and outside its pipeline's calls."""
    import diffusers
    import tiny_pipelines

    stage = load_stage("01")
    teacher = tiny_pipelines.instruct_pix2pix(folder / "pipeline")
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline
    plain = pipeline.__call__
    calls = []  # (start, end) of each

    @functools.wraps(plain)
    def slow(*args, **options):
        start = time.perf_counter()
        output = plain(*args, **options)
        time.sleep(max(0, 0.05 - (time.perf_counter() - start)))
        calls.append((start, time.perf_counter()))
        return output

    sys.argv = ["01", "--demo", "--teacher", str(teacher), "--overwrite"]
    flags = {"steps": 1, "size": size, "teacher-size": 32, "batch": batch, "out": folder / "pairs"}
    flags |= {"train": 100 * batch, "test": 4 * batch, "concept": "sketch=draw it"}
    for flag, value in flags.items():
        sys.argv += [f"--{flag}", str(value)]
    pipeline.__call__ = slow
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        stage.main()
    pipeline.__call__ = plain
    inside = sum(end - start for start, end in calls)
    span = calls[-1][1] - calls[0][0]
    row = {"what": f"{size} pixels, batch {batch}", "calls": len(calls)}
    row["in the pipeline s"] = inside
    return {**row, "from first to last s": span, "own time %": 100 * (1 - inside / span)}


def memory(folder: Path, count: int) -> dict:
    """A row: seconds and peak memory of a run that takes 200 of `count` photos."""
    photos = folder / f"photos {count}"
    photos.mkdir()
    Image.effect_noise((320, 240), 60).convert("RGB").save(photos / "000000.jpg")
    for i in range(1, count):
        shutil.copyfile(photos / "000000.jpg", photos / f"{i:06}.jpg")
    flags = ["--images", photos, "--size", 64, "--train", 180, "--test", 20, "--concept", "wave"]
    start = time.perf_counter()
    run_stage(script("01"), folder, "--demo", *flags, "--out", folder / f"pairs {count}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    row = {"what": f"200 of {count:,} photos", "in all s": time.perf_counter() - start}
    return {**row, "peak memory MiB": peak}


# ---- Seconds to a given quality ------------------------------------------------------------------

SHORT = "--batch 1 --fid off --save-every 1000000 --device cpu"
WAYS = {
    "from scratch": "03 --no-text --width 16 --lr 1e-3",
    "adapter on a base": "04 --lr 3e-3 --samples all --rank 8 --layers all",
    "pruned to a quarter": "05 --generator e2gan --no-text --width 16 --lr 1e-3 --lr-search 2e-4"
    " --search-epochs 1 --epochs 3",
}


def bench_speedrun(args) -> tuple[str, list[dict]]:
    """Seconds of training until a stage reaches the goal: at most the perceptual distance on
    held-out photos that pix2pix has after --steps, and at most an L1, which is the larger of
    pix2pix's and that of the teacher's edits moved by six pixels. (That is a stroke's width;
    strokes beside their places have a larger L1 than blur.)

    A stage is run with 1.5 times as many --epochs until it reaches the goal; the seconds of its
    last run count. Medians of --rounds seeds, on the CPU. Runs found in --out are not repeated, so
    give another --out with other --pairs or --base."""
    args.out /= f"{args.concept}-{args.steps}-steps-{args.threads}-threads"
    climbs = {"pix2pix, resnet9": [pix2pix(args, seed) for seed in range(args.rounds)]}
    [before] = climbs.values()
    goal = {key: statistics.median(run[key] for run in before) for key in ("perceptual", L1)}
    edits = find(args, "test").pictures(0)[1].float()
    goal[L1] = max(goal[L1], (edits[..., 6:] - edits[..., :-6]).abs().mean().item())
    print(f"goal: {goal}", file=sys.stderr)
    for way in WAYS:
        climbs[way] = [climb(args, goal, way, seed) for seed in range(args.rounds)]
    rows = []
    for way, found in climbs.items():
        seconds = [run["training s"] for run in found]
        row = {"training": way, "least s": min(seconds), "most s": max(seconds)}
        row |= {key: statistics.median(run[key] for run in found) for key in found[0]}
        there = sum(all(run[key] <= most for key, most in goal.items()) for run in found)
        rows.append({**row, "got there": f"{there} of {len(found)}"})
        rows[-1]["x as fast"] = rows[0]["training s"] / row["training s"]
    return f"{args.concept}, {args.threads} threads", rows


def find(args, split: str) -> dataset.Pairs:
    return dataset.find_pairs(args.pairs, split, [args.concept]).cache(args.out / "cache")


def climb(args, goal: dict, way: str, seed: int) -> dict:
    """The measures of a stage's first run that reaches the goal."""
    (number, *flags), epochs, measured = WAYS[way].split(), args.epochs, {}
    flags += [*SHORT.split(), "--concept", args.concept, "--seed", seed, "--pairs", args.pairs]
    flags += ["--cache", args.out / "cache", *(["--base", args.base] if number == "04" else [])]
    while epochs < 400 and any(measured.get(key, math.inf) > most for key, most in goal.items()):
        out = args.out / f"{way} {seed} {epochs:.0f} epochs".replace(" ", "-")
        if not runs.files_below(out, "result.json"):
            more = ["--epochs", int(epochs), "--out", out, "--overwrite"]
            run_stage(script(number), Path(), *flags, *more, threads=args.threads)
        [file] = runs.files_below(out, "result.json")
        measured = summary(runs.read_json(file)["tables"])
        print(way, seed, measured, file=sys.stderr, flush=True)
        epochs *= 1.5
    return measured


def summary(tables: dict[str, list[dict]]) -> dict:
    found = {key: value for rows in tables.values() for row in rows for key, value in row.items()}
    seconds = found.get("training s") or found["search s"] + found["converge s"]
    steps = found.get("steps") or found["search steps"] + found["converge steps"]
    measures = {}
    for key, value in found.items():
        if key in (L1, "PSNR dB", "perceptual") or key.startswith("SWD"):
            measures[key] = value
    return {"training s": seconds, "steps": steps, **measures}


def pix2pix(args, seed: int) -> dict:
    """The measures of a plain pix2pix: resnet9, whole pictures, batch 1, PyTorch's own norms, fp32,
    a pass of the discriminator for real and one for fake pictures, L1 * 100, Adam at 2e-4."""
    file = args.out / f"pix2pix-{seed}.json"
    if file.exists():
        return runs.read_json(file)
    torch.set_num_threads(args.threads)
    cpu_way, common.trains_on_cpu = common.trains_on_cpu, lambda x: False
    torch.manual_seed(seed)
    train, test = find(args, "train"), find(args, "test")
    generator = common.new_generator("resnet9", 64, train.size, train.concepts)
    discriminator = common.new_discriminator(generator)
    opt_g = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    start = time.perf_counter()
    batches = train.batches(1, range(args.steps), seed, torch.device("cpu"))
    for step, (photo, edit, concept) in enumerate(tqdm(batches, total=args.steps)):
        training.set_lr(opt_g, 2e-4, step, args.steps)
        training.set_lr(opt_d, 2e-4, step, args.steps)
        fake = generator(photo, concept)
        real_score, fake_score = discriminator(photo, edit), discriminator(photo, fake.detach())
        loss_d = ((real_score - 1).square().mean() + fake_score.square().mean()) / 2
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        discriminator.requires_grad_(False)
        score = discriminator(photo, fake)
        loss_g = (score - 1).square().mean() + 100 * (fake - edit).abs().mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        discriminator.requires_grad_(True)
    seconds = time.perf_counter() - start
    common.trains_on_cpu = cpu_way
    common.save_network(file.with_suffix(".safetensors"), generator)
    row = {"training s": seconds, "steps": args.steps, **training.evaluate(generator, test)[0]}
    measured = summary({"": [row]})
    runs.write_json(file, measured)
    return measured


# ---- Steadiness ----------------------------------------------------------------------------------

SIGMA = 2.5  # of 255: a sensor's noise


def bench_steady(args) -> tuple[str, list[dict]]:
    """How far edits of held-out photos change, of 255, when a sensor's noise is added to the photo,
    and when the camera moves by one pixel (that edit is shifted back before it is compared). It
    measures --base, and the teacher `styles`, from whose edits the base must have been trained."""
    torch.manual_seed(0)
    generator = common.load_generator(args.base)
    stylize = load_stage("01").style_teacher()
    files = sorted((args.pairs / "test/source").iterdir())
    photos = torch.stack([dataset.read_image(file) for file in files])  # uint8 (N, 3, H, W)

    def teacher(pixels, name):
        pictures = [dataset.to_pil(picture) for picture in pixels]
        edits = stylize(pictures, [name] * len(pictures), None, None)
        return torch.stack([dataset.to_pixels(edit) for edit in edits])

    rows = []
    for concept in generator.config["concepts"]:
        name = concept["name"]
        number = generator.concept_index(name)
        edit = functools.partial(training.run_generator, generator, concept=number)
        row = {"concept": name, **changes(edit, photos, "")}
        rows.append(row | changes(functools.partial(teacher, name=name), photos, ", teacher"))
    return f"Mean change of {len(photos)} edits, 0 to 255, {photos.shape[-1]} pixels", rows


def changes(edit, photos: torch.Tensor, whose: str) -> dict[str, float]:
    """bench_steady's columns of one editor: edit takes and returns uint8 (N, 3, H, W)."""
    noisy = photos + SIGMA * torch.randn(photos.shape)
    noisy = noisy.round().clamp(0, 255).to(torch.uint8)
    panned = torch.cat([photos[..., :1], photos[..., :-1]], -1)  # a pixel to the right
    still = edit(photos).float()
    noise = (edit(noisy).float() - still).abs().mean().item()
    pan = (edit(panned).float()[..., 1:] - still[..., :-1]).abs().mean().item()
    return {f"noise{whose}": noise, f"pan{whose}": pan}


# ---- Beside other work ---------------------------------------------------------------------------


def bench_busy(args) -> tuple[str, list[dict]]:
    """A step of stage 3 (e2gan, its defaults, but --batch) beside 0, 1 and 4 processes that are
    never idle: with one thread, with --threads that wait spinning (OpenMP's default) or asleep, and
    as stage 3 chooses when it begins beside them. These ways take turns of two seconds: mean ms a
    step of the best turn of --rounds, and how many times the best way's that had the machine to
    itself."""
    asleep = {"OMP_WAIT_POLICY": "PASSIVE"}
    soon = {"GOMP_SPINCOUNT": "3000"}  # what runs.py sets
    many = {"OMP_NUM_THREADS": str(args.threads)}
    ways = {
        "1 thread": {"OMP_NUM_THREADS": "1"},
        f"{args.threads}, spinning": {**many, "GOMP_SPINCOUNT": "300000"},  # libgomp's default
        f"{args.threads}, asleep": {**many, **asleep},
        "as chosen": soon,
    }
    rows = []
    for width, size in itertools.product((16, 32, 64), (128, 256)):
        rows += beside_others(width, size, args.batch, ways, args.rounds)
    return f"A step of stage 3 beside other processes, {os.cpu_count()} cores", rows


def beside_others(width: int, size: int, batch: int, ways: dict, rounds: int) -> list[dict]:
    """bench_busy's rows of one width and size. ways: {name: environment variables}."""
    steppers = {name: Stepper(width, size, batch, env) for name, env in ways.items()}
    found = {others: best_turns(steppers, others, rounds) for others in (0, 1, 4)}
    alone = min(found[0].values())
    rows = []
    for others, ms in found.items():
        row = {"width": width, "pixels": size, "beside": others}
        for name in ways:
            row |= {f"{name}, ms": ms[name], f"{name}, x": ms[name] / alone}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    for stepper in steppers.values():
        stepper.end()
    return rows


class Stepper:
    """Stage 3 in a process of its own, which takes steps for a while when it is told to."""

    def __init__(self, width: int, size: int, batch: int, env: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, width, size, batch)
        self.process = context.Process(target=take_steps, args=arguments, daemon=True)
        inherited = {key: value for key, value in os.environ.items() if "OMP_" not in key}
        with unittest.mock.patch.dict(os.environ, {**inherited, **env}, clear=True):
            self.process.start()
        self.pipe.recv()

    def turn(self, seconds: float) -> float:
        """Mean ms of the steps that so many seconds hold, at least one."""
        self.pipe.send(seconds)
        return self.pipe.recv()

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def take_steps(pipe, width: int, size: int, batch: int) -> None:
    """Stage 3's own training, whose batches come when they are asked for."""
    training.tqdm = functools.partial(tqdm, file=io.StringIO())  # no bars
    stage = load_stage("03")
    photo, edit = torch.rand(2, batch, 3, size, size) * 2 - 1
    concept = torch.zeros(batch, dtype=torch.long)

    def choose_threads():
        """As a run that begins now, unless OMP_NUM_THREADS is set."""
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
            training.set_threads(torch.device("cpu"), generator, batch, size, Path(out))

    def batches(*_, **__):
        yield photo, edit, concept  # warms up
        yield photo, edit, concept
        pipe.send("ready")
        while True:
            seconds = pipe.recv()
            choose_threads()
            times = []
            while sum(times) < seconds:
                start = time.perf_counter()
                yield photo, edit, concept
                times.append(time.perf_counter() - start)
            pipe.send(1000 * statistics.mean(times))

    data = argparse.Namespace(batches=batches, size=size, counts=[batch])
    sys.argv = f"03 --width {width} --batch {batch} --half-size 0 --lr 1e-9 --steps 999999".split()
    flags = stage.parse()
    flags.l1, flags.out, flags.eval_every, flags.save_every = 10.0, None, 10**6, 10**6
    torch.manual_seed(0)
    generator = untrained("e2gan", width, size)
    stage.train_base(generator, common.new_discriminator(generator), data, data, flags)


def best_turns(steppers: dict[str, Stepper], others: int, rounds: int) -> dict[str, float]:
    """Each stepper's least ms a step of some turns, beside so many other processes."""
    context = multiprocessing.get_context("spawn")
    busy = [context.Process(target=never_idle, daemon=True) for _ in range(others)]
    for process in busy:
        process.start()
    if busy:
        time.sleep(5)  # until they have started
    turns = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            turns[name].append(stepper.turn(2.0))
    for process in busy:
        process.kill()
        process.join()
    return {name: min(found) for name, found in turns.items()}


def never_idle() -> None:
    while True:
        pass


# ---- Stage 5 -------------------------------------------------------------------------------------


def bench_prune(args) -> tuple[str, list[dict]]:
    """A step of a plain e2gan, of one whose weights hypernetworks compute (wanted: at most 1.25
    times the time and 1.5 times the memory), and of one sliced to a quarter of its MACs; each in a
    process of its own, on a CPU with one thread."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in ("plain", "search", "converge"):
        answer = context.SimpleQueue()
        process = context.Process(target=prune_steps, args=(name, args, answer))
        process.start()
        process.join()
        rows.append({"step": name, **answer.get()})
    for row in rows:
        row["x plain time"] = row["step ms"] / rows[0]["step ms"]
        row["x plain memory"] = row["peak MiB"] / rows[0]["peak MiB"]
    return f"Stage 5, {args.size} pixels, width {args.width}, batch {args.batch}", rows


def prune_steps(name: str, args, answer) -> None:
    """Measures a step like stage 5's: both networks' passes, losses and optimizers. Puts a row into
    the queue `answer`."""
    torch.set_num_threads(1)
    device = training.start(argparse.Namespace(device=args.device, seed=0))
    generator = untrained("e2gan", args.width, args.size).to(device)
    discriminator = common.new_discriminator(generator)
    latents = {}
    for group, n in common.all_widths(generator.config).items():
        latents[group] = torch.ones(n, device=device)
        if group in generator.config["widths"]:
            latents[group] = torch.nn.Parameter(torch.arange(n, 0, -1.0, device=device) / n)
    learned = [z for z in latents.values() if z.requires_grad]
    if name == "search":
        common.add_hypernetwork(generator, latents, trained=False)
    if name == "converge":
        target = load_stage("05").Target(generator, 0.25)
        own = {g: latents[g].detach() for g in generator.config["widths"]}
        generator = common.slice_network(generator, target.kept(own, 0.25))
    opt_g = training.adam([*generator.parameters(), *learned], 2e-4)
    opt_d = training.adam(discriminator.parameters(), 2e-4)
    scaler = training.grad_scaler(device, "bf16")  # does nothing
    photo, concept = generator.example(batch=args.batch, device=device)
    edit, text = torch.randn_like(photo), common.prompt_embedding(generator, concept)

    def step():
        discriminator.requires_grad_(False)
        with parametrize.cached():
            with training.autocast(device, args.precision):
                fake = generator(photo, concept)
                score = discriminator(photo, fake, text).float()
            l1 = (fake.float() - edit).abs().mean()
            loss_g = (score - 1).square().mean() + 100 * l1
        loss_g.backward()
        training.descend(opt_g, scaler)
        discriminator.requires_grad_(True)
        with training.autocast(device, args.precision):
            pictures, texts = torch.cat([edit, fake.detach()]), text.repeat(2, 1)
            scores = discriminator(photo.repeat(2, 1, 1, 1), pictures, texts).float()
        real_score, fake_score = scores.chunk(2)
        loss_d = (real_score - 1).square().mean() + fake_score.square().mean()
        loss_d.backward()
        training.descend(opt_d, scaler)
        discriminator.score.bias.sum().item()  # waits for a GPU

    step()
    ms = 1000 * least(step, args.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    answer.put({"step ms": ms, "peak MiB": peak})


# ---- Stage 6 -------------------------------------------------------------------------------------


def bench_onnx(args) -> tuple[str, list[dict]]:
    """Milliseconds of an edit by merged files (bytes, any size) of resnet9 and of --generator or,
    without one, of the other untrained architectures, e2gan also with all groups narrowed alike
    (wanted: at most 0.5 of resnet9's time); and by the folder of each that takes prompts (wanted:
    at most 1.03 of its file's time)."""
    stage, pruning = load_stage("06"), load_stage("05")
    networks = {"resnet9": untrained("resnet9", args.width, args.size)}
    for path in args.generator or []:
        networks[str(path)] = common.load_generator(path)
    if not args.generator:
        unet, e2gan = (untrained(arch, args.width, args.size) for arch in ("unet256", "e2gan"))
        networks |= {"unet256": unet, "e2gan": e2gan}
        alike = {g: 1 - torch.arange(n) / n for g, n in e2gan.config["widths"].items()}
        for share in (0.25, 0.08):
            kept = pruning.Target(e2gan, share).kept(alike, share)
            networks[f"e2gan, {share:.0%} of the MACs"] = common.slice_network(e2gan, kept)
    sessions, rows = {}, []
    photo = torch.randint(256, (1, 3, args.size, args.size), dtype=torch.uint8)
    for name, network in networks.items():
        graph = stage.trace(network.eval(), args.size, "uint8", True)
        data = stage.specialize(graph, network, 0).SerializeToString()
        merged = stage.open_file(data, args.threads)
        sessions[name, "file"] = merged.session, stage.feed(merged, photo)
        if network.takes_text:
            with tempfile.TemporaryDirectory() as folder:
                common.save_network(Path(folder, "generator.safetensors"), network)
                flags = {"generator": [Path(folder, "generator.safetensors")], "strength": 1.0}
                flags |= {"size": args.size, "threads": args.threads, "cdn": True}
                known = stage.load_concepts(*flags["generator"], [])
                Path(folder, "onnx").mkdir()
                flags = argparse.Namespace(**flags)
                editor = stage.build_folder(Path(folder, "onnx"), graph, known, flags)
                editor.use(next(iter(known)))
            sessions[name, "folder"] = editor.session, stage.feed(editor, photo)
    times, began = {key: [] for key in sessions}, time.perf_counter()
    while len(times["resnet9", "file"]) < 13 or time.perf_counter() - began < 10:
        # in any order: whoever runs before hits all alike
        for key in random.sample(list(sessions), len(sessions)):
            session, inputs = sessions[key]
            times[key].append(1000 * least(lambda: session.run(None, inputs), 1))  # noqa: B023
    ms = {key: statistics.median(found[3:]) for key, found in times.items()}
    for name, form in sessions:
        row = {"generator": name, "form": form, "ms": ms[name, form], "FPS": 1000 / ms[name, form]}
        row |= {"GMACs": common.count_macs(networks[name], args.size) / 1e9}
        row["/ resnet9"] = ms[name, form] / ms["resnet9", "file"]
        rows.append({**row, "/ file": ms[name, form] / ms[name, "file"]})
    return f"ONNX Runtime, {args.size} pixels, width {args.width}, {args.threads} threads", rows


EDITS = """async size => {
    const { Editor } = await import("/editor.js");
    const editor = await Editor.load();
    const photo = new ImageData(size, size);
    photo.data.forEach((_, i, data) => { data[i] = Math.random() * 256; });
    const times = [];
    for (let i = 0; i < 45; i++) {
        const start = performance.now();
        await editor.edit(photo);
        times.push(performance.now() - start);
    }
    return times.slice(5);
}"""


def bench_browser(args) -> tuple[str, list[dict]]:
    """Milliseconds of an edit of random pixels by each --folder, which stage 6 made: the median of
    40 calls of its editor.js in headless Chromium, after 5 that do not count. It needs Chromium and
    `pip install playwright`."""
    from playwright import sync_api  # only here: the project does not need it

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    rows = []
    for folder in args.folder or [Path("runs/onnx")]:
        command = [sys.executable, str(script("06")), "--out", str(folder), "--serve", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(server.kill)
            address = server.stdout.readline().split("open ")[1].split(",")[0]
            playwright = stack.enter_context(sync_api.sync_playwright())
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("figure[aria-busy=false]", timeout=120_000)
            ms = statistics.median(page.evaluate(EDITS, args.size))
            rows.append({"folder": folder, "ms": ms, "FPS": 1000 / ms, "Chromium": browser.version})
            browser.close()
    return f"An edit in a browser, {args.size} pixels, {os.cpu_count()} cores", rows


BENCHMARKS = {"distill": bench_distill, "busy": bench_busy, "speedrun": bench_speedrun}
BENCHMARKS |= {"prune": bench_prune, "onnx": bench_onnx, "steady": bench_steady}
BENCHMARKS |= {"browser": bench_browser}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    flag = parser.add_argument
    flag("name", choices=BENCHMARKS, help="what to measure")
    flag("--size", type=int, default=256, help="prune, onnx, browser: width and height in pixels")
    flag("--folder", type=Path, action="append", help="browser: stage 6's (runs/onnx); repeatable")
    flag("--width", type=int, default=64, help="prune, onnx: channels of the first layer")
    flag("--batch", type=int, default=4, help="prune, busy: pairs in a step's batch")
    flag("--device", default="auto", help="prune: stage 5's --device")
    flag("--precision", default="auto", help="prune: stage 5's --precision")
    rounds = "prune, busy: the best of this many counts; speedrun: how many seeds"
    flag("--rounds", type=int, default=3, help=rounds)
    flag("--generator", type=Path, action="append", help="onnx: a generator's file; repeatable")
    flag("--threads", type=int, default=2, help="onnx, busy, speedrun: threads of a process")
    flag("--pairs", type=Path, default="runs/pairs", help="speedrun, steady: stage 1's pairs")
    base = "speedrun, steady: stage 3's generator"
    flag("--base", type=Path, default="runs/base/generator.safetensors", help=base)
    flag("--concept", default="starry", help="speedrun: a concept that is new to --base")
    flag("--steps", type=int, default=240, help="speedrun: steps of plain pix2pix")
    flag("--epochs", type=float, default=1, help="speedrun: epochs of each stage's first run")
    flag("--out", type=Path, default="runs/speedrun", help="speedrun: folder of its runs")
    args = parser.parse_args()
    print(runs.markdown(*BENCHMARKS[args.name](args)), flush=True)


if __name__ == "__main__":
    runs.run(main)
