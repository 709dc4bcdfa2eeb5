"""Ranges that a space holds: reservations, and adoptions of what somebody else holds."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from errno import EBUSY, ESTALE
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt

from uvas._core import ffi, lib
from uvas.arguments import as_elements, as_size
from uvas.devices.adapter import located, raise_answer
from uvas.interop.view import card_of, cupy_view
from uvas.leases import Errand, Lease, ReservationTrace, enqueue, generation, live, start_reaper, work_off_with_others
from uvas.protection import protection_bits
from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.devices.base import Device
    from uvas.space import AddressSpace

_SHARING = {"shared": lib.UVAS_SHARED, "private": lib.UVAS_PRIVATE}


class _Held:
    """What reservations and adoptions have in common: a range, a handle that C wrote into a cell of theirs, an end."""

    __slots__ = ("__weakref__", "_base", "_cell", "_generation", "_name", "_size", "_space")

    def __init__(self, space: AddressSpace, name: str | None) -> None:
        self._cell = ffi.new("struct uvas_reservation *")
        self._space = space
        self._name = name
        self._generation = generation()
        self._base = self._size = 0

    def _settle(self) -> None:
        """C has made it: known from now on."""
        cell = self._cell
        self._base, self._size = cell.base, cell.size
        live[cell.id] = ReservationTrace.of(self, cell, self._space)

    def _forget(self) -> None:
        live.pop(self._cell.id, None)
        self._cell.id = 0

    @property
    def base(self) -> int:
        """The lowest address."""
        return self._base

    @property
    def size(self) -> int:
        """Bytes, as rounded up to pages and granularities."""
        return self._size

    @property
    def end(self) -> int:
        """The first address after it."""
        return self._base + self._size

    @property
    def range(self) -> Range:
        """Base and size as a value."""
        return Range(self._base, self._size)

    @property
    def space(self) -> AddressSpace:
        """The space that holds it."""
        return self._space

    @property
    def _released(self) -> bool:
        return not self._cell.id or self._generation is not generation()

    def __repr__(self) -> str:
        name = f" {self._name!r}" if self._name else ""
        state = ", released" if self._released else ""
        return f"<{type(self).__name__}{name} [{self.base:#x}, {self.end:#x}) of {self._space.name!r}{state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled or copied: addresses belong to one process; give others its base and size"
        )

    def __enter__(self) -> Self:
        return self


class Adoption(_Held):
    """Somebody else's range that uvas has been told of by `AddressSpace.adopt`; uvas never maps or unmaps it."""

    __slots__ = ()

    @property
    def owner(self) -> str:
        """Whose it is, as told."""
        return self._name or ""

    def release(self) -> None:
        """Forget it.

        Raises
        ------
        ReleasedError
            It has been released.
        """
        code = lib.uvas_release(self._cell.id)
        if code < 0:
            raise raise_answer(code)
        self._forget()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._released:
            self.release()


