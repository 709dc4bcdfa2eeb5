from __future__ import annotations

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvas.ranges import Range

TOP = 1 << 64


def ranges(limit=TOP):
    bases = st.integers(0, limit - 1)
    return bases.flatmap(lambda base: st.builds(Range, st.just(base), st.integers(1, limit - base)))


small = ranges(12)


def members(some: Range) -> set[int]:
    return set(range(some.base, some.end))


# ---- what it means: the set of its addresses


@given(small, small)
def test_is_the_set_of_its_addresses(one, other):
    assert one.overlaps(other) == bool(members(one) & members(other))
    assert one.contains(other) == (members(other) <= members(one))
    both = one.intersection(other)
    assert (members(both) if both else set()) == members(one) & members(other)
    for address in range(13):
        assert one.contains(address) == (address in one) == (address in members(one))


@given(ranges(), ranges())
def test_overlap_is_symmetric_and_the_intersection_lies_in_both(one, other):
    both = one.intersection(other)
    assert one.overlaps(other) == other.overlaps(one) == (both is not None)
    assert both == other.intersection(one)
    if both:
        assert both in one
        assert both in other


def test_the_last_address_of_all_can_be_held():
    last = Range(TOP - 1, 1)
    assert last.end == TOP
    assert TOP - 1 in last
    assert TOP not in last
    assert -1 not in last


def test_order_is_by_base_then_size():
    expected = [Range(1, 1), Range(1, 2), Range(2, 1)]
    for shuffled in itertools.permutations(expected):
        assert sorted(shuffled) == expected


# ---- what is no range


@pytest.mark.parametrize(
    ("base", "size", "shown"),
    [
        (-0x1000, 0x2000, "-0x1000"),
        (0x1000, 0, "0x0"),
        (0x1000, -0x10, "-0x10"),
        (TOP, 1, "0x10000000000000000"),
        (TOP - 0x1000, 0x1001, "0x1001"),
        (1, TOP, "0x10000000000000000"),
        (0, TOP + 1, "0x10000000000000001"),
    ],
)
def test_no_such_range_shows_the_number_in_hex(base, size, shown):
    with pytest.raises(ValueError, match=r"range") as raised:
        Range(base, size)
    assert f" {shown} " in f"{raised.value} "


@pytest.mark.parametrize("wrong", [1.0, "4096", None, b"1", 1 + 0j])
def test_only_integers(wrong):
    with pytest.raises(TypeError, match="base is an integer"):
        Range(wrong, 1)
    with pytest.raises(TypeError, match="size is an integer"):
        Range(1, wrong)
    with pytest.raises(TypeError, match="address is an integer"):
        Range(1, 1).contains(wrong)


def test_integers_of_numpy_become_plain_ones():
    some = Range(np.uint64(0x7F00_0000_0000), np.int32(0x1000))
    assert type(some.base) is int
    assert type(some.size) is int
    assert np.uint64(0x7F00_0000_0FFF) in some
    assert np.uint64(0x7F00_0000_1000) not in some


# ---- a value


@given(ranges())
def test_repr_makes_it_again_and_str_is_half_open(some):
    assert eval(repr(some)) == some
    assert str(some) == f"[{hex(some.base)}, {hex(some.end)})"


@given(ranges())
def test_equal_values_are_the_same_key_and_survive_pickling(some):
    again = pickle.loads(pickle.dumps(some))
    assert again == some
    assert {again: 1}[some] == 1


def test_cannot_be_changed():
    some = Range(0x1000, 0x1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        some.base = 0x2000
    assert not hasattr(some, "__dict__")
