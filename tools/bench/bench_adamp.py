"""AdamP's step on a CPU: ours and timm's in turn, on the same gradients of a real model.

    python tools/bench/bench_adamp.py --rounds 9

A round is a forward and backward pass of a small random batch, then a step of each optimizer on
twins of the model, the first alternating. Printed are CPU milliseconds of a step (median, lowest
and highest), and ours over timm's, taken round by round. The twins have to stay equal to the last
bit, which one thread makes sure of.
"""

import copy
import time

import click
import timm
import torch
from spread import spread
from timm.optim import AdamP as TimmAdamP

from wds_convnext.training.adamp import AdamP, parameter_groups

WARM_UP = 2  # rounds that are not counted


@click.command(help=__doc__.partition("\n")[0])
@click.option("--models", default="convnext_atto,convnext_base", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--image-size", default=64, show_default=True)
@click.option("--found-inf/--no-found-inf", default=True, help="As train sets it.")
def main(models: str, rounds: int, image_size: int, found_inf: bool) -> None:
    torch.set_num_threads(1)
    for name in models.split(","):
        ours, theirs = measure(name, rounds=rounds, image_size=image_size, found_inf=found_inf)
        ratios = [x / y for x, y in zip(ours, theirs, strict=True)]
        click.echo(
            f"{name}: ours {spread(ours, '.1f')} ms, timm {spread(theirs, '.1f')} ms, "
            f"ours is {spread(ratios, '.2f')} of it (n = {rounds})"
        )


def measure(
    name: str, *, rounds: int, image_size: int, found_inf: bool
) -> tuple[list[float], list[float]]:
    """CPU milliseconds of the steps of ours and of timm's."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    ours = AdamP(parameter_groups(model, weight_decay=0.05), lr=1e-3)
    theirs = TimmAdamP(parameter_groups(twin, weight_decay=0.05), lr=1e-3)
    if found_inf:
        ours.found_inf = torch.zeros(())
    spent: tuple[list[float], list[float]] = [], []
    for round in range(WARM_UP + rounds):
        images = torch.randn(4, 3, image_size, image_size)
        loss = torch.nn.functional.cross_entropy(model(images), torch.randint(100, (4,)))
        loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone(memory_format=torch.preserve_format)
        turns = [(ours, spent[0]), (theirs, spent[1])]
        for optimizer, times in turns if round % 2 else reversed(turns):
            started = time.process_time()
            optimizer.step()
            times.append(1000 * (time.process_time() - started))
            optimizer.zero_grad()
    if not all(map(torch.equal, model.parameters(), twin.parameters())):
        raise click.ClickException(f"{name}: the two optimizers have come to different weights.")
    return spent[0][WARM_UP:], spent[1][WARM_UP:]


if __name__ == "__main__":
    main()
