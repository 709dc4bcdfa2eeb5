"""The book of committed ranges against a table of pages."""

from __future__ import annotations

from builtins import range as steps_from

from hypothesis import given
from hypothesis import strategies as st

from uvas import Range
from uvas.devices.committed import Committed

PAGES = 24
ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda one: Range(0x1000 * (16 + one[0]), 0x1000 * min(one[1], PAGES - one[0]))
)
steps = st.lists(st.tuples(ranges, st.sampled_from(["none", "r", "rw", "rwx", None])), max_size=30)


def pages(range: Range) -> list[int]:
    return [*steps_from(range.base, range.end, 0x1000)]


@given(steps, ranges)
def test_it_says_what_a_table_of_pages_says(done: list[tuple[Range, str | None]], asked: Range) -> None:
    book, table = Committed(), {}
    for where, protection in done:
        if protection is None:
            book.remove(where)
            for page in pages(where):
                table.pop(page, None)
        else:
            book.put(where, protection)
            table |= dict.fromkeys(pages(where), protection)
    for wanted in ("", "r", "rw"):
        expected = all(page in table and set(wanted) <= set(table[page]) for page in pages(asked))
        assert book.allows(asked, wanted) == expected
    told = book.pieces_of(asked)
    assert {page: how for where, how in told for page in pages(where)} == {
        page: table[page] for page in pages(asked) if page in table
    }
    runs = sum(table.get(page) != table.get(page - 0x1000) for page in table)
    assert len(book) == runs  # neighbours that are alike are one piece
