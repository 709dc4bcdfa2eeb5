"""Ranges of addresses that mean the same on the host and on every device, taken without replacing anybody's memory.

>>> import uvas
>>> with uvas.AddressSpace() as space, space.reserve(1 << 20) as held:
...     held.commit()
...     array = held.numpy("f8")
...     array[:] = 1
...     uvas.find(array.ctypes.data) is held
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvas._core import get_include, get_library
from uvas.arena import Allocation, Arena, allocation_of
from uvas.arrays import (
    array,
    asarray,
    configure,
    default_arena,
    empty,
    empty_like,
    full,
    is_unified,
    numpy_allocator,
    ones,
    zeros,
    zeros_like,
)
from uvas.devices.base import Backing, Device, DeviceInfo, LentMemory
from uvas.errors import (
    AddressInUseError,
    AddressSpaceExhaustedError,
    DeviceError,
    DeviceLostError,
    LimitReachedError,
    NotSupportedError,
    OutOfMemoryError,
    ReleasedError,
    UvasError,
)
from uvas.maps.own import address_map
from uvas.maps.rows import MapRow
from uvas.movement import MovementStats, PageFlag, PartyMovement
from uvas.ranges import Range
from uvas.reports import AllocationInfo, ArenaStats, Finding, Report, SpaceStats
from uvas.reservation import Adoption, Reservation
from uvas.space import AddressSpace, find

if TYPE_CHECKING:
    from uvas.devices.cfunction import CFunction
    from uvas.devices.cuda.device import CudaDevice
    from uvas.devices.opencl.device import OpenCLDevice
    from uvas.devices.process import ProcessDevice
    from uvas.devices.transport import by_value
    from uvas.interop.cupy import ascupy, asnumpy, host_access
    from uvas.interop.cupy_allocator import cupy_allocator
    from uvas.interop.dlpack import dlpack

__all__ = [
    "AddressInUseError",
    "AddressSpace",
    "AddressSpaceExhaustedError",
    "Adoption",
    "Allocation",
    "AllocationInfo",
    "Arena",
    "ArenaStats",
    "Backing",
    "CFunction",
    "CudaDevice",
    "Device",
    "DeviceError",
    "DeviceInfo",
    "DeviceLostError",
    "Finding",
    "LentMemory",
    "LimitReachedError",
    "MapRow",
    "MovementStats",
    "NotSupportedError",
    "OpenCLDevice",
    "OutOfMemoryError",
    "PageFlag",
    "PartyMovement",
    "ProcessDevice",
    "Range",
    "ReleasedError",
    "Report",
    "Reservation",
    "SpaceStats",
    "UvasError",
    "address_map",
    "allocation_of",
    "array",
    "asarray",
    "ascupy",
    "asnumpy",
    "by_value",
    "configure",
    "cupy_allocator",
    "default_arena",
    "dlpack",
    "empty",
    "empty_like",
    "find",
    "full",
    "get_include",
    "get_library",
    "host_access",
    "is_unified",
    "numpy_allocator",
    "ones",
    "zeros",
    "zeros_like",
]

__version__ = "0.1.0"

_LAZY = {
    "CFunction": "uvas.devices.cfunction",
    "CudaDevice": "uvas.devices.cuda.device",
    "OpenCLDevice": "uvas.devices.opencl.device",
    "ProcessDevice": "uvas.devices.process",
    "ascupy": "uvas.interop.cupy",
    "asnumpy": "uvas.interop.cupy",
    "by_value": "uvas.devices.transport",
    "cupy_allocator": "uvas.interop.cupy_allocator",
    "dlpack": "uvas.interop.dlpack",
    "host_access": "uvas.interop.cupy",
}  # what needs multiprocessing and concurrent.futures is imported when it is asked for


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'uvas' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
