"""Blocks that streams of a GPU use: given back when these have come so far.

Every block of an arena whose space has a CUDA device notes the stream that is current when it is made. When it is
freed it is *pending*: it counts as freed, and its memory goes back to the arena once that stream, and others that use
it, have run what was queued. Nobody waits for that: it is looked at whenever something is allocated from the arena or
freed in order; and it is waited for when the arena is closed or out of memory.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from uvas._core._allocation import Hold
from uvas.devices.cuda import driver
from uvas.devices.cuda.marks import Mark, card_of, stream_pointer
from uvas.errors import DeviceError, NotSupportedError, ReleasedError, UvasError
from uvas.leases import Trace, find, in_hand, work_off

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from uvas._core._allocation import Allocation
    from uvas.devices.base import Device
    from uvas.devices.cuda.card import Card

    _Pending = tuple[list["Mark | _Later"], int, object]

__all__ = ["cards_of", "collect", "free_in_order", "keep", "look", "note", "pending", "retire_in_order", "use"]

_LEGACY, _OF_THE_THREAD = 0, 2
"""The default streams. The first waits for the second, which is another one in every thread."""


class _Process:
    """What is pending in this process; a forked child begins anew."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.lock = threading.Lock()  # of the lists; never held over a call
        self.pending: list[_Pending] = []
        """Marks to pass, the arena's handle, and what then gives the memory back by going."""
        self.used: dict[int, _Use] = {}
        self.kept: set[_Kept] = set()
        """To keep them. Whoever makes one adds it, whoever works off what finalizers left takes it away."""


class _Use(Trace):
    """The streams that use a block; when the block goes unfreed, they are marked then."""

    __slots__ = ("arena_id", "base", "streams")

    base: int
    arena_id: int
    streams: list[tuple[Card, object]]

    def end(self) -> None:
        """Put the block's memory among what is pending. Somebody who works off what finalizers left calls this."""
        with _process.lock:
            if _process.used.get(self.base) is not self:
                return  # it was freed
            del _process.used[self.base]
        holder = _Settle(self.alive, self.base)
        if not _look_first([_Later(self.streams)], self.arena_id, holder):
            holder.settle()


class _Kept(Trace):
    """What a kernel may be using still when the object goes that said so."""

    __slots__ = ("arena_id", "streams")

    arena_id: int
    streams: list[tuple[Card, object]]

    def end(self) -> None:
        """Keep it until the streams have come so far."""
        _process.kept.discard(self)
        _look_first([_Later(self.streams)], self.arena_id, self.alive)


class _Keeper:
    """Keeps something alive."""

    __slots__ = ("__weakref__", "what")

    def __init__(self, what: object) -> None:
        self.what = what


class _Later:
    """Streams that are marked when somebody looks for the first time.

    A finalizer calls no driver, and during a capture nothing can be marked.
    """

    def __init__(self, streams: Sequence[tuple[Card, object]]) -> None:
        self._streams = streams

    def marks(self) -> list[Mark] | None:
        """Return marks of what is queued now; None in the middle of a capture."""
        try:
            return _marks(self._streams)
        except NotSupportedError:
            return None


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


def cards_of(devices: Iterable[Device]) -> tuple[Card, ...]:
    """Return the cards of those devices that are CUDA's."""
    return tuple(one.card for one in devices if one.info.details.get("api") == "cuda")  # type: ignore[attr-defined]


def _cards_that_see(base: int) -> tuple[Card, ...]:
    held = find(base)
    cards = cards_of(held.space.devices) if held is not None else ()
    if not cards:
        raise NotSupportedError("an order after a stream", f"no CUDA device sees {base:#x}", "free it without an order")
    return cards


def _marks(streams: Iterable[tuple[Card, object]], after: tuple[Card, object] | None = None) -> list[Mark]:
    """Mark streams: all of them, or none."""
    made: list[Mark] = []
    try:
        if after is not None:
            made.append(Mark(*after))
        for card, stream in streams:
            try:
                made.append(Mark(card, _LEGACY if card.closed else stream))
            except DeviceError as error:
                if error.name != "CUDA_ERROR_INVALID_HANDLE":
                    raise
                made.append(Mark(card, _LEGACY))  # its owner has destroyed it
    except BaseException:
        for mark in made:
            mark.drop()
        raise
    return made


def _pass(marks: list[Mark | _Later], behind: set[tuple[Card, int]], *, wait: bool = False) -> None:
    """Take away what has been passed. `behind`: where something was seen that has not."""
    while marks:
        last = marks[-1]
        if isinstance(last, _Later):
            found = last.marks()
            if found is None:
                return
            marks[-1:] = found
        elif last.lane in behind:
            return
        elif last.passed(wait=wait):
            marks.pop()
        else:
            behind.add(last.lane)
            return


def _look_first(marks: list[Mark | _Later], arena_id: int, holder: object) -> bool:
    """Look once, and make it pending if it is not over; whether that was so. The driver's refusals are for later."""
    with suppress(UvasError):
        _pass(marks, set())
    if marks:
        _add(marks, arena_id, holder)
    return bool(marks)


def _add(marks: list[Mark | _Later], arena_id: int, holder: object) -> None:
    with _process.lock:
        _process.pending.append((marks, arena_id, holder))


