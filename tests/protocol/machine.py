"""What may come next: the rules of threads, of the pager, of a decommit, of chance; and what must hold in every state.

What *must* come, sooner or later, is told apart from what only *may*: the pager goes on, a woken thread tries again, a
write in flight ends, a decommit that has begun goes on. But nobody need fault again, be evicted or die. So whoever can
be woken only by what may come is asleep for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from protocol.directory import (
    AT_HOME,
    GOES_ON,
    HOST,
    MAY_FAIL,
    NOWHERE,
    Entry,
    Step,
    Transition,
    Verb,
    Wish,
    can_ask,
    members,
    party_name,
    transition,
    undo,
)
from protocol.kernel import READABLE, Kernel, Refused
from protocol.state import AT_REST, Data, Place, Plan, Request, State, Table, Thread, promise

PRIVATE = (Verb.CHARGE, Verb.DISCHARGE, Verb.PUBLISH)
"""Steps that only the pager sees: done together with the step before, since nobody can tell."""


class Move(NamedTuple):
    """One thing that may come next."""

    name: str
    must: bool
    state: State


@dataclass(frozen=True)
class Machine:
    """The rules, for so many devices, and for the kinds of chance that are wanted."""

    devices: int
    threads: int = 1  # of each party
    writes_in_flight: bool = False  # one more thread of the host's, whose writes are the kernel's
    deaths: bool = False
    failures: bool = False  # of every step that may fail
    reclaim: bool = False  # the kernel takes pages out of a device's page table
    commands: tuple[Wish, ...] = ()  # prefetches (READ, WRITE), evictions (LEAVE), DISCARD
    decommits: bool = False
    forks: bool = False  # of the host's process; not together with decommits
    kernel_type: type[Kernel] = Kernel

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel, for these threads."""
        parties = [party for party in range(self.devices + 1) for _ in range(self.threads)]
        return self.kernel_type((*parties, *([HOST] if self.writes_in_flight else [])))

    @cached_property
    def used(self) -> set[tuple[Entry, int, Wish]]:
        """Rows of the table that have been used so far."""
        return set()

    @cached_property
    def first(self) -> State:
        """Committed, and never touched."""
        parties = self.devices + 1
        return State(
            entry=AT_HOME,
            table=(Table.ABSENT,) * parties,
            memory=(Data.NOTHING,) * parties,
            staging=Data.NOTHING,
            zeros=Data.FRESH,
            charged=0,
            threads=(AT_REST,) * len(self.kernel.party_of),
            known=frozenset(),
            plan=None,
            script=0,
        )

    def moves(self, state: State) -> Iterator[Move]:
        """Yield everything that may come next."""
        yield from self.accesses(state)
        yield from self.pager_goes_on(state) if state.plan else self.pager_turns(state)
        if self.decommits:
            yield from self.decommit_goes_on(state)
        if self.forks and not state.plan:
            yield from self.fork_goes_on(state)
        if self.commands and not state.plan:
            yield from self.told(state)
        yield from self.chance(state)

    def one_of_its_like(self, state: State) -> State:
        """Put a party's threads in order: no rule tells them apart, so what can come of one order can of the other."""
        if self.threads == 1:
            return state
        count = self.threads * (self.devices + 1)  # the one whose writes are the kernel's is like no other
        starts = range(0, count, self.threads)
        ordered = [one for at in starts for one in sorted(state.threads[at : at + self.threads])]
        return state._replace(threads=(*ordered, *state.threads[count:]))

    # ---- threads -----------------------------------------------------------------------------------------------------

    def accesses(self, state: State) -> Iterator[Move]:
        """Whoever rests may read or write, whoever was woken tries again, what is in flight lands."""
        for number, one in enumerate(state.threads):
            party = self.kernel.party_of[number]
            pins = self.writes_in_flight and number == len(state.threads) - 1
            who = "the kernel, for the host," if pins else party_name(party)
            if one.place == Place.WOKEN:
                tried = self.kernel.access(state, number, one.wish, pins=pins)
                yield Move(f"{who} tries again to {one.wish.name.lower()}", True, tried)
            elif one.place in (Place.FLYING, Place.ADRIFT):
                yield Move("the write in flight lands", True, self.kernel.landed(state, number))
            elif one.place == Place.RESTS and state.table[party] not in (Table.DEAD, Table.BURIED):
                for wish in (Wish.WRITE,) if pins else (Wish.READ, Wish.WRITE):
                    tried = self.kernel.access(state, number, wish, pins=pins)
                    yield Move(f"{who} {wish.name.lower()}s", False, tried)

    # ---- the pager ---------------------------------------------------------------------------------------------------

    def pager_turns(self, state: State) -> Iterator[Move]:
        """Between two transitions it reads faults and deaths, and takes up any of the requests that it knows."""
        answers = state.entry is not None and not self.is_closed(state)
        for number, one in enumerate(state.threads):
            if one.place == Place.QUEUED:
                asked = Request(self.kernel.party_of[number], one.wish)
                read = state.with_thread(number, Thread(Place.ASLEEP, one.wish))
                known = read.known | {asked} if answers else read.known  # or who brings or takes the memory wakes it
                yield Move(f"the pager reads a fault: {asked}", True, read._replace(known=known))
        for party, table in enumerate(state.table):
            if table == Table.DEAD:
                yield Move(f"the pager learns that {party_name(party)} is dead", True, self.bury(state, party))
        for asked in state.known if answers else ():
            if self.waits_for_fork(state, asked):
                continue
            left = state._replace(known=state.known - {asked})
            todo = self.steps(state.entry, asked)
            plan = Plan(asked, todo.after, (), todo.steps) if todo.steps else None
            yield Move(f"the pager takes up: {asked}", True, self.settled(left._replace(plan=plan)))

    def bury(self, state: State, party: int) -> State:
        """Nothing more is asked for the dead; what it holds comes home."""
        left = frozenset(asked for asked in state.known if asked.asker != party)
        leaves = left | {Request(party, Wish.LEAVE)} if state.entry else left
        return state.with_table(party, Table.BURIED)._replace(known=leaves)

    def steps(self, entry: Entry, asked: Request) -> Transition:
        """Look it up in the table."""
        self.used.add((entry, asked.asker, asked.wish))
        return transition(entry, asked.asker, asked.wish)

    def pager_goes_on(self, state: State) -> Iterator[Move]:
        """Do the next step; or it fails."""
        plan = state.plan
        step = plan.todo[0]
        try:
            yield Move(f"the pager: {step}", True, self.settled(self.performed(state, step)))
        except Refused as refusal:
            yield Move(f"the pager: {step}: {refusal}", True, self.settled(self.failed(state)))
        else:
            if self.failures and step.verb in MAY_FAIL | GOES_ON and not plan.undoes:
                yield Move(f"the pager: {step}: fails", False, self.settled(self.failed(state)))

    def performed(self, state: State, step: Step) -> State:
        """Do one step, and remember that it is done."""
        plan = state.plan
        if step.verb == Verb.PUBLISH:
            state = self.published(state, plan)
        elif step.verb == Verb.WAKE:
            state = self.kernel.wake(state, step.party)
        else:
            state = getattr(self.kernel, step.verb.name.lower())(state, step)
        return state._replace(plan=plan._replace(done=(*plan.done, step), todo=plan.todo[1:]))

    def settled(self, state: State) -> State:
        """Go on to the next step that others can see."""
        while state.plan and (not state.plan.todo or state.plan.todo[0].verb in PRIVATE):
            state = self.performed(state, state.plan.todo[0]) if state.plan.todo else state._replace(plan=None)
        return state

    def published(self, state: State, plan: Plan) -> State:
        """Tell the directory. What is discarded reads as zeros from now on; what is in flight into it is void."""
        state = state._replace(entry=plan.after)
        if plan.after != NOWHERE or plan.request.wish != Wish.DISCARD:
            return state
        state = state.with_threads(lambda _, one: AT_REST if one.place == Place.ADRIFT else one)
        return self.cleared(state)

    def cleared(self, state: State) -> State:
        """Make zeros the last completed write."""
        return state._replace(memory=tuple(min(data, Data.STALE) for data in state.memory), zeros=Data.FRESH)

    def failed(self, state: State) -> State:
        """Undo what was done, or go on to something that is true as well. Ask again later."""
        plan = state.plan
        step = plan.todo[0]
        if step.verb == Verb.KEEP:
            return state._replace(plan=plan._replace(after=self.without_host(plan.after), todo=plan.todo[1:]))
        if step.verb == Verb.TAKE:
            plan = self.with_loser(state, step.party)
        else:
            back = undo(state.entry, plan.done)
            plan = Plan(plan.request, back.after, (), back.steps, undoes=True)
        return state._replace(plan=plan, known=state.known | {plan.request})

    def without_host(self, after: Entry) -> Entry:
        """The host was to keep a copy, and there is no memory for it."""
        return Entry(after.holders & ~(1 << HOST), False)

    def with_loser(self, state: State, loser: int) -> Plan:
        """Somebody's copy could not be taken: it is true, and nobody may write while it is there."""
        plan = state.plan
        if plan.request.wish == Wish.DISCARD:  # nothing was protected: whoever has it has it as before
            taken = sum(1 << step.party for step in plan.done if step.verb == Verb.TAKE)
            return plan._replace(
                after=state.entry._replace(holders=state.entry.holders & ~taken), todo=(Step(Verb.PUBLISH),)
            )
        left_out = (Step(Verb.DISCHARGE, loser), Step(Verb.ALLOW, plan.request.asker), Step(Verb.ALLOW, HOST))
        todo = tuple(step for step in plan.todo[1:] if step not in left_out)
        return plan._replace(after=Entry(plan.after.holders | 1 << loser, False), todo=todo)

    # ---- others ------------------------------------------------------------------------------------------------------

    def told(self, state: State) -> Iterator[Move]:
        """Somebody prefetches, evicts or discards. Nothing is asked for the dead."""
        for wish in self.commands:
            for party, table in enumerate(state.table):
                asked = Request(party, wish)
                holders = state.entry.holders if state.entry else 0
                gives = holders >> party & 1 if wish == Wish.LEAVE else holders if wish == Wish.DISCARD else 1
                if gives and can_ask(party, wish) and table != Table.BURIED and asked not in state.known:
                    yield Move(f"the pager is asked to {asked}", False, state._replace(known=state.known | {asked}))

    def chance(self, state: State) -> Iterator[Move]:
        """A device dies at any moment; the kernel reclaims what is mapped from a device's file."""
        for party in range(1, self.devices + 1):
            if self.deaths and state.table[party] not in (Table.DEAD, Table.BURIED):
                yield Move(f"{party_name(party)} dies", False, self.kernel.died(state, party))
            if self.reclaim and state.table[party] in READABLE:
                gone = state.with_table(party, Table.ABSENT)
                yield Move(f"the kernel unmaps the page of {party_name(party)}", False, gone)

    # ---- decommit, and commit again ----------------------------------------------------------------------------------

    @cached_property
    def script(self) -> tuple[tuple[str, int], ...]:
        """What a decommit does, in order, and the commit after it; then what one does that failed half way."""
        parties = range(self.devices + 1)
        unmap, remap = ([(verb, party) for party in parties] for verb in ("unmap", "remap"))
        decommit = (*unmap[1:], ("suspend", HOST), unmap[0], ("forget", HOST))
        return (*decommit, *remap, ("commit", HOST), ("resume", HOST), *remap[1:], ("end", HOST))

    def is_closed(self, state: State) -> bool:
        """Whether the pager leaves the granule alone."""
        if not self.decommits:
            return False
        forgets = self.script.index(("forget", HOST))
        return forgets - 1 <= state.script <= forgets or self.script[state.script] == ("resume", HOST)

    def decommit_goes_on(self, state: State) -> Iterator[Move]:
        """Do the next thing. What the pager is told, it hears between two transitions."""
        verb, party = self.script[state.script]
        if state.plan and verb in ("suspend", "forget", "commit", "resume"):
            return
        again = verb in ("commit", "end")
        done = getattr(self, verb)(state, party)._replace(script=0 if again else state.script + 1)
        yield Move(f"decommit: {verb} {party_name(party)}", not self.is_between(state), done)
        if (verb, party) == ("unmap", HOST):
            failed = state._replace(script=self.script.index(("resume", HOST)))
            yield Move("decommit: the host's memory cannot be unmapped", False, failed)

    def is_between(self, state: State) -> bool:
        """Whether no decommit and no commit is under way."""
        return state.script == 0 or (self.decommits and state.script == self.script.index(("forget", HOST)) + 1)

    def unmap(self, state: State, party: int) -> State:
        """Map something else over a party's addresses. Its threads are woken, a device's at once."""
        state = self.kernel.unmapped(state, party)
        return state if party == HOST else self.kernel.wake(state, party)

    def suspend(self, state: State, party: int) -> State:
        """Tell the pager to leave it alone. It lets go of faults that it knows: whoever ends this wakes them."""
        return state._replace(known=frozenset(asked for asked in state.known if asked.wish == Wish.LEAVE))

    def forget(self, state: State, party: int) -> State:
        """Tell the directory, drop what devices hold, wake everybody."""
        state = self.cleared(state._replace(memory=(Data.NOTHING,) * len(state.memory)))
        return self.everybody_woken(state._replace(entry=None, charged=0, known=frozenset()))

    def remap(self, state: State, party: int) -> State:
        """Map the memory again."""
        return self.kernel.mapped(state, party)

    def commit(self, state: State, party: int) -> State:
        """Tell the directory, wake everybody: somebody may have been quicker."""
        return self.everybody_woken(state._replace(entry=AT_HOME))

    def resume(self, state: State, party: int) -> State:
        """Tell the pager that the memory stays, wake everybody."""
        return self.everybody_woken(state)

    def end(self, state: State, party: int) -> State:
        """All is as before."""
        return state

    def everybody_woken(self, state: State) -> State:
        """Wake whoever is asleep in a fault."""
        for party in range(self.devices + 1):
            state = self.kernel.wake(state, party)
        return state

    # ---- fork --------------------------------------------------------------------------------------------------------

    def is_pausing(self, state: State) -> bool:
        """Whether a fork is under way."""
        return self.forks and state.script > 0

    def waits_for_fork(self, state: State, asked: Request) -> bool:
        """Whether a request is not answered until it is over."""
        return self.is_pausing(state) and asked.asker != HOST

    def fork_goes_on(self, state: State) -> Iterator[Move]:
        """Pause, bring home what the host has no copy of, fork. The pager does all of it, between two transitions."""
        comes_home = Request(HOST, Wish.READ)
        if not self.is_pausing(state):
            missing = frozenset({comes_home}) if self.is_missed(state.entry) else frozenset()
            yield Move("a fork begins", False, state._replace(script=1, known=state.known | missing))
        elif comes_home not in state.known:
            child = state.memory[HOST] or state.zeros
            promise(child == Data.FRESH, "the child of a fork does not read the last completed write")
            yield Move("the process forks", True, state._replace(script=0))

    def is_missed(self, entry: Entry) -> bool:
        """Whether a child would miss it."""
        return entry != NOWHERE and HOST not in members(entry.holders)

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def is_at_rest(self, state: State) -> bool:
        """Whether nobody waits for anything."""
        return (
            not state.plan
            and not state.known
            and all(one.place == Place.RESTS for one in state.threads)
            and Table.DEAD not in state.table
            and self.is_between(state)
        )

    def check(self, state: State) -> None:
        """Raise Broken unless everything that must always hold does."""
        can_write = [party for party, table in enumerate(state.table) if table == Table.WRITE]
        can_read = [party for party, table in enumerate(state.table) if table in READABLE]
        promise(not can_write or can_read == can_write, "somebody can write what another can read or write")
        for party in can_read:
            promise(state.memory[party] == Data.FRESH, f"{party_name(party)} reads old data")
        for party in range(1, self.devices + 1):
            charged = bool(state.charged >> party & 1)
            promise(charged or not state.memory[party], f"{party_name(party)} has a page that it is not charged for")
        committed = state.entry is not None and not self.is_closed(state)
        if committed:
            places = (*state.memory, state.staging, state.zeros)
            promise(Data.FRESH in places, "the last completed write is nowhere")
        if committed and not state.plan:
            self.check_directory(state, state.entry)

    def check_directory(self, state: State, entry: Entry) -> None:
        """The directory tells the truth between two transitions."""
        promise(not state.staging, "staging is not empty")
        for party, data in enumerate(state.memory):
            name, holds = party_name(party), bool(entry.holders >> party & 1)
            hole = party == HOST and entry == AT_HOME and state.zeros == Data.FRESH
            promise(data == (Data.FRESH if holds else Data.NOTHING) or (hole and not data), f"{name} holds {data.name}")
            promise(party == HOST or holds == bool(state.charged >> party & 1), f"{name} is not charged as it holds")
            promise(holds or state.table[party] not in READABLE, f"{name} maps what it does not hold")
            promise(entry.modified or state.table[party] != Table.WRITE, f"{name} can write what is shared")
            leaves = Request(party, Wish.LEAVE) in state.known
            promise(not holds or state.table[party] != Table.BURIED or leaves, f"{name} is dead and holds")
        if state.entry == NOWHERE:
            promise(state.zeros == Data.FRESH, "what is nowhere does not read as the last write")
