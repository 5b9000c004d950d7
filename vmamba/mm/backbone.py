"""VMambaBackbone: any backbone of the zoo as an OpenMMLab module, in mmengine's root registry."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vmamba.mm.weights import fitted, load
from vmamba.protocol import TimmModel
from vmamba.registry import create_model, find

PYRAMID = "pyramid."  # where the pyramid's parameters are


@MODELS.register_module()
class VMambaBackbone(BaseModule):
    """(b, in_channels, h, w) -> maps (b, c_i, h / s_i, w / s_i), one per output: ``channels`` c_i at ``strides`` s_i.

    Args:
        variant: a network of ``vmamba.list_models()``.
        out_indices: stages whose maps are returned (blocks, of a column such as Vim); by default those of the paper.
        out_norm: a norm on each output; by default whatever the paper has. No unused parameters are left either way.
        in_channels: channels of the image.
        frozen_stages: 0 freezes the stem with its positions, n also the first n stages (blocks, of a column) and
            the norms of their outputs; -1 freezes nothing.
        norm_eval: batch norms stay in eval mode during training.
        with_cp: recompute blocks in the backward pass to save memory.
        pretrained: a checkpoint's path or address: short for ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: how to initialise; ``Pretrained`` loads files of the original code or ours, of a classifier or of a
            detector (``prefix`` is not needed for ``backbone.``), and raises unless all of the backbone is in it.
        **settings: of the network, such as ``drop_path_rate=0.2`` or ``scan="raster"``; see its class.

    Raises:
        ValueError: no such variant, stages that it lacks, or both ``pretrained`` and ``init_cfg``; TypeError: a setting
        is unknown or ``pretrained`` is no string.
    """

    def __init__(
        self,
        variant: str,
        *,
        out_indices: Sequence[int] | None = None,
        out_norm: bool | None = None,
        in_channels: int = 3,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: "dict | list[dict] | None" = None,
        **settings,
    ):
        super().__init__(_init_cfg(pretrained, init_cfg))
        self.pyramid: Any = _pyramid(variant, out_indices, out_norm, {"in_chans": in_channels, **settings})
        self.variant, self.channels, self.strides = variant, self.pyramid.channels, self.pyramid.strides
        levels = len(self.pyramid.body.levels)
        if not -1 <= frozen_stages <= levels:
            raise ValueError(f"frozen_stages must be -1 (none) to {levels} (all of {variant}), got {frozen_stages}")
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.pyramid.body.set_grad_checkpointing(with_cp)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, in_channels, h, w) -> ((b, c_i, h / s_i, w / s_i), ...), contiguous"""
        return tuple(self.pyramid(x))

    def init_weights(self) -> None:
        """What ``init_cfg`` asks for, once; without one the network keeps its own initialisation."""
        cfgs: list[Any] = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or [])
        pretrained = [cfg for cfg in cfgs if cfg["type"] in ("Pretrained", "PretrainedInit")]
        done, self.init_cfg = self.is_init, [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = cfgs or None
        for cfg in [] if done else pretrained:
            load(self.pyramid, **{key: value for key, value in cfg.items() if key not in ("type", "map_location")})

    def train(self, mode: bool = True) -> "VMambaBackbone":
        """Training mode, but for what is frozen, and for batch norms with ``norm_eval``."""
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        body, norms = self.pyramid.body, getattr(self.pyramid, "norms", ())
        outputs = zip(getattr(self.pyramid, "out_indices", ()), norms, strict=False)
        frozen = [*body.levels[: max(self.frozen_stages, 0)], *(y for i, y in outputs if i < self.frozen_stages)]
        for module in [body.stem, *frozen] if self.frozen_stages >= 0 else []:
            module.eval().requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: state matrices, skips, step-size biases, positions."""
        return {f"{PYRAMID}body.{name}" for name in self.pyramid.body.no_weight_decay()}

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The layer of a parameter and the number of layers, for layer-wise learning rates: mmpretrain's protocol.

        The stem is layer 0, then each block is a layer with the downsampling before it; norms of outputs, a neck and
        what follows the backbone are the last layer.
        """
        depth = max(self._layers.values()) + 2
        name = param_name.removeprefix(prefix).removeprefix(f"{PYRAMID}body.")
        return self._layers.get(name, depth - 1), depth

    @cached_property
    def _layers(self) -> dict[str, int]:
        """The layer of each parameter of the body by its name there."""
        return group_parameters(self.pyramid.body, self.pyramid.body.group_matcher(), reverse=True)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take checkpoints of the original code too, and none of another network."""
        mine = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        if mine:
            state = {key.removeprefix(prefix).removeprefix(PYRAMID): value for key, value in mine.items()}
            native = fitted(state, self.pyramid)
            state_dict.update({f"{prefix}{PYRAMID}{name}": tensor for name, tensor in native.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _init_cfg(pretrained: str | None, init_cfg: "dict | list[dict] | None") -> "dict | list[dict] | None":
    if pretrained is None:
        return init_cfg
    if not isinstance(pretrained, str):
        raise TypeError(f"pretrained must be a checkpoint's path or address, or None; got {pretrained!r}")
    if init_cfg is not None:
        raise ValueError("give pretrained or init_cfg, not both; init_cfg is the newer one")
    return {"type": "Pretrained", "checkpoint": pretrained}


def _pyramid(variant: str, out_indices: Sequence[int] | None, out_norm: bool | None, settings: dict) -> nn.Module:
    """The pyramid of a classifier's variant, or a network that is one (Vim's dense variants)."""
    options = {"out_indices": out_indices, "norm": out_norm}
    settings.update({key: value for key, value in options.items() if value is not None})
    classifier = issubclass(find(variant).cls, TimmModel)
    model = create_model(f"{variant}_backbone" if classifier else variant, **settings)
    if not hasattr(model, "body"):
        raise ValueError(f"{variant} is no backbone but a whole network; choose a classifier or a dense variant")
    return model
