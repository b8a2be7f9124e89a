"""Stage 6: a file computes what PyTorch computes, with the adapter merged and the prompt inside,
and stands alone."""

import argparse
import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import random_rows, script, write_adapter
from PIL import Image

import common
import training

SIZE = 32
RANKS = {"down1.conv": 2, "blocks.tb.feed1": 1, "up1.conv": 2}


def new_generator(arch="e2gan", concepts=("sketch", "oil"), seed=0, text=True):
    """Random weights, biases and prompts (of unequal lengths): nothing is zero by chance."""
    torch.manual_seed(seed)
    tokens = [random_rows(f"tokens/{name}", 3 + i) for i, name in enumerate(concepts)]
    concepts = [{"name": name, "prompt": f"make it {name}"} for name in concepts]
    text = (tokens, "ViT-S-32:random") if text else ()
    generator = common.new_generator(arch, 8, SIZE, concepts, *text).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    return generator


def halved(network):
    kept = {group: torch.arange(0, n, 2) for group, n in network.config["widths"].items()}
    return common.slice_network(network, kept)


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_pairs):
    """Pairs of three concepts, a base for two of them, a pruned one for `sketch`, an adapter for
    `night`; what a CycleGAN run of stage 5 leaves: resnet9 one way, a pruned e2gan the other; and
    photos of any size."""
    root = tmp_path_factory.mktemp("world")
    edits = {"sketch": lambda x: 1 - x, "oil": lambda x: 0.5 * x, "night": lambda x: x**2}
    write_pairs(root / "pairs", edits, train=4, test=5, size=SIZE)
    (root / "pairs/test/oil/00004.png").unlink()  # an edit that stage 1 rejected
    common.save_network(root / "base/generator.safetensors", new_generator())
    pruned = halved(new_generator(concepts=("sketch",), seed=1))
    common.save_network(root / "coronet/generator.safetensors", pruned)
    base = common.load_generator(root / "base/generator.safetensors")
    write_adapter(root / "lora/night/adapter.safetensors", base, "night", RANKS)
    there = new_generator("resnet9", ("AtoB",), text=False)
    back = halved(new_generator("e2gan", ("BtoA",), text=False))
    common.save_network(root / "cyclegan/generator_AtoB.safetensors", there)
    common.save_network(root / "cyclegan/generator_BtoA.safetensors", back)
    picture(root / "photos/wide.png", 60, 40)
    picture(root / "photos/high.jpg", 30, 50)
    return root


def picture(path, width, height, mode="RGB", **options):
    noise = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height))
    image.convert(mode).save(path, **options)


def flags_of(root, flags: str) -> list[str]:
    """Flags in which W stands for the world's folder."""
    given = f"--pairs W/pairs --size {SIZE} --threads 1 {flags}"
    return given.replace("W/", f"{root}/").split()


@pytest.fixture(scope="module")
def export(world, load_stage):
    """export("--out W/name ...") runs the stage in this process on what `world` holds, and returns
    its table's rows by concept. Tracing takes seconds, so a generator is traced once with the same
    options."""
    module, traced = load_stage("06"), {}
    trace = module.trace

    def trace_once(generator, *options):
        key = getattr(generator, "sha256", None), *options
        traced[key] = traced.get(key) or trace(generator, *options)
        return traced[key]

    module.trace = trace_once

    def call(flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [script("06"), *flags_of(world, flags)])
            module.main()
        out = world / flags.split("--out W/")[1].split()[0]
        rows = common.read_json(out / "result.json")["tables"]["ONNX files"]
        return {row["concept"]: row for row in rows}

    return call


GENERATORS = "--generator W/base/generator.safetensors --generator W/coronet/generator.safetensors"


@pytest.fixture(scope="module")
def exported(world, export):
    export(f"{GENERATORS} --adapter W/lora --out W/onnx")
    return world / "onnx"


@pytest.fixture(scope="module")
def dynamic(world, export):
    """The base's concepts in the other form: bytes, and any height and width."""
    export("--generator W/base/generator.safetensors --io uint8 --dynamic --out W/dynamic")
    return world / "dynamic"


