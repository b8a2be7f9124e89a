"""Stage 6: one self-contained ONNX file per concept, proved equal to PyTorch, timed, and applied to photos.

The network is traced once per generator with the photo and the prompt's text features as inputs. Each file is that graph with
its concept's weights (LoRA merged) and its prompt as constants, and with everything that depends on constants alone computed.
A concept comes from the last file that knows it: the generators in the order given, then the adapters.

Reads   generator.safetensors (stages 3, 4, 5), adapter.safetensors (stage 4; each finds its base by SHA-256), the test photos
Writes  runs/onnx/<concept>.onnx    input photo (N, 3, H, W) in [-1, 1], output edit, like it; metadata says all of this
        runs/onnx/comparison.png    photo | teacher | base | adapter | pruned | ONNX          result.json
        runs/onnx/applied/...       edits of --apply's pictures

    python 06_export_onnx.py --demo
    python 06_export_onnx.py --generator runs/base/generator.safetensors --adapter runs/lora --size 256 --apply photos
    python 06_export_onnx.py --device cpu       (files are made and timed on the CPU, whatever the machine has)
"""
import copy
import logging
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer

import common

PAPER = dict(
    generator=[Path("runs/base/generator.safetensors")], concept=[],
    pairs=Path("runs/pairs"), size=256, threads=2, out=Path("runs/onnx"),
)
DEMO = dict(
    generator=[Path("runs/demo/base/generator.safetensors"), Path("runs/demo/coronet/generator.safetensors")],
    pairs=Path("runs/demo/pairs"), size=64, out=Path("runs/demo/onnx"),
)
OPSET = 18                      # ONNX Runtime 1.14 (2023) and later, its web and mobile builds included
MOST_DIFFERENCE = 1e-3          # of fp32 from PyTorch, in a range of 2
COMPARED = 8                    # test photos on which PyTorch runs too
REFERENCE = "resnet9"           # whose latency the others are compared with


# ---------------------------------------------------------------------------------------------------------------------
# Which concept comes from where

def find_adapters(args) -> list[Path]:
    """The files that --adapter names, and those below the folders that it names. Without it: those in the folder `lora` beside
    the default generators' (there may be none), or none for other generators, which those adapters need not fit."""
    if args.adapter is None:
        default = (DEMO if args.demo else PAPER)["generator"]
        return sorted((default[0].parents[1] / "lora").rglob("adapter.safetensors")) if args.generator == default else []
    files = []
    for path in args.adapter:
        if not path.exists():
            raise common.UserError(f"{path} does not exist; 04_lora_finetune.py makes adapters")
        files += sorted(path.rglob("adapter.safetensors")) if path.is_dir() else [path]
    return files


def load_sources(generators: list[Path], adapters: list[Path]) -> list[common.Generator]:
    """The generators, then a copy of its base for each adapter, with the adapter merged. Each has .adapter, the concept that
    it was adapted to or None, and .file, where it comes from."""
    sources = []
    for path in generators:
        generator = common.load_generator(path)
        generator.adapter, generator.file = None, path
        sources.append(generator)
    bases = {generator.sha256: generator for generator in sources}
    for path in adapters:
        base = common.read_tensors(path, "adapter")[1].get("base")
        if base not in bases:
            raise common.UserError(f"{path} belongs to a base with SHA-256 {str(base)[:12]}..., which is none of "
                                   f"{', '.join(map(str, generators))}; give that one with --generator too")
        adapted = copy.deepcopy(bases[base])
        index = common.load_adapter(adapted, path)
        common.remove_parametrizations(adapted)
        adapted.adapter, adapted.file = adapted.config["concepts"][index]["name"], path
        sources.append(adapted)
    return sources


def knows(source: common.Generator, concept: str) -> bool:
    """An adapted generator counts for the concept that it was adapted to alone."""
    if source.adapter:
        return source.adapter == concept
    return concept in [known["name"] for known in source.config["concepts"]]


def is_pruned(source: common.Generator) -> bool:
    return source.config["widths"] != source.config["full"]


def kind(source: common.Generator) -> str:
    return ("pruned" if is_pruned(source) else "base") + (" + adapter" if source.adapter else "")


def choose(sources: list[common.Generator], wanted: list[str]) -> dict[str, common.Generator]:
    """{concept: the last source that knows it}, for the wanted concepts or all."""
    names = [source.adapter or known["name"] for source in sources for known in source.config["concepts"]]
    found = {name: [source for source in sources if knows(source, name)][-1] for name in dict.fromkeys(names)}
    for name in wanted:
        if name not in found:
            raise common.UserError(f"unknown concept {name!r}; the generators and adapters given know {', '.join(found)}")
    return {name: found[name] for name in wanted or found}


def prompt_of(source: common.Generator, concept: str) -> tuple[str, torch.Tensor | None]:
    """A concept's prompt and its text features (1, T, D), None for an architecture that takes no text."""
    index = source.concept(concept)
    text = source.tokens[index][source.mask[index]][None] if "text_dim" in source.config else None
    return source.config["concepts"][index]["prompt"], text


