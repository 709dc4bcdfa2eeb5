from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

class _FFI:
    def def_extern(
        self, name: str | None = None, error: int = 0, onerror: Callable[..., None] | None = None
    ) -> Callable[[_F], _F]: ...
    def __getattr__(self, name: str) -> Any: ...  # cffi's objects have the types that uvas.h gives them, at run time

ffi: _FFI
lib: Any
