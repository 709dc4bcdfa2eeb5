"""What gpu.py compares: memories, allocators and reservers, uvas's and others', each behind a few lines.

A *peer* is a context manager that gives ``prepare(parameter)``, which returns what does the work so many times. What
returns a number has measured itself, in nanoseconds. Each runs in a process of its own (`gpu_peer.py`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import uvas

MIB = 1 << 20
NODES = 20_000
Work = Callable[[int], object]
Peer = Callable[[], AbstractContextManager[Callable[[int], Work]]]
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
_BUMP = r"""
extern "C" __global__ void bump(unsigned long long *word) { *word += 1; }
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


def enough(size: int) -> None:
    """Refuse to ask for pages that the card would have to move away again: that can stop it."""
    import cupy

    free = int(cupy.cuda.runtime.memGetInfo()[0])
    if size > free // 2:
        raise MemoryError(f"{size:#x} bytes are more than half of what the card has free, {free:#x}")


def memories() -> dict[str, Maker]:
    """Every kind of memory, by name; the peers first."""
    return {
        "cudaMalloc": _of_cupy(lambda cupy, size: cupy.cuda.memory.Memory(size), on_host=False),
        "cudaMallocHost": _pinned,
        "cudaMallocManaged": _managed,
        "uvas hmm": _of_uvas("hmm"),
        "uvas register": _of_uvas("register"),
        "uvas vmm, on the host": _of_uvas("vmm"),
        "uvas vmm, on the card": _of_uvas("vmm", on_card=True),
    }


def fresh_memories() -> dict[str, Maker]:
    """Memory whose pages nobody has touched, and that the card may touch first."""
    return {"cudaMallocManaged": _managed, "uvas hmm": _of_uvas("hmm", fresh=True)}


def _of_cupy(make: Callable[[Any, int], Any], on_host: bool) -> Maker:
    @contextmanager
    def maker(size: int) -> Iterator[Memory]:
        import cupy

        memory = make(cupy, size)
        yield Memory(memory.ptr, size, memory, on_host)

    return maker


@contextmanager
def _managed(size: int) -> Iterator[Memory]:
    import cupy

    enough(size)
    memory = cupy.cuda.memory.ManagedMemory(size)
    yield Memory(memory.ptr, size, memory)


@contextmanager
def _pinned(size: int) -> Iterator[Memory]:
    import cupy

    memory = cupy.cuda.PinnedMemory(size)
    yield Memory(memory.ptr, size, memory)


def _of_uvas(strategy: str, on_card: bool = False, fresh: bool = False) -> Maker:
    @contextmanager
    def maker(size: int) -> Iterator[Memory]:
        if strategy == "hmm":
            enough(size)
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


# ---- what is done with memory ----------------------------------------------------------------------------------------


def _copying(make: Maker) -> Peer:
    """Copy one half of it into the other, by a kernel."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        with ExitStack() as stack:

            def prepare(size: int) -> Work:
                memory, half, launch = stack.enter_context(make(size)), size // 2, CopyKernel()
                _check_copy(memory, half, launch)

                def work(count: int) -> None:
                    for _ in range(count):
                        launch(memory.address, memory.address + half, half, wait=False)
                    launch.wait()

                return work

            yield prepare

    return peer


def _check_copy(memory: Memory, half: int, launch: CopyKernel) -> None:
    import cupy

    sides = [
        cupy.ndarray((half // 8,), "u8", cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(at, half, memory.keep, 0), 0))
        for at in (memory.address, memory.address + half)
    ]
    for side, value in zip(sides, (7, 1), strict=True):
        side *= 0
        side += value
    launch(memory.address, memory.address + half, half)
    if int(sides[1].sum()) != 7 * (half // 8):
        raise AssertionError("the kernel has not copied")


def _walking(make: Maker) -> Peer:
    """Follow a list that the host has linked, by one thread of the card; its sum is checked."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        import cupy

        with ExitStack() as stack:

            def prepare(nodes: int) -> Work:
                memory = stack.enter_context(make(16 * nodes))
                memory.host("u8")[: 2 * nodes] = linked(memory.address, nodes)
                kernel, total = cupy.RawKernel(_WALK, "walk"), cupy.zeros(1, "u8")

                def work(count: int) -> None:
                    for _ in range(count):
                        kernel((1,), (1,), (np.uint64(memory.address), total))
                    if int(total[0]) != sum(range(nodes)):
                        raise AssertionError(f"the list adds up to {int(total[0])}, not {sum(range(nodes))}")

                return work

            yield prepare

    return peer


