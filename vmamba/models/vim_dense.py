"""Vision Mamba for dense prediction (arXiv:2401.09417, section 4): the backbones of UPerNet and Cascade Mask R-CNN.

Original code and weights: hustvl/Vim, Apache-2.0. No class token; the published recipes differ in what they take of the
blocks and in rotary positions. Checkpoints of the original segmentors and detectors load whole (their heads apart).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vmamba.column_pyramid import ColumnPyramid, SimpleFeaturePyramid, hidden, stream
from vmamba.models.vim import KEYS, RotaryBlock, Vim
from vmamba.registry import register
from vmamba.tokens import ClassTokens, TokenEmbed, middle


class VimDense(ColumnPyramid):
    """(b, in_chans, h, w) -> maps (b, c_i, h / s_i, w / s_i) for a decoder or detector.

    Args:
        out_indices, tap, neck: what is made of the blocks' results; see :class:`ColumnPyramid`.
        **vim: settings of :class:`Vim`.
    """

    def __init__(
        self,
        *,
        out_indices: Sequence[int] | None = None,
        tap: Callable = stream,
        neck: Callable | None = None,
        **vim,
    ):
        super().__init__(Vim(**{"num_classes": 0, **vim}), out_indices=out_indices, tap=tap, neck=neck)


PATCHES: dict[str, Any] = dict(depth=24, embed=partial(TokenEmbed, class_tokens=ClassTokens(0, middle)))
DETECTION: dict[str, Any] = dict(out_indices=(23,), neck=SimpleFeaturePyramid, block=RotaryBlock)

VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_seg": dict(dim=192, img_size=512, tap=hidden, **PATCHES),
    "vim_small_patch16_seg": dict(dim=384, img_size=512, block=RotaryBlock, **PATCHES),
    "vim_tiny_patch16_det": dict(dim=192, img_size=1024, drop_path_rate=0.1, **DETECTION, **PATCHES),
}

register(
    VimDense,
    VARIANTS,
    keys=KEYS,
    paper="2401.09417",
    origin="https://github.com/hustvl/Vim",
    license="apache-2.0",
)
