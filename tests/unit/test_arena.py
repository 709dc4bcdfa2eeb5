"""Arenas and allocations, through the public API."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from machine import MIB, PAGE, in_child

import uvas
from uvas._core import fast, ffi, lib

GIB = 1 << 30


@pytest.fixture
def arena(space: uvas.AddressSpace) -> Iterator[uvas.Arena]:
    """An arena; afterwards its invariants hold and nothing lives in it."""
    with uvas.Arena(space, name="test") as one:
        yield one
        gc.collect()
        if not one.closed:
            one.check()
            assert one.stats().live_blocks == 0
            one.close()


def forget(things: list[Any]) -> None:
    """Let go of things."""
    things.clear()
    gc.collect()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_alloc_use_free(arena: uvas.Arena, space: uvas.AddressSpace) -> None:
    block = arena.alloc(1000)
    assert (block.size, block.end, block.range) == (1000, block.base + 1000, uvas.Range(block.base, 1000))
    assert block.arena is arena
    assert arena.space is space
    assert hex(block.base) in repr(block)
    assert "test" in repr(block)
    array = block.numpy("f8")
    assert array.size == 125
    assert array.ctypes.data == block.base
    array[:] = 1.5
    assert (block.numpy("f8", 3, offset=80) == 1.5).all()
    del array
    assert not block.freed
    block.free()
    assert block.freed
    assert "freed" in repr(block)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 65536, 65537, MIB, 100 * MIB])
@pytest.mark.parametrize("align", [1, 16, 64, PAGE, 2 * MIB])
def test_sizes_and_alignments(arena: uvas.Arena, size: int, align: int) -> None:
    first, second = arena.alloc(size, align=align), arena.alloc(np.int64(size), align=align)
    for block in (first, second):
        assert block.base % align == 0
        ends = block.numpy("u1")[:: max(1, size - 1)]
        ends[:] = 7
        del ends
    assert first.end <= second.base or second.end <= first.base
    first.free()
    second.free()


@pytest.mark.parametrize(
    ("size", "align", "said"),
    [
        (0, 16, "0x0"),
        (-3, 16, "-0x3"),
        (1 << 64, 16, "0x10000000000000000"),
        (8, 0, "0x0"),
        (8, 3, "0x3"),
        (8, 1 << 31, "0x80000000"),
        (8, -16, "-0x10"),
    ],
)
def test_numbers_that_cannot_be(arena: uvas.Arena, size: int, align: int, said: str) -> None:
    with pytest.raises(ValueError, match=rf"{said}\b"):
        arena.alloc(size, align=align)
    if align == 16:
        with pytest.raises(ValueError, match=rf"{said}\b"):
            arena.alloc_many([1, size])


@pytest.mark.parametrize("size", ["8", 8.0, None, True, b"8"])
def test_what_is_no_number(arena: uvas.Arena, size: object) -> None:
    with pytest.raises(TypeError, match=r"size"):
        arena.alloc(size)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        arena.alloc_many([size])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"align"):
        arena.alloc(8, align=size)  # type: ignore[arg-type]


def test_arguments_as_of_any_function(arena: uvas.Arena) -> None:
    arena.alloc(size=8).free()
    arena.alloc(align=64, size=8).free()
    for wrong in (lambda: arena.alloc(), lambda: arena.alloc(8, 16), lambda: arena.alloc(8, size=8)):
        with pytest.raises(TypeError, match="alloc"):
            wrong()
    with pytest.raises(TypeError, match="flavour"):
        arena.alloc(8, flavour=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        arena.alloc_many(8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alloc"):
        uvas.Allocation()


def test_freed_once(arena: uvas.Arena) -> None:
    block = arena.alloc(100)
    block.free()
    for again in (block.free, block.__enter__, lambda: block.numpy("u1")):
        with pytest.raises(uvas.ReleasedError, match=hex(block.base)):
            again()
    other = arena.alloc(100)  # at the same address, most likely
    with pytest.raises(uvas.ReleasedError):
        block.free()
    assert uvas.allocation_of(other.base) is not None
    other.free()


def test_freed_when_nobody_has_it(arena: uvas.Arena) -> None:
    with arena.measure() as used:
        block = arena.alloc(100)
        gone = weakref.ref(block)
        assert used.live_blocks == 1
        del block
        assert gone() is None
        assert used.live_blocks == 0


def test_an_array_keeps_the_memory(arena: uvas.Arena) -> None:
    block = arena.alloc(PAGE)
    base = block.base
    array = block.numpy("u1")
    view = array[10:20].reshape(5, 2).T
    second = block.numpy("i4", (2, 2))
    del array
    with pytest.raises(BufferError, match=f"{base:#x}.* 2 live arrays"):
        block.free()
    assert not block.freed
    del second
    view[:] = 9
    del block
    found = uvas.allocation_of(view)
    assert found is not None
    assert found.range.base == base
    del view
    assert uvas.allocation_of(base) is None


def test_views_of_other_libraries_keep_it_too(arena: uvas.Arena) -> None:
    block = arena.alloc(80)
    memory = memoryview(block.numpy("f8"))
    with pytest.raises(BufferError):
        block.free()
    exchanged = np.from_dlpack(block.numpy("f8"))
    memory.release()
    with pytest.raises(BufferError):
        block.free()
    assert exchanged.ctypes.data == block.base
    del exchanged, memory
    block.free()


def test_no_buffer_that_numpy_would_not_hold(arena: uvas.Arena) -> None:
    block = arena.alloc(80)
    with pytest.raises(TypeError):
        memoryview(block)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        np.ndarray(8, "u1", buffer=block)  # type: ignore[call-overload]
    base = block.numpy("u1").base
    with pytest.raises(TypeError):
        np.ndarray(8, "u1", buffer=base.base if isinstance(base, np.ndarray) else base)  # type: ignore[call-overload]
    del base
    block.free()


def test_cycles_do_not_keep_it(arena: uvas.Arena) -> None:
    class Knot:
        pass

    gc.disable()
    try:
        block = arena.alloc(100)
        knot = Knot()
        knot.array, knot.itself = block.numpy("u1"), knot  # type: ignore[attr-defined]
        del knot
        assert block.holds == 1
        block.free()  # collects
    finally:
        gc.enable()


def test_with_frees(arena: uvas.Arena) -> None:
    with arena.alloc(100) as block:
        base = block.base
    assert block.freed
    assert uvas.allocation_of(base) is None
    with arena.alloc(100) as block:
        block.free()


def test_with_is_kind_to_arrays_and_exceptions(arena: uvas.Arena) -> None:
    with pytest.raises(KeyError, match="mine"), arena.alloc(100) as block:  # noqa: PT012
        array = block.numpy("u1")
        array[:] = 5
        raise KeyError("mine")
    assert block.freed
    with pytest.raises(uvas.ReleasedError):
        block.numpy("u1")
    with pytest.raises(uvas.ReleasedError):
        block.free()
    assert (array == 5).all()
    base = array.ctypes.data
    assert uvas.allocation_of(base) is not None
    del array
    assert uvas.allocation_of(base) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "error"),
    [
        ("O", None, 0, TypeError),
        (np.dtypes.StringDType(), None, 0, TypeError),
        ("V0", None, 0, ValueError),
        ("f8", 126, 0, ValueError),
        ("f8", (5, 26), 0, ValueError),
        ("f8", -1, 0, ValueError),
        ("f8", 1, 993, ValueError),
        ("f8", 0, 1001, ValueError),
        ("f8", None, -8, ValueError),
        ("f8", 1.5, 0, TypeError),
    ],
)
def test_arrays_that_cannot_be(arena: uvas.Arena, dtype: str, shape: int, offset: int, error: type[Exception]) -> None:
    block = arena.alloc(1000)
    with pytest.raises(error):
        block.numpy(dtype, shape, offset=offset)
    assert block.holds == 0


def test_what_is_said_of_arguments_names_the_class(arena: uvas.Arena) -> None:
    with arena.alloc(100) as block, pytest.raises(TypeError, match=r"Allocation\.numpy\(\)"):
        block.numpy()  # type: ignore[call-arg]


def test_not_to_be_copied_or_pickled(arena: uvas.Arena) -> None:
    block = arena.alloc(8)
    for one in (block, arena):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="one process"):
                attempt(one)


# ---- many ------------------------------------------------------------------------------------------------------------


def test_many_at_once(arena: uvas.Arena) -> None:
    sizes = [1 + 37 * index % 5000 for index in range(3000)]
    blocks = arena.alloc_many(sizes)
    assert [block.size for block in blocks] == sizes
    ordered = sorted(blocks, key=lambda block: block.base)
    assert all(one.end <= other.base for one, other in itertools.pairwise(ordered))
    assert arena.alloc_many([]) == []
    assert len(arena.alloc_many(np.array([10, 20]))) == 2
    assert len(arena.alloc_many(size for size in (1, 2, 3))) == 3
    assert arena.stats().live_blocks == 3000
    blocks[5].free()
    del ordered, blocks
    assert arena.stats().live_blocks == 0


def test_all_or_none(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, limit=8 * MIB) as arena:
        with pytest.raises(uvas.OutOfMemoryError):
            arena.alloc_many([MIB] * 9)
        assert arena.stats().live_blocks == 0
        assert len(arena.alloc_many([MIB] * 7)) == 7


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_limit(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, limit=4 * MIB, name="small") as arena:
        kept = arena.alloc(3 * MIB)
        with pytest.raises(uvas.OutOfMemoryError) as caught:
            arena.alloc(2 * MIB)
        error = caught.value
        assert isinstance(error, MemoryError)
        assert (error.size, error.limit, error.in_use) == (2 * MIB, 4 * MIB, 3 * MIB)
        assert error.largest_hole is not None
        assert error.largest_hole > 0
        for number in (error.size, error.limit, error.in_use, error.largest_hole):
            assert hex(number) in str(error)
        assert "small" in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (again.limit, again.in_use, again.largest_hole) == (error.limit, error.in_use, error.largest_hole)
        kept.free()
        arena.alloc(2 * MIB).free()


def test_no_room_in_a_reservation(space: uvas.AddressSpace) -> None:
    with space.reserve(4 * MIB) as held, uvas.Arena(held) as arena:
        assert arena.space is space
        with pytest.raises(uvas.AddressSpaceExhaustedError) as caught:
            arena.alloc(5 * MIB)
        assert caught.value.size == 5 * MIB
        whole = arena.alloc(4 * MIB)
        assert whole.range == held.range
        assert uvas.find(whole.base) is held
        whole.free()


def test_the_callback_frees_and_the_call_succeeds(space: uvas.AddressSpace) -> None:
    cache: list[uvas.Allocation] = []
    asked: list[int] = []

    def exhausted(size: int) -> bool:
        asked.append(size)
        had = bool(cache)
        cache.clear()
        return had

    with uvas.Arena(space, limit=4 * MIB, exhausted=exhausted) as arena:
        cache.append(arena.alloc(3 * MIB))
        block = arena.alloc(2 * MIB)
        assert asked == [2 * MIB]
        with pytest.raises(uvas.OutOfMemoryError):
            arena.alloc(3 * MIB)
        assert asked == [2 * MIB, 3 * MIB]
        with pytest.raises(ValueError, match="0x0"):
            arena.alloc(0)
        assert len(asked) == 2
        block.free()


def test_what_the_callback_raises_is_raised(space: uvas.AddressSpace) -> None:
    def exhausted(size: int) -> bool:
        raise RuntimeError(f"no {size}")

    with uvas.Arena(space, limit=MIB, exhausted=exhausted) as arena:
        with pytest.raises(RuntimeError, match=f"no {2 * MIB}") as caught:
            arena.alloc(2 * MIB)
        assert isinstance(caught.value.__context__, uvas.OutOfMemoryError)
        arena.alloc(1000).free()


def test_nobody_is_asked_on_behalf_of_the_callback(space: uvas.AddressSpace) -> None:
    asked: list[int] = []

    def exhausted(size: int) -> bool:
        asked.append(size)
        arena.alloc(size)
        return True

    with uvas.Arena(space, limit=MIB, exhausted=exhausted) as arena:
        for count in (1, 2):
            with pytest.raises(uvas.OutOfMemoryError) as caught:
                arena.alloc(2 * MIB)
            assert isinstance(caught.value.__context__, uvas.OutOfMemoryError)
            assert asked == [2 * MIB] * count


def test_a_cache_that_the_callback_refers_to_goes_with_the_arena(space: uvas.AddressSpace) -> None:
    class Cache(list[uvas.Allocation]):
        def drop(self, size: int) -> bool:
            self.clear()
            return size > 0

    cache = Cache()
    things = [uvas.Arena(space, exhausted=cache.drop), cache]
    cache.append(things[0].alloc(1000))  # type: ignore[attr-defined]
    base, gone = cache[0].base, weakref.ref(things[0])
    del cache
    with pytest.warns(ResourceWarning, match="never closed"):
        forget(things)
    assert gone() is None
    assert uvas.allocation_of(base) is None


def test_a_stream_that_cannot_be_asked_for_costs_no_block(arena: uvas.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def note(self: uvas.Arena, block: object) -> None:
        told.append(id(block))
        if len(told) == 3:
            raise InterruptedError("the driver is gone")

    monkeypatch.setattr(uvas.Arena, "_note", note)
    arena._core.order(True)
    kept = arena.alloc(100)
    with pytest.raises(InterruptedError):
        arena.alloc_many([100, 200, 300])
    told[:] = [0, 0]
    with pytest.raises(InterruptedError):
        arena.alloc(100)
    arena._core.order(False)
    assert arena.stats().live_blocks == 1
    kept.free()


# ---- whose address is it ---------------------------------------------------------------------------------------------


def test_find_and_allocation_of(arena: uvas.Arena, space: uvas.AddressSpace) -> None:
    block = arena.alloc(100 * 1000)
    for address in (block.base, block.base + 1, block.end - 1):
        found = uvas.allocation_of(address)
        assert found is not None
        assert found.range.base == block.base
        assert found.range.size >= block.size
        assert found.arena is arena
    held = uvas.find(block.base)
    assert isinstance(held, uvas.Reservation)
    assert block.range in held.range
    assert held.space is space
    assert uvas.find(block.end - 1) is held
    assert space.find(block.base) is held
    array = block.numpy("u1")
    assert uvas.is_unified(array)
    assert uvas.is_unified(array[::-3])
    assert uvas.allocation_of(array[5:]) == uvas.allocation_of(block.base)
    assert not uvas.is_unified(np.zeros(3))
    assert uvas.allocation_of(np.zeros(3)) is None
    for nowhere in (0, -1, 1 << 70):
        assert uvas.allocation_of(nowhere) is None
    for wrong in ("here", 1.5, [1]):
        with pytest.raises(TypeError):
            uvas.allocation_of(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            uvas.is_unified(wrong)  # type: ignore[arg-type]
    del array
    base = block.base
    block.free()
    assert uvas.allocation_of(base) is None


def test_an_arenas_reservation_is_its_own(arena: uvas.Arena) -> None:
    block = arena.alloc(MIB)
    held = uvas.find(block.base)
    assert isinstance(held, uvas.Reservation)
    for verb in (
        held.release,
        held.commit,
        lambda: held.decommit(0, PAGE),
        lambda: held.map_fd(0, offset=0, size=PAGE),
    ):
        with pytest.raises(ValueError, match="arena's"):
            verb()
    with held:
        pass
    block.numpy("u1")[:] = 1
    block.free()


def test_is_unified_at_the_borders(space: uvas.AddressSpace) -> None:
    with space.reserve(2 * PAGE) as held:
        held.commit()
        array = held.numpy("u1")
        assert uvas.is_unified(array)
        assert uvas.is_unified(array[:0])
        beyond = np.lib.stride_tricks.as_strided(array, (2 * PAGE + 1,))
        assert not uvas.is_unified(beyond)
        del beyond, array


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_stats(arena: uvas.Arena) -> None:
    before = arena.stats()
    assert (before.live_blocks, before.live_bytes, before.fragmentation) == (0, 0, 0.0)
    blocks = [arena.alloc(MIB) for _ in range(4)]
    stats = arena.stats()
    assert (stats.live_blocks, stats.total_blocks - before.total_blocks) == (4, 4)
    assert stats.live_bytes == stats.used_bytes - stats.cached_bytes == 4 * MIB
    assert stats.committed_bytes >= 4 * MIB
    assert stats.reserved_bytes >= stats.committed_bytes
    blocks[0].numpy("u1")[:] = 1
    assert MIB <= arena.stats().resident_bytes <= stats.committed_bytes
    assert 0 < stats.metadata_bytes < MIB
    assert stats.largest_hole <= stats.hole_bytes
    assert 0 <= stats.fragmentation <= 1
    with pytest.raises(AttributeError):
        stats.live_blocks = 0  # type: ignore[misc]
    blocks.clear()
    assert arena.stats().peak_bytes >= 4 * MIB
    assert arena.trim() > 0
    after = arena.stats()
    assert after.committed_bytes < stats.committed_bytes
    assert after.reserved_bytes == stats.reserved_bytes


def test_fragmentation_counts_what_is_not_in_the_largest_hole() -> None:
    numbers = dict.fromkeys(uvas.ArenaStats.__slots__, 0)
    stats = uvas.ArenaStats(**(numbers | {"hole_bytes": 400, "largest_hole": 100}))
    assert stats.fragmentation == 0.75


def test_measure(arena: uvas.Arena) -> None:
    outside = arena.alloc(MIB)
    with arena.measure() as used:
        kept = arena.alloc(2 * MIB)
        arena.alloc(3 * MIB).free()
        assert used.allocations == 2
        outside.free()
    assert (used.allocations, used.allocated_bytes) == (2, 5 * MIB)
    assert used.peak_bytes == 5 * MIB
    assert (used.live_blocks, used.live_bytes) == (0, MIB)
    kept.free()
    assert used.live_bytes == MIB  # stands still
    assert "2 allocations" in repr(used)


def test_a_measure_that_never_began(arena: uvas.Arena) -> None:
    with pytest.raises(RuntimeError, match="nothing to end"):
        arena.measure().__exit__(None, None, None)


def test_measures_may_be_nested(arena: uvas.Arena) -> None:
    with arena.measure() as outer:
        arena.alloc(8 * MIB).free()
        arena.trim()
        with arena.measure() as inner:
            arena.alloc(2 * MIB).free()
        assert inner.peak_bytes == 2 * MIB
        arena.trim()
        arena.alloc(MIB).free()
    assert outer.peak_bytes == 8 * MIB
    assert outer.allocations == 3
    with pytest.raises(KeyError), arena.measure() as interrupted:
        raise KeyError
    assert interrupted.allocations == 0


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"backing": "file"},
        {"backing": False},
        {"pages": "giant"},
        {"guard": "all"},
        {"freed": "gone"},
        {"limit": 0},
        {"limit": -1},
        {"growth": 0},
        {"idle": 0},
        {"idle": -1.5},
        {"idle": math.nan},
        {"node": -1},
        {"node": 1 << 20},
    ],
)
def test_options_that_there_are_not(space: uvas.AddressSpace, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        uvas.Arena(space, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"name": 5}, {"exhausted": 5}, {"limit": 1.5}, {"node": "0"}])
def test_options_of_another_type(space: uvas.AddressSpace, options: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=str(next(iter(options)))):
        uvas.Arena(space, **options)  # type: ignore[arg-type]


def test_names_that_c_would_cut(space: uvas.AddressSpace) -> None:
    for named in (
        lambda: uvas.AddressSpace(name="a\0b"),
        lambda: uvas.Arena(space, name="a\0b"),
        lambda: space.reserve(PAGE, name="a\0b"),
        lambda: space.adopt(PAGE, PAGE, owner="a\0b"),
    ):
        with pytest.raises(ValueError, match="NUL"):
            named()


def test_homes_that_there_are_not(space: uvas.AddressSpace, arena: uvas.Arena) -> None:
    block = arena.alloc(8)
    for home in (None, 5, block, uvas.find(block.base)):
        with pytest.raises(TypeError, match="lives in"):
            uvas.Arena(home)  # type: ignore[arg-type]
    held = space.reserve(PAGE)
    held.release()
    with pytest.raises(uvas.ReleasedError):
        uvas.Arena(held)
    with pytest.raises(TypeError):
        uvas.Arena()  # type: ignore[call-arg]


def test_huge_pages_are_refused_with_the_remedy_or_used(space: uvas.AddressSpace) -> None:
    try:
        arena = uvas.Arena(space, pages="huge", growth=4 * MIB)
        block = arena.alloc(MIB)
    except uvas.NotSupportedError as error:
        remedy = error.remedy
    else:
        remedy = "set aside already"
        block.numpy("u1")[:] = 1
        block.free()
        arena.close()
    assert remedy


def test_transparent_pages_poison_and_no_idle_time(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, pages="transparent", freed="poisoned", idle=math.inf, growth=64 * MIB) as arena:
        block = arena.alloc(MIB)
        block.numpy("u1")[:] = 1
        base = block.base
        block.free()
        again = arena.alloc(MIB)
        if again.base == base:
            assert again.numpy("u1")[0] == 0xDF
        again.free()
        assert arena.stats().reserved_bytes == 64 * MIB


@pytest.mark.parametrize("options", [{"freed": "poisoned"}, {"guard": "large"}])
def test_what_finalizers_may_not_wait_for_is_done_by_the_next_verb(
    space: uvas.AddressSpace, options: dict[str, str]
) -> None:
    with uvas.Arena(space, limit=2 * MIB, **options) as arena:  # type: ignore[arg-type]
        for _ in range(5):
            arena.alloc(MIB + MIB // 2)  # dropped, and the next one has room
        array = arena.alloc(MIB).numpy("u1")
        array[:] = 1
        del array
        assert arena.stats().live_blocks == 0
        arena.alloc(1000)
        arena.check()
        assert arena.stats().live_blocks == 0
        arena.alloc(1000)


def test_a_guard_page_stands_behind_a_large_block() -> None:
    program = """
