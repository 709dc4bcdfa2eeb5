"""``uvas maps``: what uvas holds in the processes that may be read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from uvas.errors import NotSupportedError
from uvas.maps.draw import panels
from uvas.maps.kernel import Mapping, command_of, names_uvas, processes, read_mappings
from uvas.maps.rows import MapRow
from uvas.maps.tags import rows_of
from uvas.report import printable

_REFRESH_S = 0.5
_HEAD, _TAIL = 30, 26  # characters of a command line that are shown


@dataclass(frozen=True, slots=True)
class ProcessMap:
    """What one process holds."""

    pid: int
    command: str
    rows: tuple[MapRow, ...]
    book: tuple[Mapping, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, and how many processes may not be read."""

    processes: tuple[ProcessMap, ...]
    unreadable: int

    def as_json(self) -> str:
        """Return one line, for scripts."""
        found = [
            {"pid": one.pid, "command": one.command, "rows": [_as_json(row) for row in one.rows]}
            for one in self.processes
        ]
        return json.dumps({"processes": found, "unreadable": self.unreadable})


def main(*, as_json: bool, watch: bool, pid: int | None) -> int:
    """Show the maps; 2 where there is no such process, or it may not be read."""

    def look() -> Survey:
        return survey() if pid is None else Survey((process_map(pid),), 0)

    try:
        if watch:
            return _watch(look, as_json=as_json)
        found = look()
    except (ProcessLookupError, PermissionError, NotSupportedError) as refusal:
        print(f"uvas maps: {refusal.args[-1] if refusal.args else refusal}", file=sys.stderr)
        return 2
    if as_json:
        print(found.as_json())
    else:
        console = Console()
        console.print(_drawn(found, console))
    return 0


def process_map(pid: int) -> ProcessMap:
    """Look at one process. Raises as `read_mappings` does."""
    book = read_mappings(pid)
    return ProcessMap(pid, command_of(pid), rows_of(book), tuple(book))


def survey() -> Survey:
    """Look at every process whose maps name uvas.

    Raises
    ------
    NotSupportedError
        ``/proc`` is not mounted.
    """
    found: list[ProcessMap] = []
    unreadable = 0
    for pid in sorted(processes()):
        try:
            if names_uvas(pid):
                found.append(process_map(pid))
        except ProcessLookupError:
            continue  # ended meanwhile
        except PermissionError:
            unreadable += 1
    return Survey(tuple(found), unreadable)


def _watch(look: Callable[[], Survey], *, as_json: bool) -> int:
    try:
        if as_json:
            while True:
                print(look().as_json(), flush=True)
                time.sleep(_REFRESH_S)
        console = Console()
        with Live(_drawn(look(), console), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_REFRESH_S)
                live.update(_drawn(look(), console), refresh=True)
    except KeyboardInterrupt:
        return 0


def _drawn(found: Survey, console: Console) -> RenderableType:
    parts: list[RenderableType] = []
    for one in found.processes:
        parts.append(Text.assemble("process ", (str(one.pid), "bold"), f": {_cropped(one.command)}"))
        parts += panels(one.rows, one.book, width=console.width) or [Text("  nothing that is tagged by uvas")]
    if not parts:
        parts.append(Text("no process that may be read holds anything with uvas"))
    if found.unreadable:
        processes = "1 process" if found.unreadable == 1 else f"{found.unreadable} processes"
        parts.append(Text(f"{processes} may not be read (it takes CAP_SYS_PTRACE)"))
    return Group(*parts)


def _cropped(command: str) -> str:
    """Leave the middle out of a long command line: a worker's has its whole program there."""
    command = printable(command)
    if len(command) <= _HEAD + _TAIL:
        return command
    return f"{command[:_HEAD]} ... {command[-_TAIL:]}"


def _as_json(row: MapRow) -> dict[str, object]:
    return {"base": row.range.base, "size": row.range.size} | {
        name: value for name, value in asdict(row).items() if name != "range"
    }
