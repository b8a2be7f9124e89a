"""Teaches a trained base a new concept with a low-rank adapter on its crucial layers.

E2GAN (arXiv 2401.06127), section 3. The base stays as it is; each adapted weight becomes W + (alpha/r) B A. The paper's
crucial layers are the down- and upsampling layers and the transformer block; its ranks 1, 4, 1, 8 (first and second
downsampling, transformer block, upsamplings). We add the first and the last layer at ranks 4 and 3. `--mode full` trains
all of the base's weights and `--mode scratch` a new network, in the same loop.

Reads   runs/pairs, runs/base/generator.safetensors, runs/clusters (new concepts, chosen training photos)
Writes  runs/lora/<concept>/adapter.safetensors     kilobytes: A, B (fp16), the prompt's text features, the base's SHA-256
        (full, scratch: generator.safetensors)      state.safetensors, log.jsonl, curve.png, samples/*.png, result.json

    python 04_lora_finetune.py --demo
    python 04_lora_finetune.py --concept cartoon        (default: every new concept of stage 2)
    torchrun --nproc_per_node=8 04_lora_finetune.py --concept cartoon --batch 128
"""
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common

PAPER = dict(
    pairs=Path("runs/pairs"), clusters=Path("runs/clusters"), base=Path("runs/base/generator.safetensors"),
    concept=[], samples="clusters", out=Path("runs/lora"),
    mode="lora", layers="crucial", rank="paper",
    alpha=16.0,                     # rank r is scaled by alpha / r
    epochs=200, batch=16, lr={"lora": 1e-3, "full": 2e-4, "scratch": 2e-4}, lr_d=2e-4, l1=100.0,
    precision="auto", cache_gb=8.0, fid="auto", save_every=1000,
)
DEMO = dict(
    pairs=Path("runs/demo/pairs"), clusters=Path("runs/demo/clusters"), base=Path("runs/demo/base/generator.safetensors"),
    out=Path("runs/demo/lora"), epochs=50, fid="off", save_every=150,
    rank="4",
    lr={"lora": 3e-3, "full": 1e-3, "scratch": 1e-3},       # short runs want long steps
)
# The paper's crucial layers are the samplings and the transformer block. The two ends are ours: they alone see how bright the
# photo is, and a tint such as sepia is learned worse without them (compare --layers down1,down2,tb,up1,up2).
CRUCIAL = ("stem", "down1", "down2", "tb", "up1", "up2", "out")
PAPER_RANKS = {"stem": 4, "down1": 1, "down2": 4, "tb": 1, "up1": 8, "up2": 8, "out": 3}
LOG_EVERY = 50


def chosen_concepts(args) -> list[str]:
    """--concept, or the new concepts that stage 2 found."""
    if args.concept:
        return args.concept
    new = common.read_json(args.clusters / "concepts.json").get("new")
    if not isinstance(new, list) or not new:
        raise common.UserError(f"{args.clusters / 'concepts.json'} lists no new concepts; name one with --concept")
    return new


def chosen_samples(args, concept: str) -> list[str] | None:
    """The training photos to use, None for all: stage 2's choice unless --samples names a file or says `all`."""
    if args.samples == "all":
        return None
    path = args.clusters / "samples" / f"{concept}.txt" if args.samples == "clusters" else Path(args.samples)
    if args.samples == "clusters" and not path.exists():
        print(f"stage 2 chose no photos for {concept} ({path} does not exist): using all of them")
        return None
    if not path.is_file():
        raise common.UserError(f"--samples {path} does not exist; it should list file names, one a line")
    names = path.read_text(encoding="utf-8").split("\n")
    return [name for name in names if name.strip()]


