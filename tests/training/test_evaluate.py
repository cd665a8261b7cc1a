"""Evaluation counts exactly: each real sample once, the padding never."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wds_convnext.errors import DataError
from wds_convnext.stream.stream import Batch
from wds_convnext.training.augment import Normalizer
from wds_convnext.training.distributed import World
from wds_convnext.training.evaluate import EvalResult, evaluate_batches

CPU = torch.device("cpu")


class FirstPixels(nn.Module):
    """Takes the first `num_classes` values of each image as its logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        assert not self.training
        return images.flatten(1)[:, : self.num_classes]


def random_batches(num_samples: int, *, batch_size: int, num_classes: int, seed=0) -> list[Batch]:
    """Full batches; what fills the last one is not real, but has hits among its labels."""
    rng = torch.Generator().manual_seed(seed)
    num_batches = -(-num_samples // batch_size)
    images = torch.randint(256, (num_batches * batch_size, 3, 4, 4), generator=rng).to(torch.uint8)
    labels = torch.randint(num_classes, (num_batches * batch_size,), generator=rng)
    is_real = torch.arange(num_batches * batch_size) < num_samples
    columns = zip(*(tensor.split(batch_size) for tensor in (images, labels, is_real)))
    return [Batch(*column, []) for column in columns]


def run(batches: list[Batch], *, num_classes: int, model_class=FirstPixels) -> EvalResult:
    return evaluate_batches(
        model_class(num_classes),
        batches,
        num_classes=num_classes,
        normalizer=Normalizer((0, 0, 0), (1, 1, 1), CPU),
        autocast=nullcontext,
        world=World(),
    )


def by_hand(batches: list[Batch], *, num_classes: int) -> EvalResult:
    """One sample at a time, in float64 numpy."""
    top1 = top5 = num_samples = 0
    losses = []
    for batch in batches:
        for image, label, is_real in zip(*batch[:3]):
            if is_real:
                logits = image.double().flatten()[:num_classes].numpy() / 255
                better = int((logits > logits[label]).sum())
                top1 += better < 1
                top5 += better < 5
                losses.append(np.log(np.exp(logits).sum()) - logits[label])
                num_samples += 1
    return EvalResult(top1 / num_samples, top5 / num_samples, float(np.mean(losses)), num_samples)


@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    num_classes=st.sampled_from([2, 3, 5, 6, 11]),
    seed=st.integers(0, 10**6),
)
def test_counts_are_those_made_by_hand(num_samples, batch_size, num_classes, seed):
    """For any split, batch size and number of classes, fewer than five too."""
    batches = random_batches(num_samples, batch_size=batch_size, num_classes=num_classes, seed=seed)
    batches = [batch._replace(images=distinct(batch.images)) for batch in batches]

    result = run(batches, num_classes=num_classes)

    expected = by_hand(batches, num_classes=num_classes)
    assert (result.top1, result.top5) == (expected.top1, expected.top5)
    assert result.num_samples == num_samples
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)


def distinct(images: torch.Tensor) -> torch.Tensor:
    """The same order of values within each image, but no two alike."""
    ranks = images.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks * 5).to(torch.uint8).view_as(images)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 64])
def test_the_batch_size_does_not_change_the_result(batch_size):
    """20 samples in any batches; sums are in float64, so only the order of the sum differs."""
    whole = random_batches(20, batch_size=20, num_classes=6)[0]
    padded = random_batches(20, batch_size=batch_size, num_classes=6, seed=1)
    columns = []
    for tensor, filled in zip(whole[:3], zip(*(batch[:3] for batch in padded))):
        columns.append(torch.cat([tensor, torch.cat(filled)[20:]]).split(batch_size))

    result = run([Batch(*column, []) for column in zip(*columns)], num_classes=6)

    expected = run([whole], num_classes=6)
    assert (result.top1, result.top5) == (expected.top1, expected.top5)
    assert result.num_samples == 20
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)


class BlankIsNan(FirstPixels):
    """Gives NaN for a blank image, as a model that normalizes each image may."""

    def forward(self, images):
        logits = super().forward(images)
        return logits / (logits != 0).any(dim=1, keepdim=True)


def test_padding_never_counts_whatever_the_model_makes_of_it():
    """Blank images fill the last batch; a NaN among their losses must not reach the mean."""
    batch = random_batches(3, batch_size=5, num_classes=6)[0]
    batch.images[3:] = 0

    result = run([batch], num_classes=6, model_class=BlankIsNan)

    expected = by_hand([batch], num_classes=6)
    assert (result.top1, result.top5) == (expected.top1, expected.top5)
    assert result.num_samples == 3
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)


def test_with_fewer_than_five_classes_top5_is_all():
    """There are only so many guesses."""
    result = run(random_batches(9, batch_size=4, num_classes=3), num_classes=3)

    assert result.top5 == 1.0
    assert result.top1 < 1.0


def test_a_loss_that_is_not_finite_shows():
    """A sample that counts may spoil the mean: it is not hidden."""
    batch = random_batches(4, batch_size=4, num_classes=6)[0]
    batch.images[1] = 0

    result = run([batch], num_classes=6, model_class=BlankIsNan)

    assert np.isnan(result.loss)


def test_a_split_without_a_real_sample_is_an_error():
    """Where every sample failed to decode there is no accuracy to report."""
    batch = random_batches(4, batch_size=4, num_classes=6)[0]
    batch.is_real[:] = False

    with pytest.raises(DataError, match="nothing to evaluate"):
        run([batch], num_classes=6)


@pytest.mark.parametrize(
    ("hits", "num_samples", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(hits, num_samples, low, high):
    """Published values, to their four digits; mirrored for the misses."""
    result = EvalResult(hits / num_samples, 1.0, 0.0, num_samples)
    mirrored = EvalResult(1 - hits / num_samples, 1.0, 0.0, num_samples)

    assert result.top1_interval == pytest.approx((low, high), abs=5e-5)
    assert mirrored.top1_interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(num_samples=st.integers(1, 10**6), share=st.floats(0, 1))
def test_the_interval_holds_the_accuracy_and_stays_between_0_and_1(num_samples, share):
    """For every possible count."""
    top1 = round(share * num_samples) / num_samples

    low, high = EvalResult(top1, 1.0, 0.0, num_samples).top1_interval

    assert 0 <= low <= top1 + 1e-12
    assert top1 - 1e-12 <= high <= 1
    assert low < high
