"""Poisson's equation on a square by conjugate gradients: every array in unified memory, half the work elsewhere.

The matrix is the five-point stencil, which is never stored: 4 at a point, -1 at each of its four neighbours, 0 around
the square. A worker process applies it to the lower half of the rows while the host does the upper half, and forms the
inner products. It is given addresses: the host writes a vector, the worker reads it where it lies, and the other way
round.

The answer is known. The matrix is S D S, where S are discrete sines and D exact eigenvalues, so that the solution for
any right-hand side follows without solving anything.

    python conjugate_gradients.py [POINTS_PER_SIDE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import uvas

TOLERANCE = 1e-10
"""Of the residual, against the right-hand side."""


# ---- what runs on either side ----------------------------------------------------------------------------------------


def apply(x: np.ndarray, y: np.ndarray) -> None:
    """Set the inner points of y to those of the matrix times x. Both have a border around their inner points."""
    out = y[1:-1, 1:-1]
    np.multiply(x[1:-1, 1:-1], 4, out=out)
    for neighbours in (x[:-2, 1:-1], x[2:, 1:-1], x[1:-1, :-2], x[1:-1, 2:]):
        out -= neighbours


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """Return the inner product; the borders are 0. Without BLAS, whose threads would be too many here."""
    return float(np.einsum("ij,ij->", x, y))


def address(x: np.ndarray) -> int:
    """Return where an array lies for whoever calls this."""
    return x.ctypes.data


# ---- the solver ------------------------------------------------------------------------------------------------------


class Device:
    """A worker, and what it was asked.

    Parameters
    ----------
    worker
        Who computes.
    """

    def __init__(self, worker: uvas.ProcessDevice) -> None:
        self.worker = worker
        self.calls = self.bytes_seen = 0

    def _note(self, arrays: tuple[np.ndarray, ...]) -> None:
        self.calls += 1
        self.bytes_seen += sum(array.nbytes for array in arrays)

    def run(self, function: Callable[..., Any], *arrays: np.ndarray) -> Any:
        """Compute there, and wait."""
        self._note(arrays)
        return self.worker.run(function, *arrays)

    def apply(self, x: np.ndarray, y: np.ndarray) -> None:
        """Apply the matrix: the lower half of the rows there, the upper half here, at the same time."""
        middle = x.shape[0] // 2
        lower = x[middle - 1 :], y[middle - 1 :]  # views, each with the row beside it for a border
        self._note(lower)
        there = self.worker.submit(apply, *lower)
        apply(x[: middle + 1], y[: middle + 1])
        there.result()


def solve(device: Device, right: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the solution and the number of iterations (Hestenes and Stiefel 1952)."""
    solution = np.zeros_like(right)
    residual = right.copy()
    direction = residual.copy()
    image = np.zeros_like(right)
    square = device.run(dot, residual, residual)
    enough = TOLERANCE**2 * square
    for iteration in range(1, right.size + 1):
        device.apply(direction, image)
        step = square / device.run(dot, direction, image)
        solution += step * direction
        residual -= step * image
        before, square = square, device.run(dot, residual, residual)
        if square <= enough:
            return solution, iteration
        direction *= square / before
        direction += residual
    raise ArithmeticError("no solution after as many iterations as there are unknowns")


# ---- what is known ---------------------------------------------------------------------------------------------------


def sines(points: int) -> np.ndarray:
    """Return S: its columns are eigenvectors in one dimension; it is symmetric and its own inverse."""
    number = np.arange(1, points + 1)
    return np.sqrt(2 / (points + 1)) * np.sin(np.pi / (points + 1) * np.outer(number, number))


def eigenvalues(points: int) -> np.ndarray:
    """Return D, of all pairs of frequencies."""
    one = 4 * np.sin(np.pi / (points + 1) * np.arange(1, points + 1) / 2) ** 2
    return one[:, None] + one


def bordered(inner: np.ndarray) -> np.ndarray:
    """Return the points with a border of 0."""
    return np.pad(inner, 1)


