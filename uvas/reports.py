"""What a space answers when asked about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.reservation import Reservation

FindingKind = Literal["hole", "foreign", "changed", "lost"]


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """What a space holds now and has done so far; bytes and counts."""

    reservations: int
    """Live now."""
    adoptions: int
    """Live now."""
    reserved_bytes: int
    """Live now."""
    committed_bytes: int
    """Live now."""
    reserves: int
    """That succeeded, ever."""
    releases: int
    """Ever."""
    attempts: int
    """Candidates acted on, ever."""
    conflicts: int
    """Candidates that the host or a device said were taken, ever."""
    registry_conflicts: int
    """Candidates found claimed by another thread of this process, ever; they cost no system call."""
    quarantined_bytes: int
    """Released, addresses still held because the kernel had no mapping left to split; of the whole process."""
    poisoned_bytes: int
    """Never used again, because an undo failed."""
    lost_bytes: int
    """Taken by somebody else behind uvas's back, found by `heal`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between what the kernel says and what the registry says."""

    range: Range
    """Where."""
    kind: FindingKind
    """``hole``: nobody is there. ``foreign``: somebody else is. ``changed``: ours, with another protection.
    ``lost``: marked lost earlier."""
    reservation: Reservation | None
    """Whose part it is; None if the object is gone."""
    committed: bool
    """Whether memory was committed there."""
    healed: bool
    """Whether `heal` took it back."""
    owner: str
    """Who is there, as a line of ``/proc/self/maps``; empty for a hole."""

    def __str__(self) -> str:
        taken_back = ", taken back" if self.healed else ""
        return f"{self.range} {self.kind}{taken_back}{f': {self.owner}' if self.owner else ''}"


@dataclass(frozen=True, slots=True)
class Report:
    """What `audit` or `heal` found."""

    findings: tuple[Finding, ...]
    """By address."""
    count: int
    """Of all findings; `heal` names the first 64."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "registry and kernel agree"
