"""The memories, allocators and reservers that gpu.py compares: uvas's and others', each behind a few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import uvas

MIB = 1 << 20
_POOL_BYTES = 2 << 30

_COPY = r"""
extern "C" __global__ void copy(const uint4 *from, uint4 *to, unsigned long long count) {
    unsigned long long stride = gridDim.x * (unsigned long long)blockDim.x;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < count; i += stride)
        to[i] = from[i];
}
"""
_WALK = r"""
struct node { unsigned long long next, value; };
extern "C" __global__ void walk(const struct node *at, unsigned long long *sum) {
    unsigned long long total = 0;
    for (; at; at = (const struct node *)at->next) total += at->value;
    *sum = total;
}
"""


@dataclass
class Memory:
    """Bytes at an address that a kernel can use."""

    address: int
    size: int
    keep: object
    on_host: bool = True

    def host(self, dtype: str) -> np.ndarray:
        """Return them as the host sees them."""
        if not self.on_host:
            raise ValueError("the host cannot touch it")
        interface = {"version": 3, "shape": (self.size,), "typestr": "|u1", "data": (self.address, False)}
        return np.asarray(type("Bytes", (), {"__array_interface__": interface, "keep": self.keep})()).view(dtype)


Maker = Callable[[int], AbstractContextManager[Memory]]


def memories() -> dict[str, Maker]:
    """Every kind of memory, by name; the peers first."""
    return {
        "cudaMalloc": _of_cupy(lambda cupy, size: cupy.cuda.memory.Memory(size), on_host=False),
        "cudaMallocHost": _pinned,
        "cudaMallocManaged": _of_cupy(lambda cupy, size: cupy.cuda.memory.ManagedMemory(size), on_host=True),
        "uvas hmm": _of_uvas("hmm"),
        "uvas register": _of_uvas("register"),
        "uvas vmm, on the host": _of_uvas("vmm"),
        "uvas vmm, on the card": _of_uvas("vmm", on_card=True),
    }


def fresh_memories() -> dict[str, Maker]:
    """Memory whose pages nobody has touched, and that the card may touch first."""
    managed = _of_cupy(lambda cupy, size: cupy.cuda.memory.ManagedMemory(size), on_host=True)
    return {"cudaMallocManaged": managed, "uvas hmm": _of_uvas("hmm", fresh=True)}


def _of_cupy(make: Callable[[Any, int], Any], on_host: bool) -> Maker:
    @contextmanager
    def maker(size: int) -> Iterator[Memory]:
        import cupy

        memory = make(cupy, size)
        yield Memory(memory.ptr, size, memory, on_host)

    return maker


@contextmanager
def _pinned(size: int) -> Iterator[Memory]:
    import cupy

    memory = cupy.cuda.PinnedMemory(size)
    yield Memory(memory.ptr, size, memory)


def _of_uvas(strategy: str, on_card: bool = False, fresh: bool = False) -> Maker:
    @contextmanager
    def maker(size: int) -> Iterator[Memory]:
        with (
            uvas.CudaDevice(strategy=strategy) as device,  # type: ignore[arg-type]
            uvas.AddressSpace([device]) as space,
            space.reserve(size) as held,
        ):
            held.commit(location=device if on_card else "host")
            if strategy == "hmm" and not fresh:
                held.numpy("u1")[:] = 1
                space.prefetch(held, device)
            yield Memory(held.base, size, held, not on_card)

    return maker


class CopyKernel:
    """Copies on the card, by a kernel."""

    def __init__(self) -> None:
        import cupy

        self._kernel = cupy.RawKernel(_COPY, "copy")
        self._stream = cupy.cuda.get_current_stream()

    def __call__(self, source: int, target: int, size: int, *, wait: bool = True) -> None:
        """Copy, and wait for it or not."""
        self._kernel((1024,), (256,), (np.uint64(source), np.uint64(target), np.uint64(size // 16)))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for what was launched."""
        self._stream.synchronize()


def walk_kernel(address: int, expected: int) -> Callable[[int], object]:
    """Return what follows a list so many times, and checks the sum once."""
    import cupy

    kernel, total = cupy.RawKernel(_WALK, "walk"), cupy.zeros(1, "u8")

    def work(count: int) -> None:
        for _ in range(count):
            kernel((1,), (1,), (np.uint64(address), total))
        if int(total[0]) != expected:
            raise AssertionError(f"the list adds up to {int(total[0])}, not {expected}")

    work(1)
    return work


