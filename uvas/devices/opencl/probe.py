"""Whether an OpenCL device follows the host's pointers.

    python probe.py                     each device, what it advertises: one JSON object
    python probe.py PLATFORM DEVICE     try that one, by its places in the lists: one JSON object

A device that does not share the host's addresses may do anything when it is given one: fail the command, or take the
process with it. So a process of its own asks, in which nothing of uvas is imported. All that the kernel is pointed to
is memory that the process surely has.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from typing import Any

_SOURCE = """
kernel void follow(ulong node, ulong sum) {
    ulong total = 0;
    while (node) {
        global ulong *fields = (global ulong *)node;
        total += fields[1];
        fields[1] += 1;
        node = fields[0];
    }
    *(global ulong *)sum = total;
}
"""
_MAPPINGS = 3  # that the nodes lie in: nobody has told the device of any
_NODES = 100
_BYTES = 16  # of a node: the next one's address, a value
_ROUNDS = 2  # the host writes in between: what the device kept of the first round would show in the second

_left: list[object] = []
"""Memory that is never given back."""

_CAPABILITIES = {"coarse_grain_buffer": 1, "fine_grain_buffer": 2, "fine_grain_system": 4, "atomics": 8}
"""Bits of CL_DEVICE_SVM_CAPABILITIES, by the second halves of their names (cl.h)."""


def advertised_by(cl: Any, device: Any) -> tuple[str, ...]:
    """Return what shared virtual memory a device says that it has."""
    try:
        bits = device.svm_capabilities
    except cl.Error:  # OpenCL 1.2 has no such question
        return ()
    return tuple(name for name, bit in _CAPABILITIES.items() if bits & bit)


def try_out(cl: Any, device: Any) -> str:
    """Let a kernel walk and change a list whose nodes lie in plain memory; return why it cannot, or nothing.

    Raises
    ------
    pyopencl.Error
        The device refused a command.
    """
    context = cl.Context([device])
    queue = cl.CommandQueue(context)
    kernel = cl.Kernel(cl.Program(context, _SOURCE).build(), "follow")
    size = _NODES * _BYTES
    memory = [(ctypes.c_uint64 * (size // 8)).from_buffer(mmap.mmap(-1, size)) for _ in range(_MAPPINGS)]
    addresses = [ctypes.addressof(memory[i % _MAPPINGS]) + i * _BYTES for i in range(_NODES)]
    total = ctypes.c_uint64(0)
    for turn in range(_ROUNDS):
        for i, address in enumerate(addresses):
            fields = (ctypes.c_uint64 * 2).from_address(address)
            fields[0] = addresses[i + 1] if i + 1 < _NODES else 0
            fields[1] = 1000 * turn + i
        for place, value in enumerate((addresses[0], ctypes.addressof(total))):
            kernel.set_arg(place, ctypes.c_uint64(value))
        try:
            cl.enqueue_nd_range_kernel(queue, kernel, (1,), None).wait()
        except cl.Error:
            _left.append((memory, total))  # for all that is known the kernel is still at it
            raise
        expected = [1000 * turn + i for i in range(_NODES)]
        if total.value != sum(expected):
            return "it did not read what the host had written"
        if [ctypes.c_uint64.from_address(address + 8).value - 1 for address in addresses] != expected:
            return "it did not write where the host reads"
    return ""


def _survey(cl: Any) -> list[dict[str, Any]]:
    return [
        {
            "platform": platform.name.strip(),
            "device": device.name.strip(),
            "driver": device.driver_version.strip(),
            "places": [i, j],
            "advertised": advertised_by(cl, device),
        }
        for i, platform in enumerate(cl.get_platforms())
        for j, device in enumerate(platform.get_devices())
    ]


def main(places: list[int]) -> dict[str, Any]:
    """Answer as the command line asks."""
    import pyopencl as cl

    try:
        if not places:
            return {"devices": _survey(cl)}
        return {"why_not": try_out(cl, cl.get_platforms()[places[0]].get_devices()[places[1]])}
    except cl.Error as error:
        return {"why_not": str(error)}


if __name__ == "__main__":
    print(json.dumps(main([int(place) for place in sys.argv[1:]])))
