"""Stage 6: one self-contained ONNX file per concept, proved against PyTorch, timed, and applied to photos.

The network is traced once per generator, its inputs the photo and the prompt's text features. Each file is that graph
with its concept's weights (LoRA merged) and its prompt as constants, and what depends on constants alone computed.
A concept comes from the last file that knows it: the generators in the order given, then the adapters. DCGAN's generator knows
one, `dcgan`: its file takes noise (N, 100) of N(0, 1) and gives pictures; no photo is needed to prove, time or calibrate it.

Reads   generator*.safetensors (stages 3, 4, 5), adapter.safetensors (stage 4; each finds its base by SHA-256), photos
Writes  runs/onnx/<concept>.onnx    input photo (N, 3, H, W) in [-1, 1] or, with --io uint8, (N, H, W, 3) in 0..255;
                                    output edit, like it; its metadata says which, and concept, prompt and base
        runs/onnx/comparison.png    photo | teacher | base | adapter | pruned | ONNX          result.json
        runs/onnx/applied/...       edits of --apply's pictures

    python 06_export_onnx.py --demo
    python 06_export_onnx.py --adapter runs/lora --size 256 --precision int8 --io uint8
    python 06_export_onnx.py --model runs/onnx/sketch.onnx --apply photos       (needs the file alone, no checkpoint)
"""

import argparse
import copy
import logging
import math
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite
from PIL import Image, ImageOps
from tqdm import tqdm

import common

PAPER = dict(
    generator=[Path("runs/base/generator.safetensors")],
    pairs=Path("runs/pairs"),
    out=Path("runs/onnx"),
    photos=None,
    strength=1.0,
    size=256,
    precision="fp32",
    io="float32",
    threads=2,
)
DEMO = dict(
    generator=[
        Path("runs/demo/base/generator.safetensors"),
        Path("runs/demo/coronet/generator.safetensors"),
    ],
    pairs=Path("runs/demo/pairs"),
    out=Path("runs/demo/onnx"),
    size=64,
)
OPSET = 18  # ONNX Runtime 1.14 (2023) and later, its web and mobile builds included
BARS = dict(
    fp32=1e-3, fp16=45.0, int8=30.0
)  # fp32: most difference from PyTorch, of a range of 2; others: least dB
CALIBRATION = 32  # training photos that int8's ranges are measured on
COMPARED = 4  # test photos on which PyTorch runs too
SAMPLES = 6  # pictures of DCGAN's that are compared
REFERENCE = "resnet9"  # whose latency the others are compared with


# ---------------------------------------------------------------------------------------------------------------------
# Which concept comes from where


def find_adapters(args) -> list[Path]:
    """The files that --adapter names, and those below the folders that it names. Without it: those in the folder `lora`
    beside the default generators' (there may be none); for other generators none, as those adapters need not fit."""
    if args.adapter is None:
        default = (DEMO if args.demo else PAPER)["generator"]
        lora = default[0].parents[1] / "lora"
        return sorted(lora.rglob("adapter.safetensors")) if args.generator == default else []
    files = []
    for path in args.adapter:
        if not path.exists():
            raise common.UserError(f"{path} does not exist; 04_lora_finetune.py makes adapters")
        files += sorted(path.rglob("adapter.safetensors")) if path.is_dir() else [path]
    return files


def load_sources(
    generators: list[Path], adapters: list[Path], strength: float = 1.0
) -> list[common.Generator]:
    """The generators, then a copy of its base for each adapter, with the adapter merged at this strength. Each has
    .adapter: the concept that it was adapted to, or None."""
    sources = []
    for path in generators:
        generator = common.load_network(
            path, torch.device("cpu"), common.Generator.kind, common.DcganGenerator.kind
        )
        generator.adapter = None
        sources.append(generator)
    bases = {generator.sha256: generator for generator in sources}
    for path in adapters:
        base = common.read_tensors(path, "adapter")[1].get("base")
        if str(base) not in bases:
            raise common.UserError(
                f"{path} belongs to a base with SHA-256 {str(base)[:12]}..., which is none of "
                f"{', '.join(map(str, generators))}; give that one with --generator too"
            )
        adapted = copy.deepcopy(bases[base])
        index = common.load_adapter(adapted, path, strength)
        common.remove_parametrizations(adapted)
        adapted.adapter = adapted.config["concepts"][index]["name"]
        sources.append(adapted)
    return sources


