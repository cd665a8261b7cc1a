"""A short training on this machine's GPU: against its CPU, and against itself resumed.

    python tools/bench/train_on_gpu.py cifar/train-000.tar

`wds-convnext shards CIFAR10_PARQUET --out cifar` writes that shard. The package need not be
installed; what a bare machine lacks, `make carried` gets (`bench_step`).
First a few steps in float32, uncompiled, on the CPU and on the device: samples, crops, mixing and
starting weights are the same, so what differs is rounding (a GPU's convolutions round to TF32).
Then a run with the defaults of a user, twice: in one go, and stopped in mid-epoch and resumed, from
where on losses of the two differ by rounding, too. Prints the largest relative differences, the
first and last losses and images/s; on a machine without a GPU all differences are 0.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
# Long enough that the schedule goes on behind the last step.
OPTIONS = ["--log-every", "1", "--epochs", "100", "--seed", "0", "--save-every", "1000000"]


def train(out: Path, *options: str) -> list[dict]:
    """Run the command line; gives the lines of its metrics."""
    command = [sys.executable, "-m", "wds_convnext", "train", "--out", str(out), *OPTIONS, *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    click.echo(f"{out.name}: {time.perf_counter() - start:.0f} s", err=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(metrics: list[dict], name: str = "train/loss") -> list[float]:
    return [line[name] for line in metrics if name in line]


def furthest(ours: list[float], others: list[float]) -> str:
    """The largest relative difference, and how many values it is of."""
    apart = max(abs(one - other) / abs(other) for one, other in zip(ours, others, strict=True))
    return f"furthest apart {apart:.1e} of the loss, {len(ours)} steps"


@click.command()
@click.argument("shards")
@click.option("--model", default="convnext_tiny", show_default=True)
@click.option("--image-size", default=64, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--device", default="auto", show_default=True, help="What the CPU is compared with.")
@click.option("--first-steps", default=10, show_default=True, help="Of CPU and device.")
@click.option("--steps", default=300, show_default=True, help="Of the run that is resumed.")
@click.option("--stop-at", default=170, show_default=True, help="A step in mid-epoch.")
def main(shards, model, image_size, batch_size, device, first_steps, steps, stop_at) -> None:
    """Train on SHARDS, stop, resume and compare."""
    setting = ["--shards", shards if "://" in shards else str(Path(shards).absolute())]
    setting += ["--model", model, "--image-size", str(image_size), "--batch-size", str(batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plain = [*setting, "--amp", "off", "--no-compile", "--max-steps", str(first_steps)]
        on_cpu = curve(train(scratch / "cpu", *plain, "--device", "cpu"))
        on_device = curve(train(scratch / "device", *plain, "--device", device))
        click.echo(f"CPU:    {' '.join(f'{loss:.4f}' for loss in on_cpu)}")
        click.echo(f"device: {' '.join(f'{loss:.4f}' for loss in on_device)}")
        click.echo(f"float32: {furthest(on_device, on_cpu)}")

        setting += ["--device", device, "--max-steps"]
        whole = train(scratch / "in one go", *setting, str(steps))
        train(scratch / "resumed", *setting, str(stop_at))
        resumed = train(scratch / "resumed", *setting, str(steps), "--resume")
        apart = furthest(curve(resumed)[stop_at:], curve(whole)[stop_at:])
        click.echo(f"resumed at step {stop_at}: {apart}")
        for name, metrics in (("in one go", whole), ("resumed", resumed)):
            losses, rates = curve(metrics), curve(metrics, "train/images_per_s")
            click.echo(
                f"{name}: loss {losses[0]:.3f} .. {losses[-1]:.3f}, {rates[-1]:,.0f} images/s"
            )


if __name__ == "__main__":
    main()
