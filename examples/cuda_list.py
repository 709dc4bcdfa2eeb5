"""A list that the host links with plain addresses, followed by a CUDA kernel, which appends what the host then reads.

Needs a CUDA GPU and ``pip install 'uvas[cuda]'``; without them it says so. Not yet seen on hardware.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

import uvas

WALK = r"""
struct node { struct node *next; long long value; };
extern "C" __global__ void walk_and_append(struct node *at, struct node *last, long long *sum) {
    long long total = 0;
    struct node *end = at;
    for (; at; at = at->next) { total += at->value; end = at; }
    last->value = total;  // the kernel's own node, behind all others
    end->next = last;
    *sum = total;
}
"""
NODES = 1000


def main(device: uvas.CudaDevice) -> None:
    """Link, let the kernel walk and append, and walk again on the host."""
    import cupy

    walk = cupy.RawKernel(WALK, "walk_and_append")
    with uvas.AddressSpace([device]) as space, uvas.Arena(space, name="nodes") as arena:
        blocks = arena.alloc_many([16] * (NODES + 1))
        nodes = {block.base: block.numpy("i8", 2) for block in blocks}
        for block, following in pairwise(blocks[:-1]):
            nodes[block.base][:] = following.base, block.base % 1000
        nodes[blocks[-2].base][:] = 0, 7
        nodes[blocks[-1].base][:] = 0, 0
        expected = sum(int(nodes[block.base][1]) for block in blocks[:-1])
        total = arena.alloc(8).numpy("i8", 1)
        walk((1,), (1,), (np.uint64(blocks[0].base), np.uint64(blocks[-1].base), uvas.ascupy(total)))
        with uvas.host_access(total) as seen:
            assert seen[0] == expected
        at, length = blocks[0].base, 0
        while at:
            at, length = int(nodes[at][0]), length + 1
        assert length == NODES + 1
        print(f"the kernel followed {NODES} pointers of the host's ({device.strategy}) and appended node {length}")
        print(f"both add them up to {expected}")
        del nodes, total, seen


if __name__ == "__main__":
    try:
        with uvas.CudaDevice() as gpu:
            main(gpu)
    except uvas.NotSupportedError as missing:
        print(f"this example needs a CUDA GPU: {missing}")
