"""Files that appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from vmamba.safety import replacing


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        picture.save(partial, format="PNG", compress_level=3)


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
