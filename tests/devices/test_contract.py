"""One contract for every device, asked through spaces and directly."""

from __future__ import annotations

import threading
from builtins import range as pages_from  # the contract's parameter is called range
from collections.abc import Iterator
from itertools import count
from typing import Any, ClassVar, Protocol

import cuda_in_tests
import on_device
import opencl_in_tests
import pytest
from devices_in_tests import TableDevice
from machine import PAGE, Mapping, mappings

import uvas


class Party(Protocol):
    """A device, and what the tests must know of it to judge."""

    device: uvas.Device
    name: str
    backing: str  # of a space for devices of its kind

    def holds(self, range: uvas.Range) -> bool:
        """Whether the range, all of it, is held there and nothing is committed in it."""

    def committed(self, range: uvas.Range) -> str | None:
        """What may be done with the range, all of it; None: it is not committed."""

    def occupy(self, range: uvas.Range) -> bool:
        """Something of the device's own takes the range. False: something is there already."""

    def intact(self, range: uvas.Range) -> bool:
        """Whether that is as it was."""


class Table:
    """A plain Python device."""

    backing = "memfd"

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = TableDevice(name)

    def holds(self, range: uvas.Range) -> bool:
        claimed = any(base <= range.base and range.end <= base + size for base, size in self.device.claims.items())
        return claimed and self.committed(range) is None

    def committed(self, range: uvas.Range) -> str | None:
        found = {self.device.committed.get(page, "").partition(" ")[0] for page in self.device._pages(range)}
        return (found.pop() or None) if len(found) == 1 else None

    def occupy(self, range: uvas.Range) -> bool:
        if any(uvas.Range(base, size).overlaps(range) for base, size in self.device.claims.items()):
            return False
        self.device.taken += (range,)
        return True

    def intact(self, range: uvas.Range) -> bool:
        return range in self.device.taken


class Process:
    """A worker process."""

    backing = "memfd"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = uvas.ProcessDevice(name=name, **self.options)
        self._tag = f"/memfd:uvas:{name} "

    def _mappings(self, range: uvas.Range) -> list[Mapping]:
        """What lies there; all of the range, or none of it."""
        found = mappings(range.base, range.end, self.device.pid)
        covered = sum(min(one.end, range.end) - max(one.start, range.base) for one in found)
        return found if covered == range.size else []

    def holds(self, range: uvas.Range) -> bool:
        found = self._mappings(range)
        return bool(found) and all(one.permissions == "---p" and one.name.startswith(self._tag) for one in found)

    def committed(self, range: uvas.Range) -> str | None:
        found = {one.permissions for one in self._mappings(range) if not one.name.startswith(self._tag)}
        return found.pop()[:3].replace("-", "") or "none" if len(found) == 1 else None

    def occupy(self, range: uvas.Range) -> bool:
        return self.device.run(on_device.plant, range.base, range.size)

    def intact(self, range: uvas.Range) -> bool:
        return self.device.run(on_device.planted_is_intact, range.base, range.size)


class PrivateProcess(Process):
    """A worker process with memory of its own."""

    backing = "anonymous"
    options: ClassVar[dict[str, Any]] = {"memory": "private", "granule": PAGE}


class OpenCL:
    """An OpenCL device, which follows the host: what is held is what the host holds."""

    backing = "memfd"

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = opencl_in_tests.device(name)

    def holds(self, range: uvas.Range) -> bool:
        found = mappings(range.base, range.end)
        ours = [one for one in found if one.permissions == "---p" and one.name.startswith("/memfd:uvas:")]
        covered = sum(min(one.end, range.end) - max(one.start, range.base) for one in ours)
        return covered == range.size and self.committed(range) is None

    def committed(self, range: uvas.Range) -> str | None:
        """Asked of kernels, page by page, and for what they refuse of the device."""
        found = {self._page(address) for address in pages_from(range.base, range.end, PAGE)}
        return found.pop() if len(found) == 1 else None

    def _page(self, address: int) -> str | None:
        try:
            byte = self.device.read(address, 1)
            self.device.write(address, byte)
        except uvas.DeviceError as refusal:
            known = self.device._memory.allows(uvas.Range(address, PAGE), "")
            return ("r" if refusal.call == "write" else "none") if known else None
        return "rw"

    def occupy(self, range: uvas.Range) -> bool:
        pytest.skip("it follows: there are no addresses of its own that could be taken")

    def intact(self, range: uvas.Range) -> bool:
        raise AssertionError("nothing was put there")


PARTIES = {"table": Table, "process": Process, "private": PrivateProcess, "opencl": OpenCL}
CUDA = [f"cuda {strategy}" for strategy in cuda_in_tests.PARTIES]
GPU = [pytest.param(f"gpu {strategy}", marks=pytest.mark.cuda) for strategy in cuda_in_tests.PARTIES]


