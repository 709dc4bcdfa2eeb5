"""GPUs: what each strategy of CudaDevice costs, beside its peers, in one run: ``python benchmarks/gpu.py [--quick]``.

Needs a CUDA GPU and ``pip install 'uvas[cuda]'``; peers that are not installed (torch, rmm, cuda-core) are left out,
and it is said. Each peer runs in a process of its own, and they take turns: what crashes or hangs loses its own rows.
Lines appear as they are measured, and the evidence, ``results/gpu.json``, is written anew after each target. Ends in
under five minutes: what does not fit is left out, and it is said. Without a GPU it says what is missing and ends well.

  G1  bandwidth of a kernel that copies     G4  moving pages by prefetch, each way
  G2  CuPy's allocations                    G5  a list followed, and a word counted up in turn, by pointer; first touch
  G3  reserve + commit + release; the same  G6  contexts that are made while threads reserve
      beside 100 and 400 that are held
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_peers import MIB, NODES, peers
from harness import Row, Sample, rows_of, write

REPEATS = 5
BUDGET_S = 280.0
START_S = 90.0
"""For a process to start: libraries of gigabytes are read from a cold disk."""
ANSWER_S = 30.0
COPY_BYTES = 512 * MIB
HERE = Path(__file__).resolve().parent
PEER = [sys.executable, str(HERE / "gpu_peer.py")]
ROUND = [sys.executable, str(HERE / "gpu_round.py")]
ROUNDS = 100
ROUNDS_S = 60.0


class GoneError(Exception):
    """A peer that cannot, has crashed, or hangs."""


class Peer:
    """A process with one of those who are compared.

    Parameters
    ----------
    arguments
        Of ``gpu_peer.py``.
    """

    def __init__(self, *arguments: str) -> None:
        conf = {
            "PYTORCH_ALLOC_CONF": "expandable_segments:True"
        }  # a warning and no more to a torch that says it otherwise
        self._process = process = subprocess.Popen(
            [*PEER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | conf,
            start_new_session=True,
        )
        assert process.stdin
        assert process.stdout
        self._questions, self._answers = process.stdin, process.stdout

    def ask(self, question: str, seconds: float = ANSWER_S) -> dict[str, Any]:
        """Ask, and return the answer.

        Raises
        ------
        GoneError
            There is none in time, or it is an error.
        """
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(f"{question}\n".encode())
        return self.answer(seconds)

    def answer(self, seconds: float = ANSWER_S) -> dict[str, Any]:
        """Return the next answer; as `ask`."""
        line, end = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise GoneError(f"no answer in {seconds:.0f} s")
                some = os.read(self._answers.fileno(), 1 << 16)
                if not some:
                    raise GoneError(f"its process ended with {self.end()}")
                line += some
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise GoneError(answer["error"])
        return answer

    def end(self) -> int | None:
        """End the process; its code, or None where it does not end: nobody waits for a driver that hangs."""
        for pipe in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        for patience in (3.0, 5.0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return None


@dataclass(frozen=True)
class Target:
    """What is measured.

    Parameters
    ----------
    name
        As `gpu_peers.peers` has it.
    parameters
        With what, in turn.
    count
        How often for one sample.
    seconds
        That it may take.
    """

    name: str
    parameters: tuple[int, ...]
    count: int
    seconds: float


TARGETS = (
    Target("G1", (COPY_BYTES,), 10, 25),
    Target("G2", (512, 64 << 10, MIB, 64 * MIB, 1 << 30), 500, 40),
    Target("G3", (2 * MIB, 64 * MIB, 512 * MIB), 5, 30),
    Target("G3 beside", (0, 100, 400), 5, 20),
    Target("G4", (COPY_BYTES,), 1, 20),
    Target("G5 walk", (NODES,), 1, 20),
    Target("G5 trip", (8,), 1000, 15),
    Target("G5 touch", (COPY_BYTES // 16,), 1, 20),
)


class Run:
    """One run: what was measured, and how long it may go on."""

    def __init__(self, about: dict[str, Any], quick: bool) -> None:
        self.about, self.quick = about, quick
        self.began = time.monotonic()
        self.samples: list[Sample] = []
        self.left_out: list[str] = []

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; otherwise it is noted."""
        if time.monotonic() - self.began + seconds < BUDGET_S:
            return True
        self.leave_out(what, "no time")
        return False

    def leave_out(self, what: str, why: object) -> None:
        """Say what is not measured, and why."""
        self.left_out.append(f"{what}: {why}")
        print(f"     left out: {what}: {why}", flush=True)

    def save(self) -> None:
        """Write what was seen."""
        if self.samples:
            seconds = round(time.monotonic() - self.began)
            write("gpu", rows_of(self.samples), left_out=self.left_out, seconds=seconds, **self.about)

    def compare(self, target: Target) -> None:
        """Let all peers of a target take turns, and print a line for each as it is known."""
        processes = {name: Peer(target.name, name) for name in peers()[target.name]}
        ready: dict[str, Peer] = {}
        try:
            for name, process in processes.items():
                with self._one(target, name):
                    process.answer(START_S)
                    ready[name] = process
            for parameter in target.parameters[:3] if self.quick else target.parameters:
                self._turns(target, parameter, ready)
        finally:
            for process in processes.values():
                process.end()

    def _turns(self, target: Target, parameter: int, ready: dict[str, Peer]) -> None:
        taken: list[Sample] = []

        def each(question: str) -> None:
            for name in [*ready]:
                process = ready.pop(name)
                with self._one(target, f"{name}, {parameter:,}"):
                    answer = process.ask(question)
                    ready[name] = process
                    if "ns" in answer:
                        taken.append(Sample(target.name[:2], f"{name}{target.name[2:]}", parameter, answer["ns"]))

        each(f"prepare {parameter}")
        for _ in range(3 if self.quick else REPEATS):
            each(f"run {target.count}")
        self.samples += taken
        for row in rows_of(taken):
            print(line_of(row), flush=True)

    @contextlib.contextmanager
    def _one(self, target: Target, who: str) -> Iterator[None]:
        """Leave out who is gone."""
        try:
            yield
        except GoneError as error:
            self.leave_out(f"{target.name} {who}", error)

    def contexts(self) -> None:
        """G6: processes in which CuPy, and torch, come up while 8 threads reserve; nobody's bytes may change."""
        began, done = time.monotonic(), 0
        while done < (2 if self.quick else ROUNDS) and time.monotonic() - began < ROUNDS_S and self.fits("G6", 15):
            try:
                ended = subprocess.run(ROUND, capture_output=True, text=True, timeout=60, check=False)
            except subprocess.TimeoutExpired:
                self.leave_out(f"G6 round {done}", "not over in 60 s")
                break
            if ended.returncode:
                self.leave_out(f"G6 round {done}: LOST", (ended.returncode, ended.stdout[-500:], ended.stderr[-500:]))
                break
            done += 1
        print(f"G6   {done} rounds, nothing lost on either side", flush=True)
        if done:
            took = (time.monotonic() - began) * 1e9 / done
            self.samples.append(Sample("G6", "rounds in which nothing was lost", done, took))


def line_of(row: Row) -> str:
    """Return a row as a line of the table."""
    rate = f"{row.parameter / row.ns:9.2f} GB/s" if row.id in ("G1", "G4") and row.ns else " " * 14
    spread = f"[{row.low / 1e3:.2f} {row.high / 1e3:.2f}]"
    return f"{row.id:4} {row.what:44} {row.parameter:>14,} {row.ns / 1e3:14.2f} us {rate}  {spread}"


def main() -> int:
    """Measure what there is."""
    asked = Peer("about")
    try:
        about = asked.answer(START_S)
    except GoneError as error:
        print(f"nothing is measured: {error}")
        return 1
    finally:
        asked.end()
    if "missing" in about:
        print(f"nothing is measured: {about['missing']}")
        return 0
    print(f"{about['card']}, driver {about['driver']}: {about['attributes']}", flush=True)
    run = Run(about, quick="--quick" in sys.argv[1:])
    for target in TARGETS:
        if run.fits(target.name, target.seconds):
            run.compare(target)
            run.save()
    run.contexts()
    run.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
