"""Class names of shards that others made: numbers, or a list that fits the labels."""

import pytest
from conftest import write_shards
from test_indexing import index

from wds_convnext.check.index import read_class_names
from wds_convnext.errors import UsageError
from wds_convnext.shards.dataset import read_manifest


def test_class_names_are_given_or_numbers(tmp_path):
    """Over all splits of a folder, so that training and validation agree."""
    write_shards(tmp_path, [4], split="train").unlink()
    write_shards(tmp_path, [2], split="val").unlink()
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nemu\n")

    index(tmp_path)
    numbered = [read_manifest(tmp_path / name).class_names for name in ("train.json", "val.json")]
    for name in ("train.json", "val.json"):
        (tmp_path / name).unlink()
    index(tmp_path, class_names=names)

    assert numbered == [("0", "1", "2", "3")] * 2
    assert read_manifest(tmp_path / "val.json").class_names == ("ant", "bee", "cat", "dog", "emu")


@pytest.mark.parametrize(
    "content",
    [
        "ant\nbee\ncat\ndog\n",
        "\ufeffant\r\nbee\r\ncat\r\ndog",
        '\ufeff[\n"ant", "bee","cat", "dog"]',
    ],
)
def test_class_names_are_lines_or_a_json_list(tmp_path, content):
    """As Windows writes them, too: with a byte order mark."""
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")

    assert read_class_names(str(tmp_path / "names.txt")) == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("content", ['{"ant": 0}', "[1, 2]", "[[]]", '["ant"'])
def test_json_that_is_no_list_of_names_is_refused(tmp_path, content):
    """In one line."""
    (tmp_path / "names.txt").write_text(content)

    with pytest.raises(UsageError, match="names.txt: (JSON, but not a list|not a readable)"):
        read_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    ("content", "said"),
    [("ant\nbee\n", "2 names, but labels up to 3"), ("ant\n\nbee\n", "line 2 is empty")],
)
def test_class_names_that_do_not_fit_are_refused(tmp_path, content, said):
    """Too few, or a gap in the list."""
    write_shards(tmp_path, [4]).unlink()
    (tmp_path / "names.txt").write_text(content)

    with pytest.raises(UsageError, match=said):
        index(tmp_path, class_names=tmp_path / "names.txt")
