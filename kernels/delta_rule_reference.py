"""The meaning of the gated delta rule, in PyTorch, in any precision: what the chunked form is tested against.

DeltaNet (arXiv:2406.06484), equation 4, with the gate of Gated DeltaNet (arXiv:2412.06464), equation 10::

    S[t] = exp(g[t]) S[t-1]                                        S[-1] = initial state, or 0
    S[t] += k[t] (beta[t] (v[t] - S[t]^T k[t]))^T                  overwrite what the state recalls for the key
    y[t] = scale S[t]^T q[t]
"""

import torch


def reference(q, k, v, beta, g=None, *, scale=None, initial_state=None):
    """The arguments of :func:`vmamba.kernels.delta_rule.delta_rule` -> y (..., l, p), state after the last step."""
    wide = torch.promote_types(v.dtype, torch.float32)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, beta = (t.to(wide) for t in (q, k, v, beta))
    shape = *k.shape[:-2], k.shape[-1], v.shape[-1]
    state = v.new_zeros(shape) if initial_state is None else initial_state.to(wide)  # (..., n, p)
    ys = []
    for t in range(k.shape[-2]):
        key, value = k[..., t, :, None], v[..., t, None, :]  # (..., n, 1), (..., 1, p)
        state = state if g is None else state * g.to(wide)[..., t, None, None].exp()
        recalled = (state * key).sum(-2, keepdim=True)
        state = state + key * (beta[..., t, None, None] * (value - recalled))
        ys.append((state * q[..., t, :, None]).sum(-2) * scale)
    return torch.stack(ys, -2), state
