"""CudaDevice on pages that are registered with the driver, and so pinned."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_cards
import numpy as np
import pytest
from cuda_cards import cards
from fake_cuda import REGISTER_CARD, VMM_CARD
from machine import MIB, PAGE

import uvas

plug = cuda_cards.plug


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
