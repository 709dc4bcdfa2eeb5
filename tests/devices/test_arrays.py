"""Arrays in shared memory travel by address; others are refused unless they are to be copied."""

from __future__ import annotations

import gc
import threading

import machine
import numpy as np
import on_device
import pytest

import uvas

MIB = machine.MIB
PAGE = machine.PAGE


@pytest.fixture
def device(reused: uvas.ProcessDevice) -> uvas.ProcessDevice:
    """One for all tests."""
    return reused


@pytest.fixture
def held(space):
    with space.reserve(MIB) as one:
        one.commit()
        yield one
        gc.collect()  # arrays in cycles: masked ones, and those in the frames of expected errors


def views(held):
    whole = held.numpy("i4", (6, 5))
    whole[...] = np.arange(30).reshape(6, 5)
    read_only = held.numpy("u2", 8, offset=8192)
    read_only.flags.writeable = False
    records = held.numpy([("a", "<i2"), ("b", ">f8")], 3, offset=4096)
    records["b"] = [1.5, 2.5, 3.5]
    return {
        "whole": whole,
        "column": whole[:, 2],
        "backwards": whole[::-2, ::-1],
        "transposed": whole.T,
        "broadcast": np.broadcast_to(whole[0], (4, 5)),
        "scalar": whole[1, 1, ...],
        "read-only": read_only,
        "records": records,
        "field": records["b"],
        "datetimes": held.numpy("M8[s]", 4, offset=12288),
        "unaligned": held.numpy("u1", 80, offset=16385)[:72].view("f8"),
        "last-bytes": held.numpy("u1", 3, offset=MIB - 3),
        "empty": whole[:0],
    }


KINDS = (
    "whole column backwards transposed broadcast scalar read-only records field datetimes unaligned last-bytes empty"
)


@pytest.mark.parametrize("kind", KINDS.split())
def test_an_array_is_the_same_array_there(device, held, kind):
    array = views(held)[kind]
    there = device.run(on_device.describe, array)
    if kind == "empty":  # no bytes, no address
        assert there[1] == array.shape
        assert there[3] == array.dtype
    else:
        assert there == on_device.describe(array)


@pytest.mark.parametrize("kind", ["whole", "backwards", "broadcast", "read-only", "records", "unaligned"])
def test_a_result_is_an_array_over_the_same_memory(device, held, kind):
    array = views(held)[kind]
    back = device.run(on_device.same, array)
    assert on_device.describe(back) == on_device.describe(array)
    assert np.shares_memory(back, array)


def test_the_host_writes_and_the_worker_sees(device, held):
    array = held.numpy("i8")
    array[:] = 3
    assert device.run(on_device.total, array) == 3 * array.size
    array[0] = 4
    assert device.run(on_device.total, array) == 3 * array.size + 1


def test_the_worker_writes_and_the_host_sees(device, held):
    array = held.numpy("f4", (4, 4))
    assert device.run(on_device.fill, array[1:3, ::2], 2.5) is None
    expected = np.zeros((4, 4), "f4")
    expected[1:3, ::2] = 2.5
    assert (array == expected).all()


def test_they_see_each_other_while_the_function_runs(device, held, pipe):
    array = held.numpy("u8", 2)
    seen = device.submit(on_device.answer, array)
    while not array[1]:  # until the worker has written
        assert not seen.done()
    array[0] = 41
    assert seen.result(30) == 42


def test_pointers_stored_in_memory_mean_the_same(device, held):
    nodes = held.numpy("u8", (100, 2))
    values = [7 * i for i in range(100)]
    assert device.run(on_device.walk, on_device.link_up(nodes, values)) == values
    nodes[...] = 0
    head = device.run(on_device.link_up, nodes, values)
    assert on_device.walk(head) == values


def test_one_array_twice_is_one_array_there(device, held):
    array = held.numpy("u1", 4)
    first, second = device.run(on_device.two, array, array)
    assert first is second


def test_arrays_inside_other_things(device, held):
    array = held.numpy("u1", 4)
    array[:] = 9
    back = device.run(on_device.same, {"deep": [(array, array[1:])]})["deep"][0]
    assert [one.ctypes.data for one in back] == [held.base, held.base + 1]


def test_from_one_device_to_another(space, device, held, memory):
    with uvas.ProcessDevice(name="gpu1", **memory) as other:
        space.attach(other)
        array = held.numpy("i8", 10)
        device.run(on_device.fill, array, 5)
        assert other.run(on_device.total, array) == 50
        assert other.run(on_device.address_of, array) == held.base == device.run(on_device.address_of, array)
        space.detach(other)


# ---- what does not travel --------------------------------------------------------------------------------------------


def test_an_array_elsewhere_is_refused_and_the_message_says_what_helps(device, space):
    array = np.arange(3.0)
    with pytest.raises(TypeError, match=rf"shape \(3,\) and dtype float64 at {array.ctypes.data:#x} .*gpu0.*by_value"):
        device.submit(on_device.total, array)


def test_an_array_elsewhere_inside_other_things_is_refused(device, space):
    with pytest.raises(TypeError, match="by_value"):
        device.submit(on_device.same, [{"deep": np.arange(3)}])


