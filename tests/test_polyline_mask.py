"""The polyline path mask: the linear-time form against path sums and against the original, and what it costs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import goldens
from vmamba.kernels.polyline_mask import log_masks, masked_linear_attention, polyline_mask, segment_sums
from vmamba.kernels.polyline_mask_reference import log_mask, reference

CASES = [case for case in goldens.load("op_polyline_mask")["cases"] if case["what"].startswith("mask")]
GRIDS = [(1, 1), (1, 5), (5, 1), (3, 7), (2, 34), (33, 2)]


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [] if func.is_view else [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *made, 0)
        return out


def inputs(h, w, d=3, decay=2.0, dtype=torch.float64, **options):
    torch.manual_seed(h * w)
    v = torch.randn(2, h, w, d, dtype=dtype, **options)
    return v, *(-decay * torch.rand(2, h, w, dtype=dtype, **options) for _ in range(2))


def with_gradients(form, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = form(*leaves, **options)
    return y, *torch.autograd.grad(y, leaves, y.detach().cos(), materialize_grads=True)


def dense(masks):
    """(..., h, w, h, w) -> (..., h * w, h * w)"""
    return masks.flatten(-4, -3).flatten(-2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["what"])
def test_golden(case):
    raw_a, raw_b, v = goldens.case_inputs(case)
    a, b = -F.softplus(raw_a), -F.softplus(raw_b)
    rows, columns = segment_sums(a), segment_sums(b.mT)
    mask, transposed = map(dense, log_masks(rows, columns))
    assert torch.equal(mask.mT, transposed)
    found = {
        "row_log_mask": rows,
        "col_log_mask": columns,
        "log_mask": mask,
        "mask": mask.exp(),
        "mask_product": polyline_mask(v, a, b),
        "transposed_mask_product": polyline_mask(v, a, b, transposed=True),
    }
    assert found.keys() == case["outputs"].keys()
    for name, summary in case["outputs"].items():
        assert goldens.compare(found[name], summary) < 1e-13, name
    assert goldens.compare(log_mask(a, b), case["outputs"]["log_mask"]) < 1e-13
    assert goldens.compare(reference(v, a, b), case["outputs"]["mask_product"]) < 1e-13


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_the_reference(grid, transposed):
    tensors = inputs(*grid)
    expected = with_gradients(reference, tensors, transposed=transposed)
    for got, want in zip(with_gradients(polyline_mask, tensors, transposed=transposed), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_two_paths_are_each_others_transpose():
    v, a, b = inputs(70, 9)
    u = torch.randn_like(v)
    torch.testing.assert_close((u * polyline_mask(v, a, b)).sum(), (polyline_mask(u, a, b, transposed=True) * v).sum())
    turned = polyline_mask(v.transpose(1, 2), b.mT, a.mT, transposed=True).transpose(1, 2)
    torch.testing.assert_close(polyline_mask(v, a, b), turned)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), slice(2, 9)])
def test_masks_of_some_rows_of_queries(rows):
    _, a, b = inputs(4, 3)
    sums = segment_sums(a), segment_sums(b.mT)
    for part, whole in zip(log_masks(*sums, rows), log_masks(*sums), strict=True):
        assert torch.equal(part, whole[:, rows])


@pytest.mark.parametrize("transposed", [False, True])
def test_masked_linear_attention(transposed):
    v, a, b = inputs(5, 4)
    q, k = torch.randn(2, 2, 5, 4, 6, dtype=v.dtype)
    mask = log_mask(a, b).exp()
    weights = (q.flatten(1, 2) @ k.flatten(1, 2).mT) * (mask.mT if transposed else mask)
    expected = (weights @ v.flatten(1, 2)).unflatten(1, (5, 4))
    torch.testing.assert_close(masked_linear_attention(q, k, v, a, b, transposed=transposed), expected)


@pytest.mark.parametrize("decay", [1e-4, 1.0, 1e4])
def test_long_rows_neither_overflow_nor_lose_digits(decay):
    tensors = inputs(1, 3000, decay=decay, dtype=torch.float32)
    tensors[1][:, :, 1000] = -3e4  # a cut; weak decays after it must stay exact
    single = with_gradients(polyline_mask, tensors)
    double = with_gradients(polyline_mask, [t.double() for t in tensors])
    for got, want in zip(single, double, strict=True):
        assert got.isfinite().all() and (got - want).norm() <= 1e-5 * want.norm()


def test_what_is_left_of_the_first_pixel():
    v, a, b = inputs(1, 300)
    v[:, :, 1:] = 0
    left = (a[:, 0].cumsum(-1) - a[:, 0, :1]).exp()[..., None] * v[:, 0, :1]
    torch.testing.assert_close(polyline_mask(v, a, b)[:, 0], left)


def test_sums_after_a_cut_are_exact():
    a = torch.full((2000,), -1e-3)
    a[1000] = -1e6
    sums = segment_sums(a)
    assert sums[1999, 1001].item() == sums[1001, 1999].item() == pytest.approx(-0.998, rel=1e-6)
    assert sums[999, 1000] == -1e6 and (sums.diagonal() == 0).all() and (sums <= 0).all()


@pytest.mark.parametrize("grid", [(256, 256), (1, 4096), (1024, 8)])
def test_memory_grows_linearly(grid):
    """On the meta device: no tensor, forward or backward, has more than a constant number of elements per pixel."""
    per_pixel, saved = [], []
    for factor in (1, 4):
        h, w = (side * factor if side > 8 else side for side in grid)
        total = 0

        def count(t):
            nonlocal total
            total += t.numel()
            return t

        leaves = [t.requires_grad_() for t in inputs(h, w, d=4, dtype=torch.float32, device="meta")]
        with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            polyline_mask(*leaves).sum().backward()
        per_pixel.append(sizes.largest / (h * w))
        saved.append(total / (h * w))
    assert per_pixel[1] == pytest.approx(per_pixel[0], rel=0.02) and per_pixel[1] <= 2 * 2 * 32
    assert saved[1] == pytest.approx(saved[0], rel=0.05)


def test_half_precision_is_computed_in_float32():
    tensors = [t.bfloat16() for t in inputs(9, 40)]
    exact = polyline_mask(*(t.double() for t in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        y = polyline_mask(*tensors)
    assert y.dtype == torch.float32 and (y - exact).norm() < 1e-6 * exact.norm()


def test_compiled_is_eager():
    tensors = inputs(5, 40)
    compiled = torch.compile(polyline_mask, fullgraph=True, backend="aot_eager")
    for got, want in zip(with_gradients(compiled, tensors), with_gradients(polyline_mask, tensors), strict=True):
        torch.testing.assert_close(got, want)
    torch.compiler.reset()


def test_wrong_shapes():
    v, a, b = inputs(3, 4)
    with pytest.raises(ValueError, match=r"a and b must be \(\.\.\., h, w\) .* \(2, 3, 4, 3\), got \(2, 4, 3\) and"):
        polyline_mask(v, a.mT, b)
    with pytest.raises(
        ValueError, match=r"q and k must be \(\.\.\., h, w, n\) .* got \(2, 3, 4, 3\) and \(2, 3, 4, 2\)"
    ):
        masked_linear_attention(v, v[..., :2], v, a, b)
