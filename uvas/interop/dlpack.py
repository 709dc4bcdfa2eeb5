"""Arrays for other libraries by DLPack, with the device type that their memory has.

NumPy makes the capsule, for a CPU; its device field is then set to what the memory is besides.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from uvas.devices.transport import address_of, extent
from uvas.interop.view import card_of
from uvas.leases import find

__all__ = ["DLPack", "dlpack"]

_CPU, _CUDA_HOST, _CUDA_MANAGED = 1, 3, 13  # DLDeviceType of dlpack.h
_TYPES = {"hmm": _CUDA_MANAGED, "register": _CUDA_HOST, "vmm": _CUDA_HOST}
_TENSOR = {b"dltensor": 0, b"dltensor_versioned": 32}
"""Where the DLTensor begins in what a capsule of that name holds."""
_DEVICE = 8  # of DLTensor.device, after the pointer to the data

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]


class DLPack:
    """What ``from_dlpack`` of other libraries takes. Made by `dlpack`."""

    __slots__ = ("_array", "_device")

    def __init__(self, array: npt.NDArray[Any], device: tuple[int, int]) -> None:
        self._array = array
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the device type and the number of the card."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return the capsule; nothing is copied.

        Raises
        ------
        BufferError
            A copy or another device was asked for, or the array is read-only.
        """
        del stream  # the host has written: whatever runs later sees it
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError(f"the memory of this array is {self._device}, and it is not copied")
        capsule = self._array.__dlpack__(max_version=max_version)
        name = _name(capsule)
        at = _pointer(capsule, name) + _TENSOR[name] + _DEVICE
        (ctypes.c_int32 * 2).from_address(at)[:] = [*self._device]
        return capsule


def dlpack(array: npt.NDArray[Any], device: Literal["cpu", "cuda"] = "cpu") -> DLPack:
    """Return an array for another library's ``from_dlpack``, as memory of the CPU's or of CUDA's.

    Parameters
    ----------
    array
        In unified memory; the memory stays as long as what the other library makes of it.
    device
        "cpu", which every library takes. "cuda": by the strategy of the space's `CudaDevice`, CUDAManaged for ``hmm``,
        CUDAHost for ``register`` and ``vmm``. Memory on a card travels as CuPy's own array.

    Raises
    ------
    ValueError
        There is no such device, or no CUDA device shares the memory.
    TypeError
        It is no NumPy array.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"dlpack is for NumPy arrays, not {type(array).__name__}")
    if device == "cpu":
        return DLPack(array, (_CPU, 0))
    if device != "cuda":
        raise ValueError(f"{device!r} is neither 'cpu' nor 'cuda'")
    low, size = extent(array)
    held = find(low if size else address_of(array))
    devices = held.space.devices if held is not None else ()
    card = card_of(devices, f"the array of shape {array.shape} at {address_of(array):#x}")
    strategy = next(one.info.details["strategy"] for one in devices if one.info.details.get("index") == card)
    kind = _TYPES[str(strategy)]
    return DLPack(array, (kind, card if kind == _CUDA_MANAGED else 0))
