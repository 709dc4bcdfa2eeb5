"""CuPy's allocator on an arena, called as CuPy calls it; over the strict fake of the driver."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import cupy_in_tests
import numpy as np
import pytest
from cupy_in_tests import cupy, live
from machine import MIB, PAGE

import uvas
from uvas._core import ffi, lib
from uvas.interop.cupy_allocator import CupyAllocator

fake, device, space = cupy_in_tests.fake, cupy_in_tests.device, cupy_in_tests.space
arena, current = cupy_in_tests.arena, cupy_in_tests.current


@pytest.fixture
def now(monkeypatch) -> dict[str, int]:
    """The stream that CuPy's function says is current; CuPy's own needs the GIL, which cffi gives up."""
    streams = {"stream": 0}
    tell = ffi.callback("intptr_t(void)", lambda: streams["stream"])
    monkeypatch.setattr("uvas.interop.cupy_allocator._current_stream", lambda: tell)
    streams["keep"] = tell
    return streams


@pytest.fixture
def allocator(arena, now) -> Iterator[CupyAllocator]:
    one = uvas.cupy_allocator(arena)
    yield one
    gc.collect()
    one.close()


def malloc(allocator, size: int) -> int:
    """As CuPy's CFunctionAllocator calls it."""
    return int(ffi.cast("uintptr_t", lib.uvas_order_malloc(allocator._order, size, 0)))


def free(allocator, address: int) -> None:
    lib.uvas_order_free(allocator._order, ffi.cast("void *", address), 0)


def test_a_freed_block_goes_back_to_the_stream_of_its_allocation(allocator, arena, now):
    first = malloc(allocator, 1000)
    assert first % 512 == 0
    now["stream"] = 5
    free(allocator, first)  # whatever is current now
    other = malloc(allocator, 1000)
    assert other != first
    now["stream"] = 0
    assert malloc(allocator, 900) == first  # of the same rounded size
    assert allocator.stats().live_blocks == 2
    assert live(arena) == 2
    free(allocator, first)
    free(allocator, other)


def test_what_is_kept_goes_back_after_the_cards_have_stopped(allocator, arena, fake):
    blocks = [malloc(allocator, size) for size in (1, 512, 5000, 3 * MIB)]
    for one in blocks:
        free(allocator, one)
    stats = allocator.stats()
    assert (stats.live_blocks, stats.kept_blocks) == (0, 4)
    assert stats.kept_bytes == 512 + 512 + 5120 + 3 * MIB
    fake.synchronized.clear()
    assert allocator.trim() == stats.kept_bytes
    assert fake.synchronized == [0]
    assert live(arena) == 0
    free(allocator, blocks[0])  # no block of it any more
    free(allocator, 0x1234)
    assert allocator.stats().kept_blocks == 0


def test_sizes_waste_an_eighth_at_most(allocator):
    for size in (1, 511, 513, 4097, 5 * PAGE + 1, MIB + 1, 3 * MIB - 1):
        block = malloc(allocator, size)
        got = allocator.stats().live_bytes
        assert size <= got <= max(size * 9 / 8, size + 511)
        assert uvas.allocation_of(block).range.size >= got
        free(allocator, block)


def test_streams_of_the_same_number_keep_their_own(allocator):
    first = malloc(allocator, 1000)
    free(allocator, first)
    other = int(ffi.cast("uintptr_t", lib.uvas_order_malloc(allocator._order, 1000, 1)))  # the default one of card 1
    assert other not in (0, first)
    free(allocator, other)
    assert malloc(allocator, 1000) == first
    free(allocator, first)


def test_each_thread_has_a_stream_of_its_own_of_one_number(allocator, now):
    now["stream"] = 2  # CU_STREAM_PER_THREAD
    found = []

    def work() -> None:
        found.append(malloc(allocator, 1000))
        free(allocator, found[-1])

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    mine = malloc(allocator, 1000)
    assert len({*found, mine}) == 4
    free(allocator, mine)


def test_out_of_memory_uses_what_other_streams_have_done_with(space, fake, now):
    with uvas.Arena(space, limit=4 * MIB) as arena:
        allocator = uvas.cupy_allocator(arena)
        first = malloc(allocator, 3 * MIB)
        free(allocator, first)
        now["stream"] = 5
        for fake.apart in (False, True):
            fake.capturing = True
            assert malloc(allocator, 3 * MIB) == 0  # nothing is given back in the middle of a capture...
            assert fake.spoiled == []  # ... which goes on
            fake.capturing = False
        second = malloc(allocator, 3 * MIB)
        assert second
        assert malloc(allocator, 3 * MIB) == 0
        with pytest.raises(BufferError, match="1 array of CuPy's lives in it"):
            allocator.close()
        free(allocator, second)
    assert not allocator._order  # closed with the arena


