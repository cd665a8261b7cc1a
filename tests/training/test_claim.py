"""A run has its folder for itself, goes on from where it says, and loses nothing of another."""

import json
import os
import shutil
import signal
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import HANG_S, command, run, train_command
from test_cli import call
from test_resume import start, wait_for_a_newer_step
from test_train import run_config, tiny_config

from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.runs import best_checkpoint, newest_run
from wds_convnext.training.train import train


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12, validated after 7 and 12."""
    folder = tmp_path_factory.mktemp("claim")
    train(run_config(shards, folder, max_steps=12, save_every=4, keep=9, val_every=1, lr=0.02))
    return folder / "run"


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    """A copy that may be written to."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps_of(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["step"] for path in folder.glob("*.pt")}


def resume(shards: Path, source: Path, **options) -> None:
    """Continue a run in this process."""
    options = {"lr": 0.02, "val_every": 1, "keep": 9} | options
    train(tiny_config(shards=str(shards / "train.json"), resume=str(source), **options))


@pytest.mark.parametrize("source", ["", "step-000000008.pt"])
def test_a_run_that_goes_on_elsewhere_leaves_the_first_as_it_was(run_folder, tmp_path, source):
    """`--resume A --out B`: A's weights and A's options, in B."""
    before, other = content(run_folder), tmp_path / "other"
    step = load_checkpoint(run_folder / (source or "last.pt"))["step"]

    options = {"--resume": run_folder / source, "--out": other, "--max-steps": 13, "--lr": 0.01}
    result = run(command("train", **options))

    assert f"Resumed at step {step}. " in result.stdout and str(other) in result.stdout
    assert content(run_folder) == before
    assert steps_of(other)["last.pt"] == 13
    options = (other / "config.toml").read_text().splitlines()
    assert {"lr = 0.01", 'model = "test_convnext"', "save_every = 4"} <= set(options)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] > step for line in lines)


@pytest.mark.parametrize("source", ["", "last.pt", "step-000000004.pt"])
def test_a_folder_that_holds_another_run_is_refused(run_folder, tmp_path, source):
    """And not a byte of it changes."""
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    before = content(other)

    with pytest.raises(UsageError) as error:
        train(tiny_config(shards="x", resume=str(run_folder / source), out=str(other)))

    assert str(error.value).startswith(f"{other}: already holds a run. Continue it with --resume")
    assert content(other) == before


def test_the_runs_own_folder_as_out_is_no_other(run_folder, shards):
    """However it is spelled."""
    out = run_folder.parent / "run" / ".." / "run"

    resume(shards, run_folder, out=str(out), max_steps=13)

    assert steps_of(run_folder)["last.pt"] == 13


@pytest.mark.parametrize("step", [4, 8])
def test_going_back_moves_what_is_later_aside(run_folder, shards, capsys, step):
    """Checkpoints, best.pt and metrics; from then on the folder is that of the new branch."""
    before, steps = content(run_folder), steps_of(run_folder)

    resume(shards, run_folder / f"step-{step:09d}.pt", max_steps=step + 1)

    aside, later = run_folder / f"after-step-{step}", {n for n in steps if steps[n] > step}
    assert {path.name for path in aside.glob("*.pt")} == later
    assert all(content(aside)[name] == before[name] for name in later | {"metrics.jsonl"})
    assert f"Went back to step {step}: " in capsys.readouterr().out
    after = steps_of(run_folder)
    assert after["last.pt"] == max(after.values()) == step + 1
    assert "best.pt" in after


def test_a_kill_after_going_back_does_not_bring_the_old_branch_back(run_folder, shards):
    """Before the first new step is saved, last.pt is the checkpoint gone back to."""
    resume(shards, run_folder / "step-000000004.pt", max_steps=4)

    assert steps_of(run_folder)["last.pt"] == 4


def batch_size_of(folder: Path) -> int:
    return tomllib.loads((folder / "config.toml").read_text())["batch_size"]


