"""How large an image may be: what is beyond it is unusable, whatever its bytes hold."""

from dataclasses import dataclass

from wds_convnext.errors import DataError

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses an image as a decompression bomb
MAX_BYTES = 1 << 30  # of one encoded image
# A pixel, to decode it: as stored, as RGB in 4 bytes, and two arrays of 3; WebP's keeps more.
PILLOW_BYTES, WEBP_BYTES = 14, 22


class ImageError(DataError):
    """The bytes are not one whole image of bounded size; the message says what was found."""


def check_num_pixels(height: int, width: int) -> None:
    """Raise ImageError if an image of this size has no pixels, or more than MAX_PIXELS."""
    if not 0 < height * width <= MAX_PIXELS:
        if height * width == 0:
            raise ImageError(f"no pixels: {width} x {height}")
        raise ImageError(f"too large: {width} x {height} pixels, the limit is {MAX_PIXELS:,}")


@dataclass(frozen=True)
class Limits:
    """How much decoding one image may take: memory, and scans times pixels (1e9 are 3 s)."""

    purpose: str
    decoded_bytes: int
    scan_pixels: int

    def check(self, height: int, width: int, bytes_per_pixel: int) -> None:
        """Raise ImageError if an image has no pixels, or more than may be decoded."""
        check_num_pixels(height, width)
        num_bytes = height * width * bytes_per_pixel
        if num_bytes > self.decoded_bytes:
            raise ImageError(
                f"too large: {width} x {height} pixels take {num_bytes >> 20:,} MiB to decode, "
                f"the limit of {self.purpose} is {self.decoded_bytes >> 20:,}"
            )

    def check_scans(self, num_scans: int, pixels: int) -> None:
        """Raise ImageError if an image has more scans than may be decoded."""
        most = self.scan_pixels // pixels
        if num_scans > most:
            raise ImageError(
                f"too many scans: {num_scans:,}, the limit of {self.purpose} is {most}"
            )


# Training decodes in many processes at once, and every image again each epoch.
CONVERSION_LIMITS = Limits("conversion", 1 << 30, 4 * 10**9)
TRAINING_LIMITS = Limits("training", 1 << 29, 10**9)
