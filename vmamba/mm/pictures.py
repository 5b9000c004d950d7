"""Which pictures a command was given, under which names its outputs appear, and whether a file is a whole picture."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from vmamba.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


def find_pictures(inputs: Sequence[str], *, recursive: bool = False, without: Iterable[Path] = ()) -> dict[str, Path]:
    """``{name: file}`` of files, folders and patterns, sorted; a file that is named twice comes once.

    A name is the path from the deepest folder that holds all of them, without its ending: ``a/1`` and ``b/1`` of
    ``a/1.jpg b/1.jpg``, but ``1`` of ``a/1.jpg`` alone.

    Args:
        inputs: files (of any ending), folders (of which files with an ending of a picture are taken) and patterns of
            :mod:`glob` (of which the same).
        recursive: also folders inside folders.
        without: folders whose files are left out of folders and patterns: those of earlier outputs.

    Raises:
        UserError: an input does not exist or holds no picture, or two pictures would have the same name.
    """
    left_out = [_absolute(folder) for folder in without]
    files = {_absolute(path): path for text in inputs for path in _files(text, recursive, left_out)}
    top = Path(os.path.commonpath([path.parent for path in files]))
    names: dict[str, Path] = {}
    for path in sorted(files):
        name = path.relative_to(top).with_suffix("").as_posix()
        if name in names:
            pair = f"{names[name]} and {files[path]}"
            raise UserError(f"{pair} would have the same output, {name}.png; give each an output folder of its own")
        names[name] = files[path]
    return names


def _files(text: str, recursive: bool, left_out: Sequence[Path]) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [
            Path(file) for file in glob.iglob(f"{glob.escape(text)}/{'**/' if recursive else ''}*", recursive=True)
        ]
    elif glob.has_magic(text):
        found = [Path(file) for file in glob.iglob(text, recursive=True)]
    else:
        raise UserError(f"no picture or folder at {text}")
    pictures = [file for file in found if file.suffix.lower() in ENDINGS and file.is_file()]
    pictures = [file for file in pictures if not any(_absolute(file).is_relative_to(folder) for folder in left_out)]
    if not pictures:
        deeper = "; --recursive looks into its folders too" if path.is_dir() and not recursive else ""
        raise UserError(f"no picture in {text}: expected files ending in {', '.join(ENDINGS)}{deeper}")
    return pictures


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # unlike resolve(), this keeps the names of links


def why_not_whole(path: Path) -> str | None:
    """Why a file is no picture that can be read to its end, in a few words; None if it can.

    Decoders of OpenCV, which OpenMMLab uses, silently fill up what is missing of a damaged file.
    """
    try:
        if not path.stat().st_size:
            return "the file is empty"
        with Image.open(path) as image:
            image.load()
    except Image.UnidentifiedImageError:
        return "it is no picture of a known format"
    except Exception as error:  # decoders raise anything for damaged files
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
