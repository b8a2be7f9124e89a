"""Teaches a trained base a new concept with a low-rank adapter on its crucial layers.

E2GAN (arXiv 2401.06127), section 3. The base stays as it is; each adapted weight becomes W + (alpha/r) B A. The paper's
crucial layers are the down- and upsampling layers and the transformer block; its ranks 1, 4, 1, 8 (first and second
downsampling, transformer block, upsamplings). We add the first and the last layer at ranks 4 and 3, and what the prompt
scales and shifts the upsamplings with at rank 1, which reaches every scale and shift, as an adapter has one prompt.
`--mode full` trains all of the base's weights and `--mode scratch` a new network, in the same loop.

Two searches choose otherwise, by short trainings (probes). `--layers search` adapts each layer group alone, at rank 1,
ranks them by the fall of the held-out error per trained weight, and takes them in that order: a group is crucial if adding
it to those before it lowers the error by more than --rank-threshold. Later runs find its crucial.json. `--rank auto` starts
all groups at rank 1 and doubles one's rank as often as that lowers the error by more than --rank-threshold. Their held-out
photos are no test photos: they are training photos that the concept does not train on (up to 100 outside stage 2's
choice; where there are none, each fifth of the chosen, which the probes then leave out). A search that was stopped
continues, and finds the same.

Reads   runs/pairs, runs/base/generator.safetensors, runs/clusters (new concepts, chosen training photos)
Writes  runs/lora/<concept>/adapter.safetensors     kilobytes: A, B (fp16), the prompt's text features, the base's SHA-256
        (full, scratch: generator.safetensors)      state.safetensors, log.jsonl, curve.png, samples/*.png, result.json
        runs/lora/crucial.json, layer-search/       what --layers search found; its bar chart, table and probes

    python 04_lora_finetune.py --demo
    python 04_lora_finetune.py --concept cartoon        (default: every new concept of stage 2)
    python 04_lora_finetune.py --layers search --rank auto
    torchrun --nproc_per_node=8 04_lora_finetune.py --concept cartoon --batch 128
"""

import copy
import functools
import json
import math
import time
from pathlib import Path
from typing import Sequence

import torch
from tqdm import tqdm

import common

PAPER = dict(
    pairs=Path("runs/pairs"),
    clusters=Path("runs/clusters"),
    base=Path("runs/base/generator.safetensors"),
    concept=[],
    samples="clusters",
    out=Path("runs/lora"),
    mode="lora",
    layers="crucial",
    rank="paper",
    alpha=16.0,  # rank r is scaled by alpha / r
    rank_threshold=0.01,
    probe_steps=500,
    epochs=200,
    steps=0,
    batch=16,
    lr={"lora": 1e-3, "full": 2e-4, "scratch": 2e-4},
    lr_d=2e-4,
    l1=100.0,
    precision="auto",
    cache_gb=8.0,
    fid="auto",
    save_every=1000,
)
DEMO = dict(
    pairs=Path("runs/demo/pairs"),
    clusters=Path("runs/demo/clusters"),
    base=Path("runs/demo/base/generator.safetensors"),
    out=Path("runs/demo/lora"),
    epochs=34,
    fid="off",
    save_every=50,
    rank="4",
    probe_steps=40,
    lr={"lora": 3e-3, "full": 1e-3, "scratch": 1e-3},  # short runs want long steps
)
# The paper's crucial layers are the samplings and the transformer block. The two ends, which alone see how bright the photo is,
# and film1 and film2, through which the prompt acts, are ours: without them (--layers down1,down2,tb,up1,up2) a new concept is
# hardly learned; README has the numbers.
CRUCIAL = ("stem", "down1", "down2", "tb", "up1", "up2", "film1", "film2", "out")
RANK_LIMIT = 16  # no search goes beyond it
VALIDATION = 100  # photos that probes are judged on, at most
PAPER_RANKS = {
    "stem": 4,
    "down1": 1,
    "down2": 4,
    "tb": 1,
    "up1": 8,
    "up2": 8,
    "film1": 1,
    "film2": 1,
    "out": 3,
}
LOG_EVERY = 50


