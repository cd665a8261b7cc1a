"""Evaluating checkpoints at other sizes, with several views, and several in one table."""

import json
from pathlib import Path

import pytest
import tiny_model  # noqa: F401  (registers the fixture's model)
import torch
from click.testing import CliRunner

import wds_convnext as wc
from wds_convnext.cli import commands
from wds_convnext.config import EvalConfig
from wds_convnext.errors import CheckpointError, DataError, UsageError
from wds_convnext.training.augment import Normalizer
from wds_convnext.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint, evaluate_checkpoints
from wds_convnext.training.model import create_model

OLD = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"
LAST, FINAL = str(OLD / "run" / "last.pt"), str(OLD / "run")
HOW = {"device": "cpu", "workers": 0, "batch_size": 4}


@pytest.fixture
def split(shards) -> str:
    return str(shards / "validation.json")


def views(image: torch.Tensor, tta: str) -> list[tuple[float, torch.Tensor]]:
    """The images whose logits count, with their weights."""
    if tta == "none":
        return [(1.0, image)]
    if tta == "flip":
        return [(0.5, image), (0.5, image.flip(-1))]
    size = image.shape[-1]
    up_left = [1, *range(size - 1)]
    down_right = [*range(1, size), size - 2]
    moved = [image[..., places, :][..., places] for places in (up_left, down_right)]
    weighted = [(0.25, image), *((0.125, view) for view in moved)]
    return [(weight, v) for weight, view in weighted for v in (view, view.flip(-1))]


def by_hand(split: str, *, image_size: int, crop: float, tta: str) -> tuple[float, float]:
    """Top-1 and mean loss of the old run's weights, sample by sample."""
    transform = wc.EvalTransform(image_size, crop_ratio=crop)
    normalizer = Normalizer(wc.Preprocessing().mean, wc.Preprocessing().std, torch.device("cpu"))
    model = create_model("tiny_convnext", num_classes=4).eval()
    load_weights(model, load_checkpoint(LAST))
    hits, losses = [], []
    for sample in wc.open_dataset(split):
        image = normalizer(transform(sample.image)[None])
        with torch.no_grad():
            logits = torch.stack([w * model(view) for w, view in views(image, tta)]).sum(0)
        hits.append(float(logits.argmax() == sample.label))
        losses.append(-logits.log_softmax(1)[0, sample.label].item())
    return sum(hits) / len(hits), sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("given", "image_size", "crop", "tta"),
    [
        ({}, 32, 0.875, "none"),  # the checkpoint's
        ({}, 32, 0.875, "flip-shift"),
        ({"image_size": 64}, 64, 0.875, "flip"),
        ({"crop": 1.0}, 32, 1.0, "none"),
        ({"image_size": 48, "crop": 0.5}, 48, 0.5, "flip"),
        ({"image_size": 48, "crop": 0.5}, 48, 0.5, "flip-shift"),
    ],
)
def test_size_crop_and_views_are_as_asked(split, given, image_size, crop, tta):
    """Each result is what one finds by hand: the mean of logits, not of probabilities."""
    config = EvalConfig(checkpoint=LAST, shards=split, tta=tta, **given, **HOW)

    result, about = evaluate_checkpoint(config)

    top1, loss = by_hand(split, image_size=image_size, crop=crop, tta=tta)
    assert (result.top1, result.num_samples) == (top1, 13)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert [about["image_size"], about["crop"], about["tta"]] == [image_size, crop, tta]


def test_several_checkpoints_are_compared_in_one_table(split):
    """A row each, in the order they are named; the same numbers as alone, and as a list."""
    shown = ["--shards", split, "--device", "cpu", "--workers", "0"]
    named = [FINAL, LAST]
    alone = [
        json.loads(CliRunner().invoke(commands, ["eval", name, *shown, "--json"]).stdout)
        for name in named
    ]

    as_json = CliRunner().invoke(commands, ["eval", *named, *shown, "--json"]).stdout
    text = CliRunner().invoke(commands, ["eval", *named, *shown]).stdout

    assert json.loads(as_json) == alone
    rows = text.splitlines()[-2:]
    for row, score in zip(rows, alone, strict=True):
        assert row.split()[:2] == ["13", f"{score['top1']:.2%}"]
        assert row.endswith(f"{score['checkpoint']}, step {score['step']}")
    assert "95 % interval" in text and "validation split" in text
    option = CliRunner().invoke(commands, ["eval", "--checkpoint", LAST, *shown, "--json"])
    assert json.loads(option.stdout) == alone[1]


def test_the_split_is_the_first_ones_where_none_is_named(shards, tmp_path):
    """Of runs that were validated on different splits, too."""
    paths = []
    for name in ("validation", "test"):
        content = load_checkpoint(LAST)
        content["facts"] |= {"val_shards": str(shards / f"{name}.json")}
        paths.append(str(tmp_path / f"{name}.pt"))
        save_checkpoint(paths[-1], content)

    scores = [evaluate_checkpoints(named, EvalConfig(**HOW)) for named in (paths, paths[::-1])]

    splits = [[score.about["split"] for score in pair] for pair in scores]
    assert splits == [["validation"] * 2, ["test"] * 2]


def test_a_checkpoint_that_is_missing_is_found_before_anything_is_evaluated(split, capsys):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        evaluate_checkpoints([LAST, "nowhere"], EvalConfig(shards=split, **HOW))

    assert "Evaluating" not in "".join(capsys.readouterr())


def test_a_crop_that_makes_images_too_large_is_named(split):
    """The short side would be 32,000 pixels."""
    with pytest.raises(DataError, match=r"nothing to evaluate: .*38,?400"):
        evaluate_checkpoint(EvalConfig(checkpoint=LAST, shards=split, crop=0.001, **HOW))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--crop", "0"], "--crop 0: expected a number > 0 and <= 1."),
        (["--crop", "1.5"], "--crop 1.5: expected a number > 0 and <= 1."),
        (["--image-size", "7"], "--image-size 7: expected an integer from 8 to 4096."),
        (["--tta", "five"], "--tta five: expected none, flip or flip-shift."),
        (["--checkpoint", "a"], "--checkpoint a: b is named as well."),
    ],
)
def test_values_that_mean_nothing_are_refused(args, message):
    error = CliRunner().invoke(commands, ["eval", "b", *args]).exception

    assert isinstance(error, UsageError) and str(error).startswith(message)
