"""Memory of a device that breaks: the loss is told, never garbage, and the addresses can be used again."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import on_device
import pytest

import uvas
from uvas._core import ffi, lib

GRANULE = 64 << 10


@pytest.fixture
def private() -> Iterator[uvas.ProcessDevice]:
    """A worker with memory of its own."""
    with uvas.ProcessDevice(name="gpu0", memory="private", granule=GRANULE) as one:
        yield one


def break_first_granule(space: uvas.AddressSpace, base: int) -> None:
    """Let the kernel answer EIO to every attempt to read what the device holds there, until the pager gives it up."""
    found = ffi.new("struct uvas_found *")
    assert lib.uvas_find(base, found) == 0
    lib.uvas_test_fail(2, errno.EIO, 1)  # the first call only protects it
    try:
        lib.uvas_prefetch(found.id, 0, GRANULE, 0, ffi.NULL)
    finally:
        lib.uvas_test_fail(0, 0, 0)
    assert space.where(uvas.Range(base, GRANULE))[0] == uvas.PageFlag.LOST


def test_what_was_lost_is_told_and_used_again(private: uvas.ProcessDevice) -> None:
    with uvas.AddressSpace([private]) as space, space.reserve(4 * GRANULE) as held:
        held.commit()
        array = held.numpy(np.uint8)
        private.run(on_device.fill, array, 5)
        break_first_granule(space, held.base)
        with pytest.raises(uvas.DeviceError):
            private.read(held.base, 4)
        with pytest.raises(uvas.DeviceError, match="lost"):
            space.prefetch(array, private)
        assert array[GRANULE] == 5  # the others are whole
        private.write(held.base + 100, b"\7" * 10)
        assert array[99:111].tolist() == [0] + [7] * 10 + [0]
        private.run(on_device.fill, array, 5)
        break_first_granule(space, held.base)
        space.discard(array[:GRANULE])
        assert not array[:GRANULE].any()
        assert private.run(on_device.total, array) == 5 * 3 * GRANULE
        del array


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, on_device, uvas
from test_lost_memory import GRANULE, break_first_granule

if __name__ == "__main__":
    device = uvas.ProcessDevice(memory="private", granule=GRANULE)
    space = uvas.AddressSpace([device])
    held = space.reserve(GRANULE)
    held.commit()
    array = held.numpy(np.uint8)
    device.run(on_device.fill, array, 5)
    break_first_granule(space, held.base)
    print("touching", flush=True)
    array[0]
    print("garbage", flush=True)
"""


def test_a_touch_of_what_was_lost_is_a_bus_error(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    here = Path(__file__).parent
    program.write_text(PROGRAM.format(paths=[str(here.parent), str(here)]))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "touching\n"), done.stderr


def test_a_write_that_a_dying_device_may_not_have_made_is_named(private: uvas.ProcessDevice) -> None:
    with uvas.AddressSpace([private]) as space, space.reserve(4 * GRANULE) as held:
        held.commit()
        array = held.numpy(np.uint8)
        private.run(on_device.fill, array, 5)
        with space.pin_host(array[:GRANULE]):  # the write waits there
            died = private.submit(on_device.die_soon)
            with pytest.raises(uvas.DeviceLostError) as gone:
                private.write(held.base, b"\7" * 10)
            assert gone.value.lost == (uvas.Range(held.base, 10),)
            with pytest.raises(uvas.DeviceLostError):
                died.result(timeout=30)
        assert (array == 5).all()  # what it held alone has come home
        del array
