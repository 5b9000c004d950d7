"""Weights cast together: what autocast would make of each, in fewer launches, and only where nothing else looks."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import vmamba
from vmamba import narrow
from vmamba.mlp import Mlp

SMALL = {"depths": (1, 1), "dim": 16, "num_classes": 5}


def network(name="vmamba_tiny_s1l8", **options):
    torch.manual_seed(0)
    return vmamba.create_model(name, **(SMALL | options)).eval()


def image(device="cpu", side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)


@contextmanager
def autocasts_own():
    """Inside, every weight is cast by autocast."""
    halves, narrow.HALF = narrow.HALF, ()
    try:
        yield
    finally:
        narrow.HALF = halves


def autocast(function, *args, device="cpu"):
    with torch.autocast(device, torch.bfloat16):
        return function(*args)


def value_and_gradients(model, x, parameters=None):
    model.zero_grad()
    y = autocast(model, x, device=x.device.type)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in parameters or model.parameters())]


def both(model, *args):
    with autocasts_own():
        expected = value_and_gradients(model, *args)
    return value_and_gradients(model, *args), expected


def launches(function, name="aten::_foreach_copy_"):
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == name)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny", "vmamba_tiny_m2", "efficientvmamba_tiny"])
def test_same_bits_as_autocast(name):
    own, expected = both(
        network(name, drop_path_rate=0) if name != "efficientvmamba_tiny" else small_other(name), image()
    )
    assert all(map(torch.equal, own, expected))


def small_other(name):
    torch.manual_seed(0)
    return vmamba.create_model(name, num_classes=5).eval()


def test_one_launch_for_a_stage_or_for_each_mixer_and_mlp():
    model, x, stages = network(depths=(2, 1)), image(), 2
    with torch.no_grad():
        assert launches(lambda: autocast(model, x)) == stages
    assert launches(lambda: value_and_gradients(model, x)) == 2 * stages
    model.set_grad_checkpointing()  # each block by itself, three of them: forward, again, and backward
    assert launches(lambda: value_and_gradients(model, x)) == 3 * 2 * 3
    model.set_grad_checkpointing(False)
    assert launches(lambda: model(x)) == 0
    with autocasts_own():
        assert launches(lambda: autocast(model, x)) == 0


def test_one_launch_for_a_column():
    torch.manual_seed(0)
    model, x = vmamba.create_model("vim_tiny_patch16_224", depth=3, dim=16, img_size=32, num_classes=5).eval(), image()
    with torch.no_grad():
        assert launches(lambda: autocast(model, x)) == 1
        own = autocast(model, x)
        with autocasts_own():
            assert torch.equal(own, autocast(model, x))
        model.blocks[1].mixer.register_forward_hook(lambda *_: None)  # it is called, and casts its own
        assert launches(lambda: autocast(model, x)) == 2
        assert torch.equal(own, autocast(model, x))
    assert launches(lambda: value_and_gradients(model, x)) == 2 * 3  # gradients do not wait for those of all blocks
    assert all(map(torch.equal, *both(model, x)))


def test_never_stale():
    model, x = network(), image()
    weight = model.stages[0].blocks[0].mlp.fc2.weight
    with torch.inference_mode():
        before = autocast(model, x)
        weight.data.mul_(2)
        assert not torch.equal(autocast(model, x), before)
        with autocasts_own():
            expected = autocast(model, x)
        assert torch.equal(autocast(model, x), expected)


@pytest.mark.parametrize("frozen", ["mlp.fc1", "mixer.x_proj", "mixer", ""])
def test_frozen_weights(frozen):
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{frozen}" not in name if frozen else name.startswith("head"))
    learned = [p for p in model.parameters() if p.requires_grad]
    own, expected = both(model, image(), learned)
    assert len(learned) < len(list(model.parameters())) and all(map(torch.equal, own, expected))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_checkpointing():
    model, x = network(), image()
    expected = value_and_gradients(model, x)
    model.set_grad_checkpointing()
    assert all(map(torch.equal, value_and_gradients(model, x), expected))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("layer", ["mlp.fc1", "mixer.out_proj", "mixer.conv", "mlp.drop1", "norm2", "drop_path"])
def test_hooks_see_their_layer(hook, layer):
    model, x, seen = network(), image(), []
    handle = getattr(model.stages[0].blocks[0].get_submodule(layer), hook)(lambda *_: seen.append(1))
    value_and_gradients(model, x)
    assert seen
    handle.remove()


def test_hooks_see_their_block():
    model, x, seen = network(), image(), []
    for block in model.stages[0].blocks:
        block.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    y = model.stages[0](model.stem(x))
    assert len(seen) == SMALL["depths"][0] and seen[-1][1] is y


class Doubled(nn.Linear):
    """Stands for layers that wrap or replace a linear one, as adapters do."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_other_layers_are_called():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    plain = autocast(mlp, x)
    mlp.fc2.__class__ = Doubled
    assert torch.equal(autocast(mlp, x), 2 * plain)
    mlp.fc2.__class__ = nn.Linear
    mlp.fc2.forward = lambda input: torch.zeros(3, 8)
    assert not autocast(mlp, x).any()


def test_pruned_weights():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    prune.l1_unstructured(mlp.fc1, "weight", amount=0.5)
    parametrizations.spectral_norm(mlp.fc2)
    with autocasts_own():
        expected = autocast(mlp.eval(), x)
    assert torch.equal(autocast(mlp, x), expected)


