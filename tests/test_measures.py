"""FID through pytorch-fid, the curve of a log, and the tables of many runs."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as library

import common

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """TORCH_HOME whose cache holds an Inception state of seeded random weights under the library's file name."""
    home = tmp_path_factory.mktemp("home")
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the library's network before its weights are loaded
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = library.fid_inception_v3()
    for module in network.modules():
        if isinstance(
            module, torch.nn.Conv2d
        ):  # as drawn, 94 layers would shrink every feature to 1e-8
            torch.nn.init.kaiming_normal_(module.weight)
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(
        network.state_dict(), home / "hub/checkpoints" / os.path.basename(library.FID_WEIGHTS_URL)
    )
    return home


@pytest.fixture
def cached(weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    common.inception.cache_clear()
    yield weights
    common.inception.cache_clear()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and a network that refuses; returns the list of hosts that were asked for."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    common.inception.cache_clear()
    yield asked
    common.inception.cache_clear()


def pictures(n, cells, seed=0):
    """uint8 (n, 3, 32, 32), smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = [
        Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8)) for _ in range(n)
    ]
    return torch.stack(
        [torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) for image in coarse]
    )


def write(folder, pixels):
    for i, picture in enumerate(pixels):
        common.write_png(folder / f"{i:05}.png", common.to_pil(picture))
    return folder


def test_fid_is_the_librarys_for_folders_of_the_same_pictures(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FID_DIMS", 768)  # 2048 take the program half a minute
    edits, truth = pictures(6, 4), pictures(8, 6, seed=1)
    state = torch.get_rng_state()
    value = common.fid(edits, truth, CPU)
    assert torch.equal(torch.get_rng_state(), state)  # measuring changes no training
    folders = [write(tmp_path / "made", edits), write(tmp_path / "truth", truth)]
    program = [
        sys.executable,
        "-m",
        "pytorch_fid",
        *folders,
        "--dims",
        "768",
        "--device",
        "cpu",
        "--num-workers",
        "0",
    ]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert value > 0.1 and value == pytest.approx(float(printed.split("FID:")[1]), rel=3e-5)
    assert (
        common.fid(edits[:1], truth, CPU) is common.fid(edits, truth[:1], CPU) is None
    )  # one picture has no covariance


@pytest.fixture
def dark(tmp_path, write_pairs):
    return write_pairs(tmp_path / "pairs", {"dark": lambda x: 0.3 * x}, train=1, test=3)


def test_the_teachers_side_of_fid_is_measured_once_and_kept_beside_its_pictures(
    cached, dark, monkeypatch
):
    monkeypatch.setattr(common, "FID_DIMS", 64)  # the first layers alone
    file, plain, taken = dark / ".fid/test-dark.safetensors", common.inception_statistics, []

    def count(pictures, *more):
        taken.append([picture.clone() for picture in pictures])
        return plain(taken[-1], *more)

    monkeypatch.setattr(common, "inception_statistics", count)

    def measure(sides, fresh=True):
        """FID of some evaluation, which should measure 1 or 2 sides; in a new process unless told otherwise."""
        if fresh:
            common.TEACHERS.clear()
        taken.clear()
        pairs = common.find_pairs(dark, "test", ["dark"])
        torch.manual_seed(0)
        [row] = common.evaluate(
            common.build_network(common.generator_config("unet256", 8, 32, pairs.concepts)),
            pairs,
            True,
        )
        assert len(taken) == sides
        return row["FID"]

    value = measure(2)
    assert value > 0 and measure(1) == measure(1, fresh=False) == value
    whole = file.read_bytes()
    mean = torch.full((64,), float("nan"), dtype=torch.float64)
    about = common.read_tensors(file, "fid")[1]
    for spoil in (
        lambda: file.write_bytes(whole[:-8]),
        lambda: common.write_tensors(file, {"mu": mean}, about),
        lambda: common.write_tensors(file, {"mu": mean.clamp(0, 0)}, about),
    ):
        spoil()
        assert measure(2) == value and file.read_bytes() == whole
    image = common.read_image(dark / "test/dark/00001.png")
    image[:, 5, 5] += 9
    common.write_png(dark / "test/dark/00001.png", common.to_pil(image))
    assert measure(2) != value and file.read_bytes() != whole
    monkeypatch.setattr(common.inception(CPU), "sha256", "of other weights")
    measure(2)


def test_fid_where_nothing_can_be_kept(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FID_DIMS", 64)
    common.TEACHERS.clear()
    (tmp_path / "file").touch()
    edits, truth = pictures(2, 4), pictures(3, 6)
    assert (
        common.fid(edits, truth, CPU, tmp_path / "file/kept.safetensors")
        == common.fid(edits, truth, CPU)
        > 0
    )


def test_evaluation_holds_no_more_than_a_part(cached, dark, monkeypatch):
    """Neither the pictures nor what the generator makes of them, wherever they are held; the numbers are the whole set's."""
    pairs, decoded = (
        common.find_pairs(dark, "test", ["dark"]),
        common.load_pairs(dark, "test", ["dark"]),
    )
    generator = common.build_network(
        common.generator_config("unet256", 8, 32, pairs.concepts)
    ).eval()
    made = common.to_float(common.run_generator(generator, decoded.photos, 0))
    parts, sizes = common.Pairs.parts, []
    monkeypatch.setattr(common.Pairs, "parts", lambda self, c, count=2: parts(self, c, count))
    plain = common.run_generator
    monkeypatch.setattr(
        common,
        "run_generator",
        lambda g, photos, *more: sizes.append(len(photos)) or plain(g, photos, *more),
    )
    for source in (pairs, decoded):
        [row] = common.evaluate(generator, source)
        assert row["PSNR dB"] == pytest.approx(
            common.psnr(made, common.to_float(decoded.edits[0])).mean().item(), rel=1e-6
        )
        assert row["L1 (0-255)"] == pytest.approx(
            (made - common.to_float(decoded.edits[0])).abs().mean().item() * 127.5, rel=1e-5
        )
    assert sizes == [2, 1] * 2 and pairs.pixels is None


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(n, 60)) @ np.diag(np.linspace(0.1, 3, 60)) + shift
        for n, shift in ((20, 0), (400, 0.3))
    )
    one, two = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    for first, second in (
        (one, two),
        (two, one),
    ):  # 20 samples in 60 dimensions: a singular covariance
        assert common.frechet_distance(*first, *second) == pytest.approx(
            fid_score.calculate_frechet_distance(*first, *second), rel=1e-5
        )
    assert common.frechet_distance(*one, *one) == pytest.approx(0, abs=1e-9)
    mean, variance = np.zeros(3), np.diag([1.0, 4.0, 9.0])
    assert common.frechet_distance(mean, variance, mean + 2, 4 * variance) == pytest.approx(
        12 + 1 + 4 + 9
    )
    assert common.frechet_distance(mean, 0 * variance, mean, variance) == pytest.approx(14)


