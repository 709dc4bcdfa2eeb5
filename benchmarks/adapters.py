"""Allocators to compare: the files under ``benchmarks/allocators/``, each made into a program of its own.

A ``.toml`` names a library whose calls look like malloc and free; a ``.c`` is for any other. README.md shows both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE

import uvas

__all__ = ["ALLOCATORS", "Allocator", "FailedError", "allocators"]

ALLOCATORS = HERE / "allocators"
# Some libraries want more thread-local room than a program that loads them late has to spare.
ENVIRONMENT = {**os.environ, "GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=65536"}
TIMEOUT_S = 3600


class FailedError(Exception):
    """An allocator did not do what a workload asks for, or not rightly."""


@dataclass(frozen=True, slots=True)
class Allocator:
    """One allocator, ready to run.

    Parameters
    ----------
    key
        The name of its file.
    name
        What tables call it.
    program
        The driver, with the adapter in it.
    library
        What it loads: a path, or a name that the dynamic linker finds.
    bound
        Not a peer but a limit: no allocator is called better or worse than it.
    alone
        It is for one thread only.
    """

    key: str
    name: str
    program: Path
    library: str
    bound: bool
    alone: bool

    def run(self, *keys: str) -> dict[str, float]:
        """Run one workload and return what it measured.

        Raises
        ------
        FailedError
            The library cannot be had, or the workload did not come to its end.
        """
        command = [str(self.program), self.library, *keys]
        try:
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FailedError(f"took more than {TIMEOUT_S} s") from None
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:]
            raise FailedError(last[0].removeprefix(f"{HERE}/") if last else f"ended with {done.returncode}")
        measured: dict[str, Any] = json.loads(done.stdout)
        if "missing" in measured:
            raise FailedError(measured["missing"])
        return measured


def allocators(directory: Path, libraries: Mapping[str, str]) -> tuple[list[Allocator], dict[str, str]]:
    """Build all of them.

    Parameters
    ----------
    directory
        Where the programs go.
    libraries
        Paths, by the names of adapters, of libraries that are not where they are looked for.

    Returns
    -------
    tuple
        Those that run, uvas first, and for the others the reason, with how to get them.
    """
    running, missing = [], {}
    for path in sorted(ALLOCATORS.glob("*.[ct]*"), key=lambda path: (path.stem != "uvas", path.stem)):
        program = _build(path, directory)
        about = json.loads(subprocess.run([program, "about"], check=True, stdout=subprocess.PIPE).stdout)
        library = libraries.get(path.stem) or _library(about["library"], about["package"])
        found = Allocator(path.stem, about["name"], program, library, about["bound"], about["alone"])
        try:
            found.run("kind=none")
        except FailedError as why:
            missing[found.name] = f"{why}; to get it: {about['get']}"
        else:
            running.append(found)
    return running, missing


def _library(name: str, package: str) -> str:
    """Return the path of a library that a Python package brings, or its bare name."""
    if package == "uvas":
        return uvas.get_library()
    try:
        files = importlib.metadata.files(package) if package else None
    except importlib.metadata.PackageNotFoundError:
        files = None
    return next((str(Path(str(file.locate())).resolve()) for file in files or [] if file.name == name), name)


def _build(path: Path, directory: Path) -> Path:
    program = directory / path.stem
    adapter = ALLOCATORS / "malloc_like.h" if path.suffix == ".toml" else path
    macros = _macros(tomllib.loads(path.read_text())) if path.suffix == ".toml" else []
    subprocess.run(
        [os.environ.get("CC", "gcc"), "-std=c11", "-O2", "-Wall", "-Wextra", f"-I{HERE / 'c'}", f"-I{ALLOCATORS}",
         f"-I{uvas.get_include()}", f'-DADAPTER="{adapter}"', *macros, str(HERE / "c" / "alloc.c"), "-pthread", "-ldl",
         "-o", str(program)],
        check=True,
    )  # fmt: skip
    return program


def _macros(data: Mapping[str, Any]) -> list[str]:
    """Return an adapter's data as the macros of malloc_like.h."""
    texts = {f"ADAPTER_{key.upper()}": data.get(key, "") for key in ("name", "library", "package", "get")}
    texts |= {
        f"LIBRARY_{key.upper()}": data[key] for key in ("alloc", "free", "usable", "aligned", "trim") if key in data
    }
    return [f'-D{name}="{text}"' for name, text in texts.items()] + [f"-DLIBRARY_TRIM_WITH={data.get('trim_with', 0)}"]
