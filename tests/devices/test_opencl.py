"""OpenCL devices: what is believed of them, what kernels are given, what waits for what, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import numpy as np
import opencl_in_tests
import pytest
from machine import PAGE

import uvas
from uvas.devices.opencl import platforms, probe
from uvas.devices.opencl.launches import Launch

SOURCE = """
kernel void saxpy(global const float *x, global float *y, float factor) {
    size_t i = get_global_id(0);
    y[i] += factor * x[i];
}
struct node { global struct node *next; long value; };
kernel void walk(global const struct node *node, global long *total) {
    long sum = 0;
    for (; node; node = node->next) {
        sum += node->value;
    }
    *total = sum;
}
kernel void walk_from(ulong node, ulong total) {
    long sum = 0;
    for (; node; node = ((global ulong *)node)[0]) {
        sum += ((global long *)node)[1];
    }
    *(global long *)total = sum;
}
kernel void numbers(char a, ushort b, int c, ulong d, float e, double f, global double *out) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = f;
}
kernel void reversed(global const int *x, global int *y, local int *scratch, constant int *factor) {
    size_t i = get_local_id(0), n = get_local_size(0);
    scratch[i] = x[i];
    barrier(CLK_LOCAL_MEM_FENCE);
    y[i] = scratch[n - 1 - i] * *factor;
}
kernel void four(float4 one, global float *out) { *out = one.x + one.y + one.z + one.w; }
kernel void no_more_than(ulong is_null, global const int *pointer, global int *out) {
    *out = (pointer == 0) == is_null;
}
kernel void count(global volatile ulong *word, ulong times, global volatile int *ready) {
    *ready = 1;
    for (ulong i = 0; i < times; i++) {
        *word += 1;
    }
}
kernel void when_open(global int *gate, ulong from, global long *to) {
    atomic_inc(gate + 1);
    for (ulong i = 0; i < 1ul << 34 && atomic_add(gate, 0) == 0; i++) {
    }
    *to = *(global const long *)from;
}
"""


@pytest.fixture
def device() -> Iterator[uvas.OpenCLDevice]:
    with opencl_in_tests.device("cl") as one:
        yield one


@pytest.fixture
def kernels(device):
    """Kernels of SOURCE by name."""
    return lambda name: device.kernel(SOURCE, name)


@pytest.fixture
def memory(space) -> Iterator[uvas.Reservation]:
    """Sixteen committed pages."""
    with space.reserve(16 * PAGE, name="memory") as held:
        held.commit()
        yield held


def chain(held: uvas.Reservation, count: int) -> int:
    """Link nodes of value 3 by plain addresses; the address of the first."""
    nodes = held.numpy("u8", (count, 2))
    nodes[:, 1] = 3
    nodes[0, 0] = 0
    nodes[1:, 0] = held.base + 16 * np.arange(count - 1, dtype="u8")
    return held.base + 16 * (count - 1)


# ---- what is believed ------------------------------------------------------------------------------------------------


def test_what_it_says_and_what_was_tried_are_kept_apart(device):
    info = device.info
    assert info.placement == "follows"
    assert info.details["probed"] == ("fine_grain_system",)
    assert info.details["advertised"] == probe.advertised_by(device._cl, device.context.devices[0])
    if "Portable" in info.details["platform"]:
        assert "fine_grain_system" not in info.details["advertised"]  # the day it is, platforms.py can be simpler
    assert info.details["device"] == device.context.devices[0].name


def test_a_device_that_is_chosen(device):
    with uvas.OpenCLDevice(device.context.devices[0]) as same:
        assert same.info.name == device.info.details["device"]
        assert same.context.devices == device.context.devices


def test_an_unknown_one_is_tried_in_a_process_of_its_own(device, monkeypatch):
    monkeypatch.setattr(platforms, "_POCL", "somebody else")
    monkeypatch.setattr(probe, "try_out", lambda *_: pytest.fail("it was tried here"))
    platforms._answer.cache_clear()
    with uvas.OpenCLDevice() as other:
        assert other.info.details["probed"] == ("fine_grain_system",)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("raise SystemExit('no such thing')", "exit code 1; no such thing"),
        ('print(\'{"why_not": "it did not read what the host had written"}\')', "did not read what the host"),
        ("print()", "ended: exit code 0"),
    ],
)
def test_one_that_cannot_is_refused_and_does_no_harm(device, monkeypatch, tmp_path, program, reason):
    (tmp_path / "probe.py").write_text(program)
    monkeypatch.setattr(platforms, "_POCL", "somebody else")
    monkeypatch.setattr(platforms, "_PATIENCE_S", 1.0 if "sleep" in program else 30.0)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    platforms._answer.cache_clear()
    try:
        with pytest.raises(uvas.NotSupportedError, match=reason) as caught:
            uvas.OpenCLDevice()
    finally:
        platforms._answer.cache_clear()
    assert device.info.details["device"] in caught.value.reason
    assert "PoCL" in caught.value.remedy


def test_a_device_whose_kernels_see_other_memory_is_no_follower(device, monkeypatch):
    """The list is walked and changed in copies: what such a device would do."""
    cl = device._cl
    monkeypatch.setattr(probe, "_SOURCE", "kernel void follow(ulong node, ulong sum) { *(global ulong *)sum = 4950; }")
    assert probe.try_out(cl, device.context.devices[0]) == "it did not write where the host reads"
    monkeypatch.setattr(probe, "_SOURCE", "kernel void follow(ulong node, ulong sum) { }")
    assert probe.try_out(cl, device.context.devices[0]) == "it did not read what the host had written"


def without(preparation: str) -> str:
    """What an interpreter says who has made a device after that."""
    program = f"""
        import os, sys
        {preparation}
        import uvas
        try:
            uvas.OpenCLDevice()
        except uvas.NotSupportedError as error:
            print(error.reason, error.remedy, sep=" | ")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_without_pyopencl_it_says_what_to_install():
    said = without("sys.modules['pyopencl'] = None")
    assert "pyopencl cannot be imported" in said
    assert "pip install 'uvas[opencl]'" in said


