"""The protocol in all states that two and three parties can reach: one writer, nothing stale, nothing lost, nobody left
asleep. And the search would tell if it were not so: each rule is broken once, on purpose, and a promise falls.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from protocol.directory import CANNOT_BE_UNDONE, MAY_FAIL, NOWHERE, UNDONE_BY, Verb, Wish, members, table
from protocol.machine import Machine
from protocol.mutants import MUTANTS
from protocol.search import search

EVICTIONS = (Wish.LEAVE,)
DISCARDS = (Wish.DISCARD,)
PREFETCHES = (Wish.READ, Wish.WRITE)

TWO = {
    "two threads each": Machine(1, threads=2),
    "writes in flight, failures, deaths": Machine(1, writes_in_flight=True, failures=True, deaths=True),
    "evictions, discards, failures": Machine(1, commands=EVICTIONS + DISCARDS, failures=True),
    "prefetches, reclaim": Machine(1, commands=PREFETCHES, reclaim=True),
    "decommits, deaths, failures": Machine(1, decommits=True, deaths=True, failures=True),
    "forks, deaths, failures": Machine(1, forks=True, deaths=True, failures=True),
}
THREE = {
    "deaths, failures": Machine(2, deaths=True, failures=True),
    "discards, failures": Machine(2, commands=DISCARDS, failures=True),
    "evictions": Machine(2, commands=EVICTIONS),
    "decommits": Machine(2, decommits=True),
    "forks": Machine(2, forks=True),
}
FULL = {
    "writes in flight": Machine(2, writes_in_flight=True, deaths=True),
    "prefetches": Machine(2, commands=PREFETCHES),
    "evictions, discards, reclaim": Machine(2, commands=EVICTIONS + DISCARDS, reclaim=True),
    "four parties": Machine(3),
}
searched = lru_cache(search)
"""Each machine once, whichever tests ask."""


def run(machine: Machine, capsys: pytest.CaptureFixture[str], title: str) -> None:
    """Search, and say how much there was."""
    found = searched(machine)
    with capsys.disabled():
        print(f"\n  {machine.devices + 1} parties, {title}: {found.states:,} states, {found.moves:,} moves", end=" ")
    assert not found.broken, str(found)


@pytest.mark.parametrize("title", TWO)
def test_every_promise_holds_between_two_parties(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(TWO[title], capsys, title)


@pytest.mark.parametrize("title", THREE)
def test_every_promise_holds_between_three_parties(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(THREE[title], capsys, title)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("title", FULL)
def test_every_promise_holds_in_more_states(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(FULL[title], capsys, title)


def test_every_row_of_the_table_comes_up() -> None:
    machines = [*TWO.values(), *THREE.values()]
    for machine in machines:
        searched(machine)
    used = set().union(*(machine.used for machine in machines))
    assert not {key for key, plan in table(3).items() if plan.after != key[0]} - used


@pytest.mark.parametrize("title", MUTANTS)
def test_a_broken_rule_breaks_a_promise(title: str) -> None:
    found = search(MUTANTS[title].machine)
    assert MUTANTS[title].falls in found.broken, str(found)
    assert found.story


# ---- the table by itself ---------------------------------------------------------------------------------------------

TABLE = table(4)


def test_the_table_is_whole() -> None:
    entries = {before for before, _, _ in TABLE}
    assert len(entries) == 1 + 4 + 15
    assert len(TABLE) == len(entries) * (4 + 4 + 3 + 1)
    assert {plan.after for plan in TABLE.values()} <= entries
    assert {step.verb for plan in TABLE.values() for step in plan.steps} == set(Verb) - {Verb.MOVE_BACK}


def test_what_may_fail_comes_before_what_cannot_be_undone() -> None:
    for plan in TABLE.values():
        verbs = [step.verb for step in plan.steps]
        last = max((i for i, verb in enumerate(verbs) if verb in MAY_FAIL), default=0)
        assert set(verbs[:last]) <= set(UNDONE_BY)
        assert not set(verbs[:last]) & CANNOT_BE_UNDONE


def test_others_lose_before_the_asker_gains() -> None:
    for plan in TABLE.values():
        verbs = [step.verb for step in plan.steps]
        gains = [i for i, verb in enumerate(verbs) if verb in (Verb.MAP, Verb.ALLOW)]
        loses = [i for i, verb in enumerate(verbs) if verb in (Verb.MOVE_OUT, Verb.PROTECT, Verb.TAKE)]
        assert not gains or not loses or max(loses) < min(gains)


def test_the_directory_is_told_once_and_before_anybody_gains() -> None:
    for (before, _, _), plan in TABLE.items():
        verbs = [step.verb for step in plan.steps]
        assert verbs.count(Verb.PUBLISH) == (plan.after != before)
        if Verb.PUBLISH in verbs:
            assert not {Verb.MAP, Verb.ALLOW, Verb.WAKE} & set(verbs[: verbs.index(Verb.PUBLISH)])


def test_who_is_charged_holds() -> None:
    for (before, _, _), plan in TABLE.items():
        charged = {step.party for step in plan.steps if step.verb == Verb.CHARGE}
        discharged = {step.party for step in plan.steps if step.verb == Verb.DISCHARGE}
        devices = [set(members(entry.holders)) - {0} for entry in (before, plan.after)]
        assert charged == devices[1] - devices[0]
        assert discharged == devices[0] - devices[1]


def test_a_modified_granule_has_one_holder() -> None:
    for plan in TABLE.values():
        assert plan.after == NOWHERE or plan.after.holders.bit_count() == 1 or not plan.after.modified
