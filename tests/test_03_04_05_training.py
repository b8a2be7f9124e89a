"""Stages 3 to 5 on pairs that take seconds: they learn, keep their promises about size, continue after SIGKILL in the same bytes,
and train the same on two processes as on one."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, script

EDITS = {
    "inverted": lambda x: 1 - x,
    "dark": lambda x: 0.25 * x,
    "warm": lambda x: x @ np.array([[1.0, 0.5, 0.2], [0.3, 0.6, 0.1], [0.2, 0.1, 0.1]]),
}
BASE = [
    "--arch",
    "e2gan",
    "--width",
    8,
    "--clip",
    "ViT-S-32:random",
    "--batch",
    8,
    "--lr",
    "2e-3",
    "--seed",
    1,
    "--fid",
    "off",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, stage, write_pairs):
    """Pairs of three concepts; clusters that make `warm` the new one; a base trained on the others."""
    root = tmp_path_factory.mktemp("world")
    write_pairs(root / "pairs", EDITS)
    common.write_json(
        root / "clusters/concepts.json", {"base": ["inverted", "dark"], "new": ["warm"]}
    )
    common.write_text(
        root / "clusters/samples/warm.txt", "".join(f"{i:05}.png\n" for i in range(0, 12, 2))
    )
    stage(
        "03",
        "--pairs",
        root / "pairs",
        "--clusters",
        root / "clusters",
        "--out",
        root / "base",
        *BASE,
        "--epochs",
        40,
    )
    return root


def files(world):
    return ["--pairs", world / "pairs", "--clusters", world / "clusters", "--fid", "off"]


def table(folder, title):
    return common.read_json(folder / "result.json")["tables"][title]


def kill_midway_and_continue(stage, number, flags, out, state, kills=1):
    """Starts a stage, kills it with SIGKILL as soon as it has saved `state` anew, `kills` times, and lets the same command finish."""
    for _ in range(kills):
        before = (out / state).stat().st_mtime_ns if (out / state).exists() else 0
        process = subprocess.Popen(
            [sys.executable, script(number), *map(str, flags)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if (out / state).exists() and (out / state).stat().st_mtime_ns > before:
                break
            time.sleep(0.02)
        assert process.poll() is None, "ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (out / state).exists() and not (out / "result.json").exists()
    stage(number, *flags)


def assert_same_files(one, two, *names):
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_base_learns_its_concepts(world):
    for row in table(world / "base", "Base concepts, held-out photos"):
        assert row["PSNR dB"] > row["photo unchanged dB"] + 3, row
    assert (world / "base/samples").is_dir() and not list(world.rglob("*.part"))


def test_the_right_prompt_beats_every_wrong_one_on_the_demos_photos(stage, tmp_path):
    """Less than half of the demo's training: its photos, six of its concepts and its settings."""
    stage("01", "--demo", "--out", tmp_path / "pairs")
    concepts = [
        flag
        for name in ("sketch", "oil", "poster", "neon", "night", "emboss")
        for flag in ("--concept", name)
    ]
    stage(
        "03",
        "--demo",
        "--pairs",
        tmp_path / "pairs",
        "--out",
        tmp_path / "base",
        *concepts,
        "--epochs",
        5,
    )
    rows = table(tmp_path / "base", "Base concepts, held-out photos")
    assert len(rows) == 6
    for row in rows:
        assert row["PSNR dB"] > row["best wrong prompt dB"] + 1.5, row


def test_base_killed_and_continued_ends_in_the_same_bytes(world, stage, tmp_path):
    flags = [*files(world), *BASE, "--epochs", 12, "--save-every", 10, "--eval-every", 5]
    stage("03", *flags, "--out", tmp_path / "whole")
    kill_midway_and_continue(
        stage,
        "03",
        [*flags, "--out", tmp_path / "killed"],
        tmp_path / "killed",
        "state.safetensors",
        kills=2,
    )
    assert_same_files(
        tmp_path / "whole",
        tmp_path / "killed",
        "generator.safetensors",
        "best.safetensors",
        "state.safetensors",
        "log.jsonl",
    )
    again = stage("03", *flags, "--out", tmp_path / "whole")
    assert "done already" in again.stdout


