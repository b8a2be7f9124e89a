"""Prunes a GAN while it trains, to the share of its MACs that you ask for.

CoroNetGAN (arXiv 2403.08261), section 3. Searching: small hypernetworks make every weight from latent vectors, one element
a channel; after each step the latents are soft-thresholded, so channels fade until the target is met. Then the generated
weights are sliced to the surviving channels: a dense, smaller network, no hypernetwork left. Converging: that one trains
on as usual.

`--task pix2pix` (paired): `--generator FILE` prunes a trained base and keeps what it learned; `--generator e2gan` (or resnet9,
unet256) starts from scratch. `--task cyclegan` (unpaired, both directions; resnet9, or e2gan without text) and `--task dcgan`
(pictures from noise) start from scratch.

Reads   runs/pairs and runs/base/generator.safetensors, or --data, a folder as downloaded: pix2pix's (train, val or test, with A|B side
        by side), CycleGAN's (trainA trainB testA testB), or a flat folder of pictures; `--data cifar10` downloads CIFAR-10
Writes  runs/coronet/generator.safetensors      an ordinary generator: fine-tune adapters on it, export it
                                                (cyclegan: generator_AtoB.safetensors, generator_BtoA.safetensors)
        sliced/*.safetensors                    what the search left, before converging; the discriminators too
        search.safetensors, converge.safetensors    to continue
        search.jsonl, converge.jsonl, search.png, converge.png, pruning.png, samples/*.png, result.json

    python 05_prune_coronet.py --demo
    python 05_prune_coronet.py --generator runs/base/generator.safetensors --keep 0.25
    python 05_prune_coronet.py --task cyclegan --data horse2zebra --keep 0.25 --prune-discriminator --batch 1
    torchrun --nproc_per_node=8 05_prune_coronet.py --keep 0.25 --batch 128
"""

import copy
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils import parametrize
from tqdm import tqdm

import common

PAPER = dict(
    task="pix2pix",
    pairs=Path("runs/pairs"),
    concept=[],
    generator="auto",
    out=Path("runs/coronet"),
    data=None,
    direction="AtoB",
    size=0,
    method="coronet",
    start="weights",
    keep=0.25,
    width=64,
    clip="ViT-B-32:openai",
    search_epochs=20,
    epochs=180,  # together pix2pix's 200
    batch=16,
    lr=2e-4,
    lr_search=1e-4,
    lr_d=2e-4,
    lr_z=1e-2,
    l1=100.0,
    cycle=10.0,
    identity=0.5,
    precision="auto",
    cache_gb=8.0,
    fid="auto",
    save_every=1000,
)
DEMO = dict(
    pairs=Path("runs/demo/pairs"),
    out=Path("runs/demo/coronet"),
    width=32,
    clip="ViT-S-32:random",
    search_epochs=3,
    epochs=5,
    lr=1e-3,
    lr_search=2e-4,
    fid="off",
    save_every=144,
)
LOG_EVERY = 50
MOST = 0.05  # the largest amount by which one step may shrink a latent
POOL = 50  # CycleGAN's number of earlier fakes


# ---------------------------------------------------------------------------------------------------------------------
# Data in the field's usual layouts: pix2pix's, CycleGAN's, a folder of pictures, CIFAR-10

LAYOUTS = (
    "train/ and test/ or val/ of pictures that hold A|B side by side (pix2pix), trainA/ trainB/ testA/ testB/ (cyclegan), "
    "two or more pictures or cifar-10-batches-py/ (dcgan)"
)


def fit(picture: Image.Image, size: int) -> torch.Tensor:
    """The middle square of a picture, RGB, its short side scaled to `size`, as uint8 (3, size, size)."""
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def header(path: Path, side_by_side: bool = False) -> bytes:
    """What a picture file adds to the fingerprint; JPEG has no checksum, so more of its end than of our PNGs'. UserError where
    it is no picture, or does not hold two squares side by side."""
    with common.opened(path) as picture:
        if side_by_side and picture.width != 2 * picture.height:
            raise common.UserError(
                f"{path} is {picture.width}x{picture.height}; A|B side by side is twice as wide as high"
            )
    return common.file_ends(path, 4096)


@dataclasses.dataclass(kw_only=True)
class SideBySide(common.Pairs):
    """pix2pix's layout: each file holds A and B side by side, two squares. AtoB: A is the photo and B its edit."""

    direction: str  # AtoB or BtoA

    def statistics(self, concept):
        return None  # nothing is written into a folder that is not ours

    def path(self, place):
        return self.folder / self.names[place % len(self.names)]

    def load(self, place):
        with common.opened(self.path(place)) as picture:
            picture = common.upright(picture)
        half = picture.width // 2
        left = 0 if (place < len(self.names)) == (self.direction == "AtoB") else half
        return fit(picture.crop((left, 0, left + half, picture.height)), self.size)

    def check(self):
        return common.fingerprint(
            [self.names, self.concepts, self.size, self.direction],
            lambda name: header(self.folder / name, True),
            self.names,
        )


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
            picture.draft(
                None, (2 * self.size, 2 * self.size)
            )  # JPEG decodes several times faster at 1/2, 1/4, 1/8
            return fit(common.upright(picture), self.size)

    def plan(self, step, batch, seed):
        picks, flips = common.draw_picks(self.counts, batch, step, seed)
        return picks[:, 1:], flips[:, None], picks[:, 0]  # the one concept is 0


@dataclasses.dataclass(kw_only=True)
class Unpaired(Flat):
    """CycleGAN's layout: pictures of two kinds, A's files before B's. A row of a batch is an A and a B drawn independently, and
    mirrored each for itself; an epoch passes over the larger set once."""

    first_b: int  # how many are A's

    def __post_init__(self):
        super().__post_init__()
        self.sets = self.first_b, self.places - self.first_b
        self.counts = [max(self.sets)]

    @property
    def photos(self) -> torch.Tensor:
        """A's pictures (nA, 3, S, S) uint8, once decoded."""
        return self.pixels[: self.first_b]

    @property
    def others(self) -> torch.Tensor:
        """B's pictures (nB, 3, S, S) uint8, once decoded; none of them belongs to one of A's."""
        return self.pixels[self.first_b :]

    def plan(self, step, batch, seed):
        picks, flips = common.draw_picks(self.sets, 2 * batch, step, seed)  # A and B take turns
        places = picks[:, 1].view(batch, 2) + torch.tensor([0, self.first_b])
        return places, flips.view(batch, 2), torch.zeros(batch, dtype=torch.long)


