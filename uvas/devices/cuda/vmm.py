"""Memory that the driver maps, at addresses that the driver holds.

The driver's claim of an address is the host's as well, so one card of a space owns the addresses and the others follow:
each gives itself access to what the owner has mapped. Memory lies on the host, where all see the same bytes, or on a
card, where the address means the same but the host has no access.

Numbers that messages quote: a claim is freed with its own base and size, after every mapping in it is gone; a mapping
is taken away as a whole, after every card that has access has stopped; a handle is released when nothing is mapped
through it any more. Each step is undone by its counterpart, last first.

Not yet seen on hardware.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from uvas.devices.base import Backing
from uvas.devices.cuda import driver
from uvas.devices.cuda.claims import claim_address, free_address
from uvas.devices.cuda.parts import Parts
from uvas.devices.cuda.strategy import DEVICE_BIT, HOST_BIT, Strategy, Target, where_all_is
from uvas.devices.cuda.undo import Undo
from uvas.errors import DeviceError, OutOfMemoryError
from uvas.ranges import Range

if TYPE_CHECKING:
    from typing import Literal

    from uvas.devices.cuda.card import Card

__all__ = ["Vmm"]

_LEAST_GRANULARITY = 2 << 20  # hints are multiples of it
_HOSTILE_END = 0x17_0000_0000
"""Below it lie the driver's own PROT_NONE ranges, in every process that uses CUDA: 0x2_0000_0000 to 0x16_0000_0000."""
_HIGHEST = 1 << 47


Place: TypeAlias = "Card | Literal['host']"
"""Where memory lies."""


@dataclass(eq=False, slots=True)
class _Memory:
    """Physical memory: one handle of the driver's."""

    handle: int
    place: Place
    mappings: int = 0


@dataclass(eq=False, slots=True)
class _Mapping:
    """One handle at one address, and who may do what there."""

    range: Range
    memory: _Memory
    protection: str
    users: dict[Card, int] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Claim:
    """Addresses of the driver's."""

    range: Range
    owner: Card
    mappings: Parts[_Mapping] = field(default_factory=Parts)


class _Book:
    """What the driver holds for uvas in this process: its addresses are those of all cards."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Hold nothing: what a parent's driver holds is the parent's."""
        self.lock = threading.Lock()  # of the tables; never held over a call
        self.claims: Parts[_Claim] = Parts()
        self.unreleased: list[int] = []
        """Handles that the driver did not take back."""

    def claim_of(self, range: Range) -> _Claim | None:
        """Return the claim that a range lies in."""
        with self.lock:
            found = self.claims.touching(range)
        return found[0] if found and found[0].range.contains(range) else None


book = _Book()
os.register_at_fork(after_in_child=book.begin)


def _flags(protection: str) -> int:
    """Return the driver's CUmemAccess_flags."""
    return 3 if "w" in protection else 1 if "r" in protection else 0


