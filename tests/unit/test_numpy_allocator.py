"""NumPy's own allocations from an arena, and arrays in unified memory."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import on_device
import pytest
from machine import MIB, in_child

import uvas


@pytest.fixture
def arena(space: uvas.AddressSpace) -> Iterator[uvas.Arena]:
    """An arena; afterwards its invariants hold and nothing lives in it."""
    with uvas.Arena(space, name="numpy") as one:
        yield one
        gc.collect()
        one.check()
        assert one.stats().live_blocks == 0
        one.close()


def is_from(array: np.ndarray, arena: uvas.Arena) -> bool:
    """Whether an array's memory is a block of the arena."""
    found = uvas.allocation_of(array)
    return found is not None and found.arena is arena


def alone(program: str) -> str:
    """Run a program in a process of its own, to its good end; what it prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the block -------------------------------------------------------------------------------------------------------


def test_every_array_of_a_block_is_the_arenas(arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena) as allocator:
        arrays = [
            np.empty(3),
            np.zeros((100, 100)),
            np.arange(1000) * 2 + 1,
            np.array([[1, 2], [3, 4]]) @ np.eye(2),
            np.concatenate([np.ones(5), np.zeros(70_000)]),
            np.array(["a", "bc"]),
            np.zeros(3, dtype=object),
            np.empty(0),
            np.empty((3, 0, 5)),
            np.zeros(0, "V0"),
            np.array(5),
        ]
        assert allocator.arena is arena
    assert all(is_from(array, arena) for array in arrays)
    assert (arrays[2] == np.arange(1, 2000, 2)).all()
    assert not is_from(arrays[2] + 1, arena)
    arrays.clear()


def test_zeros_are_zeros(arena: uvas.Arena) -> None:
    for size in (1, 100, 5000, 40_000, 3 * MIB):
        with uvas.numpy_allocator(arena):
            dirty = np.empty(size, "u1")
            dirty[:] = 255
            del dirty
            assert not np.zeros(size, "u1").any()


def test_resize_keeps_what_fits(arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena):
        array = np.arange(1000)
        for size in (2000, 100_000, 3_000_000, 500, 1, 0, 7):
            before = array.copy()
            array.resize(size, refcheck=False)
            kept = min(size, before.size)
            assert (array[:kept] == before[:kept]).all()
            assert not array[kept:].any()
            assert is_from(array, arena)
        del before, array
        assert np.fromiter((i for i in range(10_000)), int).sum() == 49_995_000


def test_numpy_calls_without_the_gil_too(arena: uvas.Arena) -> None:
    text = " ".join(map(str, range(200_000)))
    with uvas.numpy_allocator(arena):
        array = np.fromstring(text, int, sep=" ")
        assert (array == np.arange(200_000)).all()
        assert is_from(array, arena)
    del array


def test_arrays_outlive_the_block_and_keep_the_arena(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space) as arena, uvas.numpy_allocator(arena):
        array = np.arange(100)
    assert arena.closed
    assert array.sum() == 4950
    assert uvas.is_unified(array)


def test_blocks_may_be_nested_and_end_with_exceptions(arena: uvas.Arena, space: uvas.AddressSpace) -> None:
    with uvas.Arena(space) as inner:
        allocator = uvas.numpy_allocator(arena)
        with allocator:
            with suppress(KeyError), uvas.numpy_allocator(inner), allocator, uvas.numpy_allocator(inner):
                assert is_from(np.empty(3), inner)
                raise KeyError
            assert is_from(np.empty(3), arena)
        assert not uvas.is_unified(np.empty(3))


def test_install_and_back(arena: uvas.Arena) -> None:
    allocator = uvas.numpy_allocator(arena)
    assert allocator.install() is allocator
    try:
        assert is_from(np.empty(3), arena)
        with pytest.raises(BufferError, match="NumPy"):
            arena.close()
    finally:
        allocator.uninstall()
    assert not uvas.is_unified(np.empty(3))
    with pytest.raises(RuntimeError, match="nothing has been installed"):
        allocator.uninstall()


def test_the_limit_is_numpys_memory_error(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, limit=8 * MIB) as arena, uvas.numpy_allocator(arena):
        for make in (np.empty, np.zeros, np.ones):
            with pytest.raises(MemoryError, match="Unable to allocate"):
                make(16 * MIB)
        array = np.arange(1000)
        with pytest.raises(MemoryError):
            array.resize(16 * MIB, refcheck=False)
        assert array.sum() == 499_500
        with pytest.raises((MemoryError, ValueError)):
            np.empty((1 << 40, 1 << 30))
        del array


def test_the_callback_serves_numpy(space: uvas.AddressSpace) -> None:
    cache = []

    def exhausted(size: int) -> bool:
        cache.clear()
        return size > 0

    with uvas.Arena(space, limit=8 * MIB, exhausted=exhausted) as arena, uvas.numpy_allocator(arena):
        cache.append(np.ones(6 * MIB, "u1"))
        assert np.ones(6 * MIB, "u1").all()
        assert cache == []


def test_what_the_callback_raises_under_numpy_is_told(
    space: uvas.AddressSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def exhausted(size: int) -> bool:
        raise LookupError(size)

    with uvas.Arena(space, limit=MIB, exhausted=exhausted) as arena:
        monkeypatch.setattr(sys, "unraisablehook", told.append)
        for make in (np.empty, np.zeros):
            with uvas.numpy_allocator(arena), pytest.raises(MemoryError):
                make(2 * MIB)
        assert [(type(one.exc_value), one.object) for one in told] == [(LookupError, exhausted)] * 2
        assert told[0].exc_traceback is not None
        with pytest.raises(LookupError):  # alloc raises it itself
            arena.alloc(2 * MIB)
        assert len(told) == 2
        told.clear()
        assert not arena._errors


def test_a_callback_under_numpy_is_raised_at_by_alloc(space: uvas.AddressSpace) -> None:
    caught: list[BaseException] = []

    def inner(size: int) -> bool:
        raise LookupError(size)

    with uvas.Arena(space, limit=MIB, exhausted=inner) as other:

        def outer(size: int) -> bool:
            with pytest.raises(LookupError) as raised:
                other.alloc(size)
            caught.append(raised.value)
            return False

        with (
            uvas.Arena(space, limit=MIB, exhausted=outer) as arena,
            uvas.numpy_allocator(arena),
            pytest.raises(MemoryError),
        ):
            np.empty(2 * MIB)
    assert len(caught) == 1


def test_an_interrupt_in_the_callback_comes_again_after_numpy(space: uvas.AddressSpace) -> None:
    def exhausted(size: int) -> bool:
        raise KeyboardInterrupt

    def ask(turns: Iterator[int]) -> None:
        with suppress(MemoryError):
            np.empty(2 * MIB)
        for _ in turns:
            pass

    turns = iter(range(1000))
    with uvas.Arena(space, limit=MIB, exhausted=exhausted) as arena:
        with pytest.raises(KeyboardInterrupt), uvas.numpy_allocator(arena):
            ask(turns)
        assert next(turns, None) is not None  # at once
        assert not arena._errors


# ---- threads and tasks -----------------------------------------------------------------------------------------------


def test_threads_begin_with_numpys_own_unless_it_is_carried(arena: uvas.Arena) -> None:
    allocator = uvas.numpy_allocator(arena)
    with allocator, ThreadPoolExecutor(2) as threads:
        plain = threads.submit(np.ones, 100).result()
        carried = list(threads.map(allocator.bind(np.ones), [100] * 8))
        after = threads.submit(np.ones, 100).result()
    assert not uvas.is_unified(plain)
    assert not uvas.is_unified(after)
    assert all(is_from(one, arena) for one in carried)
    assert allocator.bind(in_child).__name__ == "in_child"
    with ThreadPoolExecutor(2, initializer=allocator.install) as threads:
        assert all(is_from(one, arena) for one in threads.map(np.ones, [100] * 8))
    carried.clear()


def test_asyncio_tasks_have_their_creators(arena: uvas.Arena) -> None:
    async def make() -> np.ndarray:
        await asyncio.sleep(0)
        return np.ones(10)

    async def both() -> tuple[np.ndarray, np.ndarray]:
        with uvas.numpy_allocator(arena):
            inside = asyncio.create_task(make())
        outside = asyncio.create_task(make())
        return await inside, await outside

    inside, outside = asyncio.run(both())
    assert is_from(inside, arena)
    assert not uvas.is_unified(outside)


def test_threads_free_each_others_arrays(arena: uvas.Arena) -> None:
    mailboxes: list[list[np.ndarray]] = [[] for _ in range(4)]
    wrong: list[int] = []

    def work(mine: int) -> None:
        chance = np.random.default_rng(mine)
        with uvas.numpy_allocator(arena):
            for _ in range(1500):
                mailboxes[chance.integers(4)].append(np.full(chance.integers(1, 3000), mine))
                if mailboxes[mine]:
                    array = mailboxes[mine].pop()
                    if not (array == array[0]).all() or array[0] not in range(4):
                        wrong.append(mine)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    mailboxes.clear()


# ---- fork and spawn --------------------------------------------------------------------------------------------------


def test_a_forked_child_allocates_elsewhere(arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena):
        arrays = [np.arange(1000), np.arange(100_000), np.arange(10)]
        base = uvas.allocation_of(arrays[0])

        def child() -> None:
            assert arrays[0].sum() == 499_500
            new = np.arange(5000)
            found = uvas.allocation_of(new)
            assert found is not None
            assert uvas.is_unified(new)
            assert found.arena is None
            for size in (20_000, 50):
                arrays[1].resize(size, refcheck=False)
                assert (arrays[1] == np.arange(size)).all()
            arrays[2].resize(100_000, refcheck=False)
            assert arrays[2][:10].tolist() == list(range(10))
            arrays.clear()
            del new

            def grandchild() -> None:
                assert np.arange(777).sum() == 301_476
                kept.resize(9999, refcheck=False)
                assert (kept[:3333] == 1).all()

            kept = np.ones(3333)
            in_child(grandchild)
            assert np.zeros(100_000).sum() == 0

        in_child(child)
        assert [array.size for array in arrays] == [1000, 100_000, 10]
        assert arrays[1].sum() == 4_999_950_000
        assert uvas.allocation_of(arrays[0]) == base
    arrays.clear()


def test_a_childs_arena_has_the_limit_of_its_parents(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, limit=8 << 20) as limited, uvas.numpy_allocator(limited):

        def child() -> None:
            assert np.ones(1000).sum() == 1000
            with pytest.raises(MemoryError):
                np.ones(16 << 20, "u1")

        in_child(child)


def test_two_threads_of_a_child_agree_on_its_arena(arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena):
        allocator = uvas.numpy_allocator(arena)

        def child() -> None:
            with ThreadPoolExecutor(4) as threads:
                door = threading.Barrier(4)

                def make(number: int) -> bool:
                    door.wait()
                    arrays = [np.full(number + 1, size) for size in range(1, 300)]
                    return all((array == size).all() for size, array in enumerate(arrays, 1))

                with pytest.raises(uvas.ReleasedError):
                    allocator.install()
                assert all(threads.map(make, range(4)))

        in_child(child)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(arena: uvas.Arena, method: str) -> None:
    with uvas.numpy_allocator(arena):
        array = np.arange(1000)
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(on_device.total_and_own, [array] * 4) == [(499_500, True)] * 4
    del array


# ---- NumPy's functions in unified memory -----------------------------------------------------------------------------


def test_numpys_functions_with_numpys_results() -> None:
    out = alone("""
