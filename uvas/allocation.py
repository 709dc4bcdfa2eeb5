"""Blocks of an arena as Python objects. Their memory, and what speed asks for, is ``_core/allocation``'s."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from uvas import ordered
from uvas._core import allocation as core
from uvas._core._allocation import Allocation as Allocation
from uvas.arguments import as_elements, as_size
from uvas.devices.adapter import raise_answer
from uvas.errors import ReleasedError
from uvas.interop.view import card_of, cupy_view
from uvas.leases import find
from uvas.ranges import Range
from uvas.reservation import Reservation

if TYPE_CHECKING:
    from uvas.arena import Arena

arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()
"""The open arenas of the process, by handle."""

os.register_at_fork(after_in_child=arenas.clear)


class _Methods(Allocation if TYPE_CHECKING else object):  # type: ignore[misc]  # final for everybody else
    """What `Allocation`, which is written in C, has beside the methods for which speed matters."""

    @property
    def end(self) -> int:
        """The first address after it."""
        end: int = self.base + self.size
        return end

    @property
    def range(self) -> Range:
        """Base and size as a value."""
        return Range(self.base, self.size)

    @property
    def arena(self) -> Arena | None:
        """The arena that it is from; None if that object is gone (its memory then stays as long as this block)."""
        return arenas.get(self.arena_id)

    def numpy(
        self, dtype: npt.DTypeLike, shape: int | Iterable[int] | None = None, *, offset: int = 0
    ) -> npt.NDArray[Any]:
        """Return an array over the memory itself; the block stays as long as any view of it lives.

        Parameters
        ----------
        dtype
            Of the elements; none with Python objects in it.
        shape
            By default one dimension, with as many elements as fit from `offset` to the end.
        offset
            Of the first element, bytes.

        Returns
        -------
        numpy.ndarray
            In C order. What it holds at first is undefined.

        Raises
        ------
        ValueError
            It does not fit, or the arena hands out bare addresses.
        TypeError
            The elements hold Python objects, whose pointers mean nothing to anybody else.
        ReleasedError
            It has been freed, or was left by ``with``.
        """
        start = as_size("offset", offset)
        kind, dimensions, size = as_elements(dtype, shape, start, self.size)
        return np.ndarray(dimensions, kind, buffer=np.asarray(core.Hold(self, start, size)))

    def cupy(self, dtype: npt.DTypeLike, shape: int | Iterable[int] | None = None, *, offset: int = 0) -> Any:
        """Return a CuPy array over the memory itself; the block stays as long as any view of it lives.

        The stream that is current now counts as one that uses the block, as of `used_on`.

        Parameters
        ----------
        dtype, shape, offset
            As of `numpy`.

        Returns
        -------
        cupy.ndarray
            In C order. Of bare addresses too, where memory has been committed behind them.

        Raises
        ------
        ValueError
            It does not fit, no CUDA device of the space sees it, or nothing is committed behind bare addresses.
        TypeError
            The elements hold Python objects.
        NotSupportedError
            CuPy is not installed.
        ReleasedError
            It has been freed, or was left by ``with``.
        """
        start = as_size("offset", offset)
        kind, dimensions, size = as_elements(dtype, shape, start, self.size)
        hold = core.Hold(self, start, size)
        held = find(self.base)
        card = card_of(held.space.devices if held is not None else (), f"{self!r}")
        keeper: object = hold
        arena = self.arena
        if isinstance(held, Reservation) and (arena is None or arena.backing == "none"):
            keeper = hold, held._lease(self.base + start - held.base, size, f"CuPy array in {self!r}", by_host=False)
        ordered.use(self, self._core)
        return cupy_view(self.base + start, size, self.base + start, kind, dimensions, None, keeper, card)

    def used_on(self, stream: object) -> None:
        """Note that a CUDA stream uses it: when it is freed, however, what that stream has queued by then runs first.

        Parameters
        ----------
        stream
            A CuPy stream, anything with ``__cuda_stream__``, or the driver's number of one.

        Raises
        ------
        NotSupportedError
            No CUDA device of the space sees it.
        TypeError
            It is no stream.
        ReleasedError
            It has been freed.
        """
        if self.freed:
            raise self._dead()
        ordered.use(self, self._core, stream)

    def _free_in_order(self, after: object) -> None:
        ordered.free_in_order(self, after)

    def _retire_in_order(self) -> None:
        ordered.retire_in_order(self)

    def _dead(self) -> ReleasedError:
        return ReleasedError(f"{self!r} is no more")

    def _failed(self, code: int) -> BaseException:
        return raise_answer(code)

    def __enter__(self) -> Self:
        if self.freed:
            raise self._dead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.retire()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled or copied: addresses belong to one process")

    def __repr__(self) -> str:
        arena = self.arena
        of = f" of {arena.name!r}" if arena is not None else ""
        return f"<Allocation [{self.base:#x}, {self.end:#x}){of}{', freed' if self.freed else ''}>"


for _name, _method in vars(_Methods).items():
    if _name not in ("__module__", "__doc__", "__dict__", "__weakref__"):
        if isinstance(_method, FunctionType):
            _method.__qualname__ = f"Allocation.{_name}"  # for what Python says of arguments
        setattr(Allocation, _name, _method)
