"""The map of this process: what the registry says, and where the kernel says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from uvas._core import ffi, lib
from uvas.audit import inspect_space
from uvas.errors import ReleasedError
from uvas.maps.kernel import Mapping, read_mappings
from uvas.maps.rows import MapRow
from uvas.protection import protection_name
from uvas.ranges import Range, first_above
from uvas.reports import Finding

_NAME_BYTES = 64
_PIECES = 64
_BACKINGS = {
    lib.UVAS_BACKING_ANONYMOUS: "anonymous",
    lib.UVAS_BACKING_MEMFD: "memfd",
    lib.UVAS_BACKING_DESCRIPTOR: "descriptor",
    lib.UVAS_BACKING_DRIVER: "driver",
}


def address_map() -> tuple[MapRow, ...]:
    """Return what uvas holds in this process, by address: the registry, compared with the kernel's own book.

    Reservations of all spaces, those of C code as well, part by part; adoptions; and whatever is not as uvas left it:
    what `AddressSpace.audit` finds. Other threads go on meanwhile: what they change may be seen as before or after.

    Raises
    ------
    NotSupportedError
        ``/proc`` is not mounted.

    Notes
    -----
    O(n log n) in mappings and parts. Waits for operations that are under way in a reservation.

    Examples
    --------
    >>> import uvas
    >>> with uvas.AddressSpace() as space, space.reserve(1 << 20, name="a") as held:
    ...     held.commit(0, 1 << 19)
    ...     [(row.kind, row.name, row.detail) for row in uvas.address_map() if row.range in held.range]
    [('committed', 'a', 'rw, anonymous, private'), ('reserved', 'a', '')]
    """
    book = read_mappings()
    rows: list[MapRow] = []
    spaces: dict[int, str] = {}
    for found in _registered():
        space = ffi.new("uvas_id *")
        name, owner = _name(found.id), lib.uvas_space_of(found.id, space)
        space_name = _name(space[0]) if owner == 0 else None
        if name is None or space_name is None:
            continue  # released meanwhile
        spaces[space[0]] = space_name
        if found.kind == lib.UVAS_ADOPTION:
            held = Range(found.base, found.size)
            rows.append(MapRow(held, "adopted", space_name, name, _who_is_in(held, book)))
        else:
            rows += _parts(found, space_name, name)
    findings = [finding for space_id in spaces for finding in _audit(space_id)]
    seen = [*_with_findings(rows, findings), *_unregistered(rows, book)]
    return tuple(sorted(seen, key=lambda row: row.range))


# ---- the registry ----------------------------------------------------------------------------------------------------


def _registered() -> Iterator[Any]:
    address = 0
    while True:
        found = ffi.new("struct uvas_found *")
        if lib.uvas_next(address, found) < 0:
            return
        yield found
        address = found.base + found.size


def _name(handle: int) -> str | None:
    out = ffi.new("char[]", _NAME_BYTES)
    if lib.uvas_name(handle, out, _NAME_BYTES) < 0:
        return None
    return str(ffi.string(out).decode(errors="backslashreplace"))


def _parts(found: Any, space: str, name: str) -> Iterator[MapRow]:
    """Cut a reservation into what is committed and what lies between."""
    end = 0
    for piece in _pieces(found.id):
        if piece.offset > end:
            yield MapRow(Range(found.base + end, piece.offset - end), "reserved", space, name, "")
        end = piece.offset + piece.size
        part = Range(found.base + piece.offset, piece.size)
        if piece.kind == 0:
            yield MapRow(part, "lost", space, name, "")
        elif piece.guarded:
            yield MapRow(part, "reserved", space, name, "guard pages")
        else:
            sharing = "shared" if piece.shared else "private"
            detail = f"{protection_name(piece.protection)}, {_BACKINGS[piece.kind]}, {sharing}"
            yield MapRow(part, "committed", space, name, detail)
    if end < found.size:
        yield MapRow(Range(found.base + end, found.size - end), "reserved", space, name, "")


def _pieces(reservation: int) -> Iterator[Any]:
    offset = 0
    count = ffi.new("size_t *")
    while True:
        pieces = ffi.new("struct uvas_piece[]", _PIECES)
        if lib.uvas_pieces(reservation, offset, pieces, _PIECES, count) < 0 or not count[0]:
            return  # no more; or released meanwhile
        yield from pieces[0 : count[0]]
        last = pieces[count[0] - 1]
        offset = last.offset + last.size


# ---- the kernel ------------------------------------------------------------------------------------------------------


def _audit(space: int) -> tuple[Finding, ...]:
    try:
        return inspect_space(space, lib.uvas_audit).findings
    except ReleasedError:
        return ()  # closed meanwhile


def _with_findings(rows: list[MapRow], findings: list[Finding]) -> Iterator[MapRow]:
    """Cut the rows where a finding says otherwise, and put it there."""
    findings = sorted(findings, key=lambda finding: finding.range)
    places = [finding.range for finding in findings]
    for row in rows:
        yield from (replace(row, range=part) for part in _outside(row.range, places))
        for i in range(first_above(row.range.base, places), len(places)):
            inside = row.range.intersection(places[i])
            if inside is None:
                break
            yield replace(row, range=inside, kind=findings[i].kind, detail=findings[i].owner)


def _unregistered(rows: list[MapRow], book: Iterable[Mapping]) -> Iterator[MapRow]:
    """Find what carries a tag of uvas outside of all that the registry knows."""
    known = [row.range for row in rows]
    for mapping in book:
        if mapping.label is not None:
            for part in _outside(mapping.range, known):
                yield MapRow(part, "unregistered", mapping.label, "", str(mapping))


def _outside(whole: Range, places: list[Range]) -> Iterator[Range]:
    """Cut out of a range what lies in disjoint ranges, which are in order."""
    base = whole.base
    for i in range(first_above(base, places), len(places)):
        if places[i].base >= whole.end:
            break
        if base < places[i].base:
            yield Range(base, places[i].base - base)
        base = places[i].end
    if base < whole.end:
        yield Range(base, whole.end - base)


def _who_is_in(held: Range, book: Iterable[Mapping]) -> str:
    there = [str(mapping) for mapping in book if mapping.range.overlaps(held)]
    if not there:
        return "nothing is mapped there"
    return there[0] if len(there) == 1 else f"{there[0]}, and {len(there) - 1} more"