def chosen_concepts(args) -> list[str]:
    """--concept, or the new concepts that stage 2 found."""
    if args.concept:
        return list(dict.fromkeys(args.concept))
    new = common.read_json(args.clusters / "concepts.json", maker="02_cluster.py").get("new")
    if not isinstance(new, list) or not new or not all(isinstance(name, str) for name in new):
        raise common.UserError(
            f"{args.clusters / 'concepts.json'} lists no new concepts; name one with --concept"
        )
    return new


def chosen_samples(args, concept: str) -> list[str] | None:
    """The training photos to use, None for all: stage 2's choice unless --samples says otherwise."""
    if args.samples == "all":
        return None
    if args.samples.startswith("random:"):
        all_names, count = (
            common.edit_names(args.pairs, "train", concept),
            args.samples.removeprefix("random:"),
        )
        if not count.isdecimal() or not 0 < int(count) <= len(all_names):
            raise common.UserError(
                f"--samples {args.samples}: give a number from 1 to {len(all_names)}, as many as {concept} has"
            )
        order = torch.randperm(len(all_names), generator=torch.Generator().manual_seed(args.seed))
        return sorted(all_names[i] for i in order[: int(count)])
    path = (
        args.clusters / "samples" / f"{concept}.txt"
        if args.samples == "clusters"
        else Path(args.samples)
    )
    if args.samples == "clusters" and not path.exists():
        print(f"stage 2 chose no photos for {concept} ({path} does not exist): using all of them")
        return None
    if not path.is_file():
        raise common.UserError(
            f"--samples {path} does not exist; it should list file names, one a line"
        )
    try:
        names = [name for name in path.read_text(encoding="utf-8").split("\n") if name.strip()]
    except UnicodeDecodeError as error:
        raise common.UserError(f"--samples {path} is no text: {error}")
    if not names:
        raise common.UserError(f"--samples {path} lists no photos")
    return names


def data_of(args, train: common.Pairs) -> str:
    """What settings say of the data. Random photos follow from the seed and all photos, so runs of several seeds are alike."""
    if args.samples.startswith("random:"):
        train = common.find_pairs(args.pairs, "train", [train.concepts[0]["name"]])
    return train.fingerprint


def validation_split(args, concept: str) -> tuple[list[str], list[str]]:
    """(photos that probes train on, photos that judge them), as the docstring says."""
    all_names = common.edit_names(args.pairs, "train", concept)
    chosen = chosen_samples(args, concept) or all_names
    outside = sorted(set(all_names) - set(chosen))
    if outside:
        return chosen, outside[:: math.ceil(len(outside) / VALIDATION)]
    if len(chosen) < 2:
        raise common.UserError(f"{concept} has one photo: a search needs others to judge by")
    return sorted(set(chosen) - set(chosen[::5])), chosen[::5]


# ---------------------------------------------------------------------------------------------------------------------
# Which layers, which ranks


def group_sizes(generator: common.Generator) -> dict[str, dict[str, tuple[int, int]]]:
    """{layer group: {layer: its weight as a matrix, (out, in * k * k)}}, in the generator's order."""
    groups: dict[str, dict] = {}
    for name, module in common.named_layers(generator):
        out = module.bias.numel()
        groups.setdefault(common.layer_group(name), {})[name] = out, module.weight.numel() // out
    return groups


def layer_ranks(groups: dict, ranks: dict[str, int]) -> dict[str, int]:
    """Ranks by group as ranks by layer, none above that of the layer's weight."""
    return {
        name: min(rank, *shape)
        for group, rank in ranks.items()
        for name, shape in groups[group].items()
    }


def lora_weights(groups: dict, ranks: dict[str, int]) -> int:
    """How many numbers adapters of these ranks (by group) hold."""
    shapes = {name: shape for layers in groups.values() for name, shape in layers.items()}
    return sum(rank * sum(shapes[name]) for name, rank in layer_ranks(groups, ranks).items())


