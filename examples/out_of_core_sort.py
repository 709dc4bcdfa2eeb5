"""Sort more than a device can hold: it is given addresses, and what it has no room for goes back to the host.

The device sorts runs that fit into its memory, in place. Splitters from samples of the runs cut the result into pieces;
for each piece the device gathers its slices of all runs and sorts them once more. Nowhere does the program say which
pages are where: they come when they are touched, and leave for others that do.

    python out_of_core_sort.py [DATA_MIB] [DEVICE_MIB]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

import uvas

MIB = 1 << 20
SAMPLES = 1024
"""Of each run: pieces then differ by a few percent."""


def sort(run: np.ndarray) -> None:
    """On a device: sort in place."""
    run.sort()


def gather(data: np.ndarray, slices: list[tuple[int, int]], piece: np.ndarray) -> None:
    """On a device: bring sorted slices together, in order."""
    np.concatenate([data[start:end] for start, end in slices], out=piece)
    piece.sort(kind="stable")  # of what is sorted in parts


def runs_of(data: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Cut into runs: first and end."""
    for start in range(0, len(data), length):
        yield start, min(start + length, len(data))


def pieces_of(data: np.ndarray, runs: list[tuple[int, int]], count: int) -> Iterator[list[tuple[int, int]]]:
    """Cut sorted runs by common splitters: for each piece, the slice of every run."""
    samples = np.sort(np.concatenate([data[start : end : -(-(end - start) // SAMPLES)] for start, end in runs]))
    splitters = samples[[len(samples) * i // count for i in range(1, count)]]
    cuts = [[start, *(start + np.searchsorted(data[start:end], splitters)), end] for start, end in runs]
    for i in range(count):
        yield [(int(cut[i]), int(cut[i + 1])) for cut in cuts]


def check(result: np.ndarray, expected: tuple[int, int]) -> None:
    """See that it is in order, and made of the same numbers."""
    for start, end in runs_of(result, MIB):
        part = result[max(0, start - 1) : end]
        assert (part[:-1] <= part[1:]).all()
    assert fingerprint(result) == expected


def fingerprint(data: np.ndarray) -> tuple[int, int]:
    """Return what does not depend on the order: the sums of the numbers and of their mixed squares, modulo 2**64."""
    plain, mixed = 0, 0
    for start, end in runs_of(data, MIB):
        part = data[start:end]
        plain += int(part.sum())
        mixed += int((part * part ^ (part >> np.uint64(7))).sum())
    return plain % (1 << 64), mixed % (1 << 64)


def main() -> None:
    """Fill, sort, check, and say what moved."""
    size, capacity = (
        (int(sys.argv[i]) if len(sys.argv) > i else default) * MIB for i, default in ((1, 1024), (2, 256))
    )
    with (
        uvas.ProcessDevice(name="sorter", memory="private", capacity=capacity) as device,
        uvas.AddressSpace([device], name="sort") as space,
        space.reserve(2 * size, name="data") as held,
    ):
        held.commit()
        data, result = held.numpy(np.uint64, (2, size // 8))
        chance = np.random.default_rng(5)
        for start, end in runs_of(data, MIB):
            data[start:end] = chance.integers(0, 1 << 64, end - start, dtype=np.uint64)
        expected = fingerprint(data)
        print(f"{size // MIB} MiB of data, {capacity // MIB} MiB of device memory")

        began = time.perf_counter()
        runs = list(runs_of(data, capacity // 2 // 8))
        for start, end in runs:
            device.run(sort, data[start:end])
        at = 0
        for slices in pieces_of(data, runs, 4 * len(runs)):
            length = sum(end - start for start, end in slices)
            device.run(gather, data, slices, result[at : at + length])
            at += length
        elapsed = time.perf_counter() - began
        moved = space.movement().devices["sorter"]
        assert moved.resident_bytes <= capacity
        check(result, expected)
        print(f"sorted in {elapsed:.1f} s: {len(runs)} runs, {4 * len(runs)} pieces, all in order")
        print(f"{moved.bytes_in // MIB} MiB came to the device and {moved.bytes_out // MIB} MiB went back, "
              f"in {moved.read_faults + moved.write_faults} faults; {moved.evictions} evictions made room, "
              f"{moved.resident_bytes // MIB} MiB are there now")  # fmt: skip
        del data, result


if __name__ == "__main__":
    main()
