"""Exports a generator as a folder to serve or to ship: a graph, its weights, kilobytes a concept.

The weights lie beside the graph, in the generator's own file. A concept of the base is a prompt in
it; a further one is stage 4's own adapter, which whoever runs it adds to the weights: the page, or
`Editor`, which needs no PyTorch. --merged writes a file per concept instead, which stands alone, in
fp32, fp16 or int8. All is compared with PyTorch before it is written, and timed.

Reads   generator.safetensors (stages 3, 5), adapter.safetensors (stage 4), photos (stage 1 or any)
Writes  runs/onnx/base.onnx          bytes (N, H, W, 3), sides multiples of 8, and the prompt's
                                     text features (1, T, D) -> edit, like the photo
        runs/onnx/base.safetensors, adapters/<concept>.safetensors, index.json, index.html, ort/
        runs/onnx/<concept>.onnx     --merged: photo (N, 3, H, W) in [-1, 1] -> edit, like it
        runs/onnx/comparison.png     photo, teacher, every generator's edit, the file's
        runs/onnx-applied/...        edits of --apply's pictures

    python 06_export_onnx.py --demo
    python 06_export_onnx.py --serve                                            (opens the folder)
    python 06_export_onnx.py --merged --precision int8 --io uint8 --out runs/onnx-int8
    python 06_export_onnx.py --model runs/onnx --concept sketch --apply photos  (needs it alone)
"""

import argparse
import copy
import functools
import http.server
import itertools
import json
import logging
import math
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn as nn
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite
from PIL import Image
from tqdm import tqdm

import common
import training
from assets.editor import Editor
from common import UserError

DEMO = {"size": 256}
OPSET, IR_VERSION = 18, 8  # ONNX Runtime 1.16 (2023) and later, its web and mobile builds included
# Most difference from PyTorch, of a range of 2, and least dB.
TOLERANCE = {"fp32": (1e-3, 60.0), "fp16": (math.inf, 45.0), "int8": (math.inf, 30.0)}
CALIBRATION = 32  # training photos that int8's ranges are measured on
COMPARED = 4  # test photos on which PyTorch runs too
SCORES = 4e9  # most bytes of attention's scores, which limits pictures' pixels
WEB = "onnxruntime-web@1.30.0"  # its CPU build, threaded where the page may, and its WebGPU build
WEB_FILES = ["ort.wasm.min.mjs", "ort.webgpu.min.mjs"]
for build in ("threaded", "threaded.asyncify"):
    WEB_FILES += [f"ort-wasm-simd-{build}.{kind}" for kind in ("mjs", "wasm")]
RANGE = {"uint8": "0..255, RGB, NHWC", "float32": "-1..1, RGB, NCHW"}


