"""Stage 6: the folder's graph with the base's and an adapter's own files, and a merged file that
stands alone, compute what PyTorch computes."""

import argparse
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_pipelines
import torch
from conftest import ROOT, random_rows, run_main, run_python, script, table, write_adapter
from PIL import Image

import common
import dataset
import runs
import training
from assets.editor import Editor, Merged
from assets.serve import fetch_runtime

SIZE = 32
BASE = "--generator W/base/generator.safetensors"
PRUNED = "--generator W/coronet/generator.safetensors"
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
    """Pairs of three concepts, a base for two of them, a pruned one for `sketch`, adapters for
    `night` and `fog`; what a CycleGAN run of stage 5 leaves: resnet9 one way, a pruned e2gan the
    other; and photos of any size."""
    root = tmp_path_factory.mktemp("world")
    edits = {"sketch": lambda x: 1 - x, "oil": lambda x: 0.5 * x, "night": lambda x: x**2}
    write_pairs(root / "pairs", edits, train=4, test=5, size=SIZE)
    (root / "pairs/test/oil/00004.png").unlink()  # an edit that stage 1 rejected
    base = new_generator()
    torch.nn.init.zeros_(base.films["rb0_1"].bias)  # as a fresh one's, which must not be lost
    common.save_network(root / "base/generator.safetensors", base)
    pruned = halved(new_generator(concepts=("sketch",), seed=1))
    common.save_network(root / "coronet/generator.safetensors", pruned)
    base = common.load_generator(root / "base/generator.safetensors")
    write_adapter(root / "lora/night/adapter.safetensors", base, "night", RANKS)
    write_adapter(root / "lora/fog/adapter.safetensors", base, "fog", {"out": 3, "up2.conv": 1})
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
    given = f"--cdn --pairs W/pairs --size {SIZE} --threads 1 {flags}"
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
        run_main(module, *flags_of(world, flags))
        out = world / flags.split("--out W/")[1].split()[0]
        return {row["concept"]: row for row in table(out, "ONNX files")}

    return call


@pytest.fixture(scope="module")
def folder(world, export):
    export(f"{BASE} --adapter W/lora --out W/folder")
    return world / "folder"


@pytest.fixture(scope="module")
def exported(world, export):
    export(f"--merged {BASE} {PRUNED} --adapter W/lora/night --out W/onnx")
    return world / "onnx"


@pytest.fixture(scope="module")
def dynamic(world, export):
    """The base's concepts in the other form: bytes, and any height and width."""
    export(f"--merged {BASE} --io uint8 --dynamic --out W/dynamic")
    return world / "dynamic"


@pytest.fixture
def adapted(world):
    """adapted(night=0.5, fog=1) is the base with these adapters at these strengths."""

    def load(**strengths):
        generator = common.load_generator(world / "base/generator.safetensors")
        for name, strength in strengths.items():
            common.load_adapter(generator, world / f"lora/{name}/adapter.safetensors", strength)
        return generator

    return load


def run_file(path, photo):
    return onnxruntime.InferenceSession(path).run(None, {"photo": photo.numpy()})[0]


def edit(generator, photo, concept):
    with torch.no_grad():
        return generator(photo, torch.full((len(photo),), generator.concept_index(concept))).numpy()


def pixels_of(width, height, seed=0):
    """uint8 (1, 3, height, width)"""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=rng)


def distance(editor, generator, concept, pixels):
    """Of an editor's bytes from PyTorch's, at most."""
    made = editor.edit(pixels[0].permute(1, 2, 0).numpy())
    wanted = training.run_generator(generator, pixels, generator.concept_index(concept))[0]
    return np.abs(made.astype(int) - wanted.permute(1, 2, 0).numpy()).max()


def test_folder_holds_the_files_themselves(world, folder):
    index = runs.read_json(folder / "index.json")
    originals = {"base.onnx": folder / "base.onnx"}
    originals["base.safetensors"] = world / "base/generator.safetensors"
    for name in ("night", "fog"):
        originals[f"adapters/{name}.safetensors"] = world / f"lora/{name}/adapter.safetensors"
    assert index["files"].keys() == originals.keys()
    for name, about in index["files"].items():
        data = (folder / name).read_bytes()
        assert (about["bytes"], about["sha256"]) == (len(data), runs.sha256(originals[name]))
    assert [x["name"] for x in index["concepts"]] == ["sketch", "oil", "fog", "night"]
    assert index["concepts"][3]["prompt"] == "make it night" and index["transposed"] == []
    assert index["web"].startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.")
    for name in ("index.html", "editor.js", "editor.py", "photo.jpg", "thumbnails/night.jpg"):
        assert (folder / name).stat().st_size
    model = onnx.load(folder / "base.onnx", load_external_data=False)
    assert (folder / "base.onnx").stat().st_size < 100_000 and model.ir_version == 8
    weights = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    base = common.load_generator(folder / "base.safetensors")
    assert weights == {name for name, _ in base.named_parameters()}
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    session = onnxruntime.InferenceSession(folder / "base.onnx")  # finds them itself
    assert [value.name for value in session.get_inputs()] == ["photo", "text"]


