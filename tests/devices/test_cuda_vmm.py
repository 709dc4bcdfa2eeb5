"""CudaDevice on memory that the driver maps, on the host and on cards."""

from __future__ import annotations

import os

import cuda_cards
import pytest
from cuda_cards import UNIT, cards
from fake_cuda import NUMA_CARD, OLD_BYTES, VMM_CARD, CardDied, FakeCard
from machine import MIB, PAGE, Stranger, mappings

import uvas

plug = cuda_cards.plug


# ---- what is mapped --------------------------------------------------------------------------------------------------


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


def fake_properties():
    from uvas.devices.cuda import driver

    properties = driver.make("CUmemAllocationProp")
    properties.type = driver.enum("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
    properties.location.type = driver.enum("CUmemLocationType", "CU_MEM_LOCATION_TYPE_HOST")
    return properties


def test_old_bytes_are_what_new_memory_holds(plug):
    """The fake is as unkind as it says."""
    fake = plug(*cards(VMM_CARD))
    properties = fake_properties()
    fake.calls.clear()
    _, number = fake.cuMemCreate(UNIT, properties, 0)
    assert os.pread(fake.handles[int(number)].fd, len(OLD_BYTES), 4096) == OLD_BYTES
    fake.cuMemRelease(number)


# ---- where it may be -------------------------------------------------------------------------------------------------


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


# ---- arenas ----------------------------------------------------------------------------------------------------------


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
