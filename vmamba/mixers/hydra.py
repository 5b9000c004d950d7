"""Hydra: the quasiseparable matrix mixer (arXiv:2407.09941, NeurIPS 2024). Original code: goombalab/hydra, MIT.

A bidirectional state-space model as one matrix: Mamba-2's scan forward below the diagonal, backward above it, and a
diagonal of its own.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.kernels.quasiseparable import quasiseparable
from vmamba.mixers.heads import init_step_bias
from vmamba.mixers.matrix_mixer import Matrix, MatrixMixer, check_length


class Quasiseparable(Matrix):
    """The matrix of ``vmamba.kernels.quasiseparable``, with B, C, dt and the diagonal made from each token.

    Args:
        dim: channels d. heads: heads h.
        state: states n. groups: groups g of heads that share B and C.
        shared: one pair B and C for both directions instead of one for each.
        dt_limit: least and greatest step size.
        initial_states: learn the state before the first step, the same for both directions.

    Raises:
        ValueError: the heads do not divide into the groups.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        state: int = 64,
        groups: int = 1,
        shared: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, heads)
        if heads % groups:
            raise ValueError(f"{heads} heads do not divide into {groups} groups")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout = 1 if shared else 2, 2, groups, state  # directions, (B, C), groups, states
        self.convolved, self.direct = math.prod(self.layout), 2 * heads
        self.dt_limit = dt_limit
        self.init_states = nn.Parameter(torch.empty(heads, dim // heads, state, **dd)) if initial_states else None
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.A_log = nn.Parameter(torch.empty(heads, **dd))
        self.D = nn.Parameter(torch.empty(heads, **dd))
        self.fc_D = nn.Linear(dim, heads, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1, D = 1, dt log-uniform in [1e-3, 0.1], initial states 0."""
        init_step_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.zero_()
            self.D.fill_(1)
            if self.init_states is not None:
                self.init_states.zero_()

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d), (b, l, convolved), (b, l, 2h) -> (b, l, d) in float32 (float64 for float64)."""
        return self.mix(x, F.silu(features), steps)

    def mix(self, x: Tensor, BC: Tensor, steps: Tensor) -> Tensor:
        """As :meth:`forward`, with B and C as they are: (b, l, directions * 2 * groups * state)."""
        groups = self.layout[2]
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        B, C = BC.unflatten(-1, self.layout).permute(3, 0, 2, 4, 1, 5).expand(-1, -1, 2, -1, -1, -1)  # (b, 2, g, l, n)
        dt = F.softplus(steps.to(wide).unflatten(-1, (2, -1)) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        dt = dt.unflatten(-1, (groups, -1)).permute(0, 2, 3, 1, 4)  # (b, 2, g, l, m)
        A = -torch.exp(self.A_log.to(wide)).unflatten(0, (groups, -1))
        diagonal = (self.fc_D(x) + self.D).unflatten(-1, (groups, -1)).transpose(1, 2)  # (b, g, l, m)
        tokens = x.unflatten(-1, (groups, self.heads // groups, -1)).transpose(1, 2)  # (b, g, l, m, p)
        initial = None if self.init_states is None else self.init_states.unflatten(0, (groups, -1))
        y = quasiseparable(tokens, dt, A, B, C, diagonal, initial=initial)
        return y.transpose(1, 2).flatten(2)


class FixedQuasiseparable(Quasiseparable):
    """The same with learned B and C of each position, shared by both directions, and constant step sizes.

    Args:
        dim: channels d. heads: heads h.
        length: tokens T at most; of a shorter sequence the first positions are used.
        state: states n.
    """

    def __init__(self, dim: int, heads: int, *, length: int, state: int = 64, device=None, dtype=None):
        super().__init__(dim, heads, state=state, shared=True, device=device, dtype=dtype)
        self.convolved = self.direct = 0
        self.BC = nn.Embedding(length, 2 * state, device=device, dtype=dtype)

    def forward(self, x: Tensor, features: Tensor, steps: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d) in float32 (float64 for float64)."""
        batch, length = x.shape[:2]
        check_length(length, self.BC.num_embeddings)
        BC = self.BC.weight[:length].expand(batch, -1, -1)
        return self.mix(x, BC, x.new_zeros(batch, length, 2 * self.heads))


@register_notrace_module
class Hydra(MatrixMixer):
    """The Hydra block, a token mixer on sequences (b, l, c) and on maps (b, h, w, c).

    Args:
        dim: channels c.
        state: states n of each direction. groups: groups of heads that share B and C.
        dt_limit: least and greatest step size.
        initial_states: learn the state before the first step.
        head_dim: channels of a head; one head has all of them where there are fewer.
        **mixer: ``expand``, ``conv``, ``bias``, ``scan``, ``device``, ``dtype`` of :class:`MatrixMixer`.
    """

    official_keys = (
        (r"(^|\.)(init_states|dt_bias|A_log|D|fc_D\.weight)$", r"\1matrix.\2"),
        (r"(^|\.)conv1d\.", r"\1conv."),
    )

    def __init__(
        self,
        dim: int,
        *,
        state: int = 64,
        groups: int = 1,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: bool = False,
        head_dim: int = 64,
        **mixer,
    ):
        matrix = partial(Quasiseparable, state=state, groups=groups, dt_limit=dt_limit, initial_states=initial_states)
        super().__init__(dim, matrix=matrix, head_dim=head_dim, **mixer)
