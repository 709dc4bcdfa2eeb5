"""The harm: find a hole in /proc/self/maps, then map it with MAP_FIXED. A program of its own, which may well die.

``python -m uvas.demo.clobber SECONDS``

One thread maps 64 KiB wherever the kernel likes, writes a sentinel, looks at it, unmaps: any library. The main thread
chooses a hole *as the kernel chooses it* (the highest one that is large enough) and maps there destructively. Between
the look and the map the other thread may have come: then its memory is replaced without a word. Prints one JSON object
a line, the last one being the most recent state, so that a death loses nothing.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import threading
import time

_BLOCK = 64 << 10
_MAP_FIXED = 0x10  # this program shows what it does; the library's only use is in vm.c
_SENTINEL = 0x5EED5EED5EED5EED

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, flags: int) -> int:
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    got = _libc.mmap(address, _BLOCK, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    return int(got or 0)


def hole_as_the_kernel_chooses() -> int:
    """Return the top of the highest hole that holds a block, below the highest library: where mmap(NULL) goes."""
    with open("/proc/self/maps", "rb", buffering=0) as file:
        text = b"".join(iter(lambda: file.read(1 << 16), b""))
    spans = []
    for line in text.splitlines():
        if b"[stack]" in line:
            break
        low, _, high = line.split(b" ", 1)[0].partition(b"-")
        spans.append((int(low, 16), int(high, 16)))
    above = spans[-1][0]
    for start, end in reversed(spans[:-1]):
        if above - end >= _BLOCK:
            return above - _BLOCK
        above = start
    return 0


class Victim(threading.Thread):
    """Any library: maps, uses, unmaps."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self.lost = 0

    def run(self) -> None:
        """Go on until the process ends."""
        while True:
            address = _map(None, 0)
            word = ctypes.c_uint64.from_address(address)
            word.value = _SENTINEL
            time.sleep(0)  # works on it
            if word.value != _SENTINEL:
                self.lost += 1  # not ours any more: leave it to whoever has it now
            else:
                _libc.munmap(address, _BLOCK)
            self.rounds += 1


def main(seconds: float) -> None:
    """Race for `seconds`, telling the state as it goes."""
    victim = Victim()
    victim.start()
    maps = 0
    until = time.monotonic() + seconds
    told = 0.0
    while time.monotonic() < until:
        address = hole_as_the_kernel_chooses()
        if address and _map(address, _MAP_FIXED) == address:
            # And keeps it, untouched: giving it back would unmap the victim's memory too and end the count at once.
            maps += 1
        if time.monotonic() - told > 0.02:
            told = time.monotonic()
            print(json.dumps({"maps": maps, "victim_rounds": victim.rounds, "victim_lost": victim.lost}), flush=True)
    print(json.dumps({"maps": maps, "victim_rounds": victim.rounds, "victim_lost": victim.lost}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
