"""What this process may have, as the kernel's files and getrlimit say."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from uvas.doctor.check import Check
from uvas.report import format_size

_MAPPINGS = 65_530
"""vm.max_map_count as kernels have it by default (include/linux/mm.h, DEFAULT_MAX_MAP_COUNT)."""

_DESCRIPTORS = 1024
"""RLIMIT_NOFILE as most systems have it: spaces take one each, matched reservations one each, a worker six."""

_NEVER_OVERCOMMIT = 2
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")


def check_limits() -> list[Check]:
    """Read every limit that uvas can run into."""
    return [
        _check_addresses(),
        _check_data(),
        _check_descriptors(),
        _check_locked(),
        _check_overcommit(),
        _check_mappings(),
        _check_huge_pages(),
        _check_transparent("enabled", "transparent huge pages", "anonymous memory"),
        _check_transparent(
            "shmem_enabled", "shmem huge pages", "memfd memory, which matched reservations are made of,"
        ),
    ]


def _read(path: Path | str) -> str:
    """Return a file's text, empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _number(path: str, key: str = "") -> int | None:
    """Return the number after `key` in a file of the kernel's."""
    found = re.search(rf"{key}\s*(\d+)", _read(path))
    return int(found[1]) if found else None


def _check_bytes(limit: str, used: int, unlimited: str, limited: str, remedy: str) -> Check:
    """Check a limit in bytes of which something is in use already."""
    soft, hard = resource.getrlimit(getattr(resource, limit))
    if soft == resource.RLIM_INFINITY:
        return Check(limit, "unlimited", "good", unlimited, "")
    shown = f"{format_size(soft)}, {format_size(used)} in use here"
    return Check(limit, shown, "limited", limited, _raise_to(hard, remedy))


def _check_addresses() -> Check:
    return _check_bytes(
        "RLIMIT_AS",
        (_number("/proc/self/statm") or 0) * resource.getpagesize(),
        "reservations of any size",
        "reserved addresses count in full, though no memory is behind them",
        "ulimit -v unlimited",
    )


def _check_data() -> Check:
    return _check_bytes(
        "RLIMIT_DATA",
        (_number("/proc/self/status", "VmData:") or 0) << 10,
        "committed anonymous memory is not counted",
        "committed anonymous memory counts, touched or not; memfd memory does not",
        "ulimit -d unlimited",
    )


def _check_descriptors() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    means = "a space takes one, a reservation with shared memory one, a worker process a handful"
    if soft >= _DESCRIPTORS or soft == resource.RLIM_INFINITY:
        return Check("RLIMIT_NOFILE", _amount(soft), "good", means, "")
    return Check("RLIMIT_NOFILE", _amount(soft), "limited", means, _raise_to(hard, f"ulimit -n {_DESCRIPTORS} or more"))


def _check_locked() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    means = "uvas locks no memory; only what a device registers for itself may count"
    return Check("RLIMIT_MEMLOCK", value, "good", means, "")


def _raise_to(hard: int, command: str) -> str:
    if hard == resource.RLIM_INFINITY:
        return command
    return f"{command}; the hard limit of {hard} has to be raised first, by root"


def _amount(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit}"


def _check_overcommit() -> Check:
    mode = _number("/proc/sys/vm/overcommit_memory")
    if mode != _NEVER_OVERCOMMIT:
        names = {None: "not to be read", 0: "0, by a rule of thumb", 1: "1, always"}
        means = "reserved addresses need no memory; what is committed is provided when touched"
        return Check("overcommit", names[mode], "good", means, "")
    limit = (_number("/proc/meminfo", "CommitLimit:") or 0) << 10
    used = (_number("/proc/meminfo", "Committed_AS:") or 0) << 10
    return Check(
        "overcommit",
        f"2, never: CommitLimit {format_size(limit)}, {format_size(used)} of it promised",
        "limited",
        "what is committed counts in full when it is committed, touched or not; what is reserved does not",
        "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
    )


def _check_mappings() -> Check:
    most = _number("/proc/sys/vm/max_map_count")
    now = _read("/proc/self/maps").count("\n") + 1
    means = "each reservation that stands alone and each committed part with a protection of its own is one mapping"
    if most is None:
        return Check("vm.max_map_count", "not to be read", "limited", means, "mount /proc")
    value = f"{most}, {now} in use here"
    if most < _MAPPINGS or now > most // 2:
        return Check("vm.max_map_count", value, "limited", means, "sysctl vm.max_map_count=262144")
    return Check("vm.max_map_count", value, "good", means, "")


def _check_huge_pages() -> Check:
    pools: dict[int, tuple[int, int]] = {}
    for pool in _HUGE_PAGES.glob("hugepages-*kB"):
        size = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        pools[size] = (_number(str(pool / "nr_hugepages")) or 0, _number(str(pool / "free_hugepages")) or 0)
    means = "a descriptor of such pages can be mapped into a reservation (map_fd)"
    if not pools:
        return Check(
            "huge page pools", "none", "missing", f"without them no {means[2:]}", "a kernel with CONFIG_HUGETLBFS"
        )
    value = "; ".join(f"{format_size(size)}: {count}, {free} free" for size, (count, free) in sorted(pools.items()))
    if not any(free for _, free in pools.values()):
        return Check("huge page pools", value, "limited", f"{means}, if there were any", "sysctl vm.nr_hugepages=N")
    return Check("huge page pools", value, "good", means, "")


def _check_transparent(setting: str, name: str, what: str) -> Check:
    text = _read(_TRANSPARENT / setting)
    chosen = re.search(r"\[(\w+)\]", text)
    if not chosen:
        remedy = "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        return Check(name, "none", "missing", f"{what} is in small pages", remedy)
    if chosen[1] in ("never", "deny"):
        better = "advise" if setting.startswith("shmem") else "madvise"
        remedy = f"echo {better} > {_TRANSPARENT / setting}, then madvise(MADV_HUGEPAGE)"
        return Check(name, chosen[1], "limited", f"{what} is in small pages", remedy)
    asked = " where madvise(MADV_HUGEPAGE) asks for them" if chosen[1] in ("madvise", "advise") else ""
    return Check(name, chosen[1], "good", f"{what} may be in large pages{asked}", "")
