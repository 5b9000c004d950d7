"""The pyramid of MobileMamba's detectors: its levels, and mmdet's pyramid where the two are the same."""

import pytest
import torch
from mmdet.models.necks import FPN

from vmamba.mm.transposed_fpn import TransposedFPN

CHANNELS = [6, 10, 14]


def maps(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize(("finer", "coarser"), [(2, 0), (1, 1), (0, 2)])
def test_levels(finer, coarser):
    """Each level doubles the one below, from any sizes, and everything learns."""
    neck = TransposedFPN(CHANNELS, 8, finer=finer, coarser=coarser)
    neck.init_weights()
    outputs = neck(maps((7, 9), (4, 5), (2, 3)))
    above = [(7 * 2**i, 9 * 2**i) for i in range(finer, 0, -1)]
    below = [(1, 2), (1, 1)][:coarser]
    assert [tuple(y.shape) for y in outputs] == [(2, 8, *size) for size in (*above, (7, 9), (4, 5), (2, 3), *below)]
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


def test_middle_is_a_usual_pyramid():
    """Without further levels, and below with RetinaNet's, it is mmdet's, with the same names of parameters."""
    inputs = maps((7, 9), (4, 5), (2, 3))
    for coarser in (0, 2):
        theirs = FPN(CHANNELS, 8, 3 + coarser, add_extra_convs="on_input")
        ours, state = TransposedFPN(CHANNELS, 8, finer=0, coarser=coarser), theirs.state_dict()
        for i in range(coarser):
            for leaf in ("weight", "bias"):
                state[f"down_convs.{i}.conv.{leaf}"] = state.pop(f"fpn_convs.{3 + i}.conv.{leaf}")
        ours.load_state_dict(state)
        for a, b in zip(ours(inputs), theirs(inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_finer_levels():
    """The first transposed convolution doubles the finest merged map, the second doubles what it gives."""
    neck, inputs = TransposedFPN(CHANNELS, 8), maps((4, 6), (2, 3), (1, 2))
    merged = neck.lateral_convs[2](inputs[2])
    for lateral, x in ((neck.lateral_convs[1], inputs[1]), (neck.lateral_convs[0], inputs[0])):
        merged = lateral(x) + torch.nn.functional.interpolate(merged, x.shape[2:])
    eighth = neck.extra_trans_convs[0](merged)
    quarter = neck.extra_trans_convs[1](eighth)
    outputs = neck(inputs)
    torch.testing.assert_close(outputs[0], neck.extra_fpn_convs[0](quarter))
    torch.testing.assert_close(outputs[1], neck.extra_fpn_convs[1](eighth))
    torch.testing.assert_close(outputs[2], neck.fpn_convs[0](merged))
