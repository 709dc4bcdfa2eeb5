"""Spaces and reservations, through the public API."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import threading
import time
import traceback
from itertools import pairwise

import numpy as np
import pytest
from devices_in_tests import TableDevice
from machine import ARENA, MIB, PAGE, Stranger, descriptors, map_at, mappings

import uvas
from uvas._core import ffi, lib

WINDOW = uvas.Range(ARENA + (8 << 32), 64 * MIB)


def test_reserve_commit_use_release(space: uvas.AddressSpace) -> None:
    held = space.reserve(10_000, name="weights")
    assert held.size == 3 * PAGE
    assert held.end == held.base + held.size
    assert held.range == uvas.Range(held.base, held.size)
    assert (held.name, held.space) == ("weights", space)
    assert "weights" in repr(held)
    held.commit()
    array = held.numpy(np.float64)
    assert array.ctypes.data == held.base
    assert array.nbytes == held.size
    array[:] = 2
    assert array.sum() == 2 * array.size
    del array
    held.release()
    assert "released" in repr(held)


def test_find_gives_back_the_very_object(space: uvas.AddressSpace) -> None:
    held = space.reserve(4 * PAGE)
    for address in (held.base, held.base + 1, held.end - 1):
        assert space.find(address) is held
        assert uvas.find(address) is held
    assert space.find(held.base - 1) is not held
    assert uvas.find(held.end) is not held
    assert uvas.find(-1) is None
    assert uvas.find(1 << 70) is None
    with pytest.raises(TypeError):
        uvas.find("here")
    base = held.base
    held.release()
    assert uvas.find(base) is None


def test_windows_alignment_and_order(space: uvas.AddressSpace) -> None:
    inside = space.reserve(PAGE, window=WINDOW, align=MIB)
    assert WINDOW.contains(inside.range)
    assert inside.base % MIB == 0
    second = space.reserve(PAGE, window=(WINDOW.base, WINDOW.size))
    assert WINDOW.contains(second.range)
    assert space.ranges() == sorted([inside, second], key=lambda one: one.base)
    inside.release()
    second.release()
    with pytest.raises(uvas.AddressSpaceExhaustedError) as caught:
        space.reserve(2 * WINDOW.size, window=WINDOW)
    assert caught.value.size == 2 * WINDOW.size
    assert caught.value.window == WINDOW
    with pytest.raises(ValueError, match="window"):
        space.reserve(PAGE, at=WINDOW.end, window=WINDOW)


def test_exhausted_tells_what_was_tried() -> None:
    small = uvas.Range(WINDOW.base, 4 * PAGE)
    with Stranger(small.base + PAGE, PAGE) as stranger, uvas.AddressSpace(window=small) as space:
        with pytest.raises(uvas.AddressSpaceExhaustedError, match=r"no room for 0x4000 bytes"):
            space.reserve(4 * PAGE)
        assert stranger.intact()


def test_the_attempts_are_a_bound_with_a_name() -> None:
    class Full(TableDevice):
        def claim(self, range: uvas.Range) -> None:
            self.asked += 1
            raise uvas.AddressInUseError(range, "its firmware", None)

    device = Full("full")
    with uvas.AddressSpace([device], window=WINDOW, attempts=7) as space:
        with pytest.raises(
            uvas.AddressSpaceExhaustedError, match=r"attempts are spent after 7 candidates.*its firmware"
        ):
            space.reserve(PAGE)
        assert device.asked == 7


def test_in_use_names_the_holder(space: uvas.AddressSpace) -> None:
    held = space.reserve(4 * PAGE, at=WINDOW.base, name="first")
    with pytest.raises(uvas.AddressInUseError, match=r'reservation "first" of uvas space "test"') as caught:
        space.reserve(PAGE, at=WINDOW.base + PAGE)
    assert caught.value.wanted == uvas.Range(WINDOW.base + PAGE, PAGE)
    assert caught.value.obstacle == held.range
    assert pickle.loads(pickle.dumps(caught.value)).owner == caught.value.owner
    held.release()
    library = next(one for one in mappings() if one.name.endswith("libuvas.so"))
    with pytest.raises(uvas.AddressInUseError, match=r"libuvas\.so"):
        space.reserve(PAGE, at=library.start)


def test_adoptions_are_known_and_never_touched(space: uvas.AddressSpace) -> None:
    with Stranger(WINDOW.base, 4 * PAGE) as stranger:
        adopted = space.adopt(WINDOW.base, 4 * PAGE, owner="a driver")
        assert (adopted.owner, adopted.base, adopted.size) == ("a driver", WINDOW.base, 4 * PAGE)
        assert uvas.find(WINDOW.base + PAGE) is adopted
        with pytest.raises(uvas.AddressInUseError, match="a driver"):
            space.reserve(PAGE, at=WINDOW.base)
        with pytest.raises(uvas.AddressInUseError, match="a driver"):
            space.adopt(WINDOW.base + PAGE, PAGE, owner="another")
        assert space.ranges() == [adopted]
        assert space.stats().adoptions == 1
        adopted.release()
        with pytest.raises(uvas.ReleasedError):
            adopted.release()
        assert uvas.find(WINDOW.base) is None
        assert stranger.intact()
    for base, size in ((WINDOW.base + 1, PAGE), (WINDOW.base, 0), (WINDOW.base, 100)):
        with pytest.raises(ValueError, match="adopted"):
            space.adopt(base, size, owner="nobody")


def test_memory_comes_and_goes_and_addresses_stay(space: uvas.AddressSpace) -> None:
    with space.reserve(8 * PAGE) as held:
        held.commit(0, 4 * PAGE)
        held.numpy("u1", 4 * PAGE)[:] = 7
        held.commit(2 * PAGE, 4 * PAGE, populate=True)
        again = held.numpy("u1", 6 * PAGE)
        assert (again[: 4 * PAGE] == 7).all()
        assert (again[4 * PAGE :] == 0).all()
        del again
        assert space.stats().committed_bytes == 6 * PAGE
        held.decommit(PAGE, PAGE)
        assert not map_at(held.base + PAGE, PAGE)
        with pytest.raises(ValueError, match="not committed"):
            held.numpy("u1", 2 * PAGE)
        held.commit(PAGE, PAGE)
        assert (held.numpy("u1", PAGE, offset=PAGE) == 0).all()


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.parametrize("tagged", [True, False])
def test_decommitted_memory_reads_as_zeros_again(backing: str, tagged: bool) -> None:
    with uvas.AddressSpace(backing=backing, tagged=tagged) as space, space.reserve(4 * PAGE) as held:
        held.commit()
        held.numpy("u1")[:] = 9
        held.decommit()
        held.commit()
        assert (held.numpy("u1") == 0).all()
        assert space.audit().findings == ()


def test_tags_name_the_space_in_maps() -> None:
    with uvas.AddressSpace(name="gpu") as space:
        held = [space.reserve(PAGE) for _ in range(4)]
        tagged = [one for one in mappings() if one.name == "/memfd:uvas:gpu (deleted)"]
        assert len(tagged) == 1, "neighbours merge into one mapping"
        assert tagged[0].end - tagged[0].start == 4 * PAGE
        assert tagged[0].offset == tagged[0].start
        for one in held:
            one.release()


def test_protections(space: uvas.AddressSpace) -> None:
    with space.reserve(4 * PAGE) as held:
        held.commit()
        held.protect(PAGE, PAGE, "r")
        assert held.numpy("u1", PAGE).flags.writeable
        assert not held.numpy("u1", 2 * PAGE).flags.writeable
        held.protect(PAGE, PAGE, "none")
        with pytest.raises(ValueError, match="protected"):
            held.numpy("u1", 2 * PAGE)
        for nonsense in ("w", "", "rwxx"):
            with pytest.raises(ValueError, match="no protection"):
                held.protect(0, PAGE, nonsense)


def test_parts_of_one_file_need_one_descriptor(space: uvas.AddressSpace) -> None:
    fd = os.memfd_create("file")
    os.ftruncate(fd, 64 * PAGE)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with space.reserve(64 * PAGE) as held:
        held.map_fd(fd, offset=0, size=PAGE, fd_offset=0)
        before = len(descriptors())
        for page in range(2, 64, 2):
            held.map_fd(fd, offset=page * PAGE, size=PAGE, fd_offset=page * PAGE)
        assert len(descriptors()) == before
        held.map_fd(reader, offset=PAGE, size=PAGE, fd_offset=PAGE, protection="r")
        assert len(descriptors()) == before + 1  # it may not be written through, whatever is mapped next to it
        with pytest.raises(PermissionError):
            held.protect(PAGE, PAGE, "rw")
        held.protect(2 * PAGE, PAGE, "rw")
        space.check()
    assert len(descriptors()) == before - 1
    os.close(reader)
    os.close(fd)


def test_map_fd_shares_a_file(space: uvas.AddressSpace) -> None:
    fd = os.memfd_create("file")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"uvas", PAGE)
    with space.reserve(8 * PAGE) as held:
        held.map_fd(fd, offset=2 * PAGE, size=2 * PAGE, fd_offset=PAGE)
        os.close(fd)  # uvas has its own
        shared = held.numpy("u1", PAGE, offset=2 * PAGE)
        assert shared[:4].tobytes() == b"uvas"
        with pytest.raises(BufferError):
            held.map_fd(0, offset=2 * PAGE, size=PAGE)
        del shared
        for offset, size in ((7 * PAGE, 2 * PAGE), (PAGE // 2, PAGE), (0, 0)):
            with pytest.raises((ValueError, OSError)):
                held.map_fd(1, offset=offset, size=size)
        with pytest.raises(ValueError, match="neither"):
            held.map_fd(1, offset=0, size=PAGE, sharing="both")
        with pytest.raises(OSError, match="Bad file descriptor"):
            held.map_fd(12345, offset=0, size=PAGE)


def test_a_private_mapping_copies_on_write(space: uvas.AddressSpace) -> None:
    fd = os.memfd_create("private")
    os.ftruncate(fd, PAGE)
    with space.reserve(PAGE) as held:
        held.map_fd(fd, offset=0, size=PAGE, sharing="private")
        held.numpy("u1")[:] = 1
        assert os.pread(fd, 1, 0) == b"\0"
    os.close(fd)


@pytest.mark.parametrize("dtype", [object, "O", [("a", "O")], np.dtypes.StringDType()])
def test_no_arrays_of_objects(space: uvas.AddressSpace, dtype: object) -> None:
    with space.reserve(PAGE) as held:
        held.commit()
        with pytest.raises(TypeError, match="Python objects"):
            held.numpy(dtype)


def test_shapes_and_offsets(space: uvas.AddressSpace) -> None:
    with space.reserve(2 * PAGE) as held:
        held.commit()
        assert held.numpy("f8", (4, 8)).shape == (4, 8)
        assert held.numpy("f8", 5).shape == (5,)
        assert held.numpy("f8", offset=PAGE).shape == (PAGE // 8,)
        assert held.numpy([("x", "f4"), ("y", "i2")], 3)["y"].tolist() == [0, 0, 0]
        assert held.numpy("u1", (0, 5)).size == 0
        for shape, offset in (((PAGE + 1,), PAGE), (3 * PAGE, 0), (-1, 0), ((1 << 40, 1 << 40), 0), (1, 2 * PAGE)):
            with pytest.raises(ValueError, match="0x"):
                held.numpy("u1", shape, offset=offset)


def test_an_array_keeps_the_memory(space: uvas.AddressSpace) -> None:
    held = space.reserve(2 * PAGE)
    held.commit()
    array = held.numpy(np.uint8, (PAGE,))
    view = array[10:20].reshape(2, 5).T
    del array
    with pytest.raises(BufferError, match=r"array of uint8, shape \(4096,\)") as caught:
        held.release()
    assert f"{held.base:#x}" in str(caught.value)
    with pytest.raises(BufferError):
        held.decommit(0, PAGE)
    held.decommit(PAGE, PAGE)  # nobody uses that page
    with pytest.raises(BufferError, match="array of uint8"):
        space.close()
    view[:] = 3
    del view
    held.release()


def test_cycles_are_collected_before_a_refusal(space: uvas.AddressSpace) -> None:
    held = space.reserve(PAGE)
    held.commit()
    cycle: list[object] = [held.numpy("u1")]
    cycle.append(cycle)
    del cycle
    held.release()


def test_finalizers_only_enqueue() -> None:
    """A collection may run inside any call, under any lock: no device is asked from there."""
    callers = []

    class Watched(TableDevice):
        def unclaim(self, range: uvas.Range) -> None:
            callers.append([frame.name for frame in traceback.extract_stack()])
            super().unclaim(range)

    device = Watched()
    with uvas.AddressSpace([device]) as space:
        held = [space.reserve(PAGE) for _ in range(3)]
        with pytest.warns(ResourceWarning, match="never released"):
            del held
        space.reserve(PAGE).release()  # a verb that passes does what was left
        for _ in range(3000):
            if not device.claims:
                break
            time.sleep(0.01)  # a thread may be at it
        assert device.claims == {}
    assert len(callers) == 4
    assert not any("__del__" in names for names in callers)


def test_with_releases_when_the_last_array_goes(space: uvas.AddressSpace) -> None:
    held = space.reserve(PAGE)
    held.commit()
    array = held.numpy("u1")
    with pytest.raises(KeyError, match="the user's own"), held:
        raise KeyError("the user's own")
    base = held.base
    array[0] = 1
    assert space.stats().reservations == 1
    with pytest.raises(uvas.ReleasedError):
        held.numpy("u1")
    del array
    gc.collect()
    for _ in range(3000):
        if uvas.find(base) is None and space.stats().reservations == 0:
            break
        time.sleep(0.01)
    assert space.stats().reservations == 0


def test_with_a_space_under_a_live_array() -> None:
    with uvas.AddressSpace(name="kind") as space:
        held = space.reserve(PAGE)
        held.commit()
        array = held.numpy("u1")
        other = space.reserve(PAGE)
    array[:] = 4
    assert (array == 4).all()
    with pytest.raises(uvas.ReleasedError):
        other.commit()
    del array, held, other
    gc.collect()
    for _ in range(3000):
        if not [one for one in mappings() if "uvas:kind" in one.name]:
            break
        time.sleep(0.01)
    assert not [one for one in mappings() if "uvas:kind" in one.name]


def test_a_released_object_is_dead(space: uvas.AddressSpace) -> None:
    held = space.reserve(PAGE)
    held.release()
    for verb in (
        held.release,
        held.commit,
        held.decommit,
        lambda: held.protect(0, PAGE, "r"),
        lambda: held.map_fd(0, offset=0, size=PAGE),
        lambda: held.numpy("u1", 1),
    ):
        with pytest.raises(uvas.ReleasedError):
            verb()


def test_a_handle_is_never_used_again(space: uvas.AddressSpace) -> None:
    """In C, where a handle is a number: records are used again, numbers are not."""
    seen = set()
    cell = ffi.new("struct uvas_reservation *")
    for _ in range(300):
        assert lib.uvas_reserve(space._cell[0], PAGE, ffi.NULL, cell) == 0
        assert lib.uvas_release(cell.id) == 0
        seen.add(cell.id)
    assert len(seen) == 300
    assert {lib.uvas_commit(one, 0, PAGE, 3, 0) for one in seen} == {-errno.ESTALE}


def test_a_closed_space_is_dead() -> None:
    space = uvas.AddressSpace()
    held = space.reserve(PAGE)
    space.close()
    space.close()
    assert space.closed
    for verb in (lambda: space.reserve(PAGE), space.stats, space.audit, held.commit, space.__enter__):
        with pytest.raises(uvas.ReleasedError):
            verb()


def test_what_is_leaked_warns_and_is_given_back(space: uvas.AddressSpace) -> None:
    held = space.reserve(PAGE, name="leaked")
    base = held.base
    with pytest.warns(ResourceWarning, match="never released"):
        del held
    assert space.stats().reservations == 0
    assert uvas.find(base) is None
    other = uvas.AddressSpace(name="leaky")
    with pytest.warns(ResourceWarning, match="never closed"):
        del other
    space.stats()


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_addresses_cannot_be_copied(space: uvas.AddressSpace, copier: object) -> None:
    with space.reserve(PAGE) as held:
        for one in (space, held):
            with pytest.raises(TypeError, match="cannot be pickled or copied"):
                copier(one)


@pytest.mark.parametrize(("name", "value"), [("size", 1.5), ("size", True), ("size", "1"), ("at", 2.5), ("align", [])])
def test_numbers_are_integers(space: uvas.AddressSpace, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=r"integer|bytes"):
        space.reserve(**({"size": PAGE} | {name: value}))
    with space.reserve(np.int64(PAGE)) as held:  # an integer for all who use numpy
        assert held.size == PAGE


def test_options_are_checked() -> None:
    for options in ({"backing": "paper"}, {"attempts": 0}, {"attempts": -1}, {"window": (1 << 60, 1 << 60)}):
        with pytest.raises(ValueError, match=r"0x|paper|attempts"):
            uvas.AddressSpace(**options)


def test_threads_get_disjoint_ranges(space: uvas.AddressSpace) -> None:
    held: list[uvas.Reservation] = []
    start = threading.Barrier(8)

    def reserve() -> None:
        start.wait()
        held.extend(space.reserve(3 * PAGE) for _ in range(200))

    threads = [threading.Thread(target=reserve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = sorted((one.base, one.end) for one in held)
    assert all(end <= base for (_, end), (base, _) in pairwise(spans))
    space.check()
    assert [one.base for one in space.ranges()] == [base for base, _ in spans]
    for one in held:
        one.release()


def test_32_tib_in_one_reservation(space: uvas.AddressSpace) -> None:
    with space.reserve(32 << 40) as held:
        held.commit((16 << 40), PAGE)
        held.numpy("u1", PAGE, offset=16 << 40)[:] = 1


def test_nothing_is_reserved_where_others_put_things_by_habit(space: uvas.AddressSpace) -> None:
    for low, high in ((0x2_0000_0000, 0x16_0000_0000), (0xC0_0000_0000, 0xD0_0000_0000), (0, 0x10000)):
        with pytest.raises(uvas.AddressSpaceExhaustedError):
            space.reserve(PAGE, window=uvas.Range(low, high - low))
