"""A step reads nothing back from the device, so that the host never waits for it."""

import itertools

import pytest
import torch
from test_train import cut, make_batch, make_parts, make_step, run_config, tiny_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wds_convnext.stream.stream import Batch
from wds_convnext.training import loop
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.step import train_step
from wds_convnext.training.train import train


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value on the device.

    `tolist`, `cpu` and `numpy` are none on a CPU: see `HostCopies`.
    """

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_reads += function._schema.name.removeprefix("aten::") in self.WAITING
        return function(*args, **kwargs or {})


class HostCopies(TorchFunctionMode):
    """Counts the calls that copy a tensor to the host, which on a CPU are no operations."""

    COPYING = {"tolist", "cpu", "numpy"}

    def __init__(self):
        super().__init__()
        self.num_copies = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.num_copies += getattr(function, "__name__", "") in self.COPYING
        return function(*args, **kwargs or {})


@pytest.fixture
def as_on_a_device(monkeypatch):
    """On a CPU AdamP reads values, as that costs nothing there."""
    monkeypatch.setattr("wds_convnext.training.adamp.HOST_DEVICES", ())


class HostOperands(TorchDispatchMode):
    """Notes the operations, and those among them that a tensor in host memory takes part in."""

    def __init__(self):
        super().__init__()
        self.names, self.of_host = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.names.append(str(function))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.of_host.append(str(function))
        return result


OF_STEPS = [{}, {"ema_decay": 0.9}, {"clip_grad_norm": 0.0}, {"on_nonfinite": "skip"}]


@pytest.mark.parametrize("options", [*OF_STEPS, {"model": "test_efficientnet"}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_stays_on_the_device(options, accumulate):
    """On the meta device, whose tensors hold no values: to read one, in whatever way, is an error.
    And nothing is made in host memory to be copied over, which would make the host wait as well."""
    config, machine = tiny_config(**options), Machine(World(), torch.device("meta"), "off")
    state, recipe = make_parts(config, machine)
    batches = [
        Batch(*(tensor.to("meta") for tensor in batch[:3]), [])
        for batch in cut(make_batch(0), accumulate)
    ]

    with HostOperands() as operations:
        for _ in range(2):
            loss = train_step(state, batches, lr=1e-3, recipe=recipe)

    assert len(operations.names) > 1000 and operations.of_host == []
    with pytest.raises(RuntimeError, match="meta"):
        loss.tolist()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("options", OF_STEPS, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_reads_nothing_from_the_device(options, accumulate):
    """Whole steps, their host reads counted; the count of one deliberate read shows it counts."""
    state, recipe = make_step(**options)
    batches = cut(make_batch(0), accumulate)

    with HostReads() as of_steps:
        for _ in range(3):
            train_step(state, batches, lr=1e-3, recipe=recipe)
    with HostReads() as of_one_read:
        float(state.sums.interval[0])

    assert of_steps.num_reads == 0
    assert of_one_read.num_reads == 1


@pytest.mark.usefixtures("as_on_a_device")
def test_between_log_lines_a_run_reads_nothing(shards, tmp_path, monkeypatch):
    """The whole loop, with validations from the training loader: from one step to the next nothing
    is read, unless a log line, the end of an epoch (with step 7, 13 and 19) or a checkpoint lies
    between."""
    reads_before_step = []
    reads, copies = HostReads(), HostCopies()

    def counted(state, batches, **how):
        reads_before_step.append(reads.num_reads + copies.num_copies)
        return train_step(state, batches, **how)

    monkeypatch.setattr(loop, "train_step", counted)
    with reads, copies:
        train(run_config(shards, tmp_path, log_every=4, save_every=10, ema_decay=0.9))

    of_steps = enumerate(itertools.pairwise(reads_before_step), start=1)
    steps_with_reads = [step for step, (before, after) in of_steps if after > before]
    assert steps_with_reads == sorted({4, 8, 12, 16, 20, 24} | {7, 13, 19} | {10, 20})
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.count("val/accuracy") == 3  # of epochs 0 and 2, and at the end


@pytest.mark.usefixtures("as_on_a_device")
def test_under_a_grad_scaler_too_a_step_reads_nothing():
    state, recipe = make_step()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    with HostReads() as reads:
        for _ in range(3):
            train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)

    assert reads.num_reads == 0
