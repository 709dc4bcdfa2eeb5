"""One granule, three parties: does what it is told, line by line, and says what was read. For test_trace.py.

``READ 1``, ``WRITE 2``, ``DISCARD 0``, ``LEAVE 1``: an access by a party, a discard, the death of a device. Each is
marked in the trace.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

import uvas

GRANULE = 4096


def read(array: np.ndarray) -> int:
    return int(array[0])


def write(array: np.ndarray, value: int) -> None:
    array[0] = value


def kill(device: uvas.ProcessDevice, space: uvas.AddressSpace, reservation: uvas.Reservation, bit: int) -> None:
    os.kill(device.pid, signal.SIGKILL)
    while space.where(reservation)[0] & bit:
        time.sleep(0.001)
    time.sleep(0.05)  # the word comes before the last step


def main(trace: int) -> None:
    with uvas.AddressSpace(name="walk") as space:
        devices = [uvas.ProcessDevice(memory="private", granule=GRANULE) for _ in range(2)]
        for device in devices:
            space.attach(device)
        reservation = space.reserve(GRANULE)
        reservation.commit()
        array = reservation.numpy(dtype=np.uint64)
        print(reservation.base, flush=True)
        for step, line in enumerate(sys.stdin):
            wish, party = line.split()
            os.write(trace, b"next\n")
            if wish == "DISCARD":
                space.discard(reservation)
            elif wish == "LEAVE":
                kill(devices[int(party) - 1], space, reservation, uvas.PageFlag.device(int(party)))
            elif wish == "WRITE":
                devices[int(party) - 1].run(write, array, step) if int(party) else write(array, step)
            else:
                print(devices[int(party) - 1].run(read, array) if int(party) else read(array))
        os.write(trace, b"next\n")  # what the end does is no access's
        del array


if __name__ == "__main__":
    main(int(sys.argv[1]))
