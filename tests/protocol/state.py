"""One granule: what there is of it, who can reach it, who waits for it.

What a copy holds is either the last completed write (FRESH) or not (STALE): a write makes its own copy fresh and all
others stale, and everything else only copies. No more is needed, since nobody asks how old a stale copy is.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, TypeVar

from protocol.directory import Entry, Step, Wish, party_name

T = TypeVar("T")


class Data(IntEnum):
    """What a place holds."""

    NOTHING = 0
    STALE = 1
    FRESH = 2


class Table(IntEnum):
    """What a party's page table says."""

    UNMAPPED = 0  # not even a mapping: SIGSEGV
    ABSENT = 1  # a fault
    READ = 2  # a fault if it writes
    WRITE = 3
    DEAD = 4  # the process is gone
    BURIED = 5  # and the pager knows


class Place(IntEnum):
    """Where a thread is."""

    RESTS = 0
    QUEUED = 1  # asleep in a fault that the pager has not read
    ASLEEP = 2  # asleep in a fault that the pager has read
    WOKEN = 3  # about to try again
    FLYING = 4  # the kernel has pinned its page, and writes into it later, whatever page tables say by then
    ADRIFT = 5  # the same, and the page is nobody's any more


class Thread(NamedTuple):
    """A thread of a party."""

    place: Place = Place.RESTS
    wish: Wish = Wish.READ  # READ or WRITE; of one that rests, READ


class Request(NamedTuple):
    """What the pager has been asked."""

    asker: int
    wish: Wish

    def __repr__(self) -> str:
        return f"{self.wish.name.lower()} for {party_name(self.asker)}"


class Plan(NamedTuple):
    """What the pager is at."""

    request: Request
    after: Entry | None
    done: tuple[Step, ...]
    todo: tuple[Step, ...]
    undoes: bool = False


class State(NamedTuple):
    """Everything. Where there is one item a party, the host's comes first."""

    entry: Entry | None  # None: uncommitted
    table: tuple[Table, ...]
    memory: tuple[Data, ...]
    staging: Data
    zeros: Data  # what a hole reads as
    charged: int  # one bit a party
    threads: tuple[Thread, ...]
    known: frozenset[Request]
    plan: Plan | None
    script: int  # how far a decommit has come, and the commit after it; or a fork

    def with_table(self, party: int, table: Table) -> State:
        """Change one page table."""
        return self._replace(table=put(self.table, party, table))

    def with_memory(self, party: int, data: Data) -> State:
        """Change what one party holds."""
        return self._replace(memory=put(self.memory, party, data))

    def with_thread(self, number: int, thread: Thread) -> State:
        """Change one thread."""
        return self._replace(threads=put(self.threads, number, thread))

    def with_threads(self, changed: Callable[[int, Thread], Thread]) -> State:
        """Change threads: each is asked for with its number."""
        return self._replace(threads=tuple(changed(number, one) for number, one in enumerate(self.threads)))


AT_REST = Thread()


class Broken(AssertionError):
    """A promise does not hold."""


def promise(holds: bool, otherwise: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise Broken(otherwise)


def put(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    """Replace one item."""
    return (*items[:index], item, *items[index + 1 :])