@pytest.fixture(params=[*PARTIES, *CUDA, *GPU])
def kind(request, monkeypatch) -> str:
    """Each kind of device. A page is, from here on, the least that it deals with."""
    strategy = request.param.partition(" ")[2]
    if strategy:
        monkeypatch.setitem(globals(), "PAGE", cuda_in_tests.PARTIES[strategy].page)
    return request.param


@pytest.fixture
def make(kind, monkeypatch) -> Iterator[type[Party]]:
    """Make a device of the kind; closed in the end."""
    made = []
    numbers = count()

    def one(name: str) -> Party:
        api, _, strategy = kind.partition(" ")
        if strategy:
            made.append(cuda_in_tests.PARTIES[strategy](monkeypatch, api == "gpu", numbers))
        else:
            made.append(PARTIES[kind](name))
        return made[-1]

    yield one
    for party in made:
        party.device.close()
    if made and getattr(made[0], "fake", None):
        assert made[0].fake.leaks() == []


def only_where_each_claims(party: Party) -> None:
    """Skip what asks for several tables of addresses."""
    if party.device.info.placement != "claims":
        pytest.skip(f"it {party.device.info.placement} addresses: there are no tables that could disagree")


def commit(party: Party, held: uvas.Reservation, offset: int, size: int) -> None:
    """Commit so that parts can be changed alone: page by page, where a device changes things as a whole."""
    step = PAGE if party.device.info.placement in ("registers", "owns") else size
    for at in range(offset, offset + size, step):
        held.commit(at, step)


@pytest.fixture
def party(make) -> Party:
    return make("the device")


def free_range(size: int) -> uvas.Range:
    """A range that is free on the host, and most likely in a worker."""
    with uvas.AddressSpace() as space, space.reserve(size) as held:
        return held.range


# ---- through a space -------------------------------------------------------------------------------------------------


def test_info_says_who_it_is(party):
    info = party.device.info
    assert info.name == party.name
    assert info.placement in ("follows", "claims", "registers", "owns")
    assert info.backings <= {"anonymous", "memfd", "descriptor", "driver"}
    assert party.device.info == info


def test_a_reservation_is_held_there_and_given_back(party):
    with uvas.AddressSpace([party.device]) as space:
        with space.reserve(3 * PAGE) as held:
            assert party.holds(held.range)
        assert not party.holds(held.range)


def test_what_is_committed_is_committed_there(party):
    with uvas.AddressSpace([party.device], backing=party.backing) as space, space.reserve(8 * PAGE) as held:
        commit(party, held, PAGE, 4 * PAGE)
        part = uvas.Range(held.base + PAGE, 4 * PAGE)
        assert party.committed(part) == "rw"
        assert party.holds(uvas.Range(held.base, PAGE))
        assert party.holds(uvas.Range(part.end, 3 * PAGE))
        held.protect(2 * PAGE, PAGE, "r")
        assert party.committed(uvas.Range(held.base + 2 * PAGE, PAGE)) == "r"
        held.protect(2 * PAGE, PAGE, "none")
        assert party.committed(uvas.Range(held.base + 2 * PAGE, PAGE)) == "none"
        held.commit(0, 8 * PAGE)
        assert party.committed(held.range) == "rw"
        held.decommit()
        assert party.holds(held.range)


def test_descriptors_are_mapped_there(party, tmp_path):
    if "descriptor" not in party.device.info.backings:
        pytest.skip("it does not declare that it can live with descriptors")
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE) + b"second page" + bytes(2 * PAGE))
    with uvas.AddressSpace([party.device]) as space, space.reserve(4 * PAGE) as held, path.open("r+b") as file:
        held.map_fd(file.fileno(), offset=PAGE, size=PAGE, fd_offset=PAGE)
        assert party.committed(uvas.Range(held.base + PAGE, PAGE)) == "rw"
        assert party.holds(uvas.Range(held.base, PAGE))
        if not isinstance(party, Table):
            assert party.device.read(held.base + PAGE, 11) == b"second page"
            party.device.write(held.base + PAGE, b"SECOND")
            assert path.read_bytes()[PAGE : PAGE + 11] == b"SECOND page"


def test_where_it_says_taken_the_range_is_elsewhere_on_both_sides(party):
    wanted = free_range(16 * PAGE)
    assert party.occupy(wanted)
    window = uvas.Range(wanted.base - 64 * PAGE, 256 * PAGE)
    with uvas.AddressSpace([party.device], window=window) as space:
        for _ in range(5):
            with space.reserve(16 * PAGE) as held:
                assert not held.range.overlaps(wanted)
                assert party.holds(held.range)
        with pytest.raises(uvas.AddressInUseError) as caught:
            space.reserve(16 * PAGE, at=wanted.base)
        assert caught.value.owner.startswith(f"{party.name}: ")
        assert caught.value.wanted == wanted
        told = caught.value.obstacle  # a driver may not know what is in its way
        assert told.overlaps(wanted) if party.device.info.placement == "claims" else told is None
        assert not mappings(wanted.base, wanted.end)  # the host's part was given back
        assert space.stats().conflicts > 0
        space.check()
    assert party.intact(wanted)


