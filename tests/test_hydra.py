"""Hydra and its quasiseparable operator against the original, against the dense matrix, and on maps."""

from typing import Any

import pytest
import torch

import vmamba
from tests import goldens
from vmamba.checkpoint import load_checkpoint
from vmamba.kernels.quasiseparable import matrix, quasiseparable
from vmamba.mixers.hydra import Hydra
from vmamba.scans import list_scans

OFFICIAL = {  # arguments of the original -> ours
    "d_state": "state",
    "headdim": "head_dim",
    "d_conv": "conv",
    "ngroups": "groups",
    "learnable_init_states": "initial_states",
    "expand": "expand",
    "bias": "bias",
    "dt_limit": "dt_limit",
}


def check_golden(block: Any, golden: dict) -> None:
    """Weights of the original load strictly, and every intermediate result is the same."""
    load_checkpoint(block.double(), goldens.fill_state(golden) | tables(golden))
    assert sum(p.numel() for p in block.parameters()) == golden["params"]
    found = {}
    block.in_proj.register_forward_hook(lambda module, inputs, output: found.update(in_proj=output))
    block.conv.register_forward_hook(lambda module, inputs, output: found.update(conv=output.mT))
    block.norm.register_forward_pre_hook(lambda module, inputs: found.update(y=inputs[0]))
    block.out_proj.register_forward_pre_hook(lambda module, inputs: found.update(normed=inputs[0]))
    for case in golden["cases"]:
        found["out"] = block(*goldens.case_inputs(case))
        assert found.keys() == case["outputs"].keys()
        for name, expected in case["outputs"].items():
            assert goldens.compare(found[name], expected) < 1e-12, name


def tables(golden: dict) -> dict:
    """The tables that golden files leave out: cosines, which the original computes in single precision."""
    order = {key: torch.arange(golden["state"][key][0]) for key in golden["skip"]}
    return {key: torch.cos(torch.outer(2 * torch.pi * t, t) / len(t)) for key, t in order.items()}


@pytest.mark.parametrize("name", goldens.names("op_hydra*"))
def test_golden(name):
    golden = goldens.load(name)
    options = {OFFICIAL[key]: value for key, value in golden["config"].items() if key != "d_model"}
    check_golden(Hydra(golden["config"]["d_model"], **options), golden)


