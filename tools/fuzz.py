"""Feed damaged and forged files to every reader, and count what is not a result or one line.

    python tools/fuzz.py --seconds 60                 # of each kind of file
    python tools/fuzz.py --only tar --first 1234 --iterations 1

Files that are right are mutated: bytes flipped, cut, doubled or moved, numbers and words replaced
by those that readers trip over. Each case must end, within 2 s of CPU time and in flat memory, in a
value or in an error of wds_convnext/errors.py that is one printable line; decoded pixels must be
the same twice. A case is a function of seed, kind and number, so what is found can be run again.
Prints a table; exit code 1 if anything was found.
"""

import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from wds_convnext.check.verify import verify
from wds_convnext.config import TrainConfig
from wds_convnext.conversion.records import recorded
from wds_convnext.conversion.staging import Staging, read_bad_rows
from wds_convnext.errors import WdsConvnextError
from wds_convnext.options import read_run_toml, read_toml
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.decode import decode_rgb
from wds_convnext.shards.image import ImageSurvey, inspect_image
from wds_convnext.shards.limits import ImageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.sidecar import format_sidecar
from wds_convnext.shards.spec import Shard
from wds_convnext.shards.tar import walk_tar
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.checkpoint import DataFacts, Facts, load_checkpoint
from wds_convnext.training.log import RunLog

HANG_S = 2.0  # of CPU time, so that other work on the machine is no hang
WAIT_S = 30.0
WORDS = [b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"',
         b"9" * 30, b"9" * 5000, b"4294967296", b"-9223372036854775809", b'"../x"', b'"/etc/x"',
         b"[" * 3000, b"\xff\xfe", b"\x00", b"\x1b[2J", b"\n", b"\x80" + b"\xff" * 11]  # fmt: skip
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|[\w./-]+')


class Hang(BaseException):
    """A case that computed for longer than HANG_S, or waited for longer than WAIT_S."""


@dataclass
class Kind:
    """A kind of file: right contents of it, and what reads it.

    `read` is given the content; `is_text` says whether whole words are replaced, too.
    """

    name: str
    contents: list[bytes]
    read: Callable[[bytes], None]
    is_text: bool = False


@dataclass
class Found:
    """What came out of the cases of one kind."""

    kind: str
    iterations: int = 0
    refused: int = 0
    exceptions: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    peak_mb: float = 0.0


