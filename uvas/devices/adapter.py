"""A device written in Python behind the C core's callbacks.

The core calls with no lock held. What a device raises cannot travel through C: it is kept for the thread, C sees a
number, and the verb that called into C raises the very exception again (`raise_answer`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ECANCELED, EEXIST
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from uvas._core import ffi, lib
from uvas.devices.base import Backing, BackingKind, Device, DeviceInfo, LentMemory
from uvas.errors import AddressInUseError, failure
from uvas.protection import protection_name
from uvas.ranges import Range

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_PLACEMENTS = {
    "follows": lib.UVAS_FOLLOWS,
    "claims": lib.UVAS_CLAIMS,
    "registers": lib.UVAS_REGISTERS,
    "owns": lib.UVAS_OWNS,
}
_BACKINGS: dict[BackingKind, int] = {
    "anonymous": lib.UVAS_BACKING_ANONYMOUS,
    "memfd": lib.UVAS_BACKING_MEMFD,
    "descriptor": lib.UVAS_BACKING_DESCRIPTOR,
    "driver": lib.UVAS_BACKING_DRIVER,
}
_BACKING_NAMES = {bit: name for name, bit in _BACKINGS.items()}
_MOST_AT_ONCE = 32  # devices of a space

_FIRST_ANSWER = 1 << 16  # beyond every errno, below what says that nothing was undone
_MOST_KEPT = 256  # exceptions that a verb went on without: what a device said to an undo, say


class _Raised(threading.local):
    """What devices raised in the calls that this thread made into C, by the number that C was given instead."""

    def __init__(self) -> None:
        self.errors: dict[int, BaseException] = {}
        self.answers = count(_FIRST_ANSWER)


_raised = _Raised()


class _Placing(threading.local):
    """Where this thread wants memory to lie that a driver maps."""

    location: object = "host"


_placing = _Placing()


@contextmanager
def located(location: object) -> Iterator[None]:
    """Let the commits that this thread makes into C meanwhile say where the memory is to lie."""
    _placing.location = location
    try:
        yield
    finally:
        _placing.location = "host"


def _keep(error: BaseException) -> int:
    """Return the number that stands for an exception on its way through C."""
    if len(_raised.errors) == _MOST_KEPT:
        _raised.errors.clear()
    answer = -next(_raised.answers)
    if getattr(error, "unrecoverable", False):
        answer -= lib.UVAS_UNRECOVERABLE
    _raised.errors[answer] = error
    return answer


def raise_answer(code: int) -> BaseException:
    """Return what to raise for a core call that answered `code` < 0: the device's own exception where there is one."""
    error = _raised.errors.get(code)
    _raised.errors.clear()
    return failure(code) if error is None else error


