"""An index of words, linked by pointers, in memory that host and devices share at one address.

All fields are 64-bit words; pointers are plain addresses, 0 is none::

    header   buckets, number of buckets, files, number of files
    bucket   first word
    word     next word of the bucket, hash, text, bytes of text, first posting
    posting  next posting of the word, file number, occurrences
    file     name, bytes of name

The host builds it with NumPy; `answer` walks it wherever the memory is mapped, knowing nothing but the header's
address.
"""

from __future__ import annotations

import ctypes
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_WORD = re.compile(rb"[A-Za-z_]{3,}")
_BYTES = 8  # of a field
_HEADER, _WORD_FIELDS, _POSTING_FIELDS, _FILE_FIELDS = 4, 5, 3, 2


@dataclass(frozen=True, slots=True)
class Corpus:
    """The words of some files, counted."""

    files: tuple[str, ...]
    counts: dict[bytes, dict[int, int]]  # word -> file number -> occurrences
    text_bytes: int

    @property
    def postings(self) -> int:
        """How many (word, file) pairs there are."""
        return sum(map(len, self.counts.values()))

    def bytes_needed(self, buckets: int) -> int:
        """Bytes that `build` fills."""
        fields = _HEADER + buckets + _WORD_FIELDS * len(self.counts) + _POSTING_FIELDS * self.postings
        fields += _FILE_FIELDS * len(self.files)
        return _BYTES * fields + sum(map(len, self.counts)) + sum(len(name.encode()) for name in self.files)


def read_standard_library(limit: int) -> Corpus:
    """Read the sources of this Python's standard library, up to `limit` bytes of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    counts: dict[bytes, dict[int, int]] = {}
    files: list[str] = []
    size = 0
    for path in _sources(root):
        text = path.read_bytes()
        if size + len(text) > limit:
            break
        size += len(text)
        for word, times in Counter(_WORD.findall(text)).items():
            counts.setdefault(word, {})[len(files)] = times
        files.append(str(path.relative_to(root)))
    return Corpus(tuple(files), counts, size)


def _sources(root: Path) -> Iterator[Path]:
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if not skip.intersection(path.relative_to(root).parts):
            yield path


def buckets_for(words: int) -> int:
    """Return the power of two at which chains are one or two words long."""
    return 1 << max(4, words.bit_length())


def build(memory: npt.NDArray[np.uint64], corpus: Corpus) -> int:
    """Write the index into `memory` and return the address of its header.

    Parameters
    ----------
    memory
        At least ``corpus.bytes_needed(buckets_for(len(corpus.counts)))`` bytes of fields, all of them reachable by
        whoever walks the index.

    Raises
    ------
    ValueError
        If `memory` is too small.
    """
    buckets = buckets_for(len(corpus.counts))
    needed = corpus.bytes_needed(buckets)
    if memory.nbytes < needed:
        raise ValueError(f"the index needs {needed} bytes, there are {memory.nbytes}")
    base = memory.ctypes.data
    words = list(corpus.counts)
    hashes = np.fromiter((zlib.crc32(word) for word in words), np.uint64, len(words))
    lengths = np.fromiter(map(len, words), np.uint64, len(words))
    per_word = np.fromiter((len(corpus.counts[word]) for word in words), np.uint64, len(words))
    names = [name.encode() for name in corpus.files]
    name_lengths = np.fromiter(map(len, names), np.uint64, len(names))

    at_buckets = base + _BYTES * _HEADER
    at_words = at_buckets + _BYTES * buckets
    at_postings = at_words + _BYTES * _WORD_FIELDS * len(words)
    at_files = at_postings + _BYTES * _POSTING_FIELDS * int(per_word.sum())
    at_text = at_files + _BYTES * _FILE_FIELDS * len(names)
    at_names = at_text + int(lengths.sum())

    def fields(address: int, count: int, width: int) -> npt.NDArray[np.uint64]:
        start = (address - base) // _BYTES
        return memory[start : start + count * width].reshape(count, width)

    memory[:_HEADER] = (at_buckets, buckets, at_files, len(names))
    table = fields(at_words, len(words), _WORD_FIELDS)
    word_addresses = at_words + _BYTES * _WORD_FIELDS * np.arange(len(words), dtype=np.uint64)
    table[:, 0] = _link(fields(at_buckets, buckets, 1)[:, 0], hashes % np.uint64(buckets), word_addresses)
    table[:, 1] = hashes
    table[:, 2] = at_text + _starts(lengths)
    table[:, 3] = lengths
    table[:, 4] = at_postings + _BYTES * _POSTING_FIELDS * _starts(per_word)
    _write_postings(fields(at_postings, int(per_word.sum()), _POSTING_FIELDS), at_postings, corpus, per_word)
    file_table = fields(at_files, len(names), _FILE_FIELDS)
    file_table[:, 0] = at_names + _starts(name_lengths)
    file_table[:, 1] = name_lengths
    tail = b"".join(words) + b"".join(names)
    memory.view(np.uint8)[at_text - base : at_text - base + len(tail)] = np.frombuffer(tail, np.uint8)
    return base


def _starts(lengths: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths, dtype=np.uint64)[:-1]])


def _link(
    heads: npt.NDArray[np.uint64], bucket_of: npt.NDArray[np.uint64], addresses: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Chain the addresses of each bucket; fill the heads, return each one's successor."""
    heads[:] = 0
    order = np.argsort(bucket_of, kind="stable")
    sorted_buckets, sorted_addresses = bucket_of[order], addresses[order]
    last = np.append(sorted_buckets[1:] != sorted_buckets[:-1], True)
    first = np.append(True, last[:-1])
    heads[sorted_buckets[first].astype(np.intp)] = sorted_addresses[first]
    successors = np.zeros_like(addresses)
    successors[order] = np.where(last, np.uint64(0), np.append(sorted_addresses[1:], np.uint64(0)))
    return successors


