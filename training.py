"""What stages 3, 4 and 5 share around their steps: devices, the loop, losses, measures.

The step itself (the twenty lines of discriminator and generator that people edit) stands in each
stage; `Loop` is what goes around it. Every batch is a function of (seed, step) alone, so a run that
was killed continues and ends in the same bytes as one that was not.
"""

import datetime
import functools
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common
import dataset
import runs
from dataset import Pairs
from runs import UserError, average, barrier, explain, rank, world

LOG_EVERY = 50  # steps
OUTLIER = 5  # times the usual norm of gradients
NEW_DISCRIMINATOR = "do not go on with the one that lies beside the trained generator"
CROP = 128  # pixels of the crops to train on, where pictures are larger


def add_flags(parser: runs.Parser) -> None:
    """The flags that stages 3, 4 and 5 share."""
    flag, weight = parser.add_argument, runs.weight
    shared = "decoded pictures, shared by stages, seeds and processes; delete it when none runs"
    crop = f"pixels of random crops; 0: whole pictures (default: {CROP}, if they are larger)"
    fid = "auto: FID in the tables, if Inception's weights are in torch hub's cache or can be had"
    flag("--pairs", type=Path, default="runs/pairs", help="folder that stage 1 wrote")
    flag("--cache", type=Path, default="runs/cache", help=shared)
    flag("--crop", type=runs.number(int, 0), help=crop)
    flag("--batch", type=runs.count, default=16, help="pairs a step, all processes together")
    flag("--steps", type=runs.count, help="how many steps, in place of --epochs")
    flag("--lr-d", type=runs.positive, default=2e-4, help="the discriminator's learning rate")
    flag("--l1", type=weight, help="of the L1 loss (default: 10; with --fm 0 the papers' 100)")
    flag("--fm", type=weight, default=10.0, help="of feature matching; 0: the papers' plain loss")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: what is fast")
    flag("--fid", choices=["auto", "off"], default="auto", help=fid)
    flag("--save-every", type=runs.count, default=1000, help="steps between checkpoints")


def l1_weight(args) -> float:
    """--l1 or, where it was not given, 10 with feature matching and the papers' 100 without."""
    if args.l1 is not None:
        return args.l1
    return 10.0 if args.fm else 100.0


def crop_size(crop: int | None, size: int, whole: bool = False) -> int:
    """--crop or, where it was not given, CROP for larger pictures; 0 is whole pictures. size: the
    pictures'. whole: the network is one for whole pictures, such as a U-Net, which ends in one
    pixel. UserError where the crops would not fit."""
    if crop is None:
        return CROP if size > CROP and not whole else 0
    if whole and crop:
        raise UserError(f"--crop {crop}: this network takes whole pictures: give 0")
    if crop % 8 or crop > size or 0 < crop < 24:
        raise UserError(
            f"--crop {crop}: give a multiple of 8 from 24 to the pictures' {size}, or 0"
        )
    return crop


# ---- Devices and processes -----------------------------------------------------------------------


def start(args) -> torch.device:
    """Joins torchrun's processes where there are several, and seeds. Returns the device: `auto` is
    CUDA (one GPU a process under torchrun), else MPS, else the CPU."""
    name = args.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    with explain(f"--device {name} cannot be used"):
        device = torch.device(name)
        torch.empty(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes do not change
    if world() > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        hours = datetime.timedelta(hours=12)  # the others wait while the first measures
        distributed.init_process_group(backend, timeout=hours)
    torch.manual_seed(args.seed)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 has units of its own there; without them it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # also where ATEN_CPU_CAPABILITY=avx2 holds the machine back
    units = torch.cpu.get_capabilities()
    return bool(units.get("amx_bf16") or units.get("avx512_bf16"))


def autocast(device: torch.device, precision: str = "auto"):
    """A forward pass's context: bf16 where `precision` says so, or is auto and the hardware can."""
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def data_parallel(network: nn.Module) -> nn.Module:
    """The network under DDP, which averages its gradients over the processes while the backward
    pass goes on; in one process the network itself.

    Call what this returns wherever the network's own loss is computed. The generator's loss also
    passes through the discriminator, but may use its plain weights: they are frozen there, so there
    are no gradients to average, and the weights are the same in every process."""
    if world() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network)


# ---- A step --------------------------------------------------------------------------------------


