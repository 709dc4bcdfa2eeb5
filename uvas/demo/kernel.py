"""The index of words, walked by an OpenCL kernel: the same pointers, the same answers as `index.answer` gives."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from uvas import OpenCLDevice, Reservation

_SOURCE = """
kernel void answer(global const ulong *header, global const ulong *queries, global ulong *totals) {
    global const ulong *query = queries + 3 * get_global_id(0);
    global const uchar *text = (global const uchar *)query[1];
    global const ulong *buckets = (global const ulong *)header[0];
    global const ulong *word = (global const ulong *)buckets[query[0] % header[1]];
    ulong total = 0;
    for (; word; word = (global const ulong *)word[0]) {
        global const uchar *other = (global const uchar *)word[2];
        ulong same = word[1] == query[0] && word[3] == query[2] ? 0 : query[2] + 1;
        while (same < query[2] && text[same] == other[same]) {
            same++;
        }
        if (same == query[2]) {
            break;
        }
    }
    global const ulong *posting = word ? (global const ulong *)word[4] : 0;
    for (; posting; posting = (global const ulong *)posting[0]) {
        total += posting[2];
    }
    totals[get_global_id(0)] = total;
}
"""


def bytes_needed(words: Sequence[bytes]) -> int:
    """Bytes that `answer` fills: a query for each word, an answer, and the text."""
    return 8 * 4 * len(words) + sum(map(len, words))


def answer(device: OpenCLDevice, header: int, words: Sequence[bytes], memory: Reservation) -> npt.NDArray[np.uint64]:
    """Return each word's occurrences, found by one work item each.

    Parameters
    ----------
    header
        The index's address.
    memory
        Committed, of `bytes_needed` or more: the queries and the answers lie there.
    """
    queries = memory.numpy(np.uint64, (len(words), 3))
    totals = memory.numpy(np.uint64, len(words), offset=queries.nbytes)
    text = b"".join(words)
    start = queries.nbytes + totals.nbytes
    memory.numpy(np.uint8, len(text), offset=start)[:] = np.frombuffer(text, np.uint8)
    lengths = np.fromiter(map(len, words), np.uint64, len(words))
    queries[:, 0] = [zlib.crc32(word) for word in words]
    queries[:, 1] = memory.base + start + np.cumsum(lengths) - lengths
    queries[:, 2] = lengths
    device.run(device.kernel(_SOURCE, "answer"), len(words), None, header, queries, totals)
    return totals