def from_noise(source: common.Network) -> bool:
    return isinstance(source, common.DcganGenerator)


def known_to(source: common.Network) -> list[str]:
    """Names of a source's concepts; an adapted generator counts for the one that it was adapted to alone."""
    if from_noise(source):
        return [source.config["arch"]]
    return (
        [source.adapter]
        if source.adapter
        else [concept["name"] for concept in source.config["concepts"]]
    )


def kind(source: common.Generator) -> str:
    pruned = source.config["widths"] != source.config["full"]
    return ("pruned" if pruned else "base") + (" + adapter" if source.adapter else "")


def choose(
    sources: list[common.Generator], wanted: list[str] | None
) -> dict[str, common.Generator]:
    """{concept: the last source that knows it}, for the wanted concepts or all."""
    found = {name: source for source in sources for name in known_to(source)}
    for name in wanted or []:
        if name not in found:
            raise common.UserError(
                f"unknown concept {name!r}; generators and adapters know {', '.join(found)}"
            )
    return {name: found[name] for name in wanted or found}


def prompt_of(source: common.Generator, concept: str) -> tuple[str, torch.Tensor | None]:
    """A concept's prompt and its text features (1, T, D), None for an architecture that takes no text."""
    if from_noise(source):
        return "", None
    index = source.concept(concept)
    text = source.tokens[index][source.mask[index]][None] if "text_dim" in source.config else None
    return source.config["concepts"][index]["prompt"], text


# ---------------------------------------------------------------------------------------------------------------------
# Export


