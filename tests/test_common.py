"""The networks, parametrizations and files that the stages share: what each claims, checked on small random networks."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from torch.nn.utils import parametrize

import common

CONCEPTS = [
    {"name": "sketch", "prompt": "a pencil sketch"},
    {"name": "night", "prompt": "make it night"},
]


def make(arch="e2gan", width=8, size=32, seed=0):
    """A small random generator whose biases are not 0, so that a lost bias shows."""
    torch.manual_seed(seed)
    text = dict(text_dim=16, tokens=5, clip="ViT-S-32:random") if arch == "e2gan" else {}
    arch = arch.removesuffix(" without text")
    generator = common.build_network(
        common.generator_config(arch, width, size, CONCEPTS if text else CONCEPTS[:1], **text)
    )
    if text:
        common.set_tokens(generator, [torch.randn(5, 16), torch.randn(3, 16)])
    return randomize(generator)


def randomize(network):
    for module in network.modules():
        if hasattr(module, "reads"):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
        elif hasattr(module, "writes"):  # batch norm
            for name, tensor in module.state_dict().items():
                tensor.copy_(
                    torch.rand_like(tensor.float()) + (0.5 if name == "running_var" else -0.5)
                )
    return network.eval()


def make_network(name):
    """A small random network of any kind."""
    if name in GENERATORS:
        return make(name)
    if name == "dcgan":
        return make("dcgan")
    generator = make({"dcgan-d": "dcgan", "patchgan with text": "e2gan"}.get(name, "resnet9"))
    return randomize(common.new_discriminator(generator, photo=name != "patchgan without photo"))


def output(network, size=None):
    torch.manual_seed(1)
    with torch.no_grad():
        return network(*network.example(size, batch=2, device="cpu"))


def edit(generator, size=32, concept=0):
    photo = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return generator(photo, torch.full((2,), concept))


def half(generator, seed=0):
    """A random half of every group's channels."""
    rng = torch.Generator().manual_seed(seed)
    return {
        g: torch.randperm(n, generator=rng)[: max(2, n // 2)].sort().values
        for g, n in generator.config["widths"].items()
    }


GENERATORS = [*common.ARCHITECTURES, "e2gan without text"]
NETWORKS = [
    *GENERATORS,
    "dcgan",
    "patchgan",
    "patchgan with text",
    "patchgan without photo",
    "dcgan-d",
]
architectures = pytest.mark.parametrize("arch", GENERATORS)
every_network = pytest.mark.parametrize("name", NETWORKS)


def test_resnet9_is_the_papers_baseline():
    config = common.generator_config("resnet9", 64, 256, CONCEPTS[:1])
    with torch.device("meta"):
        generator = common.build_network(config)
    assert round(common.count_parameters(generator) / 1e6, 3) == 11.378
    assert 49e9 < common.count_macs(generator, 256) < 50e9


@pytest.mark.parametrize("arch", ["resnet9", "e2gan"])
def test_blocks_make_the_papers_ablation(arch, load_stage, tmp_path):
    nine, three, with_tb = (
        common.generator_config(arch, 16, 32, CONCEPTS[:1], blocks)
        for blocks in (("rb",) * 9, ("rb",) * 3, ("rb", "rb", "tb", "rb"))
    )
    assert three["blocks"] == ["rb0", "rb1", "rb2"] and with_tb["blocks"] == [
        "rb0",
        "rb1",
        "tb",
        "rb2",
    ]
    networks = [common.build_network(config).eval() for config in (nine, three, with_tb)]
    block = 2 * (9 * 64 * 64 + 64)  # two 3x3 convolutions of 64 channels, with biases
    parameters = [common.count_parameters(network) for network in networks]
    assert (
        parameters[0] - parameters[1] == 6 * block and parameters[1] < parameters[2] < parameters[0]
    )
    stage, tb = load_stage("05"), networks[2]
    assert stage.macs_of(stage.mac_terms(tb), common.all_widths(with_tb)) == common.count_macs(tb)
    common.save_network(tmp_path / "tb.safetensors", tb)
    assert torch.equal(edit(common.load_generator(tmp_path / "tb.safetensors")), edit(tb))
    usual = {"resnet9": nine, "e2gan": with_tb}[arch]
    assert common.generator_config(arch, 16, 32, CONCEPTS[:1]) == usual


@pytest.mark.parametrize(
    "arch, blocks",
    [("unet256", ["rb"]), ("e2gan", []), ("e2gan", ["tb", "tb"]), ("resnet9", ["rb", "9"])],
)
def test_blocks_that_no_network_has_are_refused(arch, blocks):
    with pytest.raises(common.UserError, match="e2gan and resnet9 take rb and at most one tb"):
        common.generator_config(arch, 8, 32, CONCEPTS[:1], blocks)


@every_network
def test_mac_formula_equals_flop_counter_full_and_pruned(name, load_stage):
    stage, network = load_stage("05"), make_network(name)
    terms = stage.mac_terms(network)
    assert stage.macs_of(terms, common.all_widths(network.config)) == common.count_macs(network)
    small = common.slice_network(network, half(network))
    assert stage.macs_of(terms, common.all_widths(small.config)) == common.count_macs(small)
    assert common.count_macs(small) < 0.5 * common.count_macs(network)


@every_network
def test_training_on_a_cpu_computes_what_pytorchs_layers_do(name, monkeypatch):
    """Outputs and gradients of what common.for_cpu chooses, in double precision."""
    network = make_network(name).double()
    inputs = [
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in network.example(batch=2, device="cpu")
    ]

    def results():
        network.zero_grad()
        result = network(*inputs)
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        return [result.detach(), *(p.grad.clone() for p in network.parameters())]

    ours = results()
    for choice in ("for_cpu", "by_rows"):
        monkeypatch.setattr(common, choice, lambda x: False)
    for a, b in zip(ours, results(), strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())


@pytest.mark.parametrize("height, width", [(4, 4), (5, 9), (33, 17)])
def test_to_rgb_by_rows_is_the_convolution(height, width):
    layer = common.layer(
        common.ToRGB,
        {"a": 5, "b": 2, "rgb": 3},
        ("a", "b"),
        "rgb",
        7,
        padding=3,
        padding_mode="reflect",
    ).double()
    a, b = (torch.randn(2, channels, height, width, dtype=torch.float64) for channels in (5, 2))
    assert (layer(a, b) - torch.nn.Conv2d.forward(layer, torch.cat([a, b], 1))).abs().max() < 1e-12


class Mask(torch.nn.Module):
    """Parametrizes a weight (out first, unless transposed) as itself with some output channels 0."""

    def __init__(self, alive, transposed):
        super().__init__()
        self.alive, self.place = alive, 1 if transposed else 0

    def forward(self, weight):
        return weight * self.alive.view([-1 if i == self.place else 1 for i in range(weight.dim())])


def mask(network, kept):
    """The network as if some channels were gone: they are 0 wherever they are written, by every writer's weights and biases and
    by batch norm's scale and shift, so whatever reads them adds nothing. All of their ways lead there: norms, attention,
    ReLU, FiLM and sums map a channel (attention: a dimension) of zeros to zeros, and the RMS norm sums squares."""
    widths = common.all_widths(network.config)
    kept = {**{g: torch.arange(n) for g, n in widths.items()}, **kept}
    for module in network.modules():
        if hasattr(module, "writes"):
            alive = torch.zeros(module.bias.numel())
            alive[common.channel_indices(module.writes, kept, widths)] = 1
            parametrize.register_parametrization(
                module, "weight", Mask(alive, isinstance(module, torch.nn.ConvTranspose2d))
            )
            module.bias.data *= alive


@every_network
def test_sliced_equals_the_masked_hypernetwork_network(name):
    network = make_network(name)
    groups = network.config["widths"]
    latents = {
        g: torch.randn(n) if g in groups else torch.ones(n)
        for g, n in common.all_widths(network.config).items()
    }
    for g in groups:  # a proximal step: half of each group's latents are 0
        amount = latents[g].abs().median()
        latents[g] = latents[g].sign() * (latents[g].abs() - amount).clamp(min=0)
    kept = {g: latents[g].nonzero().flatten() for g in groups}
    common.add_hypernetwork(network, latents, trained=False)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(
                module, common.Hypernetwork
            ):  # as if trained for a while: no bias is 0, so that
                for bias in (module.b0, module.b1):  # the weights at z = 0 are not either
                    bias += 0.2 * torch.randn_like(bias)
        for _, module in common.named_layers(network):
            b2 = module.parametrizations.weight.original
            b2 += 0.05 * torch.randn_like(b2)
    full = output(network)
    twin = copy.deepcopy(network)
    mask(twin, kept)
    masked = output(
        twin
    )  # now: the two share classes, and removing one's parametrizations breaks the other
    common.remove_parametrizations(network)
    small = common.slice_network(network, kept).eval()
    scale = (
        1 if full.shape[1] == 3 else full.abs().max()
    )  # pictures are in [-1, 1], scores anywhere
    assert (masked - output(small)).abs().max() < 1e-5 * scale
    assert (full - output(small)).abs().max() > 1e-2 * scale


@architectures
def test_hypernetwork_reproduces_a_trained_network_and_bakes_to_what_it_computed(arch):
    generator = make(arch)
    before = edit(generator)
    latents = {g: torch.rand(n) + 0.5 for g, n in common.all_widths(generator.config).items()}
    common.add_hypernetwork(generator, latents, trained=True)
    assert torch.allclose(edit(generator), before, atol=1e-4)
    latents["trunk" if arch != "unet256" else "d0"][:] *= 0.5
    shrunk = edit(generator)
    common.remove_parametrizations(generator)
    assert torch.allclose(edit(generator), shrunk, atol=1e-6)
    assert not any("parametrizations" in name for name in generator.state_dict())


def test_hypernetwork_is_the_papers_formula():
    torch.manual_seed(0)
    conv = common.layer(torch.nn.Conv2d, {"a": 3, "b": 5}, "a", "b", 3)
    latents = {"a": torch.randn(3), "b": torch.randn(5)}
    hyper = common.Hypernetwork(conv, latents, trained=False)
    for parameter in hyper.parameters():
        torch.nn.init.normal_(parameter)
    made = hyper(conv.weight)
    for o, i, k in ((0, 0, 0), (4, 2, 8), (2, 1, 5)):
        z = latents["b"][o] * latents["a"][i] + hyper.b0[o, i]
        e = z * hyper.w1[:, o, i] + hyper.b1[:, o, i]
        assert torch.isclose(made[o, i].flatten()[k], (hyper.w2[k, :, o, i] * e).sum(), atol=1e-5)
    assert hyper.w2.shape == (9, 8, 5, 3)
    linear = common.layer(torch.nn.Linear, {"a": 3, "b": 5}, "a", "b")
    assert common.Hypernetwork(linear, latents, trained=False).w2.shape == (1, 1, 5, 3)


def test_hypernetwork_from_scratch_keeps_the_variance_of_fan_in():
    torch.manual_seed(0)
    widths = {"a": 64, "b": 64}
    conv = common.layer(torch.nn.Conv2d, widths, "a", "b", 3)
    weight = common.Hypernetwork(
        conv, {g: torch.randn(n) for g, n in widths.items()}, trained=False
    )(conv.weight)
    assert 0.8 < weight.var().item() * 64 * 9 < 1.25


@architectures
def test_lora_starts_as_identity_and_merges_exactly(arch):
    generator = make(arch)
    before = edit(generator)
    ranks = {name: 2 for name, _ in common.named_layers(generator)}
    trainable = common.add_lora(generator, ranks, alpha=3.0)
    assert torch.equal(edit(generator), before)
    for parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.3)
    adapted = edit(generator)
    assert not torch.allclose(adapted, before, atol=1e-2)
    common.remove_parametrizations(generator)
    assert torch.allclose(edit(generator), adapted, atol=1e-5)
    assert (
        generator.state_dict().keys() == make(arch).state_dict().keys()
    )  # a plain network: no cost
    assert all(
        type(a) is type(b) for a, b in zip(generator.modules(), make(arch).modules(), strict=True)
    )


def test_lora_trains_the_fp32_weights_that_merging_leaves():
    generator = make()
    for parameter in common.add_lora(generator, {"up1.conv": 2}, alpha=3.0):
        torch.nn.init.normal_(parameter)
        assert parameter.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        trained = generator.up1.conv.weight.detach()
    common.remove_parametrizations(generator)
    assert trained.dtype == torch.float32 and torch.equal(trained, generator.up1.conv.weight)


def test_lora_is_w_plus_scaled_ba_for_every_kind_of_layer():
    for kind in (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear):
        module = common.layer(
            kind, {"a": 4, "b": 6}, "a", "b", *([] if kind is torch.nn.Linear else [3])
        )
        fan_in = module.weight.numel() // 6
        lora = common.LoRA(module, torch.randn(2, fan_in), torch.randn(6, 2), scale=1.5)
        delta = (lora(module.weight) - module.weight).detach()
        first = delta.transpose(0, 1) if kind is torch.nn.ConvTranspose2d else delta
        assert torch.allclose(first.reshape(6, fan_in), 1.5 * lora.lora_B @ lora.lora_A, atol=1e-5)


def write_adapter(path, base, concept, ranks, seed):
    """An adapter of random weights for the base in a file."""
    torch.manual_seed(seed)
    generator = common.load_generator(base)
    common.add_concept(generator, concept, f"make it {concept}", torch.randn(4 + seed, 16))
    for parameter in common.add_lora(generator, ranks, alpha=3.0):
        torch.nn.init.normal_(parameter, std=0.2)
    common.save_adapter(path, generator, concept, generator.sha256, alpha=3.0)
    return path


@pytest.fixture
def adapters(tmp_path):
    """A base and two adapters: `comic`, and one that replaces the base's own `night`; they share the layer up1.conv."""
    base = tmp_path / "base.safetensors"
    common.save_network(base, make())
    return base, [
        write_adapter(
            tmp_path / "a.safetensors", base, "comic", {"up1.conv": 2, "blocks.tb.feed1": 1}, seed=1
        ),
        write_adapter(
            tmp_path / "b.safetensors", base, "night", {"up1.conv": 3, "stem.conv": 1}, seed=2
        ),
    ]


def delta_of(base, adapter, strength=1.0):
    """What an adapter adds to up1.conv."""
    generator = common.load_generator(base)
    before = generator.up1.conv.weight.detach().clone()
    common.load_adapter(generator, adapter, strength)
    return generator.up1.conv.weight.detach() - before


def test_adapters_are_swapped_on_one_generator_and_leave_the_base(adapters):
    base, (comic, night) = adapters
    alone = common.load_generator(base)
    wanted = edit(alone, concept=common.load_adapter(alone, night))

    generator = common.load_generator(base)
    weights, config = [p.data_ptr() for p in generator.parameters()], generator.config
    before = [edit(generator, concept=c) for c in range(2)]
    assert common.load_adapter(generator, comic) == 2 and not torch.allclose(
        edit(generator), before[0], atol=1e-2
    )
    common.unload_adapters(generator)
    assert torch.equal(edit(generator, concept=common.load_adapter(generator, night)), wanted)
    common.unload_adapters(generator)
    assert all(torch.equal(edit(generator, concept=c), before[c]) for c in range(2))
    assert (
        generator.config == config and generator.state_dict().keys() == make().state_dict().keys()
    )
    assert sorted(p.data_ptr() for p in generator.parameters()) == sorted(
        weights
    )  # the same memory: no copy


@pytest.mark.parametrize("strength", [0, 0.5, 1.5])
def test_strength_scales_the_change(adapters, strength):
    base, (comic, _) = adapters
    assert torch.allclose(
        delta_of(base, comic, strength), strength * delta_of(base, comic), atol=1e-5
    )


def test_two_adapters_add_up_whichever_is_loaded_first(adapters):
    base, (comic, night) = adapters
    generators = []
    for order in ((comic, 0.5), (night, 0.7)), ((night, 0.7), (comic, 0.5)):
        generator = common.load_generator(base)
        before = generator.up1.conv.weight.detach().clone()
        for path, strength in order:
            common.load_adapter(generator, path, strength)
        delta = generator.up1.conv.weight.detach() - before
        assert torch.allclose(
            delta, delta_of(base, comic, 0.5) + delta_of(base, night, 0.7), atol=1e-5
        )
        generators.append(generator)
    for concept in ("sketch", "comic", "night"):  # each knows all prompts
        one, two = (edit(generator, concept=generator.concept(concept)) for generator in generators)
        assert torch.allclose(one, two, atol=1e-4)


def test_adapter_is_read_with_safetensors_alone(adapters):
    base, (comic, _) = adapters
    with safe_open(base, "np") as weights, safe_open(comic, "np") as file:
        about = json.loads(file.metadata()["about"])
        assert (
            about["base"] == hashlib.sha256(base.read_bytes()).hexdigest()
            and about["prompt"] == "make it comic"
        )
        assert file.get_tensor("tokens").shape == (5, 16)
        merged = {}
        for name, rank in about["ranks"].items():
            weight, a, b = (
                weights.get_tensor(f"{name}.weight"),
                file.get_tensor(f"{name}.lora_A"),
                file.get_tensor(f"{name}.lora_B"),
            )
            assert a.dtype == b.dtype == "float16"
            delta = about["alpha"] / rank * (b.astype("float32") @ a.astype("float32"))
            if name.startswith("up"):  # transposed convolutions
                merged[name] = weight + delta.reshape(
                    weight.shape[1], weight.shape[0], *weight.shape[2:]
                ).swapaxes(0, 1)
            else:
                merged[name] = weight + delta.reshape(weight.shape)
    generator = common.load_generator(base)
    common.load_adapter(generator, comic)
    common.remove_parametrizations(generator)
    for name, weight in merged.items():
        assert torch.allclose(
            torch.from_numpy(weight), generator.get_submodule(name).weight, atol=1e-5
        )


def test_adapter_that_does_not_fit_leaves_the_generator_as_it_was(adapters, tmp_path):
    base, (comic, _) = adapters
    generator = common.load_generator(base)
    before, config = edit(generator), generator.config
    tensors, about = common.read_tensors(comic, "adapter")
    for changed in (
        {**tensors, "blocks.tb.feed1.lora_A": torch.zeros(1, 7)},
        {**tensors, "tokens": torch.zeros(4, 3)},
        {key: value for key, value in tensors.items() if key != "up1.conv.lora_B"},
    ):
        common.write_tensors(tmp_path / "bad.safetensors", changed, about)
        with pytest.raises(common.UserError, match="fit the generator"):
            common.load_adapter(generator, tmp_path / "bad.safetensors")
        assert generator.config == config and torch.equal(edit(generator), before)


def test_paper_adapter_is_one_percent_of_the_weights_and_150_kilobytes(load_stage, tmp_path):
    stage = load_stage("04")
    prompt = {"name": "a", "prompt": "turn it into a pencil sketch"}
    generator = common.build_network(
        common.generator_config("e2gan", 64, 256, [prompt], text_dim=512, tokens=9, clip="")
    )
    groups = stage.group_sizes(generator)
    ranks = {group: stage.PAPER_RANKS[group] for group in stage.CRUCIAL}
    whole = common.count_parameters(generator)
    trained = sum(
        p.numel() for p in common.add_lora(generator, stage.layer_ranks(groups, ranks), 16.0)
    )
    assert trained == stage.lora_weights(groups, ranks) <= 0.01 * whole
    common.save_adapter(tmp_path / "adapter.safetensors", generator, "a", "0" * 64, 16.0)
    assert (tmp_path / "adapter.safetensors").stat().st_size <= 150_000


def test_adapter_needs_its_base_and_carries_its_concept(tmp_path):
    common.save_network(tmp_path / "base.safetensors", make())
    generator = common.load_generator(tmp_path / "base.safetensors")
    common.add_concept(generator, "comic", "a comic strip", torch.randn(7, 16))
    for parameter in common.add_lora(generator, {"down1.conv": 2, "blocks.tb.feed1": 1}, alpha=1.0):
        torch.nn.init.normal_(parameter)
    common.save_adapter(
        tmp_path / "adapter.safetensors", generator, "comic", generator.sha256, alpha=1.0
    )
    wanted = edit(generator, concept=2)

    loaded = common.load_generator(tmp_path / "base.safetensors")
    index = common.load_adapter(loaded, tmp_path / "adapter.safetensors")
    assert loaded.config["concepts"][index] == {"name": "comic", "prompt": "a comic strip"}
    assert torch.allclose(edit(loaded, concept=index), wanted, atol=0.02)  # fp16
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == {
            "down1.conv.lora_A",
            "down1.conv.lora_B",
            "blocks.tb.feed1.lora_A",
            "blocks.tb.feed1.lora_B",
            "tokens",
        }
        assert json.loads(file.metadata()["about"])["ranks"] == {
            "down1.conv": 2,
            "blocks.tb.feed1": 1,
        }

    common.save_network(tmp_path / "other.safetensors", make(seed=1))
    with pytest.raises(common.UserError, match="another base"):
        common.load_adapter(
            common.load_generator(tmp_path / "other.safetensors"), tmp_path / "adapter.safetensors"
        )


@every_network
def test_checkpoint_rebuilds_full_and_pruned(name, tmp_path):
    whole = make_network(name)
    for number, network in enumerate((whole, common.slice_network(whole, half(whole)).eval())):
        path = tmp_path / f"{number}.safetensors"
        common.save_network(path, network)
        loaded = common.load_network(path, torch.device("cpu"), network.kind)
        assert torch.equal(output(loaded), output(network))
        assert loaded.config == network.config and loaded.sha256 == common.sha256(path)
        if name not in GENERATORS:  # stages that edit photos refuse it
            with pytest.raises(
                common.UserError, match=f"no generator of ours but a {network.kind}"
            ):
                common.load_generator(path)


@pytest.mark.parametrize("size", [4, 24, 100])
def test_dcgan_says_which_sizes_it_makes(size):
    with pytest.raises(common.UserError, match=f"8, 16, 32, 64, ... pixels, not {size}"):
        common.generator_config("dcgan", 8, size, [])


def test_without_clip_e2gan_learns_one_concept():
    generator = common.new_generator("e2gan", 8, 32, CONCEPTS[:1], "none", torch.device("cpu"))
    assert not hasattr(generator, "tokens") and not any(
        "cross" in name or "film" in name for name in generator.state_dict()
    )
    with pytest.raises(
        common.UserError, match="without CLIP takes no prompt and learns one concept"
    ):
        common.new_generator("e2gan", 8, 32, CONCEPTS, "none", torch.device("cpu"))


def damaged(tmp_path, change):
    """A good checkpoint after `change` (tensors, metadata) -> (tensors, metadata)."""
    generator = make()
    tensors, metadata = change(
        dict(generator.state_dict()), {"kind": "generator", "config": generator.config}
    )
    common.write_tensors(tmp_path / "bad.safetensors", tensors, metadata)
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: (t, {**m, "config": {**m["config"], "arch": "vgg"}}), "unknown architecture"),
        (lambda t, m: (t, {**m, "kind": "adapter"}), "no generator of ours"),
        (lambda t, m: (t, {}), "no generator of ours"),
        (
            lambda t, m: ({k: v for k, v in t.items() if k != "out.bias"}, m),
            "does not hold the weights",
        ),
        (lambda t, m: ({**t, "out.bias": torch.zeros(7)}, m), "does not hold the weights"),
        (
            lambda t, m: (t, {**m, "config": {**m["config"], "widths": {"stem": 10**9}}}),
            "does not hold the weights",
        ),
        (lambda t, m: (t, {**m, "config": {"arch": "e2gan"}}), "does not hold the weights"),
        (lambda t, m: (t, {**m, "config": [1, 2]}), "does not hold the weights"),
    ],
)
def test_a_checkpoint_that_is_not_ours_is_named(tmp_path, change, words):
    with pytest.raises(common.UserError, match=words):
        common.load_generator(damaged(tmp_path, change))


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "g.safetensors"
    common.save_network(path, make())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(common.UserError, match="g.safetensors is truncated"):
        common.load_generator(path)
    path.write_bytes(b"hello")
    with pytest.raises(common.UserError, match="g.safetensors is truncated or no checkpoint"):
        common.load_generator(path)