def linked(base: int, nodes: int) -> np.ndarray:
    """Return nodes (next, value), shuffled, the first at the base."""
    order = np.concatenate([[0], 1 + np.random.default_rng(1).permutation(nodes - 1)])
    list_of = np.zeros((nodes, 2), np.uint64)
    list_of[order[:-1], 0] = base + 16 * order[1:].astype(np.uint64)
    list_of[order, 1] = np.arange(nodes)
    return list_of.reshape(-1)


def _touching(make: Maker) -> Peer:
    """Let a kernel write and read memory that nobody has touched; making the memory is not measured."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        launch = CopyKernel()

        def prepare(size: int) -> Work:
            def work(count: int) -> float:
                took = 0
                for _ in range(count):
                    with make(size) as memory:
                        began = time.perf_counter_ns()
                        launch(memory.address, memory.address + size // 2, size // 2)
                        took += time.perf_counter_ns() - began
                return took / count

            return work

        yield prepare

    return peer


def _tripping(make: Maker) -> Peer:
    """Let host and card count up one word in turn, each by its pointer; the end is checked."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        import cupy

        with ExitStack() as stack:

            def prepare(size: int) -> Work:
                memory = stack.enter_context(make(size))
                kernel, stream = cupy.RawKernel(_BUMP, "bump"), cupy.cuda.get_current_stream()
                word, address = ctypes.c_uint64.from_address(memory.address), np.uint64(memory.address)

                def work(count: int) -> None:
                    word.value = 0
                    for _ in range(count):
                        kernel((1,), (1,), (address,))
                        stream.synchronize()
                        word.value += 1
                    if word.value != 2 * count:
                        raise AssertionError(f"host and card have counted to {word.value}, not {2 * count}")

                return work

            yield prepare

    return peer


