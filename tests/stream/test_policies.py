"""Augmentation policies: torchvision's pixels, given the draws."""

import numpy as np
import pytest
import torch
from conftest import encode_image
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.stream.policies import (
    RandAugment,
    ThreeAugment,
    TrivialAugment,
    apply,
    parse_policy,
)
from wds_convnext.stream.transforms import TrainTransform

draw = st.floats(0, 1, exclude_max=True)


def picture(seed: int, height: int, width: int) -> torch.Tensor:
    """In the memory layout that the resize gives: a pixel's three bytes side by side."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=rng)
    return pixels.permute(2, 0, 1)


class Told:
    """Answers torch.randint and torch.rand, in turn, as if they had drawn these numbers."""

    def __init__(self, monkeypatch, draws):
        self.draws = iter(draws)
        monkeypatch.setattr(torch, "randint", self.randint)
        monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(next(self.draws)))

    def randint(self, high, size):
        return torch.tensor(int(next(self.draws) * high))


@pytest.mark.parametrize("operation", range(14))
@pytest.mark.parametrize(("magnitude", "sign"), [(0.0, 0.9), (0.35, 0.1), (0.99, 0.9)])
def test_trivial_augment_is_torchvisions(operation, magnitude, sign, monkeypatch):
    draws = np.array([(operation + 0.5) / 14, magnitude, sign])
    image = picture(operation, 40, 40)
    ours = apply(image, TrivialAugment().choose(draws, 40))

    Told(monkeypatch, draws.tolist())
    theirs = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)(image)

    assert torch.equal(ours, theirs)


@settings(max_examples=40)
@given(
    draws=st.lists(draw, min_size=6, max_size=6),
    magnitude=st.integers(0, 30),
    size=st.sampled_from([8, 33, 64]),
)
def test_rand_augment_is_torchvisions(draws, magnitude, size):
    draws, image = np.array(draws), picture(magnitude, size, size)
    ours = apply(image, RandAugment(magnitude, num_ops=3).choose(draws, size))

    with pytest.MonkeyPatch.context() as monkeypatch:
        Told(monkeypatch, _without_unused(draws))
        theirs = v2.RandAugment(3, magnitude, interpolation=v2.InterpolationMode.BILINEAR)(image)

    assert torch.equal(ours, theirs)


def _without_unused(draws) -> list[float]:
    """torchvision draws no sign for an operation that has none."""
    told = []
    for operation, sign in draws.reshape(-1, 2).tolist():
        told += [operation, sign] if 1 <= int(operation * 14) < 10 else [operation]
    return told


def test_three_augment_grays_solarizes_and_blurs():
    image = picture(0, 24, 24)
    gray, solarized, blurred = (
        apply(image, ThreeAugment().choose(np.array([which, 0.5]), 24)) for which in (0.1, 0.5, 0.9)
    )

    assert torch.equal(gray, F.rgb_to_grayscale(image, 3))
    assert torch.equal(solarized, F.solarize(image, 128))
    assert torch.equal(blurred, F.gaussian_blur(image, 9, 1.05))


@pytest.mark.parametrize("policy", [TrivialAugment(), RandAugment(), ThreeAugment()])
def test_every_operation_is_chosen_about_as_often(policy):
    rng = np.random.default_rng(0)
    chosen = [
        name for _ in range(2800) for name, _ in policy.choose(rng.random(policy.NUM_DRAWS), 32)
    ]
    names, counts = np.unique(chosen, return_counts=True)

    assert len(names) == (3 if policy == ThreeAugment() else 14)
    assert (np.abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()


def test_specs():
    assert parse_policy("none") is None
    assert parse_policy("trivial") == TrivialAugment()
    assert parse_policy("3a") == ThreeAugment()
    assert parse_policy("rand") == parse_policy("rand-m9-n2") == RandAugment(9, 2)
    assert parse_policy("rand-m0-n9") == RandAugment(0, 9)


@pytest.mark.parametrize("text", ["", "rand-m31", "rand-n0", "rand-n2-m9", "augmix", "rand-m-n2"])
def test_other_specs_are_refused(text):
    with pytest.raises(UsageError, match="--auto-augment"):
        parse_policy(text)


def test_a_transform_applies_its_policy_to_the_crop():
    """Its draws stand behind the transform's own, so that these stay as they are without it."""
    data, policy = encode_image(3), RandAugment()
    draws = np.random.default_rng(0).random(TrainTransform(32, policy=policy).NUM_DRAWS)

    image = TrainTransform(32, policy=policy)(data, draws)

    crop = TrainTransform(32)(data, draws[: TrainTransform(32).NUM_DRAWS])
    assert torch.equal(image, apply(crop, policy.choose(draws[-policy.NUM_DRAWS :], 32)))
    assert not torch.equal(image, crop)


def test_jitter_depends_on_the_policy_unless_it_is_given():
    jitters = [
        TrainConfig(auto_augment=policy).color_jitter for policy in ("none", "3a", "trivial")
    ]

    assert jitters == [0.4, 0.3, 0.0]
    assert TrainConfig(auto_augment="rand", color_jitter=0.2).color_jitter == 0.2
    with pytest.raises(UsageError, match="--auto-augment augmix: expected none, trivial, 3a"):
        TrainConfig(auto_augment="augmix")
