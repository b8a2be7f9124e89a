"""Stage 6: exports a generator to ONNX, as a folder to ship or to serve as a web page.

The folder holds one graph for all concepts, and its weights beside it: the generator's own file,
byte for byte. A concept is a prompt in that file, or an adapter file of stage 4, of some kilobytes,
which is added to the weights before the graph runs. editor.py does so without PyTorch, index.html
in a browser. --merged writes a file per concept instead, which needs no other file. Each concept is
compared with PyTorch before anything is written, and the graph is timed.

Reads   generator.safetensors (stages 3, 5), adapter.safetensors (stage 4), photos (stage 1 or any)
Writes  runs/onnx/base.onnx         photo (N, H, W, 3) bytes, prompt (1, T, D) -> edit, like it
        runs/onnx/base.safetensors  its weights, and the prompts of the base's own concepts
        runs/onnx/adapters/*        an adapter per further concept
        runs/onnx/index.json        the concepts and files; index.html, editor.py, ... use it
        runs/onnx/<concept>.onnx    with --merged: photo (N, 3, H, W) in [-1, 1] -> edit, like it
        runs/onnx/comparison.png    photo, teacher, every generator's edit, the exported graph's
        runs/onnx/result.json       what `python runs.py` prints
        runs/onnx-applied/...       edits of --apply's pictures or video

    python 06_export_onnx.py --demo
    python 06_export_onnx.py --serve                                            (opens runs/onnx)
    python 06_export_onnx.py --model runs/onnx --concept sketch --apply photos  (edits, no export)
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import logging
import shlex
import shutil
import sys
import tempfile
import timeit
from collections import Counter
from pathlib import Path

import runs  # before torch, which reads how threads wait when it is imported

# isort: split
import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn as nn
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite
from PIL import Image
from tqdm import tqdm

try:
    import av  # PyAV, for videos; the rest goes without it
except ImportError:
    av = None

import common
import dataset
import training
from assets.editor import Editor, Merged
from assets.serve import fetch_runtime, serve
from runs import UserError

OPSET, IR_VERSION = 18, 8  # ONNX Runtime 1.16 (2023) and later, its web and mobile builds included
# {precision: (largest difference from PyTorch, of a range of 2, smallest PSNR in dB)}
TOLERANCE = {"fp32": (1e-3, 60.0), "fp16": (np.inf, 45.0), "int8": (np.inf, 30.0)}
CALIBRATION = 32  # training photos on which int8's ranges are measured
COMPARED = 4  # test photos that PyTorch edits too


def parse() -> argparse.Namespace:
    """The flags. Without --merged, --dynamic and --io are set to what a folder's graph has."""
    parser = runs.Parser(__doc__, "runs/onnx")
    flag = parser.add_argument
    flag(
        "--generator",
        type=Path,
        action="append",
        help="the generator's file (default: stage 3's in runs/); can be repeated: the first is "
        "exported, the others are shown beside it in comparison.png",
    )
    flag(
        "--adapter",
        type=Path,
        action="append",
        help="an adapter's file, or a folder of them, for the generator; can be repeated "
        "(default: without --generator, stage 4's)",
    )
    flag(
        "--strength",
        type=runs.number(float, 0, 1.5),
        default=1.0,
        help="how strongly adapters change the weights: 1 as trained, 0 not at all",
    )
    flag(
        "--concept",
        action="append",
        help="export or apply only this concept; can be repeated (default: all)",
    )
    flag(
        "--pairs",
        type=Path,
        default="runs/pairs",
        help="stage 1's folder, whose photos the graph is compared, timed and calibrated on",
    )
    flag(
        "--photos",
        type=Path,
        help="a folder of photos of any size, in place of those of --pairs",
    )
    flag(
        "--size",
        type=runs.count,
        default=256,
        help="width and height in pixels at which the graph is compared and timed; with --merged "
        "also the only size that a file takes, unless --dynamic is given",
    )
    flag(
        "--threads",
        type=runs.count,
        default=2,
        help="ONNX Runtime's threads while the graph is timed",
    )
    flag(
        "--cdn",
        action="store_true",
        help="the page loads onnxruntime-web from a CDN, in place of a copy in the folder",
    )
    flag(
        "--merged",
        action="store_true",
        help="write a file per concept that stands alone, in place of the folder",
    )
    flag("--dynamic", action="store_true", help="with --merged: the file takes photos of any size")
    flag(
        "--precision",
        choices=list(TOLERANCE),
        default="fp32",
        help="with --merged: type of the layers' numbers",
    )
    flag(
        "--io",
        choices=["float32", "uint8"],
        default="float32",
        help="with --merged: pictures as floats (N, 3, H, W) in [-1, 1] or as bytes (N, H, W, 3)",
    )
    flag("--apply", type=Path, help="a picture, a folder of pictures or a video to edit")
    flag(
        "--full-size",
        action="store_true",
        help="with --apply: scale edits of pictures that were too large back to their size",
    )
    flag(
        "--model",
        type=Path,
        action="append",
        help="with --apply: use this exported folder or file and export nothing; can be repeated",
    )
    flag(
        "--serve",
        type=runs.number(int, 0, 65535),
        nargs="?",
        const=8000,
        metavar="PORT",
        help="serve the exported folder --out as a web page on this machine, at port 8000 or PORT",
    )
    args = parser.parse({})
    if args.model and not args.apply:
        raise UserError("--model needs --apply: the pictures to edit")
    if not args.merged:
        if args.dynamic or args.io != "float32" or args.precision != "fp32":
            raise UserError("--dynamic, --io and --precision are flags of --merged")
        args.dynamic = True  # a folder's graph takes any size
        args.io = "uint8"
    if not args.generator:
        args.generator, default_adapters = default_files(args.demo)
        args.adapter = args.adapter or default_adapters
    return args


