"""Parties that must agree on what an address means, and how they say how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from uvas.ranges import Range

Placement = Literal["follows", "claims", "registers", "owns"]
BackingKind = Literal["anonymous", "memfd", "descriptor", "driver"]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """How a device agrees to an address: data, which nobody asks for its class.

    Parameters
    ----------
    name
        For messages.
    placement
        ``follows``: a host address is enough. ``claims``: it has an address space of its own and can refuse.
        ``registers``: host memory is made known to it at commit. ``owns``: its claim takes the address itself, on the
        host too.
    backings
        What it can live with behind committed addresses.
    granularity
        Bytes, a power of two, that bases and sizes of its ranges are multiples of; 0: the host's page.
    window
        The addresses that it can reach; None: all.
    memory
        ``shared``: it sees the host's. ``private``: it has memory of its own, kept coherent with the host's; then it
        has a method ``lend_memory`` as well.
    details
        Whatever else the device has to say of itself.
    """

    name: str
    placement: Placement
    backings: frozenset[BackingKind]
    granularity: int = 0
    window: Range | None = None
    memory: Literal["shared", "private"] = "shared"
    details: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Backing:
    """What is behind a range that is being committed.

    Parameters
    ----------
    kind
        ``anonymous``: private memory of the host's. ``memfd``: the reservation's own. ``descriptor``: one of the
        caller's. ``driver``: what an owning device maps.
    shared
        Whether it is mapped shared.
    descriptor
        Of `memfd` and `descriptor`; valid during the call, to be duplicated by who keeps it. Otherwise None.
    offset
        Of the range's first byte in it, in bytes.
    location
        Of `driver`: "host", the `Device` that the memory is to lie on, or the `Range` whose memory it is to be.
    """

    kind: BackingKind
    shared: bool
    descriptor: int | None
    offset: int
    location: object = "host"


@dataclass(frozen=True, slots=True)
class LentMemory:
    """What the pager needs of a device with memory of its own, to serve the faults of its process.

    Parameters
    ----------
    faults
        A userfaultfd made in the device's process by ``uvas_lend_faults``, for one attachment; whoever asked closes it.
    process
        A pidfd of it, or None: it never ends.
    capacity
        Bytes that it holds at most, or None: as many as there is memory for.
    granule
        Bytes that move at once.
    identity
        An address that is this device's alone (``id(self)``, say): what it holds of all spaces together is then within
        the capacity. 0: each attachment has a capacity of its own.
    """

    faults: int
    process: int | None
    capacity: int | None
    granule: int
    identity: int = 0


class Device(Protocol):
    """A party that must agree on what an address means.

    The contract of every method: ranges are not empty, aligned to the granularity and inside one live reservation; a
    method that raises has changed nothing; calls on disjoint ranges may come from several threads at once; a device
    never calls back into the space.

    A device may also have a method ``start_claim(range)``. It is called on every claiming device before the first
    `claim` is, with what `claim` will be asked, and is always followed by that `claim`: who can work meanwhile starts
    there. Devices without it are asked on threads, all at the same time.

    And a method ``agree(attached, coming)``, for a device that has a choice: it is told who is in the space and who
    will be next, and returns the `DeviceInfo` that holds there. And ``host_reaches(range)``: whether the host can touch
    what the device has mapped there.

    A device whose `info.memory` is "private" has a method ``lend_memory()`` that returns a `LentMemory`; it is called
    when the device is attached. What `commit` gives such a device as the descriptor
    behind anonymous memory is the device's own memory, which its process maps shared.

    A device that moves pages by itself, as a GPU's driver does, may have ``prefetch(range, target)``, where the target
    is "device" or "host" and what it returns is called to wait for the end; ``advise(range, advice, applies)``, where
    `applies` is "device", "host" or None; and ``where(range)``, a word for each page of the host as
    `AddressSpace.where` has them, with bit 1 for the device, or None if it cannot tell.
    """

    @property
    def info(self) -> DeviceInfo:
        """What it declares."""

    def claim(self, range: Range, /) -> None:
        """Take the range in the device's address space.

        Raises
        ------
        AddressInUseError
            It is taken there: uvas tries another range. Anything else that is raised means that the device is broken
            and reaches the caller.
        """

    def unclaim(self, range: Range, /) -> None:
        """Give the range back, with whatever is still committed in it."""

    def commit(self, range: Range, backing: Backing, protection: str, /) -> None:
        """Let the range mean what the host sees there; `protection` is "none", "r", "rw", ..."""

    def decommit(self, range: Range, /) -> None:
        """Forget what is behind the range; it stays claimed."""

    def protect(self, range: Range, protection: str, /) -> None:
        """Change what may be done with a committed range.

        Asked before the host where something is taken away, after it where something is given: a device may have what
        the host has, never more.
        """

    def close(self) -> None:
        """End; idempotent."""
