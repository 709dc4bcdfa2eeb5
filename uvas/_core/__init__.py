"""The C core: ``libuvas.so`` through cffi (`ffi`, `lib`), the calls that keep the GIL, and where it lies.

`fast` has lookups, `allocation` the blocks of arenas, `handler` what NumPy asks for memory.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

try:
    from uvas._core import _allocation as allocation
    from uvas._core import _fast as fast
    from uvas._core import _handler as handler
    from uvas._core._cffi import ffi, lib
except ImportError as error:
    if (_HERE / "libuvas.so").exists():
        raise
    raise ImportError(
        f"the C parts of uvas are not built in {_HERE}: build them there (pip install -e .), or start Python in "
        "another directory, so that it finds an installed uvas and not these sources"
    ) from error

__all__ = ["allocation", "fast", "ffi", "get_include", "get_library", "handler", "lib"]


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
