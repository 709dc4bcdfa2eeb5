"""The tests of the core that are written in C. The sanitizers' runs of them are `tests/c/run.py --sanitizer ...`."""

from __future__ import annotations

import pytest
from c import run as c

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return c.Builder(tmp_path_factory.mktemp("c")).build(c.tests())


@pytest.mark.parametrize("name", c.tests())
def test_in_c(name, programs):
    assert c.run([str(programs[name])]) is None


def test_a_failing_program_is_a_failure(tmp_path):
    program = tmp_path / "fails"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    assert c.run([str(program)]) == "exit code 3"
