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
from collections.abc import Container
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from uvas._core import fast
from uvas._core._allocation import Hold
from uvas.leases import find

__all__ = [
    "ByValue",
    "Bytes",
    "address_of",
    "by_value",
    "described",
    "dumps",
    "extent",
    "extent_of",
    "keeper_of",
    "memory_at",
]

_sent: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""What keeps a block of an arena, by its base, for blocks of which something was sent: an array over such a block may
come back, and then holds the same."""

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
        Any array, wherever it lies. One of a subclass arrives as a plain array too.

    Returns
    -------
    ByValue
        To be used as an argument of `ProcessDevice.submit`, or returned by a function that runs there. The other side
        gets a plain array.

    Raises
    ------
    TypeError
        It is no NumPy array: everything else is copied anyway. Or it is one of those with more than its elements (a
        masked array, say), which would be lost.

    Examples
    --------
    >>> by_value(np.arange(3))
    by_value(array([0, 1, 2]))
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"by_value is for NumPy arrays; {type(array).__name__} travels by value anyway")
    if type(array).__reduce__ is not np.ndarray.__reduce__:
        raise TypeError(f"a {type(array).__name__} has more than its elements, which would be lost: send its parts")
    return ByValue(array)


class Bytes:
    """The base of an array over memory that something else keeps."""

    __slots__ = ("__array_interface__", "keeper")

    def __init__(self, address: int, size: int, keeper: object) -> None:
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, False)}
        self.keeper = keeper


def memory_at(address: int, size: int) -> np.ndarray[Any, Any]:
    """Return bytes of a reservation as an array, which keeps them from being released or, in an arena, freed.

    Raises
    ------
    ValueError
        They do not lie in one reservation, or not all of them are committed and readable. Or they lie in a block of an
        arena that nobody has sent or that has been freed since.
    ReleasedError
        The reservation is being released, or was left by ``with``.
    """
    block = fast.find_allocation(address)
    if block is not None:
        return _memory_of_block(address, size, block[0], block[1])
    held = find(address)
    over = getattr(held, "numpy", None)  # an adoption has none
    if held is None or over is None:
        raise ValueError(f"[{address:#x}, {address + size:#x}) lies in no reservation")
    memory: np.ndarray[Any, Any] = over("u1", size, offset=address - held.base)
    return memory


def _memory_of_block(address: int, size: int, base: int, block_size: int) -> np.ndarray[Any, Any]:
    keeper = _sent.get(base)
    if keeper is None or address + size > base + block_size:
        raise ValueError(f"[{address:#x}, {address + size:#x}) lies in no allocation that was sent and lives")
    if isinstance(keeper, np.ndarray):
        low, length = extent(keeper)
        if not (low <= address and address + size <= low + length):  # resized, and elsewhere now
            raise ValueError(f"[{address:#x}, {address + size:#x}) lies no more in the array that was sent")
        return np.asarray(Bytes(address, size, keeper))
    return np.asarray(Hold(keeper, address - base, size))


def keeper_of(array: np.ndarray[Any, Any]) -> Any:
    """Return what lives as long as any array over an array's memory: its allocation, or the array that owns it."""
    base: Any = array
    while isinstance(base, np.ndarray):
        array, base = base, base.base
    return base.allocation if isinstance(base, Hold) else base.keeper if isinstance(base, Bytes) else array


# ---- sending ---------------------------------------------------------------------------------------------------------


def dumps(message: object, shared: Container[int], party: str) -> tuple[bytes, list[object]]:
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
    bytes, list
        The message, and what keeps the memory of its arrays while it is on its way.

    Raises
    ------
    TypeError
        An array in it lies elsewhere, or its elements are references. Or, as `pickle` has it, something else in it
        cannot be pickled.
    """
    held: list[object] = []
    file = io.BytesIO()
    _Pickler(file, shared, party, held).dump(message)
    return file.getvalue(), held


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Container[int], party: str, held: list[object]) -> None:
        super().__init__(file, protocol=5)
        self._shared = shared
        self._party = party
        self._held = held

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is np.ndarray:
            return self._reduce(obj)
        if kind is ByValue:
            return np.asarray(obj.array).__reduce_ex__(5)
        if isinstance(obj, np.ndarray):
            raise TypeError(
                f"{described(obj)} is a {kind.__module__}.{kind.__qualname__}, which does not travel by address: "
                f"send array.view(numpy.ndarray), or wrap it in uvas.by_value to copy it"
            )
        return NotImplemented

    def _reduce(self, array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        if array.dtype.hasobject or array.dtype.kind == "T":
            raise TypeError(f"{described(array)} holds references, which mean nothing in another process")
        low, size = extent(array)
        if size == 0:  # no bytes to share
            return np.ndarray, (array.shape, array.dtype)
        self._held.append(self._shared_memory(array, low, size))
        offset = address_of(array) - low
        return _rebuild, (low, size, offset, array.shape, array.strides, array.dtype, array.flags.writeable)

    def _shared_memory(self, array: np.ndarray[Any, Any], low: int, size: int) -> np.ndarray[Any, Any]:
        """Return what keeps an array's memory while it is on its way: the array itself, or a lease."""
        held = find(low)
        why = f"does not lie in memory that {self._party} shares"
        if held is not None and held.base in self._shared:
            block = fast.find_allocation(low)
            if block is not None:
                _sent[block[0]] = keeper_of(array)
                return array
            try:
                return memory_at(low, size)
            except ValueError as error:
                why = f"does not lie in committed memory: {error}"
        raise TypeError(
            f"{described(array)} {why}; allocate it with reservation.numpy or in an arena of the device's space, "
            f"or wrap it in uvas.by_value to copy it"
        )


def described(array: np.ndarray[Any, Any]) -> str:
    """Say which array it is, for messages."""
    return f"the array of shape {array.shape} and dtype {array.dtype} at {address_of(array):#x}"


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the lowest address of an array's elements and the bytes from there to the end of its highest one."""
    if array.nbytes == 0:
        return 0, 0
    if array.flags.c_contiguous:
        return address_of(array), array.nbytes
    return extent_of(address_of(array), array.shape, array.strides, array.itemsize)


def extent_of(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the same for an array that is told by its parts."""
    if 0 in shape:
        return 0, 0
    spans = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    below = sum(span for span in spans if span < 0)
    above = sum(span for span in spans if span > 0)
    return address + below, above - below + itemsize


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
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=memory_at(low, size), offset=offset, strides=strides)
    if not writeable:
        array.flags.writeable = False
    return array
