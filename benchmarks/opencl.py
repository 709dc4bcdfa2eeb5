"""One kernel, y += a * x, from the host's bytes to the host's bytes: by address, and by the ways that pyopencl has.

python benchmarks/opencl.py [--quick]      writes results/opencl.json

Each way ends when the host can read the result. Buffers and coarse-grained memory are made once and used again; what is
timed is what each call needs: copies in and out, mapping and unmapping, or nothing. `cl.SVM` over plain arrays is the
same as uvas does, without its checks and leases.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pyopencl as cl
from harness import Sample, rows_of, sample, write

import uvas

SOURCE = """
kernel void saxpy(global const float *x, global float *y, float factor) {
    size_t i = get_global_id(0);
    y[i] += factor * x[i];
}
"""
FACTOR = np.float32(2)
Array = np.ndarray[tuple[int], np.dtype[np.float32]]


class Peers:
    """The ways, over arrays of one length. Each adds FACTOR to every element of its own y."""

    def __init__(self, device: uvas.OpenCLDevice, space: uvas.AddressSpace, length: int) -> None:
        self._device, self._queue, self._size = device, device.queue, (length,)
        self._saxpy = device.kernel(SOURCE, "saxpy")
        self._raw = cl.Kernel(cl.Program(device.context, SOURCE).build(), "saxpy")
        self._held = space.reserve(2 * 4 * length)
        self._held.commit(populate=True)
        self._unified = self._held.numpy("f4", length), self._held.numpy("f4", length, offset=4 * length)
        self._plain = np.empty(length, "f4"), np.empty(length, "f4")
        flags = cl.mem_flags.READ_WRITE
        self._copied = np.empty(length, "f4"), np.empty(length, "f4")
        self._buffers = cl.Buffer(device.context, flags, 4 * length), cl.Buffer(device.context, flags, 4 * length)
        self._coarse = [
            cl.SVM(cl.svm_empty(device.context, cl.svm_mem_flags.READ_WRITE, length, np.float32)) for _ in range(2)
        ]
        for x, y in (self._unified, self._plain, self._copied):
            x[:], y[:] = 1, 0
        for memory, value in zip(self._coarse, (1, 0), strict=True):
            with memory.map_rw(self._queue) as array:
                array[:] = value

    def by_address(self, times: int) -> None:
        """Let uvas pass unified arrays."""
        x, y = self._unified
        for _ in range(times):
            self._device.run(self._saxpy, self._size, None, x, y, FACTOR)

    def by_bare_svm(self, times: int) -> None:
        """Pass plain arrays as `cl.SVM`, which nobody checks or holds."""
        x, y = self._plain
        for _ in range(times):
            self._launch(cl.SVM(x), cl.SVM(y)).wait()

    def by_copies(self, times: int) -> None:
        """Copy both arrays into buffers, and the result back."""
        (x, y), (to_x, to_y) = self._copied, self._buffers
        for _ in range(times):
            cl.enqueue_copy(self._queue, to_x, x, is_blocking=False)
            cl.enqueue_copy(self._queue, to_y, y, is_blocking=False)
            self._launch(to_x, to_y)
            cl.enqueue_copy(self._queue, y, to_y)

    def by_coarse_svm(self, times: int) -> None:
        """Use memory that is the device's and the host's in turn: map it, touch it, unmap it."""
        x, y = self._coarse
        for _ in range(times):
            for memory in (x, y):
                with memory.map_rw(self._queue):
                    pass
            self._launch(x, y)
            with y.map_ro(self._queue):
                pass

    def _launch(self, x: object, y: object) -> cl.Event:
        for place, value in enumerate((x, y, FACTOR)):
            self._raw.set_arg(place, value)
        return cl.enqueue_nd_range_kernel(self._queue, self._raw, self._size, None)

    def check(self, times: int) -> None:
        """See that each way computed right."""
        coarse = self._coarse[1]
        with coarse.map_ro(self._queue) as array:
            for name, y in (
                ("uvas", self._unified[1]),
                ("svm", self._plain[1]),
                ("copies", self._copied[1]),
                ("coarse", array),
            ):
                if not (y == FACTOR * times).all():
                    raise AssertionError(f"{name}: {y[:3]} after {times} calls")

    def ways(self) -> dict[str, Callable[[int], None]]:
        """Return them by name."""
        return {
            "uvas, by address": self.by_address,
            "cl.SVM, unchecked": self.by_bare_svm,
            "cl.Buffer, copied in and out": self.by_copies,
            "coarse-grained SVM, mapped": self.by_coarse_svm,
        }


def measure(length: int, rounds: int, count: int) -> list[Sample]:
    """Measure one length."""
    samples: list[Sample] = []
    with uvas.OpenCLDevice() as device, uvas.AddressSpace([device]) as space:
        peers = Peers(device, space, length)
        for turn in range(rounds + 1):  # the first compiles
            for name, way in peers.ways().items():
                one = sample("OpenCL", name, way, count, length)
                samples += [one] if turn else []
        peers.check((rounds + 1) * count)
    return samples


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds, calls = (5, 100) if parser.parse_args().quick else (11, 400)
    with uvas.OpenCLDevice() as device:
        details = {key: str(value) for key, value in device.info.details.items()}
    lengths = {1_000: calls, 1 << 20: calls // 10, 1 << 24: max(2, calls // 100)}
    samples = [one for length, count in lengths.items() for one in measure(length, rounds, count)]
    write("opencl", rows_of(samples), device=details)


if __name__ == "__main__":
    main()
