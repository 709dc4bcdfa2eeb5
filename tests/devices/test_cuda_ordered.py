"""Blocks that go back in the order of the streams that their user names; over the strict fake of the driver."""

from __future__ import annotations

import gc
import threading

import cupy_in_tests
import pytest
from cupy_in_tests import Stream, live
from fake_cuda import HMM_CARD, CardDied, FakeCard, fake_driver

import uvas
from uvas import ordered

fake, device, space = cupy_in_tests.fake, cupy_in_tests.device, cupy_in_tests.space
arena, stream = cupy_in_tests.arena, cupy_in_tests.stream


# ---- freed after a stream, or used on one ----------------------------------------------------------------------------


def test_a_block_freed_after_a_stream_goes_back_when_that_has_come_so_far(fake, arena, stream):
    block = arena.alloc(1000)
    stream.work()
    block.free(after=stream)
    assert block.freed
    assert live(arena) == 1
    with pytest.raises(uvas.ReleasedError):
        block.free()
    with pytest.raises(uvas.ReleasedError):
        block.free(after=stream)
    ordered.collect()
    assert live(arena) == 1
    assert ordered.pending(arena._core.id) == 1
    fake.busy.clear()
    arena.alloc(10).free(after=stream)  # the next looks
    assert live(arena) == 0
    assert fake.events == set()


def test_freeing_in_order_under_an_array_is_refused(arena, stream):
    block = arena.alloc(1000)
    array = block.numpy("u1")
    with pytest.raises(BufferError, match="live array"):
        block.free(after=stream)
    del array
    block.free(after=stream)
    arena.trim()
    assert live(arena) == 0


def test_free_takes_nothing_else(arena, stream):
    with arena.alloc(100) as block:
        for wrong in (lambda: block.free(stream), lambda: block.free(before=stream)):
            with pytest.raises(TypeError, match="after=stream"):
                wrong()
        with pytest.raises(TypeError, match="no CUDA stream"):
            block.free(after="soon")
        assert not block.freed
    arena.alloc(100).free(after=None)
    assert live(arena) == 0


@pytest.mark.parametrize("end", ["free", "with", "drop", "free after another"])
def test_a_block_used_on_a_stream_waits_for_it_however_it_is_freed(fake, arena, stream, end):
    other = Stream(fake, 8)
    block = arena.alloc(1000)
    block.used_on(stream)
    stream.work()  # after used_on, before the free
    if end == "free":
        block.free()
    elif end == "with":
        with block:
            pass
    elif end == "free after another":
        other.work()
        block.free(after=other)
    if end != "drop":
        with pytest.raises(uvas.ReleasedError):
            block.used_on(stream)
    del block
    gc.collect()
    ordered.collect()
    assert live(arena) == 1
    fake.busy.discard(stream.ptr)
    ordered.collect()
    assert live(arena) == (end == "free after another")
    fake.busy.clear()
    ordered.collect()
    assert live(arena) == 0
    assert fake.events == set()


def test_an_arena_is_closed_while_another_thread_looks_at_what_is_pending(fake, space, stream, monkeypatch):
    arena = uvas.Arena(space)
    block = arena.alloc(1000)
    stream.work()
    block.free(after=stream)
    fake.busy.clear()
    looking, closing = threading.Event(), threading.Event()

    def slowly(*arguments, **named):
        if threading.current_thread() is other:
            looking.set()
            closing.wait(0.2)
        passing(*arguments, **named)

    passing = ordered._pass
    monkeypatch.setattr(ordered, "_pass", slowly)
    other = threading.Thread(target=ordered.collect)
    other.start()
    looking.wait()
    arena.close()
    closing.set()
    other.join()
    assert arena.closed


def test_an_arena_is_closed_while_another_thread_frees_its_last_block(fake, space, stream, monkeypatch):
    """That is retired, and not yet pending."""
    arena = uvas.Arena(space)
    block = arena.alloc(1000)
    stream.work()
    freeing, closing = threading.Event(), threading.Event()

    def slowly(*arguments):
        freeing.set()
        closing.wait(0.2)
        fake.busy.clear()
        return looking(*arguments)

    looking = ordered._look_first
    monkeypatch.setattr(ordered, "_look_first", slowly)
    other = threading.Thread(target=lambda: block.free(after=stream))
    other.start()
    freeing.wait()
    arena.close()
    closing.set()
    other.join()
    assert arena.closed