@pytest.mark.parametrize("how", ["none", "an error"])
def test_without_a_platform_it_says_what_to_install(device, monkeypatch, how):
    cl = device._cl

    def none():
        if how == "an error":
            cl.Context([])  # any error will do
        return []

    monkeypatch.setattr(cl, "get_platforms", none)
    with pytest.raises(uvas.NotSupportedError, match="no OpenCL platform") as caught:
        uvas.OpenCLDevice()
    assert "pocl-binary-distribution" in caught.value.remedy


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arrays_go_by_address(device, kernels, memory):
    x, y = memory.numpy("f4", 1000), memory.numpy("f4", 1000, offset=2 * PAGE)
    x[:], y[:] = np.arange(1000), 1
    assert device.run(kernels("saxpy"), 1000, None, x, y, 2) is None
    assert (y == 2 * np.arange(1000) + 1).all()
    device.run(kernels("saxpy"), (10,), (5,), x[500:], y[990:], 0.5)
    assert y[990:].tolist() == [2 * i + 1 + (i - 490) / 2 for i in range(990, 1000)]


def test_arrays_whose_strides_a_kernel_cannot_know_are_refused(device, kernels, memory):
    x, y = memory.numpy("f4", 100), memory.numpy("f4", 100, offset=2 * PAGE)
    x[:], y[:] = 1, 1
    square = x.reshape(10, 10)
    for wrong in (x[::-1], x[::2], square[:, :5], square[::-1], x[:50][::-1], np.broadcast_to(x[:1], 100)):
        with pytest.raises(ValueError, match=r"x of saxpy: .* has the strides"):
            device.run(kernels("saxpy"), 10, None, wrong, y, 1)
        with pytest.raises(ValueError, match=r"strides|read-only"):
            device.run(kernels("saxpy"), 10, None, x, wrong, 1)
    assert (y == 1).all()
    for right in (square.T, square[3:5], x[::2][:1], x[::-1][:1]):
        device.run(kernels("saxpy"), right.size, None, right, y, 1)


def test_arrays_of_arenas_and_of_numpy_go_by_address(device, kernels, space):
    with uvas.Arena(space) as arena:
        x = arena.alloc(4000).numpy("f4")
        x[:] = 2
        y = np.ones(1000, "f4")
        with uvas.numpy_allocator(arena):
            z = np.ones(1000, "f4")
        device.run(kernels("saxpy"), 1000, None, x, z, 3)
        assert (z == 7).all()
        with pytest.raises(TypeError, match=r"y of saxpy: the array .* does not lie in memory that cl shares"):
            device.run(kernels("saxpy"), 1000, None, x, y, 3)
        assert (y == 1).all()
        del x, z


