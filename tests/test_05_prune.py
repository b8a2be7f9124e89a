"""Stage 5's three tasks on data that takes seconds: the target is met by every network, a killed run ends in the same bytes, unpaired
training finds an edit that it never saw a pair of."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, script
from test_03_04_05_training import (
    RANKS,
    assert_same_files,
    kill_midway_and_continue,
    run_twice,
    table,
)

EDITS = {"dark": lambda x: 0.25 * x}
SMALL = [
    "--width",
    8,
    "--batch",
    4,
    "--fid",
    "off",
    "--device",
    "cpu",
    "--lr",
    "1e-3",
    "--lr-search",
    "2e-4",
    "--search-epochs",
    6,
    "--epochs",
    2,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_pairs):
    """Pairs of one edit, and the same pictures in the layouts of pix2pix, CycleGAN and DCGAN."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "pairs", EDITS, train=24, test=6)
    for split in ("train", "test"):
        pairs = common.load_pairs(root / "pairs", split, ["dark"])
        for i, (photo, edit) in enumerate(zip(pairs.photos, pairs.edits[0])):
            common.write_png(
                root / "sides" / split / f"{i}.png", common.to_pil(torch.cat([photo, edit], 2))
            )
            common.write_png(root / "unpaired" / f"{split}A" / f"{i}.png", common.to_pil(photo))
            if i < 20:  # the sets need not be equally large
                common.write_png(root / "unpaired" / f"{split}B" / f"{i}.png", common.to_pil(edit))
            common.write_png(root / "flat" / split / f"{i}.png", common.to_pil(photo))
    base = common.new_generator(
        "resnet9", 8, 64, [{"name": "dark", "prompt": "darken it"}], "none", torch.device("cpu")
    )
    common.save_network(root / "base", base)
    return root


@pytest.fixture
def prune(load_stage, monkeypatch, tmp_path):
    """prune(*flags) runs stage 5 in this process; returns its folder."""
    module = load_stage("05")

    def call(*flags):
        monkeypatch.setattr(
            sys, "argv", [str(script("05")), *map(str, [*SMALL, "--out", tmp_path / "out", *flags])]
        )
        module.main()
        return tmp_path / "out"

    call.module = module
    return call


TASKS = {
    "A|B, unet256": [
        "--task",
        "pix2pix",
        "--data",
        "sides",
        "--generator",
        "unet256",
        "--size",
        32,
    ],
    "pairs, resnet9": ["--task", "pix2pix", "--pairs", "pairs", "--generator", "resnet9"],
    "pairs, e2gan": [
        "--task",
        "pix2pix",
        "--pairs",
        "pairs",
        "--generator",
        "e2gan",
        "--clip",
        "ViT-S-32:random",
        "--width",
        16,
    ],
    "trainA trainB, resnet9": [
        "--task",
        "cyclegan",
        "--data",
        "unpaired",
        "--size",
        32,
        "--width",
        4,
        "--search-epochs",
        4,
        "--epochs",
        1,
    ],
    "pairs taken apart, e2gan without text": [
        "--task",
        "cyclegan",
        "--pairs",
        "pairs",
        "--concept",
        "dark",
        "--generator",
        "e2gan",
    ],
    "flat, dcgan": ["--task", "dcgan", "--data", "flat", "--size", 32, "--epochs", 6],
}


@pytest.mark.parametrize("flags", TASKS.values(), ids=TASKS)
def test_every_task_meets_its_target_from_below_for_all_networks(data, prune, flags):
    flags = [
        data / flag if flag in ("sides", "pairs", "unpaired", "flat") else flag for flag in flags
    ]
    out = prune(*flags, "--prune-discriminator", "--keep", "0.3")
    rows = table(out, "Pruning")
    assert len(rows) == (4 if "cyclegan" in flags else 2)
    for row in rows:
        assert 29 < row["MACs %"] <= 30, row
    for path in out.glob("generator*.safetensors"):
        kind = "dcgan generator" if "dcgan" in flags else "generator"
        network = common.load_network(path, torch.device("cpu"), kind)
        assert network.config["widths"] != network.config["full"]
    assert len(list(out.glob("generator*.safetensors"))) == (2 if "cyclegan" in flags else 1)
    path = [
        row["MACs %"]
        for row in map(json.loads, (out / "search.jsonl").read_text().splitlines())
        if "MACs %" in row
    ]
    for name in path[0]:
        assert path[0][name] > 80 and path[-1][name] <= 30
    for name, tensor in common.read_tensors(out / "search.safetensors", "state")[0].items():
        assert not name.endswith(".b0") or not tensor.any(), (
            name
        )  # starting from weights, it stays 0
    for name in ("pruning.png", "search.png", "converge.png"):
        assert common.read_image(out / name).shape[1] > 100
    [*_, measured] = table(out, "Pruned generator, held-out pictures")
    assert all(np.isfinite(value) for value in measured.values() if isinstance(value, float))


