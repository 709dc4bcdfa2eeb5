"""Kernels on their way, and the thread that waits for those that nobody else waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["Launch", "Waiter"]

_LOOK_S = 0.001
"""Between looks at a command that cannot be waited for."""


class Launch:
    """A kernel that is handed to the driver.

    Parameters
    ----------
    holds
        What must live until it has ended.
    translate
        Makes uvas's error of OpenCL's.
    """

    __slots__ = ("_begun", "_event", "_holds", "_translate", "future")

    def __init__(self, holds: object, translate: Callable[[Exception], Exception]) -> None:
        self._begun = False
        self._event: Any = None
        self._holds = holds
        self._translate = translate
        self.future: Future[None] = Future()

    def begin(self, enqueue: Callable[..., Any], *arguments: Any) -> None:
        """Hand it to the driver: `enqueue` returns the event of its end. A command in a queue cannot be taken back."""
        self._begun = True
        self._event = enqueue(*arguments)

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
            self._watch()
            self._holds = None
            raise self._translate(error) from None
        self._holds = None

    def _watch(self) -> None:
        """Wait without the driver's help, which has failed: for all that it says, the kernel may be running."""
        try:
            while self._event.command_execution_status > 0:
                time.sleep(_LOOK_S)
        except Exception:
            return  # it knows nothing of it any more

    def finish(self, queue: Any) -> None:
        """See to it that it has ended although something came in between, if it was begun at all."""
        if self._begun and self._holds is not None:
            queue.finish()
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
