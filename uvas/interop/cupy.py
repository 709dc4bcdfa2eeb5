"""NumPy arrays and CuPy arrays over the same bytes, and the order between host and streams."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from uvas import ordered
from uvas._core import fast
from uvas._core._allocation import Allocation
from uvas.devices.transport import Bytes, address_of, extent, extent_of, keeper_of
from uvas.interop.view import card_of, cupy_module, cupy_view
from uvas.leases import find

__all__ = ["HostAccess", "ascupy", "asnumpy", "host_access"]


def ascupy(array: npt.NDArray[Any]) -> Any:
    """Return a CuPy array over the very bytes of a NumPy array; never a copy.

    Both have the same address, and pointers stored in them mean the same to a kernel. The memory stays as long as one
    of the two lives, and in an arena until the stream that is current now has run what was queued by then.

    Parameters
    ----------
    array
        In memory of a space with a `CudaDevice`.

    Returns
    -------
    cupy.ndarray
        Of the same shape, strides and type.

    Raises
    ------
    ValueError
        Only a copy would do: it lies elsewhere, or is read-only, which CuPy's arrays cannot be.
    TypeError
        It is no NumPy array.
    NotSupportedError
        CuPy is not installed.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"ascupy is for NumPy arrays, not {type(array).__name__}")
    what = f"the array of shape {array.shape} at {address_of(array):#x}"
    if not array.flags.writeable:
        raise ValueError(f"{what} is read-only, which a CuPy array cannot be: copy it by cupy.asarray")
    low, size = extent(array)
    low = low if size else address_of(array)
    bounds, held = fast.held(low), find(low)
    if held is None or bounds is None or low + size > bounds[0] + bounds[1]:
        raise ValueError(f"{what} lies in no unified memory: allocate it there, or copy it by cupy.asarray")
    card = card_of(held.space.devices, what)
    return cupy_view(low, size, address_of(array), array.dtype, array.shape, array.strides, _in_order(array, low), card)


def _in_order(array: npt.NDArray[Any], low: int) -> object:
    """Return what keeps an array, with its memory given back only after the stream that is current now.

    Reservations need none of this: they are not released before cards have stopped.
    """
    found = fast.find_allocation(low)
    if found is None:
        return array
    block = keeper_of(array)
    if isinstance(block, Allocation):
        ordered.use(block, block._core)
        return array
    return ordered.keep(array, low, found[2])  # of NumPy's own, which is freed in C


def asnumpy(array: Any) -> npt.NDArray[Any]:
    """Return a NumPy array over the very bytes of a CuPy array, after what the current stream does; never a copy.

    Kernels that are launched later may write there while the host reads: `host_access` is for that.

    Parameters
    ----------
    array
        A ``cupy.ndarray`` in memory of a space, wherever it was made.

    Raises
    ------
    ValueError
        Only a copy would do: it lies elsewhere, or on a card, where the host has no access.
    TypeError
        It is no CuPy array.
    DeviceError, cupy.cuda.runtime.CUDARuntimeError
        The stream is being captured, or has failed.
    """
    return _over(array, None)


def _over(array: Any, stream: Any) -> npt.NDArray[Any]:
    cupy = cupy_module()
    if not isinstance(array, cupy.ndarray):
        raise TypeError(f"a CuPy array is wanted, not {type(array).__name__}")
    address, shape, strides, dtype = int(array.data.ptr), array.shape, array.strides, array.dtype
    low, size = extent_of(address, shape, strides, dtype.itemsize)
    low = low if size else address
    held = find(low)
    what = f"the CuPy array of shape {shape} at {address:#x}"
    if held is None or low + size > held.end:
        raise ValueError(f"{what} lies in no unified memory: copy it by cupy.asnumpy")
    if size:
        held.space.check_reach(held.range.__class__(low, size))
    (cupy.cuda.get_current_stream() if stream is None else stream).synchronize()
    memory = np.asarray(Bytes(low, size, array))
    return np.ndarray(shape, dtype, buffer=memory, offset=address - low, strides=strides)


class HostAccess:
    """A ``with`` block in which the host may touch what kernels have written. Made by `host_access`."""

    __slots__ = ("_array", "_stream")

    def __init__(self, array: Any, stream: Any) -> None:
        self._array = array
        self._stream = stream

    def __enter__(self) -> npt.NDArray[Any]:
        """Wait for the stream, and return the array as NumPy has it."""
        if not isinstance(self._array, np.ndarray):
            return _over(self._array, self._stream)
        stream = cupy_module().cuda.get_current_stream() if self._stream is None else self._stream
        stream.synchronize()
        return self._array

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it: kernels that are launched from here on see what the host wrote."""


def host_access(array: Any, *, stream: Any = None) -> HostAccess:
    """Return a context manager that waits for a stream before the host reads or writes.

    ``with uvas.host_access(array, stream=stream) as seen:`` gives the bytes as a NumPy array. Kernels that are launched
    after the block see what the host wrote in it; launch none on this memory inside.

    Parameters
    ----------
    array
        A CuPy or NumPy array in memory that host and card share.
    stream
        The stream whose kernels use it; None: CuPy's current one.

    Raises
    ------
    ValueError, TypeError
        As of `asnumpy`, at the beginning of the block.
    """
    return HostAccess(array, stream)
