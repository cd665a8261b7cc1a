"""Loaders side by side on the same images: images/s, CPU per image, memory, time to first batch.

    python tools/bench/bench_loader.py PARQUET --rounds 7 --workers 2 --json loaders.json
    python tools/bench/bench_loader.py PARQUET --photo-size 32x32 --image-size 32 --measure 60000
    python tools/bench/bench_loader.py PARQUET --photo-size 4000x3000 --images 400 --batch-size 16
    python tools/bench/bench_loader.py PARQUET --loaders all
    python tools/bench/bench_loader.py PARQUET --loaders ours --before CHECKOUT --measure 1500
    python tools/bench/bench_loader.py PARQUET --alive --measure 1500

PARQUET is a folder in mini-imagenet's layout; its training images are repeated until there are
--images, or so many are taken evenly. --photo-size brings each to one size before any format is
made: by a resize, or where it is larger than a photograph as a mosaic of whole ones. Every format
is written once, under --work, in a folder for this source, number and size.

Every loader does RandomResizedCrop and a flip and gives batches; uint8 except where the peer's
documented way is float. Each measurement is a process of its own, begins after a warm-up and meets
no end of an epoch; it must take seconds (--measure), as batches are made ahead. Rounds go through
all loaders in turn, so that a drift of the machine's speed hits all of them. "ours is" is our
images/s over the row's, taken round by round: the median, then the lowest and highest; "its CPU is"
the row's CPU time per image over ours, which other work on the machine disturbs less. Memory is
the peak proportional set size of the process tree.

With --alive each loader is started once, and waits, its batches made ahead, while the others are
measured; then a round takes a tenth of the time, as compilers and imports of peers take most of it
(FFCV 30 s). Memory is lower then: what several of these processes map counts for each in part.

A loader that fails, or whose library is missing, is left out with the reason. DALI comes with
`pip install .[bench]`. FFCV is not in that extra, as it compiles against system libraries:
`apt install libopencv-dev libturbojpeg0-dev pkg-config`, then `pip install ffcv`.

What is not equal. FFCV writes JPEGs again at quality 90 (62 kB instead of 110), so there is "ours
on ffcv jpegs", the same bytes in our shards; "ours on shrunk shards" are those of --max-side 512.
FFCV decodes with libjpeg's fast DCT (up to 12 of 255 off) where all others use the exact one, and
shrinks by box filter (antialiased). Batches of FFCV and DALI lie in memory that they use again,
ours are copied out of it. webdataset shuffles within 1,000 samples per worker and draws shards with
replacement, DALI shuffles within 1,024; the others shuffle everything. Article, image folder and
webdataset's recipe make float batches, four times the bytes. FFCV and DALI use --workers threads,
the others as many processes. All files are in the system's cache: disks are not measured, nor is
the copy to a GPU.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from bench_apart import Apart, measure_when_asked, one_line, wait_for_quiet
from bench_formats import prepare, write_photos
from bench_peers import LOADERS, Setting

from wds_convnext.errors import DataError, WdsConvnextError, did_you_mean

LIBRARIES = (
    *("torch", "torchvision", "numpy", "pillow", "simplejpeg", "pyarrow", "webdataset"),
    "nvidia-nvimgcodec-cu13",
    *("ffcv", "numba", "opencv-python", "nvidia-dali-cuda130", "wds-convnext"),
)
Results = dict[str, list[dict]]  # by loader, one LoaderCost for each round


def formats_folder(work: Path, source: Path, *, num_images: int, photo_size) -> Path:
    """Where the formats of this data set are: another folder for other images, number or size."""
    files = [(str(file), file.stat()) for file in sorted(source.resolve().glob("*.parquet"))]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    size = "x".join(map(str, photo_size)) if photo_size else "as-they-are"
    return work / f"{source.resolve().name}-{digest}-{num_images}-{size}"


def prepare_all(names: list[str], formats: Path, write) -> dict[str, str]:
    """Write what these loaders read; why the loaders whose format fails are left out."""
    prepare("photos", formats, write)
    failures = {}
    for name in names:
        try:
            prepare(LOADERS[name].format, formats)
        except Exception as error:
            failures[name] = one_line(error)
            echo(f"{name} is left out: {failures[name]}")
    return failures


def run_rounds(
    names: list[str], failures: dict[str, str], *, rounds: int, start, is_alive: bool
) -> Results:
    """Measure all loaders in turn, again and again; those that fail move to `failures`.

    Args:
        start: the name of a loader -> Apart.
        is_alive: whether a loader goes on, once started, instead of being started each time.
    """
    results: Results = {name: [] for name in names if name not in failures}
    started, num_done, running = time.monotonic(), 0, dict[str, Apart]()
    with contextlib.ExitStack() as stack:
        for number in range(1, rounds + 1):
            for name in list(results):
                if name not in running:
                    running[name] = start(name)
                    stack.callback(running[name].kill)
                wait_for_quiet()
                try:
                    cost = running[name].measure()
                except DataError as error:
                    failures[name] = str(error)
                    del results[name]
                    echo(f"{name} is left out: {error}")
                    continue
                finally:
                    if not is_alive:
                        running.pop(name).kill()
                results[name].append(cost)
                num_done += 1
                num_left = sum(rounds - len(costs) for costs in results.values())
                left_s = (time.monotonic() - started) / num_done * num_left
                rate = f"{cost['images_per_s']:,.0f} images/s"
                cpu = (
                    "n/a" if cost["cpu_ms_per_image"] is None else f"{cost['cpu_ms_per_image']:.3f}"
                )
                told = f"{name}: {rate}, {cpu} CPU ms an image"
                echo(f"round {number} of {rounds}, {told}; {left_s:,.0f} s left")
    return results


def echo(line: str) -> None:
    click.echo(line, err=True)


def summarize(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def summarize_loader(name: str, results: Results) -> dict:
    """Medians over the rounds, and our images/s over this loader's; None: not measurable here."""
    rounds = results[name]
    summary = {"images_per_s": summarize([cost["images_per_s"] for cost in rounds])}
    for field in ("cpu_ms_per_image", "peak_pss_mib", "first_batch_s"):
        values = [cost[field] for cost in rounds if cost[field] is not None]
        summary[field] = statistics.median(values) if values else None
    rivals = [mine for mine in LOADERS[name].against if mine in results]
    summary["ours_is"] = {mine: ratios(results[mine], rounds, "images_per_s") for mine in rivals}
    summary["its_cpu_is"] = {
        mine: ratios(rounds, results[mine], "cpu_ms_per_image")
        for mine in rivals
        if summary["cpu_ms_per_image"]
    }
    return summary | {"rounds": rounds}


