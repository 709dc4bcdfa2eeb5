"""What was looked at, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["good", "limited", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One property of this machine, what it means for uvas, and what would help."""

    name: str
    value: str
    """As it was found, for a person."""
    state: State
    """``good``: nothing to wish for. ``limited``: uvas works, with less. ``missing``: it is not there."""
    means: str
    remedy: str
    """Empty where nothing is to be done."""


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """One kind of device: what the machine shows, apart from what answered when it was tried."""

    name: str
    advertised: str
    probed: str
    state: State
    remedy: str
    """Empty where nothing is to be done."""