def adam(parameters, lr: float) -> torch.optim.Adam:
    """pix2pix's optimizer, but for its second beta of 0.999, after which what learned nothing for a
    while leaps by 16 learning rates when it does (1.6 with 0.9); 0.9 makes finer strokes."""
    return torch.optim.Adam(parameters, lr, (0.5, 0.9), fused=True)


def descend(loss: torch.Tensor, optimizer: torch.optim.Adam) -> None:
    """One step of an optimizer down a loss. Gradients are freed after it, not before the next one:
    a hypernetwork's take as much memory as its weights."""
    loss.backward()
    limit_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def limit_gradients(optimizer: torch.optim.Adam) -> None:
    """Scales all gradients down to OUTLIER times their usual norm, which Adam's second moments tell
    (ours). On a flat crop one instance norm after the other divides by next to nothing: a norm of
    1e15 instead of 10, after which Adam would hardly move for hundreds of steps."""
    [group], found = optimizer.param_groups, optimizer.state
    known = [p for p in group["params"] if p.grad is not None and p in found]
    if not known:
        return
    squares = nn.utils.get_total_norm([found[p]["exp_avg_sq"] for p in known], 1.0)  # their sum
    usual = (squares / (1 - group["betas"][1] ** found[known[0]]["step"])).sqrt()
    norm = nn.utils.get_total_norm([p.grad for p in known])
    times = torch.where(usual > 0, norm / usual, 0)  # the usual norm; 0 tells nothing
    nn.utils.clip_grads_with_norm_(known, OUTLIER, times)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """pix2pix's schedule: constant for the first half of the steps, then linear to 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, 2 * (1 - step / steps))


# ---- The loop ------------------------------------------------------------------------------------


class Diverged(UserError):
    """Training whose numbers are no longer finite."""


class Loop:
    """What goes around a stage's steps: batches, Ctrl-C, the log, and the state to continue from.

        loop = Loop(args, data, steps, {"g": generator, "opt_g": opt_g}, out)
        for photo, edit, concept in loop:               # from where the state in `out` stopped
            ...                                         # loop.step: how many steps are done
            if loop.record({"G": loss_g, "D": loss_d}): # ends the step
                loop.save()                             # the first process, when it is time to

    Ctrl-C and SIGTERM wait until the step is done; then all processes stop, and the first one
    saves. Without `out` nothing is read or written. A stage may lower loop.steps to end sooner;
    loop.total stays what it was, for schedules."""

    def __init__(self, args, data, steps, parts: dict, out=None, name="", desc=""):
        """parts: modules and optimizers by name, all that a run needs to continue. name: begins
        the names of state, log and curve, where a stage has two loops."""
        self.args, self.data, self.out, self.desc = args, data, out, desc
        self.modules = nn.ModuleList(x for x in parts.values() if isinstance(x, nn.Module))
        self.device = next(self.modules.parameters()).device
        self.prefix, self.losses, self.seconds = f"{name}-" if name else "", [], 0.0
        self.state = out and out / f"{self.prefix}state.safetensors"
        self.parts = {**parts, "losses": self.losses}
        self.total = self.steps = steps
        self.start, self.rows = load_state(self.state, self.parts)
        self.step = self.rows[-1]["step"] if self.start == self.total and self.rows else self.start

    def __iter__(self) -> Iterator[tuple]:
        args, caught = self.args, []

        def catch(number, frame):
            if caught and world() == 1:  # a second signal does not wait
                raise KeyboardInterrupt
            caught.append(number)

        before = {n: signal.signal(n, catch) for n in (signal.SIGINT, signal.SIGTERM)}
        steps = range(self.start, self.total)
        self.bar = tqdm(desc=self.desc, initial=self.start, total=self.total, disable=rank() > 0)
        self.began = time.time()
        try:
            for batch in self.data.batches(args.batch, steps, args.seed, self.device, args.crop):
                torch.manual_seed((args.seed * 1_000_003 + self.step) * world() + rank())
                yield batch
                self.bar.update()
                self.began = time.time()
                if average(torch.tensor(float(len(caught)))) > 0:  # on the CPU: no GPU waits
                    self.save()
                    barrier()  # none ends before the first has saved
                    raise KeyboardInterrupt
                if self.step == self.steps:
                    break
        finally:
            self.bar.close()
            for n, handler in before.items():
                signal.signal(n, handler)

    def record(self, losses: dict[str, torch.Tensor], save: bool = False) -> bool:
        """Ends a step. Losses' means are logged every LOG_EVERY steps and when it is time to save:
        every --save-every steps, after the last, and where `save`. Whether this process should."""
        self.step += 1
        self.losses.append(torch.stack(list(losses.values())).detach())
        save = save or self.step == self.steps or self.step % self.args.save_every == 0
        if save or self.step % LOG_EVERY == 0:
            means = average(torch.stack([x.to(self.device) for x in self.losses]).mean(0)).tolist()
            finite = torch.stack([p.isfinite().all() for p in self.modules.parameters()]).all()
            if not finite or not all(map(math.isfinite, means)):  # before anything is written
                what = f"training diverged shortly before step {self.step}: a loss or a weight is"
                raise Diverged(f"{what} not finite. {self.out} keeps its last checkpoint, if any")
            self.rows.append({"step": self.step, **dict(zip(losses, means, strict=True))})
            self.bar.set_postfix({name: f"{x:.4g}" for name, x in zip(losses, means, strict=True)})
            self.losses.clear()
        self.seconds += time.time() - self.began  # what the stage does from here on is no training
        return save and rank() == 0

    def save(self) -> None:
        """Log, curve and state, by the first process."""
        if self.out and rank() == 0:
            log = "".join(json.dumps(row) + "\n" for row in self.rows)
            runs.write_text(self.out / f"{self.prefix}log.jsonl", log)
            if self.rows:
                write_curve(self.out / f"{self.prefix}curve.png", self.rows)
            done = self.total if self.step == self.steps else self.step
            save_state(self.state, done, self.parts, self.rows)

    def pace(self) -> dict:
        """Columns for a table. A resumed run knows only its part's seconds."""
        images = (self.step - self.start) * self.args.batch / self.seconds if self.seconds else None
        pace = {"steps": self.step, "batch": self.args.batch}
        return {**pace, "training s": None if self.start else self.seconds, "images/s": images}


