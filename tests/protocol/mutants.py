"""The protocol with one rule broken, each in a few lines, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.directory import HOST, NOWHERE, Entry, Step, Transition, Verb, Wish
from protocol.kernel import Kernel
from protocol.machine import Machine
from protocol.state import Request, State, Table

Steps = tuple[Step, ...]

UNSAFE = "somebody can write what another can read or write"
ASLEEP = "nothing wakes them"
OLD = "reads old data"
LOST = "the last completed write is nowhere"


@dataclass(frozen=True)
class Rewritten(Machine):
    """A machine whose plans are not what the table says."""

    rewrite: Callable[[Steps], Steps] = tuple

    def steps(self, entry: Entry | None, asked: Request) -> Transition:
        plan = super().steps(entry, asked)
        return Transition(plan.after, self.rewrite(plan.steps))


def without(*verbs: Verb) -> Callable[[Steps], Steps]:
    """Leave out steps."""
    return lambda steps: tuple(step for step in steps if step.verb not in verbs)


def writable(verb: Verb) -> Callable[[Steps], Steps]:
    """Forget MODE_WP."""
    return lambda steps: tuple(step._replace(readonly=step.readonly and step.verb != verb) for step in steps)


def early(verbs: tuple[Verb, ...], than: tuple[Verb, ...]) -> Callable[[Steps], Steps]:
    """Do steps before the first of others."""

    def rewrite(steps: Steps) -> Steps:
        at = next((i for i, step in enumerate(steps) if step.verb in than), 0)
        moved = tuple(step for step in steps[at:] if step.verb in verbs)
        return (*steps[:at], *moved, *without(*verbs)(steps[at:])) if moved else steps

    return rewrite


def protect_copy_drop(steps: Steps) -> Steps:
    """Do what was done before there was UFFDIO_MOVE: protect the host's page, read it where it is, drop it."""
    if Step(Verb.MOVE_OUT) not in steps:
        return steps
    stays = any(step.verb == Verb.COPY for step in steps)
    instead = {
        Verb.MOVE_OUT: [Step(Verb.ZERO), Step(Verb.PROTECT)],
        Verb.COPY: [],
        Verb.DROP: [] if stays else [Step(Verb.TAKE)],
    }
    return tuple(
        step._replace(source=HOST) if step.verb == Verb.FILL else step
        for old in steps
        for step in instead.get(old.verb, [old])
    )


class LastSharerForgotten(Machine):
    """When a device dies that only shared, its copy is thrown away, the last one too."""

    def steps(self, entry: Entry | None, asked: Request) -> Transition:
        if asked.wish == Wish.LEAVE and entry == Entry(1 << asked.asker, False):
            party = asked.asker
            return Transition(NOWHERE, (Step(Verb.TAKE, party), Step(Verb.DISCHARGE, party), Step(Verb.PUBLISH)))
        return super().steps(entry, asked)


class PublishedEarly(Machine):
    """The directory is told before anything is done."""

    def steps(self, entry: Entry | None, asked: Request) -> Transition:
        plan = super().steps(entry, asked)
        told = tuple(step for step in plan.steps if step.verb == Verb.PUBLISH)
        return Transition(plan.after, (*told, *without(Verb.PUBLISH)(plan.steps)))

    def failed(self, state: State) -> State:
        done = without(Verb.PUBLISH)(state.plan.done)
        return super().failed(state._replace(plan=state.plan._replace(done=done)))


class NothingUndone(Machine):
    """A transition that fails is given up where it stands."""

    def failed(self, state: State) -> State:
        return state._replace(plan=None, known=state.known | {state.plan.request})


class NothingAskedAgain(Machine):
    """A request is forgotten when its transition fails."""

    def failed(self, state: State) -> State:
        return super().failed(state)._replace(known=state.known)


class DeadServed(Machine):
    """What was asked for the dead is still granted."""

    def bury(self, state: State, party: int) -> State:
        return super().bury(state, party)._replace(known=state.known | {Request(party, Wish.LEAVE)})


class DeathUnnoticed(Machine):
    """Nobody looks at what the dead held."""

    def bury(self, state: State, party: int) -> State:
        left = super().bury(state, party)
        return left._replace(known=left.known - {Request(party, Wish.LEAVE)})


class NeverSuspended(Machine):
    """The pager goes on in a range that is being decommitted."""

    def is_open(self, state: State) -> bool:
        return True


class ForgottenAsleep(Machine):
    """The directory forgets a range, and who is asleep there is not woken."""

    def forget(self, state: State, party: int) -> State:
        return super().forget(state, party)._replace(threads=state.threads)


class FaultOfNowhereDropped(Machine):
    """A fault where nothing is committed is not answered."""

    def steps(self, entry: Entry | None, asked: Request) -> Transition:
        return super().steps(entry, asked) if entry else Transition(entry, ())