import numpy as np, pickle, uvas
like = np.arange(6, dtype="i4").reshape(2, 3).T
for name, arguments, names in [
    ("empty", ((2, 3),), {}), ("empty", (5, "i2"), {}), ("empty", (), {"shape": 4, "order": "F"}),
    ("zeros", (70_000,), {}), ("zeros", ((2, 2), "c16"), {}), ("zeros", ([3, np.int8(2)],), {"dtype": np.uint8}),
    ("ones", (7,), {}), ("full", ((2, 2), 7.5), {}), ("array", ([[1, 2], [3, 4]],), {"dtype": "f4", "ndmin": 3}),
    ("array", (like,), {}), ("empty_like", (like,), {}), ("zeros_like", (like,), {"dtype": bool}),
]:
    ours, numpys = getattr(uvas, name)(*arguments, **names), getattr(np, name)(*arguments, **names)
    assert uvas.is_unified(ours), name
    assert (ours.dtype, ours.shape, ours.strides) == (numpys.dtype, numpys.shape, numpys.strides), name
    assert type(ours) is np.ndarray
    if not name.startswith("empty"):
        assert (ours == numpys).all(), name
for name, arguments in [
    ("empty", (-1,)), ("empty", ("x",)), ("zeros", (3, "nothing")), ("ones", ()), ("full", (3,)), ("empty", (1 << 62,)),
]:
    errors = []
    for module in (uvas, np):
        try:
            getattr(module, name)(*arguments)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert len(errors) == 2 and errors[0] == errors[1], errors
