"""What ends under a CudaDevice: a card, memory, a call, a process, the interpreter, the device itself; and captures."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cuda_cards
import pytest
from cuda_cards import UNIT, cards, driver_module
from fake_cuda import HMM_CARD, REGISTER_CARD, VMM_CARD, CardDied, FakeCard
from machine import MIB, PAGE, mappings

import uvas

plug = cuda_cards.plug


# ---- the end of a card -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD], ids=["hmm", "register"])
def test_a_card_that_dies_takes_no_memory_of_the_hosts_with_it(plug, attributes):
    fake = plug(*cards(attributes))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * PAGE) as held:
        held.commit(0, 2 * PAGE)
        held.numpy("u1", PAGE)[:] = 5
        with pytest.raises(CardDied):
            fake.read(0, 0x1000, 8)
        held.decommit(PAGE, PAGE) if device.strategy == "hmm" else held.decommit(0, 2 * PAGE)
        assert device.lost
        assert "lost" in repr(device)
        with pytest.raises(uvas.DeviceLostError, match="nothing is lost") as caught:
            held.commit(2 * PAGE, PAGE)
        assert caught.value.name == "CUDA_ERROR_ILLEGAL_ADDRESS"
        for verb in (lambda: device.prefetch(held.range, "host"), lambda: device.advise(held.range, None, "device")):
            with pytest.raises(uvas.DeviceLostError):
                verb()
        assert pickle.loads(pickle.dumps(caught.value)).code == caught.value.code
        assert device.strategy == "register" or (held.numpy("u1", PAGE) == 5).all()
    fake.registered.clear()  # pinned to the end of the process


def test_a_card_that_dies_names_what_was_its_own(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * UNIT) as held:
        held.commit(0, UNIT)
        held.commit(UNIT, UNIT, location=device)
        array = held.numpy("u1", UNIT)
        array[:] = 5
        with pytest.raises(CardDied):
            fake.read(0, 0x1000, 8)
        for verb in (lambda: held.commit(2 * UNIT, UNIT), lambda: space.reserve(UNIT)):
            with pytest.raises(uvas.DeviceLostError) as caught:
                verb()
            assert caught.value.lost == (uvas.Range(held.base + UNIT, UNIT),)
        assert (array == 5).all()
        del array
        with pytest.raises(uvas.DeviceLostError):  # the driver keeps the addresses, so they are not given to others
            held.release()
        assert uvas.find(held.base) is held
        fake.cards[0].sticky = None  # so that this process can go on


def test_an_answer_that_comes_of_the_machine_is_no_loss(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device:
        answer = driver_module.CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE  # somebody else's, for now
        fake.fail(1, answer=answer)
        with pytest.raises(uvas.DeviceError, match="DEVICE_UNAVAILABLE") as caught:
            device.card.free_bytes()
        assert not isinstance(caught.value, uvas.DeviceLostError)
        assert not device.lost
        assert device.card.free_bytes()


# ---- captures --------------------------------------------------------------------------------------------------------


def test_nothing_is_taken_away_during_a_capture_which_goes_on(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        fake.capturing = True
        with pytest.raises(uvas.DeviceError, match="CAPTURE_UNSUPPORTED"):
            held.decommit()
        assert fake.spoiled == []
        fake.capturing = False
        held.numpy("u1")[:] = 1


def test_a_capture_that_does_not_show_is_the_drivers_to_tell_of(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        fake.capturing = fake.apart = True
        with pytest.raises(uvas.DeviceError, match="CAPTURE_UNSUPPORTED"):
            held.decommit()
        assert fake.spoiled == ["cuCtxSynchronize"]  # as any library's wait for the card would
        fake.capturing = False
        fake.spoiled.clear()
        held.numpy("u1")[:] = 1


@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def test_memory_is_made_during_a_capture(plug, attributes):
    fake = plug(FakeCard(dict(attributes)))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        fake.capturing = True
        held = space.reserve(2 * UNIT)
        held.commit(0, UNIT)
        assert fake.spoiled == []
        fake.capturing = False
        held.release()


# ---- the end of a process and of the interpreter ---------------------------------------------------------------------


def in_child(check: Callable[[], None]) -> int:
    """Run a check in a forked child; 0: it held."""
    child = os.fork()
    if not child:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def test_no_call_is_made_in_a_forked_child(plug, attributes):
    plug(*cards(attributes))  # asserts that it is not called there
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(UNIT) as held:
        held.commit()

        def check() -> None:
            for verb in (
                lambda: space.reserve(UNIT),
                lambda: held.decommit(),
                lambda: uvas.CudaDevice(),
                lambda: (
                    device.prefetch(held.range, "device")()
                    if device.strategy == "hmm"
                    else device.claim(held.range) or device.__enter__()
                ),
                lambda: device.__enter__(),
            ):
                try:
                    verb()
                except uvas.ReleasedError:
                    continue
                raise AssertionError("went on in a child")
            device.close()

        assert in_child(check) == 0
        assert not device.lost


PROGRAM = """
import sys
import time
sys.path[:0] = {paths!r}
import uvas
from fake_cuda import FakeCard, FakeDriver, VMM_CARD
class Patch:
    setattr = staticmethod(setattr)
