"""Edits pictures with the folder that this file lies in, without PyTorch.

editor = Editor("runs/onnx")
editor.use("starry", strength=0.8)  # or two of them: editor.use({"starry": 0.8, "wave": 0.4})
editor.edit("photo.jpg").save("starry.png")
"""

import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors.numpy
from PIL import Image, ImageCms, ImageOps

with contextlib.suppress(ImportError):  # for iPhones' HEIC files; all else goes without it
    import pillow_heif

    pillow_heif.register_heif_opener()


def session_options(threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # it raises what it would log
    # or idle sessions' threads slow the running one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Editor:
    """Edits pictures with an exported folder. threads: 0 takes one per core. Bad input raises
    ValueError and changes nothing."""

    def __init__(self, folder, threads=0):
        self.folder = Path(folder)
        self.threads = threads
        if not (self.folder / "index.json").is_file():
            raise ValueError(f"{folder} holds no index.json: 06_export_onnx.py writes one")
        self.index = json.loads((self.folder / "index.json").read_text("utf-8"))
        self.graph = self.read("base.onnx")
        self.base = safetensors.numpy.load(self.read("base.safetensors"))
        self.session = None  # use() makes it

    def read(self, file):
        data = (self.folder / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.index["files"][file]["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in index.json")
        return data

    def use(self, concept, strength=1.0):
        """Chooses the concept of edit(): a name, or {name: strength} of several. Returns self.

        A strength, from 0 to 1.5, scales the change of the weights by an adapter; several changes
        add up. Prompts are mixed in proportion to the strengths. A concept of the base has only a
        prompt, so its strength matters only beside another's."""
        chosen = concept if isinstance(concept, dict) else {concept: strength}
        known = {concept["name"]: concept for concept in self.index["concepts"]}
        if not chosen:
            raise ValueError(f"no concept is named; known are {', '.join(known)}")
        for name, share in chosen.items():
            if name not in known:
                raise ValueError(f"unknown concept {name!r}; known are {', '.join(known)}")
            if not 0 <= share <= 1.5:
                raise ValueError(f"{name}: a strength of {share} is not from 0 to 1.5")
            if len(chosen) == 1 and share != 1 and "adapter" not in known[name]:
                raise ValueError(f"{name} is a concept of the base: alone it has no strength but 1")
        weights = dict(self.base)
        prompts = []  # (strength, tokens (T, D)) each
        for name, share in chosen.items():
            if "adapter" in known[name]:
                prompts.append((share, self.merge(weights, known[name]["adapter"], share)))
            elif "tokens" in weights:
                place = known[name]["place"]
                prompts.append((share, weights["tokens"][place][weights["mask"][place]]))
        text = {}
        if "tokens" in weights:
            text = {"text": mix_prompts(prompts)[None]}
        names = sorted(weights.keys() - {"tokens", "mask"})
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in names]
        options = session_options(self.threads)
        options.add_external_initializers(names, values)
        self.session = onnxruntime.InferenceSession(self.graph, options, ["CPUExecutionProvider"])
        self.text = text
        return self

    def merge(self, weights, file, strength):
        """Adds strength * alpha / rank * B A to the weights; returns the prompt's tokens (T, D)."""
        data = self.read(file)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header.pop("__metadata__")["about"])
        if about["base"] != self.index["files"]["base.safetensors"]["sha256"]:
            raise ValueError(f"{file} belongs to another base")
        for name, tensor in header.items():
            if tensor["dtype"] not in ("F16", "F32"):
                raise ValueError(f"{file}: {name} is {tensor['dtype']}, not F16 or F32.")
        adapter = safetensors.numpy.load(data)
        for layer, rank in about["ranks"].items():
            a, b = adapter.get(f"{layer}.lora_A"), adapter.get(f"{layer}.lora_B")
            if a is None or b is None or f"{layer}.weight" not in weights:
                raise ValueError(f"{file} or the base lacks a tensor of {layer}")
            weight = weights[f"{layer}.weight"].copy()
            out_first = weight.swapaxes(0, 1) if layer in self.index["transposed"] else weight
            outputs = len(out_first)
            columns = weight.size // outputs
            if a.shape != (rank, columns) or b.shape != (outputs, rank):
                raise ValueError(f"{file}: {layer} does not fit the base")
            change = strength * about["alpha"] / rank * b.astype("float32") @ a.astype("float32")
            out_first += change.reshape(out_first.shape)
            weights[f"{layer}.weight"] = weight
        tokens = adapter.get("tokens", np.zeros(0))
        if "tokens" in weights and tokens.shape[1:] != weights["tokens"].shape[2:]:
            raise ValueError(f"{file}: its prompt does not fit the base")
        return tokens

    def edit(self, picture, full_size=False):
        """A picture's edit. picture: a file's path or a PIL picture, for an edit as a PIL picture,
        upright, in sRGB and with the picture's transparency; or an array, uint8 (H, W, 3) RGB, for
        an edit as an array.

        A large picture is edited at edit_size(), and its edit is that small; full_size scales it
        back to the picture's size, which adds no detail."""
        if self.session is None:
            raise ValueError("no concept is chosen yet: call use() first")
        if isinstance(picture, str | os.PathLike):
            picture = read_picture(picture)
        if not isinstance(picture, Image.Image):
            return self.edit_array(np.asarray(picture), full_size)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"a picture of mode {picture.mode}: give one of 8 bits a channel")
        edit = Image.fromarray(self.edit_array(np.asarray(to_srgb(picture)), full_size))
        if picture.has_transparency_data:
            edit.putalpha(picture.convert("RGBA").getchannel("A").resize(edit.size))
        return edit

    def edit_array(self, picture, full_size):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            found = f"{picture.dtype} {picture.shape}"
            raise ValueError(f"an array of {found} is no picture: give uint8 (H, W, 3), RGB")
        height, width = picture.shape[:2]
        if not picture.size:
            raise ValueError(f"a picture of {width}x{height} has no pixels")
        inner_width, inner_height = self.edit_size(width, height)
        inner = scale(picture, inner_width, inner_height)
        multiple = self.index["multiple"]
        pad = (0, -inner_height % multiple), (0, -inner_width % multiple), (0, 0)
        edit = self.run(np.pad(inner, pad, "symmetric")[None])[0, :inner_height, :inner_width]
        return scale(edit, width, height) if full_size else edit

    def edit_size(self, width, height):
        """(width, height) at which a picture of this size is edited: its own or, if it has more
        than index["most pixels"], for which attention would need too much memory, a smaller one of
        the same shape."""
        multiple, most = self.index["multiple"], self.index["most pixels"]
        shrink = min(1, (most / (width * height)) ** 0.5)
        while True:
            inner = max(1, round(width * shrink)), max(1, round(height * shrink))
            padded = [side + -side % multiple for side in inner]
            if padded[0] * padded[1] <= most or max(inner) == 1:
                return inner
            shrink *= 0.99

    def run(self, photos):
        """Photos uint8 (N, H, W, 3), with H and W multiples of index["multiple"] -> edits like
        them."""
        return self.session.run(None, {"photo": photos, **self.text})[0]


