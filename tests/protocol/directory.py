"""The directory's table: who asks for a granule, who has it afterwards, and the steps that bring it there, in order.

A granule is *modified* (one party has it and may write), *shared* (its holders may read), *nowhere* (it reads as zeros)
or *uncommitted*. Party 0 is the host. Its memory is anonymous: what its page table lacks is gone. Party i is the i-th
device. Its memory is a file that the host holds open: what the device's page table lacks, or the device's death leaves
behind, can still be read there.

The whole protocol is in ``transition``, and it is one idea: **others lose before the asker gains**. In more words:

1. Nobody writes what is being copied: the host's page is moved out of everybody's reach, a device's is protected.
2. The new copy is complete, and protected, before an old one is dropped. The right to write comes last.
3. What may fail comes before what cannot be undone: a transition that fails has changed nothing, or goes on to
   something that is true as well.
4. The directory is told before the asker is woken.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from typing import NamedTuple

HOST = 0
STAGING = -1
"""Where the host's page is while it is moved: memory of the pager's own, which nobody else can reach."""


class Wish(IntEnum):
    """What is asked of the pager for a party."""

    READ = 0  # a fault, or a prefetch that shares
    WRITE = 1  # a fault, or a prefetch that moves
    LEAVE = 2  # the party gives up its copy: eviction, or the party is dead
    DISCARD = 3  # everybody does, and the contents do not matter


class Verb(IntEnum):
    """A step. All but CHARGE, DISCHARGE and PUBLISH are one call of the kernel."""

    CHARGE = 0  # count a granule against the device's capacity
    MOVE_OUT = 1  # UFFDIO_MOVE from the host to staging
    PROTECT = 2  # UFFDIO_WRITEPROTECT
    ZERO = 3  # host: UFFDIO_ZEROPAGE, which is writable; device: fallocate
    COPY = 4  # UFFDIO_COPY with MODE_WP, to the host or into a device
    KEEP = 5  # the same, from staging back to the host
    DROP = 6  # empty staging
    TAKE = 7  # host: MADV_DONTNEED; device: punch the hole, which unmaps
    DISCHARGE = 8  # the device's page is gone
    PUBLISH = 9  # the new entry
    MAP = 10  # UFFDIO_CONTINUE in a device
    ALLOW = 11  # UFFDIO_WRITEPROTECT off, and wake
    WAKE = 12  # UFFDIO_WAKE
    MOVE_BACK = 13  # UFFDIO_MOVE from staging to the host: only to undo


MAY_FAIL = frozenset({Verb.CHARGE, Verb.MOVE_OUT, Verb.ZERO, Verb.COPY})
"""If it fails (capacity, a pinned page, memory) all before it is undone."""
UNDONE_BY = {
    Verb.CHARGE: Verb.DISCHARGE,
    Verb.MOVE_OUT: Verb.MOVE_BACK,
    Verb.PROTECT: Verb.ALLOW,
    Verb.COPY: Verb.TAKE,
}
GOES_ON = frozenset({Verb.KEEP, Verb.TAKE})
"""If it fails what comes is true as well: the host does without, the loser keeps a copy."""
CANNOT_BE_UNDONE = frozenset({Verb.DROP, Verb.TAKE, Verb.DISCHARGE, Verb.PUBLISH})


class Step(NamedTuple):
    """One step."""

    verb: Verb
    party: int = HOST  # whose memory, whose page table
    source: int = STAGING  # COPY and KEEP: whose memory is read
    readonly: bool = True  # COPY, KEEP and MAP: with MODE_WP

    def __repr__(self) -> str:
        name = self.verb.name.lower().replace("_", " ")
        source = f" from {party_name(self.source)}" if self.verb in (Verb.COPY, Verb.KEEP) else ""
        return f"{name} {party_name(self.party)}{source}{'' if self.readonly else ', writable'}"


class Entry(NamedTuple):
    """What the directory knows of a committed granule."""

    holders: int  # one bit a party
    modified: bool


class Transition(NamedTuple):
    """How a wish is granted."""

    after: Entry
    steps: tuple[Step, ...]


NOWHERE = Entry(0, False)
AT_HOME = Entry(1 << HOST, True)
"""The host alone, who may write. Pages that were never touched are holes in it."""


@cache
def party_name(party: int) -> str:
    """Say who it is."""
    return {STAGING: "staging", HOST: "host"}.get(party, f"device {party}")


def members(holders: int) -> list[int]:
    """List the parties in a set."""
    return [party for party in range(holders.bit_length()) if holders >> party & 1]


def entries(parties: int) -> list[Entry]:
    """List every entry there can be: nowhere, one party modified, one or more shared."""
    shared = [Entry(holders, False) for holders in range(1, 1 << parties)]
    return [NOWHERE, *(Entry(1 << party, True) for party in range(parties)), *shared]


def entry_after(before: Entry, asker: int, wish: Wish) -> Entry:
    """Who has the granule when the wish is granted."""
    holds = before.holders >> asker & 1
    match wish:
        case Wish.READ if holds:
            return before
        case Wish.READ if before != NOWHERE:
            return Entry(before.holders | 1 << asker, False)
        case Wish.READ | Wish.WRITE:
            return Entry(1 << asker, True)
        case Wish.LEAVE if not holds:
            return before
        case Wish.LEAVE:
            rest = before.holders & ~(1 << asker)
            return Entry(rest, False) if rest else AT_HOME
        case Wish.DISCARD:
            return NOWHERE


@cache
def transition(before: Entry, asker: int, wish: Wish) -> Transition:
    """How it becomes so."""
    after = entry_after(before, asker, wish)
    if after == before:
        return Transition(after, repair(before, asker, wish))
    if before == NOWHERE:
        return Transition(after, from_nowhere(asker))
    change = Change(before, after, HOST if wish == Wish.LEAVE else asker)
    return Transition(after, (*copied(change), *dropped(change), Step(Verb.PUBLISH), *granted(change)))


class Change(NamedTuple):
    """From one entry to another, for the sake of a party."""

    before: Entry
    after: Entry
    gainer: int

    @property
    def copies(self) -> bool:
        """Whether the gainer has no copy yet."""
        return bool(self.after.holders & ~self.before.holders)

    @property
    def source(self) -> int:
        """Where to copy from: a device's file, or if the host has it alone, where its page is moved."""
        return next((party for party in members(self.before.holders) if party != HOST), STAGING)

    @property
    def moves(self) -> bool:
        """Whether the host, who has it alone, has to let go of its page."""
        return self.source == STAGING and self.copies


