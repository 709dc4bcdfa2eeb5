"""Whose address it is: a block's, an arena's, a reservation's, or nobody's."""

from __future__ import annotations

import numpy as np
import pytest
from machine import MIB, PAGE

import uvas


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
            uvas.allocation_of(wrong)
        with pytest.raises(TypeError):
            uvas.is_unified(wrong)
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
