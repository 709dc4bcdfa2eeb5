"""Host memory that is pinned where it lies, and that every GPU sees at the host's addresses.

Registered when it is committed, unregistered before it is decommitted; a registration is of the process and counts for
all cards. The kernel's pages stay where they are: the cards reach them over the bus.

Not yet seen on hardware.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from uvas.devices.base import Backing
from uvas.devices.cuda.parts import Parts
from uvas.devices.cuda.strategy import Strategy
from uvas.devices.cuda.undo import Undo
from uvas.errors import DeviceError, DeviceLostError, LimitReachedError, NotSupportedError
from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.devices.cuda.card import Card

__all__ = ["Register"]

_PORTABLE, _DEVICEMAP, _READ_ONLY = 1, 2, 8  # CU_MEMHOSTREGISTER_*


@dataclass(eq=False, slots=True)
class _Registration:
    range: Range
    protection: str
    users: set[Card] = field(default_factory=set)


class _Book:
    """What is registered in this process."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Hold nothing: what a parent registered is the parent's."""
        self.lock = threading.Lock()  # of the table; never held over a call
        self.parts: Parts[_Registration] = Parts()


_book = _Book()
os.register_at_fork(after_in_child=_book.begin)


class Register(Strategy):
    """Registers host memory."""

    name = "register"
    placement = "registers"
    takes_all_visible = True  # a portable registration is made for every card of the process at once
    backings = frozenset(("anonymous", "memfd"))

    @staticmethod
    def why_not(attributes: Mapping[str, int], *, asked: bool = False) -> str:
        """Say what the card lacks."""
        wanted = ("unified addressing", "host registration", "registered memory at host addresses")
        lacking = [what for what in wanted if not attributes[what]]
        return f"the card lacks {', '.join(lacking)}" if lacking else ""

    # ---- with the driver ---------------------------------------------------------------------------------------------

    def _flags(self, protection: str) -> int:
        """Return how it is registered.

        Raises
        ------
        NotSupportedError
            The host may not write there, and the card takes no such memory.
        """
        if "w" in protection or protection == "none":
            return _PORTABLE | _DEVICEMAP
        if not self.card.attributes["read-only registration"]:
            raise self.refuse("read-only memory", "the card does not take it", "let the host write there, or use hmm")
        return _PORTABLE | _DEVICEMAP | _READ_ONLY

    def _register(self, range: Range, protection: str) -> None:
        """Pin it, and see that its device address is its host address."""
        flags, card = self._flags(protection), self.card
        if protection == "none":
            return  # nothing that anybody could access
        with card.current(), Undo() as undo:
            try:
                card.call("cuMemHostRegister", range.base, range.size, flags)
            except DeviceError as error:
                if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
                    raise
                raise LimitReachedError(
                    "memory that may be pinned", range.size, "commit less, or raise RLIMIT_MEMLOCK"
                ) from error
            undo.push(lambda: card.call("cuMemHostUnregister", range.base))
            self._compare(range)

    def _compare(self, range: Range) -> None:
        seen = int(self.card.call("cuMemHostGetDevicePointer", range.base, 0))
        if seen != range.base:
            raise NotSupportedError(
                f"registered memory on {self.card.name}",
                f"{range} is seen there at {seen:#x}: a card that this process sees keeps its own addresses",
                "hide that card (CUDA_VISIBLE_DEVICES)",
            )

    def _unregister(self, range: Range, protection: str) -> None:
        if protection != "none" and not self.card.lost:
            try:
                with self.card.current():
                    self.card.call("cuMemHostUnregister", range.base)
            except DeviceLostError:
                return  # a card that is gone holds nothing that could be given back
            except DeviceError as error:
                if not (self.card.closed and error.name == "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"):
                    raise  # but with the context of a card that was closed it has gone already

    # ---- what a space asks -------------------------------------------------------------------------------------------

    def commit(self, range: Range, backing: Backing, protection: str) -> None:
        """Register the range, or take part in another card's registration of it.

        Raises
        ------
        NotSupportedError
            The card sees it at another address.
        LimitReachedError
            So much memory cannot be pinned.
        DeviceError
            The driver said no.
        """
        self.card.check("commit")
        with _book.lock:
            found = _book.parts.at(range.base)
        if found is None:
            self._register(range, protection)
            found = _Registration(range, protection)
            with _book.lock:
                _book.parts.add(found)
        elif found.range != range:
            raise self.refuse("commit", f"{found.range} was registered at once, {range} is not the same", "decommit it")
        elif protection != "none":
            with self.card.current():
                self._compare(range)
        found.users.add(self.card)

    def _mine(self, range: Range) -> list[_Registration]:
        with _book.lock:
            return [part for part in _book.parts.whole(range, self.card.name) if self.card in part.users]

    def decommit(self, range: Range) -> None:
        """Unregister, when the last card lets go of it.

        Raises
        ------
        NotSupportedError
            The range cuts what was registered at once.
        DeviceError
            The driver said no.
        """
        parts = self._mine(range)
        self.card.synchronize()
        with Undo() as undo:
            for part in parts:
                if len(part.users) == 1:
                    self._unregister(part.range, part.protection)
                    undo.push(partial(self._register, part.range, part.protection))
        with _book.lock:
            for part in parts:
                part.users.discard(self.card)
                if not part.users:
                    _book.parts.remove(part)

    def protect(self, range: Range, protection: str) -> None:
        """Register anew with what is now allowed; the first of several cards does it.

        Raises
        ------
        NotSupportedError, DeviceError
            As of `decommit`.
        """
        self.card.check("protect")
        self._flags(protection)  # before anything is given up
        parts = [part for part in self._mine(range) if part.protection != protection]
        if parts:
            self.card.synchronize()
        with Undo() as undo:
            for part in parts:
                before = part.protection
                self._unregister(part.range, before)
                undo.push(partial(self._set, part, before))
                self._set(part, protection)
                undo.push(partial(self._unregister, part.range, protection))

    def _set(self, part: _Registration, protection: str) -> None:
        self._register(part.range, protection)
        part.protection = protection
