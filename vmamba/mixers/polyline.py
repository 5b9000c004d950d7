"""Attention whose logits decay along polyline paths (PPMA, arXiv:2506.15940), over the whole map or criss-cross.

The paper multiplies the mask with the attention weights; the published networks, and these, add its logarithm to the
logits. What decays how fast is a linear function of the pixel; the mask itself is in ``vmamba.kernels.polyline_mask``.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import apply_rot_embed
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vmamba.block import Conv2d
from vmamba.kernels.polyline_mask import log_masks, segment_sums
from vmamba.mixers.heads import init_step_bias

WHOLE = 1024**2  # products of queries and keys that `full` holds at a time, per head: all of a map of 32 x 32


def criss_cross(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Attention within rows and attention within columns, one after the other in both orders; their mean.

    Costs h w (h + w) in time and memory. Arguments and result as in :func:`full`.
    """
    rows = (q @ k.mT + segment_sums(a)).softmax(-1).to(v.dtype)  # (b, g, h, w, w)
    q, k = q.transpose(2, 3), k.transpose(2, 3)
    columns = (q @ k.mT + segment_sums(b.mT)).softmax(-1).to(v.dtype)  # (b, g, w, h, h)
    rows_first = columns @ (rows @ v).transpose(2, 3)
    columns_first = rows @ (columns @ v.transpose(2, 3)).transpose(2, 3)
    return (columns_first + rows_first.transpose(2, 3)) / 2


def full(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Attention over the whole map, once with each of the two paths between pixels; their mean.

    Costs (h w)^2 in time. Memory is that of :data:`WHOLE` products per head, or of one row of queries where they are
    more: larger maps are worked on some rows of queries at a time, whose products are made again for the gradient.

    Args:
        q, k, v: (b, g, h, w, d) for g heads; q or k scaled.
        a, b: (b, g, h, w), log decays along rows and along columns.

    Returns:
        (b, g, h, w, d)
    """
    rows, columns = segment_sums(a), segment_sums(b.mT)
    h, w = a.shape[-2:]
    step = max(1, WHOLE // (h * w * w))
    if step >= h:
        return _attend(q, k, v, rows, columns, slice(None))
    parts = []
    for start in range(0, h, step):
        of = slice(start, start + step)
        parts.append(checkpoint(_attend, q, k, v, rows, columns, of, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(cast(list[Tensor], parts), 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, of: slice) -> Tensor:
    """The queries in the rows ``of`` the map over all keys, (b, g, q, w, d)."""
    logits = q[:, :, of].flatten(2, 3) @ k.flatten(2, 3).mT  # (b, g, q * w, h * w)
    masks = (mask.flatten(4, 5).flatten(2, 3) for mask in log_masks(rows, columns, of))
    one, other = ((logits + mask).softmax(-1) for mask in masks)
    y = ((one + other) / 2).to(v.dtype) @ v.flatten(2, 3)
    return y.unflatten(2, (-1, v.shape[3]))


@register_notrace_module
class PolylineAttention(nn.Module):
    """(b, h, w, c) -> (b, h, w, c): masked attention with rotary positions, and a depthwise 5x5 convolution of values.

    Positions are those of the flattened map, row by row, for both axes: phases depend on the width of the map.

    Args:
        dim: channels c.
        head_dim: channels d of a head, even.
        attend: :func:`full` or :func:`criss_cross`.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim is not a multiple of head_dim, or head_dim is odd.
    """

    def __init__(self, dim: int, *, head_dim: int = 32, attend: Callable[..., Tensor] = full, device=None, dtype=None):
        super().__init__()
        if dim % head_dim or head_dim % 2:
            raise ValueError(f"dim must be a multiple of an even head_dim, got dim {dim} and head_dim {head_dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.attend = head_dim, attend
        self.q_proj = nn.Linear(dim, dim, **dd)
        self.k_proj = nn.Linear(dim, dim, **dd)
        self.v_proj = nn.Linear(dim, dim, **dd)
        self.local = Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.dt_proj = nn.Linear(head_dim, 2, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(dim // head_dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim // head_dim, **dd))
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in [1, 1.1], delta log-uniform in [1e-3, 0.1]."""
        init_step_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 1.1).log_()

    def log_decays(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, h, w, c) -> log decays along rows and along columns, (b, g, h, w) each, float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = self.dt_proj(x.unflatten(-1, (-1, self.head_dim))).to(wide)  # (b, h, w, g, 2)
        delta = F.softplus(raw + self.dt_bias.to(wide)[:, None])
        a, b = (-torch.exp(self.A_log.to(wide))[:, None] * delta).movedim(3, 1).unbind(-1)
        return a, b

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) -> (b, h, w, c)"""
        h, w = x.shape[1:3]
        values = self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).movedim(3, 1) for t in (self.q_proj(x), self.k_proj(x), values))
        sin, cos = (t.unflatten(0, (h, w)) for t in rotary(h * w, self.head_dim, q))
        q, k = apply_rot_embed(q, sin, cos), apply_rot_embed(k * self.head_dim**-0.5, sin, cos)
        y = self.attend(q, k, v, *self.log_decays(x))  # (b, g, h, w, d)
        return self.out_proj(y.movedim(1, 3).flatten(3) + self.local(values))


def rotary(steps: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines (steps, width) of t / 10000^(m / (width / 2 - 1)), twice for each m, on the device of ``like``.

    Frequencies are of float32, as in the published networks, also where ``like`` is wider.
    """
    exponents = torch.linspace(0, 1, width // 2, device=like.device, dtype=torch.float32)
    wide = torch.promote_types(like.dtype, torch.float32)
    frequencies = (1 / 10000**exponents).to(wide).repeat_interleave(2)
    angles = torch.arange(steps, device=like.device, dtype=wide)[:, None] * frequencies
    return angles.sin(), angles.cos()