def mutate(content: bytes, rng: random.Random, *, is_text: bool) -> bytes:
    """The content after one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 4, 16, 512))
        change = rng.randrange(8 if is_text else 6)
        if change == 0 and at < len(content):
            flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
            content = content[:at] + flipped + content[at + 1 :]
        elif change == 1:
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif change == 2:
            content = content[:at] if rng.random() < 0.3 else content[:at] + content[at + size :]
        elif change == 3:
            content = content[:at] + content[at : at + size] * rng.choice((2, 3)) + content[at:]
        elif change == 4:
            # Of 5,000 digits torch makes a message, with a regular expression that takes seconds.
            words = WORDS if is_text else [word for word in WORDS if len(word) < 100]
            content = content[:at] + rng.choice(words) + content[at + size :]
        elif change == 5:
            other = rng.randrange(len(content) + 1)
            content = content[:at] + content[other : other + size] + content[at + size :]
        elif tokens := list(TOKEN.finditer(content)):
            token = rng.choice(tokens)
            word = rng.choice(WORDS) if change == 6 else rng.choice(tokens)[0]
            content = content[: token.start()] + word + content[token.end() :]
    return content


@contextmanager
def deadline() -> Iterator[None]:
    def stop(*_):
        raise Hang

    timers = {signal.ITIMER_PROF: HANG_S, signal.ITIMER_REAL: WAIT_S}
    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def fuzz(kind: Kind, *, seed: int, first: int, iterations: int, seconds: float) -> Found:
    """Run cases of a kind, from number `first` on, until there were so many or time is up."""
    found, end = Found(kind.name), time.monotonic() + seconds
    for content in kind.contents:  # as they are, they are right
        kind.read(content)
    reset_peak()
    for number in range(first, first + iterations):
        if time.monotonic() > end:
            break
        rng = random.Random(f"{seed} {kind.name} {number}")
        content = mutate(rng.choice(kind.contents), rng, is_text=kind.is_text)
        found.iterations += 1
        started = time.process_time()
        try:
            with deadline():
                kind.read(content)
        except WdsConvnextError as error:
            found.refused += 1
            if not str(error).isprintable():
                found.exceptions.append(f"case {number}: not one printable line: {str(error)!r}")
        except Hang:
            found.hangs.append(f"case {number}")
        except Exception:
            found.exceptions.append(f"case {number}: {traceback.format_exc()}")
        found.slowest_s = max(found.slowest_s, time.process_time() - started)
    found.peak_mb = peak_bytes() / 1e6
    return found


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that the process has held since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10


def encode(format: str, *, size=(48, 36), mode="RGB", **options) -> bytes:
    channels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(channels, "RGBA").convert(mode).save(file, format, **options)
    return file.getvalue()


def kinds_of_images() -> Iterator[Kind]:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [
        encode("JPEG"),
        encode("JPEG", progressive=True, exif=exif),
        encode("JPEG", mode="L", restart_marker_blocks=2),
        encode("JPEG", mode="CMYK"),
        *(encode(name) for name in ("PNG", "WEBP", "BMP")),
        encode("PNG", mode="RGBA", exif=exif),
        encode("GIF", mode="P"),
    ]
    yield Kind("image header", contents, inspect_image)
    yield Kind("decode", contents, decode_twice)


def decode_twice(data: bytes) -> None:
    pixels, again = decode_rgb(data), decode_rgb(data)
    if pixels.shape != again.shape or (pixels != again).any():
        raise AssertionError("pixels differ between two calls")
    try:
        facts = inspect_image(data)
    except ImageError as error:
        raise AssertionError(f"decoded, but its header is refused: {error}") from None
    if pixels.shape != (facts.height, facts.width, 3):
        raise AssertionError(f"{pixels.shape}, but its header says {facts}")


def write_shards(folder: Path) -> None:
    """Two shards with sidecars, manifest and index."""
    shards = []
    for number in range(2):
        path = folder / f"train-{number:03d}.tar"
        long_name = "folder/" + "k" * 120
        with tarfile.open(
            path, "w", format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number]
        ) as tar:
            for i, key in enumerate(["a", "b.c".replace(".", "_"), long_name]):
                for extension, data in (("jpg", encode("JPEG")), ("cls", b"%d" % i)):
                    info = tarfile.TarInfo(f"{key}{number}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        samples = list(walk_tar(str(path)))
        path.with_suffix(".idx").write_bytes(format_sidecar(samples))
        shards.append(Shard(str(path), len(samples), path.stat().st_size))
    names = ("ant", "bee", "cat")
    Dataset("pictures", "train", tuple(shards), names).write_manifest(folder / "train.json")
    open_dataset(str(folder / "train.json"))


def kinds_of_shards(folder: Path) -> Iterator[Kind]:
    (whole := folder / "whole").mkdir()
    write_shards(whole)

    def reader(name: str, without: tuple[str, ...] = ()) -> Callable[[bytes], None]:
        here = folder / f"{name}-case"

        def read(content: bytes) -> None:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(whole, here, ignore=shutil.ignore_patterns(*without))
            (here / name).write_bytes(content)
            read_all(here)

        return read

    def kind(title: str, name: str, without: tuple[str, ...] = (), *, is_text=False) -> Kind:
        return Kind(title, [(whole / name).read_bytes()], reader(name, without), is_text)

    yield kind("manifest", "train.json", is_text=True)
    yield kind("index", "train.index")
    yield kind("sidecar", "train-000.idx", ("*.index",), is_text=True)
    yield kind("tar, GNU", "train-000.tar", ("*.index", "*.idx", "*.json"))
    yield kind("tar, pax", "train-001.tar", ("*.index", "*.idx", "*.json"))


def read_all(folder: Path) -> None:
    """Verify shards, then open them and read every sample."""
    str(verify(str(folder), quiet=True, jobs=1))
    dataset = open_dataset(
        str(folder / "train.json" if (folder / "train.json").exists() else folder)
    )
    for number in range(len(dataset)):
        _, image, label = dataset[number]
        if not 0 <= label < dataset.num_classes:
            raise AssertionError(f"label {label}")
        decode_rgb(image)


def kinds_of_conversion(folder: Path) -> Iterator[Kind]:
    out, record = folder / "out", folder / "step.done"
    precious = folder / "precious.tar"
    precious.write_bytes(b"precious")

    def read_staging(name: str, content: bytes) -> None:
        shutil.rmtree(out, ignore_errors=True)
        (out / "train.partial").mkdir(parents=True)
        (out / "train.partial" / name).write_bytes(content)
        staging = Staging(out, "train")
        try:
            staging.begin({"seed": 0}, ["train-000.tar"], overwrite=True)
        finally:
            staging.close()
            if not precious.exists():
                raise AssertionError("a file outside OUT was deleted")

    def read_record(content: bytes) -> None:
        record.write_bytes(content)
        recorded(record, lambda: {"num_samples": 3})

    def read_list(content: bytes) -> None:
        (folder / "train.bad.jsonl").write_bytes(content)
        read_bad_rows(folder / "train.bad.jsonl")

    names = ["train-000.tar", "train-000.idx", "train.json", "train.index"]
    plan = json.dumps({"options": {"seed": 0, "edges": [0, 3]}, "replaces": names}).encode()
    yield Kind("plan", [plan], lambda content: read_staging("plan.json", content), True)
    marker = [json.dumps(names).encode()]
    yield Kind("publishing", marker, lambda content: read_staging("publishing", content), True)
    survey = ImageSurvey()
    survey.add(inspect_image(encode("PNG")))
    result = {"survey": survey.to_json(), "bad": [(3, "empty")], "files": {"a": [3, "0" * 16]}}
    record.unlink(missing_ok=True)
    recorded(record, lambda: result)
    yield Kind("record", [record.read_bytes()], read_record, True)
    lines = [{"row": i, "file": "a.parquet", "row_in_file": i, "reason": "empty"} for i in range(3)]
    listing = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield Kind("bad rows", [listing], read_list, True)


def facts() -> dict:
    data = DataFacts("0" * 16, seed=0, global_batch_size=8, shuffle_buffer=16, num_lanes=1)
    return Facts("convnext_atto", ("ant", "bee"), 8, Preprocessing(32), data).to_dict()


def kinds_of_runs(folder: Path) -> Iterator[Kind]:
    path = folder / "last.pt"
    torch.save({"format": 1, "step": 3, "model": {"w": torch.zeros(3)}, "facts": facts()}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))

    def read_checkpoint(content: bytes) -> None:
        path.write_bytes(content)
        Facts.from_dict(load_checkpoint(path).get("facts", {}))

    def read_pickle(content: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, content if name == pickled else data)
        Facts.from_dict(load_checkpoint(path).get("facts", {}))

    def read_options(content: bytes) -> None:
        (folder / "config.toml").write_bytes(content)
        read_run_toml(folder / "config.toml", TrainConfig, warn=lambda text: None)
        read_toml(folder / "config.toml", TrainConfig)

    def read_metrics(content: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(content)
        with redirect_stdout(io.StringIO()):  # it says how many lines it left out
            RunLog(folder, start_step=3).close()

    yield Kind("checkpoint", [path.read_bytes()], read_checkpoint)
    yield Kind("checkpoint's pickle", [records[pickled]], read_pickle)
    toml = (
        b'model = "convnext_base"\nlr = 4e-3\nepochs = 300\nbatch_size = 160\nshards = "a.json"\n'
    )
    yield Kind("TOML", [toml], read_options, True)
    metrics = b"".join(b'{"step": %d, "loss": 2.5, "lr": 0.004}\n' % step for step in range(6))
    yield Kind("metrics", [metrics], read_metrics, True)


def all_kinds(folder: Path) -> Iterator[Kind]:
    yield from kinds_of_shards(folder)
    yield from kinds_of_conversion(folder)
    yield from kinds_of_runs(folder)
    yield from kinds_of_images()


@click.command()
@click.option("--seconds", default=60.0, help="For each kind of file.")
@click.option("--iterations", default=10**9, help="At most so many of each kind.")
@click.option("--seed", default=0)
@click.option("--first", default=0, help="Number of the first case.")
@click.option("--only", default="", help="Kinds whose name begins so.")
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, iterations: int, seed: int, first: int, only: str, as_json: bool) -> None:
    """Feed damaged files to every reader; print a table of what came out."""
    results = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for kind in all_kinds(Path(folder)):
            if kind.name.startswith(only):
                results.append(
                    fuzz(kind, seed=seed, first=first, iterations=iterations, seconds=seconds)
                )
    if as_json:
        click.echo(json.dumps([vars(found) for found in results]))
    else:
        click.echo("| file | iterations | refused | not ours | over 2 s | slowest, s | peak, MB |")
        click.echo("|---|---|---|---|---|---|---|")
        for found in results:
            click.echo(
                f"| {found.kind} | {found.iterations:,} | {found.refused / found.iterations:.0%} | "
                f"{len(found.exceptions)} | {len(found.hangs)} | {found.slowest_s:.2f} | "
                f"{found.peak_mb:,.0f} |"
            )
        for found in results:
            for problem in (found.exceptions + found.hangs)[:3]:
                click.echo(f"\n{found.kind}, {problem}", err=True)
    sys.exit(any(found.exceptions or found.hangs for found in results))


if __name__ == "__main__":
    main()
