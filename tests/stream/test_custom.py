"""Any function of the bytes is a transform, with the promises of the built-in ones."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

import wds_convnext as wc
from wds_convnext.errors import UsageError

ORDER = {"seed": 3, "global_batch_size": 8, "shuffle_buffer": 16}


def noisy(data: bytes) -> torch.Tensor:
    """An image of its own shape and dtype, with noise from all three global generators."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB").resize((10, 6)))
    noise = torch.rand(3, 6, 10) + np.random.rand() + random.random()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 + noise


# Functions of the module: with spawn, workers import them.
def of_its_own_width(data: bytes) -> torch.Tensor:
    return torch.zeros(3, 4, len(data))


def flat(data: bytes) -> torch.Tensor:
    return torch.zeros(4, 4)


def of_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def batches(shards, transform, *, workers: int, start: int = 0, num: int = 5) -> list[wc.Batch]:
    dataset = wc.open_dataset(f"{shards}/train.json")
    order = wc.TrainOrder(dataset.sizes, **ORDER)
    stream = wc.ShardStream(dataset, order, batch_size=8, transform=transform, start=start)
    loader = wc.make_loader(stream, workers=workers)
    return [next(loader) for _ in range(num)]


@pytest.mark.parametrize("workers", [1, 3])
def test_images_depend_neither_on_workers_nor_on_where_they_begin(shards, workers):
    straight = batches(shards, noisy, workers=0, num=7)

    again = batches(shards, noisy, workers=workers, start=2)

    assert straight[0].images.shape == (8, 3, 6, 10)
    assert straight[0].images.dtype == torch.float32
    assert not torch.equal(straight[0].images[0], straight[0].images[1])
    for one, other in zip(straight[2:], again):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_the_global_generators_are_left_as_they_were(shards):
    def draw() -> tuple:
        return torch.rand(1).item(), np.random.rand(), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    undisturbed = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])

    batches(shards, noisy, workers=0)

    assert draw() == undisturbed


def test_what_the_function_cannot_open_is_a_bad_sample(shards):
    first = wc.open_dataset(f"{shards}/train.json")[0].image

    def picky(data: bytes) -> torch.Tensor:
        if data == first:
            raise OSError("not today")
        return noisy(data)

    made = batches(shards, picky, workers=0, num=7)

    [bad] = [bad for batch in made for bad in batch.bad_samples]
    assert "not today" in bad["reason"]
    assert all(batch.is_real.all() for batch in made)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (of_its_own_width, "Give all images one shape and dtype"),
        (flat, r"gives a tensor \(4, 4\): expected a tensor \(C, H, W\)"),
        (of_pillow, "gives a JpegImageFile: expected a tensor"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_image_of_one_shape_is_refused(shards, transform, expected, workers):
    with pytest.raises(UsageError, match=expected):
        batches(shards, transform, workers=workers)


def test_a_stream_without_a_transform_is_refused(shards):
    with pytest.raises(UsageError, match="a transform is missing"):
        batches(shards, None, workers=0)
