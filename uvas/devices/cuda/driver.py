"""The CUDA driver, through cuda.bindings, loaded at the first use.

Every call goes through `call`. It makes errors of the driver's numbers, and refuses to call where no call may be made:
in a process forked from the one that began to use the driver, and in an interpreter that is taking itself apart.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from types import ModuleType
from typing import Any

from uvas.errors import DeviceError, DeviceLostError, NotSupportedError, ReleasedError

__all__ = ["call", "enum", "make", "ordinals", "usable", "version"]

_STICKY = frozenset(
    {
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_CONTAINED",
        "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        "CUDA_ERROR_DEINITIALIZED",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_MPS_CLIENT_TERMINATED",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    }
)
"""After these every later call in the context answers the same, or there is no context any more (cuda.h, CUresult)."""

_HELP = "install NVIDIA's display driver, and in a container start it with the GPU (--gpus all)"
_HIDDEN = "check CUDA_VISIBLE_DEVICES and nvidia-smi"


@cache
def _module() -> ModuleType:
    """Load and start the driver, once.

    Raises
    ------
    NotSupportedError
        The Python package, the driver or a card is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NotSupportedError(
            "CUDA", f"cuda.bindings is not installed ({error})", "pip install 'uvas[cuda]'"
        ) from None
    _Process.first = os.getpid()
    try:
        (result,) = driver.cuInit(0)
    except RuntimeError as error:  # DynamicLibNotFoundError: there is no libcuda
        raise NotSupportedError("CUDA", f"there is no driver ({error})", _HELP) from None
    if int(result):
        remedy = _HIDDEN if result.name == "CUDA_ERROR_NO_DEVICE" else _HELP
        raise NotSupportedError("CUDA", f"the driver does not start: cuInit answered {result.name}", remedy)
    loaded: ModuleType = driver
    return loaded


class _Process:
    """The process that began to use the driver: a driver's state is not inherited."""

    first: int | None = None


def forget() -> None:
    """Begin anew, as if the driver had never been asked. For tests."""
    _module.cache_clear()
    _Process.first = None


def usable() -> bool:
    """Whether calls may be made: not in a forked child, not at the interpreter's end."""
    return _Process.first in (None, os.getpid()) and not sys.is_finalizing()


def call(name: str, *arguments: Any, device: str = "the CUDA driver") -> Any:
    """Call a function of the driver and return what it returns besides its answer: nothing, a value or a tuple.

    Raises
    ------
    DeviceLostError
        The device's context is gone.
    DeviceError
        The driver answered anything but success.
    NotSupportedError
        There is no driver, or it is older than this function.
    ReleasedError
        This process was forked from the one that uses the driver, or is at its end.
    """
    if not usable():
        forked = _Process.first not in (None, os.getpid())
        where = "in a process forked from the one that uses the driver" if forked else "at the interpreter's end"
        raise ReleasedError(f"{name} is not called {where}: CUDA devices are dead here")
    function = getattr(_module(), name)
    try:
        result, *values = function(*arguments)
    except RuntimeError as error:  # FunctionNotFoundError: the bindings know more than the driver
        raise NotSupportedError(f"{name} of {device}", str(error), "install a newer driver") from error
    if int(result):
        kind = DeviceLostError if result.name in _STICKY else DeviceError
        raise kind(name, int(result), result.name, device)
    return values[0] if len(values) == 1 else tuple(values) or None


def enum(kind: str, member: str) -> Any:
    """Return a constant of the driver's; None where this version has none."""
    return getattr(getattr(_module(), kind), member, None)


def make(kind: str) -> Any:
    """Return a new, empty structure of the driver's."""
    return getattr(_module(), kind)()


def version() -> int:
    """Return the driver's version as it counts: 13010 is 13.1."""
    return int(call("cuDriverGetVersion"))


def ordinals() -> range:
    """Return the numbers of the cards that this process may use.

    Raises
    ------
    NotSupportedError
        There is none.
    """
    count = int(call("cuDeviceGetCount"))
    if not count:
        raise NotSupportedError("CUDA", "the driver knows no card", _HIDDEN)
    return range(count)
