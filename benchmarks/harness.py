"""What all benchmarks share: building the C ones, taking medians, and writing evidence.

A benchmark makes samples: ``(id, what, parameter, nanoseconds)``, several of each, taken in turn with those of its
peers, so that a slow second on the machine falls on all of them. A *row* is the median of the samples of one kind,
with the quartiles; the rows of one run are a file under ``benchmarks/results/``, with the machine, the versions and
the commit that they were measured on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvas

__all__ = [
    "RESULTS",
    "Ratio",
    "Row",
    "Sample",
    "built",
    "library",
    "load",
    "programs_output",
    "ratio",
    "rows_of",
    "sample",
    "write",
]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CORE = HERE.parent / "uvas" / "_core" / "src"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Parameters
    ----------
    id
        The target's, R1 for example.
    what
        Who was measured.
    parameter
        How much of what the row is about: ranges in the book, mappings in the way, devices.
    ns
        Nanoseconds for one operation.
    """

    id: str
    what: str
    parameter: int
    ns: float


@dataclass(frozen=True, slots=True)
class Row:
    """The median of some samples, in nanoseconds, and the quartiles around it."""

    id: str
    what: str
    parameter: int
    ns: float
    low: float
    high: float
    samples: int


def rows_of(samples: Iterable[Sample]) -> list[Row]:
    """Return a row for each kind of sample, in the order in which the kinds appeared."""
    kinds: dict[tuple[str, str, int], list[float]] = {}
    for one in samples:
        kinds.setdefault((one.id, one.what, one.parameter), []).append(one.ns)
    return [Row(*kind, *_spread(times), len(times)) for kind, times in kinds.items()]


def _spread(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return round(middle, 2), round(low, 2), round(high, 2)


Kind = tuple[str, str, int]
"""``(id, what, parameter)`` of a sample."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over a peer's, round by round: quick and slow seconds of the machine fall on both."""

    about: str
    ours_ns: float
    peer: str
    peer_ns: float
    ratio: float
    low: float
    high: float


def ratio(samples: Iterable[Sample], about: str, ours: Kind, peers: Iterable[Kind]) -> Ratio | None:
    """Compare with the peer that needs least, or return None where one side was not measured.

    Both have been measured once in each round, or equally often.
    """
    kinds: dict[Kind, list[float]] = {}
    for one in samples:
        kinds.setdefault((one.id, one.what, one.parameter), []).append(one.ns)
    measured = [peer for peer in peers if peer in kinds]
    if ours not in kinds or not measured:
        return None
    best = min(measured, key=lambda peer: statistics.median(kinds[peer]))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(kinds[ours], kinds[best], strict=True)], n=4)
    return Ratio(about, statistics.median(kinds[ours]), best[1], statistics.median(kinds[best]), middle, low, high)


def sample(id: str, what: str, function: Callable[[int], object], count: int, parameter: int = 1) -> Sample:
    """Time ``function(count)``, which does its work `count` times."""
    began = time.perf_counter_ns()
    function(count)
    return Sample(id, what, parameter, (time.perf_counter_ns() - began) / count)


# ---- C ---------------------------------------------------------------------------------------------------------------


@contextmanager
def built(source: str, *, with_core: bool = False) -> Iterator[Path]:
    """Compile ``benchmarks/c/SOURCE`` and give the program for as long as the block lasts.

    Parameters
    ----------
    source
        The file's name.
    with_core
        Link the core's own sources, for what lies behind ``uvas.h``, instead of the library that Python uses.
    """
    core = Path(uvas.get_library())
    linked = [*map(str, CORE.glob("*.c"))] if with_core else [str(core), f"-Wl,-rpath,{core.parent}"]
    with tempfile.TemporaryDirectory() as directory:
        yield _compiled(source, Path(directory) / Path(source).stem, *linked)


@contextmanager
def library(source: str) -> Iterator[Path]:
    """Compile ``benchmarks/c/SOURCE`` into a shared library, for `uvas.CFunction`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{Path(source).stem}.so"
        yield _compiled(source, path, "-shared", "-fPIC", "-fvisibility=hidden")


def _compiled(source: str, to: Path, *more: str) -> Path:
    subprocess.run(
        [os.environ.get("CC", "gcc"), "-std=c11", "-O2", "-Wall", "-Wextra", f"-I{HERE / 'c'}",
         f"-I{uvas.get_include()}", f"-I{CORE}", str(HERE / "c" / source), *more, "-pthread", "-ldl", "-o", str(to)],
        check=True,
    )  # fmt: skip
    return to


def programs_output(*command: object, **environment: object) -> list[Sample]:
    """Run a C benchmark, with more in its environment, and return the samples that it prints: JSON, one a line."""
    done = subprocess.run(
        [str(part) for part in command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in environment.items()},
    )
    return [Sample(one["id"], one["what"], one["parameter"], one["ns"]) for one in _lines(done.stdout)]


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- evidence --------------------------------------------------------------------------------------------------------


def write(name: str, rows: list[Row], **more: object) -> Path:
    """Write ``results/NAME.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        **more,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}: {len(rows)} rows", file=sys.stderr)
    return path


def load(name: str) -> dict[str, Any]:
    """Return what `write` wrote, its rows as objects."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    content["rows"] = [Row(**row) for row in content["rows"]]
    return content


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "not a checkout"


def _machine() -> dict[str, object]:
    with open("/proc/cpuinfo") as text:
        models = [line.split(":")[1].strip() for line in text if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def _versions() -> dict[str, str]:
    packages = (
        "uvas",
        "numpy",
        "cffi",
        "sortedcontainers",
        "intervaltree",
        "umf",
        "pyopencl",
        "pocl-binary-distribution",
        "ray",
        "cupy-cuda13x",
        "cuda-bindings",
        "cuda-core",
        "torch",
        "rmm-cu13",
    )
    present = {one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}
    versions = {name: present[name] for name in packages if name in present}
    return {"python": platform.python_version(), "compiler": str(sysconfig.get_config_var("CC")), **versions}