class Merged(Editor):
    """Edits pictures with a file of `06_export_onnx.py --merged`, given as its path or bytes, which
    has one concept. A file of fixed size edits larger pictures at a size that fits into its own."""

    def __init__(self, file, threads=0):
        options = session_options(threads)
        self.session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        about = self.session.get_modelmeta().custom_metadata_map
        self.text = {}
        self.index = dict(about)
        self.side = None
        if about.get("size", "any") != "any":
            self.side = int(about["size"].split("x")[0])
            self.index |= {"multiple": self.side, "most pixels": self.side**2}
        elif about:
            self.index |= {key: int(about[key]) for key in ("multiple", "most pixels")}

    def edit_size(self, width, height):
        if "multiple" not in self.index:
            raise ValueError("the file was not written by 06_export_onnx.py --merged")
        if self.side is None:
            return super().edit_size(width, height)
        shrink = min(1, self.side / max(width, height))
        return max(1, round(width * shrink)), max(1, round(height * shrink))

    def run(self, photos):
        if self.session.get_inputs()[0].type == "tensor(uint8)":
            return super().run(photos)
        photos = photos.transpose(0, 3, 1, 2).astype("float32") / 127.5 - 1
        edits = self.session.run(None, {"photo": photos})[0].transpose(0, 2, 3, 1)
        return ((edits.clip(-1, 1) + 1) * 127.5).round().astype("uint8")


def mix_prompts(prompts):
    """[(strength, tokens (T, D)), ...] -> tokens (T, D): the mean of some prompts, weighted by
    strength. Shorter prompts are filled up with their mean token. editor.js does the same."""
    counting = [(strength, tokens) for strength, tokens in prompts if strength > 0]
    if len(counting) < 2:
        _, tokens = (counting or prompts)[0]
        return tokens.astype("float32")
    total = sum(strength for strength, _ in counting)
    length = max(len(tokens) for _, tokens in counting)
    mixed = 0
    for strength, tokens in counting:
        tokens = tokens.astype("float32")
        rest = np.tile(tokens.mean(0), (length - len(tokens), 1))
        mixed = mixed + np.float32(strength / total) * np.concatenate([tokens, rest])
    return mixed


def read_picture(path):
    """A picture file as a PIL picture, upright."""
    if str(path).lower().endswith((".heic", ".heif")) and "HEIF" not in Image.OPEN:
        raise ValueError(f"{path} is a HEIC file: `pip install pillow-heif` reads them")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow raises anything where a file is broken
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error


def to_srgb(picture):
    """A PIL picture as RGB, converted from its colour profile: phones' photos are in Display P3."""
    rgb = picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA"):
        return rgb
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(theirs):
            return rgb
        return ImageCms.profileToProfile(rgb, theirs, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError) as error:
        warnings.warn(f"the colour profile cannot be used and is left out: {error}", stacklevel=2)
        return rgb


def scale(picture, width, height):
    """uint8 (H, W, 3), scaled to (height, width, 3)."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
