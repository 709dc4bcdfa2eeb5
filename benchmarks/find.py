"""Whose address is this? Against a sorted array, a table of granules, UMF, and what Python has.

python benchmarks/find.py [--quick]      targets R4, R5, S1; writes results/find.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import subprocess
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from harness import Sample, built, programs_output, rows_of, sample, write
from intervaltree import IntervalTree
from sortedcontainers import SortedDict

import uvas

PLACE = 4 << 20
BASE = 0x1000_0000_0000


def umf_library() -> list[Path]:
    """Return the path of libumf.so, if the package is installed."""
    try:
        files = importlib.metadata.files("umf") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name == "libumf.so"]


def python_lookups(rounds: int, count: int, ranges: int) -> list[Sample]:
    """R5: from Python, with the same ranges known to each."""
    space = uvas.AddressSpace()
    known = [(BASE + i * PLACE, BASE + i * PLACE + (1 << 16)) for i in range(ranges)]
    adopted = [space.adopt(base, end - base, owner="bench") for base, end in known]
    bases = [base for base, _ in known]
    by_base = SortedDict(dict(known))
    tree = IntervalTree.from_tuples([(base, end, base) for base, end in known])
    chance = random.Random(1)
    asked = [bases[chance.randrange(ranges)] + chance.randrange(1 << 16) for _ in range(count)]

    def each(question: Callable[[int], object]) -> Callable[[int], None]:
        def ask(_times: int) -> None:
            for address in asked:
                question(address)

        return ask

    def by_bisect(address: int) -> int | None:
        at = bisect_right(bases, address) - 1
        return at if at >= 0 and address < known[at][1] else None

    def by_sorted_dict(address: int) -> int | None:
        at = by_base.bisect_right(address) - 1
        base, end = by_base.peekitem(at)
        return base if at >= 0 and address < end else None

    ways: dict[str, Callable[[int], object]] = {
        "space.find": space.find,
        "uvas.find": uvas.find,
        "bisect over lists": by_bisect,
        "SortedDict": by_sorted_dict,
        "IntervalTree": tree.at,
    }
    samples = [
        sample("R5", what, each(question), count, ranges) for _ in range(rounds) for what, question in ways.items()
    ]
    if any(space.find(one.base) is not one for one in adopted):
        raise AssertionError("find does not give what adopt gave")
    space.close()
    return samples


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args().quick else 11
    samples = python_lookups(rounds, 20_000, 10_000)
    with built("find.c") as program:
        for ranges in (100, 10_000, 1_000_000):
            # A million blocks take UMF's pool over fixed memory minutes to make.
            samples += programs_output(program, rounds, ranges, *(umf_library() if ranges < 1_000_000 else []))
    book = []
    with built("book.c", with_core=True) as program:
        for pages in (1, 1_000):
            done = subprocess.run([program, "1000000", str(pages)], check=True, stdout=subprocess.PIPE)
            book.append(json.loads(done.stdout))
    write("find", rows_of(samples), book=book)


if __name__ == "__main__":
    main()
