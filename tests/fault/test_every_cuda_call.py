"""Every driver call of every verb fails in turn: for k = 1, 2, ... until the verb completes untouched, once and from
then on, over the strict fake of the driver.

A verb that raises has changed nothing: what the driver holds, the bytes, the maps, the counters. Where taking back
fails as well, the reservation is poisoned and named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from machine import descriptors, mappings

import uvas

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")

from fake_cuda import GRANULARITY, HMM_CARD, FakeCard, FakeDriver, fake_driver

UNIT = GRANULARITY
WINDOWS = count(0x2B10_0000_0000, 64 * UNIT)
"""One for each scene: what was poisoned in one is nobody's for ever."""
MOST_CALLS = 200
COUNTERS = ("reservations", "reserved_bytes", "committed_bytes", "lost_bytes")
REFUSALS = (uvas.UvasError, OSError)


@dataclass
class Scene:
    """Two cards, a space, and something in it."""

    fake: FakeDriver
    devices: list[uvas.CudaDevice]
    space: uvas.AddressSpace
    held: uvas.Reservation
    window: uvas.Range


def snapshot(scene: Scene, lasting: bool) -> tuple[object, ...]:
    """All that a verb may change. What a card keeps that refuses for ever and is not of the space hurts only itself."""
    stats = scene.space.stats()
    first = scene.held.numpy("u1", 64)
    contents = first.tobytes()
    del first
    return (
        scene.fake.table(2 if lasting else 3),
        contents,
        [scene.fake.read(card, scene.held.base, 64) for card in range(2)],
        [getattr(stats, name) for name in COUNTERS],
        [one.range for one in scene.space.ranges()],
        [(one.start, one.end, one.permissions) for one in mappings(scene.window.base, scene.window.end)],
        descriptors(),
    )


@contextlib.contextmanager
def a_scene(patch: Any, strategy: str) -> Iterator[Scene]:
    """A reservation of 8 units: one with bytes in it, a read-only one, the rest not committed."""
    with fake_driver(patch, *(FakeCard(dict(HMM_CARD)) for _ in range(3))) as fake:
        devices = [uvas.CudaDevice(index, strategy=strategy) for index in range(2)]
        window = uvas.Range(next(WINDOWS), 64 * UNIT)
        space = uvas.AddressSpace(devices, window=window, name="scene")
        held = space.reserve(8 * UNIT, name="held")
        held.commit(0, UNIT)
        held.commit(UNIT, UNIT, protection="r")
        array = held.numpy("u1", UNIT)
        array[:] = 7
        del array
        try:
            yield Scene(fake, devices, space, held, window)
        finally:
            fake.fail(0)
            with contextlib.suppress(uvas.ReleasedError):
                space.close()
            for device in devices:
                device.close()


def attach(scene: Scene) -> None:
    scene.devices.append(uvas.CudaDevice(2))  # closed after the space, as devices are
    scene.space.attach(scene.devices[-1])


