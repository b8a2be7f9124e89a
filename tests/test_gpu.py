"""What would go wrong on a GPU, found without one: a training step of every stage on tensors that
have a shape, a dtype and the device cuda:0, but no numbers (torch's FakeTensorMode). And on the
CPU, what GPUs are given: micro-batches, fp16 with its scaler, torch.compile."""

import functools
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import training

CUDA = torch.device("cuda:0")
SIZE = 32
BATCH = 4
FLAGS = {
    "precision": "bf16",
    "batch": BATCH,
    "accumulate": 1,
    "compile": False,
    "tensorboard": False,
    "crop": 0,
    "no_flip": False,
    "seed": 0,
    "save_every": 1000,
    "eval_every": 1000,
    "epochs": 1000,
    "steps": 100,
    "half_size": 0.0,
    "l1": 10.0,
    "fm": 10.0,
    "perceptual": 5.0,
    "lr": 1e-3,
    "lr_d": 1e-3,
    "lr_search": 1e-3,
    "lr_z": 1e-3,
    "alpha": 16.0,
    "width": 8,
    "keep": 0.5,
    "method": "coronet",
    "start_from": "weights",
    "data": None,
    "generator": "e2gan",
    "no_text": True,
    "new_discriminator": True,
    "cycle": 10.0,
    "identity": 0.5,
    "out": None,
}


class GpuWaits(TorchDispatchMode):
    """Counts what makes a CPU wait for the GPU: reading a number (`if x > 0`, x.item()), results
    whose shape depends on numbers (x[x > 0]), copies to the CPU.

    It also lets gradients be computed where no GPU is. PyTorch's engine asks each tensor's device
    for its streams, and ends in an error, or ends Python, if there is no such device. So the engine
    is told "meta", and what it then makes on "meta" is made on the GPU."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, operator, types, args=(), options=None):
        options = options or {}
        if operator is torch.ops.prim.device.default:
            return torch.device("meta")
        if options.get("device") == torch.device("meta"):
            options = {**options, "device": CUDA}
        if operator is torch.ops.aten.uniform_.default:  # a torch without CUDA cannot draw on it
            return args[0]
        if operator is torch.ops.aten.randn.default:
            operator = torch.ops.aten.empty.memory_format
        if self.waits(operator, args, options):
            self.counts[str(operator)] = self.counts.get(str(operator), 0) + 1
        return operator(*args, **options)

    def waits(self, operator, args, options) -> bool:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if operator is torch.ops.aten.copy_.default:
            target, source = tensors
            return source.device == CUDA and target.device.type == "cpu"
        if not any(x.device == CUDA for x in tensors):
            return False
        if operator is torch.ops.aten._to_copy.default:
            return options.get("device", CUDA).type == "cpu"
        if operator is torch.ops.aten.index.Tensor:
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        return any(tag in operator.tags for tag in tags)


class Autocast(TorchFunctionMode):
    """What torch.autocast does to convolutions, matrix products and concatenations, in the place of
    the real one, which looks at the device that GpuWaits hides."""

    LOWERED = (F.conv2d, F.conv_transpose2d, F.linear, torch.matmul, torch.Tensor.matmul)
    LOWERED = (*LOWERED, torch.Tensor.__matmul__, F.scaled_dot_product_attention)

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), options=None):
        options = options or {}
        if function in self.LOWERED:
            args = [self.lowered(x) for x in args]
            options = {name: self.lowered(x) for name, x in options.items()}
        if function is torch.cat and len({x.dtype for x in args[0]}) > 1:
            args = ([x.float() for x in args[0]], *args[1:])
        return function(*args, **options)

    def lowered(self, x):
        is_float = isinstance(x, torch.Tensor) and x.dtype == torch.float32
        return x.to(self.dtype) if is_float else x


def to_cuda(module: torch.nn.Module) -> torch.nn.Module:
    """The module with fake parameters and buffers on cuda:0. Module.to cannot do it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, device=CUDA)
            part.register_parameter(name, torch.nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))
    return module


class Enough(Exception):
    """Raised after the steps that a test wants."""


class Batches:
    """In the place of a stage's data: two batches, then Enough. The second step is an ordinary one:
    what is made once has been made, and nothing is logged or saved."""

    def __init__(self, waits: GpuWaits, pictures: int):
        self.waits = waits
        self.pictures = pictures
        self.size = SIZE
        self.counts = [100]
        self.concepts = [{"name": "dark", "prompt": "make it dark"}]

    def batches(self, *_, **__):
        for _ in range(2):
            self.waits.counts.clear()
            pictures = [
                torch.empty(BATCH, 3, SIZE, SIZE, device=CUDA) for _ in range(self.pictures)
            ]
            yield *pictures, torch.zeros(BATCH, dtype=torch.long, device=CUDA)
        raise Enough


