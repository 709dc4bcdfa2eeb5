"""CuPy and NumPy over the same bytes; over the strict fake of the driver."""

from __future__ import annotations

import ctypes
import gc

import cupy_in_tests
import numpy as np
import pytest
from cupy_in_tests import UNIT, Stream, cupy

import uvas

fake, device, space = cupy_in_tests.fake, cupy_in_tests.device, cupy_in_tests.space
arena, current = cupy_in_tests.arena, cupy_in_tests.current


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_a_numpy_array_as_cupy_has_it_and_back(fake, arena, current):
    array = arena.alloc(1000).numpy("f4", (10, 20))[1::2, ::-1]
    array[:] = np.arange(100).reshape(5, 20)
    seen = uvas.ascupy(array)
    assert isinstance(seen, cupy.ndarray)
    assert seen.data.ptr == array.ctypes.data
    assert (seen.shape, seen.strides, seen.dtype) == (array.shape, array.strides, array.dtype)
    first = np.float32(array[0, 0]).tobytes()
    assert fake.read(0, seen.data.ptr, 4) == first
    back = uvas.asnumpy(seen)
    assert current.waited == 1
    assert back.ctypes.data == array.ctypes.data
    assert (back == array).all()
    back[:] = 3
    assert (array == 3).all()


def test_the_memory_lives_as_long_as_either(arena, current):
    block = arena.alloc(800)
    seen = uvas.ascupy(block.numpy("f8"))
    gc.collect()
    with pytest.raises(BufferError):
        block.free()
    back = uvas.asnumpy(seen[3:5])
    del seen
    gc.collect()
    with pytest.raises(BufferError):
        block.free()
    back[:] = 1
    del back
    block.free()


def test_reservations_hold_a_lease_for_cupy(space, current):
    held = space.reserve(UNIT, name="held")
    held.commit()
    seen = held.cupy("i4", (4, 4), offset=64)
    assert seen.data.ptr == held.base + 64
    with pytest.raises(BufferError, match="CuPy array of int32"):
        held.release()
    assert (uvas.asnumpy(seen) == 0).all()
    del seen
    held.release()


def test_what_only_a_copy_could_do_is_refused(space, arena, current):
    with pytest.raises(ValueError, match="no unified memory"):
        uvas.ascupy(np.zeros(3))
    readonly = arena.alloc(100).numpy("u1")
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        uvas.ascupy(readonly)
    with pytest.raises(TypeError, match="for NumPy arrays"):
        uvas.ascupy([1, 2])
    with pytest.raises(TypeError, match="CuPy array is wanted"):
        uvas.asnumpy(np.zeros(3))
    foreign = np.zeros(4)
    memory = cupy.cuda.UnownedMemory(foreign.ctypes.data, foreign.nbytes, foreign, 0)
    with pytest.raises(ValueError, match="no unified memory"):
        uvas.asnumpy(cupy.ndarray((4,), "f8", cupy.cuda.MemoryPointer(memory, 0)))
    with uvas.AddressSpace() as apart, uvas.Arena(apart) as other:
        block = other.alloc(80)
        with pytest.raises(ValueError, match="no CUDA device shares"):
            uvas.ascupy(block.numpy("f8"))
        with pytest.raises(ValueError, match="no CUDA device shares"):
            block.cupy("f8")
        del block
        gc.collect()


def test_arrays_that_numpy_made_in_an_arena(arena, current):
    with uvas.numpy_allocator(arena):
        made = np.ones(1000)
    seen = uvas.ascupy(made)
    assert seen.data.ptr == made.ctypes.data
    del made
    gc.collect()
    assert (uvas.asnumpy(seen) == 1).all()


def test_empty_arrays_have_an_address_too(arena, current):
    array = arena.alloc(64).numpy("f8", (0, 3))
    seen = uvas.ascupy(array)
    assert seen.shape == (0, 3)
    assert uvas.asnumpy(seen).shape == (0, 3)


