"""What kernels of OpenCL devices are given, by address and by value; and what is read and written there."""

from __future__ import annotations

import numpy as np
import opencl_in_tests
import opencl_kernels
import pytest
from machine import PAGE

import uvas

device, kernels, memory = opencl_kernels.device, opencl_kernels.kernels, opencl_kernels.memory


# ---- arguments -------------------------------------------------------------------------------------------------------


def chain(held: uvas.Reservation, count: int) -> int:
    """Link nodes of value 3 by plain addresses; the address of the first."""
    nodes = held.numpy("u8", (count, 2))
    nodes[:, 1] = 3
    nodes[0, 0] = 0
    nodes[1:, 0] = held.base + 16 * np.arange(count - 1, dtype="u8")
    return held.base + 16 * (count - 1)


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
