"""Cards in the strict fake of CUDA's driver, for the tests of CudaDevice; a skip where cuda-bindings are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

driver_module = pytest.importorskip(
    "cuda.bindings.driver", reason="cuda-bindings is not installed: pip install 'uvas[test]'"
)

from fake_cuda import GRANULARITY, FakeCard, FakeDriver, fake_driver  # noqa: E402  # it needs the bindings

UNIT = GRANULARITY
Plug = Callable[..., FakeDriver]


@pytest.fixture
def plug(monkeypatch) -> Iterator[Plug]:
    """Plug cards in; afterwards nothing of theirs is left."""
    made: list[FakeDriver] = []
    contexts = []

    def one(*cards: FakeCard) -> FakeDriver:
        context = fake_driver(monkeypatch, *cards)
        contexts.append(context)
        made.append(context.__enter__())
        return made[-1]

    yield one
    for fake in made:
        fake.fail(0)
        assert fake.leaks() == []
    for context in contexts:
        context.__exit__(None, None, None)


def cards(attributes: dict[int, int], count: int = 1) -> list[FakeCard]:
    return [FakeCard(dict(attributes)) for _ in range(count)]
