"""OpenCL for the tests: one device for each name, or a skip that says why there is none."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache

import pytest

import uvas

_CACHE = tempfile.mkdtemp(prefix="uvas-opencl-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["POCL_CACHE_DIR"] = _CACHE  # PoCL compiles into files, and looks here when it is loaded
os.environ["PYOPENCL_NO_CACHE"] = "1"  # pyopencl has a cache of its own in the home directory


@cache
def _why_not() -> str:
    """Why there is no OpenCL device; empty: there is one. From then on PoCL's threads and descriptors are there."""
    try:
        with uvas.OpenCLDevice():
            return ""
    except uvas.NotSupportedError as refusal:
        return str(refusal)


def device(name: str | None = None) -> uvas.OpenCLDevice:
    """An OpenCL device."""
    if _why_not():
        pytest.skip(_why_not())
    return uvas.OpenCLDevice(name=name)