def run_file(path, photo):
    return onnxruntime.InferenceSession(path).run(None, {"photo": photo.numpy()})[0]


def edit(generator, photo, concept):
    with torch.no_grad():
        return generator(photo, torch.full((len(photo),), generator.concept(concept))).numpy()


def test_each_file_equals_its_generator(world, exported):
    photo = torch.rand(3, 3, SIZE, SIZE) * 2 - 1  # a batch that the tracer has not seen
    base = common.load_generator(world / "base/generator.safetensors")
    adapted = common.load_generator(world / "base/generator.safetensors")
    common.load_adapter(adapted, world / "lora/night/adapter.safetensors")
    pruned = common.load_generator(world / "coronet/generator.safetensors")
    sources = {"oil": base, "night": adapted, "sketch": pruned}
    assert {path.stem for path in exported.glob("*.onnx")} == sources.keys()
    for name, generator in sources.items():
        difference = run_file(exported / f"{name}.onnx", photo) - edit(generator, photo, name)
        assert np.abs(difference).max() < 1e-4
    assert np.abs(edit(adapted, photo, "night") - edit(base, photo, "oil")).max() > 0.01


def test_file_stands_alone(world, exported, tmp_path):
    shutil.copy(exported / "night.onnx", tmp_path)
    model = onnx.load(tmp_path / "night.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["photo", "edit"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    assert model.ir_version == 8  # ONNX Runtime of 2023 refuses what says that it is newer
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        **{"concept": "night", "prompt": "make it night", "size": "32x32", "precision": "fp32"},
        **{"value range": "-1..1, RGB, NCHW", "multiple": "8", "attention heads": "4"},
        "base sha256": common.sha256(world / "base/generator.safetensors"),
    }
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, SIZE, SIZE]
    # what the prompt leads to is computed already
    assert not any("text" in node.input for node in model.graph.node)


def test_result(world, exported):
    result = common.read_json(exported / "result.json")
    rows = {row["concept"]: row for row in result["tables"]["ONNX files"]}
    kinds = {"sketch": "pruned", "oil": "base", "night": "base + adapter"}
    found = {name: row.get("from") for name, row in rows.items()}
    assert found == kinds
    assert all(rows[name]["max difference"] <= 1e-3 and rows[name]["ms"] > 0 for name in kinds)
    for column in ("GMACs", "KB"):
        assert rows["sketch"][column] < rows["oil"][column]
    photos, edits = [], []
    for path in sorted((world / "pairs/test/oil").iterdir()):  # the photos that have an edit
        photos.append(common.to_float(common.read_image(world / "pairs/test/source" / path.name)))
        edits.append(common.to_float(common.read_image(path)))
    fake = torch.from_numpy(run_file(exported / "oil.onnx", torch.stack(photos)))
    psnr = training.psnr(fake, torch.stack(edits)).mean().item()
    assert len(edits) == 4 and rows["oil"]["PSNR dB"] == pytest.approx(psnr, abs=1e-3)
    # photo, teacher, base, pruned, ONNX; three concepts
    assert common.read_image(exported / "comparison.png").shape[1] > 3 * 160
    assert common.read_image(exported / "comparison.png").shape[2] > 5 * 160


def test_done_already_and_one_concept(world, export, capsys):
    flags = "--generator W/base/generator.safetensors --adapter W/lora --concept night --out W/one"
    export(flags)
    assert {path.stem for path in (world / "one").glob("*.onnx")} == {"night"}
    before = (world / "one/night.onnx").stat().st_mtime_ns
    export(f"{flags} --apply W/photos")  # which changes nothing of the export
    assert "done already" in capsys.readouterr().out
    assert (world / "one/night.onnx").stat().st_mtime_ns == before
    settings = (world / "one/settings.json").read_text()
    assert str(world) not in settings and (world / "one-applied/night/wide.png").exists()


