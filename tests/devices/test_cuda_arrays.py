"""CuPy and NumPy over the same bytes, and blocks in the order of streams; over the strict fake of the driver.

CuPy runs here without a driver: its arrays are made and told apart, its allocator in C is called as CuPy calls it.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machine import MIB, PAGE

import uvas
from uvas import ordered
from uvas._core import ffi, lib
from uvas.interop.cupy_allocator import CupyAllocator

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")
cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'uvas[cuda]'")

from fake_cuda import GRANULARITY, HMM_CARD, REGISTER_CARD, VMM_CARD, CardDied, FakeCard, FakeDriver, fake_driver  # noqa: E402

UNIT = GRANULARITY


class Stream:
    """A stream of CuPy's, as far as uvas asks it."""

    def __init__(self, fake: FakeDriver, number: int) -> None:
        self.fake, self.ptr, self.waited = fake, number, 0
        self.device_id = 0

    def work(self) -> None:
        """Run something, until somebody waits."""
        self.fake.busy.add(self.ptr)

    def synchronize(self) -> None:
        self.waited += 1
        self.fake.busy.discard(self.ptr)


@pytest.fixture(params=[HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def fake(request, monkeypatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch, FakeCard(dict(request.param))) as one:
        yield one
        gc.collect()
        assert one.leaks() == []


@pytest.fixture
def device(fake) -> Iterator[uvas.CudaDevice]:
    with uvas.CudaDevice() as one:
        yield one


@pytest.fixture
def space(device) -> Iterator[uvas.AddressSpace]:
    with uvas.AddressSpace([device]) as one:
        yield one
        gc.collect()
        one.check()


@pytest.fixture
def arena(space) -> Iterator[uvas.Arena]:
    with uvas.Arena(space, name="unified") as one:
        yield one
        gc.collect()
        one.check()


@pytest.fixture
def current(fake, monkeypatch) -> Stream:
    """The stream that CuPy says is current."""
    stream = Stream(fake, 77)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream)
    return stream


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_a_numpy_array_as_cupy_has_it_and_back(fake, arena, current):
    array = arena.alloc(1000).numpy("f4", (10, 20))[1::2, ::-1]
    array[:] = np.arange(100).reshape(5, 20)
    seen = uvas.ascupy(array)
    assert isinstance(seen, cupy.ndarray)
    assert seen.data.ptr == array.ctypes.data
    assert (seen.shape, seen.strides, seen.dtype) == (array.shape, array.strides, array.dtype)
    first = np.float32(array[0, 0]).tobytes()
    assert fake.read(0, seen.data.ptr, 4) == first
    back = uvas.asnumpy(seen)
    assert current.waited == 1
    assert back.ctypes.data == array.ctypes.data
    assert (back == array).all()
    back[:] = 3
    assert (array == 3).all()


def test_the_memory_lives_as_long_as_either(arena, current):
    block = arena.alloc(800)
    seen = uvas.ascupy(block.numpy("f8"))
    gc.collect()
    with pytest.raises(BufferError):
        block.free()
    back = uvas.asnumpy(seen[3:5])
    del seen
    gc.collect()
    with pytest.raises(BufferError):
        block.free()
    back[:] = 1
    del back
    block.free()


def test_reservations_hold_a_lease_for_cupy(space, current):
    held = space.reserve(UNIT, name="held")
    held.commit()
    seen = held.cupy("i4", (4, 4), offset=64)
    assert seen.data.ptr == held.base + 64
    with pytest.raises(BufferError, match="CuPy array of int32"):
        held.release()
    assert (uvas.asnumpy(seen) == 0).all()
    del seen
    held.release()


def test_what_only_a_copy_could_do_is_refused(space, arena, current):
    with pytest.raises(ValueError, match="no unified memory"):
        uvas.ascupy(np.zeros(3))
    readonly = arena.alloc(100).numpy("u1")
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        uvas.ascupy(readonly)
    with pytest.raises(TypeError, match="for NumPy arrays"):
        uvas.ascupy([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="CuPy array is wanted"):
        uvas.asnumpy(np.zeros(3))
    foreign = np.zeros(4)
    memory = cupy.cuda.UnownedMemory(foreign.ctypes.data, foreign.nbytes, foreign, 0)
    with pytest.raises(ValueError, match="no unified memory"):
        uvas.asnumpy(cupy.ndarray((4,), "f8", cupy.cuda.MemoryPointer(memory, 0)))
    with uvas.AddressSpace() as apart, uvas.Arena(apart) as other:
        block = other.alloc(80)
        with pytest.raises(ValueError, match="no CUDA device shares"):
            uvas.ascupy(block.numpy("f8"))
        with pytest.raises(ValueError, match="no CUDA device shares"):
            block.cupy("f8")
        del block
        gc.collect()


def test_arrays_that_numpy_made_in_an_arena(arena, current):
    with uvas.numpy_allocator(arena):
        made = np.ones(1000)
    seen = uvas.ascupy(made)
    assert seen.data.ptr == made.ctypes.data
    del made
    gc.collect()
    assert (uvas.asnumpy(seen) == 1).all()


def test_empty_arrays_have_an_address_too(arena, current):
    array = arena.alloc(64).numpy("f8", (0, 3))
    seen = uvas.ascupy(array)
    assert seen.shape == (0, 3)
    assert uvas.asnumpy(seen).shape == (0, 3)


def test_without_cupy_it_says_what_to_install(arena, monkeypatch):
    array = arena.alloc(64).numpy("f8")
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(uvas.NotSupportedError, match=r"pip install 'uvas\[cuda\]'"):
        uvas.ascupy(array)


def test_host_access_waits_for_the_stream(arena, current, fake):
    array = arena.alloc(64).numpy("f8")
    seen = uvas.ascupy(array)
    mine = Stream(fake, 5)
    with uvas.host_access(seen, stream=mine) as host:
        assert mine.waited == 1
        host[:] = 4
    with uvas.host_access(array) as host:
        assert current.waited == 1
        assert host is array
    with uvas.host_access(seen) as host:
        assert current.waited == 2
        assert (host == 4).all()


def test_memory_on_a_card_is_cupys_and_not_numpys(fake, device, space, current):
    if device.strategy != "vmm":
        pytest.skip("only a driver that maps memory puts it on a card")
    with space.reserve(2 * UNIT) as held:
        held.commit(0, UNIT, location=device)
        seen = held.cupy("u1", 16)
        fake.write(0, seen.data.ptr, b"on the card")
        with pytest.raises(ValueError, match="lies on a device"):
            uvas.asnumpy(seen)
        with pytest.raises(BufferError):
            held.decommit(0, UNIT)
        del seen
        with pytest.raises(ValueError, match="not committed"):
            held.cupy("u1", 16, offset=UNIT)
        held.protect(0, UNIT, "r")
        with pytest.raises(ValueError, match="read-only"):
            held.cupy("u1", 16)


def test_bare_blocks_over_memory_on_a_card(device, space):
    if device.strategy != "vmm":
        pytest.skip("only a driver that maps memory puts it on a card")
    with space.reserve(2 * UNIT) as held, uvas.Arena(held, backing="none") as arena:
        block = arena.alloc(1000)
        with pytest.raises(ValueError, match="not committed"):
            block.cupy("f4", 10)
        held.commit(location=device)
        seen = block.cupy("f4", 10)
        assert seen.data.ptr == block.base
        with pytest.raises(ValueError, match="bare addresses"):
            block.numpy("f4", 10)
        with pytest.raises(BufferError):
            block.free()
        with pytest.raises(BufferError):
            held.decommit()
        del seen
        block.free()
        held.decommit()


# ---- DLPack ----------------------------------------------------------------------------------------------------------


def told(capsule: object) -> tuple[int, int, int]:
    """Address, device type and number, as a consumer reads them."""
    take = ctypes.pythonapi.PyCapsule_GetPointer
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    at = take(capsule, b"dltensor")
    return (
        ctypes.c_uint64.from_address(at).value,
        ctypes.c_int32.from_address(at + 8).value,
        ctypes.c_int32.from_address(at + 12).value,
    )


def test_dlpack_tells_what_the_memory_is(device, arena):
    array = arena.alloc(80).numpy("f8")
    array[:] = 2
    kind = 13 if device.strategy == "hmm" else 3
    plain, cuda = uvas.dlpack(array), uvas.dlpack(array, "cuda")
    assert plain.__dlpack_device__() == (1, 0)
    assert cuda.__dlpack_device__() == (kind, 0)
    assert told(plain.__dlpack__()) == (array.ctypes.data, 1, 0)
    assert told(cuda.__dlpack__()) == (array.ctypes.data, kind, 0)
    for one in (plain, cuda):
        taken = np.from_dlpack(one)
        assert taken.ctypes.data == array.ctypes.data
        assert (taken == 2).all()
    with pytest.raises(BufferError, match="not copied"):
        cuda.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        cuda.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="neither 'cpu' nor 'cuda'"):
        uvas.dlpack(array, "tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no CUDA device shares"):
        uvas.dlpack(np.zeros(2), "cuda")


# ---- blocks in the order of streams ----------------------------------------------------------------------------------


@pytest.fixture
def stream(fake) -> Stream:
    return Stream(fake, 7)


def live(arena: uvas.Arena) -> int:
    return arena.stats().live_blocks


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
                wrong()  # type: ignore[call-arg]
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


END = ["free", "with", "drop", "an array over it"]


def end(block: uvas.arena.Allocation, how: str) -> None:
    """Let a block go, which nobody else has."""
    if how == "free":
        block.free()
    elif how == "with":
        with block:
            pass
    elif how == "an array over it":
        block.numpy("u1")[:10] = 1


@pytest.mark.parametrize("how", END)
@pytest.mark.parametrize("number", [0, 77], ids=["the default one", "CuPy's"])
def test_a_block_goes_back_after_the_stream_that_was_current_at_its_allocation(
    fake, arena, stream, number, how, request
):
    (Stream(fake, 0) if number == 0 else request.getfixturevalue("current")).work()
    block = arena.alloc(1 << 20)
    base = block.base
    end(block, how)
    del block
    gc.collect()
    others = [arena.alloc(1 << 20) for _ in range(3)]
    assert base not in [one.base for one in others]
    fake.busy.clear()
    again = arena.alloc(1 << 20)  # which looks
    assert again.base == base
    for one in (*others, again):
        one.free()
    assert live(arena) == 0
    assert fake.events == set()


def test_blocks_made_many_at_once_go_back_in_order_too(fake, arena, current):
    blocks = arena.alloc_many([1000] * 3)
    current.work()
    for block in blocks:
        block.free()
    assert live(arena) == 3
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_the_stream_of_the_allocation_counts_and_not_that_of_the_free(fake, arena, current, monkeypatch):
    block = arena.alloc(1000)
    other = Stream(fake, 78)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: other)
    other.work()
    block.free()
    assert live(arena) == 0
    fake.busy.clear()