def test_unpaired_training_finds_an_edit_of_which_it_never_saw_a_pair(data, prune):
    out = prune(
        *TASKS["pairs taken apart, e2gan without text"][:2],
        "--pairs",
        data / "pairs",
        "--concept",
        "dark",
        "--generator",
        "e2gan",
        "--keep",
        "0.5",
        "--search-epochs",
        10,
        "--epochs",
        30,
    )
    there, back = table(out, "Pruned generator, held-out pictures")
    assert (
        there["PSNR dB"] > there["picture unchanged dB"] + 3
        and back["PSNR dB"] > back["picture unchanged dB"] + 1
    )


@pytest.mark.parametrize(
    "task, state", [("cyclegan", "search.safetensors"), ("dcgan", "converge.safetensors")]
)
def test_unpaired_and_unconditional_runs_killed_and_continued_end_in_the_same_bytes(
    data, stage, tmp_path, task, state
):
    folder = data / ("unpaired" if task == "cyclegan" else "flat")
    flags = [
        *SMALL,
        "--task",
        task,
        "--data",
        folder,
        "--size",
        32,
        "--keep",
        "0.5",
        "--save-every",
        4,
        "--prune-discriminator",
        "--width",
        4,
    ]
    flags += (
        ["--search-epochs", 4, "--epochs", 1]
        if task == "cyclegan"
        else ["--search-epochs", 4, "--epochs", 20, "--width", 16]
    )
    stage("05", *flags, "--out", tmp_path / "whole")
    kill_midway_and_continue(
        stage, "05", [*flags, "--out", tmp_path / "killed"], tmp_path / "killed", state
    )
    files = [
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")
    ]
    assert len(files) >= 5
    assert_same_files(
        tmp_path / "whole", tmp_path / "killed", *files, "search.jsonl", "converge.jsonl"
    )


@pytest.mark.slow
def test_two_processes_train_cyclegan_as_one(data, stage, tmp_path):
    """For two steps: small latents magnify the rounding of sums in another order, until another channel goes first."""
    flags = [
        "--task",
        "cyclegan",
        "--data",
        data / "unpaired",
        "--size",
        32,
        "--width",
        4,
        "--batch",
        8,
        "--search-epochs",
        1,
        "--epochs",
        1,
        "--keep",
        "0.5",
        "--fid",
        "off",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--save-every",
        1,
    ]
    stage("05", *flags, "--out", tmp_path / "one")
    run_twice(script("05"), *flags, "--out", tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "search.jsonl").read_text().splitlines()][
            :4
        ]
        for run in ("one", "two")
    )
    assert [row["step"] for row in one] == [1, 1, 2, 2]
    for a, b in zip(one, two):
        assert a == b if "MACs %" in a else a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_two_processes_that_train_dcgan_keep_equal_weights(data, tmp_path):
    """Not as one: each has noise of its own, and batch norm's statistics are a process's."""
    (tmp_path / "ranks.py").write_text(
        RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), number="05", networks=4)
    )
    run_twice(
        tmp_path / "ranks.py",
        *SMALL,
        "--task",
        "dcgan",
        "--data",
        data / "flat",
        "--size",
        32,
        "--keep",
        "0.5",
        "--search-epochs",
        1,
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    )
    assert (tmp_path / "out/generator.safetensors").exists()