@pytest.mark.parametrize("arch", ["resnet9", "unet256", "e2gan"])
def test_architectures_without_prompt(world, export, arch):
    generator = new_generator(arch, ("oil",), text=False)
    common.save_network(world / f"{arch}.safetensors", generator)
    export(f"--generator W/{arch}.safetensors --out W/{arch}")
    photo = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    difference = run_file(world / arch / "oil.onnx", photo) - edit(generator, photo, "oil")
    assert np.abs(difference).max() < 1e-4


def test_both_directions_of_cyclegan_without_pairs(world, export):
    """Photos of any kind prove and calibrate what never saw a pair; --apply edits with both."""
    flags = "--generator W/cyclegan/generator_AtoB.safetensors "
    flags += "--generator W/cyclegan/generator_BtoA.safetensors --photos W/photos --pairs W/none"
    rows = export(f"{flags} --io uint8 --apply W/photos --out W/both")
    photo = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    for way, kind in (("AtoB", "base"), ("BtoA", "pruned")):
        generator = common.load_generator(world / f"cyclegan/generator_{way}.safetensors")
        made = run_file(world / f"both/{way}.onnx", photo.permute(0, 2, 3, 1))
        wanted = training.run_generator(generator, photo, 0).permute(0, 2, 3, 1).numpy()
        assert np.abs(made.astype(int) - wanted).max() <= 1
        applied = {path.name for path in (world / "both-applied" / way).iterdir()}
        assert applied == {"wide.png", "high.png"}
        assert rows[way]["from"] == kind and "PSNR dB" not in rows[way]
    rows = export(f"{flags} --io uint8 --precision int8 --out W/both-int8")
    assert all(rows[way]["dB to PyTorch"] >= 30 for way in ("AtoB", "BtoA"))


def test_bytes_of_any_size(world, dynamic):
    base = common.load_generator(world / "base/generator.safetensors")
    for shape in ((1, 3, 24, 56), (2, 3, 48, 40)):
        photo = torch.randint(0, 256, shape, dtype=torch.uint8)
        made = run_file(dynamic / "oil.onnx", photo.permute(0, 2, 3, 1))
        wanted = torch.from_numpy(edit(base, common.to_float(photo), "oil"))
        wanted = common.to_uint8(wanted).permute(0, 2, 3, 1).numpy()
        assert made.dtype == np.uint8 and np.abs(made.astype(int) - wanted).max() <= 1
        assert (made == wanted).mean() > 0.99


@pytest.mark.parametrize("precision, least", [("fp16", 45), ("int8", 30)])
def test_precisions(world, export, exported, precision, least):
    flags = "--generator W/base/generator.safetensors --concept oil"
    row = export(f"{flags} --precision {precision} --out W/{precision}")["oil"]
    path, photos = world / precision / "oil.onnx", []
    for file in (world / "pairs/test/source").glob("*.png"):
        photos.append(common.to_float(common.read_image(file)))
    full, small = (
        torch.from_numpy(run_file(file, torch.stack(photos)))
        for file in (exported / "oil.onnx", path)
    )
    assert training.psnr(full, small).mean() >= least and row["dB to PyTorch"] >= least
    assert path.stat().st_size < 0.75 * (exported / "oil.onnx").stat().st_size
    model = onnx.load(path)
    assert model.ir_version == 8 and row["precision"] == precision
    kinds = Counter(t.data_type for t in model.graph.initializer if len(t.dims) in (2, 4))
    assert kinds[onnx.TensorProto.INT8] == (17 if precision == "int8" else 0)  # 9 Conv, 8 MatMul
    assert precision == "int8" or not kinds[onnx.TensorProto.FLOAT]


def test_film_is_the_norms_own_scale_and_shift(exported):
    nodes = onnx.load(exported / "oil.onnx").graph.node
    normed = {node.output[0] for node in nodes if node.op_type == "InstanceNormalization"}
    assert normed and not any(node.op_type == "Mul" and normed & {*node.input} for node in nodes)


