"""A CUDA driver for tests: real mappings underneath, and every rule of the driver's kept to the letter.

`FakeDriver` has the functions of cuda.bindings.driver that uvas calls, with its structures, constants and answers. What
a real driver leaves undefined is an assertion here: a call in a forked child, a release of what was never got.
A *card* reads and writes by `read` and `write`, as a kernel would, and dies of what a kernel would die of.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import pytest
from cuda.bindings import driver as cu
from machine import libc, map_at, mappings, unmap

GRANULARITY = 2 << 20
_FIXED = 0x10  # MAP_FIXED, over what the fake itself holds
_NORESERVE = 0x4000
OLD_BYTES = b"\xa5old contents"

_ANSWERS = cu.CUresult
_PROTECTIONS = {0: 0, 1: mmap.PROT_READ, 3: mmap.PROT_READ | mmap.PROT_WRITE}

HMM_CARD = {41: 1, 88: 1, 89: 1, 91: 1, 99: 1, 100: 0, 102: 1, 113: 1, 134: 0, 141: 1, 145: 1}
"""The attributes of a card that can everything."""
REGISTER_CARD = HMM_CARD | {88: 0}
VMM_CARD = HMM_CARD | {88: 0, 99: 0}
NUMA_CARD = VMM_CARD | {145: 0}
OLD_CARD = dict.fromkeys(HMM_CARD, 0) | {41: 1}


class CardDied(Exception):
    """A kernel touched what it may not: the context is gone."""


@dataclass
class FakeCard:
    """A card."""

    attributes: dict[int, int] = field(default_factory=lambda: dict(HMM_CARD))
    memory: int = 1 << 30
    peers: bool = True
    retained: int = 0
    sticky: Any = None


@dataclass(eq=False)
class Handle:
    """Physical memory."""

    number: int
    fd: int
    size: int
    kind: int
    card: int
    held: bool = True
    mapped: int = 0


@dataclass(eq=False)
class Mapped:
    """A handle at an address; access by place: a card's number or "host"."""

    base: int
    size: int
    handle: Handle
    access: dict[int | Literal["host"], int] = field(default_factory=dict)