def test_without_weights_fid_is_blank_and_one_line_says_how_to_get_them(offline, tmp_path, capsys):
    assert [common.fid(pictures(2, 4), pictures(2, 6), CPU) for _ in range(3)] == [None] * 3
    assert offline == ["github.com"]  # asked once
    [line] = [line for line in capsys.readouterr().out.splitlines() if "FID" in line]
    assert (
        library.FID_WEIGHTS_URL in line
        and str(tmp_path / "empty/hub/checkpoints") in line
        and "no network" in line
    )


def test_broken_weights_leave_fid_blank_too(offline, tmp_path, capsys):
    file = tmp_path / "empty/hub/checkpoints" / os.path.basename(library.FID_WEIGHTS_URL)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"<html>")
    assert common.inception(CPU) is None and "FID is left blank" in capsys.readouterr().out


def test_evaluate_has_a_column_for_fid_only_where_it_is_asked_for(cached, dark):
    pairs = common.load_pairs(dark, "test", ["dark"])
    generator = common.build_network(common.generator_config("unet256", 8, 32, pairs.concepts))
    [plain], [row] = (
        common.evaluate(generator, pairs),
        common.evaluate(generator, pairs, with_fid=True),
    )
    assert row.pop("FID") > 0 and row == plain and "FID" not in plain


