"""A worker that dies is noticed at once by whoever waits and by the next call; the host's memory is untouched."""

from __future__ import annotations

import os
import pickle
import select
import signal
import threading
from pathlib import Path

import machine
import numpy as np
import on_device
import pytest

import uvas

PAGE = machine.PAGE


@pytest.fixture
def doomed(memory):
    """A worker to be killed, in a space with a reservation that is in use."""
    with (
        uvas.ProcessDevice(name="doomed", **memory) as device,
        uvas.AddressSpace([device]) as space,
        space.reserve(1 << 20) as held,
    ):
        held.commit()
        array = held.numpy("i8")
        array[:] = np.arange(array.size)
        yield device, space, held
        assert (array == np.arange(array.size)).all(), "the host's memory changed"
        array[:] = 1  # and it is the host's still
        del array


def kill(device: uvas.ProcessDevice) -> None:
    os.kill(device.pid, signal.SIGKILL)


def wait_until_dead(pid: int) -> None:
    """Wait for the end of a process of whoever's."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor) as end:
        assert select.select([end], [], [], 30)[0]


def every_verb(device: uvas.ProcessDevice, space: uvas.AddressSpace, held: uvas.Reservation):
    part = uvas.Range(held.base, PAGE)
    return {
        "reserve": lambda: space.reserve(PAGE),
        "protect": lambda: held.protect(0, PAGE, "r"),
        "claim": lambda: device.claim(uvas.Range(held.end, PAGE)),
        "protect directly": lambda: device.protect(part, "r"),
        "read": lambda: device.read(held.base, 8),
        "write": lambda: device.write(held.base, bytes(8)),
        "submit": lambda: device.submit(on_device.double, 1).result(),
        "run": lambda: device.run(on_device.double, 1),
        "attach": lambda: attach_elsewhere(device),
    }


def attach_elsewhere(device: uvas.ProcessDevice) -> None:
    with uvas.AddressSpace() as other, other.reserve(PAGE):
        other.attach(device)


VERBS = ["reserve", "protect", "claim", "protect directly", "read", "write", "submit", "run", "attach"]


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_call_says_so(doomed, verb):
    device, space, held = doomed
    device.run(on_device.process_id)
    kill(device)
    wait_until_dead(device.pid)
    with pytest.raises(uvas.DeviceLostError, match=rf"doomed.*process {device.pid}.*SIGKILL") as caught:
        every_verb(device, space, held)[verb]()
    assert caught.value.code == -9
    assert caught.value.name == "SIGKILL"
    assert caught.value.device == "doomed"
    assert caught.value.lost == ((uvas.Range(held.base, 8),) if verb == "write" else ())


@pytest.mark.parametrize("verb", VERBS)
def test_a_call_into_a_stopped_worker_that_is_killed_ends_at_once(doomed, verb, pipe):
    device, space, held = doomed
    stopping = device.submit(on_device.stop_answering, pipe)
    with open(pipe):
        pass
    wait_for_state(device.pid, "T")
    outcome: list[BaseException] = []
    started = threading.Event()

    def call() -> None:
        started.set()
        try:
            outcome.append(AssertionError(f"it returned {every_verb(device, space, held)[verb]()}"))
        except BaseException as error:
            outcome.append(error)

    waiting = threading.Thread(target=call)
    waiting.start()
    started.wait()
    kill(device)
    waiting.join(30)
    assert [type(error) for error in outcome] == [uvas.DeviceLostError]
    assert isinstance(stopping.exception(30), uvas.DeviceLostError)


def wait_for_state(pid: int, state: str) -> None:
    """Wait until the kernel says so: there is no event for another process's stop but for its parent."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        os.sched_yield()


