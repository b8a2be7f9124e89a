"""Prunes a generator while it trains, to the share of its MACs that you ask for.

CoroNetGAN (arXiv 2403.08261), section 3. Searching: small hypernetworks make every weight from latent vectors, one element
a channel; after each step the latents are soft-thresholded, so channels fade until the target is met. Then the generated
weights are sliced to the surviving channels: a dense, smaller generator, no hypernetwork left. Converging: that one trains
on as usual.

`--generator FILE` prunes a trained base and keeps what it learned; `--generator e2gan` (or resnet9, unet256) starts from
scratch.

Reads   runs/pairs, runs/base/generator.safetensors
Writes  runs/coronet/generator.safetensors      an ordinary generator: fine-tune adapters on it, export it
        runs/coronet/sliced.safetensors         what the search left, before converging
        search.safetensors, converge.safetensors    to continue
        search.jsonl, converge.jsonl, search.png, converge.png, channels.png, samples/*.png, result.json

    python 05_prune_coronet.py --demo
    python 05_prune_coronet.py --generator runs/base/generator.safetensors --keep 0.25
    torchrun --nproc_per_node=8 05_prune_coronet.py --keep 0.25 --batch 128
"""
import copy
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import common

PAPER = dict(
    pairs=Path("runs/pairs"), concept=[], generator="runs/base/generator.safetensors", out=Path("runs/coronet"),
    keep=0.25, width=64, clip="ViT-B-32:openai",
    search_epochs=20, epochs=180,   # together pix2pix's 200
    batch=16, lr=2e-4, lr_search=1e-4, lr_d=2e-4, lr_z=1e-2, l1=100.0, precision="auto", cache_gb=8.0, fid="auto",
    save_every=1000,
)
DEMO = dict(
    pairs=Path("runs/demo/pairs"), generator="runs/demo/base/generator.safetensors", out=Path("runs/demo/coronet"),
    width=32, clip="ViT-S-32:random", search_epochs=3, epochs=5, lr=1e-3, lr_search=2e-4,
    fid="off", save_every=144,
)
LOG_EVERY = 50
MOST = 0.05         # the largest amount by which one step may shrink a latent


# ---------------------------------------------------------------------------------------------------------------------
# Data in the field's usual layouts: pix2pix's, CycleGAN's, a folder of pictures, CIFAR-10

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp"}
LAYOUTS = ("train/ and test/ or val/ of pictures that hold A|B side by side (pix2pix), trainA/ trainB/ testA/ testB/ (cyclegan), "
           "two or more pictures or cifar-10-batches-py/ (dcgan)")


def list_pictures(folder: Path, pattern: str = "*") -> list[Path]:
    """Sorted picture files, hidden ones left out; with the pattern "**/*" those of subfolders too."""
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def fit(picture: Image.Image, size: int) -> torch.Tensor:
    """The middle square of a picture, RGB, its short side scaled to `size`, as uint8 (3, size, size)."""
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def header(path: Path, side_by_side: bool = False) -> bytes:
    """What a picture file adds to the fingerprint; JPEG has no checksum, so more of its end than of our PNGs'. UserError where
    it is no picture, or does not hold two squares side by side."""
    with common.opened(path) as picture:
        if side_by_side and picture.width != 2 * picture.height:
            raise common.UserError(f"{path} is {picture.width}x{picture.height}; A|B side by side is twice as wide as high")
    return common.file_ends(path, 4096)


@dataclasses.dataclass(kw_only=True)
class SideBySide(common.Pairs):
    """pix2pix's layout: each file holds A and B side by side, two squares. AtoB: A is the photo and B its edit."""
    direction: str                          # AtoB or BtoA

    def path(self, place):
        return self.folder / self.names[place % len(self.names)]

    def load(self, place):
        with common.opened(self.path(place)) as picture:
            picture = common.upright(picture)
        half = picture.width // 2
        left = 0 if (place < len(self.names)) == (self.direction == "AtoB") else half
        return fit(picture.crop((left, 0, left + half, picture.height)), self.size)

    def check(self):
        return common.fingerprint([self.names, self.concepts, self.size, self.direction],
                                  lambda name: header(self.folder / name, True), self.names)


