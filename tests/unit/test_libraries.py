"""Other people's libraries: over the same memory without a copy, or with all of NumPy's allocations from an arena.

Each runs in a process of its own (this file, with the name of a function): they start threads, and some forbid a fork
from then on.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

import uvas


def numbers_in(arena: uvas.Arena) -> np.ndarray:
    """Floating-point numbers 0, 1, 2 ... at a multiple of 64."""
    numbers = arena.alloc(8 * 1000, align=64).numpy("f8")
    numbers[:] = np.arange(1000)
    return numbers


def torch_takes_the_memory_itself(arena: uvas.Arena) -> None:
    import torch

    array = numbers_in(arena)
    for take in (torch.from_dlpack, torch.from_numpy, torch.as_tensor):
        tensor = take(array)
        assert tensor.data_ptr() == array.ctypes.data
        tensor[5] = 55
        assert array[5] == 55
        array[5] = 5
        assert tensor.sum() == 499_500
        back = np.from_dlpack(tensor)
        assert uvas.is_unified(back)
        assert back.ctypes.data == array.ctypes.data
        del tensor, back
    block = arena.alloc(800)
    tensor = torch.from_dlpack(block.numpy("f8"))
    with pytest.raises(BufferError):
        block.free()
    del tensor
    block.free()


def jax_takes_the_memory_itself(arena: uvas.Arena) -> None:
    import jax

    array = numbers_in(arena)
    numbers = array.view("f4")
    numbers[:] = np.arange(2000)
    seen = jax.dlpack.from_dlpack(numbers)
    assert seen.unsafe_buffer_pointer() == array.ctypes.data
    assert float(seen.sum()) == 1_999_000
    assert np.asarray(seen).ctypes.data == array.ctypes.data


def pyarrow_takes_the_memory_itself(arena: uvas.Arena) -> None:
    import pyarrow as arrow

    array = numbers_in(arena)
    column = arrow.array(array)
    assert column.buffers()[1].address == array.ctypes.data
    assert arrow.py_buffer(array).address == array.ctypes.data
    assert column.to_numpy(zero_copy_only=True).ctypes.data == array.ctypes.data
    assert sum(column.to_pylist()) == 499_500


def pandas_takes_the_memory_itself(arena: uvas.Arena) -> None:
    import pandas

    array = numbers_in(arena)
    series = pandas.Series(array, copy=False)
    assert np.shares_memory(series.to_numpy(), array)
    assert series.sum() == 499_500


@pytest.mark.parametrize("library", ["torch", "jax", "pyarrow", "pandas"])
def test_takes_the_memory_itself(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    command = [sys.executable, __file__, f"{library}_takes_the_memory_itself"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("good\n")


def test_numpy_by_dlpack_and_buffer(space: uvas.AddressSpace) -> None:
    with uvas.Arena(space) as arena:
        array = numbers_in(arena)
        assert np.from_dlpack(array).ctypes.data == array.ctypes.data
        assert np.frombuffer(memoryview(array)).ctypes.data == array.ctypes.data
        assert array.__dlpack_device__() == (1, 0)
        del array


PANDAS_AND_SCIKIT_LEARN = """
import numpy as np, uvas
import pandas, sklearn
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

def work():
    data = load_breast_cancer(as_frame=True)
    frame = data.frame
    frame["ratio"] = frame["mean area"] / frame["mean perimeter"]
    means = frame.groupby("target").mean().round(9)
    joined = frame.merge(means["ratio"].rename("of its kind"), left_on="target", right_index=True).sort_values("ratio")
    learn, check, learn_y, check_y = train_test_split(data.data, data.target, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression()).fit(learn, learn_y)
    forest = RandomForestClassifier(20, random_state=0).fit(learn, learn_y)
    return (means.to_dict(), joined["of its kind"].sum().round(6), linear.score(check, check_y),
            forest.predict_proba(check).sum(axis=0).round(9).tolist(), frame)

expected = work()
with uvas.AddressSpace() as space, uvas.Arena(space) as arena, uvas.numpy_allocator(arena), arena.measure() as used:
    got = work()
    assert got[:-1] == expected[:-1]
    assert uvas.is_unified(got[-1]["ratio"].to_numpy())
    assert used.allocations > 1000, used
    arena.check()
    del got
print("good", pandas.__version__, sklearn.__version__)
"""


@pytest.mark.slow
def test_pandas_and_scikit_learn_run_on_an_arena() -> None:
    for library in ("pandas", "sklearn"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    done = subprocess.run([sys.executable, "-c", PANDAS_AND_SCIKIT_LEARN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("good")


if __name__ == "__main__":
    with uvas.AddressSpace() as the_space, uvas.Arena(the_space) as the_arena:
        globals()[sys.argv[1]](the_arena)
        gc.collect()
    print("good")
