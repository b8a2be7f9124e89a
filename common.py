"""The papers' modules, and the files that they are saved in.

E2GAN: the generator, which a prompt tells what to do, its discriminator, and LoRA. CoroNetGAN: the
hypernetwork, and slicing to the channels that are left. To compare with: pix2pix's generators and
DCGAN's networks.
"""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from runs import UserError, check_name, explain, read_tensors, sha256, write_tensors

# ---- Layers whose channels have names ------------------------------------------------------------
#
# Every layer says which channel groups it reads and which it writes. A group is a vector of
# channels that several layers share, as in a residual stream: a channel of it is kept in all of
# them or in none. A concatenation is a tuple of groups. Attention's projections name their group
# once per head, so that every head keeps the same dimensions. config["widths"] = {group: channels};
# a pruned network is the same class with smaller widths. config["full"]: the unpruned widths.

# {group: channels} of the groups that are never pruned, beside "text". FiLM layers read "style".
FIXED = {"rgb": 3, "photo": 3, "edit": 3, "noise": 100, "score": 1, "style": 64}
NORM_LIMIT = 8.0  # standard deviations, see ConvNorm


def all_widths(config: dict) -> dict[str, int]:
    """Channels of every group: config["widths"], and of the groups that are never pruned."""
    return {**config["widths"], **FIXED, "text": config.get("text_dim", 0)}


def layer(cls: type, widths: dict, reads, writes, *args, **options) -> nn.Module:
    """A layer of class `cls` (Conv2d, ConvTranspose2d, Linear or one derived from them) between
    channel groups, which it has as .reads and .writes. reads, writes: a group's name or a tuple of
    names. Weights start as N(0, 0.02) (pix2pix), biases as 0."""
    reads = (reads,) if isinstance(reads, str) else tuple(reads)
    writes = (writes,) if isinstance(writes, str) else tuple(writes)
    inputs = sum(widths[group] for group in reads)
    outputs = sum(widths[group] for group in writes)
    module = cls(inputs, outputs, *args, **options)
    nn.init.normal_(module.weight, 0.0, 0.02)
    nn.init.zeros_(module.bias)
    module.reads, module.writes = reads, writes
    return module


def named_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every layer with named channels, in the order of definition."""
    return ((name, module) for name, module in network.named_modules() if hasattr(module, "reads"))


def out_first(weight: torch.Tensor, cls: type) -> torch.Tensor:
    """The weight of a layer of class `cls` with output channels first and input channels second,
    which transposed convolutions have the other way round. The function is its own inverse."""
    return weight.transpose(0, 1) if issubclass(cls, nn.ConvTranspose2d) else weight


def conv(widths, reads, writes, kernel=3, stride=1, padding_mode="zeros") -> nn.Conv2d:
    """A convolution that keeps height and width, or halves them with a stride of 2."""
    shape = {"kernel_size": kernel, "stride": stride, "padding": kernel // 2}
    return layer(nn.Conv2d, widths, reads, writes, **shape, padding_mode=padding_mode)


class ConvNorm(nn.Module):
    """A convolution, an instance norm and a ReLU. The norm has no parameters, so that dropping a
    channel leaves the others as they were.

    After norm and FiLM, values are clamped to NORM_LIMIT standard deviations (a choice of ours).
    Without that a long training learns spikes: in 2,950 steps a few pixels in a dark place grew to
    37 deviations, as they set the norm's scale for all others. They show as a grid of dots
    (StyleGAN2's "droplets", Karras et al. 2020, arXiv 1912.04958)."""

    def __init__(self, conv: nn.Module, norm=True, relu=True):
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.relu = relu

    def forward(self, x, film=None, skip=None):
        """x (B, C, H, W). film (B, 2C'): after the norm the C' channels are multiplied by 1 + its
        first half, and its second half is added. skip (B, C', H', W'): added before the ReLU."""
        x = self.conv(x)
        if self.norm:
            x = instance_norm(x)
        if film is not None:
            scale, shift = film[..., None, None].chunk(2, 1)
            x = x * (1 + scale) + shift
        if self.norm:
            x = x.clamp(-NORM_LIMIT, NORM_LIMIT)
        if skip is not None:
            x = x + skip
        return F.relu(x) if self.relu else x


class ResidualBlock(nn.Module):
    """Two convolutions whose result is added to the stream of channels that they read."""

    def __init__(self, widths, stream, inner):
        super().__init__()
        self.conv1 = ConvNorm(conv(widths, stream, inner, padding_mode="reflect"))
        self.conv2 = ConvNorm(conv(widths, inner, stream, padding_mode="reflect"), relu=False)

    def forward(self, x, film1=None, film2=None):
        return x + self.conv2(self.conv1(x, film1), film2)


class Attention(nn.Module):
    """Multi-head attention with linear projections: queries from the group `stream`, keys and
    values from the group `source`. Its own groups, <prefix>_qk and <prefix>_v, hold one head's
    dimensions, so that all heads keep the same ones. The scores' scale stays that of the unpruned
    network."""

    def __init__(self, widths, full, heads, stream, source, prefix):
        super().__init__()
        queries = (f"{prefix}_qk",) * heads
        values = (f"{prefix}_v",) * heads
        self.heads = heads
        self.scale = full[f"{prefix}_qk"] ** -0.5
        self.q = layer(nn.Linear, widths, stream, queries)
        self.k = layer(nn.Linear, widths, source, queries)
        self.v = layer(nn.Linear, widths, source, values)
        self.out = layer(nn.Linear, widths, values, stream)

    def forward(self, x, source, mask=None):
        """x (B, N, C), source (B, M, D), mask (B, M) True where a token counts -> (B, N, C)"""
        q = self.split_heads(self.q(x))  # (B, heads, N, d)
        k = self.split_heads(self.k(source))  # (B, heads, M, d)
        v = self.split_heads(self.v(source))
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, M)
        if trains_on_cpu(x):
            scores = q @ k.mT * self.scale  # (B, heads, N, M)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, y):
        """(B, N, heads * d) -> (B, heads, N, d)"""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """E2GAN's transformer block, at half the trunk's resolution: self-attention, cross-attention to
    the prompt's tokens and feed-forward, each with a norm before it and a residual connection
    around it. The result is added to the trunk.

    The paper leaves open the number of heads (here 4), the feed-forward ratio (4) and the skips.
    The norm is the RMS over a token's channels, as an instance norm would erase what
    cross-attention adds to all tokens alike. It divides by the unpruned number of channels, so that
    a dropped channel equals one that is 0.

    centered: subtract the mean over positions from what is added to the trunk. In e2gan later norms
    subtract it anyway, but in bf16 the differences between positions would be rounded beside it."""

    def __init__(self, widths, full, heads, centered):
        super().__init__()
        self.channels = full["tb"]
        self.centered = centered
        self.down = ConvNorm(conv(widths, "trunk", "tb", stride=2, padding_mode="reflect"))
        self.self_attention = Attention(widths, full, heads, "tb", "tb", "self")
        self.cross_attention = None
        if widths["text"]:
            self.cross_attention = Attention(widths, full, heads, "tb", "text", "cross")
        self.feed1 = layer(nn.Linear, widths, "tb", "feed")
        self.feed2 = layer(nn.Linear, widths, "feed", "tb")
        self.up = layer(UpConv, widths, "tb", "trunk", 3, padding=1)

    def norm(self, t):
        square = t.float().square().sum(-1, keepdim=True) / self.channels
        return t * torch.rsqrt(square + 1e-6).to(t.dtype)

    def forward(self, x, tokens=None, mask=None):
        h = self.down(x)  # (B, C, H/8, W/8), of a photo H x W
        t = h.flatten(2).transpose(1, 2)  # (B, N, C)
        n = self.norm(t)
        t = t + self.self_attention(n, n)
        if self.cross_attention is not None:
            t = t + self.cross_attention(self.norm(t), tokens, mask)
        t = t + self.feed2(F.gelu(self.feed1(self.norm(t))))
        if self.centered:
            t = t - t.mean(1, keepdim=True)
        return x + self.up(t.transpose(1, 2).unflatten(2, h.shape[2:]))


