"""Every example in a docstring is right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import uvas

NOT_TO_IMPORT = {
    "uvas._core.build",  # runs under setuptools
    "uvas._core.libuvas",  # no module, though its name ends like one
    "uvas.__main__",
}
MAKES_THE_DEFAULT_SPACE = {"uvas.arrays"}  # which then lives as long as its process
FOUND = {module.name for module in pkgutil.walk_packages(uvas.__path__, "uvas.")}
MODULES = sorted({"uvas"} | FOUND - NOT_TO_IMPORT)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in MAKES_THE_DEFAULT_SPACE:
        program = f"import doctest, sys, {name}; sys.exit(doctest.testmod({name}, optionflags=doctest.ELLIPSIS).failed)"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in ("uvas.ranges", "uvas.errors") for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) > 5
