"""CudaDevice over the strict fake of the driver: the strategies, how devices agree, and what the driver is told."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from machine import KERNELS, MIB, PAGE, Stranger, kernel, mappings

import uvas

driver_module = pytest.importorskip(
    "cuda.bindings.driver", reason="cuda-bindings is not installed: pip install 'uvas[test]'"
)

from fake_cuda import (  # noqa: E402
    GRANULARITY,
    HMM_CARD,
    NUMA_CARD,
    OLD_BYTES,
    OLD_CARD,
    REGISTER_CARD,
    VMM_CARD,
    CardDied,
    FakeCard,
    FakeDriver,
    fake_driver,
)

UNIT = GRANULARITY
Plug = Callable[..., FakeDriver]


@pytest.fixture
def plug(monkeypatch) -> Iterator[Plug]:
    """Plug cards in; afterwards nothing of theirs is left."""
    made: list[FakeDriver] = []
    contexts = []

    def one(*cards: FakeCard) -> FakeDriver:
        context = fake_driver(monkeypatch, *cards)
        contexts.append(context)
        made.append(context.__enter__())
        return made[-1]

    yield one
    for fake in made:
        fake.fail(0)
        assert fake.leaks() == []
    for context in contexts:
        context.__exit__(None, None, None)


def cards(attributes: dict[int, int], count: int = 1) -> list[FakeCard]:
    return [FakeCard(dict(attributes)) for _ in range(count)]


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
        uvas.CudaDevice(strategy="magic")  # type: ignore[arg-type]


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


# ---- hmm -------------------------------------------------------------------------------------------------------------


def test_hmm_sees_plain_memory_and_waits_before_it_goes(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * PAGE) as held:
        held.commit()
        array = held.numpy("u8", 2)
        array[:] = 41, 42
        assert np.frombuffer(fake.read(0, held.base, 16), "u8").tolist() == [41, 42]
        fake.write(0, held.base, np.uint64(7).tobytes())
        assert array[0] == 7
        del array
        assert fake.synchronized == []
        held.decommit(0, PAGE)
        assert fake.synchronized == [0]
        with pytest.raises(CardDied):
            fake.read(0, held.base, 8)


def test_hmm_prefetches_and_waits_for_it(plug):
    fake = plug(FakeCard(memory=8 * MIB))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(16 * MIB) as held:
        held.commit()
        part = uvas.Range(held.base, 4 * MIB)
        wait = device.prefetch(part, "device")
        assert fake.prefetched == [(held.base, 4 * MIB, 0)]
        assert len(fake.events) == 1
        wait()
        assert fake.events == set()
        device.prefetch(part, "host")()
        assert fake.prefetched[-1] == (held.base, 4 * MIB, -1)
        with pytest.raises(uvas.OutOfMemoryError, match="does not fit"):  # it could stop the card
            device.prefetch(held.range, "device")
        assert len(fake.prefetched) == 2
        with pytest.raises(ValueError, match="neither"):
            device.prefetch(part, "elsewhere")


def test_what_is_not_there_to_be_moved_is_refused_before_the_driver_is_told(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * PAGE) as held:
        held.commit(0, PAGE)
        for target in (device, "host"):
            with pytest.raises(ValueError, match="is not committed: there is nothing to move"):
                space.prefetch(held, target)
        assert "cuMemPrefetchAsync" not in fake.calls


def test_hmm_passes_advice_on(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        device.advise(held.range, "read_mostly", None)
        device.advise(held.range, "preferred_location", "device")
        device.advise(held.range, "accessed_by", "host")
        assert [(advice, where) for _, _, advice, where in fake.advised] == [(1, 0), (3, 0), (5, -1)]
        device.advise(held.range, None, None)
        assert [advice for _, _, advice, _ in fake.advised[3:]] == [2, 4, 6]
        with pytest.raises(ValueError, match="no advice"):
            device.advise(held.range, "whatever", "device")
        device.advise(held.range, "accessed_by", None)  # of another device
        assert len(fake.advised) == 6


def test_the_spaces_verbs_reach_the_driver(plug):
    fake = plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * PAGE) as held:
        held.commit()
        array = held.numpy("u1")
        array[:] = 1
        space.prefetch(array, device)
        assert space.prefetch(held, "host", wait=False).result(10) is None
        assert fake.prefetched == [(held.base, 4 * PAGE, 0), (held.base, 4 * PAGE, -1)]
        space.advise(held, "preferred_location", device)
        space.advise(held, "accessed_by", "host")
        assert [(advice, where) for _, _, advice, where in fake.advised] == [(3, 0), (5, -1)]
        assert (space.where(held) & uvas.PageFlag.HOST).all()
        assert fake.events == set()
        del array
    if device.strategy == "hmm":
        assert fake.synchronized


def test_memory_on_a_card_is_told_by_the_space(plug):
    plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(2 * UNIT) as held:
        held.commit(0, UNIT, location=device)
        held.commit(UNIT, UNIT)
        words = space.where(held)
        assert words[0] & (uvas.PageFlag.HOST | uvas.PageFlag.device(1)) == uvas.PageFlag.device(1)
        assert words[-1] & (uvas.PageFlag.HOST | uvas.PageFlag.device(1)) == uvas.PageFlag.HOST
        with pytest.raises(uvas.NotSupportedError, match="committed on a card"):
            space.prefetch(held, "host")


def test_hmm_tells_where_pages_are_without_touching_them(plug):
    plug(FakeCard())
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * PAGE) as held:
        held.commit()
        array = held.numpy("u1")
        array[PAGE] = 1
        told = device.where(held.range)
        if told is None:
            pytest.skip("this machine swaps: a page on the card could not be told from one that is swapped out")
        assert told.tolist() == [0, 1, 0, 0]
        assert told.dtype == np.uint32
        assert device.where(held.range).tolist() == [0, 1, 0, 0]
        del array


def test_a_card_that_shares_page_tables_does_not_know_where(plug):
    plug(FakeCard(HMM_CARD | {100: 1}))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        assert device.where(held.range) is None


def test_a_card_that_moves_nothing_refuses_to_be_asked(plug):
    plug(FakeCard(HMM_CARD | {89: 0}))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        with pytest.raises(uvas.NotSupportedError, match="moves no pages"):
            device.prefetch(held.range, "device")


# ---- register --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_register_pins_what_is_committed(plug, backing):
    fake = plug(*cards(REGISTER_CARD, 2))
    with (
        uvas.CudaDevice(0) as device,
        uvas.CudaDevice(1) as other,
        uvas.AddressSpace([device, other], backing=backing) as space,
        space.reserve(8 * PAGE) as held,
    ):
        held.commit(PAGE, 2 * PAGE)
        assert fake.registered == {held.base + PAGE: (2 * PAGE, 3)}
        array = held.numpy("u8", 1, offset=PAGE)
        array[0] = 5
        assert fake.read(1, held.base + PAGE, 8) == np.uint64(5).tobytes()
        del array
        held.protect(PAGE, 2 * PAGE, "r")
        assert fake.registered == {held.base + PAGE: (2 * PAGE, 3 | 8)}
        held.protect(PAGE, 2 * PAGE, "none")
        assert fake.registered == {}
        held.protect(PAGE, 2 * PAGE, "rw")
        assert fake.registered == {held.base + PAGE: (2 * PAGE, 3)}
        space.detach(other)
        assert len(fake.registered) == 1
        fake.synchronized.clear()
        held.decommit()
        assert fake.registered == {}
        assert fake.synchronized == [0]


def test_register_changes_only_as_a_whole_what_was_committed_at_once(plug):
    fake = plug(*cards(REGISTER_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(8 * PAGE) as held:
        held.commit(0, 4 * PAGE)
        before = fake.table()
        with pytest.raises(uvas.NotSupportedError, match="cuts it") as caught:
            held.decommit(0, PAGE)
        assert str(uvas.Range(held.base, 4 * PAGE)) in str(caught.value)
        with pytest.raises(uvas.NotSupportedError, match="cuts it"):
            held.protect(0, PAGE, "r")
        assert fake.table() == before
        held.numpy("u1", 4 * PAGE)[:] = 1  # still there on the host, and writable
        held.commit(4 * PAGE, 2 * PAGE)
        held.decommit(0, 6 * PAGE)  # two at once
        assert fake.registered == {}


def test_register_has_no_read_only_memory_where_the_card_takes_none(plug):
    fake = plug(*cards(REGISTER_CARD | {113: 0}))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(8 * PAGE) as held:
        held.commit(0, 4 * PAGE)
        before = fake.table(), fake.calls.count("cuMemHostUnregister")
        with pytest.raises(uvas.NotSupportedError, match="read-only memory"):
            held.protect(0, 4 * PAGE, "r")
        with pytest.raises(uvas.NotSupportedError, match="read-only memory"):
            held.commit(4 * PAGE, PAGE, protection="r")
        assert (fake.table(), fake.calls.count("cuMemHostUnregister")) == before
        held.numpy("u1", 4 * PAGE)[:] = 1


def test_register_refuses_an_address_of_the_cards_own(plug):
    fake = plug(*cards(REGISTER_CARD))
    fake.registered_elsewhere = 0x1000_0000
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        with pytest.raises(uvas.NotSupportedError, match="is seen there at"):
            held.commit()
        assert fake.registered == {}
        assert space.stats().committed_bytes == 0


def test_what_cannot_be_pinned_names_the_limit(plug):
    fake = plug(*cards(REGISTER_CARD))
    fake.host_memory = PAGE
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(2 * PAGE) as held:
        with pytest.raises(uvas.LimitReachedError, match="RLIMIT_MEMLOCK"):
            held.commit()


def inherits(address: int) -> bool:
    """Whether a child of a fork would have the page, as /proc says."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.partition(" ")[0]
        if "-" in head and ":" not in head:
            low, _, high = head.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        if inside and line.startswith("VmFlags:"):
            return "dc" not in line.split()  # don't copy
    raise AssertionError(f"nothing is at {address:#x}")


