"""A hash index built by the host and probed by two devices, each with memory of its own.

The index is open addressing: an array of keys and one of values, where a key lies at the first free place from its hash
on. The host builds it in unified memory. A device looks keys up at the very addresses, and the pages that it touches
come to it, as copies while everybody only reads. When the host changes values, the copies of just those pages go, and
the next look-up brings the new ones.

    python hash_index.py [KEYS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

import uvas

EMPTY = np.uint64(0)
"""No key: keys are odd here."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Multiplicative hashing (Knuth, TAOCP 3, 6.4): the high bits of the product are well mixed."""


def places(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return, for each key, the place where it is, or the free one where it would be."""
    mask = np.uint64(len(table) - 1)
    shift = np.uint64(64 - (len(table) - 1).bit_length())
    at = (wanted * GOLDEN >> shift) & mask
    searching = np.arange(len(wanted))
    while len(searching):
        found = table[at[searching]]
        searching = searching[(found != wanted[searching]) & (found != EMPTY)]
        at[searching] = (at[searching] + np.uint64(1)) & mask
    return at


def insert(table: np.ndarray, keys: np.ndarray) -> None:
    """Put keys into the table; of those that meet at one place the first stays, the others go on."""
    while len(keys):
        at = places(table, keys)
        _, first = np.unique(at, return_index=True)
        table[at[first]] = keys[first]
        keys = np.delete(keys, first)


def probe(table: np.ndarray, values: np.ndarray, wanted: np.ndarray, answers: np.ndarray) -> int:
    """On a device: write the values of keys, 0 for those that are not there; how many are."""
    at = places(table, wanted)
    there = table[at] == wanted
    answers[:] = np.where(there, values[at], 0)
    return int(there.sum())


def show(space: uvas.AddressSpace, what: str) -> None:
    """Print what has moved so far."""
    moved = space.movement()
    for name, party in (("host", moved.host), *moved.devices.items()):
        print(f"   {name}: {party.read_faults + party.write_faults} faults, {party.bytes_in >> 10} KiB came in {what}")


def look_up(devices: Sequence[uvas.ProcessDevice], arrays: Sequence[np.ndarray], half: int) -> list[int]:
    """Let each device probe for half of the keys, at the same time; how many each has found."""
    table, values, wanted, answers = arrays
    parts = (slice(0, half), slice(half, None))
    probing = [
        device.submit(probe, table, values, wanted[part], answers[part])
        for device, part in zip(devices, parts, strict=True)
    ]
    return [one.result() for one in probing]


def main() -> None:
    """Build, probe, change, probe again."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400_000
    size = 2 << (count - 1).bit_length()  # between a quarter and a half full
    chance = np.random.default_rng(20)
    keys = np.unique(chance.integers(1, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    with (
        uvas.ProcessDevice(name="left", memory="private") as left,
        uvas.ProcessDevice(name="right", memory="private") as right,
        uvas.AddressSpace([left, right], name="index") as space,
        uvas.Arena(space, name="tables") as arena,
    ):
        with uvas.numpy_allocator(arena):
            table, values = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
            wanted = np.concatenate([keys, keys + np.uint64(1)])  # the even ones are not there
            chance.shuffle(wanted)
            answers = np.zeros_like(wanted)
        insert(table, keys)
        values[places(table, keys)] = keys ^ GOLDEN
        space.advise(table, "read_mostly", None)
        print(f"the host built an index of {len(keys)} keys in {(table.nbytes + values.nbytes) >> 20} MiB")

        found = look_up((left, right), (table, values, wanted, answers), len(wanted) // 2)
        expected = np.where(wanted & np.uint64(1), wanted ^ GOLDEN, EMPTY)
        assert np.array_equal(answers, expected)
        print(f"the devices found {found[0]} and {found[1]}, all of them right: {sum(found) == len(keys)}")
        show(space, "so far")

        before = space.movement().devices["left"].bytes_in
        changed = keys[:100]
        values[places(table, changed)] += np.uint64(1)
        asked = np.isin(wanted, changed)
        look_up((left, right), (table, values, wanted, answers), len(wanted) // 2)
        assert np.array_equal(answers, expected + asked)
        again = space.movement().devices["left"].bytes_in - before
        print(f"after {len(changed)} changes by the host {again >> 10} KiB came to left anew; the table of keys, "
              f"{table.nbytes >> 10} KiB, stayed")  # fmt: skip
        show(space, "in all")
        del table, values, wanted, answers


if __name__ == "__main__":
    main()