def chosen_ranks(generator: common.Generator, layers: str, rank: str) -> dict[str, int]:
    """--layers and --rank as {layer name: rank}."""
    modules = dict(common.named_layers(generator))
    groups = list(dict.fromkeys(map(common.layer_group, modules)))
    wanted = {"crucial": [g for g in CRUCIAL if g in groups], "all": groups}.get(layers) or layers.split(",")
    unknown = [g for g in wanted if g not in groups]
    if unknown:
        raise common.UserError(f"--layers: no layer group {unknown[0]!r}; this generator has {', '.join(groups)}")
    if rank != "paper" and not (rank.isdigit() and int(rank) > 0):
        raise common.UserError(f"--rank {rank}: give a number from 1 on, or `paper`")
    ranks = {g: PAPER_RANKS.get(g, 1) if rank == "paper" else int(rank) for g in wanted}
    # no rank above that of the weight as out x in*k*k
    highest = {name: min(m.bias.numel(), m.weight.numel() // m.bias.numel()) for name, m in modules.items()}
    return {name: min(ranks[common.layer_group(name)], highest[name]) for name in modules if common.layer_group(name) in ranks}


def prepare(args, concept: dict, device: torch.device) -> common.Generator:
    """The network to train, with the new concept's prompt, in its mode's state."""
    torch.manual_seed(args.seed)
    generator = common.load_generator(args.base, device)
    ranks = chosen_ranks(generator, args.layers, args.rank)
    if args.mode == "scratch":
        fresh = common.build_generator(generator.config)
        for name, value in generator.named_buffers():
            fresh.get_buffer(name).copy_(value)
        fresh.sha256, generator = generator.sha256, fresh.to(device)
    tokens = common.Clip(generator.config["clip"], device).tokens(concept["prompt"]) if "clip" in generator.config else None
    common.add_concept(generator, concept["name"], concept["prompt"], tokens)
    if args.mode == "lora":
        common.add_lora(generator, ranks, args.alpha)
    else:
        generator.requires_grad_(True)
    return generator


def finetune(generator, train: common.Pairs, test: common.Pairs, args, out: Path, device, rank: int, world: int) -> dict:
    """The loop, and the files it writes. Returns its pace as columns of the table."""
    concept_index = generator.concept(train.concepts[0]["name"])
    discriminator = common.Discriminator(generator.config["width"]).to(device)      # one concept: it needs no prompt
    opt_g = common.adam([p for p in generator.parameters() if p.requires_grad], args.lr)
    opt_d = common.adam(discriminator.parameters(), args.lr_d)
    steps = args.epochs * common.steps_per_epoch(train.counts, args.batch)
    state = dict(g=generator, d=discriminator, opt_g=opt_g, opt_d=opt_d)
    start = common.load_state(out / "state.safetensors", **state)
    log = common.read_log(out / "log.jsonl", start)
    sums = torch.zeros(3, device=device)
    began = time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", desc=train.concepts[0]["name"], disable=rank > 0)
    generator.train()
    for step, (photo, edit, concept) in zip(bar, train.batches(args.batch, range(start, steps), args.seed, rank, world, device)):
        common.set_lr(opt_g, args.lr, step, steps)
        common.set_lr(opt_d, args.lr_d, step, steps)
        torch.manual_seed(args.seed * 1_000_003 + step)         # for dropout: no generator state to save
        concept = concept + concept_index                       # its place among the generator's concepts

        with common.autocast(device, args.precision):
            fake = generator(photo, concept)
            score_real, score_fake = discriminator(photo.repeat(2, 1, 1, 1), torch.cat([edit, fake.detach()])).float().chunk(2)
        loss_d = ((score_real - 1).square().mean() + score_fake.square().mean()) / 2
        opt_d.zero_grad()
        loss_d.backward()
        common.average_gradients(discriminator, world)
        opt_d.step()

        discriminator.requires_grad_(False)
        with common.autocast(device, args.precision):
            score = discriminator(photo, fake).float()
        l1 = (fake.float() - edit).abs().mean()
        loss_g = (score - 1).square().mean() + args.l1 * l1
        opt_g.zero_grad()
        loss_g.backward()
        common.average_gradients(generator, world)
        opt_g.step()
        discriminator.requires_grad_(True)

        sums += torch.stack([loss_g.detach(), loss_d.detach(), l1.detach()])
        save = (step + 1) % args.save_every == 0 or step + 1 == steps
        if save or (step + 1) % LOG_EVERY == 0:
            common.average([sums], world)
            means = (sums / (step + 1 - (log[-1]["step"] if log else 0))).tolist()
            log.append({"step": step + 1, **dict(zip(("G", "D", "L1"), means))})
            bar.set_postfix(G=f"{means[0]:.3f}", D=f"{means[1]:.3f}", L1=f"{means[2]:.4f}")
            sums.zero_()
        if save and rank == 0:
            common.write_png(out / "samples" / f"{step + 1:07d}.png", common.progress_picture(generator, test, per_concept=6))
            common.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            common.write_curve(out / "curve.png", log)
            common.save_state(out / "state.safetensors", step + 1, **state)
            generator.train()
    seconds = time.time() - began
    return {"steps": steps, "batch": args.batch,
            "training s": None if start else seconds,           # a resumed run knows only its part
            "images/s": (steps - start) * args.batch / seconds if steps > start else None}


def save(args, generator: common.Generator, concept: dict, out: Path) -> Path:
    """The stage's product: an adapter, or a generator that knows this concept only."""
    if args.mode == "lora":
        common.save_adapter(out / "adapter.safetensors", generator, concept["name"], generator.sha256, args.alpha)
        return out / "adapter.safetensors"
    common.keep_concept(generator, concept["name"])
    common.save_generator(out / "generator.safetensors", generator)
    return out / "generator.safetensors"


def learn(args, name: str, device: torch.device, rank: int, world: int) -> None:
    """One concept, from its pairs to its result.json in <out>/<concept>."""
    began, out = time.time(), args.out / name
    train = common.find_pairs(args.pairs, "train", [name], chosen_samples(args, name))
    test = common.load_pairs(args.pairs, "test", [name])
    generator = prepare(args, train.concepts[0], device)
    whole = sum(module.weight.numel() + module.bias.numel() for _, module in common.named_layers(generator))
    settings = common.settings_of(args, "04_lora_finetune", concept=name, data=train.fingerprint, base_sha256=generator.sha256)
    if common.begin_run(out, settings, args.overwrite):
        return
    before = common.evaluate(generator, test)[0]
    trained = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    train.hold(args.cache_gb, out, device, rank, world)
    pace = finetune(generator, train, test, args, out, device, rank, world)
    if rank == 0:
        file = save(args, generator, train.concepts[0], out)
        after = common.evaluate(generator, test, args.fid == "auto")[0]
        row = {"concept": name, "mode": args.mode, **after, "before dB": before["PSNR dB"],
               "trained weights": trained, "trained %": 100 * trained / whole,
               "file KB": file.stat().st_size / 1000, "photos": len(train.names), **pace}
        common.write_result(out, "04_lora_finetune", began, common.marks_of(args, args.pairs, args.base.parent),
                            {"New concepts, held-out photos": [row]})


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote")
    parser.add_argument("--clusters", type=Path, help="folder that stage 2 wrote; names the new concepts and the photos")
    parser.add_argument("--base", type=Path, help="the trained base of stage 3, or the pruned one of stage 5")
    parser.add_argument("--concept", action="append", help="a concept of --pairs to learn; can be repeated")
    parser.add_argument("--samples", help="`clusters` (stage 2's choice), `all`, or a file of photo names, one a line")
    parser.add_argument("--mode", choices=["lora", "full", "scratch"], help="train an adapter, the whole base, or a new network")
    parser.add_argument("--layers", help="`crucial`, `all`, or layer groups such as down1,tb,up2 (lora only)")
    parser.add_argument("--rank", help="`paper`, or one number for every layer (lora only)")
    parser.add_argument("--alpha", type=float, help="LoRA's alpha: the update is scaled by alpha / rank (lora only)")
    parser.add_argument("--epochs", type=int, help="passes over the photos; the learning rates fall to 0 in the second half")
    parser.add_argument("--batch", type=int, help="pairs a step, all processes together")
    parser.add_argument("--lr", type=float, help="the generator's or the adapter's learning rate, by mode")
    parser.add_argument("--lr-d", type=float, help="the discriminator's learning rate")
    parser.add_argument("--l1", type=float, help="weight of the L1 loss")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="auto: bf16 autocast where the hardware has it")
    parser.add_argument("--cache-gb", type=float, help="most pixels to hold on the device; more are held in a file in --out")
    parser.add_argument("--fid", choices=["auto", "off"], help="auto: FID on held-out photos if Inception's weights are in torch hub's "
                                                                "cache or can be downloaded there (96 MB)")
    parser.add_argument("--save-every", type=int, help="steps between saved states and progress pictures")
    args = parser.parse()
    args.lr = args.lr[args.mode] if isinstance(args.lr, dict) else args.lr
    device = common.pick_device(args.device)
    rank, world = common.start_processes(device)
    for name in chosen_concepts(args):
        learn(args, name, device, rank, world)


if __name__ == "__main__":
    common.run(main)