def test_an_interrupt_while_streams_are_waited_for_loses_no_block(fake, arena, stream, monkeypatch):
    blocks = [arena.alloc(1000) for _ in range(3)]
    stream.work()
    for block in blocks:
        block.free(after=stream)
    assert ordered.pending(arena._core.id) == 3
    calls = iter([False, True])

    def interrupted(*arguments, **named):
        if next(calls):
            raise KeyboardInterrupt
        passing(*arguments, **named)

    passing = ordered._pass
    with monkeypatch.context() as one:
        one.setattr(ordered, "_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ordered.collect()
    assert (ordered.pending(arena._core.id), live(arena)) == (3, 3)
    fake.busy.clear()
    ordered.collect()
    assert (ordered.pending(arena._core.id), live(arena)) == (0, 0)


def test_a_block_that_took_the_place_of_a_used_one_is_its_own(fake, arena, stream):
    first = arena.alloc(1 << 20)
    base = first.base
    first.used_on(stream)
    first.free()
    ordered.collect()
    second = arena.alloc(1 << 20)
    assert second.base == base  # or this test says nothing
    stream.work()
    second.free()
    assert live(arena) == 0
    fake.busy.clear()


def test_nothing_is_ordered_during_a_capture(fake, arena, stream):
    stream.work()
    arena.alloc(1000).free(after=stream)  # before
    block = arena.alloc(1000)
    fake.capturing = True
    ordered.collect()
    assert (live(arena), fake.spoiled) == (2, [])
    fake.busy.clear()
    ordered.collect()
    assert live(arena) == 1
    with pytest.raises(uvas.NotSupportedError, match="being captured"):
        block.free(after=stream)
    assert not block.freed
    dropped = arena.alloc(1000)
    dropped.used_on(stream)
    del dropped
    gc.collect()
    ordered.collect()
    assert live(arena) == 2
    fake.capturing = False
    ordered.collect()
    assert live(arena) == 1
    block.free()


# ---- the end of a card and of an arena -------------------------------------------------------------------------------


def test_blocks_that_a_lost_card_used_are_given_back(fake, space, stream):
    arena = uvas.Arena(space)
    freed, left, marked = (arena.alloc(1000) for _ in range(3))
    for block in (freed, left):
        block.used_on(stream)
    stream.work()
    marked.free(after=stream)
    with pytest.raises(CardDied):
        fake.read(0, 0x1000, 8)
    freed.free()
    del left, block
    gc.collect()
    arena.alloc(1000).free(after=stream)
    assert space.devices[0].lost
    for _ in range(2):  # who was left by a finalizer is noted first
        ordered.collect()
    assert arena.stats().live_blocks == 0
    fake.cards[0].sticky = None  # so that this process can go on
    arena.close()
    fake.registered.clear()  # pinned to the end of the process


def test_closing_an_arena_waits_for_streams(fake, space, stream):
    with uvas.Arena(space) as arena:
        block = arena.alloc(1000)
        stream.work()
        block.free(after=stream)
        del block
    assert arena.closed
    assert fake.events == set()


def test_an_arena_left_with_a_used_block_closes_when_it_has_gone(fake, space, stream):
    with uvas.Arena(space) as arena:
        block = arena.alloc(1000)
        block.used_on(stream)
    stream.work()
    del block
    gc.collect()
    ordered.collect()
    reserved = space.stats().reservations
    fake.busy.clear()
    ordered.collect()
    for _ in range(100):
        if space.stats().reservations < reserved:
            break
        threading.Event().wait(0.01)  # the reaper is at it
    assert space.stats().reservations == 0


# ---- what is a stream ------------------------------------------------------------------------------------------------


def test_streams_by_number_and_by_protocol(fake, arena):
    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 9

    fake.busy.add(9)
    arena.alloc(10).free(after=Protocol())
    arena.alloc(10).free(after=9)
    assert live(arena) == 2
    fake.busy.clear()
    ordered.collect()
    assert live(arena) == 0


@pytest.mark.parametrize("stream", [0, 9], ids=["the default one", "of card 1"])
def test_a_mark_is_put_where_the_stream_is(monkeypatch, stream):
    with fake_driver(monkeypatch, *(FakeCard(dict(HMM_CARD)) for _ in range(2))) as fake:
        with (
            uvas.CudaDevice(0) as first,
            uvas.CudaDevice(1) as second,
            uvas.AddressSpace([first, second]) as space,
            uvas.Arena(space) as arena,
        ):
            fake.home[9] = 1
            fake.busy.update((0, 9))
            with second.card.current():
                block = arena.alloc(10)
                block.free(after=stream)
            assert [fake.home[event] for event in fake.events] == [1, 1]  # one for the stream of the allocation
            block = arena.alloc(10)
            block.free(after=0)  # no card is current
            assert {fake.home[one] for one in fake.events} <= {0, 1}
            fake.busy.clear()
            ordered.collect()
            assert live(arena) == 0
            fake.home[9] = 7  # of a card that is not in the space
            block = arena.alloc(10)
            with pytest.raises(uvas.DeviceError, match="INVALID_HANDLE"):
                block.free(after=9)
            block.free()
        assert fake.leaks() == []


def test_an_order_needs_a_card():
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena, arena.alloc(100) as block:
        with pytest.raises(uvas.NotSupportedError, match="no CUDA device sees"):
            block.free(after=7)
        with pytest.raises(uvas.NotSupportedError, match="no CUDA device sees"):
            block.used_on(7)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_every_call_of_an_ordered_free_fails_in_turn(fake, arena, stream):
    for k in range(1, 50):
        block = arena.alloc(1000)
        fake.busy.update((0, stream.ptr))
        fake.fail(k)
        try:
            block.free(after=stream)
        except uvas.DeviceError:
            fake.fail(0)
            fake.busy.clear()
            assert not block.freed
            block.free()
            assert live(arena) == 0, f"call {k}"
            assert fake.events == set(), f"call {k}"
            continue
        made = fake.made
        fake.fail(0)
        fake.busy.clear()
        ordered.collect()
        assert live(arena) == 0
        if made < k:
            break
    assert 4 < k < 50
    fake.contexts.clear()  # those that it was made to refuse to take from the stack
