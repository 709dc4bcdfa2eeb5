"""uvas from Python: an arena of a space of its own."""

from __future__ import annotations

from typing import Any

import uvas


class Allocator:
    """``arena.alloc``."""

    name = "uvas"
    get = "pip install ."

    def __init__(self) -> None:
        self.arena = uvas.Arena(uvas.AddressSpace())

    def alloc(self, size: int) -> Any:
        """Return a block."""
        return self.arena.alloc(size)

    def address(self, block: Any) -> int:
        """Return where it lies."""
        return int(block.base)

    def free(self, block: Any) -> None:
        """Take it back."""
        block.free()

    def pairs(self, size: int, count: int) -> None:
        """Allocate and free, `count` times."""
        alloc = self.arena.alloc
        for _ in range(count):
            alloc(size).free()

    def many(self, sizes: list[int]) -> None:
        """Allocate all at once, and free them."""
        self.arena.alloc_many(sizes)