class Null:
    """CuPy's allocator, when C has no memory: it does not look at the address."""

    class Memory:
        ptr = 0

    def malloc(self, size: int) -> Null.Memory:
        lib.uvas_order_malloc(self.order, size, 0)
        return self.Memory()


def test_cupy_is_told_when_there_is_no_memory(space, now, monkeypatch):
    with uvas.Arena(space, limit=4 * MIB, name="small") as arena:
        allocator = uvas.cupy_allocator(arena)
        null = Null()
        null.order = allocator._order
        monkeypatch.setattr(type(allocator), "_allocator", null)
        with pytest.raises(uvas.OutOfMemoryError, match="has no room for 0x500000 bytes"):
            allocator(5 * MIB)
        allocator.close()
        with pytest.raises(uvas.ReleasedError):
            allocator(1)


def test_cupys_own_arrays_lie_in_the_arena(allocator, arena, current):
    """CuPy itself, by an allocator in Python that calls the same functions: its own needs a driver first."""

    class Owner:
        def __init__(self, size: int) -> None:
            self.address = malloc(allocator, size)

        def __del__(self) -> None:
            free(allocator, self.address)

    def python_allocator(size: int) -> object:
        owner = Owner(size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(owner.address, size, owner, 0), 0)

    with cupy.cuda.using_allocator(python_allocator):
        array = cupy.ndarray((100,), "f8")
    seen = uvas.asnumpy(array)
    seen[:] = 5
    assert uvas.allocation_of(array.data.ptr).arena is arena
    address = array.data.ptr
    del array
    assert allocator.stats().live_blocks == 1  # the NumPy array keeps it
    del seen
    assert allocator.stats().kept_blocks == 1
    with cupy.cuda.using_allocator(python_allocator):
        assert cupy.ndarray((100,), "f8").data.ptr == address


def test_the_context_manager_sets_cupys_allocator_for_this_thread(allocator):
    with allocator as entered:
        assert entered is allocator
        assert cupy.cuda.get_allocator() is allocator
        other = []
        thread = threading.Thread(target=lambda: other.append(cupy.cuda.get_allocator()))
        thread.start()
        thread.join()
        assert other[0] is not allocator
    assert cupy.cuda.get_allocator() is not allocator


def test_cupys_function_tells_the_stream():
    from uvas.interop.cupy_allocator import _current_stream

    with_the_gil = ctypes.PYFUNCTYPE(ctypes.c_ssize_t)(int(ffi.cast("uintptr_t", _current_stream())))
    try:
        assert with_the_gil() == 0
    except cupy.cuda.runtime.CUDARuntimeError as error:  # it is CuPy's: it asks for a driver
        assert "cudaError" in str(error)  # noqa: PT017  # where there is a driver nothing raises


def test_an_allocator_needs_a_card_and_an_open_arena(space):
    with uvas.AddressSpace() as apart, uvas.Arena(apart) as arena:
        with pytest.raises(uvas.NotSupportedError, match="no CUDA device"):
            uvas.cupy_allocator(arena)
    with pytest.raises(uvas.ReleasedError):
        uvas.cupy_allocator(arena)


def test_many_threads_allocate_and_free_in_order(allocator, arena):
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        mine: dict[int, int] = {}
        try:
            for i in range(2000):
                if mine and random.random() < 0.5:
                    address, value = mine.popitem()
                    assert ctypes.c_uint64.from_address(address).value == value
                    free(allocator, address)
                else:
                    address = malloc(allocator, int(random.integers(8, 20_000)))
                    assert address not in mine
                    mine[address] = ctypes.c_uint64.from_address(address).value = seed << 32 | i
            for address, value in mine.items():
                assert ctypes.c_uint64.from_address(address).value == value
                free(allocator, address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert allocator.stats().live_blocks == 0
    allocator.trim()
    assert live(arena) == 0


def test_what_the_readme_shows_runs(fake, current, now):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (piece,) = re.findall(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    exec(compile(piece, "README.md", "exec"), {})
    assert current.waited == 1
