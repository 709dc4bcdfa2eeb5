"""Who uses the memory of a reservation, and what happens when nobody does any more.

An array over a reservation has a `Lease` as its base, so the lease lives as long as any view of the array. Finalizers
take no lock and make no system call: they end the lease in C, lock-free, and put what is to be done on a queue. The
queue is worked off by a thread (`start_reaper`, once somebody left a ``with`` block under a live array) and by the
verbs of a space that make, count or end reservations (`work_off`).
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from uvas._core import fast, ffi, lib

if TYPE_CHECKING:
    from uvas.reservation import Adoption, Reservation

Errand = tuple[Callable[[int], int], int, object]
"""A function of the core, the id to call it with, and what must live until then. Nobody learns what it answers."""


live: dict[int, weakref.ref[Reservation | Adoption]] = {}
"""Every live reservation and adoption of the process, by id: `find` gives back the very object."""

represent: list[Callable[[int], Reservation | None]] = []
"""Who may know an address that `live` does not: arenas make objects for their reservations when they are asked for."""


def find(address: int) -> Reservation | Adoption | None:
    """Return whose address this is; see `uvas.find`."""
    held = fast.lookup(address, live)
    if held is None:
        for known in represent:
            held = known(address)
    return held


class _Process:
    """What belongs to this process; a forked child begins anew."""

    def __init__(self) -> None:
        self.errands: SimpleQueue[Errand] = SimpleQueue()  # put is reentrant: finalizers may interrupt it
        self.reaper: threading.Thread | None = None
        self.starting = threading.Lock()


_process = _Process()


def generation() -> object:
    """Return a token that differs between a process and its forked children, where the parent's objects are dead."""
    return _process


def enqueue(errand: Errand) -> None:
    """Leave something to be done later. For finalizers."""
    _process.errands.put(errand)


def work_off() -> None:
    """Do what finalizers left."""
    errands = _process.errands
    while not errands.empty():
        try:
            function, identity, _alive = errands.get_nowait()
        except Empty:
            return
        function(identity)


def start_reaper() -> None:
    """See to it that errands are done soon although nobody calls uvas any more."""
    process = _process
    with process.starting:
        if process.reaper is None:
            process.reaper = threading.Thread(target=_reap, args=(process.errands,), name="uvas-reaper", daemon=True)
            process.reaper.start()


def _reap(errands: SimpleQueue[Errand]) -> None:
    while True:
        function, identity, alive = errands.get()
        function(identity)
        del alive


def _begin_anew() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_begin_anew)


class Lease:
    """The base of an array over a reservation: while it lives, the memory stays.

    Parameters
    ----------
    reservation
        Whose memory it is; kept alive.
    offset, size
        Bytes of it.
    readonly
        What the array may not do.
    holder
        Who uses it, for messages.

    Raises
    ------
    ValueError
        Not all of it is committed.
    ReleasedError
        The reservation is released, or was left by ``with``.
    """

    __slots__ = ("__weakref__", "_cell", "_generation", "address", "holder", "readonly", "reservation", "size")

    def __init__(self, reservation: Reservation, offset: int, size: int, *, readonly: bool, holder: str) -> None:
        self._cell = ffi.new(
            "uvas_id *"
        )  # C writes the handle here: no signal can come between its making and its keeping
        self._generation = generation()
        self.reservation = reservation
        self.address = reservation.base + offset
        self.size = size
        self.readonly = readonly
        self.holder = holder

    def take(self, identity: int, offset: int) -> int:
        """Ask the core for it: 0 or a negative errno."""
        return int(lib.uvas_lease(identity, offset, self.size, self._cell))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The bytes, for NumPy."""
        return {"version": 3, "shape": (self.size,), "typestr": "|u1", "data": (self.address, self.readonly)}

    def __del__(self) -> None:
        try:
            identity = self._cell[0]
            if not identity or self._generation is not generation():
                return
            fast.unlease(identity)
            if not sys.is_finalizing():
                for errand in self.reservation.when_unused():
                    enqueue(errand)
        except AttributeError:
            pass  # a constructor that raised, or an interpreter that has taken itself apart

    def __repr__(self) -> str:
        return f"{self.holder} at {self.address:#x}, {self.size:#x} bytes"
