"""CuPy's allocations from an arena, in the order of streams."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

from uvas import ordered
from uvas._core import ffi, lib
from uvas.arena import Arena
from uvas.arrays import default_arena
from uvas.devices.adapter import raise_answer
from uvas.errors import NotSupportedError, ReleasedError
from uvas.interop.view import cupy_module
from uvas.reports import OrderStats

__all__ = ["CupyAllocator", "cupy_allocator"]

_STREAM_FUNCTION = "get_current_stream_ptr"
_SIGNATURE = b"intptr_t (void)"
_ALIGNMENT = 512

_kept: dict[int, CupyAllocator] = {}
"""Those that have been used, by what C knows them by: CuPy's arrays do not keep what frees them."""


def cupy_allocator(arena: Arena | None = None) -> CupyAllocator:
    """Return what lets CuPy allocate every array from an arena.

    ``cupy.cuda.set_allocator(uvas.cupy_allocator(arena))`` for all threads, or as a context manager for a block of code
    in this thread. A block that CuPy frees is handed out again at once to the stream that was current at its
    allocation, as CuPy's own pool does, and to others after `CupyAllocator.trim`.

    Parameters
    ----------
    arena
        Of a space with a `CudaDevice`; None: the default one. An arena of bare addresses hands out memory on a card, if
        its owner has committed that.

    Raises
    ------
    NotSupportedError
        CuPy is not installed, or no CUDA device shares the arena's memory.
    ReleasedError
        The arena has been closed.
    """
    return CupyAllocator(default_arena() if arena is None else arena)


def _current_stream() -> Any:
    """Return the C function of CuPy's that tells the calling thread's stream. It needs the GIL, which CuPy has."""
    from cupy_backends.cuda import stream

    take = ctypes.pythonapi.PyCapsule_GetPointer
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ffi.cast("intptr_t(*)(void)", take(stream.__pyx_capi__[_STREAM_FUNCTION], _SIGNATURE))


class CupyAllocator:
    """An allocator for ``cupy.cuda.set_allocator``; made by `cupy_allocator`.

    Called with a size it returns a ``cupy.cuda.MemoryPointer``. Allocating and freeing are C functions, which keep the
    GIL and never wait with it.
    """

    __slots__ = ("_allocator", "_arena", "_cards", "_current", "_order", "_using")

    def __init__(self, arena: Arena) -> None:
        if arena.closed:
            raise ReleasedError(f"{arena!r} hands out nothing more")
        cupy = cupy_module()
        self._arena = arena
        devices = arena.space.devices
        self._cards = [one.card for one in devices if one.info.details.get("api") == "cuda"]  # type: ignore[attr-defined]
        if not self._cards:
            raise NotSupportedError(
                "CuPy's arrays in that arena", f"no CUDA device is in {arena.space!r}", "attach a CudaDevice to it"
            )
        self._using = ExitStack()
        self._order = ffi.NULL
        current = _current_stream()
        self._current = ctypes.PYFUNCTYPE(ctypes.c_ssize_t)(int(ffi.cast("intptr_t", current)))  # with the GIL
        cell = ffi.new("struct uvas_order **")
        options = ffi.new("struct uvas_order_options *")
        options.arena, options.current = arena._core.id, current
        options.wait, options.context = lib.uvas_py_order_wait, ffi.cast("void *", id(self))
        code = lib.uvas_order_open(options, cell)
        if code < 0:
            raise raise_answer(code)
        self._order = cell[0]
        _kept[id(self)] = self
        ordered.keepers.setdefault(arena._core.id, []).append(self._settle)
        address, malloc, free = (
            int(ffi.cast("intptr_t", one))
            for one in (self._order, ffi.addressof(lib, "uvas_order_malloc"), ffi.addressof(lib, "uvas_order_free"))
        )
        self._allocator = cupy.cuda.memory.CFunctionAllocator(address, malloc, free, self)

    def __call__(self, size: int) -> Any:
        """Return memory for CuPy.

        Raises
        ------
        OutOfMemoryError, AddressSpaceExhaustedError, LimitReachedError
            As of `Arena.alloc`, after everything that streams have done with has been given back.
        ReleasedError
            It has been closed.
        """
        if not self._order:
            raise ReleasedError(f"{self!r} is closed")
        memory = self._allocator.malloc(size)
        if size and not memory.ptr:  # CuPy does not look
            raise self._arena._failed(int(lib.uvas_last_failure().code), size)
        return memory

    @property
    def arena(self) -> Arena:
        """Whose memory it hands out."""
        return self._arena

    def stats(self) -> OrderStats:
        """Return what is handed out, and what is kept for streams."""
        stats = ffi.new("struct uvas_order_stats *")
        if self._order:
            lib.uvas_order_stats(self._order, stats)
        return OrderStats(**{name: getattr(stats, name) for name in OrderStats.__slots__})

    def trim(self) -> int:
        """Wait for all cards, and give what is kept for streams back to the arena; return its bytes.

        Raises
        ------
        DeviceError
            A stream is being captured, or the driver said no otherwise.
        """
        if not self._order:
            return 0
        stream = self._current()
        for card in self._cards:
            card.synchronize(stream)
        given = ffi.new("uint64_t *")
        lib.uvas_order_trim(self._order, given)
        return int(given[0])

    def _wait(self, size: int, out: Any) -> int:
        """Allocate where that may wait, or where there is no memory: what streams have done with goes back first."""
        code = int(lib.uvas_alloc(self._arena._core.id, size, _ALIGNMENT, out))
        if code < 0 and self.stats().kept_blocks:
            try:
                self.trim()
            except (NotSupportedError, OSError):
                return code  # in the middle of a capture: nothing can be given back
            code = int(lib.uvas_alloc(self._arena._core.id, size, _ALIGNMENT, out))
        return code

    def close(self) -> None:
        """Give everything back to the arena; a second time does nothing. CuPy must not be using it any more.

        Raises
        ------
        BufferError
            CuPy's arrays in it live.
        DeviceError
            As of `trim`.
        """
        if not self._order:
            return
        self.trim()
        if lib.uvas_order_close(self._order) < 0:
            live = self.stats().live_blocks
            arrays = "1 array of CuPy's lives" if live == 1 else f"{live} arrays of CuPy's live"
            raise BufferError(f"{self!r} is not closed: {arrays} in it")
        self._order = ffi.NULL
        _kept.pop(id(self), None)
        ordered.keepers[self._arena._core.id].remove(self._settle)

    def _settle(self) -> None:
        """Give back what can be: the arena is to be closed."""
        self.trim()
        if not self.stats().live_blocks:
            self.close()

    def __enter__(self) -> Self:
        """Let CuPy allocate from it, in this thread."""
        if not self._order:
            raise ReleasedError(f"{self!r} is closed")
        self._using.enter_context(cupy_module().cuda.using_allocator(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let CuPy allocate as before. Arrays made meanwhile live on."""
        self._using.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled or copied: addresses belong to one process")

    def __repr__(self) -> str:
        return f"<CupyAllocator of {self._arena!r}{'' if self._order else ', closed'}>"


@ffi.def_extern(error=-12)
def uvas_py_order_wait(context: Any, size: int, out: Any) -> int:
    """Allocate for C, where that may wait."""
    allocator = _kept.get(int(ffi.cast("uintptr_t", context)))
    return -12 if allocator is None else allocator._wait(size, out)
