"""Break the product on purpose, one promise at a time, and see that the named test notices.

    python tests/mutants/run.py                 all of them
    python tests/mutants/run.py pin-dropped     some
    python tests/mutants/run.py --jobs 1        one at a time
    python tests/mutants/run.py --part 7/3      every third one; which third, the first number modulo the second says

Each ``*.patch`` beside this file begins with what is promised and who must notice that it no longer holds::

    Promise: release waits for the operations inside
    Killed by: tests/unit/test_space.py::test_name     a test of pytest's, or
    Killed by: c:stress_space                          a C test, or
    Killed by: c:stress_registry thread                a C test under a sanitizer

Each patch is applied to a copy of the project and that test run there. It is *killed* if the test fails, *survived* if
the test passes, and *unproven* if the patch does not apply, the copy does not build, or the test fails without the
patch as well. The exit code is 0 if all are killed. Needs the ``test`` and ``dev`` extras, git and an editable install
(its built modules are used; what a patch changes in C is compiled again).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uvas._core.build import COMPILE, FREE_THREADED, LIBRARY_FILE, LIMITED_API, LINK, MODULE_COMPILE

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
COPIED = ["pyproject.toml", "README.md", "uvas", "tests", "examples"]
CORE = Path("uvas", "_core")
TIMEOUT_S = 300
"""For a test of the unchanged project."""
PATIENCE = 10
"""A mutant's test may take so many times as long as it took unchanged, and..."""
PATIENCE_S = 15
"""...so much longer: what hangs is killed, but must not keep everybody waiting."""
STRESS_S = 10
"""For a stress test: on a busy machine it takes longer until two threads meet; a mutant that is caught is soon done."""
GRACE_S = 10
"""For pytest to say that its own timeout has struck."""


def pytest(timeout_s: float, *arguments: str) -> list[str]:
    """Run tests in Python, in the root of a copy."""
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", f"{timeout_s:.0f}", *arguments]


def made_of(folder: Path, changed: set[str]) -> list[Path]:
    """Return the C sources that are among the changed files, or include one of them, by whatever way."""
    includes = {path: set(re.findall(r'#include "(\w+\.h)"', path.read_text())) for path in folder.glob("*.[ch]")}
    while more := {path.name for path, included in includes.items() if included & changed} - changed:
        changed = changed | more
    return [path for path in includes if path.suffix == ".c" and path.name in changed]


@dataclass(frozen=True)
class Killer:
    """The test that must fail."""

    name: str
    sanitizer: str = ""

    @property
    def in_c(self) -> bool:
        """Whether it is a C test."""
        return self.name.startswith("c:")

    def command(self, timeout_s: float) -> list[str]:
        """Run it, in the root of a copy."""
        if not self.in_c:
            return pytest(timeout_s, "-x", self.name)
        sanitizer = ["--sanitizer", self.sanitizer] if self.sanitizer else []
        seconds = 2 * STRESS_S if sanitizer else STRESS_S
        return ["tests/c/run.py", "--seconds", str(seconds), *sanitizer, self.name.removeprefix("c:")]

    def verdict(self, code: int, output: str) -> tuple[str, str]:
        """Return what an exit code and an output mean, and in which words the test said so."""
        if code == 0:
            return "survived", ""
        if self.in_c:
            said = re.findall(rf"^{self.name.removeprefix('c:')} \[.*\]: .*$", output, re.MULTILINE)
            return ("killed", said[-1].partition(": ")[2]) if said else ("unproven", "does not build")
        if code < 0:
            return "killed", signal.Signals(-code).name
        errors = re.findall(r"^(?:E   |\+* *Timeout|Fatal Python error: ).*$", output, re.MULTILINE)
        return ("killed" if code == 1 else "unproven"), errors[0].removeprefix("E   ").strip() if errors else ""


@dataclass(frozen=True)
class Mutant:
    """One patch."""

    name: str
    promise: str
    killer: Killer
    files: tuple[Path, ...]

    @property
    def patch(self) -> Path:
        """Where it is."""
        return HERE / f"{self.name}.patch"


@dataclass(frozen=True)
class Result:
    """What became of it."""

    mutant: Mutant
    verdict: str
    said: str
    seconds: float


@dataclass(frozen=True)
class Unchanged:
    """What became of a test in the clean copy."""

    verdict: str
    said: str
    seconds: float

    @property
    def patience_s(self) -> float:
        """How long the same test may take in a mutant."""
        return PATIENCE * self.seconds + PATIENCE_S