def ratios(some: list[dict], others: list[dict], field: str) -> dict[str, float]:
    """The ratio of two loaders' figures, round by round."""
    return summarize([a[field] / b[field] for a, b in zip(some, others)])


def report(summaries: dict[str, dict]) -> None:
    """A row per loader; one more where it is compared with a second of ours."""
    titles = f"{'its CPU is':>20}{'CPU ms':>9}{'PSS MiB':>9}{'first s':>9}"
    click.echo(f"{'loader':26}{'images/s':>22}{'ours is':>20}{titles}")
    for name, summary in summaries.items():
        compared = [
            (mine, spread(r, 2, "x"), spread(summary["its_cpu_is"].get(mine), 2, "x"))
            for mine, r in summary["ours_is"].items()
        ]
        rate = spread(summary["images_per_s"], 0)
        costs = [
            f"{'n/a' if summary[field] is None else format(summary[field], f',.{digits}f'):>9}"
            for field, digits in (
                ("cpu_ms_per_image", 2),
                ("peak_pss_mib", 0),
                ("first_batch_s", 2),
            )
        ]
        _, ratio, cpu = compared[0] if compared else ("", "", "")
        click.echo(f"{name:26}{rate:>22}{ratio:>20}{cpu:>20}{''.join(costs)}")
        for mine, ratio, cpu in compared[1:]:
            click.echo(f"{'  against ' + mine:48}{ratio:>20}{cpu:>20}")


