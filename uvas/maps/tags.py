"""The map of another process, by what its tags tell.

Reservations map a tag privately, without any permission, at the file offset equal to the address; shared memory is
mapped from a memfd that names the space and the reservation. Private memory has no name, and adoptions leave no trace:
of what lies between tags or beside one, nobody outside can tell whether it is uvas's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile

from uvas.maps.kernel import Mapping, read_mappings
from uvas.maps.rows import MapRow

_HELD = "---p"


def tagged_map(pid: int) -> tuple[MapRow, ...]:
    """Return what a process holds with uvas, by address; O(n log n) in its mappings. Raises as `read_mappings` does."""
    return rows_of(read_mappings(pid))


def rows_of(book: list[Mapping]) -> tuple[MapRow, ...]:
    """Tell uvas's mappings from others', by name, offset and place."""
    spaces = {mapping.label for mapping in book if mapping.label is not None and not mapping.shared}
    rows: list[MapRow] = []
    for run in _runs(book):
        rows += _rows_of_run(run, spaces)
    return tuple(sorted(rows, key=lambda row: row.range))


def _runs(book: Iterable[Mapping]) -> Iterator[list[Mapping]]:
    """Cut the book where nothing is mapped."""
    run: list[Mapping] = []
    for mapping in book:
        if run and run[-1].range.end != mapping.range.base:
            yield run
            run = []
        run.append(mapping)
    if run:
        yield run


def _rows_of_run(run: list[Mapping], spaces: set[str]) -> Iterator[MapRow]:
    tagged = [i for i, mapping in enumerate(run) if mapping.label is not None]
    if not tagged:
        return
    first, last = tagged[0], tagged[-1]
    beside = [*takewhile(_is_anonymous, reversed(run[:first])), *takewhile(_is_anonymous, run[last + 1 :])]
    space = ""
    for mapping in run[first : last + 1]:
        if mapping.label is None:
            yield _untold(mapping, space)
        else:
            row = _told(mapping, mapping.label, spaces)
            space = row.space
            yield row
    for mapping in beside:
        yield _untold(mapping, space)


def _told(mapping: Mapping, label: str, spaces: set[str]) -> MapRow:
    if mapping.shared:
        space, name = _split(label, spaces)
        protection = mapping.permissions[:3].replace("-", "") or "none"
        return MapRow(mapping.range, "committed", space, name, f"{protection}, memfd, shared")
    if mapping.offset != mapping.range.base:
        return MapRow(mapping.range, "changed", label, "", f"{mapping.permissions}, moved from {mapping.offset:#x}")
    if mapping.permissions != _HELD:
        return MapRow(mapping.range, "changed", label, "", mapping.permissions)
    return MapRow(mapping.range, "reserved", label, "", "")


def _untold(mapping: Mapping, space: str) -> MapRow:
    return MapRow(mapping.range, "unknown", space, "", str(mapping))


def _split(label: str, spaces: set[str]) -> tuple[str, str]:
    """Take ``space/reservation`` apart. Either may have a slash in it: the spaces that are seen decide."""
    seen = [space for space in spaces if label.startswith(f"{space}/")]
    space = max(seen, key=len) if seen else label.partition("/")[0]
    return space, label[len(space) + 1 :]


def _is_anonymous(mapping: Mapping) -> bool:
    return not mapping.name