def default_files(demo: bool) -> tuple[list[Path], list[Path]]:
    """(generators, adapters) without --generator: stage 3's and stage 4's; in the demo also the
    pruned generator, to compare with. With --generator there are no default adapters, as stage 4's
    may belong to another one."""
    folder = Path("runs/demo" if demo else "runs")
    generators = [folder / "base/generator.safetensors"]
    if demo:
        generators.append(folder / "coronet/generator.safetensors")
    adapters = [folder / "lora"] if (folder / "lora").is_dir() else []
    return generators, adapters


# ---- The graph -----------------------------------------------------------------------------------


class PhaseConv(nn.Module):
    """A transposed convolution of stride 2, computed as four convolutions of the small picture, one
    for each pixel of a 2 x 2 block of the large one, which multiplies no zeros and has fast
    kernels. Their weights are slices of the layer's weight, taken in the graph, so that adapters
    can change that weight; ONNX Runtime computes the slices once."""

    def __init__(self, conv: common.UpConv | nn.ConvTranspose2d):
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.is_up = isinstance(conv, common.UpConv)
        self.cut_off = 1 if self.is_up else conv.padding[0]  # rows of the result that go, each side
        self.padding_mode = "replicate" if self.is_up else "constant"

    def forward(self, x):
        weight = common.UpConv.kernel(self) if self.is_up else self.weight  # (in, out, k, k)
        weight = weight.transpose(0, 1).flip(2, 3)  # of a convolution of the picture with zeros
        kernel = weight.shape[-1]
        pixels = []
        for row, column in itertools.product((0, 1), repeat=2):
            first_y, top, bottom = self.taps(row, kernel)
            first_x, left, right = self.taps(column, kernel)
            padded = nn.functional.pad(x, (left, right, top, bottom), self.padding_mode)
            taps = weight[:, :, first_y::2, first_x::2]
            pixels.append(nn.functional.conv2d(padded, taps, self.bias))
        upper = torch.stack(pixels[:2], -1).flatten(3)  # (B, C, H, 2W)
        lower = torch.stack(pixels[2:], -1).flatten(3)
        return torch.stack([upper, lower], 3).flatten(2, 3)  # (B, C, 2H, 2W)

    def taps(self, pixel: int, kernel: int) -> tuple[int, int, int]:
        """(first tap, padding before, padding after) along one side, for pixel 0 or 1 of a block.
        From the first tap on, every other one of the kernel's counts, as the others meet zeros; the
        paddings are the small picture's, in pixels."""
        last = kernel - 1
        position = self.cut_off + pixel
        first = (last - position) % 2
        return first, (last - first - position) // 2, position // 2


class FoldFilm(RewriteRuleClassBase):
    """Makes FiLM after an instance norm the norm's own scale and shift: one pass, not three."""

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


class HalveLast(RewriteRuleClassBase):
    """Writes GELU as (x (1 + erf)) 0.5 in place of x (0.5 (1 + erf)), which crashes OpenCV 5.0."""

    def pattern(self, op, x, root, one, half):
        return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))

    def check(self, context, half, **_):
        return half.const_value is not None and half.const_value.numpy() == 0.5

    def rewrite(self, op, x, root, one, half):
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


class SumByMatMul(RewriteRuleClassBase):
    """Makes the RMS norm's sum over a token's channels a product with a column of ones, as pnnx,
    ncnn's converter, loses the axis of a ReduceSum."""

    def pattern(self, op, x, two, axes):
        return op.ReduceSum(op.Pow(x, two), axes, keepdims=1)

    def check(self, context, x, axes, **_):
        last = axes.const_value is not None and axes.const_value.numpy().tolist() == [-1]
        return last and isinstance(x.shape[-1], int)

    def rewrite(self, op, x, two, axes):
        ones = op.Constant(value=ir.tensor(np.ones((x.shape[-1], 1), np.float32)))
        return op.MatMul(op.Pow(x, two), ones)


