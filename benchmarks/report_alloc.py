"""The README's table of allocating and its pictures, made from ``results/alloc.json`` and ``alloc_python.json``.

python benchmarks/report_alloc.py      rewrites what stands between the table's markers, and results/alloc*.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness import RESULTS, load
from matplotlib import pyplot
from matplotlib.axes import Axes

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- table: alloc -->\n", "<!-- end -->"
OURS = "uvas"
TIMES = {"ns": "the usual", "p99_9_ns": "99.9 % of single ones take no longer"}
MEMORY = {
    "peak_over_live": "peak resident / peak live",
    "trimmed_over_live": "resident / live, 90 % freed, trimmed",
}
ABOUT = {**MEMORY, "speedup": "throughput over that of one"}
MARKS = "osD^vPX<>*hd"

Medians = dict[tuple[str, str], dict[str, float]]  # (workload, measure) to allocator to median


def medians(content: dict[str, Any]) -> Medians:
    """Return the medians of everything that was measured."""
    found: Medians = {}
    for one in content["measures"]:
        found.setdefault((one["workload"], one["measure"]), {})[one["what"]] = one["median"]
    return found


def best_peer(content: dict[str, Any], measure: str, of: dict[str, float]) -> str | None:
    """Return who needs least, or speeds up most, limits and uvas apart."""
    peers = {what: value for what, value in of.items() if what != OURS and what not in content["bounds"]}
    best = max if measure == "speedup" else min
    return best(peers, key=lambda what: peers[what]) if peers else None


# ---- the table -------------------------------------------------------------------------------------------------------


def peers(content: dict[str, Any]) -> str:
    """Return a sentence: who was there to be the best, and who was not."""
    measured = {one["what"] for one in content["measures"]} - {OURS, *content["bounds"]}
    there = sorted(measured, key=str.casefold)
    absent = sorted({*content["missing"], *content.get("left_out", ())} - measured, key=str.casefold)
    said = f"From C the best of {len(there)} {'peer' if len(there) == 1 else 'peers'}: {'; '.join(there) or 'nobody'}"
    return f"{said}. Not measured here: {'; '.join(absent)}." if absent else f"{said}."


def lines(content: dict[str, Any]) -> list[str]:
    """Return lines of Markdown: for each workload uvas, the best peer of that workload, and the ratio."""
    found = medians(content)
    ratios = {(one["workload"], one["measure"], one["peer"]): one for one in content["ratios"]}
    table = []
    for (workload, measure), of in found.items():
        if measure not in ("ns", *ABOUT) or OURS not in of:
            continue
        peer = best_peer(content, measure, of)
        one = ratios.get((workload, measure, peer or ""))
        about = workload.split(" ", 1)[1] + (f": {ABOUT[measure]}" if measure in ABOUT else "")
        ours = _value(of[OURS], measure)
        if peer is None or one is None:
            table.append(f"| {about} | {ours} | - | - | - |")
        else:
            spread = f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
            table.append(f"| {about} | {ours} | {peer} | {_value(of[peer], measure)} | {spread} |")
    return table


def _value(value: float, measure: str) -> str:
    if measure in ABOUT:
        return f"{value:.2f}"
    for unit, size in (("ms", 1e6), ("us", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} ns"


def rewrite(contents: Sequence[dict[str, Any]]) -> None:
    """Put the table between its markers in the README, if they are there."""
    before, marker, rest = README.read_text().partition(BEGIN)
    if not marker:
        return
    machine = contents[0]["machine"]
    table = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}. {peers(contents[0])}", ""]
    table += ["| what | uvas | best peer | it takes | ratio (quartiles) |", "|---|---|---|---|---|"]
    for content in contents:
        table += lines(content)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n".join(table) + "\n" + END + after)


# ---- the pictures ----------------------------------------------------------------------------------------------------


def _dots(axes: Axes, content: dict[str, Any], rows: Sequence[tuple[str, str]], labels: Sequence[str]) -> None:
    """Draw a line for each row, and on it a mark for each allocator, with its quartiles."""
    names = sorted({one["what"] for one in content["measures"]}, key=lambda what: (what != OURS, what))
    known = {(one["workload"], one["measure"], one["what"]): one for one in content["measures"]}
    for at, what in enumerate(names):
        shown = [(y, known[*row, what]) for y, row in enumerate(rows) if (*row, what) in known]
        if not shown:
            continue
        middle = [max(one["median"], 0.5) for _, one in shown]
        spread = [[max(0.0, x - one["low"]) for x, (_, one) in zip(middle, shown, strict=True)],
                  [max(0.0, one["high"] - x) for x, (_, one) in zip(middle, shown, strict=True)]]  # fmt: skip
        ours = what == OURS
        axes.errorbar(middle, [y for y, _ in shown], xerr=spread, fmt=MARKS[at % len(MARKS)], label=what, linewidth=0.8,
                      color="black" if ours else f"C{at - 1}", markersize=9 if ours else 5,
                      zorder=3 if ours else 2, alpha=1 if ours else 0.75)  # fmt: skip
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def draw_times(content: dict[str, Any]) -> None:
    """Draw how long an operation takes, in the middle and at the 99.9th percentile."""
    found = medians(content)
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for axes, (measure, title) in zip(panels, TIMES.items(), strict=True):
        rows = [key for key in found if key[1] == measure]
        _dots(axes, content, rows, [workload for workload, _ in rows])
        axes.set(title=title, xlabel="ns for a block, allocated and freed")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.savefig(RESULTS / "alloc.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_memory(content: dict[str, Any]) -> None:
    """Draw what memory allocators take, and how that changes as blocks come and go."""
    found = medians(content)
    figure, (weights, churn) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    rows = [key for key in found if key[1] in MEMORY]
    _dots(weights, content, rows, [f"{workload}\n{MEMORY[measure]}" for workload, measure in rows])
    weights.set(title="memory", xlabel="resident bytes for a live byte")
    names = sorted({one["what"] for one in content["measures"]}, key=lambda what: (what != OURS, what))
    for one in content["series"]:
        if one["measure"] == "resident_over_live":
            ours, at = one["what"] == OURS, names.index(one["what"])
            churn.plot(range(1, len(one["values"]) + 1), one["values"], color="black" if ours else f"C{at - 1}",
                       linewidth=2 if ours else 1)  # fmt: skip
    churn.set(title="as blocks come and go", xlabel="part of the operations", ylabel="resident bytes for a live byte")
    churn.grid(alpha=0.3)
    handles, labels = weights.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.savefig(RESULTS / "alloc_memory.svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Rewrite table and pictures."""
    mpl.rcParams["svg.hashsalt"] = "uvas"  # the same picture from the same numbers
    content = load("alloc")
    rewrite([load(name) for name in ("alloc", "alloc_python") if (RESULTS / f"{name}.json").exists()])
    draw_times(content)
    draw_memory(content)


if __name__ == "__main__":
    main()