def test_prompt_changes_the_edit_and_padding_does_not():
    generator = make()
    assert not torch.allclose(edit(generator, concept=0), edit(generator, concept=1), atol=1e-4)
    wanted = edit(generator, concept=1)
    common.keep_concept(generator, "night")  # its 3 tokens, no padding left
    assert generator.tokens.shape == (1, 3, 16)
    assert torch.allclose(edit(generator, concept=0), wanted, atol=1e-5)


def test_picks_are_even_complete_and_repeatable():
    counts, batch = [10, 10, 5], 6
    steps = common.steps_per_epoch(counts, batch)
    epoch = torch.cat([common.draw_picks(counts, batch, step, seed=3)[0] for step in range(steps)])
    for step in range(steps):
        picks, flips = common.draw_picks(counts, batch, step, seed=3)
        assert torch.bincount(picks[:, 0], minlength=3).tolist() == [2, 2, 2]
        assert torch.equal(picks, common.draw_picks(counts, batch, step, seed=3)[0])
    for concept, n in enumerate(counts):
        seen = epoch[epoch[:, 0] == concept, 1]
        assert set(seen.tolist()) == set(range(n))
        assert torch.bincount(seen).tolist() == [10 // n] * n
    assert not torch.equal(epoch[:6], common.draw_picks(counts, batch, steps, seed=3)[0])
    assert not torch.equal(epoch[:6], common.draw_picks(counts, batch, 0, seed=4)[0])


def test_a_batch_is_full_even_if_there_are_fewer_pairs():
    assert common.steps_per_epoch([3, 2], 8) == 1
    picks, flips = common.draw_picks([3, 2], 8, 5, seed=0)
    assert len(picks) == len(flips) == 8 and torch.bincount(picks[:, 0]).tolist() == [4, 4]
    assert set(map(tuple, picks.tolist())) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}


