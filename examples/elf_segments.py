"""Map the segments of an ELF file at their addresses, the way a loader should: without replacing anything.

    python examples/elf_segments.py [FILE]

One reservation of the whole span, which nobody can be inside of; then the pieces, inside the reservation only. A file
with fixed addresses (ET_EXEC) is mapped exactly there or politely not at all; a position-independent one (ET_DYN) where
uvas finds room. Nothing is executed: the segments are mapped, compared with the file, and released.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import uvas

PAGE = mmap.PAGESIZE
PT_LOAD = 1
ET_EXEC, ET_DYN = 2, 3


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD program header: file bytes, then zeros up to `size`."""

    address: int
    size: int
    offset: int
    file_size: int
    protection: str

    @property
    def first_page(self) -> int:
        """The address where its first page begins."""
        return self.address // PAGE * PAGE

    @property
    def end_of_file_pages(self) -> int:
        """The address where the last page with bytes of the file ends."""
        return up(self.address + self.file_size) if self.file_size else self.first_page

    @property
    def end(self) -> int:
        """The address where its last page ends."""
        return up(self.address + self.size)


def up(address: int) -> int:
    """Round up to a page."""
    return -(-address // PAGE) * PAGE


def segments_of(path: Path) -> tuple[int, list[Segment]]:
    """Read the type of a 64-bit little-endian ELF file and its PT_LOAD segments.

    Raises
    ------
    ValueError
        It is no such file.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        (kind,) = struct.unpack_from("<H", head, 16)
        (table,) = struct.unpack_from("<Q", head, 32)
        entry_size, count = struct.unpack_from("<HH", head, 54)
        file.seek(table)
        headers = file.read(entry_size * count)
    found = []
    for i in range(count):
        kind_of_part, flags, offset, address, _, file_size, size, _ = struct.unpack_from(
            "<IIQQQQQQ", headers, i * entry_size
        )
        if kind_of_part == PT_LOAD and size:
            protection = "".join(letter for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if flags & bit)
            found.append(Segment(address, size, offset, file_size, protection or "none"))
    if kind not in (ET_EXEC, ET_DYN) or not found:
        raise ValueError(f"{path} has nothing to load")
    return kind, found


def load(space: uvas.AddressSpace, path: Path) -> tuple[uvas.Reservation, int]:
    """Map a file's segments; return the reservation and what was added to the file's addresses.

    Raises
    ------
    AddressInUseError
        The file's addresses are fixed, and somebody is there.
    """
    kind, segments = segments_of(path)
    low, high = segments[0].first_page, max(segment.end for segment in segments)
    span = space.reserve(high - low, at=low if kind == ET_EXEC else None, name=path.name)
    bias = span.base - low
    try:
        with path.open("rb") as file:
            for segment in segments:
                put(span, file.fileno(), segment, low)
    except BaseException:
        span.release()
        raise
    return span, bias


def put(span: uvas.Reservation, fd: int, segment: Segment, low: int) -> None:
    """Map one segment: its pages of the file, private, and zeroed memory behind them."""
    start = segment.first_page - low
    of_file = segment.end_of_file_pages - segment.first_page
    writable = "w" in segment.protection
    if of_file:
        skew = segment.address - segment.first_page
        span.map_fd(fd, offset=start, size=of_file, fd_offset=segment.offset - skew, sharing="private",
                    protection="rw" if writable else segment.protection)  # fmt: skip
    if segment.end > segment.end_of_file_pages:
        span.commit(start + of_file, segment.end - segment.end_of_file_pages)
    if writable and of_file:  # the last page of the file goes on with other bytes, where the program expects zeros
        behind = segment.address + segment.file_size - low
        span.numpy("u1", segment.end_of_file_pages - low - behind, offset=behind)[:] = 0
    span.protect(start, segment.end - segment.first_page, segment.protection)


def main(argument: str | None = None) -> int:
    """Load a file, compare, release; the exit code."""
    path = Path(argument or os.path.realpath("/bin/sh"))
    try:
        _, segments = segments_of(path)
        with uvas.AddressSpace(name="loader") as space:
            span, bias = load(space, path)
            print(f"{path}: {span.range}, {'where it demands' if bias == 0 else f'its addresses + {bias:#x}'}")
            content = path.read_bytes()
            for segment in segments:
                start = segment.address + bias
                seen = (
                    span.numpy("u1", segment.file_size, offset=start - span.base) if "r" in segment.protection else None
                )
                same = seen is None or seen.tobytes() == content[segment.offset : segment.offset + segment.file_size]
                print(f"  {uvas.Range(start, segment.size)}  {segment.protection:4} {segment.file_size:#x} bytes of "
                      f"the file at {segment.offset:#x}: {'the same' if same else 'DIFFERENT'}")  # fmt: skip
                del seen
                if not same:
                    return 1
            span.release()
    except uvas.AddressInUseError as refusal:
        print(f"{path} is not loaded: {refusal}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
