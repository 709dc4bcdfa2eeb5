"""The host's side of one worker: its process, the lines to it, and the thread that watches both.

One thread for each worker reads results and waits for the end of the process (its pidfd), so that nobody waits for a
worker that is gone. It alone buries the worker: reaps it, fails what was under way, gives the descriptors back.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from uvas.devices.calls import Call, Calls
from uvas.devices.launch import how_it_ended, launch
from uvas.devices.requests import RequestLine
from uvas.errors import DeviceLostError, LimitReachedError, ReleasedError

__all__ = ["Link"]

_POLL_MS = 50
"""How often to look whether the worker lives, where the kernel has no pidfd (before Linux 5.3, gVisor)."""

_EXIT_S = 5.0
"""How long a worker that was told to end may take before it is killed."""

_AT_EXIT_S = 1.0
"""How long the function at work may go on when the interpreter exits."""


def _no_descriptors() -> LimitReachedError:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LimitReachedError("RLIMIT_NOFILE", soft, "close descriptors or raise the limit (ulimit -n)")


@contextlib.contextmanager
def _naming_the_limit() -> Iterator[None]:
    """Name the limit where this process may have no more descriptors."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise _no_descriptors() from None
        raise


class Link:
    """A worker, from its start to its burial. Whoever makes one holds interrupts back until it knows whom to tell.

    Parameters
    ----------
    name
        The device's; None: one is made up.

    Raises
    ------
    LimitReachedError
        This process may have no more descriptors.
    OSError, RuntimeError
        The worker cannot be started; see `launch`.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name or f"process-{next(_numbers)}"
        self.host = os.getpid()
        self._closing = False
        self._started = False
        self._hello: BaseException | None = None
        self._complaints = ""
        self._ended = threading.Event()
        with _naming_the_limit(), contextlib.ExitStack() as on_failure:
            self._launched = launch(self.name)
            self._process = self._launched.process
            self.pid = self._process.pid
            on_failure.callback(self._process.wait)
            on_failure.callback(self._process.kill)
            on_failure.callback(os.close, self._launched.stderr)
            self.requests = RequestLine(self._launched.control)
            on_failure.callback(self.requests.close)
            self.calls = Calls(self._launched.work, self.name)
            on_failure.callback(self.calls.close)
            self._pidfd = _pidfd(self.pid)
            self._watcher = threading.Thread(target=self._watch, name=f"uvas-watch-{self.name}", daemon=True)
            self._watcher.start()
            _living.add(self)
            on_failure.pop_all()

    # ---- in use ------------------------------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether the worker is there, as far as is known."""
        return not self._closing and not self._ended.is_set() and os.getpid() == self.host

    def check(self, call: str) -> None:
        """Raise if the worker cannot be used.

        Raises
        ------
        ReleasedError
            It was closed, or is that of the process that this one was forked from.
        DeviceLostError
            It is gone.
        """
        if not self.usable:
            raise self.gone(call)

    def send(self, verb: str, *arguments: Any, descriptor: int = -1) -> int:
        """Send a request; see `RequestLine.send`."""
        self.check(verb)
        try:
            return self.requests.send(verb, *arguments, descriptor=descriptor)
        except EOFError:
            raise self._lost(verb) from None

    def collect(self, verb: str, tag: int) -> Any:
        """Wait for the answer to a request."""
        try:
            return self.requests.collect(tag)
        except EOFError:
            raise self._lost(verb) from None

    @property
    def pidfd(self) -> int | None:
        """A descriptor of the process; None where the kernel has none."""
        return self._pidfd

    def borrow(self, verb: str) -> int:
        """Ask for a descriptor, which comes by a line of its own, and is the caller's.

        Raises
        ------
        LimitReachedError
            This process may have no more.
        """
        with _naming_the_limit():
            ours, theirs = socket.socketpair()
        with ours, theirs:
            self.collect(verb, self.send(verb, descriptor=theirs.fileno()))
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        if not descriptors:  # it came, and the kernel had no number to give it
            raise _no_descriptors()
        return descriptors[0]

    def submit(self, call: Call) -> None:
        """Let a function run in the worker."""
        self.check("submit")
        self.calls.submit(call)

    def _lost(self, verb: str) -> Exception:
        # The worker ended; or this side hung up in the middle of a message, at a second interrupt: it must not go on.
        self.calls.hang_up()
        self._ended.wait()  # not long: the watcher has been woken, and kills what does not end
        return self.gone(verb)

    def gone(self, call: str) -> Exception:
        """Return the error of a worker that is no more."""
        if os.getpid() != self.host:
            return ReleasedError(f"{self.name} belongs to process {self.host}, which this one was forked from")
        if self._closing:
            return ReleasedError(f"{self.name} is closed")
        code = self._process.returncode or 0
        ending = how_it_ended(code)
        ended = f"{self.name} is gone: its worker process {self.pid} has ended ({ending})"
        if not self._started:
            ended += " before it was ready"
            ended += f": {self._hello!r}" if self._hello is not None else ""
            ended += f"\n{self._complaints}" if self._complaints else ""
        else:
            ended += "; the host's memory is as it was"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else ending
        return DeviceLostError(call, code, name, self.name, message=ended)

    # ---- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._serve()
        finally:
            self._bury()

    def _serve(self) -> None:
        """Take results until there can be no more."""
        arrivals = select.poll()
        arrivals.register(self.calls.fileno(), select.POLLIN)
        if self._pidfd is not None:
            arrivals.register(self._pidfd, select.POLLIN)
        patience = _POLL_MS if self._pidfd is None else None
        while True:
            ready = {descriptor for descriptor, _ in arrivals.poll(patience)}
            if self.calls.fileno() in ready:  # first: what was sent before the end counts
                try:
                    self.calls.receive()
                except (EOFError, OSError):
                    return
            elif ready or self._process.poll() is not None:
                return

    def _bury(self) -> None:
        self._reap(_EXIT_S if self._closing and self.calls.idle else 0.0)
        self.requests.hang_up()
        self.calls.hang_up()
        try:
            self.requests.hello()
            self._started = True
        except EOFError:
            self._complaints = self._launched.complaints()
        except Exception as error:
            self._hello = error
            self._complaints = self._launched.complaints()
        self._ended.set()
        self.calls.fail(lambda: self.gone("submit"))
        self.requests.close()
        self.calls.close()
        self._close_others()
        _living.discard(self)

    def _reap(self, patience: float) -> None:
        if self._pidfd is not None and patience > 0:
            end = select.poll()
            end.register(self._pidfd, select.POLLIN)
            end.poll(patience * 1000)
            patience = 0.0
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_others(self) -> None:
        os.close(self._launched.stderr)
        if self._pidfd is not None:
            os.close(self._pidfd)

    # ---- ending ------------------------------------------------------------------------------------------------------

    def close(self, patience: float) -> None:
        """End the worker; the function at work may go on for `patience` seconds. Idempotent, also beside itself."""
        if os.getpid() != self.host:
            return
        self._closing = True
        current = self.calls.refuse(lambda: self.gone("submit"))
        if threading.current_thread() is self._watcher:  # a callback of a future closes: it cannot wait for itself
            self.abandon()
            return
        if current is not None:
            _wait(current, patience)
        self.abandon()
        self._watcher.join()

    def abandon(self) -> None:
        """Let the worker end, and the watcher bury it, without waiting. Takes no lock: for finalizers."""
        if os.getpid() == self.host:
            self._closing = True
            self.requests.hang_up()
            self.calls.hang_up()

    def forget(self) -> None:
        """In a forked child: give back the copies of the descriptors and leave the worker to the parent."""
        self.requests.close_descriptors()
        self.calls.close_descriptors()
        self._close_others()
        self._process.returncode = 0  # it is no child of this process: there is nothing to wait for, or to warn of


def _wait(future: Any, patience: float) -> None:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(patience)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # a kernel without it
        return None


# ---- this process's workers ------------------------------------------------------------------------------------------

_numbers = itertools.count(1)
_living: set[Link] = set()


def _close_all() -> None:
    for link in list(_living):
        link.close(_AT_EXIT_S)


def _forget_all() -> None:
    for link in list(_living):
        link.forget()
    _living.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
