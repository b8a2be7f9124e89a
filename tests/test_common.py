"""The networks, parametrizations and files that the stages share: what each claims, checked on
small random networks."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import random_rows, write_adapter
from safetensors import safe_open
from torch.nn.utils import parametrize

import common
import dataset
import runs

CONCEPTS = [{"name": name, "prompt": f"make it {name}"} for name in ("sketch", "night")]
GENERATORS = [*common.ARCHITECTURES, "e2gan without text"]

NETWORKS = [*GENERATORS, "patchgan", "patchgan with text", "patchgan without photo"]
NETWORKS += ["dcgan generator", "dcgan discriminator"]
architectures = pytest.mark.parametrize("arch", GENERATORS)
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(arch="e2gan", seed=0):
    """A small random generator whose biases are not 0, so that a lost bias shows."""
    torch.manual_seed(seed)
    tokens = [torch.randn(5, 16), torch.randn(3, 16)] if arch == "e2gan" else None
    concepts = CONCEPTS if tokens else CONCEPTS[:1]
    arch = arch.removesuffix(" without text")
    return randomize(common.new_generator(arch, 8, 32, concepts, tokens, "ViT-S-32:random"))


def writers(network):
    """Layers and batch norms."""
    return [module for module in network.modules() if hasattr(module, "writes")]


def randomize(network):
    for module in writers(network):
        torch.nn.init.normal_(module.weight, std=0.2)
        torch.nn.init.normal_(module.bias, std=0.2)
    return network.eval()


def make_network(name):
    """A small random network of any kind."""
    if name in GENERATORS:
        return make(name)
    if name.startswith("dcgan"):
        torch.manual_seed(0)
        return randomize(common.dcgan_networks(8, 32)[name.split()[1]])
    generator = make("e2gan" if name == "patchgan with text" else "resnet9")
    return randomize(common.new_discriminator(generator, photo=name != "patchgan without photo"))


def output(network):
    torch.manual_seed(1)
    with torch.no_grad():
        return network(*network.example(batch=2, device="cpu"))


def edit(generator, concept=0):
    photo = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return generator(photo, torch.full((2,), concept))


def half(network):
    """A random half of every group's channels."""
    rng, kept = torch.Generator().manual_seed(0), {}
    for group, n in network.config["widths"].items():
        kept[group] = torch.randperm(n, generator=rng)[: max(2, n // 2)].sort().values
    return kept


# ---- Networks ------------------------------------------------------------------------------------


def test_resnet9_is_the_papers_baseline():
    with torch.device("meta"):
        generator = common.new_generator("resnet9", 64, 256, CONCEPTS[:1])
    assert round(common.count_parameters(generator) / 1e6, 3) == 11.378
    ends = 2 * 256**2 * 49 * 3 * 64  # a transposed convolution lays its kernel on its inputs
    halvings = 2 * (128**2 * 9 * 64 * 128 + 64**2 * 9 * 128 * 256)
    macs = ends + halvings + 18 * 64**2 * 9 * 256**2
    assert common.count_macs(generator) == macs == 4 * common.count_macs(generator, 128)


@pytest.mark.parametrize("arch", ["resnet9", "e2gan"])
def test_blocks_make_the_papers_ablation(arch, tmp_path):
    networks = []
    for blocks in (["rb"] * 9, ["rb"] * 3, ["rb", "rb", "tb", "rb"]):
        config = common.generator_config(arch, 16, 32, CONCEPTS[:1], blocks)
        networks.append(common.build_network(config).eval())
    nine, three, with_tb = networks
    assert with_tb.config["blocks"] == ["rb0", "rb1", "tb", "rb2"]
    parameters = [common.count_parameters(network) for network in networks]
    block = 2 * (9 * 64 * 64 + 64)  # two 3x3 convolutions of 64 channels, with biases
    assert parameters[0] - parameters[1] == 6 * block
    assert parameters[1] < parameters[2] < parameters[0]
    common.save_network(tmp_path / "tb.safetensors", with_tb)
    assert torch.equal(edit(common.load_generator(tmp_path / "tb.safetensors")), edit(with_tb))
    usual = {"resnet9": nine, "e2gan": with_tb}[arch]
    assert common.generator_config(arch, 16, 32, CONCEPTS[:1]) == usual.config


@every_network
def test_macs_by_formula_are_those_that_are_counted_full_and_pruned(name, load_stage):
    stage, network = load_stage("05"), make_network(name)
    terms, small = stage.mac_terms(network), common.slice_network(network, half(network))
    for width in (network, small):
        widths = common.all_widths(width.config)
        assert stage.macs_of(terms, widths) == common.count_macs(width)
    assert common.count_macs(small) < 0.5 * common.count_macs(network)


@every_network
def test_training_on_a_cpu_computes_what_pytorchs_layers_do(name, monkeypatch):
    """Outputs and gradients in double precision, with the layers as one would write them first."""
    network = make_network(name).double()
    inputs = []
    for x in network.example(batch=2, device="cpu"):
        inputs.append(x.double() if torch.is_tensor(x) and x.is_floating_point() else x)

    def results():
        network.zero_grad()
        result = network(*inputs)
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        return [result.detach(), *(p.grad.clone() for p in network.parameters())]

    found = results()
    monkeypatch.setattr(common, "trains_on_cpu", lambda x: False)
    plain = torch.nn.Conv2d.forward
    monkeypatch.setattr(common.ToRGB, "forward", lambda self, *x: plain(self, torch.cat(x, 1)))
    for a, b in zip(found, results(), strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())


def test_the_last_layer_computes_on_a_gpu_what_it_does_on_a_cpu():
    widths = {"stem": 64, "rgb": 3}
    shape = {"padding": 3, "padding_mode": "reflect"}
    layer = common.layer(common.ToRGB, widths, ("stem", "rgb"), "rgb", 7, **shape)
    features = torch.randn(2, 64, 16, 24), torch.randn(2, 3, 16, 24)
    whole = F.pad(torch.cat(features, 1), (3,) * 4, "reflect")
    wanted = F.conv2d(whole, layer.weight, layer.bias)
    assert torch.allclose(layer(*features), wanted, atol=1e-5)
    assert torch.allclose(layer.by_parts(features), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        by_parts = layer.by_parts(features)
        at_once = F.conv2d(whole, layer.weight, layer.bias)
    assert (by_parts - wanted).abs().mean() < 1.5 * (at_once - wanted).abs().mean()


def test_upsampling_is_nearest_neighbour_and_a_convolution_of_what_came_out(load_stage):
    up, x = common.UpConv(5, 7, 3), torch.randn(2, 5, 6, 8)
    large = F.pad(F.interpolate(x, scale_factor=2), (1, 1, 1, 1), "reflect")
    wanted = F.conv2d(large, up.weight, up.bias)  # (2, 7, 12, 16)
    phases = load_stage("06").PhaseConv(up)
    assert torch.allclose(up(x), wanted, atol=1e-6) and torch.allclose(phases(x), wanted, atol=1e-6)


def test_bf16_loses_little_to_what_the_transformer_adds_everywhere():
    generator = make()
    wanted = edit(generator)
    torch.nn.init.constant_(generator.blocks["tb"].feed2.bias, 30.0)
    assert torch.allclose(edit(generator), wanted, atol=1e-4)  # norms take it off
    with torch.autocast("cpu", torch.bfloat16):
        assert (edit(generator) - wanted).abs().mean() < 0.018  # 0.029 if it were not taken off


def test_prompt_changes_the_edit_and_padding_does_not():
    generator = make()
    assert not torch.allclose(edit(generator, concept=0), edit(generator, concept=1), atol=1e-4)
    wanted = edit(generator, concept=1)
    generator.set_known_concepts(generator.known_concepts()[1:])  # its 3 tokens, no padding left
    assert generator.tokens.shape == (1, 3, 16)
    assert torch.allclose(edit(generator, concept=0), wanted, atol=1e-5)


def test_discriminator_sees_photo_edit_and_the_prompts_direction():
    network = make_network("patchgan with text")
    photo, picture, text = network.example(batch=2, device="cpu")
    score = network(photo, picture, text)
    assert torch.allclose(network(photo, picture, 18 * text), score, atol=1e-4)
    for inputs in ((picture, photo, text), (photo, picture, -text), (photo, -picture, text)):
        assert not torch.allclose(network(*inputs), score, atol=1e-2)


# ---- LoRA ----------------------------------------------------------------------------------------


def add_lora(generator, layers, b=0.3):
    """Random adapters of rank 2 whose B has entries of size b."""
    for name in layers:
        module = generator.get_submodule(name)
        outputs = len(module.bias)
        a_matrix = torch.randn(2, module.weight.numel() // outputs)
        lora = common.LoRA(module, a_matrix, b * torch.randn(outputs, 2), scale=1.5)
        parametrize.register_parametrization(module, "weight", lora)


@architectures
def test_lora_is_the_identity_where_b_is_0_and_merges_exactly(arch):
    generator = make(arch)
    before, layers = edit(generator), [name for name, _ in common.named_layers(generator)]
    add_lora(generator, layers, b=0)
    assert torch.equal(edit(generator), before)
    add_lora(generator, layers)
    adapted = edit(generator)
    assert not torch.allclose(adapted, before, atol=1e-2)
    common.merge(generator)
    assert torch.allclose(edit(generator), adapted, atol=1e-5)
    plain = make(arch)  # merged, it is a plain network: no cost
    assert generator.state_dict().keys() == plain.state_dict().keys()
    assert [*map(type, generator.modules())] == [*map(type, plain.modules())]


def test_lora_takes_a_transposed_weight_by_its_outputs():
    module = common.layer(torch.nn.ConvTranspose2d, {"a": 4, "b": 6}, "a", "b", 3)
    lora = common.LoRA(module, torch.randn(2, 4 * 9), torch.randn(6, 2), scale=1.5)
    delta = (lora(module.weight) - module.weight).transpose(0, 1)
    assert torch.allclose(delta.flatten(1), 1.5 * lora.lora_B @ lora.lora_A, atol=1e-5)


def test_lora_trains_the_fp32_weights_that_merging_leaves():
    generator = make()
    add_lora(generator, ["up1.conv"])
    with torch.autocast("cpu", torch.bfloat16):
        trained = generator.up1.conv.weight.detach()
    common.merge(generator)
    assert trained.dtype == torch.float32 and torch.equal(trained, generator.up1.conv.weight)


@pytest.fixture
def adapters(tmp_path):
    """A base; adapters `comic` and `night`, a name that the base has; they share up1.conv."""
    common.save_network(tmp_path / "base.safetensors", make())
    base = common.load_generator(tmp_path / "base.safetensors")
    comic, night = tmp_path / "comic.safetensors", tmp_path / "night.safetensors"
    write_adapter(comic, base, "comic", {"up1.conv": 2, "blocks.tb.feed1": 1, "down1.conv": 2})
    write_adapter(night, base, "night", {"up1.conv": 3, "stem.conv": 1})
    return tmp_path / "base.safetensors", comic, night


def change_of(base, *adapters):
    """What adapters (path, strength) add to up1.conv."""
    generator = common.load_generator(base)
    before = generator.up1.conv.weight.detach().clone()
    for path, strength in adapters:
        common.load_adapter(generator, path, strength)
    return generator.up1.conv.weight.detach() - before


def test_adapters_are_swapped_on_one_generator_and_leave_the_base(adapters):
    base, comic, night = adapters
    alone, generator = common.load_generator(base), common.load_generator(base)
    wanted = edit(alone, concept=common.load_adapter(alone, night))
    memory, config = {p.data_ptr() for p in generator.parameters()}, generator.config
    before = [edit(generator, concept=c) for c in range(2)]
    assert common.load_adapter(generator, comic) == 2
    assert not torch.allclose(edit(generator), before[0], atol=1e-2)
    common.unload_adapters(generator)
    assert torch.equal(edit(generator, concept=common.load_adapter(generator, night)), wanted)
    assert generator.concept_index("night") == 2  # the last of a name
    assert torch.equal(
        generator.known_concepts()[2][1], random_rows("tokens/night", 4).half().float()
    )
    common.unload_adapters(generator)
    for c in range(2):
        assert torch.equal(edit(generator, concept=c), before[c])
    assert generator.config == config and generator.concept_index("night") == 1
    assert generator.state_dict().keys() == make().state_dict().keys()
    assert {p.data_ptr() for p in generator.parameters()} == memory  # no copy was made


@pytest.mark.parametrize("strength", [0, 0.5, 1.5])
def test_strength_scales_the_change_and_two_adapters_add_up(adapters, strength):
    base, comic, night = adapters
    whole, other = change_of(base, (comic, 1.0)), change_of(base, (night, 1.0))
    assert torch.allclose(change_of(base, (comic, strength)), strength * whole, atol=1e-5)
    both = strength * whole + 0.7 * other
    assert torch.allclose(change_of(base, (comic, strength), (night, 0.7)), both, atol=1e-5)
    assert torch.allclose(change_of(base, (night, 0.7), (comic, strength)), both, atol=1e-5)


def test_adapter_is_read_with_safetensors_alone(adapters):
    """And merged with numpy: W + alpha / rank B A."""
    base, comic, _ = adapters
    generator = common.load_generator(base)
    common.load_adapter(generator, comic)
    common.merge(generator)
    with safe_open(base, "np") as weights, safe_open(comic, "np") as file:
        metadata = json.loads(file.metadata()["about"])
        assert metadata["base"] == hashlib.sha256(base.read_bytes()).hexdigest()
        for name, rank in metadata["ranks"].items():
            weight = weights.get_tensor(f"{name}.weight")
            a, b = file.get_tensor(f"{name}.lora_A"), file.get_tensor(f"{name}.lora_B")
            delta = metadata["alpha"] / rank * (b.astype("float32") @ a.astype("float32"))
            merged = torch.from_numpy(weight + delta.reshape(weight.shape))
            assert torch.allclose(merged, generator.get_submodule(name).weight, atol=1e-5)


@pytest.mark.parametrize("name", ["blocks.tb.feed1.lora_A", "up1.conv.lora_B", "tokens"])
@pytest.mark.parametrize("change", [torch.zeros(1, 7), None])
def test_adapter_that_does_not_fit_leaves_the_base_as_it_was(adapters, tmp_path, name, change):
    base, comic, _ = adapters
    generator = common.load_generator(base)
    before, config = edit(generator), generator.config
    tensors, metadata = runs.read_tensors(comic, "adapter")
    tensors = {k: x for k, x in {**tensors, name: change}.items() if x is not None}
    runs.write_tensors(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(runs.UserError, match="bad.safetensors does not fit the generator"):
        common.load_adapter(generator, tmp_path / "bad.safetensors")
    assert generator.config == config and torch.equal(edit(generator), before)


def test_adapter_needs_its_base(adapters, tmp_path):
    common.save_network(tmp_path / "other.safetensors", make(seed=1))
    with pytest.raises(runs.UserError, match="comic.safetensors belongs to another base"):
        common.load_adapter(common.load_generator(tmp_path / "other.safetensors"), adapters[1])


# ---- Hypernetwork and slicing --------------------------------------------------------------------


def mask(network, kept):
    """Makes channels 0 wherever they are written, as if they were gone: whatever reads them adds
    nothing, as norms, attention, ReLU, FiLM and sums map a channel (attention: a dimension) of
    zeros to zeros, and the RMS norm sums squares."""
    widths, dropped = common.all_widths(network.config), {}
    for group, n in widths.items():
        dropped[group] = torch.tensor([group in kept and i not in kept[group] for i in range(n)])
    for module in writers(network):
        dead = torch.cat([dropped[group] for group in module.writes])
        outputs = 1 if isinstance(module, torch.nn.ConvTranspose2d) else 0
        module.weight.data.transpose(0, outputs)[dead] = 0
        module.bias.data[dead] = 0


@every_network
def test_sliced_equals_the_masked_hypernetwork_network(name):
    network = make_network(name)
    kept, latents = {}, {}
    for group, n in common.all_widths(network.config).items():
        latents[group] = torch.ones(n)
        if group in network.config["widths"]:  # a proximal step: half of the latents are 0
            z = torch.randn(n)
            latents[group] = z.sign() * (z.abs() - z.abs().median()).clamp(min=0)
            kept[group] = latents[group].nonzero().flatten()
    common.add_hypernetwork(network, latents, trained=False)
    for _, module in common.named_layers(network):  # as if trained for a while: no bias is 0,
        hypernetwork = module.parametrizations.weight[0]  # so weights at z = 0 are not either
        hypernetwork.b0.data += 0.2 * torch.randn_like(hypernetwork.b0)
        hypernetwork.b1.data += 0.2 * torch.randn_like(hypernetwork.b1)
        b2 = module.parametrizations.weight.original
        b2.data += 0.05 * torch.randn_like(b2)
    full = output(network)
    common.merge(network)
    small = common.slice_network(network, kept).eval()
    mask(network, kept)
    scale = 1 if full.shape[1] == 3 else full.abs().max()  # scores are anywhere
    assert (output(network) - output(small)).abs().max() < 1e-5 * scale
    assert (full - output(small)).abs().max() > 1e-2 * scale


@architectures
def test_hypernetwork_reproduces_a_trained_network_and_merges_to_what_it_computed(arch):
    generator = make(arch)
    before = edit(generator)
    latents = {g: torch.rand(n) + 0.5 for g, n in common.all_widths(generator.config).items()}
    common.add_hypernetwork(generator, latents, trained=True)
    assert torch.allclose(edit(generator), before, atol=1e-4)
    latents["trunk" if arch != "unet256" else "d0"][::2] *= 0.5
    shrunk = edit(generator)
    assert not torch.allclose(shrunk, before, atol=1e-2)
    common.merge(generator)
    assert torch.allclose(edit(generator), shrunk, atol=1e-6)
    assert generator.state_dict().keys() == make(arch).state_dict().keys()


def test_hypernetwork_is_the_papers_formula():
    torch.manual_seed(0)
    conv = common.layer(torch.nn.Conv2d, {"a": 3, "b": 5}, "a", "b", 3)
    latents = {"a": torch.randn(3), "b": torch.randn(5)}
    hyper = common.Hypernetwork(conv, latents, trained=False)
    for parameter in hyper.parameters():
        torch.nn.init.normal_(parameter)
    weight = hyper(conv.weight)
    for o, i, k in ((0, 0, 0), (4, 2, 8), (2, 1, 5)):
        z = latents["b"][o] * latents["a"][i] + hyper.b0[o, i]
        e = z * hyper.w1[:, o, i] + hyper.b1[:, o, i]
        wanted = (hyper.w2[k, :, o, i] * e).sum()
        assert torch.isclose(weight[o, i].flatten()[k], wanted, atol=1e-5)
    assert hyper.w2.shape == (9, 8, 5, 3)
    linear = common.layer(torch.nn.Linear, {"a": 3, "b": 5}, "a", "b")
    assert common.Hypernetwork(linear, latents, trained=False).w2.shape == (1, 1, 5, 3)


# ---- Files, run folders, flags -------------------------------------------------------------------


@every_network
def test_checkpoint_rebuilds_full_and_pruned(name, tmp_path):
    whole, path = make_network(name), tmp_path / "n.safetensors"
    for network in (whole, common.slice_network(whole, half(whole)).eval()):
        common.save_network(path, network)
        loaded = common.load_network(path, network.file_kind)
        assert torch.equal(output(loaded), output(network))
        assert loaded.config == network.config and loaded.sha256 == runs.sha256(path)
        if name not in GENERATORS:  # stages that edit photos refuse it
            with pytest.raises(runs.UserError, match=f"is a {network.file_kind}"):
                common.load_generator(path)


def test_run_folder_continues_refuses_and_overwrites(tmp_path):
    out, settings = tmp_path / "run", {"stage": "x", "lr": 1}
    assert not runs.begin_run(out, settings, False)
    (out / "log").touch()
    assert not runs.begin_run(out, settings, False)  # unfinished: continue
    assert (out / "log").exists()
    runs.write_json(out / "result.json", {})
    assert runs.begin_run(out, settings, False)  # complete
    with pytest.raises(runs.UserError, match="lr 1 there, 2 here"):
        runs.begin_run(out, {**settings, "lr": 2}, False)
    assert (out / "result.json").exists()
    assert not runs.begin_run(out, {**settings, "lr": 2}, True)
    assert [path.name for path in out.iterdir()] == ["settings.json"]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".run.lock"}


def test_a_folder_that_no_stage_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(runs.UserError, match="no stage made"):
            runs.begin_run(tmp_path, {"stage": "x"}, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_demo_has_its_own_defaults_and_folders_and_a_flag_beats_them(monkeypatch):
    def parse(*flags):
        parser = runs.Parser("what it does", "runs/base")
        parser.add_argument("--width", type=runs.count, default=64)
        parser.add_argument("--pairs", type=Path, default="runs/pairs")
        monkeypatch.setattr(sys, "argv", ["x.py", *flags])
        return parser.parse({"width": 32})

    assert parse().width == 64 and parse().out == Path("runs/base")
    demo = parse("--demo", "--pairs", "runs/pairs")
    assert demo.width == 32 and demo.out == Path("runs/demo/base")
    assert demo.pairs == Path("runs/pairs") and parse("--demo", "--width", "8").width == 8
    moved = [runs.settings_of(parse(*flags)) for flags in ((), ("--out", "y"))]
    assert moved[0] == moved[1] == {"stage": "x", "width": 64, "seed": 0}


def test_uint8_and_float_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(dataset.to_uint8(dataset.to_float(pixels)), pixels)
    assert dataset.to_float(pixels).min() == -1 and dataset.to_float(pixels).max() == 1


def test_no_pixel_outgrows_the_norm():
    """A spike of one pixel, which would be 32 standard deviations, is cut off at NORM_LIMIT."""
    block = common.ConvNorm(nn.Identity(), relu=False)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 5, 5] = 1.0
    assert block(x).max() == common.NORM_LIMIT
    scaled = block(x, torch.full((1, 2), 3.0))  # FiLM cannot pass it either
    assert scaled.max() == common.NORM_LIMIT