def test_an_older_checkpoint_of_more_ranks_goes_on(run_folder, capsys):
    """As if two ranks had trained to step 4, and one since: config.toml is of the last start."""
    config, old = run_folder / "config.toml", run_folder / "step-000000004.pt"
    then = {k: v for k, v in load_checkpoint(old).items() if k != "format"}
    save_checkpoint(old, then | {"facts": then["facts"] | {"batch_size": 4}})
    config.write_text(config.read_text().replace("batch_size = 8", "batch_size = 16"))

    code, out, err = call(capsys, "train", "--resume", old, "--max-steps", 5)

    assert code == 0, err
    assert "--batch-size 16 becomes 8, which keeps the run's global batch of 8" in out
    assert batch_size_of(run_folder) == 8
    # What is asked for takes effect or is refused, as before.
    code, _, err = call(capsys, "train", "--resume", old, "--batch-size", 2)
    assert code == 2 and "the checkpoint's global batch is 8" in err


def test_a_resume_from_the_newest_moves_nothing(run_folder, shards, capsys):
    """By whichever of its names; and a run that has finished says so."""
    for name in ("", "last.pt", "step-000000012.pt"):
        resume(shards, run_folder / name, max_steps=12)

    assert not list(run_folder.glob("after-*"))
    assert capsys.readouterr().out.count("All steps of the run are done") == 3


def test_where_only_best_is_left_the_run_goes_on_from_it(run_folder, shards, capsys):
    """It is as whole as the others."""
    step = steps_of(run_folder)["best.pt"]
    for path in [*run_folder.glob("step-*.pt"), run_folder / "last.pt"]:
        path.unlink()

    resume(shards, run_folder, max_steps=13)

    assert f"Resumed at step {step}. Read {run_folder / 'best.pt'}" in capsys.readouterr().out


def test_to_continue_and_to_overwrite_is_refused():
    """One of the two was not meant."""
    with pytest.raises(UsageError, match="--resume and --overwrite exclude each other"):
        tiny_config(resume="newest", overwrite=True)


def test_the_newest_run_is_named_not_passed_over(finished, tmp_path, monkeypatch):
    """One that has no best.pt yet is no reason to evaluate an older one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "old")
    (tmp_path / "runs" / "new").mkdir()
    (tmp_path / "runs" / "new" / "config.toml").touch()
    os.utime(tmp_path / "runs" / "new" / "config.toml", (2**33, 2**33))

    assert newest_run() == Path("runs/new")
    with pytest.raises(CheckpointError, match="runs/new: the newest run, holds no best.pt and no"):
        best_checkpoint(None)
    assert best_checkpoint("runs/old") == Path("runs/old/best.pt")


@pytest.mark.slow
def test_a_run_that_is_running_keeps_others_out(shards, tmp_path):
    """By process and host, in one line; and it runs on. Killed, it keeps nobody out."""
    out = tmp_path / "run"
    process = start(train_command(shards, out, **{"--epochs": 999, "--workers": 1}))
    wait_for_a_newer_step(out, process)

    others = [
        run(train_command(shards, out, how), check=False) for how in ("--resume", "--overwrite")
    ]
    is_running = process.poll() is None
    os.kill(process.pid, signal.SIGKILL)  # only the trainer: its workers notice later
    process.wait(timeout=HANG_S)
    third = run(train_command(shards, out, "--resume", **{"--max-steps": 1}), check=False)

    assert is_running
    for other in others:
        [line] = other.stderr.splitlines()
        assert other.returncode == 2
        assert f"{out}: its run is running, process {process.pid} on " in line
    assert "Resumed at step" in third.stdout


@pytest.mark.slow
def test_runs_that_start_together_have_a_folder_each(shards, tmp_path):
    """Without --out, in the same second; the clock is not what tells them apart."""
    arguments = train_command(shards, tmp_path, **{"--max-steps": 1})
    at = arguments.index("--out")
    del arguments[at : at + 2]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: run(arguments, cwd=tmp_path), range(3)))

    folders = [path for path in (tmp_path / "runs").iterdir() if (path / "last.pt").exists()]
    assert len(folders) == len(results) == 3