def test_a_threads_own_default_stream_is_waited_for_by_the_one_for_all(fake, arena, current):
    current.ptr = 2
    block = arena.alloc(1000)
    fake.busy.add(0)
    thread = threading.Thread(target=block.free)
    thread.start()
    thread.join()
    assert live(arena) == 1
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_a_stream_of_another_card_stands_for_nobody(fake, arena, current):
    current.device_id = 5
    block = arena.alloc(1000)
    current.work()
    block.free()
    assert live(arena) == 0
    fake.busy.clear()


def test_a_plain_free_during_a_capture_waits(fake, arena, current):
    freed, dropped, left = (arena.alloc(1000) for _ in range(3))
    freed.used_on(9)
    fake.capturing = True
    freed.free()
    with left:
        pass
    del dropped
    gc.collect()
    arena.alloc(10).free()
    assert live(arena) == 4
    assert fake.spoiled == []
    fake.capturing = False
    arena.trim()
    assert live(arena) == 0


def test_an_exhausted_arena_waits_for_what_was_freed(fake, space, current):
    with uvas.Arena(space, limit=4 * MIB) as arena:
        block = arena.alloc(3 * MIB)
        current.work()
        block.free()
        arena.alloc(3 * MIB).free()
        array, block = None, arena.alloc(3 * MIB)
        current.work()
        block.free()
        with uvas.numpy_allocator(arena):
            array = np.empty(3 * MIB, "u1")
        fake.capturing = True
        with pytest.raises(uvas.OutOfMemoryError):
            arena.alloc(3 * MIB)
        fake.capturing = False
        del array


