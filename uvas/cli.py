"""The command line: ``uvas demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="uvas", description="One address on the host and on every device, nobody's memory replaced."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="the main job on real input, in under 20 seconds",
        description="Reserve matching ranges on the host and on two devices while others map there too, let the "
        "devices follow the host's pointers, then show what MAP_FIXED does in the same race. The exit code is 0 only "
        "if everything that is claimed was verified.",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    demo.add_argument("--picture", metavar="FILE", help="also write what is shown as an SVG picture")
    options = parser.parse_args(arguments)
    from uvas.demo.run import main as run_demo  # the command line's start is not to pay for what it does not run

    return run_demo(as_json=options.json, picture=options.picture)
