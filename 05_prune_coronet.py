"""Stage 5: prunes a GAN's channels while it trains, to a given share of its MACs (CoroNetGAN).

CoroNetGAN (arXiv 2403.08261, section 3) has two phases.

Search: hypernetworks compute each layer's weight from latent vectors, which hold one number per
channel. After each step the latents are soft-thresholded, so that channels fade to 0, until the
MACs meet the target. Channels that matter least to the loss for their MACs go first (our choice;
with --start-from paper those whose latents are small). Then the computed weights are sliced to the
channels that are left: a smaller, dense network without hypernetworks.
Converge: this network trains on as usual.

--task pix2pix needs pairs, cyclegan unpaired pictures of two kinds; dcgan makes pictures from
noise. Only pix2pix can go on with a trained generator (--generator FILE) and its discriminator.

Reads   runs/pairs and runs/base/generator.safetensors, or --data, a downloaded folder
Writes  runs/coronet/generator.safetensors      (cyclegan: generator_AtoB, generator_BtoA)
                     discriminator.safetensors  (cyclegan: discriminator_A, discriminator_B)
                     sliced/*.safetensors       the same networks before they converge
                     pruning.png                channels left of each group
                     search-*, converge-*       each phase's state, log and curve
                     samples/*.png              each phase's progress pictures
                     result.json                what `python runs.py` prints

Layouts of --data (SPLIT: train, and for held-out pictures test or val; pictures of any size and
shape, whose middle square is used, also in subfolders of those named here):

    combined   SPLIT/1.jpg                     A on the left and B on the right (pix2pix)
    two sides  SPLITA/1.jpg   SPLITB/1.jpg     (CycleGAN)
               SPLIT_A/1.jpg  SPLIT_B/1.jpg    (img2img-turbo)
               A/SPLIT/1.jpg  B/SPLIT/1.jpg    (pix2pix before its pictures are combined)
               SPLIT/A/1.jpg  SPLIT/B/1.jpg
               A/1.jpg        B/1.jpg          some are held out
    flat       1.jpg                           pictures of one kind; some are held out

--task pix2pix reads combined pictures, or two sides, where equal names are pairs; cyclegan reads
two sides; dcgan reads any folder as flat.

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
# A share of the search's steps: for so long importance is only measured, in the beginning; for so
# long a channel fades; and twice as long before the end the aim has come down to --keep.
PHASE = 0.1
MEMORY = 100  # steps that the running mean of the channels' importance remembers
MAX_SHRINK = 0.05  # --start-from paper: the most that a step shrinks a latent by
POOL = 50  # CycleGAN's number of earlier fakes

# ---- MACs as a function of the widths, and the channels to keep for a target --------------------

Channels = dict[str, torch.Tensor]  # {group: a number per channel, or indices of channels}
MacTerms = list[tuple[tuple, tuple, int]]  # (groups read, groups written, factor)


def mac_terms(network: common.Network) -> MacTerms:
    """common.count_macs as a formula, which is cheap enough to be computed for many widths at every
    step: the sum over all terms of channels(groups read) * channels(groups written) * factor."""
    terms = []

    def record(module, inputs, output):
        if isinstance(module, common.Attention):
            products = inputs[0].shape[1] * inputs[1].shape[1]  # queries * keys
            terms.append((module.q.writes, (), products))  # q @ k
            terms.append((module.v.writes, (), products))  # scores @ v
        elif isinstance(module, common.UpConv):  # computed as a transposed convolution, kernel 4
            height, width = inputs[0].shape[2:]
            terms.append((module.reads, module.writes, 16 * (height + 2) * (width + 2)))
        else:
            x = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            channels = x.shape[-1 if isinstance(module, nn.Linear) else 1]
            positions = x.numel() // channels
            kernel = module.weight[0, 0].numel()
            terms.append((module.reads, module.writes, positions * kernel))

    twin = copy.deepcopy(network).to("meta").eval()
    for module in twin.modules():
        if hasattr(module, "reads") or isinstance(module, common.Attention):
            module.register_forward_hook(record)
    with torch.no_grad():
        twin(*twin.example())
    return terms


def macs_of(terms: MacTerms, widths: dict[str, int]) -> int:
    """The value of mac_terms' formula. widths: channels of all groups, as of common.all_widths."""
    total = 0
    for reads, writes, factor in terms:
        inputs = sum(widths[group] for group in reads)
        outputs = sum(widths[group] for group in writes) if writes else 1
        total += inputs * outputs * factor
    return total


