"""Mirrored memory: the scenarios of Linux's selftest of a simulated device, row by row, on private and shared memory.

A row is named where it is tested; `ELSEWHERE` says why some are not here. What goes beyond them is in the files beside
this one.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from machine import PAGE, libc, read_word, write_word
from mirror import HOST, PATIENCE_S, Child, Mirror, in_thread, pages, parts, until, words

import uvas

HUGE = 2 << 20
MADV_FREE, MADV_HUGEPAGE = 8, 14
REFUSED = (uvas.NotSupportedError, uvas.DeviceError, ValueError)
"""What may be said to a movement that cannot be."""

ROWS = """
open_close anon_read anon_read_prot anon_write anon_write_prot anon_write_child anon_write_child_shared
anon_write_huge anon_write_hugetlbfs file_read file_write anon_read_multiple anon_teardown migrate migrate_fault
migrate_release migrate_shared migrate_mixed migrate_file_private migrate_multiple mixedmap snapshot compound double_map
exclusive exclusive_mprotect exclusive_cow hmm_gup_test hmm_cow_in_device migrate_anon_huge_empty migrate_anon_huge_zero
migrate_anon_huge_free migrate_anon_huge_fault migrate_anon_huge_err migrate_anon_huge_zero_err
migrate_partial_unmap_fault migrate_remap_fault benchmark_thp_migration
"""

ELSEWHERE = {
    "anon_write_hugetlbfs": "pages of a pool are a descriptor's (map_fd of a hugetlb memfd), which is mapped and never "
    "moves: file_read and file_write are the scenario; an arena of such pages is in tests/unit/test_arena_options.py",
    "hmm_gup_test": "test_mirrored_system_calls.py, with everything else that the kernel does to such memory",
    "migrate_remap_fault": "has no meaning: uvas has no verb that moves a range to other addresses",
    "benchmark_thp_migration": "a measurement: benchmarks/, which asserts no time",
}


def test_every_row_is_here_or_it_is_said_why() -> None:
    source = Path(__file__).read_text()
    docstrings = re.findall(r'^    """(`.*)"""$', source, re.MULTILINE)
    here = {row for docstring in docstrings for row in re.findall(r"`(\w+)`", docstring)}
    assert here | set(ELSEWHERE) == set(ROWS.split())
    assert not here & set(ELSEWHERE)


# ---- read and write --------------------------------------------------------------------------------------------------


def test_a_device_starts_and_stops_twice(mirror: Mirror) -> None:
    """`open_close`"""
    for _ in range(2):
        with uvas.ProcessDevice(name="again", memory=mirror.memory) as device:
            mirror.space.attach(device)
            held = mirror.commit(2, seed=7)
            assert device.read(held.base, 64) == words(7, 64)
            held.release()
            mirror.space.detach(device)


def test_a_device_reads_what_the_host_wrote_and_zeros_elsewhere(mirror: Mirror) -> None:
    """`anon_read`"""
    held = mirror.commit(4, seed=None)
    mirror.fill(HOST, held.base + mirror.granule, mirror.granule, 5)
    before = mirror.faults()
    assert mirror.read(0, held.base, mirror.granule) == bytes(mirror.granule)
    assert mirror.read(0, held.base + mirror.granule, mirror.granule) == words(5, mirror.granule)
    assert mirror.read(0, held.base + 2 * mirror.granule, 2 * mirror.granule) == bytes(2 * mirror.granule)
    assert (mirror.faults() > before) == mirror.private
    assert mirror.differ(HOST, held.base + mirror.granule, mirror.granule, 5) == 0


@pytest.mark.parametrize("migrated", [False, True])
def test_what_nobody_may_read_is_not_read(mirror: Mirror, migrated: bool) -> None:
    """`anon_read_prot`"""
    held = mirror.commit(2, seed=11)
    if migrated:
        mirror.migrate(held, 0)
    held.protect(0, held.size, "none")
    for address in (held.base, held.base + mirror.granule + 8):
        with pytest.raises(uvas.DeviceError):
            mirror.read(0, address, 8)
        with pytest.raises(uvas.DeviceError):
            mirror.write(0, address, bytes(8))
    held.protect(0, held.size, "rw")
    assert mirror.differ(HOST, held.base, held.size, 11) == 0
    assert mirror.differ(0, held.base, held.size, 11) == 0


def test_the_host_sees_what_a_device_wrote(mirror: Mirror) -> None:
    """`anon_write`"""
    held = mirror.commit(4, seed=0)
    part = held.base + mirror.granule - 64  # across two granules
    mirror.write(0, part, b"\xa5" * 128)
    mirror.fill(1, held.base + 3 * mirror.granule, mirror.granule, 77)
    array = held.numpy(np.uint8)
    assert array[mirror.granule - 64 : mirror.granule + 64].tobytes() == b"\xa5" * 128
    assert array[: mirror.granule - 64].tobytes() == words(0, mirror.granule)[:-64]
    assert array[3 * mirror.granule :].tobytes() == words(77, mirror.granule)


@pytest.mark.parametrize("migrated", [False, True])
def test_read_only_memory_is_read_and_not_written(mirror: Mirror, migrated: bool) -> None:
    """`anon_write_prot`"""
    held = mirror.commit(2, seed=3)
    if migrated:
        mirror.migrate(held, 0)
    held.protect(0, held.size, "r")
    assert mirror.read(0, held.base, held.size) == words(3, held.size)
    with pytest.raises(uvas.DeviceError):
        mirror.write(0, held.base + 8, b"\xff" * 8)
    assert mirror.differ(0, held.base, held.size, 3) == 0
    assert mirror.differ(HOST, held.base, held.size, 3) == 0
    held.protect(0, held.size, "rw")
    mirror.write(0, held.base + 8, b"\xff" * 8)
    assert read_word(held.base + 8) == (1 << 64) - 1
    assert mirror.differ(HOST, held.base, held.size, 3) == 1


@pytest.mark.parametrize("migrated", [False, True])
def test_a_device_writes_while_a_forked_child_has_the_memory(mirror: Mirror, migrated: bool) -> None:
    """`anon_write_child`, `anon_write_child_shared`: private memory is copied on write, shared memory stays shared."""
    held = mirror.commit(4, seed=100)
    if migrated:
        mirror.migrate(held, 0)
    last = held.end - 8

    def work() -> tuple[int, int]:
        seen = mirror_differences(held, 100), read_word(last)
        write_word(held.base, 1)
        return seen

    child = Child(work)
    mirror.write(0, last, (4242).to_bytes(8, "little"))
    differences, seen_last = child.answer()
    assert seen_last == (100 + held.size // 8 - 1 if mirror.private else 4242)
    assert differences == (0 if mirror.private else 1)
    assert read_word(last) == 4242
    assert read_word(held.base) == (100 if mirror.private else 1)
    assert int.from_bytes(mirror.read(1, held.base, 8), "little") == read_word(held.base)


def mirror_differences(held: uvas.Reservation, seed: int) -> int:
    """`Mirror.differ`, in a forked child: no thread, no device."""
    from mirror import function

    return int(function("differ", "uint64")(held.base, held.size // 8, seed))


def test_huge_pages_on_the_host(mirror: Mirror) -> None:
    """`anon_write_huge`"""
    held = huge(mirror, 2)
    mirror.fill(HOST, held.base, held.size, 9)
    mirror.write(0, held.base + HUGE - 16, b"\xee" * 32)
    mirror.fill(1, held.base + HUGE + 4096, 4096, 1)
    array = held.numpy(np.uint8)
    assert array[HUGE - 16 : HUGE + 16].tobytes() == b"\xee" * 32
    assert array[HUGE + 4096 : HUGE + 8192].tobytes() == words(1, 4096)
    assert array[HUGE + 8192 :].tobytes() == words(9 + (HUGE + 8192) // 8, HUGE - 8192)
    assert array[: HUGE - 16].tobytes() == words(9, HUGE)[:-16]
    del array


def huge(mirror: Mirror, count: int) -> uvas.Reservation:
    """Memory in which the kernel is asked for huge pages."""
    held = mirror.reserve(count * HUGE, align=HUGE)
    held.commit()
    assert libc.madvise(held.base, held.size, MADV_HUGEPAGE) in (0, -1)  # a kernel without them: small pages
    return held


@pytest.mark.parametrize("devices_see", ["nothing", "memory"])
def test_a_file_is_the_same_for_all(mirror: Mirror, tmp_path: Path, devices_see: str) -> None:
    """`file_read`, `file_write`"""
    path = tmp_path / "file"
    path.write_bytes(words(50, 2 * mirror.granule))
    held = mirror.reserve(4 * mirror.granule)
    if devices_see == "memory":  # beside memory that moves
        held.commit()
        mirror.migrate(held, 0)
    with path.open("r+b") as file:
        held.map_fd(file.fileno(), offset=mirror.granule, size=2 * mirror.granule)
        base = held.base + mirror.granule
        assert mirror.read(0, base, 2 * mirror.granule) == words(50, 2 * mirror.granule)
        mirror.write(1, base + mirror.granule, b"written there")
        assert os.pread(file.fileno(), 13, mirror.granule) == b"written there"
        os.pwrite(file.fileno(), b"by the system", 0)
        assert mirror.read(0, base, 13) == b"by the system"
        if mirror.private:
            with pytest.raises(REFUSED):
                mirror.space.prefetch(uvas.Range(base, 2 * mirror.granule), mirror.devices[0])
        assert mirror.read(1, base, 13) == b"by the system"


def test_fresh_ranges_at_the_same_addresses_hold_nothing_stale(mirror: Mirror) -> None:
    """`anon_read_multiple`"""
    at = None
    for i in range(10):
        held = mirror.commit(3, seed=None, at=at)
        at = held.base
        assert mirror.read(i % 2, held.base, held.size) == bytes(held.size)
        mirror.fill(HOST, held.base, held.size, 1000 * i)
        assert mirror.differ((i + 1) % 2, held.base, held.size, 1000 * i) == 0
        mirror.fill(i % 2, held.base, held.size, 5)
        held.release()


def read_here_and_there(mirror: Mirror, held: uvas.Reservation, begun: threading.Event) -> int:
    """Let a device read granules, of which the second half may go; how many had gone."""
    expected = words(1, held.size)
    refused = 0
    for k in range(200):
        at = (k * 5 % 16) * mirror.granule
        try:
            assert mirror.read(0, held.base + at, mirror.granule) == expected[at : at + mirror.granule]
        except uvas.DeviceError:
            assert at >= held.size // 2
            refused += 1
        begun.set()
    return refused


def test_half_of_a_range_goes_while_a_device_reads_it(mirror: Mirror) -> None:
    """`anon_teardown`"""
    chance = random.Random(6)
    for _ in range(10):
        held = mirror.commit(16, seed=1)
        half = held.size // 2
        begun = threading.Event()
        reading = in_thread(read_here_and_there, mirror, held, begun)
        assert begun.wait(PATIENCE_S)
        time.sleep(chance.random() * 0.01)
        held.decommit(half, half)
        assert reading.result(PATIENCE_S) > 0
        with pytest.raises(uvas.DeviceError):
            mirror.read(0, held.base + half, 8)
        assert mirror.differ(HOST, held.base, half, 1) == 0
        held.release()


# ---- migrate ---------------------------------------------------------------------------------------------------------


def test_what_moves_keeps_its_bytes_and_is_counted(mirror: Mirror) -> None:
    """`migrate`"""
    held = mirror.commit(8, seed=21)
    before = mirror.space.movement()
    moved = mirror.migrate(held, 0)
    after = mirror.space.movement()
    assert moved == (pages(held) if mirror.private else 0)
    if mirror.private:
        assert after.devices["device0"].bytes_in - before.devices["device0"].bytes_in == held.size
        assert after.host.bytes_out - before.host.bytes_out == held.size
    assert mirror.all_at(held, 0)
    assert mirror.differ(0, held.base, held.size, 21) == 0
    assert mirror.faults() == faults_of(after)  # what has been moved is there
    assert mirror.differ(HOST, held.base, held.size, 21) == 0


def faults_of(moved: uvas.MovementStats) -> int:
    """How many, of all parties."""
    return sum(one.read_faults + one.write_faults for one in [moved.host, *moved.devices.values()])


def test_the_host_takes_half_back_by_touching_it(mirror: Mirror) -> None:
    """`migrate_fault`: every other granule, so that nothing is fetched ahead."""
    held = mirror.commit(8, seed=4)
    every = parts(held, mirror.granule)
    touched, rest = every[::2], every[1::2]
    mirror.migrate(held, 0)
    for one in touched:
        mirror.fill(HOST, one.base, one.size, 500)
    assert all(mirror.all_at(one, HOST) for one in touched)
    assert all(mirror.all_at(one, 0) for one in rest)
    assert mirror.migrate(held, 0) == (pages(held) // 2 if mirror.private else 0)  # the mixture
    assert mirror.all_at(held, 0)
    for one in touched:
        assert mirror.differ(0, one.base, one.size, 500) == 0
    for one in rest:
        assert mirror.differ(HOST, one.base, one.size, 4 + (one.base - held.base) // 8) == 0


@pytest.mark.parametrize("way", ["detached", "closed", "detached and closed"])
def test_the_host_reads_everything_after_a_device_has_ended(fresh, way: str) -> None:
    """`migrate_release`"""
    mirror = fresh(2)
    held = mirror.commit(8, seed=8)
    mirror.migrate(held, 0)
    mirror.fill(0, held.base, held.size // 2, 1 << 40)
    if "detached" in way:
        mirror.space.detach(mirror.devices[0])
    if "closed" in way:
        mirror.devices[0].close()
    half = held.size // 2
    assert mirror.differ(HOST, held.base, half, 1 << 40) == 0
    assert mirror.differ(1, held.base + half, half, 8 + half // 8) == 0


def test_what_cannot_move_is_refused_and_unchanged(mirror: Mirror, tmp_path: Path) -> None:
    """`migrate_shared`, `migrate_mixed`, `migrate_file_private`"""
    path = tmp_path / "file"
    path.write_bytes(words(60, mirror.granule))
    held = mirror.reserve(4 * mirror.granule)
    held.commit(0, 2 * mirror.granule)
    mirror.fill(HOST, held.base, 2 * mirror.granule, 30)
    with path.open("r+b") as file:
        with pytest.raises(uvas.NotSupportedError):
            held.map_fd(file.fileno(), offset=2 * mirror.granule, size=mirror.granule, sharing="private")
        with pytest.raises(ValueError, match="commit"):  # a hole
            mirror.space.prefetch(held, mirror.devices[0])
        held.map_fd(file.fileno(), offset=2 * mirror.granule, size=mirror.granule)
        if mirror.private:
            for whole in (held.range, uvas.Range(held.base + 2 * mirror.granule, mirror.granule)):
                with pytest.raises(uvas.NotSupportedError):  # a file's
                    mirror.space.prefetch(whole, mirror.devices[0])
                assert not mirror.holds(uvas.Range(held.base, 2 * mirror.granule), 0).any()
        held.protect(mirror.granule, mirror.granule, "none")
        with pytest.raises(REFUSED):  # nobody may have it
            mirror.space.prefetch(uvas.Range(held.base, 2 * mirror.granule), mirror.devices[0])
        held.protect(mirror.granule, mirror.granule, "rw")
        assert mirror.differ(0, held.base, 2 * mirror.granule, 30) == 0
        assert mirror.differ(0, held.base + 2 * mirror.granule, mirror.granule, 60) == 0
        assert os.pread(file.fileno(), mirror.granule, 0) == words(60, mirror.granule)


def test_there_and_back_ten_times(mirror: Mirror) -> None:
    """`migrate_multiple`"""
    held = mirror.commit(4, seed=0)
    for i in range(10):
        mirror.migrate(held, i % 2)
        assert mirror.all_at(held, i % 2)
        assert mirror.differ(i % 2, held.base, held.size, i) == 0
        mirror.migrate(held, HOST)
        assert mirror.all_at(held, HOST)
        mirror.fill(HOST, held.base, held.size, i + 1)


# ---- where -----------------------------------------------------------------------------------------------------------


def test_where_tells_each_page_without_a_fault(mirror: Mirror) -> None:
    """`mixedmap`, `snapshot`, `compound`"""
    flag = uvas.PageFlag
    held = mirror.commit(7, seed=None)
    part = [uvas.Range(held.base + i * mirror.granule, mirror.granule) for i in range(7)]
    for i in (1, 2, 3, 4, 5):
        mirror.fill(HOST, part[i].base, part[i].size, i)
    mirror.migrate(part[2], 0)
    mirror.migrate(part[3], 1)
    mirror.read(0, part[4].base, 8)  # host and device
    mirror.read(1, part[4].base, 8)  # and the other one
    held.protect(5 * mirror.granule, mirror.granule, "r")
    held.protect(6 * mirror.granule, mirror.granule, "none")
    before = mirror.faults()
    told = mirror.snapshot(held)
    assert mirror.faults() == before
    assert told.dtype == np.uint32
    assert len(told) == pages(held)
    places = told.reshape(7, -1)
    assert (places == places[:, :1]).all()  # a granule is in one state
    if mirror.private:
        # Part 0 was never touched: before anything moved it was the host's to write, in effect empty.
        assert int(places[0, 0]) in (0, flag.HOST)
        assert int(places[1, 0]) == flag.HOST
        assert int(places[2, 0]) == flag.device(1)
        assert int(places[3, 0]) == flag.device(2)
        assert int(places[4, 0]) == flag.HOST | flag.device(1) | flag.device(2) | flag.DUPLICATED
    everybody = flag.HOST | flag.device(1) | flag.device(2)
    for i in range(5):
        assert not places[i, 0] & (flag.READ_ONLY | flag.PROTECTED)
        assert mirror.private or places[i, 0] & everybody == (everybody if i else 0)
    assert places[5, 0] & flag.READ_ONLY
    assert not places[5, 0] & flag.PROTECTED
    assert places[6, 0] & flag.PROTECTED
    held.protect(0, held.size, "rw")
    for i in (1, 2, 3, 4, 5):
        assert mirror.differ(HOST, part[i].base, part[i].size, i) == 0


def test_where_tells_of_memory_that_only_a_device_has_touched(mirror: Mirror) -> None:
    """Nowhere means that it reads as zeros."""
    held = mirror.commit(6, seed=None)
    part = [uvas.Range(held.base + i * mirror.granule, mirror.granule) for i in range(6)]
    for i in (1, 4):
        mirror.fill(1, part[i].base, part[i].size, i)
    mirror.fill(HOST, part[3].base, part[3].size, 3)
    before = mirror.faults()
    places = mirror.snapshot(held).reshape(6, -1)
    assert mirror.faults() == before
    device = uvas.PageFlag.device(2)
    for i in range(6):
        if i in (1, 4):
            assert (places[i] & device == device).all()
        elif i != 3 and not mirror.private:
            assert (places[i] == 0).all()
    held.decommit(mirror.granule, mirror.granule)
    held.commit(mirror.granule, mirror.granule)
    assert (mirror.snapshot(part[1]) & device == 0).all()
    assert (mirror.snapshot(part[4]) & device == device).all()
    assert mirror.differ(HOST, part[4].base, part[4].size, 4) == 0


def test_where_tells_that_a_file_is_on_the_host(mirror: Mirror, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(words(50, mirror.granule))
    held = mirror.reserve(2 * mirror.granule)
    held.commit(mirror.granule, mirror.granule)
    with path.open("r+b") as file:
        held.map_fd(file.fileno(), offset=0, size=mirror.granule)
        file.seek(5)
        places = mirror.snapshot(held).reshape(2, -1)
        assert (places[0] & uvas.PageFlag.HOST).all()  # whoever has touched it
        assert file.tell() == 5
        held.protect(0, mirror.granule, "r")
        assert (mirror.snapshot(held.range).reshape(2, -1)[0] & uvas.PageFlag.READ_ONLY).all()


def test_two_devices_read_one_range_and_it_moves_to_the_second(mirror: Mirror) -> None:
    """`double_map`"""
    held = mirror.commit(4, seed=31)
    assert mirror.differ(0, held.base, held.size, 31) == 0
    assert mirror.differ(1, held.base, held.size, 31) == 0
    mirror.migrate(held, 1)
    assert mirror.all_at(held, 1)
    assert mirror.differ(0, held.base, held.size, 31) == 0
    mirror.fill(1, held.base, held.size, 32)
    assert mirror.differ(0, held.base, held.size, 32) == 0


# ---- exclusive -------------------------------------------------------------------------------------------------------


def test_an_atomic_update_is_exclusive_until_the_host_touches_it(mirror: Mirror) -> None:
    """`exclusive`"""
    held = mirror.commit(2, seed=70)
    assert mirror.exclusive(0, held.base) == 70
    assert mirror.all_at(uvas.Range(held.base, mirror.granule), 0)
    assert read_word(held.base) == 71  # revokes
    write_word(held.base, 90)
    assert mirror.all_at(uvas.Range(held.base, mirror.granule), HOST)
    assert mirror.exclusive(1, held.base, 10) == 99
    assert mirror.exclusive(0, held.base) == 100
    assert mirror.differ(HOST, held.base + 8, held.size - 8, 71) == 0


def test_protection_against_exclusive_access(mirror: Mirror) -> None:
    """`exclusive_mprotect`"""
    held = mirror.commit(1, seed=5)
    assert mirror.exclusive(0, held.base) == 5
    held.protect(0, held.size, "r")
    with pytest.raises(uvas.DeviceError):
        mirror.write(0, held.base, bytes(8))
    assert read_word(held.base) == 6
    assert int.from_bytes(mirror.read(0, held.base, 8), "little") == 6
    held.protect(0, held.size, "rw")
    assert mirror.exclusive(0, held.base) == 6


def test_a_fork_against_exclusive_access(mirror: Mirror) -> None:
    """`exclusive_cow`"""
    held = mirror.commit(1, seed=5)
    assert mirror.exclusive(0, held.base) == 5
    child = Child(lambda: read_word(held.base))
    assert mirror.exclusive(0, held.base) == 6
    assert child.answer() == (6 if mirror.private else 7)
    assert read_word(held.base) == 7


def test_a_fork_with_pages_on_a_device(mirror: Mirror) -> None:
    """`hmm_cow_in_device`"""
    held = mirror.commit(4, seed=40)
    mirror.migrate(held, 0)
    mirror.fill(0, held.base, mirror.granule, 80)
    child = Child(lambda: (read_word(held.base), read_word(held.base + mirror.granule)))
    second = 40 + mirror.granule // 8
    write_word(held.base, 1)
    write_word(held.base + mirror.granule, 2)
    assert child.answer() == ((80, second) if mirror.private else (1, 2))
    assert (read_word(held.base), read_word(held.base + mirror.granule)) == (1, 2)
    assert mirror.differ(0, held.base + 8, mirror.granule - 8, 81) == 0
    assert mirror.differ(1, held.base + 2 * mirror.granule, 2 * mirror.granule, 40 + mirror.granule // 4) == 0


# ---- huge pages that move --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["never touched", "zeros", "data"])
def test_huge_pages_move(mirror: Mirror, state: str) -> None:
    """`migrate_anon_huge_empty`, `migrate_anon_huge_zero`, `migrate_anon_huge_fault`"""
    held = huge(mirror, 2)
    array = held.numpy(np.uint64)
    if state == "zeros":
        assert not array.any()  # reading maps the zero page
    if state == "data":
        array[:] = np.arange(len(array), dtype=np.uint64)
    expected = array.copy() if state == "data" else np.zeros_like(array)
    mirror.migrate(held, 0)
    assert np.frombuffer(mirror.read(0, held.base, held.size), np.uint64).tobytes() == expected.tobytes()
    assert (array[:: PAGE // 8] == expected[:: PAGE // 8]).all()  # the host's faults
    array[5] = expected[5] = 1 << 50
    mirror.migrate(held, 1)
    assert (array == expected).all()
    del array


def test_what_was_given_up_is_zeros_or_what_it_was(mirror: Mirror) -> None:
    """`migrate_anon_huge_free`"""
    held = huge(mirror, 1)
    mirror.fill(HOST, held.base, held.size, 1)
    libc.madvise(held.base, held.size, MADV_FREE)  # on shared memory an error, and nothing happens
    mirror.migrate(held, 0)
    seen = np.frombuffer(mirror.read(0, held.base, held.size), np.uint64).reshape(-1, PAGE // 8)
    expected = np.frombuffer(words(1, held.size), np.uint64).reshape(-1, PAGE // 8)
    kept = (seen == expected).all(axis=1)
    assert (kept | (seen == 0).all(axis=1)).all()  # each page is one or the other, whole
    mirror.fill(0, held.base, held.size, 2)
    assert mirror.differ(HOST, held.base, held.size, 2) == 0


@pytest.mark.parametrize("state", ["data", "never touched"])
def test_a_device_without_room_leaves_the_data_where_it_is(private, state: str) -> None:
    """`migrate_anon_huge_err`, `migrate_anon_huge_zero_err`: shared memory has no room of its own that could lack."""
    mirror = private(1, capacity=1 << 20)
    held = huge(mirror, 1)
    seed = 3 if state == "data" else None
    if seed is not None:
        mirror.fill(HOST, held.base, held.size, seed)
    with pytest.raises(uvas.OutOfMemoryError):
        mirror.space.prefetch(held, mirror.devices[0])
    expected = bytes(held.size) if seed is None else words(seed, held.size)
    assert held.numpy(np.uint8).tobytes() == expected
    assert mirror.read(0, held.base, held.size) == expected  # by faults, in turns


# ---- parts that go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2, 4])
def test_half_of_a_range_on_a_device_goes(mirror: Mirror, start: int) -> None:
    """`migrate_partial_unmap_fault`"""
    held = mirror.commit(8, seed=90)
    mirror.migrate(held, 0)
    held.decommit(start * mirror.granule, 4 * mirror.granule)
    for i in range(8):
        at = held.base + i * mirror.granule
        if start <= i < start + 4:
            with pytest.raises(uvas.DeviceError):
                mirror.read(0, at, 8)
        else:
            assert mirror.differ(HOST if i % 2 else 0, at, mirror.granule, 90 + i * mirror.granule // 8) == 0
    held.commit()
    for i in range(start, start + 4):  # anew
        assert mirror.read(1, held.base + i * mirror.granule, mirror.granule) == bytes(mirror.granule)


@pytest.mark.parametrize("way", ["detach", "fork", "death", "prefetch"])
def test_memory_with_two_protections_comes_home(fresh, way: str) -> None:
    """Beyond the rows: protection parts the host's mapping, and no call of the kernel's goes across."""
    mirror = fresh(2, granule=4096)
    held = mirror.commit(64, seed=None)
    mirror.fill(0, held.base, held.size, 5)
    for i in (1, 2, 7, 40):
        held.protect(i * mirror.granule, mirror.granule, "r")
    if way == "fork":
        seen = Child(lambda: mirror_differences(held, 5)).answer()
        assert seen == 0
    elif way == "detach":
        mirror.space.detach(mirror.devices[0])
    elif way == "death":
        os.kill(mirror.devices[0].pid, signal.SIGKILL)
        until(lambda: mirror.holds(held, HOST).all() or not mirror.private, "what the dead held comes home")
    else:
        mirror.migrate(held, HOST)
    assert mirror_differences(held, 5) == 0
    assert mirror.differ(1, held.base, held.size, 5) == 0


def test_memory_with_two_protections_is_evicted(private) -> None:
    """As above, of what has to leave a device."""
    mirror = private(1, granule=4096, capacity=64 * 4096)
    held = mirror.commit(256, seed=1)
    for i in range(3, 256, 5):
        held.protect(i * mirror.granule, mirror.granule, "r")
    for _ in range(2):
        assert mirror.differ(0, held.base, held.size, 1) == 0
    held.protect(0, held.size, "rw")
    mirror.fill(0, held.base, held.size, 2)
    assert mirror.differ(HOST, held.base, held.size, 2) == 0
