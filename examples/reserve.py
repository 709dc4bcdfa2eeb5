"""The tour: reserve, be refused, commit, map a file, ask whose an address is, release."""

from __future__ import annotations

import mmap
import os

import numpy as np

import uvas


def main() -> None:
    """Walk through the verbs of one space."""
    with uvas.AddressSpace(name="tour") as space:
        anywhere = space.reserve(1 << 30, name="anywhere")
        print(f"anywhere:  {anywhere.range}, addresses only: no memory is behind them yet")

        low = uvas.Range(0x2000_0000_0000, 1 << 40)
        inside = space.reserve(2 << 20, window=low, align=1 << 30, name="aligned")
        print(f"in a window, aligned to 1 GiB: {inside.range}")

        exact = space.reserve(1 << 20, at=low.base, name="exact")
        print(f"exactly at the address demanded: {exact.range}")
        try:
            space.reserve(1 << 20, at=low.base)
        except uvas.AddressInUseError as refusal:
            print(f"the same again is refused: {refusal}")

        stranger = mmap.mmap(-1, 1 << 20)  # any library's memory, at an address that it never told us
        theirs = np.frombuffer(stranger, np.uint8).ctypes.data
        try:
            space.reserve(1 << 20, at=theirs)
        except uvas.AddressInUseError as refusal:
            print(f"and so is what a stranger has: {refusal.owner}")

        anywhere.commit(0, 1 << 20)
        numbers = anywhere.numpy(np.int64, 1000)
        numbers[:] = np.arange(1000)
        print(f"committed 1 MiB: the array at {numbers.ctypes.data:#x} adds up to {numbers.sum()}")

        file = os.memfd_create("table")
        os.write(file, b"from a file".ljust(4096))
        exact.map_fd(file, offset=4096, size=4096, protection="r")
        os.close(file)  # uvas has a descriptor of its own
        print(f"a file inside the reservation: {bytes(exact.numpy('S11', 1, offset=4096)[0]).decode()!r}")

        found = uvas.find(numbers.ctypes.data + 4000)
        print(f"whose is the address {numbers.ctypes.data + 4000:#x}? {found!r}, the very object: {found is anywhere}")

        try:
            anywhere.release()
        except BufferError as busy:
            print(f"nothing is released under a live array: {busy}")
        del numbers
        anywhere.release()
        print(f"audit: {len(space.audit().findings)} differences between our book and the kernel's")
    print("closing the space released the rest")


if __name__ == "__main__":
    main()
