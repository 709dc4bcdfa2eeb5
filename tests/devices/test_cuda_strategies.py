"""Which strategy a CudaDevice takes, how devices agree on one, and what it says where there is none."""

from __future__ import annotations

import sys

import cuda_cards
import numpy as np
import pytest
from cuda_cards import UNIT, cards, driver_module
from fake_cuda import HMM_CARD, OLD_CARD, REGISTER_CARD, VMM_CARD, FakeCard
from machine import KERNELS, PAGE, kernel

import uvas

plug = cuda_cards.plug


# ---- which strategy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "strategy", "placement"),
    [(HMM_CARD, "hmm", "follows"), (REGISTER_CARD, "register", "registers"), (VMM_CARD, "vmm", "owns")],
)
def test_auto_takes_the_first_that_the_card_can_do_and_says_why_not_the_others(plug, attributes, strategy, placement):
    plug(*cards(attributes))
    with uvas.CudaDevice() as device:
        info = device.info
        assert (info.placement, info.details["strategy"], device.strategy) == (placement, strategy, strategy)
        reasons = info.details["why not"]
        assert set(reasons) == {"hmm", "register", "vmm"} - {strategy}
        assert all(reasons.values())
        if strategy == "vmm":
            assert "HMM needs" in reasons["hmm"]
            assert "host registration" in reasons["register"]
        if strategy == "hmm":
            assert reasons["vmm"] == "hmm comes first"


def test_a_card_that_can_nothing_is_told_of_with_each_reason(plug):
    plug(*cards(OLD_CARD))
    with pytest.raises(uvas.NotSupportedError, match=r"hmm: .*register: .*vmm: .*virtual memory management"):
        uvas.CudaDevice()
    with pytest.raises(uvas.NotSupportedError, match="host registration") as caught:
        uvas.CudaDevice(strategy="register")
    assert "hmm:" not in str(caught.value)


def test_what_is_no_card_and_no_strategy(plug):
    plug(FakeCard())
    with pytest.raises(ValueError, match="there is no CUDA card 1"):
        uvas.CudaDevice(1)
    with pytest.raises(ValueError, match="no strategy"):
        uvas.CudaDevice(strategy="magic")


def test_one_visible_card_spoils_registration_for_all(plug):
    plug(FakeCard(REGISTER_CARD), FakeCard(REGISTER_CARD | {91: 0}))
    with uvas.CudaDevice(0) as device:
        assert device.strategy == "vmm"
        assert "cuda:1" in device.info.details["why not"]["register"]


def test_a_card_that_is_only_visible_spoils_nothing_else(plug):
    plug(FakeCard(dict(HMM_CARD)), FakeCard(dict(VMM_CARD)))
    with uvas.CudaDevice(0) as able, uvas.CudaDevice(1) as other:
        assert (able.strategy, other.strategy) == ("hmm", "vmm")
        with uvas.AddressSpace([able, other]):  # but what is in the space counts
            assert (able.strategy, other.strategy) == ("vmm", "vmm")
            assert "cuda:1: the card cannot access" in able.info.details["why not"]["hmm"]
    with uvas.CudaDevice(0) as able, uvas.AddressSpace([able]):
        assert able.strategy == "hmm"


def test_several_devices_settle_on_what_all_can_do(plug):
    plug(*cards(HMM_CARD, 3))
    with uvas.CudaDevice(0) as first, uvas.CudaDevice(1, strategy="vmm") as second, uvas.CudaDevice(2) as third:
        assert first.strategy == "hmm"
        with uvas.AddressSpace([first, second]) as space:
            assert (first.strategy, second.strategy) == ("vmm", "vmm")
            assert first.info.details["why not"]["hmm"] == "cuda:1 was asked to use vmm"
            assert (first.info.placement, second.info.placement) == ("owns", "follows")
            space.attach(third)
            assert third.strategy == "vmm"
        with uvas.CudaDevice(0, strategy="hmm") as other, uvas.AddressSpace([other]) as space:
            with pytest.raises(uvas.NotSupportedError, match="cuda:0 uses hmm already"):
                space.attach(third)


