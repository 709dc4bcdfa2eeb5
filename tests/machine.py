"""The machine under the tests: what is mapped, other people's mappings, other kernels, and failure on demand."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uvas._core import ffi, lib

PAGE = mmap.PAGESIZE
MIB = 1 << 20

NOREPLACE = 0x100000
_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

KERNELS = {
    "noreplace": lib.UVAS_KERNEL_NOREPLACE,
    "enomem": lib.UVAS_KERNEL_ENOMEM,
    "hint": lib.UVAS_KERNEL_HINT,
    "hint_fussy": lib.UVAS_KERNEL_HINT_FUSSY,
    "partial_overlap_bug": lib.UVAS_KERNEL_PARTIAL,
    "eopnotsupp": lib.UVAS_KERNEL_REFUSED,
    "aligns": lib.UVAS_KERNEL_ALIGNS,
}
"""The seven kernels that vm_imitate.c can imitate (SCENARIOS A)."""


@contextlib.contextmanager
def kernel(name: str, lacks: int = 0) -> Iterator[None]:
    """Behave as that kernel does; no space may be open."""
    assert lib.uvas_test_kernel(KERNELS[name], lacks) == 0, ffi.string(lib.uvas_last_failure().text)
    try:
        yield
    finally:
        assert lib.uvas_test_kernel(lib.UVAS_KERNEL_NATIVE, 0) == 0, ffi.string(lib.uvas_last_failure().text)


@contextlib.contextmanager
def failing(k: int, *, lasting: bool, error: int) -> Iterator[None]:
    """Let the k-th system call of uvas from here on fail, once or with all that follow it."""
    lib.uvas_test_fail(k, error, lasting)
    try:
        yield
    finally:
        lib.uvas_test_fail(0, 0, False)


def calls_made() -> int:
    """Fallible system calls since the last change of the knob."""
    return int(lib.uvas_test_calls())


def in_child(work: Callable[[], None]) -> None:
    """Do something in a forked child, which must come to its good end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@dataclass(frozen=True, slots=True, order=True)
class Mapping:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    inode: int
    name: str


def mappings(low: int = 0, high: int = 1 << 64, process: int | str = "self") -> list[Mapping]:
    """All that is mapped in [low, high). What merged during the look may be told twice by the kernel, not by this."""
    if high < 1 << 64:
        with contextlib.suppress(OSError), open(f"/proc/{process}/maps", "rb", buffering=0) as maps:
            return list(_asked(maps.fileno(), low, high))
    found, told = [], 0
    for line in Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        offset, inode = int(fields[2], 16), int(fields[4])
        fresh = max(start, told)
        if fresh < min(end, high) and low < end:
            name = fields[5] if len(fields) > 5 else ""
            found.append(Mapping(fresh, end, fields[1], offset + (fresh - start if inode else 0), inode, name))
        told = max(told, end)
    return found


_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query, Linux 6.11
_QUERY_COMMAND = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_OR_NEXT = 0x10


def _asked(maps: int, low: int, high: int) -> Iterator[Mapping]:
    """The same, mapping by mapping: with all libraries loaded the text has two thousand lines, and takes 10 ms."""
    buffer, told = ctypes.create_string_buffer(4096), 0
    while low < high:
        ask = bytearray(_QUERY.pack(_QUERY.size, _OR_NEXT, low, *[0] * 8, len(buffer), 0, ctypes.addressof(buffer), 0))
        try:
            fcntl.ioctl(maps, _QUERY_COMMAND, ask)
        except FileNotFoundError:  # nothing from there on
            return
        start, end, flags, _, offset, inode, _, _, length = _QUERY.unpack(ask)[3:12]
        if start >= high:
            return
        permissions = "".join(letter if flags >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
        name = buffer.value.decode(errors="replace") if length else ""
        fresh = max(start, told)
        shared = "s" if flags & 8 else "p"
        yield Mapping(fresh, end, permissions + shared, offset + fresh - start if inode else 0, inode, name)
        low = told = end


def descriptors() -> set[str]:
    """What this process has open, by number and target."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(f"{entry.name} {os.readlink(entry)}")
    return {one for one in found if "/proc/" not in one}


def map_anywhere(size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE, flags: int = 0) -> int:
    """Map private memory where the kernel likes."""
    address = libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    assert address != _FAILED
    return int(address)


def map_at(
    address: int, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE, flags: int = 0, fd: int = -1
) -> bool:
    """Map at an address if nothing is there."""
    kind = mmap.MAP_PRIVATE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    got = libc.mmap(address, size, protection, kind | NOREPLACE | flags, fd, 0)
    if got == _FAILED:
        return False
    if got != address:
        libc.munmap(got, size)
        return False
    return True


def unmap(address: int, size: int) -> None:
    """Unmap."""
    assert libc.munmap(address, size) == 0


def read_word(address: int) -> int:
    """Read 8 bytes."""
    return ctypes.c_uint64.from_address(address).value


def write_word(address: int, value: int) -> None:
    """Write 8 bytes."""
    ctypes.c_uint64.from_address(address).value = value


class Stranger:
    """Somebody else's memory, with a sentinel in every page that must never change."""

    def __init__(self, base: int, size: int) -> None:
        assert map_at(base, size), f"something is at {base:#x} already"
        self.base, self.size = base, size
        for address in range(base, base + size, PAGE):
            write_word(address, self._sentinel(address))

    @staticmethod
    def _sentinel(address: int) -> int:
        return (address * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF

    def intact(self) -> bool:
        """Whether every sentinel is what it was."""
        return all(read_word(at) == self._sentinel(at) for at in range(self.base, self.base + self.size, PAGE))

    def leave(self) -> None:
        """Unmap, after a last look."""
        assert self.intact()
        unmap(self.base, self.size)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()


ARENA = 0x2B00_0000_0000
"""Where the tests have a few GiB for themselves: nothing maps there on its own; a multiple of 4 MiB."""
