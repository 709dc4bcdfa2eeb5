"""The protocol with one rule broken, each in a few lines, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protocol.directory import HOST, NOWHERE, Entry, Step, Transition, Verb, Wish, members
from protocol.kernel import Kernel
from protocol.machine import Machine, Move
from protocol.state import Plan, Request, State, Table

Steps = tuple[Step, ...]

UNSAFE = "somebody can write what another can read or write"
ASLEEP = "this never comes to rest"
OLD = "reads old data"
CHILD = "the child of a fork does not read the last completed write"
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


def writable(*verbs: Verb) -> Callable[[Steps], Steps]:
    """Forget MODE_WP."""
    return lambda steps: tuple(step._replace(readonly=step.readonly and step.verb not in verbs) for step in steps)


def early(verbs: tuple[Verb, ...], than: tuple[Verb, ...]) -> Callable[[Steps], Steps]:
    """Do steps before the first of others."""

    def rewrite(steps: Steps) -> Steps:
        at = next((i for i, step in enumerate(steps) if step.verb in than), 0)
        moved = tuple(step for step in steps[at:] if step.verb in verbs)
        return (*steps[:at], *moved, *without(*verbs)(steps[at:])) if moved else steps

    return rewrite


def protect_copy_drop(steps: Steps) -> Steps:
    """Do what was done before there was UFFDIO_MOVE: protect the host's page, read it where it is, drop it."""
    if Step(Verb.MOVE_OUT) not in steps or Step(Verb.KEEP) in steps:
        return steps
    instead = {
        Verb.MOVE_OUT: [Step(Verb.ZERO), Step(Verb.PROTECT)],
        Verb.COPY: [step._replace(source=HOST) for step in steps if step.verb == Verb.COPY],
        Verb.DROP: [Step(Verb.TAKE)],
    }
    return tuple(step for old in steps for step in instead.get(old.verb, [old]))


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


class NeverClosed(Machine):
    """The pager goes on in a range that is being decommitted."""

    def pager_turns(self, state: State) -> Iterator[Move]:
        for move in super().pager_turns(state._replace(script=0)):
            yield move._replace(state=move.state._replace(script=state.script))

    def suspend(self, state: State, party: int) -> State:
        return state


class ForgottenAsleep(Machine):
    """The directory forgets a range, and who is asleep there is not woken."""

    def forget(self, state: State, party: int) -> State:
        return super().forget(state, party)._replace(threads=state.threads)


class ResumedAsleep(Machine):
    """A decommit fails, and who has waited for its end is not woken."""

    def resume(self, state: State, party: int) -> State:
        return state


class CommittedAsleep(Machine):
    """Memory is committed, and who was quicker than that is not woken."""

    def commit(self, state: State, party: int) -> State:
        return super().commit(state, party)._replace(threads=state.threads)


class ServedInAFork(Machine):
    """Devices go on taking what they ask for while a fork is prepared."""

    def waits_for_fork(self, state: State, asked: Request) -> bool:
        return False


class SharersForgottenInAFork(Machine):
    """Only what one device has alone comes home for a fork."""

    def is_missed(self, entry: Entry) -> bool:
        return super().is_missed(entry) and len(members(entry.holders)) == 1


class LoserWrites(Machine):
    """A copy that could not be taken does not keep the asker from writing."""

    def with_loser(self, state: State, loser: int) -> Plan:
        return state.plan._replace(todo=state.plan.todo[2:])


class DiscardShares(Machine):
    """What could not be discarded is called shared, and its holder can write it still."""

    def with_loser(self, state: State, loser: int) -> Plan:
        left = super().with_loser(state, loser)
        return left if loser == HOST else left._replace(after=left.after._replace(modified=False))


