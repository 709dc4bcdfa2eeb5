"""The calls that keep the GIL, against the same questions asked through cffi."""

from __future__ import annotations

import errno
import gc
import sys
import weakref

import numpy as np
import pytest

from uvas._core import fast, ffi, lib


class Holder:
    """Something that can be referred to weakly."""


@pytest.fixture
def held():
    """Open a space with one reservation of a page; its address may be asked for."""
    space = ffi.new("uvas_id *")
    out = ffi.new("struct uvas_reservation *")
    assert lib.uvas_space_open(ffi.NULL, space) == 0
    assert lib.uvas_reserve(space[0], 1, ffi.NULL, out) == 0
    yield out
    assert lib.uvas_space_close(space[0]) == 0


@pytest.fixture
def anything():
    """Set a table that has whatever it is asked for, so that `lookup` tells whether it asked."""

    class Everything(dict):
        def __missing__(self, key):
            return lambda: key

    return Everything()


NOWHERE = [-1, 0, 1, 1 << 64, -(1 << 64), 1 << 200, (1 << 64) - 1]


def test_finds_every_address_inside_and_none_beside(held):
    for address in (held.base, held.base + 1, held.base + held.size - 1):
        assert fast.find(address) == held.id
        assert fast.find(np.uint64(address)) == held.id
    for address in (held.base - 1, held.base + held.size):  # another test's default arena may lie there
        assert fast.find(address) != held.id


def test_finds_nothing_any_more_after_release(held):
    base = held.base
    assert lib.uvas_release(held.id) == 0
    assert fast.find(base) == 0


@pytest.mark.parametrize("address", NOWHERE)
def test_what_is_no_address_holds_nothing(address, held, anything):
    assert fast.find(address) == 0
    assert fast.lookup(address, anything) is None


@pytest.mark.parametrize("address", ["1", 1.0, None, b"1"])
def test_only_integers(address):
    with pytest.raises(TypeError):
        fast.find(address)
    with pytest.raises(TypeError):
        fast.lookup(address, {})


def test_an_error_of_the_address_itself_comes_through(held):
    class Strange:
        def __index__(self):
            raise OverflowError("mine")

    with pytest.raises(OverflowError, match="mine"):
        fast.find(Strange())
    with pytest.raises(OverflowError, match="mine"):
        fast.lookup(Strange(), {})


def test_looks_up_the_very_object(held, anything):
    holder = Holder()
    table = {held.id: weakref.ref(holder)}
    assert fast.lookup(held.base, table) is holder
    assert fast.lookup(held.base - 1, anything) is None
    assert fast.lookup(held.base, anything) == held.id
    del holder
    gc.collect()
    assert fast.lookup(held.base, table) is None


def test_what_the_table_does_not_know_is_none(held):
    assert fast.lookup(held.base, {}) is None


def test_errors_of_the_table_come_through(held):
    class Broken(dict):
        def __missing__(self, key):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fast.lookup(held.base, Broken())
    with pytest.raises(TypeError, match="list"):
        fast.lookup(held.base, [])
    with pytest.raises(TypeError, match="2 arguments"):
        fast.lookup(held.base)
    with pytest.raises(TypeError, match="not callable"):
        fast.lookup(held.base, {held.id: 5})


def test_keeps_no_reference(held):
    holder = Holder()
    reference = weakref.ref(holder)
    table = {held.id: reference}
    outside, inside = 1 << 70, int(str(held.base))

    def counts():
        return [sys.getrefcount(it) for it in (holder, reference, table, outside, inside, None)]

    def work(times):
        for _ in range(times):
            fast.lookup(inside, table)
            fast.lookup(inside, {})
            fast.lookup(outside, table)
            fast.find(inside)
            fast.find(outside)

    work(10)
    before = counts()
    work(1000)
    assert all(abs(now - then) < 100 for now, then in zip(counts(), before, strict=True))


def test_unlease_ends_a_lease_once(held):
    lease = ffi.new("uvas_id *")
    assert lib.uvas_commit(held.id, 0, held.size, lib.UVAS_READ, 0) == 0
    assert lib.uvas_lease(held.id, 0, held.size, lease) == 0
    assert lib.uvas_decommit(held.id, 0, held.size) == -errno.EBUSY
    assert fast.unlease(lease[0]) == 0
    assert lib.uvas_decommit(held.id, 0, held.size) == 0
    assert fast.unlease(lease[0]) == -errno.ESTALE
    with pytest.raises(TypeError):
        fast.unlease("1")
    with pytest.raises(OverflowError):
        fast.unlease(-1)