def test_a_kernel_follows_the_hosts_pointers(device, kernels, memory):
    first = chain(memory, 1000)
    total = memory.numpy("i8", 1, offset=15 * PAGE)
    device.run(kernels("walk"), 1, None, first, total)
    assert total[0] == 3000
    total[0] = 0
    nodes = memory.numpy("u8", (1000, 2))
    device.run(kernels("walk"), 1, None, nodes[499:500], total)
    assert total[0] == 1500
    device.run(kernels("walk_from"), 1, None, first, total)  # addresses as numbers
    assert total[0] == 3000
    device.run(kernels("walk_from"), 1, None, nodes[9:], total)  # an array as the number of its address
    assert total[0] == 30


def test_a_pointer_may_be_none(device, kernels, memory):
    out = memory.numpy("i4", 1)
    for pointer, is_null in ((None, 1), (0, 1), (memory.numpy("i4", 0), 1), (memory.base, 0), (out, 0)):
        out[0] = 0
        device.run(kernels("no_more_than"), 1, None, is_null, pointer, out)
        assert out[0] == 1, pointer


def test_numbers_become_what_the_parameter_is(device, kernels, memory):
    out = memory.numpy("f8", 6)
    device.run(kernels("numbers"), 1, None, -128, np.int64(65535), True, (1 << 63), 1.5, np.float32(0.25), out)
    assert out.tolist() == [-128, 65535, 1, float(1 << 63), 1.5, 0.25]
    for place, value in ((0, 128), (1, -1), (2, 1 << 31), (3, 1 << 64)):
        arguments = [0, 0, 0, 0, 0, 0, out]
        arguments[place] = value
        with pytest.raises(OverflowError, match=rf"{'abcd'[place]} of numbers is a .* no room for {value:#x}"):
            device.run(kernels("numbers"), 1, None, *arguments)
    with pytest.raises(TypeError, match="c of numbers is a int, not a float"):
        device.run(kernels("numbers"), 1, None, 0, 0, 1.5, 0, 0, 0, out)


def test_local_memory_constants_buffers_and_vectors(device, kernels, memory):
    cl = device._cl
    x, y = memory.numpy("i4", 8), memory.numpy("i4", 8, offset=PAGE)
    factor = memory.numpy("i4", 1, offset=2 * PAGE)
    x[:], factor[0] = range(8), 10
    factor.flags.writeable = False
    for scratch in (32, cl.LocalMemory(32)):
        y[:] = 0
        device.run(kernels("reversed"), 8, 8, x, y, scratch, factor)
        assert y.tolist() == [70, 60, 50, 40, 30, 20, 10, 0]
    buffer = cl.Buffer(device.context, cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR, hostbuf=np.ones(8, "i4"))
    device.run(kernels("reversed"), 8, 8, buffer, y, 32, factor)
    assert y.tolist() == [10] * 8
    out = memory.numpy("f4", 1)
    device.run(kernels("four"), 1, None, np.array([1, 2, 3, 4], "f4"), out)
    assert out[0] == 10


def test_what_is_no_argument(device, kernels, memory):
    x, saxpy = memory.numpy("f4", 10), kernels("saxpy")
    with pytest.raises(TypeError, match=r"saxpy takes 3 arguments \(x, y, factor\), not 2"):
        device.run(saxpy, 10, None, x, x)
    with pytest.raises(TypeError, match="x of saxpy is a list: a pointer is a NumPy array"):
        device.run(saxpy, 10, None, [1, 2], x, 1)
    with pytest.raises(TypeError, match="x of saxpy: the address 0x1000 does not lie in memory that cl shares"):
        device.run(saxpy, 10, None, 0x1000, x, 1)
    with pytest.raises(TypeError, match="factor of saxpy is a float, not a ndarray"):
        device.run(saxpy, 10, None, x, x, x)
    with pytest.raises(TypeError, match="holds references"):
        device.run(saxpy, 10, None, np.array([None]), x, 1)
    with pytest.raises(TypeError, match="one of four is a float4: pass a NumPy"):
        device.run(kernels("four"), 1, None, 1.0, x)
    with pytest.raises(TypeError, match="scratch of reversed is local memory"):
        device.run(kernels("reversed"), 1, 1, x, x, x, x)
    for sizes in (((1, 1, 1, 1), None), (10, 3), ((10, 10), (5,))):
        with pytest.raises((ValueError, uvas.DeviceError)):
            device.run(saxpy, *sizes, x, x, 1)
    with opencl_in_tests.device("other") as other, pytest.raises(ValueError, match="INVALID_CONTEXT"):
        other.run(kernels("walk_from"), 1, None, 0, 0)


