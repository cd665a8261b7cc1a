"""What the half-precision residual stream does to the loss: first steps next to plain timm's.

    OMP_NUM_THREADS=1 python tools/bench/bench_precision.py --shards cifar/train.json

Under autocast timm's ConvNeXt hands a float32 tensor from block to block, ours a bf16 one
(`training/precision.py`). Each seed gives the starting weights; batches and draws are the same for
all. From each start four runs are made, and compared over the second half of their steps:

- plain: timm's model under autocast to bf16;
- ours: with the stream in bf16;
- nudged: plain, each starting weight off by one unit in its last place, up or down. The yardstick
  of rounding: training doubles a difference every few steps, so no change of rounding, however
  harmless, stays nearer to plain than this one;
- float32: timm's model without autocast, so what autocast itself changes.

Two plain runs of different seeds are the yardstick of what a user cannot tell apart. The distance
of two curves is the mean of |difference|, which rounding alone makes; their shift is the mean of
the difference, which would show a model that learns worse.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import click
import timm
import torch

from wds_convnext.config import TrainConfig
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream
from wds_convnext.stream.transforms import Preprocessing, TrainTransform
from wds_convnext.training.distributed import Machine, World
from wds_convnext.training.schedule import lr_at
from wds_convnext.training.state import build_state
from wds_convnext.training.step import build_recipe, train_step

OFF = {"mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0, "label_smoothing": 0.0}


def first_batches(dataset: Dataset, *, image_size: int, batch_size: int, steps: int):
    """The batches of a run's first steps, from the training loader's stream."""
    order = TrainOrder(
        dataset.sizes, seed=0, global_batch_size=batch_size, shuffle_buffer=len(dataset)
    )
    transform = TrainTransform(image_size)
    stream = ShardStream(dataset, order, batch_size=batch_size, transform=transform)
    return list(itertools.islice(stream, steps))


def timms_model(
    name: str, *, num_classes: int, drop_path_rate: float, model_args: Sequence[str]
) -> torch.nn.Module:
    """What `create_model` gives, as timm makes it."""
    assert not drop_path_rate and not model_args
    return timm.create_model(name, num_classes=num_classes)


@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Move each weight to a neighbour among the float32 numbers."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        up = torch.rand(parameter.shape, generator=rng) < 0.5
        towards = torch.where(up, torch.inf, -torch.inf)
        parameter.copy_(torch.nextafter(parameter, towards))


def losses_of(
    config: TrainConfig,
    batches: list[Batch],
    num_classes: int,
    *,
    amp: str = "bf16",
    is_timms: bool = True,
    change: Callable[[torch.nn.Module], None] | None = None,
) -> list[float]:
    """The losses of one run over the batches."""
    machine = Machine(World(), torch.device("cpu"), amp)
    # The CPU stands for a GPU, where convolutions are torch's.
    with ExitStack() as patched:
        where = "wds_convnext.training."
        patched.enter_context(patch(where + "distributed.fit_convolutions_to_a_cpu"))
        if is_timms:
            patched.enter_context(patch(where + "model.create_model", timms_model))
        state, _ = build_state(config, num_classes=num_classes, machine=machine)
    if change:
        change(state.model)
    recipe = build_recipe(
        config,
        state,
        num_classes=num_classes,
        machine=machine,
        preprocessing=Preprocessing(config.image_size),
    )
    recipe = replace(recipe, seed=0)
    schedule = {"lr": config.lr, "warmup_lr": config.warmup_lr, "min_lr": config.min_lr}
    schedule |= {"total_steps": 20 * len(batches), "warmup_steps": len(batches) // 5}
    return [
        train_step(state, [batch], lr=lr_at(step, **schedule), recipe=recipe).item()
        for step, batch in enumerate(batches)
    ]


RUNS = {
    "plain": {},
    "ours": {"is_timms": False},
    "nudged": {"change": nudge},
    "float32": {"amp": "off"},
}


def compare(one: list[float], other: list[float]) -> dict[str, float]:
    """Distance and shift over the second half of two curves."""
    half = len(one) // 2
    differences = [a - b for a, b in zip(one[half:], other[half:])]
    return {
        "distance": statistics.fmean(map(abs, differences)),
        "shift": statistics.fmean(differences),
    }


def summarize(pairs: list[dict[str, float]]) -> dict:
    """Of all pairs of one kind: the mean distance, its range, and the mean shift with its error."""
    distances, shifts = ([pair[name] for pair in pairs] for name in ("distance", "shift"))
    error = statistics.stdev(shifts) / len(shifts) ** 0.5 if len(shifts) > 1 else None
    return {
        "num_pairs": len(pairs),
        "distance": statistics.fmean(distances),
        "distances": distances,
        "shift": statistics.fmean(shifts),
        "shift_error": error,
        "shifts": shifts,
    }


def compare_all(curves: list[dict[str, list[float]]]) -> dict[str, dict]:
    """Every run against plain from the same start, and plain against plain from another."""
    pairs = {
        f"{name} and plain": [compare(of_seed[name], of_seed["plain"]) for of_seed in curves]
        for name in RUNS
        if name != "plain"
    }
    plain = [of_seed["plain"] for of_seed in curves]
    pairs["plain, two seeds"] = [compare(*two) for two in itertools.combinations(plain, 2)]
    return {name: summarize(of_kind) for name, of_kind in pairs.items() if of_kind}


def format_table(results: dict[str, dict]) -> str:
    lines = ["| curves | pairs | distance, mean (min..max) | shift, mean +- standard error |"]
    lines.append("|---|---:|---:|---:|")
    for name, row in results.items():
        low, high = min(row["distances"]), max(row["distances"])
        error = "" if row["shift_error"] is None else f" +- {row['shift_error']:.4f}"
        lines.append(
            f"| {name} | {row['num_pairs']} | {row['distance']:.4f} ({low:.4f}..{high:.4f}) "
            f"| {row['shift']:+.4f}{error} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--shards", required=True, help="Of real images.")
@click.option("--model", default="convnext_atto", show_default=True)
@click.option("--image-size", default=32, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--lr", default=2e-3, show_default=True, help="After a warm-up of a fifth.")
@click.option("--json", "json_path", type=Path, help="Write all losses there.")
def main(shards, model, image_size, batch_size, steps, seeds, lr, json_path):
    """Compare the first losses of ours with plain timm's, on the CPU."""
    dataset = open_dataset(shards)
    batches = first_batches(dataset, image_size=image_size, batch_size=batch_size, steps=steps)
    curves = []
    for seed in range(seeds):
        size = {"image_size": image_size, "batch_size": batch_size}
        config = TrainConfig(model=model, lr=lr, seed=seed, **size, **OFF)
        curves.append(
            {
                name: losses_of(config, batches, dataset.num_classes, **options)
                for name, options in RUNS.items()
            }
        )
        ends = {name: statistics.fmean(losses[-20:]) for name, losses in curves[-1].items()}
        click.echo(
            f"seed {seed}: loss of the first step {curves[-1]['plain'][0]:.3f}, of the last 20 "
            + ", ".join(f"{name} {loss:.3f}" for name, loss in ends.items())
        )
    results = compare_all(curves)
    click.echo(
        f"\n{model}, {image_size} px, {dataset.name}, {steps} steps of {batch_size}, "
        f"{seeds} seeds; steps {steps // 2 + 1} to {steps}; torch {torch.__version__}, "
        f"timm {timm.__version__}\n\n{format_table(results)}"
    )
    if json_path:
        report = {"model": model, "results": results, "curves": curves}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
