"""The kernel's book of what a process has mapped, ``/proc/PID/maps``, as values."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from uvas.errors import NotSupportedError
from uvas.ranges import Range

_OURS = "/memfd:uvas:"
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of ``/proc/PID/maps``."""

    range: Range
    permissions: str
    """As the kernel writes them: ``rw-p``, ``---p``, ..."""
    offset: int
    inode: int
    name: str
    """A path, ``[heap]`` and its like, or empty."""

    @property
    def label(self) -> str | None:
        """What uvas called the memfd that is mapped here; None: it is not uvas's."""
        if not self.name.startswith(_OURS):
            return None
        return self.name.removeprefix(_OURS).removesuffix(_DELETED)

    @property
    def shared(self) -> bool:
        """Whether it is mapped shared."""
        return self.permissions.endswith("s")

    def __str__(self) -> str:
        return f"{self.permissions} {self.name or 'anonymous memory'}"


def read_mappings(pid: int | None = None) -> list[Mapping]:
    """Return what a process has mapped, by address.

    Parameters
    ----------
    pid
        Of the process; None: this one.

    Raises
    ------
    ProcessLookupError
        There is no such process.
    PermissionError
        Its maps may not be read.
    NotSupportedError
        ``/proc`` is not mounted.
    """
    lines = _text(pid).split("\n")  # names may hold other ends of lines
    return list(_disjoint(_parse(line) for line in lines if line))


def processes() -> Iterator[int]:
    """List the processes that can be seen.

    Raises
    ------
    NotSupportedError
        ``/proc`` is not mounted.
    """
    try:
        entries = list(Path("/proc").iterdir())
    except FileNotFoundError:
        entries = []
    if not any(entry.name == "self" for entry in entries):
        raise _no_proc()
    return (int(entry.name) for entry in entries if entry.name.isdecimal())


def names_uvas(pid: int) -> bool:
    """Tell whether the maps of a process name uvas. Raises as `read_mappings` does."""
    return _OURS in _text(pid)


def command_of(pid: int) -> str:
    """Return the command line of a process, its short name where it has none, empty where that is not to be read."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
        return (line or Path(f"/proc/{pid}/comm").read_bytes().strip()).decode(errors="backslashreplace")
    except OSError:
        return ""


def _text(pid: int | None) -> str:
    try:
        return Path(f"/proc/{'self' if pid is None else pid}/maps").read_text(errors="backslashreplace")
    except (FileNotFoundError, ProcessLookupError):
        if not Path("/proc/self/maps").exists():
            raise _no_proc() from None
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from None
    except PermissionError:
        remedy = "ask as the user whom it belongs to, or with CAP_SYS_PTRACE"
        raise PermissionError(errno.EACCES, f"the maps of process {pid} may not be read: {remedy}") from None


def _no_proc() -> NotSupportedError:
    return NotSupportedError(
        "/proc/PID/maps", "/proc is not mounted, and nothing else tells what is mapped", "mount /proc"
    )


def _disjoint(book: Iterable[Mapping]) -> Iterator[Mapping]:
    """Cut off what was told before.

    The kernel looks up the next mapping by the end of the last one: where the two have become one meanwhile, it tells
    the whole of it, from its old start (seen on Linux 6.18; proc_pid_maps(5) promises that no two lines overlap).
    """
    told = 0
    for mapping in book:
        known = told - mapping.range.base
        if known <= 0:
            yield mapping
        elif mapping.range.end > told:
            rest = Range(told, mapping.range.end - told)
            yield replace(mapping, range=rest, offset=mapping.offset + known if mapping.inode else 0)
        told = max(told, mapping.range.end)


def _parse(line: str) -> Mapping:
    """Take ``start-end permissions offset device inode  name`` apart (proc_pid_maps(5))."""
    fields = line.split(maxsplit=5)
    start, end = (int(part, 16) for part in fields[0].split("-"))
    name = fields[5] if len(fields) > 5 else ""
    return Mapping(Range(start, end - start), fields[1], int(fields[2], 16), int(fields[4]), name)