def test_all_parties_agree_or_nobody_holds(make):
    parties = [make(f"device {i}") for i in range(3)]
    only_where_each_claims(parties[0])
    wanted = free_range(PAGE)
    assert parties[2].occupy(wanted)
    with uvas.AddressSpace([one.device for one in parties]) as space:
        with pytest.raises(uvas.AddressInUseError, match="device 2"):
            space.reserve(PAGE, at=wanted.base)
        assert not any(one.holds(wanted) for one in parties)
        with space.reserve(PAGE) as held:
            assert all(one.holds(held.range) for one in parties)


def test_a_device_that_comes_later_gets_what_is_there(party, make):
    later = make("latecomer")
    if isinstance(party, cuda_in_tests.HmmParty):
        pytest.skip("it sees the host's pages before it comes and after it has left")
    with (
        uvas.AddressSpace([party.device], backing=party.backing) as space,
        space.reserve(4 * PAGE) as first,
        space.reserve(4 * PAGE) as second,
    ):
        first.commit(0, 2 * PAGE)
        second.commit(PAGE, PAGE, protection="r")
        space.attach(later.device)
        assert later.committed(uvas.Range(first.base, 2 * PAGE)) == "rw"
        assert later.holds(uvas.Range(first.base + 2 * PAGE, 2 * PAGE))
        assert later.committed(uvas.Range(second.base + PAGE, PAGE)) == "r"
        space.detach(later.device)
        for held in (first, second):
            assert not later.holds(held.range)
            assert later.committed(held.range) is None
        assert party.committed(uvas.Range(first.base, 2 * PAGE)) == "rw"


def test_a_device_that_comes_later_and_refuses_gets_nothing(make):
    later = make("latecomer")
    only_where_each_claims(later)
    with uvas.AddressSpace(backing=later.backing) as space:
        ranges = [space.reserve(PAGE) for _ in range(5)]
        for held in ranges:
            held.commit()
        assert later.occupy(ranges[2].range)
        with pytest.raises(uvas.AddressInUseError, match="latecomer"):
            space.attach(later.device)
        assert space.devices == ()
        assert all(later.committed(held.range) is None for i, held in enumerate(ranges) if i != 2)
        assert later.intact(ranges[2].range)
        for held in ranges:
            held.release()


def test_many_threads_reserve_at_once(make):
    devices = [make(f"device {i}") for i in range(2)]
    failures: list[BaseException] = []

    def work(space: uvas.AddressSpace) -> None:
        try:
            for _ in range(30):
                with space.reserve(2 * PAGE) as held:
                    held.commit(PAGE, PAGE)
                    assert all(one.committed(uvas.Range(held.base + PAGE, PAGE)) == "rw" for one in devices)
                    held.decommit()
                    assert all(one.holds(held.range) for one in devices)
        except BaseException as error:
            failures.append(error)

    with uvas.AddressSpace([one.device for one in devices], backing=devices[0].backing) as space:
        threads = [threading.Thread(target=work, args=(space,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert space.ranges() == []
        space.check()


def test_two_spaces_share_a_device(party):
    with uvas.AddressSpace([party.device], name="one") as one, uvas.AddressSpace([party.device], name="two") as two:
        with one.reserve(PAGE) as first, two.reserve(PAGE) as second:
            assert party.holds(first.range)
            assert party.holds(second.range)
        assert not party.holds(first.range)
        assert not party.holds(second.range)


# ---- asked directly --------------------------------------------------------------------------------------------------


def test_claims_of_disjoint_ranges_in_any_order(party):
    if party.device.info.placement not in ("claims", "owns"):
        pytest.skip("nothing is claimed of it")
    whole = free_range(3 * PAGE)
    parts = [uvas.Range(whole.base + i * PAGE, PAGE) for i in range(3)]
    for i in (2, 0, 1):
        party.device.claim(parts[i])
    assert all(party.holds(part) for part in parts)
    for i in (1, 2, 0):
        party.device.unclaim(parts[i])
        assert not party.holds(parts[i])


def test_a_refused_claim_changes_nothing(party):
    wanted = free_range(4 * PAGE)
    taken = uvas.Range(wanted.base + 2 * PAGE, PAGE)
    assert party.occupy(taken)
    with pytest.raises(uvas.AddressInUseError) as caught:
        party.device.claim(wanted)
    assert caught.value.obstacle is None or caught.value.obstacle.overlaps(taken)
    assert party.intact(taken)
    free = uvas.Range(wanted.base, 2 * PAGE)
    party.device.claim(free)
    assert party.holds(free)
    party.device.unclaim(free)


def test_unclaim_gives_back_what_is_committed_too(party):
    only_where_each_claims(party)
    with uvas.AddressSpace([party.device], backing=party.backing) as space, space.reserve(2 * PAGE) as held:
        held.commit()
        space.detach(party.device)
        assert party.committed(held.range) is None
        if party.device.info.placement == "claims":
            assert party.occupy(held.range)  # it is free there


def test_close_is_idempotent(party):
    party.device.close()
    party.device.close()
