"""The table, the JSON, the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uvas.doctor.check import Check, DeviceCheck, State
from uvas.doctor.devices import check_devices, check_host
from uvas.doctor.kernel import check_kernel
from uvas.doctor.limits import check_limits

_STYLES: dict[State, str] = {"good": "green", "limited": "yellow", "missing": "red"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was looked at, and whether uvas can do its main job here: one range on the host and on a device."""

    usable: bool
    checks: tuple[Check, ...]
    devices: tuple[DeviceCheck, ...]


def examine() -> Diagnosis:
    """Look at everything. Takes a second or two: a worker process is started."""
    host = check_host()
    devices = check_devices()
    usable = host.state == "good" and any(device.state == "good" for device in devices)
    return Diagnosis(usable, (host, *check_kernel(), *check_limits()), tuple(devices))


def main(*, as_json: bool) -> int:
    """Print the diagnosis; 0 if uvas can do its main job here, 1 if it cannot."""
    diagnosis = examine()
    if as_json:
        print(json.dumps(asdict(diagnosis)))
    else:
        _draw(Console(), diagnosis)
    return 0 if diagnosis.usable else 1


def _draw(console: Console, diagnosis: Diagnosis) -> None:
    console.print(_table(("", "state", "found"), [(one, one.value) for one in diagnosis.checks]))
    console.print()
    devices = [(one, one.advertised, one.probed) for one in diagnosis.devices]
    console.print(_table(("device", "state", "advertised", "probed"), devices))
    console.print()
    advice: list[tuple[Check | DeviceCheck, str]] = []
    advice += [(one, f"{one.means}. Remedy: {one.remedy}") for one in diagnosis.checks if one.state != "good"]
    advice += [(one, one.remedy) for one in diagnosis.devices if one.state != "good"]
    console.print(_table(("", "state", "what it means"), advice))
    verdict = "[bold green]uvas can" if diagnosis.usable else "[bold red]uvas cannot"
    console.print(f"\n{verdict} do its main job here[/]: one range on the host and on a device")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[Check | DeviceCheck, *tuple[str, ...]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for one, *cells in rows:
        table.add_row(Text(one.name, no_wrap=True), Text(one.state, style=_STYLES[one.state]), *map(Text, cells))
    return table
