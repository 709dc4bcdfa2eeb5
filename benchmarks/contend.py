"""The host and worker processes with memory of their own at the same word, at once and in turn, and at the same border.

python benchmarks/contend.py [--quick]      target H8; writes results/contend.json

Increments of one word by the host and two devices must add up; how many there are depends on how long a granule stays
where it is, and so does how long each of the three waits at most. *In turn* is the ping-pong of one granule between the
host and one device: each waits until the other has counted the word up, then does so itself. Shared memory shows what
the processor itself does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Literal

from harness import library, write

import uvas

SIZE = 16 << 20
LEAD_NS = 50_000_000  # for all three to be there when it begins


@dataclass(frozen=True, slots=True)
class Contention:
    """What one round came to."""

    what: str
    memory: str
    granule: int
    per_second: float
    longest_wait_ms: float
    least_share: float  # of the three's, that of who got least


class Functions:
    """Of ``c/touch.c``."""

    def __init__(self, path: str) -> None:
        self.increment = uvas.CFunction(path, "increment", "uint64")
        self.in_turn = uvas.CFunction(path, "in_turn", "uint64")
        self.straddle = uvas.CFunction(path, "straddle", "uint64")
        self.longest = uvas.CFunction(path, "longest", "uint64")


def contend(functions: Functions, memory: Literal["shared", "private"], granule: int, ns: int) -> list[Contention]:
    """Let all three increment one word, and then store across the border of two granules."""
    own = granule if memory == "private" else None
    with (
        uvas.ProcessDevice(memory=memory, granule=own) as one,
        uvas.ProcessDevice(memory=memory, granule=own) as other,
        uvas.AddressSpace([one, other]) as space,
        space.reserve(SIZE) as held,
    ):
        held.commit()
        found = []
        for what, function, at in (
            ("increments of one word", functions.increment, held.base),
            ("stores across two granules", functions.straddle, held.base + 2 * granule),
        ):
            begin = time.monotonic_ns() + LEAD_NS
            theirs = [device.submit(function, at, begin, begin + ns) for device in (one, other)]
            counts = [function(at, begin, begin + ns), *(future.result() for future in theirs)]
            waits = [functions.longest(), *(device.run(functions.longest) for device in (one, other))]
            total = sum(int(count or 0) for count in counts)
            if function is functions.increment and int(held.numpy("u8")[0]) != total:
                raise AssertionError(f"{total} increments, and the word is {held.numpy('u8')[0]}")
            least = min(int(count or 0) for count in counts) / total
            longest = max(int(wait or 0) for wait in waits) / 1e6
            found.append(Contention(what, memory, granule, total / ns * 1e9, longest, least))
        return [*found, in_turn(functions, held, one, memory, granule, ns)]


def in_turn(
    functions: Functions, held: uvas.Reservation, device: uvas.ProcessDevice, memory: str, granule: int, ns: int
) -> Contention:
    """Let host and device count one word up in turn."""
    at, function = held.base + 4 * granule, functions.in_turn
    begin = time.monotonic_ns() + LEAD_NS
    theirs = device.submit(function, at, 1, begin, begin + ns)
    counts = [int(function(at, 0, begin, begin + ns) or 0), int(theirs.result() or 0)]
    longest = max(int(functions.longest() or 0), int(device.run(functions.longest) or 0)) / 1e6
    if int(held.numpy("u8")[4 * granule // 8]) != sum(counts) or abs(counts[0] - counts[1]) > 1:
        raise AssertionError(f"{counts} turns, and the word is {held.numpy('u8')[4 * granule // 8]}")
    return Contention("one word in turn", memory, granule, sum(counts) / ns * 1e9, longest, min(counts) / sum(counts))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and shorter ones")
    rounds, ns = (5, 10**9) if parser.parse_args().quick else (9, 2 * 10**9)
    found: list[Contention] = []
    with library("touch.c") as path:
        functions = Functions(str(path))
        for _ in range(rounds):
            for granule in (4 << 10, 64 << 10, 2 << 20):
                found += contend(functions, "private", granule, ns)
            found += contend(functions, "shared", 64 << 10, ns)
    write("contend", [], contention=[asdict(one) for one in summary(found)], rounds=rounds, seconds=ns / 1e9)


def summary(found: list[Contention]) -> list[Contention]:
    """Medians, but the longest wait and the least share of all rounds."""
    kinds: dict[tuple[str, str, int], list[Contention]] = {}
    for one in found:
        kinds.setdefault((one.what, one.memory, one.granule), []).append(one)
    return [
        Contention(
            *kind,
            statistics.median(one.per_second for one in of),
            max(one.longest_wait_ms for one in of),
            min(one.least_share for one in of),
        )
        for kind, of in kinds.items()
    ]


if __name__ == "__main__":
    main()
