"""What `eval` does: checkpoints evaluated on one split, each as it was trained."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wds_convnext.config import EvalConfig
from wds_convnext.errors import UsageError
from wds_convnext.pool import num_cores
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.training.distributed import Machine, join_world, leave_world
from wds_convnext.training.evaluate import open_evaluation
from wds_convnext.training.feed import loading
from wds_convnext.training.model import check_image_size
from wds_convnext.training.remote import first_on_each_node, follow_evaluation, node_cache
from wds_convnext.training.scores import EvalResult, Score
from wds_convnext.training.stored import StoredModel, open_model


class ViewMean(nn.Module):
    """A model that gives a weighted mean of its logits for views of the images.

    Args:
        tta: `flip`: the images and their mirror images. `flip-shift`: half of the weight goes to
            these shifted by a pixel, up and left, and down and right, the edges reflected (the
            six views and the weights of cifar10-airbench's `infer_mirror_translate`).
    """

    def __init__(self, model: nn.Module, tta: str):
        super().__init__()
        self.model = model
        self.shifts = {0: 1.0} if tta == "flip" else {0: 0.5, -1: 0.25, 1: 0.25}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=images.device)
        for by, weight in self.shifts.items():
            view = shifted(images, by)
            both = self.model(view).float() + self.model(view.flip(-1)).float()
            total = total + weight / 2 * both
        return total


def shifted(images: torch.Tensor, by: int) -> torch.Tensor:
    """Images (B, C, H, W) that begin `by` pixels lower and further right, the edges reflected."""
    if by == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (abs(by),) * 4, mode="reflect")
    start = abs(by) + by
    return padded[..., start : start + height, start : start + width]


def evaluate_checkpoint(config: EvalConfig) -> tuple[EvalResult, dict[str, Any]]:
    """Evaluate a checkpoint; the result, and what was evaluated on what (plain values)."""
    (score,) = evaluate_checkpoints([config.checkpoint], config)
    return score.result, score.about


def evaluate_checkpoints(named: Sequence[str | None], config: EvalConfig) -> list[Score]:
    """Evaluate checkpoints on one split: that of the config, else the first one's own.

    Args:
        named: files, run folders or exported folders; None for the newest run.
        config: how; its `checkpoint` does not count.
    """
    world, device = join_world(config.device)
    try:
        machine = Machine.of(world, device, amp=config.amp)
        models = [open_model(name) for name in named]  # mapped: they take no memory
        spec = config.shards or models[0].val_shards
        if spec is None:
            raise UsageError(f"{models[0].path}: names no validation shards. Give --shards.")
        with node_cache(config, [spec], world):
            dataset = first_on_each_node(
                lambda: open_dataset(spec, use="validation", jobs=num_cores(), quiet=False),
                [spec],
                world,
            )
            splits = [with_classes(dataset, m.class_names, of=str(m.path)) for m in models]
            return [_evaluate_one(*pair, config, machine) for pair in zip(models, splits)]
    finally:
        leave_world(world)


def _evaluate_one(
    stored: StoredModel, dataset: Dataset, config: EvalConfig, machine: Machine
) -> Score:
    model = stored.build()
    preprocessing = replace(
        stored.preprocessing,
        image_size=config.image_size or stored.preprocessing.image_size,
        crop_ratio=config.crop or stored.preprocessing.crop_ratio,
    )
    if config.image_size is not None:
        check_image_size(model, config.image_size)
    model = machine.place(model)
    about = {
        "model": stored.name,
        "weights": stored.weights,
        "checkpoint": str(stored.path),
        "step": stored.step,
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
        decoder=config.decoder,
    )
    forward = model if config.tta == "none" else ViewMean(model, config.tta)
    pace = follow_evaluation(dataset, config.batch_size, machine.world)
    with loading(evaluation.stream, config.workers, machine, pace=pace) as batches:
        return Score(evaluation.run(forward, batches), about)