# ---- Generators ----------------------------------------------------------------------------------


class Network(nn.Module):
    """A network that can be rebuilt from its config, which holds arch, width, size (of its training
    pictures, in pixels), widths and full ({group: channels} now and unpruned), text_dim if it takes
    prompts, and what its class needs beside these.

    A subclass defines `file_kind`, how its files say what they hold, and `example(size, batch,
    device)`, inputs of its forward."""

    sha256 = ""  # of the file that it comes from

    def __init__(self, config: dict):
        super().__init__()
        self.config = config


class Generator(Network):
    """A network that edits photos by concepts: config["concepts"] = [{"name", "prompt"}, ...].

    One that takes text holds the prompts' CLIP features, so that using it needs no CLIP: the
    buffers tokens (concepts, T, D) and mask (concepts, T), True where a token counts, and CLIP's
    name in config["clip"]. A subclass defines `edit(photo, tokens, mask)`."""

    file_kind = "generator"

    def __init__(self, config: dict):
        super().__init__(config)
        self.takes_text = "text_dim" in config
        if self.takes_text:
            shape = len(config["concepts"]), config["tokens"]
            self.register_buffer("tokens", torch.zeros(*shape, config["text_dim"]))
            self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def forward(self, photo, concept=None):
        """photo (B, 3, H, W) in [-1, 1], concept (B,) long, indices into config["concepts"], which
        a generator without text does not need -> edit (B, 3, H, W) in [-1, 1]"""
        if not self.takes_text:
            return self.edit(photo)
        return self.edit(photo, self.tokens[concept], self.mask[concept])

    def example(self, size=None, batch=1, device="meta"):
        size = size or self.config["size"]
        photo = torch.randn(batch, 3, size, size, device=device)
        return photo, torch.zeros(batch, dtype=torch.long, device=device)

    def concept_index(self, name: str) -> int:
        """A concept's index. If an adapter's concept has a name that the base has too, it is the
        adapter's."""
        names = [concept["name"] for concept in self.config["concepts"]]
        if name not in names:
            raise UserError(f"unknown concept {name!r}; this generator knows {', '.join(names)}")
        return len(names) - 1 - names[::-1].index(name)

    def known_concepts(self) -> list[tuple[dict, torch.Tensor | None]]:
        """[(concept, its prompt's features (T, D), or None without text), ...]"""
        prompts = [None] * len(self.config["concepts"])
        if self.takes_text:
            prompts = [row[mask] for row, mask in zip(self.tokens, self.mask, strict=True)]
        return list(zip(self.config["concepts"], prompts, strict=True))

    def set_known_concepts(self, known: list[tuple[dict, torch.Tensor | None]]) -> None:
        """Replaces the concepts and their prompts' features. UserError, and nothing is changed, if
        the features do not fit."""
        if self.takes_text:
            width = self.config["text_dim"]
            prompts = []
            for _, tokens in known:
                if tokens is None or tokens.shape[1:] != (width,) or not len(tokens):
                    raise UserError(f"a prompt's text features are not {width} numbers a token")
                prompts.append(tokens.to(self.tokens))
            counts = [torch.ones(len(t), dtype=torch.bool, device=t.device) for t in prompts]
            self.tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
            self.mask = nn.utils.rnn.pad_sequence(counts, batch_first=True)
            self.config = {**self.config, "tokens": self.tokens.shape[1]}
        self.config = {**self.config, "concepts": [concept for concept, _ in known]}


