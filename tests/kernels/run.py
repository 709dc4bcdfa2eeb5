"""Run the core on kernels that behave otherwise: real ones, not the knob of ``uvas_test_kernel``.

    python tests/kernels/run.py                   those whose tools are here; the others are skipped, and it is said why
    python tests/kernels/run.py --install         what is missing is installed first: by apt, as root, on Debian
    python tests/kernels/run.py gvisor alpha      some of them
    python tests/kernels/run.py --json FILE       also write what was seen
    python tests/kernels/run.py --record          all of them, to benchmarks/results/kernels.json; and --readme
    python tests/kernels/run.py --readme          only make the README's table from that file

On each: what ``uvas_platform`` says and whether it is so (`test_platform`), the registry against its model, the
lock-free readers, and the race of our threads against hostile ones (`stress_space`), whose oracle is everybody's
bytes. Under gVisor Python runs as well: ``uvas demo`` reserves matching ranges with two worker processes while
squatters map there too, and verifies everybody's bytes and every answer. The exit code is 0 if all that ran was good.

qemu-user translates system calls to this machine's kernel: it is a kernel of its own in what it knows of mmap, and a
machine of its own in page size and byte order. gVisor is a kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
README = PROJECT / "README.md"
EVIDENCE = PROJECT / "benchmarks" / "results" / "kernels.json"
BEGIN, END = "<!-- table: kernels -->\n", "<!-- end: kernels -->"
sys.path.insert(0, str(HERE.parent))

from c.run import CORE, Builder, tests  # noqa: E402  # beside this directory, which is no package

TIMEOUT_S = 120
ARENAS = ("gvisor", "aarch64")  # where pages have 4 KiB, and threads are not too slow
FLAGS = {1: "honoured", 2: "answers ENOMEM", 3: "ignored: moves", 4: "replaces on partial overlap", 5: "refused"}
RACE = re.compile(r"ok stress_space .*?: (\d+) reserved, .*? (\d+) foreign")


@dataclass(frozen=True)
class Kernel:
    """Where programs run."""

    name: str
    title: str
    command: tuple[str, ...] = ()
    """What runs a program there."""
    cc: str = "gcc"
    packages: tuple[str, ...] = ()
    """Debian's, for the command and the compiler."""
    python: bool = False
    """Whether this machine's Python runs there."""
    refuses: str = ""
    """What the core says when it does not compile for that machine, and must not."""
    aligns: str = ""
    """Where shared mappings start on the real machine, if not at every page."""

    @property
    def missing(self) -> list[str]:
        """The programs that are not here."""
        return [program for program in (*self.command[:1], self.cc) if shutil.which(program) is None]


def qemu(
    name: str,
    title: str,
    triplet: str,
    *packages: str,
    page_size: int | None = None,
    refuses: str = "",
    aligns: str = "",
) -> Kernel:
    """Describe an architecture under qemu-user."""
    pages = ("-p", str(page_size)) if page_size else ()
    command = (f"qemu-{triplet.partition('-')[0]}", *pages, "-L", f"/usr/{triplet}")
    needed = ("qemu-user", f"gcc-{triplet}", *packages)
    return Kernel(name, title, command, f"{triplet}-gcc", needed, refuses=refuses, aligns=aligns)


ARM = ("aarch64-linux-gnu", "libc6-dev-arm64-cross")
KERNELS = [
    Kernel("native", f"{platform.system()} {platform.release()} {platform.machine()}", python=True),
    Kernel(
        "gvisor",
        "gVisor (runsc)",
        ("runsc", "--platform=ptrace", "--network=none", "do"),
        packages=("runsc",),
        python=True,
    ),
    qemu("aarch64", "qemu-user, aarch64, 4 KiB pages", *ARM),
    qemu("aarch64-64k", "qemu-user, aarch64, 64 KiB pages", *ARM, page_size=65536),
    qemu("alpha", "qemu-user, alpha: the flag is 0x200000", "alpha-linux-gnu", "libc6.1-dev-alpha-cross"),
    qemu(
        "sparc64",
        "qemu-user, sparc64: big-endian",
        "sparc64-linux-gnu",
        "libc6-dev-sparc64-cross",
        aligns="16 KiB",
    ),
    qemu(
        "mips64el",
        "qemu-user, mips64el",
        "mips64el-linux-gnuabi64",
        "libc6-dev-mips64el-cross",
        aligns="up to 256 KiB",
    ),
    qemu(
        "hppa",
        "qemu-user, hppa: 32 bits",
        "hppa-linux-gnu",
        "libc6-dev-hppa-cross",
        refuses="uvas knows 64-bit Linux only",
        aligns="4 MiB",
    ),
]


