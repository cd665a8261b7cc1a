"""Batches on the device: mixed as timm mixes, normalized as torchvision does, copied in order."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import Mixup, rand_bbox
from torchvision.transforms.v2 import functional as torchvision

from wds_convnext.rng import derive_key
from wds_convnext.stream.stream import Batch
from wds_convnext.stream.transforms import IMAGENET_MEAN, IMAGENET_STD
from wds_convnext.training import feed
from wds_convnext.training.augment import MixDraw, Mixer, Normalizer
from wds_convnext.training.feed import prefetch_to_device

CPU = torch.device("cpu")
NUM_CLASSES = 7
# A product of two float32 numbers rounds once here and twice in timm: two units in the last place.
ROUNDING = {"rtol": 0, "atol": 2**-21}


def random_batch(num_images: int = 6, *, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(num_images * size)
    images = torch.randn(num_images, 3, size, size, generator=rng)
    return images, torch.randint(NUM_CLASSES, (num_images,), generator=rng)


def timms_mixup(images, labels, draw: MixDraw, *, label_smoothing: float):
    """What timm makes of the same share, or of the same box."""
    mixup = Mixup(num_classes=NUM_CLASSES, label_smoothing=label_smoothing)
    use_cutmix = draw.box is not None
    bbox_and_lam = (draw.box, draw.share)
    with (
        patch.object(mixup, "_params_per_batch", lambda: (draw.share, use_cutmix)),
        patch("timm.data.mixup.cutmix_bbox_and_lam", lambda *args, **kwargs: bbox_and_lam),
    ):
        return mixup(images.clone(), labels)


boxes = st.tuples(*[st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)] * 2).map(
    lambda sides: (*sides[0], *sides[1])
)
pastes = boxes.map(lambda b: MixDraw(1 - (b[1] - b[0]) * (b[3] - b[2]) / 81, b))
blends = st.floats(0, 1).map(MixDraw)


@given(draw=pastes | blends, label_smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_a_draw_mixes_as_timm_does(draw, label_smoothing):
    """The same images and targets for the same share or box; labels smoothed the same."""
    mixer = Mixer(num_classes=NUM_CLASSES, label_smoothing=label_smoothing)
    images, labels = random_batch()

    mixed, targets = mixer(images.clone(), labels, draw)

    timms_images, timms_targets = timms_mixup(images, labels, draw, label_smoothing=label_smoothing)
    torch.testing.assert_close(mixed, timms_images, **ROUNDING)
    torch.testing.assert_close(targets, timms_targets, **ROUNDING)


@given(draw=pastes | blends, num_images=st.integers(1, 9))
def test_targets_are_distributions(draw, num_images):
    """Rows sum to 1 and no class is below its share of the smoothing, for any batch size."""
    mixer = Mixer(num_classes=NUM_CLASSES, label_smoothing=0.1)
    images, labels = random_batch(num_images)

    _, targets = mixer(images, labels, draw)

    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(num_images))
    assert targets.min() >= 0.1 / NUM_CLASSES - 1e-7


def test_a_box_is_pasted_and_nothing_else_changes():
    """Inside it the image from the other end of the batch, outside it the image itself."""
    images, labels = random_batch()
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[2:5, 1:8] = True

    mixed, _ = Mixer(NUM_CLASSES)(images.clone(), labels, MixDraw(1 - 21 / 81, (2, 5, 1, 8)))

    assert torch.equal(mixed[:, :, inside], images.flip(0)[:, :, inside])
    assert torch.equal(mixed[:, :, ~inside], images[:, :, ~inside])


@pytest.mark.parametrize("image_size", [32, 33])
def test_the_share_is_the_area_outside_the_box(image_size):
    """After clipping at the border, for every draw; boxes and borders do occur."""
    mixer = Mixer(num_classes=NUM_CLASSES, mixup_alpha=0.0)
    draws = [mixer.draw(image_size, 0, step) for step in range(500)]

    areas = [
        (bottom - top) * (right - left) for top, bottom, left, right in (draw.box for draw in draws)
    ]

    assert [draw.share for draw in draws] == [1 - area / image_size**2 for area in areas]
    assert all(0 <= edge <= image_size for draw in draws for edge in draw.box)
    clipped = [draw for draw in draws if 0 in draw.box or image_size in draw.box]
    assert 50 < len(clipped) < 500


class Replay:
    """The numbers that our draws came from, handed to timm, which asks numpy for them."""

    def __init__(self, *key: int):
        self.rng = np.random.Generator(np.random.Philox(derive_key("mix", *key)))
        self.centre = None

    def rand(self) -> float:
        return self.rng.random()

    def beta(self, a: float, b: float) -> float:
        return self.rng.beta(a, b)

    def randint(self, low: int, high: int, size=None) -> int:
        if self.centre is None:
            self.centre = list(self.rng.integers(low, high, size=2))
        return self.centre.pop(0)


def timms_draw(mixup: Mixup, image_size: int, *key: int) -> MixDraw:
    """timm's own arithmetic on the numbers of our key."""
    replay = Replay(*key)
    boxes = []

    def noting(*args, **kwargs):
        boxes.append(tuple(int(edge) for edge in rand_bbox(*args, **kwargs)))
        return boxes[-1]

    with (
        patch("numpy.random.rand", replay.rand),
        patch("numpy.random.beta", replay.beta),
        patch("numpy.random.randint", replay.randint),
        patch("timm.data.mixup.rand_bbox", noting),
    ):
        share = mixup._mix_batch(torch.zeros(2, 3, image_size, image_size))
    return MixDraw(float(share), boxes[0] if boxes else None)


