"""The command line: ``uvas demo``, ``uvas doctor``, ``uvas maps``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_JSON = "print one JSON object and nothing else"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    # The command line's start is not to pay for what it does not run.
    if options.command == "demo":
        from uvas.demo.run import main as run_demo

        return run_demo(as_json=options.json, picture=options.picture, opencl=options.opencl)
    if options.command == "doctor":
        from uvas.doctor.run import main as run_doctor

        return run_doctor(as_json=options.json)
    from uvas.maps.run import main as run_maps

    return run_maps(as_json=options.json, watch=options.watch, pid=options.pid)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uvas", description="One address on the host and on every device, nobody's memory replaced."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="the main job on real input, in under 20 seconds",
        description="Reserve matching ranges on the host and on two devices while others map there too, let the "
        "devices follow the host's pointers, show memory that moves to whoever touches it, then what MAP_FIXED does in "
        "the same race. The exit code is 0 only if everything that is claimed was verified.",
    )
    demo.add_argument("--json", action="store_true", help=_JSON)
    demo.add_argument("--opencl", action="store_true", help="let an OpenCL kernel follow the pointers too")
    demo.add_argument("--picture", metavar="FILE", help="also write what is shown as an SVG picture")
    doctor = commands.add_parser(
        "doctor",
        help="what this kernel, its limits and its devices can do for uvas",
        description="Try what uvas rests on, read the limits, look for devices and let them answer; say for each "
        "shortcoming what would help. The exit code is 0 if uvas can do its main job here, 1 if it cannot.",
    )
    doctor.add_argument("--json", action="store_true", help=_JSON)
    maps = commands.add_parser(
        "maps",
        help="the addresses that uvas holds, in every process that may be read",
        description="Show what uvas holds in other processes, by the tags that /proc/PID/maps shows. The exit code is "
        "2 where there is no such process or it may not be read.",
    )
    maps.add_argument("--json", action="store_true", help=f"{_JSON}; with --watch one a line")
    maps.add_argument("--watch", action="store_true", help="look again and again, until Ctrl-C")
    maps.add_argument("--pid", type=int, metavar="N", help="only of this process")
    return parser
