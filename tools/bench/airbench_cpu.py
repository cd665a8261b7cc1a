"""Train cifar10-airbench's own 93 % network, with its own code, on a CPU in float32.

    OMP_NUM_THREADS=1 python tools/bench/airbench_cpu.py CHECKOUT data/{train,test}.json

Its code, a checkout of KellerJordan/cifar10-airbench, is imported as it is. What needs a GPU is
replaced while it runs: half precision is float32, the GPU is the CPU, and an event on the GPU's
clock is CPU time of this process. Images are the decoded JPEGs of the shards. Each epoch's line
ends with the CPU seconds of training so far, evaluation left out; the last line's have the
evaluation of six views in them, too.
"""

import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import click
import torch

from wds_convnext import open_dataset
from wds_convnext.progress import track
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.reader import SampleReader


class CpuClock:
    """Stands for torch.cuda.Event: milliseconds of CPU time, of all threads."""

    def __init__(self, enable_timing: bool = False):
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.process_time()

    def elapsed_time(self, end: "CpuClock") -> float:
        return 1e3 * (end.seconds - self.seconds)


def run_on_cpu() -> None:
    """Have torch do on the CPU, in float32, what is written for a GPU in half precision."""
    torch.nn.Module.cuda = lambda module: module
    torch.nn.Module.half = torch.nn.Module.float
    torch.Tensor.half = torch.Tensor.float
    torch.cuda.Event = CpuClock
    torch.cuda.synchronize = lambda: None
    load = torch.load
    torch.load = lambda path, **_: load(path, map_location="cpu", weights_only=True)


def write_images(spec: str, path: Path) -> None:
    """A split's images, uint8 (N, 32, 32, 3), and labels, as airbench reads them."""
    dataset = open_dataset(spec)
    numbers = track(range(len(dataset)), dataset.split, unit="images")
    with closing(SampleReader(dataset)) as reader:
        samples = [reader.read(number) for number in numbers]
    images = torch.stack([torch.from_numpy(decode_rgb(data).copy()) for data, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    classes = list(dataset.class_names)
    torch.save({"images": images, "labels": labels, "classes": classes}, path)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("airbench", type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.argument("train")
@click.argument("test")
@click.option("--epochs", default=11.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(airbench: str, train: str, test: str, epochs: float, seed: int) -> None:
    run_on_cpu()
    sys.path.insert(0, airbench)
    from airbench import train93

    with tempfile.TemporaryDirectory() as folder:
        (data := Path(folder, "cifar10")).mkdir()
        for spec, name in ((train, "train.pt"), (test, "test.pt")):
            write_images(spec, data / name)
        os.chdir(folder)
        torch.manual_seed(seed)
        train93(epochs=epochs)


if __name__ == "__main__":
    main()
