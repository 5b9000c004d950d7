"""MambaMIM: token interpolation, the published pre-training step, masking, and the way of its encoder into HyMamba."""

import math

import pytest
import torch

import vmamba
from tests import goldens
from vmamba.heads.hymamba import HyMamba
from vmamba.heads.mambamim import MambaMIM, interpolate_tokens, random_cells

SMALL = dict(in_chans=1, dims=(4, 8, 12), depths=(1, 1), ratios=(2, 2), depth=2, patch=8)


def small(**settings):
    return MambaMIM(HyMamba(**{**SMALL, **settings}), width=16)


ORDERS = [  # in which the original saw each case's cells: that of an unstable sort, in a batch with hidden ones
    [[1, 25, 22, 20, 13, 6, 5]],
    [[26, 3, 4, 19, 11, 0, 14]],
    [
        [16, 2, 6, 7, 20, 9, 11, 22, 17, 18, 19, 21, 13, 23],
        [1, 26, 21, 20, 19, 14, 2, 16, 0, 25, 24, 23, 22, 3],
    ],
]


def visible_cells(case, cells):
    visible = torch.zeros(len(case["active"]), cells, dtype=torch.bool)
    for row, active in zip(visible, case["active"], strict=True):
        row[active] = True
    return visible


@pytest.mark.parametrize("case", goldens.load("op_toki")["cases"], ids=lambda case: case["what"])
def test_interpolated_tokens(case):
    A, x = goldens.case_inputs(case)
    A = A[0] * 0.8 / math.sqrt(A.shape[-1])
    visible = visible_cells(case, x[0, 0].numel())
    tokens = interpolate_tokens(x.flatten(2).mT, visible, A)
    assert goldens.compare(tokens, case["outputs"]["tokens"]) < 1e-12
    model = small(dims=(4, 8, 6 * math.ceil(x.shape[1] / 6))).double()
    model.A = torch.nn.Parameter(A)
    assert goldens.compare(model.interpolate(x, visible), case["outputs"]["densified"]) < 1e-12
    model.scrambled = True
    y = torch.where(visible.unflatten(1, x.shape[2:])[:, None], x, model.interpolate(x, visible))
    assert goldens.compare(tokens.reshape(x.shape), case["outputs"]["official"]) < 1e-12
    assert torch.equal(model.interpolate(x, visible), y) and not torch.equal(tokens.mT.reshape(x.shape), y)


def test_interpolation_by_its_formula():
    torch.manual_seed(0)
    x, A = torch.randn(1, 9, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    visible = torch.zeros(1, 9, dtype=torch.bool)
    visible[0, [2, 3, 7]] = True
    got = interpolate_tokens(x, visible, A)[0]
    for a, b in [(0, 2), (2, 3), (3, 7), (7, 8)]:
        n = b - a
        v = [x[0, a] + m / max(n - 1, 1) * (x[0, b] - x[0, a]) for m in range(n)]
        for j in range(n):
            z = sum(torch.linalg.matrix_power(A, n - 1 - m) @ v[m] for m in range(j + 1))
            assert torch.allclose(got[a + j], z)
    assert torch.allclose(got[8], A @ x[0, 8])
    assert torch.autograd.gradcheck(
        lambda x, A: interpolate_tokens(x, visible, A), (x.requires_grad_(), A.requires_grad_())
    )


@torch.no_grad()
def test_golden():
    golden = goldens.load("mambamim")
    network = HyMamba(in_chans=1, patch=golden["config"]["input_size"])
    model = MambaMIM(network, scrambled=True).double().eval()
    report = vmamba.load_checkpoint(model, {"module": goldens.fill_state(golden)})
    assert report.layout == "official" and report.ok
    kept = [key for key in report.ignored if key not in golden["skip"] and ".running_" not in key]
    unused = [math.prod(golden["state"][key]) for key in kept]
    assert sum(p.numel() for p in model.parameters()) + sum(unused) == golden["params"]
    for case, order in zip(golden["cases"], map(torch.tensor, ORDERS), strict=True):
        (x,), wanted = goldens.case_inputs(case), case["outputs"]
        visible = visible_cells(case, 27)
        *skips, y = model.encode(x, visible, order)
        found = {**{f"enc{i + 1}": skip for i, skip in enumerate(skips)}, "enc5": y}
        found["toki_tokens"] = interpolate_tokens(y.flatten(2).mT, visible, model.A)
        found["densified0"] = model.project[0](model.interpolate(y, visible))
        if len(x) == 1:  # the batch's decoder would take as long as all the rest
            model.rebuild.register_forward_hook(lambda module, inputs, y, found=found: found.update(decoded=y))
            assert model.loss(x, visible, order).item() == pytest.approx(case["loss"], rel=1e-9)
        for key, tensor in found.items():
            assert goldens.compare(tensor, wanted[key]) < 1e-5, key


def test_hidden_voxels_change_nothing_but_the_loss():
    torch.manual_seed(0)
    model = small().eval()
    visible = random_cells(2, 8, 0.75)
    assert visible.sum(1).tolist() == [2, 2]
    x = torch.randn(2, 1, 8, 8, 8)
    here = torch.nn.functional.interpolate(visible.view(2, 1, 2, 2, 2).float(), scale_factor=4).bool()
    other = torch.where(here, x, torch.randn_like(x))
    assert torch.equal(model(x, visible), model(other, visible)) and model.loss(x, visible) != model.loss(
        other, visible
    )
    seen = torch.where(here, torch.randn_like(x), x)
    assert not torch.allclose(model(x, visible), model(seen, visible))


def test_trains_and_its_encoder_goes_into_hymamba():
    torch.manual_seed(0)
    model = small()
    x, visible = torch.randn(2, 1, 8, 8, 8), random_cells(2, 8, 0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model.loss(x, visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model.A.abs().max() > 0
    alone = model.encode(x[1:], visible[1:])[-1]
    assert torch.allclose(model.encode(x, visible)[-1][1:], alone, atol=1e-5)  # samples do not see each other
    with pytest.raises(ValueError, match=r"visible must be booleans \(2, 8\), one for each cell of 4 x 4 x 4"):
        model(x, visible[:1])
