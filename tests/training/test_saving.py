"""A checkpoint is written while training goes on, and holds the moment it was asked for."""

import copy
import io
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import HANG_S
from test_resume import assert_same
from test_train import make_batch, make_step
from torch import nn

import wds_convnext.training.rundir as rundir_module
from wds_convnext.errors import CheckpointError
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.distributed import World
from wds_convnext.training.rundir import RunDir
from wds_convnext.training.saving import Writer, copy_to_host
from wds_convnext.training.step import train_step


def state() -> dict:
    """Tied and averaged weights, other strides, empty tensors, one tuple in two places."""
    first = nn.Linear(5, 3)
    second = nn.Linear(5, 3)
    second.weight = first.weight
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    weights = nn.Sequential(first, second).state_dict()
    group = {"betas": (0.9, 0.999), "params": [0, 1]}
    return {
        "model": weights,
        "again": weights | {"other": torch.randn(4)[1:3].expand(6, 2)},
        "values": [image, torch.tensor(3), torch.empty(0, 4), torch.empty(2, 0), image[0].half()],
        "groups": [group, {**group, "nothing": None}],
        "step": 7,
    }


def test_a_copy_is_written_as_the_state_itself_and_keeps_its_moment():
    """The same bytes, so the same sharing of memory; later changes of the state are not in it."""

    def as_bytes(content: dict) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    original = state()
    before = as_bytes(original)

    copied = copy_to_host(original)
    original["model"]["0.weight"].zero_()
    original["values"][0].zero_()
    original["groups"][0]["params"].append(2)
    original["step"] = 8

    assert as_bytes(copied) == before != as_bytes(original)
    tied = (copied["model"]["0.weight"], copied["again"]["1.weight"])
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_one_thing_at_a_time_in_the_order_asked_for():
    """The second waits for the first, the end of the context for all."""
    done = []
    gates = {1: threading.Event(), 2: threading.Event()}

    def work(number: int) -> None:
        assert gates[number].wait(HANG_S)
        done.append(number)

    with Writer() as writer:
        writer.start(lambda: work(1))
        assert done == []
        threading.Timer(0.05, gates[1].set).start()
        writer.start(lambda: work(2))
        assert done == [1]
        gates[2].set()

    assert done == [1, 2]


def test_what_fails_in_the_thread_is_raised_once_where_it_is_waited_for(tmp_path):
    """At the next start, which begins nothing, or at the end; an error of the loop goes before."""
    gone, whole = tmp_path / "gone" / "last.pt", tmp_path / "last.pt"

    with pytest.raises(CheckpointError, match="Its folder is gone"), Writer() as writer:
        writer.start(lambda: save_checkpoint(gone, {}))
    with Writer() as writer:
        writer.start(lambda: save_checkpoint(gone, {}))
        with pytest.raises(CheckpointError, match="Its folder is gone"):
            writer.start(lambda: save_checkpoint(whole, {}))
    with pytest.raises(ZeroDivisionError), Writer() as writer:
        writer.start(lambda: save_checkpoint(gone, {}))
        raise ZeroDivisionError

    assert not whole.exists()


@pytest.mark.bits
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The file is begun two steps after it was asked for, and holds the step at which it was."""
    state, recipe = make_step(ema_decay=0.9)
    rundir, has_gone_on = RunDir(tmp_path, World()), threading.Event()
    run = SimpleNamespace(state=state, facts=SimpleNamespace(to_dict=dict))

    def save_late(path, content):
        assert has_gone_on.wait(HANG_S)
        save_checkpoint(path, content)

    monkeypatch.setattr(rundir_module, "save_checkpoint", save_late)
    train_step(state, [make_batch(0)], lr=1e-2, recipe=recipe)
    then = copy.deepcopy(state.state_dict())
    with rundir.writer:
        rundir.save(run, is_best=True)
        for number in (1, 2):
            train_step(state, [make_batch(number)], lr=1e-2, recipe=recipe)
        assert not list(tmp_path.iterdir())
        has_gone_on.set()
        rundir.wait()

    names = ["best.pt", "last.pt", "step-000000001.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        saved = load_checkpoint(tmp_path / name)
        assert_same({key: saved[key] for key in then}, then)
    assert not torch.equal(saved["model"]["head.fc.bias"], state.model.state_dict()["head.fc.bias"])
