"""Stage 6: the file computes what PyTorch computes, with the adapter merged and the prompt inside, and stands alone."""

import functools
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common

SIZE = 32
CONCEPTS = ("sketch", "oil", "night")


def new_generator(arch="e2gan", concepts=("sketch", "oil"), seed=0):
    """Random weights, biases and prompts (of unequal lengths): nothing is zero by chance."""
    torch.manual_seed(seed)
    text = dict(tokens=5, text_dim=12, clip="ViT-S-32:random") if arch == "e2gan" else {}
    arch = arch.removesuffix(" without text")
    concepts = [{"name": name, "prompt": f"make it {name}"} for name in concepts]
    generator = common.build_network(
        common.generator_config(arch, 8, SIZE, concepts, **text)
    ).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    if text:
        common.set_tokens(generator, [torch.randn(3 + i, 12) for i in range(len(concepts))])
    return generator


def add_adapter(folder, base_path, concept):
    base = common.load_generator(base_path)
    common.add_concept(base, concept, f"make it {concept}", torch.randn(4, 12))
    common.add_lora(base, {"down1.conv": 2, "blocks.tb.feed1": 1, "up1.conv": 2}, alpha=1.0)
    for lora in common.lora_layers(base).values():
        torch.nn.init.normal_(lora.lora_B, 0, 0.05)
    common.save_adapter(folder / concept / "adapter.safetensors", base, concept, base.sha256, 1.0)
    return folder / concept / "adapter.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs of three concepts, a base for two of them, a pruned one for `sketch`, an adapter for `night`."""
    root = tmp_path_factory.mktemp("world")
    rng, rows = np.random.default_rng(0), {"train": [], "test": []}
    for split in rows:
        for folder in ("source", *CONCEPTS):
            (root / "pairs" / split / folder).mkdir(parents=True)
            for i in range(4):
                pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(
                    np.uint8
                )
                Image.fromarray(pixels).save(root / "pairs" / split / folder / f"{i:05}.png")
                rows[split] += (
                    [{"file_name": f"{folder}/{i:05}.png", "concept": folder}]
                    if folder != "source"
                    else []
                )
        lines = "".join(json.dumps(row) + "\n" for row in rows[split])
        common.write_text(root / "pairs" / split / "metadata.jsonl", lines)
    common.write_json(
        root / "pairs/concepts.json", {name: {"prompt": f"make it {name}"} for name in CONCEPTS}
    )
    common.save_network(root / "base/generator.safetensors", new_generator())
    pruned = new_generator(concepts=("sketch",), seed=1)
    common.save_network(root / "coronet/generator.safetensors", halved(pruned))
    add_adapter(root / "lora", root / "base/generator.safetensors", "night")
    return root


@pytest.fixture(scope="module")
def export(world, load_stage):
    """export(*flags, out="name") runs the stage in this process on what `world` holds, and returns its folder. Tracing
    takes seconds, so a generator is traced once with the same options."""
    module, traced = load_stage("06"), {}
    module.export_reference = functools.cache(module.export_reference)
    trace = module.trace

    def trace_once(generator, *options):
        key = getattr(generator, "sha256", None), *options
        if key not in traced:
            traced[key] = trace(generator, *options)
        return traced[key]

    module.trace = trace_once

    def call(*flags, out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "sys.argv",
                [
                    "06",
                    "--pairs",
                    str(world / "pairs"),
                    "--size",
                    str(SIZE),
                    "--threads",
                    "1",
                    "--out",
                    str(world / out),
                    *map(str, flags),
                ],
            )
            module.main()
        return world / out

    return call


@pytest.fixture(scope="module")
def exported(world, export):
    return export(
        "--generator",
        world / "base/generator.safetensors",
        "--adapter",
        world / "lora",
        "--generator",
        world / "coronet/generator.safetensors",
        out="onnx",
    )


@pytest.fixture(scope="module")
def dynamic(world, export):
    """The base's concepts in the other form: bytes, and any height and width."""
    return export(
        "--generator",
        world / "base/generator.safetensors",
        "--io",
        "uint8",
        "--dynamic",
        "--promptable",
        out="dynamic",
    )


def run_file(path, photo):
    return onnxruntime.InferenceSession(path).run(None, {"photo": photo.numpy()})[0]


def edit(generator, photo, concept):
    with torch.no_grad():
        return generator(photo, torch.full((len(photo),), generator.concept(concept))).numpy()


def halved(network):
    return common.slice_network(
        network, {group: torch.arange(0, n, 2) for group, n in network.config["widths"].items()}
    )