assert pickle.loads(pickle.dumps(uvas.empty)) is uvas.empty
assert uvas.zeros.__name__ == "zeros" and "numpy.zeros" in uvas.zeros.__doc__
assert not uvas.is_unified(np.empty(3))
assert not uvas.is_unified(uvas.ones(3) + 1)
with uvas.numpy_allocator():
    assert uvas.is_unified(uvas.ones(3) + 1)
print("good")
""")
    assert out == "good\n"


def test_the_context_of_the_caller_is_seen() -> None:
    out = alone("""
import numpy as np, uvas
from contextvars import ContextVar
mine = ContextVar("mine", default=0)
class Shape:
    def __index__(self):
        mine.set(mine.get() + 1)
        return 3
uvas.empty(3)
mine.set(5)
uvas.empty(Shape())
assert mine.get() > 5
class Inner:
    def __index__(self):
        assert uvas.is_unified(uvas.empty(2)) and uvas.is_unified(np.empty(2)) and uvas.is_unified(uvas.empty((2,)))
        return 3
assert uvas.empty((Inner(), 2)).shape == (3, 2)
with np.errstate(all="raise"):
    try:
        uvas.full(3, 1e300, dtype="f4")
    except FloatingPointError:
        print("good")
""")
    assert out == "good\n"


def test_asarray_copies_what_lies_elsewhere_and_nothing_else() -> None:
    out = alone("""
