"""Arrays in unified memory, made by NumPy's own functions.

`empty`, `zeros`, `ones`, `full`, `array`, `empty_like` and `zeros_like` are NumPy's functions, called while NumPy
allocates from an arena: signatures, results and errors are NumPy's. What NumPy makes later from such an array lies
where NumPy puts it: ``2 * x + 1`` is in unified memory only inside ``with uvas.numpy_allocator():``.

The arena and its space are made at the first use, as `configure` says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from uvas._core import fast, handler
from uvas.arena import Arena, Pages
from uvas.devices.base import Device
from uvas.devices.transport import address_of, extent
from uvas.numpy_memory import NumpyAllocator
from uvas.space import AddressSpace

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Configuration:
    devices: tuple[Device, ...] = ()
    limit: int | None = None
    name: str = "uvas"
    pages: Pages = "any"
    node: int | None = None
    idle: float | None = None
    exhausted: Callable[[int], bool] | None = None


class _Default:
    """The arena of those who name none, made once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.configuration = _Configuration()
        self.arena: Arena | None = None
        self.capsule: object = None
        self.inherited: list[Arena] = []
        self.functions: list[handler.Under] = []

    def get(self) -> Arena:
        with self.lock:
            if self.arena is None:
                chosen = self.configuration
                space = AddressSpace(chosen.devices, name=chosen.name)
                try:
                    self.arena = Arena(
                        space,
                        limit=chosen.limit,
                        name="default",
                        pages=chosen.pages,
                        node=chosen.node,
                        idle=chosen.idle,
                        exhausted=chosen.exhausted,
                    )
                except BaseException:
                    space.close()
                    raise
                self.capsule = handler.make(self.arena._core, self.arena._core.id, self.arena._limit)
            return self.arena

    def memory(self) -> object:
        """Return what NumPy allocates with."""
        self.get()
        return self.capsule

    def begin_anew(self) -> None:
        """Begin as a forked child: with a lock that nobody holds, without the parent's arena and devices."""
        self.lock = threading.Lock()
        if self.arena is not None:
            self.inherited.append(self.arena)  # arrays of the parent's may ask for it
        self.arena = self.capsule = None
        self.configuration = replace(self.configuration, devices=())
        for function in self.functions:
            function.begin_anew()


_default = _Default()
os.register_at_fork(after_in_child=_default.begin_anew)


def configure(
    *,
    devices: Iterable[Device] = (),
    limit: int | None = None,
    name: str = "uvas",
    pages: Pages = "any",
    node: int | None = None,
    idle: float | None = None,
    exhausted: Callable[[int], bool] | None = None,
) -> None:
    """Say how the default space and arena shall be, before anything uses them.

    Parameters
    ----------
    devices
        The parties that the addresses shall mean the same to. Who made a device closes it; the default space lives to
        the end of the process.
    limit, pages, node, idle, exhausted
        As of `Arena`.
    name
        Of the space, as in ``/proc/PID/maps``.

    Raises
    ------
    RuntimeError
        The default space is in use already: the call comes too late.
    """
    with _default.lock:
        if _default.arena is not None:
            raise RuntimeError(
                f"{_default.arena!r} is in use already: call uvas.configure before the first array, or make an Arena"
            )
        _default.configuration = _Configuration(tuple(devices), limit, name, pages, node, idle, exhausted)


def default_arena() -> Arena:
    """Return the arena that `empty` and the others allocate from; made at the first use, as `configure` said.

    Raises
    ------
    ValueError, NotSupportedError, LimitReachedError, AddressSpaceExhaustedError
        What `configure` said cannot be; as `AddressSpace` and `Arena`. The next use tries again.
    """
    return _default.get()


