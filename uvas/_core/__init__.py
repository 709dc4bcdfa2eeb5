"""The C core: ``libuvas.so`` through cffi (`ffi`, `lib`), the calls that keep the GIL (`fast`), and where it lies."""

from __future__ import annotations

from pathlib import Path

from uvas._core import _fast as fast
from uvas._core._cffi import ffi, lib

__all__ = ["fast", "ffi", "get_include", "get_library", "lib"]

_HERE = Path(__file__).parent


def get_include() -> str:
    """Return the directory that holds ``uvas.h``, for ``cc -I``.

    Examples
    --------
    >>> Path(get_include(), "uvas.h").is_file()
    True
    """
    return str(_HERE / "include")


def get_library() -> str:
    """Return the path of ``libuvas.so``: to link to, with its directory as rpath, or to load.

    Whoever links to this file or loads it shares one registry with Python and with each other.

    Examples
    --------
    >>> Path(get_library()).name
    'libuvas.so'
    """
    return str(_HERE / "libuvas.so")