@dataclass
class Seen:
    """What was seen on a kernel."""

    kernel: str
    skipped: str = ""
    refused: str = ""
    """What the core said instead of compiling, as it has to."""
    aligns: str = ""
    """Where shared mappings start on the real machine, if not at every page."""
    platform: dict[str, int] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    reserved: int = 0
    """Reservations made in the race."""
    foreign: int = 0
    """Mappings that hostile threads made, and found as they had left them."""
    matched: int | None = None
    """Ranges that the host and two worker processes agreed on."""


def run(command: list[str]) -> tuple[int, str, str]:
    """Run to the end; output through files: what runsc writes into a pipe may be cut."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaints:
        try:
            code = subprocess.run(command, stdout=out, stderr=complaints, timeout=TIMEOUT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
            complaints.write(f"not done after {TIMEOUT_S} s")
        out.seek(0)
        complaints.seek(0)
        return code, out.read(), complaints.read()


def install(kernels: list[Kernel]) -> None:
    """Install what is missing, if that is possible."""
    packages = sorted({package for kernel in kernels if kernel.missing for package in kernel.packages})
    if not packages or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*get, "update"], env=environment, check=False, capture_output=True)
    for package in packages:  # one that does not exist here must not keep the others out
        subprocess.run(
            [*get, "install", "-y", "--no-install-recommends", package],
            env=environment,
            check=False,
            capture_output=True,
        )


def look(kernel: Kernel) -> Seen:
    """Run everything on a kernel."""
    seen = Seen(kernel.title, aligns=kernel.aligns)
    if kernel.missing:
        seen.skipped = f"{' and '.join(kernel.missing)} not found: apt install {' '.join(kernel.packages)}"
        return seen
    if kernel.name == "gvisor":
        code, _, why = run([*kernel.command, "true"])
        if code:
            seen.skipped = f"does not start here: {why.strip().splitlines()[-1:] or code}"
            return seen
    if kernel.refuses:
        command = [kernel.cc, "-std=c11", f"-I{CORE / 'include'}", "-fsyntax-only", str(CORE / "src" / "vm.c")]
        code, _, why = run(command)
        print(f"{kernel.name}: {' '.join(command[:1])}: exit code {code}\n{why}", end="", flush=True)
        if code and kernel.refuses in why:
            seen.refused = kernel.refuses
        else:
            seen.failed.append("refusal to compile")
        return seen
    with tempfile.TemporaryDirectory() as directory:
        for name, program in Builder(Path(directory), cc=kernel.cc).build(tests_for(kernel)).items():
            code, said, complaints = run_test(kernel, program)
            print(f"{kernel.name}: {name}: exit code {code}\n{said}{complaints}", end="", flush=True)
            (seen.failed if code else seen.passed).append(name)
            if code == 0 and name == "test_platform":
                seen.platform = json.loads(said)
            if code == 0 and (race := RACE.search(said)):
                seen.reserved, seen.foreign = int(race[1]), int(race[2])
    if kernel.python:
        code, said, complaints = run([*kernel.command, sys.executable, "-m", "uvas", "demo", "--json"])
        print(f"{kernel.name}: uvas demo: exit code {code}\n{said}{complaints}", end="", flush=True)
        report = json.loads(said) if said.startswith("{") else {}
        (seen.passed if kept_its_word(report) else seen.failed).append("uvas demo")
        seen.matched = report.get("reserved")
    return seen


def run_test(kernel: Kernel, program: Path) -> tuple[int, str, str]:
    """Run a program; once more if it fails on an emulated kernel.

    qemu-user writes /proc/self/maps itself, mapping by mapping: once in a while it shows what never was.
    """
    command = [*kernel.command, str(program)]
    done = run(command)
    return run(command) if done[0] and kernel.command else done


def tests_for(kernel: Kernel) -> list[str]:
    """Leave out what makes no sense there.

    Emulated kernels do not know which pages are in RAM, which `test_arena_memory` asks; and all tests of arenas take
    pages of 4 KiB for granted. The pager needs userfaultfd, which only this kernel has.
    """
    everywhere = [name for name in tests() if "pager" not in name]
    if not kernel.command:
        return everywhere
    left_out = "test_arena_memory" if kernel.name in ARENAS else "test_arena"
    return [name for name in everywhere if not name.startswith(left_out)]


def kept_its_word(report: dict[str, int]) -> bool:
    """Tell whether the demo lost nothing. Its exit code also wants MAP_FIXED to do harm: luck, on a slow kernel."""
    return (
        report.get("reserved", 0) > 0
        and report["squatter_bytes_lost"] == 0
        and report["audit_findings"] == 0
        and report["right_answers"] == report["queries"]
    )


HEADINGS = (
    "kernel",
    "page",
    "the flag",
    "`PROCMAP_QUERY`",
    "guards",
    "tag",
    "shared memory starts at multiples of",
    "race: our reservations / strangers' mappings",
    "with two workers",
    "tests",
)


def cells(seen: Seen) -> tuple[str, ...]:
    """Return what was seen as words, one for each heading."""
    said = seen.platform
    if seen.failed or not said:
        why = seen.refused and f"does not compile, as it should: {seen.refused}"
        why = f"FAILED: {', '.join(seen.failed)}" if seen.failed else why or f"skipped: {seen.skipped}"
        return seen.kernel, *[""] * (len(HEADINGS) - 2), why
    yes = ["no", "yes"]
    real = f" (the real machine: {seen.aligns})" if seen.aligns else ""
    return (
        seen.kernel,
        f"{said['page_size'] >> 10} KiB",
        FLAGS[said["flag"]],
        yes[said["procmap_query"]],
        yes[said["guard"]],
        yes[said["tag"]],
        f"{said['shared_alignment'] >> 10} KiB{real}",
        f"{seen.reserved:,} / {seen.foreign:,}",
        "" if seen.matched is None else f"{seen.matched} ranges",
        f"{len(seen.passed)} good",
    )


def table(every: list[Seen]) -> Table:
    """Draw what was seen."""
    drawn = Table(box=None, header_style="bold")
    for heading in HEADINGS:
        drawn.add_column(heading.replace("`", ""), overflow="fold")
    for seen in every:
        drawn.add_row(*cells(seen), style="bold red" if seen.failed else "")
    return drawn


def machine() -> dict[str, str]:
    """Return what all of it ran on."""
    versions = {
        name: run([command, "--version"])[1].partition("\n")[0]
        for name, command in (("qemu", "qemu-aarch64"), ("runsc", "runsc"), ("gcc", "gcc"))
        if shutil.which(command)
    }
    commit = run(["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"])[1].strip()
    return {"kernel": platform.release(), "machine": platform.machine(), **versions, "commit": commit}


def write_readme() -> None:
    """Make the README's table from the evidence."""
    evidence = json.loads(EVIDENCE.read_text())
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(cells(Seen(**seen)) for seen in evidence["seen"])]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + lines + END + after)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kernel.name for kernel in KERNELS]
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--but", metavar="KERNEL", choices=names, help="not this one")
    parser.add_argument("--install", action="store_true", help="install what is missing, as root on Debian")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was seen")
    parser.add_argument(
        "--record", action="store_true", help="write it to benchmarks/results/kernels.json and the README"
    )
    parser.add_argument("--readme", action="store_true", help="run nothing: make the README's table from that file")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}")
    if arguments.record and (arguments.names or arguments.but):
        parser.error("the record is of all kernels")
    if arguments.readme:
        write_readme()
        return 0
    wanted = set(arguments.names or names) - {arguments.but}
    kernels = [kernel for kernel in KERNELS if kernel.name in wanted]
    if arguments.install:
        install(kernels)
    every = [look(kernel) for kernel in kernels]
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table(every))
    evidence = json.dumps({"machine": machine(), "seen": [asdict(seen) for seen in every]}, indent=1) + "\n"
    for file in [*([arguments.json] if arguments.json else []), *([EVIDENCE] if arguments.record else [])]:
        file.write_text(evidence)
    if arguments.record:
        write_readme()
    return 1 if any(seen.failed for seen in every) else 0


if __name__ == "__main__":
    sys.exit(main())
