"""CudaDevice on the host's own pages: what it sees, and what it asks the driver to move."""

from __future__ import annotations

import cuda_cards
import numpy as np
import pytest
from fake_cuda import HMM_CARD, CardDied, FakeCard
from machine import MIB, PAGE

import uvas

plug = cuda_cards.plug


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