def test_an_array_of_numpys_allocation_goes_back_in_order_if_cupy_has_seen_it(fake, arena, current):
    def allocate() -> np.ndarray:
        with uvas.numpy_allocator(arena):
            return np.empty(1 << 20, "u1")

    array = allocate()
    uvas.ascupy(array)  # and gone
    current.work()
    del array
    gc.collect()
    ordered.collect()
    assert live(arena) == 1
    fake.busy.clear()
    ordered.collect()
    assert live(arena) == 0
    current.work()
    allocate()  # nobody has told that a stream uses it: it goes back at once
    assert live(arena) == 0
    fake.busy.clear()


@pytest.mark.parametrize("view", [lambda block: block.cupy("u1"), lambda block: uvas.ascupy(block.numpy("u1"))])
def test_the_stream_that_is_current_when_cupy_gets_a_view_counts_too(fake, arena, current, view, monkeypatch):
    block = arena.alloc(1000)
    other = Stream(fake, 78)
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda, "get_current_stream", lambda: other)
        view(block)
    other.work()
    block.free()
    assert live(arena) == 1
    fake.busy.clear()
    arena.trim()
    assert live(arena) == 0


def test_an_arena_orders_from_when_a_card_comes_until_it_goes(fake, device):
    with uvas.AddressSpace() as space, uvas.Arena(space) as arena:
        fake.busy.add(0)
        arena.alloc(1000).free()
        assert live(arena) == 0
        try:
            space.attach(device)
        except uvas.UvasError:
            pytest.skip("this strategy wants to be there first")
        arena.alloc(1000).free()
        assert live(arena) == 1
        fake.busy.clear()
        arena.trim()
        space.detach(device)
        fake.busy.add(0)
        arena.alloc(1000).free()
        assert live(arena) == 0
        fake.busy.clear()