def test_curve_draws_losses_and_a_panel_for_each_measure(tmp_path):
    rows = [
        {"step": 0, "PSNR dB": {"dark": 9.0}},
        {"step": 50, "G": 9.1, "D": 0.2, "L1": 0.0},
        {
            "step": 50,
            "PSNR dB": {"dark": 16.2, "night": 24.9},
            "FID": {"dark": None, "night": 80.0},
        },
    ]
    widths = []
    for log in (rows[1:2], rows):
        common.write_curve(tmp_path / "curve.png", log)
        widths.append(common.read_image(tmp_path / "curve.png").shape[2])
    assert 3 * widths[0] == pytest.approx(widths[1], abs=2)


@pytest.fixture
def tables(tmp_path, monkeypatch, capsys):
    """tables() prints what `python common.py <tmp_path>` prints."""

    def call():
        monkeypatch.setattr(sys, "argv", ["common.py", str(tmp_path)])
        common.main()
        return capsys.readouterr().out

    return call


def write_run(folder: Path, rows, settings, stage="04_lora", title="T", marks=()):
    common.write_json(folder / "settings.json", {"stage": stage, **settings})
    common.write_json(
        folder / "result.json", {"stage": stage, "marks": marks, "tables": {title: rows}}
    )


def test_tables_are_in_the_stages_order_with_blanks_and_marks(tmp_path, tables):
    write_run(tmp_path / "a", [{"x dB": 1.23456}, {"y": 3}], {"seed": 0}, marks=["demo"])
    write_run(
        tmp_path / "z",
        [{"s": 1}],
        {"seed": 0},
        stage="03_base",
        title="Base",
        marks=["demo", "stand-in CLIP"],
    )
    common.write_json(tmp_path / "b/settings.json", {"seed": 0})
    assert tables() == (
        "**03_base.py: Base**\n\n| run | s |\n| --- | --- |\n| z [1, 2] | 1 |\n\n"
        "**04_lora.py: T**\n\n| run | x dB | y |\n| --- | --- | --- |\n| a [1] | 1.235 |  |\n| a [1] |  | 3 |\n\n"
        "- [1] demo\n- [2] stand-in CLIP\n- unfinished, no measures yet: b\n"
    )


def test_runs_that_differ_in_their_seed_alone_share_a_row(tmp_path, tables):
    for seed, decibels in enumerate((30.0, 31.0, 32.0)):
        write_run(
            tmp_path / f"s{seed}",
            [
                {
                    "concept": "sepia",
                    "dB": decibels,
                    "steps": 150,
                    "FID": 80.0 + seed if seed else None,
                },
                {"concept": "night", "dB": decibels + 1},
            ],
            {"lr": 1, "seed": seed},
        )
    shutil.copytree(tmp_path / "s0", tmp_path / "z")  # a copy is no fourth seed
    write_run(
        tmp_path / "other", [{"concept": "sepia", "dB": 40.0, "FID": None}], {"lr": 2, "seed": 1}
    )
    assert tables().splitlines()[4:] == [
        "| other | sepia | 40 |  |  |",
        "| s0, s1, s2 (mean ± sd, 3 seeds) | sepia | 31 ± 1 | 81.5 ± 0.71 (n = 2) | 150 |",
        "| s0, s1, s2 (mean ± sd, 3 seeds) | night | 32 ± 1 |  |  |",
        "| z | sepia | 30 |  | 150 |",
        "| z | night | 31 |  |  |",
        "",
        "",
    ]


