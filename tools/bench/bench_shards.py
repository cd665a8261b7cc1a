"""How fast conversion is next to the disk's own speed, and how much memory it takes.

    python tools/bench/bench_shards.py SOURCE --out DISK_FOLDER --out /dev/shm/bench

SOURCE is a folder of training parquet files; its rows are repeated to the sizes asked for. Each
round runs every method once, so that a busy machine slows all of them; ratios are of the medians.
The floor reads every row group with pyarrow and writes the image bytes with plain writes, one
file and one fsync per input file. The webdataset loop is ShardWriter fed from `to_pydict`.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from wds_convnext.conversion import convert
from wds_convnext.conversion.sources.parquet import open_split

NUM_FILES = 4


def repeat_rows(source: str, folder: Path, num_bytes: float) -> list[Path]:
    """Parquet files of about so many bytes, in row groups of 100 rows, made by repetition."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(source).glob("train*")))
    times = max(1, round(num_bytes / NUM_FILES / table.nbytes))
    paths = [folder / f"train-{i:05d}-of-{NUM_FILES:05d}.parquet" for i in range(NUM_FILES)]
    for path in paths:
        # Without a dictionary, which would store the repeated images once.
        with pq.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
            for _ in range(times):
                writer.write_table(table, row_group_size=100)
    return paths


def copy_plainly(paths: list[Path], out: Path) -> None:
    """The floor: row groups in, image bytes out."""
    for path in paths:
        with pq.ParquetFile(path) as file, open(out / path.name, "wb", buffering=0) as sink:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, ["image.bytes"], use_threads=False)["image"]
                for chunk in column.chunks:
                    _, offsets, data = chunk.field("bytes").buffers()
                    edges = memoryview(offsets).cast("B").cast("i")[: len(chunk) + 1]
                    view = memoryview(data)
                    for begin, end in zip(edges[:-1], edges[1:], strict=True):
                        sink.write(view[begin:end])
            os.fsync(sink.fileno())


def write_with_webdataset(paths: list[Path], out: Path) -> None:
    """What users write by hand."""
    from webdataset import ShardWriter

    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    pattern = str(out / "train-%03d.tar")
    with ShardWriter(pattern, maxcount=-(-num_rows // NUM_FILES), verbose=0) as writer:
        row = 0
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(100):
                columns = batch.to_pydict()
                for image, label in zip(columns["image"], columns["label"], strict=True):
                    writer.write({"__key__": f"{row:09d}", "jpg": image["bytes"], "cls": label})
                    row += 1


def conversion(**options):
    options = {"jobs": 1} | options
    return lambda paths, out: convert(str(paths[0].parent), out=str(out), quiet=True, **options)


METHODS = {
    "floor": copy_plainly,
    "stored order": conversion(shuffle=False),
    "scatter": conversion(),
    "stored order, 2 jobs": conversion(shuffle=False, jobs=2),
    "scatter, 2 jobs": conversion(jobs=2),
    "webdataset loop": write_with_webdataset,
}


def measure_speed(paths: list[Path], folder: str, rounds: int) -> None:
    """Print MB/s of every method in a folder, and its ratio to the floor."""
    num_bytes = open_split("train", [str(path) for path in paths]).num_bytes
    seconds = {name: [] for name in METHODS}
    for round_number in range(rounds + 1):
        for name, method in METHODS.items():
            out = Path(tempfile.mkdtemp(dir=folder))
            start = time.perf_counter()
            method(paths, out)
            # The first round fills caches and is not counted.
            if round_number:
                seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    print(f"\n{num_bytes / 1e9:.2f} GB to {folder}, median of {rounds} rounds (lowest, highest)")
    floor = statistics.median(seconds["floor"])
    for name, times in seconds.items():
        median, low, high = statistics.median(times), min(times), max(times)
        speeds = [num_bytes / 1e6 / value for value in (median, high, low)]
        print(
            f"{name:22s} {speeds[0]:6.0f} MB/s ({speeds[1]:.0f}, {speeds[2]:.0f})"
            f"   {floor / median:.2f} of the floor"
        )


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and all below it; pages that they share count for each."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(tree_rss, map(int, children)))


def measure_memory(paths: list[Path], folder: str, jobs: int, shuffle: bool) -> None:
    """Print the peak memory of a conversion's processes."""
    out = tempfile.mkdtemp(dir=folder)
    code = (
        "from wds_convnext.conversion import convert\n"
        f"if __name__ == '__main__': convert({str(paths[0].parent)!r}, out={out!r}, "
        f"jobs={jobs}, shuffle={shuffle}, quiet=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss(process.pid))
        time.sleep(0.01)
    shutil.rmtree(out)
    size = sum(path.stat().st_size for path in paths) / 1e9
    allowed = 400 + 150 * jobs
    order = "scatter" if shuffle else "stored order"
    print(f"{size:5.2f} GB  {jobs} jobs  {order:12s}  {peak / 1e6:5.0f} MB (at most {allowed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--out", action="append", help="folder to write to, one or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="input for the speeds")
    parser.add_argument("--memory", type=float, nargs="*", default=[0.5, 2, 6], help="in gigabytes")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, pyarrow {pa.__version__}"
    )
    for folder in args.out or [tempfile.gettempdir()]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            measure_speed(
                repeat_rows(args.source, Path(made), args.gigabytes * 1e9), folder, args.rounds
            )
    print("\npeak memory of all processes")
    for gigabytes in args.memory:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            paths = repeat_rows(args.source, Path(made), gigabytes * 1e9)
            for jobs, shuffle in ((1, False), (1, True), (2, True), (4, True)):
                measure_memory(paths, folder, jobs, shuffle)


if __name__ == "__main__":
    main()
