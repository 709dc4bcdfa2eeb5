"""Plain host memory that the GPU faults on: by HMM in the kernel, or by page tables that both share (ATS).

Memory is private and anonymous: the driver does not migrate files' or shared memory. Nothing is mapped for the card;
what has to be done is to wait for it before memory is taken away, as a kernel that meets a hole ends its context.

Not yet seen on hardware.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import numpy.typing as npt

from uvas.devices.base import Backing
from uvas.devices.cuda import driver
from uvas.devices.cuda.strategy import DEVICE_BIT, HOST_BIT, Strategy, Target
from uvas.devices.cuda.undo import Undo
from uvas.errors import DeviceError, OutOfMemoryError
from uvas.ranges import Range

__all__ = ["Hmm"]

_ADVICE = {
    "read_mostly": "READ_MOSTLY",
    "preferred_location": "PREFERRED_LOCATION",
    "accessed_by": "ACCESSED_BY",
}
_PRESENT, _SWAPPED = 1 << 63, 1 << 62
"""Of a word of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst). A page on a device counts as swapped."""
_SWAPS_HEADING_LINES = 1
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING


class Hmm(Strategy):
    """Follows the host's page tables."""

    name = "hmm"
    placement = "follows"
    backings = frozenset(("anonymous",))

    @staticmethod
    def why_not(attributes: Mapping[str, int], *, asked: bool = False) -> str:
        """Say what the card or the kernel lacks."""
        if attributes["pageable memory access"]:
            return ""
        return (
            "the card cannot access the host's pages: HMM needs a Turing card or later, Linux 6.1.24 or later, "
            "NVIDIA's open kernel modules and CONFIG_DEVICE_PRIVATE"
        )

    def commit(self, range: Range, backing: Backing, protection: str) -> None:
        """Nothing to do: the card faults on what the host has."""
        self.card.check("commit")

    def decommit(self, range: Range) -> None:
        """Wait until no kernel can be using it."""
        self.card.synchronize()

    def protect(self, range: Range, protection: str) -> None:
        """Nothing to do: the kernel's page tables hold for the card."""

    # ---- moving ------------------------------------------------------------------------------------------------------

    def _location(self, target: Target) -> object:
        location = driver.make("CUmemLocation")
        device = target == "device"
        kind = "CU_MEM_LOCATION_TYPE_DEVICE" if device else "CU_MEM_LOCATION_TYPE_HOST"
        location.type = driver.enum("CUmemLocationType", kind)
        location.id = self.card.ordinal if device else 0
        return location

    def _movable(self, verb: str) -> None:
        self.card.check(verb)
        if self.card.attributes["concurrent managed access"]:
            return
        raise self.refuse(verb, "the card moves no pages on request", "the card faults on them as it needs them")

    def prefetch(self, range: Range, target: Target) -> Callable[[], None]:
        """Start to move the range, on a stream of its own.

        Raises
        ------
        OutOfMemoryError
            The card has less memory free than that: what does not fit could stop it.
        NotSupportedError
            The card does not move pages.
        DeviceError
            The driver said no.
        """
        self._movable("prefetch")
        card = self.card
        if target == "device" and (free := card.free_bytes()) < range.size:
            raise OutOfMemoryError(
                range.size, card.name, message=f"{card.name} has {free:#x} bytes free: {range} does not fit into them"
            )
        with card.current(), Undo() as undo:
            event = card.call("cuEventCreate", _NO_TIMING)
            undo.push(lambda: card.call("cuEventDestroy", event))
            card.call("cuMemPrefetchAsync", range.base, range.size, self._location(target), 0, card.stream)
            card.call("cuEventRecord", event, card.stream)

        def wait() -> None:
            try:
                with card.current():
                    card.call("cuEventSynchronize", event)
            finally:
                with suppress(DeviceError):
                    card.call("cuEventDestroy", event)

        return wait

    def advise(self, range: Range, advice: str | None, applies: Target | None) -> None:
        """Pass advice on to the driver; None takes all of it back.

        Raises
        ------
        ValueError
            There is no such advice.
        NotSupportedError, DeviceError
            As of `prefetch`.
        """
        if advice is not None and advice not in _ADVICE:
            raise ValueError(f"{advice!r} is no advice: {', '.join(_ADVICE)}, or None")
        if advice not in (None, "read_mostly") and applies is None:
            return  # it is of another device
        self._movable("advise")
        given = [f"SET_{_ADVICE[advice]}"] if advice else [f"UNSET_{name}" for name in _ADVICE.values()]
        location = self._location(applies or "device")
        with self.card.current():
            for one in given:
                value = driver.enum("CUmem_advise", f"CU_MEM_ADVISE_{one}")
                self.card.call("cuMemAdvise", range.base, range.size, value, location)

    def where(self, range: Range) -> npt.NDArray[np.uint32] | None:
        """Tell by the kernel's book, without a fault, where each page is; None: it cannot be told.

        To the kernel a page on the card is one that is swapped out. Where the machine swaps for real the two cannot be
        told apart by everybody, nor can two cards, and where host and card share page tables a page on the card is an
        ordinary one.
        """
        if self.card.attributes["through the host's page tables"] or len(driver.ordinals()) > 1 or _swaps():
            return None
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as book:
                words = np.frombuffer(
                    os.pread(book.fileno(), range.size // PAGESIZE * 8, range.base // PAGESIZE * 8), "u8"
                )
        except OSError:
            return None
        on_host, on_device = (words & _PRESENT) != 0, (words & _SWAPPED) != 0
        bits: npt.NDArray[np.uint32] = (on_host * HOST_BIT + on_device * DEVICE_BIT).astype(np.uint32)
        return bits


def _swaps() -> bool:
    """Whether the kernel has anywhere to swap to."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > _SWAPS_HEADING_LINES
    except OSError:
        return True