def test_the_best_model_and_the_curve_are_kept(world):
    log = [json.loads(line) for line in (world / "base/log.jsonl").read_text().splitlines()]
    means = [np.mean(list(entry["PSNR dB"].values())) for entry in log if "PSNR dB" in entry]
    assert len(means) == 8  # 40 epochs, every 5
    test = common.load_pairs(world / "pairs", "test", ["inverted", "dark"])
    for file, wanted in (("best", max(means)), ("generator", means[-1])):
        rows = common.evaluate(common.load_generator(world / f"base/{file}.safetensors"), test)
        assert np.mean([row["PSNR dB"] for row in rows]) == pytest.approx(wanted, abs=1e-3)
    assert common.read_image(world / "base/curve.png").shape[1] > 100


def test_a_collapse_stops_the_run_and_keeps_the_last_good_checkpoint(
    world, load_stage, error_of, tmp_path, monkeypatch
):
    """The weights are broken in the 25th step, between the second checkpoint and the third."""
    flags = [
        *files(world),
        *BASE,
        "--out",
        tmp_path / "base",
        "--save-every",
        10,
        "--eval-every",
        100,
        "--epochs",
        40,
    ]
    text, kept, steps = common.text_of, {}, []

    def count_and_break(generator, concept):
        steps.append(1)
        if len(steps) == 22:
            kept.update(
                {path.name: path.read_bytes() for path in (tmp_path / "base").glob("*.safetensors")}
            )
        if len(steps) == 25:
            next(generator.parameters()).data.fill_(float("nan"))
        return text(generator, concept)

    monkeypatch.setattr(common, "text_of", count_and_break)
    line = error_of("03", *flags)
    assert line.startswith("error: training collapsed shortly before step 30: a loss is not finite")
    assert sorted(kept) == ["generator.safetensors", "state.safetensors"]
    assert all((tmp_path / "base" / name).read_bytes() == content for name, content in kept.items())
    assert not (tmp_path / "base/result.json").exists()


@pytest.mark.parametrize(
    "rate, words", [("1e30", "not finite"), ("30", "same picture of every photo")]
)
def test_rates_that_break_a_network(world, error_of, tmp_path, rate, words):
    assert words in error_of(
        "03", *files(world), *BASE, "--lr", rate, "--out", tmp_path / "base", "--epochs", 20
    )


def test_health_names_what_collapsed(tmp_path):
    torch.manual_seed(0)
    fake, edit, score, loss = (
        torch.rand(4, 3, 8, 8),
        torch.rand(4, 3, 8, 8),
        torch.randn(4, 1, 2, 2),
        torch.ones(3),
    )
    network = torch.nn.Linear(2, 2)

    def check(*parts, **more):
        return common.check_health(*parts, network, 7, tmp_path, 1, **more)

    assert check(loss, fake, edit, score) == {"step": 7, "G": 1, "D": 1, "L1": 1}
    for bad, words in (
        ((loss * torch.tensor([1, float("nan"), 1]), fake, edit, score), "not finite"),
        ((loss, fake[:1].expand_as(fake), edit, score), "same picture"),
        ((loss, fake, edit, torch.ones(4, 1, 2, 2)), "same score"),
    ):
        with pytest.raises(common.Collapse, match=f"step 7.*{words}"):
            check(*bad)
    assert check(loss, fake[:1].expand_as(fake), edit, score, vary=False)
    assert check(
        loss, torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), score
    )  # edits all alike ask for no more
    network.weight.data[0, 0] = float("inf")
    with pytest.raises(common.Collapse, match="a weight is not finite"):
        check(loss, fake, edit, score)


def run_twice(file, *flags):
    """A script, in two processes that train together."""
    port = 20000 + os.getpid() % 20000
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={port}",
            str(file),
            *map(str, flags),
        ],
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