def test_each_file_equals_its_generator(world, exported):
    photo = torch.rand(3, 3, SIZE, SIZE) * 2 - 1  # a batch that the tracer has not seen
    adapted = common.load_generator(world / "base/generator.safetensors")
    common.load_adapter(adapted, world / "lora/night/adapter.safetensors")
    sources = dict(
        oil=common.load_generator(world / "base/generator.safetensors"),
        night=adapted,
        sketch=common.load_generator(world / "coronet/generator.safetensors"),
    )
    assert {path.stem for path in exported.glob("*.onnx")} == sources.keys()
    for name, generator in sources.items():
        assert (
            np.abs(run_file(exported / f"{name}.onnx", photo) - edit(generator, photo, name)).max()
            < 1e-4
        )
    assert np.abs(edit(adapted, photo, "night") - edit(sources["oil"], photo, "oil")).max() > 0.01


def test_file_stands_alone(world, exported, tmp_path):
    shutil.copy(exported / "night.onnx", tmp_path)
    model = onnx.load(tmp_path / "night.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["photo", "edit"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about == {
        "concept": "night",
        "prompt": "make it night",
        "size": "32x32",
        "value range": "-1..1, RGB, NCHW",
        "precision": "fp32",
        "multiple": "8",
        "attention heads": "4",
        "base sha256": common.sha256(world / "base/generator.safetensors"),
    }
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in model.graph.input
    ]
    assert shapes == [["batch", 3, SIZE, SIZE]]
    assert not any(
        "prompt" in node.input for node in model.graph.node
    )  # what it leads to is computed already


def test_result(exported):
    result = common.read_json(exported / "result.json")
    rows = {row["concept"]: row for row in result["tables"]["ONNX files"]}
    assert {name: row.get("from") for name, row in rows.items()} == {
        "sketch": "pruned",
        "oil": "base",
        "night": "base + adapter",
        "(resnet9, untrained)": None,
    }
    assert all(rows[name]["max difference"] <= 1e-3 and rows[name]["ms"] > 0 for name in CONCEPTS)
    assert (
        rows["sketch"]["GMACs"] < rows["oil"]["GMACs"] and rows["sketch"]["KB"] < rows["oil"]["KB"]
    )
    assert common.read_image(exported / "comparison.png").shape[1] > 3 * 160


def test_done_already_and_one_concept(world, export, exported, capsys):
    flags = ("--generator", world / "base/generator.safetensors", "--adapter", world / "lora")
    assert {
        path.stem for path in export(*flags, "--concept", "night", out="one").glob("*.onnx")
    } == {"night"}
    before = (world / "one/night.onnx").stat().st_mtime_ns
    export(*flags, "--concept", "night", out="one")
    assert (
        "done already" in capsys.readouterr().out
        and (world / "one/night.onnx").stat().st_mtime_ns == before
    )


@pytest.mark.parametrize("arch", ["resnet9", "unet256", "e2gan without text"])
def test_architectures_without_prompt(world, export, tmp_path, arch):
    generator = new_generator(arch, ("oil",))
    common.save_network(tmp_path / "generator.safetensors", generator)
    out = export("--generator", tmp_path / "generator.safetensors", out=arch)
    photo = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    assert np.abs(run_file(out / "oil.onnx", photo) - edit(generator, photo, "oil")).max() < 1e-4


@pytest.fixture(scope="module")
def directions(world):
    """What a CycleGAN run of stage 5 leaves: resnet9 one way, a pruned e2gan without text the other."""
    for arch, way, shape in (
        ("resnet9", "AtoB", lambda network: network),
        ("e2gan without text", "BtoA", halved),
    ):
        generator = new_generator(arch, (way,))
        generator.config["concepts"] = [{"name": way, "prompt": way}]
        common.save_network(world / f"cyclegan/generator_{way}.safetensors", shape(generator))
    picture(world / "photos/wide.png", 60, 40)
    picture(world / "photos/high.jpg", 30, 50)
    return [
        flag
        for way in ("AtoB", "BtoA")
        for flag in ("--generator", world / f"cyclegan/generator_{way}.safetensors")
    ]


