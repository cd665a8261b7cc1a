"""Kill a training run at many random moments, resume it each time, and compare bit for bit.

A run of the tiny test model is killed with SIGKILL (its whole process group) or stopped with
SIGTERM, SIGINT or SIGUSR1 at random moments, also while it starts and while it saves, and resumed
with another number of workers each time. At the end its weights, optimizer, average and sums must
equal those of a run that nobody touched. Prints one line per kill and a summary; exit code 1 if
a byte differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import torch

from wds_convnext.conversion import convert
from wds_convnext.errors import CheckpointError
from wds_convnext.training.checkpoint import load_checkpoint

RUN = {
    "--model": "test_convnext",
    "--image-size": 32,
    "--batch-size": 16,
    "--epochs": 24,
    "--warmup-epochs": 1,
    "--shuffle-buffer": 200,
    "--ema-decay": 0.9,
    "--save-every": 3,
    "--log-every": 5,
    "--val-every": 3,
    "--device": "cpu",
}
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def train_command(shards: Path, out: Path, *, workers: int) -> list[str]:
    options = [str(part) for pair in (RUN | {"--workers": workers}).items() for part in pair]
    places = ["--shards", str(shards / "train.json"), "--out", str(out), "--resume"]
    return [sys.executable, "-m", "wds_convnext", "train", *places, *options]


def same(one, two) -> bool:
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def outcome(out: Path) -> dict:
    content = load_checkpoint(out / "last.pt")
    return {k: v for k, v in content.items() if k not in ("facts", "epoch_seconds")}


def steps_done(out: Path) -> int:
    try:
        return load_checkpoint(out / "last.pt")["step"]
    except CheckpointError:
        return 0


@click.command()
@click.argument("parquet", type=click.Path(exists=True))
@click.option("--kills", default=40, show_default=True)
@click.option("--longest", default=8.0, show_default=True, help="Most seconds until a kill.")
@click.option("--seed", default=0, show_default=True)
def main(parquet: str, kills: int, longest: float, seed: int) -> None:
    """Torture a run on the shards of a small PARQUET folder."""
    rng, started, counts = random.Random(seed), time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        shards, out = Path(scratch) / "data", Path(scratch) / "run"
        convert(parquet, out=shards, jobs=1, quiet=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        straight = Path(scratch) / "straight"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        subprocess.run(train_command(shards, straight, workers=0), check=True, **quiet)
        for kill in range(kills):
            workers, signum = rng.choice([0, 1, 3]), rng.choice(SIGNALS)
            command = train_command(shards, out, workers=workers)
            process = subprocess.Popen(command, start_new_session=True, **quiet)
            time.sleep(rng.uniform(0, longest))
            if process.poll() is None:
                os.killpg(process.pid, signum)
                counts[signum.name] += 1
            code = process.wait()
            counts[f"exit code {code}"] += 1
            click.echo(
                f"{kill + 1}/{kills} {signum.name}, {workers} workers: step {steps_done(out)}"
            )
            if code == 0:
                break
        subprocess.run(train_command(shards, out, workers=2), check=True, **quiet)
        equal = same(outcome(out), outcome(straight))
        left = [path.name for path in out.glob("*.tmp")]
    click.echo(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    click.echo(f"temporary files left: {left or 'none'}; {time.monotonic() - started:.0f} s")
    click.echo("bit for bit equal to the untouched run" if equal else "DIFFERENT from it")
    sys.exit(0 if equal and not left else 1)


if __name__ == "__main__":
    main()
