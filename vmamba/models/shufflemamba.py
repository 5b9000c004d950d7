"""ShuffleMamba (arXiv:2408.17081, ICML 2025): Vim trained with the stochastic layer-wise shuffle.

Original code: huangzizheng01/ShuffleMamba, no licence stated; its weights were announced, none are linked.

Two kinds of classifier: Vim with the class token first, and Mamba-Reg (arXiv:2405.14858, code and weights:
wangf3014/Mamba-Reg), whose register tokens stand evenly among the patches; its checkpoints load here. The original
registers both under the names ``mambar_*``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vmamba.columnar import RMSNorm, TokenHead, TokenPool
from vmamba.models.vim import KEYS as VIM_KEYS
from vmamba.models.vim import Vim
from vmamba.norm import LayerNorm
from vmamba.registry import register
from vmamba.shuffle import shuffle_layers
from vmamba.tokens import ClassTokens, TokenEmbed, first, spread


class ShuffledVim(Vim):
    """A Vim whose blocks are shuffled in training.

    Args:
        shuffle_rate: probability with which the last block reads the tokens in a random order; it rises linearly from 0
            (:func:`vmamba.shuffle.shuffle_layers`).
        **vim: settings of :class:`Vim`.
    """

    def __init__(self, *, shuffle_rate: float = 0.0, **vim):
        super().__init__(**vim)
        shuffle_layers(self, shuffle_rate)


class ShuffleMamba(ShuffledVim):
    """The classifier with one class token before all patches; initialised as in the original.

    Args:
        **shuffled: settings of :class:`ShuffledVim`.
    """

    def initialise(self) -> None:
        """As Vim, but truncated normal (0.02) for projections into the scans; class token and bias of delta zero."""
        super().initialise()
        for name, parameter in self.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj", "dt_proj")):
                nn.init.trunc_normal_(parameter, std=0.02)
            if name.endswith(("cls_token", "dt_bias")):
                nn.init.zeros_(parameter)


class RegisterPool(TokenPool):
    """As :class:`TokenPool`, but ``token`` is all n class tokens side by side: (b, l, c) -> (b, n * c / reduce).

    Args:
        pool_type: see :class:`TokenPool`.
        channels: c.
        class_tokens: the class tokens among the tokens.
        reduce: where it is not 1, a linear layer makes c / reduce channels of each token, and a norm follows.
        norm: builds that norm, ``norm(channels, device=..., dtype=...)``.

    Raises:
        ValueError: ``reduce`` does not divide n or c.
    """

    def __init__(
        self,
        pool_type: str,
        channels: int,
        *,
        class_tokens: ClassTokens,
        reduce: int = 1,
        norm: Callable[..., nn.Module] = RMSNorm,
        device=None,
        dtype=None,
    ):
        super().__init__(pool_type, channels, class_tokens=class_tokens)
        n, dd = class_tokens.count, {"device": device, "dtype": dtype}
        if n % reduce or channels % reduce:
            raise ValueError(f"reduce={reduce} must divide the number of class tokens, {n}, and channels, {channels}")
        self.width = n // reduce if pool_type == "token" else super().feat_mult()
        self.neck = self.norm_neck = nn.Identity()
        if pool_type == "token" and reduce > 1:
            self.neck = nn.Linear(channels, channels // reduce, bias=False, **dd)
            self.norm_neck = norm(n * channels // reduce, **dd)

    def feat_mult(self) -> int:
        """Channels of the result over c."""
        return self.width

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, c) -> (b, width * c)"""
        if self.pool_type != "token":
            return super().forward(x)
        return self.norm_neck(self.neck(self.class_tokens.split(x)[1]).flatten(1))


class RegisterMamba(ShuffledVim):
    """Mamba-Reg: all patches, n register tokens evenly among them, and the registers as what is classified.

    Args:
        registers: their number n.
        reduce: by how much a neck makes the registers narrower before the classifier; see :class:`RegisterPool`.
        **shuffled: settings of :class:`ShuffledVim`.
    """

    def __init__(self, *, registers: int = 12, reduce: int = 1, **shuffled):
        pool = partial(RegisterPool, reduce=reduce, norm=shuffled.get("norm", RMSNorm))
        embed = partial(TokenEmbed, class_tokens=ClassTokens(registers, spread))
        parts = {"embed": embed, "head": partial(TokenHead, pool=pool), "global_pool": "token"}
        super().__init__(**{**parts, **shuffled})


CLASS_TOKEN: dict[str, Any] = dict(embed=partial(TokenEmbed, class_tokens=ClassTokens(1, first)), global_pool="token")
DEFAULT = dict(drop_path_rate=0.0, shuffle_rate=0.1, **CLASS_TOKEN)
BASE = dict(drop_path_rate=0.5, shuffle_rate=0.5, **CLASS_TOKEN)
REG = dict(drop_path_rate=0.4, shuffle_rate=0.1)

VARIANTS: dict[str, dict[str, Any]] = {
    "shufflemamba_tiny_patch16_224": dict(depth=24, dim=192, **DEFAULT),
    "shufflemamba_small_patch16_224": dict(depth=24, dim=384, **DEFAULT),
    "shufflemamba_middle_patch16_224": dict(depth=32, dim=576, norm=LayerNorm, **DEFAULT),
    "shufflemamba_base_patch16_224": dict(depth=24, dim=768, **BASE),
    "shufflemamba_large_patch16_224_40": dict(depth=40, dim=1024, **DEFAULT),
    "shufflemamba_large_patch16_224": dict(depth=48, dim=1024, **DEFAULT),
}
REGISTERS: dict[str, dict[str, Any]] = {
    "shufflemamba_reg_tiny_patch16_224": dict(depth=24, dim=192, registers=12, reduce=1, **REG),
    "shufflemamba_reg_small_patch16_224": dict(depth=24, dim=384, registers=12, reduce=2, **REG),
    "shufflemamba_reg_base_patch16_224": dict(depth=24, dim=768, registers=12, reduce=4, **REG),
    "shufflemamba_reg_large_patch16_224": dict(depth=48, dim=1024, registers=16, reduce=8, **REG),
}

KEYS = [
    (r"^pos_embed_cls$", "stem.cls_pos"),
    (r"^(?=neck\.weight$|norm_neck\.)", "head.global_pool."),
    *VIM_KEYS,
]

ABOUT: dict[str, Any] = dict(
    keys=KEYS,
    paper="2408.17081",
    origin="https://github.com/huangzizheng01/ShuffleMamba",
    license="none stated",
    timm=dict(first_conv="stem.proj", classifier="head.fc", pool_size=None),
)
register(ShuffleMamba, VARIANTS, **ABOUT)
register(RegisterMamba, REGISTERS, **ABOUT)