class CenterByPooling(RewriteRuleClassBase):
    """Subtracts the transformer block's mean over positions by a global average pooling of the
    feature map, in place of a ReduceMean of the tokens, whose axis pnnx loses too."""

    def pattern(self, op, x, axes, shape):
        centered = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
        return op.Reshape(op.Transpose(centered, perm=[0, 2, 1]), shape)

    def check(self, context, axes, **_):
        return axes.const_value is not None and axes.const_value.numpy().tolist() == [1]

    def rewrite(self, op, x, axes, shape):
        feature_map = op.Reshape(op.Transpose(x, perm=[0, 2, 1]), shape)
        return op.Sub(feature_map, op.GlobalAveragePool(feature_map))


class FoldSplit(RewriteRuleClassBase):
    """Makes a constant that is split in two two constants: the optimizer does not fold operators
    with several outputs, and OpenCV 4.14 cannot read such a Split."""

    def pattern(self, op, x):
        return op.Split(x, _allow_other_inputs=True, _outputs=["first", "second"])

    def check(self, context, x, **_):
        return x.const_value is not None

    def rewrite(self, op, x, first, second):
        axis = first.producer().attributes["axis"].as_int()
        parts = np.split(x.const_value.numpy(), [first.shape[axis]], axis)
        return tuple(op.Constant(value=ir.tensor(part)) for part in parts)