def _write_postings(
    table: npt.NDArray[np.uint64], address: int, corpus: Corpus, per_word: npt.NDArray[np.uint64]
) -> None:
    count = len(table)
    table[:, 0] = address + _BYTES * _POSTING_FIELDS * np.arange(1, count + 1, dtype=np.uint64)
    table[np.cumsum(per_word).astype(np.intp) - 1, 0] = 0
    pairs = (pair for word in corpus.counts.values() for pair in word.items())
    flat = np.fromiter((field for pair in pairs for field in pair), np.uint64, 2 * count)
    table[:, 1:] = flat.reshape(count, 2)


# ---- walking it, on the host or in a worker
# ---------------------------------------------------------------------------------------------------


def _load(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def find(header: int, word: bytes) -> dict[int, int]:
    """Follow pointers from the header to the postings of `word`: file number -> occurrences."""
    digest = zlib.crc32(word)
    node = _load(_load(header) + _BYTES * (digest % _load(header + _BYTES)))
    while node:
        if _load(node + _BYTES) == digest and ctypes.string_at(_load(node + 16), _load(node + 24)) == word:
            postings: dict[int, int] = {}
            posting = _load(node + 32)
            while posting:
                postings[_load(posting + _BYTES)] = _load(posting + 16)
                posting = _load(posting)
            return postings
        node = _load(node)
    return {}


def answer(header: int, words: Sequence[bytes], totals: npt.NDArray[np.uint64]) -> list[str | None]:
    """Answer queries: write each word's occurrences into `totals`, return the file where it occurs most often."""
    best: list[str | None] = []
    for i, word in enumerate(words):
        postings = find(header, word)
        totals[i] = sum(postings.values())
        number = max(postings, key=lambda file: (postings[file], -file), default=None)
        best.append(None if number is None else _file_name(header, number))
    return best


def _file_name(header: int, number: int) -> str:
    entry = _load(header + 16) + _BYTES * _FILE_FIELDS * number
    return ctypes.string_at(_load(entry), _load(entry + _BYTES)).decode()


def expected(corpus: Corpus, words: Iterable[bytes]) -> tuple[list[int], list[str | None]]:
    """Return what `answer` must say, from the counts that the index was built of."""
    totals: list[int] = []
    best: list[str | None] = []
    for word in words:
        postings = corpus.counts.get(word, {})
        totals.append(sum(postings.values()))
        number = max(postings, key=lambda file: (postings[file], -file), default=None)
        best.append(None if number is None else corpus.files[number])
    return totals, best
