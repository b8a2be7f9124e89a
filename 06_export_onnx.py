"""Exports an ONNX file per concept, proved against PyTorch and timed, and applies it to pictures.

A generator is traced once, its inputs the photo and the prompt's text features. A file is that
graph with its concept's weights (LoRA merged) and prompt as constants, folded. A concept comes from
the last file that knows it: the generators in the order given, then the adapters.

Reads   generator*.safetensors (stages 3, 5), adapter.safetensors (stage 4), photos (stage 1 or any)
Writes  runs/onnx/<concept>.onnx    photo (N, 3, H, W) in [-1, 1] -> edit, like it; with --io uint8
                                    (N, H, W, 3) in 0..255; the metadata says which
        runs/onnx/comparison.png    photo, teacher, every generator's edit, the file's
        runs/onnx-applied/...       edits of --apply's pictures

    python 06_export_onnx.py --demo
    python 06_export_onnx.py --adapter runs/lora --size 256 --precision int8 --io uint8
    python 06_export_onnx.py --model runs/onnx/sketch.onnx --apply photos    (needs the file alone)
"""

import argparse
import copy
import itertools
import logging
import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
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
from common import UserError

DEMO = {"size": 256}
OPSET, IR_VERSION = 18, 8  # ONNX Runtime 1.14 (2023) and later, its web and mobile builds included
# Most difference from PyTorch, of a range of 2, and least dB.
TOLERANCE = {"fp32": (1e-3, 60.0), "fp16": (math.inf, 45.0), "int8": (math.inf, 30.0)}
CALIBRATION = 32  # training photos that int8's ranges are measured on
COMPARED = 4  # test photos on which PyTorch runs too


def parse() -> argparse.Namespace:
    parser = common.Parser(__doc__, "runs/onnx")
    flag, paths = parser.add_argument, {"type": Path, "action": "append"}
    flag("--generator", **paths, help="a checkpoint, repeatable (default: stage 3's in runs/)")
    flag("--adapter", **paths, help="a file or a folder of them, repeatable (default: stage 4's)")
    flag("--strength", type=common.number(float, 0, 1.5), default=1.0, help="of the adapters")
    flag("--concept", action="append", help="export this one only; can be repeated")
    flag("--pairs", type=Path, default="runs/pairs", help="photos to prove, time, calibrate on")
    flag("--photos", type=Path, help="a folder of photos of any size for that, instead of pairs")
    flag("--size", type=common.count, default=256, help="height and width of the photos")
    flag("--dynamic", action="store_true", help="the file takes any size; --size is timed")
    flag("--precision", choices=list(TOLERANCE), default="fp32", help="of the layers")
    flag("--io", choices=["float32", "uint8"], default="float32", help="uint8: bytes (N, H, W, 3)")
    flag("--threads", type=common.count, default=2, help="ONNX Runtime's threads while timed")
    flag("--apply", type=Path, help="a picture, or a folder of pictures of any size, to edit")
    flag("--model", **paths, help="apply this exported file, export nothing; can be repeated")
    args = parser.parse(DEMO)
    if args.model and not args.apply:
        raise UserError("--model needs --apply: the pictures to edit")
    if not args.generator:  # other generators get no adapters unasked: those need not fit
        runs = Path("runs/demo" if args.demo else "runs")
        made_by = ("base", "coronet") if args.demo else ("base",)
        args.generator = [runs / stage / "generator.safetensors" for stage in made_by]
        if not args.adapter and (runs / "lora").is_dir():
            args.adapter = [runs / "lora"]
    return args


def load_sources(generators, adapters, strength=1.0) -> dict[str, list[common.Generator]]:
    """{concept: the generators that know it}: those in the files, then for each adapter a copy of
    its base with the adapter merged at this strength, which knows the adapter's concept alone."""
    sources, knowing = [common.load_generator(path) for path in generators], {}
    bases = {source.sha256: source for source in sources}
    for path in adapters:
        base = common.read_tensors(path, "adapter")[1].get("base")
        adapted = copy.deepcopy(bases.get(str(base), sources[0]))  # which load_adapter refuses
        place = common.load_adapter(adapted, path, strength)
        common.merge(adapted)
        adapted.set_known([adapted.known()[place]])
        sources.append(adapted)
    for source in sources:
        for concept in source.config["concepts"]:
            knowing.setdefault(concept["name"], []).append(source)
    return knowing


def kind(source: common.Generator) -> str:
    config = source.config
    name = "base" if config["widths"] == config["full"] else "pruned"
    return name + (" + adapter" if config["concepts"][-1].get("adapter") else "")


