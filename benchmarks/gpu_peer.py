"""One peer of gpu.py's in a process of its own: ``gpu_peer.py TARGET NAME``, or ``gpu_peer.py about``.

It reads ``prepare PARAMETER`` and ``run COUNT``, a line each, and answers each by a line of JSON: what it took, or why
it cannot. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import uvas

if TYPE_CHECKING:  # the peers' libraries are for who measures
    from collections.abc import Callable

    from gpu_peers import Peer


def main(*arguments: str) -> int:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        if arguments == ("about",):
            say(**about())
        else:
            from gpu_peers import peers

            target, name = arguments
            serve(peers()[target][name], say)
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


def serve(peer: Peer, say: Callable[..., None]) -> None:
    """Do what stdin says."""
    with peer() as prepare:
        say(ready=True)
        work = None
        for line in sys.stdin:
            verb, _, number = line.partition(" ")
            if verb == "prepare":
                work = prepare(int(number))
                work(1)  # warm
                say(ready=True)
            else:
                count, began = int(number), time.perf_counter_ns()
                measured = work(count)
                say(ns=measured if measured is not None else (time.perf_counter_ns() - began) / count)


def about() -> dict[str, object]:
    """Return what the card is, or what is missing."""
    try:
        with uvas.CudaDevice() as device:
            details = device.info.details
            about = {"card": details["model"], "driver": details["driver"], "attributes": details["attributes"]}
            return about | {"strategy": details["strategy"], "why not": details["why not"]}
    except uvas.NotSupportedError as missing:
        return {"missing": str(missing)}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
