"""What holds after every test of devices: nothing is left."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import machine
import on_device
import pytest

import uvas

pytest.register_assert_rewrite("cuda_cards", "cupy_in_tests")  # fixtures of several files here, which tell what is left


def children() -> set[int]:
    """The process ids of this process's children, zombies too."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


_OURS = ("uvas", "[userfaultfd]", "[pidfd]")
"""What the targets of uvas's own descriptors have in them. A GPU's driver opens others, and keeps them."""


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember that a test has failed."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, no descriptor, no range of addresses."""
    card = request.node.get_closest_marker("cuda")

    def left() -> tuple[set[str], set[int]]:
        opened = machine.descriptors()
        return {one for one in opened if not card or any(word in one for word in _OURS)}, children()

    gc.collect()
    gc.freeze()  # what is there is no test's: the collections below need not look at all of CuPy and pandas each time
    before = left()
    assert uvas.AddressSpace.__name__  # the library is loaded before anything is counted
    yield
    if request.node.stash[_failed]:  # the frames of its error hold what it had, for as long as anybody waits
        return
    patience = 3 if card else 10  # what was let go of without a word is buried by threads
    deadline = time.monotonic() + patience
    while gc.collect() >= 0 and left() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left() == before


MEMORIES: dict[str, dict[str, Any]] = {
    "shared": {"memory": "shared"},
    "private": {"memory": "private", "granule": machine.PAGE},  # the tests count in pages
}


@pytest.fixture(scope="module", params=list(MEMORIES))
def memory(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How to make workers: with memory that is shared, and with memory of their own."""
    return MEMORIES[request.param]


@pytest.fixture
def device(memory: dict[str, Any]) -> Iterator[uvas.ProcessDevice]:
    """A worker."""
    with uvas.ProcessDevice(name="gpu0", **memory) as one:
        yield one


@pytest.fixture(scope="module")
def worker(memory: dict[str, Any]) -> Iterator[uvas.ProcessDevice]:
    """A worker for all tests of a module: starting one costs more than most of them do."""
    with uvas.ProcessDevice(name="gpu0", **memory) as one:
        yield one


@pytest.fixture
def reused(worker: uvas.ProcessDevice) -> Iterator[uvas.ProcessDevice]:
    """That worker, in which nothing stays of a test."""
    yield worker
    worker.run(on_device.drop)


@pytest.fixture
def space(device: uvas.ProcessDevice) -> Iterator[uvas.AddressSpace]:
    """A space with that worker, which leaves the maps as they were."""
    with uvas.AddressSpace([device], name="tested") as one:
        yield one
        one.check()
    assert not [mapping for mapping in machine.mappings() if "uvas:tested" in mapping.name]


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    """A named pipe: opening it waits for the other side."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return str(path)
