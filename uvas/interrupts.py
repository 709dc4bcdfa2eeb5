"""Ctrl-C, held back while half of something is done."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enumerations of `signal`, a tenth of the time
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held_back"]


@contextmanager
def held_back(*, even_a_second: bool = False) -> Iterator[None]:
    """Let an interrupt wait until the end of the block, where it raises what it would have raised at once.

    Python runs signal handlers on the main thread only, so on others there is nothing to do.

    Parameters
    ----------
    even_a_second
        For blocks that wait for nobody. Elsewhere a second interrupt does not wait: the block may be waiting for
        somebody who never answers.
    """
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    before: object = _signal.getsignal(_signal.SIGINT)
    if not callable(before):  # ignored, or the process just ends
        yield
        return
    came: list[FrameType | None] = []
    handler: Callable[[int, FrameType | None], object] = before

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(frame)
        if len(came) > 1 and not even_a_second:
            _signal.signal(_signal.SIGINT, before)  # it may raise where nothing else gives the handler back
            handler(number, frame)

    try:
        _signal.signal(_signal.SIGINT, wait)
        yield
    finally:
        _signal.signal(_signal.SIGINT, before)
        if len(came) == 1 or (came and even_a_second):
            handler(signal.SIGINT, came[0])