def copied(change: Change) -> Iterator[Step]:
    """Keep others from writing, and make the gainer's copy."""
    if not change.copies:
        return
    if change.gainer != HOST:
        yield Step(Verb.CHARGE, change.gainer)
    if change.moves:
        yield Step(Verb.MOVE_OUT)
    elif change.before.modified:
        yield Step(Verb.PROTECT, change.source)
    yield Step(Verb.COPY, change.gainer, change.source)


def dropped(change: Change) -> Iterator[Step]:
    """Take the copies of those who lose theirs."""
    if change.moves and HOST in members(change.after.holders):
        yield Step(Verb.KEEP)
    if change.moves:
        yield Step(Verb.DROP)
    for loser in members(change.before.holders & ~change.after.holders):
        if loser != HOST:
            yield Step(Verb.TAKE, loser)
            yield Step(Verb.DISCHARGE, loser)
        elif not change.moves:
            yield Step(Verb.TAKE, loser)


def granted(change: Change) -> Iterator[Step]:
    """Let the gainer in, and wake it."""
    if change.after.modified:
        yield Step(Verb.ALLOW, change.gainer)
    elif change.copies:
        yield Step(Verb.WAKE, change.gainer)


def from_nowhere(asker: int) -> tuple[Step, ...]:
    """Give zeros to who asks first."""
    if asker == HOST:
        return (Step(Verb.ZERO), Step(Verb.PUBLISH), Step(Verb.WAKE))
    return (
        Step(Verb.CHARGE, asker),
        Step(Verb.ZERO, asker),
        Step(Verb.PUBLISH),
        Step(Verb.MAP, asker, readonly=False),
        Step(Verb.WAKE, asker),
    )


def repair(entry: Entry, asker: int, wish: Wish) -> tuple[Step, ...]:
    """Answer a fault that found what it wanted: its page may be missing all the same, and somebody may be asleep.

    That the page is there already (EEXIST) is normal.
    """
    if wish in (Wish.LEAVE, Wish.DISCARD):
        return ()
    if asker != HOST:
        return (Step(Verb.MAP, asker, readonly=not entry.modified), Step(Verb.WAKE, asker))
    return (Step(Verb.ZERO), Step(Verb.WAKE)) if entry.modified else (Step(Verb.WAKE),)


def undo(before: Entry, done: tuple[Step, ...]) -> Transition:
    """Take back the steps that were done before one failed. None of these fails. What was moved back can be written."""
    steps = [Step(UNDONE_BY[step.verb], step.party) for step in reversed(done)]
    moved = any(step.verb == Verb.MOVE_OUT for step in done)
    return Transition(AT_HOME if moved else before, (*steps, Step(Verb.PUBLISH)))


def table(parties: int) -> dict[tuple[Entry, int, Wish], Transition]:
    """The protocol as data: every entry, and everything that can be asked for somebody."""
    return {
        (before, asker, wish): transition(before, asker, wish)
        for before in entries(parties)
        for asker in range(parties)
        for wish in Wish
        if can_ask(asker, wish)
    }


def can_ask(asker: int, wish: Wish) -> bool:
    """Whether there is such a request: the host does not leave, and it is the host that discards."""
    return wish not in (Wish.LEAVE, Wish.DISCARD) or (wish == Wish.DISCARD) == (asker == HOST)
