"""Kernels on their way, and the thread that waits for those that nobody else waits for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["Launch", "Waiter"]


class Launch:
    """A kernel that was handed to the driver.

    Parameters
    ----------
    event
        The driver's, of its end.
    holds
        What must live until then.
    translate
        Makes uvas's error of OpenCL's.
    """

    __slots__ = ("_event", "_holds", "_translate", "future")

    def __init__(self, event: Any, holds: object, translate: Callable[[Exception], Exception]) -> None:
        self._event = event
        self._holds = holds
        self._translate = translate
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # a command that is queued cannot be taken back

    def wait(self) -> None:
        """Wait for its end, and let go of what it held.

        Raises
        ------
        Exception
            As `translate` has it: the command failed.
        """
        try:
            self._event.wait()
        except Exception as error:
            raise self._translate(error) from None
        finally:
            self._holds = None

    def settle(self) -> None:
        """Wait for its end, and tell the future."""
        try:
            self.wait()
        except Exception as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)


class Waiter:
    """Settles launches in the order in which they were handed to the driver, on a thread while there are any.

    The interpreter waits for such a thread when it ends. One that waited for ever for more would have to be a daemon,
    and daemons that the interpreter's end finds inside OpenCL take the process with them.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._line: deque[Launch] = deque()
        self._thread: threading.Thread | None = None

    def add(self, launch: Launch) -> None:
        """Settle this one, after those before it; here and now where there is no thread to be had."""
        with self._lock:
            self._line.append(launch)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=False)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
        if self._thread is None:
            self._work()

    def _work(self) -> None:
        while (launch := self._next()) is not None:
            launch.settle()
            del launch

    def _next(self) -> Launch | None:
        with self._lock:
            if self._line:
                return self._line.popleft()
            self._thread = None
            return None

    def join(self) -> None:
        """Wait until all are settled, unless this is the very thread that does it: a callback of a future."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