class WritableAgain(Machine):
    """What was moved back can be written, and is called shared as it was."""

    def failed(self, state: State) -> State:
        failed = super().failed(state)
        return failed._replace(plan=failed.plan._replace(after=state.entry)) if failed.plan.undoes else failed


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
        Rewritten(2, rewrite=early((Verb.TAKE, Verb.DISCHARGE), (Verb.COPY,))), LOST
    ),
    "nobody is protected before the copy": Mutant(Rewritten(1, rewrite=without(Verb.PROTECT)), UNSAFE),
    "staging is dropped before it is copied": Mutant(Rewritten(1, rewrite=early((Verb.DROP,), (Verb.COPY,))), LOST),
    "protect, copy, drop in place of MOVE": Mutant(Rewritten(1, writes_in_flight=True, rewrite=protect_copy_drop), OLD),
    "COPY without MODE_WP": Mutant(Rewritten(1, rewrite=writable(Verb.COPY)), UNSAFE),
    "KEEP without MODE_WP": Mutant(Rewritten(1, rewrite=writable(Verb.KEEP)), UNSAFE),
    "CONTINUE without MODE_WP": Mutant(Rewritten(1, reclaim=True, rewrite=writable(Verb.MAP)), UNSAFE),
    "published too early, and pinned": Mutant(PublishedEarly(1, writes_in_flight=True), "can write what is shared"),
    "published too early, and a step fails": Mutant(PublishedEarly(1, failures=True), "host holds NOTHING"),
    "never published": Mutant(Rewritten(1, rewrite=without(Verb.PUBLISH)), "device 1 holds FRESH"),
    "what failed is not undone": Mutant(NothingUndone(1, failures=True), "not charged as it holds"),
    "what failed is not asked again": Mutant(NothingAskedAgain(1, failures=True), ASLEEP),
    "what was pinned is not asked again": Mutant(NothingAskedAgain(1, writes_in_flight=True), ASLEEP),
    "what was moved back is called shared": Mutant(
        WritableAgain(1, failures=True, commands=(Wish.LEAVE,)), "can write what is shared"
    ),
    "who cannot be dropped is forgotten": Mutant(LoserWrites(1, failures=True), UNSAFE),
    "what cannot be discarded is called shared": Mutant(
        DiscardShares(1, failures=True, commands=(Wish.DISCARD,)), "can write what is shared"
    ),
    "a reader is not woken": Mutant(Rewritten(1, rewrite=without(Verb.WAKE)), ASLEEP),
    "a writer is not woken": Mutant(Machine(1, kernel_type=AllowsAsleep), ASLEEP),
    "a hole of the host's is not filled": Mutant(Rewritten(1, rewrite=without(Verb.ZERO)), ASLEEP),
    "the last sharer's death is ignored": Mutant(LastSharerForgotten(2, deaths=True), LOST),
    "a death is not looked at": Mutant(DeathUnnoticed(1, deaths=True), "dead and holds"),
    "the dead are served": Mutant(DeadServed(1, deaths=True), ASLEEP),
    "what is evicted stays charged": Mutant(Rewritten(1, rewrite=without(Verb.DISCHARGE)), "charged"),
    "what is filled is not charged": Mutant(Rewritten(1, rewrite=without(Verb.CHARGE)), "charged"),
    "the pager goes on in what is being decommitted": Mutant(NeverClosed(1, decommits=True), OLD),
    "who waits where memory goes away is not woken": Mutant(ForgottenAsleep(1, decommits=True), ASLEEP),
    "who waits where memory stays after all is not woken": Mutant(ResumedAsleep(1, decommits=True), ASLEEP),
    "who waits where memory comes is not woken": Mutant(CommittedAsleep(1, decommits=True), ASLEEP),
    "devices are served in a fork": Mutant(ServedInAFork(1, forks=True), CHILD),
    "what devices share does not come home for a fork": Mutant(SharersForgottenInAFork(2, forks=True), CHILD),
    "holes of the device's file fill themselves": Mutant(Machine(1, kernel_type=HolesFilled), "not charged for"),
}
