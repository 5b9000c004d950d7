"""The layouts that ``--data DIR`` tells by its files; a further one is an object in this table."""

from pathlib import Path

from vmamba.medical.layout import Layout
from vmamba.medical.layout_arrays import ACDC, SYNAPSE
from vmamba.medical.layout_isic import ISIC

LAYOUTS = {layout.name: layout for layout in (ISIC, SYNAPSE, ACDC)}


def find_layout(folder: Path) -> Layout | None:
    """The layout of a folder by its marks, also if half of it is missing; None for any other folder."""
    if not folder.is_dir() or ((folder / "images").is_dir() and (folder / "labels").is_dir()):
        return None
    return next((layout for layout in LAYOUTS.values() if layout.marked(folder)), None)
