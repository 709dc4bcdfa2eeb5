"""Build the C parts of uvas. setuptools runs this file (see pyproject.toml); it is not installed.

These come out, beside each other in ``uvas/_core``:

``libuvas.so``
    All of ``src/*.c``, linked to libc only: no Python in it. Its SONAME is its file name. A wheel cannot hold symbolic
    links, and a second file under another name would be a second copy of the registry; so there is one file, one name,
    and the version is asked of ``uvas_abi_version()``.
``_cffi``
    The cffi module. Its declarations are the part of ``include/uvas.h`` between the cffi marks.
``_fast``, ``_allocation``, ``_handler``
    The calls that keep the GIL, written by hand: lookups (``_fast.c``), the blocks of arenas (``allocation/*.c``), and
    what NumPy asks for memory (``handler/*.c``).

All modules find the library beside themselves (``$ORIGIN``) and use the limited API, so that one wheel serves every
Python from 3.11 on. Free-threaded Pythons have no limited API: there they are built for the one Python at hand.

``CC``, ``CFLAGS`` and ``LDFLAGS`` are honoured and come last: ``CFLAGS='-O0 -g3' pip install -e .`` is a debug build.
"""

from __future__ import annotations

import os
import re
import shlex
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cffi
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.modified import newer_group

LIBRARY = "uvas._core.libuvas"
LIBRARY_FILE = "libuvas.so"

HERE = Path("uvas/_core")  # setuptools builds from the project's root, and wants relative paths
INCLUDE = HERE / "include"
HEADER = INCLUDE / "uvas.h"

