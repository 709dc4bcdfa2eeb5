"""What ``pytest -m cuda`` leaves behind: a file with the driver, the card, and how each test ended."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda_tests.json"


class Evidence:
    """A plugin of pytest's. It writes as tests begin and end: one that ends its process is seen to be *running*."""

    def __init__(self, path: Path = EVIDENCE) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.outcomes: dict[str, str] = {}
        self.notes: dict[str, object] = {}

    def pytest_apart_about(self, about: dict[str, Any]) -> None:
        """Take what was found out of the driver and its cards."""
        self.about = about

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test has begun."""
        self.outcomes[nodeid] = "running"
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended, and what it found out."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        self.notes |= dict(report.user_properties)
        if report.failed:
            self.notes[f"{report.nodeid} {report.when}"] = str(report.longrepr)[-2000:]
        self.write()

    def write(self) -> None:
        """Write all that is known, if anything was seen."""
        if any(one not in ("skipped", "running") for one in self.outcomes.values()):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            content = {"measured": now, **self.about, "tests": self.outcomes, "notes": self.notes}
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(content, indent=1) + "\n")


def about() -> dict[str, object]:
    """Return the driver's version and its cards, as far as it answers."""
    from uvas.devices.cuda import card, driver
    from uvas.errors import UvasError

    try:
        cards = [{"name": card.name_of(one), **card.can(one)} for one in driver.ordinals()]
        return {"driver": driver.version(), "cards": cards}
    except UvasError as error:
        return {"driver": str(error)}
