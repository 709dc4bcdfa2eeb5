"""CudaDevice on a real GPU, by kernels: ``python -m pytest -m cuda``. Where there is none, each test says so.

What passes here is written, with the driver's version and the card, to ``benchmarks/results/cuda_tests.json``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from machine import MIB, NOREPLACE, libc, mappings

import uvas

pytestmark = pytest.mark.cuda

ADD = r"""
extern "C" __global__ void add(unsigned long long *values, unsigned long long count, unsigned long long amount) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (i < count) values[i] += amount;
}
"""
WALK = r"""
struct node { unsigned long long next; long long value; };
extern "C" __global__ void walk(struct node *at, long long *sum) {
    long long total = 0;
    for (; at; at = (struct node *)at->next) total += at->value;
    *sum = total;
}
"""


@pytest.fixture
def gpu() -> Iterator[type]:
    """Make a device with a strategy, or skip with the reason."""
    made = []

    def one(strategy: str) -> uvas.CudaDevice:
        from uvas.devices.cuda import driver

        driver.forget()
        try:
            made.append(uvas.CudaDevice(strategy=strategy))  # type: ignore[arg-type]
        except uvas.NotSupportedError as error:
            pytest.skip(f"no hardware for it: {error}")
        return made[-1]

    yield one
    for device in made:
        device.close()


def kernel(source: str, name: str) -> object:
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'uvas[cuda]'")
    return cupy.RawKernel(source, name)


def launch(kernel: object, blocks: int, *arguments: object) -> None:
    import cupy

    kernel((blocks,), (256,), arguments)  # type: ignore[operator]
    cupy.cuda.get_current_stream().synchronize()


STRATEGIES = pytest.mark.parametrize("strategy", ["hmm", "register", "vmm"])


@STRATEGIES
def test_a_kernel_writes_at_the_hosts_address(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, space.reserve(16 * MIB) as held:
        held.commit()
        array = held.numpy("u8", MIB)
        array[:] = np.arange(MIB)
        seen = uvas.ascupy(array)
        assert seen.data.ptr == array.ctypes.data
        launch(kernel(ADD, "add"), MIB // 256, seen, np.uint64(MIB), np.uint64(5))
        with uvas.host_access(seen) as host:
            assert (host == np.arange(MIB) + 5).all()
        del array, seen, host
        held.decommit()


@STRATEGIES
def test_a_kernel_follows_pointers_of_the_hosts(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        blocks = [arena.alloc(16) for _ in range(1000)]
        nodes = [block.numpy("i8", 2) for block in blocks]
        for i, node in enumerate(nodes):
            node[:] = blocks[i + 1].base if i + 1 < len(blocks) else 0, i
        total = arena.alloc(8).numpy("i8", 1)
        launch(kernel(WALK, "walk"), 1, np.uint64(blocks[0].base), uvas.ascupy(total))
        assert total[0] == sum(range(1000))
        del nodes, node, total


@STRATEGIES
def test_new_memory_is_zero_on_both_sides(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, space.reserve(4 * MIB) as held:
        for _ in range(3):
            held.commit()
            array = held.numpy("u1")
            assert not array.any()
            array[:] = 0xA5
            del array
            held.decommit()


@STRATEGIES
def test_release_gives_the_addresses_back(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space:
        for _ in range(20):
            with space.reserve(8 * MIB) as held:
                held.commit(0, 4 * MIB)
            assert mappings(held.base, held.end) == []


def test_the_drivers_reservation_is_the_hosts_too(gpu):
    """What invariant 1 leans on for `owns`."""
    device = gpu("vmm")
    with uvas.AddressSpace([device]) as space, space.reserve(8 * MIB) as held:
        covered = sum(min(one.end, held.end) - max(one.start, held.base) for one in mappings(held.base, held.end))
        assert covered == held.size
        got = libc.mmap(held.base, 2 * MIB, 0, 0x22 | NOREPLACE, -1, 0)
        assert got in (None, (1 << 64) - 1)
        assert space.audit().findings == ()


def test_memory_on_the_card_grows_and_is_aliased(gpu):
    import cupy

    device = gpu("vmm")
    with uvas.AddressSpace([device]) as space, space.reserve(8 * MIB) as held, space.reserve(8 * MIB) as mirror:
        held.commit(0, 2 * MIB, location=device)
        held.commit(2 * MIB, 2 * MIB, location=device)
        seen = held.cupy("u8", 4 * MIB // 8)
        launch(kernel(ADD, "add"), len(seen) // 256, seen, np.uint64(len(seen)), np.uint64(7))
        assert int(seen.sum()) == 7 * len(seen)
        mirror.commit(0, 2 * MIB, location=uvas.Range(held.base, 2 * MIB))
        assert int(cupy.sum(mirror.cupy("u8", 10))) == 70
        with pytest.raises(ValueError, match="lies on a device"):
            held.numpy("u1", 10)
        del seen


def test_pages_move_on_request(gpu):
    device = gpu("hmm")
    with uvas.AddressSpace([device]) as space, space.reserve(64 * MIB) as held:
        held.commit()
        array = held.numpy("u8")
        array[:] = 3
        space.prefetch(array, device)
        told = device.where(held.range)
        if told is not None:
            assert (told == 2).mean() > 0.9
        space.prefetch(array, "host")
        assert (array == 3).all()
        del array


@STRATEGIES
def test_cupy_allocates_from_an_arena(gpu, strategy):
    import cupy

    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        allocator = uvas.cupy_allocator(arena)
        with allocator:
            a = cupy.arange(10_000, dtype="f8")
            b = a * 2 + 1
        assert uvas.allocation_of(int(b.data.ptr)).arena is arena
        assert (uvas.asnumpy(b) == np.arange(10_000) * 2 + 1).all()
        with allocator:
            pointer = int(b.data.ptr)
            del b
            assert int(cupy.empty(10_000, "f8").data.ptr) == pointer  # the same stream gets it again
        del a
        allocator.close()


def test_a_block_waits_for_its_stream(gpu):
    import cupy

    device = gpu("register")
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        stream = cupy.cuda.Stream(non_blocking=True)
        block = arena.alloc(32 * MIB)
        block.used_on(stream)
        with stream:
            seen = block.cupy("u8")
            for _ in range(200):
                kernel(ADD, "add")((len(seen) // 256,), (256,), (seen, np.uint64(len(seen)), np.uint64(1)))
        del seen
        block.free()
        stream.synchronize()
        arena.trim()
        assert arena.stats().live_blocks == 0


def test_the_card_dies_of_a_bad_address_with_a_typed_error(tmp_path):
    """In a process of its own: no context of this one must die."""
    import subprocess
    import sys

    program = """
import numpy as np, uvas
try:
    device = uvas.CudaDevice()
except uvas.NotSupportedError as error:
    raise SystemExit(f"skip: {error}")
import cupy
space = uvas.AddressSpace([device])
held = space.reserve(1 << 22); held.commit()
kernel = cupy.RawKernel(r'extern "C" __global__ void bad(int *p) { *p = 1; }', "bad")
try:
    kernel((1,), (1,), (np.uint64(0x1000),)); cupy.cuda.get_current_stream().synchronize()
except Exception: pass
try:
    held.decommit(); held.commit()
except uvas.DeviceLostError as error:
    print("lost:", error.name, flush=True)
import os; os._exit(0)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"no hardware for it: {done.stderr[6:].strip()}")
    assert done.stdout.startswith("lost: CUDA_ERROR_"), done.stderr
