"""The core's directory (directory.c) says what the table says, for every word, party and access of four parties."""

from __future__ import annotations

import pytest
from protocol.directory import STAGING, Entry, Step, Verb, Wish, members, table

from uvas._core import ffi, lib

COMMITTED, MODIFIED = 1 << 28, 1 << 29  # as in directory.h
ZERO, TAKE, PROTECT, FILL, KEEP, DROP, MAP, UNPROTECT = (1 << bit for bit in range(8))

NOT_THE_DIRECTORYS = (Verb.CHARGE, Verb.DISCHARGE, Verb.PUBLISH, Verb.WAKE)
"""Steps that the core does around what its directory says."""

ROWS = {key: plan for key, plan in table(4).items() if key[2] in (Wish.READ, Wish.WRITE)}


def word_of(entry: Entry) -> int:
    """Write an entry as the core does."""
    return COMMITTED | entry.holders | (MODIFIED if entry.modified else 0)


def asked(before: Entry, party: int, wish: Wish) -> tuple[int, tuple[Step, ...]]:
    """Ask the core: the word afterwards, and the steps in the table's words."""
    said = ffi.new("struct uvas_test_step *")
    assert lib.uvas_test_transition(word_of(before), party, wish == Wish.WRITE, said) == 0
    source = STAGING if said.steps & TAKE else said.source
    steps = {
        ZERO: [Step(Verb.ZERO, party)],
        TAKE: [Step(Verb.MOVE_OUT)],
        PROTECT: [Step(Verb.PROTECT, said.source)],
        FILL: [Step(Verb.COPY, party, source)],
        KEEP: [Step(Verb.KEEP)],
        DROP: [Step(Verb.TAKE, loser) for loser in members(said.drops)],
        MAP: [Step(Verb.MAP, party, readonly=False)],
        UNPROTECT: [Step(Verb.ALLOW, party)],
    }
    if said.steps & TAKE:
        steps[KEEP if said.steps & KEEP else FILL].append(Step(Verb.DROP))  # staging goes when it has been read
    assert said.steps < 2 * UNPROTECT
    return said.after, tuple(step for bit, each in steps.items() if said.steps & bit for step in each)


@pytest.mark.parametrize("key", ROWS, ids=lambda key: f"{key[0]}, {key[2].name} of {key[1]}")
def test_the_core_does_what_the_table_says(key: tuple[Entry, int, Wish]) -> None:
    plan = ROWS[key]
    steps = tuple(step for step in plan.steps if step.verb not in NOT_THE_DIRECTORYS)
    assert asked(*key) == (word_of(plan.after), steps if plan.after != key[0] else ())


def test_nobody_else_can_be_asked() -> None:
    said = ffi.new("struct uvas_test_step *")
    assert lib.uvas_test_transition(COMMITTED, 28, 0, said) < 0
