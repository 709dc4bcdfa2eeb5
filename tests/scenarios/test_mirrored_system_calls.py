"""System calls on mirrored memory: they wait for the page like any access, and what the kernel holds is never lost.

The row ``hmm_gup_test``, and what else reads and writes memory on a program's behalf.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from machine import PAGE, read_word
from mirror import HOST, PATIENCE_S, Mirror, function, in_thread, words

import uvas

PLACES = ["host", "device", "both", "nowhere"]


def placed(mirror: Mirror, granules: int, place: str) -> uvas.Reservation:
    """Memory that lies there, full of ``3, 4, ...`` unless it lies nowhere."""
    held = mirror.commit(granules, seed=None if place == "nowhere" else 3)
    if place == "device":
        mirror.migrate(held, 0)
    if place == "both":
        assert mirror.differ(0, held.base, held.size, 3) == 0
    if place == "nowhere":
        mirror.migrate(mirror.commit(1), 0)  # from here on faults count
    return held


def content(place: str, size: int) -> bytes:
    """What `placed` put there."""
    return bytes(size) if place == "nowhere" else words(3, size)


# ---- into memory -----------------------------------------------------------------------------------------------------


def by_read(array: np.ndarray, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        assert file.readinto(memoryview(array)) == array.nbytes


def by_readv(array: np.ndarray, path: Path) -> None:
    half = array.nbytes // 2
    fd = os.open(path, os.O_RDONLY)
    assert os.preadv(fd, [memoryview(array)[:half], memoryview(array)[half:]], 0) == array.nbytes
    os.close(fd)


def by_direct_read(array: np.ndarray, path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    got = os.preadv(fd, [memoryview(array)], 0)
    os.close(fd)
    assert got == array.nbytes


def by_pipe(array: np.ndarray, path: Path) -> None:
    reading, writing = os.pipe()
    sending = in_thread(lambda: [os.write(writing, path.read_bytes()), os.close(writing)])
    view, got = memoryview(array), 0
    while got < array.nbytes:
        got += os.readv(reading, [view[got:]])
    sending.result(PATIENCE_S)
    os.close(reading)


def by_socket(array: np.ndarray, path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = in_thread(theirs.sendall, path.read_bytes())
        assert ours.recv_into(memoryview(array), array.nbytes, socket.MSG_WAITALL) == array.nbytes
        sending.result(PATIENCE_S)


def by_numpy(array: np.ndarray, path: Path) -> None:
    array[:] = np.fromfile(path, np.uint8)


WAYS_IN: dict[str, Callable[[np.ndarray, Path], None]] = {
    "read": by_read,
    "preadv": by_readv,
    "O_DIRECT": by_direct_read,
    "pipe": by_pipe,
    "socket": by_socket,
    "np.fromfile": by_numpy,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS_IN)
def test_the_kernel_writes_into_memory(mirror: Mirror, tmp_path: Path, way: str, place: str) -> None:
    """`hmm_gup_test`"""
    held = placed(mirror, 4, place)
    path = tmp_path / "file"
    path.write_bytes(words(700, held.size))
    array = held.numpy(np.uint8)
    WAYS_IN[way](array, path)
    del array
    assert mirror.differ(HOST, held.base, held.size, 700) == 0
    assert mirror.differ(0, held.base, held.size, 700) == 0
    assert mirror.differ(1, held.base, held.size, 700) == 0


# ---- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["write", "pwritev", "tofile", "socket"])
def test_the_kernel_reads_memory(mirror: Mirror, tmp_path: Path, way: str, place: str) -> None:
    held = placed(mirror, 4, place)
    path = tmp_path / "file"
    array = held.numpy(np.uint8)
    if way == "tofile":
        array.tofile(path)
    elif way == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sending = in_thread(theirs.sendall, memoryview(array))
            path.write_bytes(received(ours, array.nbytes))
            sending.result(PATIENCE_S)
    else:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        wrote = os.write(fd, memoryview(array)) if way == "write" else os.pwritev(fd, [memoryview(array)], 0)
        os.close(fd)
        assert wrote == array.nbytes
    del array
    assert path.read_bytes() == content(place, held.size)
    assert mirror.read(0, held.base, held.size) == content(place, held.size)


def received(end: socket.socket, size: int) -> bytes:
    """All that the other side sends."""
    parts = []
    while size:
        parts.append(end.recv(size))
        size -= len(parts[-1])
    return b"".join(parts)


@pytest.mark.parametrize("place", PLACES)
def test_the_kernel_reads_and_writes_while_pages_move(mirror: Mirror, tmp_path: Path, place: str) -> None:
    """Devices work on their words of every granule while files are read into the rest of it: nothing is lost."""
    held = placed(mirror, 8, place)
    whole = mirror.granule // 8
    path = tmp_path / "file"
    path.write_bytes(words(1, mirror.granule))
    fd = os.open(path, os.O_RDONLY)
    array = held.numpy(np.uint64).reshape(8, -1)
    array[:, : PAGE // 8] = 0
    rounds = 20
    adding = [
        in_thread(lambda i=i: [mirror.call(i, "add_strided", held.base + 64 * i, 8, whole, 1) for _ in range(rounds)])
        for i in (0, 1)
    ]
    view = memoryview(held.numpy(np.uint8))
    for i in range(4 * rounds):
        at = (i % 8) * mirror.granule + PAGE
        assert os.preadv(fd, [view[at : (i % 8 + 1) * mirror.granule]], 0) == mirror.granule - PAGE
    for one in adding:
        one.result(PATIENCE_S)
    os.close(fd)
    del view
    assert (array[:, :16:8] == rounds).all()
    assert (array[:, PAGE // 8 :] == np.arange(1, 1 + whole - PAGE // 8, dtype=np.uint64)).all()
    del array


# ---- what the kernel holds -------------------------------------------------------------------------------------------


class Ring:
    """A ring of io_uring with memory registered: its pages are pinned until it is closed."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.descriptor = int(function("uring_open")(address, size) or 0)
        if self.descriptor < 0:
            pytest.skip(f"io_uring is not to be had here: errno {-self.descriptor}")

    def read(self, descriptor: int) -> None:
        """Begin to read into it."""
        assert function("uring_read")(self.descriptor, descriptor, self.address, self.size) == 0

    def wait(self) -> int:
        """Bytes that were read."""
        return int(in_thread(function("uring_wait"), self.descriptor).result(PATIENCE_S))

    def close(self) -> None:
        """Let go."""
        if self.descriptor >= 0:
            function("uring_close", "none")(self.descriptor)
            self.descriptor = -1


