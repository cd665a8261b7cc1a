"""Checkpoints in a run's folder: names of one file, the newest ones, the newest that is whole."""

from pathlib import Path

import pytest
import torch
from test_checkpoint import content

from wds_convnext.errors import CheckpointError
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.rundir import (
    link_checkpoint,
    load_newest,
    prune_steps,
    step_checkpoints,
)


def save_steps(folder: Path, steps: list[int]) -> None:
    """Checkpoints as a run leaves them: one per step, and `last.pt` as another name of the last."""
    for step in steps:
        save_checkpoint(folder / f"step-{step:09d}.pt", content(step))
    link_checkpoint(folder / f"step-{steps[-1]:09d}.pt", folder / "last.pt")


def damage(path: Path) -> None:
    """Flip one bit of a tensor, in place, so under every name that the file has."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(4, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def test_saving_over_a_linked_checkpoint_leaves_the_other_name(tmp_path):
    """`best.pt` may be a second name of a step's file; a new one does not change that file."""
    save_steps(tmp_path, [5])
    link_checkpoint(tmp_path / "step-000000005.pt", tmp_path / "best.pt")

    save_checkpoint(tmp_path / "best.pt", content(6))
    link_checkpoint(tmp_path / "best.pt", tmp_path / "last.pt")

    assert load_checkpoint(tmp_path / "step-000000005.pt")["step"] == 5
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 6
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 6
    assert (tmp_path / "best.pt").stat().st_ino == (tmp_path / "last.pt").stat().st_ino


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    """By step; `last.pt`, `best.pt` and files of other names stay."""
    save_steps(tmp_path, [5, 10, 100, 20])
    others = ["best.pt", "step-5.pt.tmp", "step-abc.pt", "metrics.jsonl"]
    for name in others:
        (tmp_path / name).touch()

    prune_steps(tmp_path, keep=2)

    assert [p.name for p in step_checkpoints(tmp_path)] == [
        "step-000000100.pt",
        "step-000000020.pt",
    ]
    assert all((tmp_path / name).exists() for name in [*others, "last.pt"])


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_keeping_none_or_more_than_there_are_works(tmp_path, keep):
    """`last.pt` alone is left, or all."""
    save_steps(tmp_path, [5, 10])

    prune_steps(tmp_path, keep=keep)

    assert len(step_checkpoints(tmp_path)) == min(keep, 2)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 10


@pytest.mark.parametrize(
    ("damaged", "step", "num_warnings"),
    [
        ([], 30, 0),
        (["step-000000030.pt"], 20, 2),
        (["step-000000030.pt", "step-000000020.pt"], 10, 3),
        (["step-000000010.pt"], 30, 0),
    ],
)
def test_the_newest_whole_checkpoint_is_used(tmp_path, damaged, step, num_warnings):
    """Damaged ones are passed over, each with a warning of one line that names it."""
    save_steps(tmp_path, [10, 20, 30])
    for name in damaged:
        damage(tmp_path / name)
    warnings = []

    _, loaded = load_newest(tmp_path, warn=warnings.append)

    assert loaded["step"] == step
    assert len(warnings) == num_warnings
    assert all(w.endswith("Trying the one before it.") and "\n" not in w for w in warnings)


def test_without_last_the_newest_step_is_used(tmp_path):
    """A kill between the two names leaves only the step's."""
    save_steps(tmp_path, [10, 20])
    (tmp_path / "last.pt").unlink()

    path, loaded = load_newest(tmp_path, warn=pytest.fail)

    assert path.name == "step-000000020.pt" and loaded["step"] == 20


def test_without_a_whole_checkpoint_it_says_how_to_start_from_scratch(tmp_path):
    """After a warning for each that there is."""
    save_steps(tmp_path, [10])
    damage(tmp_path / "last.pt")
    warnings = []

    with pytest.raises(CheckpointError) as error:
        load_newest(tmp_path, warn=warnings.append)

    assert str(error.value) == (
        f"{tmp_path}: holds no whole checkpoint to resume from. "
        "Start from scratch with --overwrite, or in another folder with --out."
    )
    assert len(warnings) == 2
