"""The staging folder: nothing outside OUT is touched, and nothing half done is published."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parquet_sets import image_table, read_folder, sorted_rows, write_split

import wds_convnext.conversion
from wds_convnext.conversion.records import recorded
from wds_convnext.conversion.staging import Staging, read_bad_rows
from wds_convnext.errors import ShardError, UsageError, WdsConvnextError


def convert(source, out, **options):
    return wds_convnext.conversion.convert(str(source), out=str(out), quiet=True, jobs=1, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_split(folder, "train", image_table(*sorted_rows(24)), num_files=2)
    return folder


@pytest.fixture(scope="module")
def staged(source, tmp_path_factory):
    """By kind of order, OUT of a conversion that ended just before it was published, and whole."""
    folders = {}
    for shuffle in (False, True):
        out, whole = (tmp_path_factory.mktemp("out") for _ in range(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Staging, "publish", lambda self, *args: self.close())
            convert(source, out, shuffle=shuffle)
        convert(source, whole, shuffle=shuffle)
        folders[shuffle] = out, whole
    return folders


@pytest.mark.parametrize("harm", ["delete", "cut", "empty", "flip", "grow", "link"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_finished_file_that_changed_between_two_runs_is_written_again(
    staged, source, tmp_path, shuffle, harm
):
    """Every file that a step left, each in every way; the bytes in the end are the same."""
    left, whole = staged[shuffle]
    paths = [p for p in sorted((left / "train.partial").iterdir()) if p.name not in ("lock",)]
    for number, victim in enumerate(path.name for path in paths):
        if victim == "plan.json" or (harm in ("grow", "link") and number % 3):
            continue
        out = tmp_path / str(number)
        shutil.copytree(left, out)
        path = out / "train.partial" / victim
        content = bytearray(path.read_bytes())
        if harm == "delete":
            path.unlink()
        elif harm == "link":
            path.unlink()
            path.symlink_to(tmp_path / "elsewhere")
        else:
            content[len(content) // 2] ^= harm == "flip"
            cut = {"cut": len(content) // 2, "empty": 0}.get(harm, len(content))
            path.write_bytes(content[:cut] + b"more" * (harm == "grow"))

        convert(source, out, shuffle=shuffle)

        assert read_folder(out) == read_folder(whole), victim
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("num_moved", range(6))
def test_a_file_that_changed_while_it_was_published_is_written_again(
    staged, source, tmp_path, num_moved, monkeypatch
):
    """Killed between two renames, and then harmed, whether it had moved or not."""
    left, whole = staged[True]
    out = tmp_path / "out"
    shutil.copytree(left, out)
    replace, moved = os.replace, []

    def replace_some(old, new):
        if str(old).endswith(".part") and not str(new).endswith(".part"):
            if len(moved) == num_moved:
                raise KeyboardInterrupt
            moved.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_some)
    if num_moved < 5:
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    else:
        convert(source, out)
    monkeypatch.undo()
    for path in [*out.glob("train-*.tar"), *out.glob("train.partial/*.tar.*.part")]:
        if not (out / "train.json").exists():
            path.write_bytes(path.read_bytes()[:-512])

    convert(source, out)

    assert read_folder(out) == read_folder(whole)


def test_a_shard_that_vanishes_while_others_are_written_is_not_published(
    source, tmp_path, monkeypatch
):
    """The manifest is not written, and the next run writes the shard again."""
    publish = Staging.publish

    def lose_one(self, *args):
        next(self.folder.glob("*.tar.*.part")).unlink()
        publish(self, *args)

    monkeypatch.setattr(Staging, "publish", lose_one)
    with pytest.raises(ShardError, match="missing or changed since it was written"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train.json").exists()
    monkeypatch.undo()

    convert(source, tmp_path / "out")
    convert(source, tmp_path / "straight")

    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


NAMES = ["../precious.tar", "{tmp}/precious.tar", "precious.tar", "..", "", "sub/train-000.tar",
         "train-000.tar/../../precious.tar", "train.json\0", "other-000.tar", 7, None]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["plan.json", "publishing"])
def test_no_name_in_a_file_leads_outside_the_splits_own_files(source, tmp_path, name, where):
    """A forged plan, or list of what is being published, is refused; nothing is deleted."""
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "train.partial").mkdir()
    for precious in (
        "precious.tar",
        "out/precious.tar",
        "out/other-000.tar",
        "out/sub/train-000.tar",
    ):
        (tmp_path / precious).write_bytes(b"precious")
    before = read_folder(tmp_path)
    forged = [name] if where == "publishing" else {"options": {"a": 1}, "replaces": [name]}
    (out / "train.partial" / where).write_text(json.dumps(forged))

    with pytest.raises(ShardError, match=rf"{where}: not what a conversion leaves .*Delete "):
        convert(source, out, overwrite=True)

    after = read_folder(tmp_path)
    assert before.items() <= after.items()


@given(content=st.binary(max_size=30) | st.text(max_size=20).map(lambda s: json.dumps(s).encode()))
def test_a_damaged_plan_is_one_line(content, tmp_path_factory, source):
    """Whatever stands in it."""
    out = tmp_path_factory.mktemp("out")
    (out / "train.partial").mkdir()
    (out / "train.partial" / "plan.json").write_bytes(content)

    with pytest.raises(WdsConvnextError, match="not what a conversion leaves"):
        convert(source, out)


def test_a_manifest_that_lists_others_files_deletes_none_of_them(source, tmp_path):
    """With --overwrite, too."""
    out = tmp_path / "out"
    convert(source, out)
    (out / "notes.tar").write_bytes(b"precious")
    content = json.loads((out / "train.json").read_text())
    content["shardlist"].append({"url": "notes.tar", "nsamples": 1, "filesize": 8})
    (out / "train.json").write_text(json.dumps(content))

    convert(source, out, overwrite=True, num_shards=1)

    assert (out / "notes.tar").read_bytes() == b"precious"
    assert not (out / "train-001.tar").exists()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_link_at_a_temporary_name_is_not_followed(staged, source, tmp_path, shuffle):
    """Of no file that a step leaves: shards, spill files, sidecars, records."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    (out / "train.partial").mkdir(parents=True)
    precious.write_bytes(b"precious")
    names = [path.name for path in (staged[shuffle][0] / "train.partial").glob("*.part*")]
    assert len(names) > 6
    for name in names:
        (out / "train.partial" / name).symlink_to(precious)

    convert(source, out, shuffle=shuffle)

    assert precious.read_bytes() == b"precious"
    assert not [path for path in out.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("name", ["train.partial", "train.partial/lock"])
def test_a_link_in_place_of_the_staging_folder_is_refused(source, tmp_path, name):
    """What it leads to is left alone."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.mkdir()
    (precious / "a.part").write_bytes(b"precious")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(precious)

    with pytest.raises(WdsConvnextError, match=name):
        convert(source, out)

    assert read_folder(precious) == {"a.part": b"precious"}


def test_the_second_of_two_conversions_at_once_does_not_replace_the_first(
    source, tmp_path, monkeypatch
):
    """It asked whether OUT is complete before the first had finished."""
    out, asked, finished = tmp_path / "out", threading.Event(), threading.Event()
    begin, is_main = Staging.begin, threading.main_thread

    def begin_late(self, *args, **options):
        if threading.current_thread() is not is_main():
            asked.set()
            assert finished.wait(60)
        return begin(self, *args, **options)

    monkeypatch.setattr(Staging, "begin", begin_late)
    problems = []

    def convert_too(**options):
        try:
            convert(source, out, **options)
        except UsageError as error:
            problems.append(str(error))

    for options in ({"num_shards": 3}, {}):
        asked.clear(), finished.clear()
        second = threading.Thread(target=convert_too, kwargs=options)
        second.start()
        assert asked.wait(60)
        convert(source, out)
        before = read_folder(out)
        finished.set()
        second.join()
        assert read_folder(out) == before
        shutil.rmtree(out)

    assert len(problems) == 1
    assert "holds train with other options" in problems[0]


def test_a_short_read_is_read_on(source, tmp_path, monkeypatch):
    """A call that gives fewer bytes than were asked for, as at a bad sector, truncates no image."""
    convert(source, tmp_path / "straight")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, offset: pread(file, min(n, 100), offset))

    convert(source, tmp_path / "out")

    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")


def test_a_spill_file_that_ends_early_is_an_error(source, tmp_path, monkeypatch):
    """Cut while the shards are collected: no shard of wrong bytes is published."""
    from wds_convnext.conversion import passes

    read_spilled = passes.read_spilled

    def cut_first(paths, shard):
        os.truncate(paths[0], os.path.getsize(paths[0]) - 1)
        return read_spilled(paths, shard)

    monkeypatch.setattr(passes, "read_spilled", cut_first)

    with pytest.raises(ShardError, match=r"spill\..*part: it ends before byte .* Run the same"):
        convert(source, tmp_path / "out")

    assert not (tmp_path / "out" / "train.json").exists()


def test_a_record_is_believed_only_as_it_was_written(tmp_path):
    """Any byte of it changed, the step is done again."""
    path = tmp_path / "step.done"
    assert recorded(path, lambda: {"number": 1}) == {"number": 1}
    assert recorded(path, lambda: {"number": 2}) == {"number": 1}
    content = path.read_bytes()

    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert recorded(path, lambda: {"number": 2}) == {"number": 2}


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"\xff", b'{"row": -1, "reason": "x"}', b"{" * 9999]
)
def test_a_damaged_list_of_unusable_rows_is_one_line(tmp_path, line):
    """Of OUT and of the staging folder."""
    path = Path(tmp_path, "train.bad.jsonl")
    path.write_bytes(b'{"row": 1, "reason": "empty"}\n' + line + b"\n")

    with pytest.raises(ShardError, match="train.bad.jsonl: not a list of unusable rows"):
        read_bad_rows(path)
