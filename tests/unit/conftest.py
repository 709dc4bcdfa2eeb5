"""What several tests of arenas ask for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import uvas


@pytest.fixture
def arena(space: uvas.AddressSpace) -> Iterator[uvas.Arena]:
    """An arena; afterwards its invariants hold and nothing lives in it."""
    with uvas.Arena(space, name="test") as one:
        yield one
        gc.collect()
        if not one.closed:
            one.check()
            assert one.stats().live_blocks == 0
            one.close()
