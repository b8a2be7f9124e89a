"""Stage 4: teaches a trained base a new concept, by a low-rank adapter (LoRA) on crucial layers.

E2GAN (arXiv 2401.06127, section 3). The base's weights stay as they are; an adapted weight becomes
W + (alpha / rank) B A, of which only A and B are trained. To compare with, --mode full trains all
of the base's weights and --mode scratch a new network. Training goes on with the base's
discriminator (ours), which can tell strokes from blur from the first step on.

The default layers and ranks are the paper's. `--layers all --rank 8` makes an adapter of five times
as many numbers that is nearer to what all weights learn. It starts in the directions of the loss's
gradient (ours, after LoRA-GA, arXiv 2407.05000, section 3).

Layers and ranks are fixed unless a search chooses them. A search makes short trainings (probes) and
compares their error, training.error, on training photos that the probes do not train on: up to 100
that stage 2 did not choose or, if it chose all, every fifth of them. A change of layers or ranks is
kept if it lowers the error by more than the share --rank-threshold.
- --layers search adapts each layer group alone at rank 1 and sorts the groups by how much the error
  falls per trained weight. Then it adds the groups in that order. Later runs use what it kept
- --rank auto starts all groups at rank 1, and doubles a group's rank as long as that is kept

Reads   runs/pairs, runs/clusters               the new concepts, and the photos chosen for them
        runs/base/generator.safetensors         the base, and discriminator.safetensors beside it
Writes  runs/lora/<concept>/adapter.safetensors  kilobytes: A, B, the prompt, the base's SHA-256
                                                 (--mode full, scratch: generator.safetensors)
                            state.safetensors    what a run that was stopped continues from
                            log.jsonl, curve.png, samples/*.png, result.json
        runs/lora/layer-search/crucial.json      what --layers search kept

    python 04_lora_finetune.py --demo
    python 04_lora_finetune.py --concept cartoon        (default: every new concept of stage 2)
    python 04_lora_finetune.py --layers all --rank 8
    python 04_lora_finetune.py --layers search --rank auto
    torchrun --nproc_per_node=8 04_lora_finetune.py --concept cartoon --batch 128
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import common
import dataset
import training
from runs import UserError

DEMO = {
    "batch": 1,
    "steps": 64,
    "half_size": 0.0,  # too few steps for two sizes
    "probe_steps": 60,
    "fid": "off",
    "save_every": 64,
}
RATES = {"lora": 1e-3, "full": 2e-4, "scratch": 2e-4}  # default of --lr, by --mode
DEMO_RATES = {"lora": 3e-3, "full": 1e-3, "scratch": 1e-3}  # larger, as the demo's runs are short
PAPER_RANKS = {  # {layer group: rank}
    # the paper's: down- and upsampling layers and the transformer block
    "down1": 1,
    "down2": 4,
    "tb": 1,
    "up1": 8,
    "up2": 8,
    # ours: the first and the last layer, which alone see how bright the photo is, and the layers
    # that compute FiLM's scales and shifts from the prompt. Without them little is learned.
    "stem": 4,
    "films": 1,
    "out": 3,
}
RANK_LIMIT = 16  # the highest rank that a search tries
FIRST_PAIRS = 16  # over which --start-from gradient sums
VALIDATION = 100  # the most photos on which a probe's error is measured

Matrices = dict[str, torch.Tensor]  # {layer: of its weight's shape}


def rank_flag(text: str) -> int | str:
    """argparse's type of --rank: paper, auto or a number."""
    return text if text in ("paper", "auto") else runs.count(text)


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, "runs/lora")
    flag = parser.add_argument
    training.add_flags(parser)
    training.add_half_size_flag(parser)
    flag(
        "--clusters",
        type=Path,
        default="runs/clusters",
        help="stage 2's folder, which names the new concepts and the photos chosen for them",
    )
    flag(
        "--base",
        type=Path,
        default="runs/base/generator.safetensors",
        help="the trained generator's file, of stage 3 or 5",
    )
    training.add_discriminator_flag(parser)
    flag(
        "--concept",
        action="append",
        help="learn this concept, in place of all new ones of --clusters; can be repeated",
    )
    flag(
        "--samples",
        default="clusters",
        help="training photos: clusters (those that stage 2 chose), all, random:N, or a text file "
        "of file names, one a line",
    )
    flag(
        "--mode",
        choices=list(RATES),
        default="lora",
        help="lora: train an adapter; full: all weights of the base; scratch: a new network",
    )
    flag(
        "--layers",
        default="crucial",
        help="layer groups to adapt: crucial (those that a search found, else the built-in ones), "
        "search (finds them first), all, or names: down1,tb,...",
    )
    flag(
        "--rank",
        type=rank_flag,
        default="paper",
        help="ranks of the adapter: paper (built in, by group), auto (a search finds them), or one "
        "number for all",
    )
    flag(
        "--alpha",
        type=runs.positive,
        default=16.0,
        help="LoRA's scale: B A is multiplied by alpha / rank",
    )
    flag(
        "--start-from",
        choices=["weights", "gradient"],
        help="what A's singular vectors are of, weights: the layer's weight; gradient: the loss's "
        "gradient for it, as LoRA-GA has it (default: gradient with --layers all, else weights)",
    )
    flag(
        "--rank-threshold",
        type=runs.weight,
        default=0.01,
        help="share of the error by which a change in a search must lower it to be kept",
    )
    flag(
        "--probe-steps",
        type=runs.count,
        default=500,
        help="steps of each short training of a search",
    )
    flag(
        "--epochs",
        type=runs.count,
        default=200,
        help="passes over the data, in the second half of which the learning rates fall to 0",
    )
    flag("--lr", type=runs.positive, help="the generator's learning rate (default: by --mode)")
    args = parser.parse(DEMO)
    if args.lr is None:
        args.lr = DEMO_RATES[args.mode] if args.demo else RATES[args.mode]
    if args.mode == "scratch":
        args.new_discriminator = True
    if args.mode != "lora" and (args.rank == "auto" or args.layers == "search" or args.start_from):
        given = "--start-from is" if args.start_from else "searches are"
        raise UserError(f"--mode {args.mode} trains all weights: {given} for --mode lora")
    if args.start_from is None:
        args.start_from = "gradient" if args.layers == "all" else "weights"
    if args.start_from == "gradient" and args.l1 == 0 and args.perceptual == 0:
        raise UserError("--start-from gradient needs --l1 or --perceptual, which are both 0")
    return args