class Exported(nn.Module):
    """The generator as it is exported: photo, and if it takes text the features (1, T, D) of a
    prompt -> edit. Pictures are floats (N, 3, H, W) in [-1, 1] or, for io "uint8", bytes
    (N, H, W, 3)."""

    def __init__(self, generator: common.Generator, io: str = "float32"):
        super().__init__()
        self.generator = copy.deepcopy(generator)
        self.bytes = io == "uint8"
        for name, module in list(self.generator.named_modules()):
            if isinstance(module, common.UpConv | nn.ConvTranspose2d):
                self.generator.set_submodule(name, PhaseConv(module))

    def forward(self, photo, text=None):
        if not self.bytes:
            return self.generator.edit(photo, text)
        edit = self.generator.edit(photo.permute(0, 3, 1, 2).float() / 127.5 - 1, text)
        return ((edit + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()  # so that norms and attention are PyTorch's own, see common.trains_on_cpu
def trace(generator: common.Generator, size: int, io="float32", dynamic=False) -> ir.Model:
    """The generator as a graph. The prompt is an input; weights are named as in Exported."""
    if io == "uint8":
        photo = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        height, width = 1, 2  # numbers of the dimensions
    else:
        photo = torch.zeros(2, 3, size, size)
        height, width = 2, 3
    examples = {"photo": photo}
    free = {"photo": {0: "batch"}}  # dimensions of any length
    if dynamic:
        free["photo"] |= {height: "height", width: "width"}
    if generator.takes_text:
        examples["text"] = generator.tokens[:1]
        free["text"] = {1: "tokens"}
    program = torch.onnx.export(
        Exported(generator, io).eval(),
        kwargs=examples,
        dynamic_shapes=free,
        output_names=["edit"],
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    return program.model


def simplify(model: ir.Model) -> ir.Model:
    """The graph with constants folded, and rewritten by the rules above."""
    model.graph.outputs[0].shape = model.graph.inputs[0].shape  # in place of the tracer's formula
    folding = {"input_size_limit": 2**31, "output_size_limit": 2**31}
    optimizer.optimize(model, **folding)
    rules = (FoldFilm, HalveLast, SumByMatMul, CenterByPooling, FoldSplit)
    model = rewrite(model, RewriteRuleSet([each.rule() for each in rules]))
    optimizer.optimize(model, **folding)
    ClearMetadataAndDocStringPass()(model)
    model.ir_version = IR_VERSION
    return model


def specialize(graph: ir.Model, generator: common.Generator, concept: int) -> onnx.ModelProto:
    """The graph with this generator's weights, and the prompt of the concept of this index, as
    constants."""
    model = graph.clone()
    for name, weight in Exported(generator).named_parameters():
        model.graph.initializers[name].const_value = ir.tensor(weight.detach().numpy())
    if generator.takes_text:
        prompt = model.graph.inputs.pop(1)
        text = generator.known_concepts()[concept][1][None]  # (1, T, D)
        prompt.const_value = ir.tensor(text.numpy())
        prompt.shape = ir.Shape(text.shape)
        model.graph.register_initializer(prompt)
    return ir.to_proto(simplify(model))


def separate(graph: ir.Model, weights: Path) -> onnx.ModelProto:
    """The graph without weights: they are external data, the tensors in a generator's safetensors
    file (8 bytes with the header's length, the header in JSON, the tensors)."""
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    model = graph.clone()
    names = [name for name in model.graph.initializers if name.startswith("generator.")]
    values = [model.graph.initializers.pop(name) for name in names]
    # While the graph is simplified the weights are inputs of unknown value. Otherwise they would be
    # folded as constants, and those that are zero optimized away.
    for value in values:
        value.const_value = None
    model.graph.inputs.extend(values)
    model = simplify(model)
    del model.graph.inputs[-len(values) :]
    for value in values:
        value.name = value.name.removeprefix("generator.")
        begin, end = header[value.name]["data_offsets"]
        about = {"dtype": value.dtype, "shape": value.shape, "name": value.name}
        value.const_value = ir.ExternalTensor(weights.name, start + begin, end - begin, **about)
        model.graph.register_initializer(value)
    return ir.to_proto(model)


def convert(proto: onnx.ModelProto, precision: str, photos: torch.Tensor) -> onnx.ModelProto:
    """The model in a precision: fp32, fp16 or static int8.

    int8 has a scale per channel of the weights (QDQ), and ranges measured on photos, uint8
    (N, 3, H, W). Stay in float: convolutions that read or write pictures, attention, norms and the
    upsamplings. On a trained e2gan the last cost quality, 38 to 58 dB with them in int8 and 45 to
    68 without, and gained no speed."""
    if precision == "fp32":
        return proto
    if precision == "fp16":
        model = ir.from_proto(convert_float_to_float16(proto, keep_io_types=True))
        model.graph.sort()  # the converter puts casts after the nodes that read them
        return ir.to_proto(model)
    shapes = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    chosen = []  # names of the nodes to quantize
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        weight = node.input[1]
        shape = shapes.get(weight, ())
        is_linear = len(shape) == 2 and shape[1] > 1  # not a norm's column of ones
        # a convolution that neither reads nor writes pictures
        is_inner = len(shape) == 4 and min(shape[:2]) > 3 and shape[3] < 7
        is_upsampling = not weight.endswith(".weight")  # PhaseConv's weights are slices
        if is_linear or (is_inner and not is_upsampling):
            chosen.append(node.name)
    model = open_file(proto.SerializeToString())
    feeds = iter([feed(model, photo) for photo in photos.split(1)])
    reader = argparse.Namespace(get_next=lambda: next(feeds, None))
    with tempfile.TemporaryDirectory() as folder:
        before = f"{folder}/float.onnx"
        after = f"{folder}/int8.onnx"
        onnx.save(proto, before)  # a model in memory would be altered
        quantize_static(
            before,
            after,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            nodes_to_quantize=chosen,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(after)


# ---- Export --------------------------------------------------------------------------------------


def open_file(model: bytes | Path, threads: int = 0) -> Merged:
    """Opens a merged file, or its bytes. UserError if ONNX Runtime cannot run it. threads: 0 leaves
    their number to ONNX Runtime."""
    name = model if isinstance(model, Path) else "this graph"
    with runs.explain(f"ONNX Runtime cannot run {name}"):
        return Merged(model, threads)


def feed(model: Editor, photos: torch.Tensor) -> dict:
    """A model's inputs: photos, given as uint8 (N, 3, H, W), and the prompt."""
    if model.session.get_inputs()[0].type == "tensor(uint8)":
        return {"photo": photos.permute(0, 2, 3, 1).contiguous().numpy(), **model.text}
    return {"photo": dataset.to_float(photos).numpy(), **model.text}


def run_onnx(model: Editor, photos: torch.Tensor, batch=8) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> edits, floats (N, 3, H, W) in [-1, 1]."""
    edits = [model.session.run(None, feed(model, part))[0] for part in photos.split(batch)]
    fake = torch.from_numpy(np.concatenate(edits))
    return dataset.to_float(fake.permute(0, 3, 1, 2)) if fake.dtype == torch.uint8 else fake


def median_ms(model: Editor, photo: torch.Tensor) -> float:
    """Median milliseconds of an edit after warm-up, of 10 edits or as many as fit into a second."""
    run = functools.partial(model.session.run, None, feed(model, photo))
    rounds = max(10, int(1 / min(timeit.repeat(run, repeat=3, number=1))))
    return 1000 * float(np.median(timeit.repeat(run, repeat=rounds, number=1)))


def origin(generator: common.Generator) -> str:
    """base or pruned, for tables and headings."""
    is_whole = generator.config["widths"] == generator.config["full"]
    return "base" if is_whole else "pruned"


def has_adapter(generator: common.Generator) -> bool:
    """Whether load_concepts merged an adapter into it."""
    return hasattr(generator, "adapter")


def limits_of(generator: common.Generator) -> dict[str, int]:
    """The sizes of pictures that a generator takes: sides that are multiples of "multiple", and
    "most pixels" in all, so that attention's 8 bytes per head and pair of tokens fit into 4 GB. A
    token is 8 x 8 pixels."""
    heads = generator.config.get("heads")
    most = int(64 * (4e9 / 8 / heads) ** 0.5) if heads else dataset.MAX_PIXELS
    return {"multiple": 2 ** generator.config.get("depth", 3), "most pixels": most}


def load_concepts(base: Path, adapters: list[Path], strength=1.0) -> dict[str, common.Generator]:
    """{concept: its generator}. The base's own concepts all have the base; an adapter's has a copy
    of the base with the adapter merged in, and the adapter's file as .adapter. UserError if two
    adapters have one name."""
    base = common.load_generator(base)
    generators = {concept["name"]: base for concept in base.config["concepts"]}
    for path in adapters:
        adapted = copy.deepcopy(base)
        index = common.load_adapter(adapted, path, strength)
        common.merge(adapted)
        adapted.set_known_concepts([adapted.known_concepts()[index]])
        adapted.adapter = path
        name = adapted.config["concepts"][0]["name"]
        if name in generators and has_adapter(generators[name]):
            other = generators[name].adapter
            raise UserError(f"{path} and {other} are both called {name!r}: give one of them")
        generators[name] = adapted
    return generators


def find_photos(args) -> tuple[list[Path], list[Path]]:
    """(files of photos to compare and time on, files of photos to calibrate int8 on)"""
    if args.photos:
        files = find_pictures(args.photos)
        others = files[COMPARED:] or files
        return files[:COMPARED], others[:CALIBRATION]
    dataset.read_concepts(args.pairs)  # raises where it is no pairs folder
    test = find_pictures(args.pairs / "test/source")
    train = find_pictures(args.pairs / "train/source")
    return test, train[:CALIBRATION]


def read_squares(files: list[Path], size: int) -> torch.Tensor:
    """The middle squares of pictures, uint8 (N, 3, size, size)."""
    return torch.stack([dataset.to_pixels(dataset.read_square(path, size)) for path in files])


def build_folder(folder: Path, graph: ir.Model, generators: dict, args) -> Editor:
    """Writes base.onnx, base.safetensors, adapters/, index.json and the page into an empty folder,
    and opens it. generators: {concept: its generator}."""
    (folder / "adapters").mkdir()
    (folder / "thumbnails").mkdir()
    shutil.copyfile(args.generator[0], folder / "base.safetensors")
    onnx.save(separate(graph, folder / "base.safetensors"), folder / "base.onnx")
    onnx.checker.check_model(folder / "base.onnx", full_check=True)
    concepts = []
    for name, generator in generators.items():
        concept = generator.concept_index(name)
        entry = {"name": name, "prompt": generator.config["concepts"][concept]["prompt"]}
        if has_adapter(generator):
            entry["adapter"] = f"adapters/{name}.safetensors"
            shutil.copyfile(generator.adapter, folder / entry["adapter"])
        else:
            entry["place"] = concept
        concepts.append(entry)
    files = {}
    for path in sorted(folder.rglob("*.*")):
        about = {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
        files[path.relative_to(folder).as_posix()] = about
    any_generator = next(iter(generators.values()))  # they share the graph
    transposed = []  # layers whose weights have inputs first, which matters for adding B A
    for name, module in common.named_layers(any_generator):
        if isinstance(module, nn.ConvTranspose2d):
            transposed.append(name)
    web = fetch_runtime(folder, args.cdn)
    index = {
        "concepts": concepts,
        "files": files,
        "transposed": transposed,
        **limits_of(any_generator),
        "value range": "0..255, RGB, NHWC",
        "size": args.size,
        "strength": args.strength,
        "web": web,
        "web bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("ort/*"))},
    }
    runs.write_json(folder / "index.json", index)
    skip = shutil.ignore_patterns("*.jpg", "styles.json", "__pycache__")
    shutil.copytree(Path(__file__).parent / "assets", folder, ignore=skip, dirs_exist_ok=True)
    return Editor(folder, args.threads)


def merged_file(name: str, generator: common.Generator, graph: ir.Model, calibrate, args) -> bytes:
    """The bytes of a concept's ONNX file that stands alone. calibrate: photos, uint8
    (N, 3, S, S), on which int8's ranges are measured."""
    concept = generator.concept_index(name)
    proto = convert(specialize(graph, generator, concept), args.precision, calibrate)
    about = {
        "concept": name,
        "prompt": generator.config["concepts"][concept]["prompt"],
        "base sha256": generator.sha256,
        "precision": args.precision,
        **limits_of(generator),
        "value range": "0..255, RGB, NHWC" if args.io == "uint8" else "-1..1, RGB, NCHW",
        "size": "any" if args.dynamic else f"{args.size}x{args.size}",
    }
    onnx.helper.set_model_props(proto, {key: str(value) for key, value in about.items()})
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@torch.no_grad()
def prove(model, name: str, generator: common.Generator, photos: torch.Tensor, args) -> dict:
    """How far the model's edits of photos, uint8 (N, 3, S, S), are from PyTorch's, as columns of a
    table. UserError beyond TOLERANCE."""
    most_difference, least_dB = TOLERANCE[args.precision]
    fake = run_onnx(model, photos)
    concept = torch.full((len(photos),), generator.concept_index(name))
    wanted = generator(dataset.to_float(photos), concept)
    if args.io == "uint8":
        wanted = dataset.to_float(dataset.to_uint8(wanted))
        most_difference += 2 / 255  # a byte may be rounded the other way
    difference = (fake - wanted).abs().max().item()
    quality = training.psnr(fake, wanted).mean().item()
    if not (difference <= most_difference and quality >= least_dB):  # so written, NaN fails too
        distance = f"by {difference:.2g} at most, {quality:.1f} dB; {least_dB:.0f} are needed"
        raise UserError(f"{name}: the {args.precision} graph differs from PyTorch {distance}")
    return {"max difference": difference, "dB to PyTorch": quality}


def find_adapters(paths: list[Path]) -> list[Path]:
    """Adapter files: those given, and all below the folders given."""
    found = []
    for path in paths:
        found += runs.files_below(path, "adapter.safetensors") if path.is_dir() else [path]
    return found


def export_all(args) -> list[Path]:
    """Exports every concept, unless --out holds this run already. Returns the exported files, or
    the folder, for --apply."""
    adapters = find_adapters(args.adapter or [])
    generators = load_concepts(args.generator[0], adapters, args.strength)
    others = [common.load_generator(path) for path in args.generator[1:]]
    unknown = set(args.concept or []) - generators.keys()
    if unknown:
        known = ", ".join(generators)
        raise UserError(f"unknown concept {min(unknown)!r}; known are {known}")
    if args.concept:
        generators = {name: generators[name] for name in args.concept}
    multiple = max(limits_of(each)["multiple"] for each in [*generators.values(), *others])
    if args.size < 16 or args.size % multiple:  # a norm needs more than 1x1
        raise UserError(f"--size {args.size}: give a multiple of {multiple} from 16 on")
    test, train = find_photos(args)
    photos = read_squares(test, args.size)
    calibrate = read_squares(train, args.size)
    reads = [runs.sha256(path)[:16] for path in [*args.generator, *adapters]]
    reads.append(dataset.Pictures([*test, *train], args.size, []).data_hash)
    settings = runs.settings_of(args, reads=reads)
    for key in ("full_size", "serve"):  # they do not change the export
        settings.pop(key)
    written = [args.out / f"{name}.onnx" for name in generators] if args.merged else [args.out]
    if runs.begin_run(args.out, settings, args.overwrite):
        return written
    logging.disable(logging.WARNING)  # the tracer's and the quantizer's are for their developers
    with tempfile.TemporaryDirectory() as scratch:
        rows = export_to(Path(scratch), generators, others, test, photos, calibrate, args)
        for path in sorted(Path(scratch).rglob("*.*")):
            copy_file = functools.partial(shutil.copyfile, path)
            runs.replace_file(args.out / path.relative_to(scratch), copy_file)
    folders = [path.parent for path in [*args.generator, *adapters]]
    if not args.photos:
        folders.append(args.pairs)
    runs.write_result(args, {"ONNX files": rows}, folders)
    return written


def export_to(
    folder: Path, generators: dict, others, test: list[Path], photos, calibrate, args
) -> list[dict]:
    """Exports {concept: generator} to an empty folder and compares each with PyTorch on photos,
    uint8 (N, 3, S, S), of the files `test`. others: generators to show in comparison.png.
    calibrate: photos for int8. Returns the table's rows."""
    base = next(iter(generators.values()))
    graph = trace(base, args.size, args.io, args.dynamic)
    editor = None if args.merged else build_folder(folder, graph, generators, args)
    rows = []
    edits = {}  # {concept: its edits of the photos, uint8 (N, 3, S, S)}
    for name, generator in generators.items():
        if args.merged:
            data = merged_file(name, generator, graph, calibrate, args)
            (folder / f"{name}.onnx").write_bytes(data)
            model = open_file(data, args.threads)
            size = len(data)
        else:
            model = use(editor, name, args.strength)
            size = generator.adapter.stat().st_size if has_adapter(generator) else 0
        proof = prove(model, name, generator, photos[:COMPARED], args)
        if args.dynamic and not rows:  # one other shape, once, as all concepts share the graph
            height = args.size + limits_of(generator)["multiple"]
            prove(model, name, generator, photos[:1].tile(1, 1, 2, 2)[:, :, :height], args)
        edits[name] = dataset.to_uint8(run_onnx(model, photos))
        rows.append(
            {
                "concept": name,
                "from": origin(generator) + " + adapter" * has_adapter(generator),
                "precision": args.precision,
                "KB": size / 1000,
                "GMACs": common.count_macs(generator, args.size) / 1e9,
                **proof,
                **compare_with_teacher(name, edits[name], photos, test, args),
            }
        )
        print(f"{name} ({rows[-1]['from']}): {size / 1000:.0f} KB, {proof['dB to PyTorch']:.0f} dB")
    ms = median_ms(model, photos[:1])  # the same for all concepts, which share the graph
    for row in rows:
        row |= {"ms": ms, "FPS": 1000 / ms, "threads": args.threads, "size px": args.size}
    sheet = comparison(generators, others, edits, test, photos, args)
    runs.write_png(folder / "comparison.png", sheet)
    if not args.merged:  # what the page shows
        dataset.to_pil(photos[0]).save(folder / "photo.jpg", quality=95)
        for name, pictures in edits.items():
            dataset.to_pil(pictures[0]).resize((96, 96)).save(folder / f"thumbnails/{name}.jpg")
    return rows


def teacher_edits(name: str, test: list[Path], args) -> dict[int, Path]:
    """{number of a test photo: the teacher's edit of it}, where stage 1's pairs have one."""
    if args.photos:
        return {}
    paths = {i: args.pairs / "test" / name / photo.name for i, photo in enumerate(test)}
    return {i: path for i, path in paths.items() if path.exists()}


def compare_with_teacher(name: str, edits: torch.Tensor, photos, test: list[Path], args) -> dict:
    """training.measure of the exported graph's edits, as columns of a table; none where stage 1's
    pairs have no teacher's edits."""
    found = teacher_edits(name, test, args)
    if not found:
        return {}
    numbers = list(found)
    truth = read_squares(list(found.values()), args.size)
    return training.measure(edits[numbers], photos[numbers], truth)


def comparison(
    generators: dict, others, edits: dict, test: list[Path], photos, args
) -> Image.Image:
    """A picture of the first photo's edits: a row per concept, and columns for the photo, the
    teacher, PyTorch's edits by the base and by pruned generators, and the exported graph's."""
    origins = dict.fromkeys(origin(each) for each in [*generators.values(), *others])
    columns = ["photo", "teacher", *origins, "ONNX"]
    rows = []
    labels = []
    for name, generator in generators.items():
        shown = {"photo": photos[0], "ONNX": edits[name][0]}
        found = teacher_edits(name, test, args)
        if 0 in found:
            [shown["teacher"]] = read_squares([found[0]], args.size)
        for each in [generator, *others]:
            if name in {concept["name"] for concept in each.config["concepts"]}:
                concept = each.concept_index(name)
                [shown[origin(each)]] = training.run_generator(each, photos[:1], concept)
        rows.append([shown.get(column) for column in columns])
        labels.append(f"{name} (adapter)" if has_adapter(generator) else name)
    return dataset.picture_grid(rows, columns, labels, max(160, args.size))


# ---- Pictures of any size ------------------------------------------------------------------------


def find_pictures(path: Path) -> list[Path]:
    """[path] of a file; of a folder all picture files in it and below, sorted."""
    found = dataset.list_pictures(path, subfolders=True) if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} holds no pictures: give another folder, or a file")
    return found


def use(editor: Editor, concept: str, strength: float) -> Editor:
    """The editor, set to this concept. strength: of its adapter, if it has one."""
    known = {entry["name"]: entry for entry in editor.index["concepts"]}
    if "adapter" not in known.get(concept, {}):
        return editor.use(concept)
    return editor.use(concept, strength)


def open_models(args, paths: list[Path]) -> dict[str, Editor]:
    """{name: model} of exported files and of all concepts of exported folders. The name is that of
    the folder that its edits go to."""
    models = {}
    for path in paths:
        if not path.is_dir():
            models[path.stem] = open_file(path)
    for path in paths:
        if path.is_dir():
            index = runs.read_json(path / "index.json", "06_export_onnx.py")
            with runs.explain(f"{path} cannot be used"):
                for name in args.concept or [concept["name"] for concept in index["concepts"]]:
                    key = f"{path.name}-{name}" if name in models else name
                    models[key] = use(Editor(path), name, args.strength)
    return models


def apply_files(args, paths: list[Path]) -> bool:
    """Writes the edits of --apply into <out>-applied/<model>/. Returns whether all could be."""
    models = open_models(args, paths)
    out = args.out.with_name(f"{args.out.name}-applied")
    if args.apply.is_file() and args.apply.suffix.lower() in VIDEOS:
        apply_to_video(models, out, args)
        return True
    return apply_to_pictures(models, out, args)


def apply_to_pictures(models: dict[str, Editor], out: Path, args) -> bool:
    """Writes <out>/<model>/<picture's path>.png. Pictures that cannot be read or edited are left
    out and named. Returns whether all could be; UserError if none could."""
    pictures = find_pictures(args.apply)
    root = args.apply if args.apply.is_dir() else args.apply.parent
    taken = Counter(path.with_suffix("") for path in pictures)
    sizes = {}  # {picture: width, height}
    bad = []  # what was left out, and why
    for path in tqdm(pictures, unit="picture"):
        name = path.relative_to(root).with_suffix(".png")
        if taken[path.with_suffix("")] > 1:  # a.jpg and a.png become a.jpg.png and a.png.png
            name = name.with_name(path.name + ".png")
        edits = {}
        try:
            picture = dataset.read_picture(path, alpha=True)
            for folder, model in models.items():
                with runs.explain(f"{path} cannot be edited"):
                    edits[folder] = model.edit(picture, args.full_size)
        except UserError as error:
            bad.append(str(error))
            continue
        for folder, edit in edits.items():
            runs.write_png(out / folder / name, edit)
        sizes[path] = picture.size
    if len(bad) == len(pictures):
        raise UserError(bad[0])
    print(f"{len(sizes)} pictures edited by {len(models)} models: {out}")
    tell_of_smaller(sizes, models, args)
    for reason in bad:
        print(f"left out: {reason}", file=sys.stderr)
    return not bad


def tell_of_smaller(sizes: dict[Path, tuple[int, int]], models: dict[str, Editor], args) -> None:
    """Says in one line which pictures were too large to be edited at their own size. sizes:
    {picture: width, height}."""
    smaller = []
    for path, size in sizes.items():
        edited_size = min(model.edit_size(*size) for model in models.values())
        if edited_size != size:
            width, height = edited_size
            smaller.append(f"{path.name} at {width}x{height}")
    if smaller:
        examples = ", ".join(smaller[:3]) + ", ..." * (len(smaller) > 3)
        ending = "" if args.full_size else " (--full-size scales edits back)"
        print(f"{len(smaller)} larger than can be edited, scaled down: {examples}{ending}")


# ---- Videos --------------------------------------------------------------------------------------

# {suffix of a video: FFmpeg's name of the container that its edit is written in}
VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}
VIDEOS |= {".mkv": "matroska", ".webm": "matroska", ".avi": "matroska"}


def apply_to_video(models: dict[str, Editor], out: Path, args) -> None:
    """Writes <out>/<model>/<video's name>, with the video's frame times and sound."""
    video = args.apply
    if av is None:
        raise UserError(f"{video}: {ways_without_av(video, out / next(iter(models)))}")
    container = VIDEOS[video.suffix.lower()]
    name = f"{video.stem}.mkv" if container == "matroska" else video.name
    with runs.explain(f"{video} cannot be edited"):
        size = frame_size(video)
        for folder, model in models.items():
            edit = functools.partial(edit_video, model, video, size, container, args.full_size)
            runs.replace_file(out / folder / name, edit)
    print(f"{len(models)} edits of {video}: {out}")
    tell_of_smaller({video: size}, models, args)


def ways_without_av(video: Path, edits: Path) -> str:
    """Advice for a machine without PyAV. edits: the folder that the frames' edits would go to."""
    source = shlex.quote(str(video))
    split = f"mkdir frames && ffmpeg -i {source} frames/%06d.png"
    join = f"ffmpeg -i {source} -framerate RATE -i {shlex.quote(str(edits))}/%06d.png"
    join += " -map 1:v -map 0:a? -pix_fmt yuv420p edit.mp4"
    return f"`pip install av` reads videos; or `{split}`, then --apply frames, then `{join}`"


def frame_size(video: Path) -> tuple[int, int]:
    """Width and height of a video's first frame, upright."""
    with av.open(video) as source:
        if not source.streams.video:
            raise ValueError("it holds no pictures")
        height, width, _ = upright(next(source.decode(video=0))).shape
        return width, height


def edit_video(
    model: Editor,
    video: Path,
    size: tuple[int, int],
    container: str,
    full_size: bool,
    target: Path,
) -> None:
    """Writes the edits of a video's frames to the file `target`, in H.264. size: the frames' width
    and height, upright. Frames keep their times; sound is copied unchanged."""
    width, height = size if full_size else model.edit_size(*size)
    width = width // 2 * 2  # H.264 takes even sides
    height = height // 2 * 2
    with av.open(video) as source, av.open(target, "w", format=container) as output:
        frames = source.streams.video[0]
        edits = output.add_stream("libx264", rate=frames.average_rate, options={"crf": "18"})
        edits.width = width
        edits.height = height
        edits.pix_fmt = "yuv420p"
        edits.codec_context.time_base = frames.time_base
        edits.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        sound = {}  # {number of a stream: its copy}
        for stream in source.streams.audio:
            sound[stream.index] = output.add_stream_from_template(stream)
        bar = tqdm(total=frames.frames or None, unit="frame")
        for packet in source.demux(frames, *source.streams.audio):
            if packet.stream.type == "video":
                for frame in packet.decode():
                    edit = model.edit(upright(frame), full_size)[:height, :width]
                    edit = av.VideoFrame.from_ndarray(np.ascontiguousarray(edit), format="rgb24")
                    edit = edit.reformat(format="yuv420p", dst_colorspace="ITU709")
                    edit.pts = frame.pts
                    edit.time_base = frame.time_base
                    output.mux(edits.encode(edit))
                    bar.update()
            elif packet.dts is not None:  # not the empty packet that ends a stream
                packet.stream = sound[packet.stream.index]
                output.mux(packet)
        output.mux(edits.encode())  # frames that the encoder still holds
        bar.close()


def upright(frame) -> np.ndarray:
    """A video's frame as uint8 (H, W, 3) RGB, turned as its file says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def main() -> None:
    args = parse()
    if args.serve is not None:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how one stops it
            serve(args.out, args.serve)
        return
    paths = args.model or export_all(args)
    if args.apply and not apply_files(args, paths):
        sys.exit(1)


if __name__ == "__main__":
    runs.run(main)
