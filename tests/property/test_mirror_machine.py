"""Two devices with memory of their own and the host against the model, whatever the order of what they do.

Values, refusals, and after each step where everything is; one of the devices has room for a third of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from machine import PAGE, read_word, write_word
from mirror import Child, watched
from model import HOST, MirrorModel, ModelGranule

import uvas

GRANULES = 24
CAPACITY = 8
MOST = 300 if os.environ.get("UVAS_FULL") == "1" else 50

parties = st.sampled_from([HOST, 0, 1])
places = st.integers(0, GRANULES - 1)
lengths = st.integers(1, 12)
values = st.integers(1, (1 << 63) - 1)
WORDS = (0, PAGE // 2, PAGE - 8)
"""Where a granule's value stands, in bytes."""


@pytest.fixture(scope="module")
def devices() -> Iterator[tuple[uvas.ProcessDevice, uvas.ProcessDevice]]:
    """The workers, for all runs."""
    with (
        uvas.ProcessDevice(name="small", memory="private", granule=PAGE, capacity=CAPACITY * PAGE) as small,
        uvas.ProcessDevice(name="large", memory="private", granule=PAGE) as large,
    ):
        yield small, large


class MirrorMachine(RuleBasedStateMachine):
    """Read, write, move, advise, discard, protect, commit, decommit, fork."""

    devices: tuple[uvas.ProcessDevice, ...] = ()

    @initialize(committed=st.integers(0, GRANULES))
    def open(self, committed: int) -> None:
        self.space = uvas.AddressSpace(self.devices, name="machine")
        self.held = self.space.reserve(GRANULES * PAGE)
        self.model = MirrorModel([None] * GRANULES, {0: CAPACITY})
        if committed:
            self.held.commit(0, committed * PAGE)
            self.model.commit(0, committed, "rw")

    def _base(self, at: int) -> int:
        return self.held.base + at * PAGE

    def _range(self, first: int, length: int) -> tuple[uvas.Range, int]:
        end = min(first + length, GRANULES)
        return uvas.Range(self._base(first), (end - first) * PAGE), end

    # ---- accesses ----------------------------------------------------------------------------------------------------

    @rule(at=places, party=parties)
    def read(self, at: int, party: int) -> None:
        if not self.model.may(at, "r"):
            if party != HOST:
                with pytest.raises(uvas.DeviceError):
                    self.devices[party].read(self._base(at), 8)
            return
        if party == HOST:
            seen = [read_word(self._base(at) + offset) for offset in WORDS]
        else:
            data = np.frombuffer(self.devices[party].read(self._base(at), PAGE), np.uint64)
            seen = [int(data[offset // 8]) for offset in WORDS]
        assert seen == [self.model.read(at, party)] * len(WORDS)

    @rule(at=places, party=parties, value=values)
    def write(self, at: int, party: int, value: int) -> None:
        if not self.model.may(at, "w"):
            if party != HOST:
                with pytest.raises(uvas.DeviceError):
                    self.devices[party].write(self._base(at), bytes(8))
            return
        for offset in WORDS:
            if party == HOST:
                write_word(self._base(at) + offset, value)
            else:
                self.devices[party].write(self._base(at) + offset, value.to_bytes(8, "little"))
        self.model.write(at, party, value)

    # ---- verbs -------------------------------------------------------------------------------------------------------

    @rule(first=places, length=lengths, party=parties)
    def prefetch(self, first: int, length: int, party: int) -> None:
        part, end = self._range(first, length)
        target = "host" if party == HOST else self.devices[party]
        if not self.model.movable(first, end):
            with pytest.raises((ValueError, uvas.DeviceError, uvas.NotSupportedError)):
                self.space.prefetch(part, target)
        elif not self.model.fits(end - first, party):
            with pytest.raises(uvas.OutOfMemoryError):
                self.space.prefetch(part, target)
        else:
            self.space.prefetch(part, target)
            self.model.move(first, end, party)

    @rule(first=places, length=lengths, advice=st.sampled_from(["read_mostly", "accessed_by", None]))
    def advise(self, first: int, length: int, advice: str | None) -> None:
        part, end = self._range(first, length)
        if not all(self.model.granules[first:end]):
            return
        self.space.advise(part, advice, self.devices[1] if advice == "accessed_by" else None)
        touched = set(range(first, end))
        self.model.homed = self.model.homed - touched if advice is None else self.model.homed | touched

    @rule(first=places, length=lengths)
    def discard(self, first: int, length: int) -> None:
        part, end = self._range(first, length)
        if all(one is not None and "w" in one.protection for one in self.model.granules[first:end]):
            self.space.discard(part)
            self.model.discard(first, end)

    @rule(first=places, length=lengths, party=parties)
    def keep_at_home(self, first: int, length: int, party: int) -> None:
        part, end = self._range(first, length)
        if not self.model.movable(first, end):
            return
        with self.space.pin_host(part):
            self.model.move(first, end, HOST)
            for at in range(first, end):
                self.model.check(at, self._holders()[at])

    @rule(first=places, length=lengths, protection=st.sampled_from(["none", "r", "rw"]))
    def protect(self, first: int, length: int, protection: str) -> None:
        part, end = self._range(first, length)
        if all(self.model.granules[first:end]):
            self.held.protect(part.base - self.held.base, part.size, protection)
            for one in self.model.granules[first:end]:
                assert one is not None
                one.protection = protection
                one.holders, one.among = None, frozenset()

    @rule(first=places, length=lengths, protection=st.sampled_from(["r", "rw"]))
    def commit(self, first: int, length: int, protection: str) -> None:
        part, end = self._range(first, length)
        self.held.commit(part.base - self.held.base, part.size, protection=protection)
        self.model.commit(first, end, protection)

    @rule(first=places, length=lengths)
    def decommit(self, first: int, length: int) -> None:
        part, end = self._range(first, length)
        self.held.decommit(part.base - self.held.base, part.size)
        self.model.decommit(first, end)
        self.model.homed -= set(range(first, end))

    @rule()
    def fork(self) -> None:
        readable = [at for at in range(GRANULES) if self.model.may(at, "r")]
        child = Child(lambda: [read_word(self._base(at)) for at in readable])
        assert child.answer() == [self._granule(at).value for at in readable]
        for one in self.model.granules:
            if one is not None:
                one.holders, one.among = None, frozenset()

    @rule(device=st.sampled_from([0, 1]))
    def come_and_go(self, device: int) -> None:
        self.space.detach(self.devices[device])
        assert not any(1 in holders for holders in self._holders())  # there is only a first one now
        self.space.attach(self.devices[device])
        self.devices = tuple(self.space.devices)  # the order of the bits of `where`
        self.model.capacities = {i: CAPACITY for i, one in enumerate(self.devices) if one.info.name == "small"}
        for one in self.model.granules:
            if one is not None:
                one.holders, one.among = None, frozenset()

    def _granule(self, at: int) -> ModelGranule:
        granule = self.model.granules[at]
        assert granule is not None
        return granule

    # ---- what is always so -------------------------------------------------------------------------------------------

    def _holders(self) -> list[frozenset[int]]:
        flags = self.space.where(self.held)
        bits = {HOST: uvas.PageFlag.HOST, 0: uvas.PageFlag.device(1), 1: uvas.PageFlag.device(2)}
        return [frozenset(party for party, bit in bits.items() if int(one) & bit) for one in flags]

    @invariant()
    def everything_is_where_it_may_be(self) -> None:
        before = self.space.movement()
        flags = [int(one) for one in self.space.where(self.held)]
        assert self.space.movement().host.read_faults == before.host.read_faults
        for at, (flag, holders) in enumerate(zip(flags, self._holders(), strict=True)):
            self.model.check(at, holders)
            assert bool(flag & uvas.PageFlag.DUPLICATED) == (len(holders) > 1)
            assert not flag & uvas.PageFlag.LOST
            granule = self.model.granules[at]
            protection = granule.protection if granule else None
            assert bool(flag & uvas.PageFlag.READ_ONLY) == (protection == "r")
            assert bool(flag & uvas.PageFlag.PROTECTED) == (protection == "none")
        for device, capacity in self.model.capacities.items():
            assert sum(device in holders for holders in self._holders()) <= capacity
        self.space.check()

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.held.commit()
            self.model.commit(0, GRANULES, "rw")
            for at in range(GRANULES):  # nothing was lost
                assert read_word(self._base(at) + WORDS[-1]) == self._granule(at).value
            self.held.release()
            self.space.close()


@pytest.mark.slow
def test_mirrors_are_as_the_model_says(devices) -> None:
    MirrorMachine.devices = devices
    with watched(240):
        run_state_machine_as_test(
            MirrorMachine,
            settings=settings(
                max_examples=MOST,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
