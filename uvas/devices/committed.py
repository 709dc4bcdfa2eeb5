"""What a device was told is committed: disjoint ranges by address, each with what may be done there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from uvas.ranges import Range

__all__ = ["Committed"]

_Piece = tuple[int, int, str]  # base, end, protection


def _base(piece: _Piece) -> int:
    return piece[0]


class Committed:
    """A book of committed ranges. Not for several threads at once.

    Neighbours that may be used alike are one piece. Each call is O(log n) in the pieces, apart from making room in a
    list.

    Examples
    --------
    >>> book = Committed()
    >>> book.put(Range(0x1000, 0x2000), "rw")
    >>> book.put(Range(0x2000, 0x1000), "r")
    >>> book.allows(Range(0x1000, 0x2000), "r"), book.allows(Range(0x1000, 0x2000), "rw")
    (True, False)
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def put(self, range: Range, protection: str) -> None:
        """Note that a range is committed and what may be done there, whatever it was before."""
        self.remove(range)
        base, end = range.base, range.end
        at = bisect_left(self._pieces, base, key=_base)
        first, last = at, at
        if at < len(self._pieces) and self._pieces[at][0] == end and self._pieces[at][2] == protection:
            end, last = self._pieces[at][1], at + 1
        if at > 0 and self._pieces[at - 1][1:] == (base, protection):
            base, first = self._pieces[at - 1][0], at - 1
        self._pieces[first:last] = [(base, end, protection)]

    def remove(self, range: Range) -> None:
        """Note that nothing of a range is committed."""
        first, last = self._touched(range)
        kept: list[_Piece] = []
        for base, end, protection in self._pieces[first:last]:
            if base < range.base:
                kept.append((base, range.base, protection))
            if end > range.end:
                kept.append((range.end, end, protection))
        self._pieces[first:last] = kept

    def allows(self, range: Range, wanted: str) -> bool:
        """Tell whether all of a range is committed and may be used so: "" for no matter how, "r", "rw"."""
        first, last = self._touched(range)
        reached = range.base
        for base, end, protection in self._pieces[first:last]:
            if base > reached or not set(wanted) <= set(protection):
                return False
            reached = end
        return reached >= range.end

    def _touched(self, range: Range) -> tuple[int, int]:
        first = bisect_right(self._pieces, range.base, key=_base)
        if first > 0 and self._pieces[first - 1][1] > range.base:
            first -= 1
        return first, bisect_left(self._pieces, range.end, lo=first, key=_base)

    def pieces_of(self, range: Range) -> list[tuple[Range, str]]:
        """Return what of a range is committed, by address, with what may be done there."""
        first, last = self._touched(range)
        cut = [(max(base, range.base), min(end, range.end), how) for base, end, how in self._pieces[first:last]]
        return [(Range(base, end - base), how) for base, end, how in cut]

    def __len__(self) -> int:
        return len(self._pieces)
