"""Stage 4: a new concept for a trained base, as a low-rank adapter (LoRA) on its crucial layers.

E2GAN (arXiv 2401.06127), section 3. The base stays as it is; each adapted weight becomes
W + (alpha/r) B A. `--mode full` trains all of the base's weights, `--mode scratch` a new network.
The discriminator is the base's, which tells strokes from blur from the first step on (ours).

Layers and ranks are fixed, unless a search chooses them by short trainings (probes). Their error
is training.error (perceptual distance + RMSE / 50) on training photos that the concept does not
train on: up to 100 outside stage 2's choice, else each fifth of the chosen, which the probes leave
out. `--layers search` adapts each layer group alone at rank 1, sorts the groups by how much a
trained weight lowers the error, adds them in that order, and keeps one if it lowers the error by
more than --rank-threshold. Later runs use what it found. `--rank auto` starts every group at rank 1
and doubles a group's rank as long as that lowers the error by more than --rank-threshold.

Reads   runs/pairs, runs/base/generator.safetensors, runs/clusters (new concepts, chosen photos)
Writes  runs/lora/<concept>/adapter.safetensors     kilobytes: A, B, prompt, the base's SHA-256
        (full, scratch: generator.safetensors)      and state, log.jsonl, curve.png, samples/*.png
        runs/lora/layer-search/crucial.json         what --layers search found

    python 04_lora_finetune.py --demo
    python 04_lora_finetune.py --concept cartoon        (default: every new concept of stage 2)
    python 04_lora_finetune.py --layers search --rank auto
    torchrun --nproc_per_node=8 04_lora_finetune.py --concept cartoon --batch 128
"""

import argparse
import json
import math
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

DEMO = {  # so few steps are too few for pictures of two sizes
    "batch": 1,
    "steps": 64,
    "half_size": 0.0,
    "probe_steps": 60,
    "fid": "off",
    "save_every": 64,
}
RATES = {"lora": 1e-3, "full": 2e-4, "scratch": 2e-4}  # --lr by --mode, where it was not given
DEMO_RATES = {"lora": 3e-3, "full": 1e-3, "scratch": 1e-3}  # short runs want long steps
PAPER_RANKS = {  # the down- and upsamplings and the transformer block are the paper's
    "down1": 1,
    "down2": 4,
    "tb": 1,
    "up1": 8,
    "up2": 8,
    # Ours, without which little is learned: the first and the last layer, which alone see how
    # bright the photo is, and those by which the prompt scales and shifts what comes out of norms.
    "stem": 4,
    "films": 1,
    "out": 3,
}
RANK_LIMIT = 16  # no search goes beyond it
VALIDATION = 100  # photos that probes are judged on, at most


def rank_flag(text: str) -> int | str:
    """--rank as argparse reads it."""
    return text if text in ("paper", "auto") else runs.count(text)


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, "runs/lora")
    flag = parser.add_argument
    training.add_flags(parser)
    training.add_half_size_flag(parser)
    flag("--clusters", type=Path, default="runs/clusters", help="stage 2's: concepts and photos")
    flag("--base", type=Path, default="runs/base/generator.safetensors", help="stage 3's or 5's")
    training.add_discriminator_flag(parser)
    flag("--concept", action="append", help="learn this concept instead; can be repeated")
    flag("--samples", default="clusters", help="clusters (stage 2's), all, random:N, file of names")
    flag("--mode", choices=list(RATES), default="lora", help="adapter, all weights, a new network")
    flag("--layers", default="crucial", help="crucial, search (finds them), all, or down1,tb,...")
    flag("--rank", type=rank_flag, default="paper", help="paper, auto (searches), or a number")
    flag("--alpha", type=runs.positive, default=16.0, help="LoRA's: B A counts alpha / rank")
    flag(
        "--rank-threshold",
        type=runs.weight,
        default=0.01,
        help="by what share a step of a search must lower the error",
    )
    flag("--probe-steps", type=runs.count, default=500, help="steps of a search's short training")
    flag("--epochs", type=runs.count, default=200, help="rates fall to 0 in the second half")
    flag("--lr", type=runs.positive, help="the generator's learning rate (default: by --mode)")
    args = parser.parse(DEMO)
    if args.lr is None:
        args.lr = DEMO_RATES[args.mode] if args.demo else RATES[args.mode]
    if args.mode == "scratch":
        args.new_discriminator = True
    if args.mode != "lora" and (args.rank == "auto" or args.layers == "search"):
        raise UserError(f"--mode {args.mode} trains all weights: searches are for --mode lora")
    return args