# ---- Adapters: W + (alpha / rank) B A, see common.LoRA -------------------------------------------


def layer_group(name: str) -> str:
    """The group that a layer belongs to: "tb" for "blocks.tb.feed1", "down1" for "down1.conv"."""
    return name.removeprefix("blocks.").split(".")[0]


def layer_shapes(generator: common.Generator) -> dict[str, tuple[int, int]]:
    """{layer: its weight's shape as a matrix, (out, in * k * k)}, in the order of definition."""
    shapes = {}
    for name, module in common.named_layers(generator):
        outputs = len(module.bias)
        shapes[name] = outputs, module.weight.numel() // outputs
    return shapes


def layer_ranks(shapes: dict, ranks: dict[str, int]) -> dict[str, int]:
    """{layer: rank} from {layer group: rank}. A rank is at most the shorter side of its matrix."""
    found = {}
    for name, shape in shapes.items():
        group = layer_group(name)
        if group in ranks:
            found[name] = min(ranks[group], *shape)
    return found


def lora_weights(shapes: dict, ranks: dict[str, int]) -> int:
    """How many numbers A and B hold in all layers. ranks: {layer group: rank}."""
    total = 0
    for name, rank in layer_ranks(shapes, ranks).items():
        outputs, inputs = shapes[name]
        total += rank * (outputs + inputs)
    return total


