"""A million reservations against hostile threads, and the same race with MAP_FIXED.

    python benchmarks/race.py [--reservations N]      target R7; writes results/race.json

Eight threads of ours reserve, commit, write, verify and release in one small window while four map and unmap there
without asking anybody; every page that anybody holds has its holder's mark in it, and nobody's mark may ever change
(``tests/c/stress_space.c``). The other side of the comparison is the demo's: a hole chosen as the kernel chooses it,
mapped with MAP_FIXED, and how many of those maps replaced somebody's memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from harness import write

RUN = Path(__file__).resolve().parents[1] / "tests" / "c" / "run.py"
SAID = re.compile(r"(\d+) reserved, (\d+) refused, ([\d.]+) candidates each; (\d+) foreign")
ROUND_S = 20


def map_fixed() -> dict[str, object]:
    """Return what the demo saw of the same race with MAP_FIXED: maps, how many replaced somebody's memory, deaths."""
    done = subprocess.run([sys.executable, "-m", "uvas", "demo", "--json"], check=True, stdout=subprocess.PIPE)
    outcome = json.loads(done.stdout)
    return {name: outcome[f"clobber_{name}"] for name in ("maps", "lost", "deaths")}


def main() -> None:
    """Race and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reservations", type=int, default=1_000_000)
    wanted = parser.parse_args().reservations
    reserved = refused = foreign = 0
    candidates = 0.0
    began = time.monotonic()
    while reserved < wanted:
        command = [sys.executable, str(RUN), "--seconds", str(ROUND_S), "stress_space"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        said = SAID.search(done.stdout)
        if said is None:
            raise ValueError(f"stress_space said {done.stdout!r}")
        reserved += int(said[1])
        refused += int(said[2])
        foreign += int(said[4])
        candidates += int(said[1]) * float(said[3])
        print(f"{reserved:,} reservations, nobody's byte lost", file=sys.stderr)
    uvas_side = {
        "reservations": reserved,
        "refused": refused,
        "hostile_maps": foreign,
        "candidates_each": round(candidates / reserved, 4),
        "bytes_lost": 0,  # a lost byte ends the race with an error
        "seconds": round(time.monotonic() - began, 1),
    }
    write("race", [], uvas=uvas_side, map_fixed=map_fixed())


if __name__ == "__main__":
    main()