def multiple_of(source: common.Generator) -> int:
    """Height and width must be multiples of this."""
    return 2 ** source.config.get("depth", 3)


# ---- The graph -----------------------------------------------------------------------------------


class PhaseConv(nn.Module):
    """A transposed convolution of stride 2 as four convolutions of the small picture, one for each
    place in a 2 x 2 block of the large one: the same products without the zeros between, in a form
    that ONNX Runtime has fast kernels for."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter, pad: int, mode="constant"):
        """weight: (in, out, k, k); pad: the transposed convolution's padding; mode: F.pad's."""
        super().__init__()
        self.mode = mode
        kernel = weight.shape[-1]
        reads = []  # for both places along a side: the taps there, pixels read before and after
        for place in (0, 1):
            taps = list(range((place + pad) % 2, kernel, 2))[::-1]
            reads.append((taps, (taps[0] - place - pad) // 2, (place + pad - taps[-1]) // 2))
        self.pads, self.weights, self.bias = [], nn.ParameterList(), bias
        weight = weight.detach().transpose(0, 1)
        for (rows, top, bottom), (columns, left, right) in itertools.product(reads, repeat=2):
            self.pads.append((left, right, top, bottom))
            self.weights.append(weight[:, :, rows][..., columns].contiguous())

    def forward(self, x):
        places = []
        for pad, weight in zip(self.pads, self.weights, strict=True):
            places.append(F.conv2d(F.pad(x, pad, self.mode), weight, self.bias))
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
            if isinstance(module, common.UpConv):
                phases = PhaseConv(module.kernel(), module.bias, 1, "replicate")
                self.generator.set_submodule(name, phases)
            elif isinstance(module, nn.ConvTranspose2d) and module.stride == (2, 2):
                phases = PhaseConv(module.weight, module.bias, module.padding[0])
                self.generator.set_submodule(name, phases)

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
    model.graph.outputs[0].shape = model.graph.inputs[0].shape  # the tracer's is a formula of it
    folding = {"input_size_limit": 2**31, "output_size_limit": 2**31}
    optimizer.optimize(model, **folding)
    model = rewrite(model, RewriteRuleSet([FoldFilm.rule()]))
    optimizer.optimize(model, **folding)
    ClearMetadataAndDocStringPass()(model)
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
        if len(dims) == 2 or (inner and ".weights." not in node.input[1]):  # PhaseConv's
            chosen.append(node.name)
    session = open_file(proto.SerializeToString(), 0)
    feeds = iter([feed(session, photo) for photo in photos.split(1)])
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


def feed(session: onnxruntime.InferenceSession, photos: torch.Tensor) -> dict:
    """uint8 photos (N, 3, H, W) as the file takes them."""
    if session.get_inputs()[0].type == "tensor(uint8)":
        return {"photo": photos.permute(0, 2, 3, 1).contiguous().numpy()}
    return {"photo": common.to_float(photos).numpy()}


def run_onnx(session: onnxruntime.InferenceSession, photos: torch.Tensor, batch=8) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> edits, floats in [-1, 1]."""
    edits = [torch.from_numpy(session.run(None, feed(session, x))[0]) for x in photos.split(batch)]
    fake = torch.cat(edits)
    return common.to_float(fake.permute(0, 3, 1, 2)) if fake.dtype == torch.uint8 else fake


def median_ms(runs: list[tuple], seconds: float = 1.0) -> list[float]:
    """Median milliseconds of each (session, inputs), after warm-up. The sessions take turns, in a
    new order each round, so that whatever else the machine does, and who ran before, hits all
    alike; at least 10 rounds, and as many as fit."""
    rounds, began = [], time.perf_counter()
    while len(rounds) < 13 or time.perf_counter() - began < seconds:
        rounds.append([0.0] * len(runs))
        for i in torch.randperm(len(runs)).tolist():
            session, inputs = runs[i]
            start = time.perf_counter()
            session.run(None, inputs)
            rounds[-1][i] = 1000 * (time.perf_counter() - start)
    return np.median(rounds[3:], axis=0).tolist()


# ---- Export --------------------------------------------------------------------------------------


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


