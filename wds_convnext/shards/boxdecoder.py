"""nvImageCodec: decodes a box of a JPEG on the CPU, without the columns next to it.

Its libjpeg-turbo skips what lies above, left and right of the box, which the plain interfaces of
other packages do not offer. Where data are damaged it warns on stderr and gives noise for an image.
So stderr is watched: whatever is said while an image is decoded means that it is not taken from
here, and the strict decoder judges it. Nothing of it reaches the user.

CPU ms per random crop with its resize and copy into a batch, one core, 500 ImageNet photographs,
medians of 7 interleaved rounds on a busy Intel Xeon: 1.52 where simplejpeg decodes every image,
1.43 with nvImageCodec one by one, 1.30 with eight per call (4: 1.33, 16: 1.31). A call takes 0.03
whatever it decodes, and decoding without a resize in between keeps more in the CPU's caches. The
Huffman codes, which nothing can skip, are 0.7 of it. Watching stderr takes 0.002. A worker has one
thread as with simplejpeg, 16 descriptors for 12 and 184 MiB for 172 (PSS; n = 2). Tried and lost:
- Eight images before their resizes, but a call for each: 1.35.
- New memory for each image: 0.06 more, one per call.
- 16 more rows below the box, so that it finds damage where simplejpeg does, whatever is known of
  the image: 0.15 more.
- Whole images: 0.14 more than simplejpeg.
"""

import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

PACKAGE = "nvidia-nvimgcodec-cu13"
_MODULE = "nvidia.nvimgcodec"
_OWN_REFERENCES = 2  # to an image before: the list's, and the argument
_MUCH_SAID = 1 << 20  # bytes; they are in memory
# nvImageCodec's own lines begin with a level in color, libjpeg's as in its jerror.h.
_ITS_OWN = re.compile(
    rb"\x1b\[|Application transferred|Bogus|Corrupt JPEG|Didn't expect|Empty|Huffman table|"
    rb"Improper|Inconsistent|Insufficient|Invalid|Maximum|Missing|Not a JPEG|Premature end|"
    rb"Quantization table|Sampling|Sorry|Unexpected|Unknown|Unsupported|Warning: unknown"
)
_EXTENSIONS = "NVIMGCODEC_EXTENSIONS_PATH"  # the folder that it looks for extensions in


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def box_decoder() -> "BoxDecoder | None":
    """This process's decoder; None where nvImageCodec is not installed or not as expected."""
    # One for each process: a fork copies no threads, and waits forever for those of its parent.
    return _box_decoder(os.getpid())


@functools.cache
def is_installed() -> bool:
    """Whether nvImageCodec can be imported here; nothing is imported."""
    try:
        # The same module comes in packages for other CUDA versions, which were not tried.
        importlib.metadata.version(PACKAGE)
        return sys.platform == "linux" and importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:  # the package, or the folder `nvidia`
        return False


@functools.cache
def _box_decoder(_pid: int) -> "BoxDecoder | None":
    if not is_installed():
        return None
    try:
        decoder = BoxDecoder()
    except Exception:  # a wheel that does not fit the machine raises nearly any type
        return None
    return decoder if _is_as_expected(decoder) else None


class BoxDecoder:
    """nvImageCodec's decoder on the CPU, which says nothing to the user."""

    def __init__(self) -> None:
        self._said = os.memfd_create("stderr")
        self._num_taken = 0  # bytes of it
        self._stderr = os.dup(2)
        self._lock = threading.Lock()  # stderr is the process's: two threads would mix it up
        with self._listening():  # also to what it says of the machine, while it is imported
            codec = _import_for_cpu()
            self._decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
                max_num_cpu_threads=1,
            )
        self._images: list[Any] = []
        self._codec = codec
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB
        )

    def decode(self, jpegs: Sequence[bytes], boxes: Sequence[Box]) -> list[np.ndarray | None]:
        """The RGB pixels of a box in each JPEG, uint8 (height, width, 3), by one call.

        All are None if anything is said: one image is damaged, or of a kind that it does not take.
        """
        regions = [
            self._codec.Region(box.top, box.left, box.top + box.height, box.left + box.width)
            for box in boxes
        ]
        with self._listening() as said:
            streams = [
                self._codec.CodeStream(jpeg).get_sub_code_stream(region=region)
                for jpeg, region in zip(jpegs, regions, strict=True)
            ]
            images = self._decoder.decode(
                streams, images=self._free_images(len(jpegs)), params=self._params
            )
        if said or None in images:
            return [None] * len(jpegs)
        pixels: list[np.ndarray | None] = [np.asarray(image) for image in images]
        self._images = images  # after they are held, so that no other thread takes them for free
        return pixels

    def _free_images(self, num_images: int) -> list[Any] | None:
        """The memory of images before, which grows as needed, if nobody holds their pixels."""
        images, self._images = self._images[:num_images], []
        if len(images) < num_images:
            return None
        is_free = all(sys.getrefcount(images[i]) <= _OWN_REFERENCES for i in range(num_images))
        return images if is_free else None

    @contextmanager
    def _listening(self) -> Iterator[list[bytes]]:
        """Gives a list that holds afterwards the lines written to stderr meanwhile.

        They are kept from the user. But outside of workers, which have one thread, those of other
        threads are passed on, unless they stand in the middle of one of its own.
        """
        lines: list[bytes] = []
        with self._lock:
            os.dup2(self._said, 2)
            try:
                yield lines
            finally:
                os.dup2(self._stderr, 2)  # before it is read, so that nothing is lost between
                lines += self._take_lines()
        if lines and multiprocessing.parent_process() is None:
            os.write(2, b"".join(line for line in lines if not _ITS_OWN.match(line)))

    def _take_lines(self) -> list[bytes]:
        start, end = self._num_taken, os.lseek(self._said, 0, os.SEEK_CUR)
        self._num_taken = end
        lines = os.pread(self._said, end - start, start).splitlines(keepends=True)
        if end > _MUCH_SAID:
            os.ftruncate(self._said, 0)
            self._num_taken = os.lseek(self._said, 0, os.SEEK_SET)
        return lines


def _import_for_cpu() -> Any:
    """nvImageCodec with the one extension that is needed.

    The others open CUDA's libraries, where a fork may not touch them, take 7 MB, and complain on
    stderr where there are none. Extensions are opened once, at the import.
    """
    spec = importlib.util.find_spec(_MODULE)
    assert spec is not None and spec.origin is not None
    before = os.environ.get(_EXTENSIONS)
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(spec.origin).parent.glob("extensions/libjpeg_turbo_ext.so*"):
            os.symlink(file, os.path.join(folder, file.name))
        os.environ[_EXTENSIONS] = folder
        try:
            return importlib.import_module(_MODULE)
        finally:
            del os.environ[_EXTENSIONS]
            if before is not None:
                os.environ[_EXTENSIONS] = before


def _is_as_expected(decoder: BoxDecoder) -> bool:
    """Whether a box has simplejpeg's pixels, and damage is noticed: what all else rests on."""
    noise_HWC = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(noise_HWC, colorsubsampling="420")
    box = Box(top=9, left=21, height=30, width=33)
    (pixels,) = decoder.decode([jpeg], [box])
    expected = simplejpeg.decode_jpeg(jpeg)[9:39, 21:54]
    torn = jpeg[: len(jpeg) // 2] + jpeg[-2:]
    is_equal = pixels is not None and np.array_equal(pixels, expected)
    return is_equal and decoder.decode([torn], [box]) == [None]
