"""What can go wrong, as types: taken, no room, a limit, and no memory are four errors.

A caller's mistake is a plain `ValueError` or `TypeError`, and memory that somebody still uses is a plain `BufferError`,
as CPython's own `mmap` has it. Everything else is a `UvasError`. All survive pickling, with their attributes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar

from uvas._core import ffi, lib
from uvas.ranges import Range

__all__ = [
    "AddressInUseError",
    "AddressSpaceExhaustedError",
    "DeviceError",
    "DeviceLostError",
    "LimitReachedError",
    "NotSupportedError",
    "OutOfMemoryError",
    "ReleasedError",
    "UvasError",
    "failure",
]


class UvasError(Exception):
    """What all errors of uvas have in common."""

    _fields: ClassVar[tuple[str, ...]] = ()
    """The attributes: a class is made again from these and its message."""

    unrecoverable: bool = False
    """A device sets it where it could not undo what it had begun: the range is poisoned."""

    def __str__(self) -> str:
        return str(self.args[-1])  # without the number that OSError puts before it

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in self._fields}
        return _make_again, (type(self), str(self), fields), vars(self)


def _make_again(kind: Callable[..., UvasError], message: str, fields: dict[str, Any]) -> UvasError:
    return kind(**fields, message=message)


class AddressInUseError(UvasError, OSError):
    """Someone is there, and this is who. ``errno`` is EEXIST.

    A device's `claim` raises it to say that the range is taken there.

    Parameters
    ----------
    wanted
        The range that was asked for.
    owner
        Who is in the way: a reservation's or a device's name, or a line of ``/proc/self/maps``.
    obstacle
        The range in the way, where it is known: the next candidate starts after it.
    message
        A sentence; made from the others if left out.
    """

    _fields = ("wanted", "owner", "obstacle")

    def __init__(self, wanted: Range, owner: str, obstacle: Range | None = None, *, message: str | None = None) -> None:
        holder = f"held by {owner}" if obstacle is None else f"{obstacle} is held by {owner}"
        super().__init__(errno.EEXIST, message or f"{wanted} is in use: {holder}")
        self.wanted = wanted
        self.owner = owner
        self.obstacle = obstacle


class AddressSpaceExhaustedError(UvasError, MemoryError):
    """There is no room for it.

    Parameters
    ----------
    size
        Bytes that were asked for.
    window
        Where room was looked for; None where the parties reach no common address.
    tried
        The last candidates, oldest first: the base of each and why it was not taken.
    message
        A sentence; made from the others if left out.
    """

    _fields = ("size", "window", "tried")

    def __init__(
        self, size: int, window: Range | None, tried: tuple[tuple[int, str], ...] = (), *, message: str | None = None
    ) -> None:
        where = "any window" if window is None else f"{window}"
        super().__init__(message or f"no room for {size:#x} bytes in {where}: {len(tried)} candidates were tried")
        self.size = size
        self.window = window
        self.tried = tried


class LimitReachedError(UvasError, MemoryError):
    """A limit of this process is reached, and was measured to be.

    Parameters
    ----------
    limit
        Its name: RLIMIT_AS, max_map_count, overcommit, ...
    value
        Its value, in its own unit.
    remedy
        What would help.
    message
        A sentence; made from the others if left out.
    """

    _fields = ("limit", "value", "remedy")

    def __init__(self, limit: str, value: int, remedy: str, *, message: str | None = None) -> None:
        super().__init__(message or f"{limit} of {value} is reached: {remedy}")
        self.limit = limit
        self.value = value
        self.remedy = remedy


class OutOfMemoryError(UvasError, MemoryError):
    """There is room, but no memory behind it.

    Parameters
    ----------
    size
        Bytes that were asked for.
    device
        Who has none: "the host", a device's name or an arena's.
    limit, in_use, largest_hole
        Where an arena's limit is reached: the limit, the bytes of pages that it has in use, and the bytes of the
        largest hole between them. Elsewhere None.
    message
        A sentence; made from the others if left out.
    """

    _fields = ("size", "device", "limit", "in_use", "largest_hole")

    def __init__(
        self,
        size: int,
        device: str = "the host",
        limit: int | None = None,
        in_use: int | None = None,
        largest_hole: int | None = None,
        *,
        message: str | None = None,
    ) -> None:
        reached = "" if limit is None else f": its limit is {limit:#x}, {in_use or 0:#x} are in use"
        super().__init__(message or f"{device} has no memory for {size:#x} bytes{reached}")
        self.size = size
        self.device = device
        self.limit = limit
        self.in_use = in_use
        self.largest_hole = largest_hole


class DeviceError(UvasError, OSError):
    """A device or its driver said no. ``errno`` is EIO.

    Parameters
    ----------
    call
        What it was asked: a method of the device or a function of the driver.
    code
        What it answered.
    name
        The answer's name: a driver's name for the code, an errno's or a signal's.
    device
        The device's name.
    message
        A sentence; made from the others if left out.
    """

    _fields: ClassVar[tuple[str, ...]] = ("call", "code", "name", "device")

    def __init__(self, call: str, code: int, name: str, device: str = "", *, message: str | None = None) -> None:
        super().__init__(errno.EIO, message or f"{device or 'the device'} answered {code} ({name}) to {call}")
        self.call = call
        self.code = code
        self.name = name
        self.device = device


class DeviceLostError(DeviceError):
    """The device went away.

    Parameters
    ----------
    call, code, name, device, message
        As of `DeviceError`; of a process, the code is its exit code, and the name that of the signal that ended it.
    lost
        The ranges whose contents went with it. Empty: nothing is lost.
    """

    _fields = (*DeviceError._fields, "lost")

    def __init__(
        self,
        call: str,
        code: int,
        name: str,
        device: str = "",
        lost: tuple[Range, ...] = (),
        *,
        message: str | None = None,
    ) -> None:
        toll = f"lost: {', '.join(map(str, lost))}" if lost else "nothing is lost"
        gone = f"{device or 'the device'} went away ({name}, {code}) at {call}; {toll}"
        super().__init__(call, code, name, device, message=message or gone)
        self.lost = lost


class NotSupportedError(UvasError, OSError):
    """It is not to be had on this kernel or device. ``errno`` is ENOTSUP.

    Parameters
    ----------
    feature
        What was asked for.
    reason
        Why.
    remedy
        What would help.
    message
        A sentence; made from the others if left out.
    """

    _fields = ("feature", "reason", "remedy")

    def __init__(self, feature: str, reason: str, remedy: str = "", *, message: str | None = None) -> None:
        sentence = f"{feature}: {reason}"
        super().__init__(errno.ENOTSUP, message or (f"{sentence}; {remedy}" if remedy else sentence))
        self.feature = feature
        self.reason = reason
        self.remedy = remedy


class ReleasedError(UvasError, ValueError):
    """It was released or closed, or belongs to the process that this one was forked from."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


