"""Trains the base generator: one small text-conditioned GAN that learns several edits at once.

E2GAN (arXiv 2401.06127), section 3. The generator sees a photo and the CLIP features of a prompt, the PatchGAN
discriminator photo, edit and prompt. Least-squares GAN + 100 * L1, Adam and pix2pix's schedule, on stage 1's pairs. Every
step is a function of (seed, step) alone, so a run that was killed continues and ends in the same bytes as one that was not.

Reads   runs/pairs (stage 1), runs/clusters/concepts.json (stage 2; or --concept)
Writes  runs/base/generator.safetensors     the last model, with the prompts' text features: using it needs no CLIP
        runs/base/best.safetensors          the one with the highest mean PSNR on the held-out photos
        runs/base/state.safetensors         to continue      log.jsonl, curve.png, samples/*.png, result.json

    python 03_train_base.py --demo
    python 03_train_base.py --pairs runs/pairs --clusters runs/clusters
    torchrun --nproc_per_node=8 03_train_base.py --batch 128        (the batch of all processes together)
"""

import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common

PAPER = dict(
    pairs=Path("runs/pairs"),
    clusters=Path("runs/clusters"),
    concept=[],
    out=Path("runs/base"),
    arch="e2gan",
    width=64,
    epochs=200,  # pix2pix's 100 constant + 100 decaying
    batch=16,
    lr=2e-4,
    lr_d=2e-4,
    l1=100.0,
    clip="ViT-B-32:openai",
    precision="auto",
    cache_gb=8.0,
    fid="auto",
    save_every=1000,
    eval_every=5,
)
LOG_EVERY = 50
MEASURES = "PSNR dB", "L1 (0-255)", "FID"  # on the held-out photos, while it trains
DEMO = dict(
    pairs=Path("runs/demo/pairs"),
    clusters=Path("runs/demo/clusters"),
    out=Path("runs/demo/base"),
    width=32,
    epochs=12,
    clip="ViT-S-32:random",
    fid="off",
    save_every=216,
    eval_every=6,
    lr=1e-3,  # short runs want five times the paper's rate: 1.9 dB more after 270 steps
)


def chosen_concepts(args) -> list[str]:
    """--concept, or the base concepts that stage 2 chose."""
    if args.concept:
        return list(dict.fromkeys(args.concept))
    path = args.clusters / "concepts.json"
    base = common.read_json(path, maker="02_cluster.py").get("base")
    if not isinstance(base, list) or not base or not all(isinstance(name, str) for name in base):
        raise common.UserError(
            f"{path} lists no base concepts; run 02_cluster.py, or name them with --concept"
        )
    return base


