"""Decoding a random crop against its floor: the Huffman codes that nothing can skip.

    python tools/bench/bench_floor.py data/train.json --images 96 --rounds 7

A JPEG's Huffman codes have to be read one after the other, from the first row down to the lower
edge of the crop. The floor is that alone: libjpeg-turbo, through nvImageCodec, asked for 8 x 8
pixels at the left end of the crop's last rows, so that it skips all before them. One process, CPU
time; rounds go through all rows of the table in turn. "of the floor" is taken round by round.
Medians over the rounds, then lowest and highest.
"""

import time
from collections.abc import Callable

import click
import numpy as np
import torch
from spread import spread

from wds_convnext.progress import Progress
from wds_convnext.shards.boxdecoder import Box, box_decoder
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.jpeg import read_jpeg_header
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.transforms import TrainTransform

CORNER = 8  # pixels


def read_codes(data: bytes, box: Box) -> None:
    """Read the Huffman codes down to a box's lower edge."""
    side = min(CORNER, box.height)
    decoder = box_decoder()
    if decoder is None:
        raise click.ClickException("nvImageCodec is not installed here.")
    (pixels,) = decoder.decode([data], [Box(box.top + box.height - side, 0, side, CORNER)])
    assert pixels is not None  # known to decode


@click.command()
@click.argument("shards")
@click.option("--images", default=96, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--image-size", default=224, show_default=True)
def main(shards: str, images: int, rounds: int, image_size: int) -> None:
    """Measure the crops of the first images of SHARDS."""
    torch.set_num_threads(1)
    dataset = open_dataset(shards)
    reader, transform = SampleReader(dataset), TrainTransform(image_size, decoder="nvimgcodec")
    encoded = [reader.read(number)[0] for number in range(min(images, len(dataset)))]
    draws = np.random.default_rng(0).random((len(encoded), transform.NUM_DRAWS))
    boxes = []
    for data, row in zip(encoded, draws):
        if (header := read_jpeg_header(data)) is None or not header.is_one_run:
            raise click.ClickException("the images are to be JPEGs of one scan, without restarts.")
        boxes.append(transform.crop_box(row, header.height, header.width))
    works: dict[str, Callable] = {
        "Huffman codes alone": lambda data, box, row: read_codes(data, box),
        "crop": lambda data, box, row: transform.crop(data, row),
        "crop and resize": lambda data, box, row: transform(data, row),
        "simplejpeg, crop": lambda data, box, row: decode_rgb(data, lambda h, w: box),
    }
    costs: dict[str, list[float]] = {name: [] for name in works}
    progress = Progress("floor", total=rounds, unit="rounds")
    for _ in range(rounds):
        for name, work in works.items():
            started = time.process_time()
            for arguments in zip(encoded, boxes, draws):
                work(*arguments)
            costs[name].append(1e3 * (time.process_time() - started) / len(encoded))
        progress.add(1, 0)
    progress.close()
    floor = costs["Huffman codes alone"]
    for name, values in costs.items():
        ratio = spread([cost / least for cost, least in zip(values, floor)], ",.2f")
        cost = spread(values, ",.2f")
        print(f"{name:22}{cost:>24} CPU ms   {ratio:>18} of the floor, n = {rounds}")


if __name__ == "__main__":
    main()
