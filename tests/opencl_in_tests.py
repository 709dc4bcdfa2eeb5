"""OpenCL for the tests: a device, or a skip that says why there is none."""

from __future__ import annotations

from functools import cache

import pytest

import uvas


@cache
def _why_not() -> str:
    """Why there is no OpenCL device; empty: there is one. From then on its runtime's threads are in this process."""
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