def test_a_worker_in_the_space_rules_out_private_memory(plug):
    plug(FakeCard())
    with uvas.ProcessDevice(name="worker") as worker, uvas.CudaDevice() as device:
        with uvas.AddressSpace([device, worker]) as space, space.reserve(PAGE) as held:
            assert device.strategy == "register"
            assert device.info.details["why not"]["hmm"] == "worker lives with descriptor, memfd memory only"
            held.commit()
            array = held.numpy("u8", 1)
            array[0] = 7
            del array


def test_nothing_suits_a_worker_and_a_card_that_only_maps(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.ProcessDevice() as worker, uvas.CudaDevice() as device:
        with pytest.raises(uvas.NotSupportedError, match=r"vmm: process.* lives with"):
            uvas.AddressSpace([device, worker])
    assert fake.leaks() == []


def test_one_card_is_one_device_of_a_space(plug):
    plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.CudaDevice() as same, uvas.AddressSpace([device]) as space:
        with pytest.raises(ValueError, match="cuda:0 is in the space already"):
            space.attach(same)


def test_memory_that_moves_by_userfaultfd_is_not_for_the_driver(plug):
    plug(FakeCard())
    try:
        worker = uvas.ProcessDevice(name="worker", memory="private")
    except uvas.NotSupportedError as missing:
        pytest.skip(str(missing))
    with worker, uvas.CudaDevice() as device:
        with pytest.raises(uvas.NotSupportedError, match="hmm: worker has memory of its own"):
            uvas.AddressSpace([device, worker])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("attributes", [HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def test_cards_work_whatever_the_kernel_makes_of_the_flag(plug, attributes, name):
    fake = plug(*cards(attributes))
    with kernel(name), uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        there = [space.reserve(2 * UNIT) for _ in range(5)]
        for held in there:
            held.commit()
            held.numpy("u8")[:] = held.base
        assert fake.read(0, there[2].base, 8) == np.uint64(there[2].base).tobytes()
        assert all((held.numpy("u8") == held.base).all() for held in there)
        assert space.audit().findings == ()
        for held in there:
            held.release()


# ---- no driver -------------------------------------------------------------------------------------------------------


def test_without_a_driver_it_says_what_is_missing(monkeypatch):
    from uvas.devices.cuda import driver

    driver.forget()
    monkeypatch.setattr(driver_module, "cuInit", no_library)
    with pytest.raises(uvas.NotSupportedError, match="there is no driver") as caught:
        uvas.CudaDevice()
    assert "display driver" in caught.value.remedy
    driver.forget()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(uvas.NotSupportedError, match=r"pip install 'uvas\[cuda\]'"):
        uvas.CudaDevice()
    driver.forget()


def no_library(flags: int) -> None:
    raise RuntimeError("libcuda.so.1 is nowhere")  # as cuda.bindings' DynamicLibNotFoundError


def test_without_a_card_it_says_so(plug):
    fake = plug()
    fake.cards.clear()
    with pytest.raises(uvas.NotSupportedError, match="knows no card"):
        uvas.CudaDevice()
    from uvas.devices.cuda import driver

    driver.forget()
    fake.init_answer = type(fake.init_answer).CUDA_ERROR_STUB_LIBRARY
    with pytest.raises(uvas.NotSupportedError, match="CUDA_ERROR_STUB_LIBRARY"):
        uvas.CudaDevice()


def test_a_driver_that_is_older_than_the_bindings_says_what_it_lacks(plug, monkeypatch):
    plug(FakeCard())

    def missing(*arguments: object) -> None:
        raise RuntimeError('Function "cuMemPrefetchAsync_v2" not found')

    monkeypatch.setattr(driver_module, "cuMemPrefetchAsync", missing)
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        with pytest.raises(uvas.NotSupportedError, match=r"cuMemPrefetchAsync_v2.*newer driver"):
            space.prefetch(held, device)