def weight_sizes(network: common.Network) -> Channels:
    """How large the weights are that write or read each channel: their RMS, relative to that of
    all channels of the layer, averaged over layers, and scaled to a mean of 1 in each group."""
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
    """The share of its MACs that a network is to keep, and the channels which that leaves it.

    Channels are ranked by scores, one number per channel, such as latents; only their absolute
    values count. Attributes: config, parameters and macs of the unpruned network; full, its
    channels by group; floor, the fewest channels that a group keeps; alike, the channels if all
    groups were narrowed by the same factor."""

    def __init__(self, network: common.Network, keep: float, multiple: int = 1):
        """keep: the share; UserError if no widths meet it. multiple: pruned widths are multiples
        of this number, unless a group has fewer channels."""
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
        # Importance looks at one channel at a time and does not see what the last channels of a
        # group are worth together. So a group keeps at least two thirds of the channels that it
        # would have if all groups were narrowed by the same factor.
        scores = {}
        for group, count in network.config["widths"].items():
            scores[group] = torch.arange(1, count + 1) / count
        self.alike = self.widths(scores, self.threshold(scores, keep))
        for group in self.floor:
            two_thirds = self.alike[group] * 2 // 3 // multiple * multiple
            self.floor[group] = max(self.floor[group], two_thirds)

    def share(self, widths: dict[str, int]) -> float:
        """The MACs of some widths, as a share of the unpruned network's."""
        return macs_of(self.terms, widths) / self.macs

    def widths(self, scores: Channels, threshold: float) -> dict[str, int]:
        """How many channels of each group have a score above the threshold, never fewer than the
        floor. Groups without scores stay whole."""
        widths = dict(self.full)
        for group, values in scores.items():
            above = int((values.abs() > threshold).sum())
            widths[group] = max(above, self.floor[group])
        return widths

    def threshold(self, scores: Channels, share: float) -> float:
        """The smallest threshold that brings the MACs to `share` or less: 0 or one of the scores'
        absolute values."""
        thresholds = torch.cat([torch.zeros(1), *(values.abs() for values in scores.values())])
        thresholds = thresholds.unique().tolist()  # sorted

        def is_enough(threshold: float) -> bool:
            return self.share(self.widths(scores, threshold)) <= share

        return thresholds[bisect.bisect_left(thresholds, True, key=is_enough)]

    def kept(self, scores: Channels, share: float) -> Channels:
        """{group: sorted indices} of the channels with the highest scores, as many as have `share`
        of the MACs or less.

        The threshold alone would stop up to a hundredth of all MACs short of the share. So channels
        are then added, `multiple` at a time, the highest score first, while some fit."""
        widths = self.widths(scores, self.threshold(scores, share))
        for group in scores:
            if widths[group] < self.full[group]:
                rounded_down = widths[group] // self.multiple * self.multiple
                widths[group] = max(rounded_down, self.floor[group])
        ranked = {}
        for group, values in scores.items():
            ranked[group] = values.abs().sort(descending=True, stable=True)

        def next_width(group: str) -> int:
            return min(widths[group] + self.multiple, self.full[group])

        def next_fits(group: str) -> bool:
            wider = {**widths, group: next_width(group)}
            return widths[group] < self.full[group] and self.share(wider) <= share

        def next_score(group: str) -> float:
            return ranked[group].values[widths[group]].item()

        while candidates := [group for group in scores if next_fits(group)]:
            chosen = max(candidates, key=next_score)
            widths[chosen] = next_width(chosen)
        kept = {}
        for group in scores:
            kept[group] = ranked[group].indices[: widths[group]].sort().values
        return kept


# ---- CoroNetGAN: latents, the soft threshold, slicing --------------------------------------------


def add_latents(network: common.Network, start: str) -> None:
    """Gives the network a latent vector per channel group, and hypernetworks that compute all its
    weights from them. network.importance holds a number per latent, for measure_importance.

    start "paper": latents drawn from N(0, 1), and random weights. "weights" (a choice of ours):
    latents of 1 and the network's own weights, so that no channel is smaller from the start."""
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
    """Updates the importance of each channel, a running mean of (z dL/dz)^2, from the gradients of
    this step.

    To first order z dL/dz is how much the loss changes without the channel (Molchanov et al. 2017,
    arXiv 1611.06440; squared: 2019, arXiv 1906.10771). A channel whose latent is 0 keeps the
    importance that it had before; in a step in which fp16 overflows all channels do."""
    weight_of_newest = max(1 / (step + 1), 1 / MEMORY)
    for group, z in network.latents.items():
        newest = (z * z.grad).square()
        mean = network.importance[group]
        counts = (z != 0) & newest.isfinite()
        mean.lerp_(torch.where(counts, newest, mean), weight_of_newest)


def copy_to_cpu(networks: dict[str, common.Network]) -> dict[str, tuple[Channels, Channels]]:
    """{name: (latents, importance)} of these networks, in one copy, as each copy waits for the
    GPU."""
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
    """How much each channel matters to the loss per MAC that it costs, by which the search ranks
    channels (a choice of ours).

    The square root of its importance is how much the loss changes without a channel. If several
    channels of a group go, their changes add up, and the loss is taken to grow with the square of
    that sum. So a channel counts with its own change times the sum of the changes of all channels
    that go before it and its own: the fewer channels a group has left, the more each is worth."""
    left = target.widths(latents, 0.0)
    worth = {}
    for group, z in latents.items():
        change = importance[group].sqrt()
        order = torch.where(z == 0, -1.0, change).argsort(stable=True)  # the first to go first
        sum_of_changes = torch.empty_like(change)
        sum_of_changes[order] = change[order].cumsum(0)
        one_less = {**left, group: left[group] - 1}
        macs = target.share(left) - target.share(one_less)  # of one channel of the group
        value = change * sum_of_changes / macs
        # channels that are gone rank below all others
        worth[group] = torch.where(z == 0, 1e-30 * value, value.clamp(min=1e-20))
    return worth


def share_at(step: int, steps: int, keep: float) -> float:
    """The share of the MACs that the search aims at after a step: 1 while importance is measured,
    then linear to `keep`, which it reaches early enough for the last channels to fade."""
    progress = (step / steps - PHASE) / (1 - 3 * PHASE)
    return 1 - (1 - keep) * min(1.0, max(0.0, progress))


def paper_amounts(target: Target, latents: Channels, share: float) -> Channels:
    """How much a step shrinks each latent with --start-from paper: all by the same amount.

    In the paper it is lambda * lr with a constant lambda. Here it is the smallest amount that
    brings the MACs to `share`, but at most MAX_SHRINK (a choice of ours, which meets any
    target)."""
    threshold = min(target.threshold(latents, share), MAX_SHRINK)
    return {group: torch.full_like(z, threshold) for group, z in latents.items()}


