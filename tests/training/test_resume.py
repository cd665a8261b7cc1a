"""Resumed equals uninterrupted, bit for bit: real processes, killed, signalled, started again."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import HANG_S, own_arguments, run, train_command, wait_until
from preloaded import Started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wds_convnext.training.checkpoint import load_checkpoint

NOT_REPEATABLE = {  # times and memory
    "time",
    "train/images_per_s",
    "train/data_wait",
    "train/tflops_per_s",
    "train/mfu",
    "train/optimizer_ms",
    "train/memory_gb",
}


def comparable(folder: Path) -> dict:
    """Everything a run leaves that must not depend on how often it was interrupted."""
    content = load_checkpoint(folder / "last.pt")
    del content["facts"], content["epoch_seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in NOT_REPEATABLE} for line in lines]
    return {"checkpoint": content, "metrics": metrics, "scalars": scalars(folder)}


def scalars(folder: Path) -> dict:
    """TensorBoard's scalars as it shows them: steps and values."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("utilization/")
    }


def assert_same(one, two, where: str = "") -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


EXTRAS = {
    "--ema-decay": 0.9,
    "--accumulate": 2,
    "--batch-size": 4,
    "--drop-path-rate": 0.3,
    "--epochs": 10,
    "--auto-augment": "rand-m9-n1",
    "--random-erasing": 0.5,
    "--repeated-augmentation": 2,
    "--mixing-off-epochs": 3,
    "--image-size": 48,
    "--image-size-schedule": "0:32,0.3:40,0.6:48",
}


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    """A run to its end in one go, without workers."""
    out = tmp_path_factory.mktemp("run") / "straight"
    run(train_command(shards, out, **EXTRAS))
    return comparable(out)


def start(command: list[str], **env) -> subprocess.Popen | Started:
    """Start a run in a process group of its own, with torch imported already if it is ours."""
    if command[1:3] == ["-m", "wds_convnext"]:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | env
        return Started(own_arguments(command), env=env, new_session=True)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def newest_step(out: Path) -> str:
    """The name of the newest checkpoint of a step; empty if there is none."""
    return max((path.name for path in out.glob("step-*.pt")), default="")


def wait_for_a_newer_step(out: Path, process: subprocess.Popen | Started) -> None:
    """Any newer one: a fast run may delete a checkpoint before it is seen."""
    before = newest_step(out)
    wait_until(lambda: newest_step(out) > before, process)


@pytest.mark.slow
def test_another_number_of_workers_gives_the_same_run(shards, tmp_path, uninterrupted):
    """Weights, optimizer, average, sums, metrics and TensorBoard, with 3 workers and with none."""
    run(train_command(shards, tmp_path / "run", **EXTRAS | {"--workers": 3}))

    assert_same(comparable(tmp_path / "run"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 3])
def test_killed_at_random_moments_and_resumed_is_as_if_never_killed(
    shards, tmp_path, uninterrupted, workers
):
    """kill -9 of the whole process group, three times, then to the end.

    The moments are random within the time of two checkpoints, as this machine takes it; the last
    is one at which a checkpoint is being written.
    """
    out, rng = tmp_path / "run", random.Random(workers)
    command = train_command(shards, out, **EXTRAS | {"--workers": workers, "--save-every": 2})
    for attempt in range(3):
        process = start(command + (["--resume"] if attempt else []))
        wait_for_a_newer_step(out, process)
        started = time.monotonic()
        wait_for_a_newer_step(out, process)
        time.sleep(2 * rng.random() * (time.monotonic() - started))
        while attempt == 2 and process.poll() is None and not any(out.glob("*.pt.*.tmp")):
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=HANG_S)
        assert process.returncode == -signal.SIGKILL
    run(command + ["--resume"])

    assert_same(comparable(out), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_group_saves_and_exits_with_75(shards, tmp_path, uninterrupted, signum):
    """The step under way ends, last.pt is written, status.json says why; resumed as if never."""
    out = tmp_path / "run"
    command = train_command(shards, out, **EXTRAS | {"--workers": 2, "--save-every": 1000})
    process = start(command)
    # A line, not the file, which is there before the handlers of the signals are.
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=HANG_S)
    status = json.loads((out / "status.json").read_text())
    run(command + ["--resume"])

    assert process.returncode == 75, output
    assert output.count(f"Stopping after this batch ({signal.Signals(signum).name})") == 1
    assert status["status"] == "stopped"
    assert status["reason"] == signal.Signals(signum).name
    assert "--resume" in output.splitlines()[-1]
    assert_same(comparable(out), uninterrupted)


@pytest.mark.slow
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(shards, tmp_path, uninterrupted):
    """One flipped bit in last.pt and its twin: the run goes on from the older one and says so."""
    out = tmp_path / "run"
    command = train_command(shards, out, **EXTRAS)
    run(command + ["--max-steps", "10"])
    newest = out / "step-000000010.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)

    output = run(command + ["--resume"])

    assert "last.pt: damaged" in output.stderr
    assert "Resumed at step 5." in output.stdout
    assert_same(comparable(out), uninterrupted)


@pytest.mark.slow
def test_a_resume_with_another_stream_is_refused_and_changes_nothing(shards, tmp_path):
    """Other seed, global batch or shards: which one differs, what to do, exit code 2."""
    out = tmp_path / "run"
    command = train_command(shards, out, "--max-steps", 2)
    run(command)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    for options, named in [
        (["--seed", "5"], "seed 0 (now 5)"),
        (["--batch-size", "4"], "global batch is 8"),
        (["--shards", str(shards / "train-000.tar")], "shards"),
        (["--shuffle-buffer", "7"], "shuffle_buffer 16 (now 7)"),
    ]:
        result = run(command + ["--resume", *options], check=False)
        assert result.returncode == 2
        assert named in result.stderr and "--out" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def catches(process: subprocess.Popen | Started, signum: int) -> bool:
    """Whether a process has a handler for a signal; see `man proc_pid_status`."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signum - 1) & 1)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(shards, tmp_path):
    """Ctrl-C twice: the second is not waited for, and the last checkpoint stays whole.

    Steps are long, so that the second comes within the step of the first.
    """
    out = tmp_path / "run"
    long_steps = {"--accumulate": 12, "--epochs": 300, "--workers": 1}
    process = start(train_command(shards, out, **EXTRAS | long_steps))
    wait_until((out / "last.pt").exists, process)
    before = load_checkpoint(out / "last.pt")["step"]  # of --save-every or of a validation
    os.kill(process.pid, signal.SIGINT)
    # Two signals that come before the process runs again would be one.
    wait_until(lambda: not catches(process, signal.SIGINT), process)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)

    assert process.returncode in (-signal.SIGINT, 75)  # 75: the step ended in between
    assert load_checkpoint(out / "last.pt")["step"] >= before
