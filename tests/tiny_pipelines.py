"""What stage 1's tests share: photos and edits, diffusers pipelines of a few
thousand random weights, saved as folders that `from_pretrained` loads; readers of its output."""

import json
import struct
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import save_file

import runs


def scene(width=300, height=200, seed=0):
    """A smooth random picture with a few hard edges, as a photo has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 2 :, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def write_made(root):
    """Photos of several shapes in photos/, their negatives, half as large, in edits/negative/."""
    for i in range(10):
        photo, name = scene(160 + 16 * (i % 3), 120, seed=i), f"{'a b/' * (i % 2)}{i}.jpg"
        edit = ImageOps.invert(photo).resize((photo.width // 2, 60))
        other = Path(name).with_suffix((".jpg", ".png", ".WEBP")[i % 3])
        for path, picture in (("photos" / Path(name), photo), ("edits/negative" / other, edit)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(root / path, quality=95)


def display_p3() -> bytes:
    """An ICC profile of Display P3's primaries with a gamma of 2.2."""

    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    def xyz(*numbers):
        return b"XYZ " + bytes(4) + fixed(*numbers)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    text = b"Display P3\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(79)
    tags = {
        b"desc": description + bytes(-len(description) % 4),
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table = struct.pack(">I", len(tags))
    body = b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = struct.pack(">I", start + len(body))
    header = size + bytes(4) + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + body


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def psnr(a, b):
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return min(99, 10 * np.log10(255**2 / max(1e-9, error)))


def contents(folder):
    """{relative path: bytes} of every file but locks, and result.json, which holds a clock's."""
    paths = [path for path in folder.rglob("*.*") if path.suffix != ".lock"]
    paths = [path for path in paths if path.name != "result.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def rows(folder, *splits):
    """metadata.jsonl of splits, which may lie in rejected/."""
    found = []
    for split in splits or ("train", "test"):
        lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        found += [json.loads(line) for line in lines]
    return found


def features(folder):
    return runs.read_tensors(folder / "features.safetensors", "features")[0]


def clip_text(folder: Path) -> dict:
    """A text encoder over single letters."""
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends))
    tokenizer = transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def vae() -> diffusers.AutoencoderKL:
    """Halves the picture once."""
    options = {"down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
    options |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    options |= {"norm_num_groups": 4, "sample_size": 32}
    return diffusers.AutoencoderKL(**options)


def unet(channels: int) -> diffusers.UNet2DConditionModel:
    options = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 16}
    options |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    options |= {"block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": channels}
    options |= {"out_channels": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(**options)


def save_unet_pipeline(kind: type, channels: int, scheduler, folder: Path) -> Path:
    torch.manual_seed(0)
    parts = {"vae": vae(), "unet": unet(channels), "scheduler": scheduler}
    without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    texts = clip_text(folder / "words")
    pipe = kind(**texts, **parts, **without, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def instruct_pix2pix(folder: Path) -> Path:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    return save_unet_pipeline(kind, 8, scheduler, folder)


def text_to_image(folder: Path) -> Path:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return save_unet_pipeline(diffusers.StableDiffusionPipeline, 4, scheduler, folder)


def write_lora(path: Path, seed: int = 0, form: str = "diffusers", width: int = 16) -> Path:
    """A LoRA of large random numbers for `unet`, as diffusers names its layers or as kohya's
    trainer does; with another width it fits no layer."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    for part in ("to_q", "to_k", "to_v"):
        down, up = torch.randn(2, width, generator=rng), torch.randn(width, 2, generator=rng)
        if form == "diffusers":
            tensors[f"unet.{layer}.{part}.lora_A.weight"] = down
            tensors[f"unet.{layer}.{part}.lora_B.weight"] = up
        else:
            name = f"lora_unet_{layer}.{part}".replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(2.0)  # the rank: a factor of 1
    save_file(tensors, path)
    return path
