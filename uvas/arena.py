"""Blocks of any size inside reservations: arenas, and the allocations that they hand out.

The work is done in C: `uvas.h` has the arena's contract, ``_core/allocation`` the objects. What the C core keeps of
the blocks lies apart from their memory, which may be on a device, protected, or not there at all.
"""

from __future__ import annotations

import gc
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from errno import EBUSY, EDQUOT, ENOMEM, ENOSPC, ESTALE
from itertools import count
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt

from uvas import ordered
from uvas._core import allocation as core
from uvas._core import fast, ffi, handler, lib
from uvas.allocation import Allocation as Allocation
from uvas.allocation import arenas
from uvas.arguments import as_choice, as_label, as_number, as_size
from uvas.devices.adapter import raise_answer
from uvas.devices.transport import address_of
from uvas.errors import OutOfMemoryError, ReleasedError, UvasError
from uvas.leases import enqueue, generation, put_errand, represent, start_reaper, work_off, work_off_with_others
from uvas.measurement import Measurement as Measurement
from uvas.measurement import Measuring
from uvas.ranges import Range
from uvas.region import Region
from uvas.reports import AllocationInfo, ArenaStats
from uvas.reservation import Reservation
from uvas.space import AddressSpace

Backing = Literal["auto", "none"]
Pages = Literal["any", "transparent", "huge"]
Guard = Literal["none", "large"]
Freed = Literal["kept", "poisoned"]

_BACKINGS: dict[str, int] = {"auto": 0, "none": lib.UVAS_ARENA_BARE}
_PAGES: dict[str, int] = {
    "any": lib.UVAS_PAGES_ANY,
    "transparent": lib.UVAS_PAGES_TRANSPARENT,
    "huge": lib.UVAS_PAGES_HUGE,
}
_GUARDS: dict[str, int] = {"none": 0, "large": lib.UVAS_ARENA_GUARD}
_FREED: dict[str, int] = {"kept": 0, "poisoned": lib.UVAS_ARENA_POISON}
_LARGEST_ALIGNMENT = 1 << 30
_NEVER = (1 << 64) - 1

_asked: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()
"""Those with somebody to ask when they are exhausted, by what C knows them by."""
_keys = count(1)


class _Close:
    """Closes an arena after its last block, if it has not been closed, and then what waited for it."""

    __slots__ = ("_home",)

    def __init__(self, home: AddressSpace | Reservation) -> None:
        self._home = home

    def __call__(self, identity: int) -> int:
        code = int(lib.uvas_arena_close(identity))
        for function, waiting, _alive in self._home.when_unused():
            function(waiting)
        return code