@torch.no_grad()
def prove(session, name: str, source: common.Generator, photos: torch.Tensor, args) -> dict:
    """The file's distance from PyTorch on some photos, as columns; UserError beyond TOLERANCE."""
    place, (most, least) = source.concept(name), TOLERANCE[args.precision]
    fake, wanted = run_onnx(session, photos), source(common.to_float(photos), torch.tensor([place]))
    if args.io == "uint8":  # what bytes can say of it; one may be rounded the other way
        wanted, most = common.to_float(common.to_uint8(wanted)), most + 2 / 255
    difference = (fake - wanted).abs().max().item()
    quality = training.psnr(fake, wanted).mean().item()
    if not (difference <= most and quality >= least):  # NaN is not
        distance = f"by {difference:.2g} at most, {quality:.1f} dB; {least:.0f} are needed"
        raise UserError(f"{name}: the {args.precision} file differs from PyTorch {distance}")
    return {"max difference": difference, "dB to PyTorch": quality}


def export_concept(name: str, source: common.Generator, graph: ir.Model, photos, calibrate, args):
    """Writes <concept>.onnx once it is proved on photos, uint8 (N, 3, S, S), converted by
    calibrate, like them. Returns its session and its columns of the table."""
    place = source.concept(name)
    proto = convert(specialize(graph, source, place), args.precision, calibrate)
    about = {
        "concept": name,
        "prompt": source.config["concepts"][place]["prompt"],
        "base sha256": source.sha256,
        "precision": args.precision,
        "value range": "0..255, RGB, NHWC" if args.io == "uint8" else "-1..1, RGB, NCHW",
        "size": "any" if args.dynamic else f"{args.size}x{args.size}",
        "multiple": str(multiple_of(source)),
        "attention heads": str(source.config.get("heads", 0)),
    }
    onnx.helper.set_model_props(proto, about)
    proto.ir_version = IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()
    session = open_file(data, args.threads)
    distance = prove(session, name, source, photos[:COMPARED], args)
    if args.dynamic:
        other = photos[:1].tile(1, 1, 2, 2)[:, :, : args.size + multiple_of(source)]
        prove(session, name, source, other, args)
    common.replace_file(args.out / f"{name}.onnx", lambda part: part.write_bytes(data))
    row = {"concept": name, "from": kind(source), "precision": args.precision}
    size = {"KB": len(data) / 1000, "GMACs": common.count_macs(source, args.size) / 1e9}
    return session, {**row, **size, **distance}


def export_all(args, began: float) -> list[Path]:
    """Exports every concept, unless the folder holds this run already. Returns the files."""
    adapters = []
    for path in args.adapter or []:
        adapters += common.files_below(path, "adapter.safetensors") if path.is_dir() else [path]
    knowing = load_sources(args.generator, adapters, args.strength)
    for name in args.concept or []:
        if name not in knowing:
            raise UserError(f"unknown concept {name!r}; known are {', '.join(knowing)}")
    knowing = {name: knowing[name] for name in args.concept or knowing}
    sources = list(itertools.chain(*knowing.values()))
    multiple = max(map(multiple_of, sources))
    if args.size < 16 or args.size % multiple:  # a norm needs more than 1x1
        raise UserError(f"--size {args.size}: give a multiple of {multiple} from 16 on")
    test, train = find_photos(args)
    photos, calibrate = (read_squares(files, args.size) for files in (test, train))
    reads = [common.sha256(path)[:16] for path in [*args.generator, *adapters]]
    reads.append(training.Pictures([*test, *train], args.size, []).data_hash)
    settings = common.settings_of(args, "06_export_onnx", reads=reads)
    for key in {"generator", "adapter", "photos", "apply", "model"} & settings.keys():  # paths
        del settings[key]
    written = [args.out / f"{name}.onnx" for name in knowing]
    if common.begin_run(args.out, settings, args.overwrite):
        return written
    logging.disable(logging.WARNING)  # the tracer and the quantizer address their developers
    graphs, sessions, rows, pictures = {}, {}, [], []
    kinds = dict.fromkeys(kind(source).split()[0] for source in sources)  # adapters as their bases
    columns = ["photo", "teacher", *kinds, "ONNX"]
    for name, known_by in knowing.items():
        best, key = known_by[-1], known_by[-1].sha256  # an adapted generator has its base's
        if key not in graphs:
            graphs[key] = trace(best, args.size, args.io, args.dynamic)
        session, row = export_concept(name, best, graphs[key], photos, calibrate, args)
        fakes, shown = common.to_uint8(run_onnx(session, photos)), {"photo": photos[0]}
        for source in known_by:
            column, place = kind(source).split()[0], source.concept(name)
            shown[column] = training.run_generator(source, photos[:1], place)[0]
        shown["ONNX"] = fakes[0]
        edits = [] if args.photos else [args.pairs / "test" / name / path.name for path in test]
        places = [place for place, path in enumerate(edits) if path.exists()]
        if places:
            truth = read_squares([edits[place] for place in places], args.size)
            row |= training.measure(fakes[places], photos[places], truth)
            shown |= {"teacher": truth[0]} if places[0] == 0 else {}
        pictures.append([shown.get(column) for column in columns])
        sessions[key] = session  # files of one generator are one graph: timed once
        rows.append((key, row))
        print(f"{name}.onnx ({row['from']}): {row['KB']:.0f} KB, {row['dB to PyTorch']:.0f} dB")
    labels = [
        name + " (adapter)" * kind(known[-1]).endswith("adapter") for name, known in knowing.items()
    ]
    comparison = common.picture_grid(pictures, columns, labels, max(160, args.size))
    common.write_png(args.out / "comparison.png", comparison)
    times = median_ms([(session, feed(session, photos[:1])) for session in sessions.values()])
    times = dict(zip(sessions, times, strict=True))
    for key, row in rows:
        row |= {"ms": times[key], "FPS": 1000 / times[key]}
        row |= {"threads": args.threads, "size px": args.size}
    folders = [path.parent for path in [*args.generator, *adapters]]
    folders += [] if args.photos else [args.pairs]
    marks, seconds = common.marks_of(args, *folders), time.time() - began
    tables = {"ONNX files": [row for _, row in rows]}
    common.write_result(args.out, "06_export_onnx", seconds, marks, tables)
    return written