def flags(**changes) -> Namespace:
    return Namespace(**{**FLAGS, **changes})


def new_generator(arch="e2gan") -> common.Generator:
    concepts = [{"name": "dark", "prompt": "make it dark"}]
    tokens = [random_rows("tokens/dark", 4)] if arch == "e2gan" else None
    return common.new_generator(arch, 8, SIZE, concepts, tokens, "ViT-S-32:random")


@pytest.fixture
def gpu(monkeypatch):
    """Inside, all tensors are fake. Yields what counts the waits."""
    perceptual = training.PerceptualNetwork()
    monkeypatch.setattr(training, "perceptual_network", lambda device: perceptual)
    monkeypatch.setattr(training, "autocast", fake_autocast)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: to_cuda(module))
    with FakeTensorMode(allow_non_fake_inputs=True), GpuWaits() as waits:
        to_cuda(perceptual)
        yield waits


def fake_autocast(device, precision):
    assert device == CUDA
    return Autocast({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def test_the_counter_sees_every_kind_of_wait(gpu):
    x = torch.empty(3, device=CUDA)
    for wait in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x[x > 0]):
        gpu.counts.clear()
        with pytest.raises(Exception):  # noqa: B017  there are no numbers to read
            wait()
        assert sum(gpu.counts.values()) == 1
    gpu.counts.clear()
    x.cpu()
    x.to("cpu", non_blocking=True)
    torch.empty(3).copy_(x)
    assert sum(gpu.counts.values()) == 3
    x[torch.zeros(2, dtype=torch.long, device=CUDA)] + x.new_zeros(2) * torch.tensor(2.0)
    assert sum(gpu.counts.values()) == 3
    with pytest.raises(Exception, match="device"):
        x + torch.ones(3)


def test_bf16_goes_through_a_network(gpu):
    generator = to_cuda(new_generator())
    photo, concept = generator.example(device=CUDA)
    with training.autocast(CUDA, "bf16"):
        assert generator.down1(generator.stem(photo)).dtype == torch.bfloat16
        assert generator(photo, concept).device == CUDA


@pytest.mark.parametrize("precision, micro_batches", [("bf16", 1), ("fp16", 2)])
def test_a_step_of_stage_3_waits_for_nothing(gpu, load_stage, precision, micro_batches):
    generator = to_cuda(new_generator())
    discriminator = common.new_discriminator(generator)
    data = Batches(gpu, pictures=2)
    args = flags(precision=precision, accumulate=micro_batches)
    with pytest.raises(Enough):
        load_stage("03").train_base(generator, discriminator, data, data, args)
    assert not gpu.counts


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_step_of_stage_4_waits_for_nothing(gpu, load_stage, mode):
    four = load_stage("04")
    generator = to_cuda(new_generator())
    if mode == "lora":
        ranks = four.layer_ranks(four.layer_shapes(generator), four.PAPER_RANKS)
        four.add_lora(generator, ranks, 16.0)
    discriminator = common.new_discriminator(generator, text=False)
    data = Batches(gpu, pictures=2)
    with pytest.raises(Enough):
        four.finetune(flags(mode=mode), generator, discriminator, data, steps=100)
    assert not gpu.counts


TASKS = {"pix2pix": "e2gan", "cyclegan": "e2gan", "dcgan": "dcgan"}
no_cuda = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="fake batch norms need a torch built for CUDA"
)
EVERY_TASK = ["pix2pix", "cyclegan", pytest.param("dcgan", marks=no_cuda)]


def new_task(five, task: str, waits: GpuWaits):
    """A GAN to prune, its data, and flags."""
    args = flags(task=task, generator=TASKS[task])
    data = Batches(waits, pictures=1 if task == "dcgan" else 2)
    trained = to_cuda(new_generator()) if task == "pix2pix" else None
    return to_cuda(five.TASKS[task](args, data, trained)), data, args


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_converging_step_of_stage_5_waits_for_nothing(gpu, load_stage, task):
    five = load_stage("05")
    networks, data, args = new_task(five, task, gpu)
    with pytest.raises(Enough):
        five.converge(networks, data, data, args, steps=100)
    assert not gpu.counts


