"""An array larger than one likes to move at once, worked through by the card piece by piece, each moved ahead of need.

While the card computes on one piece the next is on its way, and the one before goes home. No more is asked of the card
than half of what it has free. Needs a CUDA GPU whose driver moves the host's pages (HMM); without it, it says so. Not
yet seen on hardware.
"""

from __future__ import annotations

import uvas

PIECE = 64 << 20
PIECES = 16


def main(device: uvas.CudaDevice) -> None:
    """Double every number, a piece at a time."""
    free = device.card.free_bytes()
    piece = min(PIECE, free // 8 >> 21 << 21)
    pieces = min(PIECES, free // 2 // piece)  # never beyond the card's free memory
    with uvas.AddressSpace([device]) as space, space.reserve(piece * pieces) as held:
        held.commit()
        whole = held.numpy("f4")
        whole[:] = 1
        parts = [uvas.Range(held.base + i * piece, piece) for i in range(pieces)]
        arriving = space.prefetch(parts[0], device, wait=False)
        for i, part in enumerate(parts):
            arriving.result()
            if i + 1 < len(parts):
                arriving = space.prefetch(parts[i + 1], device, wait=False)
            on_card = held.cupy("f4", piece // 4, offset=part.base - held.base)
            on_card *= 2
            with uvas.host_access(on_card):
                pass  # computed
            del on_card
            space.prefetch(part, "host", wait=False)
        assert (whole == 2).all()
        print(f"{piece * pieces >> 20} MiB in {pieces} pieces of {piece >> 20} MiB went through the card")
        del whole


if __name__ == "__main__":
    try:
        with uvas.CudaDevice(strategy="hmm") as gpu:
            main(gpu)
    except uvas.NotSupportedError as missing:
        print(f"this example needs a CUDA GPU: {missing}")
