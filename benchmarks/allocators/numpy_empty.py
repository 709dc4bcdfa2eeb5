"""NumPy's own allocations, as its users make them."""

from __future__ import annotations

from typing import Any

import numpy as np


class Allocator:
    """Bytes from ``np.empty``; an array frees its memory when it goes."""

    name = "np.empty"
    get = "pip install numpy"

    def alloc(self, size: int) -> Any:
        """Return a block."""
        return np.empty(size, np.uint8)

    def address(self, block: Any) -> int:
        """Return where it lies."""
        return int(block.ctypes.data)

    def free(self, block: Any) -> None:
        """Take it back: it goes with its last reference."""

    def pairs(self, size: int, count: int) -> None:
        """Allocate and free, `count` times."""
        for _ in range(count):
            np.empty(size, np.uint8)

    def many(self, sizes: list[int]) -> None:
        """Allocate all at once, and free them."""
        [np.empty(size, np.uint8) for size in sizes]
