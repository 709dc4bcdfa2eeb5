"""Fork while pages are on devices: what a child has is what was there at that moment, and the parent loses nothing."""

from __future__ import annotations

import multiprocessing
import threading
import time

import numpy as np
import pytest
from machine import read_word, write_word
from mirror import HOST, PATIENCE_S, Child, Mirror, function, in_thread

import uvas


def differ_here(address: int, size: int, seed: int) -> int:
    """`Mirror.differ`, by whoever calls it, without a thread or a device: in a forked child."""
    return int(function("differ", "uint64")(address, size // 8, seed) or 0)


@pytest.mark.parametrize("holder", [HOST, 0, 1])
def test_a_child_has_the_bytes_of_the_moment_wherever_they_were(mirror: Mirror, holder: int) -> None:
    held = mirror.commit(8, seed=5)
    mirror.migrate(held, holder)
    mirror.fill(holder, held.base, held.size, 6)
    child = Child(lambda: differ_here(held.base, held.size, 6))
    if mirror.private:
        mirror.fill(0, held.base, held.size, 7)
    assert child.answer() == 0
    assert mirror.differ(HOST, held.base, held.size, 7 if mirror.private else 6) == 0


def test_what_a_child_writes_is_its_own(mirror: Mirror) -> None:
    held = mirror.commit(4, seed=5)
    mirror.migrate(held, 0)

    def work() -> int:
        function("fill", "none")(held.base, held.size // 8, 99)
        return differ_here(held.base, held.size, 99)

    assert Child(work).answer() == 0
    assert mirror.differ(0, held.base, held.size, 5 if mirror.private else 99) == 0


def test_copies_in_several_places_survive_a_fork(mirror: Mirror) -> None:
    held = mirror.commit(4, seed=5)
    assert mirror.differ(0, held.base, held.size, 5) == 0
    assert mirror.differ(1, held.base, held.size, 5) == 0
    child = Child(lambda: differ_here(held.base, held.size, 5))
    mirror.migrate(held, 1)
    assert mirror.differ(0, held.base, held.size, 5) == 0
    assert child.answer() == 0


def test_in_a_child_the_verbs_of_the_parents_space_are_dead(mirror: Mirror) -> None:
    held = mirror.commit(4, seed=5)
    mirror.migrate(held, 0)

    def work() -> list[str]:
        said = []
        for verb in (
            lambda: mirror.space.prefetch(held, "host"),
            lambda: mirror.space.where(held),
            lambda: mirror.space.where(held.range),
            lambda: mirror.space.discard(held),
            lambda: mirror.space.advise(held, "read_mostly", None),
            lambda: mirror.space.pin_host(held).__enter__(),
            lambda: mirror.devices[0].read(held.base, 8),
        ):
            try:
                verb()
                said.append("nothing")
            except Exception as error:
                said.append(type(error).__name__)
        return [*said, str(differ_here(held.base, held.size, 5))]

    assert Child(work).answer() == ["ReleasedError"] * 7 + ["0"]
    assert mirror.differ(0, held.base, held.size, 5) == 0


def test_a_child_makes_a_space_of_its_own_with_devices(mirror: Mirror) -> None:
    held = mirror.commit(4, seed=5)
    mirror.migrate(held, 0)

    def work() -> int:
        with Mirror(mirror.memory, 1) as own:
            other = own.commit(4, seed=8)
            own.migrate(other, 0)
            return own.differ(0, other.base, other.size, 8) + own.differ(HOST, other.base, other.size, 8)

    assert Child(work).answer() == 0
    assert mirror.differ(0, held.base, held.size, 5) == 0


def test_forks_while_devices_and_the_pager_work(mirror: Mirror) -> None:
    """A child never sees a word go backwards, and no addition is lost to either side."""
    held = mirror.commit(4, seed=None)
    stop = threading.Event()
    granules = [held.base + i * mirror.granule for i in range(4)]

    def hammer(party: int) -> int:
        rounds = 0
        while not stop.is_set():
            for address in granules:
                mirror.call(party, "add", address, 20, result="uint64")
            rounds += 1
        return 20 * rounds

    hammering = [in_thread(hammer, party) for party in (0, 1, HOST)]
    last = [0] * 4
    for _ in range(12):
        least = [read_word(address) for address in granules]
        child = Child(lambda: [read_word(address) for address in granules])
        seen = child.answer()
        most = [read_word(address) for address in granules]
        assert all(low <= there <= high for low, there, high in zip(least, seen, most, strict=True))
        assert all(before <= there for before, there in zip(last, seen, strict=True))
        last = least
        time.sleep(0.01)
    stop.set()
    done = sum(one.result(PATIENCE_S) for one in hammering)
    assert [read_word(address) for address in granules] == [done] * 4


def test_forks_by_many_threads_at_once(mirror: Mirror) -> None:
    held = mirror.commit(8, seed=3)

    def forks() -> None:
        for i in range(4):
            mirror.migrate(held, i % 2)
            assert Child(lambda: differ_here(held.base, held.size, 3)).answer() == 0

    forking = [in_thread(forks) for _ in range(3)]
    for one in forking:
        one.result(PATIENCE_S)
    assert mirror.differ(1, held.base, held.size, 3) == 0


def of_a_child(address: int, size: int, seed: int) -> int:
    """What a process of multiprocessing's makes of inherited memory: it looks, then it writes."""
    wrong = differ_here(address, size, seed)
    write_word(address, 1 << 60)
    return wrong


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_multiprocessing_by_fork(mirror: Mirror) -> None:
    held = mirror.commit(8, seed=3)
    array = held.numpy(np.uint64)
    mirror.migrate(held, 0)
    for copies in (0, 0 if mirror.private else 1):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            asked = pool.apply_async(of_a_child, (held.base + 8, held.size - 8, 4))
            assert asked.get(PATIENCE_S) == copies  # of what the child before wrote
    assert array[0] == 3
    assert int(array[1]) == (4 if mirror.private else 1 << 60)
    assert mirror.differ(0, held.base + 16, held.size - 16, 5) == 0
    del array


def test_arrays_of_an_arena_in_a_child(mirror: Mirror) -> None:
    with uvas.Arena(mirror.space, name="inherited", growth=1 << 24) as arena:
        with uvas.numpy_allocator(arena):
            one = np.arange(50_000, dtype=np.uint64)
            two = np.ones(1000)
        address, size = one.ctypes.data, one.nbytes
        assert mirror.differ(0, address, size, 0) == 0
        mirror.fill(1, address, size, 10)

        def work() -> tuple[int, float]:
            nonlocal two
            answer = differ_here(address, size, 10), float((two * 2).sum())
            two = np.zeros(3)  # the inherited one is freed here
            return answer

        assert Child(work).answer() == (0, 2000.0)
        assert int(one[0]) == 10
        assert two.sum() == 1000
        del one, two, work
