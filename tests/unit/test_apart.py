"""Tests of hardware run apart: what ends, blocks or spoils a process of tests loses nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import apart

CONFTEST = """
import os, sys, pathlib
sys.path.insert(0, {tests!r})
from apart import REPORTS, Apart, Hooks, Reporter
from cuda_evidence import Evidence

def pytest_configure(config):
    if REPORTS in os.environ:
        config.pluginmanager.register(Reporter(int(os.environ[REPORTS]), lambda: {{"driver": 13010, "card": "X"}}))
    else:
        config.pluginmanager.add_hookspecs(Hooks)
        config.pluginmanager.register(Evidence(pathlib.Path("results", "evidence.json")))
        config.pluginmanager.register(Apart(budget_s={budget}, test_s={test}))
"""
TESTS = """
import os, signal, time
import pytest

def test_good(record_property):
    record_property("found", 5)

def test_is_left_out():
    pytest.skip("no hardware for it")

def test_dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_fails():
    os.environ["SPOILED"] = "1"
    assert 1 == 2

def test_goes_on():
    assert "SPOILED" not in os.environ

def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    time.sleep(100)

def test_last():
    pass
"""


def run(where: Path, tests: str, budget: float = 60, test: float = 6) -> tuple[str, dict[str, str], dict[str, object]]:
    """Run tests apart: what is printed, how each ended, and the rest of the evidence."""
    here = str(Path(apart.__file__).parent)
    (where / "conftest.py").write_text(CONFTEST.format(tests=here, budget=budget, test=test))
    (where / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-vrs", "-p", "no:cacheprovider", "--rootdir", str(where)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120, check=False)
    evidence = where / "results" / "evidence.json"
    content = json.loads(evidence.read_text()) if evidence.exists() else {"tests": {}}
    outcomes = {name.partition("::")[2]: how for name, how in content.pop("tests").items()}
    return done.stdout + done.stderr, outcomes, content


def test_what_ends_or_blocks_a_process_loses_one_test(tmp_path: Path) -> None:
    out, outcomes, content = run(tmp_path, TESTS)
    assert outcomes == {
        "test_good": "passed",
        "test_is_left_out": "skipped",
        "test_dies": "failed",
        "test_fails": "failed",
        "test_goes_on": "passed",
        "test_hangs": "failed",
        "test_last": "passed",
    }
    assert (content["driver"], content["card"]) == (13010, "X")
    notes = content["notes"]
    assert isinstance(notes, dict)
    assert notes["found"] == 5
    assert "ended with -11" in notes["test_it.py::test_dies call"]
    assert "assert 1 == 2" in notes["test_it.py::test_fails call"]
    assert "no word for 6 s: killed" in notes["test_it.py::test_hangs call"]
    assert "3 failed, 3 passed, 1 skipped" in out


def test_what_does_not_fit_into_the_time_is_said(tmp_path: Path) -> None:
    slow = "import time\ndef test_one(): pass\ndef test_two(): time.sleep(60)\ndef test_three(): pass\n"
    out, outcomes, _ = run(tmp_path, slow, budget=6, test=30)
    assert outcomes == {"test_one": "passed", "test_two": "failed", "test_three": "skipped"}
    assert "not begun: 6 s are over" in out


def test_what_has_begun_is_seen_to_be_running(tmp_path: Path) -> None:
    """What a machine that goes down leaves behind."""
    from cuda_evidence import Evidence

    evidence = Evidence(tmp_path / "results" / "evidence.json")
    evidence.pytest_runtest_logstart("one")
    assert not evidence.path.exists()  # nothing was seen
    evidence.outcomes["one"] = "passed"
    evidence.pytest_runtest_logstart("two")
    assert json.loads(evidence.path.read_text())["tests"] == {"one": "passed", "two": "running"}


def test_where_no_process_begins_a_test_nobody_waits_for_ever(tmp_path: Path) -> None:
    out, outcomes, _ = run(tmp_path, "import os\nif 'UVAS_TEST_REPORTS' in os.environ: os._exit(3)\ndef test(): pass\n")
    assert "not begun: the process of the tests ended with 3" in out
    assert outcomes == {}


def test_a_machine_with_a_card_needs_no_hypothesis(tmp_path: Path) -> None:
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('hypothesis', name='hypothesis')\n")
    project = Path(__file__).parents[2]
    pytest_m_cuda = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-m", "cuda"]
    ended = subprocess.run(
        [
            sys.executable,
            "-P",
            *pytest_m_cuda,
            "--collect-only",
            "tests/property",
            "tests/devices/test_cuda_hardware.py",
        ],
        cwd=project,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "test_cuda_hardware.py::test_a_kernel_writes_at_the_hosts_address" in ended.stdout
