"""Laws of the transforms: torchvision's geometry and colours, Pillow's pixels within 2/255."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import _geometry

from wds_convnext.errors import DataError
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.stream.geometry import PADDING_MODES
from wds_convnext.stream.transforms import (
    EvalTransform,
    ImageError,
    TrainTransform,
    random_crop_box,
)

# By how much torch's fixed-point antialiased resize may differ from Pillow's, of 255.
RESIZE_TOLERANCE = 2

NUM_CROP_DRAWS = TrainTransform().NUM_DRAWS - 5
FLIP, BRIGHTNESS, CONTRAST, SATURATION, ORDER = range(NUM_CROP_DRAWS, TrainTransform().NUM_DRAWS)

sides = st.integers(1, 150)


@pytest.fixture(autouse=True, scope="module")
def torchs_resize():
    """Have torchvision resize bytes with torch's fixed-point kernel on every CPU.

    On x86 without AVX2 it resizes in float32 and rounds, which is one of 255 off in places. For
    the same kernel the bytes are the same whatever the vector width: its sums are of integers.
    """
    with mock.patch.object(_geometry, "_do_native_uint8_resize_on_cpu", lambda mode: True):
        yield


uniform = st.floats(0, 1, exclude_max=True)
all_draws = st.lists(
    uniform, min_size=TrainTransform().NUM_DRAWS, max_size=TrainTransform().NUM_DRAWS
).map(np.array)


def encode(height, width, file_format="JPEG", **options):
    """An encoded picture of smooth shapes, grain and one hard edge."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    channels = [128 + 90 * np.sin(y / (5 + c) + c) * np.cos(x / (9 - c)) for c in range(3)]
    pixels = np.stack(channels, axis=-1) + rng.normal(0, 20, (height, width, 3))
    pixels[:, width // 2 :] = 255 - pixels[:, width // 2 :]
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, file_format, **options)
    return file.getvalue()


def decode_CHW(data):
    """The reference decoder: the whole image, uint8 (3, H, W)."""
    return torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)


def max_difference(image, reference):
    return (image.int() - functional.pil_to_tensor(reference).int()).abs().max().item()


def torchvision_crop_box(draws, height, width, *, scale, ratio):
    """RandomResizedCrop's own code, in float64 and fed with our draws in place of its generator."""
    attempts, places = iter(draws[:-2]), iter(draws[-2:])

    def uniform_(tensor, low, high):
        return tensor.fill_(float(low) + next(attempts) * (float(high) - float(low)))

    def randint(low, high, size):
        return torch.tensor([int(low + next(places) * (high - low))])

    torch.set_default_dtype(torch.float64)
    try:
        crop = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
        with mock.patch("torch.Tensor.uniform_", uniform_), mock.patch("torch.randint", randint):
            box = crop.make_params([torch.empty(3, height, width, dtype=torch.uint8)])
    finally:
        torch.set_default_dtype(torch.float32)
    return box["top"], box["left"], box["height"], box["width"]


@pytest.mark.bits
@settings(max_examples=300, deadline=None)
@given(
    draws=st.lists(uniform, min_size=NUM_CROP_DRAWS, max_size=NUM_CROP_DRAWS),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    scale=st.sampled_from([(0.08, 1.0), (0.9, 1.0), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 5.0)]),
)
@example(draws=[0.99] * NUM_CROP_DRAWS, height=10, width=1000, scale=(0.9, 1.0), ratio=(0.75, 1.33))
@example(draws=[0.99] * NUM_CROP_DRAWS, height=1000, width=10, scale=(0.9, 1.0), ratio=(0.75, 1.33))
def test_the_crop_box_is_torchvisions(draws, height, width, scale, ratio):
    box = random_crop_box(draws, height, width, scale=scale, ratio=ratio)

    assert box == torchvision_crop_box(draws, height, width, scale=scale, ratio=ratio)


@pytest.mark.bits
def test_a_crop_box_stays_as_it_is():
    """Golden example: a change here changes every training run."""
    draws = np.linspace(0.05, 0.95, NUM_CROP_DRAWS)

    box = random_crop_box(draws, 375, 500, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))

    assert box == (184, 345, 173, 137)


