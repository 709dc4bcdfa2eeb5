"""What a space answers when asked about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.arena import Arena
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
class OrderStats:
    """What an arena's blocks in the order of streams amount to; bytes as rounded up."""

    live_blocks: int
    """Handed out."""
    live_bytes: int
    """Handed out."""
    kept_blocks: int
    """Freed, and kept for the stream that was current when they were allocated."""
    kept_bytes: int
    """Likewise."""


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


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """What an arena holds now and has done so far; bytes and counts."""

    live_blocks: int
    """Now."""
    live_bytes: int
    """Of those blocks, as rounded up to the sizes that there are."""
    total_blocks: int
    """Ever allocated."""
    total_bytes: int
    """Ever allocated."""
    used_bytes: int
    """Whole pages with blocks in them or kept for some: what the limit bounds."""
    peak_bytes: int
    """The most that `used_bytes` has been."""
    cached_bytes: int
    """Of `used_bytes`: what threads keep for their next block."""
    reserved_bytes: int
    """Addresses."""
    committed_bytes: int
    """Memory behind them."""
    resident_bytes: int
    """Of it, present in RAM, as the kernel says."""
    hole_bytes: int
    """Addresses between the pages in use."""
    hole_count: int
    """Runs of them."""
    largest_hole: int
    """Bytes of the longest run."""
    metadata_bytes: int
    """The arena's own bookkeeping, which lies elsewhere."""
    threads: int
    """That keep something."""
    regions: int
    """Reservations that it lives in."""

    @property
    def fragmentation(self) -> float:
        """What part of the holes is not in the largest one: 0 is none, near 1 is dust."""
        return 1 - self.largest_hole / self.hole_bytes if self.hole_bytes else 0.0


@dataclass(frozen=True, slots=True)
class AllocationInfo:
    """A live block of an arena, as `uvas.allocation_of` found it. It keeps nothing alive."""

    range: Range
    """Its usable bytes, which may be more than were asked for."""
    arena: Arena | None
    """Whose it is; None if C or a forked child's NumPy made the arena, or its object is gone."""