def test_registered_private_memory_is_not_inherited(plug):
    plug(*cards(REGISTER_CARD, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as other, uvas.AddressSpace() as space:
        with space.reserve(PAGE) as held:
            held.commit()
            assert inherits(held.base)
            space.attach(device)
            space.attach(other)
            assert not inherits(held.base)
            space.detach(other)
            assert not inherits(held.base)
            space.detach(device)
            assert inherits(held.base)


def test_pages_that_are_registered_stay_the_ones_that_the_card_sees(plug):
    """Dropping one gives the host another, and the two sides would see different bytes from then on."""
    fake = plug(*cards(REGISTER_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device], backing="memfd") as space:
        with space.reserve(4 * PAGE) as held:
            held.commit()
            array = held.numpy("u1")
            array[:] = 1
            before = frames(held.base, 4)
            space.discard(held)
            assert not array.any()
            assert frames(held.base, 4) == before
            del array
        with uvas.Arena(space) as arena:
            blocks = [arena.alloc(PAGE) for _ in range(1000)]
            for block in blocks:
                block.numpy("u1")[:] = 1
            kept = blocks[::100]
            base = kept[0].base // (2 * MIB) * 2 * MIB
            before = frames(base, 512)
            del blocks, block
            arena.trim()  # empties pages elsewhere
            assert frames(base, 512) == before
            assert fake.registered
            del kept


@pytest.mark.parametrize("attributes", [REGISTER_CARD, VMM_CARD], ids=["register", "vmm"])
def test_arenas_change_no_pages_that_a_driver_holds(plug, attributes):
    plug(*cards(attributes))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        for options in ({"guard": "large"}, {"node": 0}):
            with uvas.Arena(space, **options) as arena:
                with pytest.raises(uvas.NotSupportedError, match="memory that a driver holds"):
                    arena.alloc(MIB)


def frames(base: int, count: int) -> list[int]:
    """The physical page behind each page, or whether there is one, where this process may not know more."""
    with open("/proc/self/pagemap", "rb", buffering=0) as book:
        return np.frombuffer(os.pread(book.fileno(), 8 * count, base // PAGE * 8), "u8").tolist()


def test_arenas_give_registered_memory_back_in_their_spans(plug):
    fake = plug(*cards(REGISTER_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        arena.alloc(16 * MIB).free()  # one hole, whose memory was taken at once
        kept = arena.alloc(4 * MIB)
        arena.trim()
        assert sum(size for size, _ in fake.registered.values()) <= 6 * MIB  # the rest went back beside it
        kept.free()
        blocks = [arena.alloc(2 * MIB) for _ in range(8)]
        assert sum(size for size, _ in fake.registered.values()) >= 16 * MIB
        blocks[3].free()
        blocks[0].free()
        assert arena.trim() >= 2 * MIB
        array = blocks[5].numpy("u1")
        array[:] = 1
        del array, blocks
        arena.trim()
        assert sum(size for size, _ in fake.registered.values()) == 0


# ---- vmm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [VMM_CARD, NUMA_CARD], ids=["by host", "by node"])
def test_vmm_maps_the_same_bytes_for_host_and_cards(plug, attributes):
    fake = plug(*cards(attributes, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as other, uvas.AddressSpace([device, other]) as space:
        with space.reserve(4 * UNIT) as held:
            assert fake.reserved == {held.base: 4 * UNIT}
            held.commit(UNIT, UNIT)
            array = held.numpy("u1", UNIT, offset=UNIT)
            assert not array.any()  # although the driver's memory was not new
            array[7] = 9
            assert fake.read(0, held.base + UNIT, 8)[7] == fake.read(1, held.base + UNIT, 8)[7] == 9
            fake.write(1, held.base + UNIT, b"\1")
            assert array[0] == 1
            del array
            held.commit(2 * UNIT, UNIT)  # growing next to it
            assert len(fake.mapped) == 2
            whole = held.numpy("u1", 2 * UNIT, offset=UNIT)
            assert whole[7] == 9
            del whole
            held.protect(UNIT, UNIT, "r")
            with pytest.raises(CardDied):
                fake.write(1, held.base + UNIT, b"\1")
            fake.cards[1].sticky = None
            assert held.numpy("u1", 1, offset=UNIT).flags.writeable is False
            held.decommit(UNIT, 2 * UNIT)
            assert fake.mapped == {}
            assert fake.handles == {}
        assert fake.reserved == {}
        assert mappings(held.base, held.end) == []


def test_vmm_memory_on_a_card_means_the_same_there_and_nothing_on_the_host(plug):
    fake = plug(*cards(VMM_CARD, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as other, uvas.AddressSpace([device, other]) as space:
        with space.reserve(3 * UNIT) as held:
            held.commit(0, UNIT, location=device)
            held.commit(UNIT, UNIT, location=other)
            held.commit(2 * UNIT, UNIT)
            fake.write(0, held.base, b"here")
            fake.write(0, held.base + UNIT, b"there")  # over the bus
            assert fake.read(1, held.base, 4) == b"here"
            assert fake.read(1, held.base + UNIT, 5) == b"there"
            assert {one.permissions for one in mappings(held.base, held.base + 2 * UNIT)} == {"---p"}
            with pytest.raises(ValueError, match="lies on a device"):
                held.numpy("u1", UNIT)
            held.numpy("u1", UNIT, offset=2 * UNIT)[:] = 1
            assert device.where(held.range)[:: UNIT // PAGE].tolist() == [2, 0, 1]
            assert other.where(held.range)[:: UNIT // PAGE].tolist() == [0, 2, 1]
            with pytest.raises(uvas.NotSupportedError, match="committed on a card"):
                device.prefetch(held.range, "host")
            device.prefetch(uvas.Range(held.base + 2 * UNIT, UNIT), "host")()


def test_cards_that_do_not_reach_each_other_keep_to_their_own(plug):
    fake = plug(FakeCard(VMM_CARD, peers=False), FakeCard(VMM_CARD, peers=False))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as other, uvas.AddressSpace([device, other]) as space:
        with space.reserve(2 * UNIT) as held:
            held.commit(0, UNIT, location=device)
            held.commit(UNIT, UNIT, location=other)
            assert not any(fake.read(0, held.base, UNIT))
            assert not any(fake.read(1, held.base + UNIT, UNIT))  # zeroed by the card that can
            with pytest.raises(CardDied):
                fake.read(0, held.base + UNIT, 1)
            fake.cards[0].sticky = None


def test_vmm_without_host_located_memory_has_memory_on_cards_only(plug):
    attributes = VMM_CARD | {141: 0, 145: 0}
    plug(*cards(attributes))
    with pytest.raises(uvas.NotSupportedError, match=r"12\.2"):
        uvas.CudaDevice()
    with uvas.CudaDevice(strategy="vmm") as device, uvas.AddressSpace([device]) as space:
        with space.reserve(UNIT) as held:
            with pytest.raises(uvas.NotSupportedError, match="memory on the host"):
                held.commit()
            held.commit(location=device)


def test_one_memory_at_two_addresses(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        with space.reserve(2 * UNIT) as held, space.reserve(2 * UNIT) as mirror:
            held.commit(0, UNIT)
            array = held.numpy("u1", UNIT)
            array[3] = 33
            mirror.commit(UNIT, UNIT, location=uvas.Range(held.base, UNIT))
            other = mirror.numpy("u1", UNIT, offset=UNIT)
            assert other[3] == 33
            other[3] = 34
            assert array[3] == 34
            assert len(fake.handles) == 1
            del array, other
            held.decommit()
            assert mirror.numpy("u1", 4, offset=UNIT)[3] == 34
            with pytest.raises(uvas.NotSupportedError, match="not one commit"):
                mirror.commit(0, UNIT, location=uvas.Range(held.base, UNIT))
            assert len(fake.handles) == 1
        assert fake.handles == {}


def test_locations_that_are_none(plug):
    plug(*cards(VMM_CARD, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as stranger, uvas.AddressSpace([device]) as space:
        with space.reserve(UNIT) as held, pytest.raises(ValueError, match="neither 'host', nor a device"):
            held.commit(location=stranger)
    with uvas.AddressSpace() as space, space.reserve(PAGE) as held:
        with pytest.raises(uvas.NotSupportedError, match="maps its memory itself"):
            held.commit(location=held.range)


def test_vmm_changes_only_as_a_whole_what_was_committed_at_once(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * UNIT) as held:
        held.commit(0, 2 * UNIT)
        before = fake.table()
        with pytest.raises(uvas.NotSupportedError, match="cuts it"):
            held.decommit(0, UNIT)
        with pytest.raises(uvas.NotSupportedError, match="cuts it"):
            held.protect(UNIT, UNIT, "r")
        with pytest.raises(uvas.NotSupportedError, match="executable"):
            held.commit(2 * UNIT, UNIT, protection="rx")
        assert fake.table() == before
        held.commit(2 * UNIT, 2 * UNIT, protection="r")
        held.decommit()
        assert fake.mapped == {}


def test_the_drivers_own_ranges_are_not_chosen(plug):
    plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        with pytest.raises(ValueError, match="not inside the window"):
            space.reserve(UNIT, at=0x3_0000_0000)
        with space.reserve(UNIT) as held:
            assert held.base >= 0x16_0000_0000


def test_a_driver_that_moves_is_asked_again_and_gets_its_strays_back_at_the_end(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        fake.mood, fake.honours_after = "moves", 3
        fake.calls.clear()
        with space.reserve(UNIT) as held:
            assert fake.reserved == {held.base: UNIT}
            asked = [name for name in fake.calls if name.startswith("cuMemAddress")]
            assert asked == ["cuMemAddressReserve"] * 3 + ["cuMemAddressFree"] * 2
        fake.honours_after = 0  # never
        with pytest.raises(uvas.AddressSpaceExhaustedError, match="moved by the driver"):
            space.reserve(UNIT)
        assert fake.reserved == {}
        assert fake.calls.count("cuMemAddressReserve") <= 3 + 4 * 64


def test_who_is_in_the_drivers_way_is_named_and_spared(plug):
    fake = plug(*cards(VMM_CARD))
    base = 0x2B00_4000_0000
    with Stranger(base, 16 * PAGE), uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space:
        with pytest.raises(uvas.AddressInUseError) as caught:
            space.reserve(UNIT, at=base)
        assert caught.value.obstacle == uvas.Range(base, 16 * PAGE)
        assert f"{base:x}-" in caught.value.owner
        with space.reserve(UNIT, window=(base, 8 * UNIT)) as held:
            assert held.base > base
        fake.mood = "refuses"  # as sanitizers see it: "out of memory"
        with pytest.raises(uvas.AddressInUseError):
            space.reserve(UNIT, at=base)
        with pytest.raises(uvas.OutOfMemoryError, match="no addresses"):
            space.reserve(UNIT, at=base + 64 * UNIT)


def test_no_memory_for_it_is_told_of_whom(plug):
    fake = plug(FakeCard(VMM_CARD, memory=UNIT))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * UNIT) as held:
        with pytest.raises(uvas.OutOfMemoryError, match="cuda:0 has no memory"):
            held.commit(0, 2 * UNIT, location=device)
        fake.host_memory = UNIT
        with pytest.raises(uvas.OutOfMemoryError, match="the host has no memory"):
            held.commit(0, 2 * UNIT)
        assert fake.mapped == {}


def test_a_device_that_comes_later_follows_the_owner(plug):
    fake = plug(*cards(VMM_CARD, 2))
    with uvas.CudaDevice(0) as device, uvas.CudaDevice(1) as late, uvas.AddressSpace([device]) as space:
        with space.reserve(2 * UNIT) as held:
            held.commit(0, UNIT)
            held.numpy("u1", 4)[:] = 4
            space.attach(late)
            assert fake.read(1, held.base, 4) == b"\4" * 4
            space.detach(late)
            with pytest.raises(CardDied):
                fake.read(1, held.base, 4)
            fake.cards[1].sticky = None
            assert held.numpy("u1", 4).tolist() == [4] * 4


def test_an_owner_in_one_space_follows_in_another(plug):
    fake = plug(*cards(VMM_CARD, 2))
    with uvas.CudaDevice(0) as first, uvas.CudaDevice(1) as second:
        with uvas.AddressSpace([first, second]) as one, uvas.AddressSpace([second, first]) as two:
            with one.reserve(UNIT) as held, two.reserve(UNIT) as other:
                for each in (held, other):
                    each.commit()
                    fake.write(0, each.base, b"x")
                    assert fake.read(1, each.base, 1) == b"x"


def test_audit_has_nothing_to_say_of_what_the_driver_maps(plug):
    plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * UNIT) as held:
        held.commit(0, UNIT)
        held.commit(UNIT, UNIT, location=device)
        assert space.audit().findings == ()
        space.check()


def test_arenas_live_in_what_the_driver_maps_and_give_it_back(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        blocks = [arena.alloc(3 * MIB) for _ in range(6)]
        array = blocks[2].numpy("u1")
        array[:] = 3
        assert fake.read(0, blocks[2].base, 4) == b"\3" * 4
        del array
        had = len(fake.mapped)
        del blocks
        assert arena.trim() > 0
        assert len(fake.mapped) < had
        arena.alloc(100).free()


def test_bare_blocks_of_memory_on_a_card(plug):
    fake = plug(*cards(VMM_CARD))
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(4 * UNIT) as held:
        with uvas.Arena(held, backing="none") as arena:
            held.commit(location=device)
            with arena.alloc(1000) as block:
                fake.write(0, block.base, b"bytes")
                assert fake.read(0, block.base, 5) == b"bytes"
            held.decommit()


# ---- the end of a card, of a process, of the interpreter -------------------------------------------------------------


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


def test_a_driver_that_is_older_than_the_bindings_says_what_it_lacks(plug, monkeypatch):
    plug(FakeCard())

    def missing(*arguments: object) -> None:
        raise RuntimeError('Function "cuMemPrefetchAsync_v2" not found')

    monkeypatch.setattr(driver_module, "cuMemPrefetchAsync", missing)
    with uvas.CudaDevice() as device, uvas.AddressSpace([device]) as space, space.reserve(PAGE) as held:
        held.commit()
        with pytest.raises(uvas.NotSupportedError, match=r"cuMemPrefetchAsync_v2.*newer driver"):
            space.prefetch(held, device)


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


def test_old_bytes_are_what_new_memory_holds(plug):
    """The fake is as unkind as it says."""
    fake = plug(*cards(VMM_CARD))
    properties = fake_properties()
    fake.calls.clear()
    _, number = fake.cuMemCreate(UNIT, properties, 0)
    assert os.pread(fake.handles[int(number)].fd, len(OLD_BYTES), 4096) == OLD_BYTES
    fake.cuMemRelease(number)


def fake_properties():
    from uvas.devices.cuda import driver

    properties = driver.make("CUmemAllocationProp")
    properties.type = driver.enum("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
    properties.location.type = driver.enum("CUmemLocationType", "CU_MEM_LOCATION_TYPE_HOST")
    return properties


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


def test_memory_that_moves_by_userfaultfd_is_not_for_the_driver(plug):
    plug(FakeCard())
    try:
        worker = uvas.ProcessDevice(name="worker", memory="private")
    except uvas.NotSupportedError as missing:
        pytest.skip(str(missing))
    with worker, uvas.CudaDevice() as device:
        with pytest.raises(uvas.NotSupportedError, match="hmm: worker has memory of its own"):
            uvas.AddressSpace([device, worker])