# ---- Adapters: W + (alpha / rank) B A (common.LoRA), made and saved ------------------------------


def layer_group(name: str) -> str:
    """The group of a layer: of "blocks.tb.feed1" it is "tb", of "down1.conv" it is "down1"."""
    return name.removeprefix("blocks.").split(".")[0]


def layer_shapes(generator: common.Generator) -> dict[str, tuple[int, int]]:
    """{layer: the shape of its weight as a matrix, (out, in * k * k)}, in order."""
    shapes = {}
    for name, module in common.named_layers(generator):
        outputs = len(module.bias)
        shapes[name] = outputs, module.weight.numel() // outputs
    return shapes


def layer_ranks(shapes: dict, ranks: dict[str, int]) -> dict[str, int]:
    """Ranks by group as ranks by layer; a rank can't be larger than its weight's sides."""
    found = {}
    for name, shape in shapes.items():
        group = layer_group(name)
        if group in ranks:
            found[name] = min(ranks[group], *shape)
    return found


def lora_weights(shapes: dict, ranks: dict[str, int]) -> int:
    """How many numbers the matrices A and B of these ranks (by group) hold."""
    total = 0
    for name, rank in layer_ranks(shapes, ranks).items():
        outputs, inputs = shapes[name]
        total += rank * (outputs + inputs)
    return total


def add_lora(generator, ranks: dict[str, int], alpha: float) -> list[nn.Parameter]:
    """Freezes the generator and adapts the layers in `ranks` {layer: rank}; returns what trains.
    B starts at 0, so nothing changes yet; A as the weight's leading right singular vectors (ours:
    the inputs that count most; random rows learned less in as many steps)."""
    generator.requires_grad_(False)
    for name, rank in ranks.items():
        module = generator.get_submodule(name)
        weight = common.out_first(module.weight, type(module))
        right = torch.linalg.svd(weight.detach().cpu().flatten(1), full_matrices=False).Vh
        b = torch.zeros(len(weight), rank)
        lora = common.LoRA(module, right[:rank].contiguous(), b, alpha / rank)
        parametrize.register_parametrization(module, "weight", lora)
    return [p for p in generator.parameters() if p.requires_grad]


def save_adapter(path: Path, generator, concept: str, base_sha256: str, alpha: float) -> None:
    """fp16 A and B of every adapted layer and the prompt's token features. A reader without this
    code adds (alpha / rank) B A to the base's <layer>.weight, seen as (out, in * k * k)."""
    tensors, ranks = {}, {}
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


# ---- Which photos --------------------------------------------------------------------------------


def chosen_samples(args, concept: str) -> list[str] | None:
    """The names of the training photos to use, as --samples says; None for all."""
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
    """The chosen pairs. If --seed draws them, data_hash is that of all: seeds are no other data."""
    pairs = dataset.find_pairs(args.pairs, "train", [concept], chosen_samples(args, concept))
    if args.samples.startswith("random:"):
        pairs.data_hash = pairs.cache_hash
    return pairs


def validation_split(args, concept: str) -> tuple[list[str], list[str]]:
    """(photos that probes train on, photos that judge them), as the docstring says."""
    names = dataset.edit_names(args.pairs, "train", [concept])[concept]
    chosen = chosen_samples(args, concept) or names
    held_out = sorted(set(names) - set(chosen))
    if held_out:
        return chosen, held_out[:: math.ceil(len(held_out) / VALIDATION)]
    judged = chosen[::5]
    trained = [name for name in chosen if name not in judged]
    return trained or chosen, judged


