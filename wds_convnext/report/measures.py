"""What predictions are worth: confusion, calibration, and whether two models differ."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wds_convnext.report.kept import Predictions

_NUM_BINS = 15
_MAX_FITTED = 10_000  # samples that a temperature is fitted on
_LOG_TEMPERATURES = math.log(0.05), math.log(20)


class Pair(NamedTuple):
    """Two classes that are confused."""

    label: int
    guess: int
    num_samples: int
    share: float  # of the samples of `label`


def confusion(found: Predictions) -> np.ndarray:
    """Counts by label (row) and guess (column), int64 (num_classes, num_classes)."""
    num_classes = found.log_probabilities.shape[1]
    read = found.is_read
    cells = found.labels[read].astype(np.int64) * num_classes + found.guesses[read]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(counts: np.ndarray, most: int) -> list[Pair]:
    """The pairs with the most samples, the most first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = counts.sum(axis=1)
    best = np.argsort(-wrong, axis=None, kind="stable")[:most]
    cells = [divmod(int(cell), len(counts)) for cell in best]
    return [
        Pair(label, guess, int(wrong[label, guess]), wrong[label, guess] / totals[label])
        for label, guess in cells
        if wrong[label, guess]
    ]


def similar_first(counts: np.ndarray) -> np.ndarray:
    """An order of the classes in which those that are confused stand near each other.

    By the Fiedler vector of the graph of confusions (Atkins, Boman and Hendrickson 1998,
    doi:10.1137/S0097539795285771).
    """
    wrong = (counts + counts.T).astype(np.float64)
    np.fill_diagonal(wrong, 0)
    wrong += 1e-3 / len(wrong)  # one graph, also where no path of confusions leads
    laplacian = np.diag(wrong.sum(axis=1)) - wrong
    _, vectors = np.linalg.eigh(laplacian)
    fiedler = np.round(vectors[:, 1] / np.abs(vectors[:, 1]).max(), 9)
    if fiedler[np.flatnonzero(fiedler)[:1]].sum() > 0:  # its sign has no meaning
        fiedler = -fiedler
    return np.argsort(fiedler, kind="stable")


@dataclass(frozen=True)
class Calibration:
    """Whether samples of a confidence are right as often as it says.

    `counts`, `confidences` and `accuracies` are of the bins, float64 (num_bins,); NaN where a bin
    has no sample. `ece` is the expected calibration error (Guo et al. 2017, arXiv:1706.04599).
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray
    ece: float


def calibration(confidences: np.ndarray, is_right: np.ndarray) -> Calibration:
    """Over 15 bins of equal width."""
    bins = np.clip((confidences * _NUM_BINS).astype(int), 0, _NUM_BINS - 1)
    counts = np.bincount(bins, minlength=_NUM_BINS).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, confidences, minlength=_NUM_BINS) / counts
        accuracy = np.bincount(bins, is_right, minlength=_NUM_BINS) / counts
    ece = float(np.nansum(counts * np.abs(mean - accuracy)) / max(1, len(bins)))
    return Calibration(counts, mean, accuracy, ece)


@dataclass(frozen=True)
class Temperature:
    """The divisor of the logits with the least loss on one half of the samples.

    It is fitted on samples of even numbers; the errors before and after are of the others.
    """

    value: float
    num_fitted: int
    ece_before: float
    ece_after: float


def fit_temperature(found: Predictions) -> Temperature | None:
    """None where one half has no sample."""
    numbers = np.flatnonzero(found.is_read)
    even, odd = numbers[numbers % 2 == 0], numbers[numbers % 2 == 1]
    if not len(even) or not len(odd):
        return None
    chosen = even[np.arange(min(len(even), _MAX_FITTED)) * len(even) // min(len(even), _MAX_FITTED)]
    logits = found.log_probabilities[chosen].astype(np.float32)
    own = found.labels[chosen][:, None]

    def loss(log_temperature: float) -> float:
        rows = logits / math.exp(log_temperature)
        top = rows.max(axis=1, keepdims=True)
        sums = np.log(np.exp(rows - top).sum(axis=1, keepdims=True)) + top
        return float((sums - np.take_along_axis(rows, own, axis=1)).mean(dtype=np.float64))

    value = math.exp(_smallest(loss, *_LOG_TEMPERATURES))
    right = found.is_right[odd]
    rows = found.log_probabilities[odd].astype(np.float32) / value
    rows -= rows.max(axis=1, keepdims=True)
    after = 1 / np.exp(rows).sum(axis=1)
    before = calibration(found.confidences[odd], right)
    return Temperature(value, len(chosen), before.ece, calibration(after, right).ece)


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is smallest, by golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [function(x) for x in inner]
    for _ in range(40):
        if values[0] < values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - ratio * (high - low)
            values[0] = function(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + ratio * (high - low)
            values[1] = function(inner[1])
    return (low + high) / 2


@dataclass(frozen=True)
class Comparison:
    """Two models on the samples that both could read: how often who is right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def num_samples(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first."""
        return (self.only_second - self.only_first) / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference (Agresti and Min 2005, doi:10.1002/sim.1781)."""
        b, c, n = self.only_second + 0.5, self.only_first + 0.5, self.num_samples + 2
        center = (b - c) / n
        half = 1.959964 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
        return max(-1.0, center - half), min(1.0, center + half)

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: of equal models, so uneven changes or more uneven."""
        few, num = min(self.only_first, self.only_second), self.only_first + self.only_second
        log_half = math.log(0.5) * num
        terms = (
            math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) + log_half
            for k in range(few + 1)
        )
        return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def compare(first: Predictions, second: Predictions) -> Comparison:
    """How often who is right, on the samples that both could read."""
    read = first.is_read & second.is_read
    a, b = first.is_right[read], second.is_right[read]
    counts = [(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()]
    return Comparison(*map(int, counts))
