"""Workers and the host have the same bytes: four that agree, and what is read and written."""

from __future__ import annotations

import os

import on_device
import pytest
from machine import PAGE

import uvas


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