@pytest.mark.parametrize("task", EVERY_TASK)
def test_a_searching_step_of_stage_5_waits_once(gpu, load_stage, monkeypatch, task):
    """All networks are pruned. Who is shrunk is found on the CPU, from numbers that are not there:
    it is given."""
    five = load_stage("05")
    networks, data, args = new_task(five, task, gpu)
    target = Namespace(widths=lambda *_: {}, share=lambda _: 0.9)
    shrunk = []

    def given_amounts(target, latents, *rest):
        shrunk.append(latents)
        return {group: torch.full_like(z, 0.01) for group, z in latents.items()}

    monkeypatch.setattr(five, "weighted_amounts", given_amounts)
    targets = dict.fromkeys(networks.networks, target)
    with pytest.raises(Enough):
        five.search(networks, targets, data, data, args, steps=100)
    assert len(shrunk) == 2 * len(networks.networks)
    assert gpu.counts == {"aten._to_copy.default": 1}


# ---- On the CPU, with numbers --------------------------------------------------------------------


class OneBatch:
    """In the place of a stage's data: one random batch, then Enough."""

    size = SIZE
    counts = [100]
    concepts = [{"name": "dark", "prompt": "make it dark"}]

    def batches(self, *_, **__):
        rng = torch.Generator().manual_seed(1)
        photo, edit = torch.rand(2, BATCH, 3, SIZE, SIZE, generator=rng) * 2 - 1
        yield photo, edit, torch.zeros(BATCH, dtype=torch.long)
        raise Enough


def step_gradients(stage, **changes) -> list[torch.Tensor]:
    """The gradients of stage 3's or 5's (searching) networks, of each optimizer one vector."""
    rates = {
        "lr": 1e-6,
        "lr_d": 1e-6,
        "lr_search": 1e-6,
    }  # so that one step does not alter the next
    args = flags(**{"precision": "fp32", "perceptual": 0.0, **rates, **changes})
    found = []

    def keep(optimizer, args, options):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

    torch.manual_seed(0)
    generator = new_generator()
    hook = register_optimizer_step_pre_hook(keep)
    try:
        with pytest.raises(Enough):
            if hasattr(stage, "train_base"):
                discriminator = common.new_discriminator(generator)
                stage.train_base(generator, discriminator, OneBatch(), OneBatch(), args)
            else:
                task = stage.TASKS["pix2pix"](args, OneBatch(), generator)
                targets = {"generator": stage.Target(generator, 0.5)}
                stage.search(task, targets, OneBatch(), OneBatch(), args, steps=100)
    finally:
        hook.remove()
    return found


def assert_near(found, wanted, tolerance) -> None:
    assert len(found) == len(wanted) > 1
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("number", ["03", "05"])
def test_micro_batches_have_the_gradients_of_the_whole_batch(load_stage, number):
    stage = load_stage(number)
    assert_near(step_gradients(stage, accumulate=2), step_gradients(stage), 1e-4)


@pytest.mark.parametrize("number", ["03", "05"])
def test_fp16_has_the_gradients_of_fp32_nearly(load_stage, number, monkeypatch):
    """The scaler has multiplied the losses, and taken that back before the optimizers step. It
    begins with less than 2^16, with which first steps overflow and are left out. The furthest off
    are the gradients of latents, by 12 %: a norm undoes most of what a latent does, so that they
    are sums of terms which cancel."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**7)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    stage = load_stage(number)
    assert_near(step_gradients(stage, precision="fp16"), step_gradients(stage), 0.2)


def test_a_scaler_goes_on_where_it_was(tmp_path):
    scaler = training.grad_scaler(torch.device("cpu"), "fp16")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = training.adam([weight], 0.1)
    scaler.scale(weight * torch.inf).sum().backward()
    training.descend(optimizer, scaler)
    scaler.update()
    assert weight == 1  # no step
    training.save_state(tmp_path / "state", {"scaler": scaler}, 1, False, [])
    again = training.grad_scaler(torch.device("cpu"), "fp16")
    training.load_state(tmp_path / "state", {"scaler": again})
    assert again.get_scale() == scaler.get_scale() == 2**15


@pytest.mark.parametrize("number", ["03", "05"])
def test_compiled_networks_have_the_same_gradients(load_stage, number, monkeypatch):
    """Traced, but not made into kernels, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    stage = load_stage(number)
    assert_near(step_gradients(stage, compile=True), step_gradients(stage), 1e-4)