# ---------------------------------------------------------------------------------------------------------------------
# Export

class Network(torch.nn.Module):
    """What a file computes: photo (N, 3, H, W) and the prompt's text features (1, T, D), if any -> edit."""

    def __init__(self, generator: common.Generator):
        super().__init__()
        self.generator = generator

    def forward(self, photo, text=None):
        return self.generator.edit(photo, text, None)


def trace(generator: common.Generator, size: int) -> ir.Model:
    """The generator as a graph, its prompt an input, its parameters initializers named as in the module."""
    photo, names, shapes = torch.zeros(2, 3, size, size), ["photo"], [{0: "batch"}]
    inputs = [photo]
    if "text_dim" in generator.config:
        inputs, names, shapes = [photo, generator.tokens[:1]], ["photo", "text"], [{0: "batch"}, {1: "tokens"}]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    return torch.onnx.export(Network(generator).eval(), tuple(inputs), None, input_names=names, output_names=["edit"],
                             dynamic_shapes=tuple(shapes), opset_version=OPSET, optimize=False, verbose=False).model


def bake(graph: ir.Model, generator: common.Generator, text: torch.Tensor | None, about: dict[str, str]) -> onnx.ModelProto:
    """The graph with this generator's weights and this prompt as constants, folded, and `about` as its metadata."""
    model = graph.clone()
    for name, weight in generator.named_parameters():
        model.graph.initializers[f"generator.{name}"].const_value = ir.tensor(weight.detach().numpy())
    if text is not None:
        constant = ir.Value(name="prompt", const_value=ir.tensor(text.numpy(), name="prompt"),
                            shape=ir.Shape(text.shape), type=ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(model.graph.inputs[1], constant)
        del model.graph.inputs[1]
        model.graph.register_initializer(constant)
    optimizer.optimize(model, input_size_limit=2 ** 31, output_size_limit=2 ** 31)
    ClearMetadataAndDocStringPass()(model)
    proto = ir.to_proto(model)
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto, full_check=True)
    return proto


# ---------------------------------------------------------------------------------------------------------------------
# ONNX Runtime

