"""What a person looks at: who holds which addresses of a window, as a bar and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from uvas.ranges import Range

Kind = Literal["ours", "foreign"]

_STYLES: dict[str, str] = {"ours": "green", "foreign": "red", "free": "bright_black"}
_CELLS = {"ours": "█", "foreign": "▒", "free": "·"}
_WIDEST_BAR = 96
_FRAME = 4  # columns that the panel takes
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


def foreign_holdings(window: Range, ours: Sequence[Range]) -> list[Holding]:
    """List the mappings of this process inside `window` that lie in none of `ours`; O(mappings x ours)."""
    found: list[Holding] = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        mapping = Range(start, end - start)
        if window.overlaps(mapping) and not any(own.overlaps(mapping) for own in ours):
            found.append(Holding(mapping, fields[5] if len(fields) > 5 else "anonymous memory", "foreign"))
    return found


def bar(window: Range, holdings: Iterable[Holding], width: int) -> Text:
    """Draw `window` as `width` cells; a cell shows uvas where uvas holds any of it, else a stranger, else nothing."""
    cells = ["free"] * width
    for holding in sorted(holdings, key=lambda one: one.kind == "ours"):
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
    table = Table(box=None, pad_edge=False)
    for title, justify in (("addresses", "left"), ("size", "right"), ("held by", "left")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # rich's own literal type
    merged = _merge(holdings)
    for holding, count in merged[:rows]:
        span = f"{holding.range.base:#x}-{holding.range.end:#x}"
        holder = holding.holder if count == 1 else f"{holding.holder} (x{count})"
        table.add_row(span, format_size(holding.range.size), Text(holder, style=_STYLES[holding.kind]))
    if len(merged) > rows:
        table.add_row(f"... and {len(merged) - rows} more", "", "")
    legend = Text.assemble(("█ uvas  ", "green"), ("▒ somebody else  ", "red"), ("· free", "bright_black"))
    title = f"[{window.base:#x}, {window.end:#x}): {format_size(window.size)}"
    width = min(_WIDEST_BAR, console.width - _FRAME)
    console.print(Panel(Group(bar(window, holdings, width), legend, Text(), table), title=title, expand=False))


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
