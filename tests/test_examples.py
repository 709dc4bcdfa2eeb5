"""The examples do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import uvas

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    """Run a command to its good end; what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_device_in_python() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "my_device.py"))
    assert "both agree on" in out
    assert "1 candidate(s) of 2 were refused" in out
    assert out.endswith("released on both sides\n")


def test_a_runtime_in_c_without_python(tmp_path: Path) -> None:
    library = Path(uvas.get_library())
    program = tmp_path / "c_runtime"
    source = EXAMPLES / "c_runtime" / "main.c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{uvas.get_include()}"]
    run("cc", *flags, str(source), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program))
    out = run(str(program))
    assert "host and device agree on [0x2c01" in out
    assert 'is held by reservation "queue" of uvas space "c_runtime"' in out
    assert "python" not in run("ldd", str(program)).lower().replace(str(library.parent).lower(), "")


def test_the_demo_verifies_what_it_claims() -> None:
    outcome = json.loads(run(sys.executable, "-W", "error", "-m", "uvas", "demo", "--json"))
    assert outcome["failures"] == []
    assert outcome["right_answers"] == outcome["queries"] == 2000
    assert outcome["conflicts"] > 0
    assert outcome["squatter_blocks"] > 0
    assert outcome["squatter_bytes_lost"] == 0
    assert outcome["audit_findings"] == 0
    assert outcome["clobber_lost"] > 0 or outcome["clobber_deaths"]
    assert outcome["seconds"] < 60
