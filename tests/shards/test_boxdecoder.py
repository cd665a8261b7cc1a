"""nvImageCodec gives simplejpeg's pixels, where it is used; the user never hears of it."""

import itertools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HANG_S, write_tar
from parquet_sets import encode, image_table, write_split
from test_decode import JPEG_KINDS, crop, encode_jpeg

from wds_convnext.check.index import index
from wds_convnext.config import TrainConfig
from wds_convnext.conversion import convert
from wds_convnext.errors import UsageError
from wds_convnext.shards.boxdecoder import PACKAGE, Box, box_decoder, is_installed
from wds_convnext.shards.decode import (
    DECODERS,
    check_decoder,
    decode_boxes,
    decode_rgb,
    decoder_versions,
    whole_image,
)
from wds_convnext.shards.limits import ImageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import TrainTransform

needs_nvimgcodec = pytest.mark.skipif(not is_installed(), reason=f"{PACKAGE} is not installed")


def random_box(rng, height, width):
    box_height, box_width = rng.integers(1, height + 1), rng.integers(8, width + 1)
    top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
    return Box(*map(int, (top, left, box_height, box_width)))


@needs_nvimgcodec
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_box_has_the_pixels_of_the_strict_decoder(kind):
    """Boxes anywhere in images of odd sizes, for every layout of a JPEG that it takes at all."""
    rng, decoder = np.random.default_rng(1), box_decoder()
    for _ in range(12):
        height, width = map(int, rng.integers(8, 120, 2))
        encoded = encode_jpeg(height, width, **JPEG_KINDS[kind])
        for box in [random_box(rng, height, width) for _ in range(12)]:
            (pixels,) = decoder.decode([encoded], [box])

            if kind != "CMYK":  # Pillow's alone; `decode_rgb` does not ask
                np.testing.assert_array_equal(pixels, crop(decode_rgb(encoded), box))


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_all_decoders_give_the_same_pixels(kind):
    encoded = encode_jpeg(203, 311, **JPEG_KINDS[kind])
    boxes = [Box(0, 0, 203, 311), Box(61, 30, 90, 111), Box(0, 200, 203, 111), Box(202, 7, 1, 1)]

    for box, decoder in itertools.product(boxes, DECODERS):
        if decoder != "nvimgcodec" or is_installed():
            pixels = decode_rgb(encoded, lambda *size, box=box: box, decoder=decoder)
            np.testing.assert_array_equal(pixels, crop(decode_rgb(encoded), box))


@needs_nvimgcodec
def test_pixels_that_are_held_are_not_overwritten():
    """Its memory is used again, but not while somebody looks at it; also when it has to grow."""
    decoder, held = box_decoder(), []
    for size in (40, 40, 90, 30, 40):
        encoded = encode_jpeg(size, size + size % 7)
        (pixels,) = decoder.decode([encoded], [Box(2, 3, size - 4, size - 5)])
        held.append((pixels, decode_rgb(encoded)[2 : size - 2, 3 : size - 2].copy()))

    for pixels, expected in held:
        np.testing.assert_array_equal(pixels, expected)


def damaged_jpegs():
    """Noise in the middle, cut short with an end mark, and bytes left out."""
    encoded = encode_jpeg(240, 320)
    start, end = len(encoded) // 4, len(encoded) // 3
    noise = np.random.default_rng(0).integers(0, 256, end - start, dtype=np.uint8).tobytes()
    return [encoded[:start] + junk + encoded[end:] for junk in (noise, b"", b"\xff\xd9" * 20)]


@needs_nvimgcodec
@pytest.mark.parametrize("number", range(3))
def test_damage_is_refused_as_by_the_strict_decoder(number):
    encoded = damaged_jpegs()[number]
    box = Box(0, 40, 240, 100)
    with pytest.raises(ImageError) as strict:
        decode_rgb(encoded, lambda *size: box)

    with pytest.raises(ImageError) as found:
        decode_rgb(encoded, lambda *size: box, decoder="nvimgcodec")

    assert str(found.value) == str(strict.value)


@needs_nvimgcodec
def test_boxes_decoded_together_are_those_decoded_alone():
    """None is left to the strict decoder: what is damaged, and those that met it in one call."""
    sound = [encode_jpeg(220 + n, 260) for n in range(3)] + [encode_jpeg(20, 30)]
    large = encode_jpeg(1100, 1200)
    boxes = [Box(n, 2 * n, 18, 20 + n) for n in range(4)]

    together = decode_boxes(
        [*sound, large], [*(lambda *size, box=box: box for box in boxes), whole_image]
    )
    damaged = decode_boxes([sound[3], damaged_jpegs()[0], sound[1], b"GIF"], [whole_image] * 4)
    torn = decode_boxes([sound[0], damaged_jpegs()[0]], [lambda *size: Box(0, 40, 200, 100)] * 2)

    for encoded, box, pixels in zip(sound, boxes, together):
        np.testing.assert_array_equal(pixels, crop(decode_rgb(encoded), box))
    assert together[4] is None  # 1.3 megapixels are not kept in memory with others
    assert [pixels is None for pixels in damaged] == [False, True, False, True]
    assert torn == [None, None]


_SCRIPT = """
import sys, os
from wds_convnext.shards.boxdecoder import Box, box_decoder
before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    assert box_decoder().decode([data], [Box(0, 40, 240, 100)]) == [None]
assert box_decoder().decode([b"no image"], [Box(0, 0, 9, 9)]) == [None]
after = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
print(after[0] - before[0], after[1] - before[1])
os.write(2, b"still there")
"""


def run_alone(program: str, *paths: Path) -> subprocess.CompletedProcess:
    """In a process that nobody forked: one of multiprocessing counts as a loader worker."""
    command = [sys.executable, "-c", program, *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_S)


