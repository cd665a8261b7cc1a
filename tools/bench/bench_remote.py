"""Shards behind a slow line: the first batch, waits in mid-epoch and bytes, next to other loaders.

    python tools/bench/bench_remote.py data/train.json --litdata PYTHON

A web server on this machine waits LATENCY_MS before each answer and shares MB_PER_S among all of
them. Each contender reads the same images for EPOCHS epochs, with a pause per batch where a step
would compute, in a process of its own with an empty cache of CACHE_SHARE of the data: ours from
local files, from the server, and from a server without ranges, which has no quick start; webdataset
by `curl` with its cache; litdata in its own format, by its S3 client, if --litdata names a Python
that has it. The rounds are interleaved.

"First batch" is counted from the fetcher's start, which is right after the index has come and
before the model is built; for others from the making of their dataset. "Until the plan" is the part
of it in which the trainer is not ready to ask for anything. Mid-epoch are all batches but the first
four of an epoch. Bytes are those that the server sent in all epochs, indexes included.

Not equal: only ours is shuffled over all shards, checked, and cropped at random; others resize
whole images, decoded at a fraction of their size. webdataset looks at its cache's size every 30 s
only. Ours reads with one process and fetches with another, litdata does both with threads of its
worker; the server takes its share of the same CPU.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from spread import spread

_IMAGE_SIZE = 32
_SETTLED = 4  # batches of an epoch before the middle of it


def take(batches: Iterator, started: float, task: dict) -> dict:
    """The time of the first batch, the waits for those in mid-epoch, and for all but the first."""
    waits = []
    for number in range(task["number"]):
        before = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - before))
        if number == 0:
            first_s = time.time() - started
        time.sleep(task["pause"])
    middle = [w for n, w in enumerate(waits) if n % task["per_epoch"] >= _SETTLED]
    return {"first_s": first_s, "middle": middle, "sum_s": sum(waits[1:]) / 1000}


def ours(task: dict) -> dict:
    from wds_convnext.config import TrainConfig
    from wds_convnext.storage.cache import current_cache
    from wds_convnext.training.distributed import Machine, join_world
    from wds_convnext.training.feed import loading
    from wds_convnext.training.remote import follow_run, node_cache
    from wds_convnext.training.run import open_run

    config = TrainConfig.of(
        None,
        {
            "shards": task["spec"],
            "model": "test_convnext",
            "image_size": _IMAGE_SIZE,
            "batch_size": task["batch_size"],
            "max_steps": task["number"],
            "epochs": task["epochs"] + 1,
            "workers": task["workers"],
            "shuffle_buffer": task["buffer"],
            "cache_dir": task["cache"],
            "cache_size": task["cache_size"],
        },
    )
    world, device = join_world("cpu")
    machine = Machine.of(world, device, amp="off")
    with node_cache(config, [task["spec"]], world):
        started = time.time()
        run, _ = open_run(config, machine, checkpoint=None, stated_batch=None, warn=print)
        if objects := list(Path(task["cache"]).glob("*/objects.json")):
            started = objects[0].stat().st_mtime  # written right before the fetcher starts
        _, pace, _ = follow_run(run, is_fresh=True)
        plan_s = time.time() - started
        with loading(run.stream(), config.workers, machine, pace=pace) as batches:
            result = take(iter(batches), started, task) | {"plan_s": plan_s}
        if objects:
            time.sleep(0.1)  # the fetcher's figures are a moment old
            num_bytes, _, _, num_shards, _ = current_cache().counts()
            result |= {"num_bytes": num_bytes, "shards": num_shards}
    return result


def decoded(sample: tuple) -> tuple[np.ndarray, int]:
    image = Image.open(io.BytesIO(sample[0]))
    image.draft("RGB", (_IMAGE_SIZE, _IMAGE_SIZE))  # cheap, so that it is the line that is measured
    image = image.convert("RGB").resize((_IMAGE_SIZE, _IMAGE_SIZE))
    return np.asarray(image), int(sample[1])


def forever(loader) -> Iterator:
    while True:
        yield from loader


def webdataset(task: dict) -> dict:
    import webdataset as wds
    from torch.utils.data import DataLoader

    started, urls = time.time(), [f"pipe:curl -s -f {url}" for url in task["urls"]]
    dataset = wds.WebDataset(
        urls, shardshuffle=len(urls), cache_dir=task["cache"], cache_size=task["cache_size"], seed=0
    )
    dataset = dataset.shuffle(200).to_tuple("jpg;jpeg;png", "cls").map(decoded)
    batches = dataset.batched(task["batch_size"], partial=False)
    loader = DataLoader(batches, batch_size=None, num_workers=task["workers"])
    return take(forever(loader), started, task)


def litdata(task: dict) -> dict:
    import litdata.streaming.downloader
    from litdata import StreamingDataLoader, StreamingDataset

    litdata.streaming.downloader._OBSTORE_AVAILABLE = False  # that client of S3 refuses http

    class Images(StreamingDataset):
        def __getitem__(self, index):
            return decoded(super().__getitem__(index))

    started = time.time()
    options = {"endpoint_url": task["endpoint"], "region_name": "us-east-1"}
    options |= {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    dataset = Images(
        "s3://litdata",
        cache_dir=task["cache"],
        shuffle=True,
        drop_last=True,
        max_cache_size=str(task["cache_size"]),
        storage_options=options,
    )
    loader = StreamingDataLoader(
        dataset, batch_size=task["batch_size"], num_workers=task["workers"], shuffle=True
    )
    return take(forever(loader), started, task)


def optimize(task: dict) -> dict:
    """Write litdata's chunks of the samples of shards."""
    from litdata.streaming.cache import Cache

    cache, number = Cache(input_dir=task["out"], chunk_bytes=task["chunk_bytes"]), 0
    for shard in task["shards"]:
        with tarfile.open(shard) as tar:
            image = b""
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    cache[number] = (image, content)
                    number += 1
                elif member.name.endswith((".jpg", ".jpeg", ".png")):
                    image = content
    cache.done()
    cache.merge()
    return {}


