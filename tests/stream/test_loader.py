"""The processes of a loader: killed, stopped, signalled, failing; what arrives stays the same."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HANG_S, write_shards
from streams import (
    SIZES,
    assert_same,
    damage_images,
    eval_stream,
    take,
    train_order,
    train_stream,
    workers_of_this_process,
)

from wds_convnext.errors import TrainingError
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream import workers as loader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import EvalTransform, TrainTransform

pytestmark = pytest.mark.usefixtures("no_workers_left")


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return open_dataset(str(write_shards(tmp_path, SIZES)))


@pytest.fixture
def damaged_set(dataset) -> Dataset:
    """Samples 2, 3 and 20 do not decode."""
    return damage_images(dataset, [(0, 2), (0, 3), (3, 0)])


@pytest.mark.parametrize(
    "victims", [[(0, 0)], [(3, 1)], [(1, 0), (1, 1)], [(2, 0), (10, 0), (18, 1)]]
)
def test_a_killed_worker_is_started_again_and_changes_nothing(damaged_set, victims, capsys):
    """Whenever which of them dies: the same batches, bad samples included, and a line for each."""
    straight = take(train_stream(damaged_set), 24)
    batches = make_loader(train_stream(damaged_set), workers=2)
    taken = []
    for number in range(24):
        taken.append(next(batches))
        workers = workers_of_this_process()
        for _, victim in (pair for pair in victims if pair[0] == number):
            os.kill(workers[victim].pid, signal.SIGKILL)
            workers[victim].join()
    batches.close()

    assert_same(taken, straight)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(victims)
    assert all("A loader worker died (SIGKILL); it is started again" in line for line in said)


def test_a_batch_that_is_held_stays_as_it_is(dataset):
    """As a tensor, as a view of one, as numpy's; memory that nobody holds is used again."""
    order = train_order(dataset)
    stream = ShardStream(dataset, order, batch_size=4, transform=TrainTransform(80))
    straight = [batch.images for batch in take(stream, 12)]
    batches = make_loader(stream, workers=1)
    held = [next(batches).images, next(batches).images[1], next(batches).images.numpy()[2]]
    for _ in range(9):
        next(batches)
    batches.close()

    assert torch.equal(held[0], straight[0])
    assert torch.equal(held[1], straight[1][1])
    assert torch.equal(torch.from_numpy(held[2]), straight[2][2])


class Deadly(EvalTransform):
    """A transform that ends its process, as a decoder that crashes would."""

    def __call__(self, data, draws=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_again_and_again_ends_in_one_line(dataset, capsys):
    """Not in a hang, and not for ever: the cause stays."""
    stream = ShardStream(dataset, train_order(dataset), batch_size=4, transform=Deadly(16))

    with pytest.raises(
        TrainingError, match=r"A loader worker died \(SIGKILL\).* is memory"
    ) as error:
        take(stream, 1, workers=2)

    assert "\n" not in str(error.value)
    assert len(capsys.readouterr().err.splitlines()) == loader.MAX_RESTARTS


def test_waiting_for_a_worker_can_be_ended(dataset):
    """One that is stopped, as by a disk that does not answer."""

    class Enough(Exception):
        pass

    stopped = []

    def stop():
        if stopped:
            raise Enough

    batches = make_loader(train_stream(dataset), workers=1, while_waiting=stop)
    next(batches)
    stopped += workers_of_this_process()
    os.kill(stopped[0].pid, signal.SIGSTOP)

    with pytest.raises(Enough):
        for _ in range(5):
            next(batches)
    assert workers_of_this_process() == []


ORPHANS = """
import os, signal, sys
from streams import *
from wds_convnext.shards.opening import open_dataset
batches = make_loader(train_stream(open_dataset(sys.argv[1])), workers=2)
next(batches)
print(*(worker.pid for worker in workers_of_this_process()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    """Whatever kills it, and though each of them holds both ends of the others' pipes."""
    result = run_here(ORPHANS, write_shards(tmp_path, SIZES))

    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = result.stdout.split()
    assert len(pids) == 2
    ends = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < ends
        time.sleep(0.1)


class Buggy(EvalTransform):
    """A transform with a programming error."""

    def __call__(self, data, draws=None):
        raise RuntimeError("a bug")


def test_a_bug_in_a_worker_leaves_as_itself(dataset):
    """It is not taken for a lack of memory."""
    order = train_order(dataset)
    stream = ShardStream(dataset, order, batch_size=4, transform=Buggy(16))

    with pytest.raises(RuntimeError, match="a bug"):
        take(stream, 1, workers=1)


def run_here(program: str, *args) -> subprocess.CompletedProcess:
    """Run a program that imports this file in a process of its own."""
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, (here, here.parent)), *sys.path])}
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S)


UNCAUGHT = """
import sys
from streams import *
from wds_convnext.shards.opening import open_dataset
batches = make_loader(train_stream(open_dataset(sys.argv[1])), workers=2)
next(batches)
raise SystemError("a bug of the trainer")
"""


@pytest.mark.slow
def test_a_process_that_fails_while_workers_run_ends(tmp_path):
    """Workers ignore SIGTERM, which is how Python ends its children before it waits for them."""
    result = run_here(UNCAUGHT, write_shards(tmp_path, SIZES))

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "SystemError: a bug of the trainer"


def leave_a_loader_open(dataset) -> None:
    """And keep it until the process ends, as a script's global does."""
    leave_a_loader_open.loader = make_loader(train_stream(dataset), workers=2)
    next(leave_a_loader_open.loader)


def test_a_child_process_that_leaves_its_loader_open_ends(dataset):
    """As the children of torch.multiprocessing.spawn may."""
    child = multiprocessing.get_context("fork").Process(target=leave_a_loader_open, args=[dataset])
    child.start()

    child.join(HANG_S)

    assert child.exitcode == 0


def test_workers_outlive_the_signals_that_stop_a_run(dataset):
    """A signal to the whole process group reaches them too; the trainer decides when to stop.

    From their start on: the second worker may not even have run when the first batch is there.
    """
    batches = make_loader(train_stream(dataset), workers=2)
    taken = [next(batches)]

    for process in workers_of_this_process():
        for signum in loader.STOP_SIGNALS:
            os.kill(process.pid, signum)
    taken += [next(batches) for _ in range(6)]

    batches.close()
    assert_same(taken, take(train_stream(dataset), 7))


def test_workers_outlive_signals_that_come_before_they_ignore_them(dataset, monkeypatch):
    """Each worker's come in its first line, however soon the trainer asks for a batch."""
    settle_in = loader._settle_in

    def signal_then_settle_in():
        for signum in loader.STOP_SIGNALS:
            os.kill(os.getpid(), signum)
        settle_in()

    monkeypatch.setattr(loader, "_settle_in", signal_then_settle_in)

    taken = take(train_stream(dataset), 7, workers=2)

    assert_same(taken, take(train_stream(dataset), 7))


def test_a_loader_without_workers_leaves_no_shard_open(dataset):
    """However many evaluations a run makes in its own process."""
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/dev/fd"))

    for _ in range(3):
        assert len(list(make_loader(eval_stream(dataset), workers=0))) == 6
        take(train_stream(dataset), 2)

    assert len(os.listdir("/dev/fd")) <= before  # what earlier tests left may be closed by now


def test_a_loader_leaves_no_process_behind(dataset):
    """Whether its stream came to its end or was closed before."""
    for _ in range(3):
        assert len(list(make_loader(eval_stream(dataset), workers=2))) == 6
        take(train_stream(dataset), 2, workers=2)

    assert workers_of_this_process() == []