# ---- the run ---------------------------------------------------------------------------------------------------------


def written() -> int:
    """Return how many bytes this process has written so far, into pipes and sockets too."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def relative(difference: np.ndarray, to: np.ndarray) -> float:
    """Return the largest difference, against the largest value."""
    return float(abs(difference).max() / abs(to).max())


def check_the_matrix(device: Device, points: int) -> None:
    """See that an eigenvector is one, with the eigenvalue that theory says."""
    mode = bordered(np.outer(sines(points)[:, 2], sines(points)[:, 4]))
    image = np.zeros_like(mode)
    device.apply(mode, image)
    error = relative(image - eigenvalues(points)[2, 4] * mode, image)
    print(f"the eigenvector of frequencies 3 and 5 is one, to {error:.0e}")
    assert error < 1e-9


def compare(charges: np.ndarray, right: np.ndarray, solution: np.ndarray) -> tuple[float, float]:
    """Return the residual and the largest error."""
    image = np.zeros_like(solution)
    apply(solution, image)
    residual = np.linalg.norm(right - image) / np.linalg.norm(right)
    basis = sines(len(charges))
    known = basis @ (basis @ charges @ basis / eigenvalues(len(charges))) @ basis
    assert all(map(uvas.is_unified, (right, solution, image, known)))
    return float(residual), relative(solution[1:-1, 1:-1] - known, known)


def show_where(device: Device, solution: np.ndarray) -> None:
    """See that it lies at the same address here and there, and that nothing else would do."""
    here, block = address(solution), uvas.allocation_of(solution)
    assert device.run(address, solution) == here
    assert block is not None
    print(f"the solution lies at {here:#x}, here and there: {uvas.find(here)!r}")
    print(f"in the block {block.range} of {block.arena!r}")
    try:
        device.run(dot, solution, np.frombuffer(bytes(solution.nbytes)).reshape(solution.shape))
    except TypeError as refusal:
        print(f"an array from elsewhere is refused: {refusal}")


def run(device: Device, arena: uvas.Arena, points: int) -> None:
    """Solve for some point charges, and compare."""
    charges = np.zeros((points, points))
    charges.flat[:: points * 20 + 7] = 1
    charges.flat[:: points * 30 + 11] = -2
    right = bordered(charges)
    check_the_matrix(device, points)

    device.calls = device.bytes_seen = 0
    arena.trim()  # what threads keep for their next block counts as used
    before, began = written(), time.perf_counter()
    with arena.measure() as used:
        solution, iterations = solve(device, right)
    elapsed, sent = time.perf_counter() - began, written() - before

    residual, error = compare(charges, right, solution)
    print(f"{points} x {points} points: {iterations} iterations, {elapsed:.2f} s, residual {residual:.1e}, "
          f"largest error {error:.1e}")  # fmt: skip
    assert residual < 10 * TOLERANCE
    assert error < 1e-6
    print(f"{device.calls} calls gave the device {device.bytes_seen >> 20} MiB of arrays to work on; 0 bytes of them "
          f"travelled: a call's message has {sent // device.calls} bytes, all told")  # fmt: skip
    assert 0 < sent < 1024 * device.calls
    print(f"solving took {used.allocations} allocations of {used.allocated_bytes >> 20} MiB in all, at most "
          f"{used.peak_bytes >> 10} KiB at once; {used.live_blocks} live, of {used.live_bytes >> 10} KiB")  # fmt: skip
    show_where(device, solution)


def main() -> None:
    """Set the stage: a worker, a space that both agree on, an arena in it from which NumPy allocates."""
    points = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with (
        uvas.ProcessDevice(name="worker") as worker,
        uvas.AddressSpace([worker], name="poisson") as space,
        uvas.Arena(space, name="vectors") as arena,
    ):
        with uvas.numpy_allocator(arena):  # results of expressions, too, lie where the device sees them
            run(Device(worker), arena, points)
        arena.check()
        print(f"afterwards {arena.stats().live_blocks} blocks live")


if __name__ == "__main__":
    main()
