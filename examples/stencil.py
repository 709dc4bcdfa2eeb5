"""Heat on a plate, in two halves that live on two devices: only rows near where they meet move.

Each step every point becomes the mean of its four neighbours. Two arrays take turns as the old and the new plate. The
devices compute at the same time, each its half, into memory of its own; for the row beside its half it reads the other
one's. Nobody sends anything: the row is touched, and its pages come.

A row is one page here, and so is a granule, the unit that moves. Who reads rows in order is sent a few more ahead, so
that the other half's first rows travel as well.

    python stencil.py [STEPS] [ROWS]
"""

from __future__ import annotations

import sys

import numpy as np

import uvas

GRANULE = 4096
COLUMNS = GRANULE // 8


def step(old: np.ndarray, new: np.ndarray, first: int, end: int) -> None:
    """On a device: compute rows of the new plate; its border stays."""
    new[first:end, 1:-1] = old[first - 1 : end - 1, 1:-1] + old[first + 1 : end + 1, 1:-1]
    new[first:end, 1:-1] += old[first:end, :-2] + old[first:end, 2:]
    new[first:end, 1:-1] /= 4


def start(plate: np.ndarray) -> None:
    """Make one side hot."""
    plate[:] = 0
    plate[:, 0] = 100


def draw(space: uvas.AddressSpace, plate: np.ndarray, parts: int = 32) -> str:
    """Return where the rows of a plate are: h on the host, 1 and 2 on a device, + on several."""
    flags = space.where(plate).reshape(parts, -1)[:, -1]
    signs = {int(uvas.PageFlag.HOST): "h", int(uvas.PageFlag.device(1)): "1", int(uvas.PageFlag.device(2)): "2"}
    return "".join(signs.get(int(one), "+") for one in flags)


def main() -> None:
    """Compute on two devices, compare with the host alone."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    middle = rows // 2
    with (
        uvas.ProcessDevice(name="upper", memory="private", granule=GRANULE) as upper,
        uvas.ProcessDevice(name="lower", memory="private", granule=GRANULE) as lower,
        uvas.AddressSpace([upper, lower], name="plate") as space,
        space.reserve(2 * rows * GRANULE, name="plates") as held,
    ):
        held.commit()
        plates = held.numpy(np.float64, (2, rows, COLUMNS))
        for plate in plates:
            start(plate)
            space.prefetch(plate[:middle], upper)
            space.prefetch(plate[middle:], lower)
        print(f"two plates of {rows} x {COLUMNS} points, {plates.nbytes >> 20} MiB: {draw(space, plates[0])}")

        before = space.movement()
        for i in range(steps):
            old, new = plates[i % 2], plates[(i + 1) % 2]
            at_work = [upper.submit(step, old, new, 1, middle), lower.submit(step, old, new, middle, rows - 1)]
            for one in at_work:
                one.result()
        after = space.movement()
        moved = [after.devices[name].bytes_in - before.devices[name].bytes_in for name in ("upper", "lower")]
        print(f"after {steps} steps:                          {draw(space, plates[steps % 2])}")
        print(f"upper was sent {moved[0] >> 10} KiB and lower {moved[1] >> 10} KiB: "
              f"{sum(moved) / steps / GRANULE:.1f} rows a step, of {rows}")  # fmt: skip

        alone = np.empty((2, rows, COLUMNS))
        start(alone[0])
        start(alone[1])
        for i in range(steps):
            step(alone[i % 2], alone[(i + 1) % 2], 1, rows - 1)
        same = np.array_equal(alone[steps % 2], plates[steps % 2])
        print(f"the same, to the bit, as the host alone: {same}; "
              f"looking at it brought {space.movement().host.bytes_in >> 20} MiB home")  # fmt: skip
        assert same
        del plates, plate, old, new, at_work, one


if __name__ == "__main__":
    main()