# ---- from C ----------------------------------------------------------------------------------------------------------


def failure(code: int) -> Exception:
    """Return, as an exception to raise, what the core said of the calling thread's last failure.

    Parameters
    ----------
    code
        What the call returned: a negative errno.

    Examples
    --------
    >>> raise failure(lib.uvas_release(0))
    Traceback (most recent call last):
    ...
    uvas.errors.ReleasedError: ...
    """
    record = lib.uvas_last_failure()
    build = _BUILDERS.get(record.kind)
    if build is None or record.code != code:
        # Not of this call: a finalizer ran in between, on this thread, and failed as well.
        return OSError(-code, os.strerror(-code))
    return build(record, _text(record.text))


def _text(characters: Any) -> str:
    """Return a C string. Paths in it may be in any encoding."""
    return str(ffi.string(characters).decode(errors="backslashreplace"))


def _obstacle(record: Any) -> Range | None:
    return Range(record.other_base, record.other_size) if record.other_size else None


def _in_use(record: Any, message: str) -> Exception:
    wanted = Range(record.base, record.size)
    return AddressInUseError(wanted, _text(record.owner), _obstacle(record), message=message)


def _exhausted(record: Any, message: str) -> Exception:
    tried = tuple((one.base, _text(one.reason)) for one in record.tried[0 : record.tried_kept])
    return AddressSpaceExhaustedError(record.size, _obstacle(record), tried, message=message)


def _limit(record: Any, message: str) -> Exception:
    return LimitReachedError(_text(record.what), record.value, _text(record.remedy), message=message)


def _memory(record: Any, message: str) -> Exception:
    return OutOfMemoryError(record.size, _text(record.what), record.value or None, message=message)


def _device(record: Any, message: str) -> Exception:
    unrecoverable = record.code <= -lib.UVAS_UNRECOVERABLE
    code = record.code + (lib.UVAS_UNRECOVERABLE if unrecoverable else 0)
    name = errno.errorcode.get(-code, "unknown")
    error = DeviceError(_text(record.what), code, name, _text(record.owner), message=message)
    error.unrecoverable = unrecoverable
    return error


def _unsupported(record: Any, message: str) -> Exception:
    return NotSupportedError(_text(record.what), message, _text(record.remedy))


def _system(record: Any, message: str) -> Exception:
    return OSError(-record.code, message)


_BUILDERS: dict[int, Callable[[Any, str], Exception]] = {
    lib.UVAS_FAILURE_IN_USE: _in_use,
    lib.UVAS_FAILURE_EXHAUSTED: _exhausted,
    lib.UVAS_FAILURE_LIMIT: _limit,
    lib.UVAS_FAILURE_MEMORY: _memory,
    lib.UVAS_FAILURE_DEVICE: _device,
    lib.UVAS_FAILURE_UNSUPPORTED: _unsupported,
    lib.UVAS_FAILURE_RELEASED: lambda _, message: ReleasedError(message),
    lib.UVAS_FAILURE_INVALID: lambda _, message: ValueError(message),
    lib.UVAS_FAILURE_BUSY: lambda _, message: BufferError(message),
    lib.UVAS_FAILURE_SYSTEM: _system,
}
