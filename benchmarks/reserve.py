"""Reserving, choosing a hole, committing: against the bare system calls, Python's mmap, and the text of /proc.

python benchmarks/reserve.py [--quick]      targets R1, R2, R3, R6; writes results/reserve.json
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable

import cffi
from harness import Sample, built, programs_output, rows_of, sample, write

import uvas

SIZE = 64 << 20
PROT_NONE = 0
NORESERVE_NOREPLACE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000 | 0x100000


def bare_calls() -> tuple[Callable[..., int], Callable[..., int]]:
    """Return mmap and munmap as cffi's ABI mode calls them."""
    ffi = cffi.FFI()
    ffi.cdef("uintptr_t mmap(uintptr_t, size_t, int, int, int, long); int munmap(uintptr_t, size_t);")
    libc = ffi.dlopen(None)
    return libc.mmap, libc.munmap


def python_pairs(rounds: int, count: int) -> list[Sample]:
    """R2: reserve + release from Python, and what else Python has."""
    raw_mmap, raw_munmap = bare_calls()
    plain, tagged = uvas.AddressSpace(tagged=False), uvas.AddressSpace()
    with plain.reserve(SIZE) as held:
        place = held.base - (1 << 34)

    def reserve(space: uvas.AddressSpace) -> Callable[[int], None]:
        def pairs(times: int) -> None:
            for _ in range(times):
                space.reserve(SIZE).release()

        return pairs

    def by_mmap(times: int) -> None:
        for _ in range(times):
            mmap.mmap(-1, 4096).close()

    def by_cffi(times: int) -> None:
        for _ in range(times):
            if raw_mmap(place, SIZE, PROT_NONE, NORESERVE_NOREPLACE, -1, 0) != place or raw_munmap(place, SIZE):
                raise OSError("the place is taken")

    samples = []
    for _ in range(rounds):
        samples += [
            sample("R2", "uvas untagged", reserve(plain), count),
            sample("R2", "uvas tagged", reserve(tagged), count),
            sample("R2", "mmap.mmap(-1, 4096) + close", by_mmap, count),
            sample("R2", "raw calls through cffi", by_cffi, count),
        ]
    return samples


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    rounds, count = (5, 1000) if quick else (15, 5000)
    samples = python_pairs(rounds, count)
    with built("reserve.c") as program:
        samples += programs_output(program, "pairs", rounds, count)
        for vmas in (10, 1_000, 10_000, 60_000):
            samples += programs_output(program, "hole", rounds, vmas)
    write("reserve", rows_of(samples))


if __name__ == "__main__":
    main()