def test_beyond_tolerance_nothing_is_written(world, load_stage, monkeypatch):
    stage, flags = load_stage("06"), "--generator W/base/generator.safetensors --precision int8"
    monkeypatch.setitem(stage.TOLERANCE, "int8", (9.0, 200.0))
    given = flags_of(world, f"{flags} --out W/missed")
    monkeypatch.setattr("sys.argv", [script("06"), *given])
    with pytest.raises(common.UserError, match="differs from PyTorch .* 200 are needed"):
        stage.main()
    assert not list((world / "missed").glob("*.onnx"))
    assert not (world / "missed/result.json").exists()


def test_a_trace_serves_other_weights_and_prompts(load_stage):
    """Equal constants, such as zero biases, are not taken for one. What differs is found out, also
    where it differs by NaN."""
    stage, zero, other = load_stage("06"), new_generator(), new_generator(seed=2)
    for name, parameter in zero.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    photos = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    graph = stage.trace(zero, SIZE)
    session = stage.open_file(stage.specialize(graph, other, 1).SerializeToString(), 1)
    wanted = torch.from_numpy(edit(other, common.to_float(photos), "oil"))
    assert (stage.run_onnx(session, photos) - wanted).abs().max() < 1e-4
    args = argparse.Namespace(precision="fp32", io="float32")
    assert stage.prove(session, "oil", other, photos, args)["max difference"] < 1e-4
    torch.nn.init.constant_(other.out.bias, torch.nan)
    for name, generator in (("sketch", other), ("oil", zero), ("oil", other)):
        with pytest.raises(common.UserError, match="differs from PyTorch"):
            stage.prove(session, name, generator, photos, args)


def test_apply_pictures_of_any_kind(stage, dynamic, exported, tmp_path):
    """In a folder that holds the files alone, as an app has them."""
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    picture(tmp_path / "photos/side.jpg", 50, 30, exif=turned)
    picture(tmp_path / "photos/deep/clear.png", 45, 21, "RGBA")
    picture(tmp_path / "photos/deep/side.gif", 17, 40, "P")
    picture(tmp_path / "photos/deep/side.png", 16, 41)
    picture(tmp_path / "photos/tiny.webp", 3, 2)
    (tmp_path / "photos/readme.txt").write_text("not a picture, and not taken for one")
    shutil.copy(dynamic / "oil.onnx", tmp_path / "free.onnx")
    shutil.copy(exported / "oil.onnx", tmp_path / "fixed.onnx")
    flags = "--model free.onnx --model fixed.onnx --apply photos --out out"
    stage("06", *flags.split(), cwd=tmp_path)
    sizes = {"side.png": (30, 50), "deep/clear.png": (45, 21), "tiny.png": (3, 2)}
    sizes |= {"deep/side.gif.png": (17, 40), "deep/side.png.png": (16, 41)}
    for name in ("free", "fixed"):
        folder, made = tmp_path / "out-applied" / name, {}
        for path in folder.rglob("*.png"):
            made[path.relative_to(folder).as_posix()] = Image.open(path).size
        assert made == sizes
        assert Image.open(folder / "deep/clear.png").mode == "RGBA"
        assert Image.open(folder / "side.png").mode == "RGB"


def test_alpha_is_kept_and_hides_nothing(load_stage, dynamic, tmp_path):
    """The colours below are edited as they are, and the edit is as transparent as the picture."""
    stage, rng = load_stage("06"), np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 24, 4), dtype=np.uint8)
    common.write_png(tmp_path / "in/clear.png", Image.fromarray(rgba))
    stage.apply_files([dynamic / "oil.onnx"], tmp_path / "in", tmp_path / "out")
    made = np.asarray(Image.open(tmp_path / "out/oil/clear.png"))
    session = stage.open_file(dynamic / "oil.onnx", 1)
    wanted = stage.edit_picture(session, Image.fromarray(rgba[..., :3]))
    assert (made[..., 3] == rgba[..., 3]).all() and (made[..., :3] == np.asarray(wanted)).all()


