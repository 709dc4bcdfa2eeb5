"""Mirrored memory beyond the selftest's rows.

Many parties on the same words, linked structures, less device memory than data, advice, memory that goes while somebody
waits for it.
"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, TimeoutError

import numpy as np
import pytest
from machine import PAGE, read_word, write_word
from mirror import HOST, PATIENCE_S, Mirror, function, in_thread, until, words

import uvas
from uvas._core import lib

SMALL = 4096
"""A granule for tests that want many."""


@pytest.fixture
def pinned_host() -> Iterator[object]:
    """Pin memory of the host's as drivers do, by a ring that has it registered; ``pin(address, size)``."""
    rings: list[int] = []

    def pin(address: int, size: int) -> None:
        ring = int(function("uring_open")(address, size) or 0)
        if ring < 0:
            pytest.skip(f"io_uring is not to be had here: errno {-ring}")
        rings.append(ring)

    yield pin
    for ring in rings:
        function("uring_close", "none")(ring)


# ---- everybody on the same words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [4096, 65536])
def test_contended_atomic_additions_are_exact(fresh, granule: int) -> None:
    mirror = fresh(2, granule=granule)
    held = mirror.commit(2, seed=None)
    stop, longest = held.base + mirror.granule, held.base + mirror.granule + 64
    adding = [
        mirror.submit(party, "add_until", held.base, stop, longest + 64 * (party + 1), result="uint64")
        for party in (HOST, 0, 1)
    ]
    time.sleep(0.5)
    write_word(stop, 1)
    done = [one.result(PATIENCE_S) for one in adding]
    assert read_word(held.base) == sum(done)
    assert min(done) > 0  # nobody was shut out


def test_two_devices_and_the_host_write_one_page_in_turns(mirror: Mirror) -> None:
    held = mirror.commit(1, seed=None)
    turns = 100
    taking = [
        mirror.submit(party, "take_turns", held.base, me, 3, turns, 200, 20) for me, party in enumerate((HOST, 0, 1))
    ]
    assert [one.result(PATIENCE_S) for one in taking] == [turns] * 3
    array = held.numpy(np.uint64, 204)
    assert array[:4].tolist() == [3 * turns, turns, turns, turns]
    assert (array[4:] == 3 * turns).all()
    del array


@pytest.mark.parametrize("granule", [4096, 65536])
def test_a_store_across_two_granules_by_three_parties_ends(fresh, granule: int) -> None:
    """One instruction that needs two granules, which others take away meanwhile: everybody comes to his end."""
    mirror = fresh(2, granule=granule)
    held = mirror.commit(2, seed=None)
    across = held.base + mirror.granule - 4
    storing = [
        mirror.submit(party, "store_across", across, 1 + me, 2000, result="uint64")
        for me, party in enumerate((HOST, 0, 1))
    ]
    assert [one.result(PATIENCE_S) for one in storing] == [2000] * 3
    halves = mirror.read(0, across, 8)
    assert set(halves) <= {1, 2, 3}
    assert halves[:4] == halves[:1] * 4  # each half is somebody's, whole
    assert halves[4:] == halves[7:] * 4


