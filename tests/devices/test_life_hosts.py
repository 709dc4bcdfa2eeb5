"""What workers make of their host: a fork of it, its end, an interrupt for it, a host without stderr."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading

import machine
import on_device
import pytest
from machine import PAGE
from workers_in_tests import ended, python, script

import uvas

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


# ---- what is for the host --------------------------------------------------------------------------------------------


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
