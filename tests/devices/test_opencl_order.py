"""What waits for what on an OpenCL device, and how it ends: by close, an interrupt, a fork, the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import opencl_in_tests
import opencl_kernels
import pytest
from machine import PAGE
from opencl_kernels import SOURCE

import uvas
from uvas.devices.opencl.launches import Launch

device, kernels, memory = opencl_kernels.device, opencl_kernels.kernels, opencl_kernels.memory


# ---- what waits for what ---------------------------------------------------------------------------------------------


class Gate:
    """Lets a kernel begin, and end when it is told to."""

    def __init__(self, memory: uvas.Reservation) -> None:
        self.words = memory.numpy("i4", 2, offset=15 * PAGE)
        self.words[:] = 0
        self.result = memory.numpy("i8", 1, offset=14 * PAGE)

    def wait_for_the_kernel(self) -> None:
        deadline = threading.Event()
        for _ in range(30_000):
            if self.words[1]:
                return
            deadline.wait(0.001)
        raise AssertionError("no kernel came")

    def open(self) -> None:
        self.words[0] = 1


def test_arrays_are_leased_while_the_kernel_runs(device, kernels, space, memory):
    gate = Gate(memory)
    with space.reserve(PAGE) as held:
        held.commit()
        array = held.numpy("i8", 1)
        array[0] = 77
        future = device.submit(kernels("when_open"), 1, None, gate.words, array, gate.result)
        del array
        gate.wait_for_the_kernel()
        try:
            with pytest.raises(BufferError):
                held.decommit()
            assert not future.done()
            assert not future.cancel()
        finally:
            gate.open()
        assert future.result(60) is None
        assert gate.result[0] == 77
        held.decommit()  # nobody holds it any more


def test_memory_is_given_back_after_kernels_that_may_follow_pointers_there(device, kernels, space, memory):
    gate = Gate(memory)
    with space.reserve(PAGE) as held:
        held.commit()
        held.numpy("i8", 1)[0] = 99
        future = device.submit(kernels("when_open"), 1, None, gate.words, held.base, gate.result)
        gate.wait_for_the_kernel()
        giving_back = threading.Thread(target=held.decommit)
        giving_back.start()
        giving_back.join(0.2)
        try:
            assert giving_back.is_alive()
            with pytest.raises(uvas.DeviceError):  # no new kernel is pointed there meanwhile
                device.read(held.base, 1)
        finally:
            gate.open()
        giving_back.join(60)
        assert not giving_back.is_alive()
        future.result(60)
        assert gate.result[0] == 99


def test_kernels_run_in_order_and_close_waits_for_them(kernels, device, space, memory):
    gate = Gate(memory)
    y = memory.numpy("f4", 10)
    y[:] = 1
    futures = [device.submit(kernels("when_open"), 1, None, gate.words, memory.base, gate.result)]
    futures += [device.submit(kernels("saxpy"), 10, None, y, y, 1) for _ in range(5)]
    closed_by = []
    futures[-1].add_done_callback(lambda _: (device.close(), closed_by.append(threading.current_thread())))
    gate.wait_for_the_kernel()
    assert not any(future.done() for future in futures)
    closing = threading.Thread(target=device.close)
    closing.start()
    gate.open()
    closing.join(60)
    assert all(future.done() for future in futures)
    assert (y == 32).all()
    assert closed_by
    for verb in (
        lambda: device.queue,
        lambda: device.context,
        lambda: device.read(memory.base, 1),
        lambda: device.kernel(SOURCE, "walk"),
        lambda: memory.commit(0, PAGE, protection="r"),
    ):
        with pytest.raises(uvas.ReleasedError, match="cl: it is closed"):
            verb()


def interrupt_in_the_wait() -> None:
    """Ctrl-C, as another process would send it, while the main thread is in the driver."""
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_before_the_wait(monkeypatch) -> None:
    """Ctrl-C when the kernel has been handed over, and nobody waits for it yet."""

    def interrupted(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Launch, "wait", interrupted)


@pytest.mark.parametrize("when", ["before the wait", "in the wait"])
def test_an_interrupt_does_not_leave_a_kernel_behind(device, kernels, memory, monkeypatch, when):
    gate, when_open = Gate(memory), kernels("when_open")
    memory.numpy("i8", 1)[0] = 55

    def interrupt_then_open() -> None:
        gate.wait_for_the_kernel()
        if when == "in the wait":
            interrupt_in_the_wait()
        time.sleep(0.2)
        gate.open()

    if when == "before the wait":
        interrupt_before_the_wait(monkeypatch)
    other = threading.Thread(target=interrupt_then_open)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        device.run(when_open, 1, None, gate.words, memory.base, gate.result)
    assert gate.result[0] == 55  # it has ended
    other.join()
    device.run(when_open, 1, None, gate.words, memory.base, gate.result)


def test_many_threads(device, kernels, space):
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            saxpy = device.kernel(SOURCE, "saxpy")
            with space.reserve(2 * PAGE) as held:
                held.commit()
                x, y = held.numpy("f4", 100), held.numpy("f4", 100, offset=PAGE)
                x[:], y[:] = number, 0
                for i in range(1, 31):
                    device.run(shared if number % 2 else saxpy, 100, None, x, y, number)
                    assert (y == i * number * number).all()
        except BaseException as error:
            failures.append(error)

    shared = kernels("saxpy")
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---- fork, and the end -----------------------------------------------------------------------------------------------


def test_in_a_forked_child_it_is_dead_and_the_parent_goes_on():
    program = f"""
        import os, sys
        import uvas
        device = uvas.OpenCLDevice(name="cl")
        space = uvas.AddressSpace([device])
        held = space.reserve(4096)
        held.commit()
        array = held.numpy("f4", 10)
        array[:] = 1
        saxpy = device.kernel({SOURCE!r}, "saxpy")
        device.run(saxpy, 10, None, array, array, 1)
        future = device.submit(saxpy, 10, None, array, array, 1)
        pid = os.fork()
        if pid == 0:
            verbs = (lambda: device.queue, lambda: device.context, lambda: device.read(held.base, 1),
                     lambda: device.run(saxpy, 10, None, array, array, 1), lambda: device.kernel("", "x"),
                     lambda: device.commit(held.range, uvas.Backing("anonymous", False, None, 0), "rw"))
            for verb in verbs:
                try:
                    verb()
                except uvas.ReleasedError as error:
                    assert "forked" in str(error), error
                else:
                    os._exit(3)
            device.decommit(held.range)
            device.close()
            sys.exit(7)  # with all destructors
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        future.result(60)
        device.run(saxpy, 10, None, array, array, 1)
        assert (array == 8).all()
        del array
        space.close()
        device.close()
    """
    opencl_in_tests.device().close()
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=os.environ.copy())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ending", ["device.close()", "pass", "del device", "raise SystemExit(0)"])
def test_every_way_to_end_while_a_kernel_is_under_way(ending):
    program = f"""
        import uvas
        device = uvas.OpenCLDevice(name="cl")
        space = uvas.AddressSpace([device])
        held = space.reserve(4096)
        held.commit()
        array = held.numpy("f4", 10)
        saxpy = device.kernel({SOURCE!r}, "saxpy")
        futures = [device.submit(saxpy, 10, None, array, array, 1) for _ in range(50)]
        {ending}
    """
    opencl_in_tests.device().close()
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