import numpy as np, uvas
elsewhere, here = np.arange(6).reshape(2, 3), uvas.array([1.5, 2.5])
copied = uvas.asarray(elsewhere)
assert uvas.is_unified(copied) and (copied == elsewhere).all() and not np.shares_memory(copied, elsewhere)
assert uvas.asarray(here) is here
assert np.shares_memory(uvas.asarray(here[::-1]), here)
assert uvas.asarray(here, "f4").dtype == "f4" and uvas.is_unified(uvas.asarray(here, "f4"))
assert uvas.asarray(elsewhere.T, order="C").flags.c_contiguous
assert uvas.is_unified(uvas.asarray([[1, 2], [3, 4]]))
assert uvas.asarray(here, copy=True) is not here and uvas.is_unified(uvas.asarray(here, copy=True))
assert uvas.asarray(here, copy=False) is here
assert uvas.is_unified(uvas.asarray(elsewhere, device="cpu", like=here))
try:
    uvas.asarray(elsewhere, copy=False)
except ValueError as error:
    assert hex(elsewhere.ctypes.data) in str(error)
    print("good")
""")
    assert out == "good\n"


def test_configure_comes_first() -> None:
    out = alone("""
import numpy as np, uvas
uvas.configure(limit=1 << 20, name="mine")
uvas.configure(limit=4 << 20, name="mine")
array = uvas.zeros(1000)
assert uvas.find(array.ctypes.data).space.name == "mine"
assert uvas.default_arena() is uvas.allocation_of(array).arena
try:
    uvas.empty(8 << 20, "u1")
except MemoryError:
    pass
else:
    raise AssertionError
try:
    uvas.configure(limit=1 << 30)
except RuntimeError as error:
    assert "already" in str(error)
    print("good")
""")
    assert out == "good\n"


def test_what_configure_said_is_refused_at_the_first_use() -> None:
    out = alone("""
import uvas
uvas.configure(pages="giant")
for _ in range(2):
    try:
        uvas.empty(3)
    except ValueError as error:
        assert "giant" in str(error)
uvas.configure()
assert uvas.is_unified(uvas.empty(3))
print("good")
""")
    assert out == "good\n"


def test_the_default_space_is_shared_with_devices() -> None:
    out = alone("""
