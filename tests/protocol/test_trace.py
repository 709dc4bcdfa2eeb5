"""The pager's system calls, one by one, are the steps that the table says, on the way through every entry that accesses
and discards of three parties lead to.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from protocol.directory import AT_HOME, HOST, STAGING, Entry, Step, Verb, Wish, entry_after, transition

from uvas._core import ffi, lib

HERE = Path(__file__).parent
PARTIES = 3
UNSEEN = (Verb.CHARGE, Verb.DISCHARGE, Verb.PUBLISH, Verb.WAKE)
"""No system calls, but for waking: how often that is done does not matter, and whoever is not woken does not go on."""
WRITE_PROTECT, MINOR = 2, 4
"""Modes of UFFDIO_REGISTER; bit 1 of COPY's and of CONTINUE's is MODE_WP as well."""
REGISTER, COPY, ZEROPAGE, MOVE, PROTECT, CONTINUE = 0, 3, 4, 5, 6, 7

Row = tuple[Entry, int, Wish]


ASKED = [(party, wish) for wish in (Wish.READ, Wish.WRITE) for party in range(PARTIES)] + [(HOST, Wish.DISCARD)]


def shortest(at: Entry, wanted: Callable[[Entry], Row | None]) -> list[Row]:
    """Find the nearest entry that has a wanted row, and go there and along it; empty if none has."""
    todo: deque[tuple[Entry, list[Row]]] = deque([(at, [])])
    seen = {at}
    while todo:
        entry, path = todo.popleft()
        if row := wanted(entry):
            return [*path, row]
        for party, wish in ASKED:
            after = entry_after(entry, party, wish)
            if after not in seen:
                seen.add(after)
                todo.append((after, [*path, (entry, party, wish)]))
    return []


def walk() -> list[Row]:
    """Go along every row that can be reached, by the shortest ways."""
    way: list[Row] = []

    def fresh(entry: Entry) -> Row | None:
        return next(((entry, *asked) for asked in ASKED if (entry, *asked) not in way), None)

    while more := shortest(entry_after(*way[-1]) if way else AT_HOME, fresh):
        way += more
    return way


def deaths(holders: int, *, modified: bool) -> list[Row]:
    """Go where a granule is so, and let device 1 die, then device 2."""
    way = shortest(AT_HOME, lambda entry: (entry, 1, Wish.LEAVE) if entry == (holders, modified) else None)
    return [*way, (entry_after(*way[-1]), 2, Wish.LEAVE)]


@dataclass
class Reader:
    """Makes steps of what the trace says."""

    base: int
    whose: dict[int, int] = field(default_factory=dict)  # party of a userfaultfd, or of a device's file
    aliases: dict[int, int] = field(default_factory=dict)  # party of an address where its file is mapped
    mapped: dict[int, int] = field(default_factory=dict)  # address of the last mapping of a file
    staging: range = range(0)

    def learn(self, what: str, fd: int, words: list[int]) -> None:
        """See who is who, before the first access: devices come in order."""
        if what == "map":
            self.mapped[fd] = words[0]
        elif what == f"uffd{REGISTER}" and words[2] == WRITE_PROTECT:
            self.whose[fd] = HOST
            self.staging = range(words[0], words[0] + words[1])
        elif what == f"uffd{REGISTER}" and words[2] & MINOR:
            self.whose[fd] = sum(1 for known in self.whose.values() if known != HOST) + 1
        elif what == "punch":
            self.aliases[self.mapped[fd]] = len(self.aliases) + 1
            self.whose[fd] = self.aliases[self.mapped[fd]]

    def source(self, address: int) -> int:
        """Whose memory is read there."""
        return STAGING if address in self.staging else self.aliases[address]

    def step(self, what: str, fd: int, words: list[int]) -> Step | None:
        """Return the step that a call is."""
        party = self.whose.get(fd, HOST)
        if what == f"uffd{COPY}":
            keeps = party == HOST and words[1] in self.staging
            readonly = bool(words[3] & WRITE_PROTECT)
            return Step(Verb.KEEP if keeps else Verb.COPY, party, self.source(words[1]), readonly)
        if what == f"uffd{CONTINUE}":
            return Step(Verb.MAP, party, readonly=bool(words[2] & WRITE_PROTECT))
        if what == f"uffd{MOVE}":
            return Step(Verb.MOVE_OUT if words[1] == self.base else Verb.MOVE_BACK)
        if what == f"uffd{PROTECT}":
            return Step(Verb.PROTECT if words[2] & 1 else Verb.ALLOW, party)
        if what == "drop":
            return Step(Verb.DROP if words[0] in self.staging else Verb.TAKE)
        verb = {f"uffd{ZEROPAGE}": Verb.ZERO, "allocate": Verb.ZERO, "punch": Verb.TAKE}.get(what)
        return None if verb is None else Step(verb, party)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What writes the calls down. Without private memory that moves pages there is nothing to be seen."""
    features = ffi.new("uint32_t *")
    if lib.uvas_private_memory(features) < 0 or not features[0] & lib.UVAS_PRIVATE_PINNED:
        pytest.skip("userfaultfd is not to be had here, or has no UFFDIO_MOVE")
    library = tmp_path_factory.mktemp("trace") / "trace.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-shared", "-fPIC", HERE / "trace.c", "-o", library, "-ldl"], check=True)
    return library


