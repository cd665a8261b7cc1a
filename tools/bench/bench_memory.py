"""Memory of our loader and the article's against the size of the data set; prints, and draws.

    python tools/bench/bench_memory.py PARQUET --work DIR --out docs/memory.svg --json memory.json

The images of PARQUET (a folder in mini-imagenet's layout) are repeated to 0.5 GB and converted;
larger data sets are links to these shards under further names, each opened, indexed and read as a
file of its own. The article's loader reads links to the parquet files. Batches of 64 at 224
px, RandomResizedCrop and flip. Each measurement is a process of its own that reads one pass, or
for --at-least seconds if that is longer; other buffers and numbers of workers for the latter only.
The same command goes on where it was stopped; with all in the JSON file it prints and draws only.

Memory is the proportional set size (PSS) of the process tree: pages of several processes are
counted once; the page cache of files that are read is not counted. PSS also splits the pages of
libraries (some 240 MiB of torch's) with whatever else runs torch on the machine. So figures are of
PSS "alone": "own" (PSS of anonymous and shared memory) and the library pages of the main process.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression, median, pstdev

import click
from bench_peers import Setting, article

from wds_convnext.check.measure import process_tree
from wds_convnext.shards.dataset import read_manifest

BATCH_SIZE, IMAGE_SIZE = 64, 224
BASE_GIGABYTES = 0.5
WATCH_EVERY_S = 0.5
IMPORTS = ("sys", "torch", "wds_convnext.stream.stream")
UNWANTED = {"timm", "tensorboard", "torchvision", "webdataset", "pyarrow", "matplotlib"}

COLUMNS = {
    "samples": lambda result: result["num_samples"],
    "first": lambda result: result["first_mib"]["alone"],
    "last": lambda result: result["last_mib"]["alone"],
    "peak": lambda result: result["peak_mib"]["alone"],
    "peak own": lambda result: result["peak_mib"]["own"],
    "peak PSS": lambda result: result["peak_mib"]["pss"],
    "main USS": lambda result: result["uss_mib"][0],
    "worker USS": lambda result: max(result["uss_mib"][1:], default=math.nan),
}


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    loader: str  # "ours", "article", or "import MODULE" for no loader
    gigabytes: float = 0.0
    workers: int = 2
    shuffle_buffer: int | None = 100_000  # ours; None: all samples

    def __str__(self) -> str:
        if self.loader.startswith("import"):
            return self.loader
        buffer = "all" if self.shuffle_buffer is None else f"{self.shuffle_buffer:,}"
        end = f", buffer {buffer}" if self.loader == "ours" else ""
        return f"{self.loader}, {self.gigabytes:g} GB, workers {self.workers}{end}"


def prepare(parquet: Path, work: Path, gigabytes: float) -> None:
    """Make the data set of a size, unless it stands; its manifest is written last."""
    base, folder = work / "base", work / f"{gigabytes:g}gb"
    if (folder / "shards" / "train.json").exists():
        return
    photos = sorted(parquet.glob("train-*.parquet"))
    photos *= round(BASE_GIGABYTES * 1e9 / sum(file.stat().st_size for file in photos))
    if not (base / "shards" / "train.json").exists():
        link(photos, base / "photos", f"train-{{:05}}-of-{len(photos):05}")
        command = [sys.executable, "-m", "wds_convnext", "shards", str(base / "photos")]
        command += ["--out", str(base / "shards"), "--num-shards", "2"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    manifest = read_manifest(base / "shards" / "train.json")
    copies = round(gigabytes / BASE_GIGABYTES)
    shards = manifest.shards * copies
    link(photos * copies, folder / "photos")
    link([Path(shard.path).with_suffix(".idx") for shard in shards], folder / "shards")
    tars = link([Path(shard.path) for shard in shards], folder / "shards")
    shards = tuple(replace(shard, path=str(tar)) for shard, tar in zip(shards, tars))
    replace(manifest, shards=shards).write_manifest(folder / "shards" / "train.json")


def link(files: list[Path], folder: Path, name: str = "train-{:05}") -> list[Path]:
    """Link to files in turn, by numbered names."""
    folder.mkdir(parents=True, exist_ok=True)
    links = [folder / (name.format(i) + file.suffix) for i, file in enumerate(files)]
    for path, file in zip(links, files):
        path.unlink(missing_ok=True)
        path.symlink_to(file.resolve())
    return links


def ours(folder: Path, case: Case) -> Iterator:
    """make_loader as training uses it."""
    from wds_convnext.shards.opening import open_dataset
    from wds_convnext.stream.loader import make_loader
    from wds_convnext.stream.order import TrainOrder
    from wds_convnext.stream.stream import ShardStream
    from wds_convnext.stream.transforms import TrainTransform

    dataset = open_dataset(str(folder / "shards" / "train.json"))
    buffer = case.shuffle_buffer or len(dataset)
    order = TrainOrder(dataset.sizes, 0, BATCH_SIZE, buffer)
    transform = TrainTransform(IMAGE_SIZE)
    stream = ShardStream(dataset, order, batch_size=BATCH_SIZE, transform=transform)
    return make_loader(stream, workers=case.workers)


class Curve:
    """Memory of this process and all below it over time: (seconds, samples read, tree_mib)."""

    def __init__(self):
        self.points: list[tuple[float, int, dict]] = []
        self.num_samples = 0
        self._started = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def add(self) -> dict[str, float]:
        """Add a point of now, and give its memory."""
        seconds, memory = time.perf_counter() - self._started, tree_mib()
        self.points.append((round(seconds, 2), self.num_samples, memory))
        return memory

    def _watch(self) -> None:
        while True:
            self.add()
            time.sleep(WATCH_EVERY_S)


def tree_mib() -> dict[str, float]:
    """PSS of this process and all below it, "own" and "alone" as the module says."""
    found = [fields_mib(f"/proc/{pid}/smaps_rollup") for pid in process_tree(os.getpid())]
    own = sum(fields["Pss_Anon"] + fields["Pss_Shmem"] for fields in found)
    alone = own + fields_mib("/proc/self/status")["RssFile"]
    pss = sum(fields["Pss"] for fields in found)
    return {"pss": round(pss, 1), "own": round(own, 1), "alone": round(alone, 1)}


def fields_mib(path: str) -> Counter:
    """The fields in kB of a file in /proc; none if the process is gone."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return Counter()
    return Counter({line[0][:-1]: int(line[1]) / 1024 for line in lines if line[-1:] == ["kB"]})


