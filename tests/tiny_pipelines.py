"""What stage 1's tests share: photos and edits, diffusers pipelines of a few
thousand random weights, saved as folders that `from_pretrained` loads; readers of its output."""

import json
import struct
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion import safety_checker
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def t5_text(width: int = 16) -> dict:
    """T5 over single letters: Flux's second text encoder, Stable Diffusion 3's third."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(chr(i), -1.0) for i in (0x2581, *range(33, 127))]  # first the mark of a space
    sizes = {"d_model": width, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(pieces), **sizes)
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)
    return {"text_encoder": transformers.T5EncoderModel(config), "tokenizer": tokenizer}


def qwen_text() -> dict:
    """Qwen3 over single bytes: the text encoder of FLUX.2 klein and Z-Image."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(bytes_to_unicode().values()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Qwen3Config(vocab_size=len(vocabulary), **sizes, **heads)
    return {"text_encoder": transformers.Qwen3ForCausalLM(config), "tokenizer": tokenizer}


def vae(kind: type = diffusers.AutoencoderKL, **options) -> diffusers.ModelMixin:
    """Halves the picture once."""
    sizes = {"down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
    sizes |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    sizes |= {"norm_num_groups": 4, "sample_size": 32}
    return kind(**sizes, **options)


def unet(channels: int, **options) -> diffusers.UNet2DConditionModel:
    sizes = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 16}
    sizes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    sizes |= {"block_out_channels": (8, 16), "norm_num_groups": 4, "in_channels": channels}
    sizes |= {"out_channels": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(**{**sizes, **options})


# ---- A pipeline of each kind, written into a folder ----------------------------------------------


def save_unet_pipeline(kind: type, channels: int, scheduler, folder: Path, **more) -> Path:
    torch.manual_seed(0)
    parts = {"vae": vae(), "unet": unet(channels), "scheduler": scheduler}
    without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    texts = clip_text(folder / "words")
    parts = {**texts, **parts, **without, "requires_safety_checker": False, **more}
    kind(**parts).save_pretrained(folder)
    return folder


def euler():
    return diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")


def ddim():
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)


def instruct_pix2pix(folder: Path) -> Path:
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    return save_unet_pipeline(kind, 8, euler(), folder)


def text_to_image(folder: Path) -> Path:
    return save_unet_pipeline(diffusers.StableDiffusionPipeline, 4, ddim(), folder)


def inpainting(folder: Path) -> Path:
    return save_unet_pipeline(diffusers.StableDiffusionInpaintPipeline, 9, ddim(), folder)


def controlnet(folder: Path) -> Path:
    network = diffusers.ControlNetModel.from_unet(unet(4), conditioning_embedding_out_channels=(8,))
    kind = diffusers.StableDiffusionControlNetPipeline
    return save_unet_pipeline(kind, 4, ddim(), folder, controlnet=network)


def careful(folder: Path) -> Path:
    """InstructPix2Pix with a safety checker that finds every picture improper."""
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config={**vision, **layers}, projection_dim=16)
    checker = safety_checker.StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(-2)  # below any cosine
    extractor = transformers.CLIPImageProcessor(size=32, crop_size=32)
    more = {"safety_checker": checker, "feature_extractor": extractor}
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    return save_unet_pipeline(kind, 8, euler(), folder, **more, requires_safety_checker=True)


def clip_text_twice(folder: Path) -> dict:
    """The two text encoders of Stable Diffusion XL and 3, both with a projection."""
    texts = {}
    for name in ("", "_2"):
        part = clip_text(folder)
        encoder = transformers.CLIPTextModelWithProjection(part["text_encoder"].config)
        texts |= {f"text_encoder{name}": encoder, f"tokenizer{name}": part["tokenizer"]}
    return texts


