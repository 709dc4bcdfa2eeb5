"""Each kind of device: what the machine shows of it, and what answered when it was tried."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from uvas import AddressInUseError, AddressSpace, NotSupportedError, ProcessDevice
from uvas.devices.launch import how_it_ended
from uvas.devices.opencl import platforms
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
_PRIVATE = "private memory"
"""What `check_private` is called beside ProcessDevice, whose memory is shared."""
_GPUS = {"HIP": "HipDevice"}
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
        check_private(),
        check_cuda(),
        _check_gpu("HIP", "hip", ("/dev/kfd",)),
        check_opencl(),
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


def _add_one_to_each(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    """Write, in the worker, into memory that moves there."""
    words += 1


def check_private() -> DeviceCheck:
    """Let a worker with memory of its own write, and see the pages move there and come back when they are touched."""
    advertised = "userfaultfd: see above"
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of faults of code only: the kernel's part says so
            worker = ProcessDevice(name="doctor", memory="private")
        with worker as device, AddressSpace([device], name="doctor") as space, space.reserve(_SIZE) as held:
            held.commit()
            words = held.numpy(np.uint64)
            words[:] = 41
            device.run(_add_one_to_each, words)
            there = space.movement().devices["doctor"].bytes_in
            right = bool((words == 42).all()) and there >= _SIZE
            back = space.movement().host.bytes_in
            probed = f"{format_size(there)} moved to process {device.pid} on touch, {format_size(back)} came back"
            del words
    except NotSupportedError as refusal:
        remedy = refusal.remedy or 'see userfaultfd above; memory="shared" works'
        return DeviceCheck(_PRIVATE, advertised, refusal.reason, "missing", remedy)
    except (OSError, MemoryError, RuntimeError) as refusal:
        remedy = "allow processes and descriptors (ulimit -u, ulimit -n), and see the limits"
        return DeviceCheck(_PRIVATE, advertised, f"{refusal}", "missing", remedy)
    if not right:
        return DeviceCheck(_PRIVATE, advertised, "the memory did not move, or not whole", "missing", "report it")
    return DeviceCheck(_PRIVATE, advertised, f"{probed}, in {time.monotonic() - began:.2f} s", "good", "")


def check_opencl() -> DeviceCheck:
    """Let each OpenCL device say what it shares with the host, and try whether it follows the host's pointers."""
    if not importlib.util.find_spec("pyopencl"):
        answer = _ask("opencl")
        shown = f"{answer.library}: {answer.text}" if answer.library else "nothing"
        return DeviceCheck("OpenCL", shown, "not tried: there is no pyopencl", "missing", platforms.INSTALL)
    survey = platforms.ask()
    devices = survey.get("devices", [])
    if not devices:
        why = survey.get("why_not", "no platform has a device")
        return DeviceCheck("OpenCL", "pyopencl", why, "missing", platforms.INSTALL)
    advertised, probed, good = [], [], False
    for one in devices:
        what = f"{one['device']} ({one['platform']}, {one['driver']})"
        advertised.append(f"{what}: {', '.join(one['advertised']) or 'no shared virtual memory'}")
        why_not = platforms.ask(*one["places"])["why_not"]
        probed.append(f"{one['device']}: {why_not or 'its kernels follow the pointers of the host'}")
        good = good or not why_not
    remedy = "" if good else "another device, a newer driver, or pocl-binary-distribution, which runs on any CPU"
    return DeviceCheck("OpenCL", "; ".join(advertised), "; ".join(probed), "good" if good else "missing", remedy)


def _check_gpu(name: str, driver: str, paths: tuple[str, ...]) -> DeviceCheck:
    """Look for device files and the driver's library; let the driver answer."""
    answer = _ask(driver)
    advertised = [path for path in paths if Path(path).exists()]
    advertised += [answer.library] if answer.library else []
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