def train_base(
    generator,
    discriminator,
    train: common.Pairs,
    test: common.Pairs,
    args,
    device,
    rank: int,
    world: int,
) -> tuple[dict, list[dict]]:
    """The loop. Returns its pace as columns of the table, and the last evaluation's rows (none if there was no step left)."""
    opt_g = common.adam(generator.parameters(), args.lr)
    opt_d = common.adam(discriminator.parameters(), args.lr_d)
    per_epoch = common.steps_per_epoch(train.counts, args.batch)
    steps = args.epochs * per_epoch
    losses: list[torch.Tensor] = []  # G, D and L1 of each step since the log's last row
    state = dict(g=generator, d=discriminator, opt_g=opt_g, opt_d=opt_d, losses=losses)
    start = common.load_state(args.out / "state.safetensors", **state)
    log = common.read_log(args.out / "log.jsonl", start)
    if args.compile:
        generator.compile()
        discriminator.compile()
    # the discriminator's own step goes through DDP; the generator's step passes through its plain weights
    ddp_g, ddp_d = (
        common.data_parallel(network, device, world) for network in (generator, discriminator)
    )
    rows, aside, began, done = [], 0.0, time.time(), start

    def save_state() -> None:
        common.write_text(args.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        common.save_state(args.out / "state.safetensors", done, **state)

    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", disable=rank > 0)
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
        text = common.text_of(generator, concept)

        with common.autocast(device, args.precision):
            fake = ddp_g(photo, concept)
            twice = (
                photo.repeat(2, 1, 1, 1),
                torch.cat([edit, fake.detach()]),
                None if text is None else text.repeat(2, 1),
            )
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
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        discriminator.requires_grad_(True)

        losses.append(torch.stack([loss_g, loss_d, l1]).detach())
        done = step + 1
        judge = done == steps or done % (args.eval_every * per_epoch) == 0
        save = judge or done % args.save_every == 0
        if save or done % LOG_EVERY == 0:
            log.append(
                common.check_health(
                    losses, fake, edit, score_real, generator, done, args.out, world
                )
            )
            bar.set_postfix({key: f"{log[-1][key]:.4g}" for key in ("G", "D", "L1")})
            losses.clear()
        if save and rank == 0:
            paused = time.time()
            if judge:
                rows = common.evaluate(generator, test, args.fid == "auto")
                log.append(
                    {
                        "step": done,
                        **{
                            key: {row["concept"]: row[key] for row in rows}
                            for key in MEASURES
                            if key in rows[0]
                        },
                    }
                )
                if best_so_far(log):
                    common.save_network(args.out / "best.safetensors", generator)
                common.write_png(
                    args.out / "samples" / f"{done:07d}.png",
                    common.progress_picture(generator, test),
                )
            common.save_network(args.out / "generator.safetensors", generator)
            common.write_curve(args.out / "curve.png", log)
            save_state()
            generator.train()
            aside += time.time() - paused
    seconds = time.time() - began - aside
    return {
        "steps": steps,
        "batch": args.batch,
        "training s": None if start else seconds,  # a resumed run knows only its part
        "images/s": (steps - start) * args.batch / seconds if steps > start else None,
    }, rows


def best_so_far(log: list[dict]) -> bool:
    """Whether the last evaluation's mean PSNR is the highest of all."""
    means = [statistics.mean(entry["PSNR dB"].values()) for entry in log if "PSNR dB" in entry]
    return means[-1] == max(means)


def add_wrong_prompts(rows: list[dict], generator, test: common.Pairs) -> None:
    """Adds to the rows of common.evaluate the highest PSNR that another concept's prompt reaches: the prompt matters where
    this is lower."""
    for c, row in enumerate(rows if len(rows) > 1 and "text_dim" in generator.config else []):
        others = [
            generator.concept(concept["name"])
            for concept in test.concepts
            if concept["name"] != row["concept"]
        ]
        found = [
            torch.stack(
                [
                    common.psnr(
                        common.to_float(common.run_generator(generator, photos, other)),
                        common.to_float(truth),
                    )
                    for other in others
                ]
            )
            for photos, truth in test.parts(c)
        ]  # (others, 32)
        row["best wrong prompt dB"] = torch.cat(found, 1).mean(1).max().item()


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote")
    parser.add_argument(
        "--clusters", type=Path, help="folder that stage 2 wrote; names the base concepts"
    )
    parser.add_argument(
        "--concept", action="append", help="train on this concept instead; can be repeated"
    )
    parser.add_argument(
        "--arch",
        choices=list(common.ARCHITECTURES),
        help="e2gan takes prompts; the others learn one concept",
    )
    parser.add_argument(
        "--blocks",
        help="the trunk's residual (rb) and transformer (tb) blocks, such as rb,rb,rb (default: "
        "rb,rb,tb,rb for e2gan, nine rb for resnet9)",
    )
    parser.add_argument("--width", type=int, help="channels of the first layer")
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes over all pairs; the learning rates fall to 0 in the second half",
    )
    parser.add_argument("--batch", type=int, help="pairs a step, all processes together")
    parser.add_argument("--lr", type=float, help="the generator's learning rate")
    parser.add_argument("--lr-d", type=float, help="the discriminator's learning rate")
    parser.add_argument("--l1", type=float, help="weight of the L1 loss")
    parser.add_argument(
        "--clip",
        help="text tower as open_clip's MODEL:WEIGHTS; WEIGHTS `random` is an offline stand-in; "
        "none: e2gan takes no prompt, like the others",
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
    parser.add_argument("--save-every", type=int, help="steps between checkpoints")
    parser.add_argument(
        "--eval-every",
        type=int,
        help="epochs between evaluations on the held-out photos, with progress pictures",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile both networks: a minute or more to start; "
        "measure whether your machine gains by it",
    )
    args = parser.parse()

    began = time.time()
    concepts = chosen_concepts(args)
    train, test = (common.find_pairs(args.pairs, split, concepts) for split in ("train", "test"))
    device = common.pick_device(args.device)
    rank, world = common.start_processes(device)
    torch.manual_seed(args.seed)
    blocks = args.blocks and tuple(args.blocks.split(","))
    generator = common.new_generator(
        args.arch, args.width, train.size, train.concepts, args.clip, device, blocks
    )
    settings = common.settings_of(args, "03_train_base", data=[train.fingerprint, test.fingerprint])
    if common.begin_run(args.out, settings, args.overwrite):
        return
    discriminator = common.new_discriminator(generator)
    train.hold(args.cache_gb, args.out, device, rank, world)
    if rank == 0:  # which alone evaluates
        test.hold(args.cache_gb, args.out, torch.device("cpu"))
    pace, rows = train_base(generator, discriminator, train, test, args, device, rank, world)
    if rank == 0:
        size = {
            "arch": " ".join(filter(None, (args.arch, args.blocks))),
            "width": args.width,
            "size px": train.size,
            "parameters M": common.count_parameters(generator) / 1e6,
            "GMACs": common.count_macs(generator, train.size) / 1e9,
            **pace,
        }
        rows = rows or common.evaluate(generator, test, args.fid == "auto")
        add_wrong_prompts(rows, generator, test)
        marks = common.marks_of(args, args.pairs, clip=generator.config.get("clip", ""))
        common.write_result(
            args.out,
            "03_train_base",
            began,
            marks,
            {"Base generator": [size], "Base concepts, held-out photos": rows},
        )


if __name__ == "__main__":
    common.run(main)
