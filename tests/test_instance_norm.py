"""Instance norm, residual and LeakyReLU in one: the operator, the modules it stands for, and the blocks that use it.

Triton's kernels run in Triton's interpreter, in a process of its own.
"""

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import vmamba
from vmamba import norm_act as module
from vmamba.kernels import instance_norm_cuda as cuda
from vmamba.kernels import instance_norm_reference as reference
from vmamba.kernels import nvrtc
from vmamba.kernels.instance_norm import FORMATS, instance_norm, is_channels_last
from vmamba.norm_act import Chain, conv_norm_act, laid_out, norm_act
from vmamba.unet_blocks import ConvResidual, UnetrBlock
from vmamba.unet_blocks import instance_norm as layer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = [  # affine, slope, residual
    (True, 0.01, True),
    (False, 0.01, False),
    (True, 0.01, False),
    (False, 0.01, True),
    (True, 1.0, True),
    (False, 1.0, False),
    (True, 0.0, True),
]
SHAPES = [(2, 3, 5, 17), (2, 32, 40, 56, 48)]  # of all cases
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("umamba_v1_bot_2d", {"features": (8, 16, 16), "strides": ((1, 1), (2, 2), (2, 2))}),
    ("swin_umamba", {"dim": 16}),
]
COLUMNS = [(2, 70, 3, 2), (1, 5, 20, 23), (1, 12, 3, 4, 7)]  # channels-last
LARGE = [(1, 20, 4, 2, 4), (2, 70, 3, 2), (1, 2, 100, 53), (2, 320, 5, 7, 6), (1, 3, 257, 255), (300, 2, 66, 64)]


def tensors(shape, case, dtype=torch.float64, device="cpu", added=None) -> tuple[Any, ...]:
    torch.manual_seed(shape[1])
    affine, slope, residual = case
    leaves = torch.randn(shape) * 3 + 5, torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    types = dtype, added or dtype, *[torch.promote_types(dtype, torch.float32)] * 2
    x, r, weight, bias = (t.to(device, d).requires_grad_() for t, d in zip(leaves, types, strict=True))
    return x, r if residual else None, *((weight, bias) if affine else (None, None)), 1e-5, slope


def results(forward, arguments, upstream):
    """y and the gradients of all tensors."""
    y = forward(*arguments)
    return [y.detach(), *torch.autograd.grad(y, [t for t in arguments[:4] if t is not None], upstream.to(y))]


def error(got, right):
    return float((got.double() - right.double()).norm() / right.double().norm())


def channels_last(arguments):
    """The same maps, laid out otherwise."""
    form = FORMATS[arguments[0].ndim]
    maps = (None if t is None else t.detach().contiguous(memory_format=form).requires_grad_() for t in arguments[:2])
    return *maps, *arguments[2:]


def errors(arguments, backend=cuda):
    """Those of a backend's results, relative to float64's; a second run gives the same.

    Where rounding decides whether LeakyReLU's argument is positive there is no gradient from above.
    """
    exact: Any = tuple(t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments)
    with torch.no_grad():
        z = reference.forward(*exact[:-1], slope=1.0)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    upstream = upstream.masked_fill(z.abs() < 1e-3, 0).to(backend.forward(*arguments))
    got = results(backend.forward, arguments, upstream)
    assert [t.dtype for t in got[1:]] == [t.dtype for t in arguments[:4] if t is not None]
    assert all(map(torch.equal, got, results(backend.forward, arguments, upstream)))
    return list(map(error, got, results(reference.forward, exact, upstream)))


if INTERPRETED:
    from tests import interpreter  # noqa: F401

    @pytest.mark.parametrize("shape", COLUMNS, ids=str)
    @pytest.mark.parametrize("case", CASES[:4], ids=str)
    def test_columns(case, shape, monkeypatch):
        from vmamba.kernels import instance_norm_triton

        monkeypatch.setattr(instance_norm_triton, "TILE", 256)
        monkeypatch.setattr(instance_norm_triton, "PROGRAMS", 7)
        monkeypatch.setattr(instance_norm_triton, "FOLDED", 4)
        arguments = channels_last(tensors(shape, case, torch.float32))
        assert is_channels_last(instance_norm_triton.forward(*arguments))
        assert max(errors(arguments, instance_norm_triton)) < 3e-6


