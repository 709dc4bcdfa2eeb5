"""One round of G6: CuPy, and torch where it is, come up while 8 threads reserve. 0: nothing was lost."""

from __future__ import annotations

import sys
import threading

import uvas

SIZE = 1 << 20
failures: list[str] = []
ended = threading.Event()


def work(space: uvas.AddressSpace, seed: int) -> None:
    """Reserve, write, read again, release, until the others are up."""
    try:
        while not ended.is_set():
            with space.reserve(SIZE) as held:
                held.commit()
                array = held.numpy("u8")
                array[:] = seed
                if not (array == seed).all():
                    failures.append(f"bytes at {held.base:#x} are lost")
                del array
    except BaseException as error:
        failures.append(repr(error))


with uvas.AddressSpace() as space:
    threads = [threading.Thread(target=work, args=(space, seed)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    try:
        import cupy

        values = cupy.arange(1 << 20)
        if int(values.sum()) != (1 << 19) * ((1 << 20) - 1):
            failures.append("the card computes wrongly")
        try:
            import torch
        except ImportError:
            torch = None
        if torch is not None and int(torch.arange(1 << 16, device="cuda").sum()) != (1 << 15) * ((1 << 16) - 1):
            failures.append("the card computes wrongly for torch")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    space.check()
print("\n".join(failures))
sys.exit(bool(failures))