RANKS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import common, conftest, importlib.util
spec = importlib.util.spec_from_file_location("stage", conftest.script({number!r}))
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
wrap, networks = common.data_parallel, []
common.data_parallel = lambda network, *rest: networks.append(network) or wrap(network, *rest)

def main():
    stage.main()
    mine = torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert len(networks) == {networks} and torch.equal(*both), "the ranks' weights differ"
    networks.clear()

common.run(main)
"""


def test_two_processes_train_as_one(world, stage, tmp_path):
    # few and short steps: Adam turns the rounding of sums in another order into differences that grow
    flags = [
        *files(world),
        *BASE,
        "--epochs",
        1,
        "--lr",
        "2e-4",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    stage("03", *flags, "--out", tmp_path / "one")
    (tmp_path / "ranks.py").write_text(
        RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), number="03", networks=2)
    )
    run_twice(tmp_path / "ranks.py", *flags, "--out", tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    assert one[0] == pytest.approx(
        two[0], rel=1e-5
    )  # the losses; the other row is the held-out photos'
    # outputs, not weights: a bias that instance norm erases has a gradient of pure rounding, which Adam magnifies
    photos = common.load_pairs(world / "pairs", "test", ["dark"]).photos
    one, two = (
        common.load_generator(tmp_path / name / "generator.safetensors") for name in ("one", "two")
    )
    with torch.no_grad():
        a, b = (
            network(common.to_float(photos), torch.ones(len(photos), dtype=torch.long))
            for network in (one, two)
        )
    assert (a - b).abs().max() < 1e-3


@pytest.mark.parametrize(
    "number, log, flags",
    [
        ("04", "warm/log.jsonl", ["--epochs", 2, "--samples", "all", "--batch", 4]),
        (
            "05",
            "search.jsonl",
            [
                "--keep",
                "0.5",
                "--search-epochs",
                2,
                "--epochs",
                1,
                "--batch",
                8,
                "--lr-search",
                "2e-5",
                "--lr-d",
                "2e-5",
            ],
        ),
    ],
)
def test_two_processes_train_as_one_in_the_later_stages(world, stage, tmp_path, number, log, flags):
    source = ["--base" if number == "04" else "--generator", world / "base/generator.safetensors"]
    flags = [
        "--pairs",
        world / "pairs",
        *source,
        *flags,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--fid",
        "off",
    ]
    flags += ["--concept", "warm"] if number == "04" else []
    stage(number, *flags, "--out", tmp_path / "one")
    run_twice(script(number), *flags, "--out", tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / log).read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.get("MACs %") == b.get("MACs %")
        assert {**a, "MACs %": 0} == pytest.approx({**b, "MACs %": 0}, rel=1e-5)


@pytest.mark.parametrize("arch", ["resnet9", "unet256"])
def test_other_architectures_train_on_one_concept(world, stage, tmp_path, error_of, arch):
    flags = [
        "--pairs",
        world / "pairs",
        "--arch",
        arch,
        "--width",
        8,
        "--epochs",
        1,
        "--fid",
        "off",
        "--out",
        tmp_path / arch,
    ]
    assert "takes no prompt" in error_of("03", *flags, "--concept", "dark", "--concept", "warm")
    stage("03", *flags, "--concept", "dark")
    assert common.load_generator(tmp_path / arch / "generator.safetensors").config["arch"] == arch


@pytest.fixture(scope="module")
def adapter(world, stage):
    """The folder of an adapter for `warm`, with the base's bytes checked to be untouched."""
    before = common.sha256(world / "base/generator.safetensors")
    stage(
        "04",
        *files(world),
        "--base",
        world / "base/generator.safetensors",
        "--out",
        world / "lora",
        "--epochs",
        60,
        "--batch",
        6,
        "--lr",
        "3e-3",
        "--rank",
        "2",
    )
    assert common.sha256(world / "base/generator.safetensors") == before
    return world / "lora/warm"


