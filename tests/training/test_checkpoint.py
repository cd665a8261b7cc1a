"""A checkpoint is whole and reads back to the last bit, or it is refused with one line."""

import hashlib
import os
import random
import resource
import signal
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wds_convnext.errors import CheckpointError
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint


def content(step: int = 7) -> dict:
    """What a run saves: tensors of every kind, numbers, text, nothing, nested."""
    return {
        "model": OrderedDict(weight=torch.randn(3, 5), count=torch.tensor(4), empty=torch.empty(0)),
        "optimizer": {"state": {0: {"step": torch.tensor(2.0, dtype=torch.float64)}}, "groups": []},
        "half": torch.arange(4, dtype=torch.bfloat16),
        "ema": None,
        "step": step,
        "facts": {"model": "convnext_base", "class_names": ["ant", "Bär"], "lr": 4e-3, "amp": True},
    }


def tensors(saved: dict) -> dict[str, torch.Tensor]:
    return {**saved["model"], **saved["optimizer"]["state"][0], "half": saved["half"]}


def test_a_checkpoint_reads_back_as_saved(tmp_path):
    """Every tensor's bits and dtype, every number, every key."""
    saved = content()
    path = tmp_path / "last.pt"

    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)

    assert loaded.pop("format") == 1
    assert loaded.keys() == saved.keys()
    for name, tensor in tensors(saved).items():
        assert tensors(loaded)[name].dtype == tensor.dtype, name
        assert torch.equal(tensors(loaded)[name], tensor), name
    assert loaded["facts"] == saved["facts"]
    assert (loaded["ema"], loaded["step"]) == (None, 7)
    assert type(loaded["model"]) is OrderedDict
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("weights_only", [True, False])
def test_plain_torch_load_reads_the_file(tmp_path, weights_only):
    """Without this package."""
    saved = content()
    save_checkpoint(tmp_path / "last.pt", saved)

    loaded = torch.load(tmp_path / "last.pt", weights_only=weights_only)

    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert loaded["facts"] == saved["facts"]


SAVED = content()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    save_checkpoint(path, SAVED)
    return path.read_bytes()


def with_trailer(data: bytes) -> bytes:
    """As version 0.1.0 wrote it."""
    return data + b"\nsha256:" + hashlib.sha256(data).hexdigest().encode()


def write_new(path: Path, data: bytes) -> None:
    """Write a file as a new one: what was loaded from the old one is mapped, and stays."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def refused(path: Path, data: bytes) -> bool:
    write_new(path, data)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    return message.startswith(f"{path}: ") and "\n" not in message


def refused_or_harmless(path: Path, data: bytes) -> bool:
    """Never are other values given than those saved."""
    write_new(path, data)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        return str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert loaded.keys() == SAVED.keys() | {"format"}
    assert all(torch.equal(tensors(loaded)[name], t) for name, t in tensors(SAVED).items())
    return all(loaded[name] == SAVED[name] for name in ("ema", "step", "facts"))


@settings(max_examples=600)
@given(data=st.data())
def test_no_flipped_bit_gives_other_values(tmp_path_factory, whole, data):
    """Wherever it is: in a tensor, in the archive's directory, in the padding between records."""
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))

    assert refused_or_harmless(path, bytes(damaged))


@pytest.mark.parametrize("name", sorted(tensors(SAVED)))
def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path, whole, name):
    """Every byte of every tensor is under a checksum."""
    value = tensors(SAVED)[name]
    stored = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if not stored:
        return
    assert whole.count(stored) >= 1

    for position in range(len(stored)):
        damaged = bytearray(whole)
        damaged[whole.index(stored) + position] ^= 1 << position % 8
        assert refused(tmp_path / "last.pt", bytes(damaged))


@given(data=st.data())
def test_any_flipped_bit_of_an_old_checkpoint_is_refused(tmp_path_factory, whole, data):
    """Version 0.1.0 wrote a checksum of the whole file behind it; also in that line itself."""
    path = tmp_path_factory.getbasetemp() / "old.pt"
    damaged = bytearray(with_trailer(whole))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    assert refused(path, bytes(damaged))
    assert refused(path, with_trailer(whole)[: -data.draw(st.integers(1, 71))])


def test_an_old_checkpoint_is_read(tmp_path, whole):
    """With its trailer."""
    (tmp_path / "last.pt").write_bytes(with_trailer(whole))

    assert load_checkpoint(tmp_path / "last.pt")["facts"] == SAVED["facts"]


@given(data=st.data())
def test_any_missing_or_added_bytes_are_refused(tmp_path_factory, whole, data):
    """Cut anywhere, a stretch lost in the middle, something put before or behind."""
    path = tmp_path_factory.getbasetemp() / "missing.pt"
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first + 1, len(whole)))

    assert refused(path, whole[:first])
    assert refused(path, whole[:first] + whole[last:])
    assert refused(path, whole + whole[first:last])
    assert refused(path, whole[first:last] + whole)


@given(data=st.data())
def test_a_block_of_zeros_gives_no_other_values(tmp_path_factory, whole, data):
    """As a disk leaves it that lost a write."""
    path = tmp_path_factory.getbasetemp() / "zeros.pt"
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first + 1, len(whole)))

    assert refused_or_harmless(path, whole[:first] + bytes(last - first) + whole[last:])


@pytest.mark.parametrize("data", [b"", b"\nsha256:", b"hello", bytes(1000)])
def test_what_is_not_a_checkpoint_is_refused(tmp_path, data):
    """Also where it is shorter than the end of an archive."""
    assert refused(tmp_path / "last.pt", data)


def test_a_plain_state_dict_is_sent_to_init_from(tmp_path):
    """It is readable, but nothing says that it is whole or what it belongs to."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pth")

    with pytest.raises(CheckpointError, match="plain state dicts go to --init-from"):
        load_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.pt", "gone.pt: No such file or directory. Give a run folder or a .pt file."),
        ("", ": Is a directory. Give a run folder or a .pt file."),
    ],
)
def test_a_missing_checkpoint_is_named(tmp_path, name, message):
    """With what could be given in its place."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / name)

    assert str(error.value) == f"{tmp_path / name}{message.removeprefix(name)}"


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    """A later version may mean other things by the same keys."""
    save_checkpoint(tmp_path / "last.pt", content() | {"format": 2})

    with pytest.raises(CheckpointError, match="last.pt: format 2, expected 1."):
        load_checkpoint(tmp_path / "last.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Only tensors and plain values are read, from whomever the file is."""
    save_checkpoint(tmp_path / "last.pt", {"random": random.Random(0)})

    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "last.pt")

    assert str(error.value).startswith(f"{tmp_path / 'last.pt'}: ")
    assert "\n" not in str(error.value)


@contextmanager
def full_disk(num_bytes: int):
    """Within this context no file can grow over so many bytes: the write fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 100, 50_000, 399_999, 401_000])
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, room):
    """At its beginning, in a tensor, in the directory of the archive; no temporary file stays."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(1))
    big = {"weight": torch.zeros(100_000)}

    with full_disk(room), pytest.raises(CheckpointError) as error:
        save_checkpoint(path, big)

    assert str(error.value).startswith(f"{path}: cannot be written (")
    assert str(error.value).endswith("Free some space.")
    assert "\n" not in str(error.value)
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_that_is_gone_is_an_error_of_ours(tmp_path):
    """A run whose folder was deleted ends in one line."""
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "gone/last.pt", content())
