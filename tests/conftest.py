"""Small real files for the tests: images, parquet in mini-imagenet's layout, shards, runs."""

import atexit
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import Image
from preloaded import Started, run_preloaded, start_ranks

# The same cases every time, and no deadline: machines that run tests are shared and slow.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")

# A process that takes longer hangs: on a loaded machine the slowest of the tests' takes a minute.
# Less than the 600 s that a collective waits for a rank, so that such a wait counts as a hang.
HANG_S = 500
AFTER_FAILURE_S = 60  # how long the ranks of a run may outlive one that failed
# Indexes of shards without a manifest go here, not into the home folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="wds_convnext-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

CLASS_NAMES = ["ant", "bee", "cat", "dog"]
TINY_RUN = {
    "--model": "test_convnext",
    "--image-size": "32",
    "--batch-size": "8",
    "--epochs": "4",
    "--workers": "0",
    "--warmup-epochs": "1",
    "--log-every": "3",
    "--save-every": "5",
    "--val-every": "2",
    "--shuffle-buffer": "16",
    "--device": "cpu",
}


def encode_image(seed: int, *, size=(24, 20), format="JPEG") -> bytes:
    """A smooth random picture, another for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, format)
    return file.getvalue()


def write_parquet(folder: Path, split: str, sizes: list[int], *, classes=CLASS_NAMES) -> None:
    """Files of one split, one per size, sorted by class."""
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.sort(np.arange(sum(sizes)) % len(classes))
    starts = np.cumsum([0, *sizes])
    for i, (start, size) in enumerate(zip(starts, sizes)):
        rows = range(start, start + size)
        seed = sum(split.encode()) * 1000
        images = [{"bytes": encode_image(seed + row), "path": f"{row}.jpg"} for row in rows]
        table = pa.table({"image": images, "label": labels[list(rows)].tolist()}, schema=schema)
        path = folder / f"{split}-{i:05d}-of-{len(sizes):05d}.parquet"
        pq.write_table(table, path, row_group_size=7)


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format=tarfile.GNU_FORMAT) -> str:
    """A tar of (name, data) members, as the standard library writes it; gives its path."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def sample_members(num_samples: int, *, start: int = 0) -> list[tuple[str, bytes]]:
    """Members of samples numbered from `start`: an image each, and the label number % 4."""
    pairs = [
        ((f"{i:04d}.jpg", encode_image(i)), (f"{i:04d}.cls", str(i % 4).encode()))
        for i in range(start, start + num_samples)
    ]
    return [member for pair in pairs for member in pair]


def write_shards(folder: Path, sizes: list[int], *, split: str = "train") -> Path:
    """Shards of samples numbered over the split, with sidecars and manifest; gives the latter."""
    from wds_convnext.shards.dataset import Dataset
    from wds_convnext.shards.sidecar import format_sidecar, sidecar_path
    from wds_convnext.shards.spec import Shard
    from wds_convnext.shards.tar import walk_tar

    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, size in enumerate(sizes):
        path = write_tar(
            folder / f"{split}-{i:03d}.tar", sample_members(size, start=sum(sizes[:i]))
        )
        Path(sidecar_path(path)).write_bytes(format_sidecar(list(walk_tar(path))))
        shards.append(Shard(path, size, os.path.getsize(path)))
    dataset = Dataset("pictures", split, tuple(shards), tuple(CLASS_NAMES))
    dataset.write_manifest(folder / f"{split}.json")
    return folder / f"{split}.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--start-method",
        choices=["fork", "spawn"],
        help="How loader workers start, instead of the platform's way: spawn is macOS's.",
    )


@pytest.fixture(autouse=True)
def start_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start loader workers as --start-method says, if it is given."""
    if method := request.config.getoption("--start-method"):
        monkeypatch.setattr("wds_convnext.stream.workers.START_METHOD", method)


@pytest.fixture
def one_thread():
    """Sums over one thread have one order; equal bits are promised for that alone."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def no_workers_left():
    """Ends the workers that a failed iteration left to its traceback."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    """A data set of three splits; 50 training samples in files of very different sizes."""
    folder = tmp_path_factory.mktemp("tiny") / "pictures"
    write_parquet(folder, "train", [21, 1, 28])
    write_parquet(folder, "validation", [9, 4])
    write_parquet(folder, "test", [11])
    return folder


@pytest.fixture(scope="session")
def shards(parquet, tmp_path_factory) -> Path:
    """The same as tar shards in stored order, so sorted by class. Do not write to it."""
    from wds_convnext.conversion import convert

    out = tmp_path_factory.mktemp("shards") / "data"
    convert(str(parquet), out=str(out), shuffle=False, jobs=1, quiet=True)
    return out


@pytest.fixture(scope="session")
def trained_run(shards, tmp_path_factory) -> Path:
    """A finished run of moments with averaged weights, validated. Do not write to it."""
    import wds_convnext as wc

    out = tmp_path_factory.mktemp("trained") / "run"
    wc.train(
        shards=str(shards / "train.json"),
        out=str(out),
        model="test_convnext",
        image_size=32,
        batch_size=8,
        epochs=4,
        val_every=2,
        lr=3e-3,
        mix_prob=0.0,
        ema_decay=0.9,
        workers=0,
        device="cpu",
        log_every=3,
    )
    return out


def command(*args, **options) -> list[str]:
    """A wds-convnext command line for a process of its own."""
    flat = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "wds_convnext", *map(str, args), *flat]


def train_command(shards: Path, out: Path, *args, **options) -> list[str]:
    """A training run of moments on the tiny shards; options as {"--epochs": 2}."""
    return command(
        "train", "--shards", shards / "train.json", "--out", out, *args, **TINY_RUN | options
    )


def run(command: list[str], *, cwd=None, check=True, **env) -> subprocess.CompletedProcess:
    """Run a command to its end, on one thread, and give its output.

    Trainings, evaluations and programs (`python -c`) start with torch imported already.
    """
    options = {
        "cwd": cwd,
        "timeout": HANG_S,
        "env": dict(os.environ) | {"OMP_NUM_THREADS": "1"} | env,
    }
    arguments = own_arguments(command)
    if arguments[0] in ("train", "eval", "-c") and not env:
        result = run_preloaded(arguments, **options)
    else:
        result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def own_arguments(command: list[str]) -> list[str]:
    """What follows `python -m wds_convnext` or `python`."""
    return command[3:] if command[1:3] == ["-m", "wds_convnext"] else command[1:]


def on_ranks(*commands: list[str], check=True, folders=None) -> list:
    """As `run`, a command for each rank; gives the output of each, whichever fails or hangs."""
    ranks = start_ranks(*map(own_arguments, commands), folders=folders)
    deadline = time.monotonic() + HANG_S
    while (running := [r for r in ranks if r.poll() is None]) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        time.sleep(0.01)
    for rank in running:
        rank.kill()
    texts = [rank.communicate(HANG_S) for rank in ranks]
    results = [
        subprocess.CompletedProcess(rank.arguments, rank.returncode, *printed)
        for rank, printed in zip(ranks, texts)
    ]
    assert not running, results
    assert not check or not any(result.returncode for result in results), results
    return results


def wait_until(is_reached: Callable[[], bool], process: subprocess.Popen | Started) -> None:
    """Wait for a state that a process brings about, for as long as the process lives."""
    while True:
        has_ended = process.poll() is not None  # asked first: what it did last counts
        if is_reached():
            return
        assert not has_ended, process.communicate(timeout=HANG_S)[0]
        time.sleep(0.01)
