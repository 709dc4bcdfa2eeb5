"""Where the pages of an array are while the host and two devices with memory of their own work on it, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from uvas import AddressSpace, MovementStats, PageFlag, ProcessDevice

_GRANULE = 64 << 10
_GRANULES = 64  # of the array: as many as fit into a line of a terminal
_ROOM = 24  # granules that the left device has room for
_WORDS = _GRANULE // 8

_SIGNS: dict[int, tuple[str, str]] = {
    0: ("·", "dim"),
    PageFlag.HOST: ("H", "white on blue"),
    PageFlag.device(1): ("L", "white on dark_green"),
    PageFlag.device(2): ("R", "white on dark_red"),
}
_SEVERAL = ("+", "black on yellow")
_HOLDERS = int(PageFlag.HOST | PageFlag.device(1) | PageFlag.device(2))

_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Movement:
    """What moved in the act, and whether every party saw the right words."""

    right: bool
    faults: int
    bytes_in: int
    evictions: int
    pictures: tuple[str, ...]
    """A line for each step, a sign for each granule."""


def show(console: Console) -> Movement:
    """Draw a line for each step.

    Raises
    ------
    NotSupportedError
        This process may not have memory that moves when it is touched; the error says what would help.
    """
    with (
        ProcessDevice(name="L", memory="private", granule=_GRANULE, capacity=_ROOM * _GRANULE) as left,
        ProcessDevice(name="R", memory="private", granule=_GRANULE) as right,
        AddressSpace([left, right], name="moving") as space,
        space.reserve(_GRANULES * _GRANULE, name="array") as held,
    ):
        held.commit()
        words = held.numpy(np.uint64)
        pictures: list[str] = []
        all_right = True
        for told, work in _steps(space, words, left, right):
            began, before = time.perf_counter(), _faults(space.movement())
            all_right &= work()
            elapsed = time.perf_counter() - began
            faults = _faults(space.movement()) - before
            line = _drawn(space.where(words))
            pictures.append(line.plain)
            console.print(f"   {told}: {faults} faults, {1e3 * elapsed:.1f} ms", highlight=False)
            console.print(Text("   "), line, sep="")
        moved = space.movement()
        console.print(_legend())
        del words, work
    devices = moved.devices.values()
    return Movement(
        right=all_right,
        faults=_faults(moved),
        bytes_in=moved.host.bytes_in + sum(one.bytes_in for one in devices),
        evictions=sum(one.evictions for one in devices),
        pictures=tuple(pictures),
    )


def _steps(
    space: AddressSpace, words: _Words, left: ProcessDevice, right: ProcessDevice
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Each step in words, and what it does; that tells whether it saw what it had to see."""
    half, eighth = len(words) // 2, len(words) // 8

    def sent() -> bool:
        space.prefetch(words[half:], right)
        return True

    yield "nobody has touched it", lambda: True
    yield "the host writes", lambda: _count(words, 1)
    yield "L reads an eighth", lambda: left.run(_add_up, words[:eighth]) == eighth
    yield "L adds 1 there", lambda: left.run(_count, words[:eighth], 1)
    yield "the second half is sent to R", sent
    yield "R reads what L wrote", lambda: right.run(_add_up, words[:eighth]) == 2 * eighth
    yield "R adds 1 to its half", lambda: right.run(_count, words[half:], 1)
    yield f"L reads all, with room for {_ROOM}", lambda: left.run(_add_up, words) == len(words) + eighth + half
    yield "the host adds 1 everywhere", lambda: _count(words, 1)
    yield "R reads a word of each granule", lambda: right.run(_add_up, words[::_WORDS]) == 2 * _GRANULES + 8 + 32


def _add_up(words: _Words) -> int:
    """On whoever calls it: read."""
    return int(words.sum())


def _count(words: _Words, more: int) -> bool:
    """On whoever calls it: write."""
    words += np.uint64(more)
    return True


def _faults(moved: MovementStats) -> int:
    return sum(one.read_faults + one.write_faults for one in (moved.host, *moved.devices.values()))


def _drawn(flags: npt.NDArray[np.uint32]) -> Text:
    """Return a sign for each granule."""
    line = Text()
    for flag in flags.reshape(_GRANULES, -1)[:, 0]:
        line.append(*_SIGNS.get(int(flag) & _HOLDERS, _SEVERAL))
    return line


def _legend() -> Text:
    names = {"H": "the host alone", "L": "device L", "R": "device R", "·": "nowhere: zeros"}
    legend = Text("   ")
    for sign, style in (*_SIGNS.values(), _SEVERAL):
        legend.append(sign, style)
        legend.append(f" {names.get(sign, 'copies, to be read')}   ")
    return legend
