"""Paths as people have them: commas, brackets, `~`, `file://`, another working directory."""

import os

import pytest
from conftest import write_shards

from wds_convnext.shards.expand import absolute_spec, expand_spec


@pytest.mark.parametrize(
    "folder", ["plain", "da,ta", "a,b,c", "data [1]", "v2.0,160px [x]", "set, final"]
)
@pytest.mark.parametrize("name", ["train.json", "train-*.tar", "train-<000..001>.tar", ""])
def test_any_folder_may_hold_shards(tmp_path, monkeypatch, folder, name):
    """Alone and in a list, relative, absolute, from home and as a URL; from elsewhere as well."""
    write_shards(tmp_path / folder, [2, 1])
    write_shards(tmp_path / "other", [1], split="more")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = f"{folder}/{name}".rstrip("/")
    expected = [str(tmp_path / folder / f"train-00{i}.tar") for i in (0, 1)]
    more = str(tmp_path / "other" / "more-000.tar")

    for spec in (path, f"{tmp_path}/{path}", f"~/{path}", f"file://{tmp_path}/{path}"):
        for listed, files in (
            (spec, expected),
            (f"{spec},other/more.json", [*expected, more]),
            (f"other/more-000.tar, {spec}", [more, *expected]),
        ):
            monkeypatch.chdir(tmp_path)
            assert list(map(os.path.abspath, expand_spec(listed))) == files
            absolute = absolute_spec(listed)
            monkeypatch.chdir("/")
            assert expand_spec(absolute) == files