class Cifar(Flat):
    """The same of an array (N, H, W, 3) uint8 in the place of files."""

    def __post_init__(self):
        self.places, self.counts = len(self.files), [len(self.files)]
        self.fingerprint = common.fingerprint(
            [self.concepts, self.size], np.ndarray.tobytes, [self.files]
        )

    def load(self, place):
        return fit(Image.fromarray(self.files[place]), self.size)


def unpaired_from_pairs(pairs: Path, concept: str) -> tuple[Unpaired, common.Pairs]:
    """Unpaired training data whose truth is known: A is the photos of the first half of the training pairs, B the edits of the
    others'. The test pairs stay pairs, decoded."""
    data, test = (
        common.find_pairs(pairs, "train", [concept]),
        common.load_pairs(pairs, "test", [concept]),
    )
    n = len(data.names)
    if n < 2:
        raise common.UserError(
            f"{pairs / 'train'} holds {n} pair of {concept!r}; it takes two to take them apart"
        )
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
            torch.distributed.barrier()  # the first process downloads for all
        train, test = (datasets.CIFAR10(root, train=split).data for split in (True, False))
    except (RuntimeError, OSError) as error:
        raise common.UserError(
            f"CIFAR-10 cannot be {'downloaded to' if download else 'read from'} {root} ({error}); unpack "
            f"{datasets.CIFAR10.url} there"
        )
    return tuple(
        Cifar(files=part, size=size, concepts=[{"name": "cifar10", "prompt": ""}])
        for part in (train, test[:1000])
    )


