"""A CUDA GPU as a party of a space, and how several agree on one strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import index as as_integer
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from uvas.devices.base import Backing, Device, DeviceInfo
from uvas.devices.cuda import driver
from uvas.devices.cuda.card import Card, can
from uvas.devices.cuda.hmm import Hmm
from uvas.devices.cuda.register import Register
from uvas.devices.cuda.strategy import Strategy, StrategyName, Target
from uvas.devices.cuda.undo import Undo
from uvas.devices.cuda.vmm import Vmm
from uvas.errors import NotSupportedError, ReleasedError
from uvas.ranges import Range

__all__ = ["CudaDevice"]

_STRATEGIES: dict[StrategyName, type[Strategy]] = {"hmm": Hmm, "register": Register, "vmm": Vmm}
"""In the order in which ``auto`` tries them: what needs the least from the driver comes first."""


class CudaDevice:
    """A CUDA GPU that sees memory of a space at the host's addresses.

    Parameters
    ----------
    index
        Which card, as the driver counts (``CUDA_VISIBLE_DEVICES`` hides and orders them).
    strategy
        How it sees it. ``hmm``: plain host memory, on whose pages the card faults; they migrate. ``register``: host
        memory that is pinned when it is committed and reached over the bus. ``vmm``: memory that the driver maps, on
        the host for all or on one card; the driver holds the addresses. ``auto``: the first of these that every
        device of the space can do, fixed when the device is attached for the first time.

    Raises
    ------
    ValueError
        There is no such strategy or card.
    NotSupportedError
        The driver, a Python package or the card cannot; the message says what is missing and what would help.
    DeviceError
        The driver does not give a context.

    Notes
    -----
    ``info.details`` says which strategy was taken and for each other why not. A card whose context is gone (a kernel
    that touched what is not there, say) raises DeviceLostError from then on. In a forked child the device is dead, and
    no call is made there. Not yet seen on hardware.
    """

    def __init__(self, index: int = 0, *, strategy: Literal["auto", "hmm", "register", "vmm"] = "auto") -> None:
        if strategy != "auto" and strategy not in _STRATEGIES:
            raise ValueError(f"{strategy!r} is no strategy: auto, {', '.join(_STRATEGIES)}")
        ordinal, visible = as_integer(index), driver.ordinals()
        if ordinal not in visible:
            raise ValueError(f"there is no CUDA card {ordinal}: this process sees {len(visible)}")
        self._asked = strategy
        self._version = driver.version()
        self._refusals = _refusals(ordinal, visible, strategy)
        able = self._able()
        if not able:
            raise _nothing_does(f"CUDA device {ordinal}", self._refusals, self._asked)
        self.card = Card(ordinal)
        """The card, for the other devices of a space."""
        self._fixed: StrategyName | None = None
        with Undo() as undo:
            undo.push(self.card.close)
            self._strategy: Strategy = _STRATEGIES[able[0]](self.card)
            self._info = self._describe({})

    def _able(self) -> list[StrategyName]:
        """Return what was asked for and what the card can do."""
        asked: Iterable[StrategyName] = _STRATEGIES if self._asked == "auto" else (self._asked,)
        return [name for name in asked if not self._refusals[name]]

    def _describe(self, refused: dict[StrategyName, str], *, follows: bool = False) -> DeviceInfo:
        chosen = self._strategy
        reasons = self._refusals | refused
        otherwise = f"{chosen.name} {'comes first' if self._asked == 'auto' else 'was asked for'}"
        why_not = {other: reasons[other] or otherwise for other in _STRATEGIES if other != chosen.name}
        return DeviceInfo(
            name=self.card.name,
            placement="follows" if follows else chosen.placement,
            backings=chosen.backings,
            granularity=chosen.granularity,
            window=chosen.window,
            details={
                "api": "cuda",
                "index": self.card.ordinal,
                "model": self.card.model,
                "driver": self._version,
                "strategy": chosen.name,
                "why not": why_not,
                "attributes": dict(self.card.attributes),
            },
        )

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def info(self) -> DeviceInfo:
        """What the device declares."""
        return self._info

    @property
    def strategy(self) -> StrategyName:
        """How it sees memory; until it is attached, how it would."""
        return self._strategy.name

    @property
    def lost(self) -> bool:
        """Whether its context is gone."""
        return self.card.lost

    def agree(self, attached: tuple[Device, ...], coming: tuple[Device, ...]) -> DeviceInfo:
        """Settle on a strategy with those who share a space, and return what is declared there.

        Parameters
        ----------
        attached
            Those who are in the space.
        coming
            Those who will be next.

        Raises
        ------
        NotSupportedError
            There is no strategy that all can do; the message has the reason for each.
        ValueError
            Another device of the space is of the same card.
        """
        others = [*attached, *coming]
        cards = [self, *(one for one in others if isinstance(one, CudaDevice) and one is not self)]
        if any(one.card.ordinal == self.card.ordinal for one in cards[1:]):
            raise ValueError(f"{self.card.name} is in the space already, as another device")
        refused: dict[StrategyName, str] = {}
        for name in self._able():
            refused[name] = _why_not_together(name, cards, others)
        if self._fixed is None or refused[self._fixed]:
            fitting = [name for name, reason in refused.items() if not reason]
            if self._fixed or not fitting:
                raise _nothing_does(
                    f"a space with {self.card.name}", self._refusals | refused, self._fixed or self._asked
                )
            if fitting[0] != self._strategy.name:
                self._strategy = _STRATEGIES[fitting[0]](self.card)
            self._fixed = fitting[0]
        owned = any(isinstance(one, CudaDevice) and one.strategy == "vmm" for one in attached if one is not self)
        self._info = self._describe(refused, follows=self._fixed == "vmm" and owned)
        return self._info

    # ---- what a space asks -------------------------------------------------------------------------------------------

    def claim(self, range: Range, /) -> None:
        """Take the range of the driver (``vmm``).

        Raises
        ------
        AddressInUseError
            The driver gives other addresses.
        OutOfMemoryError
            It has none.
        DeviceError, DeviceLostError
            It said no otherwise; the card is gone.
        """
        self._strategy.claim(range)

    def unclaim(self, range: Range, /) -> None:
        """Give the range back, with whatever is mapped in it (``vmm``).

        Raises
        ------
        DeviceError
            The driver said no.
        """
        self._strategy.unclaim(range)

    def commit(self, range: Range, backing: Backing, protection: str, /) -> None:
        """Let the range mean what the host sees there.

        Raises
        ------
        OutOfMemoryError, LimitReachedError
            There is no memory for it, or it cannot be pinned.
        NotSupportedError
            The card, or the driver, cannot.
        DeviceError, DeviceLostError
            The driver said no; the card is gone.
        """
        self._strategy.commit(range, backing, protection)

    def decommit(self, range: Range, /) -> None:
        """Forget what is behind the range, when nothing runs on the card any more.

        Raises
        ------
        NotSupportedError
            The range cuts what was committed at once (``register``, ``vmm``).
        DeviceError
            A stream is being captured, or the driver said no otherwise.
        """
        self._strategy.decommit(range)

    def protect(self, range: Range, protection: str, /) -> None:
        """Change what may be done with a committed range.

        Raises
        ------
        NotSupportedError, DeviceError, DeviceLostError
            As of `decommit`; the card is gone.
        """
        self._strategy.protect(range, protection)

    def prefetch(self, range: Range, target: Target, /) -> Callable[[], None]:
        """Start to move pages to the card or to the host; the function that is returned waits.

        Raises
        ------
        OutOfMemoryError
            The card has less memory free than that.
        NotSupportedError
            They do not move.
        DeviceError, DeviceLostError
            The driver said no; the card is gone.
        """
        if target not in get_args(Target):
            raise ValueError(f"{target!r} is neither 'device' nor 'host'")
        return self._strategy.prefetch(range, target)

    def advise(self, range: Range, advice: str | None, applies: Target | None, /) -> None:
        """Tell the driver what a range is for: "read_mostly", "preferred_location", "accessed_by"; None: nothing.

        Raises
        ------
        ValueError
            There is no such advice.
        NotSupportedError, DeviceError, DeviceLostError
            As of `prefetch`.
        """
        self._strategy.advise(range, advice, applies)

    def where(self, range: Range, /) -> npt.NDArray[np.uint32] | None:
        """Return, for each host page, bit 0 if it is on the host, bit 1 if it is on this card; None: not known."""
        return self._strategy.where(range)

    def host_reaches(self, range: Range, /) -> bool:
        """Whether the host can touch what is committed there; not, where it was committed on a card."""
        return self._strategy.host_reaches(range)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the card; idempotent. In a forked child and at the interpreter's end no call is made.

        What spaces have of it stays until they give it back: an array may live longer than the device's ``with`` block.
        """
        if isinstance(self._strategy, Vmm) and driver.usable():
            self._strategy.abandon(claims=self._fixed is None)
        self.card.close()

    def __enter__(self) -> CudaDevice:
        if not driver.usable():
            raise ReleasedError(f"{self!r} belongs to the process that this one was forked from")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} cannot be pickled or copied: it is this process's")

    def __repr__(self) -> str:
        return f"<CudaDevice {self.card.ordinal} ({self.card.model}), {self.strategy}{', lost' if self.lost else ''}>"