@pytest.fixture
def ring() -> Iterator[Callable[[int, int], Ring]]:
    """Make rings."""
    made: list[Ring] = []

    def make(address: int, size: int) -> Ring:
        made.append(Ring(address, size))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_write_in_flight_into_pinned_memory_comes_out_right(mirror: Mirror, ring, place: str) -> None:
    """`hmm_gup_test`: what is pinned stays, and prefetch lists it; others of the range may have moved."""
    held = placed(mirror, 4, place)
    middle = uvas.Range(held.base + mirror.granule, mirror.granule)
    pinned = ring(middle.base, middle.size)
    reading, writing = os.pipe()
    pinned.read(reading)  # nothing there yet: it is in flight
    if mirror.private:
        with pytest.raises(uvas.DeviceError, match=f"{middle.base:#x}") as caught:
            mirror.space.prefetch(held, mirror.devices[0])
        assert caught.value.errno == errno.EBUSY or caught.value.code
        assert mirror.holds(middle, HOST).all()
    touching = in_thread(mirror.read, 0, middle.base, 8)  # waits for it, or sees it as it is
    os.write(writing, words(900, 4096))
    assert pinned.wait() == 4096
    pinned.close()
    touching.result(PATIENCE_S)
    assert mirror.differ(0, middle.base, 4096, 900) == 0
    assert mirror.differ(1, middle.base, 4096, 900) == 0
    assert mirror.differ(HOST, middle.base, 4096, 900) == 0
    rest = content(place, held.size)
    assert mirror.read(0, held.base, mirror.granule) == rest[: mirror.granule]
    assert mirror.read(0, middle.base + 4096, held.end - middle.base - 4096) == rest[mirror.granule + 4096 :]
    assert mirror.migrate(held, 1) >= 0  # nothing is in the way any more
    assert mirror.all_at(held, 1) or not mirror.private
    os.close(reading)
    os.close(writing)


def test_direct_reads_into_memory_that_devices_hammer(mirror: Mirror, tmp_path: Path) -> None:
    held = mirror.commit(2, seed=0)
    path = tmp_path / "file"
    path.write_bytes(words(1, mirror.granule))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    stop = threading.Event()

    def hammer(device: int) -> int:
        rounds = 0
        while not stop.is_set():
            mirror.exclusive(device, held.base, 50)
            rounds += 1
        return rounds * 50

    hammering = [in_thread(hammer, device) for device in (0, 1)]
    view = memoryview(held.numpy(np.uint8))
    for _ in range(100):  # from the second page of the first granule on
        assert os.preadv(fd, [view[PAGE : mirror.granule]], 0) == mirror.granule - PAGE
        assert bytes(view[PAGE : mirror.granule]) == words(1, mirror.granule - PAGE)
    stop.set()
    done = sum(one.result(PATIENCE_S) for one in hammering)
    os.close(fd)
    del view
    assert read_word(held.base) == done
    assert mirror.differ(0, held.base + mirror.granule, mirror.granule, mirror.granule // 8) == 0


def test_memory_kept_at_home_for_the_kernel(mirror: Mirror, tmp_path: Path) -> None:
    """`pin_host` is for processes whose system calls may not wait for pages; it works in all of them."""
    held = mirror.commit(4, seed=1)
    mirror.migrate(held, 0)
    path = tmp_path / "file"
    path.write_bytes(words(5, held.size))
    with mirror.space.pin_host(held), path.open("rb", buffering=0) as file:
        assert mirror.holds(held, HOST).all()
        array = held.numpy(np.uint8)
        assert file.readinto(memoryview(array)) == held.size
        del array
    assert mirror.differ(1, held.base, held.size, 5) == 0
