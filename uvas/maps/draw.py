"""A map for people: each neighbourhood of addresses as a bar and a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.panel import Panel

from uvas.maps.kernel import Mapping
from uvas.maps.rows import MapRow, RowKind
from uvas.ranges import Range
from uvas.report import Holding, Kind, foreign_holdings, map_panel

_KINDS: dict[RowKind, Kind] = {
    "reserved": "reserved",
    "committed": "committed",
    "adopted": "adopted",
    "hole": "amiss",
    "foreign": "amiss",
    "changed": "amiss",
    "lost": "amiss",
    "unregistered": "unknown",
    "unknown": "unknown",
}
_ROWS = 40
_FAR = 1 << 30
"""Bytes without uvas between two neighbourhoods, each of which gets a bar of its own."""


def panels(rows: Iterable[MapRow], book: Sequence[Mapping], *, width: int) -> list[Panel]:
    """Draw a map, each neighbourhood by itself, with the strangers of the kernel's book between; `width` in columns."""
    return [_panel(near, book, width) for near in _neighbourhoods(rows)]


def _neighbourhoods(rows: Iterable[MapRow]) -> Iterator[list[MapRow]]:
    near: list[MapRow] = []
    for row in rows:
        if near and row.range.base - near[-1].range.end > _FAR:
            yield near
            near = []
        near.append(row)
    if near:
        yield near


def _panel(rows: Sequence[MapRow], book: Sequence[Mapping], width: int) -> Panel:
    window = Range(rows[0].range.base, rows[-1].range.end - rows[0].range.base)
    holdings = [Holding(row.range, _words(row), _KINDS[row.kind]) for row in rows]
    strangers = foreign_holdings(window, [row.range for row in rows], book)
    return map_panel(window, holdings, strangers=strangers, width=width, rows=_ROWS)


def _words(row: MapRow) -> str:
    whose = f"{row.space}: {row.kind}"
    return ", ".join(part for part in (whose, f'"{row.name}"' if row.name else "", row.detail) if part)
