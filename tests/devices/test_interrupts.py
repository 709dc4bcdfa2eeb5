"""Interrupts of the host, while it works with a worker or starts one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import on_device
import pytest
from machine import PAGE
from workers_in_tests import open_on

import uvas
from uvas.devices import link

ENOUGH = 10


class Interrupts:
    """SIGINT at random moments of the main thread's work, which raises KeyboardInterrupt once for each, and only there.

    Parameters
    ----------
    one_at_a_time
        The next one comes when the last one has raised; else two may meet one call.
    """

    def __init__(self, one_at_a_time: bool) -> None:
        self._one_at_a_time = one_at_a_time
        self._raised = threading.Event()
        self._armed = False
        self.count = 0
        self.thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        pause, began = 0.0001, time.monotonic()
        while time.monotonic() < began + 3 or (self.count <= ENOUGH and time.monotonic() < began + 60):
            time.sleep(pause)
            self._raised.clear()
            os.kill(os.getpid(), signal.SIGINT)
            if self._one_at_a_time:
                self._raised.wait(1)
            pause = 0.0001 + (pause * 7919) % 0.003
        time.sleep(0.1)  # until the last one has been delivered

    def _handle(self, _number: int, _frame: object) -> None:
        self._raised.set()
        if self._armed:
            self._armed = False
            self.count += 1
            raise KeyboardInterrupt

    def during(self, work: Callable[[], object]) -> tuple[int, int]:
        """Do the work again and again; return how often, and how often it was interrupted."""
        rounds = interrupted = 0
        ordinary = signal.signal(signal.SIGINT, self._handle)
        self.thread.start()
        while self.thread.is_alive():
            try:
                self._armed = True
                rounds += 1
                work()
                self._armed = False
            except KeyboardInterrupt:
                interrupted += 1
        signal.signal(signal.SIGINT, ordinary)
        return rounds, interrupted


def test_interrupts_at_random_moments_cost_nothing(device, space):
    """The main thread is interrupted while it claims and reads; nothing is left behind, and the device goes on."""
    base = free_base(space)
    before = open_on(device)

    def work() -> None:
        device.read(device_page(device), 8)
        device.submit(on_device.double, 1)

    rounds, interrupted = Interrupts(one_at_a_time=True).during(work)
    assert interrupted > ENOUGH
    assert rounds > interrupted
    assert device.run(on_device.double, 21) == 42
    assert open_on(device) == before
    with space.reserve(PAGE, at=base):
        pass


def test_a_second_interrupt_breaks_off_and_never_hangs():
    """It may come in the middle of a message: then the device is given up, by a typed error, and a new one works."""
    device = uvas.ProcessDevice()

    def work() -> None:
        nonlocal device
        try:
            device.read(device_page(device), 8)
            device.submit(on_device.double, 1)
        except (uvas.DeviceLostError, uvas.ReleasedError):
            device.close()
            device = uvas.ProcessDevice()

    rounds, interrupted = Interrupts(one_at_a_time=False).during(work)
    assert interrupted > ENOUGH
    assert rounds > interrupted
    device.close()
    with uvas.ProcessDevice() as fresh:
        assert fresh.run(on_device.double, 21) == 42


def test_an_interrupt_while_a_worker_starts_leaves_none(monkeypatch):
    """It is raised when the worker has an owner, who goes and takes it along."""

    def interrupted(name: str) -> object:
        started = launch(name)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return started

    launch = link.launch
    monkeypatch.setattr(link, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uvas.ProcessDevice()
    left = [one for one in link._living if one.usable]
    for one in left:
        one.abandon()
    assert left == []


def test_a_line_that_broke_off_ends_the_device():
    """What an interrupt in the middle of a message leaves: what follows would not be understood, so nothing follows."""
    with uvas.ProcessDevice() as device:
        assert device.run(on_device.double, 21) == 42
        device._link.requests.hang_up()
        with pytest.raises(uvas.DeviceLostError):
            device.read(PAGE, 8)


def free_base(space: uvas.AddressSpace) -> int:
    with space.reserve(PAGE) as held:
        return held.base


_pages: dict[int, int] = {}


def device_page(device: uvas.ProcessDevice) -> int:
    if device.pid not in _pages:
        _pages[device.pid] = device.run(on_device.map_somewhere, PAGE)
    return _pages[device.pid]