def find_data(
    task: str, folder: Path, size: int, direction: str = "AtoB"
) -> tuple[common.Pictures, common.Pictures]:
    """A folder's training pictures, not decoded yet, and its held-out ones, decoded but for pix2pix, in the layout that the task reads:
    pix2pix: SideBySide; cyclegan: Unpaired; dcgan: Flat, a tenth of them held out, at most 1000; or CIFAR-10, which torchvision
    downloads to runs/cifar10 if `folder` is "cifar10". The one concept bears the folder's name."""
    if task == "dcgan" and (size < 8 or size & (size - 1)):
        raise common.UserError(f"--size {size}: dcgan needs a power of two from 8 on")
    if size % 8 or size < 24 and task != "dcgan":
        raise common.UserError(f"--size {size}: the networks need a multiple of 8 from 24 on")
    common.check_name(folder.resolve().name, folder)  # the generator's concept will bear it
    same = dict(size=size, concepts=[{"name": folder.resolve().name, "prompt": ""}])
    found = {
        name: common.list_pictures(folder / name)
        for name in ("train", "test", "val", "trainA", "trainB", "testA", "testB")
    }
    download = folder == Path("cifar10") and not folder.exists()
    if task == "dcgan" and (download or (folder / "cifar-10-batches-py").is_dir()):
        train, test = cifar10(Path("runs/cifar10") if download else folder, download, size)
    elif not folder.is_dir():
        raise common.UserError(f"--data {folder} is no folder")
    elif (
        task == "pix2pix"
        and found["train"]
        and (held_out := "test" if found["test"] else "val" if found["val"] else "")
    ):
        train, test = (
            SideBySide(
                folder=folder / split,
                names=[path.name for path in found[split]],
                rows=[torch.arange(len(found[split]))],
                direction=direction,
                **same,
            )
            for split in ("train", held_out)
        )
    elif task == "cyclegan" and all(
        found[split + kind] for split in ("train", "test") for kind in "AB"
    ):
        train, test = (
            Unpaired(
                files=found[split + "A"] + found[split + "B"],
                first_b=len(found[split + "A"]),
                **same,
            )
            for split in ("train", "test")
        )
    elif task == "dcgan" and len(files := common.list_pictures(folder, "**/*")) > 1:
        order, tenth = (
            np.random.default_rng(0).permutation(len(files)),
            max(1, min(1000, len(files) // 10)),
        )
        train, test = (
            Flat(files=[files[i] for i in sorted(part)], **same)
            for part in (order[tenth:], order[:tenth])
        )
    else:
        there = sorted(path.name for path in folder.iterdir())
        raise common.UserError(
            f"--task {task} finds no data in {folder}; looked for {LAYOUTS}; found "
            f"{', '.join(there[:8]) or 'nothing'}{', ...' * (len(there) > 8)}"
        )
    return train, test if task == "pix2pix" else test.decoded()


# ---------------------------------------------------------------------------------------------------------------------
# The task: its networks, its losses, its measures. Batches are (pictures, ..., concept); the last but one are what fakes are
# to look like. In the losses `g` and `d` are dictionaries of the networks, under DDP or plain. For `grace` steps of a phase fakes that
# hardly differ are no collapse: DCGAN starts with grey pictures, which at width 4 may differ 2 % as much as the real ones for 100 steps.


class Pix2pix:
    """Paired pictures: one generator, photo -> edit, and a PatchGAN that sees both. Least-squares GAN + 100 L1 (pix2pix)."""

    grace = 0

    def __init__(
        self, args, data: common.Pairs, device: torch.device, trained: common.Generator | None
    ):
        self.l1 = args.l1
        if trained and trained.config["size"] != data.size:
            raise common.UserError(
                f"{args.generator} was trained at {trained.config['size']} pixels, and the data has {data.size}"
            )
        generator = (
            trained.to(device)
            if trained
            else common.new_generator(
                args.generator, args.width, data.size, data.concepts, args.clip, device
            )
        )
        self.generators = {"generator": generator}
        self.discriminators = {"discriminator": common.new_discriminator(generator)}
        self.pools, self.names = {}, {}
        self.concepts = torch.tensor(
            [generator.concept(concept["name"]) for concept in data.concepts], device=device
        )

    def fakes(self, g, batch):
        photo, _, concept = batch
        return [g["generator"](photo, self.concepts[concept])]

    def generator_loss(self, g, d, batch, fakes):
        photo, edit, concept = batch
        text = common.text_of(self.generators["generator"], self.concepts[concept])
        score = d["discriminator"](photo, fakes[0], text).float()
        distance = l1(fakes[0], edit)
        return (score - 1).square().mean() + self.l1 * distance, distance

    def discriminator_loss(self, d, batch, fakes):
        photo, edit, concept = batch
        text = common.text_of(self.generators["generator"], self.concepts[concept].repeat(2))
        real, fake = (
            d["discriminator"](photo.repeat(2, 1, 1, 1), torch.cat([edit, fakes[0]]), text)
            .float()
            .chunk(2)
        )
        return ((real - 1).square().mean() + fake.square().mean()) / 2, real

    def measure(self, test, with_fid: bool) -> list[dict]:
        return common.evaluate(self.generators["generator"], test, with_fid)

    def picture(self, test):
        return common.progress_picture(self.generators["generator"], test)


class CycleGan:
    """Unpaired pictures of two kinds: two generators, and two PatchGANs that see the picture alone. Least-squares GAN + 10 times
    the L1 of coming back + half of that for changing what is on the other side already; the discriminators see new and
    earlier fakes (CycleGAN)."""

    grace = 0

    def __init__(self, args, data: Unpaired, device: torch.device, trained: None):
        self.weight, self.identity = args.cycle, args.identity
        self.generators = {
            f"generator_{way}": common.new_generator(
                args.generator,
                args.width,
                data.size,
                [{"name": way, "prompt": way}],
                "none",
                device,
            )
            for way in ("AtoB", "BtoA")
        }
        self.discriminators = {
            f"discriminator_{side}": common.new_discriminator(generator, photo=False)
            for side, generator in zip("BA", self.generators.values())
        }
        self.pools = {f"pool_{side}": Pool(data.size, device) for side in "AB"}
        self.names = {"L1": "cycle"}

    def fakes(self, g, batch):
        a, b, _ = batch
        if not self.identity:
            return [g["generator_AtoB"](a), g["generator_BtoA"](b)]
        (to_b, same_b), (to_a, same_a) = (
            g["generator_AtoB"](torch.cat([a, b])).chunk(2),
            g["generator_BtoA"](torch.cat([b, a])).chunk(2),
        )
        return [to_b, to_a, same_b, same_a]

    def generator_loss(self, g, d, batch, fakes):
        a, b, _ = batch
        to_b, to_a, *same = fakes
        gan = sum(
            (d[f"discriminator_{side}"](None, fake).float() - 1).square().mean()
            for side, fake in (("B", to_b), ("A", to_a))
        )
        cycle = l1(g["generator_BtoA"](to_b), a) + l1(g["generator_AtoB"](to_a), b)
        identity = sum(l1(x, y) for x, y in zip(same, (b, a)))
        return gan + self.weight * (cycle + self.identity * identity), cycle / 2

    def discriminator_loss(self, d, batch, fakes):
        loss = 0
        for side, picture, fake in (("A", batch[0], fakes[1]), ("B", batch[1], fakes[0])):
            fake = self.pools[f"pool_{side}"].swap(fake)
            real, fake = (
                d[f"discriminator_{side}"](None, torch.cat([picture, fake])).float().chunk(2)
            )
            loss = loss + ((real - 1).square().mean() + fake.square().mean()) / 2
        return loss, real

    def measure(self, test, with_fid: bool) -> list[dict]:
        """A row per direction: PSNR and L1 where the test pictures are pairs, and how far a picture is from itself after
        the way there and back."""
        rows, (a, b) = [], sides(test)
        truth = isinstance(test, common.Pairs)
        for way, back, x, y in (("AtoB", "BtoA", a, b), ("BtoA", "AtoB", b, a)):
            there, home = (self.generators[f"generator_{name}"].eval() for name in (way, back))
            made = common.run_generator(there, x, 0)
            row = {"direction": way}
            if truth:
                row |= {"PSNR dB": mean_psnr(made, y), "picture unchanged dB": mean_psnr(x, y)}
            if with_fid:
                row["FID"] = common.fid(made, y, next(there.parameters()).device)
            rows.append(
                {**row, "PSNR dB there and back": mean_psnr(common.run_generator(home, made, 0), x)}
            )
        return rows

    def picture(self, test):
        rows, labels = [], []
        for way, x in zip(("AtoB", "BtoA"), sides(test)):
            made = common.run_generator(self.generators[f"generator_{way}"].eval(), x[:4], 0)
            rows, labels = (
                rows + [list(row) for row in zip(x[:4], made)],
                labels + [way] * len(made),
            )
        return common.picture_grid(rows, ["picture", "made of it"], labels)


class Pool(torch.nn.Module):
    """The last fakes that a discriminator saw. A module, so that it is saved with the networks; under several processes a
    continued run gives all of them the first's."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.register_buffer("pictures", torch.zeros(POOL, 3, size, size, device=device))
        self.register_buffer(
            "filled", torch.zeros((), dtype=torch.long)
        )  # stays on the CPU: reading it waits for no device

    def swap(self, fakes: torch.Tensor) -> torch.Tensor:
        """fakes (B, 3, S, S) -> as many: once the pool is full, half of them replaced by earlier ones, whose places they take."""
        given = []
        for fake in fakes.detach().float():
            if self.filled < POOL:
                self.pictures[self.filled] = fake
                self.filled += 1
            elif torch.rand(()) < 0.5:
                place = torch.randint(POOL, ())
                earlier = self.pictures[place].clone()
                self.pictures[place] = fake
                fake = earlier
            given.append(fake)
        return torch.stack(given)


class Dcgan:
    """Pictures from noise: DCGAN's generator and discriminator, cross entropy."""

    grace = 1000

    def __init__(self, args, data: Flat, device: torch.device, trained: None):
        generator = common.new_generator("dcgan", args.width, data.size, [], "none", device)
        self.generators, self.discriminators = (
            {"generator": generator},
            {"discriminator": common.new_discriminator(generator)},
        )
        self.pools, self.names = {}, {"L1": ""}

    def fakes(self, g, batch):
        return [
            g["generator"](
                torch.randn(len(batch[0]), common.FIXED["noise"], device=batch[0].device)
            )
        ]

    def generator_loss(self, g, d, batch, fakes):
        score = d["discriminator"](fakes[0]).float()
        return F.softplus(-score).mean(), score.new_zeros(())

    def discriminator_loss(self, d, batch, fakes):
        real, fake = (
            d["discriminator"](batch[0]).float(),
            d["discriminator"](fakes[0]).float(),
        )  # not one pass: BatchNorm would
        return F.softplus(-real).mean() + F.softplus(fake).mean(), real  # mix their statistics

    def measure(self, test, with_fid: bool) -> list[dict]:
        """FID, and the Frechet distance of 8x8 thumbnails, which needs no Inception: it sees colours and layout, no more."""
        made = samples(self.generators["generator"], len(test.pixels))
        row = {
            "pictures": len(made),
            "Frechet distance of thumbnails (lower is better)": thumbnail_distance(
                made, test.pixels
            ),
        }
        if with_fid:
            row["FID"] = common.fid(
                made, test.pixels, next(self.generators["generator"].parameters()).device
            )
        return [row]

    def picture(self, test):
        made = samples(self.generators["generator"], 64)
        return common.picture_grid(
            [list(row) for row in made.split(8)], [""] * 8, [""] * 8, cell=made.shape[-1]
        )


TASKS = {"pix2pix": Pix2pix, "cyclegan": CycleGan, "dcgan": Dcgan}


def l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.float() - y).abs().mean()


def mean_psnr(made: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean PSNR in dB of uint8 pictures (N, 3, H, W)."""
    return common.psnr(common.to_float(made), common.to_float(truth)).mean().item()


def sides(test) -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out pictures A and B, uint8: photos and edits of pairs, or two unpaired sets."""
    return (
        (test.photos[test.rows[0]], test.edits[0])
        if isinstance(test, common.Pairs)
        else (test.photos, test.others)
    )


@torch.no_grad()
def samples(generator: common.Generator, count: int) -> torch.Tensor:
    """`count` pictures, uint8 (N, 3, S, S), from noise that is always the same."""
    noise = torch.randn(count, common.FIXED["noise"], generator=torch.Generator().manual_seed(0))
    device = next(generator.parameters()).device
    return torch.cat(
        [common.to_uint8(generator.eval()(part.to(device))).cpu() for part in noise.split(100)]
    )


def thumbnail_distance(made: torch.Tensor, real: torch.Tensor) -> float | None:
    """Frechet distance of two sets of uint8 pictures (N, 3, S, S), as 8x8 thumbnails with values in [-1, 1]; None for a single
    picture, which has no covariance."""
    if min(len(made), len(real)) < 2:
        return None
    sides = []
    for pictures in (made, real):
        x = (
            F.adaptive_avg_pool2d(common.to_float(pictures), 8).flatten(1).double().numpy()
        )  # (N, 192)
        sides += [x.mean(0), np.cov(x, rowvar=False)]
    return common.frechet_distance(*sides)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to keep: MACs as a function of the widths, latents, targets


def mac_terms(network: common.Network) -> list[tuple[tuple, tuple, int]]:
    """common.count_macs as a formula in the widths: a list of (reads, writes, unit), whose sum over
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

    twin = copy.deepcopy(network).to("meta").eval()
    for module in twin.modules():
        if hasattr(module, "reads") or isinstance(module, common.Attention):
            hooks.append(module.register_forward_hook(record))
    with torch.no_grad():
        twin(*twin.example())
    return terms


def macs_of(terms: list[tuple[tuple, tuple, int]], widths: dict) -> int:
    """mac_terms' formula for some widths (which must name the fixed groups too)."""
    total = 0
    for reads, writes, unit in terms:
        total += (
            unit * sum(widths[g] for g in reads) * (sum(widths[g] for g in writes) if writes else 1)
        )
    return total


def channel_importance(network: common.Network) -> dict[str, torch.Tensor]:
    """{group: (channels,)}: the RMS of the weights that write or read each channel, relative to its layer's, averaged over the
    layers; mean 1 a group. Where latents start from when the network is trained already (a choice of ours)."""
    widths = common.all_widths(network.config)
    sums = {group: torch.zeros(n) for group, n in widths.items()}
    for _, module in common.named_layers(network):
        weight = module.weight.detach().cpu()
        weight = weight.transpose(0, 1) if isinstance(module, torch.nn.ConvTranspose2d) else weight
        square = weight.square().reshape(*weight.shape[:2], -1).mean(2)  # (O, I)
        for groups, rms in (
            (module.writes, square.mean(1).sqrt()),
            (module.reads, square.mean(0).sqrt()),
        ):
            for group, part in zip(groups, rms.split([widths[g] for g in groups])):
                sums[group] += part / rms.mean()
    return {group: sums[group] / sums[group].mean() for group in network.config["widths"]}


class Latents(torch.nn.ParameterDict):
    """One vector per channel group, {group: (channels,)}: what the search shrinks."""

    def __init__(self, network: common.Network, start: str):
        """start "paper": N(0, 1). "weights": the network's channels ranked by importance and spread evenly over two decades, 0.01
        to 1, so that half of them can fade while the others barely move (a choice of ours)."""

        def spread(importance):
            ranks = importance.argsort().argsort()
            return 10 ** (2 * ranks / max(1, len(ranks) - 1) - 2)

        super().__init__(
            {
                group: torch.randn(network.config["widths"][group])
                if start == "paper"
                else spread(importance)
                for group, importance in channel_importance(network).items()
            }
        )

    def with_fixed(self, network: common.Network) -> dict[str, torch.Tensor]:
        """The latents and ones for the groups that are never pruned: RGB and text."""
        widths, device = common.all_widths(network.config), next(self.parameters()).device
        return {
            g: self[g] if g in self else torch.ones(n, device=device) for g, n in widths.items()
        }


class Target:
    """Knows how many MACs a choice of widths costs, and which threshold on the latents brings them under a share of all."""

    def __init__(self, network: common.Network, keep: float):
        self.terms, self.full = mac_terms(network), common.all_widths(network.config)
        self.macs = macs_of(self.terms, self.full)
        self.floor = {g: min(n, max(2, n // 16)) for g, n in network.config["widths"].items()}
        smallest = self.share({**self.full, **self.floor})
        if not 0 < keep < 1 or keep < smallest:
            raise common.UserError(
                f"--keep {keep}: give a share of the MACs below 1 and not under {smallest:.3f}, what a "
                f"{network.kind} keeps with the fewest channels, a sixteenth of each group and at least 2"
            )

    def share(self, widths: dict[str, int]) -> float:
        return macs_of(self.terms, widths) / self.macs

    def widths(self, latents: dict[str, torch.Tensor], threshold: float) -> dict[str, int]:
        """Channels with |z| above the threshold, per group; never under the floor."""
        above = {
            g: max(int((z.abs() > threshold).sum()), self.floor[g]) for g, z in latents.items()
        }
        return {**self.full, **above}

    def threshold(self, latents: dict[str, torch.Tensor], share: float, most: float) -> float:
        """The smallest threshold (to 1/1000 of `most`) that brings the MACs to `share` or less; `most` if none does."""
        low, high = -most / 1000, most  # below 0: nothing is dropped
        if self.share(self.widths(latents, 0.0)) <= share:
            return 0.0
        while high - low > most / 1000:
            middle = (low + high) / 2
            low, high = (
                (low, middle)
                if self.share(self.widths(latents, middle)) <= share
                else (middle, high)
            )
        return high

    def kept(self, latents: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """{group: sorted indices} of the largest latents such that the MACs come to `share` or just less: to the last channel
        that fits, as one channel of a wide group can be more than a hundredth of all MACs."""
        widths = self.widths(
            latents,
            self.threshold(latents, share, max(z.abs().max().item() for z in latents.values())),
        )
        order = {g: z.abs().sort(descending=True) for g, z in latents.items()}
        while True:
            fits = [
                g
                for g in latents
                if widths[g] < self.full[g] and self.share({**widths, g: widths[g] + 1}) <= share
            ]
            if not fits:
                return {g: order[g].indices[: widths[g]].sort().values for g in latents}
            widths[max(fits, key=lambda g: order[g].values[widths[g]].item())] += 1


def soft_threshold(latents: Latents, amount: float) -> None:
    """The proximal step of the l1 norm: z <- sign(z) max(|z| - amount, 0)."""
    with torch.no_grad():
        for z in latents.values():
            z.copy_(z.sign() * (z.abs() - amount).clamp(min=0))


def on_cpu(latents: Latents) -> dict[str, torch.Tensor]:
    return {g: z.detach().cpu() for g, z in latents.items()}


def scores_of(args, network: common.Network) -> dict[str, torch.Tensor]:
    """What the methods that CoroNetGAN is compared with keep the channels by, the largest first, {group: (channels,)}: at random, by
    the size of their weights, or so many of each group that all groups are narrowed alike."""
    if args.method == "magnitude":
        return channel_importance(network)
    rng, widths = torch.Generator().manual_seed(args.seed), network.config["widths"]
    return {
        g: torch.rand(n, generator=rng) if args.method == "random" else 1 - torch.arange(n) / n
        for g, n in widths.items()
    }


def slice_task(task, kept: dict[str, dict[str, torch.Tensor]]) -> None:
    """Puts the dense, smaller networks in place of those that `kept` = {name: {group: sorted indices}} names."""
    for networks in (task.generators, task.discriminators):
        for name in networks.keys() & kept.keys():
            networks[name] = common.slice_network(networks[name], kept[name])


def write_pruning(path: Path, widths: dict[str, tuple[dict, dict]], log: list[dict]) -> None:
    """The path of the MACs during the search, and bars of every group's channels, {network: (before, after)}."""
    from matplotlib.figure import Figure

    sizes = [0.3 * len(before) + 1.2 for before, _ in widths.values()]
    figure = Figure(figsize=(4 + sum(sizes), 3.8), layout="constrained")
    macs, *panels = figure.subplots(1, 1 + len(widths), width_ratios=[4, *sizes])
    path_of = [(row["step"], row["MACs %"]) for row in log if "MACs %" in row]
    for name in widths if path_of else ():
        macs.plot(
            [step for step, _ in path_of],
            [shares[name] for _, shares in path_of],
            marker=".",
            label=name,
        )
    macs.set(xlabel="search step", ylabel="MACs %", ylim=(0, 105))
    macs.grid(alpha=0.3)
    if path_of:  # the other methods cut once, at the end
        macs.legend(loc="lower left", fontsize="small")
    for axes, (name, (before, after)) in zip(panels, widths.items()):
        axes.bar(list(before), list(before.values()), color="lightgrey", label="before")
        axes.bar(list(before), [after[g] for g in before], color="tab:blue", label="after")
        axes.tick_params(axis="x", rotation=90)
        axes.set(title=name, ylabel="channels")
        axes.legend(loc="upper left", fontsize="small")
    common.replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=110))


# ---------------------------------------------------------------------------------------------------------------------
# Training, both phases


def train(
    task,
    optimizers: list,
    after_step,
    data: common.Pictures,
    test,
    args,
    phase: str,
    steps: int,
    lr: float,
    decay: bool,
    device,
    rank: int,
    world: int,
) -> dict:
    """The loop of both phases. optimizers: the generators', the discriminators', then any that `after_step(step)` steps; it
    returns what to add to the log's row, and True to end the phase. Returns the pace as columns of the table. The generators
    step first here: their activations are gone when the discriminators' pass begins."""
    opt_g, opt_d = optimizers[:2]
    judges = [
        p
        for network in task.discriminators.values()
        for p in network.parameters()
        if p.requires_grad
    ]
    rate = "--lr-search" if len(optimizers) > 2 else "--lr"
    losses: list[torch.Tensor] = []  # G, D and the distance of each step since the log's last row
    state = {
        **task.generators,
        **task.discriminators,
        **task.pools,
        "losses": losses,
        **{f"opt{i}": optimizer for i, optimizer in enumerate(optimizers)},
    }
    start = common.load_state(args.out / f"{phase}.safetensors", **state)
    log = common.read_log(args.out / f"{phase}.jsonl", start)
    # the discriminators' own step goes through DDP; the generators' step passes through their plain weights
    ddp_g, ddp_d = (
        {name: common.data_parallel(network, device, world) for name, network in networks.items()}
        for networks in (task.generators, task.discriminators)
    )
    began, done, ended = time.time(), log[-1]["step"] if log else start, start == steps

    def save_state() -> None:
        common.write_text(
            args.out / f"{phase}.jsonl", "".join(json.dumps(row) + "\n" for row in log)
        )
        common.save_state(args.out / f"{phase}.safetensors", steps if ended else done, **state)

    bar = tqdm(
        range(start, steps), initial=start, total=steps, unit="step", desc=phase, disable=rank > 0
    )
    set_training(task)
    batches = data.batches(args.batch, range(start, steps), args.seed, rank, world, device)
    until_ended = zip(itertools.takewhile(lambda _: not ended, bar), batches)
    for step, batch in common.until_stopped(until_ended, save_state, world):
        common.set_lr(opt_g, lr, step if decay else 0, steps)
        common.set_lr(opt_d, args.lr_d, step if decay else 0, steps)
        torch.manual_seed(
            (args.seed * 1_000_003 + step) * world + rank
        )  # noise, pools, dropout: no generator state to save
        for parameter in judges:
            parameter.requires_grad_(False)
        with (
            parametrize.cached()
        ):  # a generator's weights are made once, however often it is called
            with common.autocast(device, args.precision):
                fakes = task.fakes(ddp_g, batch)
                loss_g, distance = task.generator_loss(ddp_g, task.discriminators, batch, fakes)
            loss_g.backward()
        opt_g.step()
        opt_g.zero_grad()  # now, not before the next pass: a hypernetwork's gradients are as many as its weights
        for parameter in judges:
            parameter.requires_grad_(True)

        fakes = [fake.detach() for fake in fakes]
        with common.autocast(device, args.precision):
            loss_d, score = task.discriminator_loss(ddp_d, batch, fakes)
        loss_d.backward()
        opt_d.step()
        opt_d.zero_grad()
        more, ended = after_step(step)
        ended, done = ended or step + 1 == steps, step + 1

        if more and done % max(1, steps // 50) == 0:
            log.append({"step": done, **more})
        losses.append(torch.stack([loss_g, loss_d, distance]).detach())
        save = ended or done % args.save_every == 0
        if save or done % LOG_EVERY == 0:
            row = common.check_health(
                losses,
                fakes[0],
                batch[-2],
                score,
                torch.nn.ModuleDict(task.generators),
                done,
                args.out,
                world,
                rate,
                done > task.grace,
            )
            log.append(
                {
                    task.names.get(key, key): value
                    for key, value in row.items()
                    if task.names.get(key, key)
                }
            )
            bar.set_postfix(
                {
                    key: f"{value:.4g}"
                    for key, value in log[-1].items()
                    if key in ("G", "D", "L1", "cycle")
                }
            )
            losses.clear()
        if save and rank == 0:
            common.write_png(args.out / "samples" / f"{phase}-{done:07d}.png", task.picture(test))
            common.write_curve(args.out / f"{phase}.png", log)
            save_state()
            set_training(task)
    seconds = time.time() - began
    return {f"{phase} steps": done, f"{phase} s": None if start else seconds}


def set_training(task) -> None:
    for network in (*task.generators.values(), *task.discriminators.values()):
        network.train()


def search(
    task, targets: dict[str, "Target"], data, test, args, device, rank: int, world: int
) -> dict:
    """Searching, then slicing: the task's networks named in `targets` become dense and small. Returns the pace.

    The paper's threshold per step is lambda * lr with a constant lambda. Here it is the smallest amount that keeps the MACs on
    a straight line which reaches the target after nine tenths of the phase (a choice of ours: it meets any target on time)."""
    networks = {
        name: network
        for name, network in {**task.generators, **task.discriminators}.items()
        if name in targets
    }
    steps = args.search_epochs * common.steps_per_epoch(data.counts, args.batch)
    if args.method == "uniform":
        slice_task(
            task,
            {
                name: target.kept(scores_of(args, networks[name]), args.keep)
                for name, target in targets.items()
            },
        )
    latents = {}
    for name, network in networks.items() if args.method == "coronet" else ():
        latents[name] = network.latents = Latents(network, args.start).to(
            device
        )  # saved, and averaged over processes, with it
        common.add_hypernetwork(network, latents[name].with_fixed(network), args.start == "weights")

    def without_latents(networks: dict) -> list:
        return [
            p
            for network in networks.values()
            for key, p in network.named_parameters()
            if not key.startswith("latents.")
        ]

    opt_g = common.adam(without_latents(task.generators), args.lr_search if latents else args.lr)
    opt_d = common.adam(without_latents(task.discriminators), args.lr_d)
    optimizers = [opt_g, opt_d]
    if latents:
        optimizers.append(
            torch.optim.SGD(
                [z for group in latents.values() for z in group.values()], args.lr_z, momentum=0.9
            )
        )

    def shrink(step: int) -> tuple[dict, bool]:
        if not latents:
            return {}, False
        for group in latents.values():
            torch.nn.utils.clip_grad_norm_(group.parameters(), 1.0)
        optimizers[2].step()
        optimizers[2].zero_grad()
        line = 1 - (1 - args.keep) * min(1.0, (step + 1) / (0.9 * steps))
        shares = {}
        for name, target in targets.items():
            there = on_cpu(latents[name])
            amount = target.threshold(there, line, MOST)
            shares[name] = target.share(
                target.widths(there, amount)
            )  # now: on the CPU `there` is the latents, not a copy
            soft_threshold(latents[name], amount)
        return {"MACs %": {name: 100 * share for name, share in shares.items()}}, max(
            shares.values()
        ) <= args.keep

    lr = opt_g.param_groups[0]["lr"]
    pace = train(
        task, optimizers, shrink, data, test, args, "search", steps, lr, False, device, rank, world
    )
    if args.method != "uniform":
        kept = {
            name: target.kept(
                on_cpu(latents[name]) if latents else scores_of(args, networks[name]), args.keep
            )
            for name, target in targets.items()
        }
        for network in networks.values() if latents else ():
            common.remove_parametrizations(network)
            del network.latents
        slice_task(task, kept)
    return pace


def read_data(
    args, task: str, trained: common.Generator | None
) -> tuple[common.Pictures, common.Pictures]:
    """Training pictures, not decoded yet, and held-out ones, decoded but for pix2pix."""
    if args.data:
        return find_data(
            task, args.data, args.size or (64 if task == "dcgan" else 256), args.direction
        )
    if task == "dcgan":
        raise common.UserError("--task dcgan: give --data, a folder of pictures, or --data cifar10")
    names = list(dict.fromkeys(args.concept))
    if task == "cyclegan":
        if len(names) != 1:
            raise common.UserError(
                "--task cyclegan: give --data, a folder with trainA, trainB, testA and testB, "
                "or one --concept of --pairs"
            )
        return unpaired_from_pairs(args.pairs, names[0])
    known = common.read_concepts(args.pairs)
    names = names or (
        [concept["name"] for concept in trained.config["concepts"]] if trained else list(known)
    )
    return common.find_pairs(args.pairs, "train", names), common.find_pairs(
        args.pairs, "test", names
    )


def check_generator(args, given: set[str]) -> common.Generator | None:
    """Fills in --generator, and refuses what the task has no use for, and flags `given` that a trained generator contradicts. The
    trained generator, on the CPU; None where an architecture is to be trained from scratch."""
    base = f"runs/{'demo/' if args.demo else ''}base/generator.safetensors"
    if args.generator == "auto":
        args.generator = {"cyclegan": "resnet9", "dcgan": "dcgan"}.get(args.task) or (
            "unet256" if args.data else base
        )
    trained = args.generator not in common.NETWORKS and args.task == "pix2pix"
    fits = ["dcgan"] if args.task == "dcgan" else list(common.ARCHITECTURES)
    if not trained and args.generator not in fits:
        raise common.UserError(
            f"--task {args.task} takes --generator {' or '.join(fits)}, not {args.generator}"
        )
    if trained and not Path(args.generator).is_file():
        raise common.UserError(
            f"--generator {args.generator}: neither a file nor one of {', '.join(fits)}"
        )
    if trained and args.start == "paper":
        raise common.UserError(
            f"--start paper would forget what {args.generator} has learned: leave it out, "
            "or give --generator an architecture"
        )
    if trained and args.method == "uniform":
        raise common.UserError(
            "--method uniform trains a narrower network from scratch: give --generator an architecture, not a file"
        )
    if args.data and args.concept:
        raise common.UserError("--concept names concepts of --pairs: leave it out, or --data")
    if args.size and not args.data:
        raise common.UserError("--size scales --data; pairs have their own size")
    if not trained:
        return None
    generator = common.load_generator(Path(args.generator))
    for flag, there in (
        ("width", generator.config["width"]),
        ("clip", generator.config.get("clip", "none")),
    ):
        if flag in given and getattr(args, flag) != there:
            raise common.UserError(
                f"--{flag} {getattr(args, flag)} is for a new network, and {args.generator} has --{flag} {there}: "
                "leave it out, or give --generator an architecture"
            )
    return generator


def save_task(task, folder: Path, searched: int) -> None:
    """All networks, and after how many steps the search ended: the last file, so that it says that all are there."""
    for name, network in (*task.generators.items(), *task.discriminators.items()):
        common.save_network(folder / f"{name}.safetensors", network)
    common.write_json(folder / "search.json", {"steps": searched})


def load_task(task, folder: Path, device: torch.device) -> int | None:
    """Puts the networks that save_task saved in the place of the task's, and empties the pools. The steps of the search; None if
    it has not ended."""
    if not (folder / "search.json").exists():
        return None
    for networks in (task.generators, task.discriminators):
        for name in networks:
            networks[name] = common.load_network(
                folder / f"{name}.safetensors", device, networks[name].kind
            ).requires_grad_(True)
    for pool in task.pools.values():
        pool.filled.zero_()
        pool.pictures.zero_()
    steps = common.read_json(folder / "search.json").get("steps")
    if type(steps) is not int or steps < 1:
        raise common.UserError(
            f"{folder / 'search.json'} names no number of steps: --overwrite starts the run again"
        )
    return steps


def result_tables(
    task, args, full: dict, pace: dict, before: list, sliced: list, after: list
) -> dict[str, list[dict]]:
    """full: {network: its config, MACs and parameters before}; the rest as task.measure gives it."""
    networks = {**task.generators, **task.discriminators}
    sizes, channels = [], []
    for name, (config, macs, parameters) in full.items():
        small = networks[name]
        left = common.count_macs(small)
        sizes.append(
            {
                "network": name,
                "architecture": config["arch"],
                "method": args.method,
                "keep": args.keep,
                "size px": config["size"],
                "GMACs before": macs / 1e9,
                "GMACs": left / 1e9,
                "MACs %": 100 * left / macs,
                "parameters M before": parameters / 1e6,
                "parameters M": common.count_parameters(small) / 1e6,
            }
        )
        channels += [
            {"network": name, "group": g, "before": n, "after": small.config["widths"][g]}
            for g, n in config["widths"].items()
        ]
    sizes[0] |= {"batch": args.batch, **pace}
    rows = []
    for i, row in enumerate(after):
        earlier = {
            f"{when} dB": there[i]["PSNR dB"]
            for when, there in (("before", before), ("sliced", sliced))
            if there and "PSNR dB" in row
        }
        earlier |= {"FID before": before[i]["FID"]} if before and "FID" in before[i] else {}
        first = next(iter(row))
        rows.append({first: row[first], **earlier, **row})
    return {"Pruning": sizes, "Pruned generator, held-out pictures": rows, "Channels": channels}


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument(
        "--task",
        choices=list(TASKS),
        help="pix2pix: pairs; cyclegan: two unpaired sets; dcgan: pictures from noise",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder in the layout of pix2pix, of CycleGAN, or of pictures; or cifar10",
    )
    parser.add_argument(
        "--direction", choices=["AtoB", "BtoA"], help="which half of an A|B picture is the photo"
    )
    parser.add_argument(
        "--size", type=int, help="pixels to scale --data to; 0: 256, or 64 for dcgan"
    )
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote; read without --data")
    parser.add_argument(
        "--concept",
        action="append",
        help="train on this concept; can be repeated (default: the generator's)",
    )
    parser.add_argument(
        "--generator",
        help="a trained generator's file, or an architecture to train from scratch: "
        f"{', '.join(common.ARCHITECTURES)}, dcgan; auto: stage 3's base, unet256 with --data, resnet9 for cyclegan",
    )
    parser.add_argument(
        "--method",
        choices=["coronet", "uniform", "random", "magnitude"],
        help="what chooses the channels; the other "
        "three are for comparison: all groups narrowed alike from the start, or the channels cut after the search phase",
    )
    parser.add_argument(
        "--start",
        choices=["weights", "paper"],
        help="what the hypernetworks make at first: the weights that the "
        "network has, trained or not, or the paper's random ones",
    )
    parser.add_argument("--keep", type=float, help="share of the MACs to keep")
    parser.add_argument(
        "--prune-discriminator",
        action="store_true",
        help="prune the discriminators to the same share",
    )
    parser.add_argument(
        "--width",
        type=int,
        help="channels of the first layer (dcgan: of the last hidden one), for a new architecture",
    )
    parser.add_argument(
        "--clip",
        help="text tower for a new e2gan as open_clip's MODEL:WEIGHTS; none: an e2gan without text",
    )
    parser.add_argument("--search-epochs", type=int, help="passes over all pictures while pruning")
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes after it, and what the search did not need; the learning "
        "rates fall to 0 in the second half",
    )
    parser.add_argument(
        "--batch", type=int, help="pictures or pairs a step, all processes together"
    )
    parser.add_argument("--lr", type=float, help="the generator's learning rate while converging")
    parser.add_argument(
        "--lr-search",
        type=float,
        help="the generators' learning rate in the search: a weight is a sum "
        "of nine terms, and all of them move",
    )
    parser.add_argument("--lr-d", type=float, help="the discriminators' learning rate")
    parser.add_argument(
        "--lr-z",
        type=float,
        help="the latents' learning rate (SGD with momentum 0.9, gradients clipped to norm 1)",
    )
    parser.add_argument("--l1", type=float, help="pix2pix: weight of the L1 loss")
    parser.add_argument("--cycle", type=float, help="cyclegan: weight of the L1 of coming back")
    parser.add_argument(
        "--identity",
        type=float,
        help="cyclegan: weight, times --cycle, of the L1 of a picture "
        "that is on the other side already",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        help="auto: bf16 autocast where the hardware has it",
    )
    parser.add_argument(
        "--cache-gb",
        type=float,
        help="most pixels to hold on the device; more are held in a file in --out",
    )
    parser.add_argument("--fid", choices=["auto", "off"], help=common.FID_HELP)
    parser.add_argument(
        "--save-every", type=int, help="steps between saved states and progress pictures"
    )
    args = parser.parse()

    began = time.time()
    trained = check_generator(args, parser.given)
    device = common.pick_device(args.device)
    rank, world = common.start_processes(device)
    torch.manual_seed(args.seed)
    data, test = read_data(args, args.task, trained)
    task = TASKS[args.task](args, data, device, trained)
    networks = {**task.generators, **(task.discriminators if args.prune_discriminator else {})}
    targets = {name: Target(network, args.keep) for name, network in networks.items()}
    settings = common.settings_of(
        args,
        "05_prune_coronet",
        generator=trained.sha256 if trained else args.generator,
        data=[data.fingerprint, test.fingerprint],
    )
    if common.begin_run(args.out, settings, args.overwrite):
        return

    data.hold(args.cache_gb, args.out, device, rank, world)
    if rank == 0 and args.task == "pix2pix":  # the first process alone measures
        test.hold(args.cache_gb, args.out, torch.device("cpu"))
    with_fid = args.fid == "auto"
    before = task.measure(test, with_fid) if trained and rank == 0 else []
    full = {
        name: (network.config, common.count_macs(network), common.count_parameters(network))
        for name, network in networks.items()
    }
    pace, sliced = {}, args.out / "sliced"
    searched = load_task(task, sliced, device)
    if searched is None:
        pace = search(task, targets, data, test, args, device, rank, world)
        if rank == 0:
            after = {**task.generators, **task.discriminators}
            write_pruning(
                args.out / "pruning.png",
                {
                    name: (config["widths"], after[name].config["widths"])
                    for name, (config, *_) in full.items()
                },
                common.read_log(args.out / "search.jsonl", pace["search steps"]),
            )
            save_task(
                task, sliced, pace["search steps"]
            )  # last: from here on a continued run converges
        if world > 1:
            torch.distributed.barrier()
        searched = load_task(task, sliced, device)
    after_slice = task.measure(test, False) if rank == 0 else []
    optimizers = [
        common.adam([p for network in kind.values() for p in network.parameters()], lr)
        for kind, lr in ((task.generators, args.lr), (task.discriminators, args.lr_d))
    ]
    steps = (args.search_epochs + args.epochs) * common.steps_per_epoch(data.counts, args.batch)
    pace = {"search steps": searched, **pace}
    steps -= searched  # what the search did not need is added: runs of equal flags have equal steps
    pace |= train(
        task,
        optimizers,
        lambda step: ({}, False),
        data,
        test,
        args,
        "converge",
        steps,
        args.lr,
        True,
        device,
        rank,
        world,
    )
    if rank > 0:
        return
    for name, network in task.generators.items():
        common.save_network(args.out / f"{name}.safetensors", network)
    tables = result_tables(
        task, args, full, pace, before, after_slice, task.measure(test, with_fid)
    )
    reads = [
        *([] if args.data else [args.pairs]),
        *([Path(args.generator).parent] if trained else []),
    ]
    marks = common.marks_of(
        args, *reads, clip=next(iter(task.generators.values())).config.get("clip", "")
    )
    source = [(args.data or args.pairs).resolve().name, *args.concept]
    common.write_result(args.out, "05_prune_coronet", began, marks, tables, data=" ".join(source))


if __name__ == "__main__":
    common.run(main)