def chosen_groups(args, groups: dict, base_sha256: str) -> list[str]:
    """--layers as layer groups. `crucial` and `search`: those of crucial.json, else the built-in choice."""
    if args.layers not in ("crucial", "search"):
        wanted = list(groups) if args.layers == "all" else args.layers.split(",")
        unknown = [group for group in wanted if group not in groups]
        if unknown:
            raise common.UserError(
                f"--layers: no layer group {unknown[0]!r}; this generator has {', '.join(groups)}"
            )
        return wanted
    path = args.out / "crucial.json"
    if not path.exists():
        return [group for group in CRUCIAL if group in groups] or list(groups)
    found = common.read_json(path)
    if (
        not isinstance(found.get("groups"), list)
        or not found["groups"]
        or any(g not in list(groups) for g in found["groups"])
    ):
        raise common.UserError(
            f"{path} names no layer groups of this generator, which has {', '.join(groups)}; delete it"
        )
    print(
        f"crucial layers from {path}: {', '.join(found['groups'])}"
        + (" (found on another base)" if found.get("base") != base_sha256 else "")
    )
    return found["groups"]


def quality(generator: common.Generator, pairs: common.Pairs, judge: str) -> float:
    """What the searches make small on held-out photos: `FID`, or the mean absolute error `L1 (0-255)` to the teacher's edits."""
    return common.evaluate(generator, pairs, judge == "FID")[0][judge]


class Probes:
    """Short trainings on some concepts that tell what ranks are worth; those done are remembered in probes.json."""

    def __init__(
        self, args, concepts: Sequence[str], file: Path, device: torch.device, rank: int, world: int
    ):
        self.args, self.file, self.place = copy.copy(args), file, (device, rank, world)
        self.args.steps = args.probe_steps
        self.judge = "FID" if args.fid == "auto" and common.inception(device) else "L1 (0-255)"
        self.done = common.read_json(file) if file.exists() else {}
        if not all(isinstance(error, float) and error > 0 for error in self.done.values()):
            raise common.UserError(f"{file} is broken: delete it")
        self.data = {
            name: [
                common.find_pairs(args.pairs, "train", [name], names)
                for names in validation_split(args, name)
            ]
            for name in concepts
        }
        for train, held_out in self.data.values():
            train.hold(args.cache_gb / len(concepts), file.parent, device, rank, world)
            if rank == 0:  # which alone judges
                held_out.hold(args.cache_gb / len(concepts), file.parent, torch.device("cpu"))

    def error(self, ranks: dict[str, int]) -> float:
        """Held-out error after a probe with these ranks by group, relative to the base's, averaged over the concepts."""
        return sum(self.one(name, ranks) / self.one(name, {}) for name in self.data) / len(
            self.data
        )

    def one(self, name: str, ranks: dict[str, int]) -> float:
        device, rank, world = self.place
        key = json.dumps([name, sorted(ranks.items()), self.judge])
        if key not in self.done:
            train, held_out = self.data[name]
            generator = prepare(self.args, train.concepts[0], ranks, device)
            try:
                if ranks:
                    finetune(generator, train, None, self.args, None, device, rank, world)
                error = torch.tensor(
                    [quality(generator, held_out, self.judge) * world if rank == 0 else 0.0],
                    device=device,
                )
            except (
                common.Collapse
            ):  # these ranks do not train at this rate: the worst that can be said
                error = torch.tensor([math.inf], device=device)
            common.average(error, world)  # all processes must go the same way
            self.done[key] = error.item()
            if rank == 0:
                common.write_json(self.file, self.done)
        return self.done[key]


