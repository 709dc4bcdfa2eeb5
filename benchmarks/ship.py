"""An array of 256 MiB to a worker process and back, by everything that Python offers for it.

python benchmarks/ship.py [--quick]      target H5; writes results/ship.json

The worker touches a word in each page of it: that is the least that needs all of it there, and it hides nothing behind
arithmetic. Time is from the host having the array to its having read a word in each page of the result. What is not
there (ray is no dependency of anything here: ``pip install ray``) is left out, and the JSON says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from harness import Ratio, Sample, ratio, rows_of, write

import uvas

SIZE = 256 << 20
WORDS = SIZE // 8
STEP = 512  # words of a page


def touch(array: np.ndarray) -> None:
    """Add one to a word in each page."""
    array[::STEP] += 1


def store(array: np.ndarray) -> None:
    """Write a word in each page, without reading it before."""
    array[::STEP] = 1


def by_pickle(line: Connection) -> None:
    """Take arrays and send them back."""
    with contextlib.suppress(EOFError):
        while True:
            array = line.recv()
            touch(array)
            line.send(array)


def by_bytes(line: Connection) -> None:
    """Take arrays as bare bytes and send them back: a pipe without pickle."""
    array = np.empty(WORDS, "i8")
    with contextlib.suppress(EOFError):
        while True:
            line.recv_bytes_into(array)
            touch(array)
            line.send_bytes(array)


def by_name(line: Connection) -> None:
    """Touch shared memory that is named."""
    known: dict[str, SharedMemory] = {}
    with contextlib.suppress(EOFError):
        while True:
            name = line.recv()
            block = known.get(name) or known.setdefault(
                name, SharedMemory(name, track=False) if TRACKS else SharedMemory(name)
            )
            touch(np.frombuffer(block.buf, "i8", WORDS))
            line.send(None)


TRACKS = "track" in SharedMemory.__init__.__code__.co_varnames  # Python 3.13


def worker(ending: contextlib.ExitStack, function: Callable[[Connection], None]) -> Connection:
    """Start a process that runs the function, and return the line to it."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=function, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ending.callback(process.join)
    ending.callback(mine.close)
    return mine


# ---- the ways: each returns what ships the array once and gives the result -------------------------------------------

Ship = Callable[[], np.ndarray]


def pipes(ending: contextlib.ExitStack) -> dict[str, Ship]:
    """By multiprocessing's pipes."""
    array = np.arange(WORDS)
    pickling, plain = worker(ending, by_pickle), worker(ending, by_bytes)
    back = np.empty(WORDS, "i8")

    def pickled() -> np.ndarray:
        pickling.send(array)
        result: np.ndarray = pickling.recv()
        return result

    def as_bytes() -> np.ndarray:
        plain.send_bytes(array)
        plain.recv_bytes_into(back)
        return back

    return {"multiprocessing, pickle": pickled, "multiprocessing, send_bytes": as_bytes}


def shared(ending: contextlib.ExitStack) -> dict[str, Ship]:
    """By multiprocessing.shared_memory: an array that lies there, and one that is copied there and back."""
    line = worker(ending, by_name)
    block = SharedMemory(create=True, size=SIZE)
    there, elsewhere, back = np.frombuffer(block.buf, "i8", WORDS), np.arange(WORDS), np.empty(WORDS, "i8")
    there[:] = elsewhere
    view = [there]
    ending.callback(lambda: (view.clear(), block.unlink()))

    def in_place() -> np.ndarray:
        line.send(block.name)
        line.recv()
        return view[0]

    def copied() -> np.ndarray:
        view[0][:] = elsewhere
        np.copyto(back, in_place())
        return back

    return {"multiprocessing.shared_memory, in place": in_place, "multiprocessing.shared_memory, copied": copied}


def unified(ending: contextlib.ExitStack) -> dict[str, Ship]:
    """By uvas: with memory in common, with memory of the worker's own, and that with prefetch."""
    ships: dict[str, Ship] = {}
    for memory in ("shared", "private"):
        device = ending.enter_context(uvas.ProcessDevice(memory=memory))
        space = ending.enter_context(uvas.AddressSpace([device]))
        held = ending.enter_context(space.reserve(SIZE))
        held.commit()
        array = held.numpy("i8")
        array[:] = np.arange(WORDS)

        def run(device: Any = device, array: np.ndarray = array) -> np.ndarray:
            device.run(touch, array)
            return array

        def prefetched(device: Any = device, space: Any = space, array: np.ndarray = array) -> np.ndarray:
            space.prefetch(array, device)
            device.run(touch, array)
            space.prefetch(array, "host")
            return array

        def stored(device: Any = device, array: np.ndarray = array) -> np.ndarray:
            device.run(store, array)
            return array

        ships[f"uvas, memory={memory}"] = run
        if memory == "private":
            ships["uvas, memory=private, prefetch"] = prefetched
            ships["uvas, memory=private, stored without reading"] = stored
    return ships


def ray_store(ending: contextlib.ExitStack) -> dict[str, Ship]:
    """By ray's object store, whose arrays are read-only: the worker copies before it writes."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    ray.init(
        num_cpus=1, include_dashboard=False, object_store_memory=4 * SIZE, log_to_driver=False, configure_logging=False
    )
    ending.callback(ray.shutdown)
    array = np.arange(WORDS)

    def added(given: np.ndarray) -> np.ndarray:
        mine = given.copy()
        mine[::512] += 1
        return mine

    remote = ray.remote(added)

    def ship() -> np.ndarray:
        result: np.ndarray = ray.get(remote.remote(ray.put(array)))
        return result

    return {"ray": ship}


def comparisons(samples: list[Sample]) -> list[Ratio]:
    """Return what the report shows: each of ours against each of the others."""
    theirs = [one for one in dict.fromkeys(sample.what for sample in samples) if not one.startswith("uvas")]
    ours = {
        "uvas, memory=shared": "256 MiB to a worker and back, memory in common",
        "uvas, memory=private": "the same, memory of its own",
    }
    found = [
        ratio(samples, about, ("H5", what, SIZE), [("H5", peer, SIZE)])
        for what, about in ours.items()
        for peer in theirs
    ]
    return [one for one in found if one]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args().quick else 9
    samples: list[Sample] = []
    missing = {}
    with contextlib.ExitStack() as ending:
        ways = unified(ending) | pipes(ending) | shared(ending)
        if importlib.util.find_spec("ray"):
            ways |= ray_store(ending)
        else:
            missing["ray"] = "not installed: pip install ray"
        for round in range(rounds + 1):  # the first one warms up
            for what, ship in ways.items():
                began = time.perf_counter_ns()
                result = ship()
                total = int(result[::STEP].sum())
                took = time.perf_counter_ns() - began
                if round:
                    samples.append(Sample("H5", what, SIZE, took))
                elif total == 0:
                    raise AssertionError(f"{what}: nothing came back")
                del result
    write("ship", rows_of(samples), ratios=[asdict(one) for one in comparisons(samples)], missing=missing)


if __name__ == "__main__":
    main()