def test_while_a_stream_is_busy_the_driver_is_not_asked_for_each_block(fake, arena, current):
    current.work()
    blocks = [arena.alloc(1000) for _ in range(50)]
    for block in blocks:
        block.free()
    fake.calls.clear()
    arena.alloc(1000)
    assert fake.calls.count("cuEventQuery") == 1
    fake.busy.clear()


def test_a_stream_that_was_destroyed_does_not_keep_a_block(fake, arena, current):
    block = arena.alloc(1000)
    fake.home[current.ptr] = 7  # what the fake refuses
    block.free()
    assert live(arena) == 0


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


# ---- CuPy's allocator ------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch) -> dict[str, int]:
    """The stream that CuPy's function says is current; CuPy's own needs the GIL, which cffi gives up."""
    streams = {"stream": 0}
    tell = ffi.callback("intptr_t(void)", lambda: streams["stream"])
    monkeypatch.setattr("uvas.interop.cupy_allocator._current_stream", lambda: tell)
    streams["keep"] = tell
    return streams


@pytest.fixture
def allocator(arena, now) -> Iterator[CupyAllocator]:
    one = uvas.cupy_allocator(arena)
    yield one
    gc.collect()
    one.close()


def malloc(allocator, size: int) -> int:
    """As CuPy's CFunctionAllocator calls it."""
    return int(ffi.cast("uintptr_t", lib.uvas_order_malloc(allocator._order, size, 0)))


