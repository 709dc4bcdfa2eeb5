"""Processes that may not have userfaultfd, as most users' may not: for tests, which run as root as often as not."""

from __future__ import annotations

import ctypes
import platform
import struct

_CALLS = {"x86_64": (323, 16), "aarch64": (282, 29), "riscv64": (282, 29)}
"""The numbers of userfaultfd(2) and ioctl(2)."""
_NEW_FROM_DEVICE = 0xAA00  # the ioctl of /dev/userfaultfd
_USER_MODE_ONLY = 1
_NO_NEW_PRIVILEGES, _SET_FILTER, _FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # linux/filter.h
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # with EPERM
_NUMBER, _FIRST, _SECOND = 0, 16, 24  # struct seccomp_data, little-endian


def deny_userfaultfd(*, user_mode: bool) -> None:
    """Refuse it to this process and to all that it starts; with `user_mode` only what would serve system calls too.

    There is no way back: for processes that a test starts.
    """
    opens, ioctl = _CALLS[platform.machine()]
    program = [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 3, 0, opens),
        (_EQUAL, 0, 4, ioctl),
        (_LOAD, 0, 0, _SECOND),
        (_EQUAL, 3, 2, _NEW_FROM_DEVICE),
        (_LOAD, 0, 0, _FIRST),
        (_ANY_BIT, 0 if user_mode else 1, 1, _USER_MODE_ONLY),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(_SET_FILTER, _FILTER, head, 0, 0) == 0, ctypes.get_errno()
