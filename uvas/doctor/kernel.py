"""What this kernel does, found by trying."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uvas._core import ffi, lib
from uvas.doctor.check import Check, State
from uvas.errors import failure
from uvas.report import format_size

_FLAGS: dict[int, tuple[str, State, str, str]] = {
    lib.UVAS_FLAG_HONOURED: ("honoured (EEXIST)", "good", "the kernel itself refuses to map over anybody", ""),
    lib.UVAS_FLAG_ENOMEM: (
        "honoured (ENOMEM)",
        "limited",
        "a conflict answers as a lack of memory does; uvas tells the two apart by looking",
        "Linux 4.19 or later",
    ),
    lib.UVAS_FLAG_IGNORED: (
        "ignored",
        "limited",
        "an address is only a hint; uvas compares the answer and gives strays back: nobody is clobbered, but a demand "
        "for one address may fail although it is free",
        "Linux 4.19 or later, outside emulators and sandboxes",
    ),
    lib.UVAS_FLAG_PARTIAL: (
        "clobbers on partial overlap",
        "limited",
        "the flag destroys memory here (4.17, 4.18): uvas does not use it, passes the address as a hint and compares",
        "Linux 4.19 or later",
    ),
    lib.UVAS_FLAG_REFUSED: (
        "refused (EOPNOTSUPP)",
        "limited",
        "uvas does not use the flag, passes the address as a hint and compares",
        "Linux 4.19 or later; on Windows WSL2",
    ),
}
_SERVED_BITS = 47
"""What x86-64 and most others give to a process: below it there is less room to agree in."""


def check_kernel() -> list[Check]:
    """Try what uvas rests on."""
    found = ffi.new("struct uvas_platform *")
    code = lib.uvas_platform(found)
    if code < 0:
        return [Check("kernel", str(failure(code)), "missing", "uvas cannot start", "see the message")]
    value, state, means, remedy = _FLAGS[found.flag]
    return [
        Check(
            "kernel", f"{platform.system()} {platform.release()} {platform.machine()}", "good", "as it says itself", ""
        ),
        Check("MAP_FIXED_NOREPLACE", value, state, means, remedy),
        _feature(
            "PROCMAP_QUERY",
            found.has_procmap_query,
            "who is in the way is asked by one system call",
            "the text of /proc/self/maps is read instead: slower the more mappings there are",
            "Linux 6.11 or later",
        ),
        _feature(
            "guard pages",
            found.has_guard,
            "decommit works without a mapping to spare (MADV_GUARD_INSTALL)",
            "decommit fails where vm.max_map_count is reached",
            "Linux 6.13 or later, or raise vm.max_map_count",
        ),
        _feature(
            "tag",
            found.has_tag,
            "reservations are named in /proc/PID/maps, and audit tells them from strangers' mappings",
            "reservations are plain anonymous mappings: audit and `uvas maps --pid` see less",
            "a kernel that maps an empty memfd (Linux with 4 KiB pages; emulators of larger pages refuse)",
        ),
        _check_width(found),
        _check_page(found),
        check_userfaultfd(),
    ]


def _feature(name: str, there: int, means: str, else_means: str, remedy: str) -> Check:
    return Check(name, "yes", "good", means, "") if there else Check(name, "no", "limited", else_means, remedy)


def _check_width(found: Any) -> Check:
    bits, window = found.address_bits, found.window_bits
    value = f"{bits}" if bits == window else f"{bits}, of which {window} without being asked for more"
    room = format_size(1 << min(bits, window))
    if window < _SERVED_BITS:
        remedy = "raise RLIMIT_AS, or use a kernel and an architecture with 47 bits or more"
        return Check("address bits", value, "limited", f"parties have to agree within {room}", remedy)
    return Check("address bits", value, "good", f"reservations lie anywhere in {room}", "")


def _check_page(found: Any) -> Check:
    page, shared = found.page_size, found.shared_alignment
    if shared > page:
        return Check(
            "page size",
            f"{format_size(page)}, shared memory at multiples of {format_size(shared)}",
            "limited",
            "reservations whose memory is shared are aligned more coarsely than pages",
            "none: the architecture wants it so",
        )
    return Check("page size", format_size(page), "good", "reservations are multiples of it", "")


# ---- userfaultfd -----------------------------------------------------------------------------------------------------

_SYSCALLS = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282, "s390x": 355}
"""The number of userfaultfd(2), where ioctl numbers are also the generic ones (asm-generic/ioctl.h)."""

_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api)
_USERFAULTFD_IOC_NEW = 0xAA00  # _IO(0xAA, 0x00)
_UFFD_FEATURE_MOVE = 1 << 16
_UFFD_SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
_MEANS_UFFD = "uvas does not use it yet: its pager, which moves memory between host and device on touch, will"


def check_userfaultfd() -> Check:
    """Open one in each of the ways that there are, and ask it what it can do."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        return Check("userfaultfd", "not tried on this architecture", "limited", _MEANS_UFFD, "none known")
    privileged = _features_of(lambda: _open_by_call(number, 0))
    by_device = _features_of(_open_by_device)
    user_mode = _features_of(lambda: _open_by_call(number, _UFFD_USER_MODE_ONLY))
    ways: dict[str, list[str]] = {}
    for way, answer in (("system call", privileged), ("/dev/userfaultfd", by_device), ("user mode", user_mode)):
        ways.setdefault(_told(answer), []).append(way)
    value = "; ".join(f"{', '.join(same)}: {told}" for told, same in ways.items())
    value += f"; vm.unprivileged_userfaultfd = {_setting()}"
    whole = privileged if isinstance(privileged, int) else by_device
    if isinstance(whole, int):
        if whole & _UFFD_FEATURE_MOVE:
            return Check("userfaultfd", value, "good", _MEANS_UFFD, "")
        return Check("userfaultfd", value, "limited", f"{_MEANS_UFFD}; no UFFDIO_MOVE", "Linux 6.8 or later")
    allow = "sysctl vm.unprivileged_userfaultfd=1, or read and write access to /dev/userfaultfd"
    if isinstance(user_mode, int):
        means = f"{_MEANS_UFFD}; system calls that touch such memory would fail with EFAULT"
        return Check("userfaultfd", value, "limited", means, allow)
    return Check("userfaultfd", value, "missing", _MEANS_UFFD, f"a kernel with CONFIG_USERFAULTFD, and {allow}")


def _open_by_call(number: int, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(number), ctypes.c_int(flags | os.O_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _open_by_device() -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
    finally:
        os.close(device)


def _features_of(open_one: Callable[[], int]) -> int | OSError:
    """Return the features that UFFDIO_API names, or what was answered instead."""
    try:
        fd = open_one()
    except OSError as refusal:
        return refusal
    try:
        answer = fcntl.ioctl(fd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
    except OSError as refusal:
        return refusal
    finally:
        os.close(fd)
    return int(struct.unpack("QQQ", answer)[1])


def _told(answer: int | OSError) -> str:
    if isinstance(answer, OSError):
        return (answer.strerror or str(answer)).lower()
    return f"yes, features {answer:#x}, {'with' if answer & _UFFD_FEATURE_MOVE else 'without'} UFFDIO_MOVE"


def _setting() -> str:
    try:
        return _UFFD_SETTING.read_text().strip()
    except OSError:
        return "not there"
