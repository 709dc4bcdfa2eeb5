"""Threads that map and unmap without asking anybody, as libraries do, in the window where uvas reserves.

Each block that a squatter holds carries a sentinel; before it is given back the sentinel is looked at. A sentinel that
changed means that somebody mapped over the block.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
from types import TracebackType

from uvas.ranges import Range

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_NOREPLACE = 0x100000
_FAILED = ctypes.c_void_p(-1).value


def map_at(address: int, size: int) -> bool:
    """Map private memory at `address` if nothing is there; tell whether it is ours."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NOREPLACE
    got = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if got == _FAILED or got is None:
        return False
    if got != address:
        _libc.munmap(got, size)
        return False
    return True


def unmap(address: int, size: int) -> None:
    """Give back what `map_at` got."""
    _libc.munmap(address, size)


class Squatters:
    """A crowd of threads, each with a few blocks of the window in its hands, always taking and giving back.

    Parameters
    ----------
    window
        Where they map.
    threads
        How many.
    blocks
        How many blocks each holds at once, at most.
    block
        Bytes of a block.
    seed
        Of the places that they choose.
    """

    def __init__(self, window: Range, *, threads: int, blocks: int, block: int, seed: int) -> None:
        self._window = window
        self._block = block
        self._blocks = blocks
        self._stop = threading.Event()
        self._settled = threading.Barrier(threads + 1)
        self.taken = 0  # blocks mapped, ever; each thread adds under the lock when it ends
        self.lost = 0  # sentinels that changed
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._squat, args=(random.Random(seed + i),), daemon=True) for i in range(threads)
        ]

    def __enter__(self) -> Squatters:
        for thread in self._threads:
            thread.start()
        self._settled.wait()  # the window is crowded before anybody is asked to find room in it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _squat(self, chance: random.Random) -> None:
        held: list[tuple[int, int]] = []
        taken = lost = 0
        places = self._window.size // self._block
        settled = False
        while not self._stop.is_set():
            if len(held) < self._blocks:
                address = self._window.base + chance.randrange(places) * self._block
                if map_at(address, self._block):
                    sentinel = chance.getrandbits(63) | 1
                    ctypes.c_uint64.from_address(address).value = sentinel
                    held.append((address, sentinel))
                    taken += 1
                    continue
            if not settled:
                self._settled.wait()
                settled = True
            address, sentinel = held.pop(chance.randrange(len(held))) if held else (0, 0)
            if address:
                lost += ctypes.c_uint64.from_address(address).value != sentinel
                unmap(address, self._block)
            self._stop.wait(0.001)
        for address, sentinel in held:
            lost += ctypes.c_uint64.from_address(address).value != sentinel
            unmap(address, self._block)
        with self._lock:
            self.taken += taken
            self.lost += lost
