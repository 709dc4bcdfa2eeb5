"""Steps that are taken back, last first, when a later one fails."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from uvas.errors import UvasError

__all__ = ["Undo"]


class Undo:
    """A ``with`` block whose steps are all kept or all taken back.

    If taking back fails, the block's error is marked `unrecoverable`: the range is in no state that anybody may use,
    and the space poisons it. What was to be taken back after that step is left: it may hang on the step.

    Examples
    --------
    >>> with Undo() as undo:
    ...     opened = ["file"]
    ...     undo.push(opened.clear)
    >>> opened
    ['file']
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Remember how to take back what has just been done."""
        self._steps.append(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        for step in reversed(self._steps):
            try:
                step()
            except UvasError as failed:
                error.add_note(f"taking it back failed as well: {failed}")
                if isinstance(error, UvasError):
                    error.unrecoverable = True
                return