def parse() -> argparse.Namespace:
    parser = common.Parser(__doc__, "runs/onnx")
    flag, paths = parser.add_argument, {"type": Path, "action": "append"}
    flag("--generator", **paths, help="default: stage 3's in runs/; further ones are compared")
    flag("--adapter", **paths, help="a file or a folder of them, repeatable (default: stage 4's)")
    flag("--strength", type=common.number(float, 0, 1.5), default=1.0, help="of the adapters")
    flag("--concept", action="append", help="export this one only; can be repeated")
    flag("--pairs", type=Path, default="runs/pairs", help="photos to prove, time, calibrate on")
    flag("--photos", type=Path, help="a folder of photos of any size for that, instead of pairs")
    flag("--size", type=common.count, default=256, help="height and width of the photos")
    flag("--threads", type=common.count, default=2, help="ONNX Runtime's threads while timed")
    flag("--cdn", action="store_true", help="leave onnxruntime-web on its CDN, not in the folder")
    flag("--merged", action="store_true", help="a file per concept; the next three are for these")
    flag("--dynamic", action="store_true", help="the file takes any size; --size is timed")
    flag("--precision", choices=list(TOLERANCE), default="fp32", help="of the layers")
    flag("--io", choices=["float32", "uint8"], default="float32", help="uint8: bytes (N, H, W, 3)")
    flag("--apply", type=Path, help="a picture, or a folder of pictures of any size, to edit")
    flag("--model", **paths, help="apply this exported folder or file; can be repeated")
    port = {"type": common.number(int, 0, 65535), "nargs": "?", "const": 8000, "metavar": "PORT"}
    flag(
        "--serve", **port, help="show the folder --out in this machine's browsers, at 8000 or PORT"
    )
    args = parser.parse(DEMO)
    if args.model and not args.apply:
        raise UserError("--model needs --apply: the pictures to edit")
    if not args.merged:
        if args.dynamic or args.io != "float32" or args.precision != "fp32":
            raise UserError("--dynamic, --io, --precision: only --merged; a folder is any size's")
        args.dynamic, args.io = True, "uint8"
    args = parser.parse(DEMO)
    if args.model and not args.apply:
        raise UserError("--model needs --apply: the pictures to edit")
    if not args.merged:
        if args.dynamic or args.io != "float32" or args.precision != "fp32":
            raise UserError("--dynamic, --io, --precision: only with --merged")
        args.dynamic, args.io = True, "uint8"
    if not args.generator:  # other generators get no adapters unasked: those need not fit
        runs = Path("runs/demo" if args.demo else "runs")
        made_by = ("base", "coronet") if args.demo else ("base",)
        args.generator = [runs / stage / "generator.safetensors" for stage in made_by]
        if not args.adapter and (runs / "lora").is_dir():
            args.adapter = [runs / "lora"]
    return args


# ---- The graph -----------------------------------------------------------------------------------