def free(allocator, address: int) -> None:
    lib.uvas_order_free(allocator._order, ffi.cast("void *", address), 0)


def test_a_freed_block_goes_back_to_the_stream_of_its_allocation(allocator, arena, now):
    first = malloc(allocator, 1000)
    assert first % 512 == 0
    now["stream"] = 5
    free(allocator, first)  # whatever is current now
    other = malloc(allocator, 1000)
    assert other != first
    now["stream"] = 0
    assert malloc(allocator, 900) == first  # of the same rounded size
    assert allocator.stats().live_blocks == 2
    assert live(arena) == 2
    free(allocator, first)
    free(allocator, other)


def test_what_is_kept_goes_back_after_the_cards_have_stopped(allocator, arena, fake):
    blocks = [malloc(allocator, size) for size in (1, 512, 5000, 3 * MIB)]
    for one in blocks:
        free(allocator, one)
    stats = allocator.stats()
    assert (stats.live_blocks, stats.kept_blocks) == (0, 4)
    assert stats.kept_bytes == 512 + 512 + 5120 + 3 * MIB
    fake.synchronized.clear()
    assert allocator.trim() == stats.kept_bytes
    assert fake.synchronized == [0]
    assert live(arena) == 0
    free(allocator, blocks[0])  # no block of it any more
    free(allocator, 0x1234)
    assert allocator.stats().kept_blocks == 0


def test_sizes_waste_an_eighth_at_most(allocator):
    for size in (1, 511, 513, 4097, 5 * PAGE + 1, MIB + 1, 3 * MIB - 1):
        block = malloc(allocator, size)
        got = allocator.stats().live_bytes
        assert size <= got <= max(size * 9 / 8, size + 511)
        assert uvas.allocation_of(block).range.size >= got
        free(allocator, block)


def test_streams_of_the_same_number_keep_their_own(allocator):
    first = malloc(allocator, 1000)
    free(allocator, first)
    other = int(ffi.cast("uintptr_t", lib.uvas_order_malloc(allocator._order, 1000, 1)))  # the default one of card 1
    assert other not in (0, first)
    free(allocator, other)
    assert malloc(allocator, 1000) == first
    free(allocator, first)


def test_each_thread_has_a_stream_of_its_own_of_one_number(allocator, now):
    now["stream"] = 2  # CU_STREAM_PER_THREAD
    found = []

    def work() -> None:
        found.append(malloc(allocator, 1000))
        free(allocator, found[-1])

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    mine = malloc(allocator, 1000)
    assert len({*found, mine}) == 4
    free(allocator, mine)


def test_out_of_memory_uses_what_other_streams_have_done_with(space, fake, now):
    with uvas.Arena(space, limit=4 * MIB) as arena:
        allocator = uvas.cupy_allocator(arena)
        first = malloc(allocator, 3 * MIB)
        free(allocator, first)
        now["stream"] = 5
        for fake.apart in (False, True):
            fake.capturing = True
            assert malloc(allocator, 3 * MIB) == 0  # nothing is given back in the middle of a capture...
            assert fake.spoiled == []  # ... which goes on
            fake.capturing = False
        second = malloc(allocator, 3 * MIB)
        assert second
        assert malloc(allocator, 3 * MIB) == 0
        with pytest.raises(BufferError, match="1 array of CuPy's lives in it"):
            allocator.close()
        free(allocator, second)
    assert not allocator._order  # closed with the arena