def trunk(config: dict, centered: bool) -> nn.ModuleDict:
    """The blocks that config["blocks"] names: residual ones "rb0", "rb1", ..., and the transformer
    block "tb"."""
    widths = all_widths(config)
    blocks = nn.ModuleDict()
    for name in config["blocks"]:
        if name == "tb":
            blocks[name] = TransformerBlock(widths, config["full"], config["heads"], centered)
        else:
            blocks[name] = ResidualBlock(widths, "trunk", name)
    return blocks


class E2GAN(Generator):
    """E2GAN's generator: 3 residual blocks, with a transformer block before the last of them.

    The paper leaves open what stands around them; these are choices of ours, made by measuring. An
    instance norm hides how bright a photo is, so none follows the stem, and the last layer also
    reads the photo. It erases what a prompt adds to a whole channel, so every norm is followed by a
    scale and a shift that are computed from the prompt's mean token (FiLM; Dumoulin et al. 2017,
    arXiv 1610.07629). The trunk, at a quarter of the size, loses fine lines, so the stem's features
    are added before the last ReLU."""

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        reflect = {"padding_mode": "reflect"}
        self.stem = ConvNorm(conv(widths, "rgb", "stem", 7, **reflect), norm=False)
        self.down1 = ConvNorm(conv(widths, "stem", "down1", stride=2, **reflect))
        self.down2 = ConvNorm(conv(widths, "down1", "trunk", stride=2, **reflect))
        self.blocks = trunk(config, centered=True)
        self.up1 = ConvNorm(layer(UpConv, widths, "trunk", "up1", 3, padding=1))
        # writes the stem's group, as the stem's features are added to it
        self.up2 = ConvNorm(layer(UpConv, widths, "up1", "stem", 3, padding=1))
        if self.takes_text:
            self.style = layer(nn.Linear, widths, "text", "style")
            self.films = nn.ModuleDict()
            # {norm: the group that it normalises}
            normed = {"down1": "down1", "down2": "trunk", "up1": "up1", "up2": "stem"}
            for name in self.blocks:
                if name != "tb":
                    normed[f"{name}_1"] = name
                    normed[f"{name}_2"] = "trunk"
            for name, group in sorted(normed.items()):
                self.films[name] = layer(nn.Linear, widths, "style", (group, group))
        self.out = layer(ToRGB, widths, ("stem", "rgb"), "rgb", 7, padding=3, **reflect)

    def edit(self, photo, tokens=None, mask=None):
        film = {}  # (B, 2C) for each norm
        if tokens is not None:
            style = F.normalize(self.style(mean_token(tokens, mask))) * FIXED["style"] ** 0.5
            film = {name: linear(style) for name, linear in self.films.items()}
        stem = self.stem(photo)  # (B, C, H, W)
        x = self.down1(stem, film.get("down1"))  # (B, 2C, H/2, W/2)
        x = self.down2(x, film.get("down2"))  # (B, 4C, H/4, W/4)
        for name, block in self.blocks.items():
            if name == "tb":
                x = block(x, tokens, mask)
            else:
                x = block(x, film.get(f"{name}_1"), film.get(f"{name}_2"))
        x = self.up1(x, film.get("up1"))  # (B, 2C, H/2, W/2)
        x = self.up2(x, film.get("up2"), stem)  # (B, C, H, W)
        return torch.tanh(self.out(x, photo))


class ResnetGenerator(Generator):
    """pix2pix's ResNet generator: 9 residual blocks, 11.378 M parameters at width 64."""

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        doubling = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        self.stem = ConvNorm(conv(widths, "rgb", "stem", 7, padding_mode="reflect"))
        self.down1 = ConvNorm(conv(widths, "stem", "down1", stride=2))
        self.down2 = ConvNorm(conv(widths, "down1", "trunk", stride=2))
        self.blocks = trunk(config, centered=False)
        self.up1 = ConvNorm(layer(nn.ConvTranspose2d, widths, "trunk", "up1", **doubling))
        self.up2 = ConvNorm(layer(nn.ConvTranspose2d, widths, "up1", "up2", **doubling))
        self.out = layer(ToRGB, widths, "up2", "rgb", 7, padding=3, padding_mode="reflect")

    def edit(self, photo, tokens=None, mask=None):
        x = self.down2(self.down1(self.stem(photo)))  # (B, 4C, H/4, W/4)
        for block in self.blocks.values():
            x = block(x)
        return torch.tanh(self.out(self.up2(self.up1(x))))


