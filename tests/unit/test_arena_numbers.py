"""What an arena says of itself in numbers: its statistics, and measures."""

from __future__ import annotations

import pytest
from machine import MIB

import uvas


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
        stats.live_blocks = 0
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
