"""A worker process as a device: it has an address space of its own and can refuse; what is committed is there too."""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from operator import index
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

from uvas._core import ffi, lib
from uvas.devices.base import Backing, DeviceInfo, LentMemory
from uvas.devices.calls import Call
from uvas.devices.link import Link
from uvas.devices.transport import dumps
from uvas.errors import (
    AddressInUseError,
    DeviceError,
    DeviceLostError,
    NotSupportedError,
    ReleasedError,
    UvasError,
    failure,
)
from uvas.interrupts import held_back
from uvas.ranges import Range

__all__ = ["ProcessDevice"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_CLOSE_S = 5.0
"""How long `close` lets the function at work go on."""

_GRANULE, _GRANULE_LEAST, _GRANULE_MOST = 64 << 10, 4 << 10, 2 << 20
"""Bytes: what is taken where nothing is said, and what is possible."""

_CAPACITY_MOST = (1 << 30) - 2
"""Granules: more are not counted."""

_PAGE = mmap.PAGESIZE

_COPY_BYTES = 1 << 20
"""What one request reads or writes at most: claims of other threads come in between."""


class ProcessDevice:
    """A worker process that holds the host's reservations at the same addresses, and calls functions there.

    The worker is a freshly executed process, not a fork: it has its own libraries and its own randomised layout, so
    that claiming an address in it can fail. What is committed is there at the same addresses: the very pages, or, with
    private memory, pages of its own.

    Functions travel as under `multiprocessing`'s spawn: by their module and name. A script that submits functions of
    its own must start its work under ``if __name__ == "__main__":``, because the worker imports it. Arrays in shared
    memory travel by address, without a copy, and so do plain addresses, being integers; `uvas.by_value` copies an array
    that lies elsewhere; all else goes by pickle.

    The worker ends with this process, however that ends. In a forked child the device is dead.

    Parameters
    ----------
    name
        For messages; None: one is made up.
    memory
        ``shared``: host and worker map the same pages. ``private``: the worker has memory of its own, and a granule of
        memory moves to whoever touches it, on a fault or ahead of time (`AddressSpace.prefetch`).
    capacity
        With private memory: bytes that the worker holds at most, of all its spaces together; None: as many as there is
        memory for.
    granule
        With private memory: bytes that move at once, a power of two from 4 KiB to 2 MiB. The same for all private
        devices of a space.

    Raises
    ------
    ValueError
        There is no such `memory`, `capacity` or `granule`.
    NotSupportedError
        `memory` is ``private`` and this process may not use userfaultfd, or the kernel's lacks something; the remedy
        says what would help.
    LimitReachedError
        This process may have no more descriptors.
    OSError
        There is no process to be had.
    RuntimeError
        This process is itself a worker that is importing ``__main__``: that lacks its ``if __name__ == "__main__":``.

    Notes
    -----
    A worker that ends is noticed at once: whoever waits for it gets DeviceLostError, as does the next call. The host's
    memory stays as it is. Interrupting this process (Ctrl-C) does not reach the worker. An interrupt waits for the
    exchange that is under way; a second one does not wait, and costs the device.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        memory: Literal["shared", "private"] = "shared",
        capacity: int | None = None,
        granule: int | None = None,
    ) -> None:
        self._capacity, self._granule = _own_memory(memory, capacity, granule)
        with held_back(even_a_second=True):  # an interrupt afterwards finds an object that ends its worker when it goes
            self._link = Link(name)
            weakref.finalize(self, self._link.abandon).atexit = False
        self._bases: set[int] = set()
        self._claiming: dict[int, int] = {}
        self._info = DeviceInfo(
            name=self._link.name,
            placement="claims",
            backings=frozenset(("anonymous", "descriptor") if memory == "private" else ("memfd", "descriptor")),
            granularity=self._granule if memory == "private" else 0,
            memory=memory,
            details={"pid": self._link.pid, "capacity": self._capacity}
            if memory == "private"
            else {"pid": self._link.pid},
        )

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._link.pid

    @property
    def info(self) -> DeviceInfo:
        """What the device declares."""
        return self._info

    def lend_memory(self) -> LentMemory:
        """Return what the pager needs to serve the worker's faults: for each space a descriptor of its own.

        Raises
        ------
        NotSupportedError
            The worker may not use userfaultfd.
        DeviceLostError, ReleasedError
            As of `claim`.
        """
        return LentMemory(self._link.borrow("lend_faults"), self._link.pidfd, self._capacity, self._granule, id(self))

    # ---- what a space asks -------------------------------------------------------------------------------------------

    def start_claim(self, range: Range, /) -> None:
        """Ask the worker for the range and do not wait: `claim` has the answer."""
        try:
            with held_back():
                self._claiming[range.base] = self._link.send("claim", range.base, range.size)
        except UvasError:
            return  # claim finds the same
        except BaseException:
            self._drop_claim(range)
            raise

    def claim(self, range: Range, /) -> None:
        """Hold the range in the worker, at the same addresses.

        Raises
        ------
        AddressInUseError
            Something of the worker's own is there; the owner names the device and what it is.
        DeviceLostError
            The worker is gone.
        ReleasedError
            The device is closed, or the parent process's.
        """
        try:
            with held_back():
                tag = self._claiming.pop(range.base, None)
                self._link.collect("claim", self._link.send("claim", range.base, range.size) if tag is None else tag)
                self._bases.add(range.base)
        except AddressInUseError as refusal:
            owner = f"{self._info.name}: {refusal.owner}"
            raise AddressInUseError(range, owner, refusal.obstacle) from None
        except UvasError:
            raise
        except BaseException:
            self._drop_claim(range)
            raise

    def _drop_claim(self, range: Range) -> None:
        """Undo a claim that was interrupted. The worker works in order, and passes over what it does not hold."""
        self._claiming.pop(range.base, None)
        self.unclaim(range)

    def unclaim(self, range: Range, /) -> None:
        """Give the range back, with whatever is committed in it. A worker that is gone holds nothing.

        Raises
        ------
        BufferError
            An array over it still lives in the worker: in a global of a function's module, say.
        """
        self._give_back("unclaim", range)
        self._bases.discard(range.base)

    def commit(self, range: Range, backing: Backing, protection: str, /) -> None:
        """Map what the host has there into the worker.

        Raises
        ------
        NotSupportedError
            It cannot be shared.
        DeviceLostError, ReleasedError
            As of `claim`.
        """
        if backing.descriptor is None or not backing.shared:
            raise NotSupportedError(
                f"{backing.kind} memory on {self._info.name}",
                "a worker can map only what is shared and has a descriptor",
            )
        with held_back():
            tag = self._link.send(
                "commit", range.base, range.size, backing.offset, protection, descriptor=backing.descriptor
            )
            self._link.collect("commit", tag)

    def decommit(self, range: Range, /) -> None:
        """Let go of the pages in the worker. A worker that is gone holds none."""
        self._give_back("decommit", range)

    def protect(self, range: Range, protection: str, /) -> None:
        """Change what may be done with committed pages in the worker.

        Raises
        ------
        DeviceLostError, ReleasedError
            As of `claim`.
        """
        with held_back():
            self._link.collect("protect", self._link.send("protect", range.base, range.size, protection))

    def _give_back(self, verb: str, range: Range) -> None:
        try:
            with held_back():
                self._link.collect(verb, self._link.send(verb, range.base, range.size))
        except (DeviceLostError, ReleasedError):
            if self._link.usable:
                raise

    # ---- what a person asks ------------------------------------------------------------------------------------------

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Let the worker call a function, after those submitted before it.

        The arrays among the arguments are held, and the memory under them leased, until the call is done. A call that
        waits for its turn can be cancelled; one at work cannot.

        Parameters
        ----------
        function
            Importable in the worker by its module and name, or a `CFunction`.
        *args, **kwargs
            For the function.

        Returns
        -------
        concurrent.futures.Future
            The result. An exception of the function comes back as itself, with the worker's traceback as its cause.

        Raises
        ------
        TypeError
            An array lies outside the memory that this device shares, and is not wrapped in `uvas.by_value`.
        pickle.PicklingError, AttributeError
            The function (a lambda, say) or an argument cannot be pickled.
        DeviceLostError, ReleasedError
            As of `claim`.
        """
        self._link.check("submit")
        message, held = dumps((function, args, kwargs), self._bases, self._info.name)
        name = getattr(function, "__qualname__", None) or repr(function)
        call = Call(name, message, (self, args, kwargs, held))
        self._link.submit(call)
        return call.future

    def run(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Let the worker call a function and return its result: `submit`, and wait."""
        return self.submit(function, *args, **kwargs).result()

    def read(self, address: int, size: int) -> bytes:
        """Return what the worker sees at an address.

        Raises
        ------
        DeviceError
            Not all of it is accessible there. The worker goes on.
        ValueError
            There is no such range of addresses.
        DeviceLostError, ReleasedError
            As of `claim`.
        """
        return b"".join(self._ask("read", start, size) for start, size in _parts(address, size))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Let the worker write at an address.

        If part of the range is not accessible there, what precedes it may have been written. Memory whose bytes were
        lost is used again from here on: the rest of its granules reads as zeros.

        Raises
        ------
        DeviceLostError
            As of `claim`; `lost` is what may not have been written.
        DeviceError, ValueError, ReleasedError
            As of `read`.
        """
        view = memoryview(data).cast("B")
        for start, size in _parts(address, len(view)):
            part = bytes(view[start - address :][:size])
            try:
                self._write_part(start, part)
            except DeviceLostError as gone:
                missing = Range(start, len(view) - (start - address))
                raise DeviceLostError(
                    gone.call, gone.code, gone.name, self._info.name, (missing,),
                    message=f"{gone}; of what was being written, {missing} may be missing",
                ) from gone  # fmt: skip

    def _write_part(self, address: int, data: bytes) -> None:
        try:
            self._ask("write", address, data)
        except DeviceLostError:
            raise
        except DeviceError:
            if not self._forget_lost(address, len(data)):
                raise
            self._ask("write", address, data)

    def _forget_lost(self, address: int, size: int) -> bool:
        """Let lost memory be used again, in whole granules; tell whether there was any."""
        found = ffi.new("struct uvas_found *")
        if self._info.memory == "shared" or lib.uvas_find(address, found) < 0:
            return False
        start = (address - found.base) // self._granule * self._granule
        length = -((start - (address - found.base) - size) // self._granule) * self._granule
        words = ffi.new("uint32_t[]", length // _PAGE)
        if lib.uvas_where(found.id, start, length, words) < 0:
            return False
        lost = sorted({at * _PAGE // self._granule for at, word in enumerate(words) if word & lib.UVAS_PAGE_LOST})
        for granule in lost:
            lib.uvas_discard(found.id, start + granule * self._granule, self._granule)
        return bool(lost)

    def _ask(self, verb: str, *arguments: Any) -> Any:
        with held_back():
            return self._link.collect(verb, self._link.send(verb, *arguments))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the worker. Idempotent; in a forked child it does nothing.

        Calls that wait for their turn are cancelled. The one at work may go on for five seconds; then the worker is
        killed.
        """
        self._link.close(_CLOSE_S)

    def __enter__(self) -> ProcessDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._link.usable else ", gone"
        what = f"process {self.pid}, {self._info.memory} memory, {len(self._bases)} ranges"
        return f"<ProcessDevice {self._info.name!r}: {what}{state}>"


def _own_memory(memory: str, capacity: int | None, granule: int | None) -> tuple[int | None, int]:
    """Check what is asked of a worker's memory, and whether it can be had; return capacity and granule."""
    if memory not in ("shared", "private"):
        raise ValueError(f"a worker's memory is 'shared' or 'private', not {memory!r}")
    if memory == "shared":
        if capacity is not None or granule is not None:
            raise ValueError("capacity and granule are of private memory: shared memory is the host's")
        return None, 0
    granule = _GRANULE if granule is None else index(granule)
    if not _GRANULE_LEAST <= granule <= _GRANULE_MOST or granule & (granule - 1):
        raise ValueError(
            f"a granule is a power of two from {_GRANULE_LEAST:#x} to {_GRANULE_MOST:#x} bytes, not {granule:#x}"
        )
    if capacity is not None and index(capacity) < granule:
        raise ValueError(f"a capacity of {capacity:#x} bytes has no room for a granule of {granule:#x}")
    if capacity is not None and capacity // granule > _CAPACITY_MOST:
        raise ValueError(f"a capacity of {capacity:#x} bytes is more than {_CAPACITY_MOST} granules of {granule:#x}")
    features = ffi.new("uint32_t *")
    code = lib.uvas_private_memory(features)
    if code < 0:
        raise failure(code)
    if features[0] & lib.UVAS_PRIVATE_USER_ONLY:
        _say_once()
    return capacity, granule


@cache
def _say_once() -> None:
    warnings.warn(
        "this process may serve page faults of code only: a system call that touches memory which is on a device fails "
        "with EFAULT. Keep the memory on the host meanwhile (AddressSpace.pin_host), or run as root or with "
        "CAP_SYS_PTRACE, set vm.unprivileged_userfaultfd = 1, or let the user open /dev/userfaultfd",
        RuntimeWarning,
        stacklevel=4,
    )


def _parts(address: int, size: int) -> list[tuple[int, int]]:
    """Cut a range into what one request copies."""
    address, size = index(address), index(size)
    if size == 0 and 0 <= address < 1 << 64:
        return []
    whole = Range(address, size)
    if whole.base == 0:
        raise ValueError(f"{whole} begins at 0x0, where nothing is")
    return [(start, min(_COPY_BYTES, whole.end - start)) for start in range(whole.base, whole.end, _COPY_BYTES)]
