"""Stage 5: prunes a GAN while it trains, to the share of its MACs that you ask for (CoroNetGAN).

CoroNetGAN (arXiv 2403.08261), section 3. Searching: small hypernetworks make every weight from
latent vectors, one element a channel; after each step the latents are soft-thresholded, so channels
fade until the target is met: those that the loss needs least for their MACs (ours; --start paper:
those whose latents are small). Then the generated weights are sliced to the surviving channels: a
dense, smaller network, no hypernetwork left. Converging: that one trains on as usual.

`--task pix2pix` (paired): `--generator FILE` goes on with a trained base and its discriminator; an
architecture's name starts from scratch, as do `--task cyclegan` (unpaired) and dcgan (noise).

Reads   runs/pairs and runs/base/generator.safetensors, or --data, a folder as downloaded: of A|B
        side by side (train, test or val), of A and of B (trainA testA, train_A, A/train, or A
        alone), paired by their names or not, or of pictures (dcgan). Of each the middle square
Writes  runs/coronet/generator.safetensors  (cyclegan: generator_AtoB, generator_BtoA)
        discriminator.safetensors           what stage 4 goes on with
        sliced/*.safetensors, pruning.png   what the search left of these; channels
        search-*, converge-*, samples/*     each phase's state, log, curve, pictures; result.json

    python 05_prune_coronet.py --demo
    python 05_prune_coronet.py --generator runs/base/generator.safetensors --keep 0.25
    python 05_prune_coronet.py --task cyclegan --data horse2zebra --prune-discriminator --batch 1
    torchrun --nproc_per_node=8 05_prune_coronet.py --keep 0.25 --batch 128
"""

import argparse
import bisect
import contextlib
import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils import parametrize

import common
import dataset
import training
from runs import UserError

DEMO = {
    "width": 16,
    "batch": 1,
    "search_epochs": 1,
    "epochs": 3,
    "steps": 280,
    "lr": 1e-3,
    "lr_search": 2e-4,
    "fid": "off",
    "save_every": 210,
}
PHASE = 0.1  # of the search: importance is measured before; a channel fades; time left at the end
MEMORY = 100  # steps that the running mean of the channels' importance remembers
MAX_SHRINK = 0.05  # the most that a step shrinks a latent by, from the paper's start
POOL = 50  # CycleGAN's number of earlier fakes

# ---- What there is to keep: MACs as a formula, importance, the target ----------------------------

Channels = dict[str, torch.Tensor]  # {group: a number per channel, or channels' indices}


def mac_terms(network: common.Network) -> list[tuple[tuple, tuple, int]]:
    """common.count_macs as a formula in the widths, cheap enough to be solved for them at every
    step: (reads, writes, unit), the sum of channels(reads) * channels(writes) * unit."""
    terms = []

    def record(module, inputs, output):
        if isinstance(module, common.Attention):
            n, m = inputs[0].shape[1], inputs[1].shape[1]
            terms.extend([(module.q.writes, (), n * m), (module.v.writes, (), n * m)])
        else:
            x = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            positions = x.numel() // x.shape[-1 if isinstance(module, nn.Linear) else 1]
            unit = positions * module.weight[0, 0].numel()
            if isinstance(module, common.UpConv):
                unit = 16 * (inputs[0].shape[2] + 2) * (inputs[0].shape[3] + 2)
            terms.append((module.reads, module.writes, unit))

    twin = copy.deepcopy(network).to("meta").eval()
    for module in twin.modules():
        if hasattr(module, "reads") or isinstance(module, common.Attention):
            module.register_forward_hook(record)
    with torch.no_grad():
        twin(*twin.example())
    return terms


def macs_of(terms: list[tuple], widths: dict[str, int]) -> int:
    """mac_terms' formula for some widths, the fixed groups' too."""
    total = 0
    for reads, writes, unit in terms:
        outputs = sum(widths[g] for g in writes) if writes else 1
        total += sum(widths[g] for g in reads) * outputs * unit
    return total


def channel_importance(network: common.Network) -> Channels:
    """The RMS of the weights that write or read each channel, relative to its layer's, averaged
    over layers; mean 1 a group."""
    widths = common.all_widths(network.config)
    sums = {group: torch.zeros(n) for group, n in widths.items()}
    for _, module in common.named_layers(network):
        weight = common.out_first(module.weight.detach().cpu(), type(module))
        square = weight.square().reshape(*weight.shape[:2], -1).mean(2)  # (O, I)
        for groups, mean in ((module.writes, square.mean(1)), (module.reads, square.mean(0))):
            rms = mean.sqrt()
            for group, part in zip(groups, rms.split([widths[g] for g in groups]), strict=True):
                sums[group] += part / rms.mean()
    return {group: sums[group] / sums[group].mean() for group in network.config["widths"]}


