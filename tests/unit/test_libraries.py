"""Other people's libraries: over the same memory without a copy, or with all of NumPy's allocations from an arena."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import uvas


@pytest.fixture
def arena(space: uvas.AddressSpace) -> Iterator[uvas.Arena]:
    """An arena, which closes when the last library has let go."""
    with uvas.Arena(space, name="libraries") as one:
        yield one
        gc.collect()


def numbers_in(arena: uvas.Arena) -> np.ndarray:
    """Floating-point numbers 0, 1, 2 ... at a multiple of 64."""
    numbers = arena.alloc(8 * 1000, align=64).numpy("f8")
    numbers[:] = np.arange(1000)
    return numbers


def test_torch_takes_the_memory_itself(arena: uvas.Arena) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
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


def test_a_tensor_keeps_the_block(arena: uvas.Arena) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    block = arena.alloc(800)
    tensor = torch.from_dlpack(block.numpy("f8"))
    with pytest.raises(BufferError):
        block.free()
    del tensor
    block.free()


def test_jax_takes_the_memory_itself(arena: uvas.Arena) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    array = numbers_in(arena)
    numbers = array.view("f4")
    numbers[:] = np.arange(2000)
    seen = jax.dlpack.from_dlpack(numbers)
    assert seen.unsafe_buffer_pointer() == array.ctypes.data
    assert float(seen.sum()) == 1_999_000
    assert np.asarray(seen).ctypes.data == array.ctypes.data
    del seen


def test_arrow_takes_the_memory_itself(arena: uvas.Arena) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Arrow is not installed")
    array = numbers_in(arena)
    column = arrow.array(array)
    assert column.buffers()[1].address == array.ctypes.data
    assert arrow.py_buffer(array).address == array.ctypes.data
    assert column.to_numpy(zero_copy_only=True).ctypes.data == array.ctypes.data
    assert sum(column.to_pylist()) == 499_500
    del column


def test_pandas_takes_the_memory_itself(arena: uvas.Arena) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    array = numbers_in(arena)
    series = pandas.Series(array, copy=False)
    assert np.shares_memory(series.to_numpy(), array)
    assert series.sum() == 499_500
    del series


def test_numpy_by_dlpack_and_buffer(arena: uvas.Arena) -> None:
    array = numbers_in(arena)
    assert np.from_dlpack(array).ctypes.data == array.ctypes.data
    assert np.frombuffer(memoryview(array)).ctypes.data == array.ctypes.data
    assert array.__dlpack_device__() == (1, 0)


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
    pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    done = subprocess.run([sys.executable, "-c", PANDAS_AND_SCIKIT_LEARN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("good")
