"""Stage 3: trains the base generator, one small text-conditioned GAN that learns several edits.

E2GAN (arXiv 2401.06127, section 3). The generator sees a photo and the CLIP features of a prompt,
the PatchGAN discriminator sees photo, edit and prompt. The loss is least-squares GAN + 10 * L1 + 10
* feature matching (pix2pixHD) + 5 * a perceptual distance (LPIPS); with --fm 0 --perceptual 0 it is
the papers' GAN + 100 * L1. Adam, pix2pix's learning rate schedule, and whole pictures, which the
first steps see at half their size.

To try another loss, copy this file to 03_NAME.py, edit `train_base` and give --out runs/NAME. It
calls training.autocast (bf16 where the device has it), Loop.scaler (for fp16; else it does
nothing), training.descend (a step of an optimizer) and Loop.record (ends a step; call it once in
each). A run's folder does not remember the code: after a change of it give --overwrite.

Reads   runs/pairs                          stage 1's pairs and prompts' features
        runs/clusters/concepts.json         stage 2's base concepts (or give --concept)
Writes  runs/base/generator.safetensors     the last model, with the prompts' features
        runs/base/best.safetensors          the model with the least mean error on held-out photos
        runs/base/discriminator.safetensors what stages 4 and 5 go on with
        runs/base/state.safetensors         what a run that was stopped continues from
        runs/base/                          log.jsonl, curve.png, samples/*.png, result.json

    python 03_train_base.py --demo
    python 03_train_base.py --pairs runs/pairs --clusters runs/clusters
    python 03_train_base.py --init runs/base/generator.safetensors --epochs 50 --out runs/longer
    torchrun --nproc_per_node=8 03_train_base.py --batch 128    (of all processes together)
"""

import argparse
import math
import statistics
from pathlib import Path

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import torch

import common
import dataset
import training
from runs import UserError

# In so short a time, many steps of small batches learn strokes, and few steps of large ones do not.
DEMO = {
    "width": 16,
    "batch": 1,
    "steps": 420,
    "lr": 1e-3,
    "fid": "off",
    "save_every": 210,
    "eval_every": 100,
}


def parse() -> argparse.Namespace:
    parser = runs.Parser(__doc__, "runs/base")
    flag = parser.add_argument
    training.add_flags(parser)
    training.add_half_size_flag(parser)
    flag(
        "--clusters",
        type=Path,
        default="runs/clusters",
        help="stage 2's folder, which names the base concepts",
    )
    flag(
        "--concept",
        action="append",
        help="train on this concept, in place of those of --clusters; can be repeated",
    )
    flag(
        "--arch",
        choices=[*common.ARCHITECTURES],
        default="e2gan",
        help="the generator's architecture; only e2gan takes prompts, the others one concept",
    )
    flag("--no-text", action="store_true", help="an e2gan without prompts, for one concept")
    flag(
        "--blocks",
        help="the trunk's blocks in order, rb (residual) or tb (transformer, at most one) "
        "(default: rb,rb,tb,rb for e2gan, nine rb for resnet9)",
    )
    flag("--width", type=runs.count, default=64, help="channels of the generator's first layer")
    flag(
        "--init",
        type=Path,
        metavar="FILE",
        help="go on from this trained generator, in place of --arch, --blocks, --width and "
        "--no-text, and from the discriminator beside it, if there is one; the schedule of "
        "learning rates starts anew",
    )
    flag(
        "--epochs",
        type=runs.count,
        default=200,
        help="passes over the data, in the second half of which the learning rates fall to 0",
    )
    flag("--lr", type=runs.positive, default=2e-4, help="the generator's learning rate")
    flag(
        "--eval-every",
        type=runs.count,
        default=5,
        help="epochs between evaluations; more where these would take over a tenth of the time",
    )
    args = parser.parse(DEMO)
    if args.init and args.init.resolve().is_relative_to(args.out.resolve()):
        raise UserError(f"--init {args.init} lies in --out, which is written: choose another --out")
    return args


def new_networks(args, train, device) -> tuple[common.Generator, common.Discriminator]:
    """(an untrained generator of the concepts to train, its untrained discriminator)"""
    tokens = None
    clip = ""
    if args.arch == "e2gan" and not args.no_text:
        tokens, clip = dataset.prompt_tokens(args.pairs, train.concepts)
    blocks = args.blocks.split(",") if args.blocks else None
    generator = common.new_generator(
        args.arch, args.width, train.size, train.concepts, tokens, clip, blocks
    ).to(device)
    return generator, common.new_discriminator(generator)


