"""The MLP of a block: two linear layers with an activation between them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from vmamba.kernels.backends import plain
from vmamba.narrow import Layer, Narrowed, Parts, watched
from vmamba.precision import autocasts

ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # what compiled code calls


class Mlp(Narrowed, TimmMlp):
    """timm's, whose weights are cast together under autocast; on a CPU bias and GELU are part of the products."""

    def parts(self) -> Parts:
        """Both linear layers."""
        return (self.fc1, self.fc2), ()

    def run(self, x: Tensor, layers: Sequence[Layer], weights: Sequence[Tensor]) -> Tensor:
        """(..., c) -> (..., c)"""
        fc1, fc2 = layers
        if self.drop1.p == self.drop2.p == 0 and self.drops_alone():
            if ONEDNN is not None and _fuses(x, self.act, *layers):
                return _linear(_linear(x, self.fc1, "gelu", "none"), self.fc2, "none", "")
            return fc2(self.act(fc1(x)))
        return self.drop2(fc2(self.norm(self.drop1(self.act(fc1(x))))))

    @torch.compiler.assume_constant_result
    def drops_alone(self) -> bool:
        """Whether dropout is all that lies between and after the layers but the activation, and nothing watches it."""
        return type(self.norm) is nn.Identity and not watched(self.drop1, self.norm, self.drop2)


def _fuses(x: Tensor, act: nn.Module, *layers: Any) -> bool:
    """Whether oneDNN can add biases and compute GELU while it writes the products: float32 on a CPU, no gradients."""
    if not isinstance(x, Tensor) or not x.is_cpu or autocasts("cpu"):  # x is a symbol where FX traces
        return False
    if type(act) is not nn.GELU or act.approximate != "none" or watched(act):
        return False
    tensors = [x]
    for layer in layers:
        if type(layer) is not nn.Linear or watched(layer) or layer.bias is None:
            return False
        tensors += [layer.weight, layer.bias]
    return all([t.dtype is torch.float32 for t in tensors]) and plain(*tensors)


def _linear(x: Tensor, layer: nn.Module, act: str, algorithm: str) -> Tensor:
    """Without a copy of the bias for each row before the product, and a pass for the activation after it."""
    linear = cast(nn.Linear, layer)
    return ONEDNN(x, linear.weight, linear.bias, act, [], algorithm)
