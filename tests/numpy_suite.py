"""Run NumPy's own tests while NumPy allocates from an arena, and tell what differs.

    python tests/numpy_suite.py                 _core, lib, linalg, ma, random and fft, without the tests marked slow
    python tests/numpy_suite.py linalg fft      some of them
    python tests/numpy_suite.py --slow          the slow ones too

What fails is run once more without uvas: a test that then passes *differs*, and the exit code is 1; one that fails as
well is NumPy's own affair on this machine, and is counted. At the end the arena's invariants are checked. Needs the
``test`` extra. Some ten minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOMS = ["_core", "lib", "linalg", "ma", "random", "fft"]
ALLOCATIONS_AT_LEAST = 10_000
TIMEOUT_S = 3600


class Watch:
    """A plugin of pytest's: what became of each test."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take note."""
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed += 1


def run_here(arguments: list[str], outcome: Path, allocator: str) -> None:
    """Run tests in this process and write down what became of them."""
    import pytest

    watch = Watch()
    numbers: dict[str, Any] = {}
    if allocator == "uvas":
        import uvas

        with uvas.AddressSpace(name="numpy") as space, uvas.Arena(space, name="numpy") as arena:
            installed = uvas.numpy_allocator(arena).install()
            code = pytest.main(arguments, plugins=[watch])
            installed.uninstall()
            arena.check()
            stats = arena.stats()
            numbers = {"allocations": stats.total_blocks, "bytes": stats.total_bytes, "peak": stats.peak_bytes}
            write(outcome, watch, int(code), numbers)
    else:
        write(outcome, watch, int(pytest.main(arguments, plugins=[watch])), numbers)


def write(outcome: Path, watch: Watch, code: int, numbers: dict[str, Any]) -> None:
    """Leave the result where the parent process looks for it."""
    outcome.write_text(json.dumps({"code": code, "failed": watch.failed, "passed": watch.passed} | numbers))


def run(arguments: list[str], allocator: str) -> dict[str, Any]:
    """Run tests in a process of their own, away from this project's settings."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "pytest.ini").write_text("[pytest]\n")
        outcome = Path(directory) / "outcome.json"
        program = [sys.executable, str(Path(__file__).resolve()), "--here", allocator, str(outcome)]
        done = subprocess.run([*program, *arguments], cwd=directory, timeout=TIMEOUT_S, check=False)
        if not outcome.exists():
            raise SystemExit(f"the tests did not come to an end: {done.returncode}")
        result: dict[str, Any] = json.loads(outcome.read_text())
    return result


def main() -> int:
    """Run all, then what failed once more without uvas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", default=ROOMS, metavar="ROOM")
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    import numpy

    home = Path(numpy.__file__).parent
    common = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    common += [] if options.slow else ["-m", "not slow"]
    first = run([*common, *(str(home / room / "tests") for room in options.rooms)], "uvas")
    failed = first["failed"]
    alone: dict[str, Any] = {"failed": []}
    if failed:
        tests = [str(home.parent / name.partition("numpy/")[1] / name.partition("numpy/")[2]) for name in failed]
        alone = run([*common, *tests], "numpy")
    differing = sorted(set(failed) - set(alone["failed"]))
    print(
        f"NumPy {numpy.__version__}: {first['passed']} passed, {len(failed)} failed, of which {len(differing)} pass "
        f"without uvas; {first['allocations']} allocations of {first['bytes']} bytes, {first['peak']} at the peak"
    )
    for name in differing:
        print(f"    differs: {name}")
    return int(bool(differing) or first["passed"] == 0 or first["allocations"] < ALLOCATIONS_AT_LEAST)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        run_here(sys.argv[4:], Path(sys.argv[3]), sys.argv[2])
    else:
        sys.exit(main())