CONTENDERS = {f.__name__: f for f in (ours, webdataset, litdata, optimize)}


def in_a_process(python: str, name: str, task: dict) -> dict:
    command = [python, __file__, "--child", name, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, rounds: list[dict], planned: float) -> None:
    middle = np.array([wait for result in rounds for wait in result["middle"]])

    def of(key: str, format: str) -> str:
        return spread([result[key] for result in rounds], format)

    first = f"first batch {of('first_s', '.2f')} s"
    if "num_bytes" in rounds[0]:
        first += f", of these until the plan {of('plan_s', '.2f')}"
    click.echo(
        f"{name} (n = {len(rounds)}): {first}; waits in mid-epoch (n = {len(middle)}): median "
        f"{np.median(middle):.1f} ms, 95 % {np.percentile(middle, 95):.1f}, most "
        f"{middle.max():.1f}; sum of all later waits {of('sum_s', '.2f')} s"
    )
    if "sent" not in rounds[0]:
        return
    line = f"    {of('sent', '.1f')} MB sent, {of('gets', '.0f')} GETs"
    if "num_bytes" in rounds[0]:
        share = [(result["num_bytes"] - 1e6 * result["ranges"]) / planned for result in rounds]
        line += f", of these {of('shards', '.0f')} shards, {spread(share, '.3f')} of the plan's "
        line += f"bytes, and {of('ranges', '.1f')} MB for the first batches"
    click.echo(line)