class UNetGenerator(Generator):
    """pix2pix's U-Net: config["depth"] halvings (8 for 256 pixels), skips by concatenation, and in
    training dropout in the three levels above the innermost. Instance norms, but not where a
    feature map is 1x1."""

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        depth = config["depth"]
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        for i in range(depth):
            reads = f"d{i - 1}" if i else "rgb"
            self.downs.append(layer(nn.Conv2d, widths, reads, f"d{i}", 4, 2, padding=1))
        for i in range(depth):
            reads = f"d{i}" if i == depth - 1 else (f"u{i + 1}", f"d{i}")
            writes = f"u{i}" if i else "rgb"
            self.ups.append(layer(nn.ConvTranspose2d, widths, reads, writes, 4, 2, padding=1))

    def edit(self, photo, tokens=None, mask=None):
        depth = len(self.downs)
        x = photo
        skips = []
        for i, down in enumerate(self.downs):
            x = down(F.leaky_relu(x, 0.2) if i else x)
            if 0 < i < depth - 1:
                x = instance_norm(x)
            skips.append(x)
        for i in reversed(range(depth)):
            if i < depth - 1:
                x = torch.cat([x, skips[i]], 1)
            x = self.ups[i](F.relu(x))
            if i:
                x = instance_norm(x)
                x = F.dropout(x, 0.5, self.training and depth - 4 <= i < depth - 1)
        return torch.tanh(x)


# The trunk's blocks: "rb" is a residual block, "tb" the transformer block.
BLOCKS = {"e2gan": ("rb", "rb", "tb", "rb"), "resnet9": ("rb",) * 9}


def generator_config(arch, width, size, concepts, blocks=None, **text) -> dict:
    """The config of an unpruned generator. width: the first layer's channels (64 in the paper).
    blocks: of e2gan and resnet9, like BLOCKS, which is the default. text: of an e2gan that takes
    prompts, tokens (length of the longest), text_dim and clip."""
    if blocks and (arch not in BLOCKS or {*blocks} - {"rb", "tb"} or blocks.count("tb") > 1):
        raise UserError(f"--blocks {','.join(blocks)}: {' and '.join(BLOCKS)} take rb and one tb")
    if arch == "unet256":
        shape, widths = unet_shape(width, size)
    else:
        shape, widths = resnet_shape(arch, width, blocks or BLOCKS[arch], with_text=bool(text))
    config = {"arch": arch, "width": width, "size": size, "widths": widths, "full": widths}
    return {**config, "concepts": concepts, **shape, **text}


def unet_shape(width: int, size: int) -> tuple[dict, dict[str, int]]:
    """({"depth": how often the size is halved}, widths) of a unet256."""
    depth = min(8, (size & -size).bit_length() - 1)  # how often the size can be halved
    widths = {}
    for i in range(depth):
        widths[f"d{i}"] = width * min(2**i, 8)
    for i in range(1, depth):
        widths[f"u{i}"] = width * min(2 ** (i - 1), 8)
    return {"depth": depth}, widths


def resnet_shape(arch, width: int, blocks, with_text: bool) -> tuple[dict, dict[str, int]]:
    """({"blocks": their names, "heads": the transformer block's}, widths) of an e2gan or a
    resnet9."""
    names = []  # "rb0", "rb1", "tb", ...
    for block in blocks:
        residual_blocks = sum(name != "tb" for name in names)
        names.append("tb" if block == "tb" else f"rb{residual_blocks}")
    shape = {"blocks": names}
    widths = {"stem": width, "down1": 2 * width, "trunk": 4 * width, "up1": 2 * width}
    for name in names:
        widths[name] = 4 * width
    if arch == "resnet9":
        widths["up2"] = width
    if "tb" in names:
        shape["heads"] = 4
        for attention in ("self", "cross") if with_text else ("self",):
            widths[f"{attention}_qk"] = width  # of one head
            widths[f"{attention}_v"] = width
        widths["feed"] = 16 * width
    return shape, widths


def new_generator(arch, width, size, concepts, tokens=None, clip="", blocks=None) -> Generator:
    """An untrained generator. tokens: the features (T, D) of each concept's prompt, which the CLIP
    of this name made, for an e2gan. Without them, and in another architecture, it can learn only
    one concept."""
    text = {}
    if arch == "e2gan" and tokens:
        text = {"text_dim": tokens[0].shape[1], "clip": clip, "tokens": max(map(len, tokens))}
    elif len(concepts) > 1:
        raise UserError(f"{arch} without prompts learns one --concept, not {len(concepts)}")
    generator = build_network(generator_config(arch, width, size, concepts, blocks, **text))
    if text:
        generator.set_known_concepts(list(zip(concepts, tokens, strict=True)))
    return generator


def mean_token(tokens, mask):
    """tokens (B, T, D), mask (B, T) True where a token counts, None for all -> (B, D)"""
    if mask is None:
        return tokens.mean(1)
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def prompt_embedding(generator: Generator, concept: torch.Tensor) -> torch.Tensor | None:
    """What the discriminator is given of the prompts of concepts (B,) long, indices: the mean token
    (B, D), or None for a generator without text."""
    if not generator.takes_text:
        return None
    return mean_token(generator.tokens[concept], generator.mask[concept])


# ---- Discriminator -------------------------------------------------------------------------------


