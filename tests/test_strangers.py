"""What strangers can hand us: broken or lying pictures, checkpoints, adapters, JSON and names. Each
ends in a UserError or is read; nothing hangs, takes gigabytes or writes anywhere."""

import copy
import io
import json
import random
import resource
import shutil
import signal
import struct
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_pipelines
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import common
import dataset
import runs
import training

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS
)
seeds = given(seed=st.integers(0, 10**9))


@pytest.fixture(autouse=True)
def limits():
    """2 GB more than the process has now, and a minute of computing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**31, hard))
    signal.signal(signal.SIGPROF, lambda *_: pytest.fail("a minute of computing"))
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def adapt(good):
    """adapt(path) puts the adapter on a copy of the base."""
    base = common.load_generator(good / "base.safetensors")
    return lambda path: common.load_adapter(copy.deepcopy(base), path)


def ends_well(call, *args):
    """What a call returns, or its UserError, whose message is not empty."""
    try:
        return call(*args)
    except runs.UserError as error:
        assert str(error).strip()
        return error


def refused(call, *args) -> str:
    with pytest.raises(runs.UserError) as error:
        call(*args)
    return str(error.value)


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes cut short, or with some of them changed; most changes hit the first 200."""
    draw = random.Random(seed)
    if draw.random() < 0.25:
        return data[: draw.randrange(len(data))]
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(min(200, len(data)) if draw.random() < 0.7 else len(data))
        flipped = data[place] ^ 1 << draw.randrange(8)
        data[place] = draw.choice((flipped, 0, 255, draw.randrange(256)))
    return bytes(data)


# ---- Pictures ------------------------------------------------------------------------------------