def save_state(path: Path, step: int, parts: dict, rows: list[dict]) -> None:
    """What a run needs to continue after `step` steps: modules, optimizers, lists of tensors, and
    the log's rows."""
    tensors = {}
    for part, value in parts.items():
        state = dict(enumerate(value)) if isinstance(value, list) else value.state_dict()
        if isinstance(value, torch.optim.Optimizer):
            state = {f"{i}.{key}": x for i, e in state["state"].items() for key, x in e.items()}
        tensors |= {f"{part}/{key}": torch.as_tensor(x) for key, x in state.items()}
    runs.write_tensors(path, tensors, {"kind": "state", "step": step, "rows": rows})


def load_state(path: Path | None, parts: dict) -> tuple[int, list[dict]]:
    """Puts a saved state back into the same parts; returns steps and rows, none without a file."""
    if not path or not path.exists():
        return 0, []
    tensors, metadata = runs.read_tensors(path, "state")
    with explain(f"{path} is no state of this run (--overwrite starts again)"):
        for part, value in parts.items():
            keys = [key for key in tensors if key.startswith(f"{part}/")]
            state = {key.removeprefix(f"{part}/"): tensors[key] for key in keys}
            if isinstance(value, list):
                value[:] = [state[key] for key in sorted(state, key=int)]
            elif isinstance(value, torch.optim.Optimizer):
                whole = value.state_dict()
                for key, x in state.items():
                    index, name = key.split(".")
                    whole["state"].setdefault(int(index), {})[name] = x
                value.load_state_dict(whole)
            else:
                value.load_state_dict(state)
        rows = [{"step": int(row["step"]), **row} for row in metadata["rows"]]
        return int(metadata["step"]), rows


