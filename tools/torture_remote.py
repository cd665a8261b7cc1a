"""Train from a store that fails, kill everything at random, and compare bit for bit.

A local web server answers 3 of 10 GETs in one of seven wrong ways: 408, 429 and 503 with
Retry-After, a stall, a cut, a wrong length, a flipped byte. Meanwhile the fetcher, loader workers
and the whole run are killed at random moments, and the run is resumed, with another number of
workers each time. The cache holds a part of the shards. At the end weights, optimizer and sums must
equal those of the untouched run on local files, every shard in the cache must be byte for byte that
of the store, and the cache must never have been over its size. Exit code 1 if anything differs.
"""

import filecmp
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import click
from torture import RUN, descendants, outcome, same, steps_done

from wds_convnext.conversion import convert
from wds_convnext.storage.layout import occupied

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from stores import serving  # noqa: E402 (the tests' store)

OPTIONS = RUN | {"--shuffle-buffer": 1, "--remote-timeout": 8, "--ema-decay": 0}


def train_command(shards: str, out: Path, *more: object, workers: int) -> list[str]:
    options = [part for pair in (OPTIONS | {"--workers": workers}).items() for part in pair]
    places = ["--shards", shards, "--out", out, "--resume"]
    return [sys.executable, "-m", "wds_convnext", "train", *map(str, [*places, *options, *more])]


def size_of(folder: Path) -> int:
    """What a folder occupies, with all that is in it."""
    files = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in ["", *names])
    return sum(map(occupied, files))


class Watch(threading.Thread):
    """Notes the most that a folder occupies."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most = folder, 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, size_of(self.folder))
            time.sleep(0.01)


def parts_of(process: subprocess.Popen, *, fetcher: bool) -> list[int]:
    """The fetcher, or the loader workers, of a run."""
    found = {}
    for pid in descendants(process.pid):
        try:
            found[pid] = b"storage.fetcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
    return [pid for pid, is_fetcher in found.items() if is_fetcher == fetcher]


def kill_one(process: subprocess.Popen, *, fetcher: bool, rng: random.Random) -> str | None:
    """Kill the fetcher, or a loader worker, of a run; gives what was killed."""
    victims = parts_of(process, fetcher=fetcher)
    if not victims:
        return None
    os.kill(rng.choice(victims), signal.SIGKILL)
    return "fetcher" if fetcher else "worker"


def torment(process: subprocess.Popen, *, longest: float, rng: random.Random) -> list[str]:
    """Kill parts of a run, and the run itself after a random time."""
    hits = []
    if rng.random() < 0.8:  # most kills are to hit a run that trains, not one that imports torch
        while process.poll() is None and not parts_of(process, fetcher=True):
            time.sleep(0.1)
    ends = time.monotonic() + rng.uniform(0, longest)
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(rng.uniform(0.1, 2))
        hit = kill_one(process, fetcher=rng.random() < 0.7, rng=rng)
        hits += [hit] if hit else []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        hits.append("run")
    return hits


@click.command()
@click.argument("parquet", type=click.Path(exists=True))
@click.option("--kills", default=30, show_default=True, help="Of the whole run.")
@click.option("--longest", default=20.0, show_default=True, help="Most seconds until a kill.")
@click.option("--samples-per-shard", default=12, show_default=True)
@click.option("--cache-share", default=0.75, show_default=True, help="Of the shards' bytes.")
@click.option("--failing", default=0.3, show_default=True, help="Probability that a GET fails.")
@click.option("--seed", default=0, show_default=True)
@click.option("--epochs", default=4, show_default=True, help="Of the run.")
@click.option("--steps", type=int, help="Of the run, if it is to end earlier.")
def main(
    parquet: str,
    kills: int,
    longest: float,
    samples_per_shard: int,
    cache_share: float,
    failing: float,
    seed: int,
    epochs: int,
    steps: int | None,
) -> None:
    """Torture a run on the shards of a small PARQUET folder, behind a failing store."""
    rng, counts, started = random.Random(seed), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data, cache = scratch / "data", scratch / "cache"
        convert(parquet, out=data, samples_per_shard=samples_per_shard, jobs=1, quiet=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        straight, out = scratch / "straight", scratch / "run"
        length = ["--epochs", epochs, *(["--max-steps", steps] if steps else [])]
        command = train_command(str(data / "train.json"), straight, *length, workers=2)
        subprocess.run(command, check=True, env=environment, **quiet)
        size = int(cache_share * sum(occupied(str(path)) for path in data.glob("*.tar")))
        watch = Watch(cache)
        watch.start()
        with serving(data, failing=failing, stall_s=3, retry_after="1", seed=seed) as store:
            limits = [*length, "--cache-dir", cache, "--cache-size", size]
            url = f"{store.url}/train.json"
            for kill in range(kills):
                command = train_command(url, out, *limits, workers=rng.choice([0, 1, 3]))
                with open(scratch / "errors", "w+") as errors:
                    process = subprocess.Popen(
                        command,
                        start_new_session=True,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                    hits = torment(process, longest=longest, rng=rng)
                    code = process.wait()
                    errors.seek(0)
                    said = errors.read().splitlines()[-1:]
                counts.update(hits)
                click.echo(f"{kill + 1}/{kills} {hits}: exit code {code}, step {steps_done(out)}")
                if code > 0:  # of itself, so it says why
                    click.echo("\n".join(said))
                if code == 0:
                    break
            command = train_command(url, out, *limits, workers=2)
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        wrong = [
            path.name
            for path in cache.glob("*/*/*.tar")
            if not filecmp.cmp(path, data / path.name, shallow=False)
        ]
        is_same = done.returncode == 0 and same(outcome(out), outcome(straight))
        click.echo(f"killed: {dict(counts)}; GETs that failed: {dict(store.failed)}")
        click.echo(f"GETs: {store.asked.total()}; {store.sent / 1e6:.1f} MB sent")
        click.echo(f"cache: at most {watch.most:,} bytes, {size:,} allowed; wrong shards: {wrong}")
        click.echo(f"{time.monotonic() - started:.0f} s")
        click.echo("bit for bit equal to the local run" if is_same else f"DIFFERS {done.stderr}")
    sys.exit(0 if is_same and not wrong and watch.most <= size else 1)


if __name__ == "__main__":
    main()