VERBS: dict[str, Callable[[Scene], object]] = {
    "reserve": lambda scene: scene.space.reserve(UNIT, name="new"),
    "reserve at": lambda scene: scene.space.reserve(UNIT, at=scene.window.base + 32 * UNIT),
    "commit": lambda scene: scene.held.commit(3 * UNIT, 2 * UNIT),
    "commit read-only": lambda scene: scene.held.commit(3 * UNIT, UNIT, protection="r"),
    "commit over some": lambda scene: scene.held.commit(UNIT, 3 * UNIT),
    "decommit": lambda scene: scene.held.decommit(),
    "decommit one": lambda scene: scene.held.decommit(UNIT, UNIT),
    "protect": lambda scene: scene.held.protect(0, 2 * UNIT, "r"),
    "protect none": lambda scene: scene.held.protect(0, 2 * UNIT, "none"),
    "release": lambda scene: scene.held.release(),
    "attach": attach,
    "detach": lambda scene: scene.space.detach(scene.devices[1]),
}
OF_HMM: dict[str, Callable[[Scene], object]] = {
    "prefetch": lambda scene: scene.devices[0].prefetch(uvas.Range(scene.held.base, UNIT), "device")(),
    "prefetch to the host": lambda scene: scene.space.prefetch(uvas.Range(scene.held.base, UNIT), "host"),  # by both
    "advise": lambda scene: scene.devices[0].advise(uvas.Range(scene.held.base, UNIT), None, None),
}
OF_VMM: dict[str, Callable[[Scene], object]] = {
    "commit on a card": lambda scene: scene.held.commit(3 * UNIT, UNIT, location=scene.devices[0]),
    "commit on the other card": lambda scene: scene.held.commit(3 * UNIT, UNIT, location=scene.devices[1]),
    "commit the same": lambda scene: scene.held.commit(3 * UNIT, UNIT, location=uvas.Range(scene.held.base, UNIT)),
}
ALL = [
    *((strategy, name) for strategy in ("hmm", "register", "vmm") for name in VERBS),
    *(("hmm", name) for name in OF_HMM),
    *(("vmm", name) for name in OF_VMM),
]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(("strategy", "name"), ALL, ids=["-".join(one).replace(" ", "-") for one in ALL])
def test_every_driver_call_of_every_verb(monkeypatch, strategy: str, name: str, lasting: bool) -> None:
    verb = (VERBS | OF_HMM | OF_VMM)[name]
    poisonings = told_by_device = 0
    for k in range(1, MOST_CALLS):
        with a_scene(monkeypatch, strategy) as scene:
            before = snapshot(scene, lasting)
            scene.fake.fail(k, lasting=lasting)
            try:
                result = verb(scene)
            except REFUSALS as refusal:
                scene.fake.fail(0)
                stats = scene.space.stats()
                if stats.poisoned_bytes:  # taking back failed as well
                    assert lasting
                    assert stats.poisoned_bytes == scene.held.size
                    assert uvas.find(scene.held.base) is None
                    with pytest.raises(uvas.AddressInUseError, match="poisoned"):
                        scene.space.reserve(UNIT, at=scene.held.base)
                    told_by_device += refusal.unrecoverable
                    poisonings += 1
                    abandon(scene)
                    continue
                assert snapshot(scene, lasting) == before, f"call {k}"
                assert lasting or not scene.fake.events, f"call {k}"
                scene.space.check()
                continue
            made = scene.fake.made
            scene.fake.fail(0)
            scene.space.check()
            if isinstance(result, uvas.Reservation):
                result.release()
            if made < k:
                break
        assert left(scene.fake) == [], f"survived call {k}"
    else:
        raise AssertionError("a verb of 200 calls")
    assert left(scene.fake) == []
    assert k > 1 or (strategy == "hmm" and name not in OF_HMM) or (strategy == "register" and "reserve" in name)
    if lasting and strategy == "vmm" and name in ("commit", "decommit"):
        assert poisonings >= told_by_device > 0  # or this test has not seen what it is for


def left(fake: FakeDriver) -> list[str]:
    """What has not been given back, but for what a driver may refuse to take when a device or a call ends."""
    return [one for one in fake.leaks() if not one.startswith(("context", "stream", "event"))]


def abandon(scene: Scene) -> None:
    """Let a poisoned scene go, as a process would end."""
    scene.space.close()
    for device in scene.devices:
        device.close()
    fake = scene.fake
    for base in list(fake.mapped):
        fake.cuMemUnmap(base, fake.mapped[base].size)
    for number in [one.number for one in fake.handles.values() if one.held]:
        fake.cuMemRelease(number)
    for base, size in list(fake.reserved.items()):
        fake.cuMemAddressFree(base, size)
    fake.registered.clear()


@pytest.mark.parametrize("strategy", ["auto", "hmm", "register", "vmm"])
def test_every_call_of_making_a_device(monkeypatch, strategy: str) -> None:
    """A device that could not be made has left nothing; lasting failures as well, but for what could not be undone."""
    for k in range(1, MOST_CALLS):
        with fake_driver(monkeypatch, FakeCard(dict(HMM_CARD)), FakeCard(dict(HMM_CARD))) as fake:
            fake.fail(k)
            try:
                device = uvas.CudaDevice(1, strategy=strategy)
            except REFUSALS:
                fake.fail(0)
                assert left(fake) == [], f"call {k}"
                continue
            made = fake.made
            fake.fail(0)
            device.close()
            assert left(fake) == []
            if made < k:
                break
    else:
        raise AssertionError("200 calls")
    assert k > 20


def test_what_the_driver_does_not_take_back_is_offered_again(monkeypatch) -> None:
    """Strays and handles: nothing hangs on them, so the verb succeeds, and they go back with the next."""
    with a_scene(monkeypatch, "vmm") as scene:
        fake = scene.fake
        frees = {"cuMemRelease"}
        inner = fake.cuMemRelease

        def refuses_once(number: object) -> object:
            if frees:
                frees.clear()
                return type(fake.init_answer).CUDA_ERROR_UNKNOWN
            return inner(number)

        monkeypatch.setattr(fake, "cuMemRelease", refuses_once)
        fake.install(monkeypatch)
        scene.held.decommit(0, UNIT)
        assert len(fake.handles) == 2
        scene.held.decommit(UNIT, UNIT)
        assert len(fake.handles) == 0
    assert fake.leaks() == []