@needs_nvimgcodec
def test_nothing_that_it_says_reaches_the_user(tmp_path):
    """Neither of missing CUDA libraries at the import nor of damage; it takes two descriptors."""
    for number, encoded in enumerate(damaged_jpegs()):
        (tmp_path / f"{number}.jpg").write_bytes(encoded)

    done = run_alone(_SCRIPT, *sorted(tmp_path.iterdir()))

    assert done.stderr == "still there"
    assert done.stdout.split() == ["2", "0"]  # and no thread


_SCRIPT_OF_TWO = """
import os, sys, threading, time
from wds_convnext.shards.boxdecoder import Box, box_decoder
data, is_over, decoder = open(sys.argv[1], "rb").read(), threading.Event(), box_decoder()
def write():
    for number in range(300):
        os.write(2, b"line %d\\n" % number)
        time.sleep(0.0003)
    is_over.set()
thread = threading.Thread(target=write)
thread.start()
while not is_over.is_set():
    decoder.decode([data], [Box(0, 40, 240, 100)])
thread.join()
"""


@needs_nvimgcodec
def test_lines_of_other_threads_are_not_lost(tmp_path):
    """Where a trainer decodes itself (`--workers 0 --decoder nvimgcodec`)."""
    (tmp_path / "sound.jpg").write_bytes(encode_jpeg(240, 320))

    done = run_alone(_SCRIPT_OF_TWO, tmp_path / "sound.jpg")

    assert sorted(done.stderr.splitlines()) == sorted(f"line {n}" for n in range(300))


def write_large_shards(folder: Path, *, damage: int | None = None) -> Path:
    members = []
    for number in range(6):
        data = encode_jpeg(220 + number, 260)
        if number == damage:
            data = damaged_jpegs()[0]
        members += [(f"{number}.jpg", data), (f"{number}.cls", b"%d" % (number % 2))]
    folder.mkdir()
    write_tar(folder / "train-000.tar", members)
    return folder


def batches_of(folder, *, decoder="auto", workers=1):
    dataset = open_dataset(str(folder))
    order = TrainOrder(dataset.sizes, 0, 6, 100)
    transform = TrainTransform(32, scale=(0.05, 0.4), decoder=decoder)
    stream = ShardStream(dataset, order, batch_size=6, transform=transform)
    loader = make_loader(stream, workers=workers)
    images = [next(loader).images.numpy() for _ in range(3)]
    used = [num_decoders(w.pid) for w in multiprocessing.active_children()]
    loader.close()
    return np.stack(images), max(used, default=0) > num_decoders(os.getpid())


def num_decoders(pid):
    """A decoder has a file of its own to which it turns stderr; a fork has those of its parent."""
    return sum("memfd:stderr" in os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").glob("*"))


@needs_nvimgcodec
def test_workers_use_it_for_samples_that_are_known_to_decode(tmp_path):
    """Once `index --check decode` has looked; before, nobody knows what it would let pass."""
    folder = write_large_shards(tmp_path / "shards")
    index(str(folder), jobs=1, quiet=True)
    strict, uses_before = batches_of(folder)

    index(str(folder), jobs=1, quiet=True, check="decode")

    images, uses_now = batches_of(folder)
    assert (uses_before, uses_now) == (False, True)
    np.testing.assert_array_equal(images, strict)
    np.testing.assert_array_equal(batches_of(folder, workers=0)[0], strict)
    assert batches_of(folder, decoder="simplejpeg")[1] is False


def test_indexing_notes_which_images_decode(tmp_path):
    folder = write_large_shards(tmp_path / "shards", damage=4)
    index(str(folder), jobs=1, quiet=True)
    assert known(folder) == [False] * 6

    report = index(str(folder), jobs=1, quiet=True, check="decode")

    assert known(folder) == [True, True, True, True, False, True]
    assert f"do not decode: 1, the first is {folder}/train-000.tar, key 4: " in str(report)


def known(folder):
    dataset = open_dataset(str(folder))
    reader = SampleReader(dataset)
    return [reader.is_known_to_decode(number) for number in range(len(dataset))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_conversion_notes_that_images_decode_where_it_decodes_them(tmp_path, shuffle):
    images, labels = [encode(number) for number in range(5)], [0, 1, 0, 1, 0]
    write_split(tmp_path / "in", "train", image_table(images, labels, class_names=["a", "b"]))
    for check in ("header", "decode"):
        options = {"jobs": 1, "quiet": True, "shuffle": shuffle, "check": check}
        convert(str(tmp_path / "in"), out=str(tmp_path / check), **options)

    assert known(tmp_path / "header") == [False] * 5
    assert known(tmp_path / "decode") == [True] * 5


def test_a_decoder_is_one_that_is_known_and_installed():
    for decoder in DECODERS:
        assert TrainConfig(decoder=decoder).decoder == decoder
    with pytest.raises(UsageError, match="expected one of auto, nvimgcodec"):
        check_decoder("simplejpg")
    if not is_installed():
        with pytest.raises(UsageError, match="not installed"):
            TrainTransform(decoder="nvimgcodec")


def test_checkpoints_name_the_decoders_that_count():
    assert decoder_versions("pillow").startswith("pillow ")
    assert decoder_versions("simplejpeg").startswith("simplejpeg ")
    assert ("nvimgcodec" in decoder_versions("auto")) == is_installed()


@needs_nvimgcodec
def test_a_fork_gets_a_decoder_of_its_own():
    encoded, box = encode_jpeg(60, 70), Box(5, 6, 40, 50)
    expected = box_decoder().decode([encoded], [box])[0].copy()

    pid = os.fork()
    if pid == 0:
        is_equal = np.array_equal(box_decoder().decode([encoded], [box])[0], expected)
        os._exit(0 if is_equal else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
