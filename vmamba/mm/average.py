"""VMambaEMAHook: mmengine's moving average of the weights, which takes files of the original codes too."""

from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS

from vmamba.checkpoint import ENVELOPES


@HOOKS.register_module()
class VMambaEMAHook(EMAHook):
    """``EMAHook``, for which a checkpoint need not have its tensors under ``state_dict``.

    The file that ``vmamba test`` or ``load_from`` reads may hold them under ``model`` and so on, or bare.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Start the average from the checkpoint, or go on with that in it (``--resume``)."""
        if "state_dict" not in checkpoint:
            envelope = next((name for name in ENVELOPES if isinstance(checkpoint.get(name), dict)), None)
            checkpoint["state_dict"] = checkpoint[envelope] if envelope else dict(checkpoint)
        super().after_load_checkpoint(runner, checkpoint)
