"""What strangers can hand us: broken or lying pictures, checkpoints, adapters, JSON, ONNX files and names. Each ends in a UserError
(one `error:` line, status 2) or is read; nothing hangs, takes gigabytes, or writes anywhere."""

import hashlib
import io
import json
import random
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import common

SIZE = 32
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Hang(BaseException):
    pass


@pytest.fixture(autouse=True)
def limits():
    """2 GB more than the process has now, and a minute of computing."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def hang(*_):
        raise Hang

    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**31, hard))
    signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def stages(load_stage):
    return {number: load_stage(number) for number in ("01", "02", "03", "04", "05", "06")}


@pytest.fixture
def adapt(good, base):
    """adapt(path) puts the adapter on the base."""
    yield lambda path: common.load_adapter(base, path)
    common.unload_adapters(base)


@pytest.fixture(scope="module")
def base(good):
    return common.load_generator(good / "base.safetensors")


def ends_well(call, *args):
    """What a call returns, or its UserError, whose message is not empty."""
    try:
        return call(*args)
    except common.UserError as error:
        assert str(error).strip()
        return error


def refused(call, *args):
    found = ends_well(call, *args)
    assert isinstance(found, common.UserError), f"taken as good: {found!r}"[:300]
    return str(found)


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes cut short, or with some of them changed; most changes hit the first 200."""
    draw = random.Random(seed)
    if draw.random() < 0.25:
        return data[: draw.randrange(len(data))]
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = (
            draw.randrange(min(200, len(data)))
            if draw.random() < 0.7
            else draw.randrange(len(data))
        )
        data[place] = draw.choice(
            (data[place] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256))
        )
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def encoded(form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has this size, its checksums right, its pixels missing."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def read_everywhere(stages, path: Path) -> list:
    """Through each stage's reader: a tensor or a PIL image where it can be read."""
    skipped = {}
    photos = list(
        stages["01"].usable(
            [path.name], lambda name: stages["01"].read_photo(path.parent / name, 32, 16), skipped
        )
    )
    assert len(photos) + len(skipped) == 1
    return [
        ends_well(common.read_image, path),
        ends_well(stages["06"].read_picture, path),
        ends_well(stages["01"].about, path),
    ]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@quick
@given(seed=st.integers(0, 10**9))
def test_damaged_pictures(stages, tmp_path, form, seed):
    path = tmp_path / "picture.png"  # its suffix lies, too
    path.write_bytes(damaged(encoded(form), seed))
    pixels, picture, _ = read_everywhere(stages, path)
    assert (
        isinstance(pixels, common.UserError) or pixels.dtype == torch.uint8 and pixels.shape[0] == 3
    )
    assert isinstance(picture, common.UserError) or picture[0].shape[0] == 3


@pytest.mark.parametrize(
    "width, height",
    [(30_000, 30_000), (12_000, 9_000), (2**31 - 1, 1), (1, 2**31 - 1), (9_000, 9_000)],
)
def test_pictures_that_say_they_are_huge(stages, tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png_of(width, height))
    for found in read_everywhere(stages, tmp_path / "huge.png"):
        assert "huge.png" in str(found) and isinstance(found, common.UserError)


def test_a_picture_that_is_huge(stages, tmp_path):
    """30,000 x 30,000 black pixels in a megabyte, and 9,000 x 9,000, which are read."""
    for side in (30_000, 9_000):
        packer = zlib.compressobj(1)
        rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n"
        for kind, part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            data += (
                struct.pack(">I", len(part))
                + kind
                + part
                + struct.pack(">I", zlib.crc32(kind + part))
            )
        (tmp_path / f"{side}.png").write_bytes(data)
    refused(common.read_image, tmp_path / "30000.png")
    refused(stages["06"].read_picture, tmp_path / "30000.png")
    assert common.read_image(tmp_path / "9000.png").shape == (3, 9_000, 9_000)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

ABSURD = [
    -1,
    0,
    True,
    1.5,
    "8",
    None,
    [],
    {},
    10**9,
    10**30,
    float("nan"),
    float("inf"),
    [[1]],
    {"a": {}},
]
KEYS = [
    "arch",
    "width",
    "size",
    "widths",
    "full",
    "concepts",
    "blocks",
    "heads",
    "tokens",
    "text_dim",
    "clip",
    "widths/stem",
    "widths/tb",
    "full/trunk",
    "full/self_qk",
    "concepts/0",
    "concepts/0/name",
    "concepts/0/prompt",
]


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
    return common.run_generator(generator, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), 0)