def test_editor_equals_pytorch(folder, adapted):
    editor, photo = Editor(folder, threads=1), pixels_of(45, 38)
    padded = torch.from_numpy(np.pad(photo.numpy(), ((0, 0), (0, 0), (0, 2), (0, 3)), "symmetric"))
    made = editor.use("oil").edit(photo[0].permute(1, 2, 0).numpy())
    whole = editor.edit(padded[0].permute(1, 2, 0).numpy())
    assert made.shape == (38, 45, 3) and (whole[:38, :45] == made).all()
    assert distance(editor, adapted(), "oil", padded) <= 1
    for x in (0, 0.6, 1.5):
        assert distance(editor.use("night", x), adapted(night=x), "night", padded) <= 1


def test_a_mixture_is_of_weights_and_of_prompts(folder, adapted):
    editor, photo = Editor(folder, threads=1), pixels_of(40, 32)

    def mix(generator, shares):
        """The generator, which then knows `mixture`: prompts in proportion to these shares."""
        prompts = {concept["name"]: tokens for concept, tokens in generator.known_concepts()}
        length = max(len(prompts[name]) for name in shares)
        mixture = 0
        for name, share in shares.items():
            rest = prompts[name].mean(0).tile(length - len(prompts[name]), 1)
            mixture = mixture + share * torch.cat([prompts[name], rest])
        generator.set_known_concepts([({"name": "mixture", "prompt": ""}, mixture)])
        return generator

    both = mix(adapted(night=0.8, fog=0.4), {"night": 2 / 3, "fog": 1 / 3})
    assert distance(editor.use({"fog": 0.4, "night": 0.8}), both, "mixture", photo) <= 1
    assert distance(editor.use({"fog": 0.8, "night": 0.4}), both, "mixture", photo) > 1
    # of the base's own, whose prompts are of unequal length
    styles = mix(adapted(), {"sketch": 1 / 4, "oil": 3 / 4})
    assert distance(editor.use({"sketch": 0.5, "oil": 1.5}), styles, "mixture", photo) <= 1
    assert distance(editor.use("oil"), styles, "mixture", photo) > 1
    assert distance(editor.use({"sketch": 0, "oil": 0.5}), adapted(), "oil", photo) <= 1
    mixed = mix(adapted(night=1), {"night": 0.5, "oil": 0.5})
    assert distance(editor.use({"oil": 1, "night": 1}), mixed, "mixture", photo) <= 1


def test_weights_from_outside_equal_merged_ones(world, folder, exported, load_stage, tmp_path):
    """In floats, which say more than bytes."""
    stage = load_stage("06")
    shutil.copytree(folder, tmp_path / "float")
    base = common.load_generator(folder / "base.safetensors")
    graph = stage.separate(stage.trace(base, SIZE), folder / "base.safetensors")
    onnx.save(graph, tmp_path / "float/base.onnx")
    index = runs.read_json(folder / "index.json")
    index["files"]["base.onnx"]["sha256"] = runs.sha256(tmp_path / "float/base.onnx")
    runs.write_json(tmp_path / "float/index.json", index)
    editor, photos = Editor(tmp_path / "float", threads=1), []
    for file in (world / "pairs/test/source").glob("*.png"):
        photos.append(dataset.to_float(dataset.read_image(file)))
    for name in ("oil", "night"):
        editor.use(name)
        merged = run_file(exported / f"{name}.onnx", torch.stack(photos))
        feeds = {"photo": torch.stack(photos).numpy(), **editor.text}
        assert np.abs(editor.session.run(None, feeds)[0] - merged).max() < 1e-4


