"""How workers start and end: what the constructor promises, closing, collection, and what is left."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import machine
import on_device
import pytest
from machine import PAGE
from workers_in_tests import ended, open_on, python

import uvas

# ---- the constructor -------------------------------------------------------------------------------------------------


def test_it_does_not_wait_for_the_worker():
    """The constructor returns although the worker cannot even say hello."""
    device = uvas.ProcessDevice()
    os.kill(device.pid, signal.SIGSTOP)
    future = device.submit(on_device.double, 4)
    assert not future.done()
    os.kill(device.pid, signal.SIGCONT)
    assert future.result() == 8
    device.close()


def test_names():
    with uvas.ProcessDevice() as one, uvas.ProcessDevice() as two, uvas.ProcessDevice(name="mine") as mine:
        assert one.info.name != two.info.name
        assert mine.info.name == "mine"
        assert mine.info.details == {"pid": mine.pid}
        assert mine.info.memory == "shared"
        assert "mine" in repr(mine)
        assert str(mine.pid) in repr(mine)
        assert mine.run(on_device.process_id) == mine.pid
        command = Path(f"/proc/{mine.pid}/cmdline").read_bytes().split(b"\0")
        assert command[-3:-1] == [b"uvas-worker", b"mine"]


def test_there_is_no_such_memory():
    with pytest.raises(ValueError, match="'borrowed'"):
        uvas.ProcessDevice(memory="borrowed")
    with pytest.raises(ValueError, match="of private memory"):
        uvas.ProcessDevice(granule=4096)
    with pytest.raises(ValueError, match="0x3000"):
        uvas.ProcessDevice(memory="private", granule=0x3000)
    with pytest.raises(ValueError, match="no room for a granule"):
        uvas.ProcessDevice(memory="private", capacity=4096)


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "uvas").mkdir()
    (tmp_path / "uvas" / "__init__.py").write_text("raise ImportError('not this one')")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        device = uvas.ProcessDevice(name="stillborn")
    with uvas.AddressSpace([device]) as space:
        with pytest.raises(
            uvas.DeviceLostError, match=r"(?s)stillborn.*before it was ready.*ImportError: not this one"
        ):
            space.reserve(PAGE)
        with pytest.raises(uvas.DeviceLostError, match="not this one"):
            device.run(on_device.double, 1)
    device.close()


def test_no_such_interpreter_leaves_nothing(monkeypatch):
    monkeypatch.setattr(multiprocessing.spawn, "get_executable", lambda: "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        uvas.ProcessDevice()


def test_without_a_descriptor_to_be_had_nothing_is_left():
    import resource

    make = uvas.ProcessDevice  # imported while there are descriptors
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.dup(1)]  # of the numbers below the highest that are free
    while fillers[-1] < highest:
        fillers.append(os.dup(1))
    highest = max(highest, fillers[-1])
    failures, limits = 0, set()
    for room in range(16):
        before = machine.descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, hard))
        try:
            device = make()
        except uvas.LimitReachedError as error:
            limits.add(error.limit)
            device = None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if device is None:
            failures += 1
            assert machine.descriptors() == before
        else:
            assert device.run(on_device.double, 1) == 2
            device.close()
    for one in fillers:
        os.close(one)
    assert 3 < failures < 16
    assert limits == {"RLIMIT_NOFILE"}


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_a_closed_device_is_dead():
    device = uvas.ProcessDevice(name="closed")
    device.run(on_device.double, 1)
    device.close()
    device.close()
    assert ended(device.pid)
    part = uvas.Range(0x10000, PAGE)
    for call in (
        lambda: device.submit(on_device.double, 1),
        lambda: device.run(on_device.double, 1),
        lambda: device.read(0x10000, 1),
        lambda: device.write(0x10000, b"x"),
        lambda: device.claim(part),
        lambda: device.protect(part, "r"),
    ):
        with pytest.raises(uvas.ReleasedError, match="closed is closed"):
            call()
    device.unclaim(part)
    device.decommit(part)


def test_closing_at_once():
    uvas.ProcessDevice().close()


def test_closing_at_once_says_nothing():
    done = python("-c", "import uvas\nfor _ in range(5): uvas.ProcessDevice().close()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_closing_lets_the_call_at_work_end_and_cancels_those_that_wait(pipe):
    device = uvas.ProcessDevice()
    at_work = device.submit(on_device.waits_for, pipe)
    waiting = [device.submit(on_device.double, i) for i in range(3)]
    writer = threading.Thread(target=lambda: (waiting[-1].exception if waiting[-1].cancelled() else None, feed(pipe)))
    waiting[-1].add_done_callback(lambda _: writer.start())  # it is cancelled: closing has begun
    device.close()
    assert at_work.result(0) == "go on"
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(0)
    writer.join()


def feed(pipe: str) -> None:
    with open(pipe, "w") as end:
        end.write("go on")


def test_closing_is_bounded(monkeypatch, pipe):
    monkeypatch.setattr("uvas.devices.process._CLOSE_S", 0.1)
    device = uvas.ProcessDevice()
    at_work = device.submit(on_device.started_and_hangs, pipe)
    with open(pipe):
        pass
    device.close()
    assert ended(device.pid)
    with pytest.raises(uvas.ReleasedError, match="is closed"):
        at_work.result(0)


def test_many_threads_close():
    device = uvas.ProcessDevice()
    threads = [threading.Thread(target=device.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_callback_may_close():
    device = uvas.ProcessDevice()
    device.submit(on_device.double, 1).add_done_callback(lambda _: device.close())
    assert ended(device.pid)
    device.close()
    with pytest.raises(uvas.ReleasedError):
        device.run(on_device.double, 1)


def test_collected_devices_end():
    device = uvas.ProcessDevice()
    pid = device.pid
    watcher = next(thread for thread in threading.enumerate() if device.info.name in thread.name)
    device.run(on_device.double, 1)
    del device
    gc.collect()
    assert ended(pid)
    watcher.join(30)
    assert not watcher.is_alive()


def test_a_call_keeps_its_device_alive(pipe):
    future = uvas.ProcessDevice().submit(on_device.waits_for, pipe)
    gc.collect()
    feed(pipe)
    assert future.result(30) == "go on"
    watchers = [thread for thread in threading.enumerate() if thread.name.startswith("uvas-watch")]
    gc.collect()
    for watcher in watchers:
        watcher.join(30)


def test_again_and_again():
    """A hundred workers with UVAS_FULL=1, else twenty: nothing here is chance, and what is left shows in one."""
    for _ in range(50 if os.environ.get("UVAS_FULL") == "1" else 10):
        with uvas.ProcessDevice() as one, uvas.ProcessDevice() as two:
            assert one.run(on_device.double, 1) == two.run(on_device.double, 1) == 2


def test_the_worker_leaks_no_descriptor(device, space):
    def use() -> list[str]:
        with space.reserve(16 * PAGE) as held:
            for i in range(0, 16, 2):
                held.commit(i * PAGE, PAGE)
            held.decommit()
        return open_on(device)

    assert use() == use() == use()
