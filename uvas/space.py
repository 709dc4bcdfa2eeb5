"""The process's addresses as uvas sees them, with the devices that must agree."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from errno import EBUSY
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NoReturn, Self, TypeVar

import numpy as np
import numpy.typing as npt

from uvas import movement as moving
from uvas import ordered
from uvas._core import ffi, lib
from uvas.allocation import arenas
from uvas.arguments import Window, as_choice, as_label, as_size, as_where, as_window
from uvas.audit import inspect_space
from uvas.devices.adapter import Party, raise_answer
from uvas.devices.base import Device
from uvas.errors import NotSupportedError, ReleasedError, UvasError
from uvas.leases import Errand, enqueue, generation, live, start_reaper, work_off, work_off_with_others
from uvas.leases import find as find_held
from uvas.movement import Advice, MovementStats, Placeable
from uvas.ranges import Range
from uvas.reports import Report, SpaceStats
from uvas.reservation import Adoption, Reservation

if TYPE_CHECKING:
    from concurrent.futures import Future

_BACKINGS = {"auto": 0, "anonymous": lib.UVAS_BACKING_ANONYMOUS, "memfd": lib.UVAS_BACKING_MEMFD}
_Held = TypeVar("_Held", Reservation, Adoption)

os.register_at_fork(after_in_child=live.clear)


def find(address: int) -> Reservation | Adoption | None:
    """Return whose address this is: the very object that `reserve` or `adopt` gave, of any space, or None.

    Any address inside will do. Takes no lock; O(log n) in the number of ranges.

    Examples
    --------
    >>> with AddressSpace() as space, space.reserve(4096) as held:
    ...     find(held.base + 7) is held
    True
    """
    return find_held(address)


class AddressSpace:
    """Hands out ranges of addresses that mean the same on the host and on every attached device.

    Parameters
    ----------
    devices
        The parties that must agree. Who made a device closes it, after the space.
    window
        A `Range`, or ``(base, size)``, that all reservations lie in; None: anywhere that every party reaches.
    name
        Shown in messages and in ``/proc/PID/maps``.
    backing
        What `Reservation.commit` puts behind addresses: "anonymous", "memfd", or "auto": what the devices agree on.
    tagged
        Whether reservations are named in ``/proc/PID/maps`` and told from strangers' by the kernel's own book; False:
        plain anonymous memory.
    attempts
        Candidates acted on by one `reserve`, at most.

    Raises
    ------
    ValueError
        There is no such window, backing or number of attempts.
    NotSupportedError
        The devices agree on no backing.
    LimitReachedError
        There is no descriptor left for the tag.
    """

    def __init__(
        self,
        devices: Iterable[Device] = (),
        *,
        window: Window | None = None,
        name: str = "uvas",
        backing: Literal["auto", "anonymous", "memfd"] = "auto",
        tagged: bool = True,
        attempts: int = lib.UVAS_DEFAULT_ATTEMPTS,
    ) -> None:
        self._cell = ffi.new(
            "uvas_id *"
        )  # C writes the handle here: no signal can come between its making and its keeping
        self._generation = generation()
        self._name = name
        self._window = as_window(window)
        self._parties: list[Party] = []
        self._retired = False
        if not 0 < as_size("attempts", attempts) < 1 << 32:
            raise ValueError(f"attempts are at least 1, not {attempts}")
        label = as_label(name)
        options = ffi.new("struct uvas_space_options *")
        options.name = label
        options.backing = as_choice("backing", backing, _BACKINGS)
        options.flags = 0 if tagged else lib.UVAS_UNTAGGED
        options.attempts = attempts
        if self._window:
            options.window_base, options.window_size = self._window.base, self._window.size
        work_off()
        code = lib.uvas_space_open(options, self._cell)
        if code < 0:
            raise raise_answer(code)
        try:
            together = tuple(devices)
            for device in together:
                self._attach(device, together)
        except BaseException:
            self.close()
            raise

    # ---- ranges ------------------------------------------------------------------------------------------------------

    def reserve(
        self,
        size: int,
        *,
        at: int | None = None,
        window: Window | None = None,
        align: int | None = None,
        name: str | None = None,
    ) -> Reservation:
        """Take one range on the host and on every device, or nothing anywhere.

        Nobody's memory is ever replaced: where somebody is in the way, the next candidate is tried, or with `at` the
        call is refused.

        Parameters
        ----------
        size
            Bytes, rounded up to the page and to every device's granularity.
        at
            Exactly here.
        window
            Inside this range, instead of the space's window.
        align
            A power of two that the base is a multiple of.
        name
            For messages.

        Raises
        ------
        ValueError
            A number that cannot be: the message shows it. Raised before any system call.
        AddressInUseError
            With `at`: somebody is there, and this is who.
        AddressSpaceExhaustedError
            There is no room for it, or the attempts are spent.
        LimitReachedError
            RLIMIT_AS, max_map_count, overcommit.
        DeviceError
            A device is broken; whatever else a device's `claim` raised reaches the caller as it is.
        ReleasedError
            The space has been closed.

        Notes
        -----
        Without conflict two to four system calls, and one exchange with the devices, all asked at the same time. O(log
        n) in the number of ranges.
        """
        size = as_size("size", size)
        work_off()
        held = Reservation(self, name)
        if at is None and window is None and align is None and name is None:
            code = lib.uvas_reserve(self._cell[0], size, ffi.NULL, held._cell)
        else:
            where, _alive = as_where(at, window, align, name)
            code = lib.uvas_reserve(self._cell[0], size, where, held._cell)
        if code < 0:
            raise raise_answer(code)
        held._settle()
        return held

    def adopt(self, base: int, size: int, *, owner: str) -> Adoption:
        """Tell uvas of somebody else's range: it is neither mapped nor unmapped, only known, and never handed out.

        Raises
        ------
        ValueError
            The range is empty, not of whole pages, or out of reach.
        AddressInUseError
            uvas holds some of it.
        ReleasedError
            The space has been closed.
        """
        work_off()
        held = Adoption(self, owner)
        label = as_label(owner)
        code = lib.uvas_adopt(self._cell[0], as_size("base", base), as_size("size", size), label, held._cell)
        if code < 0:
            raise raise_answer(code)
        held._settle()
        return held

    def find(self, address: int) -> Reservation | Adoption | None:
        """Return whose address this is among this space's, None if it is not; as `uvas.find`."""
        held = find_held(address)
        return held if held is not None and held._space is self else None

    def ranges(self) -> list[Reservation | Adoption]:
        """Return what the space and its arenas hold, by address. O(n) in what all spaces of the process hold."""
        work_off()
        found = ffi.new("struct uvas_found *")
        space = ffi.new("uvas_id *")
        address = 0
        held: list[Reservation | Adoption] = []
        while lib.uvas_next(address, found) == 0:
            address = found.base + found.size
            if lib.uvas_space_of(found.id, space) == 0 and space[0] == self._cell[0]:
                one = find_held(found.base)
                if one is not None:
                    held.append(one)
        return held

    # ---- devices -----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[Device, ...]:
        """The attached devices, in the order in which they came."""
        return tuple(party.device for party in self._parties)

    def attach(self, device: Device) -> None:
        """Bring a device to the living space, all or nothing: it claims and commits what the others have.

        Raises
        ------
        AddressInUseError
            A reservation's range is taken on the device.
        NotSupportedError
            It cannot live with the backings that are there or that the others need, or cannot reach a reservation.
        ValueError
            It is attached already, or declares what there is not.
        ReleasedError
            The space has been closed.
        """
        self._attach(device, ())

    def _attach(self, device: Device, together: tuple[Device, ...]) -> None:
        if any(party.device is device for party in self._parties):
            raise ValueError(f"{device!r} is attached already")
        attached = self.devices
        party = Party(device, attached, tuple(one for one in together if one is not device and one not in attached))
        cell = ffi.new("uvas_id *")
        try:
            code = lib.uvas_attach(self._cell[0], party.description(), cell)
        finally:
            party.attached()
        if code < 0:
            raise raise_answer(code)
        party.id = cell[0]
        self._parties.append(party)
        self._devices_changed()

    def detach(self, device: Device) -> None:
        """Take a device away: it gives back every live reservation.

        Raises
        ------
        ValueError
            It is not attached.
        DeviceError
            It does not give back what it holds: it stays attached.
        ReleasedError
            The space has been closed.
        """
        party = next((one for one in self._parties if one.device is device), None)
        if party is None:
            raise ValueError(f"{device!r} is not attached to {self!r}")
        code = lib.uvas_detach(self._cell[0], party.id)
        if code < 0:
            raise raise_answer(code)
        self._parties.remove(party)
        self._devices_changed()

    def _devices_changed(self) -> None:
        self._count_claiming()
        for arena in [*arenas.values()]:
            if arena.space is self:
                arena._devices_changed()

    def _count_claiming(self) -> None:
        claiming = [party for party in self._parties if party.info.placement == "claims"]
        for party in claiming:
            party.asked_beside_others = len(claiming) > 1

    def check_location(self, location: object) -> None:
        """See whether memory can be committed there. For `Reservation.commit`.

        Raises
        ------
        ValueError
            It is neither a device of this space nor a range of addresses.
        NotSupportedError
            No device's driver maps the memory of this space.
        """
        if not isinstance(location, Range) and location not in self.devices:
            raise ValueError(f"{location!r} is neither 'host', nor a device of {self!r}, nor a range")
        if not any(party.info.placement == "owns" for party in self._parties):
            raise NotSupportedError(
                f"memory at {location!r}",
                f"{self!r} maps its memory itself, on the host",
                'use CudaDevice(strategy="vmm")',
            )

    def check_reach(self, wanted: Range) -> None:
        """See whether the host can touch what is committed there. For arrays.

        Raises
        ------
        ValueError
            It lies on a device.
        """
        for party in self._parties:
            if party.info.placement == "owns" and not party.device.host_reaches(wanted):  # type: ignore[attr-defined]
                raise ValueError(f"{wanted} lies on a device of {self!r}: the host cannot touch it")

    # ---- memory that moves -------------------------------------------------------------------------------------------

    def prefetch(self, what: Placeable, target: Device | Literal["host"], *, wait: bool = True) -> Future[None] | None:
        """Move memory to a device that has its own, or to the host, before it is touched.

        Where nothing has memory of its own there is nothing to do. With `wait` false it goes on in the background.

        Parameters
        ----------
        what
            A range, a reservation, an allocation or an array; widened to whole granules.
        target
            A device of this space, or "host".
        wait
            Whether to return when all of it has arrived; otherwise a Future is returned.

        Raises
        ------
        ValueError
            It is not inside one reservation of this space, not committed, or may not be accessed; or there is no such
            target.
        DeviceError
            Parts stayed where they were, because they are pinned (a system call or `pin_host` holds them); the message
            lists them. The rest has moved.
        OutOfMemoryError
            It is more than the device may hold, or there is no memory for it.
        NotSupportedError
            It maps a descriptor, which does not move.
        DeviceLostError, ReleasedError
            The device, or the memory, is gone.

        Notes
        -----
        O(n) in the granules of the range.
        """
        if not wait:
            return moving.in_background(self, what, target)
        moving.prefetch(self, what, target)
        return None

    def advise(self, what: Placeable, advice: Advice | None, device: Device | Literal["host"] | None = None) -> None:
        """Say how memory will be used. It changes what moves when, never what is read.

        Parameters
        ----------
        what
            As of `prefetch`.
        advice
            "read_mostly": a prefetch copies and takes nothing away. "preferred_location": the device keeps it as long
            as something else can be evicted. "accessed_by": the device keeps a copy when it is prefetched elsewhere;
            passed over where a device is preferred, and forgotten when a location is. "preferred_location" of "host"
            does no more than that: it takes back what devices were advised, and devices that touch the memory still
            get it. None: takes all advice back.
        device
            That the advice is of, or "host": for "preferred_location" and "accessed_by".

        Raises
        ------
        ValueError
            There is no such advice, device or range, or it is not said whose advice it is.
        ReleasedError
            The memory, or the space, is gone.
        """
        moving.advise(self, what, advice, device)

    def where(self, what: Placeable) -> npt.NDArray[np.uint32]:
        """Tell where each page is, without a fault.

        Returns
        -------
        numpy.ndarray
            A word for each page of the host that the range touches: bits of `PageFlag`, the bit of each device by its
            place in `devices`. 0: nowhere; it reads as zeros. A descriptor that is mapped (`map_fd`) is always on the
            host.

        Raises
        ------
        ValueError
            It is not inside one reservation of this space.
        """
        return moving.where(self, what)

    def discard(self, what: Placeable) -> None:
        """Say that contents do not matter any more: they read as zeros afterwards, and nothing is copied for it.

        Of a granule that lies only partly inside nothing changes. What was lost with a device can be used again.

        Raises
        ------
        ValueError
            It is not inside one reservation of this space.
        NotSupportedError
            Not all of it is committed memory.
        """
        moving.discard(self, what)

    def pin_host(self, what: Placeable) -> moving.PinnedHost:
        """Keep memory on the host while a ``with`` block lasts; devices that want it wait.

        For system calls in a process whose userfaultfd serves user code only, and for whatever must not wait. It may be
        pinned more than once; it is given up when the last block ends. Until then it is not released or decommitted.

        Raises
        ------
        ValueError
            It is not inside one reservation of this space, not committed, or may not be accessed.
        NotSupportedError
            It maps a descriptor, which does not move.
        DeviceError
            Something of it could not come home.
        ReleasedError
            The memory, or the space, is gone.
        """
        return moving.PinnedHost(self, what)

    def movement(self) -> MovementStats:
        """Return what has moved so far, and for whom.

        Raises
        ------
        ReleasedError
            The space has been closed.
        """
        return moving.movement(self)

    # ---- truth -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check every invariant of the registry and of what hangs on it. O(n).

        Raises
        ------
        AssertionError
            One does not hold; the message says which, and where.
        """
        code = lib.uvas_check()
        if code < 0:
            raise AssertionError(str(raise_answer(code)))

    def audit(self) -> Report:
        """Compare what the kernel says with what the registry says, for every live reservation.

        Exact where nothing is committed. In committed anonymous memory it sees holes and visible differences: a
        stranger's anonymous mapping with the same protection merges with what is beside it without a trace. O(n log n)
        in reservations and their parts.

        Raises
        ------
        NotSupportedError
            ``/proc`` is not mounted.
        ReleasedError
            The space has been closed.
        """
        return inspect_space(self._cell[0], lib.uvas_audit)

    def heal(self) -> Report:
        """Audit, take holes back without replacing anything, and mark as lost what somebody else holds.

        What was committed in a hole is gone unless a descriptor holds it: the addresses are then reserved, and a touch
        faults.

        Raises
        ------
        NotSupportedError
            ``/proc`` is not mounted.
        ReleasedError
            The space has been closed.
        """
        return inspect_space(self._cell[0], lib.uvas_heal)

    def stats(self) -> SpaceStats:
        """Return what the space holds now and has done so far.

        Raises
        ------
        ReleasedError
            The space has been closed.
        """
        work_off()
        stats = ffi.new("struct uvas_space_stats *")
        code = lib.uvas_space_stats(self._cell[0], stats)
        if code < 0:
            raise raise_answer(code)
        return SpaceStats(**{name: getattr(stats, name) for name in SpaceStats.__slots__})

    # ---- the end -----------------------------------------------------------------------------------------------------

    @property
    def handle(self) -> int:
        """The core's id of it, for ``uvas.h``; 0: closed."""
        return int(self._cell[0])

    @property
    def parties(self) -> list[Party]:
        """The attached devices as the core knows them."""
        return self._parties

    @property
    def name(self) -> str:
        """What it was called."""
        return self._name

    @property
    def window(self) -> Range | None:
        """Where its reservations lie; None: anywhere."""
        return self._window

    @property
    def closed(self) -> bool:
        """Whether it is closed, or belongs to the process that this one was forked from."""
        return not self._cell[0] or self._generation is not generation()

    def close(self) -> None:
        """Release what is left in it and end it; the devices live on. A second time does nothing.

        Raises
        ------
        BufferError
            An array lives over a reservation of it, or an arena is open in it; raised before anything is released.
        DeviceError
            A device did not give a reservation back; what was released before stays released, and the space stays open.
        ReleasedError
            It belongs to the process that this one was forked from.
        """
        if not self._cell[0]:
            return
        work_off()
        code = lib.uvas_space_close(self._cell[0])
        if code == -EBUSY:
            gc.collect()
            if ordered.cards_of(self.devices):  # of arenas that were left by `with` streams may use the last blocks
                with suppress(UvasError):  # a stream is being captured, say: then it stays in use
                    ordered.collect(wait=True)
            work_off_with_others()  # an arena that was in a cycle, or is being closed
            code = lib.uvas_space_close(self._cell[0])
        if code == -EBUSY:
            refusal = raise_answer(code)
            holders = [repr(lease) for one in self.ranges() if isinstance(one, Reservation) for lease in one.holders()]
            raise BufferError(f"{refusal}: {'; '.join(holders)}" if holders else str(refusal))
        if code < 0:
            raise raise_answer(code)
        self._end()

    def _end(self) -> None:
        self._cell[0] = 0
        self._parties.clear()

    def when_unused(self) -> list[Errand]:
        """Return what is to be done when an array over one of its reservations has gone. For finalizers."""
        return [(lib.uvas_space_close, self._cell[0], tuple(self._parties))] if self._retired else []

    def __enter__(self) -> Self:
        if self.closed:
            raise ReleasedError(f"{self!r} is closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; under a live array refuse new ones and close when the last one goes, hiding no exception."""
        if self.closed:
            return
        gc.collect()
        work_off()
        code = lib.uvas_space_close(self._cell[0])
        if code == -EBUSY:
            work_off_with_others()
            code = lib.uvas_space_close(self._cell[0])
        if code != -EBUSY:
            if code < 0 and error is None:
                raise raise_answer(code)
            if code == 0:
                self._end()
            return
        self._retired = True
        for one in self.ranges():
            if isinstance(one, Reservation):
                one.retire()
        start_reaper()
        for errand in self.when_unused():  # the last array may have gone meanwhile
            enqueue(errand)

    def __del__(self) -> None:
        try:
            if self.closed or sys.is_finalizing():
                return
            if not self._retired:
                warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
            enqueue((lib.uvas_space_close, self._cell[0], tuple(self._parties)))
        except AttributeError:
            pass  # a constructor that raised, or an interpreter that has taken itself apart

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled or copied: addresses belong to one process")

    def __repr__(self) -> str:
        if self.closed:
            return f"<AddressSpace {self._name!r}, closed>"
        devices = ", ".join(party.info.name for party in self._parties)
        return f"<AddressSpace {self._name!r}{f' with {devices}' if devices else ''}>"
