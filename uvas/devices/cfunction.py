"""C functions in a shared library, called on a device by path and symbol."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from operator import index
from typing import Any, Literal, cast

import numpy as np

__all__ = ["CFunction", "CType"]

CType = Literal["int64", "uint64", "float64", "int32", "none"]

_RESULTS: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float64": ctypes.c_double,
    "int32": ctypes.c_int32,
    "none": None,
}


@dataclass(frozen=True, slots=True)
class CFunction:
    """A C function, to be called by a device: ``device.submit(CFunction(path, symbol), ...)``.

    It is loaded where it is called. Integers (addresses among them) are passed as 64-bit integers, floats as doubles,
    arrays as the address of their first element. While it runs, the interpreter is free for others.

    A shared library does not say what its functions take: the number and the kinds of the arguments are trusted,
    as in C.

    Parameters
    ----------
    path
        Of the shared library. A bare name is looked for as the dynamic linker does.
    symbol
        The function's name in it.
    result
        What it returns. ``none``: nothing.

    Raises
    ------
    TypeError, ValueError
        `path`, `symbol` or `result` is none.

    Examples
    --------
    >>> CFunction("libm.so.6", "cos", "float64")(0.0)
    1.0
    """

    path: str
    symbol: str
    result: CType = "int64"

    def __post_init__(self) -> None:
        path = os.fsdecode(self.path)
        if not path or not isinstance(self.symbol, str) or not self.symbol:
            raise ValueError(f"a C function has a library and a symbol, not {self.path!r} and {self.symbol!r}")
        if self.result not in _RESULTS:
            raise ValueError(f"a C function's result is one of {', '.join(_RESULTS)}, not {self.result!r}")
        # Where it is called, the working directory may be another one.
        object.__setattr__(self, "path", os.path.abspath(path) if "/" in path else path)

    def __call__(self, *arguments: object) -> int | float | None:
        """Call it in this process.

        Raises
        ------
        OSError
            The library cannot be loaded.
        AttributeError
            There is no such symbol in it.
        TypeError
            An argument is neither a number nor an array.
        OverflowError
            An integer has more than 64 bits.
        """
        function = _load(self.path, self.symbol, self.result)
        passed = [self._passed(place, argument) for place, argument in enumerate(arguments, start=1)]
        return cast("int | float | None", function(*passed))

    def _passed(self, place: int, argument: object) -> Any:
        if isinstance(argument, np.ndarray):
            return ctypes.c_void_p(argument.ctypes.data)
        if isinstance(argument, float | np.floating):
            return ctypes.c_double(float(argument))
        try:
            number = index(argument)  # type: ignore[arg-type] # this is the check
        except TypeError:
            raise TypeError(
                f"argument {place} of {self.symbol} is a {type(argument).__name__}: "
                f"a C function takes integers, floats and arrays"
            ) from None
        if not -(1 << 63) <= number < 1 << 64:
            raise OverflowError(f"argument {place} of {self.symbol} has more than 64 bits: {number:#x}")
        return ctypes.c_int64(number) if number < 0 else ctypes.c_uint64(number)


@cache
def _load(path: str, symbol: str, result: str) -> Any:
    function = ctypes.CDLL(path)[symbol]  # unlike the attribute an object of its own, whose result is ours to set
    function.restype = _RESULTS[result]
    return function