COMPILE = ["-std=c11", "-O2", "-g", "-pthread", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
LINK = [
    "-shared",
    "-pthread",
    f"-Wl,-soname,{LIBRARY_FILE}",
    "-Wl,--no-undefined",
    "-Wl,-z,nodelete",  # its fork handlers and threads outlive any dlclose
    "-Wl,-z,now",  # uvas_find is async-signal-safe; the loader's lock, which lazy binding takes, is not
    "-ldl",
]
MODULE_COMPILE = ["-fvisibility=hidden"]  # beside what Python gives: what a module's files share is theirs alone

LIMITED_API = "0x030B0000"  # Python 3.11
LIMITED_TAG = "cp311"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# What the core calls when a device is written in Python; uvas/devices/adapter.py is behind them, and uvas/arena.py is
# behind the last.
CALLBACKS = """
extern "Python" int uvas_py_claim(void *, uintptr_t, size_t, struct uvas_obstacle *);
extern "Python" int uvas_py_unclaim(void *, uintptr_t, size_t);
extern "Python" int uvas_py_commit(void *, uintptr_t, size_t, const struct uvas_backing_info *, uint32_t);
extern "Python" int uvas_py_decommit(void *, uintptr_t, size_t);
extern "Python" int uvas_py_protect(void *, uintptr_t, size_t, uint32_t);
extern "Python" void uvas_py_start_claim(void *, uintptr_t, size_t);
extern "Python" int uvas_py_exhausted(void *, size_t);
extern "Python" int uvas_py_order_wait(void *, size_t, uintptr_t *);
"""


def declarations(header: str) -> str:
    """Return what cffi's ``cdef`` shall read of the public header."""
    marked = re.search(r"/\* cffi: begin.*?\*/(.*)/\* cffi: end \*/", header, re.DOTALL)
    if marked is None:
        raise ValueError(f"{HEADER} has lost its cffi marks")
    return marked.group(1).replace("UVAS_API ", "") + CALLBACKS


def write_module(header: Path, target: Path) -> None:
    """Write the C source of the cffi module."""
    ffi = cffi.FFI()
    ffi.cdef(declarations(header.read_text()))
    ffi.set_source("uvas._core._cffi", '#include "uvas.h"')
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


def flags(variable: str) -> list[str]:
    """Return the words of an environment variable."""
    return shlex.split(os.environ.get(variable, ""))


class BuildExt(build_ext):
    """Build ``libuvas.so`` first, then the modules that link to it."""

    def finalize_options(self) -> None:
        """Complete what pyproject.toml cannot say about them."""
        super().finalize_options()
        for extension in self.extensions:
            if extension.name == LIBRARY:
                extension.sources = sorted(map(str, HERE.glob("src/*.c")))
                extension.depends = sorted(map(str, [HEADER, *HERE.glob("src/*.h"), HERE / "build.py"]))
            else:
                self.complete_module(extension)

    def complete_module(self, module: Extension) -> None:
        """Link a module to the library beside it. By assignment: setuptools may finalize more than once."""
        folder = HERE / module.name.rpartition("._")[2]  # of a module that has more than one file
        module.sources = sorted(map(str, folder.glob("*.c"))) or module.sources
        module.include_dirs = [str(INCLUDE)]
        module.extra_compile_args = MODULE_COMPILE
        module.libraries = ["uvas"]
        module.library_dirs = [str(Path(self.build_lib, HERE))]
        module.extra_link_args = ["-Wl,-rpath,$ORIGIN"]
        module.depends = sorted(map(str, [HEADER, *folder.glob("*.h"), HERE / "build.py"]))
        module.py_limited_api = not FREE_THREADED
        module.define_macros = [] if FREE_THREADED else [("Py_LIMITED_API", LIMITED_API)]

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file's name, in the directories of the package as far as they are given."""
        if fullname.rpartition(".")[2] == LIBRARY.rpartition(".")[2]:
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Build the library before the modules, which setuptools may build side by side."""
        extensions = self.extensions
        for extension in extensions:
            if extension.name == LIBRARY:
                self.build_library(extension)
        self.extensions = [extension for extension in extensions if extension.name != LIBRARY]
        try:
            super().build_extensions()
        finally:
            self.extensions = extensions

    def build_library(self, library: Extension) -> None:
        """Compile and link ``libuvas.so``, unless it is newer than all that it is made of.

        Not by Python's own compiler settings: they are for modules, and differ from one Python to the next.
        """
        target = Path(self.get_ext_fullpath(library.name))
        if not self.force and not newer_group([*library.sources, *library.depends], str(target), "newer"):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = flags("CC") or shlex.split(sysconfig.get_config_var("CC") or "cc")
        # Objects in a directory of this build's own, and a rename at the end: builds side by side do not meet.
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            objects = [str(Path(temporary, f"{Path(source).stem}.o")) for source in library.sources]

            def compile_one(source: str, result: str) -> None:
                self.spawn([*compiler, *COMPILE, f"-I{INCLUDE}", *flags("CFLAGS"), "-c", source, "-o", result])

            with ThreadPoolExecutor(os.cpu_count()) as threads:
                list(threads.map(compile_one, library.sources, objects))
            linked = Path(temporary, LIBRARY_FILE)
            self.spawn([*compiler, *flags("CFLAGS"), *objects, *LINK, *flags("LDFLAGS"), "-o", str(linked)])
            linked.replace(target)

    def swig_sources(self, sources: list[str], extension: Extension) -> list[str]:
        """Put the generated C source in the place of the header (the step where setuptools turns sources into C)."""
        if str(HEADER) not in sources:
            return super().swig_sources(sources, extension)
        generated = Path(self.build_temp, HERE, "_cffi.c")
        write_module(HEADER, generated)
        return [str(generated)]

    def copy_file(self, infile: Any, outfile: Any, *arguments: Any, **options: Any) -> Any:
        """Copy by renaming: a process that runs from this tree keeps the file that it has mapped."""
        fresh = f"{outfile}.{os.getpid()}"
        super().copy_file(infile, fresh, *arguments, **options)
        Path(fresh).replace(outfile)
        return outfile, True


class BuildPy(build_py):
    """Leave this file out of what is installed."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("uvas._core", "build")]


class BdistWheel(bdist_wheel):
    """Tag the wheel for every Python that it serves."""

    def initialize_options(self) -> None:
        """Set the tag of the limited API, where it was used."""
        super().initialize_options()
        self.py_limited_api = False if FREE_THREADED else LIMITED_TAG


class Sdist(sdist):
    """Hold all that building, testing and the examples need, beside the Python modules."""

    def make_distribution(self) -> None:
        """Add the trees that setuptools does not know of, without what builds and tests leave in them."""
        for tree in ("uvas", "tests", "examples"):
            self.filelist.extend([str(path) for path in sorted(Path(tree).rglob("*")) if path.is_file()])
        self.filelist.exclude_pattern(r"\.(py[cod]|so|o)$", is_regex=True)
        self.filelist.remove_duplicates()
        super().make_distribution()