def arguments(length, *, groups=2, heads=3, dtype=torch.float64):
    """x, dt, A, B, C and the diagonal of two sequences."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, groups, length, heads, 4), (2, 2, groups, length, heads), (groups, heads)]
    shapes += [(2, 2, groups, length, 5)] * 2 + [(2, groups, length, heads)]
    x, dt, A, B, C, diagonal = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return [t.requires_grad_() for t in (x, dt.exp(), -A.exp(), B, C, diagonal)]


def dense(x, *rest):
    return torch.einsum("bgmts,bgsmp->bgtmp", matrix(*rest), x)


def test_matrix_is_the_equation():
    _, dt, A, B, C, diagonal = (t.detach() for t in arguments(5))
    found = matrix(dt, A, B, C, diagonal)
    assert torch.equal(found.diagonal(dim1=-2, dim2=-1), diagonal.mT)
    for t in range(5):
        for s in set(range(5)) - {t}:
            side, last = (0, t - 1) if s < t else (1, t + 1)
            between = dt[:, side, :, min(s, t) + 1 : max(s, t)]  # of the steps between them, each decays once
            decay = (between.sum(2) * A).exp() * dt[:, side, :, s]
            expected = decay * (C[:, side, :, last] * B[:, side, :, s]).sum(-1)[..., None]
            torch.testing.assert_close(found[..., t, s], expected)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 150])
def test_operator_is_the_matrix(length):
    tensors = arguments(length)
    y, expected = quasiseparable(*tensors), dense(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(y)
    used = tensors if length > 1 else [tensors[0], tensors[-1]]
    grads = (torch.autograd.grad(z, used, upstream) for z in (y, expected))
    for tensor, grad, exact in zip(used, *grads, strict=True):
        assert (grad - exact).norm() <= 1e-11 * exact.norm(), tensor.shape


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_operator_in_every_type(dtype, tolerance):
    tensors = [t.detach().to(dtype) for t in arguments(70)]
    y, expected = quasiseparable(*tensors), dense(*(t.double() for t in tensors))
    assert y.dtype == torch.float32
    assert (y - expected).norm() < tolerance * expected.norm()


def test_strong_decay_stays_finite():
    x, dt, A, B, C, diagonal = arguments(150, dtype=torch.float32)
    y = quasiseparable(x, dt * 50, A * 1e3, B, C, diagonal)
    grads = torch.autograd.grad(y.sum(), (x, dt, A, B))
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_wrong_shapes_are_refused():
    x, dt, A, B, C, diagonal = arguments(6)
    with pytest.raises(ValueError, match=r"dt must be \(2, 2, 2, 6, 3\) for x .*, got \(2, 2, 2, 5, 3\)"):
        quasiseparable(x, dt[:, :, :, 1:], A, B, C, diagonal)
    with pytest.raises(ValueError, match=r"initial must be \(2, 3, 4, 5\)"):
        quasiseparable(x, dt, A, B, C, diagonal, initial=x[0])


def small(dim=16, **options):
    torch.manual_seed(0)
    return Hydra(dim, **{"state": 4, "head_dim": 8, "conv": 3, **options})


@pytest.mark.parametrize("scan", list_scans())
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (1, 6)])
def test_any_scan_trains_on_any_grid(scan, grid):
    module = small(scan=scan, groups=2, initial_states=True)
    x = torch.randn(2, *grid, 16, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])


@torch.no_grad()
def test_a_map_is_read_along_its_scan():
    x = torch.randn(2, 3, 4, 16)
    rows, backwards = small(), small(scan=lambda h, w: torch.arange(h * w).flip(0)[None])
    torch.testing.assert_close(rows(x), rows(x.flatten(1, 2)).view_as(x))
    torch.testing.assert_close(backwards(x).flip(1, 2), rows(x.flip(1, 2)))
    assert not torch.allclose(backwards(x), rows(x))
    columns, both = small(scan=by_columns), small(scan=lambda h, w: torch.cat([by_rows(h, w), by_columns(h, w)]))
    torch.testing.assert_close(before_norm(both, x), before_norm(rows, x) + before_norm(columns, x))


def by_rows(h, w):
    return torch.arange(h * w)[None]


def by_columns(h, w):
    return torch.arange(h * w).view(h, w).T.reshape(1, -1)


def before_norm(module, x):
    inputs = []
    with module.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        module(x)
    return inputs[0]


def test_every_token_sees_every_token():
    module, x = small(conv=1).double(), torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        (grad,) = torch.autograd.grad(module(x)[0, t].sum(), x)
        assert (grad.abs().amax(-1) > 0).all()


@torch.no_grad()
def test_autocast():
    module, x = small(), torch.randn(2, 3, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - module(x)).norm() < 2e-2 * module(x).norm()


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
def test_in_another_backbone(name):
    model = vmamba.create_model(name, depths=(1, 1), dim=16, mixer=Hydra, scan="cross", num_classes=3)
    y = model(torch.randn(2, 3, 33, 40))
    y.square().sum().backward()
    assert y.shape == (2, 3) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 12}, "32 inner channels .* do not divide into heads of 12"),
        ({"groups": 3}, "4 heads do not divide into 3 groups"),
        ({"conv": 4}, "odd size, got 4"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def small_vit(**options) -> Any:
    torch.manual_seed(0)
    return vmamba.create_model("hydra_vit_tiny_patch16_224", depth=2, dim=16, **options).eval()


@torch.no_grad()
def test_vit_is_a_residual_network():
    model, image = small_vit(), torch.randn(2, 3, 48, 64)
    x, grid = model.stem(image)
    for block in model.blocks:
        x = x + block.mixer(block.norm(x))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.forward_features(image), model.norm(x))
    assert grid == (3, 4) and model.head.fc.in_features == 16
    torch.testing.assert_close(model(image), model.head.fc(model.norm(x).mean(1)))


@torch.no_grad()
def test_vit_blocks_take_turns_in_the_routes_of_a_scan():
    model, image = small_vit(scan="cross"), torch.randn(2, 3, 48, 64)
    x, grid = model.stem(image)
    rows, columns = model.blocks
    x = x + rows.mixer(rows.norm(x))
    x = x + rows.mlp(rows.norm2(x))
    turned = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    turned = turned + columns.mixer(columns.norm(turned))
    turned = turned + columns.mlp(columns.norm2(turned))
    expected = turned.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(model.forward_features(image), model.norm(expected))


@pytest.mark.parametrize(
    "name, count",
    [
        ("hydra_vit_tiny_patch16_224", 6_416_896),
        ("hydra_vit_small_patch16_224", 23_535_640),
        ("hydra_vit_base_patch16_224", 89_955_400),
    ],
)
def test_vit_parameters(name, count):
    model: Any = vmamba.create_model(name, device="meta")
    dim = model.num_features
    inner, heads, state = 2 * dim, 2 * dim // 64, 64
    convolved = inner + 4 * state
    mixer = dim * (inner + convolved + 2 * heads) + 8 * convolved + heads * (3 + inner) + inner + inner * dim
    mlp, norms = 2 * dim * 3 * dim + 4 * dim, 4 * dim
    outside = dim * (3 * 16 * 16 + 1) + 14 * 14 * dim + 2 * dim + (dim + 1) * 1000
    assert count == 12 * (mixer + mlp + norms) + outside == sum(p.numel() for p in model.parameters())
