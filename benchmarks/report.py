"""The README's table and picture of speed, made from the evidence under ``benchmarks/results/``.

python benchmarks/report.py      rewrites what stands between the table's markers, and results/speed.svg
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import report_alloc
import report_move
from harness import RESULTS, Row, load
from matplotlib import pyplot

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- table: speed -->\n", "<!-- end -->"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a row of ours against a row of a peer's."""

    about: str
    ours: float
    peer: str
    theirs: float

    def text(self) -> str:
        """Return it in Markdown."""
        ratio = self.ours / self.theirs
        shown = f"{ratio:.2f}" if ratio >= 0.01 else f"1 / {1 / ratio:,.0f}"
        return f"| {self.about} | {_time(self.ours)} | {self.peer} | {_time(self.theirs)} | {shown} |"


def _time(ns: float) -> str:
    for unit, size in (("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def rows(name: str) -> Callable[..., float]:
    """Return what looks up a median of one file: ``(id, what, parameter)``."""
    known = {(row.id, row.what, row.parameter): row.ns for row in load(name)["rows"]}
    return lambda id, what, parameter=1: known[id, what, parameter]


def lines() -> list[Line]:
    """Return the table."""
    reserve, find, devices = rows("reserve"), rows("find"), rows("devices")
    table = [
        Line("reserve + release from C, untagged", reserve("R1", "uvas untagged, next"), "`mmap` + `munmap`",
             reserve("R1", "raw anonymous")),
        Line("reserve + release from C, tagged", reserve("R1", "uvas tagged, next"), "the same calls on a memfd",
             reserve("R1", "raw tagged")),
        Line("reserve + release from Python, untagged", reserve("R2", "uvas untagged"), "`mmap.mmap(-1, 4096)` + close",
             reserve("R2", "mmap.mmap(-1, 4096) + close")),
        Line("commit + decommit of 64 KiB from C", reserve("R6", "uvas"), "the same two calls", reserve("R6", "raw")),
    ]  # fmt: skip
    for vmas in (10, 60_000):
        chosen = reserve("R3", "uvas reserve + release", vmas) - reserve("R3", "raw mmap + munmap", vmas)
        table.append(
            Line(f"choosing a hole, {vmas:,} mappings in the way", chosen, "reading `/proc/self/maps` in C",
                 reserve("R3", "the text of /proc/self/maps", vmas))
        )  # fmt: skip
    table += [
        Line("whose address? 100 ranges, C", find("R4", "uvas_find", 100), "`umfPoolByPtr`",
             find("R4", "umfPoolByPtr", 100)),
        Line("whose address? 10,000 ranges, C", find("R4", "uvas_find", 10_000), "`umfPoolByPtr`",
             find("R4", "umfPoolByPtr", 10_000)),
        Line("whose address? 1,000,000 ranges, C", find("R4", "uvas_find", 1_000_000), "binary search, frozen array",
             find("R4", "binary search", 1_000_000)),
        Line("the same while another thread changes the book", find("R4", "uvas_find beside a writer", 10_000),
             "while it only computes", find("R4", "uvas_find beside a busy thread", 10_000)),
        Line("whose address? 10,000 ranges, Python", find("R5", "space.find", 10_000), "`bisect` over lists",
             find("R5", "bisect over lists", 10_000)),
        Line("reserve + release on one worker too", devices("R8", "reserve + release, matched", 1),
             "two bare round trips", devices("R8", "two round trips by multiprocessing.Pipe", 1)),
        Line("reserve + release on four workers", devices("R8", "reserve + release, matched", 4),
             "two bare round trips with each", devices("R8", "two round trips by multiprocessing.Pipe", 4)),
    ]  # fmt: skip
    opencl = rows("opencl")
    for length, size in ((1_000, "4 KB"), (1 << 20, "4 MiB"), (1 << 24, "64 MiB")):
        ours = opencl("OpenCL", "uvas, by address", length)
        table += [
            Line(f"OpenCL on a CPU: y += a x, {size} each", ours, peer, opencl("OpenCL", row, length))
            for peer, row in (("copies through `cl.Buffer`", "cl.Buffer, copied in and out"),
                              ("bare `cl.SVM`, unchecked", "cl.SVM, unchecked"))
        ]  # fmt: skip
    threads = rows("threads")
    for count in (2, 8):
        table += [
            Line(f"reserve + release from C, untagged, {count} threads", threads("R1 threads", "uvas untagged", count),
                 "`mmap` + `munmap`", threads("R1 threads", "raw anonymous", count)),
            Line(f"the same against UMF's OS provider, {count} threads", threads("R1 threads", "uvas untagged", count),
                 "alloc + free", threads("R1 threads", "UMF's OS provider", count)),
            Line(f"reserve + release from Python, {count} threads", threads("R2 threads", "uvas untagged", count),
                 "`mmap.mmap(-1, 4096)` + close", threads("R2 threads", "mmap.mmap(-1, 4096) + close", count)),
            Line(f"whose address? 10,000 ranges, C, {count} threads", threads("R4 threads", "uvas_find", count),
                 "`umfPoolByPtr`", threads("R4 threads", "umfPoolByPtr", count)),
            Line(f"whose address? 10,000 ranges, Python, {count} threads", threads("R5 threads", "space.find", count),
                 "`bisect` over lists", threads("R5 threads", "bisect over lists", count)),
        ]  # fmt: skip
    return table


def _series(found: list[Row], id: str, what: str) -> tuple[list[int], list[float]]:
    chosen = sorted((row.parameter, row.ns) for row in found if (row.id, row.what) == (id, what))
    return [parameter for parameter, _ in chosen], [ns for _, ns in chosen]


def draw() -> None:
    """Draw what grows with what: the search for a hole, and the lookup of an address."""
    mpl.rcParams["svg.hashsalt"] = "uvas"  # the same picture from the same numbers
    figure, (holes, lookups, together) = pyplot.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    reserve: list[Row] = load("reserve")["rows"]
    find: list[Row] = load("find")["rows"]
    vmas, ours = _series(reserve, "R3", "uvas reserve + release")
    _, raw = _series(reserve, "R3", "raw mmap + munmap")
    holes.plot(vmas, [a - b for a, b in zip(ours, raw, strict=True)], "o-", label="uvas")
    holes.plot(*_series(reserve, "R3", "the text of /proc/self/maps"), "s--", label="/proc/self/maps")
    holes.set(title="choosing a hole", xlabel="mappings in the way")
    for what, style in (
        ("uvas_find", "o-"),
        ("binary search", "s--"),
        ("umfPoolByPtr", "^--"),
        ("2 MiB granules", "v:"),
    ):
        lookups.plot(*_series(find, "R4", what), style, label=what)
    lookups.set(title="whose address is this?", xlabel="ranges")
    threads: list[Row] = load("threads")["rows"]
    for id, what, style, label in (
        ("R1 threads", "uvas untagged", "o-", "uvas, reserve + release"),
        ("R1 threads", "raw anonymous", "s--", "mmap + munmap"),
        ("R1 threads", "UMF's OS provider", "^--", "UMF, alloc + free"),
        ("R4 threads", "uvas_find", "o-", "uvas_find"),
        ("R4 threads", "binary search", "s--", "binary search"),
        ("R4 threads", "umfPoolByPtr", "^--", "umfPoolByPtr"),
    ):
        together.plot(*_series(threads, id, what), style, label=label)
    together.set(title="many threads: time over operations of all", xlabel="threads")
    for axes in (holes, lookups, together):
        axes.set(xscale="log", yscale="log", ylabel="ns")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    together.set_xticks([1, 2, 8], labels=["1", "2", "8"])
    together.minorticks_off()
    figure.savefig(RESULTS / "speed.svg", metadata={"Date": None})


def main() -> None:
    """Rewrite table and picture."""
    machine: dict[str, Any] = load("reserve")["machine"]
    head = ["| what | uvas | against | it takes | ratio |", "|---|---|---|---|---|"]
    table = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}:", "", *head]
    table += [line.text() for line in lines()]
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n".join(table) + "\n" + END + after)
    draw()
    report_alloc.main()
    report_move.main()


if __name__ == "__main__":
    main()