import numpy as np, uvas
with uvas.AddressSpace() as space, uvas.Arena(space, guard="large") as arena:
    block = arena.alloc(1 << 20)
    array = block.numpy("u1")
    array[:] = 1
    print("inside", flush=True)
    np.lib.stride_tricks.as_strided(array, ((1 << 20) + 1,))[1 << 20] = 1
    print("beyond", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "inside\n"
    assert done.returncode < 0


def test_bare_addresses(space: uvas.AddressSpace) -> None:
    with space.reserve(64 * MIB) as held, uvas.Arena(held, backing="none") as arena:
        block = arena.alloc(MIB, align=PAGE)
        assert arena.backing == "none"
        assert arena.stats().committed_bytes == 0
        with pytest.raises(ValueError, match="bare"):
            block.numpy("u1")
        held.commit(block.base - held.base, MIB)
        array = held.numpy("u1", MIB, offset=block.base - held.base)
        array[:] = 3
        del array
        held.decommit(block.base - held.base, MIB)
        block.free()


def test_bare_addresses_of_a_space(space: uvas.AddressSpace) -> None:
    descriptor = os.memfd_create("bare")
    os.ftruncate(descriptor, 2 * MIB)
    try:
        with uvas.Arena(space, backing="none", growth=64 * MIB) as arena:
            block = arena.alloc(2 * MIB, align=PAGE)
            held = uvas.find(block.base)
            assert isinstance(held, uvas.Reservation)
            held.map_fd(descriptor, offset=block.base - held.base, size=2 * MIB)
            held.numpy("u1", 4, offset=block.base - held.base)[:] = 65
            assert os.pread(descriptor, 4, 0) == b"AAAA"
            held.decommit(block.base - held.base, 2 * MIB)
            block.free()
    finally:
        os.close(descriptor)


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
    with pytest.raises(KeyError, match="mine"), uvas.Arena(space) as arena:  # noqa: PT012
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


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_free_each_others_blocks(arena: uvas.Arena) -> None:
    mailboxes: list[list[uvas.Allocation]] = [[] for _ in range(4)]
    wrong: list[str] = []

    def work(mine: int) -> None:
        chance = random.Random(mine)
        for step in range(2000):
            block = arena.alloc(chance.choice([16, 100, 1000, 5000, 100_000]))
            word = block.numpy("u8", 1)
            word[0] = block.base ^ mine
            del word
            mailboxes[chance.randrange(4)].append(block)
            if step % 3:
                try:
                    other = mailboxes[mine].pop()
                except IndexError:
                    continue
                if other.numpy("u8", 1)[0] ^ other.base not in range(4):
                    wrong.append(repr(other))
                other.free()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert arena.stats().total_blocks == 8000
    mailboxes.clear()


def test_of_many_threads_one_frees(arena: uvas.Arena) -> None:
    for _ in range(200):
        block = arena.alloc(64)
        outcomes: list[str] = []
        door = threading.Barrier(4)

        def free(block: uvas.Allocation = block, door: threading.Barrier = door, told: list[str] = outcomes) -> None:
            door.wait()
            try:
                block.free()
                told.append("freed")
            except uvas.ReleasedError:
                told.append("refused")

        threads = [threading.Thread(target=free) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["freed", "refused", "refused", "refused"]


def test_a_thread_that_ends_leaves_its_blocks(arena: uvas.Arena) -> None:
    blocks: list[uvas.Allocation] = []
    thread = threading.Thread(target=lambda: blocks.extend(arena.alloc(100) for _ in range(100)))
    thread.start()
    thread.join()
    for block in blocks:
        block.numpy("u1")[:] = 1
    blocks.clear()


def test_the_ranges_of_a_space_are_also_its_arenas(space: uvas.AddressSpace) -> None:
    with space.reserve(1 << 20) as held, uvas.Arena(space, growth=4 << 20, name="grows") as arena:
        assert space.ranges() == [held]
        block = arena.alloc(100)
        (grown,) = [one for one in space.ranges() if one is not held]
        assert grown is uvas.find(block.base)
        assert len(space.ranges()) == 2
        assert "grows" in repr(grown)
        far = grown.end - 1
        assert uvas.allocation_of(far) is None
        assert uvas.find(far) is grown
        block.free()
    assert space.ranges() == []


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


def test_interrupts_lose_nothing() -> None:
    program = """
import _thread, signal, threading, time
import uvas

at_work, interrupts = False, 0

def handle(number, frame):  # one at a time, and only where it is caught
    global at_work, interrupts
    if at_work:
        at_work = False
        interrupts += 1
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handle)
with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
    stop, kept = threading.Event(), []

    def interrupt():
        while not stop.wait(0.001):
            _thread.interrupt_main()

    thread = threading.Thread(target=interrupt, daemon=True)
    end = time.monotonic() + 1
    thread.start()
    while True:
        try:
            at_work = True
            while time.monotonic() < end:
                kept.append(arena.alloc(100))
                kept.extend(arena.alloc_many([1 << 17, 50]))
                kept[0].numpy("u1")[0] = 1
                kept.clear()
            stop.set()
            thread.join()
            time.sleep(0.05)
            break
        except KeyboardInterrupt:
            pass
    at_work = False
    kept.clear()
    arena.check()
    print(interrupts > 50, arena.stats().live_blocks)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True 0\n", done.stdout + done.stderr


def test_a_limit_below_a_page_is_no_limit_that_anything_fits_in(space: uvas.AddressSpace) -> None:
    with pytest.raises(ValueError, match="less than a page"):
        uvas.Arena(space, limit=1)


def test_no_arena_has_the_handle_0() -> None:
    """Also not for a thread that had a part of an arena which is closed."""
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
        arena.alloc(100).free()
    got = ffi.new("uintptr_t *")
    assert lib.uvas_alloc(0, 100, 0, got) == -errno.ESTALE
    assert lib.uvas_free(0, 4096) == -errno.ESTALE