def test_adapter_learns_the_new_concept(world, adapter):
    [row] = table(adapter, "New concepts, held-out photos")
    assert row["concept"] == "warm" and row["photos"] == 6
    assert row["PSNR dB"] > row["before dB"] + 3 and row["PSNR dB"] > row["photo unchanged dB"]
    generator = common.load_generator(world / "base/generator.safetensors")
    whole = common.count_parameters(generator)
    index = common.load_adapter(generator, adapter / "adapter.safetensors")
    assert row["trained weights"] == sum(
        lora.lora_A.numel() + lora.lora_B.numel() for lora in common.lora_layers(generator).values()
    )
    assert {common.layer_group(name) for name in common.lora_layers(generator)} == {
        "stem",
        "down1",
        "down2",
        "tb",
        "up1",
        "up2",
        "film1",
        "film2",
        "out",
    }
    assert row["trained %"] == pytest.approx(100 * row["trained weights"] / whole)
    test = common.load_pairs(world / "pairs", "test", ["warm"])
    made = common.to_float(common.run_generator(generator, test.photos, index))
    assert common.psnr(made, common.to_float(test.edits[0])).mean().item() == pytest.approx(
        row["PSNR dB"], abs=0.1
    )  # fp16 file


@pytest.mark.parametrize("mode", ["full", "scratch"])
def test_other_modes_write_a_generator_of_one_concept(world, stage, tmp_path, mode):
    stage(
        "04",
        *files(world),
        "--base",
        world / "base/generator.safetensors",
        "--mode",
        mode,
        "--epochs",
        2,
        "--samples",
        "all",
        "--out",
        tmp_path,
    )
    [row] = table(tmp_path / "warm", "New concepts, held-out photos")
    assert row["trained %"] == 100 and row["photos"] == 12
    generator = common.load_generator(tmp_path / "warm/generator.safetensors")
    assert [concept["name"] for concept in generator.config["concepts"]] == ["warm"]


def test_a_new_prompt_needs_no_new_base_and_no_new_clusters(world, stage, write_pairs, tmp_path):
    write_pairs(tmp_path / "pairs", {**EDITS, "bright": lambda x: 0.5 + 0.5 * x})
    before = {
        path: path.read_bytes()
        for folder in ("base", "clusters")
        for path in (world / folder).rglob("*")
        if path.is_file()
    }
    done = stage(
        "04",
        "--pairs",
        tmp_path / "pairs",
        "--clusters",
        world / "clusters",
        "--base",
        world / "base/generator.safetensors",
        "--concept",
        "bright",
        "--steps",
        40,
        "--batch",
        6,
        "--lr",
        "3e-3",
        "--out",
        tmp_path / "lora",
    )
    assert "chose no photos for bright" in done.stdout
    [row] = table(tmp_path / "lora/bright", "New concepts, held-out photos")
    assert row["photos"] == 12 and row["steps"] == 40 and row["PSNR dB"] > row["before dB"] + 3
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.fixture
def stage04(world, load_stage, monkeypatch):
    """stage04(*flags) runs stage 4 in this process for the world's new concept."""
    module = load_stage("04")

    def call(*flags):
        base = ["--base", world / "base/generator.safetensors", "--batch", 6, "--lr", "3e-3"]
        monkeypatch.setattr(
            sys, "argv", [str(script("04")), *map(str, [*files(world), *base, *flags])]
        )
        module.main()

    call.module = module
    return call


def test_random_photos_are_as_many_as_asked_and_follow_the_seed(world, stage04, error_of):
    def drawn(count, seed):
        args = argparse.Namespace(pairs=world / "pairs", samples=f"random:{count}", seed=seed)
        return stage04.module.chosen_samples(args, "warm")

    assert len(set(drawn(5, 1))) == 5 and drawn(5, 1) == drawn(5, 1) != drawn(5, 2)
    assert set(drawn(5, 1)) < set(drawn(8, 1))
    for count in ("0", "13", "x"):
        assert "from 1 to 12" in error_of(
            "04",
            *files(world),
            "--base",
            world / "base/generator.safetensors",
            "--samples",
            f"random:{count}",
        )


