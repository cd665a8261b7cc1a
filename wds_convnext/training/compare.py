"""What `eval` does: checkpoints evaluated on one split, each as it was trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wds_convnext.config import EvalConfig
from wds_convnext.errors import UsageError
from wds_convnext.pool import num_cores
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.training.checkpoint import (
    load_checkpoint,
    load_weights,
    step_and_facts,
    taking_over,
)
from wds_convnext.training.distributed import Machine, join_world, leave_world
from wds_convnext.training.evaluate import open_evaluation
from wds_convnext.training.feed import loading
from wds_convnext.training.model import check_image_size, create_model
from wds_convnext.training.runs import best_checkpoint
from wds_convnext.training.scores import EvalResult, Score


class FlipMean(nn.Module):
    """A model that gives the mean of its logits for images and for their mirror images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.model(images).float() + self.model(images.flip(-1)).float()) / 2


def evaluate_checkpoint(config: EvalConfig) -> tuple[EvalResult, dict[str, Any]]:
    """Evaluate a checkpoint; the result, and what was evaluated on what (plain values)."""
    (score,) = evaluate_checkpoints([config.checkpoint], config)
    return score.result, score.about


def evaluate_checkpoints(named: Sequence[str | None], config: EvalConfig) -> list[Score]:
    """Evaluate checkpoints on one split: that of the config, else the first one's own.

    Args:
        named: files or run folders; None for the newest run.
        config: how; its `checkpoint` does not count.
    """
    world, device = join_world(config.device)
    try:
        machine = Machine.of(world, device, amp=config.amp)
        paths = [best_checkpoint(name) for name in named]
        checkpoints = [load_checkpoint(path) for path in paths]  # mapped: they take no memory
        facts = [step_and_facts(c, path)[1] for c, path in zip(checkpoints, paths)]
        spec = config.shards or facts[0].val_shards
        if spec is None:
            raise UsageError(f"{paths[0]}: its run had no validation shards. Give --shards.")
        dataset = open_dataset(spec, use="validation", jobs=num_cores(), quiet=False)
        splits = [with_classes(dataset, f.class_names, of=str(p)) for f, p in zip(facts, paths)]
        return [
            _evaluate_one(path, checkpoint, split, config, machine)
            for path, checkpoint, split in zip(paths, checkpoints, splits)
        ]
    finally:
        leave_world(world)


def _evaluate_one(
    path: Path,
    checkpoint: dict[str, Any],
    dataset: Dataset,
    config: EvalConfig,
    machine: Machine,
) -> Score:
    step, facts = step_and_facts(checkpoint, path)
    model = create_model(facts.model, num_classes=facts.num_classes)
    preprocessing = replace(
        facts.preprocessing,
        image_size=config.image_size or facts.preprocessing.image_size,
        crop_ratio=config.crop or facts.preprocessing.crop_ratio,
    )
    if config.image_size is not None:
        check_image_size(model, config.image_size)
    model = model.to(machine.device)
    with taking_over():
        load_weights(model, checkpoint)
    about = {
        "model": facts.model,
        "weights": "ema" if checkpoint.get("ema") else "model",
        "checkpoint": str(path),
        "step": step,
        "dataset": dataset.name,
        "split": dataset.split,
        "image_size": preprocessing.image_size,
        "crop": preprocessing.crop_ratio,
        "tta": config.tta,
    }
    evaluation = open_evaluation(
        dataset,
        batch_size=config.batch_size,
        preprocessing=preprocessing,
        machine=machine,
        max_bad_samples=config.max_bad_samples,
        flag="--max-bad-samples",
    )
    forward = FlipMean(model) if config.tta == "flip" else model
    with loading(evaluation.stream, config.workers, machine) as batches:
        return Score(evaluation.run(forward, batches), about)