class Null:
    """CuPy's allocator, when C has no memory: it does not look at the address."""

    class Memory:
        ptr = 0

    def malloc(self, size: int) -> Null.Memory:
        lib.uvas_order_malloc(self.order, size, 0)
        return self.Memory()


def test_cupy_is_told_when_there_is_no_memory(space, now, monkeypatch):
    with uvas.Arena(space, limit=4 * MIB, name="small") as arena:
        allocator = uvas.cupy_allocator(arena)
        null = Null()
        null.order = allocator._order
        monkeypatch.setattr(type(allocator), "_allocator", null)
        with pytest.raises(uvas.OutOfMemoryError, match="has no room for 0x500000 bytes"):
            allocator(5 * MIB)
        allocator.close()
        with pytest.raises(uvas.ReleasedError):
            allocator(1)


def test_cupys_own_arrays_lie_in_the_arena(allocator, arena, current):
    """CuPy itself, by an allocator in Python that calls the same functions: its own needs a driver first."""

    class Owner:
        def __init__(self, size: int) -> None:
            self.address = malloc(allocator, size)

        def __del__(self) -> None:
            free(allocator, self.address)

    def python_allocator(size: int) -> object:
        owner = Owner(size)
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(owner.address, size, owner, 0), 0)

    with cupy.cuda.using_allocator(python_allocator):
        array = cupy.ndarray((100,), "f8")
    seen = uvas.asnumpy(array)
    seen[:] = 5
    assert uvas.allocation_of(array.data.ptr).arena is arena
    address = array.data.ptr
    del array
    assert allocator.stats().live_blocks == 1  # the NumPy array keeps it
    del seen
    assert allocator.stats().kept_blocks == 1
    with cupy.cuda.using_allocator(python_allocator):
        assert cupy.ndarray((100,), "f8").data.ptr == address


def test_the_context_manager_sets_cupys_allocator_for_this_thread(allocator):
    with allocator as entered:
        assert entered is allocator
        assert cupy.cuda.get_allocator() is allocator
        other = []
        thread = threading.Thread(target=lambda: other.append(cupy.cuda.get_allocator()))
        thread.start()
        thread.join()
        assert other[0] is not allocator
    assert cupy.cuda.get_allocator() is not allocator


def test_cupys_function_tells_the_stream():
    from uvas.interop.cupy_allocator import _current_stream

    with_the_gil = ctypes.PYFUNCTYPE(ctypes.c_ssize_t)(int(ffi.cast("uintptr_t", _current_stream())))
    try:
        assert with_the_gil() == 0
    except cupy.cuda.runtime.CUDARuntimeError as error:  # it is CuPy's: it asks for a driver
        assert "cudaError" in str(error)  # noqa: PT017


def test_an_allocator_needs_a_card_and_an_open_arena(space):
    with uvas.AddressSpace() as apart, uvas.Arena(apart) as arena:
        with pytest.raises(uvas.NotSupportedError, match="no CUDA device"):
            uvas.cupy_allocator(arena)
    with pytest.raises(uvas.ReleasedError):
        uvas.cupy_allocator(arena)


def test_many_threads_allocate_and_free_in_order(allocator, arena):
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        mine: dict[int, int] = {}
        try:
            for i in range(2000):
                if mine and random.random() < 0.5:
                    address, value = mine.popitem()
                    assert ctypes.c_uint64.from_address(address).value == value
                    free(allocator, address)
                else:
                    address = malloc(allocator, int(random.integers(8, 20_000)))
                    assert address not in mine
                    mine[address] = ctypes.c_uint64.from_address(address).value = seed << 32 | i
            for address, value in mine.items():
                assert ctypes.c_uint64.from_address(address).value == value
                free(allocator, address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert allocator.stats().live_blocks == 0
    allocator.trim()
    assert live(arena) == 0


def test_what_the_readme_shows_runs(fake, current, now):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (piece,) = re.findall(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    exec(compile(piece, "README.md", "exec"), {})
    assert current.waited == 1
