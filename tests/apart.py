"""Tests of hardware in a process of their own, which is replaced when it dies, hangs, or a test in it has failed.

``pytest -m cuda`` runs so: a driver that ends or blocks its process loses one test and nothing that was seen before,
and a failed test, whose card may be past use, spoils none after it. This process calls no driver.
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
from typing import Any

import pytest

REPORTS = "UVAS_TEST_REPORTS"
"""In the environment of a process with tests: the descriptor that it writes to, a line of JSON for each event."""


class Apart:
    """The plugin of the process that the user starts.

    Parameters
    ----------
    budget_s
        Seconds for all tests; what has not begun by then is skipped, and it is said.
    test_s
        Seconds for one, with the start of its process.
    """

    def __init__(self, budget_s: float = 280.0, test_s: float = 60.0) -> None:
        self.budget_s, self.test_s = budget_s, test_s

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the tests, in as many processes as it takes."""
        if session.config.option.collectonly:
            return None
        self._hook, self._config = session.config.hook, session.config
        self._end = time.monotonic() + self.budget_s
        left = {item.nodeid: item for item in session.items}
        while left:
            before = len(left)
            running, why = self._process(session, left)
            if running:
                self._say(left.pop(running), "failed", why)
            for nodeid in [*left] if len(left) == before or time.monotonic() > self._end else []:
                self._say(left.pop(nodeid), "skipped", f"not begun: {why}")
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
        return True

    def _process(self, session: pytest.Session, left: dict[str, pytest.Item]) -> tuple[str, str]:
        """Run what is left in a process, until that ends; which test it ended in, if it did, and why."""
        reading, writing = os.pipe()
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", *left]
        process = subprocess.Popen(
            command,
            cwd=session.config.rootpath,
            env=os.environ | {REPORTS: str(writing), "PYTHONUNBUFFERED": "1"},
            pass_fds=[writing],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(writing)
        running = why = ""
        try:
            for event in self._events(reading):
                if event is None:
                    late = time.monotonic() > self._end
                    why = f"{self.budget_s:.0f} s are over" if late else f"no word for {self.test_s:.0f} s: killed"
                    return running, why
                if "starts" in event:
                    running = event["starts"]
                    self._hook.pytest_runtest_logstart(nodeid=running, location=left[running].location)
                elif "report" in event:
                    self._hook.pytest_runtest_logreport(report=self._report(event["report"]))
                elif "about" in event:
                    self._hook.pytest_apart_about(about=event["about"])
                elif left.pop(running := event["ends"], None):
                    self._hook.pytest_runtest_logfinish(nodeid=running, location=("", None, ""))
                    running = ""
        finally:
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what hangs in a driver may not even take that: nobody waits
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        return running, f"the process of the tests ended with {process.returncode}"

    def _report(self, content: dict[str, Any]) -> pytest.TestReport:
        report: pytest.TestReport = self._hook.pytest_report_from_serializable(config=self._config, data=content)
        if isinstance(report.longrepr, list):  # JSON knows no tuples
            report.longrepr = tuple(report.longrepr)
        return report

    def _events(self, reading: int) -> Iterator[dict[str, Any] | None]:
        """What the process writes; None: it has been silent for too long."""
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while True:
                patience = min(self.test_s, self._end - time.monotonic())
                if patience <= 0 or not selector.select(patience):
                    yield None
                    return
                some = os.read(reading, 1 << 16)
                if not some:
                    return
                *lines, rest = (rest + some).split(b"\n")
                yield from map(json.loads, lines)

    def _say(self, item: pytest.Item, outcome: Any, why: str) -> None:
        """Report a test that could not do so itself."""
        text: Any = why if outcome == "failed" else (str(item.path), 0, f"Skipped: {why}")
        report = pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")
        self._hook.pytest_runtest_logreport(report=report)


class Hooks:
    """What the plugins of this process can be told besides."""

    def pytest_apart_about(self, about: dict[str, Any]) -> None:
        """Take what a process with tests says of the machine."""


class Reporter:
    """The plugin of a process with tests: it ends after a failure.

    Parameters
    ----------
    descriptor
        Where to write.
    about
        What to say of the machine; called when the first test has ended, by when the driver is in use.
    """

    def __init__(self, descriptor: int, about: Any) -> None:
        self._descriptor, self._about = descriptor, about
        self._told = False

    def _write(self, **event: object) -> None:
        data = (json.dumps(event) + "\n").encode()
        while data:
            data = data[os.write(self._descriptor, data) :]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Say when a test begins and ends."""
        self._write(starts=item.nodeid)
        result = yield
        if not self._told:
            self._told = True
            self._write(about=self._about())
        self._write(ends=item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pass a report on."""
        self._write(report=self._config.hook.pytest_report_to_serializable(config=self._config, report=report))
        if report.failed:
            self._session.shouldstop = "a new process goes on"

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Remember where we are."""
        self._session, self._config = session, session.config
