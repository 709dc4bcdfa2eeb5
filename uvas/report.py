"""What a person looks at: who holds which addresses of a window, as a bar and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from uvas.maps.kernel import Mapping
from uvas.ranges import Range, first_above

Kind = Literal["foreign", "reserved", "ours", "committed", "adopted", "unknown", "amiss"]

_STYLES: dict[str, str] = {
    "free": "bright_black",
    "foreign": "red",
    "reserved": "green",
    "ours": "green",
    "committed": "green",
    "adopted": "cyan",
    "unknown": "yellow",
    "amiss": "bold red",
}
_CELLS = {
    "free": "·",
    "foreign": "▒",
    "reserved": "░",
    "ours": "█",
    "committed": "█",
    "adopted": "▓",
    "unknown": "?",
    "amiss": "!",
}
_LEGEND = {
    "ours": "uvas",
    "committed": "committed",
    "reserved": "reserved",
    "adopted": "adopted",
    "unknown": "not told",
    "amiss": "not as uvas left it",
    "foreign": "somebody else",
    "free": "free",
}
_PRECEDENCE = tuple(_CELLS)
"""Of several kinds in one cell of a bar the last one is drawn."""

_WIDEST_BAR = 96
_FRAME = 4  # columns that the panel takes
_ADDRESSES_WIDTH = 29
_SIZE_WIDTH = 9
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Holding:
    """A range of addresses and who holds it."""

    range: Range
    holder: str
    kind: Kind


def format_size(size: int) -> str:
    """Write a number of bytes as a person would: ``format_size(1 << 26)`` is ``'64 MiB'``.

    >>> format_size(1 << 26), format_size(1536)
    ('64 MiB', '1.5 KiB')
    """
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes all")


def foreign_holdings(window: Range, ours: Iterable[Range], book: Iterable[Mapping]) -> list[Holding]:
    """List the mappings of a kernel's book inside `window` that no range of `ours`, which are disjoint, overlaps.

    O(n log n) in both.
    """
    ours = sorted(ours)
    found: list[Holding] = []
    for mapping in book:
        i = first_above(mapping.range.base, ours)
        if window.overlaps(mapping.range) and not (i < len(ours) and ours[i].overlaps(mapping.range)):
            found.append(Holding(mapping.range, mapping.name or "anonymous memory", "foreign"))
    return found


def bar(window: Range, holdings: Iterable[Holding], width: int) -> Text:
    """Draw `window` as `width` cells; a cell shows uvas where uvas holds any of it, else a stranger, else nothing."""
    cells = ["free"] * width
    for holding in sorted(holdings, key=lambda one: _PRECEDENCE.index(one.kind)):
        first = max(0, holding.range.base - window.base) * width // window.size
        last = (min(holding.range.end, window.end) - window.base - 1) * width // window.size
        for cell in range(first, last + 1):
            cells[cell] = holding.kind
    text = Text()
    for kind in cells:
        text.append(_CELLS[kind], style=_STYLES[kind])
    return text


def draw_map(console: Console, window: Range, holdings: Sequence[Holding], *, rows: int = 24) -> None:
    """Print the map of `window`: a bar, and a table of `rows` holdings at most, neighbours of one holder as one."""
    console.print(map_panel(window, holdings, width=console.width, rows=rows))


def map_panel(
    window: Range, holdings: Sequence[Holding], *, strangers: Sequence[Holding] = (), width: int, rows: int
) -> Panel:
    """Draw the map of `window` in `width` columns; `strangers` are in the bar and not in the table.

    Of more holdings than `rows` those that are amiss are shown first.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("addresses", no_wrap=True, min_width=_ADDRESSES_WIDTH)
    table.add_column("size", justify="right", no_wrap=True, min_width=_SIZE_WIDTH)
    table.add_column("held by")  # the only one that gives way where the terminal is narrow
    merged = _merge(holdings)
    shown = sorted(merged, key=lambda one: one[0].kind != "amiss")[:rows]
    for holding, count in sorted(shown, key=lambda one: one[0].range.base):
        span = f"{holding.range.base:#x}-{holding.range.end:#x}"
        holder = holding.holder if count == 1 else f"{holding.holder} (x{count})"
        whose = Text(printable(holder), _STYLES[holding.kind], no_wrap=True, overflow="ellipsis")
        table.add_row(span, format_size(holding.range.size), whose)
    if len(merged) > rows:
        table.add_row(f"... and {len(merged) - rows} more", "", "")
    everybody = [*holdings, *strangers]
    drawn = bar(window, everybody, min(_WIDEST_BAR, width - _FRAME))
    title = f"[{window.base:#x}, {window.end:#x}): {format_size(window.size)}"
    return Panel(Group(drawn, _legend(everybody), Text(), table), title=title, expand=False)


def printable(text: str) -> str:
    r"""Spell out what would move a terminal's cursor or colour it: names are other people's.

    >>> printable("a\x1b[31m")
    'a\\x1b[31m'
    """
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _legend(holdings: Iterable[Holding]) -> Text:
    there = {"free", *(holding.kind for holding in holdings)}
    entries = [(f"{_CELLS[kind]} {words}", _STYLES[kind]) for kind, words in _LEGEND.items() if kind in there]
    return Text("  ").join(Text(words, style) for words, style in entries)


def _merge(holdings: Sequence[Holding]) -> list[tuple[Holding, int]]:
    merged: list[tuple[Holding, int]] = []
    for holding in sorted(holdings, key=lambda one: one.range.base):
        last, count = merged[-1] if merged else (None, 0)
        if last and last.holder == holding.holder and last.range.end == holding.range.base:
            joined = Range(last.range.base, holding.range.end - last.range.base)
            merged[-1] = (Holding(joined, last.holder, last.kind), count + 1)
        else:
            merged.append((holding, 1))
    return merged