class Reservation(_Held):
    """A range of addresses that means the same on the host and on every device of its space.

    No memory is behind the addresses until it is committed. As a context manager it is released at the end; under a
    live array it then refuses new ones and is released when the last one goes, so that the user's own exception is
    never hidden.
    """

    __slots__ = ("_leases", "_retired")

    def __init__(self, space: AddressSpace, name: str | None) -> None:
        super().__init__(space, name)
        self._leases: weakref.WeakSet[Lease] | None = None
        self._retired = False

    @property
    def name(self) -> str | None:
        """What it was called at `reserve`, for people."""
        return self._name

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _part(self, offset: int, size: int | None) -> tuple[int, int]:
        start = as_size("offset", offset)
        return start, max(0, self._size - start) if size is None else as_size("size", size)

    def commit(
        self,
        offset: int = 0,
        size: int | None = None,
        *,
        protection: str = "rw",
        populate: bool = False,
        location: Literal["host"] | Device | Range = "host",
    ) -> None:
        """Put memory behind a part of the addresses, on every party; zeros where none was.

        What is committed already keeps its contents and gets the protection.

        Parameters
        ----------
        offset, size
            Bytes, multiples of the page; by default all.
        protection
            "none", "r", "rw", "rx" or "rwx".
        populate
            Bring the pages at once rather than when they are touched.
        location
            Where the memory is to lie, in a space whose addresses a device's driver holds: on a device of the space,
            where the host cannot touch it; or a range that was committed at once, whose memory is then to be had at
            both addresses.

        Raises
        ------
        ValueError
            The part is not inside the reservation, or not of whole pages, or the location is nobody of the space.
        NotSupportedError
            A device cannot have it there, or not so.
        OutOfMemoryError, LimitReachedError
            The host has no memory for it, or a limit stands against it.
        BufferError
            An arena lives there, which alone commits.
        AddressInUseError
            A part was lost to somebody else (`AddressSpace.heal` found it).
        DeviceError
            A device said no.
        ReleasedError
            The reservation has been released.
        """
        start, length = self._part(offset, size)
        flags = lib.UVAS_POPULATE if populate else 0
        if location != "host":
            self._space.check_location(location)
        with located(location):
            code = lib.uvas_commit(self._cell.id, start, length, protection_bits(protection), flags)
        if code < 0:
            raise raise_answer(code)

    def decommit(self, offset: int = 0, size: int | None = None) -> None:
        """Give memory back and keep the addresses; what is not committed is passed over.

        Raises
        ------
        ValueError
            The part is not inside the reservation, or not of whole pages.
        BufferError
            An array lives there.
        LimitReachedError
            The kernel has no mapping left to take the memory away with.
        DeviceError
            A device said no.
        ReleasedError
            The reservation has been released.
        """
        start, length = self._part(offset, size)
        self._unleased(lambda: lib.uvas_decommit(self._cell.id, start, length), start, length)

    def protect(self, offset: int, size: int, protection: str) -> None:
        """Change what may be done with a committed part; allowed under live arrays, which do not learn of it.

        Raises
        ------
        ValueError
            Not all of the part is committed, it is not inside the reservation, or there is no such protection.
        PermissionError
            It is a descriptor's that was not opened for that.
        DeviceError
            A device said no.
        ReleasedError
            The reservation has been released.
        """
        code = lib.uvas_protect(
            self._cell.id, as_size("offset", offset), as_size("size", size), protection_bits(protection)
        )
        if code < 0:
            raise raise_answer(code)

    def map_fd(
        self,
        fd: int,
        *,
        offset: int,
        size: int,
        fd_offset: int = 0,
        protection: str = "rw",
        sharing: Literal["shared", "private"] = "shared",
    ) -> None:
        """Map a file's or a device's descriptor, on every party, in place of what was committed there.

        Parameters
        ----------
        fd
            The descriptor; uvas keeps a duplicate.
        offset, size
            The part of the reservation, bytes; the size is rounded up as the kernel will round it (to 2 MiB for huge
            pages, say).
        fd_offset
            Of the first byte in the file.
        protection
            As for `commit`.
        sharing
            "shared" or "private" (copy on write).

        Raises
        ------
        ValueError
            The rounded part leaves the reservation, or the file cannot be mapped at that address or offset.
        BufferError
            An array lives there.
        NotSupportedError
            A device of the space cannot map it.
        OSError
            The kernel refused the descriptor; ``errno`` says why.
        ReleasedError
            The reservation has been released.
        """
        if sharing not in _SHARING:
            raise ValueError(f"{sharing!r} is neither 'shared' nor 'private'")
        start, length = self._part(offset, size)
        mapping = ffi.new("struct uvas_mapping *")
        mapping.descriptor = index(fd)
        mapping.sharing = _SHARING[sharing]
        mapping.offset, mapping.size = start, length
        mapping.descriptor_offset = as_size("fd_offset", fd_offset)
        mapping.protection = protection_bits(protection)
        self._unleased(lambda: lib.uvas_map_fd(self._cell.id, mapping), start, length)

    # ---- arrays ------------------------------------------------------------------------------------------------------

    def numpy(
        self, dtype: npt.DTypeLike, shape: int | Iterable[int] | None = None, *, offset: int = 0
    ) -> npt.NDArray[Any]:
        """Return an array over the memory itself; the memory stays as long as any view of it lives.

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
            In C order; read-only where the memory is.

        Raises
        ------
        ValueError
            Not all of it is committed and readable, or it does not fit.
        TypeError
            The elements hold Python objects, whose pointers mean nothing to anybody else.
        ReleasedError
            The reservation has been released.
        """
        start = as_size("offset", offset)
        kind, dimensions, size = as_elements(dtype, shape, start, self._size)
        lease = self._lease(start, size, f"array of {kind}, shape {dimensions}")
        return np.ndarray(dimensions, kind, buffer=np.asarray(lease))

    def cupy(self, dtype: npt.DTypeLike, shape: int | Iterable[int] | None = None, *, offset: int = 0) -> Any:
        """Return a CuPy array over the memory itself, also where it lies on a card.

        Parameters
        ----------
        dtype, shape, offset
            As of `numpy`.

        Returns
        -------
        cupy.ndarray
            In C order; the memory stays as long as any view of it lives.

        Raises
        ------
        ValueError
            Not all of it is committed, readable and writable, it does not fit, or no CUDA device of the space sees it.
        TypeError
            The elements hold Python objects.
        NotSupportedError
            CuPy is not installed.
        ReleasedError
            The reservation has been released.
        """
        start = as_size("offset", offset)
        kind, dimensions, size = as_elements(dtype, shape, start, self._size)
        card = card_of(self._space.devices, f"{self!r}")
        lease = self._lease(start, size, f"CuPy array of {kind}, shape {dimensions}", by_host=False)
        if lease.readonly:
            raise ValueError(f"{self!r} is read-only from {start:#x} on, which a CuPy array cannot be")
        return cupy_view(self._base + start, size, self._base + start, kind, dimensions, None, lease, card)

    def _lease(self, start: int, size: int, holder: str, *, by_host: bool = True) -> Lease:
        lease = Lease(self, start, size, readonly=False, holder=holder)
        code = lease.take(self._cell.id, start)
        if code < 0:
            raise raise_answer(code)
        if size:  # pages of more than one protection: the array may do what all of them allow
            bits = self._protection(start, start + size)
            if not bits & lib.UVAS_READ:
                raise ValueError(
                    f"[{self.base + start:#x}, {self.base + start + size:#x}) is protected against reading"
                )
            lease.readonly = not bits & lib.UVAS_WRITE
            if by_host:
                self._space.check_reach(Range(self._base + start, size))
        if self._leases is None:
            self._leases = weakref.WeakSet()
        self._leases.add(lease)
        return lease

    def _protection(self, start: int, end: int) -> int:
        pieces = ffi.new("struct uvas_piece[16]")
        count = ffi.new("size_t *")
        bits: int = lib.UVAS_READ | lib.UVAS_WRITE | lib.UVAS_EXECUTE
        while start < end:
            code = lib.uvas_pieces(self._cell.id, start, pieces, len(pieces), count)
            if code < 0:
                raise raise_answer(code)
            for piece in pieces[0 : count[0]]:
                if piece.offset >= end:
                    return bits
                bits &= piece.protection
                start = piece.offset + piece.size
            if not count[0]:
                return bits
        return bits

    # ---- the end -----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give memory and addresses back, on every party, exactly once.

        Raises
        ------
        BufferError
            An array over it lives; the message lists them.
        DeviceError
            A device said no: the reservation is as it was, unless the message says that it is poisoned.
        ReleasedError
            It has been released.
        """
        self._unleased(lambda: lib.uvas_release(self._cell.id), 0, self._size)
        self._forget()

    def _unleased(self, call: Callable[[], int], start: int, size: int) -> None:
        """Make a call that live arrays forbid: cycles that hold one are collected once before it is refused."""
        code = call()
        if code == -EBUSY:
            gc.collect()
            work_off_with_others()  # an array whose finalizer was interrupted
            code = call()
        if code == -EBUSY:
            refusal = raise_answer(code)
            holders = [
                repr(one)
                for one in self.holders()
                if one.address < self.base + start + size and self.base + start < one.address + one.size
            ]
            raise BufferError(f"{refusal}: {'; '.join(holders)}" if holders else str(refusal))
        if code < 0:
            raise raise_answer(code)

    def holders(self) -> list[Lease]:
        """Return the leases that live over it, by address."""
        return sorted(self._leases or (), key=lambda one: one.address)

    def retire(self) -> None:
        """Release it now if nothing uses it, else refuse new arrays and release it when the last one goes."""
        self._retired = True
        code = lib.uvas_retire(self._cell.id)
        if code == -EBUSY:
            start_reaper()
            # An array that went in between has seen that it is retired, or its errand finds nothing in the way.
            enqueue((lib.uvas_release, self._cell.id, self._space))
        elif code < 0 and code != -ESTALE:  # ESTALE: the last array has gone just now, and the reaper was faster
            raise raise_answer(code)
        else:
            self._forget()

    def when_unused(self) -> list[Errand]:
        """Return what is to be done when an array over it has gone. For finalizers."""
        errands: list[Errand] = []
        if self._retired and self._cell.id:
            errands.append((lib.uvas_release, self._cell.id, self._space))
        return errands + self._space.when_unused()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._released or self._space.closed:
            return
        if self._leases:
            gc.collect()
        self.retire()

    def __del__(self) -> None:
        try:
            identity = self._cell.id
            if not identity or self._generation is not generation() or sys.is_finalizing():
                return
            if identity not in live:  # else its trace ends it, whatever becomes of this
                enqueue((lib.uvas_release, identity, self._space))
            if not self._retired and not self._space.closed:
                warnings.warn(f"{self!r} was never released", ResourceWarning, source=self, stacklevel=2)
        except AttributeError:
            pass  # a constructor that raised, or an interpreter that has taken itself apart
