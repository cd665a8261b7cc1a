"""Whether a checkpoint, options, data and ranks fit each other."""

import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace

from wds_convnext.config import TrainConfig
from wds_convnext.config.fields import flag_of
from wds_convnext.errors import CheckpointError, TrainingError, listing
from wds_convnext.shards.classes import class_difference
from wds_convnext.training.checkpoint import Facts
from wds_convnext.training.distributed import World, gather_lists

# Options that each rank may have its own of: what those of data and arithmetic come to is compared
# as data or environment, the others change no weight.
_OF_A_RANK = (
    "shards",
    "val_shards",
    "workers",
    "device",
    "amp",
    "compile",
    "cuda_graphs",
    "out",
    "resume",
    "cache_dir",  # each machine has a disk of its own
    "cache_size",
    "remote_timeout",
)
_WEIGHTING = "weights (--balance, --mixture, --epoch-samples) of digest"
# Options that may differ on a resume without changing a bit of the weights. (Of the batch size,
# the global batch is compared.)
_FREE_OPTIONS = (
    *_OF_A_RANK,
    "batch_size",
    "max_steps",
    "max_bad_samples",
    "max_bad_val_samples",
    "on_nonfinite",
    "max_skips",
    "init_from",
    "pretrained",
    "early_stop",
    "log_every",
    "val_every",
    "save_every",
    "keep",
    "check_shards",
    "decoder",  # what it comes to is compared as environment
    "profile",
    "overwrite",
)


def fit_to_checkpoint(
    config: TrainConfig, then: Facts, world: World, *, stated: int | None
) -> TrainConfig:
    """The config with the batch per process that gives the checkpoint's global batch.

    Args:
        stated: the batch per process in the run's config.toml, which is of its last start: after a
            change of ranks neither the checkpoint's nor what this start needs. Nobody asks for it.
    Raises:
        CheckpointError: if the ranks do not divide it, or the options ask for another one.
    """
    global_batch_size = then.data.global_batch_size
    if config.batch_size * config.accumulate * world.size == global_batch_size:
        return config
    batch_size, rest = divmod(global_batch_size, config.accumulate * world.size)
    if rest or config.batch_size not in (then.batch_size, stated):
        raise CheckpointError(
            f"--resume: the checkpoint's global batch is {global_batch_size}; {world.size} "
            f"processes with --batch-size {config.batch_size} and --accumulate "
            f"{config.accumulate} do not make it. Choose a product that does, or start from "
            "scratch without --resume, in another --out."
        )
    return replace(config, batch_size=batch_size)


def check_resumable(then: Facts, now: Facts, *, warn: Callable) -> None:
    """Compare what a checkpoint was trained on and with to what it is resumed with.

    Raises:
        CheckpointError: if the stream of samples or the model would be another.
    """
    # An older version did without an option what the option's default does.
    defaults = {spec.name: spec.default for spec in fields(TrainConfig)}
    then = replace(then, config=defaults | {**then.config})
    differences = list(then.differences(now))
    for part, name, old, new in differences:
        if part == "class_names":
            raise CheckpointError(
                f"--resume: the checkpoint's classes are others: {class_difference(new, old)}. "
                "Resume on the data set that it was trained on, or start from scratch without "
                "--resume, in another --out, with --init-from."
            )
        if part == "model":
            raise CheckpointError(
                f"--resume: the checkpoint is of {name} {old}, this run has {new}. Start from "
                "scratch without --resume, in another --out."
            )
        # By their names: the folder may have moved, and version 0.1.0 stored relative paths.
        is_source = name in ("init_from", "pretrained")
        if is_source and new and os.path.basename(new) != os.path.basename(old or ""):
            flag = flag_of(name)
            raise CheckpointError(
                f"{flag} {new}: a run that is resumed goes on with its own weights (it "
                f"started from {old or 'fresh ones'}). Leave {flag} out, or start from "
                "scratch without --resume, in another --out."
            )
        if name == "optimizer":
            raise CheckpointError(
                f"--resume: the checkpoint has --optimizer {old}, this run {new}, which cannot go "
                "on with its moments. Resume with the same, or start from scratch without "
                "--resume, in another --out, with --init-from."
            )
        if name in ("freeze", "layer_decay", "head_lr") and old != new:
            raise CheckpointError(
                f"--resume: the checkpoint has {flag_of(name)} {old}, this run {new}: what is "
                "trained together cannot change in mid-run. Resume with the same, or start from "
                "scratch without --resume, in another --out, with --pretrained."
            )
        if name == "ema_decay" and bool(old) != bool(new):
            raise CheckpointError(
                f"--resume: the checkpoint has --ema-decay {old:g}, this run {new:g}: an average "
                "cannot begin or end in mid-run. Resume with the same, or start from scratch "
                "without --resume, in another --out."
            )
    of_data = [
        f"{_WEIGHTING if d.name == 'weighting' else d.name} {d.then} (now {d.now})"
        for d in differences
        if d.part == "data"
    ]
    if of_data:
        raise CheckpointError(
            f"--resume: the checkpoint's stream of samples had {', '.join(of_data)}. Resume with "
            "the same, or start from scratch without --resume, in another --out."
        )
    free: tuple[str, ...] = _FREE_OPTIONS
    if then.config.get("scale_lr") == now.config.get("scale_lr") == "none":
        free += ("reference_batch_size",)
    free += ("image_size", "crop", "crop_mode", "interpolation", "mean", "std")
    for part, name, old, new in differences:
        is_pixels = part == "preprocessing"  # which these options come to
        if is_pixels or part == "environment" or (part == "config" and name not in free):
            warn(
                f"Resuming with {name} {new}, the checkpoint had {old}: "
                "the run goes on, but not bit for bit as it would have."
            )


def check_ranks(facts: Facts, *, step: int, val_shards: str | None, world: World) -> None:
    """Compare what all ranks are about to do, before the first of them waits for another in vain.

    Args:
        step: from which this rank goes on.
        val_shards: the digest of its validation split.
    Raises:
        TrainingError: on all ranks, naming the first that is not as rank 0, and in what.
    """
    environment = {k: v for k, v in facts.environment.items() if k not in ("device", "num_threads")}
    options = {k: v for k, v in facts.config.items() if k not in _OF_A_RANK}
    own = {
        "the step it starts at": step,
        **{f"{name} of the training data": value for name, value in asdict(facts.data).items()},
        "shards of the validation data": val_shards,
        "class names": facts.class_names,
        **environment,
        **options,
    }
    first, *others = gather_lists([own], world)
    for rank, theirs in enumerate(others, start=1):
        differing = [f"{k} ({theirs[k]}, not {first[k]})" for k in own if theirs[k] != first[k]]
        if differing:
            raise TrainingError(
                f"rank {rank} differs from rank 0 in {listing(differing, limit=4)}. Start all "
                "ranks with the same options on the same shards, in an --out that all machines "
                "share."
            )
