"""Taking addresses of a driver that regards an address as a hint.

What it gives elsewhere is kept until the loop ends, because it would give the same again, and then given back. What it
does not take back is kept and offered again at the next claim.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from uvas.errors import AddressInUseError, DeviceError, DeviceLostError, OutOfMemoryError
from uvas.ranges import Range

if TYPE_CHECKING:
    from uvas.devices.cuda.card import Card

__all__ = ["CLAIM_TRIES", "claim_address", "free_address", "strays"]

CLAIM_TRIES = 4
"""How often one claim asks for the same place: a driver that moves may honour it when what it prefers is given away."""

strays: list[Range] = []
"""What the driver gave elsewhere and did not take back."""
_lock = threading.Lock()


def claim_address(card: Card, wanted: Range) -> None:
    """Let the driver take a range, which occupies it on the host as well.

    Raises
    ------
    AddressInUseError
        The driver gives other addresses: the place is taken, or it does not like it.
    OutOfMemoryError
        It has no addresses at all.
    DeviceError
        It said no otherwise.
    """
    _give_back(card, [])
    moved: list[Range] = []
    try:
        for _ in range(CLAIM_TRIES):
            try:
                got = int(card.call("cuMemAddressReserve", wanted.size, 0, wanted.base, 0))
            except DeviceLostError:
                raise
            except DeviceError as error:  # what it returned is garbage then: never given back
                raise _refusal(card, wanted, error) from error
            if got == wanted.base:
                return
            moved.append(Range(got, wanted.size))
    finally:
        _give_back(card, moved)
    there = _who_is_at(wanted)
    owner = there[1] if there else f"moved by the driver of {card.name} to {moved[0].base:#x}"
    raise AddressInUseError(wanted, owner, there[0] if there else None)


def _refusal(card: Card, wanted: Range, error: DeviceError) -> Exception:
    """Tell "taken" from "no addresses": drivers say "out of memory" to both."""
    if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
        return error
    there = _who_is_at(wanted)
    if there:
        return AddressInUseError(wanted, there[1], there[0])
    return OutOfMemoryError(wanted.size, card.name, message=f"the driver of {card.name} has no addresses for {wanted}")


def free_address(card: Card, range: Range) -> None:
    """Give a claim back, with the very numbers that it was made with."""
    card.call("cuMemAddressFree", range.base, range.size)


def _give_back(card: Card, more: list[Range]) -> None:
    with _lock:
        mine = strays + more
        strays.clear()
    kept = []
    for stray in mine:
        try:
            free_address(card, stray)
        except DeviceError:
            kept.append(stray)
    with _lock:
        strays.extend(kept)


def _who_is_at(wanted: Range) -> tuple[Range, str] | None:
    """Return the first mapping of the host in a range, for a message."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="backslashreplace").splitlines()
    except OSError:
        return None
    for line in lines:
        low, _, high = line.partition(" ")[0].partition("-")
        there = Range(int(low, 16), int(high, 16) - int(low, 16))
        if there.overlaps(wanted):
            return there, line.strip()
    return None