class Arena(core.Allocator):
    """An allocator over addresses that mean the same on the host and on every device.

    It commits memory as it needs it, and gives back what nobody has used for a while; or it hands out bare addresses.
    Allocating, freeing and looking up never touch the memory. Any thread may free a block.

    As a context manager it is closed at the end; under a live allocation it then hands out no more and closes when the
    last one goes.

    Parameters
    ----------
    home
        An `AddressSpace`, of which it takes reservations as it grows, the first for its first block; or a
        `Reservation`, in which it lives and never grows, and in which nobody else commits or maps anything unless its
        addresses are bare. (Blocks may be protected, and are to be as they were when they are freed.) Neither is closed
        or released before the arena.
    backing
        "auto": memory, as the space has it. "none": bare addresses; whoever gets a block maps behind it what he likes.
    limit
        Bytes of whole pages that its blocks may take; None: no limit.
    name
        For messages.
    pages
        What the memory is made of. "any": as the kernel likes. "transparent": transparent huge pages where the kernel
        can. "huge": pages of 2 MiB that the administrator has set aside.
    node
        The NUMA node whose memory it is; None: any.
    guard
        "large": after every large block a page that faults.
    freed
        What becomes of a block's bytes. "poisoned": they are overwritten when it is freed, which touches them.
    growth
        Bytes of addresses that it takes of a space at once; None: what suits most.
    idle
        Seconds after which unused memory is given back; `math.inf`: never.
    exhausted
        Asked, with the size, before an allocation fails for want of memory or room: it may free something, and returns
        whether to try once more. It is not asked on behalf of what it allocates in this arena itself. What it raises,
        `alloc` raises; when NumPy asked, that fails with `MemoryError`, and `sys.unraisablehook` is told what was
        raised. A `KeyboardInterrupt` then comes again, on the main thread, as soon as NumPy's function is done.

    Raises
    ------
    ValueError
        There is no such option, or a number cannot be.
    TypeError
        `home` is neither a space nor a reservation, or an option is not of its type.
    NotSupportedError
        There are no such pages or no such node here; the message says what would help.
    BufferError
        The reservation is in use, or something is committed in it.
    LimitReachedError, OutOfMemoryError
        There is no memory for what it keeps of its blocks, or no descriptor.
    ReleasedError
        `home` has been closed or released.
    """

    __slots__ = (
        "__weakref__",
        "_backing",
        "_cards",
        "_errors",
        "_exhausted",
        "_generation",
        "_home",
        "_key",
        "_limit",
        "_name",
        "_regions",
    )

    def __init__(
        self,
        home: AddressSpace | Reservation,
        *,
        backing: Backing = "auto",
        limit: int | None = None,
        name: str | None = None,
        pages: Pages = "any",
        node: int | None = None,
        guard: Guard = "none",
        freed: Freed = "kept",
        growth: int | None = None,
        idle: float | None = None,
        exhausted: Callable[[int], bool] | None = None,
    ) -> None:
        self._generation = generation()
        self._home = home
        label = as_label("arena" if name is None else name)
        self._name = name if name is not None else "arena"
        self._backing = backing
        self._exhausted = exhausted
        self._limit = as_number("limit", limit, 1, 1 << 64) if limit is not None else 0
        self._errors: dict[int, BaseException] = {}
        self._regions: dict[int, Region] = {}
        self._key = next(_keys)
        options = ffi.new("struct uvas_arena_options *")
        options.name = label
        if isinstance(home, AddressSpace):
            options.space = home._cell[0]
        elif isinstance(home, Reservation) and not isinstance(home, Region):
            options.reservation = home._cell.id
        else:
            raise TypeError(f"an arena lives in an AddressSpace or a Reservation, not in {home!r}")
        if not (options.space or options.reservation):
            raise ReleasedError(f"{home!r} has no addresses for an arena")
        options.flags = as_choice("backing", backing, _BACKINGS) | as_choice("guard", guard, _GUARDS)
        options.flags |= as_choice("freed", freed, _FREED)
        options.pages = as_choice("pages", pages, _PAGES)
        if node is not None:
            options.flags |= lib.UVAS_ARENA_BIND
            options.node = as_number("node", node, 0, 1 << 16)
        options.limit = self._limit
        if growth is not None:
            options.growth = as_number("growth", growth, 1, 1 << 64)
        options.idle_ns = 0 if idle is None else _nanoseconds(idle)
        if exhausted is not None and not callable(exhausted):
            raise TypeError(f"exhausted is called with a size: {exhausted!r} cannot be")
        self._cards = ordered.cards_of(home.devices if isinstance(home, AddressSpace) else home.space.devices)
        if exhausted is not None or self._cards:
            options.exhausted, options.context = lib.uvas_py_exhausted, ffi.cast("void *", self._key)
            _asked[self._key] = self
        work_off()
        block_source = core.Core(put_errand(), _Close(home))
        code = block_source.open(int(ffi.cast("uintptr_t", options)))
        if code < 0:
            raise raise_answer(code)
        super().__init__(block_source, Allocation)
        arenas[block_source.id] = self
        self._devices_changed()

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it was called."""
        return self._name

    @property
    def backing(self) -> Backing:
        """What is behind its blocks: "auto" or "none"."""
        return self._backing

    @property
    def space(self) -> AddressSpace:
        """The space whose addresses it hands out."""
        return self._home if isinstance(self._home, AddressSpace) else self._home.space

    @property
    def closed(self) -> bool:
        """Whether it hands out nothing more: closed, left by ``with``, or another process's before a fork."""
        return self._core is None or self._core.closing or self._generation is not generation()

    # ---- what alloc asks ---------------------------------------------------------------------------------------------

    def _refusal(self, size: object, align: object = 16) -> Exception:
        """Return what is wrong with numbers that C did not take."""
        try:
            if as_size("size", size) == 0:
                return ValueError("the size is at least 1 byte, not 0x0")
            alignment = as_size("align", align)
            if alignment & (alignment - 1) or not 0 < alignment <= _LARGEST_ALIGNMENT:
                return ValueError(f"the alignment is a power of two up to 1 GiB, not {alignment:#x}")
        except (TypeError, ValueError) as error:
            return error.with_traceback(None)
        return ValueError(f"no block of {size!r} bytes aligned to {align!r}")

    def _dead(self) -> ReleasedError:
        return ReleasedError(f"{self!r} hands out nothing more")

    def _work_off(self) -> None:
        work_off()
        if self._cards:
            ordered.look(self._core.id)

    def _devices_changed(self) -> None:
        """Look which cards there are; the space calls this too."""
        self._cards = ordered.cards_of(self.space.devices)
        self._core.order(bool(self._cards))

    def _note(self, block: Allocation) -> None:
        """Note which stream is current. C calls this for each block, where there are cards."""
        if cards := self._cards:
            ordered.note(block, self._core, cards)

    def _failed(self, code: int, size: int) -> BaseException:
        """Return what to raise for an allocation that C refused."""
        error = raise_answer(code)
        raised = self._errors.pop(threading.get_ident(), None)
        if raised is not None and -code in (ENOMEM, ENOSPC, EDQUOT):
            raised.__context__ = error
            return raised
        if not isinstance(error, OutOfMemoryError) or error.limit is None:
            return error
        stats = self.stats()
        message = (
            f"{self!r} has no room for {size:#x} bytes: of its limit of {error.limit:#x}, {stats.used_bytes:#x} are in "
            f"use ({stats.live_blocks} {'block' if stats.live_blocks == 1 else 'blocks'} of {stats.live_bytes:#x}); "
            f"the largest hole has {stats.largest_hole:#x}"
        )
        who = f"arena {self._name!r}"
        return OutOfMemoryError(size, who, error.limit, stats.used_bytes, stats.largest_hole, message=message)

    def _ask(self, size: int) -> bool:
        """Ask the user's callback. C calls this, on the thread that allocates."""
        self._errors.pop(threading.get_ident(), None)
        numpy = handler.asks(0)  # who allocates in the callback raises what he is told
        try:
            if self._cards and self._wait_for_streams():
                return True
            return self._exhausted is not None and bool(self._exhausted(size))
        except BaseException as error:
            if numpy:
                handler.asks(numpy)
                handler.tell(error, self._exhausted)
                numpy = handler.asks(0)
            else:
                self._errors[threading.get_ident()] = error
            return False
        finally:
            handler.asks(numpy)

    def _wait_for_streams(self) -> bool:
        """Wait for the streams that use what has been freed; whether something came back."""
        work_off()
        before = ordered.pending(self._core.id)
        if before:
            with suppress(UvasError):  # a stream is being captured, say
                ordered.collect(self._core.id, wait=True)
        return ordered.pending(self._core.id) < before

    # ---- what it holds -----------------------------------------------------------------------------------------------

    def stats(self) -> ArenaStats:
        """Return what it holds now and has done so far. O(n) in pages for the resident bytes, otherwise O(1).

        Raises
        ------
        ReleasedError
            It has been closed.
        """
        work_off()
        stats = ffi.new("struct uvas_arena_stats *")
        self._call(lib.uvas_arena_stats, stats)
        return ArenaStats(**{name: getattr(stats, name) for name in ArenaStats.__slots__})

    def measure(self) -> Measuring:
        """Return a context manager: ``with arena.measure() as used:`` tells what a block of code allocated.

        Allocations of all threads count. Blocks of code may be nested; two that overlap otherwise, in two threads, see
        each other's peak.

        Raises
        ------
        ReleasedError
            The arena has been closed; at the beginning of the block.

        Examples
        --------
        >>> with AddressSpace() as space, Arena(space) as arena:
        ...     with arena.measure() as used:
        ...         kept = arena.alloc(1000)
        ...         arena.alloc(500).free()
        ...     used.allocations, used.live_blocks
        ...     kept.free()
        (2, 1)
        """
        return Measuring(self)

    def restart_peak(self, floor: int) -> int:
        """Count the peak anew, from `floor` or what is used now; return what it had been. For `Measurement`."""
        was = ffi.new("uint64_t *")
        self._call(lib.uvas_arena_peak, floor, was)
        return int(was[0])

    def trim(self) -> int:
        """Give back what threads keep and the memory of all holes; return its bytes. Addresses stay held.

        Raises
        ------
        ReleasedError
            It has been closed.
        """
        ordered.collect(self._core.id)
        given = ffi.new("uint64_t *")
        self._call(lib.uvas_arena_trim, given)
        return int(given[0])

    def check(self) -> None:
        """Check every invariant, while no thread allocates or frees. O(n).

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        ReleasedError
            It has been closed.
        """
        work_off()
        try:
            self._call(lib.uvas_arena_check)
        except ValueError as error:
            if isinstance(error, ReleasedError):
                raise
            raise AssertionError(str(error)) from None

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:
        if self.closed and not (self._core and self._core.id and self._generation is generation()):
            raise self._dead()
        code = function(self._core.id, *arguments)
        if code < 0:
            raise raise_answer(code)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give its reservations back and end it. A second time does nothing.

        Raises
        ------
        BufferError
            Blocks of it live, or NumPy allocates from it: nothing has changed.
        DeviceError
            A device did not give a reservation back.
        ReleasedError
            It belongs to the process that this one was forked from.
        """
        if self._generation is not generation():
            raise self._dead()
        if not self._core.id or self._core.closing:
            return
        code = self._try_to_close()
        if code == -EBUSY:
            stats = self.stats()
            users = self._core.use(0)
            numpy = f", and NumPy allocates from it ({users} users)" if users else ""
            one = stats.live_blocks == 1
            raise BufferError(
                f"{self!r} is not closed: {stats.live_blocks} {'block' if one else 'blocks'} of {stats.live_bytes:#x} "
                f"bytes {'lives' if one else 'live'}{numpy}"
            )
        if code < 0 and code != -ESTALE:
            raise raise_answer(code)

    def _try_to_close(self) -> int:
        """Close it if nothing uses it; return what C says.

        Cycles that may are collected, and waited for are streams, and other threads that are giving blocks back.
        """
        ordered.collect(self._core.id, wait=True)
        code = -EBUSY if self._core.use(0) else self._core.close()
        if code == -EBUSY:
            gc.collect()
            work_off_with_others()
            ordered.collect(self._core.id, wait=True)
            code = -EBUSY if self._core.use(0) else self._core.close()
        if code == 0:
            self._forget()
            for errand in self._home.when_unused():  # it was left by ``with`` before the arena was closed
                enqueue(errand)
        return code

    def _forget(self) -> None:
        self._regions.clear()
        self._exhausted = None
        _asked.pop(self._key, None)

    def __enter__(self) -> Self:
        if self.closed:
            raise self._dead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; under a live block hand out no more, and close when the last one goes, hiding no exception."""
        if self.closed:
            return
        code = self._try_to_close()
        if code == -EBUSY:
            self._core.retire()
            self._exhausted = None
            start_reaper()
            enqueue((_Close(self._home), self._core.id, None))  # the last block may have gone meanwhile
        elif code < 0 and error is None:
            raise raise_answer(code)

    def __del__(self) -> None:
        try:
            if not self.closed and not sys.is_finalizing():
                warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
        except AttributeError:
            pass  # a constructor that raised, or an interpreter that has taken itself apart

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled or copied: addresses belong to one process")

    def __repr__(self) -> str:
        return f"<Arena {self._name!r} of {self.space.name!r}{', closed' if self.closed else ''}>"


