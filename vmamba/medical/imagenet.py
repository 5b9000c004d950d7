"""Where a training starts: from a segmentation network's weights, or from those of a classifier on ImageNet."""

import sys
from pathlib import Path

from torch import nn

from vmamba.checkpoint import LoadReport
from vmamba.errors import UserError
from vmamba.medical.pretrained import load_pretrained


def load_start(network: nn.Module, path: Path) -> LoadReport:
    """Start ``network`` from what :func:`load_pretrained` takes, or from a classifier by the network's published map.

    The map is ``load_imagenet`` in the file of the network, such as :func:`vmamba.heads.vmunet.load_imagenet`.

    Returns:
        What was loaded; ``missing`` lists what keeps its first values.

    Raises:
        UserError: the checkpoint is neither; nothing has been loaded then.
    """
    try:
        return load_pretrained(network, path)
    except UserError as error:
        published = getattr(sys.modules[type(network).__module__], "load_imagenet", None)
        if published is None or not path.is_file():
            raise
        try:
            return published(network, path)
        except (ValueError, AttributeError) as other:
            raise UserError(f"{error}; nor a classifier to start from: {' '.join(str(other).split())[:160]}") from other
