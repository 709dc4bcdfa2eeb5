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