@dataclasses.dataclass(kw_only=True)
class Flat(common.Pictures):
    """Pictures of any size in any format, a place each; the middle square counts."""
    files: list[Path]

    def __post_init__(self):
        self.places, self.counts = len(self.files), [len(self.files)]
        names = [f"{path.parent.name}/{path.name}" for path in self.files]
        self.fingerprint = common.fingerprint([names, self.concepts, self.size], header, self.files)

    def load(self, place):
        with common.opened(self.files[place]) as picture:
            picture.draft(None, (2 * self.size, 2 * self.size))     # JPEG decodes several times faster at 1/2, 1/4, 1/8
            return fit(common.upright(picture), self.size)

    def plan(self, step, batch, seed):
        picks, flips = common.draw_picks(self.counts, batch, step, seed)
        return picks[:, 1:], flips[:, None], picks[:, 0]            # the one concept is 0


@dataclasses.dataclass(kw_only=True)
class Unpaired(Flat):
    """CycleGAN's layout: pictures of two kinds, A's files before B's. A row of a batch is an A and a B drawn independently, and
    mirrored each for itself; an epoch passes over the larger set once."""
    first_b: int                            # how many are A's

    def __post_init__(self):
        super().__post_init__()
        self.sets = self.first_b, self.places - self.first_b
        self.counts = [max(self.sets)]

    @property
    def photos(self) -> torch.Tensor:
        """A's pictures (nA, 3, S, S) uint8, once decoded."""
        return self.pixels[:self.first_b]

    @property
    def others(self) -> torch.Tensor:
        """B's pictures (nB, 3, S, S) uint8, once decoded; none of them belongs to one of A's."""
        return self.pixels[self.first_b:]

    def plan(self, step, batch, seed):
        picks, flips = common.draw_picks(self.sets, 2 * batch, step, seed)      # A and B take turns
        places = picks[:, 1].view(batch, 2) + torch.tensor([0, self.first_b])
        return places, flips.view(batch, 2), torch.zeros(batch, dtype=torch.long)


class Cifar(Flat):
    """The same of an array (N, H, W, 3) uint8 in the place of files."""

    def __post_init__(self):
        self.places, self.counts = len(self.files), [len(self.files)]
        self.fingerprint = common.fingerprint([self.concepts, self.size], np.ndarray.tobytes, [self.files])

    def load(self, place):
        return fit(Image.fromarray(self.files[place]), self.size)


