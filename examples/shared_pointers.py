"""One tree, three processes: links are plain addresses, and they mean the same to the host and to both devices.

The host builds a binary search tree of words in a reservation; each device looks words up by following the host's
pointers, and one of them inserts new words, whose nodes the host and the other device then reach by the same links.
"""

from __future__ import annotations

import numpy as np

import uvas

NODE = np.dtype([("word", "S24"), ("count", "i8"), ("less", "u8"), ("greater", "u8")])
"""A node; the links are the addresses of others, or 0."""

TEXT = b"""when in the course of human events it becomes necessary for one people to dissolve the political bands which
have connected them with another and to assume among the powers of the earth the separate and equal station""".split()


class Tree:
    """A tree in an array of nodes, the first of which is the root.

    Parameters
    ----------
    nodes
        Where the nodes lie: an array over shared memory.
    used
        How many there are.
    """

    def __init__(self, nodes: np.ndarray, used: int = 0) -> None:
        self.nodes, self.used = nodes, used

    def at(self, address: int) -> np.void:
        """Follow a link."""
        return self.nodes[(address - self.nodes.ctypes.data) // NODE.itemsize]

    def find(self, word: bytes) -> tuple[np.void | None, str, np.void | None]:
        """Return the node of a word, or None with the link that it belongs to: its name and the node that has it."""
        parent, link, address = None, "", self.nodes.ctypes.data if self.used else 0
        while address:
            parent = self.at(address)
            if parent["word"] == word:
                return parent, "", None
            link = "less" if word < parent["word"] else "greater"
            address = int(parent[link])
        return None, link, parent

    def add(self, word: bytes) -> None:
        """Count a word."""
        node, link, parent = self.find(word)
        if node is None:
            node = self.nodes[self.used]
            node["word"], node["count"], node["less"], node["greater"] = word, 0, 0, 0
            if parent is not None:
                parent[link] = self.nodes.ctypes.data + self.used * NODE.itemsize
            self.used += 1
        node["count"] += 1


def count_of(nodes: np.ndarray, used: int, words: list[bytes]) -> list[int]:
    """On a device: look words up by the host's pointers."""
    found = [Tree(nodes, used).find(word)[0] for word in words]
    return [int(node["count"]) if node is not None else 0 for node in found]


def insert(nodes: np.ndarray, used: int, words: list[bytes]) -> int:
    """On a device: add words; how many nodes there are now."""
    tree = Tree(nodes, used)
    for word in words:
        tree.add(word)
    return tree.used


def main() -> None:
    """Build, look up, extend, look up again."""
    with (
        uvas.ProcessDevice(name="left") as left,
        uvas.ProcessDevice(name="right") as right,
        uvas.AddressSpace([left, right], name="tree") as space,
    ):
        held = space.reserve(1 << 30, name="nodes")  # room to grow: addresses cost nothing
        held.commit(0, 1 << 20)
        nodes = held.numpy(NODE, 1000)
        tree = Tree(nodes)
        for word in TEXT:
            tree.add(word)
        print(f"the host built {tree.used} nodes at {held.base:#x}; the root's links are "
              f"{nodes[0]['less']:#x} and {nodes[0]['greater']:#x}")  # fmt: skip

        asked = [b"the", b"and", b"course", b"uvas"]
        expected = [TEXT.count(word) for word in asked]
        for device in (left, right):
            answer = device.run(count_of, nodes, tree.used, asked)
            words = ", ".join(f"{word.decode()} {count}" for word, count in zip(asked, answer, strict=True))
            print(f"{device.info.name} followed them and counts: {words}")
            assert answer == expected

        tree.used = left.run(insert, nodes, tree.used, [b"uvas", b"zebra", b"the"])
        on_host = count_of(nodes, tree.used, [b"uvas", b"the"])
        on_right = right.run(count_of, nodes, tree.used, [b"uvas", b"the"])
        print(f"left added nodes; the host and right now count {on_host} and {on_right}")
        assert on_host == on_right == [1, TEXT.count(b"the") + 1]
        del nodes, tree
        held.release()
    print("released on all three")


if __name__ == "__main__":
    main()
