"""An arena that is full: its limit, its reservation, and who is asked before a call fails."""

from __future__ import annotations

import pickle

import pytest
from machine import MIB

import uvas


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


def test_a_limit_below_a_page_is_no_limit_that_anything_fits_in(space: uvas.AddressSpace) -> None:
    with pytest.raises(ValueError, match="less than a page"):
        uvas.Arena(space, limit=1)


# ---- who is asked ----------------------------------------------------------------------------------------------------


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
