"""What a block of code has allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvas.reports import ArenaStats

if TYPE_CHECKING:
    from uvas.arena import Arena


class Measurement:
    """What has been allocated in an arena since `Arena.measure` began, by all threads.

    Inside the ``with`` block the numbers go on, at its end they stand still.
    """

    __slots__ = ("_arena", "_floor", "_now", "_start")

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._start = arena.stats()
        self._floor = arena.restart_peak(0)
        self._now: ArenaStats | None = None

    def _end(self) -> None:
        self._now = self._arena.stats()
        self._arena.restart_peak(max(self._floor, self._now.peak_bytes))

    def _stats(self) -> ArenaStats:
        return self._now or self._arena.stats()

    @property
    def allocations(self) -> int:
        """Blocks allocated, freed or not."""
        return self._stats().total_blocks - self._start.total_blocks

    @property
    def allocated_bytes(self) -> int:
        """Of those blocks."""
        return self._stats().total_bytes - self._start.total_bytes

    @property
    def live_blocks(self) -> int:
        """How many more live than at the beginning."""
        return self._stats().live_blocks - self._start.live_blocks

    @property
    def live_bytes(self) -> int:
        """Of the blocks that live, how many more bytes than at the beginning."""
        return self._stats().live_bytes - self._start.live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes of pages that were in use at once beyond those in use at the beginning.

        What threads keep counts as in use, so a block of code that lives from it shows less: `Arena.trim` before.
        """
        return max(0, self._stats().peak_bytes - self._start.used_bytes)

    def __repr__(self) -> str:
        return (
            f"<Measurement: {self.allocations} allocations of {self.allocated_bytes:#x} bytes, "
            f"{self.peak_bytes:#x} more in use at the peak, {self.live_blocks} of {self.live_bytes:#x} bytes live>"
        )


class Measuring:
    """The context manager of `Arena.measure`."""

    __slots__ = ("_arena", "_measurements")

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._measurements: list[Measurement] = []

    def __enter__(self) -> Measurement:
        self._measurements.append(Measurement(self._arena))
        return self._measurements[-1]

    def __exit__(self, *exception: object) -> None:
        if not self._measurements:
            raise RuntimeError("there is nothing to end: arena.measure() begins with a with block")
        measurement = self._measurements.pop()
        if not self._arena.closed:
            measurement._end()
