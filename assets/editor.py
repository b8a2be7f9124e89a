"""Edits pictures with the folder that this file lies in, without PyTorch.

editor = Editor("runs/onnx")
editor.use("starry", strength=0.8)  # or of two adapters: editor.use({"starry": 0.8, "wave": 0.4})
edit = editor.edit(np.asarray(Image.open("photo.jpg").convert("RGB")))
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors.numpy


def session_options(threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # it raises what it would log
    # or idle sessions' threads slow the running one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Editor:
    """threads: 0 is one a core. What does not fit raises ValueError, and changes nothing."""

    def __init__(self, folder, threads=0):
        self.folder, self.threads = Path(folder), threads
        if not (self.folder / "index.json").is_file():
            raise ValueError(f"{folder} holds no index.json: 06_export_onnx.py writes one")
        self.index = json.loads((self.folder / "index.json").read_text("utf-8"))
        self.graph = self.read("base.onnx")
        self.base = safetensors.numpy.load(self.read("base.safetensors"))

    def read(self, file):
        data = (self.folder / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.index["files"][file]["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in index.json")
        return data

    def use(self, concept, strength=1.0):
        """concept: a name, or {name: strength} of several, whose changes of the weights add up; the
        first one's prompt counts. Strengths go from 0 to 1.5; a concept of the base has none."""
        chosen = concept if isinstance(concept, dict) else {concept: strength}
        known = {concept["name"]: concept for concept in self.index["concepts"]}
        weights, prompts = dict(self.base), []
        for name, share in chosen.items():
            if name not in known:
                raise ValueError(f"unknown concept {name!r}; known are {', '.join(known)}")
            if not 0 <= share <= 1.5:
                raise ValueError(f"{name}: a strength of {share} is not from 0 to 1.5")
            if "adapter" in known[name]:
                prompts.append(self.merge(weights, known[name]["adapter"], share))
            elif "tokens" in weights:
                place = known[name]["place"]
                prompts.append(weights["tokens"][place][weights["mask"][place]])  # (T, D)
        names = sorted(weights.keys() - {"tokens", "mask"})
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in names]
        options = session_options(self.threads)
        options.add_external_initializers(names, values)
        self.session = onnxruntime.InferenceSession(self.graph, options, ["CPUExecutionProvider"])
        self.text = {"text": prompts[0][None].astype("float32")} if "tokens" in weights else {}
        return self

    def merge(self, weights, file, strength):
        """Adds strength * alpha / rank * B A to the weights; returns the prompt's tokens."""
        data = self.read(file)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about, adapter = json.loads(header["__metadata__"]["about"]), safetensors.numpy.load(data)
        if about["base"] != self.index["files"]["base.safetensors"]["sha256"]:
            raise ValueError(f"{file} belongs to another base")
        for layer, rank in about["ranks"].items():
            a, b = (adapter[f"{layer}.lora_{x}"].astype("float32") for x in "AB")
            weight = weights[f"{layer}.weight"].copy()
            out_first = weight.swapaxes(0, 1) if layer in self.index["transposed"] else weight
            out_first += (strength * about["alpha"] / rank * b @ a).reshape(out_first.shape)
            weights[f"{layer}.weight"] = weight
        return adapter.get("tokens")

    def edit(self, picture):
        """uint8 (H, W, 3), RGB -> its edit, like it."""
        (height, width, _), multiple = picture.shape, self.index["multiple"]
        if height * width > self.index["most pixels"]:
            raise ValueError(f"{width}x{height} are more than {self.index['most pixels']} pixels")
        pad = (0, -height % multiple), (0, -width % multiple), (0, 0)
        return self.run(np.pad(picture, pad, "symmetric")[None])[0, :height, :width]

    def run(self, photos):
        return self.session.run(None, {"photo": photos, **self.text})[0]


class Merged(Editor):
    """A file of `06_export_onnx.py --merged` (its path or bytes), which has one concept inside. One
    of fixed size takes pictures whose sides are no longer."""

    def __init__(self, file, threads=0):
        options = session_options(threads)
        self.session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        about = self.session.get_modelmeta().custom_metadata_map
        self.text, self.index = {}, about | {"side": None}
        if about.get("size", "any") != "any":
            side = self.index["side"] = int(about["size"].split("x")[0])
            self.index |= {"multiple": side, "most pixels": side**2}
        elif about:
            self.index |= {key: int(about[key]) for key in ("multiple", "most pixels")}

    def run(self, photos):
        if self.session.get_inputs()[0].type == "tensor(uint8)":
            return super().run(photos)
        photos = photos.transpose(0, 3, 1, 2).astype("float32") / 127.5 - 1
        edits = self.session.run(None, {"photo": photos})[0].transpose(0, 2, 3, 1)
        return ((edits.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
