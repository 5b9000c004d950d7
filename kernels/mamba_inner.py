"""Mamba up to its projection out, in training: project, convolve, scan and gate (arXiv:2312.00752).

    [x | z] = in_proj h;  u = silu(conv(x));  [dt | B | C] = x_proj u;  delta = softplus(dt_proj dt + bias)
    y = silu(z) scan(u, delta, A, B, C, D)

Step by step each of these is kept for the backward: on long sequences that is what a memory is full of. Here h and the
states of the scan before each chunk are kept; projections and convolution are computed again, which takes a fraction of
the time of the scan (as in the code of Mamba, from x and z on). The gate is part of the scan.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vmamba.kernels.backends import choose
from vmamba.kernels.route_weights import Projections, route_weights

SCAN = "selective_scan"


class Mamba(NamedTuple):
    """in_proj (2d, c), filters ``weight`` (d, w) and ``shift`` (d,) of the convolution, and a scan's parameters.

    Those are x_proj (r + 2n, d), dt_proj (d, r), A_log (d, n), D (d,), and what is added to delta, bias (d,).
    """

    in_proj: Tensor
    weight: Tensor
    shift: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    A_log: Tensor
    D: Tensor
    bias: Tensor


def mamba_inner(h: Tensor, parameters: Mamba) -> Tensor:
    """h (b, l, c) -> (b, l, d), all of one type: float32 or float64; can be differentiated once."""
    return _Inner.apply(h, *parameters)


class _Steps(NamedTuple):
    """What comes before the scan: x, z, u, delta (b, l, d), projected (b, l, rank | maps), weights, A (1, d, n)."""

    x: Tensor
    z: Tensor
    u: Tensor
    delta: Tensor
    projected: Tensor
    into: Tensor
    out: Tensor
    A: Tensor

    @classmethod
    def of(cls, h: Tensor, p: Mamba) -> "_Steps":
        """Products of all rows at once: those of each sample would have gradients that few blocks sum up."""
        x, z = F.linear(h, p.in_proj).chunk(2, -1)
        u = torch.ops.vmamba.causal_conv1d(x.mT, p.weight, p.shift, None, True, "").mT.contiguous()
        into, out, A = route_weights(Projections(p.x_proj[None], p.dt_proj[None], p.A_log[None]), 1, x.dtype)
        projected = u.flatten(0, 1) @ into[0].mT
        delta = projected[:, : out.shape[1]] @ out[0]
        return cls(x, z, u, delta.view(u.shape), projected.unflatten(0, u.shape[:2]), into[0], out[0], A)

    def scanned(self, p: Mamba) -> tuple[Tensor | None, ...]:
        """The operator's u, delta, A, B, C, D, z, bias, for one route."""
        n, rank = p.A_log.shape[1], len(self.out)
        B, C = self.projected[..., rank : rank + 2 * n].split(n, -1)
        u, delta, B, C, z = (t[:, None] for t in (self.u, self.delta, B, C, self.z))
        return u, delta, self.A, B, C, p.D[None], z, p.bias[None]


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, *parameters: Tensor) -> Tensor:
        p = Mamba(*parameters)
        tensors = _Steps.of(h, p).scanned(p)
        y, _, states = choose(SCAN, "", *tensors).forward(*tensors, True)
        ctx.save_for_backward(states, h, *parameters)
        return y[:, 0].to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        states, h, *parameters = ctx.saved_tensors
        p = Mamba(*parameters)
        steps = _Steps.of(h, p)
        tensors = steps.scanned(p)
        grads = choose(SCAN, "", *tensors).backward(dy[:, None], states, True, *tensors)
        du, ddelta, dA, dB, dC, dD, dz, dbias = grads
        (d, r), n, rank = p.dt_proj.shape, p.A_log.shape[1], len(steps.out)
        rows, projected, ddelta = steps.u.view(-1, d), steps.projected.flatten(0, 1), ddelta.reshape(-1, d)
        dprojected = torch.zeros_like(projected)
        torch.mm(ddelta, steps.out.mT, out=dprojected[:, :rank])
        for start, part in ((rank, dB), (rank + n, dC)):
            dprojected[:, start : start + n] = part.reshape(-1, n)
        dx_proj = dprojected.mT @ rows
        dx_proj = torch.cat([dx_proj[:r], dx_proj[rank : rank + 2 * n]])
        ddt_proj = ddelta.mT @ projected[:, :r]
        du = du.reshape(-1, d).addmm_(dprojected, steps.into).view(steps.u.shape)
        conv = steps.x.mT, p.weight, p.shift, None, True, ""
        dx, dweight, dshift = torch.ops.vmamba.causal_conv1d_backward(du.mT, *conv)
        dxz = torch.cat([dx.mT, dz[:, 0]], -1).view(-1, 2 * d)
        dh, din_proj = (dxz @ p.in_proj).view(h.shape), dxz.mT @ h.reshape(-1, h.shape[2])
        return dh, din_proj, dweight, dshift, dx_proj, ddt_proj, (dA * steps.A)[0], dD[0], dbias[0]