def read(path: Path) -> Mutant:
    """Read a patch's head and the files that it changes."""
    text = path.read_text()
    head = re.match(r"Promise: (.+)\nKilled by: (\S+)(?: (\S+))?\n\n", text)
    if head is None:
        raise SystemExit(f"{path}: does not begin with a promise and who kills it")
    files = tuple(Path(name) for name in re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE))
    return Mutant(path.stem, head[1], Killer(head[2], head[3] or ""), files)


class Workshop:
    """A clean copy of the project, its objects, and a copy for each mutant."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clean = self.copy("clean")
        self.objects = directory / "objects"
        self.objects.mkdir()
        self.c_objects = Path(os.environ.get("UVAS_C_OBJECTS") or directory / "c-objects")
        self.c_objects.mkdir(exist_ok=True)
        self.compile(self.clean, (self.clean / CORE / "src").glob("*.c"), self.objects)
        self.link(self.clean, self.objects)

    def copy(self, name: str) -> Path:
        """Copy the project."""
        target = self.directory / name
        for one in COPIED:
            source, copied = PROJECT / one, target / one
            copied.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
            else:
                shutil.copy(source, copied)
        return target

    def compile(self, copy: Path, sources: Iterable[Path], objects: Path) -> None:
        """Compile some files of the core."""
        compiler = [*shlex.split(os.environ.get("CC", "gcc")), *COMPILE, f"-I{copy / CORE / 'include'}"]
        for source in sources:
            command = [*compiler, "-w", "-c", source, "-o", objects / f"{source.stem}.o"]
            subprocess.run(command, check=True, capture_output=True)

    def link(self, copy: Path, objects: Path) -> None:
        """Put a library into a copy."""
        target = copy / CORE / LIBRARY_FILE
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        subprocess.run([*compiler, *sorted(objects.glob("*.o")), *LINK, "-o", target], check=True, capture_output=True)

    def build_modules(self, copy: Path, changed: tuple[Path, ...]) -> None:
        """Put those of the modules written by hand into a copy that a changed file is part of: _name.c, or in name/."""
        for target in list((copy / CORE).glob("_*.so")):
            name = target.name.partition(".")[0]
            alone, folder = CORE / f"{name}.c", CORE / name.removeprefix("_")
            if any(file == alone or file.parent == folder for file in changed):
                self.build_module(copy, sorted((copy / folder).glob("*.c")) or [copy / alone], target)

    def build_module(self, copy: Path, sources: list[Path], target: Path) -> None:
        """Compile and link one of them."""
        limited = [] if FREE_THREADED else [f"-DPy_LIMITED_API={LIMITED_API}"]
        include = [f"-I{copy / CORE / 'include'}", f"-I{sysconfig.get_path('include')}"]
        link = ["-shared", *sources, "-L", target.parent, "-luvas", "-Wl,-rpath,$ORIGIN", "-o", target]
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        target.unlink()
        command = [*compiler, "-O2", "-fPIC", "-w", *MODULE_COMPILE, *limited, *include, *link]
        subprocess.run(command, check=True, capture_output=True)

    def mutate(self, mutant: Mutant) -> Path:
        """Make a copy with the patch in it, and built."""
        copy = self.copy(mutant.name)
        subprocess.run(["git", "apply", "-C1", mutant.patch], cwd=copy, check=True, capture_output=True)
        self.build_modules(copy, mutant.files)
        sources = made_of(copy / CORE / "src", {file.name for file in mutant.files if file.parent == CORE / "src"})
        if sources and not mutant.killer.in_c:  # the C tests compile the core themselves
            objects = self.directory / f"{mutant.name}.objects"
            shutil.copytree(self.objects, objects)
            self.compile(copy, sources, objects)
            self.link(copy, objects)
        return copy

    def run(self, copy: Path, command: list[str], timeout_s: float) -> tuple[int | None, str]:
        """Run Python in a copy: the exit code, None if it took too long, and the output."""
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "UVAS_C_OBJECTS": str(self.c_objects),
        }
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            end_session(process.pid)
            process.wait()
        return process.returncode, output

    def test(self, copy: Path, killer: Killer, timeout_s: float) -> tuple[str, str]:
        """Run a test in a copy."""
        code, output = self.run(copy, killer.command(timeout_s), timeout_s + GRACE_S)
        return ("killed", f"not done after {timeout_s:.0f} s") if code is None else killer.verdict(code, output)

    def unchanged(self, killer: Killer) -> Unchanged:
        """Run a test in the clean copy."""
        began = time.monotonic()
        verdict, said = self.test(self.clean, killer, TIMEOUT_S)
        return Unchanged(verdict, said, time.monotonic() - began)

    def together(self, killers: list[Killer]) -> dict[Killer, Unchanged]:
        """Run the tests in Python in one process, which starts once; nothing is known if not all pass."""
        names = [killer.name for killer in killers if not killer.in_c]
        code, output = self.run(self.clean, pytest(TIMEOUT_S, "--durations=0", *names), TIMEOUT_S + GRACE_S)
        if not names or code != 0:
            return {}
        spent = re.findall(r"^([\d.]+)s (?:setup|call|teardown) +(\S+)", output, re.MULTILINE)
        return {
            killer: Unchanged("survived", "", sum(float(s) for s, test in spent if test.startswith(killer.name)))
            for killer in killers
            if not killer.in_c
        }

    def judge(self, mutant: Mutant, timeout_s: float) -> Result:
        """See whether a mutant is killed."""
        began = time.monotonic()
        try:
            copy = self.mutate(mutant)
        except subprocess.CalledProcessError as error:
            return Result(mutant, "unproven", error.stderr.decode(errors="replace").strip(), time.monotonic() - began)
        verdict, said = self.test(copy, mutant.killer, timeout_s)
        if verdict == "survived" and mutant.killer.in_c:  # a race, which has to be met: twice is a fair chance
            verdict, said = self.test(copy, mutant.killer, timeout_s)
        shutil.rmtree(copy, ignore_errors=True)
        return Result(mutant, verdict, said, time.monotonic() - began)


def end_session(leader: int) -> None:
    """Kill what a test left behind: everything in the session that was started for it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if os.getsid(int(entry.name)) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


