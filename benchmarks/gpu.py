"""GPUs: what each strategy of CudaDevice costs, beside its peers, in one run: ``python benchmarks/gpu.py [--quick]``.

Needs a CUDA GPU and ``pip install 'uvas[cuda]'``; peers that are not installed (torch, rmm, cuda-core) are left out,
and it is said. Lines appear as they are measured, so that a crash of a driver loses nothing that was seen; the evidence
is ``results/gpu.json``. Ends in under five minutes: what does not fit is left out, and it is said. Without a GPU it
says what is missing and ends well.

  G1  bandwidth of a kernel that copies     G4  moving pages by prefetch, each way
  G2  CuPy's allocations                    G5  a list followed by pointer; first touch
  G3  reserve + commit + release            G6  contexts that are made while threads reserve
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
from gpu_peers import (
    MIB,
    CopyKernel,
    Maker,
    Memory,
    allocators,
    fresh_memories,
    memories,
    pinned_copy,
    reservers,
    walk_kernel,
)
from harness import Row, Sample, rows_of, sample, write

import uvas

REPEATS = 5
BUDGET_S = 280.0
COPY_BYTES = 256 * MIB
NODES = 20_000
ROUND = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu_round.py")]
ROUNDS = 100
ROUNDS_S = 60.0


@dataclass
class Run:
    """One run: what was measured, and how long it may go on."""

    quick: bool = False
    budget_s: float = BUDGET_S

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.samples: list[Sample] = []
        self.left_out: list[str] = []

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; otherwise it is noted."""
        if time.monotonic() - self.began + seconds < self.budget_s:
            return True
        self.leave_out(what, "no time")
        return False

    def leave_out(self, what: str, why: object) -> None:
        """Say what is not measured, and why."""
        self.left_out.append(f"{what}: {why}")
        print(f"     left out: {what}: {why}", flush=True)

    def measure(self, id: str, parameter: int, candidates: dict[str, Callable[[int], object]], count: int) -> None:
        """Time all candidates in turn, and print a line for each."""
        taken: list[Sample] = []
        for name, function in [*candidates.items()]:
            try:
                function(count)  # warm
            except Exception as error:  # a peer that cannot: the others go on
                self.leave_out(f"{id} {name}", error)
                del candidates[name]
        for _ in range(3 if self.quick else REPEATS):
            taken += [sample(id, name, function, count, parameter) for name, function in candidates.items()]
        self.samples += taken
        for row in rows_of(taken):
            print(line_of(row), flush=True)


def line_of(row: Row) -> str:
    """Return a row as a line of the table."""
    rate = f"{row.parameter / row.ns:9.2f} GB/s" if row.id in ("G1", "G4") and row.ns else " " * 14
    spread = f"[{row.low / 1e3:.2f} {row.high / 1e3:.2f}]"
    return f"{row.id:4} {row.what:44} {row.parameter:>14,} {row.ns / 1e3:14.2f} us {rate}  {spread}"


# ---- the targets -----------------------------------------------------------------------------------------------------


def bandwidth(run: Run) -> None:
    """G1: the same kernel on every kind of memory."""
    size = COPY_BYTES // (8 if run.quick else 1)
    with ExitStack() as stack:
        candidates: dict[str, Callable[[int], object]] = {}
        for name, make in memories().items():
            try:
                candidates[name] = copying(stack.enter_context(make(2 * size)), size)
            except Exception as error:
                run.leave_out(f"G1 {name}", error)
        run.measure("G1", 2 * size, candidates, 10)


def copying(memory: Memory, size: int) -> Callable[[int], object]:
    """Return what copies one half of a memory into the other; checked once."""
    launch = CopyKernel()
    launch(memory.address, memory.address + size, size)

    def work(count: int) -> None:
        for _ in range(count):
            launch(memory.address, memory.address + size, size, wait=False)
        launch.wait()

    return work


def allocation(run: Run) -> None:
    """G2: allocate and free on one stream."""
    sizes = (512, 64 << 10, MIB, 64 * MIB) if run.quick else (512, 64 << 10, MIB, 64 * MIB, 1 << 30)
    with ExitStack() as stack:
        makers = {}
        for name, make in allocators().items():
            try:
                makers[name] = stack.enter_context(make())
            except Exception as error:
                run.leave_out(f"G2 {name}", error)
        for size in sizes:
            run.measure("G2", size, {name: repeating(one, size) for name, one in makers.items()}, 500)


def repeating(function: Callable[[int], object], size: int) -> Callable[[int], object]:
    """Return what does it so many times, with one size."""

    def work(count: int) -> None:
        for _ in range(count):
            function(size)

    return work