def measure(case: Case, work: Path, at_least_s: float, at_most_s: float) -> dict:
    """One pass of a loader in this process, or longer: its memory curve, and USS at the end."""
    folder = work / f"{case.gigabytes:g}gb"
    if case.loader.startswith("import "):
        __import__(case.loader.removeprefix("import "))
        batches, shards, at_most_s = iter([None]), (), 0.0
    else:
        shards = read_manifest(folder / "shards" / "train.json").shards
    one_pass = sum(shard.num_samples for shard in shards)
    curve = Curve()
    if case.loader == "ours":
        batches = ours(folder, case)
    elif case.loader == "article":
        batches = article(Setting(folder, one_pass, case.workers, BATCH_SIZE, IMAGE_SIZE))
    next(batches)
    started = time.perf_counter()
    curve.num_samples = BATCH_SIZE if shards else 0
    first = curve.add()
    while (seconds := time.perf_counter() - started) < at_most_s:
        if seconds >= at_least_s and curve.num_samples >= one_pass:
            break
        next(batches)
        curve.num_samples += BATCH_SIZE
    unwanted = sorted(UNWANTED & set(sys.modules))
    if unwanted and case.loader != "article":
        raise SystemExit(f"{case}: imports {', '.join(unwanted)}, which no worker needs")
    last = curve.add()
    rollups = [fields_mib(f"/proc/{pid}/smaps_rollup") for pid in process_tree(os.getpid())]
    return {
        "case": asdict(case),
        "num_samples": curve.num_samples,
        "images_per_s": (curve.num_samples - BATCH_SIZE) / seconds,
        "first_mib": first,
        "last_mib": last,
        "peak_mib": {key: max(memory[key] for *_, memory in curve.points) for key in last},
        "uss_mib": [fields["Private_Clean"] + fields["Private_Dirty"] for fields in rollups],
        "curve": curve.points,
    }


