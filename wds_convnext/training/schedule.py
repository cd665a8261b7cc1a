"""What a run does when: the learning rate of each step, the validations and the last step."""

import math
from collections.abc import Callable
from functools import partial

from wds_convnext.config import REFERENCE_LR, WARMUP_EPOCHS, TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.stream.order import TrainOrder, ValidationSchedule
from wds_convnext.stream.sizes import ImageSizes


def lr_schedule(config: TrainConfig, order: TrainOrder) -> Callable[[int], float]:
    """The learning rate of a step of a run."""
    assert config.warmup_epochs is not None  # a config fills it in
    return partial(
        lr_at,
        lr=scaled_lr(
            config.lr,
            rule=config.scale_lr,
            global_batch_size=order.global_batch_size,
            reference_batch_size=config.reference_batch_size,
        ),
        total_steps=order.num_steps(config.epochs),
        warmup_steps=round(config.warmup_epochs * order.num_samples / order.global_batch_size),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
    )


def validation_schedule(config: TrainConfig, order: TrainOrder) -> ValidationSchedule:
    """After which steps of a run the model is validated, and which is its last."""
    last_step = order.num_steps(config.epochs)
    if config.max_steps is not None:
        last_step = min(last_step, config.max_steps)
    return ValidationSchedule(order, every=config.val_every, last_step=last_step)


def image_sizes(config: TrainConfig, order: TrainOrder) -> ImageSizes:
    """Which image size each step of a run has.

    Raises:
        UsageError: if a size of the schedule has no step.
    """
    shares, sizes = zip(*config.size_shares)
    num_steps = order.num_steps(config.epochs)
    first_steps = tuple(round(share * num_steps) for share in shares)
    for size, first, end in zip(sizes, first_steps, (*first_steps[1:], num_steps), strict=True):
        if first == end:
            raise UsageError(
                f"--image-size-schedule {config.image_size_schedule}: no step of the run's "
                f"{num_steps:,} has {size} px. Leave that size out, or train for more --epochs."
            )
    return ImageSizes(sizes, first_steps)


def lr_warning(config: TrainConfig, global_batch_size: int) -> str | None:
    """What both scaling rules would make of the ConvNeXt recipe's rate, if it is used unscaled.

    Another rate is taken as chosen for the batch that it is used with.
    """
    reference = config.reference_batch_size
    unscaled = config.scale_lr == "none" and global_batch_size != reference
    if not unscaled or config.lr != REFERENCE_LR:
        return None
    linear, sqrt = (
        scaled_lr(
            config.lr,
            rule=rule,
            global_batch_size=global_batch_size,
            reference_batch_size=reference,
        )
        for rule in ("linear", "sqrt")
    )
    return (
        f"--lr {config.lr:g} belongs to a global batch of {reference}, this run's is "
        f"{global_batch_size}: --scale-lr linear would make it {linear:.2e}, sqrt {sqrt:.2e}."
    )


def schedule_notes(config: TrainConfig, order: TrainOrder) -> list[str]:
    """Sentences about a learning rate that does not go the usual way: up in 5 epochs, then down."""
    warmup, notes = config.warmup_epochs or 0.0, []
    if config.epochs <= 3 * WARMUP_EPOCHS and warmup == config.epochs / 10:
        notes.append(f"Warm-up: {warmup:g} epochs, a tenth of the run (--warmup-epochs).")
    if warmup >= config.epochs:
        notes.append(
            f"The learning rate only rises: --warmup-epochs {warmup:g} is not less than "
            f"--epochs {config.epochs}. Give less, or leave it out for a tenth of the run."
        )
    num_steps = order.num_steps(config.epochs)
    if config.max_steps and config.max_steps < num_steps:
        last = lr_schedule(config, order)(config.max_steps - 1)
        notes.append(
            f"--max-steps {config.max_steps} ends the schedule of {num_steps:,} steps early: "
            f"the last learning rate is {last:.2e}, not {config.min_lr:.2e}."
        )
    return notes


def lr_at(
    step: int,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int,
    warmup_lr: float,
    min_lr: float,
) -> float:
    """Learning rate of step 0 <= step < total_steps: a linear warm-up, then a cosine.

    It is `warmup_lr` at step 0, `lr` at step `warmup_steps`, `min_lr` at step total_steps - 1,
    each exactly. With no warm-up step 0 has `lr`; a cosine of a single step is `lr`; a run that
    ends within its warm-up stays on the ramp. Later steps keep `min_lr`.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    weight = 0.5 * (1 + math.cos(math.pi * progress))
    return weight * lr + (1 - weight) * min_lr


def scaled_lr(lr: float, *, rule: str, global_batch_size: int, reference_batch_size: int) -> float:
    """The learning rate for `global_batch_size`, given the one for `reference_batch_size`.

    Args:
        rule: "none" keeps `lr`; "linear" and "sqrt" scale it with the ratio of the batch sizes
            (arXiv:1706.02677, arXiv:1404.5997).
    Raises:
        ValueError: if the rule is another.
    """
    ratio = global_batch_size / reference_batch_size
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}
    if rule not in factors:
        raise ValueError(f"learning-rate rule {rule!r}: expected one of {', '.join(factors)}.")
    return lr * factors[rule]