@pytest.mark.parametrize("arch, layer", [("resnet9", "up1.conv"), ("unet256", "ups.1")])
def test_transposed_layers_and_no_prompt(world, export, arch, layer):
    common.save_network(world / f"{arch}.safetensors", new_generator(arch, ("oil",), text=False))
    generator = common.load_generator(world / f"{arch}.safetensors")
    adapter = world / f"{arch}-lora/adapter.safetensors"
    write_adapter(adapter, generator, "night", {layer: 2})
    export(f"--generator W/{arch}.safetensors --adapter {adapter} --out W/{arch}")
    assert layer in runs.read_json(world / arch / "index.json")["transposed"]
    editor, photo = Editor(world / arch, threads=1), pixels_of(SIZE, SIZE)
    assert distance(editor.use("oil"), generator, "oil", photo) <= 1
    common.load_adapter(generator, adapter, 0.7)
    assert distance(editor.use("night", 0.7), generator, "night", photo) <= 1
    assert distance(editor.use("oil"), generator, "night", photo) > 1


def test_editor_as_in_readme_without_torch(folder, tmp_path):
    export = (ROOT / "README.md").read_text().split("## Export")[1]
    code = export.split("```python\n")[1].split("```")[0]
    (tmp_path / "runs").mkdir()
    shutil.copytree(folder, tmp_path / "runs/onnx")
    Image.fromarray(pixels_of(40, 32)[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg")
    code = code.replace("starry", "night").replace("wave", "fog")
    (tmp_path / "app.py").write_text(f"import sys\nsys.modules['torch'] = None\n{code}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "runs/onnx")}
    subprocess.run([sys.executable, "app.py"], cwd=tmp_path, env=environment, check=True)
    editor = Editor(folder).use("night", strength=0.8)
    wanted = editor.edit(np.asarray(Image.open(tmp_path / "photo.jpg")))
    assert (np.asarray(Image.open(tmp_path / "night.png")) == wanted).all()


def test_editor_believes_no_other_file(world, folder, tmp_path):
    """And what fails leaves the last edit working."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    editor, photo = Editor(copy).use("night"), pixels_of(24, 24)[0].permute(1, 2, 0).numpy()
    before = editor.edit(photo)
    data = (copy / "adapters/fog.safetensors").read_bytes()
    (copy / "adapters/fog.safetensors").write_bytes(data[:1000])
    bad = {"is damaged": "fog", "unknown concept": "snow", "not from 0 to 1.5": {"night": 1.6}}
    bad |= {"no concept is named": {}, "alone it has no strength": {"oil": 0.5}}
    for words, concept in bad.items():
        with pytest.raises(ValueError, match=words):
            editor.use(concept)
    other = common.load_generator(world / "coronet/generator.safetensors")
    write_adapter(tmp_path / "foreign.safetensors", other, "fog", {"out": 1})
    refused = {"another base": tmp_path / "foreign.safetensors"}
    write_bf16(copy / "adapters/night.safetensors", tmp_path / "bf16.safetensors")
    refused["lora_A is BF16, not F16 or F32."] = tmp_path / "bf16.safetensors"
    tensors, metadata = runs.read_tensors(copy / "adapters/night.safetensors", "adapter")
    layer = next(iter(metadata["ranks"]))
    wide = {**tensors, f"{layer}.lora_B": torch.ones(1, 1)}
    runs.write_tensors(tmp_path / "wide.safetensors", wide, metadata)
    refused[f"{layer} does not fit the base"] = tmp_path / "wide.safetensors"
    del tensors[f"{layer}.lora_B"]
    runs.write_tensors(tmp_path / "lacking.safetensors", tensors, metadata)
    refused[f"lacks a tensor of {layer}"] = tmp_path / "lacking.safetensors"
    for words, path in refused.items():
        path = shutil.copy(path, copy / "adapters/fog.safetensors")
        editor.index["files"]["adapters/fog.safetensors"]["sha256"] = runs.sha256(path)
        with pytest.raises(ValueError, match=words):
            editor.use("fog")
    assert (editor.edit(photo) == before).all()
    (copy / "base.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="base.onnx is damaged"):
        Editor(copy)


def write_bf16(adapter, path):
    """An adapter's file with one of its tensors in bf16."""
    tensors, metadata = runs.read_tensors(adapter, "adapter")
    name = next(name for name in tensors if name.endswith("lora_A"))
    tensors[name] = tensors[name].to(torch.bfloat16)
    runs.write_tensors(path, tensors, metadata)


def test_editor_takes_files_pictures_and_arrays(folder, tmp_path):
    editor, pixels = Editor(folder, threads=1), pixels_of(40, 24)[0].permute(1, 2, 0).numpy()
    with pytest.raises(ValueError, match=r"call use\(\) first"):
        editor.edit(pixels)
    edit = editor.use("night").edit(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be seen after a quarter turn clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "phone.png", exif=turned)
    for made in (editor.edit(tmp_path / "phone.png"), editor.edit(str(tmp_path / "phone.png"))):
        assert (np.asarray(made) == edit).all()
    with Image.open(tmp_path / "phone.png") as opened:
        assert (np.asarray(editor.edit(opened)) == edit).all()
    clear = Image.fromarray(pixels)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    made = editor.edit(clear)
    assert (np.asarray(made.convert("RGB")) == edit).all()
    assert (np.asarray(made)[..., 3] == np.asarray(clear)[..., 3]).all()
    clear.convert("RGB").save(tmp_path / "wide.png", icc_profile=tiny_pipelines.display_p3())
    in_srgb = np.asarray(dataset.read_picture(tmp_path / "wide.png"))
    assert (in_srgb != pixels).any()
    assert (np.asarray(editor.edit(tmp_path / "wide.png")) == editor.edit(in_srgb)).all()
    grey = editor.edit(clear.convert("L"))
    assert (np.asarray(grey) == editor.edit(np.asarray(clear.convert("L").convert("RGB")))).all()
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    bad = [
        pixels[..., 0],
        pixels / 255,
        pixels[:0],
        np.dstack([pixels, pixels]),
        pixels[None],
        None,
    ]
    bad += [Image.new("I;16", (8, 8)), Image.new("RGB", (0, 8)), tmp_path, tmp_path / "broken.jpg"]
    for picture in bad:
        with pytest.raises(ValueError, match="is no picture|no pixels|8 bits|not a picture"):
            editor.edit(picture)


@pytest.mark.parametrize("installed", [True, False])
def test_editor_takes_an_iphones_files(folder, tmp_path, monkeypatch, installed):
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "phone.heic", format="HEIF")
    editor = Editor(folder, threads=1).use("oil")
    if installed:
        assert editor.edit(tmp_path / "phone.heic").size == (64, 48)
        return
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        editor.edit(tmp_path / "phone.heic")


def test_larger_pictures_are_scaled_down(folder, exported, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    editor = Editor(tmp_path / "copy", threads=1).use("oil")
    assert editor.edit_size(4032, 3024) == (967, 725) and editor.edit_size(900, 700) == (900, 700)
    for width, height in ((10**6, 3), (1, 10**6), (846, 845)):
        inner = editor.edit_size(width, height)
        assert np.prod([side + -side % 8 for side in inner]) <= 715541
    editor.index["most pixels"] = 2048
    large = Image.new("RGB", (120, 60), "teal")
    small = editor.edit(large)
    assert small.size == editor.edit_size(120, 60) == (64, 32)
    by_hand = editor.edit(large.resize((64, 32), Image.Resampling.LANCZOS))
    assert (np.asarray(small) == np.asarray(by_hand)).all()
    assert editor.edit(large, full_size=True).size == (120, 60)
    assert editor.edit(np.asarray(large), full_size=True).shape == (60, 120, 3)
    fixed = Merged(exported / "oil.onnx", threads=1)
    assert fixed.edit(large).size == (32, 16) and fixed.edit(large.crop((0, 0, 20, 9))).size == (
        20,
        9,
    )


def test_each_file_equals_its_generator(exported, adapted):
    photo = torch.rand(3, 3, SIZE, SIZE) * 2 - 1  # a batch that the tracer has not seen
    sources = {"oil": adapted(), "sketch": adapted(), "night": adapted(night=1)}
    assert {path.stem for path in exported.glob("*.onnx")} == sources.keys()
    for name, generator in sources.items():
        difference = run_file(exported / f"{name}.onnx", photo) - edit(generator, photo, name)
        assert np.abs(difference).max() < 1e-4


def test_file_stands_alone(world, exported, tmp_path):
    shutil.copy(exported / "night.onnx", tmp_path)
    model = onnx.load(tmp_path / "night.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["photo", "edit"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    assert model.ir_version == 8  # ONNX Runtime of 2023 refuses what says that it is newer
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        **{"concept": "night", "prompt": "make it night", "size": "32x32", "precision": "fp32"},
        **{"value range": "-1..1, RGB, NCHW", "multiple": "8", "most pixels": "715541"},
        "base sha256": runs.sha256(world / "base/generator.safetensors"),
    }
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, SIZE, SIZE]
    # what the prompt leads to is computed already
    assert not any("text" in node.input for node in model.graph.node)


def test_result(world, folder, exported):
    rows = table(folder, "ONNX files")
    assert [row["KB"] for row in rows[:2]] == [0, 0] and 2 < rows[3]["KB"] < 4
    rows = {row["concept"]: row for row in table(exported, "ONNX files")}
    kinds = {"sketch": "base", "oil": "base", "night": "base + adapter"}
    assert {name: row.get("from") for name, row in rows.items()} == kinds
    assert all(rows[name]["max difference"] <= 1e-3 and rows[name]["ms"] > 0 for name in kinds)
    photos, edits = [], []
    for path in sorted((world / "pairs/test/oil").iterdir()):  # the photos that have an edit
        photos.append(dataset.to_float(dataset.read_image(world / "pairs/test/source" / path.name)))
        edits.append(dataset.to_float(dataset.read_image(path)))
    fake = torch.from_numpy(run_file(exported / "oil.onnx", torch.stack(photos)))
    psnr = training.psnr(fake, torch.stack(edits)).mean().item()
    assert len(edits) == 4 and rows["oil"]["PSNR dB"] == pytest.approx(psnr, abs=1e-3)
    # photo, teacher, base, pruned, ONNX; three concepts
    assert dataset.read_image(exported / "comparison.png").shape[1] > 3 * 160
    assert dataset.read_image(exported / "comparison.png").shape[2] > 5 * 160


def test_done_already_and_one_concept(world, export, capsys):
    flags = f"{BASE} --adapter W/lora --concept night --out W/one"
    export(flags)
    assert [x["name"] for x in runs.read_json(world / "one/index.json")["concepts"]] == ["night"]
    before = (world / "one/base.onnx").stat().st_mtime_ns
    export(f"{flags} --apply W/photos")  # which changes nothing of the export
    assert "done already" in capsys.readouterr().out
    assert (world / "one/base.onnx").stat().st_mtime_ns == before
    settings = (world / "one/settings.json").read_text()
    assert str(world) not in settings and (world / "one-applied/night/wide.png").exists()


@pytest.mark.parametrize("way, kind", [("AtoB", "base"), ("BtoA", "pruned")])
def test_cyclegan_without_pairs(world, export, way, kind):
    """Photos of any kind prove and calibrate what never saw a pair, and has no prompt."""
    flags = f"--merged --generator W/cyclegan/generator_{way}.safetensors --photos W/photos "
    flags += "--pairs W/none --io uint8"
    row = export(f"{flags} --apply W/photos --out W/{way}")[way]
    generator = common.load_generator(world / f"cyclegan/generator_{way}.safetensors")
    photo = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    made = run_file(world / f"{way}/{way}.onnx", photo.permute(0, 2, 3, 1))
    wanted = training.run_generator(generator, photo, 0).permute(0, 2, 3, 1).numpy()
    assert np.abs(made.astype(int) - wanted).max() <= 1
    applied = {path.name for path in (world / f"{way}-applied" / way).iterdir()}
    assert applied == {"wide.png", "high.png"}
    assert row["from"] == kind and "PSNR dB" not in row
    row = export(f"{flags} --precision int8 --out W/{way}-int8")[way]
    assert row["dB to PyTorch"] >= 30


def test_bytes_of_any_size(world, dynamic):
    base = common.load_generator(world / "base/generator.safetensors")
    for shape in ((1, 3, 24, 56), (2, 3, 48, 40)):
        photo = torch.randint(0, 256, shape, dtype=torch.uint8)
        made = run_file(dynamic / "oil.onnx", photo.permute(0, 2, 3, 1))
        wanted = torch.from_numpy(edit(base, dataset.to_float(photo), "oil"))
        wanted = dataset.to_uint8(wanted).permute(0, 2, 3, 1).numpy()
        assert made.dtype == np.uint8 and np.abs(made.astype(int) - wanted).max() <= 1
        assert (made == wanted).mean() > 0.99


@pytest.mark.parametrize("precision, least", [("fp16", 45), ("int8", 30)])
def test_precisions(world, export, exported, precision, least):
    flags = f"--merged {BASE} --concept oil --precision {precision} --out W/{precision}"
    row = export(flags)["oil"]
    path, photos = world / precision / "oil.onnx", []
    for file in (world / "pairs/test/source").glob("*.png"):
        photos.append(dataset.to_float(dataset.read_image(file)))
    full = torch.from_numpy(run_file(exported / "oil.onnx", torch.stack(photos)))
    small = torch.from_numpy(run_file(path, torch.stack(photos)))
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


def test_other_runtimes_take_the_graph(exported, dynamic):
    """pnnx (ncnn) loses the axes of reductions; OpenCV crashes on GELU as PyTorch exports it and,
    in 4.14, reads no Split of a constant and no Slice that goes backwards."""
    for path in (exported / "oil.onnx", dynamic / "oil.onnx"):
        graph = onnx.load(path).graph
        constants = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        kinds = [node.op_type for node in graph.node]
        assert not [kind for kind in kinds if kind.startswith("Reduce")]
        gelu = kinds.index("Erf")
        assert kinds[gelu - 1 : gelu + 4] == ["Div", "Erf", "Add", "Mul", "Mul"]
        for node in graph.node:
            assert node.op_type != "Split" or node.input[0] not in constants
            assert node.op_type != "Slice" or len(node.input) < 5 or constants[node.input[4]] > 0
    cv2 = pytest.importorskip("cv2")
    photo = np.random.default_rng(0).uniform(-1, 1, (1, 3, SIZE, SIZE)).astype(np.float32)
    network = cv2.dnn.readNetFromONNX(str(exported / "night.onnx"))
    network.setInput(photo)
    difference = network.forward() - run_file(exported / "night.onnx", torch.tensor(photo))
    assert np.abs(difference).max() < 1e-3
    if int(cv2.__version__.split(".")[0]) < 5:  # which takes no file of any size
        return
    photo = np.random.default_rng(0).integers(0, 256, (1, 40, 48, 3), dtype=np.uint8)
    network = cv2.dnn.readNetFromONNX(str(dynamic / "oil.onnx"))
    network.setInput(photo)
    difference = network.forward().astype(int) - run_file(dynamic / "oil.onnx", torch.tensor(photo))
    assert np.abs(difference).max() <= 1


def test_beyond_tolerance_nothing_is_written(world, load_stage, monkeypatch):
    stage = load_stage("06")
    flags = flags_of(world, f"--merged {BASE} --precision int8 --out W/missed")
    monkeypatch.setitem(stage.TOLERANCE, "int8", (9.0, 200.0))
    with pytest.raises(runs.UserError, match="differs from PyTorch .* 200 are needed"):
        run_main(stage, *flags)
    assert [path.name for path in (world / "missed").iterdir()] == ["settings.json"]


def test_a_trace_serves_other_weights_and_prompts(load_stage):
    """Equal constants, such as zero biases, are not taken for one. What differs is found out."""
    stage, zero, other = load_stage("06"), new_generator(), new_generator(seed=2)
    for name, parameter in zero.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    photos = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    graph = stage.trace(zero, SIZE)
    model = stage.open_file(stage.specialize(graph, other, 1).SerializeToString(), 1)
    wanted = torch.from_numpy(edit(other, dataset.to_float(photos), "oil"))
    assert (stage.run_onnx(model, photos) - wanted).abs().max() < 1e-4
    args = argparse.Namespace(precision="fp32", io="float32")
    assert stage.prove(model, "oil", other, photos, args)["max difference"] < 1e-4
    torch.nn.init.constant_(other.out.bias, torch.nan)
    for name, generator in (("sketch", other), ("oil", zero), ("oil", other)):
        with pytest.raises(runs.UserError, match="differs from PyTorch"):
            stage.prove(model, name, generator, photos, args)


def test_apply_pictures_of_any_kind(folder, dynamic, exported, tmp_path):
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
    shutil.copytree(folder, tmp_path / "all")
    models = "--model free.onnx --model fixed.onnx --model all --concept fog"
    flags = f"{models} --apply photos --full-size --out out".split()
    run_python(script("06"), *flags, cwd=tmp_path)
    sizes = {"side.png": (30, 50), "deep/clear.png": (45, 21), "tiny.png": (3, 2)}
    sizes |= {"deep/side.gif.png": (17, 40), "deep/side.png.png": (16, 41)}
    for name in ("free", "fixed", "fog"):
        root, made = tmp_path / "out-applied" / name, {}
        for path in root.rglob("*.png"):
            made[path.relative_to(root).as_posix()] = Image.open(path).size
        assert made == sizes
        assert Image.open(root / "deep/clear.png").mode == "RGBA"
        assert Image.open(root / "side.png").mode == "RGB"


def test_alpha_is_kept_and_hides_nothing(world, export, dynamic, tmp_path):
    """The colours below are edited as they are, and the edit is as transparent as the picture."""
    rgba = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    runs.write_png(tmp_path / "clear.png", Image.fromarray(rgba))
    export(f"--merged {BASE} --io uint8 --dynamic --apply {tmp_path} --out W/dynamic")
    made = np.asarray(Image.open(world / "dynamic-applied/oil/clear.png"))
    wanted = run_file(dynamic / "oil.onnx", torch.from_numpy(rgba[None, ..., :3].copy()))[0]
    assert (made[..., 3] == rgba[..., 3]).all() and (made[..., :3] == wanted).all()


def test_bad_input(world, error_of, tmp_path):
    def ends(flags):
        return error_of("06", *flags_of(world, flags), "--out", tmp_path / "out")

    assert "multiple of 8" in ends(f"{BASE} --size 60")
    assert "does not exist" in ends(f"{BASE} --adapter W/none")
    assert "unknown concept 'haze'" in ends(f"{BASE} --adapter W/lora --concept haze")
    assert "another base" in ends(f"{PRUNED} --adapter W/lora")
    shutil.copytree(world / "lora/fog", world / "twins/fog-again")
    twins = ends(f"{BASE} --adapter W/lora --adapter W/twins")
    assert "twins/fog-again/adapter.safetensors and" in twins and "both called 'fog'" in twins
    (world / "bf16").mkdir()
    write_bf16(world / "lora/night/adapter.safetensors", world / "bf16/adapter.safetensors")
    assert "lora_A is BF16, not F16 or F32." in ends(f"{BASE} --adapter W/bf16")
    assert "flags of --merged" in ends(f"{BASE} --precision int8")
    assert "from 0 to 1.5" in ends(f"{BASE} --strength 2")
    data = (world / "base/generator.safetensors").read_bytes()
    (world / "cut.safetensors").write_bytes(data[:5000])
    assert "truncated" in ends("--generator W/cut.safetensors")
    assert "is no generator of ours" in ends("--generator W/lora/night/adapter.safetensors")
    assert "01_distill_pairs.py" in ends(f"{BASE} --pairs W/none")
    (world / "broken").mkdir()
    assert "holds no pictures" in ends(f"{BASE} --photos W/broken")
    (world / "broken/photo.png").write_bytes(b"no picture")
    assert "photo.png is not a picture" in ends(f"{BASE} --photos W/broken")
    assert not (tmp_path / "out").exists()


def test_bad_input_of_apply(world, folder, exported, dynamic, error_of, tmp_path):
    def ends(model, pictures):
        return error_of("06", "--model", model, "--apply", pictures, "--out", tmp_path / "out")

    file, broken = exported / "oil.onnx", tmp_path / "broken.png"
    assert "needs --apply" in error_of("06", "--model", file, "--out", tmp_path / "out")
    assert "cannot run" in ends(tmp_path / "none.onnx", world / "photos")
    assert "does not exist" in ends(file, tmp_path / "none")
    assert "holds no pictures" in ends(file, tmp_path)
    assert "index.json does not exist" in ends(world / "onnx", world / "photos")
    broken.write_bytes(b"no picture")
    assert "broken.png is not a picture" in ends(file, tmp_path)
    assert "cannot run" in ends(broken, world / "photos")
    assert "was not written by" in ends(folder / "base.onnx", world / "photos")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/index.json").write_text("{}")
    assert "cannot be used" in ends(tmp_path / "other", world / "photos")


def test_bad_pictures_do_not_end_a_folder(folder, tmp_path, capsys):
    """Nor do large ones, which are edited at a smaller size."""
    shutil.copytree(folder, tmp_path / "model")
    index = runs.read_json(tmp_path / "model/index.json")
    runs.write_json(tmp_path / "model/index.json", index | {"most pixels": 2000})
    picture(tmp_path / "trip/phone.jpg", 4032, 3024)
    picture(tmp_path / "trip/day two/small.png", 40, 30)
    (tmp_path / "trip/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "trip/iphone.heic").write_bytes(b"nor this")
    flags = f"--model {tmp_path}/model --concept oil --apply {tmp_path}/trip --out {tmp_path}/out"
    for more, size in ([], (48, 36)), (["--full-size"], (4032, 3024)):
        with pytest.raises(SystemExit) as stop:
            run_main("06", *flags.split(), *more)
        printed = capsys.readouterr()
        assert stop.value.code == 1
        assert "2 pictures edited by 1 models" in printed.out
        assert "1 larger than can be edited, scaled down: phone.jpg at 48x36" in printed.out
        assert ("--full-size scales edits back" in printed.out) == (not more)
        left_out = [line for line in printed.err.splitlines() if line.startswith("left out: ")]
        assert "broken.jpg is not a picture" in left_out[0] and "iphone.heic is" in left_out[1]
        assert len(left_out) == 2
        assert Image.open(tmp_path / "out-applied/oil/phone.png").size == size
        assert Image.open(tmp_path / "out-applied/oil/day two/small.png").size == (40, 30)


def write_clip(path, av):
    """Ten frames of 63 ms, which grow brighter, filmed with the phone on its side; and a tone."""
    width, height = 64, 48
    with av.open(path, "w") as file:
        video = file.add_stream("libx264", rate=16)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = file.add_stream("aac", rate=44100, layout="mono")
        for i in range(10):
            frame = np.full((height, width, 3), 20 * i, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for i in range(27):
            tone = np.sin(np.arange(1024, dtype=np.float32) / 10)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 44100, 1024 * i
            file.mux(sound.encode(samples))
        file.mux(video.encode())
        file.mux(sound.encode())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, height << 16, 0, 1 << 30)
    header, track = path.read_bytes().split(b"tkhd", 1)
    path.write_bytes(header + b"tkhd" + track.replace(upright, turned, 1))


def test_videos_keep_their_times_and_sound(folder, tmp_path, capsys):
    av = pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", av)
    flags = f"--model {folder} --concept oil --concept fog --apply {tmp_path}/clip.mp4"
    run_main("06", *flags.split(), "--out", tmp_path / "out")
    for name in ("oil", "fog"):
        editor = Editor(folder, threads=1).use(name)
        with (
            av.open(tmp_path / "clip.mp4") as clip,
            av.open(tmp_path / f"out-applied/{name}/clip.mp4") as made,
        ):
            assert made.streams.video[0].average_rate == 16
            sound = [bytes(packet) for packet in clip.demux(audio=0)]
            assert [bytes(packet) for packet in made.demux(audio=0)] == sound and len(sound) > 20
            clip.seek(0), made.seek(0)
            frames, edits = list(clip.decode(video=0)), list(made.decode(video=0))
        assert [frame.time for frame in edits] == [frame.time for frame in frames]
        assert len(edits) == 10 and (edits[0].width, edits[0].height) == (48, 64)
        for frame, edit in zip(frames, edits, strict=True):
            wanted = editor.edit(np.rot90(frame.to_ndarray(format="rgb24"), -1))
            wanted = av.VideoFrame.from_ndarray(wanted, format="rgb24")
            wanted = wanted.reformat(format="yuv420p", dst_colorspace="ITU709").to_ndarray()
            assert np.abs(edit.to_ndarray().astype(int) - wanted).mean() < 6  # H.264 loses some


def test_bad_input_of_videos(folder, load_stage, error_of, tmp_path, monkeypatch):
    (tmp_path / "clip.mov").write_bytes(b"no video")
    flags = ["--model", folder, "--apply", tmp_path / "clip.mov", "--out", tmp_path / "out"]
    if load_stage("06").av:
        assert "clip.mov cannot be edited" in error_of("06", *flags)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    line = error_of("06", *flags)
    assert "pip install av" in line and line.count("ffmpeg -i") == 2
    assert not list((tmp_path / "out-applied").rglob("*.*"))


def test_bad_input_of_serve(folder, error_of, tmp_path, monkeypatch):
    assert "holds no index.json" in error_of("06", "--serve", "--out", tmp_path)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of("06", "--serve", port, "--out", folder)
    assert f"port {port} cannot be used" in line
    with pytest.raises(ValueError, match="holds no index.json"):
        Editor(tmp_path)
    monkeypatch.setenv("PATH", "")  # no npm
    assert fetch_runtime(tmp_path).startswith("https://")


@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_strength_scales_what_is_merged(world, load_stage, adapted, strength):
    base, adapter = world / "base/generator.safetensors", world / "lora/night/adapter.safetensors"
    source = load_stage("06").load_concepts(base, [adapter], strength)["night"]
    weight = source.up1.conv.weight
    assert torch.equal(weight, adapted(night=strength).up1.conv.weight)
    assert torch.equal(weight, adapted().up1.conv.weight) == (strength == 0)
    assert json.dumps(source.config["concepts"]).count("name") == 1
