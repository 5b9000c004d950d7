"""Small backbones of every kind as configurations of OpenMMLab."""

from tests.timm_zoo import KINDS, shrunk
from vmamba.registry import entries, list_models

DENSE = [name for name in list_models("vim_*") if entries()[name].timm is None]
BACKBONES = [*KINDS, *DENSE]


def small_cfg(name: str, **options) -> dict:
    """Configuration of a small backbone of the kind of ``name``."""
    blocks = {"out_indices": (0, 1, 2, 3)} if name in DENSE and not name.endswith("det") else {}
    blocks = {"out_indices": (3,)} if name.endswith("det") else blocks
    return {"type": "VMambaBackbone", "variant": name, **shrunk(name), **blocks, **options}
