"""What callers give: numbers, choices, windows, elements; checked, and turned into what C takes.

A mistake is a plain TypeError or ValueError that shows the value, raised before anything is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from uvas._core import ffi
from uvas.ranges import Range

Window = Range | tuple[int, int]
"""Where something shall lie: a range, or base and size."""

_ALL = 1 << 64


def as_size(name: str, value: object) -> int:
    """Return an integer that C can take, or say why not.

    Raises
    ------
    TypeError
        It is no integer (or a boolean).
    ValueError
        It is negative or does not fit in 64 bits.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} is a number of bytes, not {value!r}")
    try:
        number = index(value)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        raise TypeError(f"{name} is an integer, not {type(value).__name__}: {value!r}") from None
    if not 0 <= number < _ALL:
        raise ValueError(f"{name} is between 0 and 2^64, not {number:#x}")
    return number


def as_number(option: str, value: object, least: int, below: int) -> int:
    """Return an integer from `least` to below `below`.

    Raises
    ------
    TypeError, ValueError
        It is not.
    """
    number = as_size(option, value)
    if not least <= number < below:
        raise ValueError(f"{option} is at least {least:#x} and below {below:#x}, not {number:#x}")
    return number


def as_choice(option: str, value: str, choices: dict[str, int]) -> int:
    """Return what stands for one of an option's values.

    Raises
    ------
    ValueError
        The option has no such value; the message lists those that it has.
    """
    if value not in choices:
        raise ValueError(f"{value!r} is no {option}: {', '.join(choices)}")
    return choices[value]


def as_label(name: object) -> Any:
    """Return a name as C takes it, for as long as what is returned lives.

    Raises
    ------
    TypeError
        It is no string.
    ValueError
        It holds the character NUL, at which C would end it.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name is a string, not {name!r}")
    if "\0" in name:
        raise ValueError(f"a name holds no NUL, as {name!r} does")
    return ffi.new("char[]", name.encode())


def as_window(window: Window | None) -> Range | None:
    """Return a window as a range.

    Raises
    ------
    TypeError, ValueError
        It is no range of addresses.
    """
    if window is None or isinstance(window, Range):
        return window
    base, size = window
    return Range(as_size("the window's base", base), as_size("the window's size", size))


def as_where(at: int | None, window: Window | None, align: int | None, name: str | None) -> tuple[Any, Any]:
    """Return the ``struct uvas_where``, and what must live as long as it.

    Raises
    ------
    TypeError, ValueError
        A number that cannot be: the message shows it.
    """
    where = ffi.new("struct uvas_where *")
    if at is not None:
        where.at = as_size("at", at)
        if not where.at:
            raise ValueError("the address 0 is nobody's to have")
    inside = as_window(window)
    if inside is not None:
        where.window_base, where.window_size = inside.base, inside.size
    if align is not None:
        where.align = as_size("the alignment", align)
        if not where.align:
            raise ValueError("the alignment 0x0 is not a power of two")
    label = as_label(name) if name is not None else ffi.NULL
    where.name = label
    return where, label


def as_elements(
    dtype: npt.DTypeLike, shape: int | Iterable[int] | None, start: int, room: int
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return the type, the dimensions and the bytes of an array in memory that devices see.

    Parameters
    ----------
    dtype, shape
        Of the array; no shape: as many elements as there is room for.
    start, room
        The offset of the first byte, and that of the end.

    Raises
    ------
    ValueError
        It does not fit, or its elements have no size.
    TypeError
        Its elements hold Python objects, whose pointers mean nothing to anybody else.
    """
    kind = np.dtype(dtype)
    if kind.hasobject or kind.kind == "T":
        raise TypeError(f"{kind} elements are Python objects: their pointers mean nothing to a device")
    if kind.itemsize == 0:
        raise ValueError(f"{kind} elements have no size")
    rest = max(0, room - start)
    if shape is None:
        dimensions: tuple[int, ...] = (rest // kind.itemsize,)
    elif isinstance(shape, Iterable):
        dimensions = tuple(as_size("dimension", one) for one in shape)
    else:
        dimensions = (as_size("shape", shape),)
    size = kind.itemsize * math.prod(dimensions)
    if size > room - start:
        raise ValueError(
            f"{dimensions} elements of {kind} are {size:#x} bytes: from offset {start:#x} there are {rest:#x}"
        )
    return kind, dimensions, size
