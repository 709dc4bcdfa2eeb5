"""Every state that can be reached, and what is wrong with it: breadth first, so that what is found is short."""

from __future__ import annotations

import gc
from collections import deque
from dataclasses import dataclass

from protocol.machine import Machine
from protocol.state import Broken


@dataclass(frozen=True)
class Found:
    """What a search found."""

    states: int
    moves: int
    broken: str = ""  # the promise, or empty if all hold everywhere
    story: tuple[str, ...] = ()  # how to get there

    def __str__(self) -> str:
        counts = f"{self.states:,} states, {self.moves:,} moves"
        return "\n    ".join([f"{counts}: {self.broken or 'every promise holds'}", *self.story])


def search(machine: Machine) -> Found:
    """Visit all states, but for the order of like threads; then see that rest can be reached from each by what must
    come alone.

    O(states + moves): 10 to 20 microseconds a move, 1 KiB a state.
    """
    gc.freeze()  # nothing here is in a cycle: looking for some takes a third of the time
    gc.disable()
    try:
        return visit(machine)
    finally:
        gc.enable()
        gc.unfreeze()


def visit(machine: Machine) -> Found:
    """Search."""
    number = {machine.first: 0}
    came = [(0, "")]  # from which state, by which move
    before: list[list[int]] = [[]]  # from which states by what must come
    rests = []
    moves = 0
    todo = deque([machine.first])
    at = -1
    while todo:
        state, at = todo.popleft(), at + 1
        try:
            machine.check(state)
            for name, must, after in machine.moves(state):
                moves += 1
                after = machine.one_of_its_like(after)
                to = number.setdefault(after, len(number))
                if to == len(came):
                    came.append((at, name))
                    before.append([])
                    todo.append(after)
                if must:
                    before[to].append(at)
        except Broken as broken:
            return Found(len(number), moves, str(broken), story(came, at))
        if machine.is_at_rest(state):
            rests.append(at)
    stuck = first_stuck(before, rests)
    if stuck is None:
        return Found(len(number), moves)
    return Found(len(number), moves, f"this never comes to rest: {list(number)[stuck]}", story(came, stuck))


def first_stuck(before: list[list[int]], rests: list[int]) -> int | None:
    """Return the first state from which what must come never leads to rest."""
    leads = bytearray(len(before))
    todo = list(rests)
    while todo:
        at = todo.pop()
        if not leads[at]:
            leads[at] = True
            todo += before[at]
    at = leads.find(0)
    return None if at < 0 else at


def story(came: list[tuple[int, str]], at: int) -> tuple[str, ...]:
    """Tell how a state is reached."""
    told = []
    while at:
        at, name = came[at]
        told.append(name)
    return tuple(reversed(told))
