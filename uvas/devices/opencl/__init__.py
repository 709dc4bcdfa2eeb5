"""OpenCL devices that follow the host's pointers.

`device`     the device
`kernel`     a kernel, and how its arguments are passed
`launches`   kernels on their way, and who waits for them
`platforms`  what OpenCL is there, and what it says of itself
`probe`      whether a device does what it says, or more: a program of its own
"""

from __future__ import annotations

from uvas.devices.opencl.device import OpenCLDevice
from uvas.devices.opencl.kernel import Kernel, Parameter

__all__ = ["Kernel", "OpenCLDevice", "Parameter"]
