"""An arena of bare addresses, as a driver's runtime wants one: it says where, the driver says what.

A tebibyte of addresses is held; no memory is behind it. A toy driver makes buffer objects, each known by a descriptor,
and its runtime maps them at addresses that the arena hands out: one buffer at two addresses, two buffers side by side
in one block, another buffer behind the same address. The arena never touches what is behind its blocks.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np

import uvas

PAGE = mmap.PAGESIZE
HUGE = 2 << 20


class Driver:
    """Makes buffers: memory that is known by a descriptor, as that of a GPU is."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def buffer(self, size: int) -> int:
        """Return the descriptor of a new buffer of so many bytes."""
        descriptor = os.memfd_create(f"buffer {len(self.made)}")
        self.made.append(descriptor)
        os.truncate(descriptor, size)
        return descriptor

    def close(self) -> None:
        """Give up the descriptors; what is mapped stays mapped."""
        for descriptor in self.made:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Mapped:
    """Buffers at an address, one behind the other.

    Parameters
    ----------
    block
        The addresses.
    size
        Bytes of them that have memory behind them.
    """

    block: uvas.Allocation
    size: int


class Runtime:
    """Gives buffers addresses that mean the same to all who share the space.

    Parameters
    ----------
    held
        The addresses, of which an arena of its own hands out blocks.
    """

    def __init__(self, held: uvas.Reservation) -> None:
        self.held = held
        self.arena = uvas.Arena(held, backing="none", name="driver")

    def map(self, *buffers: int, align: int = PAGE) -> Mapped:
        """Map buffers one behind the other at a fresh address."""
        sizes = [os.fstat(one).st_size for one in buffers]
        mapped = Mapped(self.arena.alloc(sum(sizes), align=align), sum(sizes))
        offset = mapped.block.base - self.held.base
        for buffer, size in zip(buffers, sizes, strict=True):
            self.held.map_fd(buffer, offset=offset, size=size)
            offset += size
        return mapped

    def unmap(self, mapped: Mapped) -> None:
        """Take the memory away first, then give the addresses back: a free block may be another's at once."""
        self.held.decommit(mapped.block.base - self.held.base, mapped.size)
        mapped.block.free()

    def view(self, mapped: Mapped, dtype: str) -> np.ndarray:
        """Return an array over what is mapped; while it lives, `unmap` is refused."""
        count = mapped.size // np.dtype(dtype).itemsize
        return self.held.numpy(dtype, count, offset=mapped.block.base - self.held.base)


def whose(address: int) -> str:
    """Answer whose pointer it is."""
    found, block = uvas.find(address), uvas.allocation_of(address)
    if found is None:
        return f"{address:#x} is not ours"
    if block is None or block.arena is None:
        return f"{address:#x} is held by {found!r}, in no block"
    return f"{address:#x} is byte {address - block.range.base:#x} of a block of {block.arena.name!r}"


def tour(runtime: Runtime, driver: Driver) -> None:
    """Map, look, unmap."""
    picture, tail = driver.buffer(HUGE), driver.buffer(PAGE)
    first = runtime.map(picture, align=HUGE)
    second = runtime.map(picture, tail)
    print(f"one buffer at {first.block.base:#x} and at {second.block.base:#x}")

    pixels, again = runtime.view(first, "u4"), runtime.view(second, "u4")
    pixels[1000] = 0xC0FFEE
    again[-1] = 7
    print(f"written through the first address, read through the second: {again[1000]:#x}")
    assert again[1000] == 0xC0FFEE
    assert again.ctypes.data != pixels.ctypes.data
    assert int.from_bytes(os.pread(tail, 4, PAGE - 4), "little") == 7  # the second buffer lies right behind the first
    print(whose(pixels[1000:].ctypes.data))
    print(whose(runtime.held.end - 1))
    print(whose(id(driver)))

    try:
        runtime.unmap(first)
    except BufferError as refusal:
        print(f"nothing is taken away under a live array: {refusal}")
    del pixels
    at = first.block.base
    runtime.unmap(first)
    print(whose(at))
    assert again[1000] == 0xC0FFEE  # the buffer is the driver's, and still mapped at the other address

    third = runtime.map(driver.buffer(HUGE), align=HUGE)
    there = runtime.view(third, "u4")[1000]
    print(f"the address is used again: {third.block.base == at}; what is there now is {there}")
    del again
    for mapped in (second, third):
        runtime.unmap(mapped)


def main() -> None:
    """Hold a tebibyte, and sub-allocate from it."""
    with uvas.AddressSpace(name="gpu") as space, space.reserve(1 << 40, align=HUGE, name="heap") as held:
        runtime = Runtime(held)
        with runtime.arena as arena:
            print(f"{held.range} is {held.size >> 40} TiB with {space.stats().committed_bytes} bytes of memory")
            with arena.measure() as used:
                driver = Driver()
                tour(runtime, driver)
                driver.close()
                blocks = arena.alloc_many([HUGE] * 10_000)
            print(f"{used.allocations} blocks of {used.allocated_bytes / 2**30:.1f} GiB of addresses; the space has "
                  f"{space.stats().committed_bytes} bytes of memory committed")  # fmt: skip
            assert space.stats().committed_bytes == 0
            for block in blocks:
                block.free()
            arena.trim()  # this thread kept some for its next blocks
            arena.check()
            stats = arena.stats()
            assert (stats.live_blocks, stats.hole_count, stats.largest_hole) == (0, 1, held.size)
            print(f"all is one hole again: {stats.largest_hole == held.size}")
    print("released")


if __name__ == "__main__":
    main()
