"""Lightning modules whose training steps are CUDA graphs where one GPU trains."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from vmamba.medical.captured import Captured


class CapturedSteps(pl.LightningModule):
    """A module that makes ``captured`` of its ``network``'s loss; no graph is made where ``captures`` is False."""

    captures = True
    captured: Captured
    network: nn.Module

    def on_fit_start(self) -> None:
        """Several processes exchange gradients meanwhile."""
        self.captured.fits = self.captures and isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def on_fit_end(self) -> None:
        """What follows needs the graph's memory."""
        self.captured.graph = None
