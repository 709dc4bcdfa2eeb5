"""How arenas end, what they keep from ending, and what a forked child has of them."""

from __future__ import annotations

import errno
import gc
import os
import time
import warnings
import weakref
from typing import Any

import pytest
from machine import MIB, PAGE, in_child

import uvas
from uvas._core import fast, ffi, lib


def forget(things: list[Any]) -> None:
    """Let go of things."""
    things.clear()
    gc.collect()


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_close(space: uvas.AddressSpace) -> None:
    arena = uvas.Arena(space)
    block = arena.alloc(100)
    with pytest.raises(BufferError, match="1 block of"):
        arena.close()
    assert not arena.closed
    arena.alloc(100).free()
    block.free()
    arena.close()
    arena.close()
    assert arena.closed
    assert "closed" in repr(arena)
    for verb in (
        lambda: arena.alloc(1),
        lambda: arena.alloc_many([1]),
        arena.stats,
        arena.trim,
        arena.check,
        lambda: arena.measure().__enter__(),
        arena.__enter__,
        lambda: uvas.numpy_allocator(arena).install(),
    ):
        with pytest.raises(uvas.ReleasedError):
            verb()


def test_with_closes_or_waits_for_the_last_block(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space) as arena:
        pass
    assert arena.closed
    with pytest.raises(KeyError, match="mine"), uvas.Arena(space) as arena:  # noqa: PT012  # what raises is the block
        first, second = arena.alloc(PAGE), arena.alloc(PAGE)
        array = second.numpy("u1")
        raise KeyError("mine")
    with pytest.raises(uvas.ReleasedError):
        arena.alloc(1)
    array[:] = 1
    first.free()
    base = second.base
    del second
    assert fast.held(base) is not None
    del array
    deadline = time.monotonic() + 10
    while fast.held(base) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fast.held(base) is None


def test_a_space_is_not_closed_under_an_arena() -> None:
    space = uvas.AddressSpace()
    arena = uvas.Arena(space)
    block = arena.alloc(100)
    with pytest.raises(BufferError):
        space.close()
    block.numpy("u1")[:] = 1
    block.free()
    arena.close()
    space.close()


@pytest.mark.parametrize("backing", ["auto", "none"])
def test_a_space_is_not_closed_under_an_arena_without_a_block(backing: Any) -> None:
    space = uvas.AddressSpace()
    arena = uvas.Arena(space, name="tenant", backing=backing)
    with pytest.raises(BufferError, match="arena tenant"):
        space.close()
    arena.alloc(1).free()
    arena.close()
    space.close()
    assert space.closed


def test_a_space_left_by_with_closes_when_the_empty_arena_does() -> None:
    with uvas.AddressSpace() as space:
        arena = uvas.Arena(space)
    handle = space.handle
    arena.alloc(1).free()
    arena.close()
    stats = ffi.new("struct uvas_space_stats *")
    deadline = time.monotonic() + 10
    while lib.uvas_space_stats(handle, stats) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lib.uvas_space_stats(handle, stats) == -errno.ESTALE


def test_a_space_closes_after_an_arena_in_a_cycle() -> None:
    space = uvas.AddressSpace()
    things: list[Any] = [uvas.Arena(space)]
    things.append(things)
    del things
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # which, recorded, would keep it
        space.close()
    assert space.closed


@pytest.mark.parametrize("verb", ["commit", "decommit", "map_fd"])
def test_nobody_changes_memory_under_an_arena(space: uvas.AddressSpace, verb: str) -> None:
    held = space.reserve(4 * MIB)
    verbs = {
        "commit": held.commit,
        "decommit": held.decommit,
        "map_fd": lambda: held.map_fd(file, offset=0, size=PAGE),
    }
    file = os.memfd_create("a page")
    os.truncate(file, PAGE)
    with uvas.Arena(held, name="tenant") as arena:
        with pytest.raises(BufferError, match="arena tenant"):
            verbs["commit"]()
        block = arena.alloc(1000)
        with pytest.raises(BufferError, match="arena tenant"):
            verbs[verb]()
        block.numpy("u1")[:] = 1
        block.free()
    os.close(file)
    held.commit()
    assert not held.numpy("u1").any()
    held.release()


def test_a_space_left_by_with_closes_after_the_arena() -> None:
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
        array = arena.alloc(100).numpy("u1")
    array[:] = 1
    base = array.ctypes.data
    del array
    deadline = time.monotonic() + 10
    while fast.held(base) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fast.held(base) is None
    with pytest.raises(uvas.ReleasedError):
        space.reserve(PAGE)


def test_a_reservation_is_not_released_under_an_arena(space: uvas.AddressSpace) -> None:
    held = space.reserve(4 * MIB)
    arena = uvas.Arena(held)
    block = arena.alloc(100)
    with pytest.raises(BufferError):
        held.release()
    block.free()
    arena.close()
    held.release()


def test_an_arena_that_nobody_closed(space: uvas.AddressSpace) -> None:
    arenas = [uvas.Arena(space)]
    block = arenas[0].alloc(100)
    with pytest.warns(ResourceWarning, match="never closed"):
        forget(arenas)
    assert block.arena is None
    block.numpy("u1")[:] = 1
    base = block.base
    block.free()
    del block
    space.stats()  # works off what finalizers left
    assert fast.held(base) is None


def test_a_cache_that_the_callback_refers_to_goes_with_the_arena(space: uvas.AddressSpace) -> None:
    class Cache(list[uvas.Allocation]):
        def drop(self, size: int) -> bool:
            self.clear()
            return size > 0

    cache = Cache()
    things = [uvas.Arena(space, exhausted=cache.drop), cache]
    cache.append(things[0].alloc(1000))
    base, gone = cache[0].base, weakref.ref(things[0])
    del cache
    with pytest.warns(ResourceWarning, match="never closed"):
        forget(things)
    assert gone() is None
    assert uvas.allocation_of(base) is None


def test_no_arena_has_the_handle_0() -> None:
    """Also not for a thread that had a part of an arena which is closed."""
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
        arena.alloc(100).free()
    got = ffi.new("uintptr_t *")
    assert lib.uvas_alloc(0, 100, 0, got) == -errno.ESTALE
    assert lib.uvas_free(0, 4096) == -errno.ESTALE


# ---- fork ------------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_the_arrays_and_not_the_arena(arena: uvas.Arena, space: uvas.AddressSpace) -> None:
    block = arena.alloc(1000)
    arrays = [block.numpy("u1")]
    arrays[0][:] = 5

    def child() -> None:
        assert arena.closed
        with pytest.raises(uvas.ReleasedError):
            arena.alloc(1)
        with pytest.raises(uvas.ReleasedError):
            arena.stats()
        with pytest.raises(uvas.ReleasedError):
            arena.close()
        assert (arrays[0] == 5).all()
        arrays[0][:] = 6
        with uvas.AddressSpace() as own, uvas.Arena(own) as second:
            second.alloc(1000).free()

    in_child(child)
    assert (arrays[0] == 5).all()

    def child_frees() -> None:
        arrays.clear()
        block.free()
        assert block.freed

    in_child(child_frees)
    assert uvas.allocation_of(block.base) is not None
    arrays.clear()
    block.free()