def test_photos_that_judge_probes_are_none_that_probes_train_on(world, stage04):
    def split(samples):
        args = argparse.Namespace(
            pairs=world / "pairs", clusters=world / "clusters", samples=samples, seed=0
        )
        return stage04.module.validation_split(args, "warm")

    train, held_out = split("clusters")
    assert train == [f"{i:05}.png" for i in range(0, 12, 2)] and held_out == [
        f"{i:05}.png" for i in range(1, 12, 2)
    ]
    train, held_out = split("all")
    assert len(held_out) == 3 and sorted(train + held_out) == [f"{i:05}.png" for i in range(12)]


def test_searches_find_the_same_when_killed_and_later_runs_use_what_they_found(
    world, stage, stage04, tmp_path, capsys
):
    flags = [
        "--layers",
        "search",
        "--rank",
        "auto",
        "--probe-steps",
        6,
        "--steps",
        6,
        "--rank-threshold",
        "0.05",
    ]
    command = [
        *files(world),
        "--base",
        world / "base/generator.safetensors",
        "--batch",
        6,
        "--lr",
        "3e-3",
        *flags,
    ]
    stage("04", *command, "--out", tmp_path / "whole")
    kill_midway_and_continue(
        stage,
        "04",
        [*command, "--out", tmp_path / "killed"],
        tmp_path / "killed",
        "layer-search/probes.json",
    )
    assert_same_files(
        tmp_path / "whole",
        tmp_path / "killed",
        "crucial.json",
        "layer-search/probes.json",
        "warm/probes.json",
        "warm/adapter.safetensors",
    )
    rows = table(
        tmp_path / "whole/layer-search", "Crucial layers, held-out error relative to the base's"
    )
    gains = [row["gain % per 1000 weights"] for row in rows]
    groups = stage04.module.group_sizes(common.load_generator(world / "base/generator.safetensors"))
    assert {row["layers"] for row in rows} == set(groups) and gains == sorted(gains, reverse=True)
    crucial = common.read_json(tmp_path / "whole/crucial.json")["groups"]
    assert set(crucial) == {row["layers"] for row in rows if row["crucial"] == "yes"}
    assert (tmp_path / "whole/layer-search/gain.png").read_bytes().startswith(b"\x89PNG")

    [found] = table(tmp_path / "whole/warm", "Rank search, found")
    about = common.read_tensors(tmp_path / "whole/warm/adapter.safetensors", "adapter")[1]
    ranks = dict(
        (group, int(rank)) for group, rank in (part.split(":") for part in found["ranks"].split())
    )
    assert about["ranks"] == stage04.module.layer_ranks(groups, ranks) and set(ranks) == set(
        crucial
    )
    assert (
        len(common.read_json(tmp_path / "whole/warm/probes.json")) == found["probes"] + 1
    )  # and the base

    common.write_json(
        tmp_path / "later/crucial.json", {"base": "of another base", "groups": ["up2", "out"]}
    )
    capsys.readouterr()
    stage04("--steps", 1, "--out", tmp_path / "later")
    assert "up2, out (found on another base)" in capsys.readouterr().out
    about = common.read_tensors(tmp_path / "later/warm/adapter.safetensors", "adapter")[1]
    assert {common.layer_group(name) for name in about["ranks"]} == {"up2", "out"}


class KnownErrors:
    """Probes whose error is a function, with the probes counted."""

    def __init__(self, error):
        self.args, self.error_of, self.asked, self.judge = (
            argparse.Namespace(steps=1),
            error,
            [],
            "L1 (0-255)",
        )

    def error(self, ranks):
        self.asked.append(dict(ranks))
        return self.error_of(ranks)


def test_rank_search_doubles_what_helps_and_nothing_else(world, stage04):
    groups = stage04.module.group_sizes(common.load_generator(world / "base/generator.safetensors"))
    wanted = {"down1": 4, "tb": 1, "up1": 16, "out": 2}  # errors fall to here and no further
    probes = KnownErrors(
        lambda ranks: (
            100 - 3 * sum(min(rank, wanted[group]).bit_length() for group, rank in ranks.items())
        )
    )
    ranks, path, cost = stage04.module.search_ranks(probes, groups, list(wanted), threshold=0.01)
    assert ranks == wanted
    assert (
        cost["probes"] == len(path) == len(probes.asked) < cost["all combinations"] == 5 * 5 * 5 * 3
    )  # out: 1, 2, 3
    assert stage04.module.search_ranks(probes, groups, list(wanted), threshold=0.5)[
        0
    ] == dict.fromkeys(wanted, 1)


