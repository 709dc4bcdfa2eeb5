"""Threads that do something again and again beside each other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable


class Crowd:
    """Threads that run a body until told to stop; what any of them raises fails the test."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def add(self, count: int, body: Callable[[random.Random], None], seed: int) -> None:
        """Start `count` threads, each with its own source of chance."""

        def run(chance: random.Random) -> None:
            try:
                while not self.stop.is_set():
                    body(chance)
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        for i in range(count):
            self._threads.append(threading.Thread(target=run, args=(random.Random(seed * 100 + i),), daemon=True))
            self._threads[-1].start()

    def finish(self, seconds: float, until: Callable[[], bool] = lambda: True) -> None:
        """Let them run, on a busy machine for so long that something has happened, then collect them."""
        patience = time.monotonic() + seconds + 60
        self.stop.wait(seconds)
        while not self.stop.wait(0.01) and not until() and time.monotonic() < patience:
            pass
        self.stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread hangs"
        if self.errors:
            raise self.errors[0]
