"""Requests to a worker process and their answers, over one connection, for any number of threads.

The standard library frames the messages (`multiprocessing.connection`) and carries descriptors (`.reduction`). A
request is ``(tag, verb, arguments, whether a descriptor follows)``, its answer ``(tag, error or None, value)``; both
are pickled, and errors travel as themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import socket
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, sendfds
from queue import SimpleQueue
from typing import Any

__all__ = ["HELLO", "RequestLine", "serve"]

HELLO = 0
"""The tag of the worker's first message, which nobody asked for: it is ready, or why it is not."""


class RequestLine:
    """The host's end.

    Whoever waits for an answer reads the line, one thread at a time, and puts aside what others wait for. A thread that
    did nothing but read would make the state simpler and each answer two switches of threads later.

    Parameters
    ----------
    end
        This process's end of a pair of stream sockets. It is the line's from here on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._connection = Connection(os.dup(end.fileno()))
        self._tags = itertools.count(HELLO + 1)
        self._sending = threading.Lock()
        self._turn = threading.Condition(threading.Lock())
        self._reading = False
        self._ended = False
        self._answers: dict[int, tuple[BaseException | None, Any]] = {}
        self._abandoned: set[int] = set()
        self._arrival = select.poll()
        self._arrival.register(end.fileno(), select.POLLIN)

    def send(self, verb: str, *arguments: Any, descriptor: int = -1) -> int:
        """Send a request, with a descriptor if there is one, and return its tag, which `collect` wants.

        Raises
        ------
        EOFError
            The line has ended.
        """
        tag = next(self._tags)
        message = pickle.dumps((tag, verb, arguments, descriptor >= 0))
        with self._sending:
            if self._ended:
                raise EOFError
            try:
                self._connection.send_bytes(message)
                if descriptor >= 0:
                    self._send_descriptor(descriptor)
            except OSError:
                raise EOFError from None
            except BaseException:  # interrupted half way through: what follows would not be understood
                self.hang_up()
                raise
        return tag

    def _send_descriptor(self, descriptor: int) -> None:
        try:
            sendfds(self._socket, [descriptor])
        except BrokenPipeError:
            raise
        except OSError:  # no such descriptor, or too many in flight: the byte alone tells the worker to expect none
            self._socket.send(b"\0")

    def collect(self, tag: int) -> Any:
        """Wait for the answer to a request and return its value, or raise the error that it is.

        Raises
        ------
        EOFError
            The line ended before the answer came.
        """
        try:
            while (answer := self._put_aside(tag)) is None:
                self._read_one()
        except BaseException:
            with self._turn:
                if self._answers.pop(tag, None) is None:
                    self._abandoned.add(tag)
            raise
        error, value = answer
        if error is not None:
            raise error
        return value

    def ask(self, verb: str, *arguments: Any, descriptor: int = -1) -> Any:
        """Send a request and wait for its answer: `send`, then `collect`."""
        return self.collect(self.send(verb, *arguments, descriptor=descriptor))

    def _put_aside(self, tag: int) -> tuple[BaseException | None, Any] | None:
        """Return an answer that has come; None: it has not, and it is the caller's turn to read."""
        with self._turn:
            while self._reading and tag not in self._answers:
                self._turn.wait()
            if tag in self._answers:
                return self._answers.pop(tag)
            if self._ended:
                raise EOFError
            self._reading = True
            return None

    def _read_one(self) -> None:
        received = None
        try:
            self._arrival.poll()  # the long wait is here, where an interrupt breaks nothing
            received = self._receive()
        finally:
            with self._turn:
                self._reading = False
                if received is not None:
                    tag, error, value = received
                    if tag in self._abandoned:
                        self._abandoned.remove(tag)
                    else:
                        self._answers[tag] = error, value
                self._turn.notify_all()

    def _receive(self) -> tuple[int, BaseException | None, Any] | None:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            self._ended = True
            return None
        except BaseException:  # interrupted half way through
            self.hang_up()
            raise
        received: tuple[int, BaseException | None, Any] = pickle.loads(message)
        return received

    def hello(self) -> None:
        """Take note of the worker's first message, after the line has ended: raise what it says, if that is an error.

        Raises
        ------
        EOFError
            There was none.
        """
        with self._turn:
            while self._reading:
                self._turn.wait()
            error, _ = self._answers.get(HELLO) or self._unread()
        if error is not None:
            raise error

    def _unread(self) -> tuple[BaseException | None, Any]:
        received = self._receive()  # the first of what nobody has read
        if received is None or received[0] != HELLO:
            raise EOFError
        return received[1:]

    def hang_up(self) -> None:
        """End the line for both sides: whoever waits on it is woken. Takes no lock; may be called again."""
        self._ended = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it had ended, or is closed

    def close(self) -> None:
        """Hang up and give the descriptors back, once nobody uses them."""
        self.hang_up()
        with self._sending, self._turn:
            while self._reading:
                self._turn.wait()
            self.close_descriptors()

    def close_descriptors(self) -> None:
        """Give the descriptors back and leave the line alone: for a forked child, whose parent goes on using it."""
        self._ended = True
        self._connection.close()
        self._socket.close()


def serve(
    connection: Connection, verbs: Mapping[str, Callable[..., Any]], slow: Mapping[str, Callable[..., Any]]
) -> None:
    """Answer requests one after the other until the line ends: the worker's end.

    A verb that fails answers with its exception. A descriptor that comes with a request is the verb's last argument; it
    is closed when the verb returns.

    Parameters
    ----------
    connection
        The line.
    verbs
        Answered in order, by this thread.
    slow
        Those that may wait for memory, and so for whoever asks for one of the others: answered in order by a thread of
        their own.
    """
    sending = threading.Lock()
    aside: SimpleQueue[tuple[int, Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()

    def answer(tag: int, verb: Callable[..., Any], arguments: tuple[Any, ...], with_descriptor: bool) -> None:
        said = _pickled(tag, *_answer(connection, verb, arguments, with_descriptor))
        with sending:
            connection.send_bytes(said)

    def answer_slowly() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (request := aside.get()) is not None:
                answer(*request, with_descriptor=False)

    helper = threading.Thread(target=answer_slowly, name="uvas-slow", daemon=True)
    helper.start()
    while True:
        try:
            tag, verb, arguments, with_descriptor = pickle.loads(connection.recv_bytes())
            if verb in slow:
                aside.put((tag, slow[verb], arguments))
            else:
                answer(tag, verbs[verb], arguments, with_descriptor)
        except (EOFError, OSError):
            aside.put(None)
            return


def _answer(
    connection: Connection, verb: Callable[..., Any], arguments: tuple[Any, ...], with_descriptor: bool
) -> tuple[BaseException | None, Any]:
    descriptor = -1
    try:
        if with_descriptor:
            descriptor = recv_handle(connection)
            arguments = (*arguments, descriptor)
        return None, verb(*arguments)
    except EOFError:
        raise
    except BaseException as error:
        # Its frames would keep alive what they refer to; the host has frames of its own.
        return error.with_traceback(None), None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _pickled(tag: int, error: BaseException | None, value: Any) -> bytes:
    try:
        return pickle.dumps((tag, error, value))
    except Exception as unpicklable:
        return pickle.dumps((tag, RuntimeError(f"{error or value!r} cannot be sent: {unpicklable}"), None))
