"""What a detector finds in pictures, as overlays and as one file of results in COCO's format."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.structures.mask import encode_mask_results

from vmamba.errors import UserError
from vmamba.mm.drawing import Box, Instance, draw_instances
from vmamba.mm.files import write_json, write_png
from vmamba.mm.palette import Classes, shortened

RESULTS, IMAGES = "results.json", "images.json"


class Detection:
    """Outputs of a detector: ``overlays/NAME.png``, ``results.json`` and ``images.json``.

    Args:
        classes: of the detector.
        threshold: what has a lower score is left out, of the overlays and of the results.
    """

    folders = ("overlays",)

    def __init__(self, classes: Classes, threshold: float):
        self.classes, self.threshold = classes, threshold

    def write(self, image: np.ndarray, sample: Any, files: Sequence[Path]) -> dict[str, Any]:
        """Draw a picture's instances to ``files``; returns its size and its instances in COCO's format.

        Raises:
            UserError: the sample has no instances: it is not of a detector of objects.
        """
        if "pred_instances" not in sample:
            raise UserError("the network predicts no instances; vmamba detect is for detectors of objects")
        found = self.instances(sample.pred_instances)
        write_png(files[0], draw_instances(image, found, self.classes))
        height, width = image.shape[:2]
        return {"width": width, "height": height, "detections": [_coco(instance) for instance in found]}

    def instances(self, predicted: Any) -> list[Instance]:
        """The instances of mmdet that reach the threshold, highest scores first."""
        predicted = predicted[predicted.scores >= self.threshold].cpu().numpy()
        order = np.argsort(-predicted.scores, kind="stable")
        boxes = getattr(predicted.bboxes, "tensor", predicted.bboxes)
        masks = predicted.masks if "masks" in predicted else [None] * len(order)
        return [Instance(int(predicted.labels[i]), float(predicted.scores[i]), _box(boxes[i]), masks[i]) for i in order]

    def collect(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Write ``results.json``, and ``images.json`` with the pictures and categories that its numbers mean."""
        records = sorted(records, key=lambda record: record["id"])
        results = [{"image_id": record["id"], **found} for record in records for found in record["detections"]]
        images = [
            {"id": r["id"], "file_name": r["name"] + Path(r["file"]).suffix, "width": r["width"], "height": r["height"]}
            for r in records
        ]
        categories = [{"id": i, "name": name} for i, name in enumerate(self.classes.names, 1)]
        write_json(folder / RESULTS, results)
        content = {"images": images, "annotations": [], "categories": categories}
        write_json(folder / IMAGES, {"info": {"description": "pictures of vmamba detect"}, "licenses": [], **content})

    def counts(self, records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """How many instances of each class there are in all pictures, the most frequent first."""
        labels = Counter(found["category_id"] - 1 for record in records for found in record["detections"])
        return {self.classes.name(label): count for label, count in labels.most_common()}

    def headline(self, counts: Mapping[str, int]) -> str:
        """``counts`` in a few words."""
        names = shortened(f"{name} {n}" for name, n in counts.items())
        return f"{sum(counts.values())} objects ({names})" if counts else "no objects"


def _box(values: np.ndarray) -> Box:
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1


def _coco(instance: Instance) -> dict[str, Any]:
    """An entry of COCO's results: ``category_id`` from 1, ``bbox`` as x, y, width, height, a run-length mask."""
    x0, y0, x1, y1 = instance.box
    box = [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]
    entry = {"category_id": instance.label + 1, "bbox": box, "score": round(instance.score, 5)}
    if instance.mask is None:
        return entry
    (code,) = encode_mask_results([instance.mask])
    return {**entry, "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode()}}
