"""Devices for tests, in plain Python: one that keeps a table of what it was told, and breaks on demand."""

from __future__ import annotations

import threading
from builtins import range as pages_from  # the contract's parameter is called range

import uvas


class BrokenOnPurpose(Exception):
    """What a device raises when it is told to."""


class Counter:
    """Counts the calls to some devices and breaks the k-th, once or from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._k = 0
        self._lasting = False
        self.made = 0

    def start(self, k: int, *, lasting: bool) -> None:
        """Break the k-th call from here on."""
        self._k, self._lasting, self.made = k, lasting, 0

    def stop(self) -> None:
        """Break nothing any more."""
        self._k = 0

    def count(self, what: str) -> None:
        """One call; raises if it is to break."""
        with self._lock:
            self.made += 1
            if self._k and (self.made == self._k or (self._lasting and self.made > self._k)):
                raise BrokenOnPurpose(what)


class TableDevice:
    """Claims ranges in a table of its own; anything that does not fit the contract is an assertion."""

    def __init__(self, name: str = "table", *, taken: tuple[uvas.Range, ...] = ()) -> None:
        self.info = uvas.DeviceInfo(name, "claims", frozenset({"anonymous", "memfd", "descriptor"}))
        self.taken = taken
        self.claims: dict[int, int] = {}
        self.committed: dict[int, str] = {}  # page -> protection and backing
        self.counter = Counter()
        self.asked = 0

    def share_counter_with(self, other: TableDevice) -> Counter:
        """Count the calls to both."""
        other.counter = self.counter
        return self.counter

    def table(self) -> tuple[object, ...]:
        """All that it holds."""
        return tuple(sorted(self.claims.items())), tuple(sorted(self.committed.items()))

    def _pages(self, range: uvas.Range) -> list[int]:
        assert range.base % 4096 == 0
        assert range.size % 4096 == 0
        return [*pages_from(range.base, range.end, 4096)]

    def _inside_a_claim(self, range: uvas.Range) -> None:
        assert any(base <= range.base and range.end <= base + size for base, size in self.claims.items())

    def claim(self, range: uvas.Range) -> None:
        self.asked += 1
        self.counter.count("claim")
        for other in self.taken:
            if other.overlaps(range):
                raise uvas.AddressInUseError(range, "its firmware", other)
        for base, size in self.claims.items():
            assert not uvas.Range(base, size).overlaps(range), "claimed twice"
        self.claims[range.base] = range.size

    def unclaim(self, range: uvas.Range) -> None:
        assert self.claims[range.base] == range.size
        self.counter.count("unclaim")
        del self.claims[range.base]
        for page in self._pages(range):
            self.committed.pop(page, None)

    def commit(self, range: uvas.Range, backing: uvas.Backing, protection: str) -> None:
        self._inside_a_claim(range)
        pages = self._pages(range)
        assert not any(page in self.committed for page in pages), "committed twice"
        assert (backing.descriptor is None) == (backing.kind == "anonymous")
        self.counter.count("commit")
        for i, page in enumerate(pages):
            self.committed[page] = (
                f"{protection} {backing.kind} {backing.offset + 4096 * i if backing.descriptor is not None else 0}"
            )

    def decommit(self, range: uvas.Range) -> None:
        self._inside_a_claim(range)
        pages = self._pages(range)
        assert all(page in self.committed for page in pages), "was never committed"
        self.counter.count("decommit")
        for page in pages:
            del self.committed[page]

    def protect(self, range: uvas.Range, protection: str) -> None:
        self._inside_a_claim(range)
        pages = self._pages(range)
        assert all(page in self.committed for page in pages), "was never committed"
        self.counter.count("protect")
        for page in pages:
            self.committed[page] = " ".join([protection, *self.committed[page].split(" ")[1:]])

    def close(self) -> None:
        self.claims.clear()
        self.committed.clear()
