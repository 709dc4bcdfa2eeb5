"""What ``pytest -m cuda`` leaves behind: a line for each test as it ends, and a file with the driver and the card."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda_tests.json"


class Evidence:
    """A plugin of pytest's."""

    def __init__(self, path: Path = EVIDENCE) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended; a crash of the driver must not lose what was seen."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            if any(one != "skipped" for one in self.outcomes.values()):
                self.write()

    def write(self) -> None:
        """Write all that is known."""
        content = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), **about(), "tests": self.outcomes}
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
