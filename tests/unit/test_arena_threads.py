"""An arena under threads, and under what comes between: interrupts, and a driver that is gone."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest

import uvas


def test_threads_free_each_others_blocks(arena: uvas.Arena) -> None:
    mailboxes: list[list[uvas.Allocation]] = [[] for _ in range(4)]
    wrong: list[str] = []

    def work(mine: int) -> None:
        chance = random.Random(mine)
        for step in range(2000):
            block = arena.alloc(chance.choice([16, 100, 1000, 5000, 100_000]))
            word = block.numpy("u8", 1)
            word[0] = block.base ^ mine
            del word
            mailboxes[chance.randrange(4)].append(block)
            if step % 3:
                try:
                    other = mailboxes[mine].pop()
                except IndexError:
                    continue
                if other.numpy("u8", 1)[0] ^ other.base not in range(4):
                    wrong.append(repr(other))
                other.free()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert arena.stats().total_blocks == 8000
    mailboxes.clear()


def test_of_many_threads_one_frees(arena: uvas.Arena) -> None:
    for _ in range(200):
        block = arena.alloc(64)
        outcomes: list[str] = []
        door = threading.Barrier(4)

        def free(block: uvas.Allocation = block, door: threading.Barrier = door, told: list[str] = outcomes) -> None:
            door.wait()
            try:
                block.free()
                told.append("freed")
            except uvas.ReleasedError:
                told.append("refused")

        threads = [threading.Thread(target=free) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["freed", "refused", "refused", "refused"]


def test_a_thread_that_ends_leaves_its_blocks(arena: uvas.Arena) -> None:
    blocks: list[uvas.Allocation] = []
    thread = threading.Thread(target=lambda: blocks.extend(arena.alloc(100) for _ in range(100)))
    thread.start()
    thread.join()
    for block in blocks:
        block.numpy("u1")[:] = 1
    blocks.clear()


def test_interrupts_lose_nothing() -> None:
    program = """
import _thread, signal, threading, time
import uvas

at_work, interrupts = False, 0

def handle(number, frame):  # one at a time, and only where it is caught
    global at_work, interrupts
    if at_work:
        at_work = False
        interrupts += 1
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, handle)
with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
    stop, kept = threading.Event(), []

    def interrupt():
        while not stop.wait(0.001):
            _thread.interrupt_main()

    thread = threading.Thread(target=interrupt, daemon=True)
    end = time.monotonic() + 1
    thread.start()
    while True:
        try:
            at_work = True
            while time.monotonic() < end:
                kept.append(arena.alloc(100))
                kept.extend(arena.alloc_many([1 << 17, 50]))
                kept[0].numpy("u1")[0] = 1
                kept.clear()
            stop.set()
            thread.join()
            time.sleep(0.05)
            break
        except KeyboardInterrupt:
            pass
    at_work = False
    kept.clear()
    arena.check()
    print(interrupts > 50, arena.stats().live_blocks)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True 0\n", done.stdout + done.stderr


def test_a_stream_that_cannot_be_asked_for_costs_no_block(arena: uvas.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def note(self: uvas.Arena, block: object) -> None:
        told.append(id(block))
        if len(told) == 3:
            raise InterruptedError("the driver is gone")

    monkeypatch.setattr(uvas.Arena, "_note", note)
    arena._core.order(True)
    kept = arena.alloc(100)
    with pytest.raises(InterruptedError):
        arena.alloc_many([100, 200, 300])
    told[:] = [0, 0]
    with pytest.raises(InterruptedError):
        arena.alloc(100)
    arena._core.order(False)
    assert arena.stats().live_blocks == 1
    kept.free()