@pytest.mark.parametrize("method", ["uniform", "random", "magnitude", "coronet --start paper"])
def test_methods_to_compare_with_meet_the_same_target(data, prune, method):
    out = prune(
        "--pairs",
        data / "pairs",
        "--generator",
        "resnet9",
        "--keep",
        "0.25",
        "--method",
        *method.split(),
    )
    [row] = table(out, "Pruning")
    assert (
        row["search steps"] + row["converge steps"] == 8 * 6
    )  # epochs, steps in one: all methods train equally long
    assert 24 < row["MACs %"] <= 25 and row["method"] == method.split()[0]
    if method == "uniform":
        shares = [row["after"] / row["before"] for row in table(out, "Channels")]
        assert max(shares) - min(shares) < 0.2


def test_the_last_channel_that_fits_is_kept(prune):
    network = common.new_generator(
        "unet256", 8, 32, [{"name": "a", "prompt": ""}], "none", torch.device("cpu")
    )
    target = prune.module.Target(network, 0.37)
    torch.manual_seed(0)
    latents = {g: torch.randn(n) for g, n in network.config["widths"].items()}
    kept = target.kept(latents, 0.37)
    widths = {**target.full, **{g: len(indices) for g, indices in kept.items()}}
    assert target.share(widths) <= 0.37
    for g, n in network.config["widths"].items():
        if widths[g] < n:
            assert target.share({**widths, g: widths[g] + 1}) > 0.37
        magnitude = latents[g].abs()
        assert magnitude[kept[g]].min() >= magnitude.sort(descending=True).values[len(kept[g]) - 1]


