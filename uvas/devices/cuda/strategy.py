"""What the three ways have in common that lead from a host address to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from uvas.devices.base import Backing, BackingKind, Placement
from uvas.errors import NotSupportedError
from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.devices.cuda.card import Card

__all__ = ["Strategy", "StrategyName", "Target", "where_all_is"]

StrategyName = Literal["hmm", "register", "vmm"]
Target = Literal["device", "host"]
HOST_BIT, DEVICE_BIT = 1, 2


class Strategy:
    """One card's part in one way of sharing addresses: the methods of a `Device`, and those that move pages."""

    name: ClassVar[StrategyName]
    placement: ClassVar[Placement]
    backings: ClassVar[frozenset[BackingKind]]
    granularity: int = 0
    window: Range | None = None
    takes_all_visible: ClassVar[bool] = False
    """Whether every card of the process has to be able to do it, and not only those of the space."""

    def __init__(self, card: Card) -> None:
        self.card = card

    @staticmethod
    def why_not(attributes: Mapping[str, int], *, asked: bool = False) -> str:
        """Return why a card with these attributes cannot do it; empty: it can. Asked for by name, part of it may do."""
        raise NotImplementedError

    def claim(self, range: Range) -> None:
        """Nothing to take: a host address is enough."""

    def unclaim(self, range: Range) -> None:
        """Nothing to give back."""

    def commit(self, range: Range, backing: Backing, protection: str) -> None:
        """Let the range mean what the host sees there."""
        raise NotImplementedError

    def decommit(self, range: Range) -> None:
        """Forget what is behind the range."""
        raise NotImplementedError

    def protect(self, range: Range, protection: str) -> None:
        """Change what may be done with the range."""
        raise NotImplementedError

    def prefetch(self, range: Range, target: Target) -> Callable[[], None]:
        """Start to move; here there is nothing to move.

        Raises
        ------
        DeviceLostError
            The card is gone.
        """
        self.card.check("prefetch")
        return _nothing_to_wait_for

    def advise(self, range: Range, advice: str | None, applies: Target | None) -> None:
        """Take advice on where pages should be; here they do not move.

        Raises
        ------
        DeviceLostError
            The card is gone.
        """
        if advice in (None, "read_mostly") or applies is not None:  # else it is of another device
            self.card.check("advise")

    def where(self, range: Range) -> npt.NDArray[np.uint32] | None:
        """Tell where the pages are, one number each."""
        return where_all_is(range, HOST_BIT)

    def host_reaches(self, range: Range) -> bool:
        """Whether the host can touch what is committed there."""
        return True

    def refuse(self, verb: str, reason: str, remedy: str) -> NotSupportedError:
        """Return what to raise for a verb that this strategy does not have."""
        return NotSupportedError(f"{verb} on {self.card.name}", reason, remedy)


def _nothing_to_wait_for() -> None:
    pass


def where_all_is(range: Range, bits: int) -> npt.NDArray[np.uint32]:
    """Return the same number for each page of a range."""
    from mmap import PAGESIZE

    return np.full(-(-range.size // PAGESIZE), bits, np.uint32)