def test_both_directions_of_cyclegan_without_pairs(world, export, directions):
    """Photos of any kind prove and calibrate what never saw a pair; --apply edits with both files."""
    photos = ("--photos", world / "photos", "--pairs", world / "none")
    out = export(
        *directions, *photos, "--io", "uint8", "--apply", world / "photos", out="cyclegan-bytes"
    )
    photo = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    for way, kind in (("AtoB", "base"), ("BtoA", "pruned")):
        generator = common.load_generator(world / f"cyclegan/generator_{way}.safetensors")
        made = run_file(out / f"{way}.onnx", photo.permute(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        wanted = common.run_generator(generator, photo, 0).numpy()
        assert np.abs(made.astype(int) - wanted).max() <= 1
        assert {path.name for path in (out / "applied" / way).iterdir()} == {"wide.png", "high.png"}
        row = next(
            row
            for row in common.read_json(out / "result.json")["tables"]["ONNX files"]
            if row["concept"] == way
        )
        assert row["from"] == kind and row["PSNR dB"] is None
    out = export(*directions, "--precision", "int8", *photos, out="cyclegan-int8")
    for row in common.read_json(out / "result.json")["tables"]["ONNX files"][:2]:
        assert row["dB to PyTorch"] >= 30


@pytest.mark.parametrize(
    "flags", [[], ["--io", "uint8"], ["--precision", "fp16"], ["--precision", "int8"]], ids=" ".join
)
def test_dcgan(world, export, tmp_path, flags):
    """Noise in, pictures of its own size out, as many as one likes, without photos or pairs."""
    generator = halved(common.build_network(common.generator_config("dcgan", 8, 16, [])))
    for up in generator.ups:
        torch.nn.init.normal_(up.weight, 0, 0.15)
    for norm in generator.norms:
        torch.nn.init.normal_(norm.running_mean, 0, 0.1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1)
    common.save_network(tmp_path / "generator.safetensors", generator)
    out = export(
        "--generator",
        tmp_path / "generator.safetensors",
        "--pairs",
        world / "none",
        *flags,
        out="-".join(["dcgan", *flags]),
    )
    noise = torch.randn(5, 100)
    with torch.no_grad():
        wanted = generator.eval()(noise)
    session = onnxruntime.InferenceSession(out / "dcgan.onnx")
    made = torch.from_numpy(session.run(["picture"], {"noise": noise.numpy()})[0])
    if "uint8" in flags:
        assert made.dtype == torch.uint8 and made.shape == (5, 16, 16, 3)
        made = common.to_float(made.permute(0, 3, 1, 2))
    assert common.psnr(made, wanted).mean() > (30 if "int8" in flags else 45) and wanted.std() > 0.1
    assert flags or (made - wanted).abs().max() < 1e-3
    assert session.get_modelmeta().custom_metadata_map["input"] == "noise of N(0, 1)"
    row, reference = common.read_json(out / "result.json")["tables"]["ONNX files"]
    assert (
        row["size px"] == reference["size px"] == 16 and row["from"] == "pruned" and row["ms"] > 0
    )
    assert common.read_image(out / "comparison.png").shape[2] > 6 * 160
    assert row["layers"] == {"fp16": "all fp16", "int8": "1 of 1 ConvTranspose, 8 of 8 Conv"}.get(
        flags[-1] if flags else "", "all float"
    )


def test_dcgan_edits_no_photos(world, error_of, tmp_path):
    common.save_network(
        tmp_path / "generator.safetensors",
        common.build_network(common.generator_config("dcgan", 4, 8, [])),
    )
    flags = ("--generator", tmp_path / "generator.safetensors", "--out", tmp_path / "out")
    for more in (
        ("--apply", world / "pairs"),
        ("--dynamic",),
        ("--promptable",),
        ("--generator", world / "base/generator.safetensors"),
    ):
        assert "from noise" in error_of("06", *flags, *more)
    assert not (tmp_path / "out").exists()


def test_bytes_of_any_size(world, dynamic):
    base = common.load_generator(world / "base/generator.safetensors")
    for shape in ((1, 3, 24, 56), (2, 3, 48, 40)):
        photo = torch.randint(0, 256, shape, dtype=torch.uint8)
        made = run_file(dynamic / "oil.onnx", photo.permute(0, 2, 3, 1))
        wanted = torch.from_numpy(edit(base, common.to_float(photo), "oil"))
        wanted = common.to_uint8(wanted).permute(0, 2, 3, 1).numpy()
        assert made.dtype == np.uint8 and np.abs(made.astype(int) - wanted).max() <= 1
        assert (made == wanted).mean() > 0.99


def test_promptable(world, dynamic):
    """One file, any prompt: of known ones the features lie beside it, and an unknown one may have any length."""
    base, session = (
        common.load_generator(world / "base/generator.safetensors"),
        onnxruntime.InferenceSession(dynamic / "promptable.onnx"),
    )
    photo, texts = (
        torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8),
        load_file(dynamic / "prompts.safetensors"),
    )
    assert texts.keys() == {"sketch", "oil"}
    for text in (*texts.values(), torch.randn(1, 7, 12)):
        made = session.run(
            None, {"photo": photo.permute(0, 2, 3, 1).numpy(), "text": text.numpy()}
        )[0]
        with torch.no_grad():
            wanted = (
                common.to_uint8(base.edit(common.to_float(photo), text)).permute(0, 2, 3, 1).numpy()
            )
        assert np.abs(made.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("precision, bar", [("fp16", 45), ("int8", 30)])
def test_precisions(world, export, exported, precision, bar):
    out = export(
        "--generator",
        world / "base/generator.safetensors",
        "--concept",
        "oil",
        "--precision",
        precision,
        out=precision,
    )
    row = common.read_json(out / "result.json")["tables"]["ONNX files"][0]
    photo = torch.stack(
        [common.read_image(path) for path in (world / "pairs/test/source").glob("*.png")]
    )
    photo = common.to_float(photo)
    full, small = (
        torch.from_numpy(run_file(folder / "oil.onnx", photo)) for folder in (exported, out)
    )
    assert common.psnr(full, small).mean() >= bar and row["dB to PyTorch"] >= bar
    assert (out / "oil.onnx").stat().st_size < 0.75 * (exported / "oil.onnx").stat().st_size
    kinds = {node.op_type for node in onnx.load(out / "oil.onnx").graph.node}
    assert ("QuantizeLinear" in kinds) == (precision == "int8")
    assert row["layers"] == dict(fp16="all fp16", int8="9 of 24 Conv, 8 of 12 MatMul")[precision]


def test_film_is_the_norms_own_scale_and_shift(exported):
    nodes = onnx.load(exported / "oil.onnx").graph.node
    normed = {node.output[0] for node in nodes if node.op_type == "InstanceNormalization"}
    assert normed and not any(node.op_type == "Mul" and normed & {*node.input} for node in nodes)


def test_a_missed_bar_writes_nothing(world, load_stage, monkeypatch):
    stage, out = load_stage("06"), world / "missed"
    monkeypatch.setattr(stage, "BARS", dict(fp32=0, fp16=200, int8=200))
    monkeypatch.setattr(stage, "export_reference", lambda *_: (None, {}))
    monkeypatch.setattr(
        "sys.argv",
        [
            "06",
            "--pairs",
            str(world / "pairs"),
            "--size",
            str(SIZE),
            "--out",
            str(out),
            "--generator",
            str(world / "base/generator.safetensors"),
            "--precision",
            "int8",
        ],
    )
    with pytest.raises(common.UserError, match="200 are needed"):
        stage.main()
    assert not list(out.glob("*.onnx")) and not (out / "result.json").exists()


def picture(path, width, height, mode="RGB", **options):
    noise = (
        np.random.default_rng(0)
        .integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
        .astype(np.uint8)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((width, height)).convert(mode).save(path, **options)


def test_apply_pictures_of_any_kind(world, stage, dynamic, exported, tmp_path):
    """In a folder that holds the files alone, as an app has them."""
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    picture(tmp_path / "photos/side.jpg", 50, 30, exif=turned)
    picture(tmp_path / "photos/deep/clear.png", 45, 21, "RGBA")
    picture(tmp_path / "photos/deep/side.gif", 17, 40, "P")
    picture(tmp_path / "photos/tiny.webp", 3, 2)
    (tmp_path / "photos/readme.txt").write_text("not a picture, and not taken for one")
    shutil.copy(dynamic / "oil.onnx", tmp_path / "free.onnx")
    shutil.copy(exported / "oil.onnx", tmp_path / "fixed.onnx")
    stage(
        "06",
        "--model",
        "free.onnx",
        "--model",
        "fixed.onnx",
        "--apply",
        "photos",
        "--out",
        "out",
        cwd=tmp_path,
    )
    for name in ("free", "fixed"):
        made = {
            path.relative_to(tmp_path / "out/applied" / name).as_posix(): Image.open(path)
            for path in (tmp_path / "out/applied" / name).rglob("*.png")
        }
        assert {path: image.size for path, image in made.items()} == {
            "side.png": (30, 50),
            "deep/clear.png": (45, 21),
            "deep/side.png": (17, 40),
            "tiny.png": (3, 2),
        }
        assert made["deep/clear.png"].mode == "RGBA" and made["side.png"].mode == "RGB"
    assert Image.open(tmp_path / "out/applied/comparison.png").height > 4 * 240


def test_alpha_is_kept_apart_and_deep_channels_are_scaled(load_stage, tmp_path):
    stage, rgba = (
        load_stage("06"),
        np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8),
    )
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rgba[..., 0].astype(np.float32) / 255).save(tmp_path / "float.tif")
    pixels, alpha = stage.read_picture(tmp_path / "clear.png")
    assert (pixels.permute(1, 2, 0).numpy() == rgba[..., :3]).all() and (
        np.asarray(alpha) == rgba[..., 3]
    ).all()
    for name in ("deep.png", "float.tif"):
        pixels, alpha = stage.read_picture(tmp_path / name)
        assert (pixels.numpy() == rgba[..., 0]).all() and alpha is None


def test_apply_equals_pytorch_on_the_whole_picture(world, load_stage, dynamic):
    stage, base = load_stage("06"), common.load_generator(world / "base/generator.safetensors")
    pixels = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    made = stage.edit_picture(stage.open_file(dynamic / "oil.onnx", 1), pixels)
    wanted = common.run_generator(base, pixels[None], base.concept("oil"))[0]
    assert (made.int() - wanted.int()).abs().max() <= 1


def test_zero_biases_are_not_mixed_up(load_stage):
    """A trace of a network with equal constants serves one with unequal ones."""
    stage, zero, other = load_stage("06"), new_generator(), new_generator(seed=2)
    for name, parameter in zero.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    text = other.tokens[:1]
    photos = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    session = stage.open_file(
        stage.bake(stage.trace(zero, SIZE), other, text).SerializeToString(), 1
    )
    assert (
        stage.run_onnx(session, photos) - stage.run_torch(other, photos, text)
    ).abs().max() < 1e-4


def test_bad_input(world, error_of, load_stage, tmp_path):
    base, lora = world / "base/generator.safetensors", world / "lora"
    flags = ("--pairs", world / "pairs", "--size", SIZE, "--out", tmp_path / "out")
    assert "multiples of 8" in error_of("06", *flags, "--generator", base, "--size", 60)
    assert "does not exist" in error_of(
        "06", *flags, "--generator", base, "--adapter", tmp_path / "none"
    )
    assert "unknown concept 'fog'" in error_of(
        "06", *flags, "--generator", base, "--adapter", lora, "--concept", "fog"
    )
    other = world / "coronet/generator.safetensors"
    assert "which is none of" in error_of("06", *flags, "--generator", other, "--adapter", lora)
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:5000])
    assert "truncated" in error_of(
        "06", *flags, "--generator", tmp_path / "cut.safetensors", "--adapter", lora
    )
    assert "is no generator or dcgan generator of ours" in error_of(
        "06", *flags, "--generator", lora / "night/adapter.safetensors"
    )
    assert "01_distill_pairs.py" in error_of(
        "06", *flags, "--generator", base, "--pairs", tmp_path / "none"
    )
    assert not (tmp_path / "out").exists()


