"""Who uses the memory of a reservation, and what happens when nobody does any more.

An array over a reservation has a `Lease` as its base, so the lease lives as long as any view of the array. Finalizers
take no lock and make no system call: they end the lease in C, lock-free, and put what is to be done on a queue. The
queue is worked off by a thread (`start_reaper`, once somebody left a ``with`` block under a live array) and by the
verbs of a space that make, count or end reservations (`work_off`). Whoever closes something waits for what others have
taken from the queue and not done yet (`work_off_with_others`): what nobody has any more is not in use.

An interrupt may come in the middle of a finalizer, which then is not run again. So each object that owns something of
the core leaves a `Trace`: a weak reference which, when the object goes, is put on the same queue by C code, where no
interrupt comes in between.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Self

from uvas._core import allocation, fast, ffi, lib
from uvas.interrupts import held_back

if TYPE_CHECKING:
    from uvas.reservation import Adoption, Reservation

Errand = tuple[Callable[[int], int], int, object]
"""A function of the core, the id to call it with, and what must live until then. Nobody learns what it answers."""

_PATIENCE_S = 1.0
"""How long to wait for other threads: what they do may wait for a device, or for the thread that waits for them."""

_STEP_S = 0.0002


class Trace(weakref.ref[Any]):
    """What is left of an object: ends what its finalizer should have ended.

    Knows the cell where C wrote the object's handle, and keeps alive what must live until the end.
    """

    __slots__ = ("alive", "cell")

    cell: Any
    alive: Any

    @classmethod
    def of(cls, owner: object, cell: Any, alive: object) -> Self:
        """Make one."""
        made = cls(owner, _process.errands.put)
        made.cell, made.alive = cell, alive
        return made

    def end(self) -> None:
        """End it, if that has not been done."""
        raise NotImplementedError


class ReservationTrace(Trace):
    """Of a reservation or an adoption."""

    __slots__ = ()

    def end(self) -> None:
        """Release it."""
        if identity := self.cell.id:
            live.pop(identity, None)
            lib.uvas_release(identity)


class LeaseTrace(Trace):
    """Of a lease."""

    __slots__ = ()

    def end(self) -> None:
        """Let go of the memory."""
        leased.discard(self)
        if identity := self.cell[0]:
            fast.unlease(identity)
            for function, waiting, _alive in self.alive.when_unused():
                function(waiting)


live: dict[int, ReservationTrace] = {}
"""Every live reservation and adoption of the process, by id: `find` gives back the very object."""

leased: set[LeaseTrace] = set()
"""The traces of all leases, to keep them."""

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
        self.errands: SimpleQueue[Errand | Trace] = SimpleQueue()  # put is reentrant: finalizers may interrupt it
        self.reaper: threading.Thread | None = None
        self.starting = threading.Lock()
        self.at_work: dict[int, object] = {}
        """Of each thread that may have something in hand, but for the reaper's errands: a token, each time another."""
        self.rounds = 0
        """How many errands the reaper has done, which sleeps in taking one. Written by it alone."""


_process = _Process()


def generation() -> object:
    """Return a token that differs between a process and its forked children, where the parent's objects are dead."""
    return _process


def enqueue(errand: Errand) -> None:
    """Leave something to be done later. For finalizers."""
    _process.errands.put(errand)


def put_errand() -> Callable[[Any], object]:
    """Return the function of C that puts an errand on this process's queue."""
    return _process.errands.put


def work_off() -> None:
    """Do what finalizers left."""
    errands = _process.errands
    if errands.empty():
        return
    with held_back():  # what has been taken from the queue is done, or put back
        while not errands.empty():
            with in_hand():
                _do_one(errands)


def _do_one(errands: SimpleQueue[Errand | Trace]) -> None:
    try:
        errand = errands.get_nowait()
    except Empty:
        return
    try:
        _do(errand)
    except BaseException:
        if isinstance(errand, Trace) or not isinstance(errand[2], allocation.Core):
            errands.put(errand)  # done twice is done once: handles are never used again; addresses are
        raise


@contextmanager
def in_hand() -> Iterator[None]:
    """Let others wait for what this thread takes and does in the block: see `work_off_with_others`."""
    at_work, me = _process.at_work, threading.get_ident()
    if me in at_work:
        yield
        return
    at_work[me] = object()
    try:
        yield
    finally:
        at_work.pop(me, None)


def work_off_with_others() -> None:
    """Do what finalizers left, and wait for what other threads have in hand of it: for a second, if it takes that long.

    Twice: an arena's last block leaves the arena's end to be done. Nothing follows from that.
    """
    until = time.monotonic() + _PATIENCE_S
    for _ in range(2):
        work_off()
        _wait_for_others(until)
    work_off()


def _wait_for_others(until: float) -> None:
    process, me = _process, threading.current_thread()
    rounds = process.rounds
    tokens = [(thread, token) for thread, token in process.at_work.copy().items() if thread != me.ident]

    def somebody_is_at_it() -> bool:
        if process.reaper not in (None, me) and process.rounds == rounds:
            return True  # as far as is known, until it has come round
        return any(process.at_work.get(thread) is token for thread, token in tokens)

    while somebody_is_at_it() and time.monotonic() < until:
        if process.errands.empty():
            process.errands.put((_nothing, 0, None))
        time.sleep(_STEP_S)


def _nothing(_number: int) -> int:
    return 0


def _do(errand: Errand | Trace) -> None:
    if isinstance(errand, Trace):
        errand.end()
    else:
        function, identity, _alive = errand
        function(identity)


def start_reaper() -> None:
    """See to it that errands are done soon although nobody calls uvas any more."""
    process = _process
    with process.starting:
        if process.reaper is None:
            process.reaper = threading.Thread(target=_reap, args=(process,), name="uvas-reaper", daemon=True)
            process.reaper.start()


def _reap(process: _Process) -> None:
    while True:
        errand = process.errands.get()
        try:
            _do(errand)
        except Exception:  # told as any thread's last words are; the others' errands are done all the same
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        del errand
        process.rounds += 1


def _begin_anew() -> None:
    global _process
    _process = _Process()
    leased.clear()


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
        leased.add(LeaseTrace.of(self, self._cell, reservation))

    def take(self, identity: int, offset: int) -> int:
        """Ask the core for it: 0 or a negative errno."""
        work_off()  # or the traces of arrays that have gone would pile up
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