def spread(values: dict[str, float] | None, digits: int, unit: str = "") -> str:
    if values is None:
        return "n/a"
    median, lowest, highest = (f"{value:,.{digits}f}" for value in values.values())
    return f"{median}{unit} ({lowest}-{highest})"


def find_versions() -> dict[str, str | None]:
    """The libraries' versions; None for those that are not installed."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def parse_loaders(_, __, value: str) -> list[str]:
    names = list(LOADERS) if value == "all" else [name.strip() for name in value.split(",")]
    for name in names:
        if name not in LOADERS:
            raise click.BadParameter(f"no loader {name!r}.{did_you_mean(name, LOADERS)}")
    return list(dict.fromkeys(names))


def parse_size(_, __, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    width, _, height = value.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise click.BadParameter(f"{value!r} is not WIDTHxHEIGHT, as 4000x3000.")
    return int(width), int(height)


COUNT = click.IntRange(min=1)
DEFAULT_LOADERS = ",".join(name for name, loader in LOADERS.items() if loader.by_default)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("parquet", type=FOLDER)
@click.option("--work", default="bench-loader", type=click.Path(path_type=Path), show_default=True)
@click.option("--images", default=3000, type=COUNT, show_default=True, help="In the data set.")
@click.option("--photo-size", callback=parse_size, metavar="WxH", help="Default: as they are.")
@click.option("--image-size", default=224, type=COUNT, show_default=True, help="Of the batches.")
@click.option("--batch-size", default=64, type=COUNT, show_default=True)
@click.option(
    "--measure", "measured", default=3000, type=COUNT, show_default=True, help="Per round."
)
@click.option("--rounds", default=7, type=COUNT, show_default=True)
@click.option("--workers", default=2, type=click.IntRange(min=0), show_default=True)
@click.option("--loaders", default=DEFAULT_LOADERS, callback=parse_loaders, show_default=True)
@click.option("--timeout", "timeout_s", default=600, type=COUNT, show_default=True, help="Seconds.")
@click.option("--before", type=FOLDER, help="A checkout of another commit: adds it as a loader.")
@click.option("--alive", is_flag=True, help="Start each loader once, not for each round.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--one", hidden=True, help="Measure this loader, in this process.")
def main(parquet, work, images, photo_size, image_size, batch_size, **options) -> None:
    """Measure loaders on the images of PARQUET. --loaders all adds color jitter."""
    formats = formats_folder(work, parquet, num_images=images, photo_size=photo_size)
    setting = Setting(formats, images, options["workers"], batch_size, image_size)
    if options["before"] and "before" not in options["loaders"]:
        options["loaders"].insert(1, "before")
    if options["one"]:
        measure_when_asked(
            partial(LOADERS[options["one"]].batches, setting),
            batch_size=batch_size,
            num_images=options["measured"],
            warmup_batches=8 + 4 * setting.workers,
        )
    write = partial(write_photos, parquet, images, photo_size)
    try:
        failures = prepare_all(options["loaders"], formats, write)
        start = partial(Apart, timeout_s=options["timeout_s"], before=options["before"])
        results = run_rounds(
            options["loaders"],
            failures,
            rounds=options["rounds"],
            start=start,
            is_alive=options["alive"],
        )
    except (WdsConvnextError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if not results:
        raise click.ClickException("every loader was left out.")
    summaries = {name: summarize_loader(name, results) for name in results}
    report(summaries)
    if options["json_path"]:
        facts = {
            "options": asdict(setting) | {"photo_size": photo_size, "source": parquet} | options,
            "machine": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "versions": find_versions(),
            "left_out": failures,
            "loaders": summaries,
        }
        options["json_path"].write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
