"""Kernels on their way, and the thread that waits for those that nobody else waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
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
    """A thread that settles launches in the order in which they were handed to the driver. Begins with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._line: SimpleQueue[Launch | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def add(self, launch: Launch) -> None:
        """Settle this one, after those before it."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=_work, args=(self._line,), name=self._name, daemon=True)
                self._thread.start()
        self._line.put(launch)

    def end(self) -> None:
        """Let it end when all are settled. Takes no lock: finalizers call it."""
        self._line.put(None)

    def join(self) -> None:
        """Wait until it has ended, unless it is this very thread: a callback of a future."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _work(line: SimpleQueue[Launch | None]) -> None:
    while (launch := line.get()) is not None:
        launch.settle()
        del launch
