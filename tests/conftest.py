"""What many tests ask for."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mirror
import pytest
from apart import REPORTS, Apart, Hooks, Reporter
from cuda_evidence import Evidence, about
from machine import mappings

import uvas


def pytest_configure(config: pytest.Config) -> None:
    """Take interrupts, whoever started the tests: a shell lets what it starts in the background ignore them.

    And keep stderr for watchdogs: later it is captured, and what a process says that ends at once is lost. And let what
    OpenCL compiles go where it is thrown away: PoCL and pyopencl keep it at home otherwise.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mirror.stderr = os.dup(2)
    cache = tempfile.mkdtemp(prefix="uvas-opencl-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ.update(POCL_CACHE_DIR=cache, PYOPENCL_NO_CACHE="1")
    if REPORTS in os.environ:
        config.pluginmanager.register(Reporter(int(os.environ[REPORTS]), about))
        # What other libraries have to say of each other's versions is not what these tests are about.
        config.addinivalue_line("filterwarnings", "default::DeprecationWarning")
        config.addinivalue_line("filterwarnings", "default::FutureWarning")
        config.addinivalue_line("filterwarnings", "default::UserWarning")
    elif config.option.markexpr == "cuda":
        config.pluginmanager.add_hookspecs(Hooks)
        config.pluginmanager.register(Evidence())
        config.pluginmanager.register(Apart())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m cuda``, leave out what is written with Hypothesis where that is missing: a card does not need it."""
    if config.option.markexpr != "cuda" or collection_path.suffix != ".py":
        return None
    try:
        import hypothesis  # noqa: F401  # whether it is there
    except ImportError:
        return True if "\nfrom hypothesis" in collection_path.read_text() else None
    return None


def pytest_report_header() -> str:
    """Say what is not run by default."""
    return (
        f"uvas {uvas.__version__}; UVAS_FULL={os.environ.get('UVAS_FULL', '0')}; every test's chance has a fixed seed"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what takes minutes, unless asked for."""
    if os.environ.get("UVAS_FULL") != "1":
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: set UVAS_FULL=1"))


_settled: Path | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let collections look at what the tests of a module make, and at nothing older.

    Many tests collect, to see that nothing is left. All that pytest and the libraries have made by now is some hundred
    thousand objects, which take longer to look at than most tests take.
    """
    global _settled
    if item.path != _settled:
        _settled = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture
def space() -> Iterator[uvas.AddressSpace]:
    """A space; afterwards its invariants hold and the maps name nothing of it any more."""
    with uvas.AddressSpace(name="test") as one:
        yield one
        one.check()
        assert one.audit().findings == ()
    gc.collect()
    # What finalizers left is given back by a thread, which may be at it: the space goes after the last of it.
    mirror.until(lambda: not [one for one in mappings() if one.name == "/memfd:uvas:test (deleted)"], "the space goes")