def open_file(model: bytes | Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU from a file or its bytes; UserError if the runtime cannot take it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:                  # the runtime's exceptions have no common base class
        name = "the exported graph" if isinstance(model, bytes) else model
        raise common.UserError(f"ONNX Runtime {onnxruntime.__version__} cannot take {name}: {str(error).splitlines()[0]}")


def run_onnx(session: onnxruntime.InferenceSession, photos: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """uint8 photos (N, 3, H, W) -> edits (N, 3, H, W) in [-1, 1]."""
    return torch.cat([torch.from_numpy(session.run(None, {"photo": common.to_float(part).numpy()})[0])
                      for part in photos.split(batch)])


@torch.no_grad()
def run_torch(generator: common.Generator, photos: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """The same in PyTorch, in fp32."""
    return generator.edit(common.to_float(photos), text, None)


def median_ms(sessions: list[onnxruntime.InferenceSession], photo: torch.Tensor, seconds: float = 0.5) -> list[float]:
    """Median milliseconds for one photo (1, 3, H, W) uint8, after warm-up. The sessions take turns, so that whatever else
    the machine does hits all alike; at least 10 rounds, and as many as fit `seconds`."""
    feed = {"photo": common.to_float(photo).numpy()}
    took: list[list[float]] = [[] for _ in sessions]
    for _ in range(3):
        for session in sessions:
            session.run(None, feed)
    began = time.perf_counter()
    while len(took[0]) < 10 or time.perf_counter() - began < seconds:
        for session, times in zip(sessions, took):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in took]


# ---------------------------------------------------------------------------------------------------------------------
# One concept

def test_photos(pairs: Path, concept: str, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Test photos and the teacher's edits of them (uint8, `size` square), None where the pairs lack the concept."""
    known = common.read_concepts(pairs)
    loaded = common.load_pairs(pairs, "test", [concept if concept in known else next(iter(known))])
    photos, edits = loaded.photos[loaded.rows[0]], loaded.edits[0] if concept in known else None
    if loaded.size != size:
        photos, edits = (None if x is None else common.to_uint8(F.interpolate(
            common.to_float(x), (size, size), mode="bicubic", antialias=True)) for x in (photos, edits))
    return photos, edits


def export_concept(name: str, source: common.Generator, graph: ir.Model, reference, args) -> tuple[dict, torch.Tensor]:
    """Writes <concept>.onnx once it is proved. Returns the table's row and its edits of the test photos, uint8."""
    prompt, text = prompt_of(source, name)
    proto = bake(graph, source, text, {"concept": name, "prompt": prompt, "size": f"{args.size}x{args.size}",
                                       "value range": "-1..1, RGB", "base sha256": source.sha256})
    data = proto.SerializeToString()
    session = open_file(data, args.threads)
    photos, edits = test_photos(args.pairs, name, args.size)
    made = run_onnx(session, photos)
    difference = (made[:COMPARED] - run_torch(source, photos[:COMPARED], text)).abs().max().item()
    if not difference <= MOST_DIFFERENCE:
        raise common.UserError(f"{name}: ONNX Runtime differs from PyTorch by {difference:.2g}, more than {MOST_DIFFERENCE}; "
                               "no file written")
    common.replace_file(args.out / f"{name}.onnx", lambda aside: aside.write_bytes(data))
    ms, reference_ms = median_ms([session, reference], photos[:1])
    quality = None if edits is None else common.psnr(made, common.to_float(edits)).mean().item()
    return {"concept": name, "file": f"{name}.onnx", "from": kind(source), "KB": len(data) / 1000,
            "GMACs": common.count_macs(source, args.size) / 1e9, "max difference": difference, "PSNR dB": quality,
            "ms": ms, "FPS": 1000 / ms, f"of {REFERENCE}'s time": ms / reference_ms, "threads": args.threads,
            "size px": args.size}, common.to_uint8(made)


def export_reference(size: int, threads: int) -> tuple[onnxruntime.InferenceSession, dict]:
    """The network whose time the others are compared with, untrained and in memory: (session, its columns)."""
    generator = common.build_generator(common.generator_config(REFERENCE, 64, size, [{"name": "", "prompt": ""}]))
    data = bake(trace(generator, size), generator, None, {}).SerializeToString()
    return open_file(data, threads), {"concept": f"({REFERENCE}, untrained)", "KB": len(data) / 1000,
                                      "GMACs": common.count_macs(generator, size) / 1e9}


def comparison_row(name: str, pick: int, sources: list[common.Generator], made: torch.Tensor, args) -> list:
    """photo | teacher | base | adapter | pruned | ONNX for one test photo: number `pick` of those with most contrast."""
    photos, edits = test_photos(args.pairs, name, args.size)
    i = photos.float().std((1, 2, 3)).argsort(descending=True)[pick % len(photos)].item()
    kinds = {kind(source): source for source in sources if knows(source, name)}
    adapted = kinds.get("pruned + adapter", kinds.get("base + adapter"))
    pictures = [source and common.run_generator(source, photos[i:i + 1], source.concept(name))[0]
                for source in (kinds.get("base"), adapted, kinds.get("pruned"))]
    return [photos[i], None if edits is None else edits[i], *pictures, made[i]]


def main() -> None:
    parser = common.StageParser(__doc__, PAPER, DEMO)
    parser.add_argument("--generator", type=Path, action="append", help="a generator's checkpoint; can be repeated")
    parser.add_argument("--adapter", type=Path, action="append",
                        help="an adapter, or a folder for every adapter.safetensors below it; can be repeated "
                        "(default: what stage 4 wrote for the default generators)")
    parser.add_argument("--concept", action="append", help="a concept to export (default: every one); can be repeated")
    parser.add_argument("--pairs", type=Path, help="folder that stage 1 wrote: test photos")
    parser.add_argument("--size", type=int, help="height and width of the photos, a multiple of 8")
    parser.add_argument("--threads", type=int, help="ONNX Runtime's threads while it is timed")
    args, began = parser.parse(), time.time()
    if args.size < 8 or args.size % 8:
        raise common.UserError(f"--size {args.size} must be a multiple of 8")

    adapters = find_adapters(args)
    sources = load_sources(args.generator, adapters)
    chosen = choose(sources, args.concept)
    test_photos(args.pairs, next(iter(chosen)), args.size)
    reads = [common.sha256(path)[:16] for path in [*args.generator, *adapters]]
    if common.begin_run(args.out, common.settings_of(args, "06_export_onnx", reads=reads), args.overwrite):
        return
    reference, reference_row = export_reference(args.size, args.threads)
    graphs, rows, pictures = {}, [], []
    for name, source in chosen.items():
        if source.sha256 not in graphs:         # an adapted generator has its base's
            graphs[source.sha256] = trace(source, args.size)
        row, made = export_concept(name, source, graphs[source.sha256], reference, args)
        print(f"{args.out / row['file']}: {row['KB']:.0f} KB, {row['ms']:.1f} ms, differs by {row['max difference']:.1g}")
        rows.append(row)
        pictures.append(comparison_row(name, len(pictures), sources, made, args))
    common.write_png(args.out / "comparison.png", common.picture_grid(
        pictures, ["photo", "teacher", "base", "adapter", "pruned", "ONNX"], list(chosen)))
    common.write_result(args.out, "06_export_onnx", began, common.marks_of(args, *[path.parent for path in args.generator]),
                        {"ONNX files": [*rows, reference_row]})


if __name__ == "__main__":
    common.run(main)
