"""What a worker with memory of its own promises beside the contract of all devices.

Its options, its granule, whose company it can live in, and what it says where the kernel does not let it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
import on_device
import pytest
from machine import PAGE
from mirror import PATIENCE_S, in_thread

import uvas

TESTS = str(Path(__file__).parents[1])
KIB, MIB = 1 << 10, 1 << 20


def private(**options) -> uvas.ProcessDevice:
    return uvas.ProcessDevice(name="own", memory="private", **options)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_what_it_declares():
    with private() as device, private(granule=2 * MIB, capacity=64 * MIB) as other:
        assert device.info.placement == "claims"
        assert "anonymous" in device.info.backings
        assert device.info.granularity == 64 * KIB
        assert device.info.memory == "private"
        assert device.info.details["capacity"] is None
        assert other.info.granularity == 2 * MIB
        assert other.info.details["capacity"] == 64 * MIB


@pytest.mark.parametrize("granule", [0, 1, PAGE - 1, PAGE + 1, 3 * PAGE, 2 * KIB, 4 * MIB, -PAGE])
def test_a_granule_that_cannot_be(granule):
    with pytest.raises(ValueError, match="granule"):
        private(granule=granule)


@pytest.mark.parametrize("capacity", [0, -1, PAGE - 1, 1 << 50, 1 << 70])
def test_a_capacity_that_cannot_be(capacity):
    with pytest.raises(ValueError, match="capacity"):
        private(capacity=capacity)


@pytest.mark.parametrize("options", [{"granule": PAGE}, {"capacity": MIB}])
def test_shared_memory_has_no_such_options(options):
    with pytest.raises(ValueError, match="private"):
        uvas.ProcessDevice(memory="shared", **options)


# ---- the granule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [4 * KIB, 64 * KIB, 2 * MIB])
def test_everything_is_a_multiple_of_the_granule(granule):
    with private(granule=granule) as device, uvas.AddressSpace([device]) as space, space.reserve(3 * granule) as held:
        assert held.base % granule == 0
        with space.reserve(1) as small:
            assert small.size == granule
        held.commit()
        if granule > PAGE:
            for verb in (
                lambda: held.decommit(0, PAGE),
                lambda: held.decommit(PAGE, granule),
                lambda: held.commit(0, granule + PAGE),
                lambda: held.protect(PAGE, granule, "r"),
            ):
                with pytest.raises(ValueError, match=f"{granule:#x}"):
                    verb()
        held.decommit(granule, granule)
        array = held.numpy("u8", granule // 8)
        device.run(on_device.fill, array, 7)
        assert (array == 7).all()
        del array


# ---- company ---------------------------------------------------------------------------------------------------------


def test_all_private_devices_of_a_space_have_one_granule():
    with private(granule=4 * KIB) as one, uvas.ProcessDevice(name="other", memory="private", granule=8 * KIB) as two:
        with uvas.AddressSpace([one]) as space:
            with pytest.raises(uvas.NotSupportedError, match="device other moves 0x2000 bytes at once"):
                space.attach(two)
            assert space.devices == (one,)
        with uvas.AddressSpace([two]) as space, space.reserve(PAGE) as held:
            assert held.size == 8 * KIB


def test_shared_and_private_memory_do_not_go_together():
    with private() as one, uvas.ProcessDevice(name="shares") as two:
        for first, second in ((one, two), (two, one)):
            with uvas.AddressSpace([first]) as space:
                with pytest.raises(uvas.NotSupportedError, match=r"own.*shares|shares.*own"):
                    space.attach(second)
                assert space.devices == (first,)


def test_a_space_whose_memory_is_shared_is_not_for_it():
    with private(granule=PAGE) as device:
        with pytest.raises(uvas.NotSupportedError):
            uvas.AddressSpace([device], backing="memfd")
        with uvas.AddressSpace(backing="memfd") as space, space.reserve(PAGE) as held:
            held.commit()
            with pytest.raises(uvas.NotSupportedError):
                space.attach(device)
            assert space.devices == ()


def test_one_device_in_two_spaces():
    with (
        private(granule=PAGE) as device,
        uvas.AddressSpace([device], name="one") as one,
        uvas.AddressSpace([device], name="two") as two,
        one.reserve(4 * PAGE) as first,
        two.reserve(4 * PAGE) as second,
    ):
        for held in (first, second):
            held.commit()
            array = held.numpy("u8", 4 * PAGE // 8)
            device.run(on_device.fill, array, held.base)
            assert (array == held.base).all()
            del array


def test_the_capacity_is_for_all_spaces_together():
    """Two spaces fill the device in turns; one of them leaves with what it has there, and comes back."""
    with private(granule=PAGE, capacity=16 * PAGE) as device, uvas.AddressSpace([device]) as first:

        def resident(*spaces: uvas.AddressSpace) -> int:
            return sum(space.movement().devices["own"].resident_bytes for space in spaces)

        with first.reserve(64 * PAGE) as held:
            held.commit()
            array = held.numpy("u8")
            array[:] = np.arange(len(array))
            for turn in range(3):
                with uvas.AddressSpace([device]) as second, second.reserve(16 * PAGE) as other:
                    other.commit()
                    beside = other.numpy("u8")
                    for part in range(4):
                        beside[:] = part
                        second.prefetch(other, device)  # all of it, whatever the first space has there
                        assert resident(first, second) == resident(second) == 16 * PAGE
                        piece = array[part * 16 * 512 :][: 16 * 512]
                        device.run(on_device.fill, piece, turn + part)
                        assert 0 < resident(first, second) <= 16 * PAGE
                        assert (beside == part).all()
                        assert (piece == turn + part).all()
                    assert resident(second) + resident(first) <= 16 * PAGE
                    del beside
                device.run(on_device.fill, array, turn)  # four times what there is room for
                assert resident(first) == 16 * PAGE
                assert (array == turn).all()
            assert first.movement().devices["own"].evictions > 64
            del array, piece


def test_a_device_that_comes_and_goes_leaves_no_trace_in_its_room():
    """What it had in a space that it left is in no line for eviction: all that it has later can still be pushed out."""
    with (
        private(granule=PAGE, capacity=16 * PAGE) as device,
        uvas.AddressSpace([device]) as stays,
        uvas.AddressSpace() as leaves,
        stays.reserve(16 * PAGE) as other,
        leaves.reserve(16 * PAGE) as held,
    ):
        held.commit()
        other.commit()
        for _ in range(150):  # more traces than there is slack for
            leaves.attach(device)
            leaves.prefetch(uvas.Range(held.base, 8 * PAGE), device)
            leaves.detach(device)
        leaves.attach(device)
        leaves.prefetch(held, device)
        stays.prefetch(other, device)
        assert leaves.movement().devices["own"].resident_bytes == 0
        assert stays.movement().devices["own"].resident_bytes == 16 * PAGE


class WithOtherCapacity:
    """A device that does not say the same in each space."""

    def __init__(self, device: uvas.ProcessDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    def lend_memory(self) -> object:
        return dataclasses.replace(self._device.lend_memory(), capacity=32 * PAGE)


def test_a_device_that_has_another_capacity_in_another_space():
    with private(granule=PAGE, capacity=16 * PAGE) as device, uvas.AddressSpace([device]) as space:
        with uvas.AddressSpace() as other:
            with pytest.raises(ValueError, match="own is in another space with another capacity"):
                other.attach(WithOtherCapacity(device))
            assert other.devices == ()
            other.attach(device)
        space.check()


def test_the_largest_capacity_and_two_of_one_name():
    """The traffic of each is told."""
    with (
        private(granule=PAGE, capacity=((1 << 30) - 2) * PAGE) as largest,
        private(granule=PAGE) as other,
        uvas.AddressSpace([largest, other]) as space,
        space.reserve(4 * PAGE) as held,
    ):
        held.commit()
        space.prefetch(uvas.Range(held.base, PAGE), largest)
        space.prefetch(uvas.Range(held.base + PAGE, 2 * PAGE), other)
        moved = space.movement().devices
        assert {name: one.resident_bytes for name, one in moved.items()} == {"own": PAGE, "own (2)": 2 * PAGE}


def test_it_comes_to_a_space_with_memory_and_goes_again():
    with private(granule=PAGE) as device, uvas.AddressSpace() as space, space.reserve(8 * PAGE) as held:
        held.commit(0, 4 * PAGE)
        array = held.numpy("u8", 4 * PAGE // 8)
        array[:] = np.arange(len(array))
        for _ in range(3):
            space.attach(device)
            assert device.run(on_device.total, array) == len(array) * (len(array) - 1) // 2
            device.run(on_device.fill, array[:10], 5)
            space.detach(device)
            assert (array[:10] == 5).all()
            array[:10] = np.arange(10)
        del array


# ---- without descriptors ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def descriptors_left(room: int) -> Iterator[None]:
    """Let this process open so many more, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.dup(1)]  # of the numbers below the highest that are free
    while fillers[-1] < highest:
        fillers.append(os.dup(1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in fillers:
            os.close(one)


@pytest.mark.parametrize("verb", ["attach", "reserve", "where"])
def test_without_a_descriptor_to_be_had_nothing_has_changed(verb: str):
    with (
        private(granule=PAGE) as device,
        uvas.ProcessDevice(name="late", memory="private", granule=PAGE) as late,
        uvas.AddressSpace([device]) as space,
        space.reserve(8 * PAGE) as held,
    ):
        held.commit()
        array = held.numpy("u8")
        device.run(on_device.fill, array, 7)

        def attempt() -> None:
            if verb == "attach":
                space.attach(late)
                space.detach(late)
            elif verb == "reserve":
                with space.reserve(4 * PAGE) as other:
                    other.commit()
                    space.prefetch(other, device)
            else:
                assert (space.where(held) == uvas.PageFlag.device(1)).all()

        attempt()
        limits, worked, room = [], False, 0
        while not worked:
            before, stats = machine.descriptors(), space.stats()
            with descriptors_left(room):
                try:
                    attempt()
                    worked = True
                except uvas.LimitReachedError as error:
                    limits.append(error.limit)
            assert machine.descriptors() == before
            assert space.devices == (device,)
            assert space.stats().reservations == stats.reservations
            assert space.stats().committed_bytes == stats.committed_bytes
            assert device.run(on_device.total, array) == 7 * len(array)
            room += 1
            assert room < 32
        assert set(limits) == {"RLIMIT_NOFILE"}
        attempt()
        device.run(on_device.fill, array, 8)
        assert (array == 8).all()
        space.check()
        del array


# ---- what waits ------------------------------------------------------------------------------------------------------


def test_a_fault_that_waits_for_long_is_named(capfd: pytest.CaptureFixture[str]):
    """Ten seconds are long."""
    with private() as device, uvas.AddressSpace([device]) as space, space.reserve(64 * KIB) as held:
        held.commit()
        said, end = "", time.monotonic() + PATIENCE_S
        with space.pin_host(held):
            reading = in_thread(device.read, held.base, 8)
            while "\n" not in said and time.monotonic() < end:
                time.sleep(0.1)
                said += capfd.readouterr().err
        assert re.fullmatch(
            rf"uvas: thread \d+ of own has waited for 1\d s for the page at {held.base:#x}: pin_host has it .*\n", said
        )
        assert reading.result(PATIENCE_S) == bytes(8)


# ---- where it may not ------------------------------------------------------------------------------------------------


def elsewhere(*, user_mode: bool, program: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that may not have all of userfaultfd."""
    head = f"import sys; sys.path.append({TESTS!r}); import privileges; privileges.deny_userfaultfd({user_mode=})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ))


def test_without_the_privilege_it_says_what_would_help_and_shared_works():
    done = elsewhere(
        user_mode=False,
        program="""
        import uvas
        try:
            with uvas.ProcessDevice(memory="private") as device, uvas.AddressSpace([device]):
                print("it was to be had")
        except uvas.NotSupportedError as refusal:
            print(refusal.remedy)
        with uvas.ProcessDevice(memory="shared") as device:
            print(device.run(abs, -3))
        """,
    )
    assert done.returncode == 0, done.stderr
    remedy, shared = done.stdout.splitlines()
    assert "vm.unprivileged_userfaultfd" in remedy
    assert "/dev/userfaultfd" in remedy
    assert 'memory="shared"' in remedy
    assert shared == "3"


def test_in_user_mode_system_calls_need_the_memory_at_home():
    """Code waits for pages; a system call would get EFAULT. It is said once, with the remedy."""
    done = elsewhere(
        user_mode=True,
        program="""
        import os, uvas, warnings
        warnings.simplefilter("always")
        for _ in range(2):
            with uvas.ProcessDevice(memory="private") as device, uvas.AddressSpace([device]) as space:
                held = space.reserve(1 << 20)
                held.commit()
                array = held.numpy("u1")
                array[:] = 7
                space.prefetch(array, device)
                reading, writing = os.pipe()
                try:
                    os.write(writing, memoryview(array)[:4096])
                    print("written")
                except OSError as refusal:
                    print(refusal.errno)
                with space.pin_host(array):
                    print(os.write(writing, memoryview(array)[:4096]))
                space.prefetch(array, device)
                print(array.sum() == 7 << 20)  # code waits
                del array
                held.release()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["14", "4096", "True"] * 2
    said = [line for line in done.stderr.splitlines() if "pin_host" in line]
    assert len(said) == 1, done.stderr
    assert "vm.unprivileged_userfaultfd" in said[0]