def feature_matching(fake: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean absolute difference of what a discriminator's layers make of fakes and of real pictures,
    the layers' mean (pix2pixHD, arXiv 1711.11585, equation 4; its scores left out)."""
    distances = [F.l1_loss(a.float(), b.float()) for a, b in zip(fake[:-1], real[:-1], strict=True)]
    return sum(distances) / len(distances)


# ---- Measures ------------------------------------------------------------------------------------


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images (B, 3, H, W) in [-1, 1] -> (B,).
    Peak: 2, the range's width."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def mean_psnr(fakes: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean PSNR in dB of uint8 pictures (N, 3, H, W)."""
    parts = zip(fakes.split(32), truth.split(32), strict=True)
    return torch.cat([psnr(*map(dataset.to_float, part)) for part in parts]).mean().item()


@torch.no_grad()
def run_generator(generator, photos: torch.Tensor, concept: int) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> uint8 edits, on the CPU, in fp32."""
    device, edits = next(generator.parameters()).device, []
    few = max(1, 2**16 // photos[0, 0].numel())  # 256x256 pixels, as a CPU's cache is small
    for part in photos.split(few if device.type == "cpu" else 32):
        index = torch.full((len(part),), concept, device=device)
        edits.append(dataset.to_uint8(generator(dataset.to_float(part.to(device)), index)).cpu())
    return torch.cat(edits)


def measure(fakes: torch.Tensor, photos: torch.Tensor, edits: torch.Tensor) -> dict:
    """Of edits, the teacher's and the photos, uint8 (N, 3, H, W): mean PSNR in dB, also of the
    photo left as it is, mean absolute error (0..255), SWD."""
    row = {"PSNR dB": mean_psnr(fakes, edits), "photo unchanged dB": mean_psnr(photos, edits)}
    parts = zip(fakes.split(32), edits.split(32), strict=True)
    sums = [(fake.short() - edit).abs().sum().item() for fake, edit in parts]
    row["L1 (0-255)"] = sum(sums) / fakes.numel()
    return row | swd(fakes, edits)


def error(row: dict) -> float:
    """What searches and best.safetensors go by, of measure's row: sqrt(mean SWD * L1). PSNR and L1
    prefer blur to strokes in the wrong place, SWD does not see places (a choice of ours)."""
    distances = [value for name, value in row.items() if name.startswith("SWD")]
    return math.sqrt(sum(distances) / len(distances) * row["L1 (0-255)"])


def evaluate(generator: common.Generator, pairs: Pairs, with_fid: bool = False) -> list[dict]:
    """A row of measures per concept of `pairs` and, if asked for, FID to the teacher's edits. The
    generator is left in eval mode."""
    generator.eval()
    rows, device = [], next(generator.parameters()).device
    for c, concept in enumerate(pairs.concepts):
        photos, edits = pairs.pictures(c)
        fakes = run_generator(generator, photos, generator.concept_index(concept["name"]))
        rows.append({"concept": concept["name"], **measure(fakes, photos, edits)})
        if with_fid:
            rows[-1]["FID"] = fid(fakes, edits, device)
    return rows


BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
PATCHES, PROJECTIONS = 128, 512  # of a picture; of a level's patches


def swd(fakes: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Sliced Wasserstein distance of 7x7 patches on a Laplacian pyramid (Karras et al. 2018,
    arXiv 1710.10196, section 5), * 1000: how far textures of one size are from the truth's,
    wherever they stand. {"SWD 256": finest, ..., "SWD 32": what is coarser}, of uint8 pictures
    (N, 3, H, W). Ours: patches of both lie at the same places, and the truth's normalise both."""
    levels = 1 + sum(min(fakes.shape[-2:]) >> k >= 32 for k in (1, 2, 3))
    patches, rng = [[] for _ in range(levels)], torch.Generator().manual_seed(0)
    blur = torch.outer(BLUR, BLUR).repeat(3, 1, 1, 1)  # (3, 1, 5, 5)
    for part in zip(fakes.split(32), truth.split(32), strict=True):
        x = dataset.to_float(torch.cat(part))  # (2n, 3, H, W): fakes, then truth
        for k in range(levels):
            band = x  # the last level is what is left
            if k < levels - 1:
                x = F.conv2d(F.pad(band, (2,) * 4, "reflect"), blur, stride=2, groups=3)
                band = band - F.interpolate(x, band.shape[-2:], mode="bilinear")
            patches[k].append(random_patches(band.unflatten(0, (2, -1)), rng))
    distances, rng = {}, torch.Generator().manual_seed(0)
    for k, parts in enumerate(patches):
        both = torch.cat(parts, 1)  # (2, N * PATCHES, 3, 49)
        mean, std = both[1].mean((0, 2), keepdim=True), both[1].std((0, 2), keepdim=True)
        directions = F.normalize(torch.randn(3 * 49, PROJECTIONS, generator=rng), dim=0)
        projections = directions.T @ ((both - mean) / std.clamp(min=1e-6)).flatten(2).mT
        fake, true = np.sort(projections.numpy())  # five times as fast as torch's
        distances[f"SWD {fakes.shape[-1] >> k}"] = 1000 * float(np.abs(fake - true).mean())
    return distances


def random_patches(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """(2, N, C, H, W) -> 7x7 patches (2, N * PATCHES, C, 49), of both at the same places."""
    n, _, h, w = x.shape[1:]
    rows, columns = (torch.randint(side - 6, (n, PATCHES), generator=rng) for side in (h, w))
    windows = x.unfold(3, 7, 1).unfold(4, 7, 1).movedim(2, 4)  # (2, N, H - 6, W - 6, C, 7, 7)
    return windows[:, torch.arange(n)[:, None], rows, columns].flatten(1, 2).flatten(3)


@torch.no_grad()
def fid(fakes: torch.Tensor, truth: torch.Tensor, device: torch.device) -> float | None:
    """What `python -m pytorch_fid` prints for two folders of these uint8 pictures (N, 3, H, W). It
    falls as the sets grow: compare only values of equal numbers. None where Inception's weights
    cannot be had, or for one picture."""
    network, features = inception(device), []
    if network is None or min(len(fakes), len(truth)) < 2:
        return None
    for pictures in (fakes, truth):
        maps = [network(part.to(device) / 255)[0] for part in pictures.split(50)]
        features.append(torch.cat(maps).mean((2, 3)).cpu().double().numpy())  # (N, 2048)
    return frechet_distance(*features)


@functools.cache
def inception(device: torch.device) -> nn.Module | None:
    """pytorch-fid's network; None, and one line that says why, without its weights."""
    from pytorch_fid import inception as library

    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their initial weights
            block = library.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
            return library.InceptionV3([block]).to(device).eval()
    except Exception as error:  # whatever urllib and torch.load raise
        cache = Path(torch.hub.get_dir(), "checkpoints")
        print(f"FID is left blank ({error!s:.200}); put {library.FID_WEIGHTS_URL} into {cache}")
        return None


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N, D), (M, D). With
    S = R'R the last trace is the sum of R1 R2' 's singular values: pytorch-fid's number to six
    digits, in a second instead of 25, and never an exception, as its roots of S1 S2 at times."""
    r1, r2 = (np.linalg.qr(x - x.mean(0), "r") / (len(x) - 1) ** 0.5 for x in (a, b))
    traces = (r1**2).sum() + (r2**2).sum() - 2 * np.linalg.norm(r1 @ r2.T, "nuc")
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces)


def progress_picture(generator, pairs: Pairs, per_concept: int = 2) -> Image.Image:
    """photo | teacher | model for the first photos of every concept."""
    rows, labels = [], []
    for c, concept in enumerate(pairs.concepts):
        photos, edits = pairs.pictures(c, per_concept)
        fakes = run_generator(generator.eval(), photos, generator.concept_index(concept["name"]))
        rows += zip(photos, edits, fakes, strict=True)
        labels += [concept["name"]] * len(photos)
    return dataset.picture_grid(rows, ["photo", "teacher", "model"], labels)


def write_curve(path: Path, rows: Sequence[dict]) -> None:
    """Draws a log over its steps: one panel for the losses, and one for each measure per concept,
    as in {"step": 50, "G": 9.1, "D": 0.2} and {"step": 288, "PSNR dB": {"sketch": 16.2}}."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[int, dict]]] = {}  # title -> [(step, {line: value})]
    for row in rows:
        losses = {key: value for key, value in row.items() if key != "step"}
        measures = {key: value for key, value in losses.items() if isinstance(value, dict)}
        for title, lines in (measures or {"loss": losses}).items():
            panels.setdefault(title, []).append((row["step"], lines))
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        steps, values = zip(*points, strict=True)
        for line in values[0]:
            axes.plot(steps, [lines[line] for lines in values], label=line)
        axes.set(title=title, xlabel="step", yscale="log" if title == "loss" else "linear")
        axes.legend()
    runs.replace_file(path, lambda part: figure.savefig(part, format="png", dpi=110))
