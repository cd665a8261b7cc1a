"""Smaller JPEGs of large images (`--max-side`), and what shards keep of the images' sources.

What is shrunk are the pixels that training would see (`shards.decode`): those that are stored.
EXIF's orientation is not applied, but kept as a tag, so that readers that turn images by it and
readers that do not both see what they saw before. All other metadata is left out, color profiles
too, as training reads none. Alpha is dropped, of an animation the first frame is taken; gray stays
gray, 16 bits become 8, and CMYK becomes RGB.

Of each image that is shrunk, `train.sources` keeps 64 bits of the SHA-256 of its source, 8 bytes a
sample in the order of the shards, so that `verify --against` still finds every row.

CPU ms per photograph of 4000 x 3000 pixels to 512 x 384, one core: 230 from half the sides (decoded
in 141, PSNR to the next: 53 dB), 450 from all pixels, 130 from a quarter of the sides, which leaves
less than a factor of 2 and 45 dB. Encoding takes 3; `optimize` costs 2 of them for 3 % fewer bytes.
"""

import hashlib
import io
import struct
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple, Self

import PIL
from PIL import Image

from wds_convnext.config import ShardsConfig
from wds_convnext.shards.decode import decode_reduced
from wds_convnext.shards.image import ORIENTATION, ImageFacts
from wds_convnext.shards.limits import CONVERSION_LIMITS

SOURCE = struct.Struct("<Q")  # of `train.sources`
AS_STORED = 0  # in place of a digest: the image is its source, byte for byte
_DEFAULT_QUALITY = 90
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


def digest_image(data: bytes | memoryview) -> int:
    """64 bits of the SHA-256 of encoded bytes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


@dataclass(frozen=True)
class Shrink:
    """How large images become smaller JPEGs, 4:2:0; the same on any machine, by any process."""

    max_side: int
    quality: int

    @classmethod
    def of(cls, config: ShardsConfig) -> Self | None:
        """What the options ask for; None if images are copied as they are."""
        if config.max_side is None:
            return None
        return cls(config.max_side, config.quality or _DEFAULT_QUALITY)

    @property
    def identity(self) -> dict:
        """What the bytes depend on besides the source."""
        return vars(self) | {"pillow": PIL.__version__, "simplejpeg": version("simplejpeg")}

    @property
    def most_bytes(self) -> int:
        """What a shrunk image takes at most, about: photographs have less than a byte a pixel."""
        return self.max_side**2

    def apply(self, data: bytes | memoryview, facts: ImageFacts) -> bytes | None:
        """An image as a JPEG with no side longer than `max_side`; None if it has none.

        Args:
            facts: of the image, as `inspect_image` gives them.
        Raises:
            ImageError: if it does not decode, or takes too much memory (CONVERSION_LIMITS).
        """
        long_side = max(facts.width, facts.height)
        if long_side <= self.max_side:
            return None
        # At least a factor of 2 is left to the filter, so the result is antialiased as a whole.
        factor = next((f for f in (8, 4, 2) if long_side >= 2 * f * self.max_side), 1)
        pixels_HWC = decode_reduced(bytes(data), factor, limits=CONVERSION_LIMITS)
        is_gray = facts.mode in _GRAY_MODES
        image = Image.fromarray(pixels_HWC[:, :, 0] if is_gray else pixels_HWC)
        size = (
            max(1, round(facts.width * self.max_side / long_side)),
            max(1, round(facts.height * self.max_side / long_side)),
        )
        smaller = image.resize(size, Image.Resampling.LANCZOS)
        options: dict[str, Any] = {"quality": self.quality, "optimize": True}
        if facts.orientation != 1:
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = facts.orientation
        file = io.BytesIO()
        smaller.save(file, "JPEG", **options)
        return file.getvalue()


class Shrunk(NamedTuple):
    """How many images were shrunk, and their bytes before and after."""

    num_images: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def plus(self, other: tuple[int, int, int]) -> "Shrunk":
        return Shrunk(*map(sum, zip(self, other)))

    def __str__(self) -> str:
        ratio = self.bytes_before / max(1, self.bytes_after)
        return (
            f"{self.num_images:,} images, {self.bytes_before / 1e6:,.1f} MB to "
            f"{self.bytes_after / 1e6:,.1f} MB ({ratio:,.1f} x smaller)"
        )