@contextmanager
def pinned_copy(size: int) -> Iterator[Callable[[int], object]]:
    """Give what copies to the card and back from pinned memory."""
    import cupy

    host, card = cupy.cuda.PinnedMemory(size), cupy.cuda.memory.Memory(size)
    pointer, stream = cupy.cuda.MemoryPointer(card, 0), cupy.cuda.get_current_stream()

    def work(count: int) -> None:
        import ctypes

        for _ in range(count):
            pointer.copy_from_host_async(ctypes.c_void_p(host.ptr), size, stream)
            pointer.copy_to_host_async(ctypes.c_void_p(host.ptr), size, stream)
        stream.synchronize()

    yield work


# ---- allocators ------------------------------------------------------------------------------------------------------


def allocators() -> dict[str, Callable[[], AbstractContextManager[Callable[[int], object]]]]:
    """Return what allocates on the card; what it returns frees when it goes."""
    return {
        "uvas: cupy_allocator": _uvas_allocator,
        "cupy.cuda.MemoryPool": _cupy_pool,
        "torch, expandable segments": _torch,
        "rmm PoolMemoryResource": _rmm,
    }


@contextmanager
def _uvas_allocator() -> Iterator[Callable[[int], object]]:
    with (
        uvas.CudaDevice(strategy="vmm") as device,
        uvas.AddressSpace([device]) as space,
        space.reserve(_POOL_BYTES) as held,
        uvas.Arena(held, backing="none") as arena,
    ):
        held.commit(location=device)
        allocator = uvas.cupy_allocator(arena)
        yield allocator
        allocator.close()
        held.decommit()


@contextmanager
def _cupy_pool() -> Iterator[Callable[[int], object]]:
    import cupy

    pool = cupy.cuda.MemoryPool()
    yield pool.malloc
    pool.free_all_blocks()


@contextmanager
def _torch() -> Iterator[Callable[[int], object]]:
    import torch

    torch.cuda.init()
    yield lambda size: torch.cuda.caching_allocator_delete(torch.cuda.caching_allocator_alloc(size))
    torch.cuda.empty_cache()


@contextmanager
def _rmm() -> Iterator[Callable[[int], object]]:
    import rmm

    pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=_POOL_BYTES)
    yield lambda size: rmm.DeviceBuffer(size=size, mr=pool)


# ---- reservers -------------------------------------------------------------------------------------------------------


def reservers() -> dict[str, Callable[[], AbstractContextManager[Callable[[int], object]]]]:
    """Return what takes addresses with memory of the card's behind them, and gives both back."""
    return {"uvas vmm": _uvas_reserver, "the bare calls": _bare_calls, "cuda.core VirtualMemoryResource": _cuda_core}


@contextmanager
def _uvas_reserver() -> Iterator[Callable[[int], object]]:
    with uvas.CudaDevice(strategy="vmm") as device, uvas.AddressSpace([device]) as space:

        def work(size: int) -> None:
            with space.reserve(size) as held:
                held.commit(location=device)

        yield work


@contextmanager
def _bare_calls() -> Iterator[Callable[[int], object]]:
    from uvas.devices.cuda import driver

    properties, access = driver.make("CUmemAllocationProp"), driver.make("CUmemAccessDesc")
    properties.type = driver.enum("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
    properties.location.type = driver.enum("CUmemLocationType", "CU_MEM_LOCATION_TYPE_DEVICE")
    access.location = properties.location
    access.flags = driver.enum("CUmemAccess_flags", "CU_MEM_ACCESS_FLAGS_PROT_READWRITE")

    def work(size: int) -> None:
        base = int(driver.call("cuMemAddressReserve", size, 0, 0, 0))
        handle = driver.call("cuMemCreate", size, properties, 0)
        driver.call("cuMemMap", base, size, 0, handle, 0)
        driver.call("cuMemRelease", handle)
        driver.call("cuMemSetAccess", base, size, [access], 1)
        driver.call("cuMemUnmap", base, size)
        driver.call("cuMemAddressFree", base, size)

    with uvas.CudaDevice(strategy="vmm") as device, device.card.current():
        yield work


@contextmanager
def _cuda_core() -> Iterator[Callable[[int], object]]:
    from cuda.core import Device, VirtualMemoryResource

    device = Device(0)
    device.set_current()
    resource = VirtualMemoryResource(device)
    yield lambda size: resource.allocate(size).close()