def test_crops_cover_the_range_of_areas_and_ratios():
    draws = np.random.default_rng(0).random((4000, NUM_CROP_DRAWS))

    boxes = np.array(
        [random_crop_box(d, 1000, 1000, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) for d in draws]
    )

    top, left, height, width = boxes.T
    areas, ratios = height * width / 1e6, width / height
    assert areas.min() < 0.1 and areas.max() > 0.95
    assert ratios.min() < 0.76 and ratios.max() > 1.32
    assert (top + height).max() == (left + width).max() == 1000 and top.min() == left.min() == 0


@pytest.mark.bits
@settings(max_examples=100, deadline=None)
@given(height=sides, width=sides, draws=all_draws, image_size=st.sampled_from([1, 24, 64]))
def test_training_images_are_torchvisions_of_the_same_box(height, width, draws, image_size):
    """Whole decode, resized_crop and flip give the same bytes; Pillow's are within 2 of 255."""
    data = encode(height, width)
    transform = TrainTransform(image_size=image_size)
    box = random_crop_box(
        draws[:NUM_CROP_DRAWS], height, width, scale=transform.scale, ratio=transform.ratio
    )

    image = transform(data, draws)

    reference = functional.resized_crop(decode_CHW(data), *box, [image_size] * 2, antialias=True)
    pillow = functional.resized_crop(Image.open(io.BytesIO(data)), *box, [image_size] * 2)
    if draws[FLIP] < 0.5:
        reference, pillow = map(functional.horizontal_flip, (reference, pillow))
    assert torch.equal(image, reference)
    assert max_difference(image, pillow) <= RESIZE_TOLERANCE


@pytest.mark.bits
@settings(max_examples=60)
@given(
    height=st.integers(8, 60),
    width=st.integers(8, 60),
    draws=all_draws,
    image_size=st.sampled_from([12, 24, 32]),
    padding=st.integers(0, 11),
    padding_mode=st.sampled_from(PADDING_MODES),
)
@example(32, 32, np.zeros(TrainTransform().NUM_DRAWS), 32, 4, "constant")
@example(32, 32, np.full(TrainTransform().NUM_DRAWS, 0.999), 32, 4, "reflect")
def test_a_padded_crop_is_torchvisions(height, width, draws, image_size, padding, padding_mode):
    """Resize, RandomCrop with padding and flip give the same bytes for the same draws."""
    data = encode(height, width)
    crop = v2.RandomCrop(image_size, padding=padding, padding_mode=padding_mode)
    resized = v2.Resize(image_size)(decode_CHW(data))
    sides = zip(resized.shape[1:], draws[[NUM_CROP_DRAWS - 2, NUM_CROP_DRAWS - 1]])
    # torchvision draws nothing where there is one place only.
    places = iter([draw for side, draw in sides if side + 2 * padding > image_size])

    image = TrainTransform(image_size, crop_padding=padding, padding_mode=padding_mode)(data, draws)

    with mock.patch("torch.randint", lambda low, high, size: int(next(places) * high)):
        reference = crop(resized)
    if draws[FLIP] < 0.5:
        reference = functional.horizontal_flip(reference)
    assert torch.equal(image, reference)
    assert image.stride(0) == 1 and image.stride(1) == 3 * image_size


