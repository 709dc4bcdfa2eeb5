"""Allocating from Python, and NumPy with its memory from an arena.

python benchmarks/alloc_python.py [--quick]      targets A7, A8; writes results/alloc_python.json

A Python allocator is a file under ``benchmarks/allocators/`` with a class ``Allocator``: `PythonAllocator`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from adapters import ALLOCATORS
from alloc import Rounds, ratios, summary
from harness import Sample, rows_of, write

import uvas

MIB = 1 << 20


class PythonAllocator(Protocol):
    """What a Python allocator gives; its loops are its own, so that nothing of ours is in what is timed."""

    name: str
    get: str

    def alloc(self, size: int) -> Any:
        """Return a block."""

    def address(self, block: Any) -> int:
        """Return where it lies."""

    def free(self, block: Any) -> None:
        """Take it back."""

    def pairs(self, size: int, count: int) -> None:
        """Allocate and free, `count` times."""

    def many(self, sizes: list[int]) -> None:
        """Allocate all at once, and free them."""


def python_allocators() -> tuple[list[PythonAllocator], dict[str, str]]:
    """Return those that can be had, and why the others cannot."""
    running: list[PythonAllocator] = []
    missing = {}
    for path in sorted(ALLOCATORS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"allocators_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            running.append(module.Allocator())
        except (ImportError, AttributeError, OSError, StopIteration) as why:
            missing[path.stem] = f"{type(why).__name__}: {why}"
    return running, missing


def check(one: PythonAllocator) -> None:
    """Raise unless its blocks are disjoint."""
    sizes = [16 + 24 * i for i in range(500)]
    blocks = [one.alloc(size) for size in sizes]
    spans = sorted((one.address(block), size) for block, size in zip(blocks, sizes, strict=True))
    for (base, size), (above, _) in pairwise(spans):
        if base + size > above:
            raise AssertionError(f"{one.name}: {base:#x} + {size} reaches into {above:#x}")
    for block in blocks:
        one.free(block)


# ---- what is timed ---------------------------------------------------------------------------------------------------


@contextmanager
def busy_thread() -> Iterator[None]:
    """Have another thread run Python all the time."""
    stop = threading.Event()

    def burn() -> None:
        count = 0
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _time(into: Rounds, label: str, what: str, count: int, work: Callable[[int], object]) -> None:
    """Time ``work(n)``, which does n operations, by the time that the thread had: in parts, whose median counts."""
    parts = min(15, count)
    times = []
    for _ in range(parts):
        began = time.thread_time_ns()
        work(count // parts)
        times.append((time.thread_time_ns() - began) / (count // parts))
    into.setdefault((label, what), []).append({"ns": statistics.median(times)})


def _empties(empty: Callable[[tuple[int]], Any]) -> Callable[[int], None]:
    def loop(count: int) -> None:
        for _ in range(count):
            empty((1024,))

    return loop


def _pairs(one: PythonAllocator, size: int) -> Callable[[int], None]:
    return lambda count: one.pairs(size, count)


def _many(one: PythonAllocator, sizes: list[int]) -> Callable[[int], None]:
    def loop(count: int) -> None:
        for _ in range(count // len(sizes)):
            one.many(sizes)

    return loop


def a8(into: Rounds, running: list[PythonAllocator], rounds: int, count: int) -> None:
    """Time one at a time, many at once, arrays, and one at a time beside a thread that will not let go of the GIL."""
    sizes = [64] * 1_000
    empties = {"np.empty": np.empty, "uvas": _of_uvas("empty")}
    for _ in range(rounds):
        for size, about in ((64, "64 B"), (8192, "8 KiB")):
            for one in running:
                _time(into, f"A8 Python: alloc + free, {about}", one.name, count, _pairs(one, size))
        for one in running:
            _time(into, "A8 Python: 1,000 at once, 64 B, each", one.name, 15 * len(sizes), _many(one, sizes))
        for what, empty in empties.items():
            if empty:
                _time(into, "A8 Python: empty((1024,))", what, count, _empties(empty))
        with busy_thread():  # by the clock on the wall: it is the waiting for the GIL that is asked for
            for one in running:
                began = time.perf_counter_ns()
                one.pairs(64, 5 * count)
                waited = (time.perf_counter_ns() - began) / (5 * count)
                label = "A8 Python: alloc + free, 64 B, beside a busy thread"
                into.setdefault((label, one.name), []).append({"ns": waited})


def _of_uvas(name: str) -> Any:
    """Return what uvas has by that name, or None: not every build has arrays."""
    return getattr(uvas, name, None)


def _plus(a: Any, b: Any) -> Callable[[int], None]:
    def loop(count: int) -> None:
        for _ in range(count):
            a + b

    return loop


def _twice_plus_one(a: Any) -> Callable[[int], None]:
    def loop(count: int) -> None:
        for _ in range(count):
            2 * a + 1

    return loop


def a7(into: Rounds, rounds: int, count: int) -> None:
    """Time NumPy as it is and with its memory from an arena."""
    handlers: dict[str, Callable[[], AbstractContextManager[Any]]] = {"NumPy's default": contextlib.nullcontext}
    if ours := _of_uvas("numpy_allocator"):
        handlers["uvas"] = ours
    for mib in (0, 0.25, 1, 4, 16, 64, 256):
        a = np.arange(max(int(mib * MIB) // 8, 1024), dtype=np.float64)
        b = a[::-1].copy()
        times = max(2, int(128 / mib)) if mib else count
        for turn in range(rounds + 1):
            for what, handler in handlers.items():
                with handler():
                    if not turn:  # warm, and right
                        if not ((a + b) == a[-1]).all() or (2 * a + 1)[-1] != 2 * a[-1] + 1:
                            raise AssertionError(f"{what}: NumPy does not add")
                    elif not mib:
                        _time(into, "A7 under NumPy: np.empty(1024)", what, count, _empties(np.empty))
                    else:
                        _time(into, f"A7 under NumPy: a + b, {mib} MiB", what, times, _plus(a, b))
                        _time(into, f"A7 under NumPy: 2 * a + 1, {mib} MiB", what, times, _twice_plus_one(a))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args().quick else 11
    running, missing = python_allocators()
    for name, why in missing.items():
        print(f"without {name}: {why}", file=sys.stderr)
    for one in running:
        check(one)
    load, measured = os.getloadavg(), Rounds()
    a8(measured, running, rounds, 20_000)
    a7(measured, rounds, 20_000)
    samples = [Sample(label, what, 1, one["ns"]) for (label, what), all in measured.items() for one in all]
    write(
        "alloc_python",
        rows_of(samples),
        load_before=load,
        bounds=[],
        missing=missing,
        measures=[asdict(one) for one in summary(measured)],
        ratios=[asdict(one) for one in ratios(measured)],
    )


if __name__ == "__main__":
    main()