def numpy_allocator(arena: Arena | None = None) -> NumpyAllocator:
    """Return what lets NumPy allocate every array from an arena.

    As a context manager for a block of code, by ``install()`` and ``uninstall()`` from one place to another, or around
    a function by ``bind(function)``. Blocks may be nested. Arrays may outlive the block, and keep the arena.

    It holds in the current context (`contextvars`): a new thread begins with NumPy's own allocator.
    `NumpyAllocator.bind` and ``initializer=`` of an executor carry it there.

    In a forked child arrays of the parent stay usable, freeing them does nothing, and new arrays lie in an arena of the
    child's own, with the same limit; the default arena there is a new one, without the parent's devices. `configure`
    may give it others, before its first use there.

    Parameters
    ----------
    arena
        Whose memory; None: the default one. Where it is exhausted, NumPy raises its `MemoryError`.

    Raises
    ------
    TypeError
        It is no arena.

    Examples
    --------
    >>> import uvas
    >>> with uvas.numpy_allocator():
    ...     total = 2 * np.arange(1000) + 1
    >>> uvas.is_unified(total), uvas.is_unified(total + 1)
    (True, False)
    """
    if arena is not None and not isinstance(arena, Arena):
        raise TypeError(f"NumPy allocates from an Arena, not from {arena!r}")
    return NumpyAllocator(default_arena if arena is None else arena)


def is_unified(array: npt.NDArray[Any]) -> bool:
    """Return whether all of an array's bytes lie in one reservation, where they mean the same to every device of it.

    Raises
    ------
    TypeError
        It is no NumPy array.

    Examples
    --------
    >>> import uvas
    >>> is_unified(uvas.zeros(3)), is_unified(np.zeros(3))
    (True, False)
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"is_unified is for NumPy arrays, not {type(array).__name__}")
    low, size = extent(array)
    held = fast.held(low if size else address_of(array))
    return held is not None and low + size <= held[0] + held[1]


# ---- NumPy's functions -----------------------------------------------------------------------------------------------


def _in_unified_memory(function: _F, summary: str) -> _F:
    made: Any = handler.Under(function, _default.memory, function in (np.empty, np.zeros))
    _default.functions.append(made)
    made.__name__ = made.__qualname__ = function.__name__
    made.__module__ = __name__
    made.__doc__ = f"{summary}\n\n    Exactly as `numpy.{function.__name__}`, whose parameters and errors it has.\n    "
    made.__wrapped__ = function
    result: _F = made
    return result


empty = _in_unified_memory(np.empty, "Return an array in unified memory, without setting its elements.")
zeros = _in_unified_memory(np.zeros, "Return an array of zeros in unified memory.")
ones = _in_unified_memory(np.ones, "Return an array of ones in unified memory.")
full = _in_unified_memory(np.full, "Return an array of one value in unified memory.")
array = _in_unified_memory(np.array, "Return a new array in unified memory with what an object holds.")
empty_like = _in_unified_memory(np.empty_like, "Return an array like another, in unified memory, elements not set.")
zeros_like = _in_unified_memory(np.zeros_like, "Return an array of zeros like another, in unified memory.")
_asarray = _in_unified_memory(np.asarray, "Return an array.")


def asarray(
    a: Any,
    dtype: npt.DTypeLike | None = None,
    order: Literal["K", "A", "C", "F"] | None = None,
    *,
    device: Literal["cpu"] | None = None,
    copy: bool | None = None,
    like: Any = None,
) -> npt.NDArray[Any]:
    """Return an array in unified memory with what an object holds: the very array if it lies there, else a copy.

    Parameters
    ----------
    a
        An array or what `numpy.asarray` makes one of. One that lies elsewhere is copied: that is what this is for, and
        nothing else in uvas copies.
    dtype, order, device, like
        As of `numpy.asarray`. What is like an array of another library is that library's, and lies where it puts it.
    copy
        None: only if it has to. True: always. False: never.

    Raises
    ------
    ValueError
        With ``copy=False``: it would have to be copied. Or what `numpy.asarray` raises.

    Examples
    --------
    >>> here = asarray([1, 2, 3])
    >>> asarray(here) is here
    True
    """
    result: npt.NDArray[Any] = _asarray(a, dtype, order, device=device, copy=copy, like=like)
    if not isinstance(result, np.ndarray) or is_unified(result):
        return result
    if copy is False:
        raise ValueError(f"an array of shape {result.shape} at {address_of(result):#x} lies in no unified memory")
    copied: npt.NDArray[Any] = array(result, order="K" if order is None else order)
    return copied