def test_tasks_of_stage_5_have_tables_of_their_own_and_networks_rows_of_their_own(tmp_path, tables):
    title, held_out = "Pruning", "Pruned generator, held-out pictures"
    for run, keep, seed, first, rows in (
        ("a", 0.1, 0, 10.0, [{"direction": "AtoB", "there and back dB": 21.0}]),
        ("b", 0.1, 1, 12.0, [{"direction": "AtoB", "there and back dB": 22.0}]),
        ("d", 0.1, 0, 30.0, [{"pictures": 24, "FID": None}]),
    ):
        networks = [
            {"network": name, "keep": keep, "MACs %": first + i}
            for i, name in enumerate(("generator", "discriminator"))
        ]
        write_run(
            tmp_path / run,
            networks,
            {"task": run if run == "d" else "cyclegan", "seed": seed},
            stage="05_prune",
            title=title,
        )
        common.write_json(
            tmp_path / run / "result.json",
            {"stage": "05_prune", "tables": {title: networks, held_out: rows}},
        )
    assert tables().splitlines() == [
        "**05_prune.py: Pruning**",
        "",
        "| run | network | keep | MACs % |",
        "| --- | --- | --- | --- |",
        "| a, b (mean ± sd, 2 seeds) | generator | 0.1 | 11 ± 1.4 |",
        "| a, b (mean ± sd, 2 seeds) | discriminator | 0.1 | 12 ± 1.4 |",
        "| d | generator | 0.1 | 30 |",
        "| d | discriminator | 0.1 | 31 |",
        "",
        "**05_prune.py: " + held_out + "**",
        "",
        "| run | direction | there and back dB |",
        "| --- | --- | --- |",
        "| a, b (mean ± sd, 2 seeds) | AtoB | 21.5 ± 0.71 |",
        "",
        "**05_prune.py: " + held_out + "**",
        "",
        "| run | pictures | FID |",
        "| --- | --- | --- |",
        "| d | 24 |  |",
        "",
        "",
    ]


def test_rows_name_their_data_and_other_data_is_no_other_seed(tmp_path, tables):
    for run, data, seed, fid in (
        ("z0", "horse2zebra", 0, 70.0),
        ("z1", "horse2zebra", 1, 72.0),
        ("s", "summer2winter", 2, 90.0),
    ):
        write_run(
            tmp_path / run,
            [{"direction": "AtoB", "FID": fid}],
            {"data": [f"fingerprint of {data}"], "seed": seed},
            "05_prune",
        )
        common.write_json(
            tmp_path / run / "result.json",
            {**common.read_json(tmp_path / run / "result.json"), "data": data},
        )
    write_run(
        tmp_path / "old",
        [{"direction": "AtoB", "FID": 80.0}],
        {"data": ["fingerprint of pairs"], "seed": 0},
        "05_prune",
    )
    assert tables().splitlines()[2:] == [
        "| run | data | direction | FID |",
        "| --- | --- | --- | --- |",
        "| old |  | AtoB | 80 |",
        "| s | summer2winter | AtoB | 90 |",
        "| z0, z1 (mean ± sd, 2 seeds) | horse2zebra | AtoB | 71 ± 1.4 |",
        "",
        "",
    ]


def test_marks_are_those_of_what_had_a_part_in_the_run(tmp_path):
    common.write_json(
        tmp_path / "base/result.json", {"marks": ["demo", "built-in filters as teacher"]}
    )
    args = argparse.Namespace(demo=False, clip="ViT-S-32:random")
    assert common.marks_of(args) == []  # a resnet9 asks no text tower
    assert common.marks_of(args, tmp_path / "base", clip=args.clip) == [
        "demo",
        "built-in filters as teacher",
        "stand-in CLIP (random weights)",
    ]


def test_a_bar_in_a_cell_is_no_column(tmp_path, tables):
    write_run(tmp_path / "a", [{"x": "one|two", "n": 1}], {})
    assert "| a | one\\|two | 1 |" in tables()


@pytest.mark.parametrize(
    "result",
    ["[]", "{}", '{"stage": "x", "tables": [1]}', '{"stage": "x", "tables": {"T": [1]}}', "{"],
)
def test_a_result_that_is_not_ours_is_named(tmp_path, tables, result):
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(common.UserError, match="result.json"):
        tables()


@pytest.mark.slow
def test_bench_prints_a_table_of_ratios():
    command = [
        sys.executable,
        Path(__file__).with_name("bench.py"),
        "--size",
        "32",
        "--width",
        "16",
        "--steps",
        "6",
        "--batch",
        "4",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| stage")]
    assert {row[0][:9] for row in rows} == {f"| stage {i}" for i in (1, 3, 4, 5, 6)} and all(
        float(row[1]) >= 0 for row in rows
    )