@click.command()
@click.argument("manifest", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--cache-share", default=0.75, show_default=True, help="Of the data.")
@click.option("--latency-ms", default=50.0, show_default=True)
@click.option("--mb-per-s", default=100.0, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--pause", default=0.4, show_default=True, help="Seconds per batch.")
@click.option("--workers", default=1, show_default=True)
@click.option("--shuffle-buffer", "buffer", default=100_000, show_default=True)
@click.option("--litdata", "litdata_python", help="A Python that has litdata.")
@click.option("--only", help="Contenders, separated by ;. Default: all.")
def main(manifest: Path, litdata_python: str | None, only: str | None, **options) -> None:
    """Compare loaders on the shards of a local MANIFEST, served by a slow line."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from stores import serving

    from wds_convnext.check.cache import plan_cache
    from wds_convnext.shards.opening import open_dataset

    dataset = open_dataset(str(manifest))
    total = sum(shard.num_bytes for shard in dataset.shards)
    size = int(options["cache_share"] * total)
    size += os.path.getsize(manifest.with_suffix(".index")) + (1 << 20)
    per_epoch = len(dataset) // options["batch_size"]
    task = {name: options[name] for name in ("batch_size", "epochs", "pause", "workers", "buffer")}
    task |= {"per_epoch": per_epoch, "number": per_epoch * options["epochs"], "cache_size": size}
    contenders = ["ours, local", "ours", "ours, whole shards", "webdataset"]
    contenders += ["litdata"] if litdata_python else []
    contenders = [name for name in contenders if only is None or name in only.split(";")]
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        (root / "data").mkdir()
        shards = [shard.path for shard in dataset.shards]
        for path in [manifest, manifest.with_suffix(".index"), *map(Path, shards)]:
            (root / "data" / path.name).symlink_to(path.absolute())
        if litdata_python:
            what = {"shards": shards, "out": str(root / "litdata")}
            in_a_process(litdata_python, "optimize", what | {"chunk_bytes": total // len(shards)})
        plan = plan_cache(
            str(root / "data" / manifest.name),
            batch_size=task["batch_size"],
            epochs=task["epochs"],
            shuffle_buffer=task["buffer"],
            workers=task["workers"],
            cache_size=size,
        )
        planned = sum(plan.cases[0].fetched_bytes or [])
        if not planned:
            raise click.ClickException("too small a cache for this order; see wds-convnext cache")
        least_s = plan.first_samples_bytes / options["mb_per_s"] / 1e6
        click.echo(
            f"{len(dataset):,} images, {len(shards)} shards, {total / 1e6:.1f} MB, "
            f"{task['number']} batches of {task['batch_size']}; {options['latency_ms']:.0f} ms, "
            f"{options['mb_per_s']:.0f} MB/s, cache {size / 1e6:.1f} MB, load "
            f"{os.getloadavg()[0]:.1f}\nplanned: {planned / 1e6:.1f} MB; the first batch's samples "
            f"take {least_s:.2f} s of the line, its shards {plan.first_batch_bytes / 1e6:.1f} MB"
        )
        line = {"latency_s": options["latency_ms"] / 1000, "bytes_per_s": options["mb_per_s"] * 1e6}
        for _ in range(options["rounds"]):
            for name in contenders:
                cache = Path(folder) / "cache"
                cache.mkdir()
                with serving(root, ranged="whole" not in name, **line) as store:
                    where = {"cache": str(cache), "endpoint": store.url}
                    where["spec"] = f"{store.url}/data/{manifest.name}"
                    if name == "ours, local":
                        where["spec"] = str(root / "data" / manifest.name)
                    where["urls"] = [f"{store.url}/data/{Path(path).name}" for path in shards]
                    python = litdata_python if name == "litdata" else sys.executable
                    try:
                        result = in_a_process(python, name.partition(",")[0], task | where)
                    except click.ClickException as failure:
                        click.echo(failure.message)
                        continue
                    finally:
                        shutil.rmtree(cache)
                    if name != "ours, local":
                        result |= {"sent": store.sent / 1e6, "gets": store.asked.total()}
                        result |= {"ranges": store.sent_ranges / 1e6}
                    found[name].append(result)
                    show(name, found[name], planned)
    click.echo(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print("\n" + json.dumps(CONTENDERS[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
