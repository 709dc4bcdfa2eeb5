"""Build and run the C tests: every ``test_*.c`` and ``stress_*.c`` here, linked with all sources of the core.

    python tests/c/run.py                                plain, warnings are errors
    python tests/c/run.py --sanitizer thread             under ThreadSanitizer
    python tests/c/run.py --sanitizer address,undefined  under AddressSanitizer and UBSan
    python tests/c/run.py --seconds 60 stress_space      one test, longer

A test's exit code is 0 or it failed. The first argument of a stress test is how many seconds it shall take.

Where ``UVAS_C_OBJECTS`` names a directory, what is compiled is kept there by what it was made of, and not compiled
again: for who builds many copies of the core that differ in a file (``tests/mutants/run.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "uvas" / "_core"

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
COMPILE = ["-std=c11", "-O2", "-g", "-pthread", f"-I{CORE / 'include'}", f"-I{CORE / 'src'}"]
SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
TIMEOUT_S = 600


def tests() -> list[str]:
    """Return the names of all tests."""
    return sorted(path.stem for pattern in ("test_*.c", "stress_*.c") for path in HERE.glob(pattern))


@dataclass(frozen=True)
class Builder:
    """Compiles the core once, and each test against it, into one directory."""

    directory: Path
    sanitizer: str = ""
    cc: str = os.environ.get("CC", "gcc")

    @property
    def compiler(self) -> list[str]:
        """The compiler with all its flags."""
        # No warnings under a sanitizer: the code that it adds makes GCC see things.
        sanitize = ["-w", f"-fsanitize={self.sanitizer}", "-fno-sanitize-recover=all"]
        return [*shlex.split(self.cc), *COMPILE, *(sanitize if self.sanitizer else WARNINGS)]

    def compile(self, source: Path) -> Path:
        """Compile one file, unless it is kept."""
        kept = os.environ.get("UVAS_C_OBJECTS")
        result = Path(kept, f"{self.made_of(source)}.o") if kept else self.directory / f"{source.stem}.o"
        if not result.exists():
            fresh = self.directory / f"{source.stem}.fresh.o"
            subprocess.run([*self.compiler, "-c", source, "-o", fresh], check=True)
            shutil.move(fresh, result)
        return result

    def made_of(self, source: Path) -> str:
        """Return a name for an object: the same for the same source, headers and flags, wherever they lie."""
        flags = [flag for flag in self.compiler if not flag.startswith("-I")]
        headers = sorted([*CORE.glob("src/*.h"), *CORE.glob("include/*.h"), *HERE.glob("*.h")])
        made_of = hashlib.sha256(" ".join(flags).encode())
        for path in [source, *headers]:
            made_of.update(path.read_bytes())
        return f"{source.stem}-{made_of.hexdigest()[:24]}"

    def build(self, names: list[str]) -> dict[str, Path]:
        """Return the program of each test."""
        core = sorted(CORE.glob("src/*.c"))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(self.compile, [*core, *(HERE / f"{name}.c" for name in names)]))
        shared, own = objects[: len(core)], objects[len(core) :]
        return {name: self.link(name, [test, *shared]) for name, test in zip(names, own, strict=True)}

    def link(self, name: str, objects: list[Path]) -> Path:
        """Link one test."""
        program = self.directory / name
        subprocess.run([*self.compiler, *objects, "-ldl", "-o", program], check=True)
        return program

    def command(self, program: Path, seconds: int | None = None) -> list[str]:
        """Return how to run a test."""
        duration = [str(seconds)] if seconds is not None and program.name.startswith("stress_") else []
        return [*(without_randomisation() if self.sanitizer else []), str(program), *duration]


@cache
def without_randomisation() -> list[str]:
    """Return what to put before a command so that its addresses are not randomised, nothing where that is forbidden.

    GCC 12's ThreadSanitizer cannot start where the kernel randomises more address bits than it expects.
    """
    prefix = ["setarch", platform.machine(), "-R"]
    possible = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], check=False).returncode == 0
    return prefix if possible else []


def run(command: list[str]) -> str | None:
    """Run a test and return what is wrong, None if nothing is."""
    try:
        code = subprocess.run(command, env=SANITIZER_OPTIONS | os.environ, timeout=TIMEOUT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    return f"exit code {code}" if code else None


def outcomes(commands: dict[str, list[str]]) -> Iterator[tuple[str, str | None]]:
    """Run tests; what is wrong with each. Stress tests, which want all CPUs, one by one, the others together."""
    for name, command in commands.items():
        if name.startswith("stress_"):
            yield name, run(command)
    others = [name for name in commands if not name.startswith("stress_")]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from zip(others, threads.map(lambda name: run(commands[name]), others), strict=True)


def main() -> int:
    """Build and run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TEST", help="names without .c (default: all)")
    parser.add_argument("--sanitizer", default="", help="what to give to -fsanitize")
    parser.add_argument("--seconds", type=int, help="how long each stress test shall take (default: as it likes)")
    arguments = parser.parse_args()
    names = arguments.names or tests()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        builder = Builder(Path(directory), arguments.sanitizer)
        commands = {name: builder.command(one, arguments.seconds) for name, one in builder.build(names).items()}
        for name, wrong in outcomes(commands):
            failed += wrong is not None
            print(f"{name} [{arguments.sanitizer or 'plain'}]: {wrong or 'good'}", flush=True)
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main())
