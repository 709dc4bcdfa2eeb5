"""Devices that are killed while pages are theirs, or on their way: nothing is lost, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
from machine import read_word
from mirror import HOST, PATIENCE_S, Mirror, in_thread, until

import uvas

ROUNDS = 6


def kill(mirror: Mirror, device: int) -> None:
    """End a worker, and wait until it is known to have ended."""
    os.kill(mirror.devices[device].pid, signal.SIGKILL)
    until(lambda: lost(mirror, device), "the death is noticed")


def lost(mirror: Mirror, device: int) -> bool:
    """Whether a device answers no more."""
    try:
        mirror.devices[device].run(os.getpid)
    except uvas.DeviceLostError:
        return True
    return False


@pytest.mark.parametrize("state", ["written there", "read there", "read by both", "moved there"])
def test_what_a_dead_device_held_is_on_the_host(fresh, state: str) -> None:
    mirror = fresh(2)
    held = mirror.commit(8, seed=1)
    seed = 2 if "written" in state or state == "read by both" else 1
    if state == "moved there":
        mirror.migrate(held, 0)
    if seed == 2:
        mirror.fill(0, held.base, held.size, 2)
    if state == "read there":
        assert mirror.differ(0, held.base, held.size, 1) == 0
    if state == "read by both":  # the host has no copy: the last ones die, one after the other
        assert mirror.differ(1, held.base, held.size, 2) == 0
        kill(mirror, 1)
    kill(mirror, 0)
    until(lambda: mirror.all_at(held, HOST) or not mirror.private, "what it held comes home, unasked")
    assert mirror.differ(HOST, held.base, held.size, seed) == 0
    with pytest.raises(uvas.DeviceLostError):
        mirror.read(0, held.base, 8)
    if mirror.private:
        with pytest.raises(uvas.DeviceLostError):
            mirror.space.prefetch(held, mirror.devices[0])
    mirror.fill(HOST, held.base, held.size, 3)
    assert not mirror.holds(held, 0).any() or not mirror.private
    assert (mirror.snapshot(held) & int(uvas.PageFlag.LOST) == 0).all()


def test_others_go_on_and_a_new_device_takes_its_place(fresh) -> None:
    mirror = fresh(2)
    held = mirror.commit(8, seed=1)
    mirror.fill(0, held.base, held.size, 2)
    kill(mirror, 0)
    assert mirror.differ(1, held.base, held.size, 2) == 0
    mirror.space.detach(mirror.devices[0])
    with uvas.ProcessDevice(name="after", memory=mirror.memory) as after:
        mirror.space.attach(after)
        mirror.space.prefetch(held, after)
        assert after.read(held.base, 8) == (2).to_bytes(8, "little")
        mirror.space.detach(after)
    assert mirror.differ(HOST, held.base, held.size, 2) == 0


def test_killed_at_random_moments_of_migrations(private) -> None:
    """Shared memory does not migrate."""
    chance = random.Random(3)
    for _ in range(ROUNDS):
        mirror = private(2)
        held = mirror.commit(16, seed=1)

        def moves(mirror: Mirror = mirror, held: uvas.Reservation = held) -> None:
            with contextlib.suppress(uvas.DeviceLostError):
                for i in range(100_000):
                    mirror.space.prefetch(held, mirror.party((0, HOST, 0, 1)[i % 4]))

        moving = in_thread(moves)
        time.sleep(chance.random() * 0.03)
        os.kill(mirror.devices[0].pid, signal.SIGKILL)
        moving.result(PATIENCE_S)
        assert mirror.differ(1, held.base, held.size, 1) == 0
        assert mirror.differ(HOST, held.base, held.size, 1) == 0
        mirror.__exit__()


def test_killed_while_it_writes(fresh) -> None:
    """Additions that were seen by anybody are not undone by the death of who made them."""
    chance = random.Random(4)
    for _ in range(ROUNDS):
        mirror = fresh(2)
        held = mirror.commit(2, seed=None)
        mirror.submit(0, "add", held.base, 1 << 40, result="uint64")
        other = mirror.submit(1, "add", held.base + mirror.granule, 20_000, result="uint64")
        until(lambda held=held: read_word(held.base) > 0, "it writes")
        time.sleep(chance.random() * 0.02)
        seen = read_word(held.base)
        os.kill(mirror.devices[0].pid, signal.SIGKILL)
        until(lambda mirror=mirror: lost(mirror, 0), "the death is noticed")
        after = read_word(held.base)
        assert after >= seen
        assert read_word(held.base) == after  # nobody adds any more
        assert other.result(PATIENCE_S) == 19_999
        assert read_word(held.base + mirror.granule) == 20_000


def test_who_waits_for_a_page_of_a_device_that_dies_gets_it(fresh) -> None:
    mirror = fresh(3)
    held = mirror.commit(8, seed=1)
    hammering = mirror.submit(0, "add", held.base, 1 << 40, result="uint64")
    others = [mirror.submit(party, "add", held.base, 3_000, result="uint64") for party in (HOST, 1, 2)]
    until(lambda: read_word(held.base) > 1000, "they work")
    os.kill(mirror.devices[0].pid, signal.SIGKILL)
    for one in others:
        one.result(PATIENCE_S)
    with pytest.raises(uvas.DeviceLostError):
        hammering.result(PATIENCE_S)
    assert read_word(held.base) >= 1 + 3 * 3_000
    assert mirror.differ(1, held.base + mirror.granule, 7 * mirror.granule, 1 + mirror.granule // 8) == 0


def test_a_device_that_stands_still_is_not_dead_and_keeps_nobody_waiting(fresh) -> None:
    """No code of a worker's need run for its pages to be taken."""
    mirror = fresh(2)
    held = mirror.commit(8, seed=1)
    mirror.fill(0, held.base, held.size, 2)
    os.kill(mirror.devices[0].pid, signal.SIGSTOP)
    try:
        assert mirror.differ(1, held.base, held.size // 2, 2) == 0
        mirror.space.prefetch(held, "host")
        assert mirror.differ(HOST, held.base, held.size, 2) == 0
        mirror.fill(1, held.base, held.size, 3)
    finally:
        os.kill(mirror.devices[0].pid, signal.SIGCONT)
    assert mirror.differ(0, held.base, held.size, 3) == 0


def test_many_devices_die_at_once(fresh) -> None:
    mirror = fresh(5)
    held = mirror.commit(20, seed=0)
    part = held.size // 5
    for i in range(5):
        mirror.fill(i, held.base + i * part, part, 100 * i)
    for i in range(4):
        os.kill(mirror.devices[i].pid, signal.SIGKILL)
    for i in range(5):
        assert mirror.differ(HOST, held.base + i * part, part, 100 * i) == 0
        assert mirror.differ(4, held.base + i * part, part, 100 * i) == 0