def allocation_of(array_or_address: npt.NDArray[Any] | int) -> AllocationInfo | None:
    """Return the live block of an arena that holds an address or an array's first element, None if there is none.

    Takes no lock.

    Parameters
    ----------
    array_or_address
        Any address inside, or an array, however it was allocated.

    Raises
    ------
    TypeError
        It is neither.

    Examples
    --------
    >>> with AddressSpace() as space, Arena(space) as arena, arena.alloc(1000) as block:
    ...     allocation_of(block.base + 999).range.base == block.base
    True
    """
    given = array_or_address
    found = fast.find_allocation(address_of(given) if isinstance(given, np.ndarray) else given)
    if found is None:
        return None
    base, size, identity = found
    return AllocationInfo(Range(base, size), arenas.get(identity))


# ---- details ---------------------------------------------------------------------------------------------------------


def _nanoseconds(seconds: float) -> int:
    if not seconds > 0:
        raise ValueError(f"idle is a number of seconds above 0, not {seconds!r}")
    return _NEVER if math.isinf(seconds) else min(max(1, round(seconds * 1e9)), _NEVER - 1)


def _represent(address: int) -> Reservation | None:
    """Return the reservation that an arena has made for itself there, as an object."""
    held = fast.held(address)
    if held is None:
        return None
    found, cell = ffi.new("struct uvas_found *"), ffi.new("uvas_id *")
    arena = arenas.get(cell[0]) if lib.uvas_find_arena(held[0], cell) == 0 else None
    if arena is None or lib.uvas_find(held[0], found) < 0:
        return None
    region = arena._regions.get(found.id)
    if region is None:
        region = arena._regions.setdefault(found.id, Region(arena.space, arena, found))
    return region


represent.append(_represent)


@ffi.def_extern(error=0)
def uvas_py_exhausted(context: Any, size: int) -> int:
    """Ask an arena's callback whether to try once more."""
    arena = _asked.get(int(ffi.cast("uintptr_t", context)))
    return int(arena is not None and arena._ask(size))