class MapsAsleep(Kernel):
    """CONTINUE with MODE_DONTWAKE, and no WAKE after it."""

    def map(self, state: State, step: Step) -> State:
        return super().map(state, step)._replace(threads=state.threads)


class AllowsAsleep(Kernel):
    """The protection is taken away with MODE_DONTWAKE, and no WAKE after it."""

    def allow(self, state: State, step: Step) -> State:
        return super().allow(state, step)._replace(threads=state.threads)


class HolesFilled(Kernel):
    """The device's range is registered for MINOR faults alone: what its file lacks, the kernel fills with zeros."""

    def access(self, state: State, number: int, wish: Wish, *, pins: bool = False) -> State:
        party = self.party_of[number]
        if party != HOST and state.table[party] == Table.ABSENT and not state.memory[party]:
            state = state.with_memory(party, state.zeros).with_table(party, Table.WRITE)
        return super().access(state, number, wish, pins=pins)


@dataclass(frozen=True)
class Mutant:
    """A broken rule, and the promise that falls first."""

    machine: Machine
    falls: str


MUTANTS = {
    "an invalidate is dropped": Mutant(Rewritten(2, rewrite=without(Verb.TAKE, Verb.DISCHARGE)), UNSAFE),
    "a copy is dropped after the asker may write": Mutant(
        Rewritten(1, rewrite=early((Verb.ALLOW,), (Verb.TAKE,))), UNSAFE
    ),
    "a copy is dropped before it is copied": Mutant(
        Rewritten(2, rewrite=early((Verb.TAKE, Verb.DISCHARGE), (Verb.FILL,))), LOST
    ),
    "nobody is protected before the copy": Mutant(Rewritten(1, rewrite=without(Verb.PROTECT)), UNSAFE),
    "staging is dropped before the file is filled": Mutant(
        Rewritten(1, rewrite=early((Verb.DROP,), (Verb.FILL,))), LOST
    ),
    "protect, copy, drop in place of MOVE": Mutant(
        Rewritten(1, writes_in_flight=True, rewrite=protect_copy_drop), "a write in flight went into a page"
    ),
    "COPY without MODE_WP": Mutant(Rewritten(1, rewrite=writable(Verb.COPY)), UNSAFE),
    "CONTINUE without MODE_WP": Mutant(Rewritten(1, rewrite=writable(Verb.MAP)), UNSAFE),
    "published too early, and pinned": Mutant(PublishedEarly(1, writes_in_flight=True), "can write what is shared"),
    "published too early, and a step fails": Mutant(PublishedEarly(1, failures=True), "host holds NOTHING"),
    "never published": Mutant(Rewritten(1, rewrite=without(Verb.PUBLISH)), "device 1 holds FRESH"),
    "what failed is not undone": Mutant(NothingUndone(1, failures=True), "not charged as it holds"),
    "what failed is not asked again": Mutant(NothingAskedAgain(1, failures=True), ASLEEP),
    "what was pinned is not asked again": Mutant(NothingAskedAgain(1, writes_in_flight=True), ASLEEP),
    "CONTINUE wakes nobody": Mutant(Machine(1, kernel_type=MapsAsleep), ASLEEP),
    "the end of protection wakes nobody": Mutant(Machine(1, kernel_type=AllowsAsleep), ASLEEP),
    "a fault that found what it wanted is not woken": Mutant(Rewritten(1, rewrite=without(Verb.WAKE)), ASLEEP),
    "a hole of the host's is not filled": Mutant(Rewritten(1, rewrite=without(Verb.ZERO)), ASLEEP),
    "the last sharer's death is ignored": Mutant(LastSharerForgotten(2, deaths=True), LOST),
    "a death is not looked at": Mutant(DeathUnnoticed(1, deaths=True), "dead and holds"),
    "the dead are served": Mutant(DeadServed(1, deaths=True), "dead and holds"),
    "what is evicted stays charged": Mutant(Rewritten(1, rewrite=without(Verb.DISCHARGE)), "charged"),
    "what is filled is not charged": Mutant(Rewritten(1, rewrite=without(Verb.CHARGE)), "charged"),
    "the pager goes on in what is being decommitted": Mutant(NeverSuspended(1, decommits=True), "not charged for"),
    "who waits where memory goes away is not woken": Mutant(ForgottenAsleep(1, decommits=True), ASLEEP),
    "a fault where nothing is committed is dropped": Mutant(FaultOfNowhereDropped(1, decommits=True), ASLEEP),
    "holes of the device's file fill themselves": Mutant(
        Machine(1, kernel_type=HolesFilled), "has a page that it is not charged for"
    ),
}