def test_apply_equals_pytorch_on_the_whole_picture(world, load_stage, dynamic):
    stage, base = load_stage("06"), common.load_generator(world / "base/generator.safetensors")
    pixels = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    made = stage.edit_picture(stage.open_file(dynamic / "oil.onnx", 1), common.to_pil(pixels))
    wanted = training.run_generator(base, pixels[None], base.concept("oil"))[0]
    assert (common.to_pixels(made).int() - wanted.int()).abs().max() <= 1


def test_demo_finds_its_generators_and_adapters(load_stage, tmp_path, monkeypatch):
    parse = load_stage("06").parse
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo/lora").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", [script("06"), "--demo"])
    args, runs = parse(), common.Path("runs/demo")
    assert args.generator == [runs / f"{x}/generator.safetensors" for x in ("base", "coronet")]
    assert (args.adapter, args.pairs, args.size) == ([runs / "lora"], runs / "pairs", 256)
    monkeypatch.setattr("sys.argv", [script("06"), "--demo", "--generator", "x"])
    assert parse().adapter is None  # which need not fit another generator


def test_bad_input(world, error_of, tmp_path):
    def ends(flags):
        return error_of("06", *flags_of(world, flags), "--out", tmp_path / "out")

    base = "--generator W/base/generator.safetensors"
    assert "multiple of 8" in ends(f"{base} --size 60")
    assert "does not exist" in ends(f"{base} --adapter W/none")
    assert "unknown concept 'fog'" in ends(f"{base} --adapter W/lora --concept fog")
    other = "--generator W/coronet/generator.safetensors"
    assert "another base" in ends(f"{other} --adapter W/lora")
    assert "from 0 to 1.5" in ends(f"{base} --strength 2")
    data = (world / "base/generator.safetensors").read_bytes()
    (world / "cut.safetensors").write_bytes(data[:5000])
    assert "truncated" in ends("--generator W/cut.safetensors")
    assert "is no generator of ours" in ends("--generator W/lora/night/adapter.safetensors")
    assert "01_distill_pairs.py" in ends(f"{base} --pairs W/none")
    (world / "broken").mkdir()
    assert "holds no pictures" in ends(f"{base} --photos W/broken")
    (world / "broken/photo.png").write_bytes(b"no picture")
    assert "photo.png is not a picture" in ends(f"{base} --photos W/broken")
    assert not (tmp_path / "out").exists()


def test_bad_input_of_apply(world, exported, dynamic, error_of, tmp_path):
    def ends(model, pictures):
        flags = ("--model", model, *(["--apply", pictures] if pictures else []))
        return error_of("06", *flags, "--out", tmp_path / "out")

    file, broken = exported / "oil.onnx", tmp_path / "broken.png"
    assert "needs --apply" in ends(file, None)
    assert "cannot run" in ends(tmp_path / "none.onnx", world / "photos")
    assert "does not exist" in ends(file, tmp_path / "none")
    assert "holds no pictures" in ends(file, tmp_path)
    broken.write_bytes(b"no picture")
    assert "broken.png is not a picture" in ends(file, tmp_path)
    assert "cannot run" in ends(broken, world / "photos")
    (tmp_path / "huge").mkdir()
    Image.new("L", (5000, 5000)).save(tmp_path / "huge/huge.png")
    line = ends(dynamic / "oil.onnx", tmp_path / "huge")
    assert "make it smaller" in line and "without --dynamic" in line


def test_strength_scales_what_is_merged(world, load_stage):
    base, adapter = world / "base/generator.safetensors", world / "lora/night/adapter.safetensors"
    weights = {}
    for strength in (0, 0.5, 1):
        source = load_stage("06").load_sources([base], [adapter], strength)["night"][-1]
        weights[strength] = source.up1.conv.weight
        assert json.dumps(source.config["concepts"]).count("name") == 1
    assert torch.equal(weights[0], common.load_generator(base).up1.conv.weight)
    assert torch.allclose(weights[0.5], (weights[0] + weights[1]) / 2, atol=1e-6)
    assert not torch.equal(weights[0], weights[1])