@contextmanager
def _prefetching() -> Iterator[Callable[[int], Work]]:
    with uvas.CudaDevice(strategy="hmm") as device, uvas.AddressSpace([device]) as space, ExitStack() as stack:

        def prepare(size: int) -> Work:
            enough(size // 2)
            held = stack.enter_context(space.reserve(size // 2))
            held.commit(populate=True)

            def work(count: int) -> None:
                for _ in range(count):
                    space.prefetch(held, device)
                    space.prefetch(held, "host")

            return work

        yield prepare


@contextmanager
def _copying_pinned() -> Iterator[Callable[[int], Work]]:
    import cupy

    def prepare(size: int) -> Work:
        host, card = cupy.cuda.PinnedMemory(size // 2), cupy.cuda.memory.Memory(size // 2)
        pointer, stream = cupy.cuda.MemoryPointer(card, 0), cupy.cuda.get_current_stream()

        def work(count: int) -> None:
            for _ in range(count):
                pointer.copy_from_host_async(ctypes.c_void_p(host.ptr), size // 2, stream)
                pointer.copy_to_host_async(ctypes.c_void_p(host.ptr), size // 2, stream)
            stream.synchronize()

        return work

    yield prepare


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
    import torch  # PYTORCH_ALLOC_CONF has been set by who started this process

    torch.cuda.init()
    yield lambda size: torch.cuda.caching_allocator_delete(torch.cuda.caching_allocator_alloc(size))
    torch.cuda.empty_cache()


@contextmanager
def _rmm() -> Iterator[Callable[[int], object]]:
    import rmm

    pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=_POOL_BYTES)
    yield lambda size: rmm.DeviceBuffer(size=size, mr=pool)


# ---- reservers -------------------------------------------------------------------------------------------------------


TakeAndGive = tuple[Callable[[int], Any], Callable[[Any], object]]


def reservers() -> dict[str, Callable[[], AbstractContextManager[TakeAndGive]]]:
    """Return what takes addresses with memory of the card's behind them, and what gives both back."""
    return {"uvas vmm": _uvas_reserver, "the bare calls": _bare_calls, "cuda.core VirtualMemoryResource": _cuda_core}


@contextmanager
def _uvas_reserver() -> Iterator[TakeAndGive]:
    with uvas.CudaDevice(strategy="vmm") as device, uvas.AddressSpace([device]) as space:

        def take(size: int) -> uvas.Reservation:
            held = space.reserve(size)
            held.commit(location=device)
            return held

        yield take, lambda held: held.release()


@contextmanager
def _bare_calls() -> Iterator[TakeAndGive]:
    from uvas.devices.cuda import driver

    properties, access = driver.make("CUmemAllocationProp"), driver.make("CUmemAccessDesc")
    properties.type = driver.enum("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
    properties.location.type = driver.enum("CUmemLocationType", "CU_MEM_LOCATION_TYPE_DEVICE")
    access.location = properties.location
    access.flags = driver.enum("CUmemAccess_flags", "CU_MEM_ACCESS_FLAGS_PROT_READWRITE")

    def take(size: int) -> tuple[int, int]:
        base = int(driver.call("cuMemAddressReserve", size, 0, 0, 0))
        handle = driver.call("cuMemCreate", size, properties, 0)
        driver.call("cuMemMap", base, size, 0, handle, 0)
        driver.call("cuMemRelease", handle)
        driver.call("cuMemSetAccess", base, size, [access], 1)
        return base, size

    def give(taken: tuple[int, int]) -> None:
        driver.call("cuMemUnmap", *taken)
        driver.call("cuMemAddressFree", *taken)

    with uvas.CudaDevice(strategy="vmm") as device, device.card.current():
        yield take, give


@contextmanager
def _cuda_core() -> Iterator[TakeAndGive]:
    try:
        from cuda.core import Device, VirtualMemoryResource
    except ImportError:  # before 1.0
        from cuda.core.experimental import Device, VirtualMemoryResource

    device = Device(0)
    device.set_current()
    resource = VirtualMemoryResource(device)
    yield resource.allocate, lambda buffer: buffer.close()


# ---- all of them -----------------------------------------------------------------------------------------------------


def _calling(make: Callable[[], AbstractContextManager[Callable[[int], object]]]) -> Peer:
    """Call it with a size, and let go of what it returns."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        with make() as call:

            def prepare(size: int) -> Work:
                def work(count: int) -> None:
                    for _ in range(count):
                        call(size)

                return work

            yield prepare

    return peer


def _reserving(make: Callable[[], AbstractContextManager[TakeAndGive]]) -> Peer:
    """Take so many bytes and give them back."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        with make() as (take, give):

            def prepare(size: int) -> Work:
                def work(count: int) -> None:
                    for _ in range(count):
                        give(take(size))

                return work

            yield prepare

    return peer


def _reserving_beside(make: Callable[[], AbstractContextManager[TakeAndGive]]) -> Peer:
    """Take 2 MiB and give them back, while so many others are held."""

    @contextmanager
    def peer() -> Iterator[Callable[[int], Work]]:
        with make() as (take, give):
            held: list[Any] = []

            def prepare(beside: int) -> Work:
                enough((beside + 1) * 2 * MIB)
                while len(held) < beside:
                    held.append(take(2 * MIB))

                def work(count: int) -> None:
                    for _ in range(count):
                        give(take(2 * MIB))

                return work

            yield prepare
            while held:
                give(held.pop())

    return peer


def peers() -> dict[str, dict[str, Peer]]:
    """Return who is compared with whom, by the target's letters."""
    return {
        "G1": {name: _copying(make) for name, make in memories().items()},
        "G2": {name: _calling(make) for name, make in allocators().items()},
        "G3": {name: _reserving(make) for name, make in reservers().items()},
        "G3 beside": {name: _reserving_beside(make) for name, make in reservers().items()},
        "G4": {
            "uvas hmm: prefetch, there and back": _prefetching,
            "memcpyAsync, pinned, both ways": _copying_pinned,
        },
        "G5 walk": {name: _walking(make) for name, make in memories().items() if name not in _ON_CARD},
        "G5 trip": {name: _tripping(make) for name, make in memories().items() if name not in _ON_CARD},
        "G5 touch": {name: _touching(make) for name, make in fresh_memories().items()},
    }


_ON_CARD = ("cudaMalloc", "uvas vmm, on the card")  # where the host can link no list and count nothing