def search_layers(
    args, concepts: Sequence[str], groups: dict, base_sha256: str, device, rank: int, world: int
) -> None:
    """Writes crucial.json, by the rule in the docstring, and layer-search/ with the chart and the table."""
    began, out = time.time(), args.out / "layer-search"
    data = [
        data_of(args, common.find_pairs(args.pairs, "train", [name], chosen_samples(args, name)))
        for name in concepts
    ]
    settings = common.settings_of(
        args,
        "04_lora_finetune",
        rank=1,
        steps=args.probe_steps,
        epochs=0,
        concept=concepts,
        data=data,
        base_sha256=base_sha256,
    )
    if common.begin_run(out, settings, args.overwrite):
        [rows] = common.read_json(out / "result.json")["tables"].values()
        if rank == 0:
            write_crucial(args, concepts, groups, base_sha256, rows)
        return meet(world)
    probes = Probes(args, concepts, out / "probes.json", device, rank, world)
    rows = []
    for group in groups:
        error, weights = probes.error({group: 1}), lora_weights(groups, {group: 1})
        rows.append(
            {
                "layers": group,
                "trained weights": weights,
                "error alone %": 100 * error,
                "gain % per 1000 weights": 100 * (1 - error) / weights * 1000,
            }
        )
    rows.sort(key=lambda row: -row["gain % per 1000 weights"])
    crucial, best = [], 1.0
    for row in rows:
        error = probes.error(dict.fromkeys([*crucial, row["layers"]], 1))
        row["error with those before %"] = 100 * error
        if error < (1 - args.rank_threshold) * best:
            crucial, best = [*crucial, row["layers"]], error
        row["crucial"] = "yes" if row["layers"] in crucial else "no"
    if not crucial:
        raise common.UserError(
            f"no layer group lowers the held-out error by more than {args.rank_threshold}: "
            f"give more --probe-steps than {args.probe_steps}, or a lower --rank-threshold"
        )
    if rank == 0:
        bar_chart(out / "gain.png", rows)
        write_crucial(args, concepts, groups, base_sha256, rows)
        common.write_result(
            out,
            "04_lora_finetune",
            began,
            common.marks_of(args, args.pairs, args.base.parent),
            {"Crucial layers, held-out error relative to the base's": rows},
            error=probes.judge,
        )
    meet(world)


