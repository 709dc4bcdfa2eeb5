"""Memory that moves: what `AddressSpace.prefetch` and its like do, for devices that have memory of their own.

The pager in the core moves what belongs to devices whose `info.memory` is "private". A device that moves pages by
itself, as a GPU's driver does, is asked through its own methods (see `uvas.Device`).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from errno import EBUSY, EIO, ESRCH, errorcode
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from uvas._core import ffi, lib
from uvas.allocation import Allocation
from uvas.devices.adapter import Party, raise_answer
from uvas.errors import DeviceError, DeviceLostError, ReleasedError
from uvas.interrupts import held_back
from uvas.leases import enqueue
from uvas.ranges import Range
from uvas.reservation import Reservation

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from uvas.space import AddressSpace

__all__ = ["Advice", "MovementStats", "PageFlag", "PartyMovement", "Placeable"]

Advice = Literal["read_mostly", "preferred_location", "accessed_by"]
_ADVICE = {
    None: lib.UVAS_ADVISE_NOTHING,
    "read_mostly": lib.UVAS_ADVISE_READ_MOSTLY,
    "preferred_location": lib.UVAS_ADVISE_PREFERRED,
    "accessed_by": lib.UVAS_ADVISE_ACCESSED_BY,
}
_PARTY_BITS = (1 << 28) - 1
_MOVERS = 4  # threads that wait for prefetches which nobody waits for


class PageFlag(enum.IntFlag):
    """What the words of `AddressSpace.where` say of a page; 0: it is nowhere, and reads as zeros."""

    HOST = lib.UVAS_PAGE_HOST
    """The host has it."""
    LOST = lib.UVAS_PAGE_LOST
    """Its bytes are gone; a touch is SIGBUS until `AddressSpace.discard`."""
    DUPLICATED = lib.UVAS_PAGE_DUPLICATED
    """More than one party has it; nobody writes without a fault."""
    READ_ONLY = lib.UVAS_PAGE_READ_ONLY
    """By `Reservation.protect`."""
    PROTECTED = lib.UVAS_PAGE_PROTECTED
    """By `Reservation.protect`: no access."""

    @classmethod
    def _missing_(cls, value: object) -> PageFlag:
        """Take a word of the array as it is."""
        if isinstance(value, np.integer):
            return cls(int(value))
        flag: PageFlag = super()._missing_(value)
        return flag

    @staticmethod
    def device(number: int) -> int:
        """Return the bit of the device that is `number`-th in `AddressSpace.devices`, from 1 on.

        Examples
        --------
        >>> PageFlag.device(2)
        4
        """
        if not 1 <= number <= 27:
            raise ValueError(f"devices are counted from 1 to 27, not {number}")
        return 1 << number


@dataclass(frozen=True, slots=True)
class PartyMovement:
    """What the host, or one device with memory of its own, has asked for and been given; counts and bytes."""

    read_faults: int
    write_faults: int
    bytes_in: int
    bytes_out: int
    resident_bytes: int
    """Now; of devices only."""
    capacity: int | None
    """Of devices only; None: no bound."""
    evictions: int
    """Granules that left to make room."""


@dataclass(frozen=True, slots=True)
class MovementStats:
    """What has moved in a space so far."""

    host: PartyMovement
    devices: dict[str, PartyMovement]
    """By the device's name; where it is another's already, with its number: ``gpu (2)`` is the second of the space."""
    granule: int
    """Bytes that move at once; 0: no device has memory of its own."""
    pager_ns: int
    """The pager's time at work, for all spaces of the process."""
    metadata_bytes: int
    """Directories, as far as they are in RAM, and what is known of devices."""


Placeable: TypeAlias = Range | Reservation | Allocation | npt.NDArray[Any]
"""What has a place in a space: a range, a reservation, an allocation, or an array over them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A part of one reservation, by the core's handle: an arena's has no object here."""

    reservation: int
    offset: int
    range: Range