def unpaired_from_pairs(pairs: Path, concept: str) -> tuple[Unpaired, common.Pairs]:
    """Unpaired training data whose truth is known: A is the photos of the first half of the training pairs, B the edits of the
    others'. The test pairs stay pairs, decoded."""
    data, test = common.find_pairs(pairs, "train", [concept]), common.load_pairs(pairs, "test", [concept])
    n = len(data.names)
    if n < 2:
        raise common.UserError(f"{pairs / 'train'} holds {n} pair of {concept!r}; it takes two to take them apart")
    files = [data.path(place) for place in (*range(n // 2), *range(n + n // 2, 2 * n))]
    return Unpaired(files=files, first_b=n // 2, size=data.size, concepts=data.concepts), test


def cifar10(root: Path, download: bool, size: int) -> tuple[Cifar, Cifar]:
    """CIFAR-10's 50,000 training pictures, and the first 1000 of its test pictures. Its files are pickles: torchvision compares
    each one's MD5 with the one it knows before it unpickles anything."""
    from torchvision import datasets
    several = torch.distributed.is_initialized()
    try:
        if download and not (several and torch.distributed.get_rank()):
            datasets.CIFAR10(root, download=True)
        if several:
            torch.distributed.barrier()     # the first process downloads for all
        train, test = (datasets.CIFAR10(root, train=split).data for split in (True, False))
    except (RuntimeError, OSError) as error:
        raise common.UserError(f"CIFAR-10 cannot be {'downloaded to' if download else 'read from'} {root} ({error}); unpack "
                               f"{datasets.CIFAR10.url} there")
    return tuple(Cifar(files=part, size=size, concepts=[{"name": "cifar10", "prompt": ""}]) for part in (train, test[:1000]))


def find_data(task: str, folder: Path, size: int, direction: str = "AtoB") -> tuple[common.Pictures, common.Pictures]:
    """A folder's training pictures, not decoded yet, and its held-out ones, decoded, in the layout that the task reads:
    pix2pix: SideBySide; cyclegan: Unpaired; dcgan: Flat, a tenth of them held out, at most 1000; or CIFAR-10, which torchvision
    downloads to runs/cifar10 if `folder` is "cifar10". The one concept bears the folder's name."""
    if task == "dcgan" and (size < 8 or size & (size - 1)):
        raise common.UserError(f"--size {size}: dcgan needs a power of two from 8 on")
    if size % 8 or size < 24 and task != "dcgan":
        raise common.UserError(f"--size {size}: the networks need a multiple of 8 from 24 on")
    same = dict(size=size, concepts=[{"name": folder.resolve().name, "prompt": ""}])
    found = {name: list_pictures(folder / name) for name in ("train", "test", "val", "trainA", "trainB", "testA", "testB")}
    download = folder == Path("cifar10") and not folder.exists()
    if task == "dcgan" and (download or (folder / "cifar-10-batches-py").is_dir()):
        train, test = cifar10(Path("runs/cifar10") if download else folder, download, size)
    elif not folder.is_dir():
        raise common.UserError(f"{folder} does not exist")
    elif task == "pix2pix" and found["train"] and (held_out := "test" if found["test"] else "val" if found["val"] else ""):
        train, test = (SideBySide(folder=folder / split, names=[path.name for path in found[split]],
                                  rows=[torch.arange(len(found[split]))], direction=direction, **same)
                       for split in ("train", held_out))
    elif task == "cyclegan" and all(found[split + kind] for split in ("train", "test") for kind in "AB"):
        train, test = (Unpaired(files=found[split + "A"] + found[split + "B"], first_b=len(found[split + "A"]), **same)
                       for split in ("train", "test"))
    elif task == "dcgan" and len(files := list_pictures(folder, "**/*")) > 1:
        order, tenth = np.random.default_rng(0).permutation(len(files)), max(1, min(1000, len(files) // 10))
        train, test = (Flat(files=[files[i] for i in sorted(part)], **same) for part in (order[tenth:], order[:tenth]))
    else:
        there = sorted(path.name for path in folder.iterdir())
        raise common.UserError(f"--task {task} finds no data in {folder}; looked for {LAYOUTS}; found "
                               f"{', '.join(there[:8]) or 'nothing'}{', ...' * (len(there) > 8)}")
    return train, test.decoded()


def mac_terms(generator: common.Generator, size: int) -> list[tuple[tuple, tuple, int]]:
    """The same count as a formula in the widths: a list of (reads, writes, unit), whose sum over
    channels(reads) * channels(writes) * unit is the number of MACs. Cheap enough to be solved for widths at every step."""
    terms, hooks = [], []

    def record(module, inputs, output):
        if isinstance(module, common.Attention):
            n, m = inputs[0].shape[1], inputs[1].shape[1]
            terms.extend([(module.q.writes, (), n * m), (module.v.writes, (), n * m)])
        else:
            x = inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output
            positions = x.numel() // x.shape[-1 if isinstance(module, torch.nn.Linear) else 1]
            terms.append((module.reads, module.writes, positions * module.weight[0, 0].numel()))

    twin = copy.deepcopy(generator).to("meta").eval()
    for module in twin.modules():
        if hasattr(module, "reads") or isinstance(module, common.Attention):
            hooks.append(module.register_forward_hook(record))
    with torch.no_grad():
        twin(torch.empty(1, 3, size, size, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    return terms


def macs_of(terms: list[tuple[tuple, tuple, int]], widths: dict) -> int:
    """mac_terms' formula for some widths (which must name the fixed groups too)."""
    total = 0
    for reads, writes, unit in terms:
        total += unit * sum(widths[g] for g in reads) * (sum(widths[g] for g in writes) if writes else 1)
    return total


def channel_importance(generator: common.Generator) -> dict[str, torch.Tensor]:
    """{group: (channels,)}: the RMS of the weights that write or read each channel, relative to its layer's, averaged over the
    layers; mean 1 a group. Where latents start from when the generator is trained already (a choice of ours)."""
    widths = common.all_widths(generator.config)
    sums = {group: torch.zeros(n) for group, n in widths.items()}
    for _, module in common.named_layers(generator):
        weight = module.weight.detach().cpu()
        weight = weight.transpose(0, 1) if isinstance(module, torch.nn.ConvTranspose2d) else weight
        square = weight.square().reshape(*weight.shape[:2], -1).mean(2)                           # (O, I)
        for groups, rms in ((module.writes, square.mean(1).sqrt()), (module.reads, square.mean(0).sqrt())):
            for group, part in zip(groups, rms.split([widths[g] for g in groups])):
                sums[group] += part / rms.mean()
    return {group: sums[group] / sums[group].mean() for group in generator.config["widths"]}


class Latents(torch.nn.ParameterDict):
    """One vector per channel group, {group: (channels,)}: what the search shrinks."""

    def __init__(self, generator: common.Generator, trained: bool):
        """N(0, 1) as in the paper. For a trained generator: its channels ranked by importance and spread evenly over two decades,
        0.01 to 1, so that half of them can fade while the others barely move (a choice of ours)."""
        def spread(importance):
            ranks = importance.argsort().argsort()
            return 10 ** (2 * ranks / max(1, len(ranks) - 1) - 2)
        importance = channel_importance(generator) if trained else {}
        super().__init__({group: spread(importance[group]) if trained else torch.randn(n)
                          for group, n in generator.config["widths"].items()})

    def with_fixed(self, generator: common.Generator) -> dict[str, torch.Tensor]:
        """The latents and ones for the groups that are never pruned: RGB and text."""
        widths, device = common.all_widths(generator.config), next(self.parameters()).device
        return {g: self[g] if g in self else torch.ones(n, device=device) for g, n in widths.items()}


class Target:
    """Knows how many MACs a choice of widths costs, and which threshold on the latents brings them under a share of all."""

    def __init__(self, generator: common.Generator, keep: float):
        self.terms = mac_terms(generator, generator.config["size"])
        self.full = common.all_widths(generator.config)
        self.floor = {g: min(n, max(2, n // 16)) for g, n in generator.config["widths"].items()}
        smallest = self.share({**self.full, **self.floor})
        if not 0 < keep < 1 or keep < smallest:
            raise common.UserError(f"--keep {keep}: give a share of the MACs below 1 and not under {smallest:.3f}, what is left "
                                   "with a sixteenth of the channels")

    def share(self, widths: dict[str, int]) -> float:
        return macs_of(self.terms, widths) / macs_of(self.terms, self.full)

    def widths(self, latents: dict[str, torch.Tensor], threshold: float) -> dict[str, int]:
        """Channels with |z| above the threshold, per group; never under the floor."""
        above = {g: max(int((z.abs() > threshold).sum()), self.floor[g]) for g, z in latents.items()}
        return {**self.full, **above}

    def threshold(self, latents: dict[str, torch.Tensor], share: float, most: float) -> float:
        """The smallest threshold (to 1/1000 of `most`) that brings the MACs to `share` or less; `most` if none does."""
        low, high = -most / 1000, most                          # below 0: nothing is dropped
        if self.share(self.widths(latents, 0.0)) <= share:
            return 0.0
        while high - low > most / 1000:
            middle = (low + high) / 2
            low, high = (low, middle) if self.share(self.widths(latents, middle)) <= share else (middle, high)
        return high

    def kept(self, latents: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """{group: sorted indices} of the largest latents such that the MACs come to `share` or just less."""
        widths = self.widths(latents, self.threshold(latents, share, max(z.abs().max().item() for z in latents.values())))
        return {g: z.abs().topk(widths[g]).indices.sort().values for g, z in latents.items()}


def soft_threshold(latents: Latents, amount: float) -> None:
    """The proximal step of the l1 norm: z <- sign(z) max(|z| - amount, 0)."""
    with torch.no_grad():
        for z in latents.values():
            z.copy_(z.sign() * (z.abs() - amount).clamp(min=0))


def write_channels(path: Path, config: dict) -> None:
    """A bar chart of every group's channels, before and after."""
    from matplotlib.figure import Figure
    groups = list(config["full"])
    figure = Figure(figsize=(0.6 * len(groups) + 2, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(groups, config["full"].values(), color="lightgrey", label="before")
    axes.bar(groups, [config["widths"][g] for g in groups], color="tab:blue", label="after")
    axes.tick_params(axis="x", rotation=60)
    axes.set_ylabel("channels")
    axes.legend()
    common.replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=120))


def train(generator, discriminator, optimizers: list, after_step, data: common.Pairs, test: common.Pairs, args, phase: str,
          steps: int, lr: float, decay: bool, device, rank: int, world: int) -> dict:
    """The loop of both phases: least-squares GAN + L1, as in stage 3. `after_step(step)` returns True to end the phase.
    Returns its pace as columns of the table."""
    opt_g, opt_d = optimizers[:2]
    concepts = torch.tensor([generator.concept(concept["name"]) for concept in data.concepts], device=device)
    state = dict(g=generator, d=discriminator, **{f"opt{i}": optimizer for i, optimizer in enumerate(optimizers)})
    start = common.load_state(args.out / f"{phase}.safetensors", **state)
    log = common.read_log(args.out / f"{phase}.jsonl", start)
    # the discriminator's own step goes through DDP; the generator's step passes through its plain weights
    ddp_g, ddp_d = (common.data_parallel(network, device, world) for network in (generator, discriminator))
    sums, summed, began, done = torch.zeros(3, device=device), 0, time.time(), log[-1]["step"] if log else 0
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", desc=phase, disable=rank > 0)
    generator.train()
    for step, (photo, edit, concept) in zip(bar, data.batches(args.batch, range(start, steps), args.seed, rank, world, device)):
        common.set_lr(opt_g, lr, step if decay else 0, steps)
        common.set_lr(opt_d, args.lr_d, step if decay else 0, steps)
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)    # for dropout: no generator state to save
        concept = concepts[concept]
        text = common.text_of(generator, concept)

        with common.autocast(device, args.precision):
            fake = ddp_g(photo, concept)
            twice = photo.repeat(2, 1, 1, 1), torch.cat([edit, fake.detach()]), None if text is None else text.repeat(2, 1)
            score_real, score_fake = ddp_d(*twice).float().chunk(2)
        loss_d = ((score_real - 1).square().mean() + score_fake.square().mean()) / 2
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        discriminator.requires_grad_(False)
        with common.autocast(device, args.precision):
            score = discriminator(photo, fake, text).float()
        l1 = (fake.float() - edit).abs().mean()
        loss_g = (score - 1).square().mean() + args.l1 * l1
        for optimizer in (opt_g, *optimizers[2:]):
            optimizer.zero_grad()
        loss_g.backward()
        opt_g.step()
        discriminator.requires_grad_(True)
        ended = after_step(step) or step + 1 == steps
        done = step + 1

        sums += torch.stack([loss_g, loss_d, l1]).detach()
        summed += 1
        save = ended or done % args.save_every == 0
        if save or done % LOG_EVERY == 0:
            log.append(common.check_health(sums / summed, fake, edit, score_real, generator, done, args.out, world))
            bar.set_postfix({key: f"{log[-1][key]:.4g}" for key in ("G", "D", "L1")})
            sums, summed = torch.zeros_like(sums), 0
        if save and rank == 0:
            common.write_png(args.out / "samples" / f"{phase}-{done:07d}.png", common.progress_picture(generator, test))
            common.write_text(args.out / f"{phase}.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            common.write_curve(args.out / f"{phase}.png", log)
            common.save_state(args.out / f"{phase}.safetensors", steps if ended else done, **state)
            generator.train()
        if ended:
            break
    seconds = time.time() - began
    return {f"{phase} steps": done, f"{phase} s": None if start else seconds}


def search(generator, discriminator, trained: bool, target: Target, data, test, args, device, rank: int, world: int):
    """Searching, then slicing. Returns the dense small generator, and the pace.

    The paper's threshold per step is lambda * lr with a constant lambda. Here it is the smallest amount that keeps the MACs on
    a straight line which reaches the target after nine tenths of the phase (a choice of ours: it meets any target on time)."""
    lr = args.lr_search if trained else args.lr
    latents = Latents(generator, trained).to(device)
    common.add_hypernetwork(generator, latents.with_fixed(generator), trained)
    generator.latents = latents                                 # saved, and averaged over processes, with the generator
    opt_g = common.adam([p for name, p in generator.named_parameters() if not name.startswith("latents.")], lr)
    opt_d = common.adam(discriminator.parameters(), args.lr_d)
    opt_z = torch.optim.SGD(latents.parameters(), args.lr_z, momentum=0.9)
    steps = args.search_epochs * common.steps_per_epoch(data.counts, args.batch)

    def shrink(step: int) -> bool:
        torch.nn.utils.clip_grad_norm_(latents.parameters(), 1.0)
        opt_z.step()
        line = 1 - (1 - args.keep) * min(1.0, (step + 1) / (0.9 * steps))
        on_cpu = {g: z.detach().cpu() for g, z in latents.items()}
        soft_threshold(latents, target.threshold(on_cpu, line, MOST))
        return target.share(target.widths({g: z.detach().cpu() for g, z in latents.items()}, 0.0)) <= args.keep

    pace = train(generator, discriminator, [opt_g, opt_d, opt_z], shrink, data, test, args, "search", steps, lr,
                 False, device, rank, world)
    kept = target.kept({g: z.detach().cpu() for g, z in latents.items()}, args.keep)
    common.remove_parametrizations(generator)
    del generator.latents
    return common.slice_generator(generator, kept), pace


def source_generator(args, device: torch.device) -> tuple[common.Generator, bool]:
    """--generator as a network, and whether it is trained already."""
    if args.generator not in common.ARCHITECTURES:
        return common.load_generator(Path(args.generator), device), True
    known = common.read_concepts(args.pairs)
    pairs = common.find_pairs(args.pairs, "test", args.concept or list(known))
    return common.new_generator(args.generator, args.width, pairs.size, pairs.concepts, args.clip, device), False


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote")
    parser.add_argument("--concept", action="append", help="train on this concept; can be repeated (default: the generator's)")
    parser.add_argument("--generator", help="a trained generator's file, or an architecture to train from scratch: "
                                            + ", ".join(common.ARCHITECTURES))
    parser.add_argument("--keep", type=float, help="share of the MACs to keep")
    parser.add_argument("--width", type=int, help="channels of the first layer, for a new architecture")
    parser.add_argument("--clip", help="text tower for a new e2gan as open_clip's MODEL:WEIGHTS")
    parser.add_argument("--search-epochs", type=int, help="passes over all pairs while pruning")
    parser.add_argument("--epochs", type=int, help="passes over all pairs after it; the learning rates fall to 0 in the second half")
    parser.add_argument("--batch", type=int, help="pairs a step, all processes together")
    parser.add_argument("--lr", type=float, help="the generator's learning rate while converging")
    parser.add_argument("--lr-search", type=float, help="the hypernetworks' learning rate when the generator is trained already: "
                                                        "a weight is a sum of nine terms, and all of them move")
    parser.add_argument("--lr-d", type=float, help="the discriminator's learning rate")
    parser.add_argument("--lr-z", type=float, help="the latents' learning rate (SGD with momentum 0.9, gradients clipped to norm 1)")
    parser.add_argument("--l1", type=float, help="weight of the L1 loss")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="auto: bf16 autocast where the hardware has it")
    parser.add_argument("--cache-gb", type=float, help="most pixels to hold on the device; more are held in a file in --out")
    parser.add_argument("--fid", choices=["auto", "off"], help=common.FID_HELP)
    parser.add_argument("--save-every", type=int, help="steps between saved states and progress pictures")
    args = parser.parse()

    began = time.time()
    device = common.pick_device(args.device)
    rank, world = common.start_processes(device)
    torch.manual_seed(args.seed)
    generator, trained = source_generator(args, device)
    names = list(dict.fromkeys(args.concept)) or [concept["name"] for concept in generator.config["concepts"]]
    for name in names:
        generator.concept(name)         # an unknown one ends here
    data, test = common.find_pairs(args.pairs, "train", names), common.load_pairs(args.pairs, "test", names)
    target = Target(generator, args.keep)
    settings = common.settings_of(args, "05_prune_coronet", data=[data.fingerprint, test.fingerprint], source=getattr(generator, "sha256", ""))
    if common.begin_run(args.out, settings, args.overwrite):
        return

    data.hold(args.cache_gb, args.out, device, rank, world)
    with_fid = args.fid == "auto" and rank == 0
    before = common.evaluate(generator, test, with_fid and trained)
    size = generator.config["size"]
    full = {"parameters M": common.count_parameters(generator) / 1e6, "GMACs": common.count_macs(generator, size) / 1e9}
    discriminator = common.Discriminator(generator.config["width"], generator.config.get("text_dim", 0)).to(device)
    sliced = args.out / "sliced.safetensors"
    pace = {}
    if not sliced.exists():
        small, pace = search(generator, discriminator, trained, target, data, test, args, device, rank, world)
        if rank == 0:
            common.save_generator(sliced, small)
            write_channels(args.out / "channels.png", small.config)
    if world > 1:
        torch.distributed.barrier()
    common.load_state(args.out / "search.safetensors", d=discriminator)     # goes on with what it learned, also when continued
    small = common.load_generator(sliced, device)
    after_slice = common.evaluate(small, test)
    small.requires_grad_(True)
    optimizers = [common.adam(small.parameters(), args.lr), common.adam(discriminator.parameters(), args.lr_d)]
    steps = args.epochs * common.steps_per_epoch(data.counts, args.batch)
    pace |= train(small, discriminator, optimizers, lambda step: False, data, test, args, "converge", steps, args.lr,
                  True, device, rank, world)
    if rank > 0:
        return
    common.save_generator(args.out / "generator.safetensors", small)
    row = {"generator": args.generator, "keep": args.keep, "size px": size,
           "GMACs before": full["GMACs"], "GMACs": common.count_macs(small, size) / 1e9,
           "MACs %": 100 * common.count_macs(small, size) / 1e9 / full["GMACs"],
           "parameters M before": full["parameters M"], "parameters M": common.count_parameters(small) / 1e6,
           "batch": args.batch, **pace}
    rows = [{"concept": a["concept"], "before dB": b["PSNR dB"] if trained else None, "sliced dB": s["PSNR dB"],
             **({"FID before": b["FID"]} if "FID" in b else {}), **a}
            for b, s, a in zip(before, after_slice, common.evaluate(small, test, with_fid))]
    channels = [{"group": g, "before": n, "after": small.config["widths"][g]} for g, n in small.config["full"].items()]
    common.write_result(args.out, "05_prune_coronet", began, common.marks_of(args, args.pairs), {
        "Pruning": [row], "Pruned generator, held-out photos": rows, "Channels": channels})


if __name__ == "__main__":
    common.run(main)
