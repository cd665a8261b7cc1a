"""Commands about shards: making, checking, describing, measuring and adopting them."""

import json
import sys
from typing import Any

import click

from wds_convnext.config import (
    BenchConfig,
    CacheConfig,
    IndexConfig,
    InspectConfig,
    ShardsConfig,
    VerifyConfig,
)
from wds_convnext.options import GroupedCommand, add_options
from wds_convnext.progress import say


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext shards mini-imagenet --out data
wds-convnext shards photos --out data --num-shards 8
wds-convnext shards photos.parquet --out data --label-column species --on-bad skip
""",
)
@click.argument("src")
@add_options(ShardsConfig)
def shards(src: str, **options: Any) -> None:
    """Convert images of any source to tar shards with a manifest.

    SRC is a folder of class folders (photos/cat/1.jpg, or photos/train/cat/1.jpg), also as a zip
    or tar; a CSV, TSV or JSON lines file of paths and labels; parquet files: a folder of files
    named {split}-00000-of-00013.parquet, a glob, or a comma list; or shards, to write them again.
    Every split in it is converted.
    Running the same command again finishes what was interrupted.
    """
    from wds_convnext.conversion import convert

    say(str(convert(src, ShardsConfig(**options))))


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext verify data
wds-convnext verify data --against mini-imagenet
""",
)
@click.argument("shards")
@add_options(VerifyConfig)
def verify(shards: str, **options: Any) -> None:
    """Check shards against their manifest, offsets and source.

    SHARDS is as for training; a folder stands for all splits in it.

    Exit codes: 0 everything fits; 1 problems were found, one per line; 2 usage or data
    error, explained in one line.
    """
    from wds_convnext.check.verify import verify as verify_shards

    config = VerifyConfig(**options)
    report = verify_shards(shards, config)
    _show(report.to_json() if config.json else str(report))
    sys.exit(1 if report.problems else 0)


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext inspect data --sheet sheet.png
wds-convnext inspect 'data/train-<000..012>.tar' --shuffle-buffer 10000
""",
)
@click.argument("shards")
@add_options(InspectConfig)
def inspect(shards: str, **options: Any) -> None:
    """Describe shards: counts, classes, image sizes, label mix.

    SHARDS is as for training; a folder stands for all splits in it. Parquet files (a folder, a
    glob, a file) are described, too: schema, rows, row groups, compression.
    """
    from wds_convnext.check.inspect import inspect as inspect_shards

    config = InspectConfig(**options)
    summaries = inspect_shards(shards, config)
    if config.json:
        click.echo(json.dumps({"splits": [summary.to_json() for summary in summaries]}))
    else:
        say("\n".join(line for summary in summaries for line in summary.lines()))


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext bench data/train.json --target-images-per-s 2000
""",
)
@click.argument("shards")
@add_options(BenchConfig)
def bench(shards: str, **options: Any) -> None:
    """Measure the loader alone, on these shards and this machine.

    SHARDS is as for training. For each number of workers: images per second, CPU time, memory and
    the wait for the first batch; then where the time of one image goes.
    """
    from wds_convnext.check.bench import bench as bench_loader

    config = BenchConfig(**options)
    report = bench_loader(shards, config)
    _show(report.to_json() if config.json else "\n".join(report.lines()))


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext index others/
wds-convnext index others/ --label-field class_id --class-names names.txt
wds-convnext index 's3://bucket/data/train-<000..012>.tar' --out data
""",
)
@click.argument("shards")
@add_options(IndexConfig)
def index(shards: str, **options: Any) -> None:
    """Write manifest and sidecars for shards that others made.

    Labels are class numbers, in .cls members or in a field of .json members. Shards are left as
    they are; damaged ones, and keys that come twice, are refused by name. Of shards at URLs, the
    manifest and index are written into the folder --out, which is then named instead of them.
    """
    from wds_convnext.check.index import index as index_shards

    config = IndexConfig(**options)
    report = index_shards(shards, config)
    _show(report.to_json() if config.json else str(report))


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext cache 'data/train-<0000..1023>.tar' --cache-size 50GB
wds-convnext cache data/train.json --ranks 64 --nodes 8 --shuffle-buffer 10000
""",
)
@click.argument("shards")
@add_options(CacheConfig)
def cache(shards: str, **options: Any) -> None:
    """Say what a cache of remote shards would hold and fetch.

    SHARDS is as for training. The order of a training is arithmetic, so all of it is known
    beforehand: how large the cache has to be, what the first batch waits for, and what each epoch
    fetches, next to what an LRU cache would.
    """
    from wds_convnext.check.cache import plan_cache

    config = CacheConfig(**options)
    report = plan_cache(shards, config)
    _show(report.to_json() if config.json else "\n".join(report.lines()))


def _show(report: dict | str) -> None:
    """Print a report as one line of JSON, or as text that fits the terminal."""
    if isinstance(report, str):
        say(report)
    else:
        click.echo(json.dumps(report))
