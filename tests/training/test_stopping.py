"""A run ends where it says: signals while it validates or waits for data, output that is gone."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import HANG_S, TINY_RUN, run, train_command, wait_until, write_parquet
from test_cli import call
from test_distributed import two_ranks
from test_resume import assert_same, comparable, start
from tqdm import tqdm

from wds_convnext.conversion import convert
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.stopping import StopRequest

# As in the processes that runs here are compared with: more add in another order.
pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"--epochs": 2, "--val-every": 1, "--save-every": 1000, "--ema-decay": 0.9, "--log-every": 1}


@pytest.fixture(scope="module")
def long_validation(tmp_path_factory):
    """As the tiny shards, with a validation that takes its time."""
    folder = tmp_path_factory.mktemp("long")
    write_parquet(folder / "pictures", "train", [20])
    write_parquet(folder / "pictures", "validation", [1000])
    convert(str(folder / "pictures"), out=str(folder / "data"), jobs=1, quiet=True)
    return folder / "data"


def train(capsys, shards, out, *flags, **options):
    flat = [part for pair in (TINY_RUN | options).items() for part in pair]
    return call(capsys, "train", "--shards", shards / "train.json", "--out", out, *flags, *flat)


@pytest.fixture(scope="module")
def never_stopped(long_validation, tmp_path_factory):
    """A run to its end, without a signal."""
    out = tmp_path_factory.mktemp("run") / "straight"
    run(train_command(long_validation, out, **LONG))
    return comparable(out)


def has_ended_an_epoch(out) -> bool:
    """So that its validation is under way."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and "train/epoch_loss" in metrics.read_text()


@contextmanager
def acting_when(is_reached, act):
    """Call `act` in a thread once `is_reached`, and not at all after the context."""
    ended = threading.Event()

    def wait():
        while not is_reached() and not ended.is_set():
            time.sleep(0.01)
        if not ended.is_set():
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGTERM, 0), (signal.SIGHUP, 2)])
def test_a_signal_during_a_validation_ends_it(
    capsys, long_validation, never_stopped, tmp_path, signum, workers
):
    """Within a batch; the resumed run validates first, and is as if it had never been stopped."""
    out, options = tmp_path / "run", LONG | {"--workers": workers}
    signal.signal(signum, signal.SIG_DFL)  # under nohup the whole suite ignores SIGHUP

    with acting_when(lambda: has_ended_an_epoch(out), lambda: os.kill(os.getpid(), signum)):
        code, output, _ = train(capsys, long_validation, out, **options)

    assert code == 75 and signal.Signals(signum).name in output
    assert "Validation:" not in output
    stopped = load_checkpoint(out / "last.pt")
    assert stopped["owes_validation"] and stopped["best_top1"] == -1
    assert json.loads((out / "status.json").read_text())["status"] == "stopped"
    assert train(capsys, long_validation, out, "--resume", **options)[0] == 0
    assert_same(comparable(out), never_stopped)


def test_a_signal_while_waiting_for_data_ends_the_wait(capsys, shards, tmp_path):
    """As when a disk does not answer: a stopped worker hands over nothing for ever."""
    out = tmp_path / "run"

    def stop_worker_then_run():
        [worker] = subprocess.check_output(["pgrep", "-P", str(os.getpid())], text=True).split()[:1]
        os.kill(int(worker), signal.SIGSTOP)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    metrics = out / "metrics.jsonl"
    options = {"--workers": 1, "--epochs": 100, "--log-every": 1}
    with acting_when(lambda: metrics.exists() and metrics.stat().st_size, stop_worker_then_run):
        code, output, _ = train(capsys, shards, out, **options)

    assert code == 75, output
    assert load_checkpoint(out / "last.pt")["step"] >= 1


@pytest.mark.parametrize(
    ("signum", "said"),
    [(signal.SIGINT, "(SIGINT); Ctrl-C again ends"), (signal.SIGTERM, "(SIGTERM); a second one")],
)
def test_a_signal_is_acknowledged_at_once(capfd, signum, said):
    """In one line on stderr, whoever holds a lock; once, and by the main rank alone."""
    with tqdm.get_lock(), StopRequest() as request:
        signal.raise_signal(signum)
        printed = capfd.readouterr()
    with StopRequest(quiet=True):
        signal.raise_signal(signum)

    assert request.signal_name == signal.Signals(signum).name
    assert printed.err.startswith("Stopping after this batch ") and said in printed.err
    assert printed.err.count("\n") == 1 and len(printed.err) < 80 and printed.out == ""
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_signal_during_a_validation_stops_both_ranks(long_validation, tmp_path):
    """SIGTERM to torchrun, which forwards it and kills what is not gone after 30 s."""
    out = tmp_path / "run"
    process = start(two_ranks(train_command(long_validation, out, **LONG | {"--batch-size": 4})))
    wait_until(lambda: has_ended_an_epoch(out), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANG_S)

    assert "Stopped by SIGTERM" in output
    assert output.count("Stopping after this batch (SIGTERM)") == 1
    assert load_checkpoint(out / "last.pt")["owes_validation"]
    assert json.loads((out / "status.json").read_text())["status"] == "stopped"


@pytest.mark.slow
def test_ctrl_c_with_tee_saves(shards, tmp_path):
    """It ends tee as well; the run's own lines have nowhere to go, and its exit code is 75."""
    out = tmp_path / "run"
    command = train_command(shards, out, **{"--epochs": 100, "--save-every": 10**6})
    words = " ".join(f"'{word}'" for word in command)
    script = f"trap : INT; {words} 2>&1 | tee {tmp_path / 'log'}; exit ${{PIPESTATUS[0]}}"
    process = start(["bash", "-c", script])
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "Epoch 3" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)

    assert process.returncode == 75
    assert load_checkpoint(out / "last.pt")["step"] > 10
    assert json.loads((out / "status.json").read_text())["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_run_without_an_output_stream_finishes(shards, tmp_path, closed):
    """Started with stdout or stderr closed, as by some service managers."""
    words = " ".join(f"'{word}'" for word in train_command(shards, tmp_path / "run"))

    code = subprocess.call(["bash", "-c", f"{words} {closed}>&-"], timeout=HANG_S)

    assert code == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 25
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_does_not_end_a_run(shards, tmp_path):
    out = tmp_path / "run"
    process = start(["nohup", *train_command(shards, out, **{"--epochs": 12})])
    wait_until(lambda: (out / "metrics.jsonl").exists(), process)
    os.killpg(process.pid, signal.SIGHUP)
    output, _ = process.communicate(timeout=HANG_S)

    assert process.returncode == 0, output


@pytest.mark.parametrize("best", ["missing", "damaged"])
def test_without_its_best_checkpoint_a_run_ends_with_its_last_weights(
    capsys, shards, tmp_path, best
):
    """Deleted, or of a run that had no validation shards before: the average, if there is one."""
    out, flags = tmp_path / "run", {"--ema-decay": 0.9}
    assert train(capsys, shards, out, **flags)[0] == 0
    if best == "missing":
        (out / "best.pt").unlink()
    else:
        (out / "best.pt").write_bytes(b"no checkpoint")

    code, output, _ = train(capsys, shards, out, "--resume", **flags)

    validations = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "val" in line
    ]
    assert code == 0
    assert f"Final Model Accuracy: {validations[-1]['val/accuracy']:.2f}%" in output
    assert "n = 13" in output and "the last weights" in output
