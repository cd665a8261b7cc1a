"""Whatever is wrong with shards is found and named; nothing is found where nothing is wrong."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command as command_line
from conftest import encode_image, run, sample_members, write_shards, write_tar
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.check.verify import verify
from wds_convnext.conversion import convert
from wds_convnext.errors import ShardError
from wds_convnext.shards.dataset import read_manifest
from wds_convnext.shards.sidecar import format_sidecar, sidecar_path
from wds_convnext.shards.tar import walk_tar


@pytest.fixture
def data(shards, tmp_path) -> Path:
    """A copy of the converted data set, to be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "data"))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """A shard of three samples in a folder of its own, with manifest and sidecar."""
    folder = tmp_path_factory.mktemp("sealed")
    reseal(write_shards(folder, [3]))
    return folder


def reseal(manifest_path: Path) -> None:
    """Make manifest and sidecars fit the shards as they are now, as a faulty tool would."""
    from wds_convnext.check.indexshard import index_shard

    manifest = read_manifest(manifest_path)
    shards = []
    for shard in manifest.shards:
        Path(sidecar_path(shard.path)).unlink(missing_ok=True)
        task = (shard.path, "label", False)
        shards.append(index_shard(task, lambda images, num_bytes: None).shard)
    replace(manifest, shards=tuple(shards)).write_manifest(manifest_path)


def edit_members(shard: Path, edit) -> None:
    """Write a shard again with its list of (name, data) members edited in place."""
    with tarfile.open(shard) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    edit(members)
    write_tar(shard, members)