def reserving(run: Run) -> None:
    """G3: addresses, memory on the card, and both given back."""
    with ExitStack() as stack:
        makers = {}
        for name, make in reservers().items():
            try:
                makers[name] = stack.enter_context(make())
            except Exception as error:
                run.leave_out(f"G3 {name}", error)
        for size in (2 * MIB, 64 * MIB, 512 * MIB):
            run.measure("G3", size, {name: repeating(one, size) for name, one in makers.items()}, 5)


def moving(run: Run) -> None:
    """G4: pages to the card and back."""
    size = COPY_BYTES // (8 if run.quick else 1)
    with uvas.CudaDevice(strategy="hmm") as device, uvas.AddressSpace([device]) as space, space.reserve(size) as held:
        held.commit(populate=True)

        def there(count: int) -> None:
            for _ in range(count):
                space.prefetch(held, device)
                space.prefetch(held, "host")

        with pinned_copy(size) as copy:
            candidates = {"uvas hmm: prefetch, there and back": there, "memcpyAsync, pinned, both ways": copy}
            run.measure("G4", 2 * size, candidates, 1)


def following(run: Run) -> None:
    """G5: a list that the host has linked, followed by one thread of the card, and fresh pages that it touches."""
    with ExitStack() as stack:
        candidates: dict[str, Callable[[int], object]] = {}
        for name, make in memories().items():
            try:
                memory = stack.enter_context(make(16 * NODES))
                memory.host("u8")[: 2 * NODES] = linked(memory.address)
            except Exception as error:  # memory that the host cannot touch among them
                run.leave_out(f"G5 {name}", error)
                continue
            candidates[f"walk, {name}"] = walk_kernel(memory.address, sum(range(NODES)))
        run.measure("G5", NODES, candidates, 1)
    size = COPY_BYTES // (32 if run.quick else 8)
    touched = {f"first touch, {name}": touching(make, size) for name, make in fresh_memories().items()}
    run.measure("G5", size, touched, 1)


def touching(make: Maker, size: int) -> Callable[[int], object]:
    """Return what lets a kernel write memory that nobody has touched, so many times."""

    def work(count: int) -> None:
        launch = CopyKernel()
        for _ in range(count):
            with make(size) as memory:
                launch(memory.address, memory.address + size // 2, size // 2)

    return work


def linked(base: int) -> np.ndarray:
    """Return nodes (next, value), shuffled, the first at the base."""
    order = np.concatenate([[0], 1 + np.random.default_rng(1).permutation(NODES - 1)])
    nodes = np.zeros((NODES, 2), np.uint64)
    nodes[order[:-1], 0] = base + 16 * order[1:].astype(np.uint64)
    nodes[order, 1] = np.arange(NODES)
    return nodes.reshape(-1)


def contexts(run: Run) -> None:
    """G6: processes in which CuPy, and torch, come up while 8 threads reserve; nobody's bytes may change."""
    began, done = time.monotonic(), 0
    while done < (5 if run.quick else ROUNDS) and time.monotonic() - began < ROUNDS_S and run.fits("G6", 15):
        ended = subprocess.run(ROUND, capture_output=True, text=True, timeout=120, check=False)
        if ended.returncode:
            raise SystemExit(f"G6: round {done} lost something: {ended.stdout}{ended.stderr}")
        done += 1
    print(f"G6   {done} rounds, nothing lost on either side", flush=True)
    took = (time.monotonic() - began) * 1e9 / max(done, 1)
    run.samples.append(Sample("G6", "rounds in which nothing was lost", done, took))


TARGETS: dict[str, tuple[Callable[[Run], None], float]] = {
    "G1": (bandwidth, 20),
    "G2": (allocation, 40),
    "G3": (reserving, 30),
    "G4": (moving, 20),
    "G5": (following, 20),
    "G6": (contexts, 20),
}
"""Each with the seconds that it may take."""


@contextmanager
def evidence(run: Run, about: dict[str, object]) -> Iterator[None]:
    """Write what was seen, however it ends."""
    try:
        yield
    finally:
        if run.samples:
            seconds = round(time.monotonic() - run.began)
            write("gpu", rows_of(run.samples), left_out=run.left_out, seconds=seconds, **about)


def main() -> int:
    """Measure what there is."""
    try:
        with uvas.CudaDevice() as device:
            about = {"card": device.info.details["model"], "driver": device.info.details["driver"]}
            about["attributes"] = device.info.details["attributes"]
    except uvas.NotSupportedError as missing:
        print(f"nothing is measured: {missing}")
        return 0
    print(f"{about['card']}, driver {about['driver']}: {about['attributes']}", flush=True)
    run = Run(quick="--quick" in sys.argv[1:])
    with evidence(run, about):
        for id, (target, seconds) in TARGETS.items():
            if run.fits(id, seconds):
                try:
                    target(run)
                except (uvas.UvasError, OSError, MemoryError, ImportError) as error:
                    run.leave_out(id, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
