"""NumPy's own allocations from an arena.

NumPy keeps what it allocates with in a `contextvars` variable. So a new thread begins with NumPy's default, an asyncio
task with what its creator used; `NumpyAllocator.bind` carries an allocator into threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from uvas._core import handler
from uvas.arena import Arena
from uvas.errors import ReleasedError
from uvas.interrupts import held_back

_P = ParamSpec("_P")
_R = TypeVar("_R")

_before: ContextVar[tuple[object, ...]] = ContextVar("uvas_numpy_before", default=())
"""What NumPy used before each block and `install` that this context is in, outermost first."""


class NumpyAllocator:
    """Lets NumPy allocate from an arena: in a ``with`` block, from `install` on, or in a function.

    Made by `numpy_allocator`, which says the rest.

    Parameters
    ----------
    arena
        Whose memory it is, or a function that returns it when it is first needed.
    """

    __slots__ = ("_source",)

    def __init__(self, arena: Arena | Callable[[], Arena]) -> None:
        self._source = arena

    @property
    def arena(self) -> Arena:
        """Whose memory it is."""
        return self._source if isinstance(self._source, Arena) else self._source()

    def install(self) -> Self:
        """Let NumPy allocate from the arena from here on, in this context: in this thread, until `uninstall`.

        As the initializer of an executor it serves every thread of it::

            ThreadPoolExecutor(4, initializer=uvas.numpy_allocator(arena).install)

        Raises
        ------
        ReleasedError
            The arena has been closed.
        ValueError
            The arena hands out bare addresses.
        """
        arena = self.arena
        if arena.closed:
            raise ReleasedError(f"{arena!r} hands out nothing more")
        if arena.backing == "none":
            raise ValueError(f"{arena!r} hands out bare addresses: NumPy wants memory behind them")
        capsule = handler.make(arena._core, arena._core.id, arena._limit)
        with held_back():  # both or neither
            _before.set((*_before.get(), handler.set(capsule)))
        return self

    def uninstall(self) -> None:
        """Let NumPy allocate from what it used before the latest `install` in this context. Arrays stay as they are.

        Raises
        ------
        RuntimeError
            Nothing is installed in this context.
        """
        before = _before.get()
        if not before:
            raise RuntimeError("NumPy's own allocator is in use in this context: nothing has been installed here")
        with held_back():
            handler.set(before[-1])
            _before.set(before[:-1])

    def bind(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Return the function with this allocator around it, for executors and threads, which begin without one.

        Examples
        --------
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> import numpy as np, uvas
        >>> with uvas.AddressSpace() as space, Arena(space) as arena, ThreadPoolExecutor(1) as threads:
        ...     array = threads.submit(NumpyAllocator(arena).bind(np.arange), 1000).result()
        ...     uvas.allocation_of(array).arena is arena
        ...     del array
        True
        """

        @functools.wraps(function)
        def bound(*arguments: _P.args, **names: _P.kwargs) -> _R:
            with self:
                return function(*arguments, **names)

        return bound

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"numpy_allocator({self.arena!r})"
