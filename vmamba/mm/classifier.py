"""VMambaClassifier: any image classifier of timm as a model of mmengine's runner, with timm's losses and Mixup."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint
from torch import Tensor, nn

from vmamba.checkpoint import LoadReport, fit
from vmamba.errors import UserError
from vmamba.registry import find


@MODELS.register_module()
class VMambaClassifier(BaseModel):
    """Batches (images (b, in_chans, h, w), labels (b,)) -> logits (b, num_classes), a loss, or predictions.

    Args:
        variant: a classifier of the zoo, or any other name of timm.
        num_classes: width of the classifier.
        label_smoothing: probability that the targets spread over all classes: in [0, 1).
        mixup: arguments of ``timm.data.Mixup``, as ``dict(mixup_alpha=0.8, cutmix_alpha=1.0)``; None mixes nothing.
            With it a batch must have an even number of images.
        pretrained: True for the published weights, or the path of a checkpoint; a classifier of another width is
            left out.
        data_preprocessor, init_cfg: as in every model of mmengine.
        **settings: of the network, such as ``drop_path_rate=0.2``.

    Raises:
        ValueError: no such variant; UserError: the weights are of another network; TypeError: a setting is unknown.
    """

    def __init__(
        self,
        variant: str,
        *,
        num_classes: int = 1000,
        label_smoothing: float = 0.0,
        mixup: "Mapping[str, Any] | None" = None,
        pretrained: "bool | str" = False,
        data_preprocessor: "dict | None" = None,
        init_cfg: "dict | None" = None,
        **settings,
    ):
        super().__init__(data_preprocessor, init_cfg)
        if not timm.is_model(variant):
            find(variant)  # raises, and names what is near
        self.network = timm.create_model(variant, pretrained is True, num_classes=num_classes, **settings)
        if isinstance(pretrained, str):
            _load(self.network, pretrained)
        self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup) if mixup else None
        self.criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(label_smoothing)

    def forward(self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor") -> Any:
        """The logits of (b, in_chans, h, w) (``tensor``), ``{"loss": ...}`` (``loss``), or a list of b predictions.

        A prediction (``predict``) has ``scores``, the logits (num_classes,), and ``label``, what was to be found.

        Raises:
            ValueError: another mode, or no labels (``data_samples``, (b,)) where they are needed.
        """
        if mode == "tensor":
            return self.network(inputs)
        if mode not in ("loss", "predict") or data_samples is None:
            missing = "labels" if data_samples is None else "a mode among tensor, loss and predict"
            raise ValueError(f"a classifier needs {missing}; got mode {mode!r}")
        return self._loss(inputs, data_samples) if mode == "loss" else self._predictions(inputs, data_samples)

    def _loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        logits = self.network(images)
        heads = logits if isinstance(logits, tuple) else (logits,)  # two, of networks made for distillation
        return {"loss": torch.stack([self.criterion(y.float(), labels) for y in heads]).mean()}

    def _predictions(self, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        scores = self.network(images)
        return [{"scores": y, "label": label} for y, label in zip(scores, labels, strict=True)]

    def init_weights(self) -> None:
        """Nothing: the network has initialised itself, or has its weights already."""
        self._is_init = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take checkpoints of the original code too, and none of another network."""
        mine = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        if mine and hasattr(self.network, "official_keys"):
            native, report = fit({_bare(key, prefix): value for key, value in mine.items()}, self.network)
            if not report.ok:
                raise UserError(f"the checkpoint is not of this classifier; {_line(report)}")
            mine = {f"{prefix}network.{name}": tensor for name, tensor in native.items()}
        state_dict.update(mine)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _load(network: nn.Module, path: str) -> None:
    """Weights of a file, all of them but for a classifier of another width.

    Raises:
        FileNotFoundError: no such file; ValueError: it is not a checkpoint; UserError: it is not of this network.
    """
    if not hasattr(network, "official_keys"):
        load_checkpoint(network, path)
        return
    native, report = fit(path, network)
    if any(not key.startswith("head") for key in (*report.missing, *report.unexpected, *report.misshapen)):
        raise UserError(f"{path} is not of this network; {_line(report)}")
    network.load_state_dict({key: native[key] for key in report.loaded}, strict=False)


def _bare(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).removeprefix("network.")


def _line(report: LoadReport) -> str:
    return "; ".join(str(report).splitlines())
