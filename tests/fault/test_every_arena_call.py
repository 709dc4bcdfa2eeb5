"""Every system call of every verb of an arena fails in turn: for k = 1, 2, ... until the verb completes untouched, once
and from then on.

An answer other than 0 is typed, and blocks, their bytes, counters, addresses and descriptors are as before; a verb that
survives by another way has done its work. Whatever happened, the arena is in order, agrees with its space and the
kernel, serves the next call, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from machine import ARENA, MIB, PAGE, descriptors, failing, mappings

from uvas._core import ffi, lib

WINDOW_SIZE = 1 << 30
WINDOWS = itertools.count(ARENA + (10 << 32), WINDOW_SIZE)  # one for each scene: what one leaves is no other's fault
MOST_CALLS = 200
FIXED_SIZE = 24 * MIB
ANSWERS = {errno.ENOMEM, errno.EDQUOT, errno.ENOSPC, errno.EINVAL, errno.ENOTSUP}


@dataclass
class Scene:
    """An arena with blocks of all kinds in it, some freed, some pages dirty."""

    space: int
    held: int
    arena: int
    blocks: dict[int, bytes] = field(default_factory=dict)  # base -> first and last bytes
    made: list[int] = field(default_factory=list)  # by the verb

    def alloc(self, size: int, *, align: int = 0, zeroed: bool = False) -> int:
        """Allocate; the answer."""
        got = ffi.new("uintptr_t *", 1)
        code = (lib.uvas_alloc_zeroed if zeroed else lib.uvas_alloc)(self.arena, size, align, got)
        if code == 0:
            assert not zeroed or not any(ctypes.string_at(got[0], size))
            self.made.append(got[0])
        else:
            assert got[0] == 1
        return int(code)

    def alloc_many(self, *sizes: int) -> int:
        """Allocate all or none; the answer."""
        got = ffi.new("uintptr_t[]", [1] * len(sizes))
        code = lib.uvas_alloc_many(self.arena, ffi.new("size_t[]", sizes), len(sizes), got)
        if code == 0:
            self.made += list(got)
        return int(code)

    def realloc(self, index: int, size: int) -> int:
        """Resize a block of the scene; the answer."""
        base = list(self.blocks)[index]
        got = ffi.new("uintptr_t *", 1)
        code = lib.uvas_realloc(self.arena, base, size, got)
        if code == 0:
            assert ctypes.string_at(got[0], 16) == self.blocks.pop(base)[:16]
            self.made.append(got[0])
        else:
            assert got[0] == 1
        return int(code)

    def usable(self, base: int) -> int:
        """Bytes of a block."""
        size = ffi.new("size_t *")
        assert lib.uvas_allocation_size(self.arena, base, size) == 0
        return int(size[0])

    def free(self, base: int) -> None:
        """Free a block, which cannot fail."""
        assert lib.uvas_free(self.arena, base) == 0
        assert lib.uvas_free(self.arena, base) == -errno.EINVAL


def numbers(scene: Scene) -> tuple[int, ...]:
    """What a call that fails must not change."""
    stats = ffi.new("struct uvas_arena_stats *")
    assert lib.uvas_arena_stats(scene.arena, stats) == 0
    assert stats.live_bytes + stats.cached_bytes <= stats.used_bytes
    return stats.live_blocks, stats.live_bytes


def open_arena(space: int, held: int, flags: int) -> tuple[int, int]:
    """Open an arena in a fixed reservation, or in the space: the answer, and the arena."""
    options = ffi.new("struct uvas_arena_options *", {"flags": flags, "growth": 4 * MIB, "name": ffi.NULL})
    options.reservation = held
    options.space = 0 if held else space
    arena = ffi.new("uvas_id *")
    return int(lib.uvas_arena_open(options, arena)), int(arena[0])


def populate(scene: Scene) -> None:
    """Fill the scene: 3 live blocks with bytes in them, and room that has been used."""
    for size in (100, 5000, MIB, 100 * PAGE, 3 * MIB, 200):
        assert scene.alloc(size) == 0
    small, middle, large, hole, span, spare = scene.made
    for base in (small, middle, large, hole, span):
        ctypes.memset(base, base >> 4 & 0x7F | 1, scene.usable(base))
    for base in (hole, span, spare):
        scene.free(base)
    scene.blocks = {base: contents(scene, base) for base in (small, middle, large)}
    scene.made = []


def contents(scene: Scene, base: int) -> bytes:
    """The first bytes and the last."""
    return ctypes.string_at(base, 16) + ctypes.string_at(base + scene.usable(base) - 16, 16)


KINDS = {"fixed": (True, 0), "growing": (False, 0), "guarded": (False, lib.UVAS_ARENA_GUARD)}


@contextlib.contextmanager
def a_scene(kind: str) -> Iterator[Scene]:
    """A scene, which leaves nothing behind."""
    before = descriptors()
    fixed, flags = KINDS[kind]
    space = ffi.new("uvas_id *")
    window = next(WINDOWS)
    options = ffi.new("struct uvas_space_options *", {"window_base": window, "window_size": WINDOW_SIZE})
    assert lib.uvas_space_open(options, space) == 0
    held = ffi.new("struct uvas_reservation *")
    if fixed:
        assert lib.uvas_reserve(space[0], FIXED_SIZE, ffi.NULL, held) == 0
    code, arena = open_arena(space[0], held.id, flags)
    assert code == 0
    scene = Scene(space[0], held.id, arena)
    populate(scene)
    yield scene
    end(scene)
    assert mappings(window, window + WINDOW_SIZE) == []
    assert descriptors() == before


def end(scene: Scene) -> None:
    """Free what is there; nothing but that was."""
    for base in [*scene.blocks, *scene.made]:
        scene.free(base)
    if scene.arena:
        assert lib.uvas_arena_trim(scene.arena, ffi.NULL) == 0
        stats = ffi.new("struct uvas_arena_stats *")
        assert lib.uvas_arena_stats(scene.arena, stats) == 0
        assert (stats.live_blocks, stats.used_bytes, stats.committed_bytes, stats.resident_bytes) == (0, 0, 0, 0)
        assert stats.hole_count == stats.regions
        assert lib.uvas_arena_close(scene.arena) == 0
    if scene.held:
        assert lib.uvas_release(scene.held) == 0
    left = ffi.new("struct uvas_space_stats *")
    assert lib.uvas_space_stats(scene.space, left) == 0
    assert (left.reservations, left.committed_bytes) == (0, 0)
    assert lib.uvas_space_close(scene.space) == 0
    assert lib.uvas_check() == 0


def in_order(scene: Scene) -> None:
    """Every invariant, and what the space and the kernel know of it."""
    assert lib.uvas_arena_check(scene.arena) == 0, ffi.string(lib.uvas_last_failure().text).decode()
    assert lib.uvas_check() == 0
    found, count = ffi.new("struct uvas_finding *"), ffi.new("size_t *")
    assert lib.uvas_audit(scene.space, found, 1, count) == 0
    assert count[0] == 0, ffi.string(found.owner)
    stats, space = ffi.new("struct uvas_arena_stats *"), ffi.new("struct uvas_space_stats *")
    assert lib.uvas_arena_stats(scene.arena, stats) == 0
    assert lib.uvas_space_stats(scene.space, space) == 0
    assert (stats.committed_bytes, stats.reserved_bytes) == (space.committed_bytes, space.reserved_bytes)
    for base, bytes_there in scene.blocks.items():
        assert contents(scene, base) == bytes_there
    for base in scene.made:  # memory is behind what was got, all of it
        ctypes.memset(base, 0x5C, scene.usable(base))


def still_works(scene: Scene) -> None:
    """The next calls, nothing failing, do what they always do."""
    for size in (64, 3000, 2 * MIB):
        assert scene.alloc(size, zeroed=True) == 0
        scene.free(scene.made.pop())


def free_something(scene: Scene) -> int:
    """Free two blocks, whatever fails: it cannot fail."""
    for base in list(scene.blocks)[1:]:
        scene.free(base)
        del scene.blocks[base]
    return 0


VERBS: dict[str, Callable[[Scene], int]] = {
    "small": lambda scene: scene.alloc(300),
    "large in used pages": lambda scene: scene.alloc(90 * PAGE),
    "large in fresh pages": lambda scene: scene.alloc(8 * MIB, align=2 * MIB),
    "larger than a growth": lambda scene: scene.alloc(9 * MIB),
    "zeroed over used pages": lambda scene: scene.alloc(3 * MIB, zeroed=True),
    "many": lambda scene: scene.alloc_many(10, 3 * MIB, 700, 70000, 5 * MIB, 60000),
    "realloc of a small block": lambda scene: scene.realloc(0, 40000),
    "realloc in place": lambda scene: scene.realloc(2, MIB + 50 * PAGE),
    "realloc over spans": lambda scene: scene.realloc(2, 7 * MIB),
    "shrink": lambda scene: scene.realloc(2, 100 * PAGE),
    "shrink to a small block": lambda scene: scene.realloc(2, 500),
    "free": free_something,
    "trim": lambda scene: int(lib.uvas_arena_trim(scene.arena, ffi.NULL)),
}


def expect_typed(code: int) -> None:
    """A failure that says what it is."""
    assert -code in ANSWERS
    failure = lib.uvas_last_failure()
    assert failure.code == code
    assert failure.kind != lib.UVAS_FAILURE_NONE
    assert ffi.string(failure.text)


def try_a_verb(name: str, scene: Scene, k: int, *, lasting: bool, error: int) -> tuple[int, int]:
    """Do it with the k-th call failing: the answer, and how many calls it made."""
    with failing(k, lasting=lasting, error=error):
        code = VERBS[name](scene)
        made = int(lib.uvas_test_calls())
        if code:
            expect_typed(code)
    return code, made


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EINVAL], ids=["ENOMEM", "EINVAL"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VERBS)
def test_every_system_call_of_every_verb(name: str, kind: str, lasting: bool, error: int) -> None:
    for k in range(1, MOST_CALLS):
        with a_scene(kind) as scene:
            before = numbers(scene)
            code, made = try_a_verb(name, scene, k, lasting=lasting, error=error)
            in_order(scene)
            if code:
                assert numbers(scene) == before, f"call {k}"
                assert name != "free", "which needs nothing"
                assert name != "shrink" or kind == "guarded", "which moves where there are guards"
            still_works(scene)
        if made < k:
            assert code == 0
            break
    else:
        raise AssertionError("a verb of 200 calls")
    assert k > 1 or name not in ("large in fresh pages", "larger than a growth", "realloc over spans", "trim")


def settle(scene: Scene) -> None:
    """What the kernel would not take when the arena was closed: the caller's reservation has it, or the quarantine."""
    assert not scene.held or lib.uvas_decommit(scene.held, 0, FIXED_SIZE) == 0
    count, one = ffi.new("size_t *"), ffi.new("struct uvas_finding *")
    assert lib.uvas_heal(scene.space, one, 1, count) == 0
    assert count[0] == 0
    stats = ffi.new("struct uvas_space_stats *")
    assert lib.uvas_space_stats(scene.space, stats) == 0
    assert (stats.quarantined_bytes, stats.poisoned_bytes) == (0, 0)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EINVAL], ids=["ENOMEM", "EINVAL"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_system_call_of_open_and_close(kind: str, lasting: bool, error: int) -> None:
    """What cannot be opened is not there; what cannot be closed is as it was, or gone with what could not be given
    back kept aside."""
    opened = 0
    for k in range(1, MOST_CALLS):
        with a_scene(kind) as scene:
            for base in scene.blocks:
                scene.free(base)
            scene.blocks = {}
            with failing(k, lasting=lasting, error=error):
                closed = lib.uvas_arena_close(scene.arena)
                if closed:
                    expect_typed(closed)
                else:
                    scene.arena = 0
                made = int(lib.uvas_test_calls())
            if closed:
                in_order(scene)
                still_works(scene)
                assert lib.uvas_arena_close(scene.arena) == 0
                scene.arena = 0
            else:
                settle(scene)
            with failing(k, lasting=lasting, error=error):
                code, arena = open_arena(scene.space, scene.held, KINDS[kind][1])
                if code:
                    expect_typed(code)
                made = max(made, int(lib.uvas_test_calls()))
            scene.arena = arena
            if code == 0:
                opened += 1
                still_works(scene)
        if made < k:
            assert code == closed == 0
            break
    else:
        raise AssertionError("an open or a close of 200 calls")
    assert opened > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_without_memory_costs_nothing_for_ever(kind: str) -> None:
    """Refused as often as you like: neither bookkeeping nor addresses grow by it."""
    with a_scene(kind) as scene:
        stats = ffi.new("struct uvas_arena_stats *")
        sizes = []
        for _ in range(3):
            for _ in range(200):
                with failing(1, lasting=True, error=errno.ENOMEM):
                    code = scene.alloc(9 * MIB)
                assert code < 0
                with failing(2, lasting=True, error=errno.ENOMEM):
                    code = scene.alloc(5 * MIB, align=4 * MIB)
                if code == 0:
                    scene.free(scene.made.pop())
            assert lib.uvas_arena_stats(scene.arena, stats) == 0
            sizes.append((stats.metadata_bytes, stats.reserved_bytes))
        assert sizes[1] == sizes[2]
        in_order(scene)
        still_works(scene)