class PhaseConv(torch.nn.Module):
    """A transposed convolution of stride 2 as four convolutions of the small picture, one for each place in a 2 x 2 block of
    the large one: the same products without the zeros between, in a form that ONNX Runtime has fast kernels for."""

    def __init__(self, conv: torch.nn.ConvTranspose2d):
        super().__init__()
        assert conv.output_padding[0] == 2 * conv.padding[0] + 2 - conv.kernel_size[0], (
            "the picture must come out twice as large"
        )
        reads = [
            [
                ((place + conv.padding[0] - tap) // 2, tap)
                for tap in reversed(range(conv.kernel_size[0]))
                if (place + conv.padding[0] - tap) % 2 == 0
            ]
            for place in (0, 1)
        ]  # [(pixel read, relative; tap)] of a place
        self.pads = [(-x[0][0], x[-1][0], -y[0][0], y[-1][0]) for y in reads for x in reads]
        weight, self.bias = conv.weight.detach().transpose(0, 1), conv.bias
        self.weights = torch.nn.ParameterList(
            [
                weight[:, :, [tap for _, tap in y]][..., [tap for _, tap in x]].contiguous()
                for y in reads
                for x in reads
            ]
        )

    def forward(self, x):
        places = [
            F.conv2d(F.pad(x, pad), weight, self.bias)
            for pad, weight in zip(self.pads, self.weights)
        ]
        rows = [
            torch.stack(pair, -1).flatten(3) for pair in (places[:2], places[2:])
        ]  # (B, C, H, 2W)
        return torch.stack(rows, 3).flatten(2, 3)  # (B, C, 2H, 2W)


class FoldFilm(RewriteRuleClassBase):
    """FiLM after an instance norm becomes the norm's own scale and shift, one pass over the picture instead of three."""

    def pattern(self, op, x, one, zero, scale, shift):
        return op.Add(
            op.Mul(op.InstanceNormalization(x, one, zero, _outputs=["normed"]), scale), shift
        )

    def check(self, context, one, zero, scale, shift, **_):
        """Whether the norm has no scale and shift of its own, and what follows are numbers a channel."""
        return (
            np.all(one.const_value.numpy() == 1)
            and not np.any(zero.const_value.numpy())
            and all(len(value.shape) == 4 and value.shape[2:] == (1, 1) for value in (scale, shift))
        )

    def rewrite(self, op, x, one, zero, scale, shift, normed):
        flat = op.Constant(value_ints=[-1])
        return op.InstanceNormalization(
            x, op.Reshape(scale, flat), op.Reshape(shift, flat), **normed.producer().attributes
        )


class Network(torch.nn.Module):
    """What a file computes: photo and the prompt's text features (1, T, D), if any -> edit; or noise (N, 100) -> picture.
    Pictures are floats (N, 3, H, W) in [-1, 1], or bytes (N, H, W, 3)."""

    def __init__(self, generator: common.Generator, io: str = "float32"):
        super().__init__()
        self.generator, self.bytes = copy.deepcopy(generator), io == "uint8"
        for name, module in list(self.generator.named_modules()):
            if isinstance(module, torch.nn.ConvTranspose2d) and module.stride == (2, 2):
                self.generator.set_submodule(name, PhaseConv(module))

    def forward(self, photo, text=None):
        if from_noise(self.generator):
            edit = self.generator(photo)
        else:
            edit = self.generator.edit(
                photo.permute(0, 3, 1, 2).float() / 127.5 - 1 if self.bytes else photo, text, None
            )
        if not self.bytes:
            return edit
        return ((edit + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def multiple_of(generator: common.Generator) -> int:
    """Height and width must be multiples of this."""
    return 2 ** generator.config.get("depth", 3)


@torch.no_grad()  # norms and attention by PyTorch's own layers, see common.for_cpu
def trace(
    generator: common.Generator, size: int, io: str = "float32", dynamic: bool = False
) -> ir.Model:
    """The generator as a graph, its prompt an input, its parameters initializers named as in the module."""
    photo, axes = (
        torch.zeros(2, 3, size, size),
        {0: "batch"} | ({2: "height", 3: "width"} if dynamic else {}),
    )
    if io == "uint8":
        photo = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        axes = {0: "batch"} | ({1: "height", 2: "width"} if dynamic else {})
    inputs = {"photo": (photo, axes)}
    if from_noise(generator):
        inputs = {"noise": (*generator.example(batch=2, device="cpu"), {0: "batch"})}
    if "text_dim" in generator.config:
        inputs["text"] = generator.tokens[:1], {1: "tokens"}
    examples, shapes = zip(*inputs.values())
    return torch.onnx.export(
        Network(generator, io).eval(),
        examples,
        None,
        input_names=list(inputs),
        output_names=["picture" if from_noise(generator) else "edit"],
        dynamic_shapes=shapes,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    ).model


def bake(
    graph: ir.Model, generator: common.Generator, text: torch.Tensor | None
) -> onnx.ModelProto:
    """The graph with this generator's weights and this prompt as constants, folded."""
    model = graph.clone()
    for name, weight in Network(generator).named_parameters():
        model.graph.initializers[name].const_value = ir.tensor(weight.detach().numpy())
    if text is not None:
        constant = ir.Value(
            name="prompt",
            const_value=ir.tensor(text.numpy(), name="prompt"),
            shape=ir.Shape(text.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        ir.convenience.replace_all_uses_with(model.graph.inputs[1], constant)
        del model.graph.inputs[1]
        model.graph.register_initializer(constant)
    if not from_noise(generator):
        model.graph.outputs[0].shape = model.graph.inputs[
            0
        ].shape  # the tracer's is a formula of the same value
    optimizer.optimize(model, input_size_limit=2**31, output_size_limit=2**31)
    model = rewrite(model, RewriteRuleSet([FoldFilm.rule()]))
    optimizer.optimize(model, input_size_limit=2**31, output_size_limit=2**31)
    ClearMetadataAndDocStringPass()(model)
    return ir.to_proto(model)


def quantize(proto: onnx.ModelProto, feeds: list[dict]) -> tuple[onnx.ModelProto, str]:
    """Static int8 (weights a scale per channel, QDQ) of the convolutions and linear layers: (model, what is int8).

    Kept in float, as measured on a trained e2gan: the upsamplings (38 to 58 dB with them, 45 to 68 without, as fast), the convolutions
    that read or write the picture, attention's products, whose factors are no weights, and norms. DCGAN consists of nothing
    else: its weights are int8 for the file's size."""
    weights = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    layers = [
        (node, weights.get(node.input[1], ()))
        for node in proto.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "MatMul")
    ]
    chosen = [
        node
        for node, dims in layers
        if node.op_type == "MatMul"
        and len(dims) == 2
        or node.op_type == "Conv"
        and min(dims[:2]) > 3
        and dims[3] < 7
        and ".weights." not in node.input[1]
    ]  # PhaseConv's
    chosen = chosen or [node for node, _ in layers]
    reader = SimpleNamespace(get_next=partial(next, iter(feeds), None))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, f"{folder}/float.onnx")  # a model in memory would be altered
        quantize_static(
            f"{folder}/float.onnx",
            f"{folder}/int8.onnx",
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[node.name for node in chosen],
        )
        made = onnx.load(f"{folder}/int8.onnx")
    total, taken = (
        Counter(node.op_type for node in nodes) for nodes in ([node for node, _ in layers], chosen)
    )
    return made, ", ".join(f"{taken[op]} of {n} {op}" for op, n in total.items())


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime


def open_file(model: bytes | Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU from a file or its bytes; UserError if the runtime cannot take it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = (
        threads,
        4,
    )  # it raises what it would log
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # or idle sessions' threads slow the running one
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base class
        name, reason = (
            "the graph in this precision" if isinstance(model, bytes) else model,
            str(error).splitlines()[0],
        )
        raise common.UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {name}: {reason}"
        )


def feed(
    session: onnxruntime.InferenceSession, photos: torch.Tensor, text: torch.Tensor | None = None
) -> dict:
    """uint8 photos (N, 3, H, W), or noise (N, 100), as the file takes them, and the prompt's features if it is promptable."""
    takes = {value.name: value.type for value in session.get_inputs()}
    if "noise" in takes:
        return {"noise": photos.numpy()}
    photos = (
        photos.permute(0, 2, 3, 1).contiguous()
        if takes["photo"] == "tensor(uint8)"
        else common.to_float(photos)
    )
    return {"photo": photos.numpy()} | ({"text": text.numpy()} if "text" in takes else {})


def run_onnx(
    session: onnxruntime.InferenceSession,
    photos: torch.Tensor,
    text: torch.Tensor | None = None,
    batch: int = 8,
) -> torch.Tensor:
    """uint8 photos (N, 3, H, W), or noise (N, 100) -> pictures (N, 3, H, W) in [-1, 1]."""
    made = torch.cat(
        [
            torch.from_numpy(session.run(None, feed(session, part, text))[0])
            for part in photos.split(batch)
        ]
    )
    return common.to_float(made.permute(0, 3, 1, 2)) if made.dtype == torch.uint8 else made


@torch.no_grad()
def run_torch(
    generator: common.Generator, photos: torch.Tensor, text: torch.Tensor | None
) -> torch.Tensor:
    """The same in PyTorch, in fp32."""
    if from_noise(generator):
        return generator(photos)
    return generator.edit(common.to_float(photos), text, None)


def median_ms(
    runs: list[tuple[onnxruntime.InferenceSession, dict]], seconds: float = 1.0
) -> list[float]:
    """Median milliseconds of each session with its inputs, after warm-up. The sessions take turns, so that whatever
    else the machine does hits all alike; at least 10 rounds, and as many as fit `seconds`."""
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(3):
        for session, inputs in runs:
            session.run(None, inputs)
    began = time.perf_counter()
    while len(took[0]) < 10 or time.perf_counter() - began < seconds:
        for (session, inputs), times in zip(runs, took):
            start = time.perf_counter()
            session.run(None, inputs)
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in took]


# ---------------------------------------------------------------------------------------------------------------------
# One concept


def inputs_of(args, source: common.Network, split: str, concept: str, most: int | None = None):
    """What to feed a generator with, and the teacher's edits of it, uint8 (N, 3, size, size): the pairs' photos, whose edits
    are None where the pairs lack the concept; --photos', which have none; for DCGAN noise (N, 100), always the same."""
    if from_noise(source):
        rng = torch.Generator().manual_seed(int(split == "train"))
        return torch.randn(most or SAMPLES, common.FIXED["noise"], generator=rng), None
    if args.photos:  # those at the front are for the test, the others for calibration
        paths = find_pictures(args.photos)
        chosen = paths[:COMPARED] if split == "test" else paths[COMPARED:] or paths
        squares = [
            ImageOps.fit(common.to_pil(read_picture(path)[0]), (args.size, args.size))
            for path in chosen[:most]
        ]
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), None
    known = common.read_concepts(args.pairs)
    name = concept if concept in known else next(iter(known))
    loaded = common.load_pairs(
        args.pairs, split, [name], common.edit_names(args.pairs, split, name)[:most]
    )
    photos, edits = loaded.photos, loaded.edits[0] if concept in known else None
    if loaded.size != args.size:
        photos, edits = (
            None if x is None else resize(x, args.size, args.size) for x in (photos, edits)
        )
    return photos, edits


def resize(photos: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (N, 3, ., .) -> uint8 (N, 3, height, width)."""
    return common.to_uint8(
        F.interpolate(common.to_float(photos), (height, width), mode="bicubic", antialias=True)
    )


def prove(
    name: str,
    session,
    source: common.Generator,
    text: torch.Tensor | None,
    photos: torch.Tensor,
    args,
) -> dict:
    """The file's distance from PyTorch on some photos, as columns; UserError where it misses the bar."""
    made, wanted = run_onnx(session, photos, text), run_torch(source, photos, text)
    if args.io == "uint8":  # what bytes can say of it
        wanted = common.to_float(common.to_uint8(wanted))
    difference, quality = (
        (made - wanted).abs().max().item(),
        common.psnr(made, wanted).mean().item(),
    )
    bar = BARS[args.precision]
    if args.precision == "fp32":
        bar += 2 / 255 if args.io == "uint8" else 0  # a byte may be rounded the other way
        good, distance = difference <= bar, f"{difference:.2g} at most, and {bar:.2g} is allowed"
    else:
        good, distance = quality >= bar, f"{quality:.1f} dB, and {bar:.0f} are needed"
    if not good:
        raise common.UserError(
            f"{name}: the {args.precision} file differs from PyTorch ({distance}): not written"
        )
    return {"max difference": difference, "dB to PyTorch": quality}


def export_concept(
    name: str, source: common.Generator, graph: ir.Model, reference, timed: dict, args
) -> tuple[dict, torch.Tensor]:
    """Writes <concept>.onnx once it is proved. Returns the table's row and its edits of the test photos, uint8.
    `timed` keeps the times, as files of one generator are one graph with different numbers."""
    prompt, text = prompt_of(source, name)
    photos, edits = inputs_of(args, source, "test", name)
    proto, layers = bake(graph, source, text), "all float"
    if args.precision == "fp16":
        model = ir.from_proto(convert_float_to_float16(proto, keep_io_types=True))
        model.graph.sort()  # the converter leaves casts behind the nodes that read them
        proto, layers = ir.to_proto(model), "all fp16"
    if args.precision == "int8":
        session = open_file(proto.SerializeToString(), args.threads)
        calibration, _ = inputs_of(args, source, "train", name, CALIBRATION)
        proto, layers = quantize(proto, [feed(session, photo[None]) for photo in calibration])
    onnx.helper.set_model_props(
        proto,
        {
            "concept": name,
            "prompt": prompt,
            "base sha256": source.sha256,
            "precision": args.precision,
            "value range": "0..255, RGB, NHWC" if args.io == "uint8" else "-1..1, RGB, NCHW",
            "size": "any" if args.dynamic else f"{args.size}x{args.size}",
            "multiple": str(multiple_of(source)),
            "attention heads": str(source.config.get("heads", 0)),
            **({"input": "noise of N(0, 1)"} if from_noise(source) else {}),
        },
    )
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString()
    session = open_file(data, args.threads)
    distance = prove(name, session, source, text, photos[:COMPARED], args)
    if args.dynamic:
        prove(
            name,
            session,
            source,
            text,
            resize(photos[:1], args.size + multiple_of(source), 2 * args.size),
            args,
        )
    common.replace_file(args.out / f"{name}.onnx", lambda aside: aside.write_bytes(data))
    made = run_onnx(session, photos)
    if source.sha256 not in timed:
        still = torch.zeros(1, 3, args.size, args.size, dtype=torch.uint8)
        timed[source.sha256] = median_ms(
            [(session, feed(session, photos[:1])), (reference, feed(reference, still))]
        )
    ms, reference_ms = timed[source.sha256]
    return {
        "concept": name,
        "file": f"{name}.onnx",
        "from": kind(source),
        "layers": layers,
        "KB": len(data) / 1000,
        "GMACs": common.count_macs(source, args.size) / 1e9,
        **distance,
        "PSNR dB": None
        if edits is None
        else common.psnr(made, common.to_float(edits)).mean().item(),
        "ms": ms,
        "FPS": 1000 / ms,
        f"of {REFERENCE}'s time": ms / reference_ms,
        "threads": args.threads,
        "size px": args.size,
    }, common.to_uint8(made)


def export_promptable(source: common.Generator, graph: ir.Model, args) -> None:
    """Writes promptable.onnx, which takes any prompt's text features (1, T, D) as a second input, `text`, and
    prompts.safetensors, the features of the prompts that the generator knows. Proved on each of them, in fp32."""
    proto = bake(graph, source, None)
    onnx.helper.set_model_props(
        proto, {"base sha256": source.sha256, "text tower": source.config["clip"]}
    )
    onnx.checker.check_model(proto, full_check=True)
    session = open_file(proto.SerializeToString(), args.threads)
    texts = {name: prompt_of(source, name)[1].contiguous() for name in known_to(source)}
    for name, text in texts.items():
        photos, _ = inputs_of(args, source, "test", name, 1)
        prove(
            name,
            session,
            source,
            text,
            photos,
            argparse.Namespace(**{**vars(args), "precision": "fp32"}),
        )
    common.write_tensors(
        args.out / "prompts.safetensors", texts, {"kind": "prompts", "clip": source.config["clip"]}
    )
    common.replace_file(
        args.out / "promptable.onnx", lambda aside: aside.write_bytes(proto.SerializeToString())
    )


def export_reference(size: int, threads: int) -> tuple[onnxruntime.InferenceSession, dict]:
    """The network whose time the others are compared with, untrained and in memory: (session, its columns)."""
    generator = common.build_network(
        common.generator_config(REFERENCE, 64, size, [{"name": "", "prompt": ""}])
    )
    data = bake(trace(generator, size), generator, None).SerializeToString()
    return open_file(data, threads), {
        "concept": f"({REFERENCE}, untrained)",
        "KB": len(data) / 1000,
        "GMACs": common.count_macs(generator, size) / 1e9,
    }


def comparison_row(
    name: str, part: int, parts: int, sources: list[common.Generator], made: torch.Tensor, args
) -> list:
    """photo | teacher | base | adapter | pruned | ONNX for the test photo with most contrast in this part of them."""
    photos, edits = inputs_of(args, sources[0], "test", name)
    window = range(len(photos))[len(photos) * part // parts :][: max(1, len(photos) // parts)]
    i = max(window, key=lambda i: photos[i].float().std())
    kinds = {kind(source): source for source in sources if name in known_to(source)}
    adapted = kinds.get("pruned + adapter", kinds.get("base + adapter"))
    pictures = [
        source and common.run_generator(source, photos[i : i + 1], source.concept(name))[0]
        for source in (kinds.get("base"), adapted, kinds.get("pruned"))
    ]
    return [photos[i], None if edits is None else edits[i], *pictures, made[i]]


def sample_rows(sources: list[common.Network], made: torch.Tensor, args) -> dict[str, list]:
    """DCGAN's pictures from the same noise: each generator's in PyTorch, and the file's."""
    noise, _ = inputs_of(args, sources[0], "test", "")
    rows = {kind(source): common.to_uint8(run_torch(source, noise, None)) for source in sources}
    return {label: list(pictures) for label, pictures in (rows | {"ONNX": made}).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of any size


def find_pictures(path: Path) -> list[Path]:
    """A picture file itself, or all below a folder, by their suffixes, sorted."""
    if not path.exists():
        raise common.UserError(f"{path} does not exist")
    if path.is_file():
        return [path]
    found = common.list_pictures(path, "**/*")
    if not found:
        raise common.UserError(f"{path} holds no pictures")
    return found


def read_picture(path: Path) -> tuple[torch.Tensor, Image.Image | None]:
    """uint8 (3, H, W), turned as its EXIF says, and its alpha channel if it has one. UserError if it cannot be read."""
    with common.opened(path) as image:
        image = common.turned(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous(), alpha


def edit_picture(session: onnxruntime.InferenceSession, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) -> its edit, like it. A file of free size takes the whole picture, padded to its multiple; one of
    fixed size takes it scaled to fit, and the edit is scaled back."""
    about, shape = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape
    height, width = pixels.shape[1:]
    if about.get("size") == "any":
        multiple = int(about["multiple"])
        inner, whole = (
            (height, width),
            [multiple * math.ceil(side / multiple) for side in (height, width)],
        )
    else:
        whole = shape[1:3] if session.get_inputs()[0].type == "tensor(uint8)" else shape[2:]
        ratio = min(whole[0] / height, whole[1] / width)
        inner = max(1, round(height * ratio)), max(1, round(width * ratio))
    need = (
        8 * int(about.get("attention heads", 0)) * (whole[0] * whole[1] / 64) ** 2
    )  # bytes: scores, softmax
    if need > psutil.virtual_memory().total:
        raise MemoryError(f"attention over {width}x{height} pixels takes {need / 1e9:.0f} GB")
    photo = pixels[None] if inner == (height, width) else resize(pixels[None], *inner)
    padded = np.pad(
        photo,
        [(0, 0), (0, 0), *[(0, side - part) for side, part in zip(whole, inner)]],
        "symmetric",
    )
    edit = common.to_uint8(run_onnx(session, torch.from_numpy(padded))[..., : inner[0], : inner[1]])
    return edit[0] if inner == (height, width) else resize(edit, height, width)[0]


def fit(pixels: torch.Tensor, side: int = 240) -> torch.Tensor:
    """A picture for the comparison: uint8 (3, side, side), white around what is not square."""
    return torch.from_numpy(
        np.array(ImageOps.pad(common.to_pil(pixels), (side, side), color="white"))
    ).permute(2, 0, 1)


def apply_files(files: list[Path], pictures: Path, out: Path) -> None:
    """Edits pictures with every file: <out>/<file's name>/<picture's path>.png; <out>/comparison.png shows six."""
    paths, root = find_pictures(pictures), pictures if pictures.is_dir() else pictures.parent
    sessions = {file.stem: open_file(file, 0) for file in files}
    for name, session in sessions.items():
        if (takes := [value.name for value in session.get_inputs()]) != ["photo"]:
            raise common.UserError(
                f"--apply edits photos, and {name}.onnx takes {' and '.join(takes)}"
            )
    taken, shown = Counter(path.relative_to(root).with_suffix("") for path in paths), []
    with tqdm(total=len(paths) * len(files), unit="picture") as bar:
        for path in paths:
            name = path.relative_to(root)  # a.jpg and a.png become a.jpg.png and a.png.png
            name = (
                name.with_suffix(".png")
                if taken[name.with_suffix("")] == 1
                else name.with_name(name.name + ".png")
            )
            pixels, alpha = read_picture(path)
            edits = []
            for stem, session in sessions.items():
                try:
                    edits.append(edit_picture(session, pixels))
                except Exception as error:  # the runtime's exceptions have no common base class
                    raise common.UserError(
                        f"{path} cannot be edited ({str(error).splitlines()[0]}): make it smaller, "
                        "or use a file exported without --dynamic: it scales pictures to its size"
                    )
                image = common.to_pil(edits[-1])
                if alpha:
                    image.putalpha(alpha)
                common.write_png(out / stem / name, image)
                bar.update()
            if len(shown) < 6:
                shown.append([fit(picture) for picture in (pixels, *edits)])
    grid = common.picture_grid(shown, ["photo", *sessions], [""] * len(shown), cell=240)
    common.write_png(out / "comparison.png", grid)
    print(f"{len(paths)} pictures, {len(files)} edits of each: {out}")


# ---------------------------------------------------------------------------------------------------------------------


def export_all(args, began: float) -> list[Path]:
    """Exports every concept, unless the folder holds this run already. Returns the files."""
    adapters = find_adapters(args)
    sources = load_sources(args.generator, adapters, args.strength)
    chosen = choose(sources, args.concept)
    noise = any(map(from_noise, chosen.values()))
    sources = [source for source in sources if from_noise(source) == noise]
    if noise:
        if len(chosen) > 1 or args.apply or args.dynamic or args.promptable:
            raise common.UserError(
                "dcgan makes pictures of one size from noise: give its generator alone, without --apply, "
                "--dynamic and --promptable"
            )
        args.size = chosen["dcgan"].config["size"]
    multiple = max(map(multiple_of, chosen.values()))
    smallest = (
        16 if any("tb" in source.config.get("blocks", ()) for source in chosen.values()) else 8
    )  # a norm needs over 1x1
    if args.size < smallest or args.size % multiple:
        raise common.UserError(
            f"--size {args.size}: this generator takes multiples of {multiple} from {smallest} on"
        )
    inputs_of(args, next(iter(chosen.values())), "test", next(iter(chosen)), 1)
    reads = [common.sha256(path)[:16] for path in [*args.generator, *adapters]]
    settings = common.settings_of(args, "06_export_onnx", reads=reads)
    files = [args.out / f"{name}.onnx" for name in chosen]
    if common.begin_run(
        args.out, {k: v for k, v in settings.items() if k not in ("apply", "model")}, args.overwrite
    ):
        return files
    logging.disable(logging.WARNING)  # the tracer and the quantizer address their developers
    reference, reference_row = export_reference(args.size, args.threads)
    graphs, timed, rows, pictures = {}, {}, [], {}
    for name, source in chosen.items():
        if source.sha256 not in graphs:  # an adapted generator has its base's
            graphs[source.sha256] = trace(source, args.size, args.io, args.dynamic)
        row, made = export_concept(name, source, graphs[source.sha256], reference, timed, args)
        print(
            f"{row['file']} ({row['from']}): {row['KB']:.0f} KB, {row['dB to PyTorch']:.0f} dB to PyTorch"
        )
        rows.append(row)
        if noise:
            pictures = sample_rows(sources, made, args)
        else:
            pictures[name] = comparison_row(name, len(pictures), len(chosen), sources, made, args)
    if args.promptable:
        source = next((source for source in sources if "text_dim" in source.config), None)
        if source is None:
            raise common.UserError("--promptable: none of the generators takes a prompt")
        export_promptable(
            source,
            graphs.get(source.sha256) or trace(source, args.size, args.io, args.dynamic),
            args,
        )
    columns = [""] * SAMPLES if noise else ["photo", "teacher", "base", "adapter", "pruned", "ONNX"]
    common.write_png(
        args.out / "comparison.png",
        common.picture_grid(list(pictures.values()), columns, list(pictures)),
    )
    marks = common.marks_of(
        args,
        *([] if args.photos or noise else [args.pairs]),
        *[path.parent for path in args.generator],
    )
    ms = statistics.median(reference_ms for _, reference_ms in timed.values())
    reference_row |= {"ms": ms, "FPS": 1000 / ms, "threads": args.threads, "size px": args.size}
    common.write_result(
        args.out, "06_export_onnx", began, marks, {"ONNX files": [*rows, reference_row]}
    )
    return files


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument(
        "--generator", type=Path, action="append", help="a generator's checkpoint; can be repeated"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        help="an adapter, or a folder for every adapter.safetensors below it; can be repeated "
        "(default: what stage 4 wrote for the default generators)",
    )
    parser.add_argument(
        "--strength", type=float, help="how much of the adapters' change to merge, 0 to 1.5"
    )
    parser.add_argument(
        "--concept",
        action="append",
        help="a concept to export (default: every one); can be repeated",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        help="folder that stage 1 wrote: photos to prove, time and calibrate on",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        help="a folder of photos of any size and format, to do the same without pairs",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="height and width of the photos, a multiple of 8; dcgan has its own",
    )
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="let the file take any height and width, multiples of 8; --size is what it is timed at",
    )
    parser.add_argument(
        "--precision", choices=list(BARS), help="of the layers; input and output are as --io says"
    )
    parser.add_argument(
        "--io",
        choices=["float32", "uint8"],
        help="uint8: the file takes and gives bytes (N, H, W, 3)",
    )
    parser.add_argument(
        "--promptable",
        action="store_true",
        help="also write the first generator with the prompt's text features as a second input",
    )
    parser.add_argument("--threads", type=int, help="ONNX Runtime's threads while it is timed")
    parser.add_argument(
        "--apply",
        type=Path,
        help="a picture, or a folder of pictures of any size and format, to edit",
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        help="apply this exported file instead of exporting; can be repeated",
    )
    args, began = parser.parse(), time.time()
    if not 0 <= args.strength <= 1.5:
        raise common.UserError(f"--strength {args.strength} must be from 0 to 1.5")
    if args.threads < 1:
        raise common.UserError(f"--threads {args.threads} must be 1 or more")
    if args.model and not args.apply:
        raise common.UserError("--model needs --apply: the pictures to edit")
    for path in args.model or []:
        if not path.is_file():
            raise common.UserError(f"--model {path} does not exist")
    files = args.model or export_all(args, began)
    if args.apply:
        apply_files(files, args.apply, args.out / "applied")


if __name__ == "__main__":
    common.run(main)