class Party:
    """One device as attached to one space: keeps alive what C points to.

    Parameters
    ----------
    device
        The device. Its `info` is read once, or what it agrees to.
    attached, coming
        The other devices of the space.

    Raises
    ------
    ValueError
        The device declares a placement or a backing that there is not.
    """

    def __init__(self, device: Device, attached: tuple[Device, ...] = (), coming: tuple[Device, ...] = ()) -> None:
        self.device = device
        agree = getattr(device, "agree", None)
        self.info: DeviceInfo = device.info if agree is None else agree(attached, coming)
        self.id = 0
        self.asked_beside_others = False
        """Two or more devices claim: one that cannot be started is asked on a thread. Written by the space."""
        self._lent = -1
        self._pending: dict[int, Future[None] | BaseException | None] = {}
        self._handle = ffi.new_handle(self)
        self._name = ffi.new("char[]", self.info.name.encode())
        self._start: Callable[[Range], None] | None = getattr(device, "start_claim", None)

    def description(self) -> Any:
        """Return the ``struct uvas_device`` of it.

        Raises
        ------
        ValueError
            The device declares what there is not.
        DeviceLostError, ReleasedError
            It has memory of its own, and its process does not lend it any more.
        """
        info, window = self.info, self.info.window
        if info.placement not in _PLACEMENTS or not set(info.backings) <= set(_BACKINGS):
            raise ValueError(
                f"device {info.name} declares {info.placement!r} and {set(info.backings)}: uvas knows others"
            )
        lent: LentMemory | None = self.device.lend_memory() if info.memory == "private" else None  # type: ignore[attr-defined]
        self._lent = lent.faults if lent else -1
        return ffi.new(
            "struct uvas_device *",
            {
                "name": self._name,
                "placement": _PLACEMENTS[info.placement],
                "backings": sum(_BACKINGS[kind] for kind in info.backings),
                "granularity": info.granularity,
                "window_base": window.base if window else 0,
                "window_size": window.size if window else 0,
                "context": self._handle,
                "claim": lib.uvas_py_claim,
                "unclaim": lib.uvas_py_unclaim,
                "commit": lib.uvas_py_commit,
                "decommit": lib.uvas_py_decommit,
                "protect": lib.uvas_py_protect,
                "start_claim": lib.uvas_py_start_claim,
                "memory": lib.UVAS_MEMORY_PRIVATE if lent else lib.UVAS_MEMORY_SHARED,
                "faults": lent.faults if lent else -1,
                "process": lent.process if lent and lent.process is not None else -1,
                "capacity": (lent.capacity or 0) if lent else 0,
                "granule": lent.granule if lent else 0,
                "identity": ffi.cast("void *", lent.identity if lent else 0),
            },
        )

    def attached(self) -> None:
        """Give back what was lent: the core has taken a duplicate, or does not want it."""
        if self._lent >= 0:
            os.close(self._lent)
            self._lent = -1

    def start_claim(self, wanted: Range) -> None:
        """Let the device begin to claim, if it can or a thread can for it."""
        try:
            if self._start is not None:
                self._start(wanted)
            elif self.asked_beside_others:
                self._pending[wanted.base] = _askers(os.getpid()).submit(self.device.claim, wanted)
        except BaseException as error:
            self._pending[wanted.base] = error

    def claim(self, wanted: Range) -> None:
        """Claim, or learn how the claim that was started went."""
        started = self._pending.pop(wanted.base, None)
        if started is None:
            self.device.claim(wanted)
        elif isinstance(started, BaseException):
            raise started
        else:
            started.result()


@cache
def _askers(process: int) -> ThreadPoolExecutor:
    """Threads that ask devices; of this process: a forked child has none of its parent's threads."""
    del process
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="uvas-ask")


# ---- what C calls ----------------------------------------------------------------------------------------------------


def _ask(call: Callable[[], None]) -> int:
    try:
        call()
    except BaseException as error:
        return _keep(error)
    return 0


def _party(context: Any) -> Party:
    party: Party = ffi.from_handle(context)
    return party


@ffi.def_extern()
def uvas_py_start_claim(context: Any, base: int, size: int) -> None:
    """Let a device begin to claim."""
    _party(context).start_claim(Range(base, size))


@ffi.def_extern(error=-ECANCELED)
def uvas_py_claim(context: Any, base: int, size: int, obstacle: Any) -> int:
    """Claim: 0, EEXIST with the obstacle, or what stands for an exception."""
    party = _party(context)
    try:
        party.claim(Range(base, size))
    except AddressInUseError as error:
        owner = error.owner if error.owner.startswith(party.info.name) else f"{party.info.name}: {error.owner}"
        text = owner.encode(errors="backslashreplace")[: ffi.sizeof(obstacle.owner) - 1]
        ffi.memmove(obstacle.owner, text + b"\0", len(text) + 1)
        if error.obstacle is not None:
            obstacle.base, obstacle.size = error.obstacle.base, error.obstacle.size
        return -EEXIST
    except BaseException as error:
        return _keep(error)
    return 0


@ffi.def_extern(error=-ECANCELED)
def uvas_py_unclaim(context: Any, base: int, size: int) -> int:
    """Give a range back."""
    return _ask(lambda: _party(context).device.unclaim(Range(base, size)))


@ffi.def_extern(error=-ECANCELED)
def uvas_py_commit(context: Any, base: int, size: int, info: Any, protection: int) -> int:
    """Commit a range."""
    descriptor = info.descriptor if info.descriptor >= 0 else None
    backing = Backing(_BACKING_NAMES[info.kind], bool(info.shared), descriptor, info.offset, _placing.location)
    return _ask(lambda: _party(context).device.commit(Range(base, size), backing, protection_name(protection)))


@ffi.def_extern(error=-ECANCELED)
def uvas_py_decommit(context: Any, base: int, size: int) -> int:
    """Decommit a range."""
    return _ask(lambda: _party(context).device.decommit(Range(base, size)))


@ffi.def_extern(error=-ECANCELED)
def uvas_py_protect(context: Any, base: int, size: int, protection: int) -> int:
    """Change a range's protection."""
    return _ask(lambda: _party(context).device.protect(Range(base, size), protection_name(protection)))