@pytest.mark.parametrize("key", KEYS)
def test_absurd_configs(good, tmp_path, key):
    tensors, about = common.read_tensors(good / "base.safetensors", "generator")
    for value in [*ABSURD, ...]:
        common.write_tensors(
            tmp_path / "g.safetensors",
            tensors,
            {**about, "config": changed(about["config"], key, value)},
        )
        found = ends_well(use, tmp_path / "g.safetensors")
        harmless = (key, value) in (
            ("clip", "8"),
            ("clip", ...),
            ("concepts/0/prompt", "8"),
            ("concepts/0/name", "8"),
        )
        assert isinstance(found, common.UserError) or harmless or key == "clip", (key, value)


def wrong_tensors(tensors: dict, draw: random.Random) -> dict:
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    new = draw.choice(
        [
            lambda: {name: x[..., :-1]},
            lambda: {name: torch.cat([x, x])},
            lambda: {name: x[None]},
            lambda: {name: x.reshape(-1, 1)},
            lambda: {name: x.to(torch.int64)},
            lambda: {name: x.double()},
            lambda: {name: x.to(torch.float8_e4m3fn)},
            lambda: {name: x.to(torch.bfloat16)},
            lambda: {name: torch.full(x.shape, float("nan"))},
            lambda: {name: torch.full(x.shape, float("-inf"))},
            lambda: {name: torch.zeros(0)},
            lambda: {name + "x": x.clone()},
            lambda: {"x" * 300: x.clone()},
            lambda: {"../" + name: x.clone()},
        ]
    )()
    return {
        **{other: y for other, y in tensors.items() if other != name or draw.random() < 0.5},
        **new,
    }


@quick
@given(seed=st.integers(0, 10**9))
def test_wrong_tensors(good, adapt, tmp_path, seed):
    for kind, call in (("generator", use), ("adapter", adapt)):
        source = good / ("base.safetensors" if kind == "generator" else "adapter.safetensors")
        tensors, about = common.read_tensors(source, kind)
        wrong = wrong_tensors(tensors, random.Random(seed))
        common.write_tensors(tmp_path / "w.safetensors", wrong, about)
        found = ends_well(call, tmp_path / "w.safetensors")
        extra = (
            kind == "adapter" and wrong.keys() > tensors.keys()
        )  # an adapter's further tensors are not looked at
        longer = kind == "adapter" and len(wrong.get("tokens", ())) in (
            2 * len(tensors["tokens"]),
            1,
        )  # a prompt may be
        assert isinstance(found, common.UserError) or extra or longer


