"""CuPy arrays over memory that somebody else keeps."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from uvas.devices.base import Device
from uvas.errors import NotSupportedError

__all__ = ["card_of", "cupy_module", "cupy_view"]


def cupy_module() -> ModuleType:
    """Return CuPy.

    Raises
    ------
    NotSupportedError
        It is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise NotSupportedError("CuPy", f"it is not installed ({error})", "pip install 'uvas[cuda]'") from None
    module: ModuleType = cupy
    return module


def card_of(devices: Iterable[Device], what: str) -> int:
    """Return the number of the card that shall see something: the current one, if several can.

    Raises
    ------
    ValueError
        None of the devices is a CUDA GPU: only a copy would do.
    """
    cards: list[int] = [int(one.info.details["index"]) for one in devices if one.info.details.get("api") == "cuda"]  # type: ignore[call-overload]
    if not cards:
        raise ValueError(f"{what} lies in memory that no CUDA device shares: attach one, or copy it by cupy.asarray")
    if len(cards) > 1:
        current = int(cupy_module().cuda.device.get_device_id())
        cards.sort(key=lambda card: bool(card != current))
    return cards[0]


def cupy_view(
    low: int,
    size: int,
    address: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    keeper: object,
    card: int,
) -> Any:
    """Return a ``cupy.ndarray`` over ``[low, low + size)`` whose first element is at `address`; nothing is copied."""
    cupy = cupy_module()
    memory = cupy.cuda.UnownedMemory(low, size, keeper, card)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, address - low), strides)
