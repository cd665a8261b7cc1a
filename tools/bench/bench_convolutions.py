"""A training step on a CPU in float32, and in bf16 with torch's convolutions and with ours.

    OMP_NUM_THREADS=1 python tools/bench/bench_convolutions.py convnext_atto --image-size 64
    OMP_NUM_THREADS=1 python tools/bench/bench_convolutions.py thumbnet --batch-size 256

Ours keeps depthwise convolutions in float32, and finds the weights' gradients of small maps with
images side by side. Forward and backward pass of random images, without optimizer; images per CPU
second, each variant once per round, in one order and in the other, ratios taken round by round.
Memory is kept between steps in huge pages, as in a run; after `ulimit -v 500000000` in small ones.
"""

import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from spread import spread

from wds_convnext.training.allocator import keep_freed_memory
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.model import create_model


@click.command(help=__doc__.partition("\n")[0])
@click.argument("model")
@click.option("--model-arg", multiple=True, metavar="KEY=VALUE")
@click.option("--image-size", default=32, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(
    model: str, model_arg: tuple[str, ...], image_size: int, batch_size: int, rounds: int
) -> None:
    keep_freed_memory()
    images = torch.randn(batch_size, 3, image_size, image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    variants = {  # precision, and whether convolutions are ours
        "float32": ("off", False),
        "bf16, torch's convolutions": ("bf16", False),
        "ours": ("bf16", True),
    }
    steps = {name: build_step(model, model_arg, images, *how) for name, how in variants.items()}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in [*steps.values()] * 2:  # twice to warm up
        step()
    for number in range(rounds):
        for name, step in [*steps.items()][:: 1 if number % 2 else -1]:
            start = time.process_time()
            step()
            rates[name].append(batch_size / (time.process_time() - start))
    for name, values in rates.items():
        ratios = [ours / value for ours, value in zip(rates["ours"], values)]
        line = f"{name}: {spread(values, '.0f')} images per CPU second"
        click.echo(line + f", ours {spread(ratios, '.2f')} times as many" * (name != "ours"))


def build_step(
    name: str, model_args: tuple[str, ...], images: torch.Tensor, amp: str, is_placed: bool
) -> Callable[[], None]:
    """A forward and a backward pass, as the machine computes them."""
    machine = Machine(World(), torch.device("cpu"), amp)
    model = create_model(name, num_classes=10, model_args=model_args).train()
    if is_placed:
        model = machine.place(model)
    model = model.to(memory_format=torch.channels_last)
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        with machine.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
