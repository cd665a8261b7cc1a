"""A run as one of its checkpoints describes it: enough to say what it did and will do."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.options import PER_CALL
from wds_convnext.pool import num_cores
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.expand import stated_spec
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.sizes import ImageSizes
from wds_convnext.training.checkpoint import Facts, load_checkpoint, step_and_facts
from wds_convnext.training.rundir import load_newest
from wds_convnext.training.runs import named_run
from wds_convnext.training.sampling import build_weighting
from wds_convnext.training.schedule import image_sizes


@dataclass(frozen=True)
class RecordedRun:
    """What decides a run's steps. Ranks and batches are those of the checkpoint."""

    path: Path  # of the checkpoint
    steps_done: int  # when it was written
    facts: Facts
    config: TrainConfig
    dataset: Dataset
    order: TrainOrder

    @property
    def num_steps(self) -> int:
        """Of all epochs; --max-steps belongs to one start."""
        return self.order.num_steps(self.config.epochs)

    @cached_property
    def image_sizes(self) -> ImageSizes:
        return image_sizes(self.config, self.order)

    @property
    def num_ranks(self) -> int:
        return self.order.global_batch_size // (self.facts.batch_size * self.config.accumulate)

    def layout(self) -> str:
        """Who loaded what, and according to which checkpoint."""
        return (
            f"Ranks and batches are those of {self.path}, saved when {self.steps_done} steps were "
            f"done: {self.num_ranks} rank{'s' * (self.num_ranks > 1)} x {self.config.accumulate} "
            f"batch{'es' * (self.config.accumulate > 1)} x {self.facts.batch_size} samples."
        )


def open_recorded_run(
    named: str | None, *, shards: str | None = None, warn: Callable[[str], None]
) -> RecordedRun:
    """The run of a checkpoint, of a folder's newest, or of the newest run's.

    Args:
        shards: where its training shards are now, if not where they were.
    Raises:
        CheckpointError: if there is no whole checkpoint, or it says too little.
        UsageError: if the shards are not those that the run was trained on.
        ShardError: if they cannot be opened.
    """
    path = named_run(named)
    if path.is_dir() and not any(path.glob("*.pt")):
        raise CheckpointError(
            f"{path}: holds no checkpoint. Name the folder of a run that has saved one, which "
            "--save-every of train decides, or a .pt file."
        )
    if path.is_dir():
        path, checkpoint = load_newest(path, warn=warn)
    else:
        checkpoint = load_checkpoint(path)
    steps_done, facts = step_and_facts(checkpoint, path)
    options = {spec.name for spec in fields(TrainConfig)} - {*PER_CALL}
    config = TrainConfig(**{k: v for k, v in facts.config.items() if k in options})
    spec = shards or (config.shards and stated_spec(config.shards, path.parent))
    if spec is None:
        raise UsageError(f"{path}: does not say where its shards are. Give --shards.")
    dataset = open_dataset(spec, jobs=num_cores(), quiet=False)
    if not dataset.is_meant_by(facts.data.shards):
        raise UsageError(
            f"{spec}: not the shards that {path} was trained on (digest {dataset.digest}, expected "
            f"{facts.data.shards}). Name those with --shards."
        )
    return RecordedRun(
        path=path,
        steps_done=steps_done,
        facts=facts,
        config=config,
        dataset=with_classes(dataset, facts.class_names, of=str(path)),
        order=TrainOrder(
            dataset.sizes,
            seed=facts.data.seed,
            global_batch_size=facts.data.global_batch_size,
            shuffle_buffer=facts.data.shuffle_buffer,
            num_lanes=facts.data.num_lanes,
            weighting=build_weighting(config, dataset),
            repeats=facts.data.repeats,
        ),
    )
