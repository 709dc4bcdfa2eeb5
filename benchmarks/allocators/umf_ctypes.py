"""UMF's disjoint pool over fixed memory, by ctypes: it has no Python API."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
from typing import Any

SIZE = 1 << 30


class Allocator:
    """``umfPoolMalloc`` and ``umfPoolFree``."""

    name = "UMF by ctypes"
    get = "pip install umf"

    def __init__(self) -> None:
        files = importlib.metadata.files("umf") or []
        umf = ctypes.CDLL(str(next(file.locate() for file in files if file.name == "libumf.so")))
        for name in ("umfFixedMemoryProviderOps", "umfDisjointPoolOps", "umfPoolMalloc"):
            getattr(umf, name).restype = ctypes.c_void_p
        self.memory = mmap.mmap(-1, SIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.pool = ctypes.c_void_p()
        of_provider, provider, of_pool = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        provider_ops, pool_ops = (
            ctypes.c_void_p(umf.umfFixedMemoryProviderOps()),
            ctypes.c_void_p(umf.umfDisjointPoolOps()),
        )
        codes = [
            umf.umfFixedMemoryProviderParamsCreate(
                ctypes.c_void_p(base), ctypes.c_size_t(SIZE), ctypes.byref(of_provider)
            ),
            umf.umfMemoryProviderCreate(provider_ops, of_provider, ctypes.byref(provider)),
            umf.umfDisjointPoolParamsCreate(ctypes.byref(of_pool)),
            umf.umfPoolCreate(pool_ops, provider, of_pool, 0, ctypes.byref(self.pool)),
        ]
        if any(codes):
            raise OSError(f"UMF refuses: {codes}")
        self.malloc, self.give_back = umf.umfPoolMalloc, umf.umfPoolFree
        self.malloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.give_back.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def alloc(self, size: int) -> Any:
        """Return a block: its address."""
        return self.malloc(self.pool, size)

    def address(self, block: Any) -> int:
        """Return where it lies."""
        return int(block)

    def free(self, block: Any) -> None:
        """Take it back."""
        self.give_back(self.pool, block)

    def pairs(self, size: int, count: int) -> None:
        """Allocate and free, `count` times."""
        malloc, free, pool = self.malloc, self.give_back, self.pool
        for _ in range(count):
            free(pool, malloc(pool, size))

    def many(self, sizes: list[int]) -> None:
        """Allocate all at once, and free them."""
        for block in [self.malloc(self.pool, size) for size in sizes]:
            self.give_back(self.pool, block)
