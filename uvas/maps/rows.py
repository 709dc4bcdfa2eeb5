"""The lines of a map of addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uvas.ranges import Range

RowKind = Literal["reserved", "committed", "adopted", "hole", "foreign", "changed", "lost", "unregistered", "unknown"]


@dataclass(frozen=True, slots=True)
class MapRow:
    """A range of addresses, all of one nature."""

    range: Range
    """Where."""
    kind: RowKind
    """``reserved``: ours, no memory behind it. ``committed``: ours, with memory. ``adopted``: somebody else's, and uvas
    was told. In a reservation, but not as uvas left it: ``hole``: nobody is there. ``foreign``: somebody else is.
    ``changed``: ours, with another protection or moved. ``lost``: somebody else's, and `AddressSpace.heal` has given it
    up. ``unregistered``: tagged by uvas, and not in the registry: being reserved or released at this moment, kept in
    quarantine, or inherited over fork. ``unknown``: of another process, between tags: committed memory or a
    stranger's."""
    space: str
    """The name of the space that it belongs to."""
    name: str
    """The reservation's name; of an adoption, whose it is; empty: none, or not known."""
    detail: str
    """Protection and backing, or who is there."""

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"{self.range} {self.kind}{name} of {self.space!r}{f': {self.detail}' if self.detail else ''}"
