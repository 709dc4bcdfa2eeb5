"""How an arena may be made: its home, its pages, its guards, and bare addresses."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from machine import MIB, PAGE

import uvas


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
        uvas.Arena(space, **options)


@pytest.mark.parametrize("options", [{"name": 5}, {"exhausted": 5}, {"limit": 1.5}, {"node": "0"}])
def test_options_of_another_type(space: uvas.AddressSpace, options: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=str(next(iter(options)))):
        uvas.Arena(space, **options)


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
            uvas.Arena(home)
    held = space.reserve(PAGE)
    held.release()
    with pytest.raises(uvas.ReleasedError):
        uvas.Arena(held)
    with pytest.raises(TypeError):
        uvas.Arena()


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
    with uvas.Arena(space, limit=2 * MIB, **options) as arena:
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
