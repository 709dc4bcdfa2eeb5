"""Every system call of the host's, the pager's among them, fails in turn while memory moves, once and from then on.

A verb that raises has changed nothing but where pages are; an access that meets a failure waits, and goes on when the
calls do. What every party reads afterwards is what was written, whoever had it. Only where undoing fails as well, from
then on, a granule may be lost: it is said so, and nobody reads garbage.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass

import pytest
from machine import PAGE, calls_made, failing, write_word
from mirror import PATIENCE_S, in_thread, watched

import uvas
from uvas._core import ffi, lib

GRANULES = 8
MOST_CALLS = 120
ERRORS = (uvas.UvasError, OSError, ValueError, BufferError)
MANNERS = {
    "ENOMEM once": (errno.ENOMEM, False),
    "ENOMEM from then on": (errno.ENOMEM, True),
    "EINVAL once": (errno.EINVAL, False),
    "EBUSY once": (errno.EBUSY, False),
}
Devices = tuple[uvas.ProcessDevice, uvas.ProcessDevice]


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    """Two workers for all scenes; one has room for half of it."""
    with (
        uvas.ProcessDevice(name="small", memory="private", granule=PAGE, capacity=GRANULES // 2 * PAGE) as small,
        uvas.ProcessDevice(name="large", memory="private", granule=PAGE) as large,
    ):
        yield small, large


@dataclass
class Scene:
    """Memory in every state: the host's, a device's, in several places, nowhere, not committed."""

    space: uvas.AddressSpace
    held: uvas.Reservation
    devices: Devices
    values: list[int | None]  # by granule; None: not committed

    def part(self, first: int, end: int) -> uvas.Range:
        """Some granules."""
        return uvas.Range(self.held.base + first * PAGE, (end - first) * PAGE)

    def word(self, granule: int) -> int:
        """The address of the word that a granule's value is in."""
        return self.held.base + granule * PAGE + 64

    def check(self, *, zeros: range = range(0), lost: bool = False) -> None:
        """Everybody reads what was written; in `zeros` it may be zeros instead, for all the same.

        With `lost` some may be lost: that is told by where, nobody reads anything there, and discard makes it zeros.
        """
        if self.held.space.find(self.held.base) is not self.held:
            return
        gone = [bool(flag & uvas.PageFlag.LOST) for flag in self.space.where(self.held).tolist()]
        assert lost or not any(gone)
        for granule in (granule for granule, one in enumerate(gone) if one):
            assert peeked(self.word(granule)) is None
            with pytest.raises(uvas.DeviceError):
                self.devices[1].read(self.word(granule), 8)
            self.space.discard(self.part(granule, granule + 1))
            self.values[granule] = 0
        counted = self.space.movement().devices
        for number, device in enumerate(self.space.devices, start=1):
            there = int((self.space.where(self.held) & uvas.PageFlag.device(number) != 0).sum())
            assert counted[device.info.name].resident_bytes == there * PAGE
        for granule, value in enumerate(self.values):
            if value is None:
                continue
            seen: set[int | None] = {
                int.from_bytes(device.read(self.word(granule), 8), "little") for device in self.space.devices
            }
            seen.add(peeked(self.word(granule)))
            assert seen == {value} or (granule in zeros and seen == {0}), f"granule {granule}: {seen}, not {value}"


def peeked(address: int) -> int | None:
    """Read a word on the host, through the kernel: what was lost is an error and no SIGBUS."""
    word = ffi.new("uint64_t *")
    return int(word[0]) if lib.uvas_peek(address, word, 8) == 0 else None


def poke(address: int, value: int) -> None:
    """Write a word on the host, likewise, as often as it takes."""
    assert lib.uvas_poke(address, ffi.new("uint64_t *", value), 8) in (0, -errno.EFAULT)


@contextlib.contextmanager
def a_scene(devices: Devices) -> Iterator[Scene]:
    """Make one, and leave the devices empty."""
    space = uvas.AddressSpace(devices, name="scene")
    held = space.reserve(GRANULES * PAGE, name="held")
    try:
        held.commit(0, (GRANULES - 1) * PAGE)
        scene = Scene(space, held, devices, [100, 101, 202, 203, 104, 105, 0, None])
        for granule in (0, 1, 4, 5):
            write_word(scene.word(granule), 100 + granule)
        for granule in (2, 3):
            devices[0].write(scene.word(granule), (200 + granule).to_bytes(8, "little"))
        for granule in (4, 5):
            devices[granule - 4].read(scene.word(granule), 8)
        yield scene
    finally:
        with contextlib.suppress(uvas.ReleasedError):
            held.release()
        space.close()


