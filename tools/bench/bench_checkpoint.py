"""Memory and time of resuming: a checkpoint of some size loaded into a model and its optimizer.

    python tools/bench/bench_checkpoint.py --gigabytes 1

Each way runs in a process of its own, which already holds a fresh model, its average and an
optimizer without state, as a run has when it resumes:

- ours: `load_checkpoint` (the CRCs compared, the file mapped) and `TrainState.load_state_dict`;
- torch.load: the whole file read into memory and unpickled, then the same `load_state_dict`;
- version 0.1.0: the file's bytes read, hashed and unpickled from memory.

Anonymous memory is what the system cannot take back: RssAnon of /proc/self/status, looked at every
millisecond while loading. Pages of a mapped file are not in it. Linux only.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import torch
from torch import nn

from wds_convnext.training.adamp import AdamP, parameter_groups
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.state import StepSums, TrainState

WIDTH = 2048  # a layer is 16.8 MB


def fresh_state(num_layers: int) -> TrainState:
    """Weights and their average; the optimizer has no state before its first step."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    return TrainState(
        model=model,
        optimizer=AdamP(parameter_groups(model, weight_decay=0.05), lr=1e-3),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        average=WeightAverage(model, decay=0.999),
        sums=StepSums(torch.device("cpu")),
    )


def write(path: str, num_layers: int) -> None:
    """A checkpoint of weights, average and both moments."""
    state = fresh_state(num_layers)
    for parameter in state.model.parameters():
        moments = {name: torch.randn_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {"step": torch.tensor(7), **moments}
    state.step = 7
    save_checkpoint(path, {**state.state_dict(), "facts": {}})


def torch_load(path: str) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_as_0_1_0(path: str) -> dict:
    data = Path(path).read_bytes()
    body = data[:-72]
    hashlib.sha256(body).hexdigest()
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


WAYS = {"ours": load_checkpoint, "torch.load": torch_load, "version 0.1.0": load_as_0_1_0}


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class PeakMemory(threading.Thread):
    """The most anonymous memory of this process until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._stopped = 0, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.001):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return max(self.peak, status_bytes("RssAnon"))


def measure(way: str, path: str, num_layers: int) -> dict[str, float]:
    """Load in one way, in this process."""
    empty = status_bytes("RssAnon")
    state = fresh_state(num_layers)
    watch = PeakMemory()
    watch.start()
    start = time.perf_counter()
    content = WAYS[way](path)
    checked_s = time.perf_counter() - start
    state.load_state_dict(content)
    del content
    seconds = time.perf_counter() - start
    peak = watch.stop() - empty
    tensors = [*state.model.parameters(), *state.average.state_dict().values()]
    for values in state.optimizer.state.values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return {
        "tensors_gb": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9,
        "peak_gb": peak / 1e9,
        "after_gb": (status_bytes("RssAnon") - empty) / 1e9,
        "read_s": checked_s,
        "total_s": seconds,
        "still_mapped": path in Path("/proc/self/maps").read_text(),
    }


@click.command()
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of the checkpoint.")
@click.option("--folder", type=Path, help="Where it is written. Default: a temporary folder.")
@click.option("--measure", "way", hidden=True)
@click.option("--path", hidden=True)
def main(gigabytes: float, folder: Path | None, way: str | None, path: str | None) -> None:
    """Compare ways to resume from a checkpoint."""
    num_layers = max(1, round(gigabytes * 1e9 / (4 * 4 * WIDTH**2)))
    if way:
        click.echo(json.dumps(measure(way, path, num_layers)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = f"{temporary}/last.pt"
        write(path, num_layers)
        click.echo(f"{Path(path).stat().st_size / 1e9:.2f} GB, torch {torch.__version__}\n")
        click.echo("| way | tensors in use | peak anonymous | after | read s | total s | mapped |")
        click.echo("|---|---:|---:|---:|---:|---:|---|")
        for name in WAYS:
            command = [sys.executable, __file__, "--gigabytes", str(gigabytes)]
            command += ["--measure", name, "--path", path]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(output)
            click.echo(
                f"| {name} | {row['tensors_gb']:.2f} GB | {row['peak_gb']:.2f} GB | "
                f"{row['after_gb']:.2f} GB | {row['read_s']:.2f} | {row['total_s']:.2f} | "
                f"{'yes' if row['still_mapped'] else 'no'} |"
            )


if __name__ == "__main__":
    main()
