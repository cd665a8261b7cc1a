"""The loader's bench: real measurements of small shards, and the text of given figures."""

import itertools
import json
import multiprocessing
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import encode_image, write_shards
from test_cli import call

from wds_convnext.check.bench import BenchReport
from wds_convnext.check.loads import Loads, Stages, TimedReader, TimedTransform, WorkerRate
from wds_convnext.progress import Progress
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.transforms import TrainTransform
from wds_convnext.stream.workers import num_workers

QUICK = ("--batch-size", 8, "--image-size", 32, "--seconds", 0.05)
STAGES = ("read", "decode", "resize", "jitter", "batch", "hand_over")

# 10 ms per image in a worker.
REPORT = BenchReport(
    dataset="pictures",
    split="train",
    num_samples=1000,
    num_cores=4,
    batch_size=160,
    image_size=224,
    by_workers=(
        WorkerRate(100.0, 10.0, 700.0, 0.5, 1),
        WorkerRate(200.0, 10.0, 800.0, 0.5, 2),
        WorkerRate(400.0, 10.0, 1000.0, 0.5, 4),
    ),
    stages=Stages(read=1.0, decode=5.0, resize=2.0, jitter=1.0, batch=0.5, hand_over=0.5),
    target_images_per_s=None,
)


def report(*, rates: dict[int, float] | None = None, **changes) -> BenchReport:
    """REPORT with other figures; rates per number of workers."""
    if rates is not None:
        rows = [WorkerRate(rate, None, None, 0.5, workers) for workers, rate in rates.items()]
        changes["by_workers"] = tuple(rows)
    return replace(REPORT, **changes)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """21 samples in shards of uneven sizes."""
    return write_shards(tmp_path_factory.mktemp("bench"), [7, 1, 13])


def new_loads(manifest, *, batch_size=4, color_jitter=0.4, seconds=0.01) -> Loads:
    dataset = open_dataset(str(manifest))
    return Loads(
        dataset,
        TrainOrder(dataset.sizes, 0, batch_size, 100),
        TrainTransform(32, color_jitter=color_jitter),
        batch_size=batch_size,
        seconds=seconds,
        progress=Progress("Measuring", quiet=True),
    )


def test_json_has_every_figure_and_nothing_else_is_printed(capsys, manifest):
    """One object on standard output, a row for each power of two up to training's workers."""
    code, out, err = call(capsys, "bench", manifest, *QUICK, "--json")

    found = json.loads(out)
    most = num_workers(None)
    rows = {row["workers"]: row for row in found["by_workers"]}
    best = rows[found["workers"]]
    assert code == 0
    assert list(rows) == [2**i for i in range(8) if 2**i < most] + [most]
    for name in ("images_per_s", "cpu_ms_per_image", "peak_pss_mib", "first_batch_s"):
        assert found[name] == best[name]
        assert all(row[name] is None or row[name] >= 0 for row in rows.values())
    assert found["images_per_s"] == max(row["images_per_s"] for row in rows.values()) > 0
    assert list(found["stages_ms"]) == list(STAGES)
    assert all(ms > 0 for name, ms in found["stages_ms"].items() if name != "hand_over")
    assert found["stages_ms"]["hand_over"] >= 0
    assert found["largest_stage"] in STAGES
    assert (found["dataset"], found["split"], found["num_samples"]) == ("pictures", "train", 21)
    assert found["target_images_per_s"] is None and found["workers_enough"] is None
    assert all(line.startswith("Measuring: ") for line in err.splitlines())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_number_of_workers_is_measured_alone(capsys, manifest, workers):
    """Also none; and no process is left."""
    code, out, _ = call(capsys, "bench", manifest, *QUICK, "--json", "--workers", workers)

    assert code == 0
    assert [row["workers"] for row in json.loads(out)["by_workers"]] == [workers]
    assert not multiprocessing.active_children()


def test_fewer_samples_than_a_batch_are_enough(capsys, tmp_path):
    """The training order is endless."""
    manifest = write_shards(tmp_path, [2, 1])

    code, out, _ = call(capsys, "bench", manifest, *QUICK, "--workers", 1, "--json")

    assert code == 0
    assert json.loads(out)["num_samples"] == 3


@pytest.mark.parametrize(("target", "said"), [(0.5, "reached, "), (1e9, "not reached, ")])
def test_the_text_has_the_table_the_stages_and_the_target(capsys, manifest, target, said):
    code, out, _ = call(
        capsys, "bench", manifest, *QUICK, "--workers", 1, "--target-images-per-s", target
    )

    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("pictures, train split, 21 samples: batches of 8 at 32 px, on ")
    assert lines[2].split("  ")[:2] == ["workers", "images/s"] and lines[3].split()[0] == "1"
    assert len(lines[2]) == len(lines[3])
    assert [line.split()[0].rstrip(",") for line in lines[7:14]] == [
        *("read", "decode", "resize", "jitter", "order", "hand-over", "all")
    ]
    assert lines[13].endswith("100%")
    assert lines[15].startswith("largest stage: ") and lines[15].endswith(" %")
    assert f"images/s: {said}" in lines[-1] and len(lines) == 17


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/train.json"], "nowhere"),
        (["{folder}/train-<000..007>.tar"], "train-003.tar"),
        (["{folder}", "--workers", 200], "--workers 200: this machine has"),
    ],
)
def test_what_a_user_can_fix_is_one_line(capsys, manifest, arguments, said):
    arguments = [str(argument).format(folder=manifest.parent) for argument in arguments]

    code, out, err = call(capsys, "bench", *arguments)

    assert code == 2
    assert said in err and len(err.strip().splitlines()) == 1
    assert out == ""