def place(space: AddressSpace, what: Placeable) -> Place:
    """Find out what part of which reservation of the space something takes.

    Raises
    ------
    TypeError
        It is nothing that has a place.
    ValueError
        It is empty, or not inside one reservation of this space.
    ReleasedError
        The space has been closed, or what is meant was released or freed: its addresses may be somebody else's by now.
    """
    if isinstance(what, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(what)
        base, size = int(low), int(high - low)
    elif (isinstance(what, Reservation) and what._released) or (isinstance(what, Allocation) and what.freed):
        raise ReleasedError(f"{what!r} is no more")
    elif hasattr(what, "base") and hasattr(what, "size"):
        base, size = what.base, what.size
    else:
        raise TypeError(f"{what!r} is neither a range, nor a reservation, an allocation or an array")
    found, owner = ffi.new("struct uvas_found *"), ffi.new("uvas_id *")
    inside = (
        size > 0
        and lib.uvas_find(base, found) == 0
        and found.kind == lib.UVAS_RESERVATION
        and base + size <= found.base + found.size
        and lib.uvas_space_of(found.id, owner) == 0
        and owner[0] == space.handle
    )
    if not inside:
        space.stats()  # raises where the space is no more, or the parent process's
        raise ValueError(f"[{base:#x}, {base + size:#x}) is not inside one reservation of {space!r}, or is empty")
    return Place(found.id, base - found.base, Range(base, size))


# ---- prefetch --------------------------------------------------------------------------------------------------------


def prefetch(space: AddressSpace, what: Placeable, target: object) -> None:
    """Move memory; see `AddressSpace.prefetch`."""
    start(space, what, target)()


def start(space: AddressSpace, what: Placeable, target: object) -> Callable[[], None]:
    """Begin to move memory; what is returned waits for the end. Checks the arguments at once."""
    at = place(space, what)
    party = _target(space, target)
    asked = space.parties if party is None else (party,)
    movers = [mover for one in asked if (mover := _mover(one, "prefetch"))]
    if not movers:
        return partial(_by_pager, at, party)
    _by_pager(at, party)  # first: what is not there to be moved is refused before a driver is told of it
    with ExitStack() as begun:
        for mover in movers:
            begun.callback(mover(at.range, "host" if party is None else "device"))
        return begun.pop_all().close  # every one is waited for, also where another has failed


def in_background(space: AddressSpace, what: Placeable, target: object) -> Future[None]:
    """Begin to move memory, and let a thread wait for it."""
    return _movers(os.getpid()).submit(start(space, what, target))


@cache
def _movers(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    del process
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_MOVERS, thread_name_prefix="uvas-move")


def _by_pager(at: Place, party: Party | None) -> None:
    moved = ffi.new("struct uvas_moved *")
    code = lib.uvas_prefetch(at.reservation, at.offset, at.range.size, party.id if party else 0, moved)
    if code == -ESRCH and party:
        raise DeviceLostError("prefetch", code, "ESRCH", party.info.name)
    if code == -EBUSY:
        raise _stayed(moved, party.info.name if party else "the host")
    if code < 0:
        raise raise_answer(code)


def _stayed(moved: Any, target: str) -> DeviceError:
    ranges = tuple(Range(one.base, one.size) for one in moved.stayed[0 : min(moved.stayed_count, lib.UVAS_STAYED)])
    why = {-EBUSY: "pinned, by I/O in flight or by pin_host", -EIO: "lost"}.get(moved.why, "without memory")
    more = f" and {moved.stayed_count - len(ranges)} more" if moved.stayed_count > len(ranges) else ""
    text = f"not all of it moved to {target}: {', '.join(map(str, ranges))}{more} stayed ({why}); the rest has moved"
    return DeviceError("prefetch", moved.why, errorcode.get(-moved.why, "unknown"), target, message=text)


@cache
def _page_bytes() -> int:
    platform = ffi.new("struct uvas_platform *")
    lib.uvas_platform(platform)
    return int(platform.page_size)


def _target(space: AddressSpace, target: object) -> Party | None:
    """Return the party that is meant; None: the host.

    Raises
    ------
    ValueError
        It is neither "host" nor a device of this space.
    """
    if target == "host":
        return None
    for party in space.parties:
        if party.device is target:
            return party
    raise ValueError(f"{target!r} is neither 'host' nor a device of {space!r}")


def _mover(party: Party, verb: str) -> Any:
    """Return a device's own method, where it has one."""
    return getattr(party.device, verb, None)


# ---- advice, where, discard ------------------------------------------------------------------------------------------


def advise(space: AddressSpace, what: Placeable, advice: Advice | None, target: object) -> None:
    """Say how memory will be used; see `AddressSpace.advise`."""
    if advice not in _ADVICE:
        raise ValueError(f"{advice!r} is no advice: {', '.join(map(str, _ADVICE))}")
    if advice in ("preferred_location", "accessed_by") and target is None:
        raise ValueError(f"{advice!r} is of somebody: a device of {space!r}, or 'host'")
    at = place(space, what)
    party = _target(space, target) if target is not None else None
    code = lib.uvas_advise(at.reservation, at.offset, at.range.size, _ADVICE[advice], party.id if party else 0)
    if code < 0:
        raise raise_answer(code)
    for one in space.parties:
        if (adviser := _mover(one, "advise")) is not None:
            adviser(at.range, advice, "device" if one is party else "host" if target == "host" else None)


def where(space: AddressSpace, what: Placeable) -> npt.NDArray[np.uint32]:
    """Tell where the pages of a range are; see `AddressSpace.where`."""
    at = place(space, what)
    page = _page_bytes()
    start = at.offset // page * page
    count = -((start - at.offset - at.range.size) // page)
    core = np.zeros(count, np.uint32)
    code = lib.uvas_where(at.reservation, start, count * page, ffi.cast("uint32_t *", core.ctypes.data))
    if code < 0:
        raise raise_answer(code)
    pages = Range(at.range.base - at.offset + start, count * page)
    return _by_number(space, core, pages)


def _by_number(space: AddressSpace, core: npt.NDArray[np.uint32], pages: Range) -> npt.NDArray[np.uint32]:
    """Give every device its bit by its place among the space's; the core numbers those with memory of their own."""
    flags = np.uint32(~_PARTY_BITS & 0xFFFFFFFF)
    words: npt.NDArray[np.uint32] = core & (flags | np.uint32(PageFlag.HOST))
    bit = ffi.new("uint32_t *")
    for number, party in enumerate(space.parties[:27], 1):
        mine = np.uint32(PageFlag.device(number))
        own = _mover(party, "where")
        if own is not None and (seen := own(pages)) is not None:
            words |= np.where(seen & 2, mine, np.uint32(0))
            words &= np.where(seen & 3 == 2, ~np.uint32(PageFlag.HOST), np.uint32(0xFFFFFFFF))  # on the device only
            words |= np.where(seen & 1, np.uint32(PageFlag.HOST), np.uint32(0))
        elif lib.uvas_page_bit(space.handle, party.id, bit) == 0 and bit[0]:
            words |= np.where(core & bit[0], mine, np.uint32(0))
        elif own is None:
            words |= np.where(core & PageFlag.HOST, mine, np.uint32(0))  # it sees the host's very page
    return words


def discard(space: AddressSpace, what: Placeable) -> None:
    """Let contents go; see `AddressSpace.discard`."""
    at = place(space, what)
    code = lib.uvas_discard(at.reservation, at.offset, at.range.size)
    if code < 0:
        raise raise_answer(code)


class PinnedHost(AbstractContextManager["PinnedHost"]):
    """Memory that stays on the host until the block ends; see `AddressSpace.pin_host`."""

    def __init__(self, space: AddressSpace, what: Placeable) -> None:
        self._space, self._what = space, what
        self._pins: list[Any] = []  # one for each block that it was entered for

    def __enter__(self) -> PinnedHost:
        """Bring it home."""
        at = place(self._space, self._what)
        pin = ffi.new("struct uvas_pin *")
        self._pins.append(pin)
        try:
            with held_back():  # the pager knows the pin by its address: it is let go of before its memory is
                code = lib.uvas_pin_host(at.reservation, at.offset, at.range.size, pin)
            if code == -EBUSY:
                raise DeviceError("pin_host", code, "EBUSY", "the host", message=str(raise_answer(code)))
            if code < 0:
                raise raise_answer(code)
        except BaseException:
            self._unpin()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let devices have it again."""
        self._unpin()

    def _unpin(self) -> None:
        if self._pins:
            with held_back():
                lib.uvas_unpin_host(self._pins.pop())

    def __del__(self) -> None:
        """Leave what was entered and never left to be let go of."""
        for pin in self._pins:
            enqueue((lib.uvas_unpin_host, pin, None))


# ---- counters --------------------------------------------------------------------------------------------------------


def movement(space: AddressSpace) -> MovementStats:
    """Count; see `AddressSpace.movement`."""
    seen = ffi.new("struct uvas_movement *")
    code = lib.uvas_movement(space.handle, seen)
    if code < 0:
        raise raise_answer(code)
    parties = {one.device: _as_movement(one) for one in seen.parties[0 : seen.count]}
    host = parties.pop(0, PartyMovement(0, 0, 0, 0, 0, None, 0))
    devices: dict[str, PartyMovement] = {}
    for number, party in enumerate(space.parties, 1):
        if party.id in parties:
            name = party.info.name
            devices[name if name not in devices else f"{name} ({number})"] = parties[party.id]
    return MovementStats(
        host=host,
        devices=devices,
        granule=seen.granule,
        pager_ns=seen.pager_ns,
        metadata_bytes=seen.metadata_bytes,
    )


def _as_movement(one: Any) -> PartyMovement:
    return PartyMovement(
        read_faults=one.read_faults,
        write_faults=one.write_faults,
        bytes_in=one.bytes_in,
        bytes_out=one.bytes_out,
        resident_bytes=one.resident_bytes,
        capacity=one.capacity or None,
        evictions=one.evictions,
    )