def test_an_array_elsewhere_as_a_result_is_refused(device):
    with pytest.raises(TypeError, match=r"the result of fresh_array cannot be sent back: .*by_value"):
        device.run(on_device.fresh_array)


def test_an_array_in_a_space_without_the_device_is_refused(device, space):
    with uvas.AddressSpace(backing="memfd") as other, other.reserve(PAGE) as elsewhere:
        elsewhere.commit()
        with pytest.raises(TypeError, match="does not lie in memory that gpu0 shares"):
            device.submit(on_device.total, elsewhere.numpy("u1"))


def test_an_array_after_detach_is_refused(device, space, held):
    array = held.numpy("u1")
    space.detach(device)
    with pytest.raises(TypeError, match="does not lie in memory that gpu0 shares"):
        device.submit(on_device.total, array)
    del array


def test_an_array_that_leaves_committed_memory_is_refused(device, space):
    with space.reserve(2 * PAGE) as part:
        part.commit(0, PAGE)
        inside = part.numpy("u1", PAGE)
        beyond = np.lib.stride_tricks.as_strided(inside, (PAGE + 1,), (1,))
        with pytest.raises(TypeError, match="not committed"):
            device.submit(on_device.total, beyond)
        assert device.run(on_device.total, inside) == 0
        del inside, beyond


def test_references_are_refused(device):
    with pytest.raises(TypeError, match="holds references"):
        device.submit(on_device.same, np.array([None, 1], object))


@pytest.mark.parametrize("kind", [np.matrix, np.recarray, np.ma.MaskedArray], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_subclasses_are_refused(device, held, kind):
    array = held.numpy([("a", "i4")] if kind is np.recarray else "i4", (2, 2)).view(kind)
    with pytest.raises(TypeError, match=rf"{kind.__name__}.*by_value"):
        device.submit(on_device.same, array)


def test_a_copy_of_a_subclass_arrives_as_a_plain_array(device):
    records = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    assert device.run(on_device.copied, uvas.by_value(records)) == ("ndarray", [(1, 2.0)], True)
    with pytest.raises(TypeError, match="MaskedArray has more than its elements"):
        uvas.by_value(np.ma.array([1, 2], mask=[True, False]))


def test_by_value_copies_there(device, space):
    array = np.arange(12).reshape(3, 4)
    copy = device.run(on_device.copied, uvas.by_value(array[:, ::2]))
    assert copy == ("ndarray", [[0, 2], [4, 6], [8, 10]], True)
    assert (array == np.arange(12).reshape(3, 4)).all()


def test_by_value_copies_back(device):
    back = device.run(on_device.fresh_array_by_value)
    assert type(back) is np.ndarray
    assert back.tolist() == [0, 1, 2, 3, 4]


def test_by_value_of_shared_memory_is_a_copy_too(device, held):
    array = held.numpy("i8", 4)
    assert device.run(on_device.address_of, uvas.by_value(array)) != held.base


def test_by_value_is_for_arrays():
    with pytest.raises(TypeError, match="list travels by value anyway"):
        uvas.by_value([1, 2])


# ---- who holds the memory --------------------------------------------------------------------------------------------


def test_a_call_holds_its_arguments(device, space, pipe):
    held = space.reserve(PAGE)
    held.commit()
    at_work = device.submit(on_device.waits_and_adds, pipe, held.numpy("u1"))
    gc.collect()
    with pytest.raises(BufferError):
        held.release()
    with pytest.raises(BufferError):
        held.decommit()
    with open(pipe, "w") as end:
        end.write("go on")
    assert at_work.result() == 0
    held.release()


@pytest.mark.parametrize("outcome", ["value", "error"])
def test_it_lets_them_go_as_soon_as_the_result_is_there(device, space, outcome):
    for _ in range(50):
        held = space.reserve(PAGE)
        held.commit()
        if outcome == "value":
            assert device.run(on_device.total, held.numpy("u1")) == 0
        else:
            error = device.submit(on_device.fail, "chain", held.numpy("u1")).exception()
            assert isinstance(error, ValueError)
        held.release()


def test_a_result_holds_the_memory(device, space):
    held = space.reserve(PAGE)
    held.commit()
    back = device.run(on_device.part, held.numpy("u1"), 10, 20, 2)
    with pytest.raises(BufferError, match=f"{held.base + 10:#x}"):
        held.release()
    del back
    held.release()


def test_a_reservation_left_under_a_result_goes_with_it(device, space):
    with space.reserve(PAGE) as held:
        held.commit()
        back = device.run(on_device.same, held.numpy("u1"))
    base = held.base
    assert machine.mappings(base, base + PAGE)
    gone = threading.Event()
    del back
    for _ in range(1000):
        if not machine.mappings(base, base + PAGE):
            gone.set()
            break
        gone.wait(0.01)
    assert gone.is_set()


def test_an_array_kept_in_the_worker_holds_the_reservation(device, space):
    held = space.reserve(PAGE)
    held.commit()
    device.run(on_device.keep, held.numpy("u1"))
    with pytest.raises(BufferError):
        held.release()
    assert held.numpy("u1").sum() == 0  # as it was: alive on both sides
    device.run(on_device.drop)
    held.release()