ABOUTS = [
    "",
    "{",
    "[]",
    "5",
    "null",
    '{"kind": 5}',
    '{"kind": ["generator"]}',
    '{"kind": "state"}',
    '{"kind": "generator"}',
    '{"kind": "adapter"}',
    '{"kind": "generator", "config": []}',
    '{"kind": "generator", "config": {"arch": ["e2gan"]}}',
    '{"kind": "generator", "config": {"arch": "os.system"}}',
    "[" * 100_000,
    '{"kind": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("about", ABOUTS, ids=range(len(ABOUTS)))
def test_metadata_that_lies(adapt, tmp_path, about):
    for metadata in ({"about": about}, {"x": about}, None):
        save_file({"a": torch.zeros(3)}, tmp_path / "f.safetensors", metadata)
        for call in (
            common.load_generator,
            adapt,
            lambda path: common.load_state(path, g=torch.nn.Linear(2, 2)),
        ):
            refused(call, tmp_path / "f.safetensors")


@pytest.mark.parametrize("name", ["base", "adapter"])
@quick
@given(seed=st.integers(0, 10**9))
def test_damaged_checkpoints(good, adapt, tmp_path, name, seed):
    (tmp_path / "d.safetensors").write_bytes(
        damaged((good / f"{name}.safetensors").read_bytes(), seed)
    )
    ends_well(use if name == "base" else adapt, tmp_path / "d.safetensors")


def test_checkpoints_of_gigabytes(tmp_path):
    """A sparse file: no room on disk, 8 GB once read."""
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]},
            "__metadata__": {"about": '{"kind": "generator"}'},
        }
    ).encode()
    with open(tmp_path / "g.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    assert "8.6 GB" in refused(common.load_generator, tmp_path / "g.safetensors")
    for length in (2**63, 2**40, 10**9):
        (tmp_path / "h.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
        refused(common.load_generator, tmp_path / "h.safetensors")


@pytest.mark.parametrize(
    "key",
    ["kind", "base", "alpha", "name", "prompt", "ranks", "ranks/up1.conv", "ranks/down1.conv"],
)
def test_absurd_adapters(good, adapt, tmp_path, key):
    tensors, about = common.read_tensors(good / "adapter.safetensors", "adapter")
    for value in [*ABSURD, 3, 2**40, -2, "2", ...]:
        common.write_tensors(tmp_path / "a.safetensors", tensors, changed(about, key, value))
        found = ends_well(adapt, tmp_path / "a.safetensors")
        harmless = (
            key == "alpha"
            and value in (1.5, 3, 10**9)
            or key in ("name", "prompt")
            and isinstance(value, str)
            or key == "ranks"
            and value == {}
            or key.startswith("ranks/")
            and value is ...
        )
        assert isinstance(found, common.UserError) or harmless, (key, value)
    for rank in (100, 2000):  # tensors of that rank, where the weight has 8 channels
        big = {
            **tensors,
            "up1.conv.lora_A": torch.zeros(rank, 32 * 9),
            "up1.conv.lora_B": torch.zeros(16, rank),
        }
        common.write_tensors(
            tmp_path / "a.safetensors", big, changed(about, "ranks/up1.conv", rank)
        )
        refused(adapt, tmp_path / "a.safetensors")


@pytest.mark.parametrize("step", [-1, 1.5, True, "5", None, 10**30 * 1.0, float("inf"), []])
def test_states_with_absurd_steps(tmp_path, step):
    network = torch.nn.Linear(2, 2)
    common.save_state(tmp_path / "s.safetensors", step, g=network)
    refused(lambda path: common.load_state(path, g=network), tmp_path / "s.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# JSON of the wrong form

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "dark",
                    "base",
                    "new",
                    "prompt",
                    "concept",
                    "file_name",
                    "tables",
                    "marks",
                    "stage",
                    "step",
                    "PSNR dB",
                    "../x",
                    "",
                    "\n",
                ]
            )
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def args_of(**more):
    return type("Args", (), more)()


@settings(quick, max_examples=20)
@given(value=json_values, text=st.text(max_size=30) | st.just("[" * 100_000))
def test_json_of_the_wrong_form(good, stages, tmp_path, monkeypatch, value, text):
    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogatepass")

    pairs = tmp_path / "pairs"
    for content in (
        json.dumps(value),
        json.dumps({"dark": value, "base": value, "new": value}),
        json.dumps({"marks": value, "tables": value, "stage": value}),
        text,
    ):
        write("pairs/concepts.json", content)
        ends_well(common.read_concepts, pairs)
        write("pairs/train/metadata.jsonl", content + "\n")
        ends_well(common.edit_names, pairs, "train", "dark")
        write("clusters/concepts.json", content)
        for number in ("03", "04"):
            found = ends_well(
                stages[number].chosen_concepts, args_of(concept=[], clusters=tmp_path / "clusters")
            )
            assert isinstance(found, common.UserError) or all(
                isinstance(name, str) for name in found
            )
        write("runs/a/result.json", content)
        ends_well(common.marks_of, args_of(demo=False), tmp_path / "runs/a")
        monkeypatch.setattr("sys.argv", ["common.py", str(tmp_path / "runs")])
        ends_well(common.main)
        write("log.jsonl", content)
        ends_well(common.read_log, tmp_path / "log.jsonl", 5)
        write("out/settings.json", content)
        write("out/x", "")
        ends_well(common.is_complete, tmp_path / "out", {"stage": "x"}, False)
        write("crucial.json", content)
        ends_well(
            stages["04"].chosen_groups, args_of(layers="crucial", out=tmp_path), {"up1": {}}, "base"
        )
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{}")
    refused(common.read_json, tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------------------------
# Names, and whole stages

NAMES = [
    "../up",
    "..",
    ".",
    "/etc/x",
    "a/b",
    "a\\b",
    "a\nb",
    "a\x00b",
    "x" * 300,
    "",
    " ",
    ".hidden",
    "-rf",
    "\u202egnp",
]


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def commands(root: Path) -> dict[str, list]:
    pairs, base = ["--pairs", root / "pairs"], root / "base.safetensors"
    return {
        "02": [*pairs, "--clip", "ViT-S-32:random"],
        "03": [*pairs, "--clusters", root / "clusters", "--clip", "ViT-S-32:random"],
        "04": [*pairs, "--clusters", root / "clusters", "--base", base],
        "05": [*pairs, "--generator", base],
        "06": [
            *pairs,
            "--generator",
            base,
            "--adapter",
            root / "adapter.safetensors",
            "--size",
            SIZE,
        ],
    }


@pytest.fixture
def world(good, tmp_path):
    shutil.copytree(good, tmp_path / "w")
    return tmp_path / "w"


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_names_that_lead_elsewhere(world, error_of, name):
    """As a concept's name in the pairs, in a generator and in an adapter."""
    flags, clean = commands(world), tree(world)

    def ends(number, *changed_files):
        before = tree(world.parent)
        line = error_of(number, *flags[number], "--out", world.parent / "out")
        assert "concept" in line and tree(world.parent) == before
        for path in changed_files:
            path.write_bytes(kept[path])
        assert tree(world) == clean

    concepts, base, adapter = (
        world / "pairs/concepts.json",
        world / "base.safetensors",
        world / "adapter.safetensors",
    )
    kept = {path: path.read_bytes() for path in (concepts, base, adapter)}
    for number in ("02", "05"):
        common.write_json(concepts, {"dark": {"prompt": "x"}, name: {"prompt": "x"}})
        ends(number, concepts)
    tensors, about = common.read_tensors(base, "generator")
    for number in ("04", "06"):
        common.write_tensors(
            base, tensors, {**about, "config": changed(about["config"], "concepts/0/name", name)}
        )
        ends(number, base)
    tensors, about = common.read_tensors(adapter, "adapter")
    common.write_tensors(adapter, tensors, {**about, "name": name})
    ends("06", adapter)


@pytest.mark.parametrize("number", ["02", "03", "04", "05", "06"])
@pytest.mark.parametrize(
    "data", [png_of(30_000, 30_000), b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(99)], ids=range(4)
)
def test_stages_with_a_bad_picture(world, error_of, number, data):
    for path in (world / "pairs").glob("*/*/00000.png"):
        path.write_bytes(data)
    before = tree(world)
    if number == "02":  # embeds before it begins: CLIP is not what is tested
        assert "00000.png" in refused(common.read_image, world / "pairs/train/dark/00000.png")
        return
    assert "00000.png" in error_of(number, *commands(world)[number], "--out", world.parent / "out")
    assert tree(world) == before and not (world.parent / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# ONNX files that are none of ours


def identity(**inputs) -> bytes:
    """A valid file whose outputs are its inputs."""

    def info(name, shape):
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes = [onnx.helper.make_node("Identity", [name], [name + "_out"]) for name in inputs]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info(*item) for item in inputs.items()],
        [info(name + "_out", shape) for name, shape in inputs.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 9
    return model.SerializeToString()


PHOTO = identity(photo=("batch", 3, SIZE, SIZE))
ONNX = [
    b"",
    b"no model",
    b"\x08\x09",
    PHOTO[:40],
    identity(image=(1, 3, 32, 32)),
    identity(photo=(1, 3)),
    identity(photo=(1, 3, "h", "w")),
    identity(photo=(1, 1, 32, 32)),
    identity(photo=(1, 3, 32, 32), x=(1,)),
    identity(photo=()),
    identity(photo=(0, 3, 0, 0)),
    *(damaged(PHOTO, seed) for seed in range(40)),
]


def test_onnx_files_that_are_no_models_of_ours(stages, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos/a.png")
    for i, data in enumerate(ONNX):
        (tmp_path / "m.onnx").write_bytes(data)
        found = ends_well(
            stages["06"].apply_files,
            [tmp_path / "m.onnx"],
            tmp_path / "photos",
            tmp_path / f"out{i}",
        )
        if isinstance(found, common.UserError):
            assert not (tmp_path / f"out{i}").exists()
        else:
            assert i >= 11