def current(cards: Sequence[Card]) -> tuple[Card, object]:
    """Return the stream that is current in this thread, CuPy's or else the default one, and whose it is.

    The default one of each thread's own cannot be told to another thread: the one that waits for all of these stands
    for it, and also for a stream of a card that is none of these.
    """
    stream: Any = _LEGACY
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        with suppress(AttributeError, RuntimeError):  # it is being imported; its runtime finds no driver
            stream = cupy.cuda.get_current_stream()
    pointer = stream_pointer(stream)
    if len(cards) == 1:
        elsewhere = pointer > _OF_THE_THREAD and getattr(stream, "device_id", -1) not in (-1, cards[0].ordinal)
        return cards[0], _LEGACY if elsewhere or pointer == _OF_THE_THREAD else stream
    card, known = cards[0], False
    with suppress(UvasError):  # no card is current, say
        context = int(driver.call("cuStreamGetCtx", pointer))
        card, known = next(((one, True) for one in cards if one.context == context), (card, False))
    return card, stream if known and pointer != _OF_THE_THREAD else _LEGACY


def note(block: Allocation, core: Any, cards: Sequence[Card]) -> None:
    """Note for a block which stream is current, of these cards."""
    _use(block, core, current(cards))


def use(block: Allocation, core: Any, stream: object = None) -> None:
    """Note that a stream uses a block; None: the current one.

    Raises
    ------
    NotSupportedError
        No CUDA device of the space sees it.
    TypeError
        It is no stream.
    """
    cards = _cards_that_see(block.base)
    if stream is not None:
        stream_pointer(stream)
    _use(block, core, current(cards) if stream is None else (card_of(cards, stream), stream))


def _use(block: Allocation, core: Any, used: tuple[Card, object]) -> None:
    with _process.lock:
        known = _process.used.get(block.base)
        if known is None or known() is not block:
            known = _Use.of(block, None, core)
            known.base, known.arena_id, known.streams = block.base, block.arena_id, []
            _process.used[block.base] = known
        lane = used[0], stream_pointer(used[1])
        if all((card, stream_pointer(stream)) != lane for card, stream in known.streams):
            known.streams.append(used)
    block._order(True)


def keep(what: object, address: int, arena_id: int) -> object:
    """Return what keeps something alive, and when it goes, until the stream has come so far that is current now."""
    with suppress(UvasError):
        collect(arena_id)
    keeper = _Keeper(what)
    trace = _Kept.of(keeper, None, what)
    trace.arena_id, trace.streams = arena_id, [current(_cards_that_see(address))]
    _process.kept.add(trace)
    return keeper


def free_in_order(block: Allocation, after: object) -> None:
    """Free a block when the streams that use it, and this one, have come so far; see `Allocation.free`."""
    if block.freed:
        raise ReleasedError(f"{block!r} is no more")
    if block.holds:
        gc.collect()  # cycles that nobody can reach
    if holds := block.holds:
        raise BufferError(f"{block!r} is not freed under {holds} live {'array' if holds == 1 else 'arrays'}")
    retire_in_order(block, after)


@in_hand()  # until it is pending, no one else sees it
def retire_in_order(block: Allocation, after: object = None) -> None:
    """Do the same where arrays may live over it yet. Only `after` may not be in the middle of a capture."""
    can_ask = after is not None or driver.usable()
    if can_ask:
        collect()
    with _process.lock:
        known = _process.used.get(block.base)
        streams = [*known.streams] if known is not None and can_ask else []
    last = None if after is None else (card_of(_cards_that_see(block.base), after), after)
    marks: list[Mark | _Later]
    try:
        marks = [*_marks(streams, last)]  # before anything is changed: this may raise
    except NotSupportedError:
        marks = [*_marks((), last), _Later(streams)]
    hold = Hold(block, 0, 0)
    with _process.lock:
        _process.used.pop(block.base, None)
    block._order(False)
    block.retire()
    _look_first(marks, block.arena_id, hold)


def look(arena_id: int) -> None:
    """Give back what streams of an arena have passed, before something is allocated there."""
    if _process.pending:
        with suppress(UvasError):
            collect(arena_id)


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
    failures: list[UvasError] = []
    with in_hand():
        with _process.lock:
            looked_at = [one for one in _process.pending if arena_id in (None, one[1])]
            _process.pending = [one for one in _process.pending if arena_id not in (None, one[1])]
        done: list[_Pending] = []
        try:
            _look_at(looked_at, done, failures, wait=wait)
        finally:  # an interrupt, say
            gone = {id(one) for one in done}
            with _process.lock:
                _process.pending[:0] = [one for one in looked_at if id(one) not in gone]
    if failures:
        raise failures[0]


def _look_at(looked_at: list[_Pending], done: list[_Pending], failures: list[UvasError], *, wait: bool) -> None:
    behind: set[tuple[Card, int]] = set()
    for one in looked_at:
        marks, _, holder = one
        try:
            _pass(marks, behind, wait=wait)
        except UvasError as error:
            failures.append(error)
        if not marks:
            done.append(one)
            if isinstance(holder, _Settle):
                holder.settle()


def pending(arena_id: int) -> int:
    """Return how many blocks of an arena wait for streams."""
    with _process.lock:
        return sum(1 for _, arena, _ in _process.pending if arena == arena_id)