def test_memory_of_another_space_or_none_is_refused(device, kernels, memory):
    x = memory.numpy("f4", 10)
    with uvas.AddressSpace() as elsewhere, elsewhere.reserve(PAGE) as held:
        held.commit()
        with pytest.raises(TypeError, match="does not lie in memory that cl shares"):
            device.run(kernels("saxpy"), 10, None, held.numpy("f4", 10), x, 1)
        elsewhere.attach(device)
        held.numpy("f4", 10)[:] = 5
        x[:] = 0
        device.run(kernels("saxpy"), 10, None, held.numpy("f4", 10), x, 1)
        assert (x == 5).all()
        elsewhere.detach(device)
        with pytest.raises(TypeError, match="does not lie in memory that cl shares"):
            device.run(kernels("saxpy"), 10, None, held.numpy("f4", 10), x, 1)


def test_what_may_not_be_written_is_given_to_const_parameters_only(device, kernels, memory):
    x, y = memory.numpy("f4", 10), memory.numpy("f4", 10, offset=PAGE)
    x[:], y[:] = 1, 1
    view = x[:]
    view.flags.writeable = False
    device.run(kernels("saxpy"), 10, None, view, y, 1)
    assert (y == 2).all()
    with pytest.raises(ValueError, match=r"y of saxpy may be written, and the array .* is read-only"):
        device.run(kernels("saxpy"), 10, None, y, view, 1)
    memory.protect(0, PAGE, "r")
    device.run(kernels("saxpy"), 10, None, x, y, 1)
    with pytest.raises(ValueError, match=r"y of saxpy: .* needs 'rw' at .* protected against it"):
        device.run(kernels("saxpy"), 10, None, y, x, 1)
    memory.protect(0, PAGE, "none")
    with pytest.raises(ValueError, match=r"x of saxpy: .* needs 'r' at "):
        device.run(kernels("saxpy"), 10, None, x, y, 1)
    memory.protect(0, PAGE, "rw")
    device.run(kernels("saxpy"), 10, None, y, x, 1)
    assert (x == 4).all()


def test_programs(device):
    with pytest.raises(ValueError, match=r"the program of f cannot be built: [^$]*unknown type name 'nonsense'"):
        device.kernel("kernel void f(global nonsense *x) {}", "f")
    with pytest.raises(ValueError, match="there is no kernel g in the program: f"):
        device.kernel("kernel void f(global int *x) {}", "g")
    made = device.kernel("kernel void f(global const int *x, TYPE y) {}", "f", options=["-D", "TYPE=ulong"])
    x, y = made.parameters
    assert (x.name, x.type, x.memory, x.const) == ("x", "int*", "global", True)
    assert (y.name, y.type, y.memory) == ("y", "ulong", "private")
    assert repr(made) == "<Kernel f(global int* x, private ulong y) of 'cl'>"


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_read_and_write(device, memory):
    bytes_ = memory.numpy("u1")
    bytes_[:] = np.arange(16 * PAGE) % 251
    assert device.read(memory.base, 16 * PAGE) == bytes_.tobytes()
    assert device.read(memory.base + 5, 3) == bytes_[5:8].tobytes()
    device.write(memory.base + 7, b"seven")
    assert bytes_[6:13].tobytes() == b"\6seven\f"
    device.write(memory.base, memoryview(np.arange(4, dtype="i8")))
    assert memory.numpy("i8", 4).tolist() == [0, 1, 2, 3]
    assert device.read(memory.base, 0) == b""
    device.write(memory.base, b"")