class Discriminator(Network):
    """pix2pix's PatchGAN: scores, without a sigmoid, for 70x70 patches of photo and edit or, where
    config["photo"] is False, of the edit alone (CycleGAN).

    With prompts the score is conv(h) + <P text, h>, after the projection discriminator (a choice of
    ours). `text` is scaled to a unit vector: at CLIP's own length, about 18, the product outweighed
    the rest."""

    file_kind = "discriminator"

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        self.convs = nn.ModuleList()
        reads = ("photo", "edit") if config["photo"] else "edit"
        for group, stride in zip(config["widths"], (2, 2, 2, 1), strict=True):
            self.convs.append(layer(nn.Conv2d, widths, reads, group, 4, stride, padding=1))
            reads = group
        self.project = layer(nn.Linear, widths, "text", reads) if widths["text"] else None
        self.score = layer(nn.Conv2d, widths, reads, "score", 4, padding=1)
        self.score.reset_parameters()  # PyTorch's weights, a third as large: scores start near 0

    def forward(self, photo, edit, text=None):
        """photo (B, 3, H, W) in [-1, 1], or None where config["photo"] is False, edit like it, text
        (B, D) or None -> scores (B, 1, h, w)"""
        return self.features(photo, edit, text)[-1]

    def features(self, photo, edit, text=None) -> list[torch.Tensor]:
        """Every layer's output for forward's inputs, the scores last, for feature matching."""
        x = torch.cat([photo, edit], 1) if self.config["photo"] else edit
        found = []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(instance_norm(x) if i else x, 0.2)
            found.append(x)
        score = self.score(x)
        if self.project is not None:
            match = (self.project(F.normalize(text))[:, :, None, None] * x).sum(1, keepdim=True)
            score = score + F.avg_pool2d(match, 2, 1)  # pooled to the scores' size
        return [*found, score]

    def example(self, size=None, batch=1, device="meta"):
        size = size or self.config["size"]
        text_dim = self.config.get("text_dim")
        photo, edit = torch.randn(2, batch, 3, size, size, device=device)
        if not self.config["photo"]:
            photo = None
        text = torch.randn(batch, text_dim, device=device) if text_dim else None
        return photo, edit, text


def new_discriminator(generator: Generator, text=True, photo=True) -> Discriminator:
    """An untrained PatchGAN for a generator, of its unpruned width and on its device. text: whether
    it sees the prompt too, if the generator does; photo: whether it sees the photo."""
    config = {key: generator.config[key] for key in ("width", "size")}
    config |= {"arch": "patchgan", "photo": photo}
    if text and generator.takes_text:
        config["text_dim"] = generator.config["text_dim"]
    widths = {f"d{i}": config["width"] * 2**i for i in range(4)}
    network = build_network({**config, "widths": widths, "full": widths})
    return network.to(next(generator.parameters()).device)


# ---- DCGAN's networks ----------------------------------------------------------------------------


def batch_norm(widths: dict, group: str) -> nn.BatchNorm2d:
    """A batch norm of a channel group, whose scales start as N(1, 0.02) (DCGAN). It has .writes, so
    that it is sliced, but no .reads, so that no hypernetwork computes its scales."""
    module = nn.BatchNorm2d(widths[group])
    nn.init.normal_(module.weight, 1.0, 0.02)
    module.writes = (group,)
    return module


class DcganGenerator(Network):
    """DCGAN's generator (arXiv 1511.06434): noise becomes 4x4 pixels, which are doubled up to
    config["size"]. Batch norms and ReLUs; tanh at the end."""

    file_kind = "dcgan generator"

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        groups = ["noise", *config["widths"], "rgb"]
        self.ups = nn.ModuleList()
        for i, (reads, writes) in enumerate(itertools.pairwise(groups)):
            stride, padding = (2, 1) if i else (1, 0)
            self.ups.append(layer(nn.ConvTranspose2d, widths, reads, writes, 4, stride, padding))
        self.norms = nn.ModuleList([batch_norm(widths, group) for group in groups[1:-1]])

    def forward(self, noise):
        """noise (B, 100) of N(0, 1) -> (B, 3, S, S) in [-1, 1]"""
        x = noise[..., None, None]
        for up, norm in zip(self.ups[:-1], self.norms, strict=True):
            x = F.relu(norm(up(x)))  # (B, C, 4 * 2^i, 4 * 2^i)
        return torch.tanh(self.ups[-1](x))

    def example(self, size=None, batch=1, device="meta"):
        return (torch.randn(batch, FIXED["noise"], device=device),)


class DcganDiscriminator(Network):
    """DCGAN's discriminator: strided convolutions down to 4x4 pixels, batch norms after all but the
    first, and one score."""

    file_kind = "discriminator"

    def __init__(self, config):
        super().__init__(config)
        widths = all_widths(config)
        groups = ["rgb", *config["widths"]]
        self.convs = nn.ModuleList()
        for reads, writes in itertools.pairwise(groups):
            self.convs.append(layer(nn.Conv2d, widths, reads, writes, 4, 2, 1))
        self.norms = nn.ModuleList([batch_norm(widths, group) for group in groups[2:]])
        self.score = layer(nn.Conv2d, widths, groups[-1], "score", 4)

    def forward(self, picture):
        """picture (B, 3, S, S) in [-1, 1] -> score (B, 1, 1, 1), without a sigmoid"""
        x = F.leaky_relu(self.convs[0](picture), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)

    def example(self, size=None, batch=1, device="meta"):
        size = self.config["size"]
        return (torch.randn(batch, 3, size, size, device=device),)


def dcgan_networks(width: int, size: int) -> dict[str, Network]:
    """DCGAN's networks, untrained, "generator" and "discriminator". width: channels of the
    generator's last feature map and of the discriminator's first."""
    depth = size.bit_length() - 3
    if depth < 1 or size != 4 * 2**depth:
        raise UserError(f"dcgan makes pictures of 8, 16, 32, 64, ... pixels, not {size}")
    down = {f"d{i}": width * min(2**i, 8) for i in range(depth)}
    up = {f"u{i}": n for i, n in enumerate(reversed(down.values()))}
    config = {"width": width, "size": size}
    generator = build_network({"arch": "dcgan", **config, "widths": up, "full": up})
    config = {"arch": "dcgan-d", **config, "widths": down, "full": down}
    return {"generator": generator, "discriminator": build_network(config)}


