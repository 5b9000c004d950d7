"""TopAccuracy: the share of images whose label is among the k likeliest classes."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """``accuracy/top1``, ``accuracy/top5`` ... in percent, of the predictions of :class:`VMambaClassifier`.

    Args:
        topk: each k that is asked for; one above the number of classes counts every image.
        collect_device, prefix, collect_dir: as in every metric of mmengine.

    Raises:
        ValueError: a k is below 1, or there is none.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), **options):
        super().__init__(**options)
        if not topk or min(topk) < 1:
            raise ValueError(f"topk needs numbers of 1 or more, got {tuple(topk)}")
        self.topk = tuple(topk)

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Keep, of each image, how many classes are likelier than its label."""
        for sample in data_samples:
            scores = sample["scores"].float()
            self.results.append(int((scores > scores[int(sample["label"])]).sum()))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """{"top1": percent, ...}"""
        ranks = torch.tensor(results)
        return {f"top{k}": 100 * (ranks < k).double().mean().item() for k in self.topk}
