"""Which image size a training step has, when sizes rise in the course of a run.

The size is a function of the step, like the order: whoever makes a batch knows it, and a resumed
run goes on with it.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which takes seconds, and who asks for a step's size need not pay for it
    import torch


@dataclass(frozen=True)
class ImageSizes:
    """Rising image sizes in pixels, each from a step on; the first from step 0."""

    sizes: tuple[int, ...]
    first_steps: tuple[int, ...] = (0,)

    def at(self, step: int) -> int:
        """The size of a step's images."""
        return self.sizes[bisect_right(self.first_steps, step) - 1]

    def num_steps(self, steps: range) -> dict[int, int]:
        """How many of these steps have each size, for those that have any."""
        ends = (*self.first_steps[1:], steps.stop)
        counts = {
            size: min(end, steps.stop) - max(first, steps.start)
            for size, first, end in zip(self.sizes, self.first_steps, ends, strict=True)
        }
        return {size: count for size, count in counts.items() if count > 0}

    def num_pixels(self, steps: range) -> int:
        """Pixels of these steps, one image each: about what they cost."""
        return sum(count * size**2 for size, count in self.num_steps(steps).items())


def in_memory_of(images: "torch.Tensor", shape: tuple[int, ...]) -> "torch.Tensor":
    """A batch (B, C, H, W), channels_last, at the beginning of a larger one's memory."""
    if images.shape == shape:
        return images
    batch, channels, height, width = shape
    memory = images.permute(0, 2, 3, 1).view(-1)
    batch_BHWC = memory[: batch * height * width * channels].view(batch, height, width, channels)
    return batch_BHWC.permute(0, 3, 1, 2)
