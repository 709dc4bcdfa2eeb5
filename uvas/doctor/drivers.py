"""The questions to GPU drivers. ``python -m uvas.doctor.drivers cuda`` prints the answer as one line of JSON.

A process of its own: drivers hang, crash, and start threads that stay.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

_PATIENCE_S = 20.0
_NAME_BYTES = 256

_CUDA_ATTRIBUTES = {  # CUdevice_attribute of cuda.h
    "virtual memory management": 102,
    "pageable memory access": 88,
    "through the host's page tables": 100,
    "concurrent managed access": 89,
}
_CL_PLATFORM_NAME = 0x0902  # cl.h
_CL_PLATFORM_NOT_FOUND_KHR = -1001  # cl_khr_icd


@dataclass(frozen=True, slots=True)
class Answer:
    """What a driver said."""

    devices: int
    """That it has; 0 where it does not answer."""
    text: str


def ask(driver: str) -> Answer:
    """Ask a driver, in a process of its own."""
    command = [sys.executable, "-m", "uvas.doctor.drivers", driver]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Answer(0, f"the driver did not answer within {_PATIENCE_S:.0f} s")
    except OSError as refusal:
        return Answer(0, f"no process to ask it from: {refusal}")
    if done.returncode:
        return Answer(0, f"asking ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


def _ask_cuda() -> Answer:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as refusal:
        return Answer(0, f"not tried: {refusal}")
    code = cuda.cuInit(0)
    if code:
        return Answer(0, f"cuInit answered {code}")
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    code = cuda.cuDeviceGetCount(ctypes.byref(number))
    if code:
        return Answer(0, f"{version}: cuDeviceGetCount answered {code}")
    devices = [_describe_cuda(cuda, ordinal) for ordinal in range(number.value)]
    return Answer(len(devices), f"{version}: {'; '.join(devices) or 'no device'}")


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


def _ask_opencl() -> Answer:
    try:
        opencl = ctypes.CDLL("libOpenCL.so.1")
    except OSError as refusal:
        return Answer(0, f"not tried: {refusal}")
    count = ctypes.c_uint()
    code = opencl.clGetPlatformIDs(0, None, ctypes.byref(count))
    if code and code != _CL_PLATFORM_NOT_FOUND_KHR:
        return Answer(0, f"clGetPlatformIDs answered {code}")
    platforms = (ctypes.c_void_p * count.value)()
    if count.value:
        opencl.clGetPlatformIDs(count, platforms, None)
    names = []
    for platform in platforms:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        opencl.clGetPlatformInfo(ctypes.c_void_p(platform), _CL_PLATFORM_NAME, ctypes.c_size_t(_NAME_BYTES), name, None)
        names.append(name.value.decode(errors="replace"))
    return Answer(len(names), f"{len(names)} platforms{': ' if names else ''}{', '.join(names)}")


_DRIVERS: dict[str, Callable[[], Answer]] = {"cuda": _ask_cuda, "opencl": _ask_opencl}

if __name__ == "__main__":
    print(json.dumps(asdict(_DRIVERS[sys.argv[1]]())))