def test_what_is_not_accessible_is_an_error_and_no_crash(device, space, memory):
    with space.reserve(4 * PAGE) as held:
        held.commit(PAGE, PAGE)
        held.commit(2 * PAGE, PAGE, protection="r")
        held.numpy("u1", PAGE, offset=PAGE)[:] = 1
        for place, size in ((0, 1), (PAGE - 1, 2), (3 * PAGE - 1, 2), (3 * PAGE, 1), (0, 4 * PAGE)):
            with pytest.raises(uvas.DeviceError, match=r"cl cannot read .*not all of it is accessible") as caught:
                device.read(held.base + place, size)
            assert caught.value.name == "EFAULT"
        assert device.read(held.base + PAGE, 2 * PAGE) == bytes([1]) * PAGE + bytes(PAGE)
        with pytest.raises(uvas.DeviceError, match="cl cannot write"):
            device.write(held.base + 2 * PAGE - 1, b"ab")
        assert held.numpy("u1", PAGE, offset=PAGE)[-1] == 1
    for address, size in ((0, 1), (-1, 1), (1 << 64, 1), (memory.base, -1), ((1 << 64) - 1, 2)):
        with pytest.raises(ValueError, match="0x"):
            device.read(address, size)
    with pytest.raises(uvas.DeviceError):
        device.read(1, 1)


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


# ---- beside workers --------------------------------------------------------------------------------------------------


def fill(array: np.ndarray) -> int:
    """Link nodes in the worker; the address of the first."""
    count = len(array)
    base = array.ctypes.data
    array[:, 1] = 5
    array[0, 0] = 0
    array[1:, 0] = base + 16 * np.arange(count - 1, dtype="u8")
    return base + 16 * (count - 1)


@pytest.fixture(params=["shared", "private"])
def worker(request, device) -> Iterator[uvas.ProcessDevice]:
    try:
        one = uvas.ProcessDevice(name="worker", memory=request.param)
    except uvas.NotSupportedError as refusal:
        pytest.skip(str(refusal))
    with one:
        yield one


def test_a_kernel_meets_what_a_worker_wrote_and_the_other_way_round(device, kernels, worker):
    """With private memory the pages are the worker's: a kernel that meets one waits for it and gets it."""
    private = worker.info.memory == "private"
    with uvas.AddressSpace([worker, device], name="three") as space, space.reserve(1 << 20) as held:
        held.commit()
        nodes, total = held.numpy("u8", (1000, 2)), held.numpy("i8", 1, offset=1 << 19)
        for _ in range(3):
            first = worker.run(fill, nodes)
            if private:
                assert set(space.where(nodes)) == {uvas.PageFlag.device(1)}  # and nobody else has them
                before = space.movement().host
            device.run(kernels("walk"), 1, None, first, total)
            if private:
                moved = space.movement().host
                assert moved.read_faults + moved.write_faults > before.read_faults + before.write_faults
                assert all(word & uvas.PageFlag.HOST for word in space.where(nodes))
            assert total[0] == 5000
            total[0] = 0
            device.run(kernels("walk_from"), 1, None, first, total)
            assert int.from_bytes(worker.read(total.ctypes.data, 8), "little") == 5000
        del nodes, total


def count_up(word: np.ndarray, times: int) -> int:
    """Add one again and again, in memory."""
    for _ in range(times):
        word[0] += 1
    return int(word[0])


def test_a_kernel_and_a_worker_write_into_one_page_at_the_same_time(device, kernels, worker):
    """With private memory it goes to and fro; nobody's words are lost."""
    with uvas.AddressSpace([worker, device], name="both") as space, space.reserve(1 << 16) as held:
        held.commit()
        theirs, ours, ready = held.numpy("u8", 1), held.numpy("u8", 1, offset=64), held.numpy("i4", 1, offset=128)
        worker.run(count_up, theirs, 1)
        future = device.submit(kernels("count"), 1, None, ours, 1 << 24, ready)
        while not ready[0] and not future.done():
            pass
        assert worker.run(count_up, theirs, 20_000) == 20_001
        future.result(60)
        assert (theirs[0], ours[0]) == (20_001, 1 << 24)
        if worker.info.memory == "private":
            movement = space.movement()
            assert movement.host.bytes_in > 0
            assert movement.devices["worker"].bytes_in > 0
        del theirs, ours, ready


# ---- fork ------------------------------------------------------------------------------------------------------------


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
