"""Mirrored memory for tests: a space with devices, and the words in which tests of simulated devices speak.

``read`` and ``write`` are a device's accesses, bad ones being errors; ``migrate`` moves pages (prefetch); ``snapshot``
tells where they are (where); ``exclusive`` is an atomic update by the device that has the granule alone. The functions
in ``mirror.c`` are run by anybody, on the same addresses.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import pickle
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import PAGE

import uvas

Memory = Literal["private", "shared"]
MEMORIES: tuple[Memory, ...] = ("private", "shared")
HOST = -1
"""The host among parties; devices are 0, 1, ..."""

stderr = 2
"""Where the watchdog complains; set before output is captured."""

PATIENCE_S = 30.0
"""How long anything may take that a test waits for."""


@functools.cache
def library() -> str:
    """Compile ``mirror.c``, once; the path."""
    folder = tempfile.mkdtemp(prefix="uvas-mirror-")
    path = Path(folder, "libmirror.so")
    source = Path(__file__).with_name("mirror.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-o", path, source], check=True)
    return str(path)


def function(symbol: str, result: str = "int64") -> uvas.CFunction:
    """One of its functions, to be run by a device or, called, by the host."""
    return uvas.CFunction(library(), symbol, result)


@contextlib.contextmanager
def watched(seconds: float = 2 * PATIENCE_S) -> Iterator[None]:
    """End this process with the stacks of its threads if it takes longer.

    A thread that waits in a fault which nobody answers may hold Python's lock, so that only a watchdog in C can tell.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Mirror:
    """A space with devices.

    Parameters
    ----------
    memory
        Of the devices.
    devices
        How many.
    granule, capacity
        Of private devices: bytes; None: as they like.
    """

    def __init__(
        self, memory: Memory, devices: int = 1, *, granule: int | None = None, capacity: int | None = None
    ) -> None:
        self.memory = memory
        self.private = memory == "private"
        own: dict[str, Any] = {"granule": granule, "capacity": capacity} if self.private else {}
        self._reserved: list[uvas.Reservation] = []
        with contextlib.ExitStack() as made:
            self.devices = [
                made.enter_context(uvas.ProcessDevice(name=f"device{i}", memory=memory, **own)) for i in range(devices)
            ]
            self.space = made.enter_context(uvas.AddressSpace(self.devices, name="mirror"))
            self._stack = made.pop_all()
        self.granule = max(self.devices[0].info.granularity if devices else 0, granule or 65536)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *error: object) -> None:
        if self.space.handle:  # a test may have ended it early
            self.clear()
        self._stack.close()

    def clear(self) -> None:
        """Release everything; the invariants hold."""
        gc.collect()
        while self._reserved:
            with contextlib.suppress(uvas.ReleasedError):
                self._reserved.pop().release()
        self.space.check()
        assert self.space.audit().findings == ()

    # ---- memory ------------------------------------------------------------------------------------------------------

    def reserve(self, size: int, *, at: int | None = None, align: int | None = None) -> uvas.Reservation:
        """Reserve until `clear`, if not released before."""
        self._reserved.append(self.space.reserve(size, at=at, align=align))
        return self._reserved[-1]

    def commit(self, granules: int, *, seed: int | None = 0, at: int | None = None) -> uvas.Reservation:
        """Reserve and commit; with a seed, the host writes ``seed, seed + 1, ...`` into the words."""
        held = self.reserve(granules * self.granule, at=at)
        held.commit()
        if seed is not None:
            self.fill(HOST, held.base, held.size, seed)
        return held

    def fill(self, party: int, address: int, size: int, seed: int) -> None:
        """Let a party write ``seed, seed + 1, ...`` into the words there."""
        self.call(party, "fill", address, size // 8, seed, result="none")

    def differ(self, party: int, address: int, size: int, seed: int) -> int:
        """How many words there are not what `fill` wrote, as a party sees them."""
        return self.call(party, "differ", address, size // 8, seed, result="uint64")

    # ---- the words ---------------------------------------------------------------------------------------------------

    def read(self, party: int, address: int, size: int) -> bytes:
        """What a device sees."""
        return self.devices[party].read(address, size)

    def write(self, party: int, address: int, data: bytes) -> None:
        """Let a device write."""
        self.devices[party].write(address, data)

    def migrate(self, what: Any, party: int) -> int:
        """Move pages to a party; how many are there now that were not."""
        before = self.holds(what, party)
        self.space.prefetch(what, self.party(party))
        return int((self.holds(what, party) & ~before).sum())

    def snapshot(self, what: Any) -> np.ndarray:
        """Flags of each page."""
        return self.space.where(what)

    def exclusive(self, party: int, address: int, times: int = 1) -> int:
        """Add one to a word as often, atomically; the value before the last time."""
        return self.call(party, "add", address, times, result="uint64")

    # ---- parties -----------------------------------------------------------------------------------------------------

    def party(self, party: int) -> uvas.ProcessDevice | Literal["host"]:
        """The party as the space's verbs want it."""
        return "host" if party == HOST else self.devices[party]

    def submit(self, party: int, symbol: str, *arguments: int, result: str = "int64") -> Future[Any]:
        """Let a party run a function of ``mirror.c``; the host on a thread."""
        called = function(symbol, result)
        return in_thread(called, *arguments) if party == HOST else self.devices[party].submit(called, *arguments)

    def call(self, party: int, symbol: str, *arguments: int, result: str = "int64") -> Any:
        """The same, and wait."""
        return self.submit(party, symbol, *arguments, result=result).result(PATIENCE_S)

    def holds(self, what: Any, party: int) -> np.ndarray:
        """For each page, whether a party has it."""
        flag = uvas.PageFlag.HOST if party == HOST else uvas.PageFlag.device(party + 1)
        return (self.space.where(what) & np.uint32(flag)) != 0

    def all_at(self, what: Any, *parties: int) -> bool:
        """Whether these have every page, and with private memory nobody else any."""
        others = set(range(HOST, len(self.devices))) - set(parties) if self.private else set()
        return all(self.holds(what, one).all() for one in parties) and not any(
            self.holds(what, one).any() for one in others
        )

    def holds_all(self, party: int) -> np.ndarray:
        """The same over everything that was reserved here and is committed."""
        live = [held for held in self._reserved if self.space.find(held.base) is held]
        return np.concatenate([self.holds(held, party) for held in live])

    def faults(self) -> int:
        """How many, of all parties."""
        moved = self.space.movement()
        return sum(one.read_faults + one.write_faults for one in [moved.host, *moved.devices.values()])


# ---- threads and processes that a test waits for ---------------------------------------------------------------------


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run it on a thread that nobody joins: one that hangs is found by whoever waits for its result."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.002)


class Child:
    """A forked child that does its work when it is asked for its answer.

    Parameters
    ----------
    work
        What it does; a value that can be pickled is its answer, so is an exception.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._asking, asked = os.pipe()[::-1]
        answers, answering = os.pipe()
        self._answers = answers
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._asking)
            self._work(work, asked, answering)
        os.close(asked)
        os.close(answering)

    @staticmethod
    def _work(work: Callable[[], Any], asked: int, answering: int) -> None:
        try:
            os.read(asked, 1)
            answer: Any = work()
        except BaseException as error:
            answer = error.with_traceback(None)
        try:
            os.write(answering, pickle.dumps(answer))
        finally:
            os._exit(0)

    def answer(self) -> Any:
        """Let it work, and return what it says."""
        os.write(self._asking, b"!")
        os.close(self._asking)
        ready, _, _ = select.select([self._answers], [], [], PATIENCE_S)
        if not ready:
            os.kill(self.pid, 9)
        with os.fdopen(self._answers, "rb") as end:
            said = end.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"the child ended with {status} and said {said!r}"
        assert said, "the child did not answer"
        answer = pickle.loads(said)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def words(seed: int, size: int) -> bytes:
    """What `Mirror.fill` writes."""
    return np.arange(seed, seed + size // 8, dtype=np.uint64).tobytes()


def pages(what: Any) -> int:
    """Of a range."""
    return int(what.size) // PAGE


def parts(held: Any, size: int) -> Sequence[uvas.Range]:
    """A reservation cut into parts of one size."""
    return [uvas.Range(base, size) for base in range(held.base, held.end, size)]
