"""The questions to GPU drivers. ``python drivers.py cuda`` prints the answer as one line of JSON.

A process of its own asks, in which nothing else is imported: drivers hang, crash, and start threads that stay.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

_NAME_BYTES = 256

_CUDA_ATTRIBUTES = {  # CUdevice_attribute of cuda.h
    "pageable memory access": 88,
    "through the host's page tables": 100,
    "concurrent managed access": 89,
    "host registration": 99,
    "registered memory at host addresses": 91,
    "virtual memory management": 102,
    "host-located mappings": 145,
    "node-located mappings": 141,
}
_CL_PLATFORM_NAME = 0x0902  # cl.h
_CL_PLATFORM_NOT_FOUND_KHR = -1001  # cl_khr_icd


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking a driver."""

    library: str
    """Its library; empty: there is none."""
    text: str
    """What it said, or why it was not asked."""


def answer_of(driver: str) -> Answer:
    """Load a driver's library and ask it."""
    library, question = DRIVERS[driver]
    try:
        loaded = ctypes.CDLL(library)
    except OSError as refusal:
        return Answer("", f"not tried: {refusal}")
    return Answer(library, question(loaded))


def _ask_cuda(cuda: ctypes.CDLL) -> str:
    code = cuda.cuInit(0)
    if code:
        return f"cuInit answered {code}"
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    code = cuda.cuDeviceGetCount(ctypes.byref(number))
    if code:
        return f"{version}: cuDeviceGetCount answered {code}"
    devices = [_describe_cuda(cuda, ordinal) for ordinal in range(number.value)]
    return f"{version}: {'; '.join(devices) or 'no device'}"


def _describe_cuda(cuda: ctypes.CDLL, ordinal: int) -> str:
    device, value = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    code = cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    if code:
        return f"device {ordinal} answered {code}"
    can = [
        what
        for what, number in _CUDA_ATTRIBUTES.items()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) == 0 and value.value
    ]
    return f"{name.value.decode(errors='replace')} ({', '.join(can) or 'no shared addresses'})"


def _ask_hip(_: ctypes.CDLL) -> str:
    return "not tried: uvas asks no HIP driver yet"


def _ask_opencl(opencl: ctypes.CDLL) -> str:
    count = ctypes.c_uint()
    code = opencl.clGetPlatformIDs(0, None, ctypes.byref(count))
    if code and code != _CL_PLATFORM_NOT_FOUND_KHR:
        return f"clGetPlatformIDs answered {code}"
    if not count.value:
        return "no platform"
    platforms = (ctypes.c_void_p * count.value)()
    opencl.clGetPlatformIDs(count, platforms, None)
    names = []
    for platform in platforms:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        opencl.clGetPlatformInfo(ctypes.c_void_p(platform), _CL_PLATFORM_NAME, ctypes.c_size_t(_NAME_BYTES), name, None)
        names.append(name.value.decode(errors="replace"))
    return f"platforms: {', '.join(names)}"


DRIVERS: dict[str, tuple[str, Callable[[ctypes.CDLL], str]]] = {
    "cuda": ("libcuda.so.1", _ask_cuda),
    "hip": ("libamdhip64.so", _ask_hip),
    "opencl": ("libOpenCL.so.1", _ask_opencl),
}
"""Each driver's library, and how to ask it."""

if __name__ == "__main__":
    print(json.dumps(asdict(answer_of(sys.argv[1]))))