import operator, numpy as np, uvas
def main():
    with uvas.ProcessDevice(name="gpu0") as device:
        uvas.configure(devices=[device])
        array = uvas.ones(100_000)
        assert device.run(np.sum, array) == 100_000
        device.run(operator.setitem, array, 5, 7.0)
        assert array[5] == 7
        try:
            device.run(np.sum, array + 1)
        except TypeError as error:
            assert "shares" in str(error)
        else:
            raise AssertionError
        with uvas.numpy_allocator():
            assert device.run(np.sum, 2 * array) == 200_012
        uvas.default_arena().space
    print("good")
main()
""")
    assert out == "good\n"


def test_many_threads_make_the_default_space_once() -> None:
    out = alone("""
import threading, numpy as np, uvas
door, arrays = threading.Barrier(8), []
def work():
    door.wait()
    for _ in range(500):
        arrays.append(uvas.empty((100,)))
        arrays.append(uvas.zeros((100_000,)))
        arrays.pop()
threads = [threading.Thread(target=work) for _ in range(8)]
for one in threads: one.start()
for one in threads: one.join()
assert len({uvas.allocation_of(one).arena for one in arrays}) == 1
assert all(map(uvas.is_unified, arrays))
assert not uvas.is_unified(np.empty(3))
print("good")
""")
    assert out == "good\n"


def test_a_child_of_a_process_with_a_default_space() -> None:
    out = alone("""
import os, uvas
array = uvas.arange = uvas.ones(10)
pid = os.fork()
if not pid:
    assert array.sum() == 10
    del array
    new = uvas.zeros(100_000)
    assert uvas.is_unified(new) and not new.any()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert array.sum() == 10
print("good")
""")
    assert out == "good\n"


def test_a_child_makes_a_default_arena_of_its_own() -> None:
    out = alone("""
import os, numpy as np, uvas
uvas.configure(limit=64 << 20)
array = uvas.ones(10)
parents = uvas.default_arena()
pid = os.fork()
if not pid:
    with uvas.numpy_allocator():
        new = np.arange(100_000)
    own = uvas.default_arena()
    assert own is not parents and not own.closed and parents.closed
    assert uvas.allocation_of(new).arena is own and array.sum() == 10
    try:
        own.alloc(128 << 20)
    except uvas.OutOfMemoryError as error:
        assert error.limit == 64 << 20
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert uvas.default_arena() is parents and array.sum() == 10
print("good")
""")
    assert out == "good\n"


def test_a_child_may_configure_devices_of_its_own() -> None:
    out = alone("""
import os, numpy as np, uvas
def main():
    array = uvas.zeros(10), uvas.ones((3,)), uvas.array([1, 2])
    pid = os.fork()
    if not pid:
        with uvas.ProcessDevice() as device:
            uvas.configure(devices=[device])
            for new in uvas.zeros(10), uvas.ones((3,)), uvas.array([1, 2]):
                assert uvas.allocation_of(new).arena is uvas.default_arena()
                assert device.run(np.sum, new) == new.sum()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print("good")
main()
""")
    assert out == "good\n"


def test_what_is_no_arena_is_refused_at_once(space: uvas.AddressSpace) -> None:
    for one in ("arena", 5, space):
        with pytest.raises(TypeError, match="from an Arena"):
            uvas.numpy_allocator(one)


def test_a_limit_may_be_any_integer(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space, limit=np.int64(1 << 20)) as arena:
        with uvas.numpy_allocator(arena):
            array = np.ones(10)
        assert is_from(array, arena)
        del array


def test_arrays_pickle_as_arrays_do(arena: uvas.Arena) -> None:
    with uvas.numpy_allocator(arena):
        array = np.arange(10)
    again = pickle.loads(pickle.dumps(array))
    assert (again == array).all()
    assert not uvas.is_unified(again)
    del array


def test_bare_addresses_are_no_memory_for_numpy() -> None:
    with uvas.AddressSpace() as space, space.reserve(1 << 20) as held:
        arena = uvas.Arena(held, backing="none")
        with pytest.raises(ValueError, match="bare addresses"), uvas.numpy_allocator(arena):
            pass
        block = arena.alloc(4096)
        with pytest.raises(ValueError, match="bare addresses"):
            block.numpy("u1")
        block.free()
        arena.close()
