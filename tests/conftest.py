"""Tests that need mmdet and mmseg (``test_mm_*.py``) are left out where these are missing; the header says so.

``make test`` installs them and sets ``VMAMBA_TEST_MM=1``: then nothing is left out, and a broken installation fails.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

MISSING = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if find_spec(name) is None]
LEFT_OUT = ["test_mm_*.py"] if MISSING and os.environ.get("VMAMBA_TEST_MM") != "1" else []
collect_ignore_glob = LEFT_OUT


def pytest_report_header() -> str:
    """A line on what is left out, if anything."""
    return f"left out: {', '.join(LEFT_OUT)}, for want of {', '.join(MISSING)} (make mm)" if LEFT_OUT else ""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as those of most trainings here only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
