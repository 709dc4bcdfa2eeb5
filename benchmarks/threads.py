"""One, two and eight threads at once: reserving and asking, against the same peers as alone.

python benchmarks/threads.py [--quick]      beside targets R1, R2, R4, R5; writes results/threads.json

A row's parameter is the number of threads, its time that of one operation of all that the threads did.
"""

from __future__ import annotations

import argparse
import mmap
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable

from find import BASE, PLACE, umf_library
from harness import Sample, built, programs_output, rows_of, write

import uvas

SIZE = 64 << 20
RANGES = 10_000
THREADS = (1, 2, 8)


def together(id: str, what: str, work: Callable[[int], object], count: int, threads: int) -> Sample:
    """Time `threads` threads that each do ``work(count)``."""
    start = threading.Barrier(threads + 1)

    def run() -> None:
        start.wait()
        work(count)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    began = time.perf_counter_ns()
    start.wait()
    for worker in workers:
        worker.join()
    return Sample(id, what, threads, (time.perf_counter_ns() - began) / (count * threads))


def reserving(rounds: int, count: int) -> list[Sample]:
    """Beside R2: from Python, on one interpreter's threads."""
    plain, tagged = uvas.AddressSpace(tagged=False), uvas.AddressSpace()

    def reserve(space: uvas.AddressSpace) -> Callable[[int], None]:
        def pairs(times: int) -> None:
            for _ in range(times):
                space.reserve(SIZE).release()

        return pairs

    def by_mmap(times: int) -> None:
        for _ in range(times):
            mmap.mmap(-1, 4096).close()

    ways = {
        "uvas untagged": reserve(plain),
        "uvas tagged": reserve(tagged),
        "mmap.mmap(-1, 4096) + close": by_mmap,
    }
    return [
        together("R2 threads", what, work, count, threads)
        for _ in range(rounds)
        for threads in THREADS
        for what, work in ways.items()
    ]


def asking(rounds: int, count: int) -> list[Sample]:
    """Beside R5: the same ranges, the same questions."""
    space = uvas.AddressSpace()
    bases = [BASE + i * PLACE for i in range(RANGES)]
    adopted = [space.adopt(base, 1 << 16, owner="bench") for base in bases]
    chance = random.Random(1)
    asked = [bases[chance.randrange(RANGES)] + chance.randrange(1 << 16) for _ in range(count)]

    def by_find(_times: int) -> None:
        for address in asked:
            space.find(address)

    def by_bisect(_times: int) -> None:
        for address in asked:
            at = bisect_right(bases, address) - 1
            _ = at if at >= 0 and address < bases[at] + (1 << 16) else None

    samples = [
        together("R5 threads", what, work, count, threads)
        for _ in range(rounds)
        for threads in THREADS
        for what, work in (("space.find", by_find), ("bisect over lists", by_bisect))
    ]
    if any(space.find(one.base) is not one for one in adopted):
        raise AssertionError("find does not give what adopt gave")
    space.close()
    return samples


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds, count = (5, 500) if parser.parse_args().quick else (11, 2000)
    samples = reserving(rounds, count) + asking(rounds, 10_000)
    with built("threads.c") as program:
        samples += programs_output(program, rounds, count, *umf_library())
    write("threads", rows_of(samples))


if __name__ == "__main__":
    main()