def problems_of(spec, **options) -> list[str]:
    return [
        str(problem) for problem in verify(str(spec), quiet=True, **{"jobs": 1} | options).problems
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_fresh_shards_have_no_problems(parquet, tmp_path, shuffle):
    """Every split of the folder, every image, every row of the input; in any order."""
    convert(str(parquet), out=str(tmp_path), shuffle=shuffle, num_shards=4, jobs=1, quiet=True)

    report = verify(str(tmp_path), deep=True, against=str(parquet), jobs=1, quiet=True)

    assert report.problems == ()
    assert [split.split for split in report.splits] == ["test", "train", "validation"]
    assert [split.num_samples for split in report.splits] == [11, 50, 13]
    assert [split.num_shards for split in report.splits] == [4, 4, 4]


@pytest.mark.parametrize("spec", ["train.json", "train-*.tar", "train-<000..002>.tar"])
def test_any_spec_of_shards_is_taken(shards, spec):
    """As for training; only what is named is checked."""
    report = verify(str(shards / spec), jobs=1, quiet=True)

    assert [(split.split, split.num_samples) for split in report.splits] == [("train", 50)]
    assert report.problems == ()


@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_shard_is_found(sealed, data):
    """In a header, an image, a label, the padding or the end mark; without decoding."""
    shard = sealed / "train-000.tar"
    content = shard.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8

    shard.write_bytes(damaged)
    try:
        problems = problems_of(sealed)
    finally:
        shard.write_bytes(content)

    assert problems[0].startswith(f"{shard}: its SHA-256 is")


@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_sidecar_is_found(sealed, data):
    """The sidecar is exactly what a walk of the tar gives, or it is named."""
    sidecar = sealed / "train-000.idx"
    content = sidecar.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8

    sidecar.write_bytes(damaged)
    try:
        problems = problems_of(sealed)
    finally:
        sidecar.write_bytes(content)

    assert any(problem.startswith(f"{sidecar}: line ") for problem in problems)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_cut_at_any_place_is_found(tmp_path, with_manifest):
    """Also at a member's boundary, where other readers see a shorter shard; also unlisted."""
    manifest = write_shards(tmp_path, [3])
    shard = tmp_path / "train-000.tar"
    content = shard.read_bytes()
    if not with_manifest:
        manifest.unlink()
        (tmp_path / "train-000.idx").unlink()
    end = max(member.offset for sample in walk_tar(str(shard)) for member in sample) + 512
    cuts = [*range(0, end + 1, 512), *range(1, end, 499)]

    for cut in cuts:
        shard.write_bytes(content[:cut])

        assert any(str(shard) in problem for problem in problems_of(tmp_path)), cut


@pytest.mark.parametrize("spec", ["", "train.json", "train-*.tar", "train-<000..002>.tar"])
def test_a_missing_shard_is_named(data, spec):
    """However the shards are named, the manifest knows what should be there."""
    (data / "train-001.tar").unlink()

    problems = problems_of(data / spec)

    assert problems == [f"{data}/train-001.tar: missing. Copy it again, or write it again"]


def test_all_shards_missing_is_a_problem_of_the_folder(data):
    """The manifests alone remain."""
    for shard in data.glob("*.tar"):
        shard.unlink()

    assert len(problems_of(data)) == 6


def test_a_shard_that_is_not_listed_is_named(data):
    """A leftover that a glob would train on."""
    shutil.copy(data / "train-001.tar", data / "train-007.tar")

    problems = problems_of(data)

    assert problems == [f"{data}/train-007.tar: not listed in {data}/train.json. Move it away"]


def test_an_exchanged_shard_is_found(data):
    """Sound in itself and of the right name, but another."""
    shutil.copy(data / "validation-000.tar", data / "train-000.tar")

    problems = problems_of(data / "train.json")

    assert "but its manifest says" in problems[0]


def test_a_damaged_manifest_is_a_problem(data, parquet):
    """It is named, and the shards are still checked by themselves."""
    manifest = data / "train.json"
    manifest.write_text(manifest.read_text()[:200])
    (data / "train-002.tar").write_bytes((data / "train-002.tar").read_bytes()[:1024])

    problems = problems_of(data)
    compared = problems_of(data, against=str(parquet))

    assert compared == problems
    assert problems[0].startswith(f"{manifest}: not a manifest of shards")
    assert any(problem.startswith(f"{data}/train-002.tar: cut short") for problem in problems)


def test_an_interrupted_conversion_is_a_problem(data):
    """Before its manifest is written a split is not complete."""
    (data / "train.json").unlink()
    (data / "train.partial").mkdir()
    (data / "train.partial" / "plan.json").write_text("{}")

    assert "the conversion was interrupted" in problems_of(data)[0]


def test_a_label_that_is_no_class_is_named_by_its_key(tmp_path):
    """Manifest and sidecar fit, and the label is still impossible."""
    manifest = write_shards(tmp_path, [3])
    edit_members(tmp_path / "train-000.tar", lambda members: members.__setitem__(
        3, ("0001.cls", b"4")))  # fmt: skip
    reseal(manifest)

    problems = problems_of(manifest)

    shard = tmp_path / "train-000.tar"
    assert problems == [f"{shard}, key 0001: label 4 is outside the 4 classes"]


def test_a_label_that_is_no_number_is_named_by_its_key(tmp_path):
    """The others in its shard are still checked."""
    members = sample_members(3)
    members[1], members[5] = ("0000.cls", b"ant"), ("0002.cls", b"7")
    shard = write_tar(tmp_path / "train-000.tar", members)
    write_shards(tmp_path / "like", [3])
    manifest = read_manifest(tmp_path / "like" / "train.json")
    replace(manifest, shards=(replace(manifest.shards[0], num_bytes=None),)).write_manifest(
        tmp_path / "train.json"
    )

    problems = problems_of(tmp_path)

    assert problems[0].startswith(f"{shard}, key 0000: the label b'ant' is not an integer.")
    assert problems[1] == f"{shard}, key 0002: label 7 is outside the 4 classes"


def test_a_key_that_comes_twice_is_named_with_its_shards(tmp_path):
    """In two shards, though manifest and sidecars fit."""
    manifest = write_shards(tmp_path, [3, 3])
    edit_members(
        tmp_path / "train-001.tar",
        lambda members: members.extend([("0002.jpg", encode_image(9)), ("0002.cls", b"2")]),
    )
    reseal(manifest)

    problems = problems_of(manifest)

    first, second = tmp_path / "train-000.tar", tmp_path / "train-001.tar"
    assert problems == [f"{second}, key 0002 comes 2 times: in {first}, {second}"]


def test_a_key_that_comes_twice_in_a_shard_is_named(tmp_path):
    """Apart, or next to each other."""
    members = sample_members(3)
    apart = write_tar(tmp_path / "apart-000.tar", [*members, *members[:2]])
    together = write_tar(tmp_path / "together-000.tar", [*members, *members[4:]])

    problems = problems_of(tmp_path)

    assert problems[0].startswith(f"{apart}: the key 0000 comes twice")
    assert problems[1].startswith(f"{together}, key 0002: more than one .jpg member")


def test_deep_finds_images_that_do_not_decode(tmp_path):
    """Whole by its checksum and its header, but not a picture to the end."""
    manifest = write_shards(tmp_path, [3])
    image = bytearray(encode_image(1, size=(64, 64)))
    image[len(image) // 2 :] = b"\xff\xd9"
    edit_members(tmp_path / "train-000.tar", lambda members: members.__setitem__(
        2, ("0001.jpg", bytes(image))))  # fmt: skip
    reseal(manifest)

    assert problems_of(manifest) == []
    (problem,) = problems_of(manifest, deep=True)

    assert problem.startswith(f"{tmp_path}/train-000.tar, key 0001: does not decode")


def test_shards_without_a_manifest_are_checked_by_themselves(tmp_path):
    """No problem by itself; the note says what was not compared."""
    write_shards(tmp_path, [3, 2]).unlink()

    report = verify(str(tmp_path), jobs=1, quiet=True)

    assert report.problems == ()
    assert "no manifest" in report.splits[0].notes[0]
    assert report.splits[0].num_samples == 5


def test_many_problems_of_a_shard_are_summed_up(tmp_path):
    """The first twenty, and how many more."""
    write_shards(tmp_path, [50])
    manifest = read_manifest(tmp_path / "train.json")
    replace(manifest, class_names=("ant",)).write_manifest(tmp_path / "train.json")

    problems = problems_of(tmp_path)

    assert len(problems) == 21
    assert problems[-1] == f"{tmp_path}/train-000.tar: 17 more such problems"


def test_a_spec_that_names_nothing_is_an_error(tmp_path):
    """A mistyped path is not a finding."""
    with pytest.raises(ShardError, match="no shard matches"):
        verify(str(tmp_path), jobs=1, quiet=True)


def test_a_sidecar_is_optional(sealed, tmp_path):
    """Offsets then come from the tar itself."""
    shutil.copytree(sealed, tmp_path / "copy")
    (tmp_path / "copy" / "train-000.idx").unlink()

    assert problems_of(tmp_path / "copy") == []


def test_a_sidecar_that_lacks_a_sample_is_named(sealed, tmp_path):
    """Whole in its own terms, so only the walk tells."""
    folder = Path(shutil.copytree(sealed, tmp_path / "copy"))
    samples = list(walk_tar(str(folder / "train-000.tar")))
    (folder / "train-000.idx").write_bytes(format_sidecar(samples[:2]))

    problems = problems_of(folder)

    assert problems[0].startswith(f"{folder}/train-000.idx: line 1 is not what a walk")


@pytest.mark.slow
def test_the_command_line_gives_exit_codes_and_json(data, parquet):
    """0 and 1 by what was found, 2 for what it cannot do; the same with several processes."""
    fine = run(command_line("verify", data, "--jobs", 2, "--deep", "--against", parquet))
    (data / "train-001.tar").write_bytes(b"")
    found = run(command_line("verify", data, "--jobs", 2, "--json"), check=False)
    wrong = run(command_line("verify", data / "nothing", "--jobs", 1), check=False)

    assert fine.stdout.splitlines()[1].startswith("train: 50 samples, 3 shards, ")
    assert fine.stdout.splitlines()[1].endswith(" MB: no problem found")
    report = json.loads(found.stdout)
    assert (found.returncode, report["ok"]) == (1, False)
    paths = {problem["path"] for split in report["splits"] for problem in split["problems"]}
    assert paths == {f"{data}/train-001.tar"}
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