fake = FakeDriver(FakeCard(VMM_CARD)).install(Patch)
device = uvas.CudaDevice()
space = uvas.AddressSpace([device])
held = space.reserve(1 << 21)
held.commit()
class Last:
    def __del__(self):
        print("calls at the end:", len(fake.calls) - before)
before = len(fake.calls)
import builtins
builtins.last = Last()
"""


def test_no_call_is_made_at_the_interpreters_end():
    paths = [str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(paths=paths)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "calls at the end: 0"
    assert done.stderr == ""


# ---- the end of the device and of its memory -------------------------------------------------------------------------


def test_close_is_idempotent_and_gives_back_what_it_owns(plug):
    fake = plug(*cards(VMM_CARD))
    device = uvas.CudaDevice()
    device.claim(uvas.Range(0x2B00_0000_0000, UNIT))
    device.commit(uvas.Range(0x2B00_0000_0000, UNIT), uvas.Backing("driver", False, None, 0), "rw")
    device.close()
    device.close()
    assert fake.leaks() == []


def test_closed_in_the_middle_of_a_call(plug):
    """As by another thread: the context stays for the call, which then lets go of it, once."""
    fake = plug(*cards(HMM_CARD))
    device = uvas.CudaDevice()
    with device.card.current():
        device.close()
        assert fake.cards[0].retained == 1
    assert fake.cards[0].retained == 0
    with device.card.current():
        assert fake.cards[0].retained == 1
    assert fake.cards[0].retained == 0
    assert fake.leaks() == []


@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def test_arrays_outlive_the_devices_block(plug, attributes):
    fake = plug(*cards(attributes))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        array = arena.alloc(8 * MIB).numpy("u8")
        array[:] = 3
    assert not fake.cards[0].retained
    assert (array == 3).all()
    base = array.ctypes.data
    del array
    deadline = time.monotonic() + 20
    while (fake.leaks() or mappings(base, base + MIB)) and gc.collect() >= 0 and time.monotonic() < deadline:
        time.sleep(0.01)  # the reaper is at it
    assert mappings(base, base + MIB) == []


@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def test_every_card_has_stopped_before_memory_goes(plug, attributes):
    fake = plug(*cards(attributes, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as other, uvas.AddressSpace([device, other]) as space:
        for verb in ("decommit", "release"):
            held = space.reserve(UNIT)
            held.commit()
            fake.calls.clear()
            fake.synchronized.clear()
            getattr(held, verb)()
            assert {0, 1} <= set(fake.synchronized)
            taken = [at for at, name in enumerate(fake.calls) if name in ("cuMemUnmap", "cuMemHostUnregister")]
            if device.strategy == "vmm":
                assert max(at for at, name in enumerate(fake.calls) if name == "cuCtxSynchronize") < min(taken)
            assert device.strategy == "hmm" or taken
            if verb == "decommit":
                held.release()
