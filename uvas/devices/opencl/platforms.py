"""What OpenCL is there: pyopencl, its platforms, their devices, and which of them follow the host's pointers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from uvas.devices.launch import how_it_ended
from uvas.devices.opencl import probe
from uvas.errors import DeviceError, NotSupportedError

__all__ = ["ask", "choose", "load", "translated"]

INSTALL = "pip install 'uvas[opencl]'; for this machine's CPUs also pocl-binary-distribution"
_PATIENCE_S = 30.0  # with a driver that is asked in a process of its own
_COMPLAINT = 200  # characters
_POCL = "Portable Computing Language"
_SYSTEM = "fine_grain_system"


def load() -> Any:
    """Import pyopencl and return it.

    Raises
    ------
    NotSupportedError
        It is not installed, or finds no OpenCL.
    """
    try:
        import pyopencl
    except ImportError as error:
        raise NotSupportedError("OpenCLDevice", f"pyopencl cannot be imported ({error})", INSTALL) from None
    return pyopencl


def choose(cl: Any, wanted: Any | None) -> Any:
    """Return a device that follows the host's pointers: the one that is wanted, or the first there is.

    Raises
    ------
    NotSupportedError
        It does not, or none does; the message has the reason of each.
    """
    candidates = [wanted] if wanted is not None else _all(cl)
    refusals = []
    for device in candidates:
        why = why_not(cl, device)
        if not why:
            return device
        refusals.append(f"{device.name.strip()}: {why}")
    if not refusals:
        raise NotSupportedError("OpenCLDevice", "there is no OpenCL platform with a device", f"install one: {INSTALL}")
    remedy = "take another device, a newer driver, or PoCL (pocl-binary-distribution), which runs on any CPU"
    raise NotSupportedError("OpenCLDevice", f"no system SVM: {'; '.join(refusals)}", remedy)


def _all(cl: Any) -> list[Any]:
    try:
        return [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except cl.Error:  # PLATFORM_NOT_FOUND_KHR is how the loader says "none"
        return []


def why_not(cl: Any, device: Any) -> str:
    """Return why a device does not follow the host's pointers; nothing: it does, which was tried.

    Where that might end the process it is tried in another one: elsewhere than on CPUs under PoCL, and on devices that
    promise it.
    """
    ours = device.platform.name == _POCL and device.type & cl.device_type.CPU
    try:
        if ours or _SYSTEM in probe.advertised_by(cl, device):
            return probe.try_out(cl, device)
        places = _places(cl, device)
    except cl.Error as error:
        return str(error)
    return _answer(places, device.driver_version)


def _places(cl: Any, device: Any) -> tuple[int, int]:
    platforms = cl.get_platforms()
    i = platforms.index(device.platform)
    return i, platforms[i].get_devices().index(device)


@cache
def _answer(places: tuple[int, int], driver: str) -> str:
    """Ask once for each device and driver: it takes a new process."""
    del driver
    return str(ask(*places).get("why_not", "it did not say"))


def ask(*places: int) -> dict[str, Any]:
    """Ask in a process of its own; see `probe`. Without places: for all devices and what they advertise.

    Returns
    -------
    dict
        "devices", or "why_not", which is empty if it does.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", probe.__file__, *map(str, places)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return {"why_not": f"it did not answer within {_PATIENCE_S:.0f} s"}
    except OSError as refusal:
        return {"why_not": f"not tried, for lack of a process: {refusal}"}
    if done.returncode or not done.stdout.strip():
        complaint = done.stderr.strip()[-_COMPLAINT:]
        return {"why_not": f"whoever asked it ended: {how_it_ended(done.returncode)}; {complaint}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def translated(cl: Any, error: Any, party: str) -> DeviceError:
    """Return OpenCL's error as uvas's."""
    try:
        name = cl.status_code.to_string(error.code)
    except ValueError:
        name = "unknown"
    return DeviceError(error.routine, error.code, name, party)
