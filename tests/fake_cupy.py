"""As much of CuPy as tests, examples and benchmarks of real cards use, over the fake of the driver.

CuPy itself can do little without a driver. Here its arrays compute with NumPy and its kernels are compiled by the C
compiler, both on the addresses that the fake says a card has access to: what is wrong with an address, an argument, or
a kernel's arithmetic shows without a card.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from fake_cuda import FakeDriver
from machine import libc

from uvas._core import ffi
from uvas.interop import cupy_allocator

_FIXED, _NORESERVE = 0x10, 0x4000  # over what the fake itself holds
_KERNEL = r"""
typedef struct { unsigned x, y, z, w; } uint4;
static struct { unsigned x, y, z; } gridDim, blockDim, blockIdx, threadIdx;
#define __global__
%s
void launch(unsigned blocks, unsigned threads, const unsigned long long *with) {
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            %s(%s);
}
"""


@cache
def _compiled(source: str, name: str, count: int) -> Any:
    """Compile a kernel whose parameters are of 64 bits each."""
    arguments = ", ".join(f"with[{i}]" for i in range(count))
    with tempfile.TemporaryDirectory() as directory:
        path, library = Path(directory, "kernel.c"), Path(directory, "kernel.so")
        path.write_text(_KERNEL % (source.replace('extern "C"', ""), name, arguments))
        subprocess.run(["cc", "-O2", "-w", "-shared", "-fPIC", "-o", library, path], check=True)
        return ctypes.CDLL(str(library)).launch


class FakeCupy:
    """What stands in for CuPy while a test lasts; its state."""

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake
        self.own: set[int] = set()
        """Where CuPy's own memory begins."""
        self.allocate: Callable[[int], MemoryPointer] = self.plain
        self.stream = Stream(self, 0)
        self.tell: object = None
        self.numbers = itertools.count(5000)

    def plain(self, size: int) -> MemoryPointer:
        """Allocate as CuPy does by itself."""
        return MemoryPointer(Memory(size), 0)

    def touch(self, address: int) -> None:
        """Die as a card does of a pointer to what is not there."""
        if address not in self.own:
            self.fake.read(0, address, 1)

    @contextmanager
    def on_card(self) -> Iterator[None]:
        """Let this process touch what the card may: what lies on it has no mapping on the host otherwise."""
        there = [one for one in self.fake.mapped.values() if one.handle.card >= 0 and one.access.get(0)]
        for one in there:
            may = mmap.PROT_READ | (mmap.PROT_WRITE if one.access[0] == 3 else 0)
            assert libc.mmap(one.base, one.size, may, mmap.MAP_SHARED | _FIXED, one.handle.fd, 0) == one.base
        try:
            yield
        finally:
            for one in there:
                kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
                assert libc.mmap(one.base, one.size, 0, kind, -1, 0) == one.base


_now: FakeCupy


class UnownedMemory:
    """Memory of somebody else's."""

    def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id


class Memory:
    """Memory of CuPy's own: of the card, managed or pinned, all the same here."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1))
        self.ptr, self.size = ctypes.addressof(ctypes.c_char.from_buffer(self._map)), size
        _now.own.add(self.ptr)


class MemoryPointer:
    """An address in memory."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def copy_from_host_async(self, mem: ctypes.c_void_p, size: int, stream: object = None) -> None:
        ctypes.memmove(self.ptr, mem.value, size)

    def copy_to_host_async(self, mem: ctypes.c_void_p, size: int, stream: object = None) -> None:
        ctypes.memmove(mem.value, self.ptr, size)


class CFunctionAllocator:
    """Allocates by C functions, with the GIL."""

    def __init__(self, param: int, malloc_func: int, free_func: int, owner: object) -> None:
        self._param, self._owner = param, owner
        self._malloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(malloc_func)
        self._free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)(free_func)

    def malloc(self, size: int) -> MemoryPointer:
        return MemoryPointer(_Block(self, size), 0)


class _Block:
    def __init__(self, allocator: CFunctionAllocator, size: int) -> None:
        self._allocator, self.size = allocator, size
        self.ptr = (allocator._malloc(allocator._param, size, 0) or 0) if size else 0

    def __del__(self) -> None:
        if self.ptr:
            self._allocator._free(self._allocator._param, self.ptr, 0)


class MemoryPool:
    """A pool that keeps nothing."""

    def malloc(self, size: int) -> MemoryPointer:
        return _now.plain(size)

    def free_all_blocks(self) -> None:
        pass


class Stream:
    """A stream: what is launched on it has run when the launch returns."""

    def __init__(self, cupy: FakeCupy | None = None, ptr: int | None = None, *, non_blocking: bool = False) -> None:
        self._cupy = cupy or _now
        self.ptr = next(self._cupy.numbers) if ptr is None else ptr
        self.device_id = 0 if self.ptr else -1
        self._apart = non_blocking
        self._before: list[Stream] = []

    def synchronize(self) -> None:
        assert not self._cupy.fake.capturing

    def begin_capture(self) -> None:
        assert self.ptr, "the default stream cannot be captured"
        self._cupy.fake.capturing, self._cupy.fake.apart = True, self._apart

    def end_capture(self) -> Graph:
        self._cupy.fake.capturing = False
        assert self._cupy.fake.spoiled == []
        return Graph()

    def __enter__(self) -> Stream:
        self._before.append(self._cupy.stream)
        self._cupy.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy.stream = self._before.pop()