def test_without_cupy_it_says_what_to_install(arena, monkeypatch):
    array = arena.alloc(64).numpy("f8")
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(uvas.NotSupportedError, match=r"pip install 'uvas\[cuda\]'"):
        uvas.ascupy(array)


def test_host_access_waits_for_the_stream(arena, current, fake):
    array = arena.alloc(64).numpy("f8")
    seen = uvas.ascupy(array)
    mine = Stream(fake, 5)
    with uvas.host_access(seen, stream=mine) as host:
        assert mine.waited == 1
        host[:] = 4
    with uvas.host_access(array) as host:
        assert current.waited == 1
        assert host is array
    with uvas.host_access(seen) as host:
        assert current.waited == 2
        assert (host == 4).all()


def test_memory_on_a_card_is_cupys_and_not_numpys(fake, device, space, current):
    if device.strategy != "vmm":
        pytest.skip("only a driver that maps memory puts it on a card")
    with space.reserve(2 * UNIT) as held:
        held.commit(0, UNIT, location=device)
        seen = held.cupy("u1", 16)
        fake.write(0, seen.data.ptr, b"on the card")
        with pytest.raises(ValueError, match="lies on a device"):
            uvas.asnumpy(seen)
        with pytest.raises(BufferError):
            held.decommit(0, UNIT)
        del seen
        with pytest.raises(ValueError, match="not committed"):
            held.cupy("u1", 16, offset=UNIT)
        held.protect(0, UNIT, "r")
        with pytest.raises(ValueError, match="read-only"):
            held.cupy("u1", 16)


def test_bare_blocks_over_memory_on_a_card(device, space):
    if device.strategy != "vmm":
        pytest.skip("only a driver that maps memory puts it on a card")
    with space.reserve(2 * UNIT) as held, uvas.Arena(held, backing="none") as arena:
        block = arena.alloc(1000)
        with pytest.raises(ValueError, match="not committed"):
            block.cupy("f4", 10)
        held.commit(location=device)
        seen = block.cupy("f4", 10)
        assert seen.data.ptr == block.base
        with pytest.raises(ValueError, match="bare addresses"):
            block.numpy("f4", 10)
        with pytest.raises(BufferError):
            block.free()
        with pytest.raises(BufferError):
            held.decommit()
        del seen
        block.free()
        held.decommit()


# ---- DLPack ----------------------------------------------------------------------------------------------------------


def told(capsule: object) -> tuple[int, int, int]:
    """Address, device type and number, as a consumer reads them."""
    take = ctypes.pythonapi.PyCapsule_GetPointer
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    at = take(capsule, b"dltensor")
    return (
        ctypes.c_uint64.from_address(at).value,
        ctypes.c_int32.from_address(at + 8).value,
        ctypes.c_int32.from_address(at + 12).value,
    )


def test_dlpack_tells_what_the_memory_is(device, arena):
    array = arena.alloc(80).numpy("f8")
    array[:] = 2
    kind = 13 if device.strategy == "hmm" else 3
    plain, cuda = uvas.dlpack(array), uvas.dlpack(array, "cuda")
    assert plain.__dlpack_device__() == (1, 0)
    assert cuda.__dlpack_device__() == (kind, 0)
    assert told(plain.__dlpack__()) == (array.ctypes.data, 1, 0)
    assert told(cuda.__dlpack__()) == (array.ctypes.data, kind, 0)
    for one in (plain, cuda):
        taken = np.from_dlpack(one)
        assert taken.ctypes.data == array.ctypes.data
        assert (taken == 2).all()
    with pytest.raises(BufferError, match="not copied"):
        cuda.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        cuda.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="neither 'cpu' nor 'cuda'"):
        uvas.dlpack(array, "tpu")
    with pytest.raises(ValueError, match="no CUDA device shares"):
        uvas.dlpack(np.zeros(2), "cuda")