def measure_apart(case: Case, options: list[str]) -> dict:
    """`measure` in a process of its own. This one loads no torch, so it shares no library pages."""
    command = [sys.executable, "-W", "ignore", __file__, *options]
    command += ["--one", json.dumps(asdict(case))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            line = process.stdout.readline()
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers are endless
    if not line:
        raise SystemExit(f"{case}: failed, see above")
    result = json.loads(line)
    figures = ", ".join(f"{title} {figure(result):,.0f}" for title, figure in COLUMNS.items())
    click.echo(f"{case}: {figures}", err=True)
    return result


def report(cases: dict[Case, list[dict]]) -> None:
    """The table, and the slopes over data set size and workers."""
    click.echo(f"{'MiB':44}{'n':>4}" + "".join(f"{title:>11}" for title in COLUMNS))
    for case, rounds in cases.items():
        row = (median(map(figure, rounds)) for figure in COLUMNS.values())
        click.echo(f"{str(case):44}{len(rounds):>4}" + "".join(f"{mib:>11,.0f}" for mib in row))
    for loader in ("ours", "article"):
        click.echo(
            f"{loader}: {slope(vary(cases, Case(loader), 'gigabytes'))} MiB per GB of shards"
        )
    click.echo(f"ours: {slope(vary(cases, Case('ours', 2.0), 'workers'))} MiB per worker")


def vary(cases: dict[Case, list[dict]], case: Case, field: str) -> dict[float, list[dict]]:
    """The results of cases that differ from one in a field only, by its value, sorted."""
    values = sorted({getattr(other, field) for other in cases})
    found = {value: cases.get(replace(case, **{field: value})) for value in values}
    return {value: rounds for value, rounds in found.items() if rounds}


def slope(rounds_by_x: dict[float, list[dict]]) -> str:
    """The slope of peak memory by least squares over all rounds, with its standard error."""
    points = [(x, peak) for x in rounds_by_x for peak in map(COLUMNS["peak"], rounds_by_x[x])]
    if len(rounds_by_x) < 2 or len(points) < 3:
        return "unknown"
    fit = linear_regression(*zip(*points))
    residual = sum((y - fit.intercept - fit.slope * x) ** 2 for x, y in points)
    error = math.sqrt(residual / (len(points) - 2) / len(points)) / pstdev([x for x, _ in points])
    return f"{fit.slope:+,.1f} (standard error {error:.1f}, n = {len(points)})"


def draw(cases: dict[Case, list[dict]], out: Path) -> None:
    """PSS against the size of the data set; shaded from the first batch's to the highest."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "wds_convnext", "svg.fonttype": "none"})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    names = {"article": "all bytes in a list + DataLoader", "ours": "ours"}
    for (loader, name), color in zip(names.items(), ("#c0392b", "#1f6fb4")):
        sizes = vary(cases, Case(loader), "gigabytes")
        low, high = (
            [median(map(COLUMNS[when], rounds)) / 1024 for rounds in sizes.values()]
            for when in ("first", "peak")
        )
        axes.fill_between(list(sizes), low, high, color=color, alpha=0.25, linewidth=0)
        axes.plot(list(sizes), high, "o-", color=color, markersize=4)
        side = "right" if max(sizes) == max(case.gigabytes for case in cases) else "left"
        place = {"xytext": (0, 8), "textcoords": "offset points", "color": color, "ha": side}
        axes.annotate(f"{name}: {high[-1]:.2g} GiB", (max(sizes), high[-1]), **place)
    axes.margins(x=0.02, y=0.12)
    axes.set(xlabel="data set, GB of shards", ylabel="memory of all processes, GiB (PSS)")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})


@click.command()
@click.argument("parquet", type=click.Path(exists=True, path_type=Path))
@click.option("--work", default="bench-memory", type=click.Path(path_type=Path), show_default=True)
@click.option("--gigabytes", default="0.5,2,8,16", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of sizes; the rest is in the first.")
@click.option("--at-least", default=20.0, show_default=True, help="Seconds of reading.")
@click.option("--at-most", default=300.0, show_default=True, help="Seconds of reading.")
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--one", hidden=True)
def main(parquet, work, gigabytes, rounds, at_least, at_most, out, json_path, one) -> None:
    """Measure the memory of loaders on the images of PARQUET."""
    if one:
        click.echo(json.dumps(measure(Case(**json.loads(one)), work, at_least, at_most)))
        os._exit(0)
    sizes = [float(size) for size in gigabytes.split(",")]
    few = [Case(f"import {module}") for module in IMPORTS]
    few += [Case("ours", max(sizes), shuffle_buffer=buffer) for buffer in (1000, None)]
    few += [Case("ours", 2.0, workers) for workers in (1, 4, 8)]
    results = json.loads(json_path.read_text()) if json_path and json_path.exists() else []
    done = {(Case(**result["case"]), result["round"]) for result in results}
    for number in range(rounds):
        todo = [Case(loader, size) for loader in ("ours", "article") for size in sizes]
        for case in todo + few * (number == 0):
            if (case, number) in done:
                continue
            available = fields_mib("/proc/meminfo")["MemAvailable"] * 2**20
            if case.loader == "article" and available < case.gigabytes * 1.5e9 + 2e9:
                click.echo(f"{case}: not run, too little memory is free", err=True)
                continue
            if case.gigabytes:
                prepare(parquet, work, case.gigabytes)
            options = [str(parquet), "--work", str(work), "--at-least", str(at_least)]
            options += ["--at-most", str(at_least if case in few else at_most)]
            results.append(measure_apart(case, options) | {"round": number})
            if json_path:
                json_path.write_text(json.dumps(results) + "\n")
    cases = defaultdict(list)
    for result in results:
        cases[Case(**result["case"])].append(result)
    report(cases)
    if out:
        draw(cases, out)


if __name__ == "__main__":
    main()
