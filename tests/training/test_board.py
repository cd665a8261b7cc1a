"""What a person sees of a run in TensorBoard, read back from its events; and metrics.jsonl."""

import io
import json

import pytest
from conftest import CLASS_NAMES, TINY_RUN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_cli import call

from wds_convnext.cli import main
from wds_convnext.training.augment import MixDraw
from wds_convnext.training.batchsheet import captions

OPTIONS = TINY_RUN | {"--log-every": 1, "--val-every": 1, "--epochs": 2, "--lr": 0.015}


@pytest.fixture(scope="module")
def resumed(shards, tmp_path_factory):
    """The folder of a run that stopped after five steps and was resumed."""
    out = tmp_path_factory.mktemp("board") / "run"
    flat = [str(part) for pair in OPTIONS.items() for part in pair]
    start = ["train", "--shards", str(shards / "train.json"), "--out", str(out), *flat]
    for arguments in (start + ["--max-steps", "5"], ["train", "--resume", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    return out


@pytest.fixture(scope="module")
def events(resumed):
    return EventAccumulator(str(resumed), size_guidance={"images": 0, "tensors": 0}).Reload()


def text(events, name: str) -> str:
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_validation_comes_first_and_the_machine_last(events):
    """TensorBoard sorts groups by name."""
    groups = {}
    for name in sorted(events.Tags()["scalars"]):
        groups.setdefault(name.split("/")[0], []).append(name.split("/")[1])

    assert list(groups) == ["eval", "train", "utilization"]
    assert groups["eval"] == ["accuracy", "loss", "top5"]
    assert {"images_per_s", "data_wait", "memory_gb", "tflops_per_s"} <= {*groups["utilization"]}
    assert not {*groups["train"]} & {*groups["utilization"]}


def test_cards_and_hyperparameters_say_what_was_trained(events, resumed):
    """Every option, as config.toml has it; the data, the machine and versions; what was tuned."""
    config = [line.removeprefix("    ") for line in text(events, "config.toml").splitlines()]
    facts = text(events, "facts")
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    start = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info

    assert config == (resumed / "config.toml").read_text().splitlines()
    assert "50 samples in" in facts and "global_batch_size = 8" in facts and "torch = " in facts
    assert start.hparams["lr"].number_value == 0.015
    assert start.hparams["model"].string_value == "test_convnext"
    assert "workers" not in start.hparams and "shards" not in start.hparams


def test_the_first_batch_is_shown_once_with_its_labels(events):
    [image] = events.Images("train/samples")
    picture = Image.open(io.BytesIO(image.encoded_image_string))

    assert image.step == 0
    assert picture.size == (image.width, image.height)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 100  # pictures, not a blank


@pytest.mark.parametrize(
    ("mix", "first"),
    [
        (MixDraw(1.0), ("ant", "")),
        (MixDraw(0.7), ("70% ant", "30% dog")),
        (MixDraw(0.25, (0, 1, 0, 1)), ("25% ant", "75% dog")),
    ],
)
def test_a_mixed_picture_has_both_labels_and_their_weights(mix, first):
    """The partner of the first is the last, as in `Mixer`."""
    lines = captions(CLASS_NAMES, mix)

    assert lines[0] == first
    assert len(lines) == len(CLASS_NAMES)
    if mix.share < 1:
        assert [line[1].split()[1] for line in lines] == CLASS_NAMES[::-1]


def read_strictly(folder) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_metrics_have_an_epoch_and_a_time_that_goes_on(resumed):
    """Over a resume, too."""
    lines = read_strictly(resumed)
    times = [line["time"] for line in lines]

    assert times == sorted(times) and times[0] >= 0
    assert [line["epoch"] for line in lines if "train/loss" in line] == [0] * 7 + [1] * 6
    assert [line["epoch"] for line in lines if "val/loss" in line] == [0, 0, 1]
    assert [line["step"] for line in lines if "val/loss" in line] == [5, 7, 13]


def test_a_loss_that_is_no_number_is_null(capsys, shards, tmp_path):
    """A step that is skipped leaves NaN as the mean of its interval."""
    out = tmp_path / "run"
    wild = OPTIONS | {"--lr": 1e30, "--warmup-epochs": 0, "--max-steps": 4, "--clip-grad-norm": 0}
    flat = [part for pair in wild.items() for part in pair]
    places = ["--shards", shards / "train.json", "--out", out]

    call(capsys, "train", *places, *flat, "--on-nonfinite", "skip")

    assert None in [line.get("train/loss", 0) for line in read_strictly(out)]