def initial_networks(args, train, device) -> tuple[common.Generator, common.Discriminator]:
    """(the generator in the file --init, with the concepts to train in place of its own, the
    discriminator beside it or, if there is none, a new one)"""
    generator = common.load_generator(args.init, device)
    size = generator.config["size"]
    if size != train.size:
        differ = f"{args.init} was trained at {size} pixels, and these pairs have {train.size}"
        raise UserError(f"{differ}: make pairs of {size} in stage 1, or leave --init out")
    if generator.takes_text:
        clip = generator.config["clip"]
        tokens, _ = dataset.prompt_tokens(args.pairs, train.concepts, clip)
    elif len(train.concepts) == 1:
        tokens = [None]
    else:
        raise UserError(f"{args.init} takes no prompts: it learns one concept, give one --concept")
    generator.set_known_concepts(list(zip(train.concepts, tokens, strict=True)))
    if args.init.with_name("discriminator.safetensors").exists():
        return generator, common.base_discriminator(args.init, generator)
    if runs.rank() == 0:
        print(f"beside {args.init} is no discriminator.safetensors: a new one is trained")
    return generator, common.new_discriminator(generator)


def train_base(generator, discriminator, train, test, args) -> tuple[dict, list[dict]]:
    """Trains both networks. Returns (Loop.pace, columns of a table, training.evaluate's rows of the
    last step, or [] if all steps were done already)."""
    opt_g = training.adam(generator.parameters(), args.lr)
    opt_d = training.adam(discriminator.parameters(), args.lr_d)
    ddp_generator = training.data_parallel(training.compiled(generator, args.compile))
    ddp_discriminator = training.data_parallel(training.compiled(discriminator, args.compile))
    discriminator_features = training.compiled(discriminator.features, args.compile)
    one_pass = args.accumulate == 1  # the generator's forward pass serves both steps
    steps_per_epoch = dataset.steps_per_epoch(train.counts, args.batch)
    steps = args.steps or args.epochs * steps_per_epoch
    halved = training.half_size_steps(args.half_size, steps, args.crop or train.size)
    parts = {"g": generator, "d": discriminator, "opt_g": opt_g, "opt_d": opt_d}
    loop = training.Loop(args, train, steps, parts, args.out, half_size_steps=halved)
    rows = []

    def is_due(step: int) -> bool:
        return step == steps or step % steps_between_evaluations(train, test, args) == 0

    if loop.step and is_due(loop.step) and not is_evaluated(loop):  # the run was stopped before it
        rows = evaluate_and_save(loop, generator, test, args.out)
    generator.train()
    for batch in loop:
        training.set_lr(opt_g, args.lr, loop.step, steps)
        training.set_lr(opt_d, args.lr_d, loop.step, steps)
        micro_batches = loop.micro_batches(batch)
        fakes = []
        losses_d = []

        # The discriminator's step: real edits towards 1, the generator's towards 0.
        for photo, edit, concept in micro_batches:
            text = common.prompt_embedding(generator, concept)
            with training.autocast(photo.device, args.precision):
                with torch.set_grad_enabled(one_pass):
                    fake = ddp_generator(photo, concept)
                score_real = ddp_discriminator(photo, edit, text).float()
                score_fake = ddp_discriminator(photo, fake.detach(), text).float()
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
            text = common.prompt_embedding(generator, concept)
            with training.autocast(photo.device, args.precision):
                if not one_pass:  # activations of all micro-batches would not fit
                    fake = ddp_generator(photo, concept)
                features = discriminator_features(photo, fake, text)
                with torch.no_grad():
                    wanted = discriminator_features(photo, edit, text) if args.fm else features
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

        evaluates = is_due(loop.step + 1)
        if loop.record(training.mean_losses(losses), save=evaluates):
            common.save_network(args.out / "generator.safetensors", generator)
            common.save_network(args.out / "discriminator.safetensors", discriminator)
            loop.save()  # before the evaluation, which may be stopped
        if evaluates:
            rows = evaluate_and_save(loop, generator, test, args.out)
            generator.train()
    return loop.pace(), rows


