"""C functions of a shared library, called in the worker by path and symbol."""

from __future__ import annotations

import os
import pickle
import subprocess

import numpy as np
import pytest

import uvas

SOURCE = r"""
#include <stdint.h>
#include <unistd.h>
int64_t add(int64_t a, int64_t b) { return a + b; }
uint64_t all_bits(void) { return UINT64_MAX; }
int32_t process(void) { return getpid(); }
double scale(double factor, int64_t by) { return factor * (double)by; }
int64_t sum(const int64_t *values, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        total += values[i];
    }
    return total;
}
struct node { struct node *next; int64_t value; };
int64_t walk(const struct node *node) {
    int64_t total = 0;
    for (; node; node = node->next) {
        total += node->value;
    }
    return total;
}
void fill(uint8_t *bytes, uint64_t count, int64_t value) {
    for (uint64_t i = 0; i < count; i++) {
        bytes[i] = (uint8_t)value;
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("c")
    source = folder / "functions.c"
    source.write_text(SOURCE)
    path = folder / "libfunctions.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
    return str(path)


@pytest.fixture
def device(reused: uvas.ProcessDevice) -> uvas.ProcessDevice:
    """One for all tests."""
    return reused


def test_it_runs_in_the_worker(device, library):
    assert device.run(uvas.CFunction(library, "process", "int32")) == device.pid


@pytest.mark.parametrize(
    ("symbol", "result", "arguments", "expected"),
    [
        ("add", "int64", (2, -5), -3),
        ("add", "int64", (np.int32(2), True), 3),
        ("add", "int64", ((1 << 64) - 1, 1), 0),
        ("add", "int64", (-(1 << 63), 0), -(1 << 63)),
        ("all_bits", "uint64", (), (1 << 64) - 1),
        ("all_bits", "int64", (), -1),
        ("scale", "float64", (1.5, 4), 6.0),
        ("scale", "float64", (np.float32(0.5), 4), 2.0),
    ],
)
def test_numbers(device, library, symbol, result, arguments, expected):
    assert device.run(uvas.CFunction(library, symbol, result), *arguments) == expected


def test_arrays_travel_by_address(device, space, library):
    with space.reserve(1 << 16) as held:
        held.commit()
        values = held.numpy("i8", 100)
        values[:] = np.arange(100)
        assert device.run(uvas.CFunction(library, "sum"), values, 100) == 4950
        assert device.run(uvas.CFunction(library, "sum"), held.base, 100) == 4950
        assert device.run(uvas.CFunction(library, "sum"), values[10:], 2) == 21
        assert device.run(uvas.CFunction(library, "fill", "none"), held.base, 16, 0xFF) is None
        assert values[:3].tolist() == [-1, -1, 2]


def test_pointers_in_memory(device, space, library):
    with space.reserve(1 << 16) as held:
        held.commit()
        nodes = held.numpy("u8", (10, 2))
        nodes[:, 1] = 3
        nodes[1:, 0] = [held.base + 16 * i for i in range(9)]
        assert device.run(uvas.CFunction(library, "walk"), held.base + 16 * 9) == 30


def test_a_path_means_the_same_where_it_is_called(device, library, monkeypatch):
    folder, name = os.path.split(library)
    monkeypatch.chdir(folder)
    here = uvas.CFunction(f"./{name}", "add")
    monkeypatch.chdir("/")
    assert here.path == library
    assert device.run(here, 1, 2) == 3


def test_it_is_a_value(library):
    one = uvas.CFunction(library, "add")
    assert pickle.loads(pickle.dumps(one)) == one
    assert one(1, 2) == 3  # here as well


def test_no_such_library(device):
    with pytest.raises(OSError, match=r"/nowhere/libnone\.so"):
        device.run(uvas.CFunction("/nowhere/libnone.so", "add"), 1, 2)
    assert device.run(int) == 0


def test_no_such_symbol(device, library):
    with pytest.raises(AttributeError, match="subtract"):
        device.run(uvas.CFunction(library, "subtract"), 1, 2)


def test_what_is_no_argument(device, library):
    with pytest.raises(TypeError, match="argument 2 of add is a str"):
        device.run(uvas.CFunction(library, "add"), 1, "2")
    with pytest.raises(OverflowError, match="argument 1 of add has more than 64 bits: 0x10000000000000000"):
        device.run(uvas.CFunction(library, "add"), 1 << 64, 2)
    with pytest.raises(TypeError, match="keyword"):
        device.run(uvas.CFunction(library, "add"), 1, b=2)


@pytest.mark.parametrize(
    ("path", "symbol", "result"), [("", "f", "int64"), ("x.so", "", "int64"), ("x.so", "f", "long")]
)
def test_what_is_no_c_function(path, symbol, result):
    with pytest.raises(ValueError, match="a C function"):
        uvas.CFunction(path, symbol, result)


def test_a_crash_is_a_lost_device(library):
    with uvas.ProcessDevice() as device, pytest.raises(uvas.DeviceLostError, match="SIGSEGV"):
        device.run(uvas.CFunction(library, "sum"), 8, 1)
