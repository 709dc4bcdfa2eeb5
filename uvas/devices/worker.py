"""What runs in a worker process: it claims ranges of its own address space, and calls functions.

Two threads serve two lines. The control line is answered while a function runs: a worker at work can still be asked
whether an address is free. Functions run on the main thread, one after the other. Ranges are claimed by uvas itself:
the worker has an address space of its own, without devices, and asks it for the very address that the host wants.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from multiprocessing import process, spawn
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from uvas._core import ffi, lib
from uvas.devices.requests import HELLO, serve
from uvas.devices.transport import dumps
from uvas.errors import DeviceError, failure
from uvas.reservation import Reservation
from uvas.space import AddressSpace

__all__ = ["main"]

_SWITCH_S = 0.0005
"""How long a function in pure Python keeps the thread that answers claims waiting, at most: Python's 5 ms are long."""


def main(control: Connection, setup: dict[str, Any]) -> None:
    """Serve the host until it hangs up.

    Parameters
    ----------
    control
        The line for requests; the descriptor of the other one is in `setup`.
    setup
        What `launch` sent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lib.uvas_end_with(setup["host"])
    if os.getppid() != setup["host"]:  # it ended first, and the number may be another's by now
        os._exit(0)
    work = Connection(setup["work"])
    try:
        main_module = _MainModule(setup["preparation"])
        claims = Claims(setup["name"])
    except BaseException as error:
        control.send_bytes(pickle.dumps((HELLO, error.with_traceback(None), None)))
        raise
    sys.setswitchinterval(_SWITCH_S)
    _give_stderr_back(setup["stderr"])
    try:
        control.send_bytes(pickle.dumps((HELLO, None, os.getpid())))
    except BrokenPipeError:  # closed before it was ready: nobody waits for it
        claims.close()
        return
    threading.Thread(
        target=serve, args=(control, claims.verbs(), claims.slow_verbs()), name="uvas-control", daemon=True
    ).start()
    _call_functions(work, claims, main_module)
    claims.close()


def _give_stderr_back(real: int) -> None:
    """Write to the host's stderr from here on; what was said while it was kept (a warning, say) goes there first."""
    sys.stderr.flush()
    said = os.pread(2, os.fstat(2).st_size, 0)
    os.dup2(real, 2)
    os.close(real)
    if said:
        os.write(2, said)


# ---- ranges ----------------------------------------------------------------------------------------------------------


class Claims:
    """The ranges that this worker holds for the host.

    Parameters
    ----------
    name
        The device's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._space = AddressSpace(name=name)
        self._reservations: dict[int, Reservation] = {}
        self._user_only = False

    def verbs(self) -> dict[str, Any]:
        """Return what the control line can ask for."""
        verbs = (self.claim, self.unclaim, self.commit, self.decommit, self.protect, self.lend_faults)
        return {verb.__name__: verb for verb in verbs}

    def slow_verbs(self) -> dict[str, Any]:
        """Return those that touch memory, which may be elsewhere."""
        return {"read": self.read, "write": self.write}

    @property
    def bases(self) -> dict[int, Reservation]:
        """The bases of the ranges that both sides hold."""
        return self._reservations

    def claim(self, base: int, size: int) -> None:
        """Hold the range here, or raise AddressInUseError."""
        self._reservations[base] = self._space.reserve(size, at=base)

    def unclaim(self, base: int, _size: int) -> None:
        """Give it back, with what is committed in it. What is not held is passed over."""
        reservation = self._reservations.get(base)
        if reservation is not None:
            reservation.release()
            del self._reservations[base]

    def commit(self, base: int, size: int, offset: int, protection: str, descriptor: int) -> None:
        """Map the pages that the host sees there."""
        reservation = self._holding(base)
        at = base - reservation.base
        reservation.map_fd(descriptor, offset=at, size=size, fd_offset=offset, protection=protection, sharing="shared")

    def decommit(self, base: int, size: int) -> None:
        """Let go of the pages; the range stays held."""
        reservation = self._holding(base)
        reservation.decommit(base - reservation.base, size)

    def protect(self, base: int, size: int, protection: str) -> None:
        """Change what may be done there."""
        reservation = self._holding(base)
        reservation.protect(base - reservation.base, size, protection)

    def _holding(self, address: int) -> Reservation:
        found = self._space.find(address)
        if not isinstance(found, Reservation):
            raise ValueError(f"{self.name} holds nothing at {address:#x}")
        return found

    def lend_faults(self, line: int) -> int:
        """Send the host a descriptor for the faults of this process, and return what it can do."""
        descriptor, features = ffi.new("int32_t *"), ffi.new("uint32_t *")
        code = lib.uvas_lend_faults(descriptor, features)
        if code < 0:
            raise failure(code)
        try:
            with socket.socket(fileno=os.dup(line)) as sender:
                socket.send_fds(sender, [b"f"], [descriptor[0]])
        finally:
            os.close(descriptor[0])
        self._user_only = bool(features[0] & lib.UVAS_PRIVATE_USER_ONLY)
        return int(features[0])

    def read(self, address: int, size: int) -> bytes:
        """Return the bytes there, through the kernel: a bad address is an error and no crash."""
        array = self._by_code(address, size)
        if array is not None:
            return array.tobytes()
        buffer = ffi.new("char[]", size)
        self._copied("read", lib.uvas_peek(address, buffer, size), address, size)
        return bytes(ffi.buffer(buffer))

    def write(self, address: int, data: bytes) -> None:
        """Put bytes there, likewise."""
        array = self._by_code(address, len(data))
        if array is not None and array.flags.writeable:
            array[:] = np.frombuffer(data, np.uint8)
            return
        self._copied("write", lib.uvas_poke(address, ffi.from_buffer(data), len(data)), address, len(data))

    def _by_code(self, address: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the bytes as an array, where the kernel itself may not wait for memory that moves; code may."""
        found = self._space.find(address) if self._user_only and size else None
        if not isinstance(found, Reservation):
            return None
        try:
            return found.numpy(np.uint8, size, offset=address - found.base)
        except ValueError:  # not all of it is committed here: the kernel says so in its own words
            return None

    def _copied(self, call: str, code: int, address: int, size: int) -> None:
        if code < 0:
            name = errno.errorcode.get(-code, "unknown")
            raise DeviceError(
                call, code, name, self.name,
                message=f"{self.name} cannot {call} [{address:#x}, {address + size:#x}): not all of it is accessible "
                f"there ({name})",
            )  # fmt: skip

    def close(self) -> None:
        """Give everything back that nothing uses."""
        with contextlib.suppress(BufferError):
            self._space.close()


