"""What the kernel says against what the registry says: the core's audit and heal, as reports."""

from __future__ import annotations

from typing import Any

from uvas._core import ffi, lib
from uvas.devices.adapter import raise_answer
from uvas.leases import live
from uvas.ranges import Range
from uvas.reports import Finding, FindingKind, Report
from uvas.reservation import Reservation

_FINDINGS: dict[int, FindingKind] = {
    lib.UVAS_HOLE: "hole",
    lib.UVAS_FOREIGN: "foreign",
    lib.UVAS_CHANGED: "changed",
    lib.UVAS_LOST: "lost",
}
_FIRST_FINDINGS = 64


def inspect_space(space: int, inspect: Any) -> Report:
    """Let the core audit or heal a space, by its handle.

    Raises
    ------
    NotSupportedError
        ``/proc`` is not mounted.
    ReleasedError
        The space has been closed.
    """
    capacity = _FIRST_FINDINGS
    count = ffi.new("size_t *")
    while True:
        findings = ffi.new("struct uvas_finding[]", capacity)
        code = inspect(space, findings, capacity, count)
        if code < 0:
            raise raise_answer(code)
        if count[0] <= capacity or inspect == lib.uvas_heal:
            return Report(tuple(map(_as_finding, findings[0 : min(count[0], capacity)])), count[0])
        capacity = 2 * count[0]


def _as_finding(finding: Any) -> Finding:
    held = live.get(finding.reservation, lambda: None)()
    return Finding(
        range=Range(finding.base, finding.size),
        kind=_FINDINGS[finding.kind],
        reservation=held if isinstance(held, Reservation) else None,
        committed=bool(finding.committed),
        healed=bool(finding.healed),
        owner=ffi.string(finding.owner).decode(errors="backslashreplace"),
    )
