"""The doctor's rules about the machine: precision, loader, disk, hours."""

import os
from dataclasses import replace

import pytest
import torch
from test_doctor import encode, examine, plain, write_split

from wds_convnext.check.machine import (
    checkpoint_bytes,
    disk_space,
    full_size_images,
    loader_rate,
    precision,
    shard_count,
)
from wds_convnext.config import DoctorConfig
from wds_convnext.shards.spec import Shard
from wds_convnext.training.checkpoint import save_checkpoint
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.state import build_state


@pytest.mark.parametrize(
    ("num_bytes", "workers", "is_found"),
    [(10**10, 2, True), (10**8, 2, False), (10**10, 1, False)],
)
def test_few_large_shards_are_found(tmp_path, num_bytes, workers, is_found):
    """Fewer than loader processes, which matters to what goes shard by shard."""
    write_split(tmp_path, "train", plain(0))
    case = examine(tmp_path, workers=workers)
    train = replace(
        case.train, dataset=replace(case.train.dataset, shards=(Shard("a.tar", 8, num_bytes),))
    )

    assert bool(list(shard_count(replace(case, splits=(train,))))) == is_found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu"}, "The device is there: cpu, float32."),
        ({"device": "cpu", "amp": "fp16"}, "--amp fp16 needs CUDA, found cpu"),
        ({"device": "cuda:99"}, "--device cuda:99: "),
    ],
)
def test_a_precision_or_device_that_is_not_there_is_found(tmp_path, options, said):
    """A finding, not an error: the rest of the report stands."""
    write_split(tmp_path, "train", plain(0))

    (finding,) = precision(examine(tmp_path, **options))

    assert finding.found.startswith(said)
    assert finding.is_note == (options == {"device": "cpu"})
    assert finding.is_note or finding.advice.startswith("Use ")


def test_checkpoints_that_do_not_fit_the_disk_are_found(tmp_path):
    """A model of a few bytes fits; ten thousand billion checkpoints do not."""
    write_split(tmp_path, "train", plain(0))
    options = {"model": "test_convnext", "image_size": 32, "out": str(tmp_path / "a" / "b")}

    (fits,) = disk_space(examine(tmp_path, **options))
    (finding,) = disk_space(examine(tmp_path, **options, keep=10**13))

    assert fits.is_note and "There is room for 4 checkpoints" in fits.found
    assert finding.found.startswith("10000000000002 checkpoints of 0.00 GB")


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tmp_path, ema_decay):
    """That of the file, but for names and facts."""
    config = DoctorConfig(model="test_convnext", image_size=32, ema_decay=ema_decay)
    machine = Machine(World(), torch.device("cpu"), "off")
    state, _ = build_state(config, num_classes=4, machine=machine)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    save_checkpoint(tmp_path / "a.pt", state.state_dict())

    announced = checkpoint_bytes(config, num_classes=4)

    assert announced == pytest.approx(os.path.getsize(tmp_path / "a.pt"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "is_found"), [(2400, True), (12, False)])
def test_a_loader_slower_than_the_step_is_found(tmp_path, side, is_found):
    """Images that take long to decode, and a model that is done with them at once."""
    samples = [(encode("RGB", (side, side)), i % 2) for i in range(4)]
    write_split(tmp_path, "train", samples)
    options = {"model": "test_convnext", "image_size": 32, "batch_size": 4, "device": "cpu"}

    (finding,) = loader_rate(examine(tmp_path, **options, step=True))

    assert finding.is_note != is_found
    assert ("The device waits for data" in finding.why) == is_found


def test_hours_count_the_pixels_of_smaller_images(tmp_path):
    """Half of the run at half the side: 5/8 of the work, or 1/8 if --max-steps ends it there."""
    write_split(tmp_path, "train", plain(0))
    options = {"epochs": 32, "batch_size": 2, "image_size": 32}
    schedule = {"image_size_schedule": "0:16,0.5:32"}
    cases = [examine(tmp_path, **options | more) for more in ({}, schedule)]
    num_steps = cases[0].order.num_steps(32)
    cases += [examine(tmp_path, **options, **schedule, max_steps=num_steps // 2)]

    whole, growing, small = (full_size_images(case.config, case.order) for case in cases)

    assert whole == 2 * num_steps == 32 * cases[0].order.num_samples
    assert growing == pytest.approx(5 / 8 * whole)
    assert small == pytest.approx(1 / 8 * whole)