def png_of(width: int, height: int, pixels: bytes = zlib.compress(bytes(100)), bits=8, kind=2):
    """A PNG that says it has this size, its checksums right; by default its pixels are missing."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + name + part
        data += struct.pack(">I", zlib.crc32(name + part))
    return data


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@quick
@seeds
def test_damaged_pictures(tmp_path, form, seed):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    path = tmp_path / "picture.png"  # its suffix lies, too
    path.write_bytes(damaged(file.getvalue(), seed))
    found = ends_well(lambda: dataset.to_pixels(dataset.read_square(path, 16)))
    assert isinstance(found, runs.UserError) or found.shape == (3, 16, 16)


def test_pictures_that_are_huge_or_say_so(tmp_path):
    """Also 30,000 x 30,000 black pixels in a megabyte; and 9,000 x 9,000, which are read."""
    path = tmp_path / "huge.png"
    for size in ((30_000, 30_000), (12_000, 9_000), (2**31 - 1, 1), (1, 2**31 - 1), (9_000, 9_000)):
        path.write_bytes(png_of(*size))
        assert "huge.png" in refused(dataset.read_square, path, 32), size
    for side in (30_000, 9_000):
        packer = zlib.compressobj(1)
        rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side))
        path.write_bytes(png_of(side, side, rows + packer.flush(), bits=1, kind=0))
        found = ends_well(dataset.read_image, path)
    assert found.shape == (3, 9_000, 9_000)


# ---- Checkpoints and adapters --------------------------------------------------------------------

ABSURD = [-1, 0, True, 1.5, "8", None, [], {}, 10**9, 10**30, float("nan"), float("inf"), [[1]]]
ABSURD += [{"a": {}}, ...]  # an Ellipsis: the key is gone
CONFIG = ["width", "size", "tokens", "text_dim", "heads", "widths/stem", "widths/tb", "full/trunk"]
CONFIG += ["arch", "widths", "full", "full/self_qk", "concepts", "concepts/0", "concepts/0/name"]
CONFIG += ["blocks", "concepts/0/prompt"]
ADAPTER = ["kind", "base", "alpha", "name", "ranks", "ranks/up1.conv"]


def changed(value, path: str, new):
    """A copy of a JSON value with another value at a/0/b; without one where `new` is Ellipsis."""
    value = json.loads(json.dumps(value))
    *most, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    inner = value
    for part in most:
        inner = inner[part]
    if new is ...:
        del inner[last]
    else:
        inner[last] = new
    return value


def use(path: Path) -> torch.Tensor:
    """Loads a generator and edits with it: what is taken as good must work."""
    generator = common.load_generator(path)
    photo = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    return training.run_generator(generator, photo, generator.concept_index("dark"))


HARMLESS = {"concepts/0/prompt": ["8"], "name": ["8"], "alpha": [0, 1, 1.5], "ranks": [{}]}
HARMLESS |= {"ranks/up1.conv": [...]}


@pytest.mark.parametrize("key", [*CONFIG, *ADAPTER])
def test_absurd_metadata(good, adapt, tmp_path, key):
    of_base, path = key in CONFIG, f"config/{key}" if key in CONFIG else key
    file, call = good / ("base" if of_base else "adapter"), use if of_base else adapt
    kind = "generator" if of_base else "adapter"
    tensors, metadata = runs.read_tensors(file.with_suffix(".safetensors"), kind)
    for value in ABSURD:
        about = changed(metadata, path, value)
        runs.write_tensors(tmp_path / "f", tensors, about)
        found = ends_well(call, tmp_path / "f")
        harmless = value in HARMLESS.get(key, [])
        assert isinstance(found, runs.UserError) or harmless, (key, value)


def wrong_tensors(tensors: dict, draw: random.Random) -> dict:
    """One of them spoilt, most of the others as they were."""
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    wrong = [x[..., :-1], torch.cat([x, x]), x[None], x.reshape(-1, 1), torch.zeros(0), x.double()]
    wrong += [x.to(kind) for kind in (torch.int64, torch.bfloat16, torch.float8_e4m3fn)]
    wrong += [torch.full(x.shape, float(number)) for number in ("nan", "-inf")]
    new = {name: draw.choice(wrong)}
    if draw.random() < 0.2:
        new = {draw.choice((name + "x", "x" * 300, "../" + name)): x.clone()}
    kept = {key: y for key, y in tensors.items() if key != name or draw.random() < 0.5}
    return {**kept, **new}


@pytest.mark.parametrize("kind, file", [("generator", "base"), ("adapter", "adapter")])
@quick
@seeds
def test_damaged_checkpoints(good, adapt, tmp_path, kind, file, seed):
    source, call = good / f"{file}.safetensors", use if kind == "generator" else adapt
    (tmp_path / "d").write_bytes(damaged(source.read_bytes(), seed))
    ends_well(call, tmp_path / "d")
    tensors, metadata = runs.read_tensors(source, kind)
    wrong = wrong_tensors(tensors, random.Random(seed))
    runs.write_tensors(tmp_path / "w", wrong, metadata)
    if not isinstance(ends_well(call, tmp_path / "w"), runs.UserError):
        same = [wrong[key].shape == x.shape for key, x in tensors.items() if key != "tokens"]
        assert kind == "adapter" and all(same)  # its prompt may have any length


ABOUTS = ["", "{", "[]", "5", "null", '{"kind": 5}', '{"kind": ["generator"]}', '{"kind": "state"}']
ABOUTS += ['{"kind": "generator"}', '{"kind": "adapter"}', '{"kind": "generator", "config": []}']
ABOUTS += ['{"kind": "generator", "config": {"arch": ["e2gan"]}}', "[" * 100_000]
ABOUTS += ['{"kind": "generator", "config": {"arch": "os.system"}}', '{"kind": ' + "9" * 5000 + "}"]


def test_metadata_that_lies(adapt, tmp_path):
    def load_state(path):
        return training.load_state(path, {"g": torch.nn.Linear(2, 2)})

    for metadata in (None, *({key: about} for about in ABOUTS for key in ("about", "x"))):
        save_file({"a": torch.zeros(3)}, tmp_path / "f", metadata)
        for call in (common.load_generator, adapt, load_state):
            refused(call, tmp_path / "f")
    for step, rows in ((None, []), ("x", []), (float("inf"), []), (5, [5]), (5, "x"), (5, [{}])):
        training.save_state(tmp_path / "s", {"g": torch.nn.Linear(2, 2)}, step, False, rows)
        refused(load_state, tmp_path / "s")


def test_checkpoints_of_gigabytes(tmp_path):
    """A sparse file: no room on disk, 8 GB once read."""
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}
    about = {"about": '{"kind": "generator"}'}
    header = json.dumps({"a": entry, "__metadata__": about}).encode()
    with open(tmp_path / "g", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    assert "8.6 GB" in refused(common.load_generator, tmp_path / "g")
    for length in (2**63, 2**40, 10**9):
        (tmp_path / "h").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
        refused(common.load_generator, tmp_path / "h")


# ---- Teachers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """The folder of a diffusers pipeline."""
    return tiny_pipelines.instruct_pix2pix(tmp_path_factory.mktemp("editor"))


def load_editor(stage, folder: Path):
    args = Namespace(teacher=str(folder), teacher_config=None, no_safety_checker=False)
    return stage.load_pipeline(args, torch.float32)


CODE = """
from pathlib import Path
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
Path(__file__).with_name("run").touch()
class Own(StableDiffusionInstructPix2PixPipeline): pass
class OwnUnet(UNet2DConditionModel): pass
"""


@pytest.mark.parametrize(
    "file, changes",
    [
        ("own.py", {"_class_name": ["own", "Own"]}),
        ("pipeline.py", {"_class_name": "Own"}),
        ("unet/own.py", {"unet": ["own", "OwnUnet"]}),
        ("own.py", {"unet": ["os", "system"]}),
    ],
)
def test_code_in_a_pipelines_folder_is_not_run(load_stage, editor, tmp_path, file, changes):
    folder = shutil.copytree(editor, tmp_path / "editor")
    (folder / file).write_text(CODE)
    index = runs.read_json(folder / "model_index.json")
    runs.write_json(folder / "model_index.json", {**index, **changes})
    assert "cannot be loaded" in refused(load_editor, load_stage("01"), folder)
    assert not [*folder.rglob("run")]


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_pipelines(load_stage, editor, tmp_path, value):
    stage = load_stage("01")
    for file, key in (("model_index.json", "_class_name"), ("unet/config.json", "in_channels")):
        folder = shutil.copytree(editor, tmp_path / key)
        path = folder / file
        runs.write_json(path, changed(runs.read_json(path), key, value))
        refused(load_editor, stage, folder)


@settings(quick, max_examples=10)
@seeds
def test_damaged_loras_and_checkpoints(load_stage, editor, tmp_path, seed):
    stage, pipe = load_stage("01"), load_editor(load_stage("01"), editor)
    for form in ("diffusers", "kohya"):
        data = tiny_pipelines.write_lora(tmp_path / "l.safetensors", form=form).read_bytes()
        (tmp_path / "d.safetensors").write_bytes(damaged(data, seed))
        ends_well(lambda: stage.add_loras(pipe, [stage.read_lora(str(tmp_path / "d.safetensors"))]))
        pipe.unload_lora_weights()
    refused(stage.load_single_file, str(tmp_path / "d.safetensors"), str(editor), torch.float32)


# ---- JSON of the wrong form, names, whole stages -------------------------------------------------

KEYS = ["dark", "base", "prompt", "tables", "marks", "stage", "step", "PSNR dB", "../x", "", "\n"]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from(KEYS) | st.text(max_size=8)
json_values = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=4), max_leaves=8
)


@settings(quick, max_examples=20)
@given(value=json_values, text=st.text(max_size=30))
def test_json_of_the_wrong_form(tmp_path, monkeypatch, value, text):
    monkeypatch.setattr("sys.argv", ["runs.py", str(tmp_path)])
    runs.write_json(tmp_path / "settings.json", {})
    runs.write_json(tmp_path / "pairs/concepts.json", {"dark": {"prompt": "x"}})
    args = Namespace(concept=[], clusters=tmp_path, pairs=tmp_path / "pairs")
    contents = [value, {"dark": value, "base": value}, {"marks": value, "tables": value}]
    for content in (*map(json.dumps, contents), text, "[" * 100_000):
        for name in ("concepts.json", "result.json"):
            (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        ends_well(dataset.read_concepts, tmp_path)
        ends_well(dataset.chosen_concepts, args, "base")
        ends_well(runs.main)
        ends_well(runs.claim_folder, tmp_path, {"stage": 5}, False, False)


NAMES = ["../up", "/etc/x", "a\\b", "a\nb", "a\x00b", "x" * 300, "", ".hidden", "-rf", "\u202egnp"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_lead_elsewhere(good, adapt, error_of, tmp_path, name):
    """As a concept's name in the pairs, in a generator and in an adapter."""
    shutil.copytree(good / "pairs", tmp_path / "pairs")
    concepts = {"dark": {"prompt": "x"}, name: {"prompt": "x"}}
    runs.write_json(tmp_path / "pairs/concepts.json", concepts)
    before = sorted(tmp_path.rglob("*"))
    flags = f"--pairs {tmp_path}/pairs --out {tmp_path}/out".split()
    assert "no name for a file" in error_of("02", *flags)
    assert "no name for a file" in error_of("03", *flags, "--concept", "dark")
    assert sorted(tmp_path.rglob("*")) == before
    tensors, metadata = runs.read_tensors(good / "base.safetensors", "generator")
    metadata = changed(metadata, "config/concepts/0/name", name)
    runs.write_tensors(tmp_path / "g", tensors, metadata)
    refused(common.load_generator, tmp_path / "g")
    tensors, metadata = runs.read_tensors(good / "adapter.safetensors", "adapter")
    runs.write_tensors(tmp_path / "a", tensors, {**metadata, "name": name})
    refused(adapt, tmp_path / "a")