def xl_instruct_pix2pix(folder: Path) -> Path:
    torch.manual_seed(0)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + 16, "cross_attention_dim": 32}
    texts = clip_text_twice(folder / "words")
    texts["text_encoder"] = transformers.CLIPTextModel(texts["text_encoder"].config)
    kind = diffusers.StableDiffusionXLInstructPix2PixPipeline
    pipe = kind(vae=vae(), unet=unet(8, **added), scheduler=euler(), **texts, add_watermarker=False)
    pipe.save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    sizes |= {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    sizes |= {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32}
    transformer = diffusers.SD3Transformer2DModel(**sizes)
    third = {f"{name}_3": part for name, part in t5_text(width=32).items()}
    parts = {**clip_text_twice(folder / "words"), **third, "vae": vae(shift_factor=0.1)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, **parts)
    pipe.save_pretrained(folder)
    return folder


def flux_parts(folder: Path) -> dict:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    sizes |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True}
    second = {f"{name}_2": part for name, part in t5_text().items()}
    return {
        **clip_text(folder / "words"),
        **second,
        "transformer": diffusers.FluxTransformer2DModel(**sizes),
        "vae": vae(shift_factor=0.1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


def flux(folder: Path) -> Path:
    diffusers.FluxPipeline(**flux_parts(folder)).save_pretrained(folder)
    return folder


def flux_kontext(folder: Path) -> Path:
    diffusers.FluxKontextPipeline(**flux_parts(folder)).save_pretrained(folder)
    return folder


def flux2_klein(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)}
    sizes |= {"joint_attention_dim": 48, "timestep_guidance_channels": 8}
    transformer = diffusers.Flux2Transformer2DModel(**sizes, guidance_embeds=False)
    for weights in transformer.parameters():
        weights.data *= 10  # random ones hardly look at the photos otherwise
    parts = {**qwen_text(), "vae": vae(diffusers.AutoencoderKLFlux2, latent_channels=4)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    kind = diffusers.Flux2KleinPipeline
    pipe = kind(scheduler=scheduler, transformer=transformer, is_distilled=True, **parts)
    pipe.save_pretrained(folder)
    return folder


def z_image(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2}
    sizes |= {"n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6]}
    transformer = diffusers.ZImageTransformer2DModel(**sizes, axes_lens=[128, 64, 64])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {**qwen_text(), "vae": vae(shift_factor=0.1)}
    pipe = diffusers.ZImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipe.save_pretrained(folder)
    return folder


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


# ---- One file in the layout of the first Stable Diffusion ----------------------------------------

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
# of a U-Net of two levels with a block each; the first level has no attention
UNET = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("down_blocks.0.resnets.0", "input_blocks.1.0"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.3.0"),
    ("down_blocks.1.attentions.0", "input_blocks.3.1"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"),
    ("up_blocks.0.attentions.0", "output_blocks.0.1"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    ("up_blocks.0.upsamplers.0", "output_blocks.1.2"),
    ("up_blocks.1.resnets.0", "output_blocks.2.0"),
    ("up_blocks.1.resnets.1", "output_blocks.3.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
# the decoder's levels are counted from the other end
VAE = (
    ("down_blocks.0.resnets", "down.0.block"),
    ("down_blocks.1.resnets", "down.1.block"),
    ("down_blocks.0.downsamplers.0", "down.0.downsample"),
    ("up_blocks.0.resnets", "up.1.block"),
    ("up_blocks.1.resnets", "up.0.block"),
    ("up_blocks.0.upsamplers.0", "up.1.upsample"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def write_single_file(pipeline: Path, path: Path) -> Path:
    """text_to_image's weights in one file, as checkpoints of Stable Diffusion are passed around."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    tensors = {}
    for name, weights in pipe.unet.state_dict().items():
        for here, there in UNET:
            if name.startswith(f"{here}."):
                name = there + name.removeprefix(here)
        if "transformer_blocks" not in name:
            for here, there in RESNET:
                name = name.replace(f".{here}.", f".{there}.")
        tensors[f"model.diffusion_model.{name}"] = weights
    for name, weights in pipe.vae.state_dict().items():
        attention = ".attentions." in name and weights.dim() == 2
        for here, there in VAE:
            name = name.replace(here, there)
        # attention's layers were 1x1 convolutions
        tensors[f"first_stage_model.{name}"] = weights[..., None, None] if attention else weights
    for name, weights in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = weights
    save_file({name: weights.contiguous() for name, weights in tensors.items()}, path)
    return path
