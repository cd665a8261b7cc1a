"""Time from the return key to a run's first line, and to the answer to five typos.

    python tools/bench/bench_front_door.py data/train.json --rounds 5

Each command is a process of its own, started with warm files (one call before the first round);
the commands take turns. The run is stopped after its first line.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "wds_convnext"]


def typos(shards: str, runs: Path) -> dict[str, list[str]]:
    """Five mistakes: an option, a shard, a model, a checkpoint, a value out of range."""
    return {
        "--shard": ["train", "--shard", shards],
        "no such shard": ["train", "--shards", f"{shards}x"],
        "no such model": ["train", "--shards", shards, "--model", "convnxt_base"],
        "no such checkpoint": ["eval", "--checkpoint", str(runs / "none.pt"), "--shards", shards],
        "--lr -1": ["train", "--shards", shards, "--lr", "-1"],
    }


def seconds_to_error(arguments: list[str]) -> float:
    """Wall seconds of a command that has to end with exit code 2."""
    started = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode != 2:
        raise SystemExit(f"{arguments}: exit code {done.returncode}, not 2: {done.stderr}")
    return seconds


def seconds_to_first_line(shards: str, out: Path) -> float:
    """Wall seconds until a training prints its first line; it is then killed."""
    arguments = ["train", "--shards", shards, "--out", str(out), "--device", "cpu"]
    started = time.perf_counter()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.kill()
    if not line.startswith("Training on "):
        raise SystemExit(f"the first line is {line!r}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    out = Path("never-written")
    measured: dict[str, list[float]] = {}
    for turn in range(options.rounds + 1):
        seconds = {"first line": seconds_to_first_line(options.shards, out)}
        for name, arguments in typos(options.shards, out).items():
            seconds[name] = seconds_to_error(arguments)
        if turn:  # the first one warms the files
            for name, value in seconds.items():
                measured.setdefault(name, []).append(value)
    for name, values in measured.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{name:20} {middle:.2f} s ({low:.2f} to {high:.2f}, n = {len(values)})")


if __name__ == "__main__":
    main()