class Target:
    """What widths cost in MACs, and which threshold on the latents brings them under a share."""

    def __init__(self, network: common.Network, keep: float, multiple: int = 1):
        """multiple: what `kept` rounds widths to."""
        self.config = network.config
        self.parameters = common.count_parameters(network)
        self.terms = mac_terms(network)
        self.full = common.all_widths(network.config)
        self.macs = macs_of(self.terms, self.full)
        self.multiple = multiple
        self.floor = {}
        for group, count in network.config["widths"].items():
            fewest = multiple * math.ceil(max(2, count // 16) / multiple)
            self.floor[group] = min(count, fewest)
        smallest = self.share({**self.full, **self.floor})
        if not smallest <= keep < 1:
            limits = f"give a share of the MACs from {smallest:.3f} to below 1"
            if multiple > 1:
                limits += f", of widths in multiples of {multiple}"
            raise UserError(f"--keep {keep}: {limits}")
        # no group gets less than two thirds of what it has where all are narrowed alike, as first-
        # order importance does not see what the last channels of a group are worth together
        alike = {g: torch.arange(1, n + 1) / n for g, n in network.config["widths"].items()}
        for group, width in self.widths(alike, self.threshold(alike, keep)).items():
            if group in self.floor:
                two_thirds = width * 2 // 3 // multiple * multiple
                self.floor[group] = max(self.floor[group], two_thirds)

    def share(self, widths: dict[str, int]) -> float:
        return macs_of(self.terms, widths) / self.macs

    def widths(self, latents: Channels, threshold: float) -> dict[str, int]:
        """How many channels of each group have a latent above the threshold, never fewer than the
        floor. Groups without latents stay whole."""
        widths = dict(self.full)
        for group, z in latents.items():
            above = int((z.abs() > threshold).sum())
            widths[group] = max(above, self.floor[group])
        return widths

    def threshold(self, latents: Channels, share: float) -> float:
        """The smallest threshold that brings the MACs to `share` or less: 0, or a latent's size."""
        sizes = torch.cat([torch.zeros(1), *(z.abs() for z in latents.values())])
        sizes = sizes.unique().tolist()  # sorted

        def is_enough(threshold: float) -> bool:
            return self.share(self.widths(latents, threshold)) <= share

        return sizes[bisect.bisect_left(sizes, True, key=is_enough)]

    def kept(self, latents: Channels, share: float) -> Channels:
        """{group: sorted indices} of the largest latents such that the MACs come to `share` or just
        less: to the last channel that fits, which may be a hundredth of all MACs. With a multiple,
        to the last so many channels that fit; a group that stays whole stays as it is."""
        widths = self.widths(latents, self.threshold(latents, share))
        order = {}
        for group, z in latents.items():
            order[group] = z.abs().sort(descending=True, stable=True)

        for group in latents:
            if widths[group] < self.full[group]:
                down = widths[group] // self.multiple * self.multiple
                widths[group] = max(down, self.floor[group])

        def next_width(group: str) -> int:
            return min(widths[group] + self.multiple, self.full[group])

        def more_fit(group: str) -> bool:
            more = {**widths, group: next_width(group)}
            return widths[group] < self.full[group] and self.share(more) <= share

        def next_latent(group: str) -> float:
            return order[group].values[widths[group]].item()

        candidates = list(filter(more_fit, latents))
        while candidates:
            chosen = max(candidates, key=next_latent)
            widths[chosen] = next_width(chosen)
            candidates = list(filter(more_fit, latents))
        kept = {}
        for group in latents:
            kept[group] = order[group].indices[: widths[group]].sort().values
        return kept


# ---- CoroNetGAN: latents, the soft threshold, slicing --------------------------------------------


def add_latents(network: common.Network, start: str) -> None:
    """A latent vector per channel group, which the search shrinks, and hypernetworks that make all
    of the network's weights from them.

    start "paper": latents of N(0, 1), and random weights. "weights" (a choice of ours): latents of
    1 and the network's own weights, so that nothing is said yet about which channel goes first."""
    device = next(network.parameters()).device
    latents, importance = {}, {}
    for group, count in network.config["widths"].items():
        latents[group] = torch.randn(count) if start == "paper" else torch.ones(count)
        importance[group] = nn.Parameter(torch.zeros(count), requires_grad=False)
    # both are saved with the network
    network.latents = nn.ParameterDict(latents).to(device)
    network.importance = nn.ParameterDict(importance).to(device)
    sources = {}  # every group's latents; ones for groups that are never pruned
    for group, count in common.all_widths(network.config).items():
        sources[group] = torch.ones(count, device=device)
    sources.update(network.latents)
    common.add_hypernetwork(network, sources, trained=start == "weights")


@torch.no_grad()
def measure_importance(network: common.Network, step: int) -> None:
    """Updates the running mean of (z dL/dz)^2, from the gradients that this step left.

    To first order z dL/dz is what the loss would lose with the channel (Molchanov et al. 2017,
    arXiv 1611.06440; squared: 2019, arXiv 1906.10771). A channel at 0 keeps what it had last, and
    all do where fp16 overflowed."""
    newest = max(1 / (step + 1), 1 / MEMORY)
    for group, z in network.latents.items():
        found = (z * z.grad).square()
        mean = network.importance[group]
        counts = (z != 0) & found.isfinite()
        mean.lerp_(torch.where(counts, found, mean), newest)


def copy_to_cpu(networks: dict[str, common.Network]) -> dict[str, tuple[Channels, Channels]]:
    """The latents of networks and their importance, by the networks' names. All in one copy: a GPU
    is waited for at each."""
    vectors = []
    for network in networks.values():
        for channels in (network.latents, network.importance):
            vectors.extend(vector.detach() for vector in channels.values())
    copies = iter(torch.cat(vectors).cpu().split([len(vector) for vector in vectors]))
    found = {}
    for name, network in networks.items():
        latents = {group: next(copies) for group in network.latents}
        importance = {group: next(copies) for group in network.importance}
        found[name] = latents, importance
    return found


def latent_worth(target: Target, latents: Channels, importance: Channels) -> Channels:
    """What each channel is worth to the loss for each of its MACs; those at 0 come last.

    The square root of the importance is the change of the loss without the channel. What a group's
    channels do to the loss adds up, and the loss is taken to grow with the square of the sum: the
    next channel's part in it is its own change times that of all which went, or go, before it, so
    that a group is worth the more, the less is left of it (a choice of ours)."""
    living = target.widths(latents, 0.0)
    worth = {}
    for group, z in latents.items():
        change = importance[group].sqrt()
        order = torch.where(z == 0, -1.0, change).argsort(stable=True)  # the first to go first
        so_far = torch.empty_like(change)
        so_far[order] = change[order].cumsum(0)
        one_less = {**living, group: living[group] - 1}
        macs = target.share(living) - target.share(one_less)
        value = change * so_far / macs
        worth[group] = torch.where(z == 0, 1e-30 * value, value.clamp(min=1e-20))
    return worth


def share_at(step: int, steps: int, keep: float) -> float:
    """The share of the MACs that the search aims at after a step: 1 while it measures importance,
    then a straight line to `keep`, which leaves time for the last channels to fade."""
    line = (step / steps - PHASE) / (1 - 3 * PHASE)
    return 1 - (1 - keep) * min(1.0, max(0.0, line))


def paper_amounts(target: Target, latents: Channels, share: float) -> Channels:
    """How much a step shrinks each latent, from the paper's start: all by the same threshold.

    The paper's is lambda * lr with a constant lambda. Here it is the smallest that brings the MACs
    to `share`, or MAX_SHRINK (a choice of ours: it meets any target)."""
    threshold = min(target.threshold(latents, share), MAX_SHRINK)
    return {group: torch.full_like(z, threshold) for group, z in latents.items()}


def weighted_amounts(
    target: Target, latents: Channels, importance: Channels, share: float, fade: float
) -> Channels:
    """How much a step shrinks each latent, from the network's own weights: by `fade` the channels
    that are worth least, without which the MACs come to `share`, and the others by 0.

    This is the adaptive lasso's idea (Zou 2006): an l1 norm whose weights are small where a channel
    matters, so that it takes channels away and does not make all of them weaker."""
    worth = latent_worth(target, latents, importance)
    widths = target.widths(worth, target.threshold(worth, share))
    amounts = {}
    for group, value in worth.items():
        amounts[group] = torch.full_like(value, fade)
        stay = value.argsort(descending=True)[: widths[group]]
        amounts[group][stay] = 0.0
    return amounts


@torch.no_grad()
def soft_threshold(network: common.Network, latents: Channels, amounts: Channels) -> Channels:
    """The proximal step of an l1 norm with a weight for each channel: z <- sign(z) max(|z| -
    amount, 0). latents: the network's, on the CPU. Returns the new ones there."""
    shrunk = {}
    for group, z in latents.items():
        shrunk[group] = z.sign() * (z.abs() - amounts[group]).clamp(min=0)
        network.latents[group].copy_(shrunk[group])
    return shrunk


def shrink_latents(
    networks: dict[str, common.Network], targets: dict[str, Target], args, step: int, steps: int
) -> dict[str, float]:
    """What the search does to the latents after each of its steps. Returns the share of the MACs
    that each network has left. In the last tenth of the steps what has not faded goes at once, so
    that the target is met (but from the paper's start, where slicing sees to that)."""
    share = share_at(step, steps, args.keep)
    fade = 1 / (PHASE * steps) if step <= (1 - PHASE) * steps else math.inf
    left = {}
    for name, (latents, importance) in copy_to_cpu(networks).items():
        target = targets[name]
        if args.start == "paper":
            amounts = paper_amounts(target, latents, share)
        else:
            amounts = weighted_amounts(target, latents, importance, share, fade)
        shrunk = soft_threshold(networks[name], latents, amounts)
        left[name] = target.share(target.widths(shrunk, 0.0))
    return left


def channel_scores(network: common.Network, target: Target, args) -> Channels:
    """What channels are kept by, the largest first, on the CPU. coronet: the latents' worth, or
    from the paper's start their size. To compare with, magnitude: the size of a channel's weights;
    uniform: the same, but all groups are narrowed alike; random: chance."""
    if args.method == "coronet":
        latents, importance = copy_to_cpu({"network": network})["network"]
        return latents if args.start == "paper" else latent_worth(target, latents, importance)
    if args.method == "random":
        rng = torch.Generator().manual_seed(args.seed)
        widths = network.config["widths"]
        return {group: torch.rand(count, generator=rng) for group, count in widths.items()}
    scores = channel_importance(network)
    if args.method == "uniform":
        for group, size in scores.items():
            rank = size.argsort().argsort()
            scores[group] = (1 + rank) / len(size)
    return scores


@torch.no_grad()
def bring_back(network: common.Network) -> None:
    """Latents of 0 become 1 again, for the few channels that still fit when the others are chosen:
    each has the weights with which it faded."""
    for z in network.latents.values():
        z[z == 0] = 1.0


def slice_networks(task, targets: dict[str, Target], args) -> None:
    """Puts dense, smaller networks in the place of those that have a target."""
    for name, target in targets.items():
        network = task.networks[name]
        kept = target.kept(channel_scores(network, target, args), args.keep)
        if args.method == "coronet":
            if args.start == "weights":
                bring_back(network)
            common.merge(network)  # the weights that the hypernetworks make
            del network.latents, network.importance
        task.networks[name] = common.slice_network(network, kept)


# ---- Training: search, then converge -------------------------------------------------------------


@contextlib.contextmanager
def frozen(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the networks' parameters take no gradients."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def weights_of(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that train, without the latents, which have an optimizer of their own."""
    found = []
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and not name.startswith("latents."):
                found.append(parameter)
    return found


def gan_step(task, loop: training.Loop, batch, opt_g, opt_d) -> dict[str, torch.Tensor]:
    """A step of the generators, then one of the discriminators; in this order the generators'
    activations are gone when the discriminators' pass begins. Returns losses for the log.

    Hypernetworks make each weight once a pass (parametrize.cached), however often it is used."""
    args, device = loop.args, loop.device
    micro_batches = loop.micro_batches(batch)
    made = []  # each micro-batch's fakes
    losses = []
    with frozen(task.named("discriminator").values()):
        for part in micro_batches:
            with parametrize.cached(), training.autocast(device, args.precision):
                fakes = task.fakes(part)
                loss_g, row = task.generator_loss(part, fakes)
            loop.scaler.scale(loss_g / args.accumulate).backward()
            made.append([fake.detach() for fake in fakes])
            losses.append({"G": loss_g, **row})
        training.descend(opt_g, loop.scaler)
    for part, fakes, row in zip(micro_batches, made, losses, strict=True):
        with parametrize.cached(), training.autocast(device, args.precision):
            loss_d = task.discriminator_loss(part, fakes)
        loop.scaler.scale(loss_d / args.accumulate).backward()
        row["D"] = loss_d
    training.descend(opt_d, loop.scaler)
    return training.mean_losses(losses)


def search(task, targets: dict[str, Target], data, test, args, steps: int, trained=False) -> dict:
    """The first phase: trains, shrinking latents until all targets are met, and slices. Returns its
    pace as columns of a table.

    The methods to compare with have no latents: they are sliced first, and have all steps to train
    what is left, but for `magnitude` of a new network, whose weights say nothing yet. A run that is
    continued while it converges replays the end: no step is left, and the channels are the same."""
    searches = args.method == "coronet"
    cut_first = not searches and (trained or args.method != "magnitude")
    if searches:
        for name in targets:
            add_latents(task.networks[name], args.start)
    if cut_first:
        slice_networks(task, targets, args)
    lr = args.lr_search if searches else args.lr
    opt_g = training.adam(weights_of(task.named("generator").values()), lr)
    opt_d = training.adam(weights_of(task.named("discriminator").values()), args.lr_d)
    parts = {"task": task, **task.pools, "opt_g": opt_g, "opt_d": opt_d}
    if searches:
        vectors = [z for name in targets for z in task.networks[name].latents.values()]
        opt_z = torch.optim.SGD(vectors, args.lr_z, momentum=0.9)
        parts["opt_z"] = opt_z
    loop = training.Loop(args, data, steps, parts, args.out, name="search", desc="search")
    task.distribute(args.compile)
    task.train()
    for batch in loop:
        losses = gan_step(task, loop, batch, opt_g, opt_d)
        if searches:
            loop.scaler.unscale_(opt_z)
            for name in targets:
                network = task.networks[name]
                latents = list(network.latents.values())
                nn.utils.clip_grad_norm_(latents, training.MAX_NORM)  # or one odd crop would decide
                measure_importance(network, loop.step)
                nn.utils.clip_grad_norm_(latents, 1.0)
            loop.scaler.step(opt_z)
            opt_z.zero_grad()
            done = loop.step + 1
            pruned = {name: task.networks[name] for name in targets}
            left = shrink_latents(pruned, targets, args, done, steps)
            if max(left.values()) <= args.keep:
                loop.finish()
            if loop.finished or done == steps or done % max(1, steps // 50) == 0:
                percent = {name: 100 * part for name, part in left.items()}
                loop.log({"MACs %": percent}, done)
        if loop.record(losses):
            save_progress(loop, task, test, "search")
    if not cut_first:
        slice_networks(task, targets, args)
    return {"search steps": loop.step, "search s": loop.pace()["training s"]}


def converge(task, data, test, args, steps: int) -> dict:
    """The second phase: trains the small networks as usual. Returns its pace as columns of a
    table."""
    opt_g = training.adam(weights_of(task.named("generator").values()), args.lr)
    opt_d = training.adam(weights_of(task.named("discriminator").values()), args.lr_d)
    parts = {"task": task, **task.pools, "opt_g": opt_g, "opt_d": opt_d}
    loop = training.Loop(args, data, steps, parts, args.out, name="converge", desc="converge")
    task.distribute(args.compile)
    task.train()
    for batch in loop:
        training.set_lr(opt_g, args.lr, loop.step, steps)
        training.set_lr(opt_d, args.lr_d, loop.step, steps)
        losses = gan_step(task, loop, batch, opt_g, opt_d)
        if loop.record(losses):
            save_progress(loop, task, test, "converge")
    return {"converge steps": loop.step, "converge s": loop.pace()["training s"]}


def save_progress(loop: training.Loop, task, test, phase: str) -> None:
    """A picture, and the state to continue from."""
    runs.write_png(loop.out / f"samples/{phase}-{loop.step:07d}.png", task.picture(test))
    loop.save()
    task.train()


# ---- The tasks: networks, losses, measures ------------------------------------------------------


class Task(nn.Module):
    """A GAN to prune: networks whose names begin "generator" or "discriminator", and for a batch
    (pictures, ..., concept) its fakes and its two losses. pools: lists that are saved with it."""

    def __init__(self, networks: dict[str, common.Network]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.pools = {}

    def distribute(self, compiled: bool) -> None:
        """Makes of each network what training calls: self.ddp, under DDP, where the network's own
        loss is computed, and self.alone, without, where another's is. compiled: --compile."""
        self.ddp = {}
        self.alone = {}
        for name, network in self.networks.items():
            self.alone[name] = training.compiled(network, compiled)
            self.ddp[name] = training.data_parallel(self.alone[name])

    def named(self, beginning: str) -> dict[str, common.Network]:
        """The networks whose names begin so."""
        return {name: x for name, x in self.networks.items() if name.startswith(beginning)}


def least_squares(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, from its scores."""
    return ((real.float() - 1).square().mean() + fake.float().square().mean()) / 2


class Pix2pix(Task):
    """Photo -> edit, and a PatchGAN that sees both; stage 3's losses."""

    def __init__(self, args, data: dataset.Pairs, trained: common.Generator | None):
        tokens, clip = None, ""
        if args.generator == "e2gan" and not args.data and not args.no_text:
            tokens, clip = dataset.prompt_tokens(args.pairs, data.concepts)
        generator = trained or common.new_generator(
            args.generator, args.width, data.size, data.concepts, tokens, clip
        )
        size = generator.config["size"]
        if size != data.size:
            raise UserError(f"{args.generator} was trained at {size} pixels; here are {data.size}")
        discriminator = common.new_discriminator(generator)
        if trained and not args.new_discriminator:
            discriminator = common.base_discriminator(Path(args.generator), generator)
        super().__init__({"generator": generator, "discriminator": discriminator})
        self.args = args
        indices = [generator.concept_index(concept["name"]) for concept in data.concepts]
        self.register_buffer("concept_indices", torch.tensor(indices), persistent=False)

    def text(self, concept):
        return common.prompt_embedding(self.networks["generator"], self.concept_indices[concept])

    def fakes(self, batch):
        photo, _, concept = batch
        return [self.ddp["generator"](photo, self.concept_indices[concept])]

    def distribute(self, compiled):
        super().distribute(compiled)
        self.features = training.compiled(self.networks["discriminator"].features, compiled)

    def generator_loss(self, batch, fakes):
        photo, edit, concept = batch
        text = self.text(concept)
        features = self.features(photo, fakes[0], text)
        with torch.no_grad():
            real = self.features(photo, edit, text) if self.args.fm else features
        gan = (features[-1].float() - 1).square().mean()
        l1 = F.l1_loss(fakes[0].float(), edit)
        fm = training.feature_matching(features, real)
        loss = gan + self.args.l1 * l1 + self.args.fm * fm
        losses = {"L1": l1, "FM": fm}
        if self.args.perceptual:
            losses["P"] = training.perceptual_distance(fakes[0], edit).mean()
            loss = loss + self.args.perceptual * losses["P"]
        return loss, losses

    def discriminator_loss(self, batch, fakes):
        photo, edit, concept = batch
        discriminator, text = self.ddp["discriminator"], self.text(concept)
        real = discriminator(photo, edit, text)
        return least_squares(real, discriminator(photo, fakes[0], text))

    def measure(self, test, with_fid: bool) -> list[dict]:
        return training.evaluate(self.networks["generator"], test, with_fid)

    def picture(self, test):
        return training.progress_picture(self.networks["generator"], test)


class CycleGan(Task):
    """Unpaired pictures of two kinds: two generators, and two PatchGANs that see the picture alone.
    Least-squares GAN + 10 times the L1 of coming back + half of that for changing what is on the
    other side already; the discriminators see new and earlier fakes (CycleGAN)."""

    def __init__(self, args, data, trained=None):
        networks = {}
        for way in ("AtoB", "BtoA"):
            new = args.generator, args.width, data.size, [{"name": way, "prompt": way}]
            networks[f"generator_{way}"] = generator = common.new_generator(*new)
        for side in "BA":
            networks[f"discriminator_{side}"] = common.new_discriminator(generator, photo=False)
        super().__init__(networks)
        self.pools = {"pool_A": [], "pool_B": []}
        self.cycle = args.cycle
        self.identity = args.identity

    def fakes(self, batch):
        a, b, _ = batch
        if not self.identity:
            return [self.ddp["generator_AtoB"](a), self.ddp["generator_BtoA"](b)]
        to_b, same_b = self.ddp["generator_AtoB"](torch.cat([a, b])).chunk(2)
        to_a, same_a = self.ddp["generator_BtoA"](torch.cat([b, a])).chunk(2)
        return [to_b, to_a, same_b, same_a]

    def generator_loss(self, batch, fakes):
        a, b, _ = batch
        to_b, to_a, *same = fakes
        gan = (self.alone["discriminator_B"](None, to_b).float() - 1).square().mean()
        gan = gan + (self.alone["discriminator_A"](None, to_a).float() - 1).square().mean()
        cycle = F.l1_loss(self.ddp["generator_BtoA"](to_b).float(), a)
        cycle = cycle + F.l1_loss(self.ddp["generator_AtoB"](to_a).float(), b)
        identity = sum(F.l1_loss(x.float(), y) for x, y in zip(same, (b, a), strict=False))
        return gan + self.cycle * (cycle + self.identity * identity), {"cycle": cycle / 2}

    def discriminator_loss(self, batch, fakes):
        loss = 0
        for side, picture, fake in (("A", batch[0], fakes[1]), ("B", batch[1], fakes[0])):
            discriminator = self.ddp[f"discriminator_{side}"]
            earlier = swap(self.pools[f"pool_{side}"], fake)
            loss = loss + least_squares(discriminator(None, picture), discriminator(None, earlier))
        return loss

    def measure(self, test, with_fid: bool) -> list[dict]:
        """A row per direction; SWD to the other kind's pictures, PSNR only where they are pairs."""
        rows = []
        a = test.pictures(0)
        b = test.pictures(1)
        device = next(self.parameters()).device
        for way, back, x, y in (("AtoB", "BtoA", a, b), ("BtoA", "AtoB", b, a)):
            there = self.networks[f"generator_{way}"].eval()
            home = self.networks[f"generator_{back}"].eval()
            fake = training.run_generator(there, x, 0)
            row = {"direction": way}
            if test.paired:
                row["PSNR dB"] = training.mean_psnr(fake, y)
                row["picture unchanged dB"] = training.mean_psnr(x, y)
            if with_fid:
                row["FID"] = training.fid(fake, y, device)
            again = training.run_generator(home, fake, 0)
            row["PSNR dB there and back"] = training.mean_psnr(again, x)
            n = min(len(x), len(y))
            rows.append(row | training.swd(fake[:n].to(device), y[:n].to(device)))
        return rows

    def picture(self, test):
        rows, labels = [], []
        for number, way in enumerate(("AtoB", "BtoA")):
            x = test.pictures(number)
            fake = training.run_generator(self.networks[f"generator_{way}"].eval(), x[:4], 0)
            rows += zip(x[:4], fake, strict=True)
            labels += [way] * len(fake)
        return dataset.picture_grid(rows, ["picture", "made of it"], labels)


def swap(pool: list[torch.Tensor], fakes: torch.Tensor) -> torch.Tensor:
    """fakes (B, 3, S, S) -> as many: once the pool of earlier fakes is full, half of them replaced
    by some of these, whose places they take (CycleGAN)."""
    given = []
    for fake in fakes.detach().float():
        if len(pool) < POOL:
            pool.append(fake.clone())
        elif torch.rand(()) < 0.5:
            i = int(torch.randint(POOL, ()))
            pool[i], fake = fake.clone(), pool[i].to(fake.device)
        given.append(fake)
    return torch.stack(given)


class Dcgan(Task):
    """Pictures from noise: DCGAN's generator and discriminator, cross entropy."""

    def __init__(self, args, data, trained=None):
        super().__init__(common.dcgan_networks(args.width, data.size))

    def fakes(self, batch):
        noise = torch.randn(len(batch[0]), common.FIXED["noise"], device=batch[0].device)
        return [self.ddp["generator"](noise)]

    def generator_loss(self, batch, fakes):
        return F.softplus(-self.alone["discriminator"](fakes[0]).float()).mean(), {}

    def discriminator_loss(self, batch, fakes):
        # not one pass: batch norm would mix their statistics
        real, fake = (self.ddp["discriminator"](x).float() for x in (batch[0], fakes[0]))
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @torch.no_grad()
    def samples(self, count: int) -> torch.Tensor:
        """uint8 (count, 3, S, S), from noise that is always the same."""
        generator = self.networks["generator"].eval()
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(count, common.FIXED["noise"], generator=rng).to(next(self.parameters()))
        return torch.cat([dataset.to_uint8(generator(z)).cpu() for z in noise.split(100)])

    def measure(self, test, with_fid: bool) -> list[dict]:
        """FID, and the Frechet distance of 8x8 thumbnails, which needs no Inception: it sees
        colours and layout, no more."""
        real = test.pictures(0)
        fake = self.samples(len(real))
        thumbnails = []
        for pictures in (fake, real):
            x = F.adaptive_avg_pool2d(dataset.to_float(pictures), 8)
            thumbnails.append(x.flatten(1).double().numpy())  # (N, 192)
        distance = training.frechet_distance(*thumbnails)
        row = {"pictures": len(fake), "Frechet distance of thumbnails (lower is better)": distance}
        device = next(self.parameters()).device
        if with_fid:
            row["FID"] = training.fid(fake, real, device)
        return [row | training.swd(fake.to(device), real.to(device))]

    def picture(self, test):
        rows = self.samples(64).split(8)
        return dataset.picture_grid(rows, [""] * 8, [""] * 8, cell=rows[0].shape[-1])


TASKS = {"pix2pix": Pix2pix, "cyclegan": CycleGan, "dcgan": Dcgan}


# ---- Data: the pairs, or the field's usual layouts ----------------------------------------------

WANTED = {
    "pix2pix": "A|B in train/, or equal names in trainA/ and trainB/ (or train_A/, A/train/, A/)",
    "cyclegan": "pictures in trainA/ and trainB/ (or train_A/, A/train/, A/)",
    "dcgan": "four or more pictures",
}
FEWEST = 4  # pictures of which some can be held out
# of the two kinds' folders: CycleGAN's, img2img-turbo's, pix2pix's before they are combined
SIDES = (("{}A", "{}B"), ("{}_A", "{}_B"), ("A/{}", "B/{}"), ("{}/A", "{}/B"))


class Downloaded(dataset.Pictures):
    """Pictures as people have them, of which some cannot be read: these are skipped and named.

    A subclass reads one by read(index), and forgets some by leave_out(indices). The cache holds
    black pictures in their place and, beside it, a list that says what is wrong with them."""

    def __init__(self, files: list[Path], size: int, concepts: list[dict], *indices, about: object):
        """HEIC files are decoded anew once their package is installed, as `about` changes then."""
        heic = any(path.suffix.lower() in dataset.HEIC for path in files) and dataset.reads_heic()
        super().__init__(files, size, concepts, *indices, about=[about, heic])

    def load(self, index: int) -> torch.Tensor:
        try:
            return dataset.to_pixels(self.read(index))
        except UserError as error:
            self.troubles[index] = str(error)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def write_pixels(self, path: Path) -> None:
        self.troubles = {}
        super().write_pixels(path)
        runs.write_json(self.list_of_troubles(path.parent), self.troubles)

    def list_of_troubles(self, folder: Path) -> Path:
        return folder / f"{self.cache_hash}.skipped.json"

    def cache(self, folder: Path):
        # without the list, black stand-ins would be trained on
        if runs.rank() == 0 and not self.list_of_troubles(folder).exists():
            (folder / f"{self.cache_hash}.u8").unlink(missing_ok=True)
        super().cache(folder)
        troubles = runs.read_json(self.list_of_troubles(folder))
        if not troubles:
            return self
        self.leave_out(torch.tensor([int(index) for index in troubles]))
        if min(self.counts) == 0:
            raise UserError(f"no picture is left: {next(iter(troubles.values()))}")
        if runs.rank() == 0:
            for trouble in dict.fromkeys(troubles.values()):
                print(f"skipped: {trouble}")
        return self


class DownloadedPairs(Downloaded, dataset.Pairs):
    """Pairs of a photo and its edit, of which both must be readable."""

    def leave_out(self, broken: torch.Tensor) -> None:
        [pairs] = self.indices
        self.indices = [pairs[~torch.isin(pairs, broken).any(1)]]


class SideBySide(DownloadedPairs):
    """pix2pix's layout: the left half of a file is A, its right half B; of each the middle square
    counts. AtoB: A is the photo, B its edit."""

    def __init__(self, files: list[Path], size: int, concepts: list[dict], direction: str):
        indices = torch.arange(2 * len(files)).view(2, -1).T
        super().__init__([*files, *files], size, concepts, [indices], about=direction)
        self.direction = direction

    def read(self, index: int) -> Image.Image:
        picture = dataset.read_picture(self.files[index])
        width, height = picture.size
        is_photo = index < len(self.files) // 2
        half = width // 2
        left = 0 if is_photo == (self.direction == "AtoB") else width - half
        picture = picture.crop((left, 0, left + half, height))
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)


class TwoFolders(DownloadedPairs):
    """Photos in one folder and their edits in another. pairs: (photo, edit) files."""

    def __init__(self, pairs: list[tuple[Path, Path]], size: int, concepts: list[dict]):
        photos, edits = zip(*pairs, strict=True)
        indices = torch.arange(2 * len(pairs)).view(2, -1).T
        super().__init__([*photos, *edits], size, concepts, [indices], about="two folders")

    def read(self, index: int) -> Image.Image:
        count = len(self.files) // 2
        if index < count:
            return dataset.read_square(self.files[index], self.size)
        photo_size = dataset.picture_size(self.files[index - count])
        return dataset.read_edit(self.files[index], photo_size, self.size)


class Sets(Downloaded):
    """One set of pictures' middle squares, or two, A and B: a row of a batch is then one of each,
    drawn and mirrored independently. `paired`: B[i] is what A[i] should become."""

    def __init__(self, sets: list[list[Path]], size: int, concepts: list[dict], paired=False):
        lengths = [len(files) for files in sets]
        super().__init__([*itertools.chain(*sets)], size, concepts, about=lengths)
        self.paired = paired
        self.indices = list(torch.arange(sum(lengths)).split(lengths))  # of each set's pictures

    @property
    def counts(self) -> list[int]:
        """As many rows as the largest set has pictures; 0 where a set has none."""
        lengths = [len(indices) for indices in self.indices]
        return [max(lengths) if all(lengths) else 0]

    def read(self, index: int) -> Image.Image:
        return dataset.read_square(self.files[index], self.size)

    def leave_out(self, broken: torch.Tensor) -> None:
        kept = [~torch.isin(indices, broken) for indices in self.indices]
        if self.paired:
            kept = [kept[0] & kept[1]] * 2
        self.indices = [indices[keep] for indices, keep in zip(self.indices, kept, strict=True)]

    def pictures(self, number: int) -> torch.Tensor:
        """A set's pictures, uint8 (N, 3, S, S)."""
        return self.pixels[self.indices[number]]

    def plan(self, step, batch, seed):
        k = len(self.indices)
        lengths = [len(indices) for indices in self.indices]
        picks, flips = dataset.draw_picks(lengths, k * batch, step, seed)  # they take turns
        numbers = picks[:, 1].view(batch, k)
        columns = [self.indices[i][numbers[:, i]] for i in range(k)]
        concepts = torch.zeros(batch, dtype=torch.long)
        return torch.stack(columns, 1), flips.view(batch, k), concepts


def take_apart(pairs: Path, concept: str) -> list[Sets]:
    """Unpaired training data whose truth is known: A is the photos of the first half of the
    training pairs, B the edits of the others'. The test pairs stay pairs."""
    data, test = (dataset.find_pairs(pairs, split, [concept]) for split in ("train", "test"))
    n, m = data.counts[0], test.counts[0]
    if n < 2:
        raise UserError(f"{pairs / 'train'} holds one pair of {concept!r}; it takes two")
    train = [data.files[: n // 2], data.files[n + n // 2 :]]
    held_out = Sets([test.files[:m], test.files[m:]], test.size, test.concepts, paired=True)
    return [Sets(train, data.size, data.concepts), held_out]


def list_below(folder: Path) -> list[Path]:
    return dataset.list_pictures(folder, subfolders=True)


def find_sides(folder: Path, *splits: str) -> list[Path]:
    """The folders of A's and B's pictures, as SIDES names them, of the first split that has some;
    [] if none has. The split "" is A/ and B/ themselves."""
    for split, names in itertools.product(splits, SIDES):
        # of the split "", or "/A" would be a folder of its own
        sides = [folder / name.format(split).strip("/") for name in names]
        if all(map(list_below, sides)):
            return sides
    return []


def find_combined(folder: Path, *splits: str) -> list[Path]:
    """The files of A|B side by side, of the first split that has some; else []."""
    for split in splits:
        files = dataset.list_pictures(folder / split)
        if not files and not find_sides(folder, split):
            files = list_below(folder / split)
        if files:
            return files
    return []


def pair_files(photos: Path, edits: Path) -> list[tuple[Path, Path]]:
    """(photo, edit) files of equal names in two folders. Photos without an edit are counted."""
    photo_files = dataset.named_pictures(photos)
    edit_files = dataset.match_names(photo_files, dataset.named_pictures(edits))
    lacking = sorted(photo_files.keys() - edit_files.keys())
    if not edit_files:
        raise UserError(f"{edits} holds no picture named as one in {photos}, such as {lacking[0]}")
    if lacking and runs.rank() == 0:
        count = f"{len(lacking)} of {len(photo_files)} pictures in {photos}"
        print(f"{count} are left out, as {edits} holds none of their names: {lacking[0]} ...")
    return [(photo_files[name], edit_files[name]) for name in photo_files if name in edit_files]


def find_paired(folder: Path, size: int, concepts: list[dict], direction: str) -> list:
    """Training pairs and held-out ones: pictures of A|B or, where there are none, folders of A and
    B. [] where there are neither."""
    combined = find_combined(folder, "train")
    if combined:
        parts = with_held_out(combined, find_combined(folder, "test", "val"), folder)
        return [SideBySide(files, size, concepts, direction) for files in parts]
    train, held_out = find_train_and_held_out_sides(folder)
    if not train:
        return []
    if direction == "BtoA":
        train.reverse()
        held_out.reverse()
    held_out_pairs = pair_files(*held_out) if held_out else []
    parts = with_held_out(pair_files(*train), held_out_pairs, folder)
    return [TwoFolders(pairs, size, concepts) for pairs in parts]


def find_unpaired(folder: Path) -> list[list[list[Path]]]:
    """[A's and B's training pictures, A's and B's held-out ones]; [] where there are none."""
    train, held_out = find_train_and_held_out_sides(folder)
    if not train:
        return []
    parts = []
    for i in (0, 1):
        others = list_below(held_out[i]) if held_out else []
        parts.append(with_held_out(list_below(train[i]), others, train[i]))
    return [list(sides) for sides in zip(*parts, strict=True)]


def find_train_and_held_out_sides(folder: Path) -> tuple[list[Path], list[Path]]:
    """find_sides of both; all of A/ and B/ train where no pictures are held out."""
    train = find_sides(folder, "train")
    held_out = find_sides(folder, "test", "val")
    if not train and not held_out:
        train = find_sides(folder, "")
    return train, held_out


def find_data(task: str, folder: Path, size: int, direction: str = "AtoB") -> list:
    """A folder's training pictures and its held-out ones, not decoded yet, in the task's layout.
    The concept bears the folder's name."""
    if task != "dcgan" and (size % 8 or size < 24):
        raise UserError(f"--size {size}: the networks need a multiple of 8 from 24 on")
    concepts = [{"name": folder.resolve().name, "prompt": ""}]
    runs.check_name(concepts[0]["name"], folder)
    if task == "pix2pix":
        found = find_paired(folder, size, concepts, direction)
    elif task == "cyclegan":
        found = [Sets(sides, size, concepts) for sides in find_unpaired(folder)]
    else:
        files = list_below(folder)
        parts = hold_out_a_tenth(files) if len(files) >= FEWEST else []
        found = [Sets([part], size, concepts) for part in parts]
    if not found:
        wanted = f"--task {task} wants {WANTED[task]}"
        raise UserError(f"--data {folder} holds {describe(folder)}; {wanted}")
    return found


def describe(folder: Path) -> str:
    """What a folder holds: the first names in it, and how many pictures are in folders."""
    names = []
    paths = sorted(folder.glob("*"))
    for path in paths[:8]:
        if path.is_dir():
            names.append(f"{path.name}/ ({len(list_below(path))} pictures)")
        else:
            names.append(path.name)
    if len(paths) > 8:
        names.append("...")
    return ", ".join(names) or "nothing"


def with_held_out(train: list, held_out: list, folder: Path) -> list[list]:
    """[train, held_out]; where nothing is held out, a tenth of `train` is. UserError where that is
    too few."""
    if held_out:
        return [train, held_out]
    if len(train) < FEWEST:
        raise UserError(f"{folder}: {len(train)} pictures are too few to hold some out for a test")
    train, held_out = hold_out_a_tenth(train)
    if runs.rank() == 0:
        print(f"{folder} has no test pictures: {len(held_out)} of its others are held out")
    return [train, held_out]


def hold_out_a_tenth(items: list) -> tuple[list, list]:
    """(what to train on, a tenth of all drawn at random, at least 2 and at most 1000)"""
    order = np.random.default_rng(0).permutation(len(items))
    tenth = max(2, min(1000, len(items) // 10))
    return [items[i] for i in sorted(order[tenth:])], [items[i] for i in sorted(order[:tenth])]


def read_data(args, trained: common.Generator | None) -> list:
    """Training pictures and held-out ones, not decoded yet: of --data, or of stage 1's pairs."""
    if args.data:
        size = args.size or (64 if args.task == "dcgan" else 256)
        return find_data(args.task, args.data, size, args.direction)
    names = list(dict.fromkeys(args.concept or []))
    if args.task == "cyclegan" and len(names) == 1:
        return take_apart(args.pairs, names[0])
    if args.task != "pix2pix":
        raise UserError(f"give --data with {WANTED[args.task]} (or one --concept, for cyclegan)")
    if not names and trained:
        names = [concept["name"] for concept in trained.config["concepts"]]
    if not names:
        names = list(dataset.read_concepts(args.pairs))
    return [dataset.find_pairs(args.pairs, split, names) for split in ("train", "test")]


# ---- The command line, figures, tables -----------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, "runs/coronet")
    flag = parser.add_argument
    flag("--task", choices=list(TASKS), default="pix2pix", help="what kind of GAN")
    flag("--data", type=Path, help="a folder in the layout of pix2pix, CycleGAN, or of pictures")
    flag("--direction", choices=["AtoB", "BtoA"], default="AtoB", help="of A|B: photo to edit")
    flag("--size", type=runs.count, help="pixels to scale --data to: 256, or 64 for dcgan")
    training.add_flags(parser)
    flag("--concept", action="append", help="of --pairs (default: the generator's); repeatable")
    known = f"a file, or {', '.join(common.ARCHITECTURES)}; auto: stage 3's, or one for the task"
    flag("--generator", default="auto", help=known)
    training.add_discriminator_flag(parser)
    flag("--no-text", action="store_true", help="a new e2gan without prompts, for one concept")
    flag("--width", type=runs.count, default=64, help="a new generator's first layer's channels")
    methods = ["coronet", "uniform", "random", "magnitude"]
    flag("--method", choices=methods, default="coronet", help="the others are to compare with")
    made = "latents of 1 and the network's weights, or the paper's random latents and weights"
    flag("--start", choices=["weights", "paper"], default="weights", help=made)
    flag("--keep", type=runs.positive, default=0.25, help="share of the MACs to keep")
    multiple = "round pruned widths to multiples of this; 8 suits the units of GPUs and phones"
    flag("--multiple", type=runs.count, default=1, help=multiple)
    flag("--prune-discriminator", action="store_true", help="prune these to the same share")
    flag("--search-epochs", type=runs.count, default=20, help="passes while pruning")
    flag("--epochs", type=runs.count, default=180, help="passes after it, rates falling to 0")
    flag("--lr", type=runs.positive, default=2e-4, help="the generator's while converging")
    flag("--lr-search", type=runs.positive, default=1e-4, help="its rate in the search")
    flag("--lr-z", type=runs.positive, default=1e-4, help="the latents' (SGD, momentum 0.9)")
    flag("--cycle", type=runs.weight, default=10.0, help="cyclegan: weight of the cycle loss")
    flag(
        "--identity",
        type=runs.weight,
        default=0.5,
        help="cyclegan: weight of the identity loss, times --cycle",
    )
    return parser.parse(DEMO)


def default_generator(args) -> str:
    """What --generator auto means."""
    if args.task == "cyclegan":
        return "resnet9"
    if args.task == "dcgan":
        return "dcgan"
    if args.data:
        return "unet256"
    folder = "runs/demo/base" if args.demo else "runs/base"
    return f"{folder}/generator.safetensors"


def read_generator(args) -> common.Generator | None:
    """The trained generator in the file --generator, on the CPU; None where it is an architecture.
    UserError for flags that do not fit it."""
    path = Path(args.generator)
    trained = args.task == "pix2pix" and path.is_file()
    if path.suffix == ".safetensors" and not path.is_file():
        raise UserError(f"{path} does not exist; 03_train_base.py makes one")
    known = ["dcgan"] if args.task == "dcgan" else list(common.ARCHITECTURES)
    if not trained and args.generator not in known:
        takes = " or ".join(known)
        if args.task == "pix2pix":
            takes += " or a trained one's file"
        raise UserError(f"--task {args.task} takes no --generator {args.generator} but {takes}")
    if trained and args.start == "paper":
        raise UserError("--start paper forgets what a generator learned")
    if (args.concept and args.data) or (args.size and not args.data):
        raise UserError("--concept goes with --pairs and --size with --data: leave one out")
    return common.load_generator(path) if trained else None


def write_pruning(path: Path, task, targets: dict[str, Target]) -> None:
    """Bars of every group's channels, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(targets), 3.8), layout="constrained")
    for i, (name, target) in enumerate(targets.items()):
        axes = figure.add_subplot(1, len(targets), i + 1)
        for label, config in (("before", target.config), ("after", task.networks[name].config)):
            axes.bar(list(config["widths"]), list(config["widths"].values()), label=label)
        axes.tick_params(axis="x", rotation=90)
        axes.set(title=name, ylabel="channels")
        axes.legend()
    runs.replace_file(path, lambda part: figure.savefig(part, format="png", dpi=110))


def pruning_rows(task, targets: dict[str, Target], args) -> tuple[list[dict], list[dict]]:
    """Two tables' rows: what each pruned network cost and costs, and its channel groups' widths."""
    data = " ".join([(args.data or args.pairs).resolve().name, *(args.concept or [])])
    sizes, channels = [], []
    for name, target in targets.items():
        small = task.networks[name]
        macs = common.count_macs(small)
        sizes.append(
            {
                "data": data,
                "network": name,
                "architecture": target.config["arch"],
                "method": args.method,
                "keep": args.keep,
                "size px": target.config["size"],
                "GMACs before": target.macs / 1e9,
                "GMACs": macs / 1e9,
                "MACs %": 100 * macs / target.macs,
                "parameters M before": target.parameters / 1e6,
                "parameters M": common.count_parameters(small) / 1e6,
            }
        )
        for group, before in target.config["widths"].items():
            after = small.config["widths"][group]
            row = {"network": name, "group": group, "before": before, "after": after}
            channels.append(row)
    return sizes, channels


def add_earlier(rows: list[dict], earlier: list[dict], when: str) -> None:
    """Adds columns: PSNR and FID as they were measured before, where they were."""
    if not earlier:
        return
    for row, before in zip(rows, earlier, strict=True):
        for measure in ("PSNR dB", "FID"):
            if measure in before:
                row[f"{measure} {when}"] = before[measure]


def main() -> None:
    args = parse()
    if args.generator == "auto":
        args.generator = default_generator(args)
    trained = read_generator(args)
    device = training.start(args)
    data, test = read_data(args, trained)
    args.l1 = training.l1_weight(args)
    task = TASKS[args.task](args, data, trained).to(device)
    architectures = {network.config["arch"] for network in task.networks.values()}
    whole_only = bool(architectures & {"unet256", "dcgan"})
    training.check_crop(args.crop, data.size, whole_only)
    training.check_loop(args, device)
    training.set_threads(device, task, args.batch, args.crop or data.size)
    pruned = dict(task.networks) if args.prune_discriminator else task.named("generator")
    targets = {name: Target(network, args.keep, args.multiple) for name, network in pruned.items()}
    data.cache(args.cache)  # by which all input is known to be good
    test.cache(args.cache)
    first_generator = next(iter(task.named("generator").values()))
    settings = runs.settings_of(
        args,
        generator=trained.sha256 if trained else args.generator,
        clip=first_generator.config.get("clip", ""),
        data=[data.data_hash, test.data_hash],
        networks=[network.sha256 for network in task.networks.values()],
    )
    if runs.begin_run(args.out, settings, args.overwrite):
        return

    epochs = args.search_epochs + args.epochs
    steps = args.steps or epochs * dataset.steps_per_epoch(data.counts, args.batch)
    search_steps = max(1, round(steps * args.search_epochs / epochs))
    measures = runs.rank() == 0  # the first process measures and writes
    with_fid = args.fid == "auto"
    before = task.measure(test, with_fid) if trained and measures else []
    pace = search(task, targets, data, test, args, search_steps, trained is not None)
    if measures:
        write_pruning(args.out / "pruning.png", task, targets)
        for name, network in task.networks.items():
            common.save_network(args.out / f"sliced/{name}.safetensors", network)
        sliced = task.measure(test, with_fid=False)
    for pool in task.pools.values():
        pool.clear()
    # what the search did not need is added: equal flags, equal steps
    pace |= converge(task, data, test, args, steps - pace["search steps"])
    if not measures:
        return
    for name, network in task.networks.items():
        common.save_network(args.out / f"{name}.safetensors", network)
    after = task.measure(test, with_fid)
    add_earlier(after, before, "before")
    add_earlier(after, sliced, "sliced")
    sizes, channels = pruning_rows(task, targets, args)
    sizes[0] |= {"batch": args.batch, **pace}
    tables = {
        "Pruning": sizes,
        f"Pruned {args.task}, held-out pictures": after,
        "Channels": channels,
    }
    reads = [] if args.data else [args.pairs]
    if trained:
        reads.append(Path(args.generator).parent)
    runs.write_result(args, tables, reads)


if __name__ == "__main__":
    runs.run(main)