def test_many_threads_that_wait_are_all_told(doomed, pipe):
    device, space, held = doomed
    stopping = device.submit(on_device.stop_answering, pipe)
    with open(pipe):
        pass
    wait_for_state(device.pid, "T")
    outcome: list[type] = []

    def call(i: int) -> None:
        try:
            (lambda: space.reserve(PAGE), lambda: device.read(held.base, 8))[i % 2]()
        except BaseException as error:
            outcome.append(type(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    futures = [device.submit(on_device.double, i) for i in range(10)]
    for thread in threads:
        thread.start()
    kill(device)
    for thread in threads:
        thread.join(30)
    assert outcome == [uvas.DeviceLostError] * 16
    for future in [stopping, *futures]:
        assert isinstance(future.exception(30), uvas.DeviceLostError)


@pytest.mark.parametrize(
    ("how", "code", "said"), [("exit", 7, "exit code 7"), ("SIGSEGV", -11, "SIGSEGV"), ("SIGTERM", -15, "SIGTERM")]
)
def test_a_function_that_ends_the_worker(doomed, how, code, said):
    device, _, _ = doomed
    at_work = device.submit(on_device.kill_yourself, how, 0.2)  # the next one is submitted before
    after = device.submit(on_device.double, 1)
    for future in (at_work, after):
        error = future.exception(30)
        assert isinstance(error, uvas.DeviceLostError)
        assert error.code == code
        assert said in str(error)


def test_a_killed_worker_whose_child_has_its_descriptors(doomed):
    device, space, _ = doomed
    with pytest.raises(uvas.DeviceLostError, match="exit code 5"):
        device.run(on_device.leave_a_child_and_die)
    with pytest.raises(uvas.DeviceLostError):
        space.reserve(PAGE)
    os.killpg(device.pid, signal.SIGKILL)  # the child is of the worker's process group


def test_what_the_worker_held_is_given_back_without_it(doomed):
    device, space, held = doomed
    kill(device)
    wait_until_dead(device.pid)
    with pytest.raises(uvas.DeviceLostError):
        device.read(held.base, 1)
    device.decommit(uvas.Range(held.base, PAGE))  # nothing is held there any more
    device.unclaim(uvas.Range(held.end, PAGE))
    space.detach(device)
    with space.reserve(PAGE) as alone:
        alone.commit()
        alone.numpy("u1")[:] = 1


def test_a_space_closes_although_its_device_is_lost():
    device = uvas.ProcessDevice()
    space = uvas.AddressSpace([device])
    held = space.reserve(PAGE)
    held.commit()
    kill(device)
    held.decommit()
    held.release()
    space.close()
    device.close()


def test_a_reservation_after_the_loss_leaves_nothing(doomed, memory):
    device, space, _ = doomed
    with uvas.ProcessDevice(name="healthy", **memory) as healthy:
        space.attach(healthy)
        with space.reserve(PAGE) as free:
            wanted = free.range
        kill(device)
        before = space.stats().reserved_bytes, [held.range for held in space.ranges()]
        for _ in range(3):
            with pytest.raises(uvas.DeviceLostError):
                space.reserve(PAGE, at=wanted.base)
        assert (space.stats().reserved_bytes, [held.range for held in space.ranges()]) == before
        healthy.claim(wanted)  # nobody forgot it there
        healthy.unclaim(wanted)
        space.detach(healthy)


def use(device: uvas.ProcessDevice, space: uvas.AddressSpace, ready: threading.Barrier, outcomes: list) -> None:
    """Go through all verbs until one fails."""
    ready.wait()
    try:
        while True:
            with space.reserve(4 * PAGE) as held:
                held.commit(PAGE, PAGE)
                array = held.numpy("u1", PAGE, offset=PAGE)
                array[:] = 5
                assert device.run(on_device.total, array) == 5 * PAGE
                assert array.sum() == 5 * PAGE
                del array
                held.decommit()
    except BaseException as error:
        outcomes.append(type(error))  # the error itself has frames, and those have arrays


def test_killed_at_random_moments():
    """Nothing hangs, and every outcome is a success or DeviceLostError."""
    for round_ in range(15):
        device = uvas.ProcessDevice()
        space = uvas.AddressSpace([device], backing="memfd")
        outcomes: list[type] = []
        ready = threading.Barrier(5)

        threads = [threading.Thread(target=use, args=(device, space, ready, outcomes)) for _ in range(4)]
        for thread in threads:
            thread.start()
        device.run(on_device.process_id)
        ready.wait()
        for _ in range(round_ * 3):  # a moment that differs from round to round
            device.read(device.run(on_device.map_somewhere, PAGE), 1)
        kill(device)
        for thread in threads:
            thread.join(60)
        assert outcomes == [uvas.DeviceLostError] * 4
        space.check()
        space.close()
        device.close()


def test_the_error_survives_pickling(doomed):
    device, _, held = doomed
    kill(device)
    wait_until_dead(device.pid)
    with pytest.raises(uvas.DeviceLostError) as caught:
        device.read(held.base, 1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.code, again.name) == (str(caught.value), -9, "SIGKILL")
