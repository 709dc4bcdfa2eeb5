"""The obviously right reference: one list, one entry a page, everything O(n). The model is the specification."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelReservation:
    """Pages of one reservation: None is reserved only, otherwise (protection, contents)."""

    base: int
    pages: list[tuple[str, int] | None]

    @property
    def size(self) -> int:
        """In pages."""
        return len(self.pages)


@dataclass
class Model:
    """A window of pages, and who has which; addresses are page numbers."""

    window: int
    reservations: dict[int, ModelReservation] = field(default_factory=dict)  # by base
    adopted: dict[int, int] = field(default_factory=dict)  # base -> pages
    foreign: dict[int, int] = field(default_factory=dict)  # base -> pages, mapped by somebody else

    def owner(self, page: int) -> str:
        """Who has a page: "free", "reserved", "adopted" or "foreign"."""
        for kind, held in (
            ("reserved", {base: one.size for base, one in self.reservations.items()}),
            ("adopted", self.adopted),
            ("foreign", self.foreign),
        ):
            if any(base <= page < base + pages for base, pages in held.items()):
                return kind
        return "free"

    def is_free(self, base: int, pages: int) -> bool:
        """Whether nobody has any of it."""
        return all(self.owner(page) == "free" for page in range(base, base + pages))

    def is_unknown_to_uvas(self, base: int, pages: int) -> bool:
        """Whether uvas itself holds none of it."""
        return all(self.owner(page) in ("free", "foreign") for page in range(base, base + pages))

    def at(self, page: int) -> ModelReservation | None:
        """The reservation that holds a page."""
        return next((one for base, one in self.reservations.items() if base <= page < base + one.size), None)

    def commit(self, one: ModelReservation, first: int, pages: int, protection: str) -> None:
        """Contents stay, new pages read as zeros, all get the protection."""
        for page in range(first, first + pages):
            old = one.pages[page]
            one.pages[page] = (protection, old[1] if old else 0)

    def decommit(self, one: ModelReservation, first: int, pages: int) -> None:
        """Back to reserved."""
        one.pages[first : first + pages] = [None] * pages

    def committed(self, one: ModelReservation, first: int, pages: int) -> bool:
        """Whether all of it is."""
        return all(page is not None for page in one.pages[first : first + pages])

    @property
    def committed_pages(self) -> int:
        """Over all reservations."""
        return sum(page is not None for one in self.reservations.values() for page in one.pages)


@dataclass
class ModelBlock:
    """A live block: what was asked for, and what can be used."""

    base: int
    asked: int
    size: int

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.base + self.size


@dataclass
class ArenaModel:
    """Blocks in one fixed range, in bytes: a list, sorted by address.

    Where small blocks live in their slabs the model cannot know which pages the slabs take; where only large ones
    live, it knows the holes to the page.
    """

    base: int
    size: int
    page: int
    small_max: int
    guard: int = 0  # bytes after each large block
    blocks: list[ModelBlock] = field(default_factory=list)
    total_blocks: int = 0
    total_bytes: int = 0

    def add(self, base: int, asked: int, size: int) -> ModelBlock:
        """Take in a block; nobody else has a byte of it."""
        assert size >= asked
        assert self.base <= base
        assert base + size <= self.base + self.size
        assert all(block.end <= base or base + size <= block.base for block in self.blocks), "two blocks share bytes"
        block = ModelBlock(base, asked, size)
        self.blocks.append(block)
        self.blocks.sort(key=lambda one: one.base)
        self.total_blocks += 1
        self.total_bytes += size
        return block

    def remove(self, block: ModelBlock) -> None:
        """Forget a block."""
        self.blocks.remove(block)

    def holder(self, address: int) -> ModelBlock | None:
        """Return the block that holds an address."""
        return next((block for block in self.blocks if block.base <= address < block.end), None)

    def pages_of(self, size: int) -> int:
        """Bytes that a block takes when it has pages of its own."""
        return -(-size // self.page) * self.page + self.guard

    @property
    def only_large(self) -> bool:
        """Whether every live block has pages of its own."""
        return all(block.size > self.small_max for block in self.blocks)

    @property
    def large_bytes(self) -> int:
        """Pages of large blocks, without what guards them."""
        return sum(block.size for block in self.blocks if block.size > self.small_max)

    def holes(self, without: ModelBlock | None = None) -> list[tuple[int, int]]:
        """Where nothing is, in order, if only large blocks live: (base, end)."""
        found, at = [], self.base
        for block in self.blocks:
            if block is without:
                continue
            if at < block.base:
                found.append((at, block.base))
            at = block.end + (self.guard if block.size > self.small_max else 0)
        if at < self.base + self.size:
            found.append((at, self.base + self.size))
        return found

    def fits(self, size: int, align: int) -> bool:
        """Whether some hole has room, if only large blocks live."""
        step = max(align, self.page)
        return any(end - -(-base // step) * step >= self.pages_of(size) for base, end in self.holes())


@dataclass
class ModelGranule:
    """What moves as a whole: one value fills it."""

    value: int = 0
    protection: str = "rw"
    holders: frozenset[int] | None = None  # exactly these; None: not known to the model
    among: frozenset[int] = frozenset()  # at least these


HOST = -1
"""Among parties of a `MirrorModel`; devices are 0, 1, ..."""


@dataclass
class MirrorModel:
    """Granules that a host and some devices read and write, each having memory of its own.

    Values are certain. Where a granule is, is certain only right after somebody touched or moved it: what lies beside
    it may have been fetched ahead, or have had to leave.
    """

    granules: list[ModelGranule | None]  # None: no memory
    capacities: dict[int, int]  # device -> granules, of those that have a bound
    homed: set[int] = field(default_factory=set)  # granules that were advised: a move to a device is a copy

    def _touched(self, at: int, granule: ModelGranule, holders: set[int] | None, among: set[int]) -> None:
        for one in self.granules:
            if one is not None:
                one.holders, one.among = None, frozenset()
        granule.holders = frozenset(holders) if holders is not None else None
        granule.among = frozenset(among)

    def may(self, at: int, access: str) -> bool:
        """Whether an access is allowed there."""
        granule = self.granules[at]
        return granule is not None and access in granule.protection and granule.protection != "none"

    def read(self, at: int, party: int) -> int:
        """Return the value; the reader has a copy afterwards."""
        granule = self.granules[at]
        assert granule is not None
        self._touched(at, granule, None, {party})
        return granule.value

    def write(self, at: int, party: int, value: int) -> None:
        """Set the value; the writer has it alone afterwards."""
        granule = self.granules[at]
        assert granule is not None
        self._touched(at, granule, {party}, {party})
        granule.value = value

    def fits(self, count: int, party: int) -> bool:
        """Whether a device can hold so many at once."""
        return count <= self.capacities.get(party, count)

    def movable(self, first: int, end: int) -> bool:
        """Whether there is memory everywhere, for somebody to access."""
        return all(one is not None and one.protection != "none" for one in self.granules[first:end])

    def move(self, first: int, end: int, party: int) -> None:
        """All of it goes there; advised granules are copied to devices."""
        for one in self.granules:
            if one is not None:
                one.holders, one.among = None, frozenset()
        for at in range(first, end):
            granule = self.granules[at]
            assert granule is not None
            granule.among = frozenset({party})
            if at not in self.homed:
                granule.holders = frozenset({party})

    def discard(self, first: int, end: int) -> None:
        """Zeros."""
        for at in range(first, end):
            granule = self.granules[at]
            if granule is not None:
                granule.value, granule.holders, granule.among = 0, None, frozenset()

    def commit(self, first: int, end: int, protection: str) -> None:
        """Zeros where nothing was."""
        for at in range(first, end):
            old = self.granules[at]
            self.granules[at] = ModelGranule(old.value if old else 0, protection)

    def decommit(self, first: int, end: int) -> None:
        """No memory any more."""
        self.granules[first:end] = [None] * (end - first)

    def check(self, at: int, holders: frozenset[int]) -> None:
        """Whether a granule may be where it is said to be."""
        granule = self.granules[at]
        if granule is None:
            assert holders == frozenset(), f"granule {at} is with {set(holders)} and has no memory"
            return
        if granule.value == 0 and holders == frozenset():
            return  # it reads as zeros wherever it is asked for
        assert granule.among <= holders, f"granule {at} is with {set(holders)}, not with {set(granule.among)}"
        assert granule.holders in (None, holders), f"granule {at} is with {set(holders)}, not {granule.holders}"
        assert holders, f"granule {at} is nowhere and has a value"