# ---- Training ------------------------------------------------------------------------------------


def prepare(args, concept: dict, ranks: dict[str, int], device: torch.device) -> tuple:
    """The generator to train, which knows the new concept's prompt, and the discriminator, which
    sees no prompt. ranks: of the adapter, by group (--mode lora)."""
    torch.manual_seed(args.seed)
    generator = common.load_generator(args.base, device)
    if args.mode == "scratch":
        prompts = dict(generator.named_buffers())
        generator = common.build_network(generator.config).to(device)
        generator.load_state_dict(prompts, strict=False)
    tokens = None
    if generator.takes_text:
        [tokens], _ = dataset.prompt_tokens(args.pairs, [concept], generator.config["clip"])
    generator.set_known_concepts([*generator.known_concepts(), (concept, tokens)])
    if args.mode == "lora":
        add_lora(generator, layer_ranks(layer_shapes(generator), ranks), args.alpha)
    else:
        generator.requires_grad_(True)
    if args.new_discriminator:
        return generator, common.new_discriminator(generator, text=False)
    discriminator = common.base_discriminator(args.base, generator)
    discriminator.project = None  # the layer that sees the prompt
    return generator, discriminator


def finetune(
    args, generator, discriminator, train, steps: int, out: Path | None = None, test=None
) -> dict:
    """Trains what is not frozen. State, and pictures of `test`, go to `out`; a probe has none.
    Returns its pace as columns of a table."""
    name = train.concepts[0]["name"]
    index = generator.concept_index(name)  # of the only concept in `train`, whose number there is 0
    opt_g = training.adam([p for p in generator.parameters() if p.requires_grad], args.lr)
    opt_d = training.adam(discriminator.parameters(), args.lr_d)
    ddp_generator = training.data_parallel(training.compiled(generator, args.compile))
    ddp_discriminator = training.data_parallel(training.compiled(discriminator, args.compile))
    discriminator_features = training.compiled(discriminator.features, args.compile)
    one_pass = args.accumulate == 1  # the generator's serves both steps
    halved = training.half_size_steps(args.half_size, steps, args.crop or train.size)
    parts = {"g": generator, "d": discriminator, "opt_g": opt_g, "opt_d": opt_d}
    loop = training.Loop(args, train, steps, parts, out, desc=name, half_size_steps=halved)
    generator.train()
    for batch in loop:
        training.set_lr(opt_g, args.lr, loop.step, steps)
        training.set_lr(opt_d, args.lr_d, loop.step, steps)
        micro_batches = loop.micro_batches(batch)
        fakes = []
        losses = []

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
            losses.append({"D": loss_d})
        training.descend(opt_d, loop.scaler)

        # The generator's step: its edits towards 1, and near the teacher's.
        discriminator.requires_grad_(False)
        for (photo, edit, concept), fake, row in zip(micro_batches, fakes, losses, strict=True):
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
            row |= {"L1": l1, "FM": fm}
            if args.perceptual:
                row["P"] = training.perceptual_distance(fake, edit).mean()
                loss_g = loss_g + args.perceptual * row["P"]
            row["G"] = loss_g
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
    """--layers as layer groups, in the base's order. `crucial` is what a search found or, without
    one, PAPER_RANKS' groups. UserError for a group that the base does not have."""
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
    """Short trainings on some concepts, which tell what ranks are worth by training.error on
    held-out photos. Their errors are kept in a file, so a search that was killed goes on with
    those, and finds the same."""

    def __init__(self, args, concepts: list[str], file: Path, device: torch.device):
        self.args = args
        self.file = file
        self.device = device
        self.saved = runs.read_json(file) if file.exists() else {}
        self.data = {}  # {concept: (pairs to train on, pairs to judge on)}
        for name in concepts:
            pairs = []
            for samples in validation_split(args, name):
                part = dataset.find_pairs(args.pairs, "train", [name], samples)
                pairs.append(part.cache(args.cache))
            self.data[name] = pairs

    def error(self, ranks: dict[str, int]) -> float:
        """The error after probes with these ranks by group, relative to the base's: the mean over
        the concepts."""
        errors = [self.measure(name, ranks) / self.measure(name, {}) for name in self.data]
        return sum(errors) / len(errors)

    def measure(self, name: str, ranks: dict[str, int]) -> float:
        """The error on one concept; without ranks, of the base as it is."""
        key = json.dumps([name, sorted(ranks.items())])
        if key not in self.saved:
            error = self.train_and_judge(name, ranks)
            self.saved[key] = runs.from_first(error)  # all processes must go the same way
            if runs.rank() == 0:
                runs.write_json(self.file, self.saved)
        return self.saved[key]

    def train_and_judge(self, name: str, ranks: dict[str, int]) -> float:
        """measure, done anew. Only the first process judges; others return 0."""
        train, held_out = self.data[name]
        generator, discriminator = prepare(self.args, train.concepts[0], ranks, self.device)
        try:
            if ranks:
                finetune(self.args, generator, discriminator, train, self.args.probe_steps)
        except training.Diverged:
            return math.inf
        if runs.rank() > 0:
            return 0.0
        [row] = training.evaluate(generator, held_out)
        return training.error(row)


