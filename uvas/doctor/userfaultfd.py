"""Whether memory can move to a device when it is touched: what userfaultfd answers, in each way that there is to it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

from uvas.doctor.check import Check

_SYSCALLS = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282, "s390x": 355}
"""The number of userfaultfd(2), where ioctl numbers are also the generic ones (asm-generic/ioctl.h)."""

_USER_MODE_ONLY = 1
_API = 0xAA
_API_CALL = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_NEW_CALL = 0xAA00  # _IO(0xAA, 0x00), of /dev/userfaultfd

_NEEDED = {  # linux/userfaultfd.h: without these nothing can move
    "write protection": 1 << 0,
    "missing pages of shared memory": 1 << 5,
    "thread ids": 1 << 8,
    "minor faults of shared memory": 1 << 10,
    "write protection of shared memory": 1 << 12,
}
_WANTED = {"MOVE": (1 << 16, "6.8"), "POISON": (1 << 14, "6.6")}
"""What pages move and are marked lost by, and since which kernel."""

_SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
_MEANS = 'memory that moves to a device when it is touched, ProcessDevice(memory="private"), rests on it'
_ALLOW = (
    "root, CAP_SYS_PTRACE, sysctl vm.unprivileged_userfaultfd=1, or read and write access to /dev/userfaultfd "
    '(memory="shared" needs none of them)'
)


def check_userfaultfd() -> Check:
    """Open one in each of the ways that there are, and ask it what it can do."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        return Check("userfaultfd", "not tried on this architecture", "limited", _MEANS, "none known")
    privileged = _features_of(lambda: _open_by_call(number, 0))
    by_device = _features_of(_open_by_device)
    user_mode = _features_of(lambda: _open_by_call(number, _USER_MODE_ONLY))
    ways: dict[str, list[str]] = {}
    for way, answer in (("system call", privileged), ("/dev/userfaultfd", by_device), ("user mode", user_mode)):
        ways.setdefault(_told(answer), []).append(way)
    value = "; ".join(f"{', '.join(same)}: {told}" for told, same in ways.items())
    value += f"; vm.unprivileged_userfaultfd = {_setting()}"
    whole = privileged if isinstance(privileged, int) else by_device
    if isinstance(whole, int):
        return _judged(value, whole)
    if isinstance(user_mode, int) and not _lacks(user_mode):
        means = (
            f"{_MEANS}; here a system call that touches a page which is elsewhere fails (EFAULT) where code would "
            "wait: keep the memory at home for it, `with space.pin_host(memory):`"
        )
        return Check("userfaultfd", value, "limited", means, _ALLOW)
    return Check("userfaultfd", value, "missing", _MEANS, f"a kernel with CONFIG_USERFAULTFD, and {_ALLOW}")


def _judged(value: str, features: int) -> Check:
    """Judge a descriptor for which system calls wait, as code does."""
    lacks = _lacks(features)
    if lacks:
        means = f"{_MEANS}, and this kernel lacks {', '.join(lacks)}"
        return Check("userfaultfd", value, "missing", means, "Linux 5.19 or later, better 6.8 or later")
    without = {name: since for name, (bit, since) in _WANTED.items() if not features & bit}
    if "MOVE" in without:
        means = f"{_MEANS}; without UFFDIO_MOVE a write that a device driver has in flight into a moving page is lost"
        return Check("userfaultfd", value, "limited", means, f"Linux {without['MOVE']} or later")
    return Check("userfaultfd", value, "good", _MEANS, "")


def _lacks(features: int) -> list[str]:
    """Return what is not to be done without, and is not there."""
    return [name for name, bit in _NEEDED.items() if not features & bit]


def _open_by_call(number: int, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(number), ctypes.c_int(flags | os.O_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _open_by_device() -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _NEW_CALL, os.O_CLOEXEC)
    finally:
        os.close(device)


def _features_of(open_one: Callable[[], int]) -> int | OSError:
    """Return the features that UFFDIO_API names, or what was answered instead."""
    try:
        fd = open_one()
    except OSError as refusal:
        return refusal
    try:
        answer = fcntl.ioctl(fd, _API_CALL, struct.pack("QQQ", _API, 0, 0))
    except OSError as refusal:
        return refusal
    finally:
        os.close(fd)
    return int(struct.unpack("QQQ", answer)[1])


def _told(answer: int | OSError) -> str:
    if isinstance(answer, OSError):
        return (answer.strerror or str(answer)).lower()
    wanted = [f"{'with' if answer & bit else 'without'} {name}" for name, (bit, _) in _WANTED.items()]
    return f"yes, features {answer:#x}, {', '.join(wanted)}"


def _setting() -> str:
    try:
        return _SETTING.read_text().strip()
    except OSError:
        return "not there"
