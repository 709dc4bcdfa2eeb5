"""A real kernel runtime beside uvas: its compiler and its workers map and unmap where uvas reserves.

The oracle is the bytes: what strangers wrote stays, what kernels compute is right (the compiler's own memory and the
code that it has just loaded are whole), and every reservation keeps what was written there.
"""

from __future__ import annotations

import gc
import os
import random
import time

import numpy as np
import opencl_in_tests
from crowd import Crowd
from machine import MIB, PAGE, map_anywhere, read_word, unmap, write_word

import uvas

FULL = os.environ.get("UVAS_FULL") == "1"
SOURCE = """
kernel void stir(global const ulong *x, global ulong *y) {
    size_t i = get_global_id(0);
    ulong value = x[i];
    for (int round = 0; round < 7; round++) {
        value = value * NUMBER + (value >> 7);
    }
    y[i] = value;
}
"""
COUNT = 512


def stirred(x: np.ndarray, number: int) -> np.ndarray:
    """What the kernel of that number makes of x."""
    value = x.copy()
    with np.errstate(over="ignore"):
        for _ in range(7):
            value = value * np.uint64(number) + (value >> np.uint64(7))
    return value


def test_pocl_maps_and_unmaps_where_uvas_reserves() -> None:
    with opencl_in_tests.device("cl") as device, uvas.AddressSpace([device], name="race") as space:
        counts = {"compiled": 0, "reserved": 0, "refused": 0}

        def compile_and_run(chance: random.Random) -> None:
            number = chance.randrange(3, 1 << 31) | 1
            kernel = device.kernel(SOURCE, "stir", options=["-D", f"NUMBER={number}ul"])
            with space.reserve(2 * COUNT * 8) as held:
                held.commit()
                x, y = held.numpy("u8", COUNT), held.numpy("u8", COUNT, offset=COUNT * 8)
                x[:] = np.arange(COUNT) * number
                device.run(kernel, COUNT, None, x, y)
                assert (y == stirred(x, number)).all()
                del x, y
            counts["compiled"] += 1

        def reserve(chance: random.Random) -> None:
            """Where somebody has just left, which is where the kernel puts the next one."""
            size = chance.choice((PAGE, 16 * PAGE, MIB))
            left = map_anywhere(size)
            unmap(left, size)
            try:
                held = space.reserve(size, at=left)
            except uvas.AddressInUseError:
                counts["refused"] += 1
                return
            held.commit()
            words = held.numpy("u8")
            mark = chance.getrandbits(63)
            words[:] = mark
            time.sleep(0)
            assert (words == mark).all()
            del words
            held.decommit(0, PAGE)
            held.release()
            counts["reserved"] += 1

        def be_a_stranger(chance: random.Random) -> None:
            """Map where the kernel likes, look at it again, go."""
            size = chance.choice((PAGE, 16 * PAGE))
            at = map_anywhere(size)
            word = chance.getrandbits(63)
            for address in (at, at + size - 8):
                write_word(address, word)
            time.sleep(0)
            assert [read_word(address) for address in (at, at + size - 8)] == [word, word]
            unmap(at, size)

        crowd = Crowd()
        crowd.add(1, compile_and_run, seed=1)
        crowd.add(4, reserve, seed=2)
        crowd.add(1, be_a_stranger, seed=3)
        crowd.finish(60 if FULL else 4, lambda: counts["compiled"] > 3 and counts["reserved"] > 100)
        gc.collect()
        space.check()
        assert space.audit().findings == ()
        assert space.stats().reservations == 0
        assert counts["compiled"] > 3
        assert counts["reserved"] > 100
