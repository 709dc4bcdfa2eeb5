"""An OpenCL device that follows the host's pointers: system SVM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from errno import EFAULT
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from uvas.devices.base import Backing, DeviceInfo
from uvas.devices.committed import Committed
from uvas.devices.opencl.kernel import Kernel
from uvas.devices.opencl.launches import Launch, Waiter
from uvas.devices.opencl.platforms import choose, load, translated
from uvas.devices.opencl.probe import advertised_by
from uvas.errors import DeviceError, NotSupportedError, ReleasedError
from uvas.interrupts import held_back
from uvas.leases import generation
from uvas.ranges import Range

if TYPE_CHECKING:
    import pyopencl

__all__ = ["OpenCLDevice"]

_Size = int | Sequence[int]

_COPY = """
kernel void copy(ulong from, ulong to, ulong size) {
    for (ulong i = get_global_id(0); i < size; i += get_global_size(0)) {
        ((global uchar *)to)[i] = ((global const uchar *)from)[i];
    }
}
"""
_COPIERS = 256  # work items, however much is to be copied: for another number PoCL would compile anew

_CALLERS_MISTAKES = (
    "INVALID_ARG_SIZE",
    "INVALID_ARG_VALUE",
    "INVALID_CONTEXT",  # a kernel of another device
    "INVALID_GLOBAL_WORK_SIZE",
    "INVALID_WORK_DIMENSION",
    "INVALID_WORK_GROUP_SIZE",
    "INVALID_WORK_ITEM_SIZE",
)


class OpenCLDevice:
    """An OpenCL device whose kernels follow the host's pointers. Extra ``uvas[opencl]``.

    A host address is enough for it: nothing is claimed, copied or mapped. Kernels take arrays by address, and pointers
    stored in memory mean what they mean on the host. `context` and `queue` are pyopencl's, for whatever else one does
    with them; the queue runs commands in order.

    A device that merely says that it has system SVM is believed only after it was tried, and one that does not say so
    is tried as well: PoCL, which runs on any CPU, does not advertise it and has it. ``info.details`` keeps the two
    apart.

    Memory is given back only after the kernels that were launched before have ended. Protecting memory is not: a kernel
    on a CPU that writes to what has just become read-only ends the process, as any thread would that did.

    Parameters
    ----------
    device
        A `pyopencl.Device`; None: the first one that follows the host's pointers.
    name
        For messages; None: what the device calls itself.

    Raises
    ------
    NotSupportedError
        There is no pyopencl, no platform, or no device that follows the host's pointers; the message says what would
        help.
    DeviceError
        OpenCL refused something else.

    Notes
    -----
    In a forked child the device is dead. Interrupting (Ctrl-C) a thread that waits for a kernel interrupts it when the
    kernel has ended.
    """

    def __init__(self, device: pyopencl.Device | None = None, *, name: str | None = None) -> None:
        self._cl = load()
        chosen = choose(self._cl, device)
        own_name = chosen.name.strip()
        self._info = DeviceInfo(
            name=own_name if name is None else name,
            placement="follows",
            backings=frozenset(("anonymous", "memfd", "descriptor")),
            details={
                "platform": chosen.platform.name.strip(),
                "device": own_name,
                "driver": chosen.driver_version.strip(),
                "advertised": advertised_by(self._cl, chosen),
                "probed": ("fine_grain_system",),
            },
        )
        self._generation = generation()
        self._closed = False
        self._memory = Committed()
        self._order = threading.Lock()  # of looks at _memory with what is launched because of them, and its changes
        with self._driver():
            self._context = self._cl.Context([chosen])
            self._queue = self._cl.CommandQueue(self._context)
        self._copy = self.kernel(_COPY, "copy")
        self._waiter = Waiter(f"uvas-{self._info.name}")

    @property
    def info(self) -> DeviceInfo:
        """What the device declares; in its details the SVM that it says it has, and apart from that what was tried."""
        return self._info

    @property
    def context(self) -> pyopencl.Context:
        """OpenCL's context.

        Raises
        ------
        ReleasedError
            The device is closed, or the parent process's.
        """
        self._check("context")
        context: pyopencl.Context = self._context
        return context

    @property
    def queue(self) -> pyopencl.CommandQueue:
        """OpenCL's queue of commands; kernels of `submit` and `run` go there.

        Raises
        ------
        ReleasedError
            As of `context`.
        """
        self._check("queue")
        queue: pyopencl.CommandQueue = self._queue
        return queue

    # ---- what a space asks -------------------------------------------------------------------------------------------

    def claim(self, range: Range, /) -> None:
        """Nothing: a host address is enough."""

    def unclaim(self, range: Range, /) -> None:
        """Nothing is claimed; what is committed there is forgotten, as by `decommit`."""
        self.decommit(range)

    def commit(self, range: Range, backing: Backing, protection: str, /) -> None:
        """Take note of what kernels may be pointed to.

        Raises
        ------
        NotSupportedError
            Only another driver knows what is there.
        ReleasedError
            The device is closed, or the parent process's.
        """
        if backing.kind not in self._info.backings:
            raise NotSupportedError(f"{backing.kind} memory on {self._info.name}", "it follows the host's memory only")
        with self._order:
            self._check("commit")
            self._memory.put(range, protection)

    def decommit(self, range: Range, /) -> None:
        """Point no kernel there any more, and wait for those that are under way: they may follow pointers to it.

        Raises
        ------
        DeviceError
            OpenCL refused to wait.
        """
        with self._order:
            before = self._memory.pieces_of(range)
            self._memory.remove(range)
        try:
            self._finish()
        except BaseException:
            with self._order:
                for piece, protection in before:
                    self._memory.put(piece, protection)
            raise

    def protect(self, range: Range, protection: str, /) -> None:
        """Take note of what kernels may do there; no kernel is waited for.

        A space asks before the host's protection changes where something is taken away, and after it where something
        is given: what is noted here is never more than what the host allows.

        Raises
        ------
        ReleasedError
            As of `commit`.
        """
        with self._order:
            self._check("protect")
            self._memory.put(range, protection)

    def _finish(self) -> None:
        if self._generation is generation():  # also when it is closed: `close` may be waiting still
            with self._driver():
                self._queue.finish()

    # ---- what a person asks ------------------------------------------------------------------------------------------

    def kernel(self, source: str, name: str, *, options: Sequence[str] = ()) -> Kernel:
        """Build a program and return one of its kernels.

        Parameters
        ----------
        source
            OpenCL C.
        name
            The kernel's.
        options
            For the compiler: "-cl-fast-relaxed-math", "-D", "N=4".

        Raises
        ------
        ValueError
            It does not compile, and the message has the compiler's words; or there is no such kernel in it.
        DeviceError
            OpenCL refused something else.
        ReleasedError
            As of `commit`.
        """
        self._check("kernel")
        try:
            program = self._cl.Program(self._context, source).build([*options, "-cl-kernel-arg-info"])
        except self._cl.Error as error:
            failure = translated(self._cl, error, self._info.name)
            if failure.name in ("BUILD_PROGRAM_FAILURE", "INVALID_BUILD_OPTIONS", "INVALID_COMPILER_OPTIONS"):
                raise ValueError(f"the program of {name} cannot be built: {error}") from None
            raise failure from None
        with self._driver():
            names = [kernel.function_name for kernel in program.all_kernels()]
            if name not in names:
                raise ValueError(f"there is no kernel {name} in the program: {', '.join(names) or 'none at all'}")
            return Kernel(self._cl, self._cl.Kernel(program, name), self._info.name)

    def submit(self, kernel: Kernel, global_size: _Size, local_size: _Size | None, /, *args: object) -> Future[None]:
        """Launch a kernel, after those launched before it.

        Arrays in committed memory of the device's spaces are passed by address, and leased until the kernel has ended.
        So are addresses, for pointers and for ``ulong``, without a lease: whoever passes one sees to it that the memory
        behind it stays, as for pointers stored in memory. A number becomes what the parameter's type says.

        Parameters
        ----------
        kernel
            Of `kernel`, of this device.
        global_size, local_size
            Work items in all and in a group, a number or up to three; None: OpenCL chooses the groups.
        *args
            One for each parameter. For pointers to global and constant memory: an array, an address, None, or a buffer
            or SVM object of pyopencl's. For local memory: its bytes. Else numbers, or what pyopencl knows.

        Returns
        -------
        concurrent.futures.Future
            None, when the kernel has ended and what it wrote is there for the host. It cannot be cancelled.

        Raises
        ------
        TypeError
            An array or an address lies outside the memory that this device shares, or is no argument for its parameter;
            or there are too many or too few of them.
        ValueError
            Memory is protected against what the kernel may do there (a parameter that is not ``const`` may be written),
            or an array is not contiguous (in C's or Fortran's order), or OpenCL can do nothing with the sizes, or the
            kernel is another device's.
        OverflowError
            A number has no room in its parameter.
        DeviceError
            OpenCL refused something else.
        ReleasedError
            As of `commit`.
        """
        launch, begin = self._prepared(kernel, global_size, local_size, args)
        with held_back():  # from here on the kernel runs, and somebody has to hold what it uses
            begin()
            launch.future.set_running_or_notify_cancel()
            self._waiter.add(launch)
        return launch.future

    def run(self, kernel: Kernel, global_size: _Size, local_size: _Size | None, /, *args: object) -> None:
        """Launch a kernel and wait for its end; see `submit`."""
        launch, begin = self._prepared(kernel, global_size, local_size, args)
        self._see_through(launch, begin)

    def _see_through(self, launch: Launch, begin: Callable[[], None]) -> None:
        """Begin and wait; an interrupt does not get away before the kernel has ended."""
        try:
            begin()
            launch.wait()
        except BaseException:
            with self._driver():
                launch.finish(self._queue)
            raise

    def _prepared(
        self, kernel: Kernel, global_size: _Size, local_size: _Size | None, args: tuple[object, ...]
    ) -> tuple[Launch, Callable[[], None]]:
        """Lease what the kernel needs and return its launch, and what begins it."""
        sizes = _dimensions(global_size), None if local_size is None else _dimensions(local_size)
        self._check("launch")
        bound = kernel.bind(args)  # outside the lock: leases wait for who changes the memory meanwhile
        launch = Launch((self, args, bound.holds), self._translated)

        def begin() -> None:
            with self._order:
                self._check("launch")
                bound.check(self._memory, self._info.name)
                try:
                    for place, value in enumerate(bound.values):
                        kernel.raw.set_arg(place, value)
                    launch.begin(self._cl.enqueue_nd_range_kernel, self._queue, kernel.raw, *sizes)
                except self._cl.Error as error:
                    failure = self._translated(error)
                    if failure.name in _CALLERS_MISTAKES:
                        raise ValueError(f"{kernel.name} cannot be launched so: {error}") from None
                    raise failure from None

        return launch, begin

    def read(self, address: int, size: int) -> bytes:
        """Return what a kernel sees at an address.

        Raises
        ------
        DeviceError
            Not all of it is readable there; that is known before a kernel is sent.
        ValueError
            There is no such range of addresses.
        ReleasedError
            As of `commit`.
        """
        target = np.empty(index(size), np.uint8) if index(size) > 0 else np.empty(0, np.uint8)
        self._transfer("read", address, index(size), "r", address, target.ctypes.data)
        return target.tobytes()

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Let a kernel write at an address.

        Raises
        ------
        DeviceError, ValueError, ReleasedError
            As of `read`; nothing has been written then.
        """
        source = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        self._transfer("write", address, source.size, "rw", source.ctypes.data, address)

    def _transfer(self, verb: str, address: int, size: int, wanted: str, origin: int, target: int) -> None:
        self._check(verb)
        if size == 0 and 0 <= index(address) < 1 << 64:
            return
        place = Range(address, size)
        if place.base == 0:
            raise ValueError(f"{place} begins at 0x0, where nothing is")
        launch = Launch(self, self._translated)

        def begin() -> None:
            with self._order:
                self._check(verb)
                if not self._memory.allows(place, wanted):
                    raise DeviceError(
                        verb, EFAULT, "EFAULT", self._info.name,
                        message=f"{self._info.name} cannot {verb} {place}: not all of it is accessible there",
                    )  # fmt: skip
                copy = self._copy.raw
                with self._driver():
                    for argument, value in enumerate((origin, target, size)):
                        copy.set_arg(argument, np.uint64(value))
                    launch.begin(self._cl.enqueue_nd_range_kernel, self._queue, copy, (_COPIERS,), None)

        self._see_through(launch, begin)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the kernels that were launched, and end. Idempotent; in a forked child it does nothing.

        Raises
        ------
        DeviceError
            OpenCL refused to wait; the device is closed all the same.
        """
        if self._generation is not generation():
            return
        with self._order:
            already, self._closed = self._closed, True
        if already:
            return
        with self._driver():
            self._queue.finish()
        self._waiter.join()

    def _check(self, what: str) -> None:
        if self._generation is not generation():
            raise ReleasedError(f"{what} {self._info.name}: it belongs to the process that this one was forked from")
        if self._closed:
            raise ReleasedError(f"{what} {self._info.name}: it is closed")

    def _translated(self, error: Exception) -> DeviceError:
        return translated(self._cl, error, self._info.name)

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """Let OpenCL's errors out as uvas's."""
        try:
            yield
        except self._cl.Error as error:
            raise self._translated(error) from None

    def __enter__(self) -> OpenCLDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<OpenCLDevice {self._info.name!r} of {self._info.details['platform']}, system SVM{state}>"


def _dimensions(size: _Size) -> tuple[int, ...]:
    return tuple(index(one) for one in size) if isinstance(size, Sequence) else (index(size),)
