"""Foreign text in messages: one printable line, of bounded length."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wds_convnext.errors import ShardError, listing, printable

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=[]))


@given(text=ANY_TEXT, limit=st.integers(10, 50))
@example(text="\x1b[2J\x1b]0;title\x07", limit=50)
@example(text="a\u202egnp.exe", limit=50)
def test_printed_text_is_one_short_line_that_any_terminal_takes(text, limit):
    """No escape, no newline, no half of a surrogate pair; what is printable is as it was."""
    printed = printable(text, limit=limit)

    assert printed.isprintable()
    assert len(printed) <= limit
    printed.encode("utf-8")
    if text.isprintable() and len(text) <= limit:
        assert printed == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("café 猫", "café 猫"),
        (b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), r"caf\xe9.jpg"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202e\ud800\0", r"\u202e\ud800\x00"),
    ],
)
def test_what_is_not_printable_is_an_escape(text, expected):
    """As Python writes it; a byte that is not UTF-8 as the byte that it is."""
    assert printable(text) == expected


def test_an_error_is_one_printable_line():
    """Whatever name or key stands in it."""
    error = ShardError("a\x1b[2J.tar, key x\ny\udcff: " + "z" * 100_000 + " Copy it again.")

    assert str(error).startswith(r"a\x1b[2J.tar, key x\ny\xff: zzz")
    assert str(error).endswith("Copy it again.")
    assert len(str(error)) <= 2000


def test_a_long_list_is_its_first_names_and_a_count():
    """Ten names, then how many more."""
    assert listing(map(str, range(3))) == "0, 1, 2"
    assert listing(map(str, range(1012)), limit=2) == "0, 1 and 1,010 more"
