"""Starting a worker process, and saying how it ended.

The worker is executed afresh, not forked: it has its own libraries, in a layout of its own, which is what makes its
refusals real. It is told what `multiprocessing`'s spawn tells a process (`sys.path`, arguments, working directory,
where `__main__` comes from). Until it has said that it is ready, what it writes to stderr is kept, to be shown if it
never does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
from dataclasses import dataclass
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.util import _args_from_interpreter_flags  # type: ignore[attr-defined] # as spawn does
from typing import Any

__all__ = ["Launched", "how_it_ended", "launch"]

_BOOT = """\
import sys
from multiprocessing.connection import Connection
control = Connection(int(sys.argv[1]))
setup = control.recv()
sys.path[:] = setup["preparation"]["sys_path"]
from uvas.devices.worker import main
main(control, setup)
"""
"""The worker's program. It asks for the path before it imports uvas, which may have been found on a changed one."""

_TAIL = 4000
"""Characters of the worker's stderr that an error shows, at most."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A worker that was started, and the host's ends of the lines to it.

    Parameters
    ----------
    process
        The worker.
    control, work
        Stream sockets.
    stderr
        A memfd: what the worker said before it was ready.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    work: socket.socket
    stderr: int

    def complaints(self) -> str:
        """Return the end of what the worker said before it was ready."""
        size = os.fstat(self.stderr).st_size
        return os.pread(self.stderr, _TAIL, max(0, size - _TAIL)).decode(errors="replace").strip()


def launch(name: str) -> Launched:
    """Start a worker and return at once: it gets ready meanwhile.

    Parameters
    ----------
    name
        The device's; shown by ``ps``.

    Raises
    ------
    OSError
        There is no process or no descriptor to be had.
    RuntimeError
        This process is itself a worker that is importing ``__main__``: that lacks its ``if __name__ == "__main__":``.
    """
    preparation = _preparation(name)
    with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as theirs:
        control, their_control = socket.socketpair()
        theirs.enter_context(their_control)
        on_failure.callback(control.close)
        work, their_work = socket.socketpair()
        theirs.enter_context(their_work)
        on_failure.callback(work.close)
        stderr = os.memfd_create("uvas:stderr")
        on_failure.callback(os.close, stderr)
        real_stderr = _duplicate_stderr()
        theirs.callback(os.close, real_stderr)
        _send(control, {"work": their_work.fileno(), "stderr": real_stderr, "host": os.getpid(), "name": name,
                        "preparation": preparation})  # fmt: skip
        process = subprocess.Popen(
            [spawn.get_executable(), *_args_from_interpreter_flags(), "-c", _BOOT, str(their_control.fileno()),
             "uvas-worker", name],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[their_control.fileno(), their_work.fileno(), real_stderr],
            process_group=0,  # out of the terminal's Ctrl-C, which is for the host
        )  # fmt: skip
        on_failure.pop_all()
        return Launched(process, control, work, stderr)


def _preparation(name: str) -> dict[str, Any]:
    """Return what spawn tells a new process, without leaving a trace here."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    data: dict[str, Any] = spawn.get_preparation_data(name)
    if chosen is None:  # asking for the data has chosen a start method, which is the user's to choose
        multiprocessing.set_start_method(None, force=True)
        del data["start_method"]
    if not os.path.exists(data.get("init_main_from_path", "/")):  # "<stdin>": no file holds it
        del data["init_main_from_path"]
    data["authkey"] = bytes(data["authkey"])  # as it is, it refuses to be pickled
    return data


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # this process has none
        return os.open(os.devnull, os.O_WRONLY)


def _send(end: socket.socket, message: object) -> None:
    """Send the first message. It waits in the socket for the worker to start; sockets hold more than it has."""
    connection = Connection(os.dup(end.fileno()))
    with connection:
        connection.send_bytes(pickle.dumps(message))


def how_it_ended(code: int) -> str:
    """Say how a process ended, by its exit code as `subprocess` has it.

    Examples
    --------
    >>> how_it_ended(-9), how_it_ended(3)
    ('killed by SIGKILL', 'exit code 3')
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
