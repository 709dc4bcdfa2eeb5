"""The reservations that arenas make for themselves, as objects for whoever asks whose an address is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from uvas.leases import ReservationTrace, live
from uvas.reservation import Reservation
from uvas.space import AddressSpace

if TYPE_CHECKING:
    from uvas.arena import Arena
    from uvas.devices.base import Device
    from uvas.ranges import Range


class Region(Reservation):
    """A reservation that an arena has made for itself, as `uvas.find` shows it; the arena ends it."""

    __slots__ = ("_arena",)

    def __init__(self, space: AddressSpace, arena: Arena, found: Any) -> None:
        super().__init__(space, arena.name)
        self._arena = weakref.ref(arena)
        self._cell.id, self._cell.base, self._cell.size = found.id, found.base, found.size
        self._settle()

    def _settle(self) -> None:
        self._base, self._size = self._cell.base, self._cell.size
        live[self._cell.id] = _RegionTrace.of(self, self._cell, None)

    def _unleased(self, call: Callable[[], int], start: int, size: int) -> None:
        arena = self._arena()
        if arena is None or arena.backing == "auto":
            raise ValueError(f"{self!r} is an arena's, which alone commits, decommits and maps in it")
        super()._unleased(call, start, size)

    def commit(
        self,
        offset: int = 0,
        size: int | None = None,
        *,
        protection: str = "rw",
        populate: bool = False,
        location: Literal["host"] | Device | Range = "host",
    ) -> None:
        """Commit a part of it, which only an arena of bare addresses leaves to others; see `Reservation.commit`."""
        arena = self._arena()
        if arena is None or arena.backing == "auto":
            raise ValueError(f"{self!r} is an arena's, which alone commits in it")
        super().commit(offset, size, protection=protection, populate=populate, location=location)

    def release(self) -> NoReturn:
        """Refuse: the arena releases it, when it closes."""
        raise ValueError(f"{self!r} is an arena's, which releases it when it closes")

    def retire(self) -> None:
        """Do nothing: the arena ends it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __del__(self) -> None:
        """Do nothing: the arena ends it."""


class _RegionTrace(ReservationTrace):
    """Of a `Region`: it ends nothing."""

    __slots__ = ()

    def end(self) -> None:
        """Forget it."""
        live.pop(self.cell.id, None)
