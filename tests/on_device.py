"""Functions that tests let a worker process run: importable there by name."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

kept: list[Any] = []
"""What a function leaves behind in the worker."""


def double(number: Any) -> Any:
    """Return twice the argument."""
    return 2 * number


def address_of(array: np.ndarray) -> int:
    """Where the worker sees the array."""
    return array.ctypes.data


def describe(array: np.ndarray) -> tuple[Any, ...]:
    """Everything by which two views of the same memory can differ."""
    return array.ctypes.data, array.shape, array.strides, array.dtype, array.flags.writeable, array.tolist()


def same(array: np.ndarray) -> np.ndarray:
    """Return the very argument."""
    return array


def part(array: np.ndarray, start: int, stop: int, step: int) -> np.ndarray:
    """Return a view of the argument."""
    return array[start:stop:step]


def fill(array: np.ndarray, value: Any) -> None:
    """Write into the argument."""
    array[...] = value


def total(array: np.ndarray) -> float:
    """Add up."""
    return array.sum().item()


def total_and_own(array: np.ndarray) -> tuple[int, bool]:
    """Add up, and tell whether an array made here is in unified memory."""
    import uvas

    return int(array.sum()), uvas.is_unified(uvas.ones(10))


def walk(address: int) -> list[int]:
    """Follow a linked list of (next, value) pairs of 64-bit integers, by address alone."""
    values = []
    while address:
        following, value = (ctypes.c_uint64 * 2).from_address(address)
        values.append(value)
        address = following
    return values


def link_up(nodes: np.ndarray, values: list[int]) -> int:
    """Make such a list in the argument and return the address of its head."""
    base = nodes.ctypes.data
    order = range(len(values) - 1, -1, -1)  # the links point backwards, so that an order by index would show
    following = 0
    for place, value in zip(order, reversed(values), strict=True):
        nodes[place] = following, value
        following = base + 16 * place
    return following


def chain(nodes: np.ndarray) -> int:
    """Link nodes of two words, each to the one before it, with 5 in each; the address of the last."""
    base, count = nodes.ctypes.data, len(nodes)
    nodes[:, 1] = 5
    nodes[0, 0] = 0
    nodes[1:, 0] = base + 16 * np.arange(count - 1, dtype="u8")
    return base + 16 * (count - 1)


def count_up(word: np.ndarray, times: int) -> int:
    """Add one again and again, in memory."""
    for _ in range(times):
        word[0] += 1
    return int(word[0])


def fresh_array() -> np.ndarray:
    """Return an array of the worker's own."""
    return np.arange(5)


def fresh_array_by_value() -> Any:
    """Return it as a copy."""
    import uvas

    return uvas.by_value(np.arange(5))


def two(first: Any, second: Any) -> tuple[Any, Any]:
    """Return both."""
    return first, second


def keywords(first: int, *, second: int) -> int:
    """Subtract."""
    return first - second


class Unkind(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail(kind: str, array: Any = None) -> None:
    """Raise; `array` is in the frame meanwhile."""
    if kind == "value":
        raise ValueError("from the worker")
    if kind == "exit":
        sys.exit(3)
    if kind == "unkind":
        raise Unkind("not to be ", "made again")
    if kind == "lambda":
        raise ValueError(lambda: array)
    if kind == "chain":
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner


def unpicklable() -> Any:
    """Return what pickle refuses."""
    return threading.Lock()


def keep(array: Any) -> None:
    """Leave the argument behind."""
    kept.append(array)


def kept_one() -> Any:
    """Return what was kept first."""
    return kept[0]


def drop() -> None:
    """Forget what was left behind."""
    kept.clear()


def process_id() -> int:
    """Say where this runs."""
    return os.getpid()


def thread_is_main() -> bool:
    """Say on which thread this runs."""
    return threading.current_thread() is threading.main_thread()


def started_and_hangs(path: str) -> None:
    """Tell that it runs, then never end."""
    os.close(os.open(path, os.O_WRONLY))  # a pipe that somebody waits at
    while True:
        time.sleep(3600)


def waits_for(path: str) -> str:
    """Return what is written to a pipe."""
    return Path(path).read_text()


def spins_until(path: str) -> int:
    """Keep the interpreter busy, without giving way, until a file exists."""
    rounds = 0
    while not os.path.exists(path):
        rounds += 1
    return rounds


def kill_yourself(how: str, after_s: float = 0) -> None:
    """End, at once or after so many seconds."""
    time.sleep(after_s)
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))


def leave_a_child_and_die() -> None:
    """Die, while a forked child still has copies of all descriptors."""
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(5)


def interrupted() -> str:
    """Send oneself what Ctrl-C sends."""
    os.kill(os.getpid(), signal.SIGINT)
    return "unmoved"


def plant(address: int, size: int) -> bool:
    """Map memory of the worker's own at an address, filled with a pattern."""
    import machine

    if not machine.map_at(address, size):
        return False
    ctypes.memset(address, 0xA5, size)
    return True


def planted_is_intact(address: int, size: int) -> bool:
    """Tell whether nobody has touched it."""
    return ctypes.string_at(address, size) == b"\xa5" * size


def map_somewhere(size: int) -> int:
    """Map memory where the worker's kernel likes."""
    import machine

    address = machine.map_anywhere(size)
    ctypes.memset(address, 0xA5, size)
    return address


def reserve_there(address: int, size: int) -> None:
    """Hold a range in the worker by uvas itself, in a space of the function's own."""
    import uvas

    space = uvas.AddressSpace(name="private")
    kept.append((space, space.reserve(size, at=address, name="own")))


def open_descriptors() -> list[str]:
    """Tell what the worker has open."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this look itself
            links.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return sorted(links)


def start_a_grandchild() -> int:
    """Start a process that outlives the call."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid


def page() -> int:
    """Bytes of a page."""
    return mmap.PAGESIZE


def say(text: str) -> None:
    """Print."""
    print(text)


def answer(cells: np.ndarray) -> int:
    """Tell through shared memory that it runs, wait there for a number, and return the next one."""
    cells[1] = 1
    while not cells[0]:
        pass
    return int(cells[0]) + 1


def copied(array: np.ndarray) -> tuple[str, list[Any], bool]:
    """Describe the argument, then write into it."""
    before = type(array).__name__, array.tolist(), array.flags.writeable
    array[...] = -1
    return before


def waits_and_adds(path: str, array: np.ndarray) -> int:
    """Wait for a word in a pipe, then add up."""
    waits_for(path)
    return int(array.sum())


def stop_answering(path: str) -> None:
    """Tell that it runs, then stop the whole process, as Ctrl-Z does."""
    os.close(os.open(path, os.O_WRONLY))
    os.kill(os.getpid(), signal.SIGSTOP)


def die_soon() -> None:
    """End like a crash, when somebody may already wait for something else."""
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
