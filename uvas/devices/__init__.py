"""Parties that must agree on what an address means. They know nothing of spaces.

`base` says what a device is; `process` is the one that every machine has, `opencl` what follows the host's pointers.
Names are imported when they are first asked for: starting Python with uvas does not pay for multiprocessing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvas.devices.base import Backing, Device, DeviceInfo, LentMemory
    from uvas.devices.cfunction import CFunction
    from uvas.devices.opencl.device import OpenCLDevice
    from uvas.devices.process import ProcessDevice
    from uvas.devices.transport import by_value

__all__ = ["Backing", "CFunction", "Device", "DeviceInfo", "LentMemory", "OpenCLDevice", "ProcessDevice", "by_value"]

_HOMES = {
    "Backing": "base",
    "CFunction": "cfunction",
    "Device": "base",
    "DeviceInfo": "base",
    "LentMemory": "base",
    "OpenCLDevice": "opencl.device",
    "ProcessDevice": "process",
    "by_value": "transport",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