# ---- Pictures of any size ------------------------------------------------------------------------


def find_pictures(path: Path) -> list[Path]:
    """A picture file itself, or all below a folder, by their suffixes, sorted."""
    found = common.list_pictures(path, "**/*") if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} holds no pictures")
    return found


def edit_picture(session: onnxruntime.InferenceSession, picture: Image.Image) -> Image.Image:
    """RGB -> its edit, as large. A file of free size takes the whole picture, padded to its
    multiple; one of fixed size takes it scaled to fit, and the edit is scaled back."""
    about, takes = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
    height, width = takes.shape[1:3] if takes.type == "tensor(uint8)" else takes.shape[2:]
    inner = picture
    if about.get("size") == "any":
        multiple = int(about["multiple"])
        width, height = (multiple * math.ceil(side / multiple) for side in picture.size)
    else:
        ratio = min(height / picture.height, width / picture.width)
        inner = picture.resize([max(1, round(side * ratio)) for side in picture.size])
    need = (
        8 * int(about.get("attention heads", 0)) * (height * width / 64) ** 2
    )  # bytes: scores, softmax
    if need > psutil.virtual_memory().total:
        raise MemoryError(f"attention over {width}x{height} pixels takes {need / 1e9:.0f} GB")
    pad = [(0, 0), (0, height - inner.height), (0, width - inner.width)]
    photo = torch.from_numpy(np.pad(common.to_pixels(inner), pad, "symmetric"))
    edit = common.to_uint8(run_onnx(session, photo[None])[0, :, : inner.height, : inner.width])
    return common.to_pil(edit).resize(picture.size)


def apply_files(files: list[Path], pictures: Path, out: Path) -> None:
    """Edits pictures with every file: <out>/<file's name>/<picture's path>.png, with the picture's
    own alpha channel."""
    paths, root = find_pictures(pictures), pictures if pictures.is_dir() else pictures.parent
    sessions = {file.stem: open_file(file, 0) for file in files}
    taken = Counter(path.with_suffix("") for path in paths)
    for path in tqdm(paths, unit="picture"):
        name = path.relative_to(root).with_suffix(".png")
        if taken[path.with_suffix("")] > 1:  # a.jpg and a.png become a.jpg.png and a.png.png
            name = name.with_name(path.name + ".png")
        picture = common.read_picture(path, alpha=True)
        for stem, session in sessions.items():
            try:
                edit = edit_picture(session, picture.convert("RGB"))
            except Exception as error:  # the runtime's exceptions have no common base class
                raise UserError(
                    f"{path} cannot be edited ({str(error).splitlines()[0]}): make it smaller, or "
                    "use a file exported without --dynamic: it scales pictures to its size"
                ) from error
            if picture.mode == "RGBA":
                edit.putalpha(picture.getchannel("A"))
            common.write_png(out / stem / name, edit)
    print(f"{len(paths)} pictures, {len(files)} edits of each: {out}")


def main() -> None:
    args, began = parse(), time.time()
    files = args.model or export_all(args, began)
    if args.apply:
        apply_files(files, args.apply, args.out.with_name(f"{args.out.name}-applied"))


if __name__ == "__main__":
    common.run(main)
