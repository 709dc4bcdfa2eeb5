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
    HOST,
    MAY_FAIL,
    NOWHERE,
    Entry,
    Step,
    Transition,
    Verb,
    Wish,
    can_ask,
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
        if self.commands and not state.plan:
            yield from self.told(state)
        yield from self.chance(state)

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
        for number, one in enumerate(state.threads):
            if one.place == Place.QUEUED:
                asked = Request(self.kernel.party_of[number], one.wish)
                read = state.with_thread(number, Thread(Place.ASLEEP, one.wish))
                yield Move(f"the pager reads a fault: {asked}", True, read._replace(known=read.known | {asked}))
        for party, table in enumerate(state.table):
            if table == Table.DEAD:
                yield Move(f"the pager learns that {party_name(party)} is dead", True, self.bury(state, party))
        if self.is_open(state):
            for asked in state.known:
                todo = self.steps(state.entry, asked)
                plan = Plan(asked, todo.after, (), todo.steps) if todo.steps else None
                taken = state._replace(known=state.known - {asked}, plan=plan)
                yield Move(f"the pager takes up: {asked}", True, self.settled(taken))

    def bury(self, state: State, party: int) -> State:
        """Nothing more is asked for the dead; what it holds comes home."""
        left = frozenset(asked for asked in state.known if asked.asker != party)
        return state.with_table(party, Table.BURIED)._replace(known=left | {Request(party, Wish.LEAVE)})

    def steps(self, entry: Entry | None, asked: Request) -> Transition:
        """Plan a transition. Where nothing is committed, who faults is woken: it finds out by itself."""
        if entry is not None:
            self.used.add((entry, asked.asker, asked.wish))
            return transition(entry, asked.asker, asked.wish)
        faulted = asked.wish in (Wish.READ, Wish.WRITE)
        return Transition(entry, (Step(Verb.WAKE, asked.asker),) if faulted else ())

    def pager_goes_on(self, state: State) -> Iterator[Move]:
        """Do the next step; or it fails, and what was done is undone."""
        plan = state.plan
        step = plan.todo[0]
        try:
            yield Move(f"the pager: {step}", True, self.settled(self.performed(state, step)))
        except Refused as refusal:
            yield Move(f"the pager: {step}: {refusal}", True, self.settled(self.failed(state)))
        else:
            if self.failures and step.verb in MAY_FAIL:
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
        """Tell the directory. What is discarded reads as zeros from now on."""
        state = state._replace(entry=plan.after)
        return self.cleared(state) if plan.after == NOWHERE and plan.request.wish == Wish.DISCARD else state

    def cleared(self, state: State) -> State:
        """Make zeros the last completed write."""
        return state._replace(memory=tuple(min(data, Data.STALE) for data in state.memory), zeros=Data.FRESH)

    def failed(self, state: State) -> State:
        """Undo what was done, and ask again later."""
        back = undo(state.entry, state.plan.done)
        plan = Plan(state.plan.request, back.after, (), back.steps)
        return state._replace(plan=plan, known=state.known | {plan.request})

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
        """What a decommit does, in order, and the commit after it."""
        parties = range(self.devices + 1)
        unmap, punch, remap = ([(verb, party) for party in parties] for verb in ("unmap", "punch", "remap"))
        return (("suspend", HOST), *unmap, *punch[1:], ("forget", HOST), *remap, ("commit", HOST))

    def is_suspended(self, state: State) -> bool:
        """Whether the granule is being decommitted."""
        return 0 < state.script <= self.script.index(("forget", HOST))

    def is_open(self, state: State) -> bool:
        """Whether the pager may take up requests."""
        return not self.is_suspended(state)

    def decommit_goes_on(self, state: State) -> Iterator[Move]:
        """Do the next thing. What the pager is told, it hears between two transitions."""
        verb, party = self.script[state.script]
        if state.plan and verb in ("suspend", "forget", "commit"):
            return
        rests = verb == "suspend" or (verb, party) == ("remap", HOST)
        done = getattr(self, verb)(state, party)._replace(script=(state.script + 1) % len(self.script))
        yield Move(f"decommit: {verb} {party_name(party)}", not rests, done)
        if (verb, party) == ("unmap", HOST) and not state.plan:
            yield Move("decommit fails: resume", False, state._replace(script=0))

    def suspend(self, state: State, party: int) -> State:
        return state

    def unmap(self, state: State, party: int) -> State:
        return self.kernel.unmapped(state, party)

    def punch(self, state: State, party: int) -> State:
        return state.with_memory(party, Data.NOTHING)

    def forget(self, state: State, party: int) -> State:
        """Tell the directory, then wake everybody."""
        state = self.cleared(state)._replace(entry=None, charged=0, known=frozenset())
        for each in range(self.devices + 1):
            state = self.kernel.wake(state, each)
        return state

    def remap(self, state: State, party: int) -> State:
        return self.kernel.mapped(state, party)

    def commit(self, state: State, party: int) -> State:
        return state._replace(entry=AT_HOME)

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def is_at_rest(self, state: State) -> bool:
        """Whether nobody waits for anything."""
        return (
            not state.plan
            and not state.known
            and all(one.place == Place.RESTS for one in state.threads)
            and Table.DEAD not in state.table
            and (state.script == 0 or self.script[state.script] == ("remap", HOST))
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
        committed = state.entry is not None and not self.is_suspended(state)
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
