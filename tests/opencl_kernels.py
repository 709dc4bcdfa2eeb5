"""Kernels for the tests of OpenCL devices, with a device, and memory that they are run on."""

from __future__ import annotations

from collections.abc import Iterator

import opencl_in_tests
import pytest
from machine import PAGE

import uvas

SOURCE = """
kernel void saxpy(global const float *x, global float *y, float factor) {
    size_t i = get_global_id(0);
    y[i] += factor * x[i];
}
struct node { global struct node *next; long value; };
kernel void walk(global const struct node *node, global long *total) {
    long sum = 0;
    for (; node; node = node->next) {
        sum += node->value;
    }
    *total = sum;
}
kernel void walk_from(ulong node, ulong total) {
    long sum = 0;
    for (; node; node = ((global ulong *)node)[0]) {
        sum += ((global long *)node)[1];
    }
    *(global long *)total = sum;
}
kernel void numbers(char a, ushort b, int c, ulong d, float e, double f, global double *out) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = f;
}
kernel void reversed(global const int *x, global int *y, local int *scratch, constant int *factor) {
    size_t i = get_local_id(0), n = get_local_size(0);
    scratch[i] = x[i];
    barrier(CLK_LOCAL_MEM_FENCE);
    y[i] = scratch[n - 1 - i] * *factor;
}
kernel void four(float4 one, global float *out) { *out = one.x + one.y + one.z + one.w; }
kernel void no_more_than(ulong is_null, global const int *pointer, global int *out) {
    *out = (pointer == 0) == is_null;
}
kernel void count(global volatile ulong *word, ulong times, global volatile int *ready) {
    *ready = 1;
    for (ulong i = 0; i < times; i++) {
        *word += 1;
    }
}
kernel void when_open(global int *gate, ulong from, global long *to) {
    atomic_inc(gate + 1);
    for (ulong i = 0; i < 1ul << 34 && atomic_add(gate, 0) == 0; i++) {
    }
    *to = *(global const long *)from;
}
"""


@pytest.fixture
def device() -> Iterator[uvas.OpenCLDevice]:
    with opencl_in_tests.device("cl") as one:
        yield one


@pytest.fixture
def kernels(device):
    """Kernels of SOURCE by name."""
    return lambda name: device.kernel(SOURCE, name)


@pytest.fixture
def memory(space) -> Iterator[uvas.Reservation]:
    """Sixteen committed pages."""
    with space.reserve(16 * PAGE, name="memory") as held:
        held.commit()
        yield held
