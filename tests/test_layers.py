"""The structure of the house: imports go down, one function replaces mappings, every public name is documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uvas

PACKAGE = Path(uvas.__file__).parent
SOURCES = PACKAGE / "_core" / "src"

LAYERS = [  # from the ground up; a module imports from its own layer's left or from below
    {"uvas._core"},
    {"uvas.ranges", "uvas.interrupts"},
    {"uvas.arguments"},
    {"uvas.errors", "uvas.protection", "uvas.leases"},
    {"uvas.devices.base"},
    {"uvas.devices"},
    {"uvas.reports"},
    {"uvas.interop.view"},
    {"uvas.reservation"},
    {"uvas.ordered", "uvas.allocation"},
    {"uvas.movement", "uvas.audit"},
    {"uvas.space"},
    {"uvas.region", "uvas.measurement"},
    {"uvas.arena"},
    {"uvas.numpy_memory"},
    {"uvas.arrays", "uvas.interop"},
    {"uvas.maps"},
    {"uvas"},
    {"uvas.report"},
    {"uvas.maps.draw", "uvas.demo", "uvas.doctor"},
    {"uvas.maps.run"},
    {"uvas.cli"},
    {"uvas.__main__"},
]
# Of the C core, from the ground up; a file calls into its own storey or those below. Who is not named lives at the top.
STOREYS = [
    "vm vm_files vm_imitate vm_learn vm_maps vm_process userfault",  # system calls
    "lock nodes guide lookup registry survey",  # the registry
    "failure slots pieces maps limits search metadata directory streams",  # books and words
    "pager moves guard requests residency chores mirrors",  # memory that moves
    "record reserve release space party lease audit change host commit decommit map_fd movement",  # spaces
    "",  # arenas, with all that is in them, and order.c
]
EVERYWHERE = {"core"}  # sets up and forks the whole house: it calls all, and all call it
UPWARD = {("space", "region")}  # a device that comes asks whether an arena has put up guards
WORKER = "uvas.devices.worker"  # the program that runs in the worker process: a user of the whole library


def layer_of(module: str) -> int:
    """The height of the longest prefix that has one."""
    heights = {name: height for height, names in enumerate(LAYERS) for name in names}
    while module not in heights:
        module = module.rpartition(".")[0]
    return heights[module]


def modules() -> dict[str, Path]:
    """Every module of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("uvas", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """What a module imports of the package, imports for type checking apart."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = modules()
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else node.module
                for alias in node.names
            }
    return {name for name in found if name == "uvas" or name.startswith("uvas.")}


@pytest.mark.parametrize("module", sorted(set(modules()) - {WORKER}))
def test_imports_go_down(module: str) -> None:
    for imported in imports_of(modules()[module]):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported} from above"


def test_devices_know_nothing_of_spaces() -> None:
    for module, path in modules().items():
        if module.startswith("uvas.devices") and module != WORKER:
            assert not imports_of(path) & {"uvas", "uvas.space", "uvas.reservation"}, module


def without_comments(source: str) -> str:
    """C or Python source without comments and strings."""
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    return re.sub(r'"(\\.|[^"\\])*"', '""', source)


def test_the_destructive_flag_occurs_in_one_function_of_one_file() -> None:
    found = []
    for path in SOURCES.glob("*.[ch]"):
        function = ""
        for line in without_comments(path.read_text()).splitlines():
            if re.match(r"^[a-z].*\(.*\{$", line):
                function = line.split("(")[0].split()[-1].lstrip("*")
            if re.search(r"\bMAP_FIXED\b", line):
                found.append((path.name, function))
    assert found == [("vm.c", "uvas_vm_overlay")]
    for path in PACKAGE.rglob("*.py"):
        if path.name != "clobber.py":  # the program that shows the harm
            names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
            assert "MAP_FIXED" not in names, path


def test_system_calls_are_made_on_the_ground_floor() -> None:
    calls = re.compile(
        r"\b(syscall|mmap|munmap|mprotect|madvise|ioctl|open|openat|read|write|close|memfd_create|ftruncate)\s*\("
    )
    found = {path.name for path in SOURCES.glob("*.[ch]") if calls.search(without_comments(path.read_text()))}
    vm = {path.name for path in SOURCES.glob("vm*.c")}
    assert "vm.c" in found
    assert found <= vm | {"vm_call.h", "userfault.c"}
    assert {path.name for path in SOURCES.glob("*.[ch]") if '#include "vm_call.h"' in path.read_text()} <= vm


def test_the_replacing_call_is_made_where_a_range_is_pinned() -> None:
    users = {path.name for path in SOURCES.glob("*.c") if "uvas_vm_overlay(" in without_comments(path.read_text())}
    assert users == {"vm.c", "host.c", "audit.c"}


def storey_of(file: str) -> int:
    """How high a C file lives."""
    return next((height for height, files in enumerate(STOREYS) if file in files.split()), len(STOREYS) - 1)


def definitions_of(path: Path) -> set[str]:
    """The functions and variables that a C file has for others."""
    source = without_comments(path.read_text())
    functions = re.findall(
        r"^(?!static |extern |typedef |UVAS_FLAT )[a-z_].*?\b(uvas_\w+)\([^;{]*\{", source, re.MULTILINE
    )
    variables = re.findall(
        r"^(?!static |extern |typedef )[a-zA-Z_][\w ()*]*?\b(uvas_\w+)(?:\[\w*\])?(?: =[^=].*)?;", source, re.MULTILINE
    )
    return {*functions, *variables}


def test_arrows_in_the_core_go_down() -> None:
    sources = {path.stem: path for path in SOURCES.glob("*.c")}
    home = {name: file for file, path in sources.items() for name in definitions_of(path)}
    assert [home[name] for name in ("uvas_vm_overlay", "uvas_book", "uvas_commit")] == ["vm", "nodes", "commit"]
    assert not {file for files in STOREYS for file in files.split()} - set(sources), (
        "a storey names a file that is not there"
    )
    upward = set()
    for file, path in sources.items():
        used = re.sub(r"\b(struct|enum) \w+", "", without_comments(path.read_text()))
        for name in set(re.findall(r"\buvas_\w+", used)) & set(home):
            if storey_of(home[name]) > storey_of(file) and not EVERYWHERE & {file, home[name]}:
                upward.add((file, home[name]))
    assert upward == UPWARD, f"{sorted(upward ^ UPWARD)}: the first calls the second, which lives above it"


@pytest.mark.parametrize("name", uvas.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(uvas, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing) and thing.__module__.startswith("uvas"):
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(value):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def test_the_c_header_stands_alone_and_every_function_is_exported() -> None:
    header = (PACKAGE / "_core" / "include" / "uvas.h").read_text()
    declared = set(re.findall(r"UVAS_API [^;]*?\b(uvas_\w+)\(", header))
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", uvas.get_library()], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert declared <= exported
    assert {name for name in exported if name.startswith("uvas_")} - declared == {"uvas_copy_in_use"}


def test_importing_is_quick_and_needs_nothing_but_numpy() -> None:
    program = "import numpy, sys; before = set(sys.modules); import uvas; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    for heavy in ("rich", "multiprocessing", "concurrent.futures", "cupy", "pyopencl", "cffi", "pycparser", "argparse"):
        assert heavy not in loaded


def test_no_private_macro_hides_a_public_name():
    """A macro replaces an enumerator of the same name without a word from the compiler."""
    public = set(re.findall(r"\bUVAS_\w+", (PACKAGE / "_core" / "include" / "uvas.h").read_text()))
    private = {
        name for path in SOURCES.glob("*.[ch]") for name in re.findall(r"^#\s*define\s+(\w+)", path.read_text(), re.M)
    }
    assert private & public == set()
