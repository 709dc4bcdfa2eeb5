"""What is built and installed: wheel, sdist, editable install, and the library as C programs meet it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from uvas._core import get_include, get_library

ROOT = Path(__file__).parents[2]
LINKED = Path(__file__).parent / "linked"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
MODULE_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") if FREE_THREADED else ".abi3.so"

USE = """
import sys
from pathlib import Path
from uvas import _core
from uvas.errors import failure

home = Path(sys.argv[1]).resolve()
assert home in Path(_core.__file__).resolve().parents, _core.__file__
assert home in Path(_core.get_library()).resolve().parents
assert Path(_core.get_include(), "uvas.h").is_file()
space, out = _core.ffi.new("uvas_id *"), _core.ffi.new("struct uvas_reservation *")
if code := _core.lib.uvas_space_open(_core.ffi.NULL, space) or _core.lib.uvas_reserve(space[0], 1, _core.ffi.NULL, out):
    raise failure(code)
assert _core.fast.find(out.base) == out.id
python_side = {"cffi", "pycparser", "setuptools"} & set(sys.modules)
assert not python_side, python_side
print("works")
"""


def run(*command, **options):
    """Run a command and return what it printed; what it complained of is in the error."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_the_sources(target: Path) -> Path:
    """Copy what a fresh clone has: nothing that was built."""
    ignore = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "benchmarks")
    return shutil.copytree(ROOT, target, ignore=ignore)


# ---- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist from the sources, and the wheel from the sdist."""
    directory = tmp_path_factory.mktemp("built")
    sources = copy_of_the_sources(directory / "sources")
    run(sys.executable, "-m", "build", "--outdir", directory, sources, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def wheel(built):
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_sdist_has_all_that_the_build_reads(built):
    with tarfile.open(built / f"uvas-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "uvas").rglob("*.[ch]")}
    assert here
    assert {"pyproject.toml", "LICENSE", "README.md", "uvas/_core/build.py", "uvas/py.typed"} | here <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_is_for_every_python_and_holds_no_leftovers(wheel):
    tag = wheel.name.removeprefix(f"uvas-{VERSION}-")
    assert FREE_THREADED or tag.startswith("cp311-abi3-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "uvas").rglob("*.py")} - {"uvas/_core/build.py"}
    assert {name for name in names if name.endswith(".py")} == modules
    core = {name.removeprefix("uvas/_core/") for name in names if name.startswith("uvas/_core/")}
    assert core == {
        "__init__.py",
        "_allocation.pyi",
        "_cffi.pyi",
        "_fast.pyi",
        "_handler.pyi",
        "include/uvas.h",
        "libuvas.so",
        f"_allocation{MODULE_SUFFIX}",
        f"_cffi{MODULE_SUFFIX}",
        f"_fast{MODULE_SUFFIX}",
        f"_handler{MODULE_SUFFIX}",
    }
    assert "uvas/py.typed" in names
    assert all(name.startswith("uvas/") for name in names)
    assert {Path(name).suffix for name in names} <= {".py", ".pyi", ".typed", ".so", ".h"}


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    home = tmp_path / "home"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", home, wheel)
    # Before any other uvas on the path, and from outside the sources.
    printed = run(sys.executable, "-c", USE, home, cwd=tmp_path, env={"PYTHONPATH": str(home)})
    assert printed == "works\n"
    dynamic = run("readelf", "-d", home / "uvas" / "_core" / f"_fast{MODULE_SUFFIX}")
    assert "[libuvas.so]" in dynamic
    assert "$ORIGIN" in dynamic


@pytest.mark.slow
def test_editable_install_works_from_outside(tmp_path):
    sources = copy_of_the_sources(tmp_path / "sources")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", sources)
    # The dependencies are taken from where these tests run.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("platlib"))
    assert run(python, "-c", USE, sources, cwd=tmp_path) == "works\n"


# ---- C


@pytest.fixture(scope="module")
def compiler():
    return [*(sysconfig.get_config_var("CC") or "cc").split(), "-std=c11", "-Wall", "-Wextra", "-Werror"]


@pytest.mark.parametrize("link", ["by path", "by name"])
def test_a_c_program_runs_without_python(compiler, link, tmp_path):
    library = Path(get_library())
    how = [library] if link == "by path" else [f"-L{library.parent}", "-luvas"]
    program = tmp_path / "program"
    run(*compiler, f"-I{get_include()}", LINKED / "program.c", *how, f"-Wl,-rpath,{library.parent}", "-o", program)
    assert run(program, cwd="/", env={}) == "good\n"
    loaded = run("ldd", program)
    assert f"libuvas.so => {library}" in loaded
    assert "python" not in loaded.replace(str(library), "")


def test_the_library_is_c_without_python():
    dynamic = run("readelf", "-d", get_library())
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed
    assert {name.split(".")[0] for name in needed} <= {
        "libc",
        "libdl",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "Library soname: [libuvas.so]" in dynamic
    symbols = run("nm", "-D", "--defined-only", get_library()).splitlines()
    names = [symbol.split()[2] for symbol in symbols]
    assert "uvas_reserve" in names
    assert [name for name in names if not name.startswith("uvas_")] == []


ONE_REGISTRY = """
import ctypes, sys
from pathlib import Path
other = ctypes.CDLL(sys.argv[1])
other.other_library_reserves.restype = ctypes.c_size_t
before = other.other_library_reserves()
from uvas._core import fast
after = other.other_library_reserves()
assert before and after and before != after
assert fast.find(before) and fast.find(after) and fast.find(before) != fast.find(after)
copies = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libuvas.so" in line}
assert len(copies) == 1, copies
print("one")
"""


def test_another_library_that_links_it_shares_the_registry(compiler, tmp_path):
    directory = Path(get_library()).parent
    other = tmp_path / "libother.so"
    link = [f"-L{directory}", "-luvas", f"-Wl,-rpath,{directory}"]
    run(*compiler, "-shared", "-fPIC", f"-I{get_include()}", LINKED / "library.c", *link, "-o", other)
    assert run(sys.executable, "-c", ONE_REGISTRY, other, cwd=tmp_path) == "one\n"


TWO_COPIES = """
import ctypes, errno, sys
from uvas._core import ffi, lib
assert lib.uvas_platform(ffi.new("struct uvas_platform *")) == 0
second = ctypes.CDLL(sys.argv[1])
assert second.uvas_platform(ctypes.create_string_buffer(256)) == -errno.ENOTSUP
print("refused")
"""


def test_sources_that_are_not_built_say_so(tmp_path):
    sources = copy_of_the_sources(tmp_path / "sources")
    done = subprocess.run(
        [sys.executable, "-c", "import uvas"], cwd=sources, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: the C parts of uvas are not built in {sources / 'uvas' / '_core'}: build them" in done.stderr


def test_a_second_copy_refuses_to_work(tmp_path):
    second = shutil.copy(get_library(), tmp_path)
    assert run(sys.executable, "-c", TWO_COPIES, second, cwd=tmp_path) == "refused\n"
