"""Arenas against the model, whatever the order of calls and whichever thread makes them.

In one fixed reservation: blocks are disjoint, aligned, inside, hold their bytes; an arena refuses only where there is
no hole, with everything flushed that threads keep; after each step every invariant of the arena.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from machine import ARENA, MIB, PAGE, descriptors, mappings
from model import ArenaModel, ModelBlock

from uvas._core import ffi, lib

BASE = ARENA + (9 << 32)
SMALL_MAX = 262144
MOST = 1000 if os.environ.get("UVAS_FULL") == "1" else 150
T = TypeVar("T")

sizes = st.one_of(
    st.integers(1, 300),
    st.integers(1, SMALL_MAX),
    st.sampled_from([16, 128, 129, 4095, 4096, 4097, SMALL_MAX - 1, SMALL_MAX, SMALL_MAX + 1]),
    st.integers(SMALL_MAX, 200 * PAGE),
    st.integers(1, 5 * MIB),
)
aligns = st.one_of(st.just(0), st.sampled_from([16, 64, PAGE, 4 * PAGE, 64 * PAGE, 2 * MIB]))
workers = st.integers(0, 2)
picks = st.integers(0, 1 << 16)  # of the live blocks


def allocation_size(arena: int, address: int) -> int:
    """Usable bytes of a live block."""
    got = ffi.new("size_t *")
    assert lib.uvas_allocation_size(arena, address, got) == 0
    return int(got[0])


class ArenaMachine(RuleBasedStateMachine):
    """Alloc, free, resize, trim; right and wrong."""

    @initialize(
        pages=st.sampled_from([1, 17, 40, 512, 700, 1536]),
        flags=st.sampled_from([0, 0, 0, lib.UVAS_ARENA_BARE, lib.UVAS_ARENA_GUARD, lib.UVAS_ARENA_POISON]),
        limit=st.sampled_from([0, 0, 16, 100]),
        idle_ns=st.sampled_from([0, 1, (1 << 64) - 1]),
        least=st.sampled_from([1, SMALL_MAX + 1]),  # only large blocks: the model knows every page
    )
    def open(self, pages: int, flags: int, limit: int, idle_ns: int, least: int) -> None:
        self.before = descriptors()
        space = ffi.new("uvas_id *")
        assert lib.uvas_space_open(ffi.new("struct uvas_space_options *"), space) == 0
        held = ffi.new("struct uvas_reservation *")
        where = ffi.new("struct uvas_where *", {"at": BASE})
        assert lib.uvas_reserve(space[0], pages * PAGE, where, held) == 0
        options = ffi.new(
            "struct uvas_arena_options *",
            {"reservation": held.id, "flags": flags, "limit": limit * PAGE, "idle_ns": idle_ns},
        )
        arena = ffi.new("uvas_id *")
        assert lib.uvas_arena_open(options, arena) == 0
        self.space, self.held, self.arena = space[0], held.id, arena[0]
        self.bare, self.limit = flags == lib.UVAS_ARENA_BARE, limit * PAGE
        guard = PAGE if flags == lib.UVAS_ARENA_GUARD else 0
        self.model = ArenaModel(BASE, pages * PAGE, PAGE, SMALL_MAX, guard)
        self.marks: dict[int, int] = {}
        self.least = least
        self.threads = [ThreadPoolExecutor(1) for _ in range(3)]

    def _on(self, worker: int, call: Callable[[], T]) -> T:
        """Make a call from one of three threads, each with what it keeps."""
        return self.threads[worker].submit(call).result()

    # ---- blocks come -------------------------------------------------------------------------------------------------

    @rule(size=sizes, align=aligns, zeroed=st.booleans(), worker=workers)
    def alloc(self, size: int, align: int, zeroed: bool, worker: int) -> None:
        size = max(size, self.least)
        got = ffi.new("uintptr_t *", 1)
        call = lib.uvas_alloc_zeroed if zeroed and not self.bare else lib.uvas_alloc
        code = self._on(worker, lambda: call(self.arena, size, align, got))
        if code:
            assert got[0] == 1
            self._rightly_refused(code, size, align)
            return
        assert got[0] % max(align, 16) == 0
        if zeroed and not self.bare:
            assert not any(ctypes.string_at(got[0], size))
        self._taken_in(got[0], size)

    @rule(size=sizes, count=st.integers(5, 40), worker=workers)
    def alloc_some_of_a_kind(self, size: int, count: int, worker: int) -> None:
        for _ in range(count):
            self.alloc(size, 0, False, worker)

    @rule(size=sizes, worker=workers)
    def try_alloc(self, size: int, worker: int) -> None:
        size = max(size, self.least)
        got = ffi.new("uintptr_t *", 1)
        code = self._on(worker, lambda: lib.uvas_alloc_try(self.arena, size, 0, got))
        assert code in (0, -errno.EAGAIN, -errno.ENOSPC, -errno.ENOMEM)
        if code:
            assert got[0] == 1
        else:
            self._taken_in(got[0], size)

    @rule(many=st.lists(sizes, max_size=8), worker=workers)
    def alloc_many(self, many: list[int], worker: int) -> None:
        many = [max(size, self.least) for size in many]
        wanted = ffi.new("size_t[]", many)
        got = ffi.new("uintptr_t[]", [1] * len(many))
        code = self._on(worker, lambda: lib.uvas_alloc_many(self.arena, wanted, len(many), got))
        if code:
            assert code in (-errno.ENOSPC, -errno.ENOMEM)
            self.model.total_blocks = self._stats().total_blocks  # those that were given back are counted
            room = self.model.size if not self.limit else min(self.limit, self.model.size)
            assert self.model.blocks or sum(map(self.model.pages_of, many)) > room // 8 or room < MIB
            return
        for i, size in enumerate(many):
            self._taken_in(got[i], size)

    def _taken_in(self, base: int, asked: int) -> None:
        block = self.model.add(base, asked, allocation_size(self.arena, base))
        self._mark(block)

    def _mark(self, block: ModelBlock) -> None:
        self.marks[block.base] = mark = hash((block.base, self.model.total_blocks)) & 0xFFFFFFFFFFFFFFFF
        if not self.bare:
            for at in (block.base, block.end - 8):
                ctypes.c_uint64.from_address(at).value = mark

    def _rightly_refused(self, code: int, size: int, align: int) -> None:
        """Nothing is large enough: as the model knows where only large blocks live, as the arena tells elsewhere."""
        assert code == -errno.ENOSPC or (code == -errno.ENOMEM and self.limit)
        assert lib.uvas_arena_trim(self.arena, ffi.NULL) == 0
        stats = self._stats()
        need = self.model.pages_of(size)
        if code == -errno.ENOMEM:
            assert stats.used_bytes + need > self.limit
            assert not self.model.only_large or self._large_with_guards() + need > self.limit
        else:
            assert need > stats.largest_hole or align > PAGE
            assert not self.model.only_large or not self.model.fits(size, align)

    def _large_with_guards(self) -> int:
        return sum(self.model.pages_of(block.size) for block in self.model.blocks)

    # ---- blocks go ---------------------------------------------------------------------------------------------------

    def _picked(self, pick: int) -> ModelBlock | None:
        return self.model.blocks[pick % len(self.model.blocks)] if self.model.blocks else None

    @rule(pick=picks, worker=workers, tried=st.booleans())
    def free(self, pick: int, worker: int, tried: bool) -> None:
        block = self._picked(pick)
        if block is not None:
            self._free(block, worker, tried)

    @rule(first=st.integers(0, 3), step=st.integers(1, 4), worker=workers)
    def free_some(self, first: int, step: int, worker: int) -> None:
        for block in self.model.blocks[first::step]:
            self._free(block, worker, False)

    def _free(self, block: ModelBlock, worker: int, tried: bool) -> None:
        code = -errno.EAGAIN
        if tried:
            code = self._on(worker, lambda: lib.uvas_free_try(self.arena, block.base))
            assert code in (0, -errno.EAGAIN)
        assert code == 0 or self._on(worker, lambda: lib.uvas_free(self.arena, block.base)) == 0
        self.model.remove(block)
        del self.marks[block.base]
        for other in (worker, (worker + 1) % 3):
            assert self._on(other, lambda: lib.uvas_free(self.arena, block.base)) == -errno.EINVAL

    @rule(pick=picks, offset=st.integers(0, 1 << 20), worker=workers)
    def free_inside(self, pick: int, offset: int, worker: int) -> None:
        block = self._picked(pick)
        address = block.base + 1 + offset % (block.size - 1) if block else BASE
        assert self._on(worker, lambda: lib.uvas_free(self.arena, address)) == -errno.EINVAL

    @rule(offset=st.integers(-PAGE, 8 * MIB), worker=workers)
    def free_of_anything_else(self, offset: int, worker: int) -> None:
        if offset + BASE not in self.marks:
            assert self._on(worker, lambda: lib.uvas_free(self.arena, BASE + offset)) == -errno.EINVAL

    @rule(pick=picks, size=sizes, worker=workers)
    def resize(self, pick: int, size: int, worker: int) -> None:
        block, size = self._picked(pick), max(size, self.least)
        if block is None or self.bare:
            return
        got = ffi.new("uintptr_t *", 1)
        code = self._on(worker, lambda: lib.uvas_realloc(self.arena, block.base, size, got))
        if code:
            assert got[0] == 1
            self._rightly_refused(code, size, 0)
            assert allocation_size(self.arena, block.base) == block.size
            return
        mark = self.marks.pop(block.base)
        assert ctypes.c_uint64.from_address(got[0]).value & 0xFF == mark & 0xFF
        assert size < 8 or ctypes.c_uint64.from_address(got[0]).value == mark
        self.model.remove(block)
        self.model.total_blocks, self.model.total_bytes = self._stats().total_blocks - 1, 0  # as it likes to count it
        self._taken_in(got[0], size)

    @rule(worker=workers)
    def trim(self, worker: int) -> None:
        before, given = self._stats(), ffi.new("uint64_t *")
        assert self._on(worker, lambda: lib.uvas_arena_trim(self.arena, given)) == 0
        after = self._stats()
        assert after.cached_bytes == 0
        assert given[0] >= before.committed_bytes - after.committed_bytes
        assert given[0] >= before.resident_bytes - after.resident_bytes
        assert after.resident_bytes <= after.used_bytes  # nothing is behind holes
        if self.model.only_large:
            assert after.used_bytes in (self.model.large_bytes, self._large_with_guards())
            assert after.largest_hole == max((end - base for base, end in self.model.holes()), default=0)
            assert after.hole_count == len(self.model.holes())
        if not self.model.blocks:
            assert after.resident_bytes == 0
            assert after.committed_bytes == 0 or self.model.size < 2 * MIB  # less than a span: emptied

    @rule()
    def close_too_early(self) -> None:
        assert not self.model.blocks or lib.uvas_arena_close(self.arena) == -errno.EBUSY

    # ---- what must always hold ---------------------------------------------------------------------------------------

    def _stats(self) -> Any:
        stats = ffi.new("struct uvas_arena_stats *")
        assert lib.uvas_arena_stats(self.arena, stats) == 0
        return stats

    @invariant()
    def numbers_are_the_models(self) -> None:
        if not hasattr(self, "model"):
            return
        assert lib.uvas_arena_check(self.arena) == 0, ffi.string(lib.uvas_last_failure().text).decode()
        assert lib.uvas_check() == 0
        stats = self._stats()
        assert stats.live_blocks == len(self.model.blocks)
        assert stats.live_bytes == sum(block.size for block in self.model.blocks)
        assert stats.total_blocks == self.model.total_blocks
        assert stats.live_bytes + stats.cached_bytes <= stats.used_bytes <= stats.peak_bytes
        assert stats.used_bytes + stats.hole_bytes <= stats.reserved_bytes == self.model.size
        assert not self.limit or stats.peak_bytes <= self.limit
        assert stats.resident_bytes <= stats.committed_bytes <= (0 if self.bare else self.model.size)
        assert stats.threads <= 3

    @invariant()
    def every_byte_is_somebodys(self) -> None:
        if not hasattr(self, "model"):
            return
        found = ffi.new("struct uvas_allocation *")
        for block in self.model.blocks:
            for at in (block.base, block.base + block.asked - 1, block.end - 1):
                assert lib.uvas_find_allocation(at, found) == 0
                assert (found.base, found.size, found.arena) == (block.base, block.size, self.arena)
            if not self.bare:
                mark = self.marks[block.base]
                assert ctypes.c_uint64.from_address(block.end - 8).value == mark
                assert block.size < 16 or ctypes.c_uint64.from_address(block.base).value == mark
        for at in range(BASE + 5, BASE + self.model.size, max(PAGE, self.model.size // 64 + 16)):
            holder = self.model.holder(at)
            assert lib.uvas_find_allocation(at, found) == (0 if holder else -errno.ENOENT)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for block in self.model.blocks:
            assert lib.uvas_free(self.arena, block.base) == 0
        for thread in self.threads:
            thread.shutdown()
        assert lib.uvas_arena_check(self.arena) == 0
        assert lib.uvas_arena_close(self.arena) == 0
        assert lib.uvas_release(self.held) == 0
        assert lib.uvas_space_close(self.space) == 0
        assert mappings(BASE, BASE + self.model.size) == []
        assert descriptors() == self.before


ArenaMachine.TestCase.settings = settings(
    max_examples=MOST, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestArenaMachine = ArenaMachine.TestCase