def table(results: list[Result]) -> Table:
    """Draw what became of them."""
    drawn = Table(box=None, header_style="bold")
    for heading in ("mutant", "promise", "test", "verdict", "said", "s"):
        drawn.add_column(heading, overflow="fold", justify="right" if heading == "s" else "left")
    for result in results:
        style = "green" if result.verdict == "killed" else "bold red"
        killer = f"{result.mutant.killer.name} {result.mutant.killer.sanitizer}".strip().removeprefix("tests/")
        verdict = f"[{style}]{result.verdict}[/]"
        said = result.said.replace("[", r"\[")[:120]
        drawn.add_row(result.mutant.name, result.mutant.promise, killer, verdict, said, f"{result.seconds:.0f}")
    return drawn


def main() -> int:
    """Judge what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="names without .patch (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=1 + (os.cpu_count() or 1), help="how many at once (default: one more than CPUs)"
    )
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every N-th, beginning at the (K modulo N)-th")
    arguments = parser.parse_args()
    turn, parts = map(int, arguments.part.split("/"))
    every = {path.stem: path for path in sorted(HERE.glob("*.patch"))}
    if unknown := set(arguments.names) - set(every):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = [read(every[name]) for name in arguments.names or list(every)[turn % parts :: parts]]
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as threads:
        workshop = Workshop(Path(directory))
        killers = list(dict.fromkeys(mutant.killer for mutant in mutants))
        in_python = threads.submit(workshop.together, killers)
        in_c = [killer for killer in killers if killer.in_c]
        clean = dict(zip(in_c, threads.map(workshop.unchanged, in_c), strict=True)) | in_python.result()
        unknown = [killer for killer in killers if killer not in clean]
        clean |= zip(unknown, threads.map(workshop.unchanged, unknown), strict=True)
        for killer in [one for one in killers if clean[one].verdict != "survived"]:
            clean[killer] = workshop.unchanged(
                killer
            )  # alone: beside others it had a load that no test promised to bear
        sound = [mutant for mutant in mutants if clean[mutant.killer].verdict == "survived"]
        results = [
            Result(one, "unproven", f"fails unpatched: {clean[one.killer].said}", 0)
            for one in mutants
            if one not in sound
        ]
        results += threads.map(lambda one: workshop.judge(one, clean[one.killer].patience_s), sound)
    console.print(table(results))
    alive = [result for result in results if result.verdict != "killed"]
    console.print(f"\n{len(results) - len(alive)} of {len(results)} mutants killed")
    for result in alive:
        console.print(f"[bold red]{result.verdict}[/]: {result.mutant.name}: {result.mutant.promise}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