@pytest.mark.bits
@settings(max_examples=100, deadline=None)
@given(
    height=sides,
    width=sides,
    image_size=st.sampled_from([24, 32, 57]),
    crop_ratio=st.sampled_from([0.875, 0.95, 1.0]),
)
@example(height=32, width=32, image_size=32, crop_ratio=0.875)
@example(height=256, width=341, image_size=224, crop_ratio=0.875)
@example(height=500, width=375, image_size=224, crop_ratio=0.875)
@example(height=3, width=1000, image_size=32, crop_ratio=0.875)
def test_evaluation_images_are_torchvisions(height, width, image_size, crop_ratio):
    """Resize and CenterCrop, with their rounding; also of images smaller than the crop."""
    data = encode(height, width)
    geometry = v2.Compose(
        [
            v2.Resize(round(image_size / crop_ratio), InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(image_size),
        ]
    )

    image = EvalTransform(image_size=image_size, crop_ratio=crop_ratio)(data)

    assert torch.equal(image, geometry(decode_CHW(data)))
    assert max_difference(image, geometry(Image.open(io.BytesIO(data)))) <= RESIZE_TOLERANCE


@pytest.mark.bits
def test_imagenets_evaluation_is_resize_256_and_crop_224():
    data = encode(375, 500)

    image = EvalTransform()(data)

    assert torch.equal(image, v2.CenterCrop(224)(v2.Resize(256)(decode_CHW(data))))


@pytest.mark.bits
@settings(max_examples=100, deadline=None)
@given(draws=all_draws, strength=st.sampled_from([0.1, 0.4, 1.0, 1.5]))
def test_color_jitter_is_torchvisions(draws, strength):
    """The same three functions with the same factors, in the order drawn."""
    data = encode(40, 50)
    low, high = max(0, 1 - strength), 1 + strength
    factors = low + draws[[BRIGHTNESS, CONTRAST, SATURATION]] * (high - low)
    adjustments = zip(
        [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation],
        factors,
    )

    image = TrainTransform(image_size=32, color_jitter=strength)(data, draws)

    reference = TrainTransform(image_size=32)(data, draws)
    for adjust, factor in list(permutations(adjustments))[int(draws[ORDER] * 6)]:
        reference = adjust(reference, factor)
    assert torch.equal(image, reference)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(slice(0, 2), id="area and ratio"),
        pytest.param(NUM_CROP_DRAWS - 2, id="top"),
        pytest.param(NUM_CROP_DRAWS - 1, id="left"),
        pytest.param(FLIP, id="flip"),
        pytest.param(BRIGHTNESS, id="brightness"),
        pytest.param(CONTRAST, id="contrast"),
        pytest.param(SATURATION, id="saturation"),
        pytest.param(ORDER, id="order"),
    ],
)
def test_every_draw_has_an_effect(draw):
    transform = TrainTransform(image_size=32, color_jitter=0.4)
    data, draws = encode(60, 80), np.full(TrainTransform().NUM_DRAWS, 0.4)
    other_draws = draws.copy()
    other_draws[draw] = 0.8

    image, other_image = transform(data, draws), transform(data, other_draws)

    assert not torch.equal(image, other_image)


@pytest.mark.parametrize("hflip, flipped", [(0.0, False), (1.0, True)])
def test_hflip_is_a_probability(hflip, flipped):
    data = encode(60, 80)
    for flip in (0.0, 0.5, np.nextafter(1, 0)):
        draws = np.full(TrainTransform().NUM_DRAWS, 0.4)
        draws[FLIP] = flip

        image = TrainTransform(image_size=32, hflip=hflip)(data, draws)

        upright = TrainTransform(image_size=32, hflip=0)(data, draws)
        assert torch.equal(image, upright.flip(-1) if flipped else upright)


@pytest.mark.parametrize("transform", [TrainTransform(color_jitter=0.4), EvalTransform()])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (32, 32), (224, 224), (300, 256)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_images_are_uint8_with_the_bytes_of_a_pixel_side_by_side(transform, size, file_format):
    draws = np.random.default_rng(0).random(transform.NUM_DRAWS)

    image = transform(encode(*size, file_format), draws)

    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.uint8
    assert image.stride(0) == 1 and image.stride(2) == 3


@pytest.mark.parametrize("transform", [TrainTransform(), EvalTransform()])
@pytest.mark.parametrize("data", [b"", b"not an image", encode(50, 50)[:-2]])
def test_a_bad_image_is_a_data_error(transform, data):
    with pytest.raises(ImageError) as caught:
        transform(data, np.full(transform.NUM_DRAWS, 0.4))

    assert isinstance(caught.value, DataError)


def test_a_strip_that_evaluation_would_blow_up_is_refused():
    """1x60,000 pixels resized to a short side of 256 would take 11 GB."""
    with pytest.raises(ImageError, match="256"):
        EvalTransform()(encode(1, 60_000, "PNG"))


@pytest.mark.bits
def test_threads_do_not_change_images():
    transform = TrainTransform(image_size=32, color_jitter=0.4)
    data = [encode(size, 50) for size in range(20, 60)]
    draws = np.random.default_rng(0).random((len(data), transform.NUM_DRAWS))
    expected = list(map(transform, data, draws))

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(transform, data, draws))

    assert all(map(torch.equal, images, expected))


def test_importing_the_transforms_imports_nothing_heavy_but_torch():
    program = "import sys, wds_convnext.stream.transforms; print(*sys.modules)"

    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()

    assert "torch" in modules
    assert not {"torchvision", "timm", "tensorboard", "webdataset", "pyarrow"} & set(modules)
