"""The acts of ``uvas demo``, in order, and the verdict.

1. Squatters crowd a window. uvas reserves matching ranges in it, on the host and on two worker processes, one of which
   has planted mappings of its
   own there; refusals by anybody send the search on.
2. The host builds a pointer-linked index of the standard library's sources in one of the ranges. The devices walk the
   same pointers, answer queries,
   and write the totals where the host reads them. With ``--opencl`` so does a kernel.
3. The audit, and the map of the window.
4. Memory that moves to whoever touches it: where the pages of an array are, step by step.
5. The race of the first act with the destructive MAP_FIXED, in a child process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field

import numpy as np
from rich.console import Console

from uvas import AddressSpace, Device, NotSupportedError, OpenCLDevice, ProcessDevice, Range, Reservation
from uvas.demo import index, kernel, moving
from uvas.demo.squatters import Squatters, map_at
from uvas.maps.kernel import read_mappings
from uvas.report import Holding, draw_map, foreign_holdings, format_size

_MIB = 1 << 20
_WINDOW = Range(0x2A00_0000_0000, 512 * _MIB)
_BLOCK = 2 * _MIB  # of a squatter
_RANGE = 4 * _MIB  # of a reservation that is only there to be fought for
_RANGES = 24
_TEXT_LIMIT = 6 * _MIB  # of sources: what leaves the whole under 20 seconds on two slow cores
_QUERIES = 2000
_CLOBBER_SECONDS = 3.0
_CLOBBER_SECONDS_MOST = 10.0  # on a machine so busy that nobody meets in 3 seconds
_PLANTED = 8  # mappings that only one device has
_SEED = 20
_PICTURE_WIDTH = 118  # columns


@dataclass(slots=True)
class Outcome:
    """What happened, for scripts; `failures` says which claim did not hold."""

    reserved: int = 0
    reserved_bytes: int = 0
    candidates: int = 0
    conflicts: int = 0
    squatter_blocks: int = 0
    squatter_bytes_lost: int = 0
    files: int = 0
    words: int = 0
    postings: int = 0
    index_bytes: int = 0
    queries: int = 0
    right_answers: int = 0
    right_in_kernels: int = 0
    audit_findings: int = 0
    moved_bytes: int = 0
    moving_faults: int = 0
    moving_evictions: int = 0
    moving_pictures: tuple[str, ...] = ()
    moving_refused: str = ""
    clobber_maps: int = 0
    clobber_lost: int = 0
    clobber_deaths: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def claim(self, holds: bool, otherwise: str) -> None:
        """Note a claim that does not hold."""
        if not holds:
            self.failures.append(otherwise)


def main(*, as_json: bool, picture: str | None = None, opencl: bool = False) -> int:
    """Run the demo; 0 only if every claim was verified."""
    if opencl:
        try:
            with OpenCLDevice(name="kernels") as kernels:
                return _main(as_json, picture, kernels)
        except NotSupportedError as refusal:
            print(refusal, file=sys.stderr)
            return 1
    return _main(as_json, picture, None)


def _main(as_json: bool, picture: str | None, kernels: OpenCLDevice | None) -> int:
    console = Console(record=True, width=_PICTURE_WIDTH) if picture else Console(quiet=as_json)
    outcome = Outcome()
    started = time.monotonic()
    with ProcessDevice(name="left") as left, ProcessDevice(name="right") as right:
        with Squatters(_WINDOW, threads=4, blocks=16, block=_BLOCK, seed=_SEED) as squatters:
            _share_addresses(console, outcome, left, right, kernels)
        outcome.squatter_blocks = squatters.taken
        outcome.squatter_bytes_lost = squatters.lost * 8
        console.print(
            f"   squatters: {squatters.taken} blocks mapped and unmapped meanwhile, "
            f"{squatters.lost} of their sentinels lost"
        )
        outcome.claim(squatters.taken > 0, "no squatter was in the way")
        outcome.claim(squatters.lost == 0, f"{squatters.lost} sentinels of squatters were lost")
    _move(console, outcome)
    _show_harm(console, outcome)
    outcome.seconds = round(time.monotonic() - started, 2)
    if as_json:
        print(json.dumps(asdict(outcome)))
    elif outcome.failures:
        console.print("[bold red]not verified:[/] " + "; ".join(outcome.failures))
    else:
        console.print(f"[bold green]all of it verified[/] in {outcome.seconds:.1f} s")
    if picture:
        console.save_svg(picture, title="uvas demo")
    return 1 if outcome.failures else 0


def _share_addresses(
    console: Console, outcome: Outcome, left: ProcessDevice, right: ProcessDevice, kernels: OpenCLDevice | None
) -> None:
    console.rule("1. One range of addresses, three processes, and strangers in the way")
    right.run(_plant, _WINDOW.base, _WINDOW.size // _BLOCK, _SEED)
    devices: list[Device] = [left, right] if kernels is None else [left, right, kernels]
    with AddressSpace(devices, window=_WINDOW, name="demo") as space:
        ranges = [space.reserve(_RANGE, name=f"range {i}") for i in range(_RANGES)]
        corpus = index.read_standard_library(_TEXT_LIMIT)
        buckets = index.buckets_for(len(corpus.counts))
        needed = -(-corpus.bytes_needed(buckets) // 8) * 8
        book = space.reserve(needed, name="index")
        answers = space.reserve(_QUERIES * 8, name="answers")
        stats = space.stats()
        outcome.reserved = stats.reserves
        outcome.reserved_bytes = stats.reserved_bytes
        outcome.candidates = stats.attempts
        outcome.conflicts = stats.conflicts
        console.print(
            f"   {stats.reserves} ranges, {format_size(stats.reserved_bytes)}, at the same addresses on the host, "
            f"{left.info.name} and {right.info.name}; "
            f"{stats.conflicts} candidates were refused by somebody, {stats.attempts} tried in all"
        )
        outcome.claim(stats.conflicts > 0, "nobody was ever in the way: there was nothing to retry")
        words = _walk_pointers(console, outcome, corpus, book, answers, (left, right))
        if kernels is not None:
            with space.reserve(kernel.bytes_needed(words), name="queries") as queries:
                _walk_in_kernels(console, outcome, kernels, (corpus, words), book.base, queries)
        _look(console, outcome, space, [*ranges, book, answers])


def _plant(base: int, places: int, seed: int) -> None:
    """On a device: map where the host knows nothing of it."""
    chance = random.Random(seed)
    for _ in range(_PLANTED):
        map_at(base + chance.randrange(places) * _BLOCK, _BLOCK)


def _walk_pointers(
    console: Console,
    outcome: Outcome,
    corpus: index.Corpus,
    book: Reservation,
    answers: Reservation,
    devices: tuple[ProcessDevice, ProcessDevice],
) -> list[bytes]:
    """Return the words that were asked for."""
    console.rule("2. Pointers that mean the same everywhere")
    book.commit()
    answers.commit()
    header = index.build(book.numpy(np.uint64), corpus)
    totals = answers.numpy(np.uint64, (_QUERIES,))
    chance = random.Random(_SEED)
    words = chance.sample(sorted(corpus.counts), min(_QUERIES - 10, len(corpus.counts)))
    words += [b"no_such_word_%c" % (97 + i) for i in range(_QUERIES - len(words))]
    half = _QUERIES // 2
    parts = (slice(0, half), slice(half, _QUERIES))
    waiting: list[Future[list[str | None]]] = [
        device.submit(index.answer, header, words[part], totals[part])
        for device, part in zip(devices, parts, strict=True)
    ]
    best = [name for future in waiting for name in future.result()]
    right_totals, right_best = index.expected(corpus, words)
    outcome.files, outcome.words, outcome.postings = len(corpus.files), len(corpus.counts), corpus.postings
    outcome.index_bytes, outcome.queries = book.size, _QUERIES
    outcome.right_answers = sum(
        int(total) == right and name == other
        for total, right, name, other in zip(totals, right_totals, best, right_best, strict=True)
    )
    console.print(
        f"   the host indexed {outcome.files} files of the standard library ({format_size(corpus.text_bytes)}): "
        f"{outcome.words} words, "
        f"{outcome.postings} postings, linked by plain addresses in {format_size(book.size)} at {header:#x}"
    )
    console.print(
        f"   two devices followed them: {outcome.right_answers} of {_QUERIES} answers right, "
        "written where the host reads them"
    )
    outcome.claim(outcome.right_answers == _QUERIES, f"{_QUERIES - outcome.right_answers} answers were wrong")
    return words


def _walk_in_kernels(
    console: Console,
    outcome: Outcome,
    device: OpenCLDevice,
    asked: tuple[index.Corpus, list[bytes]],
    header: int,
    memory: Reservation,
) -> None:
    memory.commit()
    right, _ = index.expected(*asked)
    totals = kernel.answer(device, header, asked[1], memory)
    outcome.right_in_kernels = int((totals == np.array(right, np.uint64)).sum())
    console.print(
        f"   {len(right)} work items on {device.info.details['device']} followed them too: "
        f"{outcome.right_in_kernels} right"
    )
    outcome.claim(outcome.right_in_kernels == len(right), f"{len(right) - outcome.right_in_kernels} kernels were wrong")


def _look(console: Console, outcome: Outcome, space: AddressSpace, ranges: list[Reservation]) -> None:
    console.rule("3. Who holds what")
    space.check()
    outcome.audit_findings = len(space.audit().findings)
    outcome.claim(outcome.audit_findings == 0, f"the audit found {outcome.audit_findings} differences")
    holdings = [Holding(one.range, f'uvas "{one.name}"', "ours") for one in ranges]
    draw_map(console, _WINDOW, holdings + foreign_holdings(_WINDOW, [one.range for one in ranges], read_mappings()))
    console.print(f"   audit: {outcome.audit_findings} differences between the registry and the kernel")


def _move(console: Console, outcome: Outcome) -> None:
    console.rule("4. Memory that moves to whoever touches it")
    try:
        moved = moving.show(console)
    except NotSupportedError as refusal:
        outcome.moving_refused = str(refusal)
        console.print(f"   not to be shown here: {refusal}")
        return
    outcome.moved_bytes, outcome.moving_faults = moved.bytes_in, moved.faults
    outcome.moving_evictions, outcome.moving_pictures = moved.evictions, moved.pictures
    console.print(
        f"   {moved.faults} faults and one prefetch moved {format_size(moved.bytes_in)}; "
        f"{moved.evictions} granules had to leave L for others"
    )
    outcome.claim(moved.right, "somebody saw other words than were written")
    outcome.claim(moved.bytes_in > 0, "nothing moved")


def _show_harm(console: Console, outcome: Outcome) -> None:
    console.rule("5. The race of the first act, with MAP_FIXED")
    began = time.monotonic()
    while (spent := time.monotonic() - began) < _CLOBBER_SECONDS_MOST:
        harmed = outcome.clobber_lost or outcome.clobber_deaths
        left = _CLOBBER_SECONDS - spent if harmed else max(1.0, _CLOBBER_SECONDS - spent)
        if left < 0.2:
            break
        # -P: from a checkout's directory -m would find the sources there instead of what is installed.
        command = [sys.executable, "-P", "-m", "uvas.demo.clobber", f"{left:.2f}"]
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        lines = child.stdout.splitlines()
        if not lines and child.returncode > 0:  # a death is no proof before the race has begun
            outcome.claim(False, f"the race with MAP_FIXED did not begin: {child.stderr.strip()[-200:]}")
            return
        last = json.loads(lines[-1]) if lines else {"maps": 0, "victim_lost": 0}
        outcome.clobber_maps += last["maps"]
        outcome.clobber_lost += last["victim_lost"]
        if child.returncode < 0:
            outcome.clobber_deaths.append(signal.Signals(-child.returncode).name)
        elif child.returncode > 0:
            outcome.clobber_deaths.append(f"exit code {child.returncode}")
    share = 100 * outcome.clobber_lost / outcome.clobber_maps if outcome.clobber_maps else 0
    deaths = f", and the process died: {', '.join(outcome.clobber_deaths)}" if outcome.clobber_deaths else ""
    console.print(
        f"   {outcome.clobber_maps} maps into a hole just read from /proc/self/maps: {outcome.clobber_lost} "
        f"({share:.0f} %) replaced memory that "
        f"another thread had mapped meanwhile{deaths}"
    )
    outcome.claim(bool(outcome.clobber_lost or outcome.clobber_deaths), "MAP_FIXED destroyed nothing this time")