class Graph:
    """What was captured; kernels ran meanwhile, once."""

    def launch(self, stream: object = None) -> None:
        pass


class RawKernel:
    """A kernel in C."""

    def __init__(self, code: str, name: str) -> None:
        self._code, self._name = code, name

    def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[object, ...]) -> None:
        words = [one.data.ptr if isinstance(one, ndarray) else int(_word(one)) for one in args]
        parameters = re.search(rf"\b{self._name}\((.*?)\)", self._code)
        assert parameters is not None
        for word, parameter in zip(words, parameters[1].split(","), strict=True):
            if "*" in parameter:
                _now.touch(word)
        with _now.on_card():
            run = _compiled(self._code, self._name, len(words))
            run(grid[0], block[0], (ctypes.c_uint64 * len(words))(*words))


def _word(argument: object) -> np.uint64:
    assert isinstance(argument, np.uint64), f"{argument!r} would reach the kernel in another size"
    return argument


class ndarray:  # noqa: N801  # as CuPy calls it
    """An array on the card."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: tuple[int, ...] | None = None):
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype = np.dtype(dtype)
        example = np.lib.stride_tricks.as_strided(np.zeros(1, self.dtype), self.shape, strides)
        self.strides = np.empty(self.shape, self.dtype).strides if strides is None else example.strides
        self.size = int(np.prod(self.shape))
        self.data = memptr or _now.allocate(self.size * self.dtype.itemsize)

    def _seen(self) -> np.ndarray:
        """What a kernel sees, inside `on_card`."""
        interface = {
            "version": 3, "shape": self.shape, "strides": self.strides, "typestr": self.dtype.str,
            "data": (self.data.ptr, False),
        }  # fmt: skip
        return np.asarray(type("Seen", (), {"__array_interface__": interface})())

    def _with(self, other: object, work: Callable[..., np.ndarray]) -> ndarray:
        with _now.on_card():
            values = np.array(work(self._seen(), other._seen() if isinstance(other, ndarray) else other))
        return _array(values)

    def __add__(self, other: object) -> ndarray:
        return self._with(other, lambda a, b: a + b)

    def __mul__(self, other: object) -> ndarray:
        return self._with(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def _change(self, other: object, work: Callable[..., object]) -> ndarray:
        with _now.on_card():
            work(self._seen(), other._seen() if isinstance(other, ndarray) else other, out=self._seen())
        return self

    def __iadd__(self, other: object) -> ndarray:
        return self._change(other, np.add)

    def __isub__(self, other: object) -> ndarray:
        return self._change(other, np.subtract)

    def __imul__(self, other: object) -> ndarray:
        return self._change(other, np.multiply)

    def sum(self) -> ndarray:
        return self._with(None, lambda a, _: a.sum())

    def __getitem__(self, index: int) -> ndarray:
        return self._with(None, lambda a, _: a[index])

    def __int__(self) -> int:
        with _now.on_card():
            return int(self._seen())

    def __len__(self) -> int:
        return self.shape[0]


def _array(values: Any) -> ndarray:
    """A new array of these values."""
    values = np.asarray(values)
    made = ndarray(values.shape, values.dtype)
    with _now.on_card():
        made._seen()[...] = values
    return made


def _arange(count: int, dtype: Any = None) -> ndarray:
    return _array(np.arange(count, dtype=dtype))


@contextmanager
def _using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    before, _now.allocate = _now.allocate, allocator
    try:
        yield
    finally:
        _now.allocate = before


def install(patch: Any, fake: FakeDriver) -> FakeCupy:
    """Stand in for CuPy, by a monkeypatch, on a machine with this driver."""
    global _now
    _now = state = FakeCupy(fake)
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    memory, device = ModuleType("cupy.cuda.memory"), ModuleType("cupy.cuda.device")
    memory.__dict__.update(CFunctionAllocator=CFunctionAllocator, Memory=Memory, ManagedMemory=Memory)
    device.__dict__.update(get_device_id=lambda: 0)
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.__dict__.update(memGetInfo=lambda: (fake.cards[0].memory, fake.cards[0].memory))
    cuda.__dict__.update(
        memory=memory, device=device, runtime=runtime, UnownedMemory=UnownedMemory, MemoryPointer=MemoryPointer,
        PinnedMemory=Memory, MemoryPool=MemoryPool, Stream=Stream, get_current_stream=lambda: state.stream,
        using_allocator=_using_allocator,
    )  # fmt: skip
    cupy.__dict__.update(
        cuda=cuda, RawKernel=RawKernel, ndarray=ndarray, arange=_arange,
        empty=ndarray, zeros=lambda shape, dtype=float: _array(np.zeros(shape, dtype)), sum=lambda array: array.sum(),
    )  # fmt: skip
    for module in (cupy, cuda, memory, device, runtime):
        patch.setitem(sys.modules, module.__name__, module)
    tell = ffi.callback("intptr_t(void)", lambda: state.stream.ptr)
    state.tell = tell  # which lives as long
    patch.setattr(cupy_allocator, "_current_stream", lambda: tell)
    return state
