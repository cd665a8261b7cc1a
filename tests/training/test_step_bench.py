"""The comparison of training steps runs on a CPU and counts what it says it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import HANG_S

from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.monitor import DeviceTimer

TOOL = Path(__file__).parents[2] / "tools" / "bench" / "bench_step.py"


@pytest.fixture
def tools(monkeypatch):
    """The folder of the tool is where its imports are found."""
    monkeypatch.syspath_prepend(TOOL.parent)


@pytest.fixture
def contenders(tools):
    import bench_step_contenders

    return bench_step_contenders


def test_the_table_has_every_contender_and_only_ours_never_syncs(tmp_path):
    """One round of one step each; what a CPU cannot tell is n/a in the table, null in JSON."""
    arguments = ["--device", "cpu", "--rounds", 1, "--steps", 1, "--json", tmp_path / "steps.json"]
    result = subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    [content] = json.loads((tmp_path / "steps.json").read_text())["results"]
    syncs = {row["contender"]: row["syncs"] for row in content["rows"]}

    ours = ["ours", "ours, cudnn.benchmark", "ours, AdamP by operations"]
    assert list(syncs) == ["article", "timm, AdamP", "timm, AdamW", *ours]
    assert [name for name in syncs if syncs[name] == 0] == ours
    assert all(row["mfu"] is None and row["optimizer_ms"] > 0 for row in content["rows"])
    assert "| ours |" in result.stdout and "n/a" in result.stdout


def test_settings_for_which_no_time_is_left_say_so(tools, tmp_path):
    """Nothing is started after --minutes, and each setting is in the report all the same."""
    import bench_step

    path = tmp_path / "steps.json"
    arguments = ["--device", "cpu", "--minutes", 0, "--json", path]
    arguments += ["--batch-size", 4, "--batch-size", 6]
    result = CliRunner().invoke(bench_step.main, list(map(str, arguments)))

    assert result.exit_code == 0, result.output
    results = json.loads(path.read_text())["results"]
    assert [setting["batch_size"] for setting in results] == [4, 6]
    reasons = [row["failed"] for setting in results for row in setting["rows"]]
    assert reasons == ["no time left"] * 12


def test_nothing_is_started_that_would_end_too_late_if_as_slow_as_the_slowest(tools):
    """Of 60 s: after a start of 50 s another may begin, after one of 70 s none."""
    from bench_step import Deadline

    deadline = Deadline(minutes=1)

    deadline.note_start(50)
    assert deadline.leaves_time_to_start()
    deadline.note_start(70)
    deadline.note_start(1)
    assert not deadline.leaves_time_to_start() and not deadline.is_over


def test_every_contender_has_cudnn_and_its_own_choice_of_benchmark(contenders):
    """What PyTorch sets while it runs; ours chooses as PyTorch does by default."""
    seen = []

    def make(timer):
        return lambda: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))

    for choice in (True, False):
        contender = contenders.Contender("any", make, cudnn_benchmark=choice)
        contender.attempt(lambda one: one.start(torch.device("cpu")))

    assert set(seen[:4]) == {(True, True)} and set(seen[4:]) == {(True, False)}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("cuDNN error\nwith details"), "RuntimeError: cuDNN error"),
    ],
)
def test_whatever_a_contender_raises_ends_it_and_no_other(contenders, error, reason):
    """It is said in its row, and it is not tried again."""

    def make(timer):
        raise error

    contender = contenders.Contender("any", make)
    contender.attempt(lambda one: one.start(torch.device("cpu")))
    contender.attempt(lambda one: one.measure(torch.device("cpu"), 1))

    assert contender.failed == reason and not contender.step_ms


def test_ours_is_given_the_same_pixels_as_the_others_in_our_loaders_format(contenders, monkeypatch):
    """channels_last for ours, as PyTorch's loaders make them for the others."""
    given = []
    monkeypatch.setattr(contenders, "train_step", lambda state, batches, **_: given.extend(batches))
    machine = Machine(World(), torch.device("cpu"), "off")
    setting = contenders.Setting("test_convnext", 4, 32, machine)

    contenders.our_step(setting, DeviceTimer(machine.device))()

    [ours], others = given, setting.host_batches()[0]
    assert torch.equal(ours.images, others.images)
    assert others.images.is_contiguous()
    assert ours.images.is_contiguous(memory_format=torch.channels_last)
    assert not ours.images.is_contiguous()
