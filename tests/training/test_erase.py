"""Random erasing: timm's boxes given the draws, and noise that depends on keys alone."""

import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing

import wds_convnext as wc
from wds_convnext.rng import uniform
from wds_convnext.stream.erasing import NUM_DRAWS, erased_box
from wds_convnext.stream.stream import Batch
from wds_convnext.training.augment import Mixer, Normalizer
from wds_convnext.training.erase import erase, erase_unread, normal
from wds_convnext.training.step import augment_on_device

draw = st.floats(0, 1, exclude_max=True)


class Told:
    """Answers Python's random in the order that timm asks."""

    def __init__(self, monkeypatch, draws):
        whether, *attempts, top, left, _ = draws
        self.attempts, self.places = iter(attempts), iter((top, left))
        monkeypatch.setattr(random, "random", lambda: whether)
        monkeypatch.setattr(random, "uniform", lambda a, b: a + next(self.attempts) * (b - a))
        monkeypatch.setattr(random, "randint", lambda a, b: int(next(self.places) * (b + 1)))


@settings(max_examples=60)
@given(
    draws=st.lists(draw, min_size=NUM_DRAWS, max_size=NUM_DRAWS),
    size=st.sampled_from([8, 32, 57]),
    probability=st.sampled_from([0.25, 1.0]),
)
def test_erased_pixels_are_timms(draws, size, probability):
    """Given the same draws and the same noise."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    box = erased_box(np.array(draws), size, probability=probability)
    key = int(draws[-1] * 2**53)
    noise = normal(torch.tensor(key), torch.arange(3 * size * size)).view(3, size, size)

    erasures = torch.tensor([[*(box or (0,) * 4), key]])
    ours, unread = erase(image.clone(), erasures), erase_unread(image, erasures)

    with pytest.MonkeyPatch.context() as patch:
        Told(patch, draws)
        if box:
            rows, columns = (slice(start, start + n) for start, n in zip(box[:2], box[2:]))
            patch.setattr(torch.Tensor, "normal_", lambda _: noise[:, rows, columns])
        theirs = RandomErasing(probability, mode="pixel", device="cpu")(image.clone())
    assert torch.equal(ours, theirs) and torch.equal(unread, theirs)
    assert (box is None) == (draws[0] >= probability)


def test_noise_is_normal_and_another_for_each_key_and_pixel():
    """Mean, deviation and tails of 300,000 numbers; no correlation between neighbors."""
    keys = torch.arange(100).view(-1, 1)

    noise = normal(keys * 2**40, torch.arange(3000)).double()

    assert abs(noise.mean()) < 4 / 300_000**0.5
    assert abs(noise.std() - 1) < 4 / 600_000**0.5
    assert abs((noise.abs() > 1.96).double().mean() - 0.05) < 0.002
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert abs((a * b).mean()) < 4 / 290_000**0.5
    assert noise.unique().numel() > 290_000


def test_its_bits_are_those_of_the_keyed_draws():
    """The numbers behind the noise are those of `rng.uniform`: one function, on the device."""
    keys = np.array([3, 2**53 - 1], dtype=np.uint64)
    bits = (uniform(keys, 5) * 2**53).astype(np.uint64) << np.uint64(11)
    u, v = (((bits >> np.uint64(by)) & np.uint64(0xFFFFFF)).astype(float) for by in (40, 16))
    expected = np.sqrt(-2 * np.log((u + 0.5) / 2**24)) * np.cos(2 * np.pi * v / 2**24)

    noise = normal(torch.tensor([[3], [2**53 - 1]]), torch.arange(5))

    np.testing.assert_allclose(noise.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_erasures_travel_with_any_number_of_workers(tmp_path, workers):
    """The stream's own, of keyed draws behind those of the crop, from any batch on."""
    dataset = wc.open_dataset(str(write_shards(tmp_path, [9, 8])))
    order = wc.TrainOrder(dataset.sizes, seed=0, global_batch_size=4, shuffle_buffer=20)
    transform, plain = wc.TrainTransform(16, random_erasing=0.5), wc.TrainTransform(16)

    def batches(transform, start):
        stream = wc.ShardStream(dataset, order, batch_size=4, transform=transform, start=start)
        return list(islice(wc.make_loader(stream, workers=workers), 6))

    seen = batches(transform, 2)

    for number, (batch, unerased) in enumerate(zip(seen, batches(plain, 2)), start=2):
        draws = uniform(order.sample_keys(order.global_batch(number)), transform.NUM_DRAWS)
        expected = [erased_box(row[-NUM_DRAWS:], 16, probability=0.5) for row in draws]
        assert batch.erasures[:, :4].tolist() == [list(box or (0,) * 4) for box in expected]
        assert torch.equal(batch.images, unerased.images) and unerased.erasures is None
    assert 4 < sum(bool(batch.erasures[i, 2]) for batch in seen for i in range(4)) < 20


def test_erasing_comes_before_mixing_and_changes_what_a_step_sees():
    """As in timm; with a batch that has no erasures nothing is erased."""
    mixer, normalizer = Mixer(4), Normalizer((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    recipe = SimpleNamespace(mixer=mixer, normalizer=normalizer)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels, key = torch.arange(4), (0, 1, 0, 0)
    batch = Batch(images, labels, torch.ones(4, dtype=torch.bool), [])
    erasures = torch.tensor([[2, 3, 8, 9, 77], [0, 0, 0, 0, 1]] * 2)

    seen, _ = augment_on_device(batch._replace(erasures=erasures), key=key, recipe=recipe)
    unerased, _ = augment_on_device(batch, key=key, recipe=recipe)

    draw = mixer.draw(16, *key)
    assert torch.equal(seen, mixer(erase(normalizer(images), erasures), labels, draw)[0])
    assert torch.equal(unerased, mixer(normalizer(images), labels, draw)[0])
    assert not torch.equal(seen, unerased)
