"""Half-open ranges of addresses, as values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

_ADDRESSES = 1 << 64
"""One more than the largest address that a pointer can hold."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """The addresses from `base` up to, not including, ``base + size``.

    Never empty, never beyond 64 bits; ordered by base, then by size. Address 0 may be in it: a window may begin there,
    though no reservation does.

    Parameters
    ----------
    base
        The lowest address.
    size
        Bytes.

    Raises
    ------
    TypeError
        A number is no integer.
    ValueError
        There is no such range.

    Examples
    --------
    >>> page = Range(0x10000, 0x1000)
    >>> page
    Range(0x10000, 0x1000)
    >>> hex(page.end)
    '0x11000'
    >>> page.end in page, page.end - 1 in page
    (False, True)
    """

    base: int
    size: int

    def __post_init__(self) -> None:
        base, size = _integer("base", self.base), _integer("size", self.size)
        if base < 0:
            raise ValueError(f"a range's base is 0 or more, not {base:#x}")
        if size <= 0:
            raise ValueError(f"a range's size is above 0, not {size:#x}")
        if size > _ADDRESSES - base:
            raise ValueError(f"a range of {size:#x} bytes at {base:#x} ends beyond 64 bits")
        # Plain integers, also where NumPy's were given: theirs overflow.
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "size", size)

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.base + self.size

    def contains(self, other: int | Range) -> bool:
        """Tell whether an address, or the whole of a range, lies inside.

        Raises
        ------
        TypeError
            `other` is neither.
        """
        if isinstance(other, Range):
            return self.base <= other.base and other.end <= self.end
        return self.base <= _integer("address", other) < self.end

    __contains__ = contains

    def overlaps(self, other: Range) -> bool:
        """Tell whether any address lies in both."""
        return self.base < other.end and other.base < self.end

    def intersection(self, other: Range) -> Range | None:
        """Return the addresses that lie in both, None if there are none.

        Examples
        --------
        >>> Range(0x1000, 0x3000).intersection(Range(0x2000, 0x8000))
        Range(0x2000, 0x2000)
        >>> Range(0x1000, 0x1000).intersection(Range(0x2000, 0x1000)) is None
        True
        """
        base, end = max(self.base, other.base), min(self.end, other.end)
        return Range(base, end - base) if base < end else None

    def __repr__(self) -> str:
        return f"Range({self.base:#x}, {self.size:#x})"

    def __str__(self) -> str:
        return f"[{self.base:#x}, {self.end:#x})"


def first_above(address: int, ranges: Sequence[Range]) -> int:
    """Return the index of the first of disjoint ranges, in order, that ends above an address; O(log n).

    Examples
    --------
    >>> first_above(0x1800, [Range(0x1000, 0x1000), Range(0x4000, 0x1000)])
    0
    >>> first_above(0x2000, [Range(0x1000, 0x1000), Range(0x4000, 0x1000)])
    1
    """
    return bisect_right(ranges, address, key=lambda one: one.end)


def _integer(name: str, number: object) -> int:
    try:
        return index(number)  # type: ignore[arg-type] # this is the check
    except TypeError:
        raise TypeError(f"{name} is an integer, not {type(number).__name__}: {number!r}") from None