class FakeDriver:
    """The driver.

    Parameters
    ----------
    cards
        What is plugged in.
    """

    def __init__(self, *cards: FakeCard) -> None:
        self.cards = list(cards) or [FakeCard()]
        self.version = 13010
        self.init_answer = _ANSWERS.CUDA_SUCCESS
        self.mood: Literal["honours", "moves", "refuses"] = "honours"
        self.honours_after = 0
        """Of hints that the driver would move: how many it moves before it honours one."""
        self.taken: list[tuple[int, int]] = []
        """Bases and sizes that the driver wants for itself, although nothing of the host's is there."""
        self.host_memory = 1 << 30
        self.capturing = False
        """Whether a stream of somebody else's is being captured, in the mode that everybody must be careful of."""
        self.apart = False
        """Whether that stream waits for no default stream."""
        self.spoiled: list[str] = []
        """Calls that ended a capture."""
        self.modes: dict[int, Any] = {}
        self.home: dict[int, int] = {}
        """The card of a stream or an event."""
        self.process = os.getpid()
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, Mapped] = {}
        self.handles: dict[int, Handle] = {}
        self.registered: dict[int, tuple[int, int]] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self.busy: set[int] = set()
        """Streams on which something runs, until somebody waits for it."""
        self.running: dict[int, int] = {}
        self.contexts: dict[int, list[int]] = {}
        self.calls: list[str] = []
        self.prefetched: list[tuple[int, int, int]] = []
        self.advised: list[tuple[int, int, int, int]] = []
        self.synchronized: list[int] = []
        self.registered_elsewhere = 0
        self._next = 1000
        self._fail_at, self._lasting, self._answer = 0, False, _ANSWERS.CUDA_ERROR_UNKNOWN
        self.made = 0
        self._lock = threading.RLock()

    # ---- failing on demand -------------------------------------------------------------------------------------------

    def fail(self, k: int, *, lasting: bool = False, answer: Any = _ANSWERS.CUDA_ERROR_UNKNOWN) -> None:
        """Let the k-th call from here on fail, once or with all that follow it. 0: none."""
        self._fail_at, self._lasting, self._answer, self.made = k, lasting, answer, 0

    def install(self, patch: Any) -> FakeDriver:
        """Stand in for the driver, by a monkeypatch."""
        for name in [one for one in dir(self) if one.startswith("cu")]:
            patch.setattr(cu, name, self._entry(name, getattr(self, name)))
        return self

    def _entry(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        bindings = getattr(cu, name)

        def entry(*arguments: Any) -> Any:
            assert os.getpid() == self.process, f"{name} in a forked child"
            _convert(bindings, arguments)
            with self._lock:
                self.calls.append(name)
                self.made += 1
                due = self._fail_at and (self.made == self._fail_at or (self._lasting and self.made > self._fail_at))
                answer = self._answer if due else self._sticky(name) or self._spoils(name) or function(*arguments)
            values = answer if isinstance(answer, tuple) else (answer,)
            # On failure what comes back besides is garbage.
            return values if not int(values[0]) else (values[0], *([0xDEAD_0000] * (_VALUES.get(name, 0))))

        entry.fake = self
        return entry

    def leaks(self) -> list[str]:
        """What has not been given back."""
        found = [f"reservation at {base:#x}" for base in self.reserved]
        found += [f"mapping at {base:#x}" for base in self.mapped]
        found += [f"memory {handle.number}" for handle in self.handles.values()]
        found += [f"registration at {base:#x}" for base in self.registered]
        found += [f"stream {stream}" for stream in self.streams] + [f"event {event}" for event in self.events]
        found += [f"context of card {i}" for i, card in enumerate(self.cards) if card.retained]
        return found + [f"context on the stack of thread {thread}" for thread, stack in self.contexts.items() if stack]

    def table(self, cards: int = 32) -> tuple[object, ...]:
        """All that it holds for the first cards and the host, to be compared."""
        seen = [0, 1, *range(2, cards), "host"]
        mapped = {
            base: (one.size, one.handle.number, [one.access.get(place, 0) for place in seen])
            for base, one in self.mapped.items()
        }
        handles = {number: (one.held, one.mapped) for number, one in self.handles.items()}
        return dict(self.reserved), mapped, handles, dict(self.registered)

    # ---- what a kernel does ------------------------------------------------------------------------------------------

    def read(self, card: int, address: int, size: int) -> bytes:
        """Read on a card."""
        return self._touch(card, address, size, 1, None)

    def write(self, card: int, address: int, data: bytes) -> None:
        """Write on a card."""
        self._touch(card, address, len(data), 3, data)

    def _touch(self, card: int, address: int, size: int, flags: int, data: bytes | None) -> bytes:
        if self.cards[card].sticky:
            raise CardDied(self.cards[card].sticky.name)
        for one in self.mapped.values():
            if one.base <= address and address + size <= one.base + one.size:
                if one.access.get(card, 0) & flags != flags:
                    break
                if data is not None:
                    os.pwrite(one.handle.fd, data, address - one.base)
                return os.pread(one.handle.fd, size, address - one.base)
        else:
            for base, (length, register_flags) in self.registered.items():
                if base <= address and address + size <= base + length and not (data and register_flags & 8):
                    return self._host_touch(address, size, data)
            if self.cards[card].attributes[88] and not any(b <= address < b + s for b, s in self.reserved.items()):
                there = [m for m in mappings(address, address + size) if m.permissions[1 if data else 0] != "-"]
                if sum(min(m.end, address + size) - max(m.start, address) for m in there) == size:
                    return self._host_touch(address, size, data)
        self.cards[card].sticky = _ANSWERS.CUDA_ERROR_ILLEGAL_ADDRESS
        raise CardDied(f"{address:#x}")

    @staticmethod
    def _host_touch(address: int, size: int, data: bytes | None) -> bytes:
        if data is not None:
            ctypes.memmove(address, data, size)
        return ctypes.string_at(address, size)

    # ---- the driver and its cards ------------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> Any:
        return _ANSWERS.CUDA_ERROR_INVALID_VALUE if flags else self.init_answer

    def cuDriverGetVersion(self) -> Any:
        return _OK, self.version

    def cuDeviceGetCount(self) -> Any:
        return _OK, len(self.cards)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return (_OK, cu.CUdevice(ordinal)) if 0 <= ordinal < len(self.cards) else _ANSWERS.CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetName(self, size: int, device: int) -> Any:
        return _OK, f"Fake {int(device)}".encode().ljust(size, b"\0")

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> Any:
        known = self.cards[int(device)].attributes
        return (_OK, known[int(attribute)]) if int(attribute) in known else _ANSWERS.CUDA_ERROR_INVALID_VALUE

    def cuDeviceCanAccessPeer(self, device: int, peer: int) -> Any:
        assert device != peer
        return _OK, int(self.cards[device].peers and self.cards[peer].peers)

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self.cards[int(device)].retained += 1
        return _OK, cu.CUcontext(500 + int(device))

    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        card = self.cards[int(device)]
        assert card.retained > 0, "released more often than retained"
        card.retained -= 1
        if not card.retained and card.sticky:  # what was in a context that died goes with it
            card.sticky = None
            self.streams.clear()
            self.events.clear()
        return _OK

    def cuCtxPushCurrent(self, context: int) -> Any:
        if not self.cards[int(context) - 500].retained:
            return _ANSWERS.CUDA_ERROR_INVALID_CONTEXT
        self.contexts.setdefault(threading.get_ident(), []).append(int(context) - 500)
        return _OK

    def cuCtxPopCurrent(self) -> Any:
        stack = self.contexts.get(threading.get_ident())
        return (_OK, 500 + stack.pop()) if stack else _ANSWERS.CUDA_ERROR_INVALID_CONTEXT

    def _current(self) -> int | None:
        stack = self.contexts.get(threading.get_ident())
        return stack[-1] if stack else None

    def _sticky(self, name: str) -> Any:
        """What the thread's context answers to everything; None: it is well."""
        if name.startswith(_WITHOUT_CONTEXT):
            return None
        card = self._current()
        if card is None:
            return _ANSWERS.CUDA_ERROR_INVALID_CONTEXT if name.startswith(_WITH_CONTEXT) else None
        return self.cards[card].sticky

    def _spoils(self, name: str) -> Any:
        """What a call is answered that ends a capture; None: it does not."""
        relaxed = self.modes.get(threading.get_ident()) == cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        harmless = name.startswith((*_WITHOUT_CONTEXT, "cuStreamIsCapturing", "cuStreamGetCtx", "cuEventDestroy"))
        if not self.capturing or harmless or (relaxed and name != "cuCtxSynchronize"):
            return None
        self.spoiled.append(name)
        return _ANSWERS.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

    def cuCtxSynchronize(self) -> Any:
        self.synchronized.append(self._current() or 0)
        return _OK

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        before = self.modes.get(threading.get_ident(), cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        self.modes[threading.get_ident()] = mode
        return _OK, before

    def cuMemGetInfo(self) -> Any:
        card = self.cards[self._current() or 0]
        return _OK, card.memory, card.memory

    # ---- addresses ---------------------------------------------------------------------------------------------------

    def cuMemAddressReserve(self, size: int, alignment: int, hint: int, flags: int) -> Any:
        assert alignment == 0 or alignment & (alignment - 1) == 0
        if size % mmap.PAGESIZE or hint % mmap.PAGESIZE or flags or not size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        if self.mood == "refuses":
            return _ANSWERS.CUDA_ERROR_OUT_OF_MEMORY
        wilful = self.mood == "moves" and self.honours_after <= 0
        if self.mood == "moves" and self.honours_after > 0:
            self.honours_after -= 1
            wilful = self.honours_after > 0
        wilful |= any(base < hint + size and hint < base + length for base, length in self.taken)
        if not wilful and hint % GRANULARITY == 0 and map_at(hint, size, 0, _NORESERVE):
            self.reserved[hint] = size
            return _OK, cu.CUdeviceptr(hint)
        at = 0x5000_0000_0000  # what it prefers: the first place that is free, the same again if it is given back
        while not map_at(at, size, 0, _NORESERVE):
            at += GRANULARITY
        self.reserved[at] = size
        return _OK, cu.CUdeviceptr(at)

    def cuMemAddressFree(self, address: Any, size: int) -> Any:
        base = int(address)
        if self.reserved.get(base) != size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        if any(base <= one < base + size for one in self.mapped):
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        del self.reserved[base]
        unmap(base, size)
        return _OK

    # ---- memory ------------------------------------------------------------------------------------------------------

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> Any:
        return (
            (_OK, GRANULARITY) if self._place(properties.location) is not None else _ANSWERS.CUDA_ERROR_INVALID_DEVICE
        )

    def _place(self, location: Any) -> int | Literal["host"] | None:
        kind, number = int(location.type), int(location.id)
        if kind == 1:
            return number if 0 <= number < len(self.cards) and self.cards[number].attributes[102] else None
        if kind == 2:
            return "host" if self.cards[0].attributes[145] else None
        if kind == 3:
            return "host" if self.cards[0].attributes[141] and number == self.cards[0].attributes[134] else None
        return None

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> Any:
        place = self._place(properties.location)
        if place is None:
            return _ANSWERS.CUDA_ERROR_INVALID_DEVICE
        if size % GRANULARITY or not size or flags or int(properties.type) != 1:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        room = self.host_memory if place == "host" else self.cards[place].memory
        if size > room:
            return _ANSWERS.CUDA_ERROR_OUT_OF_MEMORY
        self._account(place, -size)
        fd = os.memfd_create("fake cuda memory")
        os.ftruncate(fd, size)
        for at in range(0, size, GRANULARITY):
            os.pwrite(fd, OLD_BYTES, at + 4096)  # new memory holds what was there last
        self._next += 1
        handle = Handle(self._next, fd, size, int(properties.location.type), -1 if place == "host" else place)
        self.handles[handle.number] = handle
        return _OK, cu.CUmemGenericAllocationHandle(handle.number)

    def _account(self, place: int | Literal["host"], size: int) -> None:
        if place == "host":
            self.host_memory += size
        else:
            self.cards[place].memory += size

    def cuMemRelease(self, number: Any) -> Any:
        handle = self.handles.get(int(number))
        assert handle is not None, "released what was never got"
        assert handle.held, "released twice"
        handle.held = False
        self._end(handle)
        return _OK

    def _end(self, handle: Handle) -> None:
        if not handle.held and not handle.mapped:
            os.close(handle.fd)
            self._account("host" if handle.card < 0 else handle.card, handle.size)
            del self.handles[handle.number]

    def cuMemMap(self, address: Any, size: int, offset: int, number: Any, flags: int) -> Any:
        base, handle = int(address), self.handles.get(int(number))
        inside = any(b <= base and base + size <= b + s for b, s in self.reserved.items())
        taken = any(one.base < base + size and base < one.base + one.size for one in self.mapped.values())
        if handle is None or not handle.held or not inside or taken or offset or flags or size != handle.size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        if base % GRANULARITY or size % GRANULARITY:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        if handle.card < 0:
            assert libc.mmap(base, size, 0, mmap.MAP_SHARED | _FIXED, handle.fd, 0) == base
        handle.mapped += 1
        self.mapped[base] = Mapped(base, size, handle)
        return _OK

    def cuMemUnmap(self, address: Any, size: int) -> Any:
        one = self.mapped.get(int(address))
        if one is None or one.size != size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
        assert libc.mmap(one.base, size, 0, kind, -1, 0) == one.base
        del self.mapped[one.base]
        one.handle.mapped -= 1
        self._end(one.handle)
        return _OK

    def cuMemSetAccess(self, address: Any, size: int, descriptions: Any, count: int) -> Any:
        base, covered = int(address), 0
        assert count == len(descriptions) > 0
        inside = [one for one in self.mapped.values() if base <= one.base and one.base + one.size <= base + size]
        covered = sum(one.size for one in inside)
        if covered != size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE  # part of a mapping, or not all of it mapped
        for description in descriptions:
            place = self._place(description.location)
            for one in inside:
                on_card = one.handle.card
                apart = place not in ("host", on_card) and on_card >= 0
                if place is None or (
                    place == "host" and (on_card >= 0 or int(description.location.type) != one.handle.kind)
                ):
                    return _ANSWERS.CUDA_ERROR_INVALID_DEVICE
                if apart and not (self.cards[on_card].peers and self.cards[place].peers):
                    return _ANSWERS.CUDA_ERROR_INVALID_DEVICE
        for description in descriptions:
            place, flags = self._place(description.location), int(description.flags)
            for one in inside:
                one.access[place] = flags
                if place == "host":
                    assert libc.mprotect(one.base, one.size, _PROTECTIONS[flags]) == 0
        return _OK

    def cuMemsetD8Async(self, address: Any, value: int, size: int, stream: Any) -> Any:
        card = self._current()
        assert int(stream) in self.streams
        one = self.mapped.get(int(address))
        if one is None or one.size != size or one.access.get(card or 0, 0) != 3:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        os.truncate(one.handle.fd, 0)
        os.ftruncate(one.handle.fd, size)
        assert value == 0
        return _OK

    # ---- registering -------------------------------------------------------------------------------------------------

    def cuMemHostRegister(self, address: Any, size: int, flags: int) -> Any:
        base = int(address)
        assert not base % mmap.PAGESIZE
        assert not size % mmap.PAGESIZE
        if flags & ~0xF or not size:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        if flags & 8 and not self.cards[self._current() or 0].attributes.get(113):
            return _ANSWERS.CUDA_ERROR_NOT_SUPPORTED
        if any(b < base + size and base < b + s for b, (s, _) in self.registered.items()):
            return _ANSWERS.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
        if size > self.host_memory:
            return _ANSWERS.CUDA_ERROR_OUT_OF_MEMORY
        there = mappings(base, base + size)
        readable = sum(min(m.end, base + size) - max(m.start, base) for m in there if m.permissions[0] == "r")
        writable = sum(min(m.end, base + size) - max(m.start, base) for m in there if m.permissions[1] == "w")
        if readable != size or (writable != size and not flags & 8):
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        self.registered[base] = size, flags
        return _OK

    def cuMemHostUnregister(self, address: Any) -> Any:
        if int(address) not in self.registered:
            return _ANSWERS.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
        size, _ = self.registered[int(address)]
        assert sum(m.end - m.start for m in mappings(int(address), int(address) + size)) >= size, "unmapped before"
        del self.registered[int(address)]
        return _OK

    def cuMemHostGetDevicePointer(self, address: Any, flags: int) -> Any:
        found = self.registered.get(int(address))
        if flags or found is None or not found[1] & 2:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        return _OK, cu.CUdeviceptr(int(address) + self.registered_elsewhere)

    # ---- moving ------------------------------------------------------------------------------------------------------

    def cuMemPrefetchAsync(self, address: Any, size: int, location: Any, flags: int, stream: Any) -> Any:
        assert int(stream) in self.streams
        card = self._current() or 0
        if flags or not self._may_move(int(address), size, location) or self.home[int(stream)] != card:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        self.prefetched.append((int(address), size, int(location.id) if int(location.type) == 1 else -1))
        return _OK

    def _may_move(self, base: int, size: int, location: Any) -> bool:
        """Whether it is memory of the host's, all of it there, and a place where it can be."""
        there = [one for one in mappings(base, base + size) if one.permissions[:2] != "--"]
        kind, number = int(location.type), int(location.id)
        card = number if kind == 1 else self._current() or 0
        able = 0 <= card < len(self.cards) and self.cards[card].attributes[88] and self.cards[card].attributes[89]
        whole = sum(min(one.end, base + size) - max(one.start, base) for one in there) == size
        return bool(kind in (1, 2) and able and whole and size)

    def cuMemAdvise(self, address: Any, size: int, advice: Any, location: Any) -> Any:
        if not self._may_move(int(address), size, location):
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        self.advised.append((int(address), size, int(advice), int(location.id) if int(location.type) == 1 else -1))
        return _OK

    # ---- streams and events ------------------------------------------------------------------------------------------

    def _number(self, kind: set[int]) -> Any:
        self._next += 1
        kind.add(self._next)
        self.home[self._next] = self._current() or 0
        return _OK, (cu.CUstream if kind is self.streams else cu.CUevent)(self._next)

    def cuStreamCreate(self, flags: int) -> Any:
        if flags not in (0, 1):
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        return self._number(self.streams)

    def cuStreamDestroy(self, stream: Any) -> Any:
        assert int(stream) in self.streams, "destroyed what was never made"
        self.streams.discard(int(stream))
        return _OK

    def cuStreamSynchronize(self, stream: Any) -> Any:
        return _OK

    def cuStreamIsCapturing(self, stream: Any) -> Any:
        number = int(stream)
        if number in (0, 1):
            waits = self.capturing and not self.apart
            return _ANSWERS.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT if waits else (_OK, _STATUS(0))
        return _OK, _STATUS(int(self.capturing and number not in self.streams))

    def cuStreamGetCtx(self, stream: Any) -> Any:
        current = self._current()
        if int(stream) < 3 and current is None:
            return _ANSWERS.CUDA_ERROR_INVALID_CONTEXT
        return _OK, cu.CUcontext(500 + (current if int(stream) < 3 else self.home.get(int(stream), 0)))

    def cuEventCreate(self, flags: int) -> Any:
        if flags & ~7:
            return _ANSWERS.CUDA_ERROR_INVALID_VALUE
        return self._number(self.events)

    def cuEventDestroy(self, event: Any) -> Any:
        assert int(event) in self.events, "destroyed what was never made"
        self.events.discard(int(event))
        self.running.pop(int(event), None)
        return _OK

    def cuEventRecord(self, event: Any, stream: Any) -> Any:
        assert int(event) in self.events
        if self.home[int(event)] != self.home.get(int(stream), self._current() or 0):
            return _ANSWERS.CUDA_ERROR_INVALID_HANDLE
        if self.capturing and int(stream) not in self.streams:
            self.spoiled.append("cuEventRecord")  # it became a part of what is captured
        self.running[int(event)] = int(stream)
        return _OK

    def cuEventQuery(self, event: Any) -> Any:
        assert int(event) in self.events
        return _ANSWERS.CUDA_ERROR_NOT_READY if self.running.get(int(event)) in self.busy else _OK

    def cuEventSynchronize(self, event: Any) -> Any:
        assert int(event) in self.events
        self.busy.discard(self.running.get(int(event), -1))
        return _OK


_OK = _ANSWERS.CUDA_SUCCESS
_STATUS = cu.CUstreamCaptureStatus
_WITHOUT_CONTEXT = ("cuInit", "cuDriver", "cuDevice", "cuCtxPush", "cuCtxPop", "cuThread")
_WITH_CONTEXT = (
    "cuCtx",
    "cuMemGetInfo",
    "cuMemset",
    "cuMemHost",
    "cuMemPrefetch",
    "cuMemAdvise",
    "cuStreamCreate",
    "cuEventCreate",
)
_converted: set[tuple[object, ...]] = set()


def _convert(bindings: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Let the bindings make of the arguments what they would hand to a driver: they say what they do not take.

    Once for each function and kinds of arguments, as they look for the driver then; on a machine that has one, nothing
    is called.
    """
    key = bindings.__name__, *map(type, arguments)
    if key in _converted or hasattr(bindings, "fake") or _driver_there():
        return
    with pytest.raises(RuntimeError, match=r"libcuda|NVIDIA driver library"):
        bindings(*arguments)
    _converted.add(key)


@cache
def _driver_there() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


_VALUES = {
    "cuDriverGetVersion": 1, "cuDeviceGetCount": 1, "cuDeviceGet": 1, "cuDeviceGetName": 1, "cuDeviceGetAttribute": 1,
    "cuDeviceCanAccessPeer": 1, "cuDevicePrimaryCtxRetain": 1, "cuCtxPopCurrent": 1, "cuMemGetInfo": 2,
    "cuThreadExchangeStreamCaptureMode": 1, "cuMemAddressReserve": 1, "cuMemGetAllocationGranularity": 1,
    "cuMemCreate": 1, "cuMemHostGetDevicePointer": 1, "cuStreamCreate": 1, "cuStreamIsCapturing": 1,
    "cuStreamGetCtx": 1, "cuEventCreate": 1,
}  # fmt: skip
"""How many values a function returns besides its answer."""


@contextmanager
def fake_driver(patch: Any, *cards: FakeCard) -> Iterator[FakeDriver]:
    """A machine with these cards, while nobody else looks; afterwards nothing has leaked."""
    from uvas.devices.cuda import claims, driver, vmm

    driver.forget()
    fake = FakeDriver(*cards).install(patch)
    try:
        yield fake
        assert fake.spoiled == []
    finally:
        driver.forget()
        vmm.book.begin()
        claims.strays.clear()
