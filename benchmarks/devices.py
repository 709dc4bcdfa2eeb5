"""A matched reservation on one and on four worker processes, against the bare round trips that it needs.

python benchmarks/devices.py [--quick]      target R8; writes results/devices.json
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from multiprocessing.connection import Connection, wait

from harness import Sample, rows_of, sample, write

import uvas

SIZE = 64 << 20


def echo(line: Connection) -> None:
    """Send back what comes."""
    with contextlib.suppress(EOFError):
        while True:
            line.send_bytes(line.recv_bytes())


class Echoes:
    """Processes that answer at once: a claim's round trip without the claim."""

    def __init__(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        pairs = [spawn.Pipe() for _ in range(count)]
        self.lines = [mine for mine, _ in pairs]
        self.processes = [spawn.Process(target=echo, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def round_trips(self, times: int) -> None:
        """Ask all at the same time, twice each time: a reserve and a release."""
        for _ in range(2 * times):
            for line in self.lines:
                line.send_bytes(b"x" * 64)
            waiting = list(self.lines)
            while waiting:
                for line in wait(waiting):
                    if not isinstance(line, Connection):
                        raise TypeError(line)
                    line.recv_bytes()
                    waiting.remove(line)

    def close(self) -> None:
        """End them."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.join()


def measure(devices: int, rounds: int, count: int) -> list[Sample]:
    """Measure one number of devices."""
    samples: list[Sample] = []
    with contextlib.ExitStack() as ending:
        workers = [ending.enter_context(uvas.ProcessDevice()) for _ in range(devices)]
        space = ending.enter_context(uvas.AddressSpace(workers))
        alone = ending.enter_context(uvas.AddressSpace())
        echoes = Echoes(devices)
        ending.callback(echoes.close)

        def reserve(times: int) -> None:
            for _ in range(times):
                space.reserve(SIZE).release()

        def on_host(times: int) -> None:
            for _ in range(times):
                alone.reserve(SIZE).release()

        for _ in range(rounds):
            samples += [
                sample("R8", "reserve + release, matched", reserve, count, devices),
                sample("R8", "reserve + release, host alone", on_host, count, devices),
                sample("R8", "two round trips by multiprocessing.Pipe", echoes.round_trips, count, devices),
            ]
    return samples


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds, count = (5, 200) if parser.parse_args().quick else (11, 1000)
    write("devices", rows_of(one for devices in (1, 4) for one in measure(devices, rounds, count)))


if __name__ == "__main__":
    main()
