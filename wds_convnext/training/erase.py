"""Random erasing on the device: rectangles of noise, from keys that came with the batch.

A sample's noise is a function of its key and of the place of a pixel, so that it is the same for
any number of workers and ranks, and nothing is read back or stored.
"""

import math

import torch

# The numbers of `rng.mix64`, as int64, whose products wrap as uint64's do.
_GOLDEN, _FIRST, _SECOND = (
    word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def erase(images: torch.Tensor, erasures: torch.Tensor) -> torch.Tensor:
    """Images whose box, if there is one, is standard normal noise, each pixel of its own.

    Args:
        images: normalized, float (B, 3, H, W); may be changed in place.
        erasures: int64 (B, 5): top, left, height and width of the box, 0 for none, and a key.
    """
    if images.device.type != "cpu":
        return erase_unread(images, erasures)
    places = torch.arange(images[0].numel()).view(images.shape[1:])
    for image, (top, left, height, width, key) in zip(images, erasures.tolist(), strict=True):
        if height:
            box = slice(None), slice(top, top + height), slice(left, left + width)
            image[box] = normal(torch.tensor(key), places[box])
    return images


def erase_unread(images: torch.Tensor, erasures: torch.Tensor) -> torch.Tensor:
    """The same for a device that is not to be waited for: noise for all pixels, most unused."""
    _, channels, height, width = images.shape
    top, left, box_height, box_width, key = erasures.view(-1, 5, 1, 1, 1).unbind(1)
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    inside = (rows >= top) & (rows < top + box_height)
    inside = inside & (columns >= left) & (columns < left + box_width)
    noise = normal(key, (channel * height + rows) * width + columns).to(images.dtype)
    erased = torch.where(inside, noise, images)
    return erased.contiguous(memory_format=torch.channels_last)


def normal(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, float32, of keys and counters (int64, broadcast together).

    By Box and Muller from two times 24 bits of what `rng.uniform` makes its numbers of.
    """
    bits = _mix64(_mix64(key + (counter + 1) * _GOLDEN))
    u, v = ((_shifted(bits, by) & 0xFFFFFF).float() for by in (40, 16))
    radius = ((u + 0.5) * 2.0**-24).log().mul(-2).sqrt()
    return radius * (v * (2 * math.pi * 2.0**-24)).cos()


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right as uint64 is: int64 repeats the sign."""
    return (x >> by) & (2 ** (64 - by) - 1)