def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_columns"]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert f"{len(COLUMNS) * 4} passed" in ran.stdout


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_equation(case):
    x, residual, weight, bias, eps, slope = arguments = tensors((2, 3, 4, 5), case)
    centred = x - x.mean((2, 3), keepdim=True)
    z = centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()
    z = z if weight is None else z * weight[:, None, None] + bias[:, None, None]
    z = z if residual is None else z + residual
    y = instance_norm(x, weight, bias, residual=residual, eps=eps, slope=slope)
    torch.testing.assert_close(y, torch.where(z > 0, z, z * slope))
    assert torch.autograd.gradcheck(lambda *t: reference.forward(*t, *arguments[4:]), arguments[:4])


def test_operator_refuses():
    x = torch.randn(2, 3, 4, 4)
    for arguments, options in [
        ((x[:, :, :1, :1],), {}),
        ((x[0, 0],), {}),
        ((x, torch.ones(3)), {}),
        ((x, torch.ones(2), torch.ones(2)), {}),
        ((x,), {"residual": x[:1]}),
        ((x,), {"slope": 1.5}),
    ]:
        with pytest.raises(ValueError, match="must be"):
            instance_norm(*arguments, **options)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it needs tensors on cuda"):
        instance_norm(x, backend="cuda")
    assert "up to 1073741824 planes" in str(cuda.why_not(x[:1, :1].expand(1 << 20, 1 << 12, 4, 4)))
    assert "float64" in str(cuda.why_not(x.double()))


@pytest.mark.parametrize("pixels", [2, 7, 210, 840, 6720, 53760, 65535, 40 * 224 * 192, 41 * 223 * 191])
@pytest.mark.parametrize("bytes", [2, 4])
def test_plan_covers_the_planes(pixels, bytes):
    for single in (True, False):
        for aligned in (True, False):
            threads, pack, per, parts = cuda.plan(pixels, bytes, single, aligned)
            chunk = pack * per * threads
            assert chunk * (parts - 1) < pixels <= chunk * parts and pixels % pack == 0
            assert pack * bytes <= 16 and per * max(pack * bytes // 4, 1) <= (32 if single else 16)
            assert (aligned or pack == 1) and threads in (32, 64, 128, 256)


@pytest.mark.skipif(nvrtc._library() is None, reason="PyTorch came without NVRTC")
def test_it_compiles_without_a_gpu():
    half, full = torch.bfloat16, torch.float32
    chosen = [
        (90, cuda.Kind(half, half, half, True, True, True, True), 40 * 224 * 192),
        (80, cuda.Kind(torch.float16, full, full, False, True, True, False), 210),
        (80, cuda.Kind(full, full, full, False, False, False), 65535),
    ]
    for architecture, kind, pixels in chosen:
        plan = cuda.plan(pixels, max(t.itemsize for t in kind[:3]), False, True)
        flags = [f"-D{define}" for define in cuda.defines(kind, plan)]
        options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *flags]
        cubin = nvrtc.compile(nvrtc.text_of(cuda.SOURCE), options)
        assert all(name in cubin for name in (b"forward", b"backward"))


def test_on_the_cpu_the_modules_are_called():
    x, z = torch.randn(2, 2, 4, 5, 6).unbind()
    norm, act = layer(2, 4), nn.LeakyReLU(0.01)
    assert type(norm) is nn.InstanceNorm2d
    assert torch.equal(norm_act(norm, act, x), act(norm(x)))
    assert torch.equal(norm_act(norm, None, x, z), norm(x) + z)
    expected = act(norm(x) + z)
    assert torch.equal(norm_act(norm, act, x, z), expected)
    fused = instance_norm(x, norm.weight, norm.bias, residual=z, eps=norm.eps, slope=0.01)
    torch.testing.assert_close(fused, expected)
    seen = []
    for m in (norm, act):
        m.register_forward_hook(lambda m, *_: seen.append(m))
    norm_act(norm, act, x, z)
    assert seen == [norm, act]


