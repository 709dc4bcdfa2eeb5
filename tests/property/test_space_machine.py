"""Spaces against the model, whatever the order of calls.

Answers, bytes, counters; and after each step every invariant, and the kernel's own book.
"""

from __future__ import annotations

import ctypes
import gc
import os

import pytest
from devices_in_tests import TableDevice
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from machine import ARENA, PAGE, map_at, mappings, read_word, unmap, write_word
from model import Model, ModelReservation

import uvas

BASE = ARENA + (6 << 32)
PAGES = 96
WINDOW = uvas.Range(BASE, PAGES * PAGE)
MOST = 400 if os.environ.get("UVAS_FULL") == "1" else 40

page_numbers = st.integers(0, PAGES - 1)
page_counts = st.integers(1, 12)
protections = st.sampled_from(["none", "r", "rw"])


class SpaceMachine(RuleBasedStateMachine):
    """Reserve, commit, decommit, protect, release, adopt; strangers come and go; a device sees the same."""

    reservations = Bundle("reservations")
    adoptions = Bundle("adoptions")
    strangers = Bundle("strangers")

    @initialize(
        backing=st.sampled_from(["anonymous", "memfd"]),
        tagged=st.booleans(),
        device=st.booleans(),
        others=st.booleans(),
    )
    def open(self, backing: str, tagged: bool, device: bool, others: bool) -> None:
        self.model = Model(PAGES)
        self.device = TableDevice() if device else None
        self.space = uvas.AddressSpace(
            [self.device] if self.device else [],
            window=WINDOW,
            backing=backing,
            tagged=tagged,
            name="machine",
        )
        self.other = uvas.AddressSpace(name="other") if others else None

    # ---- addresses ---------------------------------------------------------------------------------------------------

    @rule(target=reservations, pages=page_counts, align=st.sampled_from([None, 1, 4, 16]))
    def reserve(self, pages: int, align: int | None) -> object:
        alignment = None if align is None else align * PAGE
        try:
            held = self.space.reserve(pages * PAGE, align=alignment)
        except uvas.AddressSpaceExhaustedError:
            # A stranger keeps 256 pages (1 MiB) of room below itself: with one in the window, or above it, nothing is
            # promised.
            assert self.model.foreign or not self._has_room(pages, align or 1)
            return multiple()
        return self._got(held, pages)

    def _has_room(self, pages: int, align: int) -> bool:
        return any(
            self.model.is_free(first, pages)
            for first in range(PAGES - pages + 1)
            if (BASE // PAGE + first) % align == 0
        )

    def _got(self, held: uvas.Reservation, pages: int) -> object:
        first = (held.base - BASE) // PAGE
        assert held.size == pages * PAGE
        assert self.model.is_free(first, pages), "somebody's addresses were given away"
        self.model.reservations[first] = ModelReservation(first, [None] * pages)
        return held

    @rule(target=reservations, first=page_numbers, pages=page_counts)
    def reserve_at(self, first: int, pages: int) -> object:
        try:
            held = self.space.reserve(pages * PAGE, at=BASE + first * PAGE)
        except ValueError:
            assert first + pages > PAGES
            return multiple()
        except uvas.AddressInUseError:
            assert not self.model.is_free(first, pages)
            return multiple()
        assert held.base == BASE + first * PAGE
        return self._got(held, pages)

    @rule(held=consumes(reservations))
    def release(self, held: uvas.Reservation) -> None:
        held.release()
        del self.model.reservations[(held.base - BASE) // PAGE]
        with pytest.raises(uvas.ReleasedError):
            held.commit()

    @rule(target=adoptions, first=page_numbers, pages=page_counts)
    def adopt(self, first: int, pages: int) -> object:
        try:
            adopted = self.space.adopt(BASE + first * PAGE, pages * PAGE, owner="them")
        except uvas.AddressInUseError:
            assert not self.model.is_unknown_to_uvas(first, pages)
            return multiple()
        assert self.model.is_unknown_to_uvas(first, pages)
        self.model.adopted[first] = pages
        return adopted

    @rule(adopted=consumes(adoptions))
    def forget(self, adopted: uvas.Adoption) -> None:
        adopted.release()
        del self.model.adopted[(adopted.base - BASE) // PAGE]

    @rule(target=strangers, first=page_numbers, pages=page_counts)
    def a_stranger_comes(self, first: int, pages: int) -> object:
        if not map_at(BASE + first * PAGE, pages * PAGE):
            return multiple()
        for page in range(first, first + pages):
            assert self.model.owner(page) in ("free", "adopted"), "a stranger got what uvas holds"
            write_word(BASE + page * PAGE, page)
        self.model.foreign[first] = pages
        return first

    @rule(first=consumes(strangers))
    def a_stranger_leaves(self, first: int) -> None:
        pages = self.model.foreign.pop(first)
        for page in range(first, first + pages):
            assert read_word(BASE + page * PAGE) == page
        unmap(BASE + first * PAGE, pages * PAGE)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _part(self, held: uvas.Reservation, first: int, pages: int) -> tuple[ModelReservation, int, int]:
        one = self.model.reservations[(held.base - BASE) // PAGE]
        first %= one.size
        return one, first, min(pages, one.size - first)

    @rule(held=reservations, first=page_numbers, pages=page_counts, protection=protections, populate=st.booleans())
    def commit(self, held: uvas.Reservation, first: int, pages: int, protection: str, populate: bool) -> None:
        one, first, pages = self._part(held, first, pages)
        held.commit(first * PAGE, pages * PAGE, protection=protection, populate=populate)
        self.model.commit(one, first, pages, protection)

    @rule(held=reservations, first=page_numbers, pages=page_counts)
    def decommit(self, held: uvas.Reservation, first: int, pages: int) -> None:
        one, first, pages = self._part(held, first, pages)
        held.decommit(first * PAGE, pages * PAGE)
        self.model.decommit(one, first, pages)

    @rule(held=reservations, first=page_numbers, pages=page_counts, protection=protections)
    def protect(self, held: uvas.Reservation, first: int, pages: int, protection: str) -> None:
        one, first, pages = self._part(held, first, pages)
        if self.model.committed(one, first, pages):
            held.protect(first * PAGE, pages * PAGE, protection)
            self.model.commit(one, first, pages, protection)
        else:
            with pytest.raises(ValueError, match="not committed"):
                held.protect(first * PAGE, pages * PAGE, protection)

    @rule(held=reservations, first=page_numbers, value=st.integers(1, 1 << 62))
    def write(self, held: uvas.Reservation, first: int, value: int) -> None:
        one, first, _ = self._part(held, first, 1)
        page = one.pages[first]
        if page and page[0] == "rw":
            held.numpy("u8", 1, offset=first * PAGE)[0] = value
            one.pages[first] = ("rw", value)

    @rule(held=reservations, first=page_numbers, pages=page_counts)
    def an_array_holds_the_memory(self, held: uvas.Reservation, first: int, pages: int) -> None:
        one, first, pages = self._part(held, first, pages)
        readable = self.model.committed(one, first, pages) and all(
            page is not None and page[0] != "none" for page in one.pages[first : first + pages]
        )
        if not readable:
            with pytest.raises(ValueError, match=r"committed|protected"):
                held.numpy("u1", pages * PAGE, offset=first * PAGE)
            return
        array = held.numpy("u1", pages * PAGE, offset=first * PAGE)
        view = array[1:]
        del array
        assert view.flags.writeable == all(page[0] == "rw" for page in one.pages[first : first + pages] if page)
        for verb in (held.release, lambda: held.decommit(first * PAGE, PAGE)):
            with pytest.raises(BufferError, match="array of uint8"):
                verb()
        del view

    # ---- what must always hold
    # -----------------------------------------------------------------------------------------

    @invariant()
    def model_and_space_agree(self) -> None:
        if not hasattr(self, "space"):
            return
        self.space.check()
        assert self.space.audit().findings == ()
        held = {(one.base - BASE) // PAGE: one.size // PAGE for one in self.space.ranges()}
        assert held == {base: one.size for base, one in self.model.reservations.items()} | self.model.adopted
        stats = self.space.stats()
        assert stats.committed_bytes == self.model.committed_pages * PAGE
        assert stats.reserved_bytes == sum(one.size for one in self.model.reservations.values()) * PAGE
        for page in range(PAGES):
            found = uvas.find(BASE + page * PAGE + 5)
            assert (found is not None) == (self.model.owner(page) in ("reserved", "adopted") or self._adopted(page))
        for first, pages in self.model.foreign.items():
            assert all(read_word(BASE + page * PAGE) == page for page in range(first, first + pages))

    def _adopted(self, page: int) -> bool:
        return any(base <= page < base + pages for base, pages in self.model.adopted.items())

    @invariant()
    def bytes_are_as_written(self) -> None:
        for one in getattr(self, "model", Model(0)).reservations.values():
            for i, page in enumerate(one.pages):
                if page and page[0] != "none":
                    assert ctypes.c_uint64.from_address(BASE + (one.base + i) * PAGE).value == page[1]

    @invariant()
    def the_device_agrees(self) -> None:
        device = getattr(self, "device", None)
        if device is not None:
            assert {(base - BASE) // PAGE: size // PAGE for base, size in device.claims.items()} == {
                base: one.size for base, one in self.model.reservations.items()
            }
            told = {(page - BASE) // PAGE: text.split()[0] for page, text in device.committed.items()}
            assert told == {
                one.base + i: page[0]
                for one in self.model.reservations.values()
                for i, page in enumerate(one.pages)
                if page
            }

    @precondition(lambda self: getattr(self, "other", None) is not None)
    @rule(first=page_numbers)
    def another_space_gets_only_what_is_free(self, first: int) -> None:
        assert self.other is not None
        try:
            held = self.other.reserve(PAGE, at=BASE + first * PAGE)
        except uvas.AddressInUseError:
            assert self.model.owner(first) != "free"
            return
        assert self.model.owner(first) == "free"
        held.release()

    def teardown(self) -> None:
        if hasattr(self, "space"):
            gc.collect()
            self.space.close()
            if self.other:
                self.other.close()
            for first, pages in self.model.foreign.items():
                unmap(BASE + first * PAGE, pages * PAGE)
            assert mappings(WINDOW.base, WINDOW.end) == []
            if self.device is not None:
                assert self.device.table() == ((), ())


SpaceMachine.TestCase.settings = settings(
    max_examples=MOST, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestSpaceMachine = SpaceMachine.TestCase