def steps_between_evaluations(train, test, args) -> int:
    """--eval-every in steps, but so many that at least ten times as many pictures are trained on in
    between as an evaluation measures. Measuring a picture takes less than half as long as training
    on it (0.37 to 0.45 on a CPU), so evaluations take at most a tenth of the run, even where its
    first steps are at half the size."""
    steps = args.eval_every * dataset.steps_per_epoch(train.counts, args.batch)
    return max(steps, math.ceil(10 * sum(test.counts) / args.batch))


def is_evaluated(loop) -> bool:
    """Whether the log holds the measures of the present step."""
    return any("error" in row for row in loop.rows if row["step"] == loop.step)


def evaluate_and_save(loop, generator, test, out: Path) -> list[dict]:
    """Measures the generator on held-out photos, and returns training.evaluate's rows. Writes the
    log, a picture in samples/, and best.safetensors if the mean error is the least so far. All
    processes measure; the first writes. Leaves the generator in eval mode."""
    earlier_errors = [statistics.mean(row["error"].values()) for row in loop.rows if "error" in row]
    rows = training.evaluate_together(generator, test, loop=loop)
    if runs.rank() > 0:
        return rows
    errors = {row["concept"]: training.error(row) for row in rows}
    loop.log({"PSNR dB": {row["concept"]: row["PSNR dB"] for row in rows}, "error": errors})
    if statistics.mean(errors.values()) <= min(earlier_errors, default=math.inf):
        common.save_network(out / "best.safetensors", generator)
    picture = training.progress_picture(generator, test)
    runs.write_png(out / "samples" / f"{loop.step:07d}.png", picture)
    loop.save()
    return rows


def add_wrong_prompts(rows: list[dict], generator, test) -> None:
    """Adds to rows the PSNR of edits by another concept's prompt, on 32 photos. It is lower than
    that of the right prompt if the generator heeds prompts."""
    for c, row in enumerate(rows):
        photos, edits = test.pictures(c, 32)
        other = test.concepts[c - 1]["name"]
        fakes = training.run_generator(generator, photos, generator.concept_index(other))
        row["wrong prompt dB"] = training.mean_psnr(fakes, edits)


def size_row(generator, args) -> dict:
    """The generator's architecture and size, as columns of a table."""
    arch = generator.config["arch"]
    return {
        "arch": f"{arch} {args.blocks}" if args.blocks and not args.init else arch,
        "width": generator.config["width"],
        "size px": generator.config["size"],
        "parameters M": common.count_parameters(generator) / 1e6,
        "GMACs": common.count_macs(generator) / 1e9,
    }


def main() -> None:
    args = parse()
    device = training.start(args)
    concepts = dataset.chosen_concepts(args, "base")
    train = dataset.find_pairs(args.pairs, "train", concepts).cache(args.cache)
    test = dataset.find_pairs(args.pairs, "test", concepts).cache(args.cache)
    if args.init:
        generator, discriminator = initial_networks(args, train, device)
    else:
        generator, discriminator = new_networks(args, train, device)
    arch = generator.config["arch"]
    args.l1 = training.l1_weight(args)
    training.check_crop(args.crop, train.size, whole_only=arch == "unet256")
    training.check_loop(args, device)
    if arch == "unet256" or args.init:
        # at the full size a U-Net's innermost feature map is one pixel already; a trained generator
        # gains nothing from small pictures
        args.half_size = 0.0

    settings = runs.settings_of(
        args,
        init=generator.sha256 if args.init else None,
        discriminator=discriminator.sha256 or None,  # None of a new one
        data=[train.data_hash, test.data_hash],
        clip=generator.config.get("clip", ""),
    )
    if runs.begin_run(args.out, settings, args.overwrite):
        return
    training.set_threads(device, generator, args.batch, args.crop or train.size, args.out)
    pace, rows = train_base(generator, discriminator, train, test, args)
    with_fid = args.fid == "auto"
    if with_fid or not rows:
        rows = training.evaluate_together(generator, test, with_fid)
    if runs.rank() > 0:
        return
    if generator.takes_text and len(rows) > 1:
        add_wrong_prompts(rows, generator, test)
    tables = {
        "Base generator": [{**size_row(generator, args), **pace}],
        "Base concepts, held-out photos": rows,
    }
    runs.write_result(args, tables, reads=[args.pairs])


if __name__ == "__main__":
    runs.run(main)
