"""What is minimized: cross-entropy or BCE on soft targets, with or without weights of classes."""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from wds_convnext.config import TrainConfig
from wds_convnext.shards.dataset import Dataset
from wds_convnext.training.sampling import read_class_weights


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    `ce` is the mean over samples of -sum(targets * log softmax(logits)). `bce` takes every class
    that a target has something of as present, and each class as a question of its own: the mean
    over samples and classes (DeiT III, arXiv:2204.07118; Beyer et al. 2020, arXiv:2006.07159).

    Args:
        class_weights: factors on the terms of classes, float32 (K,), on the device of the logits.
    """

    name: str = "ce"
    class_weights: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """0-d float32, whatever the precision of logits (B, K); targets are float32 (B, K)."""
        logits = logits.float()
        if self.name == "bce":
            present = (targets > 0).float()
            return F.binary_cross_entropy_with_logits(logits, present, weight=self.class_weights)
        return F.cross_entropy(logits, targets, weight=self.class_weights)


def class_weights(config: TrainConfig, dataset: Dataset) -> list[float] | None:
    """The factor of each class in the loss; None if all have the same.

    `balanced` is num_samples / (num_classes * samples of the class), as in scikit-learn: a factor
    of 1 in the mean over the samples. A class without samples has 1.

    Raises:
        UsageError: if a file of weights cannot be read or does not fit the classes.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights != "balanced":
        return read_class_weights(config.class_weights, dataset.class_names, flag="--class-weights")
    sizes = np.bincount(dataset.labels, minlength=dataset.num_classes)
    balanced = sizes.sum() / (np.count_nonzero(sizes) * np.maximum(sizes, 1))
    return np.where(sizes > 0, balanced, 1.0).tolist()


def weights_digest(weights: list[float]) -> str:
    """Identifies weights of classes."""
    return hashlib.sha256(np.asarray(weights, "<f8").tobytes()).hexdigest()[:16]


def with_absolute_class_weights(config: TrainConfig) -> TrainConfig:
    """The config, its file of class weights named for any working directory."""
    if config.class_weights in ("none", "balanced"):
        return config
    return replace(config, class_weights=os.path.abspath(config.class_weights))