def traced(shim: Path, way: list[Row]) -> tuple[list[str], list[list[tuple[str, int, list[int]]]]]:
    """Walk; return what the walker says, and the calls before the first step, during each, and after the last."""
    trace = shim.with_name("calls")
    with trace.open("wb", buffering=0) as file:
        ran = subprocess.run(
            [sys.executable, HERE / "walk.py", str(file.fileno())],
            input="".join(f"{wish.name} {party}\n" for _, party, wish in way),
            env={**os.environ, "LD_PRELOAD": str(shim), "UVAS_TRACE": str(file.fileno())},
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    parts: list[list[tuple[str, int, list[int]]]] = [[]]
    for line in trace.read_text().splitlines():
        if line == "next":
            parts.append([])
        else:
            what, fd, *words = line.split()
            parts[-1].append((what, int(fd), [int(word) for word in words]))
    return ran.stdout.splitlines(), parts


def expected(row: Row) -> list[Step]:
    """Return the steps that can be seen. Whoever has what it wants does not fault; the dead need not be stopped."""
    plan = transition(*row)
    unseen = (*UNSEEN, Verb.PROTECT) if row[2] == Wish.LEAVE else UNSEEN
    steps = [step for step in plan.steps if step.verb not in unseen] if plan.after != row[0] else []
    if row[2] != Wish.DISCARD:
        return steps
    return [*(step for step in steps if step.party != HOST), Step(Verb.TAKE)]  # the host's in any case: marks of losses


def check_steps(shim: Path, way: list[Row]) -> None:
    """Walk, and compare."""
    said, (before, *parts, _) = traced(shim, way)
    reader = Reader(int(said[0]))
    for call in before:
        reader.learn(*call)
    assert len(parts) == len(way)
    for row, calls in zip(way, parts, strict=True):
        steps = [step for call in calls if (step := reader.step(*call)) is not None]
        assert steps == expected(row), row


def test_the_pager_does_step_by_step_what_the_table_says(shim: Path) -> None:
    check_steps(shim, walk())


@pytest.mark.parametrize(
    ("holders", "modified"), [(0b010, True), (0b111, False), (0b110, False)], ids=["modified", "shared", "by devices"]
)
def test_what_the_dead_held_comes_home_step_by_step(shim: Path, holders: int, modified: bool) -> None:
    check_steps(shim, deaths(holders, modified=modified))


def test_every_read_is_of_the_last_write(shim: Path) -> None:
    way = walk()
    said, _ = traced(shim, way)
    value, values = 0, []
    for number, (_, _, wish) in enumerate(way):
        value = {Wish.READ: value, Wish.WRITE: number, Wish.DISCARD: 0}[wish]
        values += [value] if wish == Wish.READ else []
    assert [int(line) for line in said[1:]] == values
