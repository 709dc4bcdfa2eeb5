"""CuPy for the tests: over the strict fake of CUDA's driver, with streams that the test says are busy; or a skip.

CuPy runs here without a driver: its arrays are made and told apart, its allocator in C is called as CuPy calls it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import uvas

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")
cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'uvas[cuda]'")

from fake_cuda import GRANULARITY, HMM_CARD, REGISTER_CARD, VMM_CARD, FakeCard, FakeDriver, fake_driver  # noqa: E402  # it needs the bindings

UNIT = GRANULARITY


class Stream:
    """A stream of CuPy's, as far as uvas asks it."""

    def __init__(self, fake: FakeDriver, number: int) -> None:
        self.fake, self.ptr, self.waited = fake, number, 0
        self.device_id = 0

    def work(self) -> None:
        """Run something, until somebody waits."""
        self.fake.busy.add(self.ptr)

    def synchronize(self) -> None:
        self.waited += 1
        self.fake.busy.discard(self.ptr)


@pytest.fixture(params=[HMM_CARD, REGISTER_CARD, VMM_CARD], ids=["hmm", "register", "vmm"])
def fake(request, monkeypatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch, FakeCard(dict(request.param))) as one:
        yield one
        gc.collect()
        assert one.leaks() == []


@pytest.fixture
def device(fake) -> Iterator[uvas.CudaDevice]:
    with uvas.CudaDevice() as one:
        yield one


@pytest.fixture
def space(device) -> Iterator[uvas.AddressSpace]:
    with uvas.AddressSpace([device]) as one:
        yield one
        gc.collect()
        one.check()


@pytest.fixture
def arena(space) -> Iterator[uvas.Arena]:
    with uvas.Arena(space, name="unified") as one:
        yield one
        gc.collect()
        one.check()


@pytest.fixture
def current(fake, monkeypatch) -> Stream:
    """The stream that CuPy says is current."""
    stream = Stream(fake, 77)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream)
    return stream


@pytest.fixture
def stream(fake) -> Stream:
    return Stream(fake, 7)


def live(arena: uvas.Arena) -> int:
    return arena.stats().live_blocks
