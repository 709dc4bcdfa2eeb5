"""What finalizers left, in other threads' hands: whoever closes something waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import mirror
import pytest
from machine import in_child

import uvas
from uvas import leases

SOON_S = 0.2

Elsewhere = Callable[["Slow"], AbstractContextManager[None]]


class Slow:
    """An errand that lets go of something after a while."""

    def __init__(self, what: object) -> None:
        self.what = [what]
        self.begun = threading.Event()

    def __call__(self, _number: int) -> int:
        self.begun.set()
        time.sleep(SOON_S)
        self.what.clear()
        return 0


@contextmanager
def by_the_reaper(errand: Slow) -> Iterator[None]:
    leases.start_reaper()
    leases.enqueue((errand, 0, None))
    assert errand.begun.wait(mirror.PATIENCE_S)
    yield


@contextmanager
def by_a_verb(errand: Slow) -> Iterator[None]:
    """By a thread that has called something of uvas."""
    assert leases._process.reaper is None  # it would be faster
    leases.enqueue((errand, 0, None))
    thread = threading.Thread(target=leases.work_off)
    thread.start()
    assert errand.begun.wait(mirror.PATIENCE_S)
    yield
    thread.join()


def an_arena_is_closed(elsewhere: Elsewhere) -> None:
    with uvas.AddressSpace() as space:
        arena = uvas.Arena(space)
        with elsewhere(Slow(arena.alloc(100))):
            arena.close()
        assert arena.closed


def a_space_is_closed(elsewhere: Elsewhere) -> None:
    """The block is the last of an arena that was left by `with`: what closes the arena is an errand as well."""
    space = uvas.AddressSpace()
    with uvas.Arena(space) as arena:
        errand = Slow(arena.alloc(100))
    with elsewhere(errand):
        space.close()
    assert space.closed


def a_space_is_left(elsewhere: Elsewhere) -> None:
    with uvas.AddressSpace() as space:
        with uvas.Arena(space) as arena:
            errand = Slow(arena.alloc(100))
        leaving = elsewhere(errand)
        leaving.__enter__()
    assert space.closed
    leaving.__exit__(None, None, None)


def a_reservation_is_released(elsewhere: Elsewhere) -> None:
    with uvas.AddressSpace() as space:
        held = space.reserve(1 << 20)
        held.commit()
        with elsewhere(Slow(held.numpy("u1"))):
            held.release()


@pytest.mark.parametrize(
    ("elsewhere", "way"),
    [
        (by_the_reaper, an_arena_is_closed),
        (by_the_reaper, a_space_is_closed),
        (by_the_reaper, a_space_is_left),
        (by_the_reaper, a_reservation_is_released),
        (by_a_verb, an_arena_is_closed),
        (by_a_verb, a_reservation_is_released),
    ],
    ids=lambda one: one.__name__,
)
def test_what_is_in_another_threads_hands_is_not_in_use(elsewhere, way):
    in_child(lambda: way(elsewhere))  # which has no reaper yet


def test_whoever_waits_does_not_wait_for_ever(space):
    """The other one may be waiting for us."""
    begun, ours = threading.Event(), threading.Event()
    seen = []

    def theirs(_number: int) -> int:
        begun.set()
        seen.append(ours.wait(mirror.PATIENCE_S))
        return 0

    leases.start_reaper()
    with uvas.Arena(space) as arena:
        block = arena.alloc(100)
        leases.enqueue((theirs, 0, None))
        assert begun.wait(mirror.PATIENCE_S)
        with pytest.raises(BufferError, match="1 block"):
            arena.close()
        ours.set()
        block.free()
    mirror.until(lambda: seen, "the other one goes on")
    assert seen == [True]


def test_an_errand_that_fails_is_told_and_the_next_are_done(monkeypatch, space):
    told, done = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fails(_number: int) -> int:
        raise RuntimeError("no")

    def goes_well(_number: int) -> int:
        done.set()
        return 0

    leases.start_reaper()
    leases.enqueue((fails, 0, None))
    leases.enqueue((goes_well, 0, None))
    assert done.wait(mirror.PATIENCE_S)
    assert [(one.exc_type, one.thread.name) for one in told] == [(RuntimeError, "uvas-reaper")]


def test_from_many_threads_nothing_is_found_in_use_that_nobody_has(space):
    """Arenas are closed as soon as their blocks have gone, whoever gives these back."""
    leases.start_reaper()

    def work() -> None:
        for _ in range(200):
            arena = uvas.Arena(space)
            blocks = [arena.alloc(100) for _ in range(20)]
            for block in blocks:
                leases.enqueue((lambda _number, kept=[block]: kept.clear() or 0, 0, None))
            del block, blocks
            arena.close()

    for future in [mirror.in_thread(work) for _ in range(4)]:
        future.result()