# ---- functions -------------------------------------------------------------------------------------------------------


class _MainModule:
    """The host's ``__main__``, imported when something from it is first needed, as spawn does it."""

    def __init__(self, preparation: dict[str, Any]) -> None:
        self._source = {key: value for key, value in preparation.items() if key.startswith("init_main_from_")}
        self._ready = False
        spawn.prepare({key: value for key, value in preparation.items() if key not in self._source})

    def prepare(self) -> None:
        if self._ready:
            return
        current: Any = process.current_process()
        current._inheriting = True  # a script that lacks its guard is told so, where it would start workers of its own
        try:
            spawn.prepare(self._source)
        finally:
            del current._inheriting
        self._ready = True

    def missing(self, name: str) -> AttributeError:
        where = "; ".join(self._source.values()) or "an interactive session, or python -c, which has no file"
        return AttributeError(
            f"{name!r} of the host's __main__ is not to be found in the worker, which imports __main__ anew "
            f'(from {where}): define it in a module, or in a script outside of `if __name__ == "__main__":`'
        )


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: bytes, main_module: _MainModule) -> None:
        super().__init__(io.BytesIO(message))
        self._main_module = main_module

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name != "__main__":
            return super().find_class(module_name, global_name)
        self._main_module.prepare()
        try:
            return super().find_class(module_name, global_name)
        except AttributeError:
            raise self._main_module.missing(global_name) from None


def _call_functions(work: Connection, claims: Claims, main_module: _MainModule) -> None:
    while True:
        try:
            # Nothing here refers to the arguments or to the result when the answer goes out: the host may release the
            # memory of an array as soon as it has it.
            work.send_bytes(_called(work.recv_bytes(), claims, main_module))
        except (EOFError, OSError):
            return


def _called(message: bytes, claims: Claims, main_module: _MainModule) -> bytes:
    """Run a function and return the answer."""
    name = "the function"
    try:
        function, arguments, named = _Unpickler(message, main_module).load()
        name = getattr(function, "__qualname__", None) or repr(function)
        result = function(*arguments, **named)
    except BaseException as error:
        return _failed(error, claims)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # what it printed appears when it ends, and not when the worker does
    try:
        return dumps(("value", result), claims.bases, claims.name)[0]
    except Exception as error:
        return _failed(TypeError(f"the result of {name} cannot be sent back: {error}"), claims)


def _failed(error: BaseException, claims: Claims) -> bytes:
    text = "".join(traceback.format_exception(error))
    summary = "".join(traceback.format_exception_only(error)).strip()
    _forget_frames(error)
    why = ""
    try:
        pickled = dumps(error, claims.bases, claims.name)[0]
    except Exception as unpicklable:
        pickled, why = None, str(unpicklable)
    return pickle.dumps(("error", pickled, summary, why, text))


def _forget_frames(error: BaseException) -> None:
    """Let go of what the frames of an exception, and of those behind it, refer to: arguments among others."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            one.__traceback__ = None
            pending += [one.__cause__, one.__context__]