def weighted_amounts(
    target: Target, latents: Channels, importance: Channels, share: float, fade: float
) -> Channels:
    """How much a step shrinks each latent with --start-from weights: by `fade` those of the
    channels that must go for the MACs to come down to `share`, the least worth first; by 0 the
    others.

    This is the adaptive lasso's idea (Zou 2006): an l1 norm whose weights are small where a channel
    matters removes some channels and does not weaken all of them."""
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
    """Sets the network's latents to sign(z) max(|z| - amount, 0), the proximal step of an l1 norm
    with a weight for each channel. latents: copies of them on the CPU, where also the new ones are
    returned."""
    shrunk = {}
    for group, z in latents.items():
        shrunk[group] = z.sign() * (z.abs() - amounts[group]).clamp(min=0)
        network.latents[group].copy_(shrunk[group])
    return shrunk


def shrink_latents(
    networks: dict[str, common.Network], targets: dict[str, Target], args, step: int, steps: int
) -> dict[str, float]:
    """Shrinks the latents after a step of the search. Returns the share of the MACs that each
    network has left.

    In the last PHASE of the steps, channels that must go do so at once, so that the target is met.
    With --start-from paper they go on fading, and slicing removes those that are left."""
    share = share_at(step, steps, args.keep)
    fade = 1 / (PHASE * steps) if step <= (1 - PHASE) * steps else math.inf
    left = {}
    for name, (latents, importance) in copy_to_cpu(networks).items():
        target = targets[name]
        if args.start_from == "paper":
            amounts = paper_amounts(target, latents, share)
        else:
            amounts = weighted_amounts(target, latents, importance, share, fade)
        shrunk = soft_threshold(networks[name], latents, amounts)
        left[name] = target.share(target.widths(shrunk, 0.0))
    return left


def channel_scores(network: common.Network, target: Target, args) -> Channels:
    """The scores by which --method ranks channels when a network is sliced, on the CPU.

    coronet: the latents' worth, or with --start-from paper the latents. The others are to compare
    with.
    magnitude: the size of a channel's weights. uniform: its rank by that size within its group, so
    that all groups are narrowed alike. random: chance."""
    if args.method == "coronet":
        latents, importance = copy_to_cpu({"network": network})["network"]
        return latents if args.start_from == "paper" else latent_worth(target, latents, importance)
    if args.method == "random":
        rng = torch.Generator().manual_seed(args.seed)
        widths = network.config["widths"]
        return {group: torch.rand(count, generator=rng) for group, count in widths.items()}
    scores = weight_sizes(network)
    if args.method == "uniform":
        for group, sizes in scores.items():
            rank = sizes.argsort().argsort()
            scores[group] = (1 + rank) / len(sizes)
    return scores


@torch.no_grad()
def bring_back(network: common.Network) -> None:
    """Sets latents of 0 back to 1. The search removes a little more than it must; a channel that
    slicing adds again, as it still fits, so has the weights with which it faded."""
    for z in network.latents.values():
        z[z == 0] = 1.0


def slice_networks(task, targets: dict[str, Target], args) -> None:
    """Replaces each network that has a target by a smaller, dense one of the channels to keep."""
    for name, target in targets.items():
        network = task.networks[name]
        kept = target.kept(channel_scores(network, target, args), args.keep)
        if args.method == "coronet":
            if args.start_from == "weights":
                bring_back(network)
            common.merge(network)  # leaves the weights that the hypernetworks computed
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
    """The networks' parameters that train, without the latents, which have their own optimizer."""
    found = []
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and not name.startswith("latents."):
                found.append(parameter)
    return found


def gan_step(task, loop: training.Loop, batch, opt_g, opt_d) -> dict[str, torch.Tensor]:
    """A step of the generators, then one of the discriminators. Returns losses for the log.

    The generators come first, so that their activations are freed before the discriminators' pass.
    parametrize.cached lets hypernetworks compute each weight once a pass, however often it is
    used."""
    args = loop.args
    device = loop.device
    micro_batches = loop.micro_batches(batch)
    made = []  # the fakes of each micro-batch
    losses = []  # a dict for each
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


def step_latents(networks: dict[str, common.Network], loop: training.Loop, opt_z) -> None:
    """Measures the channels' importance by the gradients that gan_step left at the latents, and
    takes a step of their optimizer, opt_z."""
    loop.scaler.unscale_(opt_z)
    for network in networks.values():
        latents = list(network.latents.values())
        nn.utils.clip_grad_norm_(latents, training.MAX_NORM)  # or one odd crop would decide
        measure_importance(network, loop.step)
        nn.utils.clip_grad_norm_(latents, 1.0)
    loop.scaler.step(opt_z)
    opt_z.zero_grad()


