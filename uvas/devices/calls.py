"""Functions on their way to a worker: one at work there, the others waiting here, first come first served.

A call is sent when the one before it has answered. So the worker is reading whenever something is sent to it: neither
side can wait for ever to send while the other one does. And a call that waits can still be cancelled.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from uvas.errors import DeviceError
from uvas.interrupts import held_back

__all__ = ["Call", "Calls", "WorkerTraceback"]


class WorkerTraceback(Exception):
    """Where in the worker an exception was raised, as text: its ``__cause__`` here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class Call:
    """A function that was submitted.

    Parameters
    ----------
    name
        The function's, for messages.
    message
        The function and its arguments, pickled.
    holds
        What must live until the call is done.
    """

    __slots__ = ("future", "holds", "message", "name")

    def __init__(self, name: str, message: bytes, holds: object) -> None:
        self.name = name
        self.message = message
        self.holds = holds
        self.future: Future[Any] = Future()

    def end(self, result: Any, error: BaseException | None) -> None:
        """Settle the future; what the call held is let go before anybody who waits goes on."""
        self.holds = None
        self.message = b""
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Calls:
    """The host's end of the line that functions travel on.

    Parameters
    ----------
    end
        This process's end of a pair of stream sockets. It is this object's from here on.
    party
        The device's name, for messages.
    """

    def __init__(self, end: socket.socket, party: str) -> None:
        self._socket = end
        self._connection = Connection(os.dup(end.fileno()))
        self._party = party
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._current: Call | None = None
        self._waiting: deque[Call] = deque()
        self._refusal: Callable[[], Exception] | None = None

    def fileno(self) -> int:
        """Return the descriptor to wait on for answers."""
        return self._connection.fileno()

    def submit(self, call: Call) -> None:
        """Send a call, or let it wait for its turn.

        Raises
        ------
        DeviceLostError, ReleasedError
            None is taken any more.
        """
        with held_back():
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal()
                if self._current is not None:
                    self._waiting.append(call)
                    return
                self._current = call
                call.future.set_running_or_notify_cancel()
            self._send(call)

    def _send(self, call: Call) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(call.message)
        except OSError:
            return  # whoever watches the worker sees that it is gone, and ends the call
        except BaseException:  # interrupted half way through: what follows would not be understood
            self.hang_up()
            raise
        finally:
            call.message = b""

    def receive(self) -> None:
        """Read the answer to the call at work, send the next one, then settle the first.

        Raises
        ------
        EOFError, OSError
            The line has ended.
        """
        answer = self._connection.recv_bytes()
        with self._lock:
            done, self._current = self._current, None
            while self._waiting and self._current is None:
                following = self._waiting.popleft()
                if following.future.set_running_or_notify_cancel():
                    self._current = following
            following_call = self._current
        if following_call is not None:
            self._send(following_call)
        if done is not None:
            done.end(*self._read(done, answer))

    def _read(self, call: Call, answer: bytes) -> tuple[Any, BaseException | None]:
        """Return the result and the error that an answer holds."""
        try:
            kind, *rest = pickle.loads(answer)
        except Exception as error:
            error.add_note(f"while reading the result of {call.name} from {self._party}")
            return None, error
        if kind == "value":
            return rest[0], None
        return None, self._raised(call, *rest)

    def _raised(self, call: Call, pickled: bytes | None, summary: str, why: str, text: str) -> BaseException:
        error: BaseException
        try:
            if pickled is None:
                raise TypeError(why)
            error = pickle.loads(pickled)
        except Exception as unreadable:
            said = f"{call.name} raised {summary} on {self._party}; the exception cannot travel: {unreadable}"
            error = DeviceError(call.name, 0, summary.partition(":")[0], self._party, message=said)
        error.__cause__ = WorkerTraceback(text)
        return error

    @property
    def idle(self) -> bool:
        """Whether no call is at work."""
        return self._current is None

    # ---- the end -----------------------------------------------------------------------------------------------------

    def refuse(self, refusal: Callable[[], Exception]) -> Future[Any] | None:
        """Take no more calls, cancel those that wait, and return the future of the one at work."""
        with self._lock:
            self._refusal = self._refusal or refusal
            waiting, self._waiting = list(self._waiting), deque()
            current = self._current
        for call in waiting:
            call.future.cancel()
            call.future.set_running_or_notify_cancel()
            call.holds = None
        return current.future if current is not None else None

    def fail(self, refusal: Callable[[], Exception]) -> None:
        """Take no more calls, and let each one that was taken fail."""
        with self._lock:
            self._refusal = self._refusal or refusal
            calls = [*([self._current] if self._current is not None else []), *self._waiting]
            self._current = None
            self._waiting.clear()
        for call in calls:
            if call.future.running() or call.future.set_running_or_notify_cancel():
                call.end(None, refusal())

    def hang_up(self) -> None:
        """End the line for both sides. Takes no lock; may be called again."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it had ended, or is closed

    def close(self) -> None:
        """Hang up and give the descriptors back, once nobody uses them."""
        self.hang_up()
        with self._sending:
            self.close_descriptors()

    def close_descriptors(self) -> None:
        """Give the descriptors back and leave the line alone: for a forked child, whose parent goes on using it."""
        self._connection.close()
        self._socket.close()
