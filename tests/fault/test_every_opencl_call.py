"""Every call to OpenCL fails in turn: for k = 1, 2, ... until the verb completes untouched, once and from then on.

A verb that raises has changed nothing: what the device may be pointed to, leases, threads, descriptors. Afterwards the
same verb works.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import opencl_in_tests
import pytest
from devices_in_tests import BrokenOnPurpose, Counter
from machine import PAGE, descriptors

import uvas
from uvas.devices.opencl import device as device_module

SOURCE = "kernel void add(global int *x, int n) { x[get_global_id(0)] += n; }"
MOST_CALLS = 60
CALLS = {"Context", "CommandQueue", "Program", "Kernel", "enqueue_nd_range_kernel", "get_platforms", "build"}
CALLS |= {"all_kernels", "set_arg", "get_arg_info", "wait", "finish"}


class Fragile:
    """pyopencl, or an object of its, of which any call may fail."""

    def __init__(self, real: Any, counter: Counter, cl: Any) -> None:
        self.real, self._counter, self._cl = real, counter, cl

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        return self._counted(name, found) if name in CALLS else found

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                self._counter.count(name)
            except BrokenOnPurpose:
                record = self._cl._cl._ErrorRecord(msg=f"cl{name} failed", code=-5, routine=f"cl{name}")
                raise self._cl.RuntimeError(record) from None
            result = function(*map(_real, arguments))
            wrapped = name in ("Context", "CommandQueue", "Program", "build", "Kernel", "enqueue_nd_range_kernel")
            return Fragile(result, self._counter, self._cl) if wrapped else result

        return call


def _real(thing: Any) -> Any:
    return thing.real if isinstance(thing, Fragile) else thing


@dataclass
class Scene:
    """A device in a space with memory, a kernel, an array."""

    counter: Counter
    device: uvas.OpenCLDevice
    space: uvas.AddressSpace
    held: uvas.Reservation
    kernel: Any

    def snapshot(self) -> tuple[object, ...]:
        gc.collect()
        return (
            self.device._memory.pieces_of(self.held.range),
            self.space.stats().committed_bytes,
            self.held.holders(),
            threading.active_count(),
            descriptors(),
        )


@pytest.fixture
def scene(monkeypatch) -> Iterator[Scene]:
    opencl_in_tests.device().close()
    counter = Counter()
    cl = device_module.load()
    monkeypatch.setattr(device_module, "load", lambda: Fragile(cl, counter, cl))
    with (
        uvas.OpenCLDevice(name="cl") as device,
        uvas.AddressSpace([device]) as space,
        space.reserve(8 * PAGE) as held,
    ):
        held.commit(0, 4 * PAGE)
        held.protect(3 * PAGE, PAGE, "r")
        yield Scene(counter, device, space, held, device.kernel(SOURCE, "add"))
        counter.stop()


def _run(scene: Scene) -> None:
    array = scene.held.numpy("i4", 10)
    array[:] = 1
    scene.device.run(scene.kernel, 10, None, array, 5)
    assert (array == 6).all()


def _submit(scene: Scene) -> None:
    array = scene.held.numpy("i4", 10)
    array[:] = 1
    futures = [scene.device.submit(scene.kernel, 10, None, array, 5)]
    del array
    try:
        futures.append(scene.device.submit(scene.kernel, 10, None, scene.held.base, 7))
    finally:
        errors = [future.exception(60) for future in futures]
        scene.device._waiter.join()
    for error in errors:
        if error is not None:
            raise error
    assert (scene.held.numpy("i4", 10) == 13).all()


def _read_and_write(scene: Scene) -> None:
    scene.device.write(scene.held.base + 100, b"written")
    assert scene.device.read(scene.held.base + 99, 9) == b"\0written\0"


def _decommit_and_commit(scene: Scene) -> None:
    scene.held.decommit(2 * PAGE, 2 * PAGE)
    scene.held.commit(2 * PAGE, 2 * PAGE)
    scene.held.protect(3 * PAGE, PAGE, "r")


def _release(scene: Scene) -> None:
    with scene.space.reserve(PAGE) as other:
        other.commit()
        try:
            other.release()
        except BaseException:
            assert uvas.find(other.base) is other  # it is still there, whole
            scene.counter.stop()
            raise


def _attach(scene: Scene) -> None:
    with uvas.AddressSpace() as space, space.reserve(PAGE) as held:
        held.commit()
        space.attach(scene.device)
        try:
            space.detach(scene.device)
        except BaseException:
            assert space.devices == (scene.device,)
            scene.counter.stop()
            raise
        assert not scene.device._memory.allows(held.range, "")


def _another_kernel(scene: Scene) -> None:
    assert scene.device.kernel(SOURCE, "add").parameters[1].type == "int"


def _another_device(scene: Scene) -> None:
    with uvas.OpenCLDevice(scene.device.context.devices[0]) as other:
        assert other.queue


VERBS: dict[str, Callable[[Scene], None]] = {
    "run": _run,
    "submit": _submit,
    "read and write": _read_and_write,
    "decommit and commit": _decommit_and_commit,
    "release": _release,
    "attach and detach": _attach,
    "kernel": _another_kernel,
    "another device": _another_device,
}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("verb", VERBS)
def test_whichever_call_fails_nothing_is_left_behind(scene: Scene, verb: str, lasting: bool) -> None:
    VERBS[verb](scene)
    before = scene.snapshot()
    for k in range(1, MOST_CALLS):
        scene.counter.start(k, lasting=lasting)
        try:
            VERBS[verb](scene)
        except (uvas.DeviceError, uvas.NotSupportedError) as error:
            refusal = str(error)
        else:
            assert scene.counter.made < k, "a failed call was passed over"
            break
        finally:
            scene.counter.stop()
        assert "OUT_OF_RESOURCES" in refusal or "no OpenCL platform" in refusal
        assert scene.snapshot() == before, k
        VERBS[verb](scene)
        assert scene.snapshot() == before, k
    assert 1 < k < MOST_CALLS - 1


def test_a_failed_wait_ends_in_the_future(scene: Scene) -> None:
    """The first call that `submit` makes on its thread is the wait."""
    array = scene.held.numpy("i4", 10)
    arguments = 2
    scene.counter.start(arguments + 2, lasting=False)
    future = scene.device.submit(scene.kernel, 10, None, array, 5)
    with pytest.raises(uvas.DeviceError, match="cl answered"):
        future.result(60)
    scene.counter.stop()
    scene.device._waiter.join()
    del array
    gc.collect()
    assert scene.held.holders() == []
    assert np.all(scene.held.numpy("i4", 1) >= 0)
