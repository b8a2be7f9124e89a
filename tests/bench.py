"""What the stages cost, measured: each name prints one Markdown table, `all` prints them all.
What is compared takes turns, and the best of the rounds counts.

    python tests/bench.py distill     stage 1's own time beside a diffusion pipeline's; its memory
    python tests/bench.py train       stage 3's images/s beside a plain loop's
    python tests/bench.py train --size 256 --width 64 --batch 4 --other ANOTHER_CHECKOUT
    python tests/bench.py lora        a step of stage 4 with an adapter and with all weights
    python tests/bench.py prune       time and memory of a search step of stage 5
    python tests/bench.py onnx        stage 6's files beside resnet9's; untrained networks, unless
    python tests/bench.py onnx --generator runs/base/generator.safetensors
"""

import argparse
import contextlib
import functools
import importlib.util
import multiprocessing
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (found by the line above)
import training  # noqa: E402

CONCEPTS = ["starry", "woodcut"]


def script(number: str, root: Path = ROOT) -> Path:
    return next(Path(root).resolve().glob(f"{number}_*.py"))


def load_stage(number: str):
    spec = importlib.util.spec_from_file_location(f"stage_{number}", script(number))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_stage(path: Path, folder: Path, *flags) -> None:
    """A stage with the demo's defaults in a process of its own."""
    command = [sys.executable, str(path), "--demo", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{path} failed:\n{done.stderr}")


def make_pairs(folder: Path, size: int, train: int = 96) -> Path:
    concepts = [flag for name in CONCEPTS for flag in ("--concept", f"{name}=make it {name}")]
    flags = ["--size", size, "--train", train, "--test", 2, *concepts, "--out", folder / "pairs"]
    run_stage(script("01"), folder, *flags)
    return folder / "pairs"


def least(call, rounds: int) -> float:
    """Least seconds of some calls that end in numbers on the CPU."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def setting(args) -> str:
    pixels = f"{args.size} pixels, width {args.width}, batch {args.batch}"
    return f"{pixels}, {args.precision}, {training.pick_device(args.device)}"


def untrained(arch: str, width: int, size: int) -> common.Generator:
    """e2gan as for a prompt of 9 tokens of ViT-B/32 (512 numbers each)."""
    concepts = [{"name": "a", "prompt": "a"}]
    tokens = [torch.randn(9, 512)] if arch == "e2gan" else None
    return common.new_generator(arch, width, size, concepts, tokens)


# ---- Stage 1 -------------------------------------------------------------------------------------


def bench_distill(_) -> tuple[str, list[dict]]:
    """The pipeline has a few thousand weights, and sleeps until each call has taken 50 ms, as the
    CPU may while a GPU works. Own time is what passes between its calls (wanted: 3 % at most)."""
    with tempfile.TemporaryDirectory() as name:
        rows = [own_time(Path(name), *each) for each in ((64, 1), (256, 1), (256, 4))]
        rows += [memory(Path(name), count) for count in (1_000, 100_000)]
    return "Stage 1", rows


def own_time(folder: Path, size: int, batch: int, seconds: float = 0.05) -> dict:
    import diffusers
    import tiny_pipelines

    stage, teacher = load_stage("01"), tiny_pipelines.instruct_pix2pix(folder / "pipeline")
    kind, calls = diffusers.StableDiffusionInstructPix2PixPipeline, []
    plain = kind.__call__

    @functools.wraps(plain)
    def slow(*args, **options):
        start = time.perf_counter()
        output = plain(*args, **options)
        time.sleep(max(0, seconds - (time.perf_counter() - start)))
        calls.append((start, time.perf_counter()))
        return output

    sys.argv = ["01", "--demo", "--teacher", str(teacher), "--overwrite"]
    flags = {"steps": 1, "size": size, "teacher-size": 32, "batch": batch, "out": folder / "pairs"}
    flags |= {"train": 100 * batch, "test": 4 * batch, "concept": "sketch=draw it"}
    for flag, value in flags.items():
        sys.argv += [f"--{flag}", str(value)]
    kind.__call__ = slow
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        stage.main()
    kind.__call__ = plain
    inside, span = sum(end - start for start, end in calls), calls[-1][1] - calls[0][0]
    row = {"what": f"{size} pixels, batch {batch}", "calls": len(calls)}
    row["in the pipeline s"] = inside
    return {**row, "from first to last s": span, "own time %": 100 * (1 - inside / span)}


def memory(folder: Path, count: int) -> dict:
    """Peak memory of a run that takes 200 of `count` photos."""
    photos = folder / f"photos {count}"
    photos.mkdir()
    Image.effect_noise((320, 240), 60).convert("RGB").save(photos / "000000.jpg")
    for i in range(1, count):
        shutil.copyfile(photos / "000000.jpg", photos / f"{i:06}.jpg")
    flags = ["--images", photos, "--size", 64, "--train", 180, "--test", 20, "--concept", "wave"]
    start = time.perf_counter()
    run_stage(script("01"), folder, *flags, "--out", folder / f"pairs {count}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    row = {"what": f"200 of {count:,} photos", "in all s": time.perf_counter() - start}
    return {**row, "peak memory MiB": peak}


# ---- Stage 3 -------------------------------------------------------------------------------------


def bench_train(args) -> tuple[str, list[dict]]:
    """Wanted: 0.97 of another checkout or more. The last column is what gathering a batch takes
    where nothing else runs; stage 3 does it beside the step before."""
    checkouts, device = {"stage 3": ROOT}, training.pick_device(args.device)
    if args.other:
        checkouts[f"stage 3 of {args.other}"] = args.other
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        pairs = make_pairs(Path(name), args.size)
        data = training.find_pairs(pairs, "train", CONCEPTS).cache(Path(name, "cache"))
        for _ in range(args.rounds):
            for loop, root in checkouts.items():
                rates.setdefault(loop, []).append(stage_3(root, pairs, args))
            rates.setdefault("plain loop", []).append(plain_loop(data, pairs, args, device))
        gather = least(lambda: list(data.batches(args.batch, range(20), 0, device)), 3) / 20
    best, rows = max(rates["stage 3"]), []
    for loop, found in rates.items():
        row = {"loop": loop, "step ms": 1000 * args.batch / max(found), "images/s": max(found)}
        rows.append({**row, "stage 3 / this": best / max(found)})
    rows[0]["gathering ms"] = 1000 * gather
    return f"Stage 3, {setting(args)}", rows


def stage_3(root: Path, pairs: Path, args) -> float:
    """Images/s of its own loop, as its table says."""
    epochs = -(-args.steps * args.batch // (96 * len(CONCEPTS)))
    flags = {"pairs": pairs, "width": args.width, "batch": args.batch, "precision": args.precision}
    flags |= {"device": args.device, "epochs": epochs, "eval-every": epochs, "save-every": 10**9}
    flags |= {"fm": 0, "crop": 0}  # what the plain loop does
    command = [part for name in CONCEPTS for part in ("--concept", name)]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    out = pairs.parent / "run"
    run_stage(script("03", root), pairs.parent, *command, "--overwrite", "--out", out)
    [row] = common.read_json(out / "result.json")["tables"]["Base generator"]
    shutil.rmtree(out)  # the checkouts' settings differ
    return row["images/s"]


def plain_loop(data, pairs: Path, args, device: torch.device) -> float:
    """Images/s of what one would write first: PNGs decoded in the loop, fp32, a pass of the
    discriminator each for real and fake, Adam as it comes, PyTorch's own layers."""
    cpu_way, common.trains_on_cpu = common.trains_on_cpu, lambda x: False
    torch.manual_seed(0)
    tokens, clip = training.prompt_tokens(pairs, data.concepts)
    new = "e2gan", args.width, data.size, data.concepts
    generator = common.new_generator(*new, tokens, clip).to(device)
    discriminator = common.new_discriminator(generator)
    opt_g = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    start = time.perf_counter()
    for step in range(args.steps):
        places, flips, concept = data.plan(step, args.batch, 0)
        pictures = []
        for place, flip in zip(places.T.flatten().tolist(), flips.T.flatten(), strict=True):
            picture = common.to_float(data.load(place))
            pictures.append(picture.flip(-1) if flip else picture)
        photo, edit = torch.stack(pictures).to(device).chunk(2)
        text = common.prompt_embedding(generator, concept.to(device))
        fake = generator(photo, concept.to(device))
        real_score = discriminator(photo, edit, text)
        fake_score = discriminator(photo, fake.detach(), text)
        loss_d = ((real_score - 1).square().mean() + fake_score.square().mean()) / 2
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        discriminator.requires_grad_(False)
        score = discriminator(photo, fake, text)
        loss_g = (score - 1).square().mean() + 100 * (fake - edit).abs().mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        discriminator.requires_grad_(True)
    loss_g.item()  # a GPU may still be at work
    common.trains_on_cpu = cpu_way
    return args.steps * args.batch / (time.perf_counter() - start)


# ---- Stage 4 -------------------------------------------------------------------------------------


def bench_lora(args, steps: int = 2) -> tuple[str, list[dict]]:
    """Wanted: no ratio above 1. One thread on a CPU."""
    stage, device = load_stage("04"), training.pick_device(args.device)
    torch.set_num_threads(1)
    flags = {"lr": 1e-3, "lr_d": 2e-4, "l1": 10.0, "fm": 10.0, "crop": 0, "seed": 0}
    flags["precision"] = args.precision
    flags |= {"batch": args.batch, "device": args.device}
    flags = argparse.Namespace(**flags, save_every=10**9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = training.find_pairs(make_pairs(folder, args.size, 16), "train", CONCEPTS[:1])
        pairs.cache(folder / "cache")
        base = untrained("e2gan", args.width, args.size)
        base.config = {**base.config, "concepts": pairs.concepts}
        common.save_network(folder / "base.safetensors", base)
        load = functools.partial(common.load_generator, folder / "base.safetensors", device)
        full, lora, plain, merged = (load() for _ in range(4))
        stage.add_lora(lora, stage.layer_ranks(stage.layer_shapes(lora), stage.PAPER_RANKS), 16.0)
        took: dict[str, list[float]] = {"full": [], "lora": []}
        for _ in range(args.rounds):
            for mode, generator in (("full", full), ("lora", lora)):
                call = functools.partial(stage.finetune, flags, generator, pairs, steps)
                took[mode].append(least(call, 1) / steps)
        rows = [compared("training step", took)]
        adapter = folder / "adapter.safetensors"
        stage.save_adapter(adapter, lora, CONCEPTS[0], load().sha256, 16.0)
        common.load_adapter(merged, adapter)
        common.merge(merged)
        photos, took = pairs.pictures(0, 32)[0], {"full": [], "lora": []}
        for _ in range(2 * args.rounds):
            for mode, generator in (("full", plain), ("lora", merged)):
                edit = functools.partial(training.run_generator, generator.eval(), photos, 0)
                took[mode].append(least(edit, 1))
        rows.append(compared(f"{len(photos)} edits, base and merged", took))
        swap = least(lambda: common.load_adapter(plain, adapter), 1)
        swap += least(lambda: common.unload_adapters(plain), 1)
        rows.append({"what": "load and unload an adapter", "lora ms": 1000 * swap})
    return f"Stage 4, {setting(args)}", rows


def compared(what: str, took: dict[str, list[float]]) -> dict:
    full, lora = min(took["full"]), min(took["lora"])
    row = {"what": what, "full ms": 1000 * full, "lora ms": 1000 * lora}
    return {**row, "lora / full": lora / full}


# ---- Stage 5 -------------------------------------------------------------------------------------


def bench_prune(args) -> tuple[str, list[dict]]:
    """A step of e2gan as it is, of one whose weights hypernetworks make (wanted: 1.25 times the
    time, 1.5 times the memory at most), and of one cut to a quarter of its MACs; each in a process
    of its own, one thread on a CPU."""
    context, rows = multiprocessing.get_context("spawn"), []
    for name in ("plain", "search", "converge"):
        answer = context.SimpleQueue()
        process = context.Process(target=prune_steps, args=(name, args, answer))
        process.start()
        process.join()
        rows.append({"step": name, **answer.get()})
    for row in rows:
        row["x plain time"] = row["step ms"] / rows[0]["step ms"]
        row["x plain memory"] = row["peak MiB"] / rows[0]["peak MiB"]
    return f"Stage 5, {setting(args)}", rows


def prune_steps(name: str, args, answer) -> None:
    """What costs something in a step of stage 5: both networks' passes, losses, Adam."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = training.pick_device(args.device)
    generator, latents = untrained("e2gan", args.width, args.size).to(device), {}
    discriminator = common.new_discriminator(generator)
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
    photo, concept = generator.example(batch=args.batch, device=device)
    edit, text = torch.randn_like(photo), common.prompt_embedding(generator, concept)

    def step():
        discriminator.requires_grad_(False)
        with parametrize.cached():
            with training.autocast(device, args.precision):
                fake = generator(photo, concept)
                score = discriminator(photo, fake, text).float()
            l1 = (fake.float() - edit).abs().mean()
            ((score - 1).square().mean() + 100 * l1).backward()
        opt_g.step()
        opt_g.zero_grad()
        discriminator.requires_grad_(True)
        with training.autocast(device, args.precision):
            pictures, texts = torch.cat([edit, fake.detach()]), text.repeat(2, 1)
            scores = discriminator(photo.repeat(2, 1, 1, 1), pictures, texts).float()
        real_score, fake_score = scores.chunk(2)
        loss_d = (real_score - 1).square().mean() + fake_score.square().mean()
        loss_d.backward()
        opt_d.step()
        opt_d.zero_grad()
        discriminator.score.bias.sum().item()  # a GPU may still be at work

    step()
    ms = 1000 * least(step, args.rounds)
    cuda, peak = device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak
    answer.put({"step ms": ms, "peak MiB": peak})


# ---- Stage 6 -------------------------------------------------------------------------------------


def bench_onnx(args) -> tuple[str, list[dict]]:
    """Merged files (bytes, any size) of resnet9 and of --generator, or of the untrained
    architectures, e2gan also with all groups narrowed alike (wanted of e2gan: 0.5 of resnet9's time
    at most); and a folder of each that takes a prompt (1.03 of its file's time at most)."""
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
    runs, rows = {}, []
    photo = torch.randint(256, (1, 3, args.size, args.size), dtype=torch.uint8)
    for name, network in networks.items():
        graph = stage.trace(network.eval(), args.size, "uint8", True)
        data = stage.specialize(graph, network, 0).SerializeToString()
        merged = stage.open_file(data, args.threads)
        runs[name, "file"] = merged.session, stage.feed(merged, photo)
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
            runs[name, "folder"] = editor.session, stage.feed(editor, photo)
    times, began = {key: [] for key in runs}, time.perf_counter()
    while len(times["resnet9", "file"]) < 13 or time.perf_counter() - began < 10:
        for key in random.sample(list(runs), len(runs)):  # whoever runs before hits all alike
            session, inputs = runs[key]
            times[key].append(1000 * least(lambda: session.run(None, inputs), 1))  # noqa: B023
    ms = {key: statistics.median(found[3:]) for key, found in times.items()}
    for name, form in runs:
        row = {"generator": name, "form": form, "ms": ms[name, form], "FPS": 1000 / ms[name, form]}
        row |= {"GMACs": common.count_macs(networks[name], args.size) / 1e9}
        row["/ resnet9"] = ms[name, form] / ms["resnet9", "file"]
        rows.append({**row, "/ file": ms[name, form] / ms[name, "file"]})
    return f"ONNX Runtime, {args.size} pixels, width {args.width}, {args.threads} threads", rows


BENCHMARKS = {
    **{"distill": bench_distill, "train": bench_train},
    **{"lora": bench_lora, "prune": bench_prune, "onnx": bench_onnx},
}
SMALL, LARGE = {"size": 64, "width": 32, "batch": 16}, {"size": 256, "width": 64, "batch": 4}


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    flag = parser.add_argument
    flag("name", choices=[*BENCHMARKS, "all"], help="what to measure")
    flag("--size", type=int, help="pixels (default: 64; prune, onnx: 256)")
    flag("--width", type=int, help="channels of the first layer (default: 32; prune, onnx: 64)")
    flag("--batch", type=int, help="pairs a step (default: 16; prune: 4)")
    flag("--steps", type=int, default=36, help="train's, at least (default: 36)")
    flag("--rounds", type=int, default=3, help="of which the best counts (default: 3)")
    flag("--precision", default="auto", help="as stage 3's")
    flag("--device", default="auto", help="as stage 3's")
    flag("--other", type=Path, metavar="FOLDER", help="train: another checkout to compare with")
    flag("--generator", type=Path, action="append", help="onnx: a generator's file")
    flag("--threads", type=int, default=2, help="onnx: the runtime's (default: 2)")
    given, threads = vars(parser.parse_args()), torch.get_num_threads()
    for name in BENCHMARKS if given["name"] == "all" else [given["name"]]:
        defaults = LARGE if name in ("prune", "onnx") else SMALL
        torch.set_num_threads(threads)
        flags = {**given, **{key: given[key] or value for key, value in defaults.items()}}
        print(common.markdown(*BENCHMARKS[name](argparse.Namespace(**flags))), flush=True)


if __name__ == "__main__":
    common.run(main)
