"""All benchmarks, then the report: ``python benchmarks [--quick]``, tens of minutes; --quick: less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

for name in ("reserve", "find", "devices", "opencl", "threads", "alloc", "alloc_python", "move", "ship", "contend"):
    subprocess.run([sys.executable, HERE / f"{name}.py", *sys.argv[1:]], check=True)
subprocess.run([sys.executable, HERE / "report.py"], check=True)