def meet(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()  # the others read crucial.json next


def write_crucial(
    args, concepts: Sequence[str], groups: dict, base_sha256: str, rows: list[dict]
) -> None:
    """crucial.json, under the lock of its folder, which no run has: what lies half written there, a killed process left."""
    common.lock_folder(args.out)
    for path in args.out.glob(".*.part"):
        path.unlink()
    found = [row["layers"] for row in rows if row["crucial"] == "yes"]
    common.write_json(
        args.out / "crucial.json",
        {
            "base": base_sha256,
            "concepts": list(concepts),
            "groups": [group for group in groups if group in found],
        },
    )


def bar_chart(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        [row["layers"] for row in rows],
        [row["gain % per 1000 weights"] for row in rows],
        color=["tab:blue" if row["crucial"] == "yes" else "lightgrey" for row in rows],
    )
    axes.set_ylabel("fall of held-out error,\n% per 1000 weights")
    axes.set_title("one layer group adapted at a time (blue: crucial)")
    common.replace_file(path, lambda aside: figure.savefig(aside, format="png", dpi=120))


def search_ranks(
    probes: Probes, groups: dict, chosen: Sequence[str], threshold: float
) -> tuple[dict[str, int], list[dict], dict]:
    """Ranks by group, the search's path as rows, and its cost beside that of all combinations."""
    ranks, active = dict.fromkeys(chosen, 1), list(chosen)
    best = probes.error(ranks)
    path = [{"probe": 1, "group": "all", "rank": 1, "error %": 100 * best, "kept": "yes"}]
    while active:
        for group in list(active):
            tried = {**ranks, group: 2 * ranks[group]}
            if tried[group] > RANK_LIMIT or layer_ranks(groups, tried) == layer_ranks(
                groups, ranks
            ):
                active.remove(group)
                continue
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
                active.remove(group)
    steps = [2**i for i in range(RANK_LIMIT.bit_length())]  # 1, 2, 4, ... RANK_LIMIT
    each = [
        len({tuple(layer_ranks(groups, {group: rank}).values()) for rank in steps})
        for group in chosen
    ]
    cost = {
        "error": probes.judge,
        "ranks": " ".join(f"{group}:{rank}" for group, rank in ranks.items()),
        "probes": len(path),
        "steps a probe": probes.args.steps,
        "all combinations": math.prod(each),
        "weights at these ranks": lora_weights(groups, ranks),
        "weights at the highest": lora_weights(groups, dict.fromkeys(chosen, RANK_LIMIT)),
    }
    return ranks, path, cost


# ---------------------------------------------------------------------------------------------------------------------
# Training


@functools.cache
def text_features(clip: str, prompt: str, device: torch.device) -> torch.Tensor:
    return common.Clip(clip, device).tokens(prompt)


def prepare(args, concept: dict, ranks: dict[str, int], device: torch.device) -> common.Generator:
    """The network to train, with the new concept's prompt, in its mode's state; ranks by layer group (lora only)."""
    torch.manual_seed(args.seed)
    generator = common.load_generator(args.base, device)
    if args.mode == "scratch":
        fresh = common.build_network(generator.config)
        for name, value in generator.named_buffers():
            fresh.get_buffer(name).copy_(value)
        fresh.sha256, generator = generator.sha256, fresh.to(device)
    config = generator.config
    tokens = text_features(config["clip"], concept["prompt"], device) if "clip" in config else None
    common.add_concept(generator, concept["name"], concept["prompt"], tokens)
    if args.mode == "lora":
        common.add_lora(generator, layer_ranks(group_sizes(generator), ranks), args.alpha)
    else:
        generator.requires_grad_(True)
    return generator


def finetune(
    generator,
    train: common.Pairs,
    test: common.Pairs | None,
    args,
    out: Path | None,
    device,
    rank: int,
    world: int,
) -> dict:
    """The loop, and the files it writes (a probe has no `out`: none). Returns its pace as columns of the table."""
    concept_index = generator.concept(train.concepts[0]["name"])
    discriminator = common.new_discriminator(
        generator, text=False
    )  # one concept: it needs no prompt
    opt_g = common.adam([p for p in generator.parameters() if p.requires_grad], args.lr)
    opt_d = common.adam(discriminator.parameters(), args.lr_d)
    steps = args.steps or args.epochs * common.steps_per_epoch(train.counts, args.batch)
    losses: list[torch.Tensor] = []  # G, D and L1 of each step since the log's last row
    state = dict(g=generator, d=discriminator, opt_g=opt_g, opt_d=opt_d, losses=losses)
    start = common.load_state(out / "state.safetensors", **state) if out else 0
    log = common.read_log(out / "log.jsonl", start) if out else []
    # the discriminator's own step goes through DDP; the generator's step passes through its plain weights
    ddp_g, ddp_d = (
        common.data_parallel(network, device, world) for network in (generator, discriminator)
    )
    began, done = time.time(), start

    def save_state() -> None:
        if out:
            common.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            common.save_state(out / "state.safetensors", done, **state)

    bar = tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        unit="step",
        desc=train.concepts[0]["name"],
        disable=rank > 0,
    )
    generator.train()
    batches = zip(
        bar, train.batches(args.batch, range(start, steps), args.seed, rank, world, device)
    )
    for step, (photo, edit, concept) in common.until_stopped(batches, save_state, world):
        common.set_lr(opt_g, args.lr, step, steps)
        common.set_lr(opt_d, args.lr_d, step, steps)
        torch.manual_seed(
            (args.seed * 1_000_003 + step) * world + rank
        )  # for dropout: no generator state to save
        concept = concept + concept_index  # its place among the generator's concepts

        with common.autocast(device, args.precision):
            fake = ddp_g(photo, concept)
            score_real, score_fake = (
                ddp_d(photo.repeat(2, 1, 1, 1), torch.cat([edit, fake.detach()])).float().chunk(2)
            )
        loss_d = ((score_real - 1).square().mean() + score_fake.square().mean()) / 2
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        discriminator.requires_grad_(False)
        with common.autocast(device, args.precision):
            score = discriminator(photo, fake).float()
        l1 = (fake.float() - edit).abs().mean()
        loss_g = (score - 1).square().mean() + args.l1 * l1
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        discriminator.requires_grad_(True)

        losses.append(torch.stack([loss_g, loss_d, l1]).detach())
        done = step + 1
        save = done % args.save_every == 0 or done == steps
        if save or done % LOG_EVERY == 0:
            log.append(
                common.check_health(
                    losses, fake, edit, score_real, generator, done, out or args.out, world
                )
            )
            bar.set_postfix({key: f"{log[-1][key]:.4g}" for key in ("G", "D", "L1")})
            losses.clear()
        if save and out and rank == 0:
            common.write_png(
                out / "samples" / f"{done:07d}.png",
                common.progress_picture(generator, test, per_concept=6),
            )
            common.write_curve(out / "curve.png", log)
            save_state()
            generator.train()
    seconds = time.time() - began
    return {
        "steps": steps,
        "batch": args.batch,
        "training s": None if start else seconds,  # a resumed run knows only its part
        "images/s": (steps - start) * args.batch / seconds if steps > start else None,
    }