def first_gradients(args, generator, train: dataset.Pairs, layers: Iterable[str]) -> Matrices:
    """The loss's gradient for the weights of these layers, summed over FIRST_PAIRS training pairs
    of each process, one at a time: of L1 and the perceptual term, which need no discriminator."""
    generator.requires_grad_(False).eval()  # the same in every run, so no dropout
    weights = {name: generator.get_submodule(name).weight for name in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    index = generator.concept_index(train.concepts[0]["name"])
    device = next(generator.parameters()).device
    pairs = train.batches(
        runs.world(), range(FIRST_PAIRS), args.seed, device, args.crop, flip=not args.no_flip
    )
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for photo, edit, concept in pairs:
        fake = generator(photo, concept + index)
        loss = args.l1 * (fake - edit).abs().mean()
        if args.perceptual:
            loss = loss + args.perceptual * training.perceptual_distance(fake, edit).mean()
        found = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            total[name] += gradient
    for name, gradient in total.items():
        if not runs.average(gradient).isfinite().all():
            raise UserError(f"the gradient for {name} is not finite: {args.base} cannot be trained")
    return total


def add_lora(
    generator, ranks: dict[str, int], alpha: float, start: Matrices | None = None
) -> list[nn.Parameter]:
    """Freezes the generator and adds A and B to the layers in `ranks`, {layer: rank}. Returns A and
    B of all of them. B starts at 0, so that nothing changes yet, and A as the leading right
    singular vectors of the layer's matrix in `start` or, without it, of its weight (ours; random
    rows learned less in as many steps)."""
    generator.requires_grad_(False)
    for name, rank in ranks.items():
        module = generator.get_submodule(name)
        matrix = start[name] if start else module.weight
        matrix = common.out_first(matrix, type(module)).detach().cpu().flatten(1)
        right = torch.linalg.svd(matrix, full_matrices=False).Vh
        b = torch.zeros(len(matrix), rank)
        lora = common.LoRA(module, right[:rank].contiguous(), b, alpha / rank)
        parametrize.register_parametrization(module, "weight", lora)
    return [p for p in generator.parameters() if p.requires_grad]


def save_adapter(path: Path, generator, concept: str, base_sha256: str, alpha: float) -> None:
    """Writes A and B of every adapted layer, and the prompt's features (T, D), in fp16. To use them
    without this code, add (alpha / rank) B A to the base's <layer>.weight, seen as
    (out, in * k * k)."""
    tensors = {}
    ranks = {}
    for name, module in common.named_layers(generator):
        if parametrize.is_parametrized(module, "weight"):
            lora = module.parametrizations.weight[-1]
            tensors[f"{name}.lora_A"] = lora.lora_A.half()
            tensors[f"{name}.lora_B"] = lora.lora_B.half()
            ranks[name] = len(lora.lora_A)
    about, tokens = generator.known_concepts()[generator.concept_index(concept)]
    if generator.takes_text:
        tensors["tokens"] = tokens.half()
    metadata = {"kind": "adapter", "base": base_sha256, "alpha": alpha, **about, "ranks": ranks}
    runs.write_tensors(path, tensors, metadata)


# ---- Which photos to train on --------------------------------------------------------------------


def chosen_samples(args, concept: str) -> list[str] | None:
    """The file names of the training photos that --samples means; None for all."""
    if args.samples == "all":
        return None
    if args.samples.startswith("random:"):
        names = dataset.edit_names(args.pairs, "train", [concept])[concept]
        count = args.samples.removeprefix("random:")
        if not count.isdecimal() or not 0 < int(count) <= len(names):
            raise UserError(f"--samples {args.samples}: give a number from 1 to {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed))
        return sorted(names[i] for i in order[: int(count)])
    path = Path(args.samples)
    if args.samples == "clusters":
        path = args.clusters / "samples" / f"{concept}.txt"
        if not path.exists():
            print(f"stage 2 chose no photos for {concept} ({path} does not exist): using all")
            return None
    text = ""
    if path.is_file():
        with runs.explain(f"{path} is no text"):
            text = runs.read_text(path)
    names = [name for name in text.split("\n") if name.strip()]
    if not names:
        raise UserError(f"--samples: {path} does not exist, or lists no photos")
    return names


def training_pairs(args, concept: str) -> dataset.Pairs:
    """The pairs that --samples means. Where --seed draws them, data_hash is that of all pairs, so
    that runs of several seeds count as runs on the same data."""
    pairs = dataset.find_pairs(args.pairs, "train", [concept], chosen_samples(args, concept))
    if args.samples.startswith("random:"):
        pairs.data_hash = pairs.cache_hash
    return pairs


def validation_split(args, concept: str) -> tuple[list[str], list[str]]:
    """(photos that a search's probes train on, photos on which their error is measured), as this
    file's docstring describes."""
    names = dataset.edit_names(args.pairs, "train", [concept])[concept]
    chosen = chosen_samples(args, concept) or names
    not_chosen = sorted(set(names) - set(chosen))
    if not_chosen:
        return chosen, not_chosen[:: math.ceil(len(not_chosen) / VALIDATION)]
    held_out = chosen[::5]
    trained = [name for name in chosen if name not in held_out]
    return trained or chosen, held_out


# ---- Training ------------------------------------------------------------------------------------


def prepare(args, concept: dict, device: torch.device) -> tuple:
    """(the generator to train, which has the new concept's prompt, the discriminator, which sees no
    prompt), without an adapter."""
    torch.manual_seed(args.seed)
    generator = common.load_generator(args.base, device)
    if args.mode == "scratch":
        prompts = dict(generator.named_buffers())
        generator = common.build_network(generator.config).to(device)
        generator.load_state_dict(prompts, strict=False)  # no weights
    tokens = None
    if generator.takes_text:
        [tokens], _ = dataset.prompt_tokens(args.pairs, [concept], generator.config["clip"])
    generator.set_known_concepts([*generator.known_concepts(), (concept, tokens)])
    generator.requires_grad_(True)
    if args.new_discriminator:
        return generator, common.new_discriminator(generator, text=False)
    discriminator = common.base_discriminator(args.base, generator)
    discriminator.project = None  # the layer that sees the prompt
    return generator, discriminator


def adapt(args, generator, train: dataset.Pairs, ranks: dict[str, int]) -> None:
    """Adds an adapter for the concept of `train`, which starts as --start-from says. ranks: {layer
    group: rank}."""
    of_layers = layer_ranks(layer_shapes(generator), ranks)
    start = None
    if args.start_from == "gradient":
        start = first_gradients(args, generator, train, of_layers)
    add_lora(generator, of_layers, args.alpha, start)


def finetune(
    args, generator, discriminator, train, steps: int, out: Path | None = None, test=None
) -> dict:
    """Trains what is not frozen. Returns Loop.pace, columns of a table. out: the folder for the
    state and for pictures of `test`; probes have none."""
    name = train.concepts[0]["name"]
    index = generator.concept_index(name)  # batches say 0 for it, as `train` has one concept
    opt_g = training.adam([p for p in generator.parameters() if p.requires_grad], args.lr)
    opt_d = training.adam(discriminator.parameters(), args.lr_d)
    ddp_generator = training.data_parallel(training.compiled(generator, args.compile))
    ddp_discriminator = training.data_parallel(training.compiled(discriminator, args.compile))
    discriminator_features = training.compiled(discriminator.features, args.compile)
    one_pass = args.accumulate == 1  # the generator's forward pass serves both steps
    halved = training.half_size_steps(args.half_size, steps, args.crop or train.size)
    parts = {"g": generator, "d": discriminator, "opt_g": opt_g, "opt_d": opt_d}
    loop = training.Loop(args, train, steps, parts, out, desc=name, half_size_steps=halved)
    generator.train()
    for batch in loop:
        training.set_lr(opt_g, args.lr, loop.step, steps)
        training.set_lr(opt_d, args.lr_d, loop.step, steps)
        micro_batches = loop.micro_batches(batch)
        fakes = []
        losses_d = []

        # The discriminator's step: real edits towards 1, the generator's towards 0.
        for photo, edit, concept in micro_batches:
            with training.autocast(photo.device, args.precision):
                with torch.set_grad_enabled(one_pass):
                    fake = ddp_generator(photo, concept + index)
                score_real = ddp_discriminator(photo, edit).float()
                score_fake = ddp_discriminator(photo, fake.detach()).float()
            loss_d = ((score_real - 1).square().mean() + score_fake.square().mean()) / 2
            loop.scaler.scale(loss_d / args.accumulate).backward()
            fakes.append(fake)
            losses_d.append(loss_d)
        training.descend(opt_d, loop.scaler)

        # The generator's step: its edits towards 1, and near the teacher's.
        discriminator.requires_grad_(False)
        losses = []
        for (photo, edit, concept), fake, loss_d in zip(
            micro_batches, fakes, losses_d, strict=True
        ):
            with training.autocast(photo.device, args.precision):
                if not one_pass:  # activations of all micro-batches would not fit
                    fake = ddp_generator(photo, concept + index)
                features = discriminator_features(photo, fake)
                with torch.no_grad():
                    wanted = discriminator_features(photo, edit) if args.fm else features
            gan = (features[-1].float() - 1).square().mean()
            l1 = (fake.float() - edit).abs().mean()
            fm = training.feature_matching(features, wanted)
            loss_g = gan + args.l1 * l1 + args.fm * fm
            row = {"L1": l1, "FM": fm}
            if args.perceptual:
                row["P"] = training.perceptual_distance(fake, edit).mean()
                loss_g = loss_g + args.perceptual * row["P"]
            losses.append({"G": loss_g, "D": loss_d, **row})
            loop.scaler.scale(loss_g / args.accumulate).backward()
        training.descend(opt_g, loop.scaler)
        discriminator.requires_grad_(True)

        if loop.record(training.mean_losses(losses)) and out:
            picture = training.progress_picture(generator, test, per_concept=6)
            runs.write_png(out / "samples" / f"{loop.step:07d}.png", picture)
            loop.save()
            generator.train()
    return loop.pace()


# ---- Which layers, which ranks -------------------------------------------------------------------


def chosen_groups(args, base: common.Generator) -> list[str]:
    """The layer groups that --layers means, in the base's order. `crucial` are those that a search
    found or, without one, those of PAPER_RANKS. UserError for one that the base does not have."""
    groups = list(dict.fromkeys(map(layer_group, layer_shapes(base))))
    if args.layers == "all":
        return groups
    wanted = args.layers.split(",")
    if args.layers in ("crucial", "search"):
        wanted = [group for group in groups if group in PAPER_RANKS] or groups
        found = args.out / "layer-search/crucial.json"
        if found.exists():
            wanted = runs.read_json(found).get("groups")
            print(f"crucial layers from {found}: {wanted}")
            if not isinstance(wanted, list) or not wanted:
                raise UserError(f"{found} lists no layer groups")
    for group in wanted:
        if group not in groups:
            known = ", ".join(groups)
            raise UserError(f"no layer group {group!r} among this generator's {known}")
    return [group for group in groups if group in wanted]


class Probes:
    """A search's short trainings on some concepts. The error of each is kept in a file, so that a
    search that was stopped continues and finds the same."""

    def __init__(self, args, concepts: list[str], file: Path, device: torch.device):
        self.args = args
        self.file = file
        self.device = device
        self.saved = runs.read_json(file) if file.exists() else {}
        self.data = {}  # {concept: [pairs to train on, pairs to measure the error on]}
        for name in concepts:
            pairs = []
            for samples in validation_split(args, name):
                part = dataset.find_pairs(args.pairs, "train", [name], samples)
                pairs.append(part.cache(args.cache))
            self.data[name] = pairs

    def error(self, ranks: dict[str, int]) -> float:
        """The error of probes with these ranks, {layer group: rank}, relative to the base's,
        averaged over the concepts."""
        errors = [self.measure(name, ranks) / self.measure(name, {}) for name in self.data]
        return sum(errors) / len(errors)

    def measure(self, name: str, ranks: dict[str, int]) -> float:
        """The error of a probe on one concept; for no ranks, of the base itself."""
        key = json.dumps([name, sorted(ranks.items())])
        if key not in self.saved:
            error = self.train_and_judge(name, ranks)
            self.saved[key] = runs.from_first(error)  # all processes must decide alike
            if runs.rank() == 0:
                runs.write_json(self.file, self.saved)
        return self.saved[key]

    def train_and_judge(self, name: str, ranks: dict[str, int]) -> float:
        """measure's error of a new probe, infinite if it diverged. Processes other than the first
        do not measure and return 0."""
        train, held_out = self.data[name]
        generator, discriminator = prepare(self.args, train.concepts[0], self.device)
        try:
            if ranks:
                adapt(self.args, generator, train, ranks)
                finetune(self.args, generator, discriminator, train, self.args.probe_steps)
        except training.Diverged:
            return math.inf
        if runs.rank() > 0:
            return 0.0
        [row] = training.evaluate(generator, held_out)
        return training.error(row)


def search_layers(args, concepts: list[str], base: common.Generator, device: torch.device) -> None:
    """Runs the layer search, which this file's docstring describes, in <out>/layer-search."""
    out = args.out / "layer-search"
    shapes = layer_shapes(base)
    pairs = [training_pairs(args, name) for name in concepts]
    data = [part.data_hash for part in pairs]
    unused = {"rank": 1, "steps": None, "epochs": None}  # flags that do not change the search
    settings = runs.settings_of(args, data=data, concept=concepts, base=base.sha256, **unused)
    if runs.begin_run(out, settings, args.overwrite):
        return
    training.set_threads(device, base, args.batch, args.crop or pairs[0].size, out)
    probes = Probes(args, concepts, out / "probes.json", device)
    rows = []
    for group in dict.fromkeys(map(layer_group, shapes)):
        error = probes.error({group: 1})
        weights = lora_weights(shapes, {group: 1})
        rows.append(
            {
                "layers": group,
                "trained weights": weights,
                "error alone %": 100 * error,
                "gain % per 1000 weights": 100 * (1 - error) / weights * 1000,
            }
        )
    rows.sort(key=lambda row: -row["gain % per 1000 weights"])
    crucial = []
    best = 1.0
    for row in rows:
        error = probes.error(dict.fromkeys([*crucial, row["layers"]], 1))
        better = error < (1 - args.rank_threshold) * best
        row["error with those before %"] = 100 * error
        row["crucial"] = "yes" if better else "no"
        if better:
            best = error
            crucial.append(row["layers"])
    if not crucial:
        raise UserError("no layer group lowers the error enough: give more --probe-steps")
    if runs.rank() == 0:
        runs.write_json(out / "crucial.json", {"groups": crucial})
        tables = {"Crucial layers, held-out error relative to the base's": rows}
        runs.write_result(args, tables, reads=[args.pairs, args.base.parent], out=out)
    runs.barrier()  # the others read crucial.json next


def search_ranks(probes: Probes, shapes: dict, chosen: list[str], threshold: float) -> tuple:
    """The rank search, which this file's docstring describes. chosen: layer groups. Returns
    ({layer group: rank}, a table's rows, one for each probe, another table's row, which compares
    the number of probes with that of all combinations)."""
    ranks = dict.fromkeys(chosen, 1)
    limits = {}
    for group in chosen:
        limits[group] = max(layer_ranks(shapes, {group: RANK_LIMIT}).values())
    # each group has the ranks 1, 2, 4, ... up to its limit
    combinations = math.prod((limit - 1).bit_length() + 1 for limit in limits.values())
    best = probes.error(ranks)
    path = [{"probe": 1, "group": "all", "rank": 1, "error %": 100 * best, "kept": "yes"}]
    while active := [group for group in chosen if ranks[group] < limits[group]]:
        for group in active:
            tried = {**ranks, group: 2 * ranks[group]}
            error = probes.error(tried)
            better = error < (1 - threshold) * best
            path.append(
                {
                    "probe": len(path) + 1,
                    "group": group,
                    "rank": tried[group],
                    "error %": 100 * error,
                    "kept": "yes" if better else "no",
                }
            )
            if better:
                ranks = tried
                best = error
            else:
                limits[group] = ranks[group]  # no further
    found = {
        "ranks": " ".join(f"{group}:{rank}" for group, rank in ranks.items()),
        "probes": len(path),
        "all combinations": combinations,
        "weights at these ranks": lora_weights(shapes, ranks),
    }
    return ranks, path, found


# ---- One concept ---------------------------------------------------------------------------------


def ranks_of(args, groups: list[str]) -> dict[str, int]:
    """{layer group: rank} that --rank means; for `auto`, the ranks from which the search starts."""
    if args.rank == "paper":
        return {group: PAPER_RANKS.get(group, 1) for group in groups}
    return dict.fromkeys(groups, 1 if args.rank == "auto" else args.rank)


def save_product(out: Path, generator, name: str, base: common.Generator, args) -> Path:
    """Writes the adapter or, in other modes, a generator that knows only the new concept. Returns
    the file."""
    if args.mode == "lora":
        path = out / "adapter.safetensors"
        save_adapter(path, generator, name, base.sha256, args.alpha)
        return path
    path = out / "generator.safetensors"
    generator.set_known_concepts([generator.known_concepts()[generator.concept_index(name)]])
    common.save_network(path, generator)
    return path


def learn(args, name: str, base: common.Generator, groups: list[str], device) -> None:
    """Learns one concept, in <out>/<concept>. groups: the layer groups to adapt."""
    out = args.out / name
    train = training_pairs(args, name).cache(args.cache)
    test = dataset.find_pairs(args.pairs, "test", [name]).cache(args.cache)
    ranks = ranks_of(args, groups)
    # raises for bad input before anything is written
    _, discriminator = prepare(args, train.concepts[0], device)
    settings = runs.settings_of(
        args,
        concept=name,
        layers=",".join(groups),
        base=base.sha256,
        data=[train.data_hash, test.data_hash],
        discriminator=discriminator.sha256,
    )
    if runs.begin_run(out, settings, args.overwrite):
        return
    training.set_threads(device, base, args.batch, args.crop or train.size, out)
    search_tables = {}
    if args.rank == "auto":
        probes = Probes(args, [name], out / "probes.json", device)
        shapes = layer_shapes(base)
        ranks, path, found = search_ranks(probes, shapes, groups, args.rank_threshold)
        search_tables["Rank search, held-out error relative to the base's"] = path
        search_tables["Rank search, found"] = [found]
    # only now, so that networks of a search's probes did not lie in memory beside these
    generator, discriminator = prepare(args, train.concepts[0], device)
    if args.mode == "lora":
        adapt(args, generator, train, ranks)

    photos, edits = test.pictures(0)
    generator.eval()
    before = training.run_generator(generator, photos, generator.concept_index(name))
    steps = args.steps or args.epochs * dataset.steps_per_epoch(train.counts, args.batch)
    pace = finetune(args, generator, discriminator, train, steps, out, test)
    if runs.rank() > 0:
        return
    product = save_product(out, generator, name, base, args)
    [measured] = training.evaluate(generator, test, args.fid == "auto")
    trained = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    row = {
        "concept": name,
        "mode": args.mode,
        "rank": args.rank if args.mode == "lora" else None,
        "before dB": training.mean_psnr(before, edits),
        **measured,
        "trained weights": trained,
        "trained %": 100 * trained / common.count_parameters(base),
        "file KB": product.stat().st_size / 1000,
        "samples": args.samples,
        "photos": train.counts[0],
        **pace,
    }
    tables = {"New concepts, held-out photos": [row], **search_tables}
    runs.write_result(args, tables, reads=[args.pairs, args.base.parent], out=out)


def main() -> None:
    args = parse()
    device = training.start(args)
    concepts = dataset.chosen_concepts(args, "new")
    base = common.load_generator(args.base)
    size = dataset.find_pairs(args.pairs, "test", concepts[:1]).size
    args.l1 = training.l1_weight(args)
    training.check_crop(args.crop, size, whole_only=base.config["arch"] == "unet256")
    training.check_loop(args, device)
    if base.config["arch"] == "unet256":
        args.half_size = 0.0  # at the full size its innermost feature map is one pixel already
    if not args.new_discriminator:
        common.base_discriminator(args.base, base)  # raises before anything is written
    if args.layers == "search":
        search_layers(args, concepts, base, device)
    groups = chosen_groups(args, base) if args.mode == "lora" else []
    for name in concepts:
        learn(args, name, base, groups, device)


if __name__ == "__main__":
    runs.run(main)