# ---- verbs -----------------------------------------------------------------------------------------------------------


def _read_mostly(scene: Scene) -> None:
    scene.space.advise(scene.part(0, 7), "read_mostly")
    scene.space.prefetch(scene.part(0, 7), scene.devices[1])


def _pin_and_unpin(scene: Scene) -> None:
    with scene.space.pin_host(scene.part(0, 6)):
        pass


def _detach_and_attach(scene: Scene) -> None:
    scene.space.detach(scene.devices[1])
    scene.space.attach(scene.devices[1])


def _commit(scene: Scene) -> None:
    scene.held.commit(7 * PAGE, PAGE)
    scene.values[7] = 0


def _decommit(scene: Scene) -> None:
    scene.held.decommit(2 * PAGE, 3 * PAGE)
    scene.values[2:5] = [None] * 3


def _protect(scene: Scene) -> None:
    scene.held.protect(0, 5 * PAGE, "r")


VERBS: dict[str, Callable[[Scene], object]] = {
    "prefetch to a device": lambda scene: scene.space.prefetch(scene.part(0, 7), scene.devices[1]),
    "prefetch that evicts": lambda scene: scene.space.prefetch(scene.part(4, 7), scene.devices[0]),
    "prefetch to the host": lambda scene: scene.space.prefetch(scene.part(0, 7), "host"),
    "prefetch of copies": _read_mostly,
    "where": lambda scene: scene.space.where(scene.held),
    "discard": lambda scene: scene.space.discard(scene.part(1, 6)),
    "pin_host": _pin_and_unpin,
    "detach and attach": _detach_and_attach,
    "commit": _commit,
    "decommit": _decommit,
    "protect": _protect,
    "release": lambda scene: scene.held.release(),
}
ZEROS = {"discard": range(1, 6)}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", VERBS)
def test_every_call_of_every_verb(devices: Devices, name: str, manner: str) -> None:
    error, lasting = MANNERS[manner]
    with watched(200):
        for k in range(1, MOST_CALLS):
            with a_scene(devices) as scene:
                with failing(k, lasting=lasting, error=error):
                    verb = in_thread(VERBS[name], scene)
                    assert wait([verb], PATIENCE_S).done, f"call {k}: it never ends"
                    made = calls_made()
                if isinstance(verb.exception(), ERRORS):
                    assert name != "pin_host" or not isinstance(verb.exception(), BufferError)
                    made = k
                else:
                    verb.result()
                scene.check(zeros=ZEROS.get(name, range(0)), lost=lasting)
                scene.space.check()
            if made < k:
                break
        else:
            raise AssertionError(f"a verb of {MOST_CALLS} calls")


# ---- accesses --------------------------------------------------------------------------------------------------------


def _writes(scene: Scene, write: Callable[[int, int], None], value: int) -> None:
    for granule in range(7):
        with contextlib.suppress(uvas.DeviceError):  # lost meanwhile: `check` looks whether it is
            write(scene.word(granule), value + granule)
            scene.values[granule] = value + granule


def _device_writes(scene: Scene) -> None:
    _writes(scene, lambda at, value: scene.devices[1].write(at, value.to_bytes(8, "little")), 300)


def _device_reads(scene: Scene, device: int) -> None:
    for granule in range(7):
        with contextlib.suppress(uvas.DeviceError):
            scene.devices[device].read(scene.word(granule), 8)


ACCESSES: dict[str, Callable[[Scene], object]] = {
    "a device reads": lambda scene: _device_reads(scene, 1),
    "a device without room reads": lambda scene: _device_reads(scene, 0),
    "a device writes": _device_writes,
    "the host reads": lambda scene: [peeked(scene.word(granule)) for granule in range(7)],
    "the host writes": lambda scene: _writes(scene, poke, 400),
}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", ACCESSES)
def test_every_call_of_every_access(devices: Devices, name: str, manner: str) -> None:
    """It waits as long as it has to, and ends when the calls go on."""
    error, lasting = MANNERS[manner]
    with watched(200):
        for k in range(1, MOST_CALLS):
            with a_scene(devices) as scene:
                with failing(k, lasting=lasting, error=error):
                    access = in_thread(ACCESSES[name], scene)
                    wait([access], 0.02 if lasting else PATIENCE_S)
                    made = calls_made()
                access.result(PATIENCE_S)
                scene.check(lost=lasting)
                scene.space.check()
            if made < k:
                break
        else:
            raise AssertionError(f"an access of {MOST_CALLS} calls")
