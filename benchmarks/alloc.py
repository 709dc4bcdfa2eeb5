"""Allocating: an arena against the allocators under ``benchmarks/allocators/``, on the work of ``workloads.toml``.

python benchmarks/alloc.py [--quick]      targets A1 to A9; writes results/alloc.json

One process for each allocator, workload and round, the allocators in turn; a README beside this file tells how to
read the results, and how another allocator joins.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from adapters import Allocator, FailedError, allocators
from harness import HERE, Sample, rows_of, write

OURS = "uvas"


@dataclass(frozen=True, slots=True)
class Workload:
    """One of ``workloads.toml``, whose head says what the fields mean."""

    target: str
    name: str
    kind: str
    low: int
    high: int
    touch: str
    live: int = 1
    operations: int = 1
    bytes: int = 0
    seed: int = 1
    long: int = 0

    def keys(self, operations: int) -> list[str]:
        """Return it as the driver's arguments."""
        told = {**asdict(self), "operations": operations}
        return [f"{key}={told[key]}" for key in ("kind", "low", "high", "live", "operations", "bytes", "seed", "touch")]

    def suits(self, allocator: Allocator) -> bool:
        """Whether the allocator may be asked."""
        return not (allocator.alone and self.kind in ("pass", "scale"))


@dataclass(frozen=True, slots=True)
class Measure:
    """The median of what one allocator did at one workload, and the quartiles around it."""

    workload: str
    what: str
    measure: str
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """uvas over a peer, round by round: the median, the quartiles, and which is less.

    `less` is the peer's name, ``"uvas"``, or ``"equal"`` where 1 lies between the quartiles.
    """

    workload: str
    measure: str
    peer: str
    ratio: float
    low: float
    high: float
    less: str


Rounds = dict[tuple[str, str], list[dict[str, float]]]  # by workload and allocator


def workloads() -> list[Workload]:
    """Return what ``workloads.toml`` says."""
    known = {field.name for field in fields(Workload)}
    data = tomllib.loads((HERE / "workloads.toml").read_text())["workload"]
    return [Workload(**{key: value for key, value in one.items() if key in known}) for one in data]


def measure(
    chosen: Sequence[Workload], running: Sequence[Allocator], rounds: int, share: float
) -> tuple[Rounds, dict[str, str]]:
    """Run each workload with each allocator in turn, round by round.

    Parameters
    ----------
    share
        Of the workload's operations; 0: its long form.

    Returns
    -------
    tuple
        What was measured, and who failed at what, with the reason.
    """
    measured: Rounds = {}
    failed: dict[str, str] = {}
    try:
        for work in chosen:
            print(f"{work.target} {work.name}", file=sys.stderr)
            for _ in range(rounds):
                _turn(work, running, share, measured, failed)
    except KeyboardInterrupt:
        print("interrupted: what has been measured is written", file=sys.stderr)
    return measured, failed


def _turn(work: Workload, running: Sequence[Allocator], share: float, measured: Rounds, failed: dict[str, str]) -> None:
    """Have each allocator do a workload once; who failed at it is not asked again."""
    label = f"{work.target} {work.name}"
    keys = work.keys(int(work.operations * share) or work.long or 1)
    for one in running:
        if f"{one.name} at {label}" in failed or not work.suits(one):
            continue
        try:
            result = one.run(*keys)
        except FailedError as why:
            failed[f"{one.name} at {label}"] = str(why)
            print(f"  {one.name}: {why}", file=sys.stderr)
        else:
            measured.setdefault((label, one.name), []).append(result)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return round(middle, 3), round(low, 3), round(high, 3)


def summary(measured: Rounds) -> list[Measure]:
    """Return medians and quartiles; what changes as a workload goes on (see `series`) is left out."""
    return [
        Measure(workload, what, name, *_spread([one[name] for one in rounds]))
        for (workload, what), rounds in measured.items()
        for name in rounds[0]
        if name != "checked" and not name[-1].isdigit()
    ]


def ratios(measured: Rounds) -> list[Ratio]:
    """Return uvas over each peer, of the rounds that both ran."""
    found = []
    for (workload, peer), theirs in measured.items():
        ours = measured.get((workload, OURS), [])
        for name in (name for name in theirs[0] if peer != OURS and name != "checked" and not name[-1].isdigit()):
            values = [a[name] / b[name] for a, b in zip(ours, theirs, strict=False) if b[name] > 0]
            if values:
                middle, low, high = _spread(values)
                less = "equal" if low <= 1 <= high else OURS if high < 1 else peer
                found.append(Ratio(workload, name, peer, middle, low, high, less))
    return found


def series(measured: Rounds) -> list[dict[str, object]]:
    """Return what changes as a workload goes on, of the first round."""
    found: list[dict[str, object]] = []
    for (workload, what), rounds in measured.items():
        for name in dict.fromkeys(name.rsplit(" ", 1)[0] for name in rounds[0] if name[-1].isdigit()):
            values = [value for key, value in rounds[0].items() if key.startswith(name + " ")]
            found.append({"workload": workload, "what": what, "measure": name, "values": values})
    return found


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the operations")
    parser.add_argument(
        "--long", action="store_true", help="the long forms alone, once; writes results/alloc_long.json"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each allocator does each workload (5)")
    parser.add_argument("--allocator", action="append", default=[], help="only these: names of files in allocators/")
    parser.add_argument("--target", action="append", default=[], help="only these: A1, A3, ...")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=PATH", help="where a library lies")
    parser.add_argument("--name", help="of the file under results/")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    asked = arguments()
    libraries = dict(one.split("=", 1) for one in asked.library)
    chosen = [one for one in workloads() if not asked.target or one.target in asked.target]
    chosen = [one for one in chosen if one.long or not asked.long]
    with tempfile.TemporaryDirectory() as directory:
        running, missing = allocators(Path(directory), libraries)
        for name, why in missing.items():
            print(f"without {name}: {why}", file=sys.stderr)
        left_out = [one.name for one in running if asked.allocator and one.key not in asked.allocator]
        running = [one for one in running if one.name not in left_out]
        share = 0 if asked.long else 0.25 if asked.quick else 1
        measured, failed = measure(chosen, running, 1 if asked.long else asked.rounds, share)
    samples = [
        Sample(workload, what, 1, one["ns"])
        for (workload, what), rounds in measured.items()
        for one in rounds
        if "ns" in one
    ]
    write(
        asked.name or ("alloc_long" if asked.long else "alloc"),
        rows_of(samples),
        load_before=os.getloadavg(),
        transparent_huge_pages=Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        libraries={one.name: Path(one.library).name for one in running if one.library},
        bounds=[one.name for one in running if one.bound],
        missing=missing,
        left_out=left_out,
        failed=failed,
        workloads=[asdict(one) for one in chosen],
        measures=[asdict(one) for one in summary(measured)],
        ratios=[asdict(one) for one in ratios(measured)],
        series=series(measured),
    )
    if any(one.startswith(f"{OURS} at ") for one in failed):
        sys.exit("uvas failed: see above")


if __name__ == "__main__":
    main()
