"""Blocks that streams of a GPU use: given back when these have come so far.

A block that is freed ``after=stream`` is *pending*: it counts as freed, and its memory goes back to the arena once the
stream has run what was queued. Nobody waits for that: it is looked at whenever something is freed in order, and when
the arena is trimmed, closed, or out of memory.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from uvas._core._allocation import Hold
from uvas.devices.cuda.marks import Mark, card_of
from uvas.errors import NotSupportedError, ReleasedError, UvasError
from uvas.leases import Trace, find, work_off

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uvas._core._allocation import Allocation

__all__ = ["collect", "free_in_order", "retire_in_order", "use"]


class _Process:
    """What is pending in this process; a forked child begins anew."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.lock = threading.Lock()  # of the lists; never held over a call
        self.pending: list[tuple[list[Mark | _Later], int, object]] = []
        """Marks to pass, the arena's handle, and what then gives the memory back by going."""
        self.used: dict[int, _Use] = {}


class _Use(Trace):
    """The streams that use a block; when the block goes unfreed, they are marked then."""

    __slots__ = ("arena_id", "base", "streams")

    base: int
    arena_id: int
    streams: list[object]

    def end(self) -> None:
        """Put the block's memory among what is pending. Somebody who works off what finalizers left calls this."""
        with _process.lock:
            if _process.used.get(self.base) is not self:
                return  # it was freed
            del _process.used[self.base]
        _add([_Later(self.base, self.streams)], self.arena_id, _Settle(self.alive, self.base))


class _Later:
    """Streams that are marked when somebody looks for the first time: a finalizer calls no driver."""

    def __init__(self, base: int, streams: list[object]) -> None:
        self._base, self._streams = base, streams
        self._marks: list[Mark] | None = None

    def passed(self, *, wait: bool = False) -> bool:
        """Whether what was queued then, at the latest when first looked at, has run."""
        if self._marks is None:
            try:
                self._marks = [*_marks(self._base, self._streams)]
            except NotSupportedError:
                return False  # in the middle of a capture
        while self._marks and self._marks[-1].passed(wait=wait):
            self._marks.pop()
        return not self._marks


class _Settle:
    """Gives a block of which no object is left back to its arena, when it goes itself."""

    __slots__ = ("_base", "_core")

    def __init__(self, core: Any, base: int) -> None:
        self._core, self._base = core, base
        core.owe()

    def settle(self) -> None:
        """Give it back."""
        self._core.settle(self._base)


keepers: dict[int, list[Callable[[], None]]] = {}
"""Who keeps blocks of an arena for streams, by its handle; called when it is to be closed."""

_process = _Process()
os.register_at_fork(after_in_child=_process.begin)


def _marks(base: int, streams: Iterable[object]) -> Iterable[Mark]:
    held = find(base)
    devices = held.space.devices if held is not None else ()
    cards = [one.card for one in devices if one.info.details.get("api") == "cuda"]  # type: ignore[attr-defined]
    if not cards:
        raise NotSupportedError("an order after a stream", f"no CUDA device sees {base:#x}", "free it without an order")
    for stream in streams:
        yield Mark(card_of(cards, stream), stream)


def _add(marks: list[Mark | _Later], arena_id: int, holder: object) -> None:
    with _process.lock:
        _process.pending.append((marks, arena_id, holder))


def use(block: Allocation, core: Any, stream: object) -> None:
    """Note that a stream uses a block.

    Raises
    ------
    NotSupportedError
        No CUDA device of the space sees it.
    """
    for _ in _marks(block.base, ()):
        pass
    with _process.lock:
        known = _process.used.get(block.base)
        if known is None or known() is not block:
            known = _Use.of(block, None, core)
            known.base, known.arena_id, known.streams = block.base, block.arena_id, []
            _process.used[block.base] = known
        known.streams.append(stream)
    block._order(True)


def free_in_order(block: Allocation, after: object) -> None:
    """Free a block when the streams that use it, and this one, have come so far; see `Allocation.free`."""
    if block.freed:
        raise ReleasedError(f"{block!r} is no more")
    if block.holds:
        raise BufferError(f"{block!r} is not freed under {block.holds} live arrays")
    retire_in_order(block, after)


def retire_in_order(block: Allocation, after: object = None) -> None:
    """Do the same where arrays may live over it yet."""
    collect()
    with _process.lock:
        known = _process.used.get(block.base)
    streams = [*(known.streams if known is not None else ()), *(() if after is None else (after,))]
    marks: list[Mark | _Later] = [*_marks(block.base, streams)]  # before anything is changed: this may raise
    hold = Hold(block, 0, 0)
    with _process.lock:
        _process.used.pop(block.base, None)
    block._order(False)
    block.retire()
    _add(marks, block.arena_id, hold)


def collect(arena_id: int | None = None, *, wait: bool = False) -> None:
    """Give back what streams have passed, of one arena or of all; or wait for them.

    Raises
    ------
    DeviceError
        The driver said no; what is pending stays so.
    """
    work_off()
    if wait:
        for keeper in [*keepers.get(arena_id or 0, ())]:
            keeper()
    with _process.lock:
        looked_at = [one for one in _process.pending if arena_id in (None, one[1])]
        _process.pending = [one for one in _process.pending if arena_id not in (None, one[1])]
    failures = []
    for marks, arena, holder in looked_at:
        try:
            while marks and marks[-1].passed(wait=wait):
                marks.pop()
        except UvasError as error:
            failures.append(error)
        if marks:
            _add(marks, arena, holder)
        elif isinstance(holder, _Settle):
            holder.settle()
    if failures:
        raise failures[0]


def pending(arena_id: int) -> int:
    """Return how many blocks of an arena wait for streams."""
    with _process.lock:
        return sum(1 for _, arena, _ in _process.pending if arena == arena_id)
