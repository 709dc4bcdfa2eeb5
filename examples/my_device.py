"""A device of your own, in Python: any object with these methods is a party that must agree.

This one has a page table of its own, some of it taken by its firmware, so that it refuses what the host would accept:
uvas looks elsewhere until both agree.
"""

from __future__ import annotations

import uvas

WINDOW = uvas.Range(0x2C00_0000_0000, 64 << 20)
FIRMWARE = uvas.Range(WINDOW.base + (32 << 20), 32 << 20)


class Accelerator:
    """Notes what it is told, as a driver would write it into a page table."""

    info = uvas.DeviceInfo("accelerator", "claims", frozenset({"anonymous"}), granularity=2 << 20)

    def __init__(self) -> None:
        self.claimed: list[uvas.Range] = []
        self.pages: dict[uvas.Range, str] = {}

    def claim(self, range: uvas.Range) -> None:
        """Take the range, or say who has it: uvas then tries another."""
        if range.overlaps(FIRMWARE):
            raise uvas.AddressInUseError(range, "its firmware", FIRMWARE)
        self.claimed.append(range)

    def unclaim(self, range: uvas.Range) -> None:
        """Give it back with whatever is committed in it."""
        self.claimed.remove(range)
        self.pages = {part: how for part, how in self.pages.items() if not range.overlaps(part)}

    def commit(self, range: uvas.Range, backing: uvas.Backing, protection: str) -> None:
        """Let the range mean what the host sees there."""
        self.pages[range] = f"{protection}, {backing.kind}"

    def decommit(self, range: uvas.Range) -> None:
        """Forget what is behind it."""
        del self.pages[range]

    def protect(self, range: uvas.Range, protection: str) -> None:
        """Change what may be done with it."""
        self.pages[range] = f"{protection}, {self.pages[range].split(', ')[1]}"

    def close(self) -> None:
        """End."""


def main() -> None:
    """Reserve a range that the host and the accelerator agree on."""
    accelerator = Accelerator()
    with uvas.AddressSpace([accelerator], window=WINDOW, name="example") as space:
        weights = space.reserve(3 << 20, name="weights")
        print(f"both agree on {weights.range}: {weights.size >> 20} MiB, as the accelerator's pages are 2 MiB")
        weights.commit()
        weights.numpy("f4")[:] = 1.5
        print(f"the accelerator knows: {accelerator.pages}")
        stats = space.stats()
        print(f"{stats.conflicts} candidate(s) of {stats.attempts} were refused by somebody")
        assert not weights.range.overlaps(FIRMWARE)
        weights.release()
    assert accelerator.claimed == []
    print("released on both sides")


if __name__ == "__main__":
    main()
