"""A kernel searches trees that the host built with plain pointers; nothing is copied, flattened or translated.

    pip install 'uvas[opencl]' pocl-binary-distribution
    python examples/opencl_pointers.py

The nodes lie in two reservations and point into each other. Ten thousand work items each look a key up, starting from
the address of the root. Then the host grows the tree where it lies, and the kernel sees it.
"""

from __future__ import annotations

import sys

import numpy as np

import uvas

SOURCE = """
struct node {
    global struct node *left, *right;
    ulong key, value;
};

kernel void look_up(global const struct node *root, global const ulong *keys, global ulong *values) {
    size_t i = get_global_id(0);
    global const struct node *node = root;
    while (node && node->key != keys[i]) {
        node = keys[i] < node->key ? node->left : node->right;
    }
    values[i] = node ? node->value : 0;
}
"""
NODES, QUERIES = 20_000, 10_000
LEFT, RIGHT, KEY, VALUE = range(4)  # the fields of a node, 64 bits each


def build(nodes: list[np.ndarray], keys: np.ndarray) -> int:
    """Link a balanced tree of the sorted keys, each one's value its square; the address of its root."""
    places = [(nodes[i % 2], i // 2) for i in range(len(keys))]  # neighbours lie in different reservations

    def link(low: int, high: int) -> int:
        if low == high:
            return 0
        middle = (low + high) // 2
        table, row = places[middle]
        table[row] = link(low, middle), link(middle + 1, high), keys[middle], keys[middle] ** 2
        return int(table[row].ctypes.data)

    return link(0, len(keys))


def main() -> int:
    """Build, search, grow, search again."""
    try:
        device = uvas.OpenCLDevice()
    except uvas.NotSupportedError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    chance = np.random.default_rng(1)
    with device, uvas.AddressSpace([device]) as space, space.reserve(1 << 20) as one, space.reserve(1 << 20) as two:
        print(f"{device.info.name} advertises {', '.join(device.info.details['advertised'])}; it was tried and follows")
        one.commit()
        two.commit()
        nodes = [held.numpy("u8", (NODES // 2 + 1, 4)) for held in (one, two)]
        keys = np.sort(chance.choice(1 << 31, NODES, replace=False)).astype("u8")
        root = build(nodes, keys)
        with uvas.Arena(space) as arena, uvas.numpy_allocator(arena):
            wanted = np.where(chance.random(QUERIES) < 0.9, chance.choice(keys, QUERIES), 0).astype("u8")
            values = np.zeros(QUERIES, "u8")
            look_up = device.kernel(SOURCE, "look_up")

            device.run(look_up, QUERIES, None, root, wanted, values)
            print(f"{NODES} nodes at {one.range} and {two.range}, root at {root:#x}")
            print(f"{QUERIES} look-ups, {np.count_nonzero(values)} found, all right: {(values == wanted**2).all()}")

            least = nodes[0][0]  # of the least key: nothing is to its left yet
            new = nodes[1][NODES // 2]
            new[:] = 0, 0, 1, 4711
            least[LEFT] = new.ctypes.data
            wanted[0] = 1
            device.run(look_up, QUERIES, None, root, wanted, values)
            print(f"the host hung a node below {int(least[KEY])}: the kernel finds {int(values[0])} there")

            del wanted, values
        try:
            device.run(look_up, 1, None, root, keys, keys)
        except TypeError as refusal:
            print(f"nothing is copied unasked: {str(refusal).partition(';')[0]}")
        del nodes, least, new
    return 0


if __name__ == "__main__":
    sys.exit(main())
