"""TransposedFPN: the pyramid of MobileMamba's detectors, whose backbone starts at stride 16 (arXiv:2411.15941)."""

from collections import OrderedDict
from collections.abc import Sequence

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

XAVIER = {"type": "Xavier", "layer": ["Conv2d", "ConvTranspose2d"], "distribution": "uniform"}


@MODELS.register_module()
class TransposedFPN(BaseModule):
    """n maps (b, c_i, h_i, w_i), finest first -> ``finer`` + n + ``coarser`` maps (b, out_channels, ...).

    A pyramid as usual (arXiv:1612.03144); above its finest level, transposed convolutions go on to double the map;
    below its coarsest, convolutions of stride 2 go on from the backbone's last map.

    Args:
        in_channels: c_i of the backbone's maps. out_channels: of every output.
        finer: levels above: 2 lead from stride 16 to 8 and 4.
        coarser: levels below, as in RetinaNet.
        init_cfg: how to initialise; Xavier's uniform distribution by default.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        finer: int = 2,
        coarser: int = 0,
        init_cfg: "dict | None" = None,
    ):
        super().__init__(XAVIER if init_cfg is None else init_cfg)
        self.in_channels, c = list(in_channels), out_channels
        self.lateral_convs = nn.ModuleList(_conv(channels, c, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(_conv(c, c, 3) for _ in in_channels)
        self.extra_trans_convs = nn.ModuleList(nn.ConvTranspose2d(c, c, 2, stride=2) for _ in range(finer))
        self.extra_fpn_convs = nn.ModuleList(_conv(c, c, 3) for _ in range(finer))
        self.down_convs = nn.ModuleList(_conv(c if i else in_channels[-1], c, 3, 2) for i in range(coarser))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[(b, c_i, h_i, w_i), ...] -> ((b, out_channels, ...), ...), finest first"""
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], merged[i - 1].shape[2:])
        finer, below = [merged[0]], [inputs[-1]]
        for double in self.extra_trans_convs:
            finer.insert(0, double(finer[0]))
        for halve in self.down_convs:
            below.append(halve(below[-1]))
        convs = [*self.extra_fpn_convs, *self.fpn_convs]
        return *(conv(x) for conv, x in zip(convs, finer[:-1] + merged, strict=True)), *below[1:]


def _conv(channels: int, out_channels: int, side: int, stride: int = 1) -> nn.Module:
    """A convolution under the name that mmcv's modules give it."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, out_channels, side, stride, side // 2)))