def test_eight_devices_in_one_space(fresh) -> None:
    mirror = fresh(8)
    held = mirror.commit(16, seed=0)
    counter = mirror.commit(1, seed=None)
    adding = [mirror.submit(i, "add", counter.base, 500, result="uint64") for i in range(8)]
    for one in adding:
        one.result(PATIENCE_S)
    assert read_word(counter.base) == 8 * 500
    part = 2 * mirror.granule
    for i in range(8):  # everybody reads everything
        assert mirror.differ(i, held.base, held.size, 0) == 0
    assert all(mirror.holds(held, party).all() for party in range(HOST, 8))
    filling = [mirror.submit(i, "fill", held.base + i * part, part // 8, 1000 * i, result="none") for i in range(8)]
    for one in filling:
        one.result(PATIENCE_S)
    for i in range(8):
        assert mirror.differ((i + 3) % 8, held.base + i * part, part, 1000 * i) == 0
        assert mirror.differ(HOST, held.base + i * part, part, 1000 * i) == 0


def test_different_parts_at_once_without_a_lock(mirror: Mirror) -> None:
    """Host and devices write words of their own in every granule, all at the same time."""
    held = mirror.commit(16, seed=None)
    stride = mirror.granule // 8
    rounds = 20
    for _ in range(rounds):
        adding = [
            mirror.submit(party, "add_strided", held.base + 64 * me, 16, stride, me + 1, result="uint64")
            for me, party in enumerate((HOST, 0, 1))
        ]
        for one in adding:
            one.result(PATIENCE_S)
    array = held.numpy(np.uint64).reshape(16, -1)
    assert (array[:, :24:8] == np.array([1, 2, 3]) * rounds).all()
    assert array.sum() == 16 * 6 * rounds
    del array


@pytest.mark.parametrize(("builder", "walker"), [(HOST, 0), (0, HOST), (0, 1)])
def test_a_linked_structure_built_by_one_and_walked_by_another(mirror: Mirror, builder: int, walker: int) -> None:
    held = mirror.commit(16, seed=None)
    count, stride = 2000, 16 * mirror.granule // 2000 // 16 * 16
    head = mirror.call(builder, "link_up", held.base, count, stride, result="uint64")
    total = count * (count - 1) // 2
    assert mirror.call(walker, "walk", head, 1, result="uint64") == total
    assert mirror.call(builder, "walk", head, 0, result="uint64") == total + count


# ---- less device memory than data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 4])
def test_more_data_than_device_memory(private, times: int) -> None:
    """Shared memory has no capacity: nothing to go beyond."""
    capacity = 1 << 20
    mirror = private(1, granule=SMALL, capacity=capacity)
    held = mirror.commit(times * capacity // SMALL, seed=1)
    for seed in (1, 2, 3):  # read, then written, then read again: what was evicted came back with what was written
        assert mirror.differ(0, held.base, held.size, seed) == 0
        mirror.fill(0, held.base, held.size, seed + 1)
        assert resident(mirror) <= capacity
    assert mirror.differ(HOST, held.base, held.size, 4) == 0
    moved = mirror.space.movement().devices["device0"]
    assert moved.evictions > 0
    assert moved.capacity == capacity


def resident(mirror: Mirror, device: int = 0) -> int:
    """Bytes in a device's memory, as the pager counts them; the kernel's count may not be above it."""
    told = mirror.space.movement().devices[f"device{device}"].resident_bytes
    assert told >= int(mirror.holds_all(device).sum()) * PAGE
    return told


def test_capacity_counts_over_all_reservations(private) -> None:
    mirror = private(2, granule=SMALL, capacity=64 * SMALL)
    several = [mirror.commit(32, seed=i) for i in range(4)]
    for device in (0, 1):
        for i, held in enumerate(several):
            assert mirror.differ(device, held.base, held.size, i) == 0
            assert resident(mirror, device) <= 64 * SMALL
    for i, held in enumerate(several):
        assert mirror.differ(HOST, held.base, held.size, i) == 0


def test_a_prefetch_does_not_evict_what_it_has_just_brought(private) -> None:
    mirror = private(1, granule=SMALL, capacity=64 * SMALL)
    new, old = mirror.commit(64, seed=2), mirror.commit(32, seed=1)
    mirror.migrate(uvas.Range(new.base, 32 * SMALL), 0)  # what came first would be the first to leave
    mirror.migrate(old, 0)
    mirror.migrate(new, 0)
    assert mirror.all_at(new, 0)  # all of it
    assert mirror.all_at(old, HOST)  # written back
    assert mirror.differ(HOST, old.base, old.size, 1) == 0
    with pytest.raises(uvas.OutOfMemoryError):
        mirror.space.prefetch(mirror.commit(65, seed=None), mirror.devices[0])
    assert mirror.differ(0, new.base, new.size, 2) == 0


def test_a_scan_does_not_drive_out_what_is_used_again_and_again(private) -> None:
    """Eight granules used between all others of four times the capacity: they fault less often than those."""
    mirror = private(1, granule=SMALL, capacity=64 * SMALL)
    held = mirror.commit(8 + 256, seed=0)
    hot = uvas.Range(held.base, 8 * SMALL)
    for _ in range(4):
        for i in range(0, 256, 8):
            assert mirror.differ(0, held.base + (8 + i) * SMALL, 8 * SMALL, (8 + i) * SMALL // 8) == 0
            assert mirror.differ(0, hot.base, hot.size, 0) == 0
    moved = mirror.space.movement().devices["device0"]
    assert moved.bytes_in < (4 * 256 + 4 * 32 * 8 // 4) * SMALL  # of 4 * 32 * 8 uses of the hot ones few faulted


def test_what_stays_on_the_host_is_not_taken(private) -> None:
    mirror = private(1, granule=SMALL, capacity=16 * SMALL)
    held = mirror.commit(32, seed=0)
    mirror.migrate(uvas.Range(held.base, 16 * SMALL), 0)
    with mirror.space.pin_host(uvas.Range(held.base, 8 * SMALL)):
        assert mirror.all_at(uvas.Range(held.base, 8 * SMALL), HOST)
        reading = in_thread(mirror.read, 0, held.base, 8)
        with pytest.raises(TimeoutError):
            reading.result(0.1)
        assert mirror.differ(0, held.base + 16 * SMALL, 16 * SMALL, 16 * SMALL // 8) == 0  # others go on
    assert reading.result(PATIENCE_S) == bytes(8)
    assert mirror.differ(0, held.base, held.size, 0) == 0


def test_a_pin_may_be_entered_in_itself_and_holds_to_the_last_end(mirror: Mirror) -> None:
    held = mirror.commit(4, seed=1)
    mirror.migrate(held, 0)
    pin = mirror.space.pin_host(held)
    with pin:
        with pin:
            pass
        reading = in_thread(mirror.read, 0, held.base, 8)
        if mirror.private:
            with pytest.raises(TimeoutError):
                reading.result(0.1)
        with pytest.raises(BufferError):
            held.release()
    assert reading.result(PATIENCE_S) == words(1, 8)
    held.release()


@pytest.mark.parametrize("way", ["forgotten", "interrupted"])
def test_a_pin_that_is_never_left_is_let_go_of(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    held = mirror.commit(4, seed=1)
    if way == "forgotten":
        mirror.space.pin_host(held).__enter__()
    else:
        pin_host = lib.uvas_pin_host

        class Interrupting:
            def __getattr__(self, name: str) -> object:
                return getattr(lib, name)

            def uvas_pin_host(self, *arguments: object) -> int:
                answer: int = pin_host(*arguments)
                signal.raise_signal(signal.SIGINT)
                return answer

        monkeypatch.setattr("uvas.movement.lib", Interrupting())
        with pytest.raises(KeyboardInterrupt), mirror.space.pin_host(held):
            pass
    gc.collect()
    mirror.space.stats()  # does what finalizers left
    assert mirror.read(0, held.base, 8) == words(1, 8)
    held.release()


# ---- advice, prefetch, discard ---------------------------------------------------------------------------------------


def test_a_prefetch_that_is_not_waited_for(mirror: Mirror) -> None:
    held = mirror.commit(32, seed=6)
    moving = mirror.space.prefetch(held, mirror.devices[0], wait=False)
    assert isinstance(moving, Future)
    assert moving.result(PATIENCE_S) is None
    assert mirror.all_at(held, 0)
    assert mirror.differ(1, held.base, held.size, 6) == 0


def test_arrays_allocations_and_ranges_can_be_moved(mirror: Mirror) -> None:
    with uvas.Arena(mirror.space, name="blocks", growth=64 * mirror.granule) as arena:
        block = arena.alloc(4 * mirror.granule, align=mirror.granule)
        array = block.numpy(np.uint64)
        array[:] = 17
        for what in (block, array[: mirror.granule // 8], block.range):
            mirror.space.prefetch(what, mirror.devices[1])
            assert mirror.holds(what, 1).all()
        assert int(array.sum()) == 17 * len(array)
        del array
        block.free()


@pytest.mark.parametrize("advice", ["read_mostly", "accessed_by", "preferred_location", None])
def test_advice_changes_where_pages_are_and_never_what_they_hold(mirror: Mirror, advice) -> None:
    held = mirror.commit(4, seed=12)
    mirror.space.advise(held, advice, None if advice in ("read_mostly", None) else mirror.devices[0])
    for party in (0, 1, HOST, 1):
        mirror.space.prefetch(held, mirror.party(party))
        if mirror.private and advice == "read_mostly":
            assert mirror.holds(held, HOST).all()  # copies, beside the host's own
            assert mirror.holds(held, party).all()
        assert mirror.differ(party, held.base, held.size, 12) == 0
    mirror.fill(1, held.base, held.size, 13)
    assert mirror.differ(0, held.base, held.size, 13) == 0
    assert mirror.differ(HOST, held.base, held.size, 13) == 0


@pytest.mark.parametrize("advice", ["preferred_location", "accessed_by", "readmostly"])
def test_advice_of_nobody_is_none(mirror: Mirror, advice) -> None:
    held = mirror.commit(1)
    with pytest.raises(ValueError, match=advice):
        mirror.space.advise(held, advice)


VERBS_OF_MEMORY = {
    "prefetch": lambda space, what: space.prefetch(what, "host"),
    "prefetch in the background": lambda space, what: space.prefetch(what, "host", wait=False),
    "advise": lambda space, what: space.advise(what, None),
    "where": lambda space, what: space.where(what),
    "discard": lambda space, what: space.discard(what),
    "pin_host": lambda space, what: space.pin_host(what).__enter__(),
}


@pytest.mark.parametrize("verb", VERBS_OF_MEMORY)
def test_what_is_dead_is_not_taken_for_who_has_its_addresses_now(mirror: Mirror, verb: str) -> None:
    held = mirror.commit(4)
    held.release()
    again = mirror.commit(4, seed=9, at=held.base)
    with uvas.Arena(mirror.space, name="blocks", growth=64 * mirror.granule) as arena:
        block = arena.alloc(4 * mirror.granule, align=mirror.granule)
        block.free()
        for dead in (held, block):
            with pytest.raises(uvas.ReleasedError):
                VERBS_OF_MEMORY[verb](mirror.space, dead)
    assert mirror.differ(HOST, again.base, again.size, 9) == 0
    for stranger in (None, again.base, [again], (again.base, again.size)):
        with pytest.raises(TypeError):
            VERBS_OF_MEMORY[verb](mirror.space, stranger)


@pytest.mark.parametrize("holder", [HOST, 0, 1])
def test_discarded_memory_is_zeros_and_is_not_copied_back(mirror: Mirror, holder: int) -> None:
    held = mirror.commit(8, seed=1)
    if holder != HOST:
        mirror.migrate(held, holder)
        mirror.fill(holder, held.base, held.size, 2)
    before = mirror.space.movement().host.bytes_in
    mirror.space.discard(uvas.Range(held.base, 4 * mirror.granule))
    assert not held.numpy(np.uint8, 4 * mirror.granule).any()
    assert mirror.read(0, held.base, 4 * mirror.granule) == bytes(4 * mirror.granule)
    assert mirror.space.movement().host.bytes_in == before
    rest = held.base + 4 * mirror.granule
    assert mirror.differ(1, rest, 4 * mirror.granule, (1 if holder == HOST else 2) + 4 * mirror.granule // 8) == 0


def test_nothing_is_armed_before_a_device_shows_up(private) -> None:
    mirror = private(1)
    held = mirror.commit(4, seed=1)
    assert mirror.faults() == 0
    assert mirror.differ(HOST, held.base, held.size, 1) == 0
    assert mirror.faults() == 0


# ---- memory that goes while somebody waits ---------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["decommit", "release", "discard"])
def test_memory_that_goes_while_a_device_waits_for_it(mirror: Mirror, pinned_host, verb: str) -> None:
    """The page is pinned on the host, so that the device's fault has to wait; then it is gone."""
    held = mirror.commit(4, seed=1)
    expected = words(1, held.size)
    pinned_host(held.base, mirror.granule)
    reading = in_thread(mirror.read, 0, held.base, mirror.granule)
    if mirror.private:
        with pytest.raises(TimeoutError):
            reading.result(0.1)
    if verb == "discard":
        mirror.space.discard(held)
        assert reading.result(PATIENCE_S) in (expected[: mirror.granule], bytes(mirror.granule))
        return
    if verb == "decommit":
        held.decommit()
    else:
        held.release()
    try:
        assert reading.result(PATIENCE_S) == expected[: mirror.granule]
        assert not mirror.private
    except uvas.DeviceError:
        pass  # nothing is there any more


def test_an_arena_trims_while_devices_work_in_its_blocks(mirror: Mirror) -> None:
    with uvas.Arena(mirror.space, name="trimmed", growth=1 << 24) as arena:
        kept = arena.alloc(4 * PAGE)
        array = kept.numpy(np.uint64)
        array[:] = 0
        adding = [mirror.submit(i, "add", kept.base + 8 * i, 20_000, result="uint64") for i in (0, 1)]
        until(lambda: read_word(kept.base) > 0 and read_word(kept.base + 8) > 0, "the devices begin")
        while not all(one.done() for one in adding):
            blocks = [arena.alloc(size) for size in (64, PAGE, 3 * PAGE, 40 * PAGE, 3 << 20)]
            for block in blocks:
                write_word(block.base, 1)
                block.free()
            arena.trim()
        assert [one.result(PATIENCE_S) for one in adding] == [19_999] * 2
        assert array[:2].tolist() == [20_000] * 2
        assert not array[2:].any()
        del array
        kept.free()
        arena.check()


def test_ranges_come_and_go_beside_devices_at_work(mirror: Mirror) -> None:
    counter = mirror.commit(1, seed=None)
    adding = [mirror.submit(i, "add", counter.base, 50_000, result="uint64") for i in (0, 1)]
    rounds = 0
    while not all(one.done() for one in adding) or rounds < 5:
        held = mirror.commit(4, seed=rounds)
        mirror.migrate(held, HOST)
        held.decommit(0, 2 * mirror.granule)
        assert mirror.differ(HOST, held.base + held.size // 2, held.size // 2, rounds + held.size // 16) == 0
        held.release()
        rounds += 1
    for one in adding:
        one.result(PATIENCE_S)
    assert read_word(counter.base) == 100_000
