"""Memory that moves between the host and a worker process, against a bare userfaultfd pager.

python benchmarks/move.py [--quick] [--target H1] [--umap PATH]     targets H1 to H4, H6, H7; writes results/move.json

The peers are in ``c/bare*.c``: the same system calls with nothing around them, a round of theirs before each of ours;
and LLNL's umap where its library is given (``--umap``: it has no package; git clone https://github.com/LLNL/umap,
cmake, make). Times of H2, H4 and H6 are for 1 MiB, those of H2 and H4 by the median of stretches of 4 MiB; the
parameter is the granule, of the bare ways the batch.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from harness import Ratio, Sample, built, library, programs_output, ratio, rows_of, write

import uvas

MIB = 1 << 20
PAGE = 4096
STRETCH = 4 * MIB
GRANULES = (4 << 10, 64 << 10, 2 << 20)  # the middle one is the default
READ, WRITE, ADD = 0, 1, 2  # as in c/touch.h; to add is to read first: a copy, and then a second fault

Setting = tuple[uvas.AddressSpace, uvas.ProcessDevice, uvas.Reservation]


@contextmanager
def unified(size: int, granule: int | None = None, capacity: int | None = None) -> Iterator[Setting]:
    """Give a space with one private device, and `size` bytes that the host has written."""
    with (
        uvas.ProcessDevice(memory="private", granule=granule, capacity=capacity) as device,
        uvas.AddressSpace([device]) as space,
        space.reserve(size) as held,
    ):
        held.commit()
        written(held)
        yield space, device, held


def written(held: uvas.Reservation) -> None:
    """Let the host write all of it."""
    words = held.numpy("u8")
    words[:] = np.arange(len(words), dtype="u8")


def timed(function: Callable[[], object]) -> int:
    """Return nanoseconds."""
    began = time.perf_counter_ns()
    function()
    return time.perf_counter_ns() - began


def worked(function: Callable[[], object]) -> int:
    """Return the nanoseconds that this thread had of its processor: where it waits for nobody."""
    began = time.thread_time_ns()
    function()
    return time.thread_time_ns() - began


def need(condition: bool, what: str) -> None:
    """Raise where what was to be measured was not done right."""
    if not condition:
        raise AssertionError(what)


class Touch:
    """The functions of ``c/touch.c``, for the host and for devices; and a library to compare with, or None."""

    def __init__(self, path: Path, umap: str | None) -> None:
        self.umap = umap
        self.faults = uvas.CFunction(str(path), "faults", "uint64")
        self.rising = uvas.CFunction(str(path), "rising", "uint64")
        self.stretches = uvas.CFunction(str(path), "stretches", "uint64")
        self.at_random = uvas.CFunction(str(path), "at_random", "uint64")
        self.sum = uvas.CFunction(str(path), "sum", "uint64")
        self.stream = uvas.CFunction(str(path), "stream", "uint64")


def by_umap(program: Path, touch: Touch, page: int, size: int, faults: int) -> list[Sample]:
    """Return what LLNL's umap needs, if it is there."""
    if touch.umap is None:
        return []
    more = {"UMAP_PAGESIZE": page, "UMAP_BUFSIZE": size // page + 16, "UMAP_LOG_LEVEL": "ERROR"}
    return programs_output(program, touch.umap, size // MIB, faults, **more)


# ---- H1: one fault ---------------------------------------------------------------------------------------------------


def faults(touch: Touch, rounds: int, count: int) -> list[Sample]:
    """Touch pages that the other side has, one a fault: the median of many."""
    samples: list[Sample] = []
    with built("bare_faults.c") as bare, built("umap.c") as umap, unified(count * PAGE, PAGE) as (space, device, held):
        for _ in range(rounds):
            samples += programs_output(bare, 1, count, "faults")
            samples += by_umap(umap, touch, PAGE, 64 * MIB, count)
            space.prefetch(held, "host")
            there = device.run(touch.faults, held.base, count, PAGE)
            back = touch.faults(held.base, count, PAGE)
            samples += [
                Sample("H1", "worker, from the host", PAGE, float(there)),
                Sample("H1", "host, from the worker", PAGE, float(back or 0)),
            ]
        seen = space.movement()
        need(seen.host.write_faults >= rounds * count, "the host did not fault on each page")
    return samples


# ---- H2, H4: prefetch, and going through without it ------------------------------------------------------------------


def prefetches(rounds: int, size: int) -> list[Sample]:
    """Move all of it there and back, and by the bare ways."""
    samples: list[Sample] = []
    with built("bare_paths.c") as bare:
        for _ in range(rounds):
            samples += programs_output(bare, 1, size // MIB, "ways")
            for granule in GRANULES:
                samples += there_and_back(size, granule)
    return samples


def there_and_back(size: int, granule: int) -> Iterator[Sample]:
    """Measure the second time: by then the directory's own pages are there."""
    with unified(size, granule) as (space, device, held):
        right = int(held.numpy("u8").sum())
        for fresh in (True, False):
            began = time.process_time_ns()
            out = stretched(lambda part: space.prefetch(part, device), held)
            turned = time.process_time_ns()
            need(bool((space.where(held) == uvas.PageFlag.device(1)).all()), "not all of it went")
            returning = time.process_time_ns()
            back = stretched(lambda part: space.prefetch(part, "host"), held)
            ended = time.process_time_ns()
            if not fresh:
                yield Sample("H2 out", "prefetch", granule, out)
                yield Sample("H2 out, processor", "prefetch", granule, (turned - began) / (size / MIB))
                yield Sample("H2 back", "prefetch", granule, back)
                yield Sample("H2 back, processor", "prefetch", granule, (ended - returning) / (size / MIB))
        need(int(held.numpy("u8").sum()) == right, "the bytes came back wrong")


def stretched(move: Callable[[uvas.Range], object], held: uvas.Reservation) -> float:
    """Do it to one stretch after the other; return the median's time for 1 MiB."""
    parts = [uvas.Range(at, STRETCH) for at in range(held.base, held.base + held.size, STRETCH)]
    return statistics.median(timed(lambda part=part: move(part)) for part in parts) / (STRETCH / MIB)


def streams(touch: Touch, rounds: int, size: int) -> list[Sample]:
    """Let a device go through host data, and the host after it; no prefetch asked."""
    samples: list[Sample] = []
    with built("bare_faults.c") as bare, built("umap.c") as umap:
        for _ in range(rounds):
            samples += programs_output(bare, 1, 1024, "granules")
            for granule in GRANULES:
                samples += by_umap(umap, touch, granule, size, 0) if granule != PAGE else []
                with unified(size, granule) as (space, device, held):
                    steps = {
                        "a device reads it all": lambda at: device.run(touch.stretches, at, size, PAGE, READ),
                        "a device writes it all": lambda at: device.run(touch.stretches, at, size, PAGE, WRITE),
                        "the host reads it all": lambda at: touch.stretches(at, size, PAGE, READ),
                        "a device adds to what both have": lambda at: device.run(touch.stretches, at, size, PAGE, ADD),
                        "the host adds to what a device has": lambda at: touch.stretches(at, size, PAGE, ADD),
                    }
                    for what, work in steps.items():
                        if "writes" in what:
                            space.prefetch(held, "host")
                        samples.append(Sample("H4", what, granule, float(work(held.base))))
                    need(bool((held.numpy("u8")[::512] == after_stretches(size)).all()), "something was lost")
    return samples


def together(touch: Touch, rounds: int, size: int) -> list[Sample]:
    """Let 1, 2, 4 and 8 devices go through host data at once, each through its part."""
    samples: list[Sample] = []
    for _ in range(rounds):
        for count in (1, 2, 4, 8):
            with ExitStack() as stack:
                devices = [stack.enter_context(uvas.ProcessDevice(memory="private")) for _ in range(count)]
                space = stack.enter_context(uvas.AddressSpace(devices))
                held = stack.enter_context(space.reserve(size))
                held.commit()
                written(held)
                part = size // count
                began = time.perf_counter_ns()
                under_way = [
                    device.submit(touch.rising, held.base + i * part, part, PAGE, ADD)
                    for i, device in enumerate(devices)
                ]
                for future in under_way:
                    future.result()
                ns = time.perf_counter_ns() - began
                samples.append(Sample("H4 devices", "each adds to its part of host data", count, ns / (size / MIB)))
                right = np.arange(0, size // 8, PAGE // 8) + 1
                need(bool((held.numpy("u8")[:: PAGE // 8] == right).all()), "something was lost")
    return samples


def after_stretches(size: int) -> np.ndarray:
    """Return the first word of each page: counted from the stretch's begin, written, and twice added to."""
    return np.arange(0, size, PAGE) % STRETCH + 3


# ---- H3: unified memory that nobody moves ----------------------------------------------------------------------------


def untouched(touch: Touch, rounds: int, size: int) -> list[Sample]:
    """Compare first touch and streaming with plain memory: nothing has been submitted or prefetched."""
    samples: list[Sample] = []
    for round in range(rounds):
        with (
            uvas.ProcessDevice(memory="private") as device,
            uvas.AddressSpace([device]) as space,
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as plain,
            space.reserve(size) as held,
        ):
            held.commit()
            array = np.frombuffer(plain, "u8")
            places = {"plain memory": array.ctypes.data, "unified memory": held.base}
            del array
            turns = sorted(places.items(), reverse=bool(round % 2))
            for what, at in turns:
                ns = worked(lambda at=at: touch.rising(at, size, PAGE, WRITE))
                samples.append(Sample("H3", f"first touch, {what}", size, ns))
            for what, at in 3 * turns:
                samples.append(Sample("H3", f"streaming, {what}", size, worked(lambda at=at: touch.stream(at, size))))
            need(space.movement().host.write_faults == 0, "somebody's faults were served")
    return samples


# ---- H6: more than the device can hold -------------------------------------------------------------------------------


def sweeps(touch: Touch, rounds: int, size: int) -> list[Sample]:
    """Let a device go through twice what it can hold, again and again."""
    samples: list[Sample] = []
    for _ in range(rounds):
        for granule in GRANULES:
            with unified(size, granule, size // 2) as (space, device, held):
                for how, verb in ((WRITE, "write"), (ADD, "add"), (READ, "read")):
                    for sweep in ("first", "second"):
                        ns = timed(lambda how=how: device.run(touch.rising, held.base, size, PAGE, how))
                        what = f"{sweep} sweep over twice what fits, {verb}"
                        samples.append(Sample("H6", what, granule, ns / (size / MIB)))
                seen = space.movement().devices[device.info.name]
                need(seen.resident_bytes <= size // 2 and seen.evictions > 0, "it held more than it may")
                need(bool((held.numpy("u8")[::512] == np.arange(0, size, PAGE) + 3).all()), "something was lost")
    return samples


# ---- H7: what it takes -----------------------------------------------------------------------------------------------


def metadata(touch: Touch, size: int) -> dict[str, float]:
    """Weigh directory and pager, as a part of the unified bytes, after a device has had all of them once."""
    parts = {}
    for granule in GRANULES:
        for capacity in (None, size // 2):
            with unified(size, granule, capacity) as (space, device, held):
                device.run(touch.rising, held.base, size, PAGE, WRITE)
                bound = "" if capacity is None else ", with a capacity"
                parts[f"{granule >> 10} KiB{bound}"] = space.movement().metadata_bytes / size
    return parts


def comparisons(samples: list[Sample]) -> list[Ratio]:
    """Return what the report shows."""
    found = []
    for what in ("worker, from the host", "host, from the worker"):
        mover, owner = what.split(", from the ")
        about = f"one 4 KiB fault of {'a device, from the host' if mover == 'worker' else 'the host, from a device'}"
        peers = [("H1", f"bare: {what}, {where}", PAGE) for where in ("anywhere", "same CPU", "other CPU", "spinning")]
        found.append(ratio(samples, about, ("H1", what, PAGE), peers))
        if owner == "host":
            found.append(ratio(samples, about, ("H1", what, PAGE), [("H1", "LLNL umap, from a memfd", PAGE)]))
    ways = {(one.id, one.what, one.parameter) for one in samples if one.id.startswith("H2") and "bare" in one.what}
    for granule in GRANULES:
        size = f"{granule >> 10} KiB" if granule < MIB else f"{granule // MIB} MiB"
        for id, about in (
            ("H2 out", "prefetch to a device"),
            ("H2 out, processor", "processor time of a prefetch to a device"),
            ("H2 back", "prefetch to the host"),
            ("H2 back, processor", "processor time of a prefetch to the host"),
        ):
            peers = [way for way in ways if way[0] == id]
            found.append(ratio(samples, f"{about}, granules of {size}", (id, "prefetch", granule), peers))
        for what in ("a device writes it all", "a device reads it all"):
            peers = [("H4", f"bare: {what.replace('a device', 'a worker')}", granule)]
            peers += [("H4", "LLNL umap: read from a memfd", granule)] if "reads" in what else []
            found.append(ratio(samples, f"{what}, granules of {size}", ("H4", what, granule), peers))
    for count in (2, 4, 8):
        one, more = (("H4 devices", "each adds to its part of host data", n) for n in (1, count))
        peer = [replace(a, what="one device adds to all of it") for a in samples if (a.id, a.what, a.parameter) == one]
        about = f"a device for each of {count} parts, all at once, adds to it"
        found.append(ratio([*samples, *peer], about, more, [("H4 devices", "one device adds to all of it", 1)]))
    for what in ("first touch", "streaming"):
        ours, peer = (("H3", f"{what}, {memory}", 256 * MIB) for memory in ("unified memory", "plain memory"))
        found.append(ratio(samples, f"{what} of 256 MiB that nobody moves", ours, [peer]))
    for how in ("write", "add", "read"):
        prefetch = ("H2 out", "prefetch", GRANULES[1])
        first, second = (
            ("H6", f"{sweep} sweep over twice what fits, {how}", GRANULES[1]) for sweep in ("first", "second")
        )
        found.append(ratio(samples, f"first sweep over twice what fits, {how}", first, [prefetch]))
        found.append(ratio(samples, f"second sweep over twice what fits, {how}", second, [prefetch]))
    return [one for one in found if one]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--target", action="append", help="H1, H2, H3, H4, devices, H6 or H7; more than once; default: all"
    )
    parser.add_argument("--umap", metavar="PATH", help="LLNL's libumap.so, to compare with")
    asked = parser.parse_args()
    rounds = 5 if asked.quick else 9
    with library("touch.c") as path:
        touch = Touch(path, asked.umap)
        targets: dict[str, Callable[[], list[Sample]]] = {
            "H1": lambda: faults(touch, rounds, 1000),
            "H2": lambda: prefetches(rounds, 64 * MIB),
            "H3": lambda: untouched(touch, rounds, 256 * MIB),
            "H4": lambda: streams(touch, rounds, 256 * MIB),
            "devices": lambda: together(touch, rounds, 64 * MIB),
            "H6": lambda: sweeps(touch, rounds, 128 * MIB),
        }
        chosen = asked.target or [*targets, "H7"]
        samples = [one for name, measure in targets.items() if name in chosen for one in measure()]
        memory = metadata(touch, 128 * MIB) if "H7" in chosen else {}
    missing = {} if asked.umap else {"LLNL umap": "no package has it: build it and say --umap PATH"}
    ratios = [asdict(one) for one in comparisons(samples)]
    write("move", rows_of(samples), ratios=ratios, metadata_over_unified=memory, missing=missing)


if __name__ == "__main__":
    main()
