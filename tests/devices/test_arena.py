"""Memory of arenas and worker processes: arrays travel by address, and what is on its way is not freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import on_device
import pytest
from machine import MIB

import uvas


@pytest.fixture
def device(reused: uvas.ProcessDevice) -> uvas.ProcessDevice:
    """One for all tests."""
    return reused


@pytest.fixture
def arena(space: uvas.AddressSpace) -> Iterator[uvas.Arena]:
    """An arena in a space with a worker."""
    with uvas.Arena(space, name="shared") as one:
        yield one
        gc.collect()
        one.check()
        assert one.stats().live_blocks == 0
        one.close()


def test_an_allocation_is_the_same_there(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    for size in (800, 40_000, 8 * MIB):
        block = arena.alloc(size)
        array = block.numpy("i8")
        array[:] = np.arange(array.size)
        view = array[3:90:7]
        assert device.run(on_device.describe, view) == on_device.describe(view)
        device.run(on_device.fill, view, -1)
        assert (array[3:90:7] == -1).all()
        assert array[4] == 4
        del array, view
        block.free()


def test_numpys_own_arrays_are_the_same_there(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena):
        array = 2 * np.arange(1000.0) + 1
        assert device.run(on_device.total, array) == 1_000_000
        assert device.run(on_device.describe, array.reshape(10, 100).T) == on_device.describe(array.reshape(10, 100).T)
    with pytest.raises(TypeError, match="shares"):
        device.run(on_device.total, array + 1)
    del array


def test_memory_that_came_after_the_device_is_asked(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    arrays = [arena.alloc(16 * MIB).numpy("u8") for _ in range(6)]
    for number, array in enumerate(arrays):
        array[:: 64 * 1024] = number
        assert device.run(on_device.total, array[:: 64 * 1024]) == number * array[:: 64 * 1024].size


def test_pointers_inside_blocks_mean_the_same(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    nodes = arena.alloc_many([16] * 100)
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        node.numpy("u8")[:] = (following.base if following else 0, node.base % 1000)
    assert device.run(on_device.walk, nodes[0].base) == [node.base % 1000 for node in nodes]
    nodes.clear()
    del node, following


def test_a_result_holds_the_block(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    block = arena.alloc(8000)
    array = block.numpy("f8")
    array[:] = 1
    back = device.run(on_device.part, array, 10, 20, 3)
    assert on_device.describe(back) == on_device.describe(array[10:20:3])
    del array
    with pytest.raises(BufferError):
        block.free()
    assert (back == 1).all()
    del back
    block.free()
    with uvas.numpy_allocator(arena):
        array = np.ones(1000)
    back = device.run(on_device.same, array)
    base = array.ctypes.data
    del array
    assert uvas.allocation_of(base) is not None
    assert back.sum() == 1000
    twice = device.run(on_device.same, back)
    del back
    assert uvas.allocation_of(base) is not None
    assert twice.sum() == 1000
    del twice
    assert uvas.allocation_of(base) is None


def test_what_is_on_its_way_is_not_freed(device: uvas.ProcessDevice, arena: uvas.Arena, pipe: str) -> None:
    block = arena.alloc(80)
    array = block.numpy("i8")
    array[:] = 4
    submitted = device.submit(on_device.waits_and_adds, pipe, array)
    del array
    with pytest.raises(BufferError):
        block.free()
    with open(pipe, "w"):
        pass
    assert submitted.result() == 40
    del submitted
    block.free()


def test_what_the_worker_kept_of_a_freed_block_is_refused(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    block = arena.alloc(80)
    device.run(on_device.keep, block.numpy("i8"))
    block.free()
    other = arena.alloc(80)
    with pytest.raises(ValueError, match=r"no more|no allocation"):
        device.run(on_device.kept_one)
    device.run(on_device.drop)
    other.free()


def test_bare_addresses_mean_the_same(device: uvas.ProcessDevice, space: uvas.AddressSpace) -> None:
    with space.reserve(64 * MIB) as held, uvas.Arena(held, backing="none") as arena:
        block = arena.alloc(MIB, align=4096)
        held.commit(block.base - held.base, MIB)
        array = held.numpy("u1", MIB, offset=block.base - held.base)
        device.run(on_device.fill, array, 3)
        assert (array == 3).all()
        del array
        gc.collect()
        held.decommit(block.base - held.base, MIB)
        block.free()


def test_a_trimmed_span_is_the_devices_no_more(device: uvas.ProcessDevice, arena: uvas.Arena) -> None:
    block = arena.alloc(16 * MIB)
    device.run(on_device.fill, block.numpy("u1"), 3)
    before = arena.stats().committed_bytes
    block.free()
    gc.collect()
    assert arena.trim() > 0
    assert arena.stats().committed_bytes < before
    again = arena.alloc(16 * MIB)
    assert device.run(on_device.total, again.numpy("u1")[::4096]) == 0
    again.free()
