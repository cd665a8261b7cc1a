"""The images of a report, as the model sees them: in the page, and as a sheet."""

import base64
import io
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from PIL import Image

from wds_convnext.errors import DataError, ShardError
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.transforms import EvalTransform
from wds_convnext.training.batchsheet import BatchSheet

_SIDE = 128  # pixels in the page
SMALL = 64  # images up to this are kept pixel by pixel


class Pictures:
    """Samples as the model sees them; one that cannot be read is gray."""

    def __init__(self, dataset: Dataset, transform: EvalTransform):
        self.dataset, self.transform = dataset, transform

    def pixels(self, numbers: Sequence[int]) -> torch.Tensor:
        """uint8 (len(numbers), 3, S, S)."""
        size = self.transform.image_size
        images = torch.full((len(numbers), 3, size, size), 128, dtype=torch.uint8)
        with closing(SampleReader(self.dataset)) as reader:
            for i, number in enumerate(numbers):
                try:
                    images[i] = self.transform(reader.read(number)[0])
                except (DataError, ShardError):
                    continue
        return images

    def name(self, number: int) -> str:
        """Shard and key, as far as they can be read."""
        with closing(SampleReader(self.dataset)) as reader:
            where = reader.describe(number)
        return f"{where['shard']}, {where['key']}"

    def urls(self, numbers: Sequence[int]) -> list[str]:
        """A `data:` URL for each sample."""
        return [_url(image) for image in self.pixels(numbers)]

    def sheet(self, numbers: Sequence[int], title: str, captions: list[tuple[str, str]]) -> bytes:
        """A PNG of samples with two lines under each."""
        size = self.transform.image_size
        sheet = BatchSheet(num_batches=1, batch_size=len(numbers), image_size=size)
        sheet.add(title, self.pixels(numbers), captions)
        file = io.BytesIO()
        sheet.image.save(file, "PNG")
        return file.getvalue()


def _url(image: torch.Tensor) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    file = io.BytesIO()
    if picture.width <= SMALL:
        picture.save(file, "PNG")
        kind = "png"
    else:
        picture.thumbnail((_SIDE, _SIDE))
        picture.save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