class PhaseConv(nn.Module):
    """A transposed convolution of stride 2 as four convolutions of the small picture, one for each
    place in a 2 x 2 block of the large one: the same products without the zeros between, in a form
    that ONNX Runtime has fast kernels for. It cuts their weights out of the layer's as it runs, so
    that a graph holds the layer's, to which adapters fit; the runtime folds the cutting."""

    def __init__(self, conv: common.UpConv | nn.ConvTranspose2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.is_up = isinstance(conv, common.UpConv)
        self.pad, self.mode = (1, "replicate") if self.is_up else (conv.padding[0], "constant")

    def forward(self, x):
        weight = common.UpConv.kernel(self) if self.is_up else self.weight  # (in, out, k, k)
        weight = weight.transpose(0, 1).flip(2, 3)
        last, reads, places = weight.shape[-1] - 1, [], []
        for at in (self.pad, self.pad + 1):  # both places along a side: first tap, pixels read
            first = (last - at) % 2  # before, and after
            reads.append((first, (last - first - at) // 2, at // 2))
        for (row, top, bottom), (column, left, right) in itertools.product(reads, repeat=2):
            padded = F.pad(x, (left, right, top, bottom), self.mode)
            places.append(F.conv2d(padded, weight[:, :, row::2, column::2], self.bias))
        rows = [torch.stack(pair, -1).flatten(3) for pair in (places[:2], places[2:])]
        return torch.stack(rows, 3).flatten(2, 3)  # (B, C, 2H, 2W)


class FoldFilm(RewriteRuleClassBase):
    """FiLM after an instance norm becomes the norm's own scale and shift: one pass, not three."""

    def pattern(self, op, x, one, zero, scale, shift):
        normed = op.InstanceNormalization(x, one, zero, _outputs=["normed"])
        return op.Add(op.Mul(normed, scale), shift)

    def check(self, context, one, zero, scale, shift, **_):
        plain = np.all(one.const_value.numpy() == 1) and not np.any(zero.const_value.numpy())
        return plain and all(len(v.shape) == 4 and v.shape[2:] == (1, 1) for v in (scale, shift))

    def rewrite(self, op, x, one, zero, scale, shift, normed):
        flat = op.Constant(value_ints=[-1])
        scale, shift = op.Reshape(scale, flat), op.Reshape(shift, flat)
        return op.InstanceNormalization(x, scale, shift, **normed.producer().attributes)


class Exported(nn.Module):
    """What a file computes: photo and the prompt's text features (1, T, D), if any -> edit.
    Pictures are floats (N, 3, H, W) in [-1, 1], or bytes (N, H, W, 3)."""

    def __init__(self, generator: common.Generator, io: str = "float32"):
        super().__init__()
        self.generator, self.bytes = copy.deepcopy(generator), io == "uint8"
        for name, module in list(self.generator.named_modules()):
            transposed = isinstance(module, nn.ConvTranspose2d) and module.stride == (2, 2)
            if transposed or isinstance(module, common.UpConv):
                self.generator.set_submodule(name, PhaseConv(module))

    def forward(self, photo, text=None):
        if not self.bytes:
            return self.generator.edit(photo, text)
        edit = self.generator.edit(photo.permute(0, 3, 1, 2).float() / 127.5 - 1, text)
        return ((edit + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()  # norms and attention by PyTorch's own layers, see common.trains_on_cpu
def trace(generator: common.Generator, size: int, io="float32", dynamic=False) -> ir.Model:
    """The generator as a graph, its prompt an input, its parameters initializers named as in
    Exported."""
    photo, height = torch.zeros(2, 3, size, size), 2
    if io == "uint8":
        photo, height = torch.zeros(2, size, size, 3, dtype=torch.uint8), 1
    free = {height: "height", height + 1: "width"} if dynamic else {}
    examples, shapes = {"photo": photo}, {"photo": {0: "batch", **free}}
    if generator.takes_text:
        examples["text"], shapes["text"] = generator.tokens[:1], {1: "tokens"}
    options = {"dynamic_shapes": shapes, "output_names": ["edit"], "opset_version": OPSET}
    options |= {"kwargs": examples, "optimize": False, "verbose": False}
    return torch.onnx.export(Exported(generator, io).eval(), **options).model


def simplify(model: ir.Model) -> ir.Model:
    """The graph with what is constant folded, and FiLM."""
    model.graph.outputs[0].shape = model.graph.inputs[0].shape  # the tracer's is a formula of it
    folding = {"input_size_limit": 2**31, "output_size_limit": 2**31}
    optimizer.optimize(model, **folding)
    model = rewrite(model, RewriteRuleSet([FoldFilm.rule()]))
    optimizer.optimize(model, **folding)
    ClearMetadataAndDocStringPass()(model)
    model.ir_version = IR_VERSION
    return model


def specialize(graph: ir.Model, generator: common.Generator, place: int) -> onnx.ModelProto:
    """The graph with this generator's weights and the prompt of the concept in this place as
    constants, folded."""
    model = graph.clone()
    for name, weight in Exported(generator).named_parameters():
        model.graph.initializers[name].const_value = ir.tensor(weight.detach().numpy())
    if generator.takes_text:
        prompt = model.graph.inputs.pop(1)
        text = generator.known()[place][1][None]  # (1, T, D)
        prompt.const_value, prompt.shape = ir.tensor(text.numpy()), ir.Shape(text.shape)
        model.graph.register_initializer(prompt)
    return ir.to_proto(simplify(model))


def separate(graph: ir.Model, weights: Path) -> onnx.ModelProto:
    """The graph alone: its weights are external data, the tensors in a generator's file, by their
    names there."""
    data, model = weights.read_bytes(), graph.clone()
    start = 8 + int.from_bytes(data[:8], "little")
    header, initializers = json.loads(data[8:start]), model.graph.initializers
    names = [name for name in initializers if name.startswith("generator.")]
    model.graph.inputs.extend(initializers.pop(name) for name in names)  # or they would be folded
    model = simplify(model)
    values = model.graph.inputs[-len(names) :]
    del model.graph.inputs[-len(names) :]
    for value in values:
        value.name = value.name.removeprefix("generator.")
        begin, end = header[value.name]["data_offsets"]
        where = weights.name, start + begin, end - begin, value.dtype
        about = {"shape": value.shape, "name": value.name, "base_dir": weights.parent}
        value.const_value = ir.ExternalTensor(*where, **about)
        model.graph.register_initializer(value)
    return ir.to_proto(model)


def convert(proto: onnx.ModelProto, precision: str, photos: torch.Tensor) -> onnx.ModelProto:
    """The model in fp16, or in static int8 (weights a scale per channel, QDQ; ranges from photos,
    uint8). Kept in float there, as measured on a trained e2gan: the upsamplings (38 to 58 dB with
    them, 45 to 68 without, as fast), the convolutions that read or write the picture, attention's
    products, whose factors are no weights, and norms."""
    if precision == "fp32":
        return proto
    if precision == "fp16":
        model = ir.from_proto(convert_float_to_float16(proto, keep_io_types=True))
        model.graph.sort()  # the converter leaves casts behind the nodes that read them
        return ir.to_proto(model)
    weights, chosen = {tensor.name: tensor.dims for tensor in proto.graph.initializer}, []
    for node in proto.graph.node:
        dims = weights.get(node.input[1], ()) if node.op_type in ("Conv", "MatMul") else ()
        inner = len(dims) == 4 and min(dims[:2]) > 3 and dims[3] < 7
        if len(dims) == 2 or (inner and node.input[1].endswith(".weight")):  # PhaseConv's are cut
            chosen.append(node.name)
    model = SimpleNamespace(session=open_file(proto.SerializeToString(), 0))
    feeds = iter([feed(model, photo) for photo in photos.split(1)])
    reader = SimpleNamespace(get_next=lambda: next(feeds, None))
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True, "nodes_to_quantize": chosen}
    options |= {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder:
        before, after = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        onnx.save(proto, before)  # a model in memory would be altered
        quantize_static(before, after, reader, **options)
        return onnx.load(after)


# ---- ONNX Runtime --------------------------------------------------------------------------------


def open_file(model: bytes | Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU from a file or its bytes; UserError if the runtime cannot take it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # it raises what it would log
    # or idle sessions' threads slow the running one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base class
        name = model if isinstance(model, Path) else "this graph"
        raise UserError(f"ONNX Runtime cannot run {name}: {str(error).splitlines()[0]}") from error


def feed(model, photos: torch.Tensor) -> dict:
    """uint8 photos (N, 3, H, W) as a model takes them: an Editor, or another with a .session."""
    text = model.text if isinstance(model, Editor) else {}
    if model.session.get_inputs()[0].type == "tensor(uint8)":
        return {"photo": photos.permute(0, 2, 3, 1).contiguous().numpy(), **text}
    return {"photo": common.to_float(photos).numpy(), **text}


def run_onnx(model, photos: torch.Tensor, batch=8) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> edits, floats in [-1, 1]."""
    edits = []
    for part in photos.split(batch):
        edits.append(torch.from_numpy(model.session.run(None, feed(model, part))[0]))
    fake = torch.cat(edits)
    return common.to_float(fake.permute(0, 3, 1, 2)) if fake.dtype == torch.uint8 else fake


def median_ms(model, photo: torch.Tensor, seconds: float = 1.0) -> float:
    """Median milliseconds of an edit, after warm-up; at least 10, and as many as fit."""
    times, inputs, began = [], feed(model, photo), time.perf_counter()
    while len(times) < 13 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        model.session.run(None, inputs)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[3:]))


# ---- Export --------------------------------------------------------------------------------------


def kind(source: common.Generator) -> str:
    name = "base" if source.config["widths"] == source.config["full"] else "pruned"
    return name + (" + adapter" if source.adapter else "")


def multiple_of(source: common.Generator) -> int:
    """Height and width must be multiples of this."""
    return 2 ** source.config.get("depth", 3)


def most_pixels(source: common.Generator) -> int:
    """Attention's scores and their softmax take 8 bytes a head and a pair of tokens."""
    heads = source.config.get("heads")
    return int(64 * (SCORES / 8 / heads) ** 0.5) if heads else Image.MAX_IMAGE_PIXELS


def load_concepts(base: Path, adapters: list[Path], strength=1.0) -> dict[str, common.Generator]:
    """{concept: the generator that makes it}: the base, or a copy with an adapter merged at this
    strength, which knows that concept alone; .adapter is the adapter's file or None."""
    base, known = common.load_generator(base), {}
    base.adapter = None
    for concept in base.config["concepts"]:
        known[concept["name"]] = base
    for path in adapters:
        adapted = copy.deepcopy(base)
        place = common.load_adapter(adapted, path, strength)
        common.merge(adapted)
        adapted.set_known([adapted.known()[place]])
        adapted.adapter = path
        known[adapted.config["concepts"][0]["name"]] = adapted
    return known


def find_photos(args) -> tuple[list[Path], list[Path]]:
    """Files of photos to prove and time on, and to calibrate on."""
    if args.photos:
        files = find_pictures(args.photos)
        return files[:COMPARED], (files[COMPARED:] or files)[:CALIBRATION]
    training.read_concepts(args.pairs)  # an error where there are none
    test, train = (find_pictures(args.pairs / split / "source") for split in ("test", "train"))
    return test, train[:CALIBRATION]


def read_squares(files: list[Path], size: int) -> torch.Tensor:
    """uint8 (N, 3, size, size)"""
    return torch.stack([common.to_pixels(common.read_square(path, size)) for path in files])


def fetch_web(folder: Path, cdn: bool) -> str:
    """Puts onnxruntime-web from npm into folder/ort; returns where the page finds it."""
    address = f"https://cdn.jsdelivr.net/npm/{WEB}/dist/"
    if cdn:
        return address
    command = ["npm", "pack", WEB, "--silent", "--prefer-offline", "--fetch-retries=0"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"npm gives no {WEB} ({error}): the page loads it from {address}")
        return address
    (folder / "ort").mkdir()
    [package] = folder.glob("*.tgz")
    with tarfile.open(package) as archive:
        for name in WEB_FILES:
            data = archive.extractfile(f"package/dist/{name}").read()
            (folder / "ort" / name).write_bytes(data)
    package.unlink()
    return "ort/"


def build_folder(folder: Path, graph: ir.Model, known: dict[str, common.Generator], args) -> Editor:
    """base.onnx, base.safetensors, adapters/, index.json and what they need in a browser."""
    for name in ("adapters", "thumbnails"):
        (folder / name).mkdir()
    shutil.copyfile(args.generator[0], folder / "base.safetensors")
    onnx.save(separate(graph, folder / "base.safetensors"), folder / "base.onnx")
    onnx.checker.check_model(folder / "base.onnx", full_check=True)
    concepts, files, [base] = [], {}, {source.sha256: source for source in known.values()}.values()
    for name, source in known.items():
        place = source.concept(name)
        about = {"name": name, "prompt": source.config["concepts"][place]["prompt"]}
        if source.adapter:
            about["adapter"] = f"adapters/{name}.safetensors"
            shutil.copyfile(source.adapter, folder / about["adapter"])
        else:
            about["place"] = place
        concepts.append(about)
    for path in sorted(folder.rglob("*.*")):
        about = {"bytes": path.stat().st_size, "sha256": common.sha256(path)}
        files[path.relative_to(folder).as_posix()] = about
    index = {"concepts": concepts, "files": files, "value range": RANGE["uint8"]}
    index |= {"strength": args.strength, "size": args.size, "web": fetch_web(folder, args.cdn)}
    index |= {"multiple": multiple_of(base), "most pixels": most_pixels(base), "transposed": []}
    for name, module in common.named_layers(base):
        if isinstance(module, nn.ConvTranspose2d):
            index["transposed"].append(name)
    common.write_json(folder / "index.json", index)
    for name in ("index.html", "editor.js", "editor.py"):
        shutil.copyfile(Path(__file__).parent / "assets" / name, folder / name)
    return Editor(folder, args.threads)


def merged_file(name: str, source: common.Generator, graph: ir.Model, calibrate, args) -> bytes:
    """A file that stands alone, converted by calibrate, uint8 (N, 3, S, S)."""
    place = source.concept(name)
    proto = convert(specialize(graph, source, place), args.precision, calibrate)
    about = {
        "concept": name,
        "prompt": source.config["concepts"][place]["prompt"],
        "base sha256": source.sha256,
        "precision": args.precision,
        "value range": RANGE[args.io],
        "size": "any" if args.dynamic else f"{args.size}x{args.size}",
        "multiple": str(multiple_of(source)),
        "most pixels": str(most_pixels(source)),
    }
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@torch.no_grad()
def prove(model, name: str, source: common.Generator, photos: torch.Tensor, args) -> dict:
    """The model's distance from PyTorch on some photos, as columns; UserError beyond TOLERANCE."""
    place, (most, least) = source.concept(name), TOLERANCE[args.precision]
    fake, wanted = run_onnx(model, photos), source(common.to_float(photos), torch.tensor([place]))
    if args.io == "uint8":  # what bytes can say of it; one may be rounded the other way
        wanted, most = common.to_float(common.to_uint8(wanted)), most + 2 / 255
    difference = (fake - wanted).abs().max().item()
    quality = training.psnr(fake, wanted).mean().item()
    if not (difference <= most and quality >= least):  # NaN is not
        distance = f"by {difference:.2g} at most, {quality:.1f} dB; {least:.0f} are needed"
        raise UserError(f"{name}: the {args.precision} graph differs from PyTorch {distance}")
    return {"max difference": difference, "dB to PyTorch": quality}


def export_all(args, began: float) -> list[Path]:
    """Exports every concept, unless the folder holds this run already. Returns what to apply."""
    adapters = []
    for path in args.adapter or []:
        adapters += common.files_below(path, "adapter.safetensors") if path.is_dir() else [path]
    known = load_concepts(args.generator[0], adapters, args.strength)
    others = [next(iter(load_concepts(path, []).values())) for path in args.generator[1:]]
    for name in args.concept or []:
        if name not in known:
            raise UserError(f"unknown concept {name!r}; known are {', '.join(known)}")
    known = {name: known[name] for name in args.concept or known}
    multiple = max(map(multiple_of, [*known.values(), *others]))
    if args.size < 16 or args.size % multiple:  # a norm needs more than 1x1
        raise UserError(f"--size {args.size}: give a multiple of {multiple} from 16 on")
    test, train = find_photos(args)
    photos, calibrate = (read_squares(files, args.size) for files in (test, train))
    reads = [common.sha256(path)[:16] for path in [*args.generator, *adapters]]
    reads.append(training.Pictures([*test, *train], args.size, []).data_hash)
    settings = common.settings_of(args, "06_export_onnx", reads=reads)
    for key in {"generator", "adapter", "apply", "model", "serve"} & settings.keys():
        del settings[key]  # paths, and what changes nothing of the export
    written = [args.out / f"{name}.onnx" for name in known] if args.merged else [args.out]
    if common.begin_run(args.out, settings, args.overwrite):
        return written
    logging.disable(logging.WARNING)  # the tracer and the quantizer address their developers
    with tempfile.TemporaryDirectory() as scratch:
        rows = export_to(Path(scratch), known, others, test, photos, calibrate, args)
        for path in sorted(Path(scratch).rglob("*.*")):
            copy_file = functools.partial(shutil.copyfile, path)
            common.replace_file(args.out / path.relative_to(scratch), copy_file)
    folders = [path.parent for path in [*args.generator, *adapters]]
    folders += [] if args.photos else [args.pairs]
    marks, seconds = common.marks_of(args, *folders), time.time() - began
    common.write_result(args.out, "06_export_onnx", seconds, marks, {"ONNX files": rows})
    return written


def export_to(folder: Path, known, others, test: list[Path], photos, calibrate, args) -> list[dict]:
    """Exports {concept: generator} to an empty folder, each proved on photos, uint8 (N, 3, S, S),
    of the files `test`; other generators are drawn beside it. Returns the table's rows."""
    rows, pictures, labels, base = [], [], [], next(iter(known.values()))
    kinds = dict.fromkeys(kind(source).split()[0] for source in [*known.values(), *others])
    columns = ["photo", "teacher", *kinds, "ONNX"]  # an adapter's edit stands with its base's
    graph = trace(base, args.size, args.io, args.dynamic)
    editor = None if args.merged else build_folder(folder, graph, known, args)
    for name, source in known.items():
        if args.merged:
            data = merged_file(name, source, graph, calibrate, args)
            (folder / f"{name}.onnx").write_bytes(data)
            model, size = SimpleNamespace(session=open_file(data, args.threads)), len(data)
        else:
            model = editor.use(name, args.strength)
            size = source.adapter.stat().st_size if source.adapter else 0
        row = {"concept": name, "from": kind(source)}
        row |= {"precision": args.precision, "KB": size / 1000}
        row |= {"GMACs": common.count_macs(source, args.size) / 1e9}
        row |= prove(model, name, source, photos[:COMPARED], args)
        if args.dynamic:
            larger = photos[:1].tile(1, 1, 2, 2)[:, :, : args.size + multiple_of(source)]
            prove(model, name, source, larger, args)
        fakes = common.to_uint8(run_onnx(model, photos))
        edits = [] if args.photos else [args.pairs / "test" / name / path.name for path in test]
        places = [place for place, path in enumerate(edits) if path.exists()]
        shown = {"photo": photos[0], "ONNX": fakes[0]}
        if places:
            truth = read_squares([edits[place] for place in places], args.size)
            row |= training.measure(fakes[places], photos[places], truth)
            shown |= {"teacher": truth[0]} if places[0] == 0 else {}
        rows.append(row)
        print(f"{name} ({row['from']}): {row['KB']:.0f} KB, {row['dB to PyTorch']:.0f} dB")
        for each in [source, *others]:
            if name in {concept["name"] for concept in each.config["concepts"]}:
                edit = training.run_generator(each, photos[:1], each.concept(name))[0]
                shown[kind(each).split()[0]] = edit
        pictures.append([shown.get(column) for column in columns])
        labels.append(name + " (adapter)" * bool(source.adapter))
        if not args.merged:
            common.to_pil(fakes[0]).resize((96, 96)).save(folder / f"thumbnails/{name}.jpg")
    comparison = common.picture_grid(pictures, columns, labels, max(160, args.size))
    common.write_png(folder / "comparison.png", comparison)
    ms = median_ms(model, photos[:1])  # of all: they are one graph
    for row in rows:
        row |= {"ms": ms, "FPS": 1000 / ms, "threads": args.threads, "size px": args.size}
    if editor:
        common.to_pil(photos[0]).save(folder / "photo.jpg", quality=95)
    return rows


# ---- Pictures of any size ------------------------------------------------------------------------


def find_pictures(path: Path) -> list[Path]:
    """A picture file itself, or all below a folder, by their suffixes, sorted."""
    found = common.list_pictures(path, "**/*") if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} holds no pictures")
    return found


def edit_picture(model, picture: Image.Image) -> Image.Image:
    """RGB -> its edit, as large. A model of free size takes the whole picture, padded to its
    multiple; one of fixed size takes it scaled to fit, and the edit is scaled back."""
    if isinstance(model, Editor):
        return Image.fromarray(model.edit(np.asarray(picture)))
    about, takes = model.session.get_modelmeta().custom_metadata_map, model.session.get_inputs()[0]
    height, width = takes.shape[1:3] if takes.type == "tensor(uint8)" else takes.shape[2:]
    inner = picture
    if about.get("size") == "any":
        multiple = int(about["multiple"])
        width, height = (multiple * math.ceil(side / multiple) for side in picture.size)
        if width * height > int(about["most pixels"]):
            raise ValueError(f"{width}x{height} are more than {about['most pixels']} pixels")
    else:
        ratio = min(height / picture.height, width / picture.width)
        inner = picture.resize([max(1, round(side * ratio)) for side in picture.size])
    pad = [(0, 0), (0, height - inner.height), (0, width - inner.width)]
    photo = torch.from_numpy(np.pad(common.to_pixels(inner), pad, "symmetric"))
    edit = common.to_uint8(run_onnx(model, photo[None])[0, :, : inner.height, : inner.width])
    return common.to_pil(edit).resize(picture.size)


def open_models(path: Path, concepts: list[str] | None, strength: float) -> dict[str, object]:
    """{name: model} of a merged file, or of these concepts (None: all) of a folder."""
    if not path.is_dir():
        return {path.stem: SimpleNamespace(session=open_file(path, 0))}
    index, models = common.read_json(path / "index.json", "06_export_onnx.py"), {}
    try:
        for name in concepts or [concept["name"] for concept in index["concepts"]]:
            models[name] = Editor(path).use(name, strength)
    except Exception as error:  # whatever a stranger's folder brings about
        raise UserError(f"{path} cannot be used: {error}") from error
    return models


def apply_files(args, paths: list[Path]) -> None:
    """Edits pictures with every model: <out>-applied/<its name>/<picture's path>.png, with the
    picture's own alpha channel."""
    pictures, out = find_pictures(args.apply), args.out.with_name(f"{args.out.name}-applied")
    root = args.apply if args.apply.is_dir() else args.apply.parent
    models = {}
    for path in paths:
        models |= open_models(path, args.concept, args.strength)
    taken = Counter(path.with_suffix("") for path in pictures)
    for path in tqdm(pictures, unit="picture"):
        name = path.relative_to(root).with_suffix(".png")
        if taken[path.with_suffix("")] > 1:  # a.jpg and a.png become a.jpg.png and a.png.png
            name = name.with_name(path.name + ".png")
        picture = common.read_picture(path, alpha=True)
        for stem, model in models.items():
            try:
                edit = edit_picture(model, picture.convert("RGB"))
            except Exception as error:  # the runtime's exceptions have no common base class
                raise UserError(
                    f"{path} cannot be edited ({str(error).splitlines()[0]}): make it smaller, or "
                    "use a --merged file without --dynamic: it scales pictures to its size"
                ) from error
            if picture.mode == "RGBA":
                edit.putalpha(picture.getchannel("A"))
            common.write_png(out / stem / name, edit)
    print(f"{len(pictures)} pictures, {len(models)} edits of each: {out}")


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):  # a page gets threads if no other site's can look into it
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def serve(folder: Path, port: int) -> None:
    common.read_json(folder / "index.json", "06_export_onnx.py without --merged")
    handler = functools.partial(Handler, directory=folder)
    try:
        server = http.server.ThreadingHTTPServer(("localhost", port), handler)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; give another: --serve PORT") from None
    print(f"{folder}: open http://localhost:{server.server_port}, Ctrl-C stops", flush=True)
    server.serve_forever()


def main() -> None:
    args, began = parse(), time.time()
    if args.serve is not None:
        serve(args.out, args.serve)
    paths = args.model or export_all(args, began)
    if args.apply:
        apply_files(args, paths)


if __name__ == "__main__":
    common.run(main)
