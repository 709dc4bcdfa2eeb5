"""What was made in one piece at which addresses, and can only be unmade so."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, Protocol, TypeVar

from uvas.errors import NotSupportedError
from uvas.ranges import Range

__all__ = ["Parts"]


class _Part(Protocol):
    @property
    def range(self) -> Range:
        """Where it is."""


_P = TypeVar("_P", bound=_Part)


class Parts(Generic[_P]):
    """Disjoint parts by address.

    Drivers unmap and unregister only what they mapped or registered at once. Not for several threads: its user locks.
    """

    def __init__(self) -> None:
        self._parts: dict[int, _P] = {}
        self._bases: list[int] = []

    def add(self, part: _P) -> None:
        """Take a part in; O(n) for the list of bases, which is short."""
        insort(self._bases, part.range.base)
        self._parts[part.range.base] = part

    def remove(self, part: _P) -> None:
        """Take it out."""
        del self._bases[bisect_left(self._bases, part.range.base)]
        del self._parts[part.range.base]

    def at(self, base: int) -> _P | None:
        """Return the part that begins there."""
        return self._parts.get(base)

    def touching(self, range: Range) -> list[_P]:
        """Return the parts that have an address in common with a range, by address."""
        first = bisect_left(self._bases, range.base)
        if first and self._parts[self._bases[first - 1]].range.end > range.base:
            first -= 1
        last = bisect_left(self._bases, range.end)
        return [self._parts[base] for base in self._bases[first:last]]

    def whole(self, range: Range, device: str) -> list[_P]:
        """Return the parts inside a range.

        Raises
        ------
        NotSupportedError
            The range cuts one.
        """
        found = self.touching(range)
        for part in found:
            if not range.contains(part.range):
                raise NotSupportedError(
                    f"a part of {part.range}",
                    f"{range} cuts it, and the driver of {device} changes only as a whole what was committed at once",
                    "commit in the parts that are to be protected or given back alone",
                )
        return found

    def __len__(self) -> int:
        return len(self._bases)