# ---- All networks --------------------------------------------------------------------------------

ARCHITECTURES = {"e2gan": E2GAN, "resnet9": ResnetGenerator, "unet256": UNetGenerator}
NETWORKS = {
    **ARCHITECTURES,
    "patchgan": Discriminator,
    "dcgan": DcganGenerator,
    "dcgan-d": DcganDiscriminator,
}


def build_network(config: dict) -> Network:
    """An untrained network of a config, whose "arch" names its class."""
    if config["arch"] not in NETWORKS:
        raise UserError(f"unknown architecture {config['arch']!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[config["arch"]](config)


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def count_macs(network: Network, size: int | None = None) -> int:
    """Multiply-accumulates for one picture of size x size (default: config["size"]), of
    convolutions, linear layers and attention, counted by torch.utils.flop_counter."""
    twin = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(*twin.example(size))
    return counter.get_total_flops() // 2


# ---- Layers that are faster on a CPU -------------------------------------------------------------
#
# They compute the same as F.instance_norm, nn.Conv2d, and nn.Upsample before nn.Conv2d, with which
# training on a CPU takes 1.3 to 1.4 times as long.


def trains_on_cpu(x: torch.Tensor) -> bool:
    """Whether x is in a training step on a CPU, where some of PyTorch's own kernels are slow."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def instance_norm(x: torch.Tensor) -> torch.Tensor:
    """F.instance_norm; a group norm with a group per channel is the same."""
    return F.group_norm(x, x.shape[1]) if trains_on_cpu(x) else F.instance_norm(x)


def reflect(x: torch.Tensor, dim: int, reach: int) -> torch.Tensor:
    """x (B, C, H, W) mirrored at both ends of dimension 2 or 3 by `reach` pixels: F.pad, but faster
    and in x's dtype."""
    if torch.compiler.is_exporting():  # one operator, which all runtimes know, in place of five
        return F.pad(x, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), "reflect")
    after = x.narrow(dim, x.shape[dim] - 1 - reach, reach)
    return torch.cat([x.narrow(dim, 1, reach).flip(dim), x, after.flip(dim)], dim)


class ToRGB(nn.Conv2d):
    """A 7x7 convolution to 3 channels with reflected borders. On a CPU, where convolutions to so
    few channels are slow, it is a 1x7 convolution to 21 channels, one per row of the kernel and
    output channel, whose results are shifted and added."""

    def forward(self, *features):
        """Feature maps (B, ., H, W), as if concatenated -> (B, 3, H, W)."""
        if features[0].device.type != "cpu":
            return self.by_parts(features)
        reach = self.padding[0]
        height = features[0].shape[2]
        weight = self.weight.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]  # (21, C, 1, 7)
        parts = weight.split([x.shape[1] for x in features], 1)
        rows = 0
        for x, part in zip(features, parts, strict=True):
            rows = rows + F.conv2d(reflect(x.to(features[0].dtype), 3, reach), part)
        rows = reflect(rows, 2, reach).to(self.bias.dtype)  # bf16 would add another error
        rows = rows.chunk(2 * reach + 1, 1)
        edit = sum(row[:, :, i : i + height] for i, row in enumerate(rows))
        return self.bias[:, None, None] + edit

    def by_parts(self, features):
        """forward on a GPU: each feature map is convolved with its part of the weight, as
        concatenating them would copy all channels, under autocast into fp32."""
        edit = self.bias[:, None, None]
        parts = self.weight.split([x.shape[1] for x in features], 1)
        for x, part in zip(features, parts, strict=True):
            padded = F.pad(x, (self.padding[0],) * 4, "reflect")
            edit = edit + F.conv2d(padded, part)  # in fp32: bf16 would add another error
        return edit


class UpConv(nn.Conv2d):
    """Doubles height and width by nearest neighbour, then a 3x3 convolution: unlike a transposed
    convolution with weights of its own it leaves no grid of dots. It is computed as a transposed
    convolution of kernel 4, whose weights are sums of the nine."""

    def kernel(self) -> torch.Tensor:
        """The transposed convolution's weight (in, out, 4, 4). See forward for its use: the input's
        border is repeated once, stride 2, and 3 pixels are cut off at each side."""
        weight = self.weight
        for dim in (2, 3):  # taps that fall on copies of the same pixel add up
            a, b, c = weight.unbind(dim)
            weight = torch.stack([c, b + c, a + b, a], dim)
        return weight.transpose(0, 1)

    def forward(self, x):
        return F.conv_transpose2d(F.pad(x, (1,) * 4, "replicate"), self.kernel(), self.bias, 2, 3)


# ---- LoRA: W + (alpha / rank) B A as a parametrization (E2GAN) -----------------------------------


class LoRA(nn.Module):
    """The parametrization that adds scale * B A to a weight, which is seen as a matrix
    (out, in * k * k): A (rank, in * k * k), B (out, rank). It is computed in fp32 even under
    autocast, so that training uses the same weights as merging leaves."""

    def __init__(self, module: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float):
        super().__init__()
        self.layer_class = type(module)
        self.scale = scale
        self.lora_A = nn.Parameter(lora_A.float().to(module.weight.device))
        self.lora_B = nn.Parameter(lora_B.float().to(module.weight.device))

    def forward(self, weight):
        device = "cpu" if weight.is_meta else weight.device.type
        with torch.autocast(device, enabled=False):
            delta = self.scale * (self.lora_B @ self.lora_A)  # (out, in * k * k)
        delta = delta.view(out_first(weight, self.layer_class).shape)
        return weight + out_first(delta, self.layer_class)