def save(args, generator: common.Generator, concept: dict, out: Path) -> Path:
    """The stage's product: an adapter, or a generator that knows this concept only."""
    if args.mode == "lora":
        common.save_adapter(
            out / "adapter.safetensors", generator, concept["name"], generator.sha256, args.alpha
        )
        return out / "adapter.safetensors"
    common.keep_concept(generator, concept["name"])
    common.save_network(out / "generator.safetensors", generator)
    return out / "generator.safetensors"


def learn(
    args,
    name: str,
    groups: dict,
    chosen: Sequence[str],
    device: torch.device,
    rank: int,
    world: int,
) -> None:
    """One concept, from its pairs to its result.json in <out>/<concept>."""
    began, out = time.time(), args.out / name
    train = common.find_pairs(args.pairs, "train", [name], chosen_samples(args, name))
    test = common.find_pairs(args.pairs, "test", [name])
    ranks = {
        group: PAPER_RANKS.get(group, 1)
        if args.rank == "paper"
        else 1
        if args.rank == "auto"
        else int(args.rank)
        for group in chosen
    }
    generator = prepare(args, train.concepts[0], ranks, device)
    unused = dict(epochs=0) if args.steps else {}
    unused |= {} if args.rank == "auto" else dict(probe_steps=0, rank_threshold=0)
    unused |= {} if args.mode == "lora" else dict(rank="", alpha=0)
    settings = common.settings_of(
        args,
        "04_lora_finetune",
        layers=",".join(chosen),
        concept=name,
        base_sha256=generator.sha256,
        data=[data_of(args, train), test.fingerprint],
        **unused,
    )
    if common.begin_run(out, settings, args.overwrite):
        return
    tables = {}
    if args.rank == "auto":
        ranks, path, cost = search_ranks(
            Probes(args, [name], out / "probes.json", device, rank, world),
            groups,
            chosen,
            args.rank_threshold,
        )
        tables = {
            "Rank search, held-out error relative to the base's": [
                {"concept": name, **row} for row in path
            ],
            "Rank search, found": [{"concept": name, **cost}],
        }
        generator = prepare(args, train.concepts[0], ranks, device)
    if rank == 0:  # which alone evaluates
        test.hold(args.cache_gb, out, torch.device("cpu"))
        before = common.evaluate(generator, test)[0]
    trained = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    whole = sum(
        fan_out * (fan_in + 1) for layers in groups.values() for fan_out, fan_in in layers.values()
    )  # with biases
    train.hold(args.cache_gb, out, device, rank, world)
    pace = finetune(generator, train, test, args, out, device, rank, world)
    if rank == 0:
        file = save(args, generator, train.concepts[0], out)
        after = common.evaluate(generator, test, args.fid == "auto")[0]
        row = {
            "concept": name,
            "mode": args.mode,
            "rank": args.rank if args.mode == "lora" else None,
            **after,
            "before dB": before["PSNR dB"],
            "trained weights": trained,
            "trained %": 100 * trained / whole,
            "file KB": file.stat().st_size / 1000,
            "samples": args.samples,
            "photos": len(train.names),
            **pace,
        }
        marks = common.marks_of(
            args, args.pairs, args.base.parent, clip=generator.config.get("clip", "")
        )
        common.write_result(
            out,
            "04_lora_finetune",
            began,
            marks,
            {"New concepts, held-out photos": [row], **tables},
        )


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote")
    parser.add_argument(
        "--clusters",
        type=Path,
        help="folder that stage 2 wrote; names the new concepts and the photos",
    )
    parser.add_argument(
        "--base", type=Path, help="the trained base of stage 3, or the pruned one of stage 5"
    )
    parser.add_argument(
        "--concept", action="append", help="a concept of --pairs to learn; can be repeated"
    )
    parser.add_argument(
        "--samples",
        help="`clusters` (stage 2's choice), `all`, `random:N` (N photos drawn by --seed), or a file "
        "of photo names, one a line",
    )
    parser.add_argument(
        "--mode",
        choices=["lora", "full", "scratch"],
        help="train an adapter, the whole base, or a new network",
    )
    parser.add_argument(
        "--layers",
        help="`crucial`, `search` (finds what is crucial first), `all`, or layer groups such as "
        "down1,tb,up2 (lora only)",
    )
    parser.add_argument(
        "--rank", help="`paper`, `auto` (searches them), or one number for every layer (lora only)"
    )
    parser.add_argument(
        "--rank-threshold",
        type=float,
        help="the searches go on where the held-out error falls by more than this share",
    )
    parser.add_argument(
        "--probe-steps", type=int, help="training steps of each of the searches' probes"
    )
    parser.add_argument(
        "--alpha", type=float, help="LoRA's alpha: the update is scaled by alpha / rank (lora only)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes over the photos; the learning rates fall to 0 in the second half",
    )
    parser.add_argument(
        "--steps", type=int, help="train for this many steps instead, whatever the number of photos"
    )
    parser.add_argument("--batch", type=int, help="pairs a step, all processes together")
    parser.add_argument(
        "--lr", type=float, help="the generator's or the adapter's learning rate, by mode"
    )
    parser.add_argument("--lr-d", type=float, help="the discriminator's learning rate")
    parser.add_argument("--l1", type=float, help="weight of the L1 loss")
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
    args.lr = args.lr[args.mode] if isinstance(args.lr, dict) else args.lr
    device = common.pick_device(args.device)
    rank, world = common.start_processes(device)
    if args.rank not in ("paper", "auto") and not (args.rank.isdecimal() and int(args.rank) > 0):
        raise common.UserError(f"--rank {args.rank}: give a number from 1 on, `paper` or `auto`")
    if args.mode != "lora" and (args.rank == "auto" or args.layers == "search"):
        raise common.UserError(
            f"--mode {args.mode} trains all weights: --rank auto and --layers search are for --mode lora"
        )
    if args.steps < 0:
        raise common.UserError(
            f"--steps {args.steps}: give a number of steps, or 0 to go by --epochs"
        )
    concepts, base = chosen_concepts(args), common.load_generator(args.base)
    groups = group_sizes(base)
    if args.layers == "search":
        search_layers(args, concepts, groups, base.sha256, device, rank, world)
    chosen = chosen_groups(args, groups, base.sha256) if args.mode == "lora" else []
    for name in concepts:
        learn(args, name, groups, chosen, device, rank, world)


if __name__ == "__main__":
    common.run(main)
