"""Stage 6: the file computes what PyTorch computes, with the adapter merged and the prompt inside, and stands alone."""
import functools
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import common

SIZE = 32


def new_generator(arch="e2gan", concepts=("sketch", "oil"), seed=0):
    """Random weights, biases and prompts (of unequal lengths): nothing is zero by chance."""
    torch.manual_seed(seed)
    text = dict(tokens=5, text_dim=12, clip="none") if arch == "e2gan" else {}
    concepts = [{"name": name, "prompt": f"make it {name}"} for name in concepts]
    generator = common.build_generator(common.generator_config(arch, 8, SIZE, concepts, **text)).eval()
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
        for folder in ("source", "sketch", "oil", "night"):
            (root / "pairs" / split / folder).mkdir(parents=True)
            for i in range(4):
                pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
                Image.fromarray(pixels).save(root / "pairs" / split / folder / f"{i:05}.png")
                rows[split] += [{"file_name": f"{folder}/{i:05}.png", "concept": folder}] if folder != "source" else []
        common.write_text(root / "pairs" / split / "metadata.jsonl",
                          "".join(f'{{"file_name": "{r["file_name"]}", "concept": "{r["concept"]}"}}\n' for r in rows[split]))
    common.write_json(root / "pairs/concepts.json", {name: {"prompt": f"make it {name}"} for name in ("sketch", "oil", "night")})
    common.save_generator(root / "base/generator.safetensors", new_generator())
    pruned = new_generator(concepts=("sketch",), seed=1)
    common.save_generator(root / "coronet/generator.safetensors", common.slice_generator(
        pruned, {group: torch.arange(0, n, 2) for group, n in pruned.config["widths"].items()}))
    add_adapter(root / "lora", root / "base/generator.safetensors", "night")
    return root


@pytest.fixture(scope="module")
def export(world, load_stage):
    """export(*flags, out="name") runs the stage in this process on what `world` holds, and returns its folder."""
    module = load_stage("06")
    module.export_reference = functools.cache(module.export_reference)

    def call(*flags, out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["06", "--pairs", str(world / "pairs"), "--size", str(SIZE), "--threads", "1",
                                       "--out", str(world / out), *map(str, flags)])
            module.main()
        return world / out
    return call


@pytest.fixture(scope="module")
def exported(world, export):
    return export("--generator", world / "base/generator.safetensors", "--generator", world / "coronet/generator.safetensors",
                  "--adapter", world / "lora", out="onnx")


def run_file(path, photo):
    return onnxruntime.InferenceSession(path).run(None, {"photo": photo.numpy()})[0]


def edit(generator, photo, concept):
    with torch.no_grad():
        return generator(photo, torch.full((len(photo),), generator.concept(concept))).numpy()


def test_each_file_equals_its_generator(world, exported):
    photo = torch.rand(3, 3, SIZE, SIZE) * 2 - 1                       # a batch that the tracer has not seen
    adapted = common.load_generator(world / "base/generator.safetensors")
    common.load_adapter(adapted, world / "lora/night/adapter.safetensors")
    sources = dict(oil=common.load_generator(world / "base/generator.safetensors"), night=adapted,
                   sketch=common.load_generator(world / "coronet/generator.safetensors"))
    assert {path.stem for path in exported.glob("*.onnx")} == sources.keys()
    for name, generator in sources.items():
        assert np.abs(run_file(exported / f"{name}.onnx", photo) - edit(generator, photo, name)).max() < 1e-4
    assert np.abs(edit(adapted, photo, "night") - edit(sources["oil"], photo, "oil")).max() > 0.01


def test_file_stands_alone(world, exported, tmp_path):
    shutil.copy(exported / "night.onnx", tmp_path)
    model = onnx.load(tmp_path / "night.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["photo", "edit"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    about = {entry.key: entry.value for entry in model.metadata_props}
    base = common.sha256(world / "base/generator.safetensors")
    assert about == {"concept": "night", "prompt": "make it night", "size": "32x32", "value range": "-1..1, RGB",
                     "base sha256": base}
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert shapes == [["batch", 3, SIZE, SIZE]]
    assert not any("prompt" in node.input for node in model.graph.node)       # what it leads to is computed already


def test_result(exported):
    result = common.read_json(exported / "result.json")
    rows = {row["concept"]: row for row in result["tables"]["ONNX files"]}
    assert {name: row.get("from") for name, row in rows.items()} == {
        "sketch": "pruned", "oil": "base", "night": "base + adapter", "(resnet9, untrained)": None}
    assert all(rows[name]["max difference"] <= 1e-3 and rows[name]["ms"] > 0 for name in ("sketch", "oil", "night"))
    assert rows["sketch"]["GMACs"] < rows["oil"]["GMACs"] and rows["sketch"]["KB"] < rows["oil"]["KB"]
    assert common.read_image(exported / "comparison.png").shape[1] > 3 * 160


def test_done_already_and_one_concept(world, export, exported, capsys):
    flags = ("--generator", world / "base/generator.safetensors", "--adapter", world / "lora")
    assert {path.stem for path in export(*flags, "--concept", "night", out="one").glob("*.onnx")} == {"night"}
    before = (world / "one/night.onnx").stat().st_mtime_ns
    export(*flags, "--concept", "night", out="one")
    assert "done already" in capsys.readouterr().out and (world / "one/night.onnx").stat().st_mtime_ns == before


@pytest.mark.parametrize("arch", ["resnet9", "unet256"])
def test_architectures_without_prompt(world, export, tmp_path, arch):
    generator = new_generator(arch, ("oil",))
    common.save_generator(tmp_path / "generator.safetensors", generator)
    out = export("--generator", tmp_path / "generator.safetensors", out=arch)
    photo = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    assert np.abs(run_file(out / "oil.onnx", photo) - edit(generator, photo, "oil")).max() < 1e-4


def test_zero_biases_are_not_mixed_up(load_stage):
    """A trace of a network with equal constants serves one with unequal ones."""
    stage, zero, other = load_stage("06"), new_generator(), new_generator(seed=2)
    for name, parameter in zero.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    text = other.tokens[:1]
    photos = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    session = stage.open_file(stage.bake(stage.trace(zero, SIZE), other, text, {}).SerializeToString(), 1)
    assert (stage.run_onnx(session, photos) - stage.run_torch(other, photos, text)).abs().max() < 1e-4


def test_bad_input(world, error_of, load_stage, tmp_path):
    base, lora = world / "base/generator.safetensors", world / "lora"
    flags = ("--pairs", world / "pairs", "--size", SIZE, "--out", tmp_path / "out")
    assert "multiple of 8" in error_of("06", "--size", 60)
    assert "does not exist" in error_of("06", *flags, "--generator", base, "--adapter", tmp_path / "none")
    assert "unknown concept 'fog'" in error_of("06", *flags, "--generator", base, "--adapter", lora, "--concept", "fog")
    other = world / "coronet/generator.safetensors"
    assert "which is none of" in error_of("06", *flags, "--generator", other, "--adapter", lora)
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:5000])
    assert "truncated" in error_of("06", *flags, "--generator", tmp_path / "cut.safetensors", "--adapter", lora)
    assert "is no generator of ours" in error_of("06", *flags, "--generator", lora / "night/adapter.safetensors")
    assert "does not exist" in error_of("06", *flags, "--generator", base, "--adapter", lora, "--pairs", tmp_path / "none")
    assert not (tmp_path / "out").exists()
