"""The README's table of moving memory and its picture, from ``results/move.json``, ``ship.json`` and ``contend.json``.

python benchmarks/report_move.py      rewrites what stands between the table's markers, and results/move.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness import RESULTS, Row, load
from matplotlib import pyplot
from matplotlib.axes import Axes

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- table: move -->\n", "<!-- end -->"
MIB = 1 << 20
PER_MIB = ("prefetch", "a device", "first sweep", "second sweep")  # times of these are for 1 MiB
GRANULES = {4 << 10: "4 KiB", 64 << 10: "64 KiB", 2 << 20: "2 MiB"}


# ---- the table -------------------------------------------------------------------------------------------------------


def line(one: dict[str, Any]) -> str:
    """Return one comparison in Markdown."""
    shown = _speed if one["about"].startswith(PER_MIB) else _time_a_mib if "processor" in one["about"] else _time
    middle, low, high = (_ratio(one[name]) for name in ("ratio", "low", "high"))
    return (
        f"| {one['about']} | {shown(one['ours_ns'])} | {one['peer']} | {shown(one['peer_ns'])} "
        f"| {middle} ({low} to {high}) |"
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"1 / {1 / value:,.0f}"


def _speed(ns_a_mib: float) -> str:
    return f"{MIB / ns_a_mib:.2f} GB/s"


def _time_a_mib(ns_a_mib: float) -> str:
    return f"{_time(ns_a_mib)} a MiB"


def _time(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def contentions(found: list[dict[str, Any]]) -> list[str]:
    """Return the second table: three at one word, and at one border."""
    table = [
        "| host and devices | memory | granule | each second | longest wait |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: (one["what"], one["memory"], one["granule"])):
        granule = GRANULES[one["granule"]] if one["memory"] == "private" else "-"
        table.append(
            f"| {one['what']} | {one['memory']} | {granule} | {one['per_second'] / 1e6:.3g} M "
            f"| {one['longest_wait_ms']:.3g} ms |"
        )
    return table


def rewrite() -> None:
    """Put the tables between their markers in the README, if they are there."""
    before, marker, rest = README.read_text().partition(BEGIN)
    if not marker:
        return
    move, ship, contend = load("move"), load("ship"), load("contend")
    machine = move["machine"]
    table = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}:", ""]
    table += ["| what | uvas | against | it takes | ratio of times (quartiles) |", "|---|---|---|---|---|"]
    table += [line(one) for content in (move, ship) for one in content["ratios"]]
    table += ["", *contentions(contend["contention"]), ""]
    parts = ", ".join(f"{name}: {part:.3%}" for name, part in move["metadata_over_unified"].items())
    table += [f"Memory of directory and pager, of the unified bytes, by granule: {parts}."]
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n".join(table) + "\n" + END + after)


# ---- the picture -----------------------------------------------------------------------------------------------------


def bars(axes: Axes, rows: list[Row], title: str, label: str, per_mib: bool) -> None:
    """Draw a bar for each row, with its quartiles; uvas's own are black."""
    shown = sorted(rows, key=lambda row: row.ns)
    values = [MIB / row.ns if per_mib else row.ns / 1000 for row in shown]
    ends = [(MIB / row.high, MIB / row.low) if per_mib else (row.low / 1000, row.high / 1000) for row in shown]
    spread = [[max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
              [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
    colors = ["0.7" if row.what.startswith(("bare", "LLNL")) else "black" for row in shown]
    axes.barh(range(len(shown)), values, xerr=spread, color=colors, ecolor="C1")
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title=title, xlabel=label)
    axes.grid(alpha=0.3, axis="x")


def _label(row: Row) -> str:
    if row.id == "H1":
        return row.what
    way = row.id.removeprefix("H2 ") + ": " if row.id.startswith("H2") else ""
    unit = f"{row.parameter >> 10} KiB" if row.parameter < MIB else f"{row.parameter // MIB} MiB"
    return f"{way}{row.what}, {unit}"


def draw() -> None:
    """Draw faults, ways, streams and sweeps."""
    rows: list[Row] = load("move")["rows"]
    figure, panels = pyplot.subplots(2, 2, figsize=(15, 10), layout="constrained")
    one = [row for row in rows if row.id == "H1" and "that is there" not in row.what and "zeros" not in row.what]
    bars(panels[0][0], one, "one fault of 4 KiB", "us", per_mib=False)
    ways = [row for row in rows if row.id in ("H2 out", "H2 back")]
    bars(panels[0][1], ways, "64 MiB to a device (out) and to the host (back)", "GB/s", per_mib=True)
    bars(
        panels[1][0],
        [row for row in rows if row.id == "H4"],
        "going through it, nothing asked for before",
        "GB/s",
        per_mib=True,
    )
    bars(
        panels[1][1],
        [row for row in rows if row.id == "H6"],
        "a device goes through twice what it holds",
        "GB/s",
        per_mib=True,
    )
    figure.savefig(RESULTS / "move.svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Rewrite tables and picture."""
    mpl.rcParams["svg.hashsalt"] = "uvas"  # the same picture from the same numbers
    rewrite()
    draw()


if __name__ == "__main__":
    main()
