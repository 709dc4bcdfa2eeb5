"""Blocks that go back in the order of CuPy's current stream, unasked; over the strict fake of the driver."""

from __future__ import annotations

import gc
import threading

import cupy_in_tests
import numpy as np
import pytest
from cupy_in_tests import Stream, cupy, live
from machine import MIB

import uvas
from uvas import ordered

fake, device, space = cupy_in_tests.fake, cupy_in_tests.device, cupy_in_tests.space
arena, current, stream = cupy_in_tests.arena, cupy_in_tests.current, cupy_in_tests.stream


END = ["free", "with", "drop", "an array over it"]


def end(block: uvas.arena.Allocation, how: str) -> None:
    """Let a block go, which nobody else has."""
    if how == "free":
        block.free()
    elif how == "with":
        with block:
            pass
    elif how == "an array over it":
        block.numpy("u1")[:10] = 1


@pytest.mark.parametrize("how", END)
@pytest.mark.parametrize("number", [0, 77], ids=["the default one", "CuPy's"])
def test_a_block_goes_back_after_the_stream_that_was_current_at_its_allocation(
    fake, arena, stream, number, how, request
):
    (Stream(fake, 0) if number == 0 else request.getfixturevalue("current")).work()
    block = arena.alloc(1 << 20)
    base = block.base
    end(block, how)
    del block
    gc.collect()
    others = [arena.alloc(1 << 20) for _ in range(3)]
    assert base not in [one.base for one in others]
    fake.busy.clear()
    again = arena.alloc(1 << 20)  # which looks
    assert again.base == base
    for one in (*others, again):
        one.free()
    assert live(arena) == 0
    assert fake.events == set()


def test_blocks_made_many_at_once_go_back_in_order_too(fake, arena, current):
    blocks = arena.alloc_many([1000] * 3)
    current.work()
    for block in blocks:
        block.free()
    assert live(arena) == 3
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_the_stream_of_the_allocation_counts_and_not_that_of_the_free(fake, arena, current, monkeypatch):
    block = arena.alloc(1000)
    other = Stream(fake, 78)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: other)
    other.work()
    block.free()
    assert live(arena) == 0
    fake.busy.clear()


def test_a_threads_own_default_stream_is_waited_for_by_the_one_for_all(fake, arena, current):
    current.ptr = 2
    block = arena.alloc(1000)
    fake.busy.add(0)
    thread = threading.Thread(target=block.free)
    thread.start()
    thread.join()
    assert live(arena) == 1
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_a_stream_of_another_card_stands_for_nobody(fake, arena, current):
    current.device_id = 5
    block = arena.alloc(1000)
    current.work()
    block.free()
    assert live(arena) == 0
    fake.busy.clear()


def test_a_plain_free_during_a_capture_waits(fake, arena, current):
    freed, dropped, left = (arena.alloc(1000) for _ in range(3))
    freed.used_on(9)
    fake.capturing = True
    freed.free()
    with left:
        pass
    del dropped
    gc.collect()
    arena.alloc(10).free()
    assert live(arena) == 4
    assert fake.spoiled == []
    fake.capturing = False
    arena.trim()
    assert live(arena) == 0


def test_an_exhausted_arena_waits_for_what_was_freed(fake, space, current):
    with uvas.Arena(space, limit=4 * MIB) as arena:
        block = arena.alloc(3 * MIB)
        current.work()
        block.free()
        arena.alloc(3 * MIB).free()
        array, block = None, arena.alloc(3 * MIB)
        current.work()
        block.free()
        with uvas.numpy_allocator(arena):
            array = np.empty(3 * MIB, "u1")
        fake.capturing = True
        with pytest.raises(uvas.OutOfMemoryError):
            arena.alloc(3 * MIB)
        fake.capturing = False
        del array


def test_an_array_of_numpys_allocation_goes_back_in_order_if_cupy_has_seen_it(fake, arena, current):
    def allocate() -> np.ndarray:
        with uvas.numpy_allocator(arena):
            return np.empty(1 << 20, "u1")

    array = allocate()
    uvas.ascupy(array)  # and gone
    current.work()
    del array
    gc.collect()
    ordered.collect()
    assert live(arena) == 1
    fake.busy.clear()
    ordered.collect()
    assert live(arena) == 0
    current.work()
    allocate()  # nobody has told that a stream uses it: it goes back at once
    assert live(arena) == 0
    fake.busy.clear()


@pytest.mark.parametrize("view", [lambda block: block.cupy("u1"), lambda block: uvas.ascupy(block.numpy("u1"))])
def test_the_stream_that_is_current_when_cupy_gets_a_view_counts_too(fake, arena, current, view, monkeypatch):
    block = arena.alloc(1000)
    other = Stream(fake, 78)
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda, "get_current_stream", lambda: other)
        view(block)
    other.work()
    block.free()
    assert live(arena) == 1
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_an_arena_orders_from_when_a_card_comes_until_it_goes(fake, device):
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
        fake.busy.add(0)
        arena.alloc(1000).free()
        assert live(arena) == 0
        try:
            space.attach(device)
        except uvas.UvasError:
            pytest.skip("this strategy wants to be there first")
        arena.alloc(1000).free()
        assert live(arena) == 1
        fake.busy.clear()
        arena.trim()
        space.detach(device)
        fake.busy.add(0)
        arena.alloc(1000).free()
        assert live(arena) == 0
        fake.busy.clear()


def test_while_a_stream_is_busy_the_driver_is_not_asked_for_each_block(fake, arena, current):
    current.work()
    blocks = [arena.alloc(1000) for _ in range(50)]
    for block in blocks:
        block.free()
    fake.calls.clear()
    arena.alloc(1000)
    assert fake.calls.count("cuEventQuery") == 1
    fake.busy.clear()


def test_a_stream_that_was_destroyed_does_not_keep_a_block(fake, arena, current):
    block = arena.alloc(1000)
    fake.home[current.ptr] = 7  # what the fake refuses
    block.free()
    assert live(arena) == 0
