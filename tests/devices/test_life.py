"""How workers start and end: closing, collection, interpreter exit, fork, a parent that is killed, scripts."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import machine
import on_device
import pytest

import uvas
from uvas.devices import link

PAGE = machine.PAGE
TESTS = str(Path(__file__).parents[1])


def ended(pid: int) -> bool:
    """Wait for the end of a process."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor) as end:
        return bool(select.select([end], [], [], 30)[0])


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python on something."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, TESTS]), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
        **options,
    )


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


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


# ---- four at once ----------------------------------------------------------------------------------------------------


def test_four_devices_agree():
    devices = [uvas.ProcessDevice(name=f"gpu{i}") for i in range(4)]
    with uvas.AddressSpace(devices) as space:
        with space.reserve(1 << 20) as held:
            held.commit()
            array = held.numpy("i8", 1000)
            for i, device in enumerate(devices):
                device.run(on_device.fill, array[i::4], i + 1)
            assert array.tolist() == [1, 2, 3, 4] * 250
            totals = [device.submit(on_device.total, array) for device in devices]
            assert [future.result() for future in totals] == [2500] * 4
            del array
        planted = []
        for i, device in enumerate(devices):  # each of them is in the way somewhere
            with space.reserve(1 << 20) as held:
                planted.append(held.range)
            assert device.run(on_device.plant, held.base, 1 << 20), i
        with space.reserve(1 << 20) as held:
            assert not any(held.range.overlaps(one) for one in planted)
        for device, one in zip(devices, planted, strict=True):
            assert device.run(on_device.planted_is_intact, one.base, one.size)
    for device in devices:
        device.close()


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_read_and_write(device, space):
    with space.reserve(4 << 20) as held:
        held.commit()
        data = os.urandom(3 << 20)
        device.write(held.base + 1, data)
        assert held.numpy("u1", len(data), offset=1).tobytes() == data
        assert device.read(held.base + 1, len(data)) == data
        assert device.read(held.base, 0) == b""
        device.write(held.base, memoryview(b"abcd")[::1])
        assert device.read(held.base, 4) == b"abcd"


def test_a_bad_address_is_an_error_and_the_worker_lives(device, space):
    with space.reserve(2 * PAGE) as held:
        for call in (lambda: device.read(held.base, 1), lambda: device.write(held.base, b"x")):
            with pytest.raises(uvas.DeviceError, match=rf"gpu0 cannot .* \[{held.base:#x}, .*EFAULT") as caught:
                call()
            assert not isinstance(caught.value, uvas.DeviceLostError)
        held.commit(0, PAGE, protection="r")
        assert device.read(held.base, 2) == b"\0\0"
        with pytest.raises(uvas.DeviceError):
            device.write(held.base, b"x")
        with pytest.raises(uvas.DeviceError):
            device.read(held.base + PAGE - 1, 2)
        assert device.read(held.base, 2) == b"\0\0"
        held.protect(0, PAGE, "rw")
        device.write(held.base, b"x")
        assert device.read(held.base, 2) == b"x\0"
    for address, size in ((0, 1), (-1, 1), (1 << 64, 1), ((1 << 64) - 1, 2), (0x1000, -1)):
        with pytest.raises(ValueError, match="0x"):
            device.read(address, size)
    with pytest.raises(uvas.DeviceError):
        device.read((1 << 64) - 1, 1)
    assert device.run(on_device.process_id) == device.pid


# ---- fork ------------------------------------------------------------------------------------------------------------


