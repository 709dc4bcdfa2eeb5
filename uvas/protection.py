"""What may be done with memory, as text and as the core's bits."""

from __future__ import annotations

from uvas._core import lib
from uvas.arguments import as_choice

PROTECTIONS: dict[str, int] = {
    "none": lib.UVAS_NONE,
    "r": lib.UVAS_READ,
    "rw": lib.UVAS_READ | lib.UVAS_WRITE,
    "rx": lib.UVAS_READ | lib.UVAS_EXECUTE,
    "rwx": lib.UVAS_READ | lib.UVAS_WRITE | lib.UVAS_EXECUTE,
}
"""All protections that uvas knows, by name."""

_NAMES = {bits: name for name, bits in PROTECTIONS.items()}


def protection_bits(protection: str) -> int:
    """Return the bits of a protection.

    Raises
    ------
    ValueError
        There is no such protection.
    """
    return as_choice("protection", protection, PROTECTIONS)


def protection_name(bits: int) -> str:
    """Return the name of what the core calls by bits."""
    return _NAMES.get(bits, f"{bits:#x}")