class Vmm(Strategy):
    """One card's part in memory that the driver maps."""

    name = "vmm"
    placement = "owns"
    backings = frozenset(("driver",))
    window = Range(_HOSTILE_END, _HIGHEST - _HOSTILE_END)

    def __init__(self, card: Card) -> None:
        super().__init__(card)
        places: list[Place] = [card]
        if not self.why_not(card.attributes):
            places.append("host")
        self.granularity = max(_LEAST_GRANULARITY, *(self._granularity(place) for place in places))

    @staticmethod
    def why_not(attributes: Mapping[str, int], *, asked: bool = False) -> str:
        """Say what the card or the driver lacks."""
        if not attributes["virtual memory management"]:
            return "the card lacks virtual memory management"
        if asked or attributes["host-located mappings"] or attributes["node-located mappings"]:
            return ""  # without the latter two there is memory on cards only
        return "the driver maps no memory of the host's at its own addresses: that needs CUDA 12.2 or later"

    # ---- what the driver is told -------------------------------------------------------------------------------------

    def _location(self, place: Place) -> object:
        location = driver.make("CUmemLocation")
        if place == "host":
            by_node = not self.card.attributes["host-located mappings"]
            kind = "CU_MEM_LOCATION_TYPE_HOST_NUMA" if by_node else "CU_MEM_LOCATION_TYPE_HOST"
            location.id = max(0, self.card.attributes["host node"]) if by_node else 0  # a node that there is, never -1
        else:
            kind = "CU_MEM_LOCATION_TYPE_DEVICE"
            location.id = place.ordinal
        location.type = driver.enum("CUmemLocationType", kind)
        return location

    def _properties(self, place: Place) -> object:
        properties = driver.make("CUmemAllocationProp")
        properties.type = driver.enum("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
        properties.location = self._location(place)
        return properties

    def _granularity(self, place: Place) -> int:
        least = driver.enum("CUmemAllocationGranularity_flags", "CU_MEM_ALLOC_GRANULARITY_MINIMUM")
        return int(self.card.call("cuMemGetAllocationGranularity", self._properties(place), least))

    def _set_access(self, range: Range, entries: Iterable[tuple[Place, int]]) -> None:
        descriptions = []
        for place, flags in entries:
            description = driver.make("CUmemAccessDesc")
            description.location = self._location(place)
            description.flags = driver.enum("CUmemAccess_flags", _FLAG_NAMES[flags])
            descriptions.append(description)
        if descriptions:
            self.card.call("cuMemSetAccess", range.base, range.size, descriptions, len(descriptions))

    # ---- addresses ---------------------------------------------------------------------------------------------------

    def claim(self, range: Range) -> None:
        """Let the driver take the range.

        Raises
        ------
        AddressInUseError
            It gives other addresses.
        OutOfMemoryError, DeviceError
            It has none, or said no otherwise.
        """
        self.card.check("claim")
        with self.card.current():
            claim_address(self.card, range)
        with book.lock:
            book.claims.add(_Claim(range, self.card))

    def unclaim(self, range: Range) -> None:
        """Take away what is mapped in it, and give the addresses back.

        Raises
        ------
        DeviceError
            The driver said no; it is all there still, unless the error is marked `unrecoverable`.
        """
        claim = book.claim_of(range)
        if claim is None or claim.owner is not self.card:
            return
        with Undo() as undo:
            mappings = self._unmap(claim, range, undo)
            with self.card.current():
                free_address(self.card, range)
        with book.lock:
            book.claims.remove(claim)
        self._drop(claim, mappings)

    # ---- memory ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, verb: str, range: Range, protection: str) -> Iterator[_Claim]:
        """Begin to change what may be done with a range: give the claim that it lies in, with the card current.

        Raises
        ------
        NotSupportedError
            The driver has no such protection.
        DeviceLostError
            The card is gone.
        """
        self.card.check(verb)
        if "x" in protection:
            raise self.refuse("executable memory", "the driver maps none", "commit it in another space")
        claim = book.claim_of(range)
        assert claim is not None, f"{range} was never claimed"
        with self.card.current():
            yield claim

    def commit(self, range: Range, backing: Backing, protection: str) -> None:
        """Map memory, or, for a card beside the owner, give it access to what the owner has just mapped.

        Raises
        ------
        OutOfMemoryError
            There is none where it was to be.
        NotSupportedError
            There is no such place or protection, or no memory of its own at the range that was named.
        DeviceError
            The driver said no.
        """
        with self._changing("commit", range, protection) as claim, Undo() as undo:
            if claim.owner is not self.card:
                self._join(claim, range, protection)
                return
            mapping = self._map(range, backing.location, protection, undo)
        with book.lock:
            claim.mappings.add(mapping)
            mapping.memory.mappings += 1

    def _map(self, range: Range, location: object, protection: str, undo: Undo) -> _Mapping:
        memory, fresh = self._memory(range, location, undo)
        mapping = _Mapping(range, memory, protection)
        self.card.call("cuMemMap", range.base, range.size, 0, memory.handle, 0)
        undo.push(lambda: self.card.call("cuMemUnmap", range.base, range.size))
        if memory.place == "host" or self.card.reaches(memory.place):
            mapping.users[self.card] = _flags(protection)
        if memory.place != "host":
            mapping.users.setdefault(memory.place, _flags(protection))
        if fresh:
            self._zero(mapping)
        if not fresh or _flags(protection) != 3:
            self._set_access(range, self._entries(mapping, _flags(protection)))
        if memory.place != "host":
            memory.place.located.add(range)
        return mapping

    def _entries(self, mapping: _Mapping, flags: int) -> list[tuple[Place, int]]:
        """Who is to have access: the cards that use it, and the host, in one call."""
        entries: list[tuple[Place, int]] = [(card, flags) for card in mapping.users]
        return [*entries, ("host", flags)] if mapping.memory.place == "host" else entries

    def _memory(self, range: Range, location: object, undo: Undo) -> tuple[_Memory, bool]:
        """Return the memory to map, and whether it is new."""
        if isinstance(location, Range):
            return self._same_as(location, range), False
        place = self._place(location)
        try:
            handle = int(self.card.call("cuMemCreate", range.size, self._properties(place), 0))
        except DeviceError as error:
            if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            raise OutOfMemoryError(range.size, "the host" if place == "host" else place.name) from error
        undo.push(lambda: self.card.call("cuMemRelease", handle))
        return _Memory(handle, place), True

    def _place(self, location: object) -> Place:
        if location != "host":
            card: Card | None = getattr(location, "card", None)
            if card is None:
                raise self.refuse("memory there", f"{location!r} is no CUDA device", "name one of the space")
            return card
        if reason := self.why_not(self.card.attributes):
            raise self.refuse("memory on the host", reason, 'commit(location=device), or strategy="register"')
        return "host"

    def _same_as(self, source: Range, range: Range) -> _Memory:
        claim = book.claim_of(source)
        with book.lock:
            found = claim.mappings.at(source.base) if claim else None
        if found is None or found.range != source or source.size != range.size:
            raise self.refuse(
                f"the memory of {source} at {range}",
                "the two are not one commit and a range of its size",
                "name such a range",
            )
        return found.memory

    def _zero(self, mapping: _Mapping) -> None:
        """Overwrite what the driver last had there."""
        place = mapping.memory.place
        card = self.card if place == "host" or self.card in mapping.users else place
        self._set_access(mapping.range, self._entries(mapping, 3))
        with card.current():
            card.call("cuMemsetD8Async", mapping.range.base, 0, mapping.range.size, card.stream)
            card.call("cuStreamSynchronize", card.stream)

    def _join(self, claim: _Claim, range: Range, protection: str) -> None:
        """Give this card access, beside the owner."""
        flags = _flags(protection)
        with book.lock:
            mappings = claim.mappings.whole(range, self.card.name)
        reached = [one for one in mappings if one.memory.place == "host" or self.card.reaches(one.memory.place)]
        with Undo() as undo:
            for mapping in reached:
                before = mapping.users.get(self.card, 0)
                self._set_access(mapping.range, [(self.card, flags)])
                undo.push(partial(self._set_access, mapping.range, [(self.card, before)]))
        for mapping in reached:
            mapping.users[self.card] = flags

    def decommit(self, range: Range) -> None:
        """Take mappings away, all or none; for a card beside the owner, its access, where there is still any.

        Raises
        ------
        NotSupportedError
            The range cuts what was committed at once.
        DeviceError
            The driver said no.
        """
        claim = book.claim_of(range)
        if claim is None:
            return
        if claim.owner is not self.card:
            self._part(claim, range)
            return
        with Undo() as undo:
            mappings = self._unmap(claim, range, undo)
        self._drop(claim, mappings)

    def _part(self, claim: _Claim, range: Range) -> None:
        with book.lock:
            mappings = [one for one in claim.mappings.touching(range) if self.card in one.users]
        if mappings and not self.card.lost:
            self.card.synchronize()
            with self.card.current():
                self._join(claim, range, "none")
        for mapping in mappings:
            mapping.users.pop(self.card, None)

    def _unmap(self, claim: _Claim, range: Range, undo: Undo) -> list[_Mapping]:
        """Take away what is mapped in a range, after all who use it have stopped. The handles are the undo."""
        with book.lock:
            mappings = claim.mappings.whole(range, self.card.name)
        for card in {card for mapping in mappings for card in mapping.users} | ({self.card} if mappings else set()):
            card.synchronize()
        for mapping in mappings:
            with self.card.current():
                self.card.call("cuMemUnmap", mapping.range.base, mapping.range.size)
            undo.push(partial(self._map_again, mapping))
        return mappings

    def _map_again(self, mapping: _Mapping) -> None:
        with self.card.current():
            self.card.call("cuMemMap", mapping.range.base, mapping.range.size, 0, mapping.memory.handle, 0)
            entries: list[tuple[Place, int]] = [*mapping.users.items()]
            if mapping.memory.place == "host":
                entries.append(("host", _flags(mapping.protection)))
            self._set_access(mapping.range, entries)

    def _drop(self, claim: _Claim, mappings: list[_Mapping]) -> None:
        """Forget mappings that are gone, and release memory that nothing maps any more: last, it cannot be undone."""
        with book.lock:
            for mapping in mappings:
                claim.mappings.remove(mapping)
                mapping.memory.mappings -= 1
            book.unreleased += {one.memory.handle for one in mappings if not one.memory.mappings}
        for mapping in mappings:
            if mapping.memory.place != "host":
                mapping.memory.place.located.discard(mapping.range)
        self._release()

    def _release(self) -> None:
        """Give back the memory of handles through which nothing is mapped."""
        with book.lock:
            handles = [*book.unreleased]
            book.unreleased.clear()
        kept = []
        for handle in handles:
            try:
                with self.card.current():
                    self.card.call("cuMemRelease", handle)
            except DeviceError:
                kept.append(handle)  # offered again with the next
        with book.lock:
            book.unreleased.extend(kept)

    def protect(self, range: Range, protection: str) -> None:
        """Change what owner and host may do, or, for a card beside the owner, what this card may.

        Raises
        ------
        NotSupportedError
            The range cuts what was committed at once, or the driver has no such protection.
        DeviceError
            The driver said no.
        """
        with self._changing("protect", range, protection) as claim, Undo() as undo:
            if claim.owner is not self.card:
                self._join(claim, range, protection)
                return
            with book.lock:
                mappings = claim.mappings.whole(range, self.card.name)
            for mapping in mappings:
                self._set_access(mapping.range, self._own_entries(mapping, protection))
                undo.push(partial(self._set_access, mapping.range, self._own_entries(mapping, mapping.protection)))
        for mapping in mappings:
            mapping.protection = protection
            for place, flags in self._own_entries(mapping, protection):
                if place != "host":
                    mapping.users[place] = flags

    def _own_entries(self, mapping: _Mapping, protection: str) -> list[tuple[Place, int]]:
        """Return what is the owner's to say: for itself, for the card that the memory lies on, and for the host."""
        flags, place = _flags(protection), mapping.memory.place
        entries = self._entries(mapping, flags)
        return [one for one in entries if one[0] in (self.card, "host", place)]

    # ---- where -------------------------------------------------------------------------------------------------------

    def _mappings(self, range: Range) -> list[_Mapping]:
        claim = book.claim_of(range)
        if claim is None:
            return []
        with book.lock:
            return claim.mappings.touching(range)

    def prefetch(self, range: Range, target: Target) -> Callable[[], None]:
        """Nothing moves: memory stays where it was committed.

        For a card there is nothing to do: it reaches memory on the host, and on other cards, where that is, over the
        bus. Memory on the host is there for the host.

        Raises
        ------
        NotSupportedError
            It is wanted on the host, and some of it is committed on a card.
        DeviceLostError
            The card is gone.
        """
        self.card.check("prefetch")
        if target == "host" and not self.host_reaches(range):
            raise self.refuse("prefetch to the host", f"{range} is committed on a card", 'use strategy="hmm"')
        return super().prefetch(range, target)

    def where(self, range: Range) -> npt.NDArray[np.uint32]:
        """Tell from the book of mappings."""
        answer = where_all_is(range, 0)
        page = range.size // len(answer)
        for mapping in self._mappings(range):
            inside = mapping.range.intersection(range)
            place = mapping.memory.place
            here = place != "host" and place.ordinal == self.card.ordinal
            bits = HOST_BIT if place == "host" else DEVICE_BIT if here else 0
            if inside:
                answer[(inside.base - range.base) // page : (inside.end - range.base) // page] = bits
        return answer

    def host_reaches(self, range: Range) -> bool:
        """Whether all that is mapped there lies on the host."""
        return all(mapping.memory.place == "host" for mapping in self._mappings(range))

    def abandon(self, *, claims: bool) -> None:
        """Give back, as far as the driver takes it, what nobody has, and the card's claims too. For its close."""
        with book.lock:
            owned = [one for one in book.claims.touching(self.window) if claims and one.owner is self.card]
        for claim in owned:
            with suppress(DeviceError):
                self.unclaim(claim.range)
        self._release()


_FLAG_NAMES = {
    0: "CU_MEM_ACCESS_FLAGS_PROT_NONE",
    1: "CU_MEM_ACCESS_FLAGS_PROT_READ",
    3: "CU_MEM_ACCESS_FLAGS_PROT_READWRITE",
}
