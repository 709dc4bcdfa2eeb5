"""Stages for scenarios of mirrored memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from mirror import MEMORIES, Memory, Mirror, watched


@pytest.fixture(scope="module", params=MEMORIES)
def stage(request: pytest.FixtureRequest) -> Iterator[Mirror]:
    """Two devices and their space, for all tests of a module: of private memory, then of shared."""
    with Mirror(request.param, 2) as one:
        yield one


@pytest.fixture
def mirror(stage: Mirror) -> Iterator[Mirror]:
    """The stage, which a test leaves empty."""
    with watched():
        yield stage
        stage.clear()


@pytest.fixture
def private(request: pytest.FixtureRequest) -> Iterator[Callable[..., Mirror]]:
    """Make mirrors of private memory, for one test alone: ``private(devices, granule=..., capacity=...)``."""
    made: list[Mirror] = []

    def make(devices: int = 1, **options: int) -> Mirror:
        made.append(Mirror("private", devices, **options))
        return made[-1]

    with watched():
        yield make
        for one in made:
            one.__exit__()


@pytest.fixture(params=MEMORIES)
def fresh(request: pytest.FixtureRequest) -> Iterator[Callable[..., Mirror]]:
    """Make mirrors of either memory, for one test alone."""
    made: list[Mirror] = []
    memory: Memory = request.param

    def make(devices: int = 1, **options: int) -> Mirror:
        made.append(Mirror(memory, devices, **options))
        return made[-1]

    with watched():
        yield make
        for one in made:
            one.__exit__()
