"""What the kernel does: each step of a plan, an access, a write in flight, a death. One function each, all at once.

The answers are those of Linux 6.18: EBUSY for a pinned page, EEXIST where something is, ENOENT where nothing is mapped,
ESRCH for a process that is gone. What installs pages wakes nobody here (MODE_DONTWAKE).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.directory import HOST, STAGING, Step, Wish, party_name
from protocol.state import AT_REST, Data, Place, State, Table, Thread, promise

WAITS = (Place.QUEUED, Place.ASLEEP)
READABLE = (Table.READ, Table.WRITE)


class Refused(Exception):
    """A step that the kernel refuses, and will refuse until something changes."""


@dataclass(frozen=True)
class Kernel:
    """The kernel, and which party each thread belongs to."""

    party_of: tuple[int, ...]

    # ---- what a thread meets -----------------------------------------------------------------------------------------

    def access(self, state: State, number: int, wish: Wish, *, pins: bool = False) -> State:
        """Read or write, or fall asleep in a fault. A write of the kernel's pins the page now and ends later."""
        party = self.party_of[number]
        table = state.table[party]
        if table == Table.UNMAPPED:
            return state.with_thread(number, AT_REST)
        if table != Table.WRITE and (table != Table.READ or wish == Wish.WRITE):
            return state.with_thread(number, Thread(Place.QUEUED, wish))
        promise(state.memory[party] == Data.FRESH, f"{party_name(party)} meets old data")
        if pins:
            return state.with_thread(number, Thread(Place.FLYING, wish))
        return (self.written(state, party) if wish == Wish.WRITE else state).with_thread(number, AT_REST)

    def written(self, state: State, party: int) -> State:
        """Make one copy the last completed write, and all others old."""
        memory = [min(data, Data.STALE) for data in state.memory]
        memory[party] = Data.FRESH
        return state._replace(memory=tuple(memory), staging=min(state.staging, Data.STALE), zeros=Data.STALE)

    def landed(self, state: State, number: int) -> State:
        """End a write in flight. Its page is where it was, or nobody's any more."""
        promise(state.threads[number].place == Place.FLYING, "a write in flight went into a page that was dropped")
        return self.written(state, HOST).with_thread(number, AT_REST)

    def died(self, state: State, party: int) -> State:
        """End a device's process: its threads and page table go, the file that is its memory stays."""
        state = state.with_table(party, Table.DEAD)
        return state.with_threads(lambda number, one: AT_REST if self.party_of[number] == party else one)

    def unmapped(self, state: State, party: int) -> State:
        """Map something else over a party's addresses. Who is asleep in a fault there sleeps on."""
        if state.table[party] in (Table.DEAD, Table.BURIED):
            return state
        state = state.with_table(party, Table.UNMAPPED)
        if party != HOST:
            return state
        state = state.with_memory(HOST, Data.NOTHING)
        return state.with_threads(lambda _, one: AT_REST if one.place == Place.FLYING else one)

    def mapped(self, state: State, party: int) -> State:
        """Map the granule's memory at a party's addresses."""
        return state.with_table(party, Table.ABSENT) if state.table[party] == Table.UNMAPPED else state

    def wake(self, state: State, party: int) -> State:
        """Wake who is asleep in a fault of a party. What the pager has read of it is not unread."""
        return state.with_threads(
            lambda number, one: (
                one._replace(place=Place.WOKEN) if self.party_of[number] == party and one.place in WAITS else one
            )
        )

    # ---- the pager's steps, each by its verb's name ------------------------------------------------------------------

    def charge(self, state: State, step: Step) -> State:
        promise(not state.charged >> step.party & 1, f"{party_name(step.party)} is charged twice")
        return state._replace(charged=state.charged | 1 << step.party)

    def discharge(self, state: State, step: Step) -> State:
        promise(not state.memory[step.party], f"{party_name(step.party)} is discharged of a page that it has")
        return state._replace(charged=state.charged & ~(1 << step.party))

    def move_out(self, state: State, step: Step) -> State:
        if state.table[HOST] == Table.UNMAPPED:
            raise Refused("ENOENT")
        if any(one.place == Place.FLYING for one in state.threads):
            raise Refused("EBUSY")
        promise(not state.staging, "staging is in use")
        moved = state._replace(staging=state.memory[HOST] or state.zeros)
        return moved.with_memory(HOST, Data.NOTHING).with_table(HOST, Table.ABSENT)

    def move_back(self, state: State, step: Step) -> State:
        promise(not state.memory[HOST], "EEXIST: moved back over a page")
        return state._replace(staging=Data.NOTHING).with_memory(HOST, state.staging).with_table(HOST, Table.WRITE)

    def drop(self, state: State, step: Step) -> State:
        return state._replace(staging=Data.NOTHING)

    def protect(self, state: State, step: Step) -> State:
        return state.with_table(step.party, Table.READ) if state.table[step.party] == Table.WRITE else state

    def allow(self, state: State, step: Step) -> State:
        if state.table[step.party] == Table.READ:
            state = state.with_table(step.party, Table.WRITE)
        return self.wake(state, step.party)

    def zero(self, state: State, step: Step) -> State:
        if state.memory[step.party] or state.table[step.party] == Table.UNMAPPED:
            return state  # EEXIST or ENOENT; fallocate changes nothing
        state = state.with_memory(step.party, state.zeros)
        return state.with_table(HOST, Table.WRITE) if step.party == HOST else state

    def copy(self, state: State, step: Step) -> State:
        if state.table[step.party] != Table.ABSENT:
            promise(state.table[step.party] not in READABLE, "EEXIST: copied over a page")
            raise Refused("ENOENT, or ESRCH")
        promise(not state.memory[step.party], "EEXIST: copied over a page")
        copied = state.with_memory(step.party, self.contents(state, step.source))
        return copied.with_table(step.party, Table.READ if step.readonly else Table.WRITE)

    keep = copy

    def contents(self, state: State, source: int) -> Data:
        """Read staging, or somebody's memory. A hole reads as zeros."""
        return (state.staging if source == STAGING else state.memory[source]) or state.zeros

    def take(self, state: State, step: Step) -> State:
        if state.table[step.party] in READABLE:
            state = state.with_table(step.party, Table.ABSENT)
        if step.party == HOST:
            state = state.with_threads(
                lambda _, one: one._replace(place=Place.ADRIFT) if one.place == Place.FLYING else one
            )
        return state.with_memory(step.party, Data.NOTHING)

    def map(self, state: State, step: Step) -> State:
        if state.table[step.party] != Table.ABSENT:
            return state  # EEXIST, ENOENT, ESRCH
        promise(bool(state.memory[step.party]), f"EFAULT: nothing to map for {party_name(step.party)}")
        return state.with_table(step.party, Table.READ if step.readonly else Table.WRITE)
