"""One memory, many libraries: PyTorch, JAX, Arrow and NumPy over the same bytes, none copied.

An array in unified memory is a NumPy array, so whatever takes those by their buffer or by DLPack takes it. What lives
over the memory keeps it: a tensor keeps the array, and the array its block.
"""

from __future__ import annotations

import numpy as np

import uvas

ALIGNED = 64
"""Bytes: what JAX and Arrow want of an address; PyTorch and NumPy take any."""


def with_torch(array: np.ndarray) -> str:
    """Let PyTorch double it."""
    import torch

    tensor = torch.from_dlpack(array)
    tensor *= 2
    assert tensor.data_ptr() == array.ctypes.data
    return f"PyTorch {torch.__version__} doubled it in place: {array[:3]}"


def with_jax(array: np.ndarray) -> str:
    """Let JAX add it up; its arrays are never written, so nobody else may write while they live."""
    import jax

    seen = jax.dlpack.from_dlpack(array)
    assert seen.unsafe_buffer_pointer() == array.ctypes.data
    return f"JAX {jax.__version__} adds it up without a copy: {float(seen.sum()):.0f}"


def with_arrow(array: np.ndarray) -> str:
    """Let Arrow see it as a column, and take it back."""
    import pyarrow

    column = pyarrow.array(array)
    assert column.buffers()[1].address == array.ctypes.data
    again = column.to_numpy(zero_copy_only=True)
    assert again.ctypes.data == array.ctypes.data
    return f"Arrow {pyarrow.__version__} has it as a column of {column.type}"


def with_numpy(array: np.ndarray) -> str:
    """Give it away by DLPack and take it back, and look at it as plain bytes."""
    again = np.from_dlpack(array)
    assert again.ctypes.data == array.ctypes.data
    assert memoryview(array).nbytes == array.nbytes
    return f"NumPy {np.__version__} took it back by DLPack; both are unified: {uvas.is_unified(again)}"


def main() -> None:
    """Show the array to whatever is installed."""
    with uvas.AddressSpace(name="exchange") as space, uvas.Arena(space, name="exchange") as arena:
        array = arena.alloc(4 * 1000, align=ALIGNED).numpy(np.float32)
        array[:] = np.arange(1000)
        for show in (with_numpy, with_torch, with_jax, with_arrow):
            try:
                print(show(array))
            except ImportError as error:
                print(f"{error.name} is not installed")
        del array
    print("everybody let go of it, and the arena is closed")


if __name__ == "__main__":
    main()