def test_a_layer_group_that_adds_nothing_to_better_ones_is_not_crucial(
    world, stage04, monkeypatch, tmp_path
):
    def error(
        ranks,
    ):  # up1 and up2 do the same; out does something else; nothing else does anything
        return 1 - 0.3 * bool(ranks.keys() & {"up1", "up2"}) - 0.1 * ("out" in ranks)

    monkeypatch.setattr(stage04.module, "Probes", lambda *_: KnownErrors(error))
    stage04("--layers", "search", "--steps", 1, "--out", tmp_path)
    assert common.read_json(tmp_path / "crucial.json")["groups"] == [
        "up2",
        "out",
    ]  # up2 has fewer weights than up1


def prune(world, out, *flags):
    return [
        "--pairs",
        world / "pairs",
        "--clip",
        "ViT-S-32:random",
        "--batch",
        8,
        "--fid",
        "off",
        "--out",
        out,
        *flags,
    ]


def test_pruning_meets_its_target_and_keeps_what_was_learned(world, stage, tmp_path):
    stage(
        "05",
        *prune(
            world,
            tmp_path / "out",
            "--generator",
            world / "base/generator.safetensors",
            "--keep",
            "0.4",
            "--lr",
            "1e-3",
            "--search-epochs",
            6,
            "--epochs",
            20,
        ),
    )
    small = common.load_generator(tmp_path / "out/generator.safetensors")
    full = common.load_generator(world / "base/generator.safetensors")
    share = common.count_macs(small, 32) / common.count_macs(full, 32)
    assert 0.39 < share <= 0.4
    assert (
        small.config["full"] == full.config["widths"]
        and small.config["concepts"] == full.config["concepts"]
    )
    for row in table(tmp_path / "out", "Pruned generator, held-out pictures"):
        assert row["PSNR dB"] > row["photo unchanged dB"] + 2, row
    assert (tmp_path / "out/pruning.png").exists()


@pytest.mark.parametrize("arch", list(common.ARCHITECTURES))
def test_pruning_from_scratch_meets_its_target(world, stage, tmp_path, arch):
    stage(
        "05",
        *prune(
            world,
            tmp_path / "out",
            "--generator",
            arch,
            "--width",
            8,
            "--concept",
            "dark",
            "--keep",
            "0.3",
            "--search-epochs",
            8,
            "--epochs",
            1,
        ),
    )
    [row] = table(tmp_path / "out", "Pruning")
    assert 29 < row["MACs %"] <= 30


def test_pruning_killed_and_continued_ends_in_the_same_bytes(world, stage, tmp_path):
    flags = [
        "--generator",
        world / "base/generator.safetensors",
        "--keep",
        "0.5",
        "--search-epochs",
        10,
        "--epochs",
        12,
        "--save-every",
        5,
    ]
    stage("05", *prune(world, tmp_path / "whole", *flags))
    kill_midway_and_continue(
        stage,
        "05",
        prune(world, tmp_path / "killed", *flags),
        tmp_path / "killed",
        "search.safetensors",
    )
    assert_same_files(
        tmp_path / "whole",
        tmp_path / "killed",
        "sliced/generator.safetensors",
        "generator.safetensors",
        "search.jsonl",
        "converge.jsonl",
    )


def test_impossible_keep_says_what_is_possible(world, error_of, tmp_path):
    line = error_of(
        "05",
        *prune(
            world,
            tmp_path / "out",
            "--generator",
            world / "base/generator.safetensors",
            "--keep",
            "0.001",
        ),
    )
    smallest = float(re.search(r"not under ([\d.]+)", line).group(1))
    assert 0.001 < smallest < 0.3 and not (tmp_path / "out").exists()