def test_state_restores_networks_and_optimizers(tmp_path):
    def one(network, optimizer):
        optimizer.zero_grad()
        network(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    adam, sgd = (
        common.adam([network.weight], 0.1),
        torch.optim.SGD([network.bias], 0.1, momentum=0.9),
    )
    one(network, adam), one(network, sgd)
    common.save_state(tmp_path / "s.safetensors", 7, g=network, a=adam, s=sgd)
    one(network, adam), one(network, sgd)
    other = torch.nn.Linear(3, 2)
    adam2, sgd2 = common.adam([other.weight], 0.1), torch.optim.SGD([other.bias], 0.1, momentum=0.9)
    assert common.load_state(tmp_path / "s.safetensors", g=other, a=adam2, s=sgd2) == 7
    one(other, adam2), one(other, sgd2)
    assert torch.equal(other.weight, network.weight) and torch.equal(other.bias, network.bias)


def test_psnr_of_known_errors():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack(
        [torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2.0)]
    )  # 2.0 is clamped to 1.0
    assert torch.allclose(common.psnr(a, b), torch.tensor([20.0, 6.0206]), atol=1e-3)


def test_uint8_and_float_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(common.to_uint8(common.to_float(pixels)), pixels)
    assert common.to_float(pixels).min() == -1 and common.to_float(pixels).max() == 1


def test_run_folder_continues_refuses_and_overwrites(tmp_path):
    out = tmp_path / "run"
    assert not common.begin_run(out, {"stage": "x", "lr": 1}, False)
    assert not common.begin_run(out, {"stage": "x", "lr": 1}, False)  # unfinished: continue
    common.write_json(out / "result.json", {})
    assert common.begin_run(out, {"stage": "x", "lr": 1}, False)  # complete
    with pytest.raises(common.UserError, match="lr 1 there, 2 here"):
        common.begin_run(out, {"stage": "x", "lr": 2}, False)
    assert (out / "result.json").exists()
    assert not common.begin_run(out, {"stage": "x", "lr": 2}, True)
    assert not (out / "result.json").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(common.UserError, match="no stage made"):
        common.begin_run(mine, {"stage": "x"}, True)
    assert (mine / "thesis.tex").exists()


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def broken(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        common.replace_file(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