@pytest.mark.parametrize("image_size", [31, 224])
@pytest.mark.parametrize("prob", [1.0, 0.7])
def test_a_draw_is_timms_arithmetic_on_the_same_numbers(image_size, prob):
    """Sides rounded, boxes clipped and shares corrected alike, for 300 draws of every kind."""
    mixer = Mixer(num_classes=NUM_CLASSES, prob=prob)
    mixup = Mixup(0.8, 1.0, prob=prob, num_classes=NUM_CLASSES)

    ours = [mixer.draw(image_size, 5, step) for step in range(300)]

    assert ours == [timms_draw(mixup, image_size, 5, step) for step in range(300)]
    assert {draw.box is None for draw in ours} == {True, False}
    assert any(draw.share == 1 for draw in ours) == (prob < 1)


def test_draws_have_the_probabilities_asked_for():
    """Counts over 4,000 draws, within four standard deviations; fixed keys, so never flickering."""
    mixer = Mixer(
        num_classes=NUM_CLASSES, mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.6, switch_prob=0.3
    )
    num_draws = 4000

    draws = [mixer.draw(64, 1, step) for step in range(num_draws)]

    pasted = sum(draw.box is not None for draw in draws)
    blended = sum(draw.box is None and draw.share < 1 for draw in draws)
    assert abs(pasted / num_draws - 0.6 * 0.3) < 4 * np.sqrt(0.18 * 0.82 / num_draws)
    assert abs(blended / num_draws - 0.6 * 0.7) < 4 * np.sqrt(0.42 * 0.58 / num_draws)


def test_shares_are_distributed_as_timms():
    """Mean and spread over 3,000 draws of each; those of Beta itself where nothing is clipped."""
    np.random.seed(0)
    mixup = Mixup(0.8, 1.0, num_classes=NUM_CLASSES)
    mixer = Mixer(num_classes=NUM_CLASSES)
    images = torch.zeros(2, 1, 64, 64)

    theirs = np.array([mixup._mix_batch(images) for _ in range(3000)])
    draws = [mixer.draw(64, 2, step) for step in range(3000)]

    ours = np.array([draw.share for draw in draws])
    blends = np.array([draw.share for draw in draws if draw.box is None])
    # The difference of two means over n has a standard error of spread * sqrt(2 / n).
    assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() * np.sqrt(2 / 3000)
    assert abs(ours.std() / theirs.std() - 1) < 0.05
    # Beta(0.8, 0.8) has mean 1/2 and variance 1 / (4 * (2 * 0.8 + 1)).
    assert abs(blends.mean() - 0.5) < 4 * np.sqrt(1 / 10.4 / len(blends))
    assert abs(blends.var() / (1 / 10.4) - 1) < 0.1


