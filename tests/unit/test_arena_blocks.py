"""Blocks of arenas: one and many at once, arrays over them, and when they are freed."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref

import numpy as np
import pytest
from machine import MIB, PAGE

import uvas

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
        arena.alloc(size)
    with pytest.raises(TypeError):
        arena.alloc_many([size])
    with pytest.raises(TypeError, match=r"align"):
        arena.alloc(8, align=size)


def test_arguments_as_of_any_function(arena: uvas.Arena) -> None:
    arena.alloc(size=8).free()
    arena.alloc(align=64, size=8).free()
    for wrong in (lambda: arena.alloc(), lambda: arena.alloc(8, 16), lambda: arena.alloc(8, size=8)):
        with pytest.raises(TypeError, match="alloc"):
            wrong()
    with pytest.raises(TypeError, match="flavour"):
        arena.alloc(8, flavour=1)
    with pytest.raises(TypeError):
        arena.alloc_many(8)
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
        memoryview(block)
    with pytest.raises(TypeError):
        np.ndarray(8, "u1", buffer=block)
    base = block.numpy("u1").base
    with pytest.raises(TypeError):
        np.ndarray(8, "u1", buffer=base.base if isinstance(base, np.ndarray) else base)
    del base
    block.free()


def test_cycles_do_not_keep_it(arena: uvas.Arena) -> None:
    class Knot:
        pass

    gc.disable()
    try:
        block = arena.alloc(100)
        knot = Knot()
        knot.array, knot.itself = block.numpy("u1"), knot
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
    with pytest.raises(KeyError, match="mine"), arena.alloc(100) as block:  # noqa: PT012  # what raises is the block
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
        block.numpy()


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
