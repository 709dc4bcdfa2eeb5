"""What travels between a host and a worker: arrays by address, everything else by pickle.

An array whose bytes lie wholly in committed memory of a range that both sides hold is sent as its address, shape,
strides and dtype. The other side makes an array over the same address, so nothing is copied and pointers stored in it
stay true. Any other array is refused: a copy that nobody asked for would part the two sides without a word; `by_value`
asks for it.

Both ends use this module: the memory is found through the core's registry, which each process has of its own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Container
from typing import Any, Generic, TypeVar

import numpy as np

from uvas._core import fast, ffi, lib
from uvas.errors import failure

__all__ = ["ByValue", "Lease", "by_value", "dumps"]

_Array = TypeVar("_Array", bound="np.ndarray[Any, Any]")


class ByValue(Generic[_Array]):
    """An array that is to be copied to the other side, where it arrives as a plain array. Made by `by_value`."""

    __slots__ = ("array",)

    def __init__(self, array: _Array) -> None:
        self.array = array

    def __repr__(self) -> str:
        return f"by_value({self.array!r})"


def by_value(array: _Array) -> ByValue[_Array]:
    """Let an array travel to a device, or back from one, as a copy.

    Parameters
    ----------
    array
        Any array, wherever it lies.

    Returns
    -------
    ByValue
        To be used as an argument of `ProcessDevice.submit`, or returned by a function that runs there. The other side
        gets a plain array.

    Raises
    ------
    TypeError
        It is no NumPy array: everything else is copied anyway.

    Examples
    --------
    >>> by_value(np.arange(3))
    by_value(array([0, 1, 2]))
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"by_value is for NumPy arrays; {type(array).__name__} travels by value anyway")
    return ByValue(array)


class Lease:
    """Keeps committed memory from being released as long as it lives: the base of an array over it.

    Parameters
    ----------
    address, size
        Bytes that lie in one reservation, all of them committed.

    Raises
    ------
    ValueError
        They do not.
    ReleasedError
        The reservation is being released.
    """

    __slots__ = ("__array_interface__", "__weakref__", "_id")

    def __init__(self, address: int, size: int) -> None:
        self._id = ffi.new("uvas_id *")
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, False)}
        found = _find(address)
        if found is None:
            raise ValueError(f"[{address:#x}, {address + size:#x}) lies in no reservation")
        code = lib.uvas_lease(found.id, address - found.base, size, self._id)
        if code < 0:
            raise failure(code)

    def __del__(self, _unlease: Callable[[int], int] = fast.unlease) -> None:
        if self._id[0]:
            _unlease(self._id[0])


def _find(address: int) -> Any:
    """Return the core's word on the reservation that holds an address, None if there is none."""
    found = ffi.new("struct uvas_found *")
    if lib.uvas_find(address, found) < 0 or found.kind != lib.UVAS_RESERVATION:
        return None
    return found


# ---- sending ---------------------------------------------------------------------------------------------------------


def dumps(message: object, shared: Container[int], party: str) -> tuple[bytes, list[Lease]]:
    """Pickle a message whose arrays travel by address.

    Parameters
    ----------
    message
        What to send.
    shared
        The bases of the ranges that both sides hold.
    party
        The device's name, for messages.

    Returns
    -------
    bytes, list of Lease
        The message, and what keeps the memory of its arrays while it is on its way.

    Raises
    ------
    TypeError
        An array in it lies elsewhere, or its elements are references. Or, as `pickle` has it, something else in it
        cannot be pickled.
    """
    leases: list[Lease] = []
    file = io.BytesIO()
    _Pickler(file, shared, party, leases).dump(message)
    return file.getvalue(), leases


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Container[int], party: str, leases: list[Lease]) -> None:
        super().__init__(file, protocol=5)
        self._shared = shared
        self._party = party
        self._leases = leases

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is np.ndarray:
            return self._reduce(obj)
        if kind is ByValue:
            return obj.array.__reduce_ex__(5)
        if isinstance(obj, np.ndarray):
            raise TypeError(
                f"{_described(obj)} is a {kind.__module__}.{kind.__qualname__}, which is not sent to {self._party} by "
                f"address: send array.view(numpy.ndarray), or wrap it in uvas.by_value to copy it"
            )
        return NotImplemented

    def _reduce(self, array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        if array.dtype.hasobject:
            raise TypeError(f"{_described(array)} holds references, which mean nothing to {self._party}")
        low, size = _extent(array)
        if size == 0:  # no bytes to share
            return np.ndarray, (array.shape, array.dtype)
        self._leases.append(self._lease(array, low, size))
        offset = _address(array) - low
        return _rebuild, (low, size, offset, array.shape, array.strides, array.dtype, array.flags.writeable)

    def _lease(self, array: np.ndarray[Any, Any], low: int, size: int) -> Lease:
        found = _find(low)
        if found is not None and found.base in self._shared:
            try:
                return Lease(low, size)
            except ValueError as error:
                why = str(error)
        else:
            why = f"it does not lie in memory that {self._party} shares"
        raise TypeError(
            f"{_described(array)} cannot be sent to or from {self._party}: {why}; "
            f"allocate it with reservation.numpy, or wrap it in uvas.by_value to copy it"
        )


def _described(array: np.ndarray[Any, Any]) -> str:
    return f"the array of shape {array.shape} and dtype {array.dtype} at {_address(array):#x}"


def _address(array: np.ndarray[Any, Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the lowest address of an array's elements and the bytes from there to the end of its highest one."""
    if array.size == 0 or array.itemsize == 0:
        return 0, 0
    spans = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    below = sum(span for span in spans if span < 0)
    above = sum(span for span in spans if span > 0)
    return _address(array) + below, above - below + array.itemsize


# ---- receiving -------------------------------------------------------------------------------------------------------


def _rebuild(
    low: int,
    size: int,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    writeable: bool,
) -> np.ndarray[Any, Any]:
    """Make an array over this process's side of shared memory; it holds a lease there."""
    memory = np.asarray(Lease(low, size))
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=memory, offset=offset, strides=strides)
    array.flags.writeable = writeable
    return array
