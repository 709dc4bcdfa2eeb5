"""CUDA devices as parties of the contract suite: over the fake of the driver, and over a real one."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from machine import PAGE, mappings

import uvas

_FAKE_CARDS = 4


class CudaParty:
    """A CUDA device with one strategy; what a card may do is tried on it."""

    strategy = "hmm"
    page = PAGE
    backing = "anonymous"

    def __init__(self, patch: Any, real: bool, numbers: count[int]) -> None:
        self.fake: Any = _the_real(self.strategy) if real else _the_fake(patch)
        self.device = uvas.CudaDevice(0 if real else next(numbers), strategy=self.strategy)
        self.name = self.device.info.name

    def committed(self, range: uvas.Range) -> str | None:
        """What the card may do with all of the range, as the strategy's own book has it and as the card finds it."""
        told = self._told(range)
        if self.fake is not None and told is not None:
            assert _found(self.fake, self.device.card.ordinal, range) == told
        return told

    def _told(self, range: uvas.Range) -> str | None:
        found = {one.permissions for one in mappings(range.base, range.end) if "uvas:" not in one.name}
        return (found.pop()[:3].replace("-", "") or "none") if len(found) == 1 else None

    def holds(self, range: uvas.Range) -> bool:
        found = [one for one in mappings(range.base, range.end) if one.permissions == "---p" and "uvas:" in one.name]
        return sum(min(one.end, range.end) - max(one.start, range.base) for one in found) == range.size

    def occupy(self, range: uvas.Range) -> bool:
        pytest.skip("it takes no addresses of its own that could be taken")

    def intact(self, range: uvas.Range) -> bool:
        raise AssertionError("nothing was put there")


class HmmParty(CudaParty):
    """On the host's pages."""


class RegisterParty(CudaParty):
    """On pinned pages."""

    strategy = "register"
    backing = "memfd"

    def _told(self, range: uvas.Range) -> str | None:
        from uvas.devices.cuda.register import _book

        parts = [part for part in _book.parts.touching(range) if self.device.card in part.users]
        found = {part.protection for part in parts}
        covered = sum(min(part.range.end, range.end) - max(part.range.base, range.base) for part in parts)
        return found.pop() if len(found) == 1 and covered == range.size else None


class VmmParty(CudaParty):
    """On what the driver maps."""

    strategy = "vmm"
    page = 2 << 20
    backing = "auto"

    def _mappings(self, range: uvas.Range) -> list[Any]:
        from uvas.devices.cuda.vmm import book

        claim = book.claim_of(range)
        return claim.mappings.touching(range) if claim else []

    def _told(self, range: uvas.Range) -> str | None:
        parts = self._mappings(range)
        found = {part.users.get(self.device.card) for part in parts}
        covered = sum(min(part.range.end, range.end) - max(part.range.base, range.base) for part in parts)
        allowed = found.pop() if len(found) == 1 and covered == range.size else None
        return None if allowed is None else {0: "none", 1: "r", 3: "rw"}[allowed]

    def holds(self, range: uvas.Range) -> bool:
        from uvas.devices.cuda.vmm import book

        return book.claim_of(range) is not None and not self._mappings(range)

    def occupy(self, range: uvas.Range) -> bool:
        if self.fake is None:
            pytest.skip("a real driver says itself what it wants for itself")
        if self._mappings(range) or any(
            base < range.end and range.base < base + size for base, size in self.fake.taken
        ):
            return False
        self.fake.taken.append((range.base, range.size))
        return True

    def intact(self, range: uvas.Range) -> bool:
        return (range.base, range.size) in self.fake.taken


PARTIES = {"hmm": HmmParty, "register": RegisterParty, "vmm": VmmParty}


def _the_real(strategy: str) -> None:
    """Skip where there is no hardware for a strategy."""
    from uvas.devices.cuda.driver import forget

    forget()
    try:
        uvas.CudaDevice(strategy=strategy).close()
    except uvas.NotSupportedError as error:
        pytest.skip(f"no hardware for it: {error}")


def _the_fake(patch: Any) -> Any:
    """Plug cards into a fake driver, once for each test."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")
    from cuda.bindings import driver
    from fake_cuda import HMM_CARD, FakeCard, FakeDriver

    from uvas.devices.cuda.driver import forget

    installed = getattr(driver.cuInit, "fake", None)
    if installed is None:
        forget()
        installed = FakeDriver(*(FakeCard(dict(HMM_CARD)) for _ in range(_FAKE_CARDS))).install(patch)
    return installed


def _found(fake: Any, card: int, range: uvas.Range) -> str:
    """What a card may do with the first and last bytes of a range, tried."""
    from fake_cuda import CardDied

    may = ""
    for letter in "rw":
        try:
            for address in (range.base, range.end - 8):
                kept = fake.read(card, address, 8)
                if letter == "w":
                    fake.write(card, address, kept)
            may += letter
        except CardDied:
            fake.cards[card].sticky = None
    return may or "none"