def test_a_damaged_shard_is_one_line(capsys, tmp_path):
    """It is met in a worker process."""
    manifest = write_shards(tmp_path, [2, 9])
    data = bytearray((tmp_path / "train-001.tar").read_bytes())
    data[:512] = bytes(512)
    (tmp_path / "train-001.tar").write_bytes(data)

    code, out, err = call(capsys, "bench", manifest, *QUICK, "--workers", 1)

    assert code == 2
    assert "train-001.tar: no member of" in err and len(err.strip().splitlines()) == 1
    assert out == "" and not multiprocessing.active_children()


def test_a_bad_option_is_refused(capsys, manifest):
    code, out, err = call(capsys, "bench", manifest, "--seconds", 0)

    assert code == 2
    assert err == "UsageError: --seconds 0: expected a number > 0 and <= 3600.\n" and out == ""


@pytest.mark.bits
@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_what_is_timed_is_the_transform_itself(color_jitter):
    """The same image to the last bit, in its three parts."""
    transform = TrainTransform(32, color_jitter=color_jitter)
    data, draws = encode_image(1), np.random.default_rng(0).random(TrainTransform().NUM_DRAWS)
    spent = Counter()

    image = TimedTransform(transform, spent)(data, draws)

    assert torch.equal(image, transform(data, draws))
    assert set(spent) == {"decode", "resize", "jitter"} and min(spent.values()) > 0


def test_what_is_timed_is_the_reader_itself(manifest):
    spent = Counter()
    with closing(SampleReader(open_dataset(str(manifest)))) as reader:
        assert TimedReader(reader, spent).read(5) == reader.read(5)
        assert TimedReader(reader, spent).describe(5) == reader.describe(5)
    assert spent["read"] > 0


def test_the_stages_share_out_all_the_time_that_loading_takes(manifest, monkeypatch):
    """By a clock that gives a millisecond each time it is asked: nothing is lost or twice."""
    ticks = itertools.count()
    monkeypatch.setattr("wds_convnext.check.loads.time.perf_counter", lambda: next(ticks) / 1e3)

    stages = new_loads(manifest, batch_size=4).stages(None)

    # Seven questions per image, and one per batch after it.
    assert (stages.read, stages.decode, stages.resize, stages.jitter) == pytest.approx((1,) * 4)
    assert stages.total == pytest.approx(7 + 1 / 4)
    assert stages.hand_over == 0


def test_hand_over_is_what_one_worker_costs_beyond_the_stages(manifest, monkeypatch):
    monkeypatch.setattr("wds_convnext.check.loads.time.process_time", lambda: 7.0)

    assert new_loads(manifest).stages(0.25).hand_over == 0.25


def test_measurements_go_on_where_the_one_before_stopped(manifest):
    """No batch is taken twice: not by the next number of workers, not by the stages."""
    loads = new_loads(manifest)
    starts = []

    def new_stream(*args, stream=loads._stream):
        starts.append(loads._start)
        return stream(*args)

    loads._stream = new_stream
    loads.rate(0)
    loads.rate(2)
    loads.stages(None)

    assert starts[0] == 0
    assert starts[1] >= 6 and starts[2] >= starts[1] + 8


FLAT = {1: 100.0, 2: 200.0, 4: 204.0, 8: 201.0}


@pytest.mark.parametrize(
    ("changes", "enough", "said"),
    [
        ({"target_images_per_s": 150.0}, 2, "target 150 images/s: reached, 200 with 2 workers"),
        ({"target_images_per_s": 200.0}, 2, "target 200 images/s: reached, 200 with 2 workers"),
        ({"target_images_per_s": 100.0}, 1, "target 100 images/s: reached, 100 with 1 worker"),
        (
            {"target_images_per_s": 1e3},
            None,
            "target 1,000 images/s: not reached, 400 with 4 workers",
        ),
        ({"target_images_per_s": 1e3, "rates": FLAT}, None, "not reached, 204 with 4 workers"),
        ({"target_images_per_s": 9.0, "rates": {0: 90.0}}, 0, "reached, 90 with 0 workers"),
    ],
)
def test_a_target_is_reached_by_the_fewest_workers_or_missed_by_the_fastest(changes, enough, said):
    """As measured; nothing is extrapolated."""
    found = report(**changes)

    assert found.to_json()["workers_enough"] == enough
    assert said in found.lines()[-1]


def test_the_table_reads_well():
    """Golden text; what a system cannot tell is n/a."""
    rows = (*REPORT.by_workers, WorkerRate(12345.6, None, None, 12.345, 16))

    lines = report(by_workers=rows).lines()

    assert lines[2:7] == [
        "workers  images/s  CPU ms per image  peak PSS MiB  first batch s",
        "      1       100             10.00           700           0.50",
        "      2       200             10.00           800           0.50",
        "      4       400             10.00         1,000           0.50",
        "     16    12,346               n/a           n/a          12.35",
    ]
    assert lines[9:] == [
        "one image in one worker     ms  share",
        "  read                    1.00    10%",
        "  decode                  5.00    50%",
        "  resize, flip            2.00    20%",
        "  jitter                  1.00    10%",
        "  order, batch            0.50     5%",
        "  hand-over               0.50     5%",
        "  all                    10.00   100%",
        "",
        "largest stage: decode, 50 %",
    ]