def test_a_full_pool_gives_half_earlier_fakes_back(prune, monkeypatch):
    monkeypatch.setattr(prune.module, "POOL", 8)
    torch.manual_seed(0)
    pool = prune.module.Pool(2, torch.device("cpu"))
    picture = torch.arange(108.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    assert torch.equal(pool.swap(picture[:8]), picture[:8])  # while it fills
    given = torch.cat([pool.swap(part) for part in picture[8:].split(4)])[:, 0, 0, 0]
    earlier = given != picture[8:, 0, 0, 0]
    assert 30 < earlier.sum() < 70
    assert (given[earlier] < picture[8:, 0, 0, 0][earlier]).all() and len(
        set(given.tolist())
    ) == len(given)


def test_thumbnails_tell_colours_apart(prune):
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (6000, 3, 16, 16), dtype=torch.uint8)
    one, other = pictures[:3000], pictures[3000:]
    same, darker = (
        prune.module.thumbnail_distance(one, other),
        prune.module.thumbnail_distance(one, other // 2),
    )
    assert 0 <= same < 1 and darker > 40  # 192 dimensions, whose mean falls from 0 to about -1/2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "dcgan", "--pairs", "pairs"], "give --data"),
        (["--task", "cyclegan", "--pairs", "pairs"], "one --concept"),
        (
            ["--task", "cyclegan", "--data", "unpaired", "--generator", "dcgan"],
            "takes --generator e2gan or resnet9 or unet256",
        ),
        (["--task", "dcgan", "--data", "flat", "--generator", "e2gan"], "takes --generator dcgan"),
        (["--task", "pix2pix", "--data", "unpaired"], "looked for train/"),
        (["--task", "cyclegan", "--data", "sides"], "looked for train/"),
        (["--task", "dcgan", "--data", "flat", "--size", 32, "--keep", "0.001"], "not under 0.0"),
        (["--pairs", "pairs", "--generator", "base", "--method", "uniform"], "from scratch"),
        (["--pairs", "pairs", "--generator", "base", "--start", "paper"], "would forget"),
        (["--pairs", "pairs", "--generator", "base", "--keep", "0.5"], "trained at 64 pixels"),
        (
            ["--pairs", "pairs", "--generator", "base", "--width", "4"],
            "has --width 8: leave it out",
        ),
        (
            ["--pairs", "pairs", "--generator", "base", "--clip", "ViT-S-32:random"],
            "has --clip none: leave it out",
        ),
        (
            ["--pairs", "pairs", "--generator", "resnet"],
            "neither a file nor one of e2gan, resnet9, unet256",
        ),
        (["--data", "sides", "--concept", "dark"], "leave it out, or --data"),
        (
            ["--pairs", "pairs", "--generator", "resnet9", "--size", "32"],
            "pairs have their own size",
        ),
        (["--pairs", "pairs", "--generator", "resnet9", "--l1", "-1"], "from 0 on"),
        (["--task", "pix2pix", "--data", "sides/train/0.png"], "is no folder"),
        (
            ["--pairs", "pairs", "--generator", "e2gan", "--clip", "none", "--concept", "nothing"],
            "no concept 'nothing'",
        ),
    ],
)
def test_bad_input_is_one_line(data, error_of, tmp_path, flags, words):
    flags = [
        data / flag
        if str(flag).split("/")[0] in ("sides", "pairs", "unpaired", "flat", "base")
        else flag
        for flag in flags
    ]
    assert words in error_of("05", *SMALL, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_stages_take_the_same_files_for_pictures(load_stage, tmp_path):
    for suffix in [*common.SUFFIXES, ".JPG", ".pdf", ".txt", ""]:
        (tmp_path / f"{len(suffix)}{suffix}").touch()
    wanted = sorted(path for path in tmp_path.iterdir() if path.suffix not in (".pdf", ".txt", ""))
    (tmp_path / "._1.png").touch()  # what macOS leaves beside 1.png
    assert common.list_pictures(tmp_path) == load_stage("06").find_pictures(tmp_path) == wanted
    assert [tmp_path / name for name in load_stage("01").list_photos(tmp_path)[0]] == wanted


def test_a_trained_generator_is_read_once(data, error_of, monkeypatch, tmp_path):
    read, load = [], common.load_network
    monkeypatch.setattr(
        common, "load_network", lambda path, *rest: read.append(path) or load(path, *rest)
    )
    network = common.build_network(
        common.generator_config("resnet9", 8, 32, [{"name": "dark", "prompt": ""}])
    )
    common.save_network(tmp_path / "base", network)
    error_of(
        "05",
        *SMALL,
        "--pairs",
        data / "pairs",
        "--generator",
        tmp_path / "base",
        "--keep",
        "0.0001",
        "--out",
        tmp_path / "out",
    )
    assert read == [tmp_path / "base"]


@pytest.mark.parametrize("text", ["{}", '{"steps": "8"}', '{"steps": -1}', '{"steps": true}'])
def test_a_run_goes_on_from_no_search_of_unknown_length(prune, tmp_path, text):
    common.write_text(tmp_path / "search.json", text)
    network = common.build_network(common.generator_config("dcgan", 4, 8, []))
    common.save_network(tmp_path / "generator.safetensors", network)
    task = argparse.Namespace(generators={"generator": network}, discriminators={}, pools={})
    with pytest.raises(common.UserError, match="search.json names no"):
        prune.module.load_task(task, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("method, rate", [("coronet", "--lr-search"), ("uniform", "--lr")])
def test_advice_names_the_rate_of_the_phase(data, error_of, tmp_path, method, rate):
    line = error_of(
        "05",
        *SMALL,
        "--pairs",
        data / "pairs",
        "--generator",
        "resnet9",
        "--method",
        method,
        "--search-epochs",
        1,
        rate,
        "1e30",
        "--out",
        tmp_path / "out",
    )
    assert f"lower {rate} or --lr-d" in line


def test_alike_fakes_of_noise_are_no_collapse_at_first(data, prune, monkeypatch):
    """A generator that makes nearly one grey of every noise, judged in its grace and after."""
    forward = common.DcganGenerator.forward
    monkeypatch.setattr(
        common.DcganGenerator, "forward", lambda self, noise: 1e-4 * forward(self, noise)
    )
    flags = [
        "--task",
        "dcgan",
        "--data",
        data / "flat",
        "--size",
        32,
        "--width",
        4,
        "--method",
        "uniform",
        "--keep",
        "0.5",
        "--search-epochs",
        2,
        "--epochs",
        1,
        "--save-every",
        6,
    ]
    monkeypatch.setattr(prune.module.Dcgan, "grace", 6)
    with pytest.raises(common.Collapse, match="step 12: the generator makes the same picture"):
        prune(*flags)
    monkeypatch.setattr(prune.module.Dcgan, "grace", 1000)
    prune(*flags)