@pytest.mark.parametrize(
    "off", [{"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, {"prob": 0.0}], ids=["alphas", "prob"]
)
def test_where_mixing_is_off_nothing_is_mixed(off):
    """Images are the same tensor; targets are smoothed labels."""
    mixer = Mixer(num_classes=NUM_CLASSES, **off)
    images, labels = random_batch(5)

    draw = mixer.draw(9, 0, 0)
    mixed, targets = mixer(images, labels, draw)

    assert not mixer.mixes
    assert draw == MixDraw(1.0)
    assert mixed is images
    assert torch.equal(targets.argmax(1), labels)
    assert torch.allclose(targets.amax(1), torch.tensor(0.9 + 0.1 / NUM_CLASSES))


@pytest.mark.parametrize(("alpha_off", "pastes"), [("mixup_alpha", True), ("cutmix_alpha", False)])
def test_one_kind_alone_needs_no_switch(alpha_off, pastes):
    """With one of them off every batch is mixed in the other way."""
    mixer = Mixer(num_classes=NUM_CLASSES, **{alpha_off: 0.0})

    draws = [mixer.draw(64, 0, step) for step in range(50)]

    assert [draw.box is not None for draw in draws] == [pastes] * 50


def test_a_draw_is_a_function_of_its_key():
    """Seed, step, micro-batch and rank each change it; the same key gives the same draw."""
    mixer = Mixer(num_classes=NUM_CLASSES)
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]

    draws = [mixer.draw(64, *key) for key in keys]

    assert draws == [mixer.draw(64, *key) for key in keys]
    assert len(set(draws)) == len(keys)


def test_normalizing_is_torchvisions():
    """(x / 255 - mean) / std for every byte; float32 rounding of numbers up to 3 apart."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    normalizer = Normalizer(IMAGENET_MEAN, IMAGENET_STD, CPU)

    normalized = normalizer(images)

    expected = torchvision.normalize(images.double() / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized.double(), expected, rtol=0, atol=1e-6)


def test_undoing_gives_the_image_back():
    """Fractions of 255, and the images that were normalized stay as they are."""
    images = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    before = images.clone()
    normalizer = Normalizer(IMAGENET_MEAN, IMAGENET_STD, CPU)

    undone = normalizer.undo(normalizer(images))

    torch.testing.assert_close(undone, images / 255, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_batches_pass_to_the_device_in_order():
    """Values and bad samples too; a stream that ends has lost none."""
    batches = [
        Batch(
            torch.full((2, 3, 4, 4), i, dtype=torch.uint8),
            torch.tensor([i, i]),
            torch.tensor([True, False]),
            [{"key": str(i)}],
        )
        for i in range(4)
    ]

    passed = list(prefetch_to_device(iter(batches), CPU))

    assert [batch.images[0, 0, 0, 0].item() for batch in passed] == [0, 1, 2, 3]
    assert [batch.bad_samples for batch in passed] == [batch.bad_samples for batch in batches]
    assert all(torch.equal(a.is_real, b.is_real) for a, b in zip(passed, batches))


def test_on_a_gpu_a_step_waits_for_its_own_batch_and_not_for_the_next(monkeypatch):
    """The next batch's copy is under way, but the step's stream was told to wait before it began.
    By a stand-in for CUDA: streams that count copies."""
    copies, waits = [], []
    tensor = SimpleNamespace(record_stream=lambda stream: None)
    step_stream = SimpleNamespace(wait_stream=lambda copying: waits.append(len(copies)))
    monkeypatch.setattr(feed, "_to", lambda batch, _: copies.append(batch) or batch)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copying")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step_stream)
    batches = [Batch(tensor, tensor, tensor, [number]) for number in range(4)]

    seen = [
        (batch.bad_samples, len(copies), waits[-1])
        for batch in feed.prefetch_to_device(iter(batches), torch.device("cuda"))
    ]

    assert seen == [([0], 2, 1), ([1], 3, 2), ([2], 4, 3), ([3], 4, 4)]