def _refusals(own: int, visible: Iterable[int], asked: str) -> dict[StrategyName, str]:
    """Return for each strategy why the card cannot do it, or one that is only visible spoils it."""
    reasons: dict[StrategyName, str] = dict.fromkeys(_STRATEGIES, "")
    for ordinal in visible:
        attributes = can(ordinal)
        for name, strategy in _STRATEGIES.items():
            if ordinal != own and not strategy.takes_all_visible:
                continue
            reason = strategy.why_not(attributes, asked=asked == name)
            if reason and not reasons[name]:
                reasons[name] = f"cuda:{ordinal}: {reason}"
    return reasons


def _why_not_together(name: StrategyName, cards: list[CudaDevice], others: list[Device]) -> str:
    """Return which device of a space cannot do a strategy; empty: all can."""
    for card in cards:
        if card._fixed not in (None, name):
            return f"{card.card.name} uses {card._fixed} already"
        if card._asked not in ("auto", name):
            return f"{card.card.name} was asked to use {card._asked}"
        if card._refusals[name]:
            return card._refusals[name]
    for other in others:
        if isinstance(other, CudaDevice):
            continue
        declared = other.info
        if declared.memory == "private":
            return f"{declared.name} has memory of its own, and the driver does not see pages that move by userfaultfd"
        if not declared.backings & _STRATEGIES[name].backings:
            return f"{declared.name} lives with {', '.join(sorted(declared.backings))} memory only"
    return ""


def _nothing_does(who: str, reasons: dict[StrategyName, str], asked: str) -> NotSupportedError:
    told = [f"{name}: {reason}" for name, reason in reasons.items() if reason and asked in ("auto", name)]
    return NotSupportedError(
        who,
        "; ".join(told),
        "use a card, driver and kernel that can do one of these (uvas doctor shows what this one can)",
    )
