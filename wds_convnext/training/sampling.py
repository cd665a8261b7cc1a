"""How often samples come in an epoch, as the options say: --balance, --mixture, --epoch-samples."""

import math
import os
from dataclasses import replace

import numpy as np

from wds_convnext.config import TrainConfig
from wds_convnext.door import read_json
from wds_convnext.errors import UsageError, listing
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.expand import absolute_spec, expand_spec
from wds_convnext.stream.weighting import Weighting, apportion


def build_weighting(config: TrainConfig, dataset: Dataset) -> Weighting | None:
    """The groups of a data set's samples and their shares of an epoch; None without such options.

    Raises:
        UsageError: if weights cannot be read or do not fit the data set, or an epoch is so short
            that a group with a weight would get nothing of it.
    """
    if config.mixture:
        names, group, weights = _by_set(config.mixture_parts, dataset)
        flag = "--mixture"
    elif config.balance != "none":
        names, group = dataset.class_names, dataset.labels
        sizes = np.bincount(group, minlength=dataset.num_classes)
        weights = _class_weights(config.balance, dataset, sizes)
        flag = f"--balance {config.balance}"
    elif config.epoch_samples:
        names, group, weights = ("all samples",), np.zeros(len(dataset), np.int32), [1.0]
        flag = "--epoch-samples"
    else:
        return None
    shares = apportion(weights, config.epoch_samples or len(dataset))
    if short := [name for name, w, share in zip(names, weights, shares) if w and not share]:
        raise UsageError(
            f"{flag}: of an epoch of {shares.sum():,} samples {listing(short, limit=3)} would get "
            "none. Give a larger --epoch-samples, or other weights."
        )
    return Weighting(np.asarray(group, np.int32), shares, config.seed)


def describe(weighting: Weighting) -> str:
    """One sentence on what an epoch is, for the beginning of a run."""
    has_samples = weighting.sizes > 0
    times = weighting.shares[has_samples] / weighting.sizes[has_samples]
    rarest, most = math.floor(times.min()), math.ceil(times.max())
    often = f"{rarest} to {most} times" if most > rarest else f"{most} times"
    return (
        f"An epoch has {weighting.epoch_size:,} samples, in exact shares of {len(times):,} groups; "
        f"a sample comes {often} in it."
    )


def with_absolute_weights(config: TrainConfig) -> TrainConfig:
    """The config, its files of weights and its sets named for any working directory."""
    if config.balance not in ("none", "classes", "sqrt"):
        config = replace(config, balance=os.path.abspath(config.balance))
    if config.mixture:
        parts = config.mixture_parts.items()
        mixture = ",".join(f"{absolute_spec(spec)}={weight:g}" for spec, weight in parts)
        config = replace(config, shards=None, mixture=mixture)
    return config


def _by_set(
    parts: dict[str, float], dataset: Dataset
) -> tuple[tuple[str, ...], np.ndarray, list[float]]:
    """The sets of a mixture, the set of each sample, and the weight of each set."""
    set_of_path = {
        os.path.normpath(path): number
        for number, spec in enumerate(parts)
        for path in expand_spec(spec)
    }
    of_shard = [set_of_path[os.path.normpath(shard.path)] for shard in dataset.shards]
    return tuple(parts), np.repeat(np.array(of_shard, np.int32), dataset.sizes), [*parts.values()]


def _class_weights(balance: str, dataset: Dataset, sizes: np.ndarray) -> list[float]:
    if balance == "classes":
        return (sizes > 0).astype(np.float64).tolist()
    if balance == "sqrt":
        return np.sqrt(sizes).tolist()
    weights = read_class_weights(balance, dataset.class_names)
    for name, weight, size in zip(dataset.class_names, weights, sizes):
        if weight and not size:
            raise UsageError(
                f"--balance {balance}: class {name} has a weight of {weight:g} and no training "
                "samples. Give it 0."
            )
    return weights


def read_class_weights(
    path: str, class_names: tuple[str, ...], *, flag: str = "--balance"
) -> list[float]:
    """The weights of all classes, in their order, from a JSON object by class name.

    Raises:
        UsageError: if it cannot be read, names other classes, or has weights that are none.
    """
    try:
        weights = read_json(path, {})
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: {error.strerror}. Expected a JSON file of weights by "
            f"class name, or a word that --help lists."
        ) from None
    except ValueError as error:
        raise UsageError(f'{flag} {path}: {error}. Expected {{"class name": weight, …}}.') from None
    missing = [name for name in class_names if name not in weights]
    unknown = [name for name in weights if name not in class_names]
    if missing or unknown:
        what = "does not name class" if missing else "the data set has no class"
        raise UsageError(
            f"{flag} {path}: {what} {listing(missing or unknown, limit=3)}. Give each class of "
            "the data set a weight; 0 leaves it out."
        )
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise UsageError(
                f"{flag} {path}: weight {weight!r} of {name}; expected a number from 0 on."
            )
    if not any(weights.values()):
        raise UsageError(f"{flag} {path}: all weights are 0. Give some class more.")
    return [float(weights[name]) for name in class_names]
