"""What `doctor` looks for in the model and on this machine; what is measured takes seconds."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from wds_convnext.check.case import Case, Finding, Rule
from wds_convnext.check.loads import Loads
from wds_convnext.check.measure import cpu_lacks_bf16
from wds_convnext.config import DoctorConfig, TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.files import free_bytes
from wds_convnext.progress import Progress
from wds_convnext.shards.spec import total_bytes
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch
from wds_convnext.stream.workers import num_workers
from wds_convnext.training.augment import build_transform, pixels_of
from wds_convnext.training.compiler import require_cuda_graphs
from wds_convnext.training.distributed import Machine, join_world
from wds_convnext.training.model import check_image_sizes, model_for
from wds_convnext.training.optimizer import NUM_MOMENTS
from wds_convnext.training.runs import RUNS
from wds_convnext.training.schedule import image_sizes, validation_schedule
from wds_convnext.training.state import build_state
from wds_convnext.training.step import build_recipe, train_step

_LOADER_S = 2.0
_LOADER_BATCH = 32  # the rate hardly depends on it, the time until it is known does
_STEP_S = 3.0
_WARMUP_STEPS = 2  # compile, allocate
_LARGE_SHARD = 2e9  # bytes


def shard_count(case: Case) -> Iterator[Finding]:
    """The shards are small or many enough to be copied and checked in parallel."""
    shards = case.train.dataset.shards
    workers = case.config.ranks * num_workers(case.config.workers, ranks=case.config.ranks)
    num_bytes = total_bytes(shards) / len(shards)
    if len(shards) < workers and num_bytes > _LARGE_SHARD:
        yield Finding(
            f"{len(shards)} shards of {num_bytes / 1e9:.1f} GB for {workers} loader processes.",
            "All of them read any shard; but verify, index and copying go shard by shard.",
            "Write smaller ones: wds-convnext shards --shard-size 500MB.",
        )


def precision(case: Case) -> Iterator[Finding]:
    """The device is there and computes in the precision asked for."""
    config = case.config
    try:
        machine = _machine(config)
    except UsageError as error:
        found, _, advice = str(error).partition(". ")
        yield Finding(
            f"{found}.",
            "train would refuse to start here; where it is to run, it may be right.",
            advice,
        )
        return
    device, lacks = machine.device, False
    if machine.amp == "bf16" and device.type == "cuda":
        lacks = not torch.cuda.is_bf16_supported(including_emulation=False)
    elif machine.amp == "bf16" and device.type == "cpu":
        lacks = cpu_lacks_bf16()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if lacks:
        yield Finding(
            f"--amp bf16, which the {name} here has no instructions for.",
            "It computes by detours, slower than in float32.",
            "--amp auto takes what the device is good at.",
        )
    else:
        amp = "float32" if machine.amp == "off" else machine.amp
        yield Finding(f"The device is there: {name}, {amp}.")


def disk_space(case: Case) -> Iterator[Finding]:
    """There is room for the checkpoints."""
    config = case.config
    num_bytes = checkpoint_bytes(config, num_classes=case.train.dataset.num_classes)
    # Those kept, an older best.pt, and the new one, which is whole before the oldest goes.
    num_copies = max(config.keep, 1) + 2
    folder = Path(config.out or RUNS).absolute()
    free = free_bytes(folder)
    size = f"{num_copies} checkpoints of {num_bytes / 1e9:.2f} GB"
    if num_copies * num_bytes > free:
        yield Finding(
            f"{size}, and {folder} has {free / 1e9:.2f} GB free.",
            "The run ends when a checkpoint cannot be written.",
            "Free some space, give another --out, or a smaller --keep.",
        )
    else:
        yield Finding(f"There is room for {size} ({free / 1e9:,.1f} GB free).")


def checkpoint_bytes(config: DoctorConfig, *, num_classes: int) -> int:
    """The size of a checkpoint's tensors: weights, moments, the average if any.

    Raises:
        UsageError: if there is no such model, or it does not take the image size.
    """
    with torch.device("meta"):  # shapes without memory
        model = model_for(config, num_classes=num_classes)
        check_image_sizes(model, config)
    copies = 1 + NUM_MOMENTS[config.optimizer] + (config.ema_decay > 0)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return copies * parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def loader_rate(case: Case) -> Iterator[Finding]:
    """The loader keeps up with the training step."""
    config = case.config
    workers = num_workers(config.workers, ranks=config.ranks)
    batch_size = min(config.batch_size, _LOADER_BATCH)
    order = replace(case.order, global_batch_size=batch_size)
    with Progress("doctor: loader", total=1, unit="measurements", quiet=case.quiet) as progress:
        loads = Loads(
            case.train.dataset,
            order,
            build_transform(config, pixels_of(config)),
            batch_size=batch_size,
            seconds=_LOADER_S,
            progress=progress,
        )
        loader = loads.rate(workers).images_per_s
    feeds = f"The loader feeds {loader:,.0f} images/s ({workers} worker{'s' * (workers != 1)})"
    step = step_rate(case) if config.step else None
    if step is None:
        yield Finding(f"{feeds}{'' if config.step else '; --step measures the step, too'}.")
    elif loader < step:
        yield Finding(
            f"{feeds}, the step takes {step:,.0f}.",
            f"The device waits for data {1 - loader / step:.0%} of the time.",
            "More CPU cores or smaller images; wds-convnext bench names the slowest stage.",
        )
    else:
        hours = full_size_images(config, case.order) / (step * config.ranks) / 3600
        yield Finding(
            f"Images/s: loader {loader:,.0f}, step {step:,.0f}; the run takes about {hours:,.1f} h."
        )


def full_size_images(config: TrainConfig, order: TrainOrder) -> float:
    """The images of a run; those that a schedule of sizes makes smaller count by their pixels."""
    sizes, steps = image_sizes(config, order), range(validation_schedule(config, order).last_step)
    return sizes.num_pixels(steps) / sizes.sizes[-1] ** 2 * order.global_batch_size


def step_rate(case: Case) -> float | None:
    """Images/s of one process's step on images of noise; None if the device is not there."""
    config = case.config
    try:
        machine = _machine(config)
    except UsageError:  # `precision` says so
        return None
    num_classes, preprocessing = case.train.dataset.num_classes, pixels_of(config)
    size = preprocessing.image_size
    state, _ = build_state(config, num_classes=num_classes, machine=machine)
    recipe = build_recipe(
        config,
        state,
        num_classes=num_classes,
        machine=machine,
        preprocessing=preprocessing,
    )
    images = torch.randint(256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    batch = Batch(
        images.to(machine.device, memory_format=torch.channels_last),
        torch.zeros(config.batch_size, dtype=torch.int64, device=machine.device),
        torch.ones(config.batch_size, dtype=torch.bool, device=machine.device),
        [],
    )

    def seconds(num_steps: int) -> float:
        started = time.perf_counter()
        for _ in range(num_steps):
            train_step(state, [batch] * config.accumulate, lr=config.min_lr, recipe=recipe)
        state.sums.read()  # waits for the device
        return time.perf_counter() - started

    seconds(_WARMUP_STEPS)
    num_steps = max(1, round(_STEP_S / seconds(1)))
    return num_steps * config.batch_size * config.accumulate / seconds(num_steps)


def _machine(config: DoctorConfig) -> Machine:
    """The machine as a run of one process would see it.

    Raises:
        UsageError: if the device is not there, or does not do what is asked for.
    """
    world, device = join_world(config.device)
    machine = Machine.for_training(world, device, config)
    if config.cuda_graphs:
        require_cuda_graphs(device, compiled=machine.compiled, num_ranks=config.ranks)
    return machine


MACHINE_RULES: tuple[Rule, ...] = (shard_count, precision, disk_space, loader_rate)