def test_what_may_be_one_step():
    x = torch.randn(2, 4, 5, 6)
    norm, act = layer(2, 4), nn.LeakyReLU(0.01)
    assert module._fits(norm, act, x, x) and module._fits(norm, None, x, None)
    assert module._fits(layer(3, 4, affine=False), act, x[..., None], None)
    watched, busy = copy.deepcopy(act), copy.deepcopy(norm)
    watched.register_forward_hook(lambda *_: None)
    busy.register_full_backward_hook(lambda *_: None)
    others = [
        (busy, act, x, None),
        (norm, watched, x, None),
        (norm, nn.GELU(), x, None),
        (norm, nn.LeakyReLU(-0.1), x, None),
        (norm, act, x[0], None),
        (norm, act, x, x[:1]),
        (norm, act, x[:, :3], None),
        (norm, act, x[:, :, :1, :1], None),
        (norm, act, x[:0], None),
        (nn.BatchNorm2d(4), act, x, None),
        (nn.InstanceNorm2d(4, track_running_stats=True), act, x, None),
    ]
    assert not any(module._fits(*arguments) for arguments in others)


def test_which_bias_is_needless():
    conv, norm, hooked = nn.Conv2d(3, 4, 3), layer(2, 4), nn.Conv2d(3, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert module._needless(conv, norm) and module._needless(nn.Conv3d(3, 4, 1), layer(3, 4, affine=False))
    tracking = nn.InstanceNorm2d(4, track_running_stats=True)
    others = [(hooked, norm), (conv, nn.BatchNorm2d(4)), (conv, tracking), (nn.Conv2d(3, 4, 3, bias=False), norm)]
    assert not any(module._needless(*pair) for pair in others)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_without_the_bias(padding_mode, monkeypatch):
    """What a GPU does, but for the kernel: the same values, and for the bias a gradient of 0."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"padding": 1, "padding_mode": padding_mode, "dtype": torch.float64}
    conv, norm, act = nn.Conv2d(3, 4, 3, **options), layer(2, 4, dtype=torch.float64), nn.LeakyReLU(0.01)
    x, z = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    outcomes = []
    for direct in (lambda x: False, lambda x: True):
        monkeypatch.setattr(module, "_direct", direct)
        y = conv_norm_act(conv, norm, act, x, z)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [*conv.parameters(), *norm.parameters()])])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(outcomes[1][2], torch.zeros(4, dtype=torch.float64))


def test_maps_are_laid_out_for_half_precision(monkeypatch):
    x = torch.randn(2, 3, 4, 5, 6)
    assert laid_out(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert laid_out(x) is x  # on a CPU
        monkeypatch.setattr(module, "_direct", lambda x: True)
        for maps in (x, x[:, :, 0], x.bfloat16()):
            assert is_channels_last(laid_out(maps)) and torch.equal(laid_out(maps), maps)
        single = laid_out(x[:, :1])
        assert single.stride() == (120, 1, 30, 6, 1) and torch.equal(single, x[:, :1])
        assert is_channels_last(nn.Conv3d(1, 4, 3)(single)) and not is_channels_last(nn.Conv3d(1, 4, 3)(x[:, :1]))
        assert laid_out(x[:, :, 0, 0]).stride() == (360, 120, 1)
    assert laid_out(x) is x and is_channels_last(laid_out(x.half()))


def test_a_chain_is_its_layers():
    x = torch.randn(2, 3, 6, 5)
    layers = nn.Conv2d(3, 4, 3), layer(2, 4), nn.LeakyReLU(0.01), layer(2, 4), nn.ReLU(), nn.LeakyReLU(0.2)
    chain, plain = Chain(*layers), nn.Sequential(*layers)
    assert chain.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(chain(x), plain(x)) and torch.equal(Chain()(x), x)
    rest = Chain(nn.Identity(), nn.LeakyReLU(0.1), nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.3), nn.ReLU(), layer(2, 4))
    assert torch.equal(rest(x), nn.Sequential(*rest)(x))


@pytest.mark.parametrize("block", [UnetrBlock(2, 4, 6), ConvResidual(2, 4, 4, norm=lambda c, **dd: layer(2, c, **dd))])
def test_blocks_compile(block):
    x = torch.randn(2, 4, 6, 5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_gpu_values_and_gradients(shape, dtype, bound):
    from vmamba.kernels import instance_norm_triton as triton

    for case in CASES if shape in SHAPES else CASES[:2]:
        arguments = tensors(shape, case, dtype, "cuda")
        assert max(errors(arguments)) < bound, case
        assert max(errors(channels_last(arguments), triton)) < bound, ("channels-last", case)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_a_wider_residual(shape):
    for case in (CASES[0], CASES[4]):
        arguments = tensors(shape, case, torch.bfloat16, "cuda", added=torch.float32)
        assert cuda.forward(*arguments).dtype == torch.float32 and max(errors(arguments)) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (2, 4, 320, 320), (2, 2, 501, 333)], ids=str)
def test_gpu_extremes(shape):
    x = (torch.randn(shape) * 4000 + 5e4).clamp(max=65504).half().cuda()
    x[0, 0] = 6e4
    x[0, 1, ::2], x[0, 1, 1::2] = 65504, -65504
    x[-1, 0] = 1
    x[-1, 0, -1, -1] = 6e4
    arguments = x.requires_grad_(), None, None, None, 1e-5, 0.01
    assert max(errors(arguments)) < 2e-3
    got = results(cuda.forward, arguments, torch.ones(shape))
    assert not got[0][0, 0].any() and all(t.isfinite().all() for t in got)
    far = (torch.randn(shape) + 3e4).cuda()
    assert error(cuda.forward(far, *arguments[1:]), reference.forward(far.double(), *arguments[1:])) < 2e-3


@pytest.mark.gpu
def test_gpu_two_pixels():
    x = torch.tensor([3.0, 5.0]).view(1, 1, 1, 2).cuda()
    assert torch.allclose(cuda.forward(x, None, None, None, 1e-5, 1.0).flatten().cpu(), torch.tensor([-1.0, 1.0]))


@pytest.mark.gpu
def test_gpu_any_memory():
    whole, weight = torch.randn(2, 8, 130, 129).cuda(), torch.randn(8).cuda()
    parts = whole[:, 1:5], whole.to(memory_format=torch.channels_last), whole[0, 0].expand(2, 4, 130, 129)
    for x in (*parts, whole.flatten()[1 : 1 + 2 * 4 * 64 * 64].view(2, 4, 64, 64)):
        x, w = x.detach().requires_grad_(), weight[: x.shape[1]]
        got, right = [f(x, x.flip(0), w, -w, 1e-5, 0.01) for f in (cuda.forward, reference.forward)]
        assert torch.allclose(got, right, atol=1e-5)
        ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (got, right))
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert instance_norm(whole[:0]).shape == whole[:0].shape


@pytest.mark.gpu
def test_gpu_graphs_and_streams():
    """Counts are set back for every run, and kernels of two streams do not wait for each other."""
    x, z = torch.randn(2, 2, 16, 64, 64, 64).cuda().bfloat16().unbind()
    run = lambda: cuda.forward(x, z, None, None, 1e-5, 0.01)  # noqa: E731
    right, graph, streams = run(), torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, right)
    torch.cuda.synchronize()
    several = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            several.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(t, right) for t in several)


@pytest.mark.gpu
def test_gpu_autocast_and_hooks():
    x, z = torch.randn(2, 2, 4, 6, 5).cuda().unbind()
    norm, act, seen = layer(2, 4).cuda(), nn.LeakyReLU(0.01), []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cuda", torch.bfloat16):
            y, right = norm_act(norm, act, x.to(dtype), z.to(dtype)), act(norm(x.to(dtype)) + z.to(dtype))
        assert y.dtype == right.dtype == dtype and torch.allclose(y, right, atol=3e-2)
    hook = norm.register_forward_hook(lambda *_: seen.append("norm"))
    norm_act(norm, act, x, z)
    assert seen == ["norm"]
    hook.remove()
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        norm_act(norm, act, x[:, :, :1, :1])


@pytest.mark.gpu
@pytest.mark.parametrize("name, options", SMALL)
def test_gpu_networks(name, options, monkeypatch):
    torch.manual_seed(0)
    model, x = vmamba.create_model(name, **options).cuda().eval(), torch.randn(2, 1, 64, 96).cuda()
    outcomes = []
    for direct in (module._direct, lambda x: False):
        monkeypatch.setattr(module, "_direct", direct)
        with torch.backends.cudnn.flags(allow_tf32=False):
            y = model(x)
            grads = torch.autograd.grad(y.square().mean(), [*model.parameters()], materialize_grads=True)
        outcomes.append([y.detach(), *grads])
    errors = [float((a - b).norm() / (b.norm() + 1e-5)) for a, b in zip(*outcomes, strict=True)]
    assert errors[0] < 1e-4 and sorted(errors)[len(errors) // 2] < 1e-3