def test_bad_input_of_apply(world, exported, dynamic, error_of, tmp_path):
    file, flags = exported / "oil.onnx", ("--out", tmp_path / "out")
    assert "needs --apply" in error_of("06", "--model", file, *flags)
    assert "does not exist" in error_of(
        "06", "--model", tmp_path / "none.onnx", "--apply", tmp_path, *flags
    )
    assert "does not exist" in error_of("06", "--model", file, "--apply", tmp_path / "none", *flags)
    assert "holds no pictures" in error_of("06", "--model", file, "--apply", tmp_path, *flags)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "broken.png is not a picture" in error_of(
        "06", "--model", file, "--apply", tmp_path, *flags
    )
    assert "cannot run" in error_of(
        "06", "--model", tmp_path / "broken.png", "--apply", tmp_path, *flags
    )
    assert "takes photo and text" in error_of(
        "06", "--model", dynamic / "promptable.onnx", "--apply", tmp_path / "broken.png", *flags
    )
    (tmp_path / "huge").mkdir()
    Image.new("L", (5000, 5000)).save(tmp_path / "huge/huge.png")
    line = error_of("06", "--model", dynamic / "oil.onnx", "--apply", tmp_path / "huge", *flags)
    assert "make it smaller" in line and "without --dynamic" in line


def test_strength_scales_what_is_merged(world, load_stage, error_of):
    base, adapter = world / "base/generator.safetensors", world / "lora/night/adapter.safetensors"
    weights = {
        strength: load_stage("06").load_sources([base], [adapter], strength)[1].up1.conv.weight
        for strength in (0, 0.5, 1)
    }
    assert torch.equal(weights[0], common.load_generator(base).up1.conv.weight)
    assert torch.allclose(
        weights[0.5], (weights[0] + weights[1]) / 2, atol=1e-6
    ) and not torch.equal(weights[0], weights[1])
    assert "must be from 0 to 1.5" in error_of(
        "06", "--generator", base, "--adapter", adapter, "--strength", 2
    )
