"""Options of the optimizer and its schedule."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import COUNT, NON_NEGATIVE, POSITIVE, Config, FiniteRange, option

# lr 4e-3 belongs to global batch 4096 (facebookresearch/ConvNeXt, TRAINING.md).
REFERENCE_LR, REFERENCE_BATCH_SIZE = 4e-3, 4096


@dataclass(frozen=True)
class OptimizationOptions(Config):
    """How long, and by which steps."""

    epochs: int = option(300, "Passes over the training samples.", group="Optimization", type=COUNT)
    max_steps: int | None = option(
        None,
        "Stop after so many steps; the schedule stays that of --epochs. 0 validates and saves "
        "the starting weights.",
        group="Optimization",
        type=click.IntRange(min=0),
    )
    early_stop: int | None = option(
        None,
        "Finish after so many validations in a row without a better accuracy.",
        group="Optimization",
        type=COUNT,
    )
    batch_size: int = option(
        160, "Samples per batch and process.", group="Optimization", type=COUNT
    )
    accumulate: int = option(1, "Batches per optimizer step.", group="Optimization", type=COUNT)
    optimizer: str = option(
        "adamp",
        "adamp, or timm's adamw, sgd (Nesterov's), lion or muon. --lr is meant for adamp and "
        "adamw; sgd adds weight decay to the gradient.",
        group="Optimization",
        type=click.Choice(["adamp", "adamw", "sgd", "lion", "muon"]),
    )
    momentum: float | None = option(
        None,
        "Momentum of sgd and muon. Default: 0.9.",
        group="Optimization",
        type=FiniteRange(0, 1, max_open=True),
    )
    loss: str = option(
        "ce",
        "Cross-entropy, or binary cross-entropy of each class (as in DeiT III).",
        group="Optimization",
        type=click.Choice(["ce", "bce"]),
    )
    class_weights: str = option(
        "none",
        "Factors on classes in the loss: none, balanced (inverse to their sizes), or a JSON file "
        "of factors by class name.",
        group="Optimization",
    )
    lr: float = option(REFERENCE_LR, "Peak learning rate.", group="Optimization", type=POSITIVE)
    scale_lr: str = option(
        "none",
        "Scale --lr with the global batch: with its ratio to --reference-batch-size, or with the "
        "ratio's square root.",
        group="Optimization",
        type=click.Choice(["none", "linear", "sqrt"]),
    )
    reference_batch_size: int = option(
        REFERENCE_BATCH_SIZE,
        "Global batch size that --lr was chosen for; 4e-3 belongs to 4096 "
        "(facebookresearch/ConvNeXt, TRAINING.md).",
        group="Optimization",
        type=COUNT,
    )
    layer_decay: float | None = option(
        None,
        "Factor on the learning rate from each of timm's layers to the one below it.",
        group="Optimization",
        type=FiniteRange(0, 1, min_open=True),
    )
    head_lr: float | None = option(
        None,
        "Peak learning rate of the classifier, on the schedule of --lr. Default: --lr.",
        group="Optimization",
        type=POSITIVE,
    )
    weight_decay: float = option(
        0.05,
        "Decoupled decay of tensors with more than one dimension.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    warmup_epochs: float | None = option(
        None,
        "Epochs in which the learning rate rises linearly. Default: 5, or a tenth of a run of "
        "at most 15 epochs.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    warmup_lr: float = option(
        1e-6, "Learning rate of the first step.", group="Optimization", type=NON_NEGATIVE
    )
    min_lr: float = option(
        2e-6, "Learning rate of the last step.", group="Optimization", type=NON_NEGATIVE
    )
    clip_grad_norm: float = option(
        1.0,
        "Largest norm of all gradients together; 0 for no limit.",
        group="Optimization",
        type=NON_NEGATIVE,
    )
    on_nonfinite: str = option(
        "stop",
        "When a loss or gradient is not finite: end the run, or leave that step out.",
        group="Optimization",
        type=click.Choice(["stop", "skip"]),
    )
    max_skips: int = option(
        10,
        "Steps in a row that --on-nonfinite skip may leave out; one more ends the run.",
        group="Optimization",
        type=COUNT,
    )
