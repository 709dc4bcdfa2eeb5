"""What this kernel does, found by trying."""

from __future__ import annotations

import platform
from typing import Any

from uvas._core import ffi, lib
from uvas.doctor.check import Check, State
from uvas.doctor.userfaultfd import check_userfaultfd
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
