"""One array from both sides: NumPy fills it, CuPy computes on the very bytes, NumPy goes on.

Needs a CUDA GPU and ``pip install 'uvas[cuda]'``; without them it says so. Not yet seen on hardware.
"""

from __future__ import annotations

import numpy as np

import uvas

COUNT = 1 << 20


def main(device: uvas.CudaDevice) -> None:
    """Compute y = 2 x + y on the card and on the host, in turn."""
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        x = arena.alloc(4 * COUNT).numpy("f4")
        y = arena.alloc(4 * COUNT).numpy("f4")
        x[:] = np.arange(COUNT)
        y[:] = 1
        on_card_x, on_card_y = uvas.ascupy(x), uvas.ascupy(y)
        assert on_card_y.data.ptr == y.ctypes.data  # one address, one memory
        on_card_y += 2 * on_card_x
        with uvas.host_access(on_card_y) as seen:  # after the stream
            assert (seen == 2 * x + 1).all()
            seen += 1  # the host's turn
        on_card_y -= 1
        assert (uvas.asnumpy(on_card_y) == 2 * x + 1).all()
        print(f"y = 2 x + y over {COUNT:,} floats at {y.ctypes.data:#x}, by {device!r} and by the host, nothing copied")
        del x, y, on_card_x, on_card_y, seen


if __name__ == "__main__":
    try:
        with uvas.CudaDevice() as gpu:
            main(gpu)
    except uvas.NotSupportedError as missing:
        print(f"this example needs a CUDA GPU: {missing}")