def test_dropout_of_an_mlp():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 64, drop=0.5), torch.randn(3, 8)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_are_not_float32_stay_as_they_are(dtype):
    other, usual, x = Mlp(4, 8), Mlp(4, 8), torch.randn(2, 4)
    other.fc2.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert [*narrow.narrow(x, [other, usual])] == [usual] == [*narrow.narrow_together(x, [nn.GELU(), other, usual])]
    assert narrow.narrow(x, [usual]) == {} == narrow.narrow_together(x, [usual])


def test_a_mixer_that_must_be_called_is_called():
    mlp, x = Mlp(4, 8), torch.randn(2, 4)
    mlp.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not narrow.narrow_together(x, [mlp]) and narrow.narrow(x, [mlp])


def test_transforms_and_second_derivatives():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    parameters = dict(mlp.named_parameters())

    def loss(parameters, x):
        return autocast(torch.func.functional_call, mlp, parameters, (x,)).float().square().sum()

    own = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    gradients = dict(zip(parameters, torch.autograd.grad(loss(parameters, x), [*parameters.values()]), strict=True))
    for name, gradient in gradients.items():
        assert torch.equal(own[name], gradient)
        assert torch.allclose(each[name].sum(0), gradient, rtol=0.05, atol=0.05)
    (first,) = torch.autograd.grad(loss(parameters, x), [mlp.fc1.weight], create_graph=True)
    first.square().sum().backward()
    assert mlp.fc2.weight.grad is not None and mlp.fc2.weight.grad.any()


def test_shared_weights_add_up():
    mlp, x = Mlp(4, 4), torch.randn(3, 4)
    mlp.fc2.weight = mlp.fc1.weight
    own, expected = both(mlp, x)
    assert all(torch.allclose(one, two, rtol=1e-2, atol=1e-2) for one, two in zip(own, expected, strict=True))


def test_compiled():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, mlp):
        mlp.zero_grad()
        y = autocast(function, x)
        y.float().square().sum().backward()
        results.append([y.detach(), *(p.grad for p in mlp.parameters())])
    assert all(torch.allclose(one, two, rtol=1e-2, atol=1e-2) for one, two in zip(*results, strict=True))
    assert all(two.any() for two in results[0][1:])
    with torch.no_grad():
        assert torch.allclose(autocast(compiled, x), autocast(mlp, x), rtol=1e-2, atol=1e-2)


def test_compiled_inference_casts_a_stage_in_one_operator():
    model, x, casts = network(depths=(2, 1)), image(), []

    def backend(graph, inputs):
        casts.append(sum(node.target is torch.ops.aten._foreach_copy.default for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        plain = autocast(torch.compile(model, backend=backend, fullgraph=True), x)
        assert torch.equal(plain, autocast(model, x)) and casts == [2]
        torch.compiler.reset()
        model.stages[0].blocks[1].mlp.register_forward_hook(lambda module, inputs, y: y + 1)  # which must be called
        hooked = autocast(torch.compile(model, backend=backend, fullgraph=True), x)
        assert torch.equal(hooked, autocast(model, x)) and not torch.equal(hooked, plain)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vim_tiny_patch16_224"])
def test_inference_is_compiled_as_one_graph(name):
    small = {"depth": 2, "img_size": 32} if name.startswith("vim") else {"depths": (2, 1)}
    model, x = vmamba.create_model(name, dim=16, num_classes=5, **small).eval(), image()
    with torch.no_grad():
        compiled = autocast(torch.compile(model, fullgraph=True, backend="eager"), x)
        assert torch.allclose(compiled, autocast(model, x), rtol=3e-2, atol=3e-2)


def test_compiled_inference_checks_little_before_a_call():
    """PyTorch passes over a block whose guards are of its modules alone, while none of them was assigned anything."""
    model = network(depths=(2, 1))
    torch.compiler.reset()
    with torch.no_grad():
        autocast(torch.compile(model, fullgraph=True, backend="eager"), image())
    (entry,) = _debug_get_cache_entry_list(type(model).forward.__code__)
    blocks = [line for line in str(entry.guard_manager).splitlines() if "'vmamba.block.Block'>, tag_safe" in line]
    assert len(blocks) == 3 and all("tag_safe=(True, True)" in line for line in blocks)


def kernels(function):
    """Kernels that a GPU runs for a call after the first ones."""
    for _ in range(3):
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name for event in profile.events()
    )


@pytest.mark.gpu
def test_gpu_launches_do_not_creep_up():
    """Behind the bounds: before weights were cast together, norms fused with what is added to the stream."""
    model, x = vmamba.create_model("vmamba_tiny_s1l8").cuda(), torch.randn(2, 3, 224, 224, device="cuda")
    with torch.no_grad():
        assert kernels(lambda: autocast(model.eval(), x, device="cuda")) <= 215  # 382
    model.train()

    def step():
        model.zero_grad()
        autocast(model, x, device="cuda").float().sum().backward()

    assert kernels(step) <= 800  # 1133


@pytest.mark.gpu
def test_gpu_same_bits_as_autocast():
    own, expected = both(network(drop_path_rate=0).cuda(), image("cuda"))
    assert all(map(torch.equal, own, expected))
    assert F.mse_loss(own[0], expected[0]) == 0