def search_layers(args, concepts: list[str], base: common.Generator, device: torch.device) -> None:
    """The layer search, by the rule in this file's docstring, in <out>/layer-search."""
    out = args.out / "layer-search"
    shapes = layer_shapes(base)
    pairs = [training_pairs(args, name) for name in concepts]
    data = [part.data_hash for part in pairs]
    unused = {"rank": 1, "steps": None, "epochs": None}  # by probes
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
    """Starts all chosen groups at rank 1, and doubles one's as often as that lowers the error by
    more than the threshold. Returns ranks by group, and for tables: the probes as rows, one after
    the other, and a row of what was found beside the probes that all combinations would take."""
    ranks = dict.fromkeys(chosen, 1)
    limits = {}
    for group in chosen:
        limits[group] = max(layer_ranks(shapes, {group: RANK_LIMIT}).values())
    # a group's ranks to try: 1, 2, 4, ... up to its limit
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
                ranks, best = tried, error
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
    """--rank as {group: rank}; of `auto`, what its search starts from."""
    if args.rank == "paper":
        return {group: PAPER_RANKS.get(group, 1) for group in groups}
    return dict.fromkeys(groups, 1 if args.rank == "auto" else args.rank)


def save_product(out: Path, generator, name: str, base: common.Generator, args) -> Path:
    """Writes what this run made: an adapter, or a generator that knows the new concept alone."""
    if args.mode == "lora":
        path = out / "adapter.safetensors"
        save_adapter(path, generator, name, base.sha256, args.alpha)
        return path
    path = out / "generator.safetensors"
    generator.set_known_concepts([generator.known_concepts()[generator.concept_index(name)]])
    common.save_network(path, generator)
    return path


def learn(args, name: str, base: common.Generator, groups: list[str], device) -> None:
    """One concept, from its pairs to its result.json in <out>/<concept>. groups: of layers to
    adapt."""
    out = args.out / name
    train = training_pairs(args, name).cache(args.cache)
    test = dataset.find_pairs(args.pairs, "test", [name]).cache(args.cache)
    ranks = ranks_of(args, groups)
    # what cannot be prepared is told before anything is written
    _, discriminator = prepare(args, train.concepts[0], ranks, device)
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
    # anew, as adapters begin with singular vectors, which depend on the number of threads
    generator, discriminator = prepare(args, train.concepts[0], ranks, device)

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
        args.half_size = 0.0  # its innermost map is one pixel at the full size
    if not args.new_discriminator:
        common.base_discriminator(args.base, base)  # an error before anything is written
    if args.layers == "search":
        search_layers(args, concepts, base, device)
    groups = chosen_groups(args, base) if args.mode == "lora" else []
    for name in concepts:
        learn(args, name, base, groups, device)


if __name__ == "__main__":
    runs.run(main)