def merge(network: nn.Module, keep_weights: bool = True) -> None:
    """Removes the parametrizations (LoRA, hypernetworks) of all layers and leaves plain weights:
    the computed ones or, without keep_weights, the original ones."""
    for _, module in named_layers(network):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_weights)


def load_adapter(generator: Generator, path: Path, strength: float = 1.0) -> int:
    """Adds an adapter to the base that it was trained for. Returns the index of its concept, which
    the generator has from then on. strength: 0 to 1.5, scales the change of the weights, not the
    prompt. A second adapter's change is added to the first's. UserError, and nothing is changed, if
    the adapter does not fit. To edit a photo:

        generator = common.load_generator("runs/base/generator.safetensors")
        cartoon = common.load_adapter(generator, "runs/lora/cartoon/adapter.safetensors", 0.8)
        photo = dataset.to_float(dataset.read_image("photo.png"))[None]  # (1, 3, H, W), 8 n each
        edit = generator(photo, torch.tensor([cartoon]))
        dataset.to_pil(dataset.to_uint8(edit[0])).save("edit.png")
        common.unload_adapters(generator)  # the base again, bit for bit
    """
    if not 0 <= strength <= 1.5:
        raise UserError(f"{path}: a strength of {strength}; give 0 to 1.5")
    tensors, metadata = read_tensors(path, "adapter")
    if metadata.get("base") != generator.sha256:
        theirs, ours = str(metadata.get("base"))[:12], generator.sha256[:12]
        raise UserError(f"{path} belongs to another base, of SHA-256 {theirs}..., not {ours}...")
    check_adapter_numbers(path)
    loras = []
    with explain(f"{path} does not fit the generator"):
        check_name(metadata["name"], path)
        for name, rank in metadata["ranks"].items():
            module = generator.get_submodule(name)
            scale = strength * metadata["alpha"] / rank
            a = tensors[f"{name}.lora_A"]
            b = tensors[f"{name}.lora_B"]
            if not len(a) == b.shape[1] == rank or not 0 <= scale < 1e6:
                raise ValueError(f"{name}: rank {rank}, alpha {metadata['alpha']}, A {(*a.shape,)}")
            lora = LoRA(module, a, b, scale).requires_grad_(False)
            lora(module.weight)  # raises where the shapes differ
            loras.append((module, lora))
        concept = {"name": metadata["name"], "prompt": str(metadata["prompt"]), "adapter": True}
        generator.set_known_concepts(
            [*generator.known_concepts(), (concept, tensors.get("tokens"))]
        )
    for module, lora in loras:
        parametrize.register_parametrization(module, "weight", lora)
    return len(generator.config["concepts"]) - 1


def check_adapter_numbers(path: Path) -> None:
    """UserError unless all tensors of an adapter are F16 or F32, the types that its three readers
    know: load_adapter, and the exported folder's editor.py and editor.js."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            if dtype not in ("F16", "F32"):
                raise UserError(f"{path}: {name} is {dtype}, not F16 or F32.")


def unload_adapters(generator: Generator) -> None:
    """Removes all adapters and their concepts. The weights are the base's again, bit for bit."""
    merge(generator, keep_weights=False)
    generator.set_known_concepts(
        [known for known in generator.known_concepts() if not known[0].get("adapter")]
    )


# ---- Hypernetwork: computes a weight from the latents of its input and output channels -----------


class Hypernetwork(nn.Module):
    """The parametrization that computes a layer's weight from the latents of its channel groups
    (CoroNetGAN; DHP), for output channel o, input channel i, kernel position k and embedding e:

        Z[o,i] = z_out[o] z_in[i] + b0[o,i]
        E[o,i,e] = Z[o,i] w1[o,i,e] + b1[o,i,e]
        W[o,i,k] = sum_e w2[o,i,k,e] E[o,i,e] + b2[o,i,k]

    b2 is the layer's own weight (parametrize calls it `original`), set to 0. There are 8
    embeddings, but no more than kernel positions (ours: a linear layer, which the paper's networks
    lack, has 1). Tensors are stored as (K, E, O, I), which is summed faster.

    w1 and w2 start as in DHP or, with `trained` (a choice of ours), such that W is the weight V
    that the layer has: w1 = 1 / (z_out z_in), w2 = V for e = 0, else 0. Then b0, b1 and b2 are kept
    at 0, so that a channel fades as its latent shrinks, and all its weights are 0 when that is."""

    def __init__(self, module: nn.Module, latents: dict[str, torch.Tensor], trained: bool):
        super().__init__()
        self.layer_class = type(module)
        # functions, so that the latents, which layers share, are no parameters of this module
        self.z_out = lambda: torch.cat([latents[group] for group in module.writes])
        self.z_in = lambda: torch.cat([latents[group] for group in module.reads])
        with torch.no_grad():
            weight = out_first(module.weight, self.layer_class)  # (O, I), (O, I, h, w)
            o, i = weight.shape[:2]
            weight = weight.reshape(o, i, -1).movedim(-1, 0)  # (K, O, I)
            k = len(weight)
            e = min(8, k)
            self.b0 = nn.Parameter(weight.new_zeros(o, i))
            self.b1 = nn.Parameter(weight.new_zeros(e, o, i))
            self.w1 = nn.Parameter(weight.new_empty(e, o, i).uniform_(-(3**0.5), 3**0.5))
            self.w2 = nn.Parameter(weight.new_zeros(k, e, o, i))
            if trained:
                self.w1[0] = 1 / (self.z_out()[:, None] * self.z_in())
                self.w2[:, 0] = weight
                for bias in (self.b0, self.b1, module.weight):
                    bias.requires_grad_(False)
            else:
                bound = (3 / (e * i * k)) ** 0.5  # hyperfan-in: Var W = 1 / fan_in
                self.w2.uniform_(-bound, bound)
            module.weight.zero_()

    def forward(self, b2):
        z = self.z_out()[:, None] * self.z_in() + self.b0  # (O, I)
        e = z * self.w1 + self.b1  # (E, O, I)
        weight = torch.stack((self.w2 * e).sum(1).unbind(), -1)  # (O, I, K)
        weight = weight.view(out_first(b2, self.layer_class).shape)
        return b2 + out_first(weight, self.layer_class)