def search(task, targets: dict[str, Target], data, test, args, steps: int, trained=False) -> dict:
    """The first phase: trains while it shrinks latents until all targets are met, then slices.
    Returns its steps and seconds, as columns of a table.

    Other methods than coronet have no latents. They slice first and use all steps to train the
    small networks; only `magnitude` of new networks trains them whole and slices at the end, as
    new weights say nothing about their channels.

    A run that is continued in its second phase comes through here too: its loop has no step left,
    and the state that it reads leads to the same channels."""
    searches = args.method == "coronet"
    slices_first = not searches and (trained or args.method != "magnitude")
    if searches:
        for name in targets:
            add_latents(task.networks[name], args.start_from)
    if slices_first:
        slice_networks(task, targets, args)
    lr = args.lr_search if searches else args.lr
    opt_g = training.adam(weights_of(task.named("generator").values()), lr)
    opt_d = training.adam(weights_of(task.named("discriminator").values()), args.lr_d)
    parts = {"task": task, **task.pools, "opt_g": opt_g, "opt_d": opt_d}
    if searches:
        pruned = {name: task.networks[name] for name in targets}
        latents = [z for network in pruned.values() for z in network.latents.values()]
        opt_z = torch.optim.SGD(latents, args.lr_z, momentum=0.9)
        parts["opt_z"] = opt_z
    loop = training.Loop(args, data, steps, parts, args.out, name="search", desc="search")
    task.distribute(args.compile)
    task.train()
    for batch in loop:
        losses = gan_step(task, loop, batch, opt_g, opt_d)
        if searches:
            step_latents(pruned, loop, opt_z)
            done = loop.step + 1
            shares = shrink_latents(pruned, targets, args, done, steps)
            if max(shares.values()) <= args.keep:
                loop.finish()
            if loop.finished or done == steps or done % max(1, steps // 50) == 0:
                loop.log({"MACs %": {name: 100 * share for name, share in shares.items()}}, done)
        if loop.record(losses):
            save_progress(loop, task, test, "search")
    if not slices_first:
        slice_networks(task, targets, args)
    return {"search steps": loop.step, "search s": loop.pace()["training s"]}


def converge(task, data, test, args, steps: int) -> dict:
    """The second phase: trains the small networks as usual. Returns its steps and seconds, as
    columns of a table."""
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
    """Saves a progress picture, and the state to continue from."""
    runs.write_png(loop.out / f"samples/{phase}-{loop.step:07d}.png", task.picture(test))
    loop.save()
    task.train()


# ---- The tasks: networks, losses, measures ------------------------------------------------------


class Task(nn.Module):
    """A GAN to prune. self.networks: its networks, whose names begin with "generator" or
    "discriminator". self.pools: lists of tensors by name, which are saved with the state.

    A subclass defines, for a batch (pictures, ..., concepts) as dataset.Pictures.batches yields it,

        fakes(batch)                      -> the generators' pictures, a list of tensors
        generator_loss(batch, fakes)      -> the generators' loss, and parts of it for the log
        discriminator_loss(batch, fakes)  -> the discriminators' loss

    and for held-out pictures

        measure(test, with_fid)           -> rows of a table; all processes call it
        picture(test)                     -> a picture of progress
    """

    def __init__(self, networks: dict[str, common.Network]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.pools = {}

    def distribute(self, compiled: bool) -> None:
        """Prepares what training calls in place of self.networks: self.ddp, under DDP, where the
        network's own loss is computed; self.alone, without DDP, where another network's is.
        compiled: --compile."""
        self.ddp = {}
        self.alone = {}
        for name, network in self.networks.items():
            self.alone[name] = training.compiled(network, compiled)
            self.ddp[name] = training.data_parallel(self.alone[name])

    def named(self, beginning: str) -> dict[str, common.Network]:
        """The networks whose names begin so."""
        found = {}
        for name, network in self.networks.items():
            if name.startswith(beginning):
                found[name] = network
        return found


def least_squares(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """LSGAN's loss of a discriminator, from its scores of real and of fake pictures."""
    return ((real.float() - 1).square().mean() + fake.float().square().mean()) / 2


class Pix2pix(Task):
    """A generator that turns a photo into its edit, and a PatchGAN that sees both, with stage 3's
    losses."""

    def __init__(self, args, data: dataset.Pairs, trained: common.Generator | None):
        tokens, clip = None, ""
        if args.generator == "e2gan" and not args.data and not args.no_text:
            tokens, clip = dataset.prompt_tokens(args.pairs, data.concepts)
        generator = trained or common.new_generator(
            args.generator, args.width, data.size, data.concepts, tokens, clip
        )
        size = generator.config["size"]
        if size != data.size:
            advice = f"give --size {size}" if args.data else f"make pairs of {size} in stage 1"
            what = f"{args.generator} was trained at {size} pixels, and these pictures have"
            raise UserError(f"{what} {data.size}: {advice}")
        discriminator = common.new_discriminator(generator)
        if trained and not args.new_discriminator:
            discriminator = common.base_discriminator(Path(args.generator), generator)
        super().__init__({"generator": generator, "discriminator": discriminator})
        self.args = args
        indices = [generator.concept_index(concept["name"]) for concept in data.concepts]
        self.register_buffer("concept_indices", torch.tensor(indices), persistent=False)

    def text(self, concept):
        """The discriminator's view of the prompts of a batch's concepts."""
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
        discriminator = self.ddp["discriminator"]
        text = self.text(concept)
        real = discriminator(photo, edit, text)
        return least_squares(real, discriminator(photo, fakes[0], text))

    def measure(self, test, with_fid: bool) -> list[dict]:
        return training.evaluate_together(self.networks["generator"], test, with_fid)

    def picture(self, test):
        return training.progress_picture(self.networks["generator"], test)


class CycleGan(Task):
    """CycleGAN, for unpaired pictures of two kinds, A and B: a generator for each direction, and
    for each kind a PatchGAN, which sees new fakes and earlier ones.

    The generators' loss is the least-squares GAN's + --cycle * (L1 of A -> B -> A and of B -> A ->
    B to where they began + --identity * L1 of B -> B by AtoB and of A -> A by BtoA)."""

    def __init__(self, args, data, trained=None):
        networks = {}
        for direction in ("AtoB", "BtoA"):
            concepts = [{"name": direction, "prompt": direction}]
            generator = common.new_generator(args.generator, args.width, data.size, concepts)
            networks[f"generator_{direction}"] = generator
        for kind in "BA":
            networks[f"discriminator_{kind}"] = common.new_discriminator(generator, photo=False)
        super().__init__(networks)
        self.pools = {"pool_A": [], "pool_B": []}
        self.cycle = args.cycle
        self.identity = args.identity

    def fakes(self, batch):
        """[B made of A, A made of B], and for --identity, unless it is 0, [B made of B, A made of
        A] too."""
        a, b, _ = batch
        if not self.identity:
            return [self.ddp["generator_AtoB"](a), self.ddp["generator_BtoA"](b)]
        fake_b, same_b = self.ddp["generator_AtoB"](torch.cat([a, b])).chunk(2)
        fake_a, same_a = self.ddp["generator_BtoA"](torch.cat([b, a])).chunk(2)
        return [fake_b, fake_a, same_b, same_a]

    def generator_loss(self, batch, fakes):
        a, b, _ = batch
        fake_b, fake_a, *same = fakes
        gan = (self.alone["discriminator_B"](None, fake_b).float() - 1).square().mean()
        gan = gan + (self.alone["discriminator_A"](None, fake_a).float() - 1).square().mean()
        cycle = F.l1_loss(self.ddp["generator_BtoA"](fake_b).float(), a)
        cycle = cycle + F.l1_loss(self.ddp["generator_AtoB"](fake_a).float(), b)
        identity = 0
        if same:
            same_b, same_a = same
            identity = F.l1_loss(same_b.float(), b) + F.l1_loss(same_a.float(), a)
        return gan + self.cycle * (cycle + self.identity * identity), {"cycle": cycle / 2}

    def discriminator_loss(self, batch, fakes):
        a, b, _ = batch
        fake_b, fake_a, *_ = fakes
        loss = 0
        for kind, picture, fake in (("A", a, fake_a), ("B", b, fake_b)):
            discriminator = self.ddp[f"discriminator_{kind}"]
            shown = swap(self.pools[f"pool_{kind}"], fake)
            loss = loss + least_squares(discriminator(None, picture), discriminator(None, shown))
        return loss

    def measure(self, test, with_fid: bool) -> list[dict]:
        """A row per direction: SWD to the wanted kind's pictures and, where `test` is paired, the
        PSNR too."""
        rows = []
        a = test.pictures(0)
        b = test.pictures(1)
        device = next(self.parameters()).device
        for direction, opposite, x, y in (("AtoB", "BtoA", a, b), ("BtoA", "AtoB", b, a)):
            fake = training.run_generator(self.networks[f"generator_{direction}"].eval(), x, 0)
            row = {"direction": direction}
            if test.paired:
                row["PSNR dB"] = training.mean_psnr(fake, y)
                row["picture unchanged dB"] = training.mean_psnr(x, y)
            if with_fid:
                row["FID"] = training.fid(fake, y, device)
            back = training.run_generator(self.networks[f"generator_{opposite}"].eval(), fake, 0)
            row["PSNR dB there and back"] = training.mean_psnr(back, x)
            n = min(len(x), len(y))  # swd takes equally many
            rows.append(row | training.swd(fake[:n].to(device), y[:n].to(device)))
        return rows

    def picture(self, test):
        rows = []
        labels = []
        for number, direction in enumerate(("AtoB", "BtoA")):
            x = test.pictures(number)[:4]
            fake = training.run_generator(self.networks[f"generator_{direction}"].eval(), x, 0)
            rows += zip(x, fake, strict=True)
            labels += [direction] * len(fake)
        return dataset.picture_grid(rows, ["picture", "made of it"], labels)


def swap(pool: list[torch.Tensor], fakes: torch.Tensor) -> torch.Tensor:
    """Exchanges some fakes (B, 3, S, S) for earlier ones, for a discriminator to see (CycleGAN).

    While the pool of earlier fakes is not full, it takes a copy of each, and none is exchanged.
    Then each changes places, by a chance of one half, with a random one of the pool."""
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
    """DCGAN, which makes pictures from noise, with the cross-entropy loss."""

    def __init__(self, args, data, trained=None):
        super().__init__(common.dcgan_networks(args.width, data.size))

    def fakes(self, batch):
        noise = torch.randn(len(batch[0]), common.FIXED["noise"], device=batch[0].device)
        return [self.ddp["generator"](noise)]

    def generator_loss(self, batch, fakes):
        return F.softplus(-self.alone["discriminator"](fakes[0]).float()).mean(), {}

    def discriminator_loss(self, batch, fakes):
        # two passes, as batch norm would mix the statistics of real and fake pictures
        real = self.ddp["discriminator"](batch[0]).float()
        fake = self.ddp["discriminator"](fakes[0]).float()
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @torch.no_grad()
    def samples(self, count: int) -> torch.Tensor:
        """Pictures uint8 (count, 3, S, S), of noise that is always the same."""
        generator = self.networks["generator"].eval()
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(count, common.FIXED["noise"], generator=rng).to(next(self.parameters()))
        return torch.cat([dataset.to_uint8(generator(z)).cpu() for z in noise.split(100)])

    def measure(self, test, with_fid: bool) -> list[dict]:
        """SWD, FID, and the Frechet distance of 8x8 thumbnails, which needs no Inception but sees
        only colours and layout."""
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


# ---- Data: stage 1's pairs, or a downloaded folder ----------------------------------------------
# This file's docstring lists the layouts of a downloaded folder, whose names are used here.

SIDES = (("{}A", "{}B"), ("{}_A", "{}_B"), ("A/{}", "B/{}"), ("{}/A", "{}/B"))  # {}: the split
WANTED = {
    "pix2pix": "A|B in train/, or equal names in trainA/ and trainB/ (or train_A/, A/train/, A/)",
    "cyclegan": "pictures in trainA/ and trainB/ (or train_A/, A/train/, A/)",
    "dcgan": "four or more pictures",
}
FEWEST = 4  # pictures of which some can be held out


class Downloaded(dataset.Pictures):
    """Pictures from anywhere. Those that cannot be read are skipped and named.

    The cache holds black pictures in their place, and a file beside it says what is wrong with
    them. A subclass defines read(index), which returns a picture's square (UserError if it cannot
    be read), and leave_out(indices), which takes pictures out of the batches."""

    def load(self, index: int) -> torch.Tensor:
        try:
            return dataset.to_pixels(self.read(index))
        except UserError as error:
            self.skipped[index] = str(error)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def write_pixels(self, path: Path) -> None:
        self.skipped = {}  # filled by load
        super().write_pixels(path)
        runs.write_json(self.skipped_file(path.parent), self.skipped)

    def skipped_file(self, folder: Path) -> Path:
        """The JSON file {index: what is wrong} that belongs to the cache in this folder."""
        return folder / f"{self.cache_hash}.skipped.json"

    def cache(self, folder: Path):
        if runs.rank() == 0 and not self.skipped_file(folder).exists():
            # decode again: nothing says which of the cached pictures are black stand-ins
            (folder / f"{self.cache_hash}.u8").unlink(missing_ok=True)
        super().cache(folder)
        skipped = runs.read_json(self.skipped_file(folder))
        if not skipped:
            return self
        self.leave_out(torch.tensor([int(index) for index in skipped]))
        if min(self.counts) == 0:
            raise UserError(f"no picture is left: {next(iter(skipped.values()))}")
        if runs.rank() == 0:
            for reason in dict.fromkeys(skipped.values()):  # each once
                print(f"skipped: {reason}")
        return self


def about_with_heic(files: list[Path], about: object) -> list:
    """`about` for dataset.Pictures, and whether HEIC files among the files can be read, so that
    they are decoded anew once their package is installed."""
    has_heic = any(path.suffix.lower() in dataset.HEIC for path in files)
    return [about, has_heic and dataset.reads_heic()]


class DownloadedPairs(Downloaded, dataset.Pairs):
    """Pairs of a photo and its edit. A pair is left out if either cannot be read."""

    def __init__(
        self, photos: list[Path], edits: list[Path], size: int, concepts: list[dict], about: str
    ):
        files = [*photos, *edits]
        self.number_of_pairs = len(photos)
        indices = torch.arange(len(files)).view(2, -1).T  # (pairs, 2): of photo and edit
        super().__init__(files, size, concepts, [indices], about_with_heic(files, about))

    def leave_out(self, broken: torch.Tensor) -> None:
        [indices] = self.indices
        self.indices = [indices[~torch.isin(indices, broken).any(1)]]


class CombinedPairs(DownloadedPairs):
    """Pairs that share a file: A is its left half, B its right half, and of each the middle square
    is used. direction: AtoB if A is the photo and B its edit, else BtoA."""

    def __init__(self, files: list[Path], size: int, concepts: list[dict], direction: str):
        super().__init__(files, files, size, concepts, direction)
        self.direction = direction

    def read(self, index: int) -> Image.Image:
        picture = dataset.read_picture(self.files[index])
        width, height = picture.size
        half = width // 2
        is_photo = index < self.number_of_pairs
        is_a = is_photo == (self.direction == "AtoB")
        left = 0 if is_a else width - half
        picture = picture.crop((left, 0, left + half, height))
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)


class TwoFilePairs(DownloadedPairs):
    """Pairs (photo, edit) of two files. Used are a photo's middle square and the part of the edit
    that shows it."""

    def __init__(self, pairs: list[tuple[Path, Path]], size: int, concepts: list[dict]):
        photos = [photo for photo, _ in pairs]
        edits = [edit for _, edit in pairs]
        super().__init__(photos, edits, size, concepts, "two folders")

    def read(self, index: int) -> Image.Image:
        if index < self.number_of_pairs:
            return dataset.read_square(self.files[index], self.size)
        photo = self.files[index - self.number_of_pairs]
        return dataset.read_edit(self.files[index], dataset.picture_size(photo), self.size)


class PictureSets(Downloaded):
    """One set of pictures, or two, A and B; of each picture the middle square is used. A row of a
    batch is a picture of each set, drawn and mirrored independently.

    paired: whether B[i] is what A[i] should become, which only measuring uses."""

    def __init__(self, sets: list[list[Path]], size: int, concepts: list[dict], paired=False):
        files = [path for files in sets for path in files]
        lengths = [len(files) for files in sets]
        super().__init__(files, size, concepts, about_with_heic(files, lengths))
        self.paired = paired
        self.indices = list(torch.arange(len(files)).split(lengths))  # of each set's pictures

    @property
    def counts(self) -> list[int]:
        """[rows in an epoch]: as many as the largest set has pictures; 0 if a set has none."""
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
        """The pictures of set 0 or 1, uint8 (N, 3, S, S)."""
        return self.pixels[self.indices[number]]

    def plan(self, step, batch, seed):
        k = len(self.indices)
        lengths = [len(indices) for indices in self.indices]
        picks, flips = dataset.draw_picks(lengths, k * batch, step, seed)  # the sets take turns
        numbers = picks[:, 1].view(batch, k)
        columns = [self.indices[i][numbers[:, i]] for i in range(k)]
        concepts = torch.zeros(batch, dtype=torch.long)
        return torch.stack(columns, 1), flips.view(batch, k), concepts


def list_below(folder: Path) -> list[Path]:
    """All pictures in a folder and its subfolders."""
    return dataset.list_pictures(folder, subfolders=True)


def find_sides(folder: Path, *splits: str) -> list[Path]:
    """[A's folder, B's folder] of the first split that has both, or []. The split "" stands for A/
    and B/ themselves."""
    for split, names in itertools.product(splits, SIDES):
        sides = [folder / name.format(split).strip("/") for name in names]
        if all(list_below(side) for side in sides):
            return sides
    return []


def find_train_and_test_sides(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sides to train on, and those that are held out; [] for either that is not there."""
    train = find_sides(folder, "train")
    test = find_sides(folder, "test", "val")
    if not train and not test:
        train = find_sides(folder, "")
    return train, test


def find_combined(folder: Path, *splits: str) -> list[Path]:
    """The combined pictures of the first split that has some, or []."""
    for split in splits:
        files = dataset.list_pictures(folder / split)
        if not files and not find_sides(folder, split):
            files = list_below(folder / split)
        if files:
            return files
    return []


def match_sides(photos: Path, edits: Path) -> list[tuple[Path, Path]]:
    """The pairs (photo, edit) of equal names in two folders. Says how many photos have no edit."""
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
    """[training pairs, held-out pairs] of a folder of combined pictures or, if there are none, of
    two sides; [] if it holds neither."""
    combined = find_combined(folder, "train")
    if combined:
        parts = with_held_out(combined, find_combined(folder, "test", "val"), folder)
        return [CombinedPairs(files, size, concepts, direction) for files in parts]
    train, test = find_train_and_test_sides(folder)
    if not train:
        return []
    if direction == "BtoA":
        train.reverse()
        test.reverse()
    test_pairs = match_sides(*test) if test else []
    parts = with_held_out(match_sides(*train), test_pairs, folder)
    return [TwoFilePairs(pairs, size, concepts) for pairs in parts]


def find_unpaired(folder: Path, size: int, concepts: list[dict]) -> list:
    """[training pictures, held-out pictures] of a folder of two sides, or []."""
    train, test = find_train_and_test_sides(folder)
    if not train:
        return []
    train_files = []  # of A, of B
    test_files = []
    for i, side in enumerate(train):
        others = list_below(test[i]) if test else []
        files, held_out = with_held_out(list_below(side), others, side)
        train_files.append(files)
        test_files.append(held_out)
    return [PictureSets(sets, size, concepts) for sets in (train_files, test_files)]


def find_flat(folder: Path, size: int, concepts: list[dict]) -> list:
    """[training pictures, held-out pictures] of all that lie below a folder; [] of too few."""
    files = list_below(folder)
    if len(files) < FEWEST:
        return []
    return [PictureSets([part], size, concepts) for part in hold_out_a_tenth(files)]


def find_data(task: str, folder: Path, size: int, direction: str = "AtoB") -> list:
    """[training data, held-out data] of a downloaded folder, not decoded yet, as the task reads it.
    The folder's name becomes the concept's."""
    if task != "dcgan" and (size % 8 or size < 24):
        raise UserError(f"--size {size}: the networks need a multiple of 8 from 24 on")
    name = folder.resolve().name
    runs.check_name(name, folder)
    concepts = [{"name": name, "prompt": ""}]
    if task == "pix2pix":
        found = find_paired(folder, size, concepts, direction)
    elif task == "cyclegan":
        found = find_unpaired(folder, size, concepts)
    else:
        found = find_flat(folder, size, concepts)
    if not found:
        wanted = f"--task {task} wants {WANTED[task]}"
        raise UserError(f"--data {folder} holds {describe(folder)}; {wanted}")
    return found


def describe(folder: Path) -> str:
    """The first names in a folder, for an error message, and how many pictures its subfolders
    hold."""
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


def with_held_out(train: list, test: list, folder: Path) -> list[list]:
    """[train, test]; if `test` is empty, a tenth of `train` is held out for it. folder: where they
    were found, for messages."""
    if test:
        return [train, test]
    if len(train) < FEWEST:
        raise UserError(f"{folder}: {len(train)} pictures are too few to hold some out for a test")
    train, test = hold_out_a_tenth(train)
    if runs.rank() == 0:
        print(f"{folder} has no test pictures: {len(test)} of its others are held out")
    return [train, test]


def hold_out_a_tenth(items: list) -> tuple[list, list]:
    """(the others, a tenth drawn at random, but at least 2 items and at most 1000)"""
    order = np.random.default_rng(0).permutation(len(items))
    tenth = max(2, min(1000, len(items) // 10))
    return [items[i] for i in sorted(order[tenth:])], [items[i] for i in sorted(order[:tenth])]


def unpair(pairs: Path, concept: str) -> list[PictureSets]:
    """[unpaired training data, held-out pairs] of stage 1's pairs, so that CycleGAN can be measured
    against the truth: A is the photos of the first half of the training pairs, B the edits of the
    other half."""
    train = dataset.find_pairs(pairs, "train", [concept])
    test = dataset.find_pairs(pairs, "test", [concept])
    n = train.counts[0]
    if n < 2:
        raise UserError(f"{pairs / 'train'} holds one pair of {concept!r}; cyclegan needs two")
    photos = train.files[:n]
    edits = train.files[n:]
    unpaired = PictureSets([photos[: n // 2], edits[n // 2 :]], train.size, train.concepts)
    m = test.counts[0]
    sets = [test.files[:m], test.files[m:]]
    return [unpaired, PictureSets(sets, test.size, test.concepts, paired=True)]


def read_data(args, trained: common.Generator | None) -> list:
    """[training data, held-out data], not decoded yet, of --data or of stage 1's pairs."""
    if args.data:
        size = args.size or (64 if args.task == "dcgan" else 256)
        return find_data(args.task, args.data, size, args.direction)
    names = list(dict.fromkeys(args.concept or []))  # each once
    if args.task == "cyclegan" and len(names) == 1:
        return unpair(args.pairs, names[0])
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
    flag(
        "--task",
        choices=list(TASKS),
        default="pix2pix",
        help="pix2pix: pairs; cyclegan: unpaired pictures of two kinds; dcgan: pictures from noise",
    )
    flag(
        "--data",
        type=Path,
        help="a downloaded folder, in place of --pairs, in one of the layouts above",
    )
    flag(
        "--direction",
        choices=["AtoB", "BtoA"],
        default="AtoB",
        help="for pix2pix with --data, AtoB: A is the photo and B its edit; BtoA: the reverse",
    )
    flag(
        "--size",
        type=runs.count,
        help="width and height in pixels to which --data's pictures are scaled (default: 256, or "
        "64 for dcgan)",
    )
    training.add_flags(parser)
    flag(
        "--concept",
        action="append",
        help="train this concept of --pairs (default: all that the trained generator knows, or of "
        "a new one all of --pairs); repeatable",
    )
    flag(
        "--generator",
        default="auto",
        help=f"a trained generator's file, or to start from scratch one of "
        f"{', '.join(common.ARCHITECTURES)}; auto: stage 3's file, or with --data or for another "
        f"task a new one",
    )
    training.add_discriminator_flag(parser)
    flag("--no-text", action="store_true", help="a new e2gan takes no prompt and one concept")
    flag("--width", type=runs.count, default=64, help="channels of a new generator's first layer")
    flag(
        "--method",
        choices=["coronet", "uniform", "random", "magnitude"],
        default="coronet",
        help="how channels are chosen, coronet: by a search; to compare with, uniform: all groups "
        "narrowed alike; random: by chance; magnitude: by the size of their weights",
    )
    flag(
        "--start-from",
        choices=["weights", "paper"],
        default="weights",
        help="the search starts from, weights: latents of 1 and the network's weights; paper: "
        "random latents and weights",
    )
    flag("--keep", type=runs.positive, default=0.25, help="share of the MACs to keep, below 1")
    flag(
        "--multiple",
        type=runs.count,
        default=1,
        help="round pruned widths to multiples of this; 8 suits the units of GPUs and phones",
    )
    flag(
        "--prune-discriminator",
        action="store_true",
        help="prune the discriminators too, to the same share",
    )
    flag("--search-epochs", type=runs.count, default=20, help="passes over the data in the search")
    flag(
        "--epochs",
        type=runs.count,
        default=180,
        help="passes over the data after the search, in the second half of which the learning "
        "rates fall to 0",
    )
    flag(
        "--lr",
        type=runs.positive,
        default=2e-4,
        help="the generators' learning rate after the search",
    )
    flag(
        "--lr-search",
        type=runs.positive,
        default=1e-4,
        help="the generators' learning rate in the search",
    )
    flag(
        "--lr-z",
        type=runs.positive,
        default=1e-4,
        help="the latents' learning rate (SGD with momentum 0.9)",
    )
    flag("--cycle", type=runs.weight, default=10.0, help="cyclegan: weight of the cycle loss")
    flag(
        "--identity",
        type=runs.weight,
        default=0.5,
        help="cyclegan: weight of the identity loss, times --cycle",
    )
    return parser.parse(DEMO)


def default_generator(args) -> str:
    """The --generator that `auto` means."""
    if args.task == "cyclegan":
        return "resnet9"
    if args.task == "dcgan":
        return "dcgan"
    if args.data:
        return "unet256"
    folder = "runs/demo/base" if args.demo else "runs/base"
    return f"{folder}/generator.safetensors"


def read_generator(args) -> common.Generator | None:
    """The trained generator in the file --generator, on the CPU; None if --generator names an
    architecture. UserError for flags that do not fit it."""
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
    if trained and args.start_from == "paper":
        raise UserError(
            "--start-from paper forgets what a generator learned: leave it out, or give an "
            "architecture as --generator"
        )
    if (args.concept and args.data) or (args.size and not args.data):
        raise UserError("--concept goes with --pairs and --size with --data: leave one out")
    return common.load_generator(path) if trained else None


def write_pruning(path: Path, task, targets: dict[str, Target]) -> None:
    """Draws for each pruned network what share of every group's channels is left, and marks what
    would be left if all groups were narrowed alike: a group above its mark was worth its MACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(targets), 3.8), layout="constrained")
    for i, (name, target) in enumerate(targets.items()):
        before = target.config["widths"]
        after = task.networks[name].config["widths"]
        groups = list(before)
        axes = figure.add_subplot(1, len(targets), i + 1)
        bars = axes.bar(groups, [100 * after[group] / before[group] for group in groups])
        axes.bar_label(
            bars, [f"{after[group]} of\n{before[group]}" for group in groups], fontsize=8
        )
        alike = [100 * target.alike[group] / before[group] for group in groups]
        axes.scatter(groups, alike, 300, "black", marker="_", label="all groups narrowed alike")
        axes.tick_params(axis="x", rotation=90)
        axes.set(title=name, ylabel="% of the channels left")
        axes.margins(y=0.15)
        axes.legend()
    runs.replace_file(path, lambda part: figure.savefig(part, format="png", dpi=110))


def pruning_rows(task, targets: dict[str, Target], args) -> tuple[list[dict], list[dict]]:
    """The rows of two tables: each pruned network's size before and after, and the widths of its
    channel groups."""
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
    """Adds to rows the PSNR and FID of earlier ones, as columns such as "PSNR dB before"."""
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
    pruned = dict(task.networks) if args.prune_discriminator else task.named("generator")
    targets = {name: Target(network, args.keep, args.multiple) for name, network in pruned.items()}
    data.cache(args.cache)
    test.cache(args.cache)  # from here on all input is known to be good
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
    training.set_threads(device, task, args.batch, args.crop or data.size, args.out)

    epochs = args.search_epochs + args.epochs
    steps = args.steps or epochs * dataset.steps_per_epoch(data.counts, args.batch)
    search_steps = max(1, round(steps * args.search_epochs / epochs))
    writes = runs.rank() == 0  # the first process, but all of them measure
    with_fid = args.fid == "auto"
    before = task.measure(test, with_fid) if trained else []
    pace = search(task, targets, data, test, args, search_steps, trained is not None)
    if writes:
        write_pruning(args.out / "pruning.png", task, targets)
        for name, network in task.networks.items():
            common.save_network(args.out / f"sliced/{name}.safetensors", network)
    sliced = task.measure(test, with_fid=False)
    for pool in task.pools.values():
        pool.clear()
    # steps that the search did not need are trained here, so that all methods train equally long
    pace |= converge(task, data, test, args, steps - pace["search steps"])
    if writes:
        for name, network in task.networks.items():
            common.save_network(args.out / f"{name}.safetensors", network)
    after = task.measure(test, with_fid)
    if not writes:
        return
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
