"""Workers in tests: what they have open, their end, and the programs that are hosts of them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import on_device

import uvas

TESTS = str(Path(__file__).parent)


def ended(pid: int) -> bool:
    """Wait for the end of a process."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor) as end:
        return bool(select.select([end], [], [], 30)[0])


def open_on(device: uvas.ProcessDevice) -> list[str]:
    """What the worker has open, but for the pidfd of the thread that waits for its parent, which it opens some time."""
    return [one for one in device.run(on_device.open_descriptors) if "pidfd" not in one]


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python on something."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, TESTS]), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
        **options,
    )


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)
