"""The same training by timm's own train.py and by ours: test accuracy over seeds.

    OMP_NUM_THREADS=1 python tools/bench/parity_timm.py pytorch-image-models data/train.json \
        data/test.json --work parity --epochs 4

The first argument is a checkout of timm's repository, which has train.py (its wheel has not).
Both train the same timm model on the same JPEG files (a folder per class for timm, shards made of
these folders for ours), with the same number of steps, the same recipe and the same seeds, and
evaluate the whole test split after the last step. A seed does not give both the same draws or
starting weights, so the means over seeds are compared. train.py runs as it is, with the timm that
lies next to it.
"""

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click

from wds_convnext import open_dataset
from wds_convnext.files import write_atomically
from wds_convnext.shards.reader import SampleReader

MEAN, STD = "0.4914 0.4822 0.4465", "0.2470 0.2435 0.2616"
# Name of the option there, its value, name here. timm's --epochs are without the one of warm-up.
SHARED = [
    ("--img-size", 32, "--image-size"),
    ("--crop-pct", 1.0, "--crop"),
    ("--batch-size", 100, "--batch-size"),
    ("--opt", "adamw", "--optimizer"),
    ("--lr", 2e-3, "--lr"),
    ("--weight-decay", 0.05, "--weight-decay"),
    ("--warmup-epochs", 1, "--warmup-epochs"),
    ("--warmup-lr", 1e-6, "--warmup-lr"),
    ("--min-lr", 2e-6, "--min-lr"),
    ("--clip-grad", 1.0, "--clip-grad-norm"),
    ("--color-jitter", 0.4, "--color-jitter"),
    ("--mixup", 0.8, "--mixup"),
    ("--cutmix", 1.0, "--cutmix"),
    ("--mixup-prob", 0.5, "--mix-prob"),
    ("--smoothing", 0.1, "--label-smoothing"),
    ("--workers", 1, "--workers"),
]
THEIRS = (
    f"--num-classes 10 --mean {MEAN} --std {STD} --interpolation bilinear --train-interpolation "
    "bilinear --scale 0.4 1.0 --sched cosine --sched-on-updates --warmup-prefix --device cpu "
    "--train-split train --val-split test --checkpoint-hist 1 --val-interval 1000"
)
OURS = (
    f"--mean {MEAN.replace(' ', ',')} --std {STD.replace(' ', ',')} --interpolation bilinear "
    "--min-crop 0.4 --drop-path-rate 0 --device cpu --val-every 1000 --log-every 100 --overwrite"
)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("timm", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("train")
@click.argument("test")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--images", default=10_000, show_default=True, help="Of the training split.")
@click.option("--model", default="test_convnext", show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--extra", default="", help="More options for ours, as '--optimizer adamp'.")
@click.option("--skip-timm", is_flag=True, help="Train ours alone.")
def main(timm, train, test, work, images, model, epochs, seeds, extra, skip_timm) -> None:
    folder, shards = work / "folders", work / "shards"
    if not shards.exists():
        write_folders(train, folder / "train", limit=images)
        write_folders(test, folder / "test")
        call([sys.executable, "-m", "wds_convnext", "shards", folder, "--out", shards])
    runs = {} if skip_timm else {"timm": lambda seed: run_timm(timm, folder, seed, model, epochs)}
    runs["ours"] = lambda seed: run_ours(work, seed, model, epochs, extra.split())
    found: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(seeds):
        for name, run in runs.items():
            before = cpu_seconds()
            found[name].append(run(seed))
            spent = cpu_seconds() - before
            click.echo(f"seed {seed}, {name}: {found[name][-1]:.2f} %, {spent:.0f} CPU seconds")
    for name, top1 in found.items():
        click.echo(f"{name}: mean {statistics.mean(top1):.2f} %, {error(top1):.2f} standard error")
    if not skip_timm:
        difference = statistics.mean(found["ours"]) - statistics.mean(found["timm"])
        of_both = (error(found["ours"]) ** 2 + error(found["timm"]) ** 2) ** 0.5
        click.echo(f"ours less timm: {difference:+.2f}, {of_both:.2f} standard error")


def write_folders(spec: str, folder: Path, *, limit: int | None = None) -> None:
    """Write a split's first images as files, as they are, in a folder per class."""
    dataset = open_dataset(spec)
    with closing(SampleReader(dataset)) as reader:
        for number in range(limit or len(dataset)):
            data, label = reader.read(number)
            path = folder / f"{label:03d}-{dataset.class_names[label]}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)


def run_timm(timm: Path, folder: Path, seed: int, model: str, epochs: int) -> float:
    """Test accuracy in percent after train.py's last step."""
    out = folder.parent / "timm"
    options = [text for name, value, _ in SHARED for text in (name, str(value))]
    options += [*THEIRS.split(), "--model", model, "--epochs", str(epochs - 1), "--seed", str(seed)]
    name = f"{model}-{seed}"
    call(
        [sys.executable, timm / "train.py", "--data-dir", folder, *options]
        + ["--output", out, "--experiment", name],
        PYTHONPATH=str(timm),
    )
    newest = max(out.glob(f"{name}*/summary.csv"), key=os.path.getmtime)
    return float(list(csv.DictReader(newest.open()))[-1]["eval_top1"])


def run_ours(work: Path, seed: int, model: str, epochs: int, extra: list[str]) -> float:
    """Test accuracy in percent after our last step."""
    out = work / "ours"
    options = [text for _, value, name in SHARED for text in (name, str(value))]
    options += [*OURS.split(), "--model", model, "--epochs", str(epochs), "--seed", str(seed)]
    call(
        [sys.executable, "-m", "wds_convnext", "train", "--shards", work / "shards" / "train.json"]
        + ["--val-shards", work / "shards" / "test.json", *options, "--out", out, *extra]
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(x["val/accuracy"] for x in reversed(lines) if "val/accuracy" in x)


def call(command: list, **env: str) -> None:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | env
    )
    if result.returncode:
        raise click.ClickException(f"{command[1]}: {(result.stdout + result.stderr)[-2000:]}")


def cpu_seconds() -> float:
    """Of the programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def error(values: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
