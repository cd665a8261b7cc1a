"""Kill a training run at many random moments, resume it each time, and compare bit for bit.

A run of the tiny test model is killed with SIGKILL (all its processes) or stopped with
SIGTERM, SIGINT, SIGHUP or SIGUSR1 at random moments, also while it starts, while it saves and while
a validation is under way, and resumed with another number of workers each time. Some of the runs
write to `tee`, which the signal ends as well; in others a loader worker is killed before, which the
run survives. First one process, then two ranks under torchrun. At the end weights, optimizer,
average and sums must equal those of a run that nobody touched. Prints one line per kill and a
summary; exit code 1 if a byte differs.
"""

import contextlib
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
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
TEE = 'trap : INT TERM HUP USR1; "$@" 2>&1 | tee /dev/null; exit ${PIPESTATUS[0]}'


def train_command(shards: Path, out: Path, *, workers: int, ranks: int = 1) -> list[str]:
    changes = {"--workers": workers, "--batch-size": RUN["--batch-size"] // ranks}
    options = [str(part) for pair in (RUN | changes).items() for part in pair]
    places = ["--shards", str(shards / "train.json"), "--out", str(out), "--resume"]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    modules = [*(launcher if ranks > 1 else []), "wds_convnext"]
    return [sys.executable, "-m", *modules, "train", *places, *options]


def is_validating(out: Path) -> bool:
    """Whether the newest line of the metrics is an epoch's end, which a validation may follow."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return False
    return bool(lines) and "train/epoch_loss" in lines[-1]


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


def descendants(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *descendants(child))]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def kill_a_worker(process: subprocess.Popen, rng: random.Random) -> bool:
    """Kill a loader worker, if there is one: a fork of a trainer, so with its command line."""
    workers = [
        child
        for pid in (process.pid, *descendants(process.pid))
        for child in children(pid)
        if b"wds_convnext" in command_line(pid) and command_line(pid) == command_line(child)
    ]
    if workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    return bool(workers)


def strike(
    process: subprocess.Popen, out: Path, *, signum: signal.Signals, longest: float, rng
) -> list[str]:
    """Send a signal to a run's process group at a random moment; gives what was hit."""
    hit, ends = [], time.monotonic() + rng.uniform(0, longest)
    waits_for_validation, worker_at = rng.random() < 0.3, time.monotonic() + rng.uniform(0, longest)
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)
        if waits_for_validation and is_validating(out):
            hit.append("in a validation, perhaps")
            break
        if not hit and time.monotonic() > worker_at and kill_a_worker(process, rng):
            hit.append("a loader worker")
    if process.poll() is None:
        # torchrun puts each rank into a group of its own; killed itself, it cannot end them.
        ranks = descendants(process.pid) if signum == signal.SIGKILL else []
        os.killpg(process.pid, signum)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        hit.append(signum.name)
    return hit


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


def torture(
    shards: Path, scratch: Path, *, ranks: int, kills: int, longest: float, rng: random.Random
) -> bool:
    """Whether a run that is struck so often ends as one that nobody touched."""
    started, counts = time.monotonic(), Counter()
    out, straight = scratch / f"run-{ranks}", scratch / f"straight-{ranks}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    subprocess.run(train_command(shards, straight, workers=0, ranks=ranks), check=True, **quiet)
    # SIGUSR1 would end torchrun itself.
    signals = SIGNALS + ([signal.SIGUSR1] if ranks == 1 else [])
    for kill in range(kills):
        workers, signum, has_tee = rng.choice([0, 1, 3]), rng.choice(signals), rng.random() < 0.3
        command = train_command(shards, out, workers=workers, ranks=ranks)
        if has_tee:
            command = ["bash", "-c", TEE, "bash", *command]
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        hit = strike(process, out, signum=signum, longest=longest * ranks, rng=rng)
        code = process.wait()
        hit += ["tee"] if has_tee else []
        counts.update([*hit, f"exit code {code}"])
        click.echo(
            f"{kill + 1}/{kills} {', '.join(hit)}; {ranks} ranks, {workers} workers: "
            f"step {steps_done(out)}"
        )
        if code == 0:
            break
    subprocess.run(train_command(shards, out, workers=2, ranks=ranks), check=True, **quiet)
    equal = same(outcome(out), outcome(straight))
    left = [path.name for path in out.glob("*.tmp")]
    click.echo(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    click.echo(f"temporary files left: {left or 'none'}; {time.monotonic() - started:.0f} s")
    click.echo("bit for bit equal to the untouched run" if equal else "DIFFERENT from it")
    return equal and not left


@click.command()
@click.argument("parquet", type=click.Path(exists=True))
@click.option("--kills", default=40, show_default=True, help="Of each of the two runs.")
@click.option("--longest", default=8.0, show_default=True, help="Most seconds until a kill.")
@click.option("--seed", default=0, show_default=True)
@click.option("--ranks", default=[1, 2], show_default=True, multiple=True)
def main(parquet: str, kills: int, longest: float, seed: int, ranks: tuple[int, ...]) -> None:
    """Torture a run on the shards of a small PARQUET folder."""
    rng = random.Random(seed)
    # Started with nohup, or in the background of a script, runs would be right to ignore these.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        convert(parquet, out=scratch / "data", jobs=1, quiet=True)
        whole = [
            torture(scratch / "data", scratch, ranks=num, kills=kills, longest=longest, rng=rng)
            for num in ranks
        ]
    sys.exit(0 if all(whole) else 1)


if __name__ == "__main__":
    main()
