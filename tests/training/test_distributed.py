"""Two processes against one: the same samples, the same evaluation, one stop, a clear end."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import HANG_S, on_ranks, run, train_command
from preloaded import start_ranks
from test_resume import assert_same, comparable, start, wait_for_a_newer_step

from wds_convnext.training.checkpoint import load_checkpoint

# Standalone: on a port that is free, whatever else runs on this machine.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# No mixing and no stochastic depth: these are drawn per rank, so only without them are the
# weights of one and of two processes equal to rounding.
PLAIN = {"--mixup": 0, "--cutmix": 0, "--drop-path-rate": 0, "--label-smoothing": 0}


def two_ranks(command: list[str]) -> list[str]:
    """The same command on two gloo ranks, which torchrun starts, stops and watches."""
    return [*TORCHRUN, *command[1:]]


# Dynamo as it is; its graphs run by PyTorch's operations, so that nothing waits for a C++ compiler.
COMPILED_QUICKLY = """
import sys
import torch
from torch._dynamo.utils import counters
from wds_convnext.cli import main
from wds_convnext.training import step
step.compile_model = lambda model: torch.compile(model, dynamic=False, backend="aot_eager")
try:
    main(sys.argv[1:])
finally:
    print("graphs:", counters["stats"]["unique_graphs"], file=sys.stderr)
"""


@pytest.mark.slow
def test_two_ranks_train_on_the_same_global_batches_as_one(shards, tmp_path):
    """Half the batch on each of two ranks: weights equal to rounding, evaluation to the sample.

    The two are compiled, with an average and validations: two graphs each, for all of the run.
    """
    options = PLAIN | {"--ema-decay": 0.9}
    run(train_command(shards, tmp_path / "one", **options))
    command = train_command(shards, tmp_path / "two", "--compile", **options | {"--batch-size": 4})
    ranks = on_ranks(*[[sys.executable, "-c", COMPILED_QUICKLY, *command[3:]]] * 2)

    assert all("graphs: 2" in rank.stderr.splitlines() for rank in ranks)
    assert not any("the compiler cut the model" in rank.stdout for rank in ranks)  # only DDP's code
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-5)
    assert two["best_top1"] == pytest.approx(one["best_top1"], abs=1 / 13 + 1e-9)
    assert two["facts"]["data"] == one["facts"]["data"]


@pytest.mark.slow
def test_evaluation_on_two_ranks_equals_one_process(shards, tmp_path):
    """13 samples in batches of 4: the same counts and loss, from one writer."""
    run(train_command(shards, tmp_path / "run", "--max-steps", 3))
    evaluation = [sys.executable, "-m", "wds_convnext", "eval", "--checkpoint", tmp_path / "run"]
    evaluation += ["--json", "--device", "cpu", "--batch-size", "4", "--workers", "1"]
    evaluation = [str(part) for part in evaluation]

    one = json.loads(run(evaluation).stdout)
    first, second = on_ranks(evaluation, evaluation)
    two = json.loads(first.stdout)

    assert second.stdout == ""
    assert two["num_samples"] == one["num_samples"] == 13
    assert two["top1"] == one["top1"] and two["top5"] == one["top5"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_one_step_and_the_resume_is_exact(shards, tmp_path):
    """SIGTERM: last.pt, status.json; then as if never stopped."""
    straight, broken = (
        train_command(shards, tmp_path / name, **{"--batch-size": 4}) for name in ("a", "b")
    )
    on_ranks(straight, straight)
    ranks = start_ranks(broken[3:], broken[3:])
    wait_for_a_newer_step(tmp_path / "b", ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    outputs = [rank.communicate(HANG_S) for rank in ranks]
    status = json.loads((tmp_path / "b" / "status.json").read_text())
    on_ranks(*[[*broken, "--resume"]] * 2)

    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    assert status["status"] == "stopped"
    assert status["reason"] == "a signal to another process"  # rank 0 writes it
    assert_same(comparable(tmp_path / "b"), comparable(tmp_path / "a"))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_quickly(shards, tmp_path):
    """kill -9 of one rank: the other says so, and the last checkpoint is whole.

    Quickly: before the timeout of a collective.
    """
    out = tmp_path / "run"
    command = train_command(shards, out, **{"--batch-size": 4, "--epochs": 300})
    ranks = start_ranks(command[3:], command[3:])
    wait_for_a_newer_step(out, ranks[0])
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, errors = ranks[0].communicate(HANG_S)

    assert ranks[0].returncode not in (0, None)
    assert "rank 0: another process of the run is gone" in errors
    assert load_checkpoint(out / "last.pt")["step"] >= 5


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(shards, tmp_path):
    """kill -9 of one rank under --max-restarts: the run goes on, and ends as if never killed."""
    options = {"--batch-size": 4, "--epochs": 8}
    on_ranks(*[train_command(shards, tmp_path / "a", **options)] * 2)
    command = two_ranks(train_command(shards, tmp_path / "b", "--resume", **options))
    command[3:3] = ["--max-restarts", "1"]
    # Without it the restarted ranks find the addresses of the dead ones (pytorch issue 135712).
    process = start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_a_newer_step(tmp_path / "b", process)
    os.kill(int(children_of(process)[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=HANG_S)

    assert process.returncode == 0, output
    assert "Resumed at step" in output
    assert_same(comparable(tmp_path / "b"), comparable(tmp_path / "a"))


def children_of(process: subprocess.Popen) -> list[str]:
    """The process ids of a process's children, oldest first."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.slow
def test_a_resume_on_other_ranks_goes_on_with_the_same_global_batches(shards, tmp_path):
    """From one process to two: the batch per process follows, weights are equal to rounding."""
    run(train_command(shards, tmp_path / "one", **PLAIN))
    run(train_command(shards, tmp_path / "both", "--max-steps", 7, **PLAIN))
    command = train_command(shards, tmp_path / "both", "--resume", **PLAIN)
    first, _ = on_ranks(command, command)

    assert "Resumed at step 7." in first.stdout
    assert "world_size 2, the checkpoint had 1" in first.stderr
    one, both = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "both"))
    assert both["facts"]["batch_size"] == 4 and both["step"] == one["step"]
    for key, value in one["model"].items():
        torch.testing.assert_close(both["model"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "is_shared", "said"),
    [
        (
            ["--seed", "5"],
            True,
            "rank 1 differs from rank 0 in seed of the training data (5,",
        ),
        (["--shards", "{shards}/train-000.tar"], True, "in shards of the training data ("),
        ([], False, "rank 1: run/last.pt is not there, though rank 0 resumes from it."),
    ],
)
def test_ranks_that_are_about_to_do_something_else_end_at_once(
    shards, tmp_path, others, is_shared, said
):
    """Before the first step, in one line that names the rank and what it has.

    Rank 1 is given other arguments, or runs in another folder, as on a machine of its own.
    """
    out = tmp_path / "run" if is_shared else "run"
    command = train_command(shards, out, **PLAIN | {"--batch-size": 4, "--max-steps": 1})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if not is_shared:
        on_ranks(command, command, folders=(tmp_path, tmp_path))
        command.append("--resume")
    of_rank_1 = [*command, *(text.format(shards=shards) for text in others)]
    folders = (tmp_path, tmp_path if is_shared else elsewhere)

    ranks = on_ranks(command, of_rank_1, folders=folders, check=False)

    assert all(rank.returncode for rank in ranks)
    assert any(said in rank.stderr for rank in ranks)
    assert not any("Traceback" in rank.stderr for rank in ranks)
