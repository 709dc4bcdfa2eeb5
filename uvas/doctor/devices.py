"""Each kind of device: what the machine shows of it, and what answered when it was tried."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from uvas import AddressInUseError, AddressSpace, ProcessDevice
from uvas.devices.launch import how_it_ended
from uvas.doctor import drivers
from uvas.doctor.check import Check, DeviceCheck
from uvas.report import format_size

_SIZE = 1 << 20
_PATIENCE_S = 20.0  # with a driver
_COMPLAINT = 200  # characters
_SENTINEL = b"not uvas"
_TRY_CUDA = """
import uvas
with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(1 << 21) as held:
    held.commit()
    array = held.numpy("u1")
    array[:] = 1
    print(f"saw {held.range} by {device.strategy}")
    del array
"""
_CUDA_FILES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/proc/driver/nvidia/version")
_GPUS = {"HIP": "HipDevice", "OpenCL": "OpenCLDevice"}
"""What is not built yet, by kind."""


def check_host() -> Check:
    """Do on the host what uvas is for: spare who is there, hold addresses, put memory behind them, give all back."""
    try:
        stranger = mmap.mmap(-1, _SIZE)
        stranger[:] = _SENTINEL * (_SIZE // len(_SENTINEL))
        taken = np.frombuffer(stranger, np.uint8).ctypes.data
        with AddressSpace(name="doctor") as space, space.reserve(_SIZE) as held:
            refused = _refuses(space, taken)
            held.commit()
            array = held.numpy(np.uint64)
            array[:] = held.base
            right = bool((array == held.base).all())
            value = f"a stranger was spared; {format_size(held.size)} at {held.base:#x} reserved, written and read"
            del array
    except (OSError, MemoryError) as refusal:
        return Check("host", str(refusal), "missing", "uvas cannot do its main job here", "see the limits")
    if not refused or not right or stranger[:] != _SENTINEL * (_SIZE // len(_SENTINEL)):
        return Check("host", "memory was replaced or lost", "missing", "uvas is not safe here", "report it")
    return Check("host", value, "good", "uvas does its main job on the host", "")


def _refuses(space: AddressSpace, taken: int) -> bool:
    try:
        space.reserve(_SIZE, at=taken)
    except AddressInUseError:
        return True
    return False


def check_devices() -> list[DeviceCheck]:
    """Look at each kind of device that uvas knows or is asked about, and try it."""
    return [
        check_process(),
        check_cuda(),
        _check_gpu("HIP", "hip", ("/dev/kfd",)),
        _check_gpu("OpenCL", "opencl", module="pyopencl"),
    ]


def _add_one(array: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> int:
    """Read and write, in the worker, what the host wrote, at the host's address."""
    array[0] += 1
    return int(array.ctypes.data)


def check_process() -> DeviceCheck:
    """Start a worker, let it agree to a range, and let it follow a pointer of the host's."""
    advertised = f"{sys.executable or 'no interpreter'}, {len(os.sched_getaffinity(0))} CPUs"
    began = time.monotonic()
    try:
        with (
            ProcessDevice(name="doctor") as device,
            AddressSpace([device], name="doctor") as space,
            space.reserve(_SIZE) as held,
        ):
            held.commit()
            array = held.numpy(np.uint64, 1)
            array[0] = 41
            address = device.run(_add_one, array)
            right = address == held.base and int(array[0]) == 42
            probed = f"process {device.pid} agreed to {held.range} and wrote where the host reads"
            del array
    except (OSError, MemoryError, RuntimeError) as refusal:
        remedy = "allow processes and descriptors (ulimit -u, ulimit -n), and see the limits"
        return DeviceCheck("ProcessDevice", advertised, f"{refusal}", "missing", remedy)
    if not right:
        return DeviceCheck("ProcessDevice", advertised, "it did not see the host's memory", "missing", "report it")
    return DeviceCheck("ProcessDevice", advertised, f"{probed}, in {time.monotonic() - began:.2f} s", "good", "")


def check_cuda() -> DeviceCheck:
    """Look for NVIDIA's driver and the packages, ask the driver, and tell by which strategies its cards see memory."""
    answer = _ask("cuda")
    advertised = [path for path in _CUDA_FILES if Path(path).exists()]
    advertised += [answer.library] if answer.library else []
    packages = [name for name in ("cuda.bindings", "cupy") if _importable(name)]
    told = ", ".join([*advertised, *packages]) or "nothing"
    missing = [name for name in ("cuda.bindings", "cupy") if name not in packages]
    if not answer.library or not answer.text.startswith("CUDA ") or answer.text.endswith("no device"):
        remedy = "install NVIDIA's driver, and in a container start it with the GPU (--gpus all)"
        return DeviceCheck("CUDA", told, answer.text, "missing", remedy)
    if missing:
        return DeviceCheck("CUDA", told, answer.text, "limited", f"{', '.join(missing)}: pip install 'uvas[cuda]'")
    tried, good = _try_cuda()
    remedy = "" if good else "see what the driver says; the other strategies may do (CudaDevice(strategy=...))"
    return DeviceCheck("CUDA", told, f"{answer.text}; {tried}", "good" if good else "limited", remedy)


def _try_cuda() -> tuple[str, bool]:
    """Let a CudaDevice see memory of a space, in a process of its own; return what became of it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY_CUDA], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired) as refusal:
        return f"not tried: {refusal}", False
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [how_it_ended(done.returncode)])[-1]
        return f"CudaDevice: {last[-_COMPLAINT:]}", False
    return f"CudaDevice {done.stdout.strip()}", True


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _check_gpu(name: str, driver: str, paths: tuple[str, ...] = (), module: str = "") -> DeviceCheck:
    """Look for device files, the driver's library and a Python module; let the driver answer."""
    answer = _ask(driver)
    advertised = [path for path in paths if Path(path).exists()]
    advertised += [answer.library] if answer.library else []
    advertised += [module] if module and importlib.util.find_spec(module) else []
    remedy = f"uvas has no {_GPUS[name]} yet; a device of your own will do (uvas.Device)"
    return DeviceCheck(name, ", ".join(advertised) or "nothing", answer.text, "missing", remedy)


def _ask(driver: str) -> drivers.Answer:
    """Ask a driver, in a process of its own."""
    library, _ = drivers.DRIVERS[driver]
    command = [sys.executable, "-I", drivers.__file__, driver]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return drivers.Answer(library, f"it did not answer within {_PATIENCE_S:.0f} s")
    except OSError as refusal:
        return drivers.Answer("", f"not tried, for lack of a process: {refusal}")
    if done.returncode:
        complaint = done.stderr.strip()[-_COMPLAINT:]
        return drivers.Answer(library, f"whoever asked it ended: {how_it_ended(done.returncode)}; {complaint}")
    return drivers.Answer(**json.loads(done.stdout.splitlines()[-1]))