def in_a_fork(work) -> dict:
    """Return what `work` answers in a forked child, which then ends as Python does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            answer = json.dumps(work()).encode()
        except BaseException as error:
            answer = json.dumps({"error": repr(error)}).encode()
        os.write(writing, answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as end:
        answer = json.loads(end.read())
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_in_a_forked_child_the_device_is_dead(device, space):
    with space.reserve(PAGE) as held:
        held.commit()

        def child() -> dict:
            said = []
            for call in (
                lambda: device.submit(on_device.double, 1),
                lambda: device.read(held.base, 1),
                lambda: device.claim(uvas.Range(held.end, PAGE)),
            ):
                try:
                    call()
                except uvas.ReleasedError as error:
                    said.append(str(error))
            device.close()
            sockets = [one for one in machine.descriptors() if "socket:" in one or "pidfd" in one]
            with uvas.ProcessDevice() as own, uvas.AddressSpace([own]) as space, space.reserve(PAGE):
                answer = own.run(on_device.double, 4)
            return {"said": said, "left": sockets, "answer": answer}

        seen = in_a_fork(child)
        assert len(seen["said"]) == 3
        assert all(f"belongs to process {os.getpid()}" in sentence for sentence in seen["said"])
        assert seen["answer"] == 8
        mine = {one for one in machine.descriptors() if "socket:" in one or "pidfd" in one}
        assert len(set(seen["left"]) & mine) <= len(mine) - 5  # the device's own copies were given back
        assert device.run(on_device.double, 2) == 4  # and the parent's worker is undisturbed
        assert device.read(held.base, 1) == b"\0"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_that_outlives_close(device):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    device.close()
    assert ended(device.pid)
    os.close(writing)
    os.close(reading)
    os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_multiprocessing_by_fork(device):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=os.getpid)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert device.run(on_device.double, 2) == 4


def test_the_start_method_stays_the_users_to_choose(tmp_path):
    path = script(
        tmp_path,
        """
        import multiprocessing, uvas
        if __name__ == "__main__":
            with uvas.ProcessDevice() as device:
                assert device.run(int) == 0
                assert multiprocessing.get_start_method(allow_none=True) is None
                multiprocessing.set_start_method("spawn")
        """,
    )
    assert python(path).returncode == 0


# ---- the host ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "exception", "sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)", "busy"])
def test_no_worker_outlives_its_host(tmp_path, how):
    path = script(
        tmp_path,
        f"""
        import os, sys, uvas, on_device
        if __name__ == "__main__":
            how = {how!r}
            devices = [uvas.ProcessDevice() for _ in range(2)]
            space = uvas.AddressSpace(devices)
            held = space.reserve(1 << 20)
            held.commit()
            print(*(device.pid for device in devices), flush=True)
            if how == "exception":
                raise KeyError("on purpose")
            if how == "busy":
                os.mkfifo({str(tmp_path / "pipe")!r})
                future = devices[0].submit(on_device.started_and_hangs, {str(tmp_path / "pipe")!r})
                open({str(tmp_path / "pipe")!r}).close()
            elif how != "end":
                exec(how)
            if how in ("end", "busy"):
                held.release()
                space.close()
        """,
    )
    done = python(path)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)
    assert done.returncode == {"end": 0, "busy": 0, "exception": 1, "os.kill(os.getpid(), 9)": -9}.get(how, 3)
    if how in ("end", "busy"):
        assert done.stderr == ""
    elif how == "exception":
        assert "on purpose" in done.stderr
        assert "uvas-" not in done.stderr


def test_no_worker_outlives_a_host_that_is_killed_while_it_starts(tmp_path):
    path = script(
        tmp_path,
        """
        import os, signal, uvas
        if __name__ == "__main__":
            print(uvas.ProcessDevice().pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    done = python(path)
    assert done.returncode == -9
    assert ended(int(done.stdout))
    assert done.stderr == ""


def test_no_worker_outlives_the_thread_that_made_it_too_early():
    made = []
    thread = threading.Thread(target=lambda: made.append(uvas.ProcessDevice()))
    thread.start()
    thread.join()
    assert made[0].run(on_device.double, 1) == 2
    made[0].close()


def test_an_interrupt_is_for_the_host(tmp_path):
    """Ctrl-C in a terminal goes to the whole foreground group; the worker goes on."""
    path = script(
        tmp_path,
        """
        import os, signal, uvas, on_device
        if __name__ == "__main__":
            with uvas.ProcessDevice() as device:
                try:
                    future = device.submit(on_device.waits_for, "pipe")
                    os.killpg(os.getpgrp(), signal.SIGINT)
                    future.result()
                except KeyboardInterrupt:
                    with open("pipe", "w") as end:
                        end.write("unharmed")
                    print(future.result())
        """,
    )
    os.mkfifo(tmp_path / "pipe")
    done = python(path, cwd=tmp_path, start_new_session=True)
    assert (done.stdout, done.stderr, done.returncode) == ("unharmed\n", "", 0)


# ---- where functions come from ---------------------------------------------------------------------------------------

MAIN = """
    import uvas
    def triple(number):
        return 3 * number
    class Pair:
        def __init__(self, a):
            self.a = a
    def make(a):
        return Pair(a)
    if __name__ == "__main__":
        with uvas.ProcessDevice() as device:
            print(device.run(triple, 5), device.run(make, 7).a, type(device.run(make, 7)).__name__)
"""


def test_functions_of_a_script(tmp_path):
    done = python(script(tmp_path, MAIN))
    assert (done.stdout, done.stderr) == ("15 7 Pair\n", "")


def test_functions_of_a_module_that_is_run(tmp_path):
    (tmp_path / "runnable.py").write_text(textwrap.dedent(MAIN))
    done = python("-m", "runnable", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("15 7 Pair\n", "")


def test_main_is_imported_only_when_it_is_needed(tmp_path):
    text = "print('imported')\n" + textwrap.dedent(MAIN).replace("device.run(triple, 5)", "device.run(abs, -5)", 1)
    path = tmp_path / "script.py"
    path.write_text(text.partition(", device.run(make, 7).a")[0] + ")\n")
    done = python(str(path))
    assert (done.stdout, done.stderr) == ("imported\n5\n", "")


def test_functions_that_are_imported_work_from_python_c():
    done = python("-c", "import uvas, os; d = uvas.ProcessDevice(); print(d.run(abs, -3)); d.close()")
    assert (done.stdout, done.stderr) == ("3\n", "")


@pytest.mark.parametrize("way", ["-c", "stdin"])
def test_functions_that_no_file_holds_are_a_clear_error(way):
    text = textwrap.dedent(
        """
        import uvas
        def f(): pass
        with uvas.ProcessDevice() as device:
            error = device.submit(f).exception()
            print(type(error).__name__, error)
            print(device.run(abs, -3))
        """
    )
    done = python("-c", text) if way == "-c" else python("-", input=text)
    assert done.stdout.startswith("AttributeError 'f' of the host's __main__ is not to be found in the worker")
    assert "define it in a module" in done.stdout
    assert done.stdout.endswith("\n3\n")
    assert done.stderr == ""


def test_a_script_without_its_guard_is_told_so(tmp_path):
    path = script(
        tmp_path,
        """
        import uvas
        def f(): pass
        with uvas.ProcessDevice() as device:
            print(device.submit(f).exception())
        """,
    )
    done = python(path)
    assert "if __name__ == '__main__':" in done.stdout
    assert done.returncode == 0


def test_the_worker_finds_uvas_where_the_host_found_it(tmp_path):
    package = Path(uvas.__file__).parents[1]
    path = script(
        tmp_path,
        f"""
        import sys
        sys.path[:] = [{str(package)!r}, *sys.path]
        import uvas, os
        os.environ.pop("PYTHONPATH")
        if __name__ == "__main__":
            with uvas.ProcessDevice() as device:
                print(device.run(eval, "__import__('uvas').__file__"))
        """,
    )
    others = [part for part in sys.path if Path(part) != package]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(others)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == (f"{uvas.__file__}\n", "")


def test_a_host_without_stderr(tmp_path):
    path = script(
        tmp_path,
        """
        import os, uvas
        if __name__ == "__main__":
            os.close(2)
            with uvas.ProcessDevice() as device:
                print(device.run(abs, -5))
        """,
    )
    assert python(path).stdout == "5\n"


# ---- interrupts ------------------------------------------------------------------------------------------------------


ENOUGH = 10


class Interrupts:
    """SIGINT at random moments of the main thread's work, which raises KeyboardInterrupt once for each, and only there.

    Parameters
    ----------
    one_at_a_time
        The next one comes when the last one has raised; else two may meet one call.
    """

    def __init__(self, one_at_a_time: bool) -> None:
        self._one_at_a_time = one_at_a_time
        self._raised = threading.Event()
        self._armed = False
        self.count = 0
        self.thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        pause, began = 0.0001, time.monotonic()
        while time.monotonic() < began + 3 or (self.count <= ENOUGH and time.monotonic() < began + 60):
            time.sleep(pause)
            self._raised.clear()
            os.kill(os.getpid(), signal.SIGINT)
            if self._one_at_a_time:
                self._raised.wait(1)
            pause = 0.0001 + (pause * 7919) % 0.003
        time.sleep(0.1)  # until the last one has been delivered

    def _handle(self, _number: int, _frame: object) -> None:
        self._raised.set()
        if self._armed:
            self._armed = False
            self.count += 1
            raise KeyboardInterrupt

    def during(self, work: Callable[[], object]) -> tuple[int, int]:
        """Do the work again and again; return how often, and how often it was interrupted."""
        rounds = interrupted = 0
        ordinary = signal.signal(signal.SIGINT, self._handle)
        self.thread.start()
        while self.thread.is_alive():
            try:
                self._armed = True
                rounds += 1
                work()
                self._armed = False
            except KeyboardInterrupt:
                interrupted += 1
        signal.signal(signal.SIGINT, ordinary)
        return rounds, interrupted


def test_interrupts_at_random_moments_cost_nothing(device, space):
    """The main thread is interrupted while it claims and reads; nothing is left behind, and the device goes on."""
    base = free_base(space)
    before = open_on(device)

    def work() -> None:
        device.read(device_page(device), 8)
        device.submit(on_device.double, 1)

    rounds, interrupted = Interrupts(one_at_a_time=True).during(work)
    assert interrupted > ENOUGH
    assert rounds > interrupted
    assert device.run(on_device.double, 21) == 42
    assert open_on(device) == before
    with space.reserve(PAGE, at=base):
        pass


def test_a_second_interrupt_breaks_off_and_never_hangs():
    """It may come in the middle of a message: then the device is given up, by a typed error, and a new one works."""
    device = uvas.ProcessDevice()

    def work() -> None:
        nonlocal device
        try:
            device.read(device_page(device), 8)
            device.submit(on_device.double, 1)
        except (uvas.DeviceLostError, uvas.ReleasedError):
            device.close()
            device = uvas.ProcessDevice()

    rounds, interrupted = Interrupts(one_at_a_time=False).during(work)
    assert interrupted > ENOUGH
    assert rounds > interrupted
    device.close()
    with uvas.ProcessDevice() as fresh:
        assert fresh.run(on_device.double, 21) == 42


def test_an_interrupt_while_a_worker_starts_leaves_none(monkeypatch):
    """It is raised when the worker has an owner, who goes and takes it along."""

    def interrupted(name: str) -> object:
        started = launch(name)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return started

    launch = link.launch
    monkeypatch.setattr(link, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uvas.ProcessDevice()
    left = [one for one in link._living if one.usable]
    for one in left:
        one.abandon()
    assert left == []


def test_a_line_that_broke_off_ends_the_device():
    """What an interrupt in the middle of a message leaves: what follows would not be understood, so nothing follows."""
    with uvas.ProcessDevice() as device:
        assert device.run(on_device.double, 21) == 42
        device._link.requests.hang_up()
        with pytest.raises(uvas.DeviceLostError):
            device.read(PAGE, 8)


def open_on(device: uvas.ProcessDevice) -> list[str]:
    """What the worker has open, but for the pidfd of the thread that waits for its parent, which it opens some time."""
    return [one for one in device.run(on_device.open_descriptors) if "pidfd" not in one]


def free_base(space: uvas.AddressSpace) -> int:
    with space.reserve(PAGE) as held:
        return held.base


_pages: dict[int, int] = {}


def device_page(device: uvas.ProcessDevice) -> int:
    if device.pid not in _pages:
        _pages[device.pid] = device.run(on_device.map_somewhere, PAGE)
    return _pages[device.pid]