def add_hypernetwork(network: nn.Module, latents: dict[str, torch.Tensor], trained: bool) -> None:
    """Adds a hypernetwork to every layer with named channels. latents: {group: (channels,)}, ones
    for groups that are never pruned. trained: see Hypernetwork."""
    for _, module in named_layers(network):
        hypernetwork = Hypernetwork(module, latents, trained)
        parametrize.register_parametrization(module, "weight", hypernetwork)


def slice_network(network: Network, kept: dict[str, torch.Tensor]) -> Network:
    """The smaller, dense network that has only the channels `kept` = {group: sorted indices}; other
    groups stay whole."""
    masks = {}  # {group: which of its channels stay}
    for group, channels in all_widths(network.config).items():
        masks[group] = torch.ones(channels, dtype=torch.bool)
        if group in kept:
            masks[group] = torch.isin(torch.arange(channels), kept[group].cpu())
    small_widths = {group: int(masks[group].sum()) for group in network.config["widths"]}
    small = type(network)({**network.config, "widths": small_widths})
    state = network.state_dict()
    for name, module in network.named_modules():
        if not hasattr(module, "writes"):
            continue
        outputs = torch.cat([masks[group] for group in module.writes])
        for key, tensor in module.state_dict(prefix=f"{name}.").items():
            if tensor.dim() == 1:  # biases, a batch norm's numbers
                state[key] = tensor[outputs]
            elif tensor.dim() > 1:
                inputs = torch.cat([masks[group] for group in module.reads])
                weight = out_first(tensor, type(module))[outputs][:, inputs]
                state[key] = out_first(weight, type(module))
    small.load_state_dict(state)
    return small.to(next(network.parameters()).device)


# ---- Checkpoints: one safetensors file each ------------------------------------------------------


def save_network(path: Path, network: Network) -> None:
    """Writes a network's tensors and config, for load_network."""
    write_tensors(path, network.state_dict(), {"kind": network.file_kind, "config": network.config})


def load_generator(path: Path, device: torch.device | str = "cpu") -> Generator:
    """The generator in a file, full or pruned, in eval mode; .sha256 is the file's hash."""
    return load_network(path, Generator.file_kind, device)


def load_network(path: Path, file_kind: str, device: torch.device | str = "cpu") -> Network:
    """The network in a file of this kind, in eval mode; .sha256 is the file's hash. UserError
    unless the file holds what its config describes."""
    tensors, metadata = read_tensors(path, file_kind)
    with explain(f"{path} does not hold what its config describes"):
        check_config(metadata["config"])
        with torch.device("meta"):  # no memory until the shapes are known to match the tensors
            network = build_network(metadata["config"])
        for name, tensor in network.state_dict().items():
            if tensors[name].dtype != tensor.dtype:
                raise ValueError(f"{name} holds {tensors[name].dtype} numbers")
        network.load_state_dict(tensors, assign=True)
        if getattr(network, "takes_text", False) and not network.mask.any(1).all():
            raise ValueError("a prompt has no token")
        count_macs(network)  # raises where the layers do not fit each other
    network.sha256 = sha256(path)
    return network.to(device).eval()


def base_discriminator(base: Path, generator: Generator) -> Discriminator:
    """The discriminator that stage 3 or 5 wrote beside a base's file, for training to go on with
    (ours): it tells strokes from blur from the first step on, which a new one learns in
    hundreds."""
    path = base.with_name("discriminator.safetensors")
    if not path.exists():
        raise UserError(f"{path} does not exist: --new-discriminator starts one")
    device = next(generator.parameters()).device
    discriminator = load_network(path, Discriminator.file_kind, device).train()
    if discriminator.config.get("text_dim") != generator.config.get("text_dim"):
        raise UserError(f"{path} was trained with another generator than {base}")
    return discriminator


def check_config(config: dict) -> None:
    """Raises if a config, from a file of unknown origin, would build something absurd."""
    counts = [config.get(key, 1) for key in ("depth", "heads", "tokens", "text_dim")]
    counts += [config["width"], config["size"], *config["widths"].values()]
    counts += [config["full"][group] for group in config["widths"]]
    if not all(type(n) is int and 0 < n < 2**16 for n in counts):
        raise ValueError("a width or size in its config is no whole number from 1 to 65535")
    if len(config.get("blocks", ())) > 100:
        raise ValueError("it has more than 100 blocks")
    for concept in config.get("concepts", []):
        check_name(concept["name"], "config")
        concept["prompt"].encode()  # raises where it is no text
