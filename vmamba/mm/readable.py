"""Damaged files in a data set: skipped with a warning, or an error, by choice; named in either case.

mmcv stops at a file that it cannot decode without saying more than its name, and takes a truncated JPEG for whole, grey
where data are missing. In a pipeline: ``dict(type="LoadReadable", on_error="skip")`` instead of ``LoadImageFromFile``.
"""

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from vmamba.errors import UserError

CHOICES = ("raise", "skip")


@TRANSFORMS.register_module()
class LoadReadable:
    """Another transform that reads files, and what happens if it fails.

    Args:
        transform: configuration of that transform; by default mmcv's ``LoadImageFromFile`` with Pillow's decoder, which
            notices truncated files.
        on_error: ``"raise"`` an error, or ``"skip"``: warn, and let the data set take another sample, which OpenMMLab's
            do in training; in testing they stop.

    Raises:
        ValueError: ``on_error`` is neither.
    """

    def __init__(self, transform: dict[str, Any] | None = None, on_error: str = "raise"):
        if on_error not in CHOICES:
            raise ValueError(f"on_error must be {' or '.join(CHOICES)}, got {on_error!r}")
        self.on_error = on_error
        self.transform = TRANSFORMS.build(transform or {"type": "LoadImageFromFile", "imdecode_backend": "pillow"})

    def __call__(self, results: dict) -> dict | None:
        """The inner transform's result; None for a sample to be skipped.

        Raises:
            UserError: a file cannot be read, and ``on_error`` is "raise"; it has the file's name.
        """
        try:
            return self.transform(results)
        except Exception as error:  # whatever a decoder raises
            file = results["seg_map_path"] if "img" in results else results["img_path"]
            reason = str(error) or type(error).__name__
            if self.on_error == "raise":
                raise UserError(f'{file}: cannot be read ({reason}); on_error="skip" leaves it out') from error
            print_log(f"{file}: cannot be read ({reason}); skipped", logger="current", level=logging.WARNING)
            return None

    def __repr__(self) -> str:
        return f"LoadReadable(transform={self.transform!r}, on_error={self.on_error!r})"
