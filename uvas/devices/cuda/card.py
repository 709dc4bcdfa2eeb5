"""One GPU as the driver has it: what it can do, its context, and a stream of uvas's own on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from uvas.devices.cuda import driver
from uvas.devices.cuda.undo import Undo
from uvas.errors import DeviceError, DeviceLostError, UvasError
from uvas.ranges import Range

__all__ = ["Card", "can", "name_of"]

_ATTRIBUTES = {  # CUdevice_attribute of cuda.h, by what uvas calls it
    "unified addressing": "CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING",
    "pageable memory access": "CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS",
    "through the host's page tables": "CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES",
    "concurrent managed access": "CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS",
    "host registration": "CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED",
    "read-only registration": "CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED",
    "registered memory at host addresses": "CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM",
    "virtual memory management": "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "host-located mappings": "CU_DEVICE_ATTRIBUTE_HOST_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "node-located mappings": "CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    "host node": "CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID",
}
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: waits for nobody's default stream
_LEGACY = 0
"""The default stream, which waits for every stream that is not like that."""

_IN_A_CAPTURE = 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"  # what the driver would answer, and end the capture


def can(ordinal: int) -> dict[str, int]:
    """Return a card's attributes. A question that fails, or that this driver does not know, counts as 0."""
    answers = {}
    for what, name in _ATTRIBUTES.items():
        attribute = driver.enum("CUdevice_attribute", name)
        try:
            answers[what] = 0 if attribute is None else int(driver.call("cuDeviceGetAttribute", attribute, ordinal))
        except DeviceError:
            answers[what] = 0
    return answers


def name_of(ordinal: int) -> str:
    """Return a card's model."""
    raw = driver.call("cuDeviceGetName", 256, driver.call("cuDeviceGet", ordinal))
    return bytes(raw).split(b"\0")[0].decode(errors="replace")


class Card:
    """One GPU. Its primary context is held, which CuPy, PyTorch and the CUDA runtime use too.

    Parameters
    ----------
    ordinal
        The driver's number of it.

    Raises
    ------
    DeviceError
        The driver does not give its context.
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self.attributes = can(ordinal)
        self._loss: tuple[int, str] | None = None
        self.located: set[Range] = set()
        """Where memory of its own is mapped; lost with it."""
        self.model = name_of(ordinal)
        handle = self._handle = self._ask("cuDeviceGet", ordinal)
        self._lock = threading.Lock()  # of the next two; never held over a call
        self._open = True
        self._inside = 0
        """Calls that use the context which an open card holds: the last of them lets go of it where it was closed."""
        with Undo() as undo:
            self._context = self._ask("cuDevicePrimaryCtxRetain", handle)
            undo.push(lambda: self._ask("cuDevicePrimaryCtxRelease", handle))
            with self.current():
                self.stream = self._ask("cuStreamCreate", _NON_BLOCKING)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return driver.call(name, *arguments, device=self.name)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the driver, on behalf of this card.

        Raises
        ------
        DeviceLostError
            Its context is gone. `DeviceLostError.lost` has the ranges whose memory was the card's own.
        DeviceError
            The driver said no.
        """
        try:
            return self._ask(name, *arguments)
        except DeviceLostError as error:
            self._loss = error.code, error.name
            raise DeviceLostError(error.call, error.code, error.name, self.name, tuple(sorted(self.located))) from None

    @property
    def context(self) -> int:
        """The driver's handle of its primary context."""
        return int(self._context)

    @property
    def closed(self) -> bool:
        """Whether its context is held only while something is being called."""
        return not self._open

    @property
    def lost(self) -> bool:
        """Whether a sticky error has been seen: nothing of it works any more."""
        return self._loss is not None

    def check(self, verb: str) -> None:
        """Refuse to begin anything with a card that is gone.

        Raises
        ------
        DeviceLostError
            It is.
        """
        if self._loss is not None:
            raise DeviceLostError(verb, *self._loss, self.name, tuple(sorted(self.located)))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make its context the thread's own, and let what is called leave a stream capture of others alone.

        A card that is closed holds its context only meanwhile: memory outlives a ``with`` block where arrays do, and
        others may run kernels on it still.
        """
        with self._lock:
            held = self._open
            self._inside += held
        if not held:
            self._context = self.call("cuDevicePrimaryCtxRetain", self._handle)
        try:
            with self._pushed():
                yield
        finally:
            if held:
                self._leave()
            else:
                self._release()

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            last = not self._open and self._inside == 0
        if last:
            self._release()

    def _release(self) -> None:
        with suppress(UvasError):
            self.call("cuDevicePrimaryCtxRelease", self._handle)

    @contextmanager
    def _pushed(self) -> Iterator[None]:
        relaxed = driver.enum("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_RELAXED")
        self.call("cuCtxPushCurrent", self._context)
        try:
            before = self.call("cuThreadExchangeStreamCaptureMode", relaxed)
            try:
                yield
            finally:
                with suppress(DeviceError):
                    self.call("cuThreadExchangeStreamCaptureMode", before)
        finally:
            with suppress(DeviceError):  # what was done is done; a context too many on a thread's stack harms nobody
                self.call("cuCtxPopCurrent")

    def captures(self, stream: int = _LEGACY) -> bool:
        """Whether a stream is being captured; of the default one: whether any is that it waits for.

        The card is `current`. To ask does a capture no harm.

        Raises
        ------
        DeviceError
            The driver said no.
        """
        none = driver.enum("CUstreamCaptureStatus", "CU_STREAM_CAPTURE_STATUS_NONE")
        try:
            return bool(self.call("cuStreamIsCapturing", stream) != none)
        except DeviceError as error:
            if error.name == "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT":
                return True
            raise

    def synchronize(self, stream: int = _LEGACY) -> None:
        """Wait until nothing runs on it. A card that is gone runs nothing.

        Parameters
        ----------
        stream
            One that the caller knows of, to be looked at as well before the driver is asked to wait: that would end a
            capture. The driver does not tell of captures on other streams that do not wait for the default one.

        Raises
        ------
        DeviceError
            A stream of it is being captured: nothing may be taken away meanwhile. Or the driver said no otherwise.
        """
        if self.lost:
            return
        try:
            with self.current():
                if any(self.captures(one) for one in {_LEGACY, stream}):
                    raise DeviceError("cuCtxSynchronize", *_IN_A_CAPTURE, self.name)
                self.call("cuCtxSynchronize")
        except DeviceLostError:
            return  # noted; it runs nothing any more

    def free_bytes(self) -> int:
        """Return how much of its memory is free."""
        with self.current():
            return int(self.call("cuMemGetInfo")[0])

    def reaches(self, other: Card) -> bool:
        """Whether it can access another card's memory."""
        if other.ordinal == self.ordinal:
            return True
        try:
            return bool(self.call("cuDeviceCanAccessPeer", self.ordinal, other.ordinal))
        except DeviceError:
            return False

    def close(self) -> None:
        """Let go of the context. Idempotent; nothing is called where no call may be made."""
        if not driver.usable():
            self._open = False
            return
        with self._lock:
            was_open, self._open = self._open, False
            self._inside += was_open  # this call, too
        if not was_open:
            return
        with suppress(UvasError), self._pushed():
            self.call("cuStreamDestroy", self.stream)
        self._leave()
