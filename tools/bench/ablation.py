"""Each lever of the cifar10 recipe off or on alone: test accuracy of a narrow ThumbNet.

    OMP_NUM_THREADS=1 python tools/bench/ablation.py parity/shards/{train,test}.json

The shards are the 10,000 training images of `parity_timm.py` and the test split. With one seed it
ranks levers and proves none: the standard error of 75 % of 10,000 images is 0.4, and seeds scatter
by about as much. It shows what the recipe's parts give; to choose parts, give a validation split.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click

BASE = "--recipe cifar10 --model-arg widths=(32,64,128) --epochs 6 --warmup-epochs 1 --val-every 6"
LEVERS = {  # of an option that is given twice, the last counts
    "the recipe": "",
    "no translation (2 pixels)": "--crop-padding 0",
    "black borders in place of mirrored ones": "--padding-mode constant",
    "no flip": "--hflip 0",
    "no label smoothing": "--label-smoothing 0",
    "Nesterov's SGD in place of Muon": (
        "--optimizer sgd --lr 0.4 --momentum 0.85 --weight-decay 1.3e-3"
    ),
    "no warm-up": "--warmup-epochs 0",
    "no weight decay": "--weight-decay 0",
    "float32 in place of bf16": "--amp off",
    "widths 32, 64, 64": "--model-arg widths=(32,64,64)",
    "an average of the weights (EMA 0.98) added": "--ema-decay 0.98",
    "Mixup 0.2 added": "--mixup 0.2",
    "random erasing added": "--random-erasing 0.25",
    "24 pixels in the first half": "--image-size-schedule 0:24,0.5:32",
}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("train")
@click.argument("test")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", default="", help="Levers with this in their name.")
def main(train: str, test: str, seed: int, only: str) -> None:
    for name, changed in LEVERS.items():
        if only not in name:
            continue
        before = cpu_seconds()
        options = [*BASE.split(), *changed.split(), "--seed", str(seed)]
        top1 = test_accuracy(train, test, options)
        click.echo(f"{name}: {top1:.1f} %, {cpu_seconds() - before:.0f} CPU seconds")


def test_accuracy(train: str, test: str, options: list[str]) -> float:
    """In percent, after the last step."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "wds_convnext", "train", *options]
        command += ["--shards", train, "--val-shards", test, "--out", out, "--overwrite"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise click.ClickException(result.stdout[-1000:] + result.stderr[-1000:])
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["val/accuracy"] for entry in entries if "val/accuracy" in entry][-1]


def cpu_seconds() -> float:
    """Of the programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
