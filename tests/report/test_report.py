"""What a report says is what eval counts; its page is text, its predictions are computed once."""

import html.parser
import os
import re
import shutil
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wds_convnext as wc
from wds_convnext.config import EvalConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.report import page
from wds_convnext.report.figures import matrix, render
from wds_convnext.report.kept import Predictions
from wds_convnext.report.measures import (
    Comparison,
    calibration,
    compare,
    confused_pairs,
    confusion,
    fit_temperature,
    similar_first,
)
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.scores import wilson_interval

CPU = {"device": "cpu", "workers": 0, "quiet": True}
HOSTILE = "<script>alert(1)</script>&\"' $x^2$ 中\u202e"


def predictions(logits, labels) -> Predictions:
    """What a model with these logits says of samples with these labels."""
    logits = np.asarray(logits, dtype=np.float64)
    rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = np.asarray(labels, dtype=np.int32)
    losses = -rows[np.arange(len(labels)), labels].astype(np.float32)
    guesses = rows.argmax(axis=1).astype(np.int32)
    return Predictions(labels, guesses, losses, rows.astype(np.float16), {"precision": "off"})


def random_predictions(seed: int, *, num_samples=400, num_classes=5) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_samples)
    logits = rng.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), labels] += 1.5
    return predictions(logits, labels)


class Tags(html.parser.HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy of the run whose classes have hostile names, and the spec of a split of it."""
    folder = tmp_path_factory.mktemp("report")
    return shutil.copytree(trained_run, folder / "run")


@pytest.fixture(scope="module")
def spec(shards):
    return str(shards / "validation.json")


def test_the_report_counts_as_eval_does(run, spec):
    """And predictions that are kept give the same page, byte for byte, without the model."""
    expected, _ = evaluate_checkpoint(
        EvalConfig(checkpoint=str(run), shards=spec, device="cpu", workers=0)
    )

    written = wc.write_report(str(run), **CPU)
    first = written.path.read_bytes()
    kept = {p.name: p.stat().st_mtime_ns for p in (run / "report").glob("*.parquet")}
    again = wc.write_report(str(run), **CPU)

    (result,) = written.results
    assert (result.top1, result.top5, result.num_samples) == (
        *(expected.top1, expected.top5, expected.num_samples),
    )
    assert result.loss == pytest.approx(expected.loss, abs=1e-6)
    assert again.path.read_bytes() == first
    assert {p.name: p.stat().st_mtime_ns for p in (run / "report").glob("*.parquet")} == kept
    assert len(kept) == 1
    low, high = result.top1_interval
    assert f"95 % interval {low:.2%} to {high:.2%}" in first.decode()
    assert {"confusion.png", "classes.png", "calibration.png", "loss.png"} <= set(written.files)


def test_the_page_needs_nothing_else(run, spec):
    """No script, no link but to itself, images within; all that it names is inside."""
    text = wc.write_report(str(run), **CPU).path.read_text()

    parsed = Tags(text)
    links = [value for name, value in parsed.attributes if name in ("href", "src", "xlink:href")]
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert all(link.startswith(("#", "data:image/")) for link in links), links
    assert not re.search(r"url\((?!#)", text)
    assert parsed.tags.count("svg") >= 5
    ids = [value for name, value in parsed.attributes if name == "id"]
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets <= set(ids)


def test_other_weights_or_samples_are_computed_anew(run, spec, shards, tmp_path):
    """A changed checkpoint or split never gives the predictions that are kept."""
    copy = shutil.copytree(run, tmp_path / "run")
    before = wc.write_report(str(copy), **CPU)
    checkpoint = load_checkpoint(copy / "best.pt")
    weights = {k: v.clone().neg() for k, v in checkpoint["ema"].items()}
    save_checkpoint(copy / "best.pt", {**checkpoint, "ema": weights, "state_dict_ema": None})

    changed = wc.write_report(str(copy), **CPU)
    other = wc.write_report(str(copy), shards=str(shards / "test.json"), **CPU)

    assert changed.results[0].loss != before.results[0].loss
    assert other.results[0].num_samples == 11
    assert len(list((copy / "report").glob("*.parquet"))) == 3


def test_two_runs_are_compared_on_the_same_samples(run, trained_run, spec, tmp_path):
    """With itself nothing changes; with other weights counts are those made by hand."""
    other = shutil.copytree(trained_run, tmp_path / "other")
    checkpoint = load_checkpoint(other / "best.pt")
    weights = {k: v.clone() * -1.5 for k, v in checkpoint["ema"].items()}
    save_checkpoint(other / "best.pt", {**checkpoint, "ema": weights, "state_dict_ema": None})

    same = wc.write_report(str(run), str(run), out=str(tmp_path / "same"), **CPU)
    changed = wc.write_report(str(run), str(other), out=str(tmp_path / "changed"), **CPU)

    assert "+0.00 points" in same.summary and "p = 1," in same.summary
    a, b = (result.top1 for result in changed.results)
    assert f"{100 * (b - a):+.2f} points" in changed.summary
    assert (tmp_path / "changed" / "comparison.html").is_file()


def test_what_comes_from_data_is_text():
    """In the page, and in the charts: no tag, no formula, nothing that turns the line around."""
    found = random_predictions(1, num_classes=4)
    figure = matrix(confusion(found), [HOSTILE, "b", "c" * 80, "$\\frac"])

    _, svg = render(figure, "hostile")
    shown = page.page(HOSTILE, HOSTILE, {HOSTILE: page.table([HOSTILE], [[HOSTILE]]) + svg})
    shown += page.pictures(
        [page.Picture("data:image/png;base64,", *[HOSTILE] * 4)], is_small=True
    ) + page.pair(HOSTILE, HOSTILE, [], is_small=False)

    tags = Tags(shown).tags
    assert "script" not in tags and "svg" in tags
    assert "<script" not in shown and "\u202e" not in shown
    assert "onerror" not in {
        name for name, _ in Tags(page.tiles({'"onerror=x': ("", "")})).attributes
    }


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_a_matrix_of_any_size_is_drawn(num_classes):
    """Every class is in one row; groups add up."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (num_classes, num_classes))

    png, svg = render(matrix(counts, [f"class {i}" for i in range(num_classes)]), "matrix")

    assert png.startswith(b"\x89PNG") and "var(--ink)" in svg
    assert len(svg) < 400_000


def test_confused_classes_stand_side_by_side():
    """Blocks that are confused among themselves are found again in whatever order they come."""
    rng = np.random.default_rng(3)
    block = np.arange(12) % 3
    counts = np.where(block[:, None] == block, 5, 0) + np.diag(np.full(12, 50))
    counts[0, 1] = counts[1, 2] = 1  # the blocks hang together

    order = similar_first(counts)

    changes = np.count_nonzero(np.diff(block[order]))
    assert changes == 2 and sorted(order) == list(range(12))
    assert np.count_nonzero(np.diff(block[rng.permutation(12)])) > 2


def test_pairs_and_confusion_are_those_made_by_hand():
    found = random_predictions(2)

    counts = confusion(found)

    for label in range(5):
        for guess in range(5):
            expected = ((found.labels == label) & (found.guesses == guess)).sum()
            assert counts[label, guess] == expected
    (first, *_) = confused_pairs(counts, 3)
    assert first.num_samples == max(counts[i, j] for i in range(5) for j in range(5) if i != j)
    assert first.share == first.num_samples / counts[first.label].sum()


def test_a_sample_that_does_not_decode_counts_nowhere():
    found = random_predictions(4)
    guesses = found.guesses.copy()
    guesses[:7] = -1
    found = Predictions(found.labels, guesses, found.losses, found.log_probabilities, {})

    assert confusion(found).sum() == found.result().num_samples == 393
    assert compare(found, random_predictions(4)).num_samples == 393


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(factor):
    """Labels drawn from the model's own probabilities, then its logits multiplied."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6000, 4)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((6000, 1)) > shares.cumsum(axis=1)).sum(axis=1).clip(0, 3)

    fitted = fit_temperature(predictions(logits * factor, labels))

    assert fitted.value == pytest.approx(factor, rel=0.06)
    assert fitted.ece_after < 0.03
    assert fitted.num_fitted == 3000
    if factor > 1:
        assert fitted.ece_before > 0.1


def test_the_calibration_error_is_that_made_by_hand():
    confidences = np.array([0.95, 0.95, 0.95, 0.55, 0.54, 1.0])
    is_right = np.array([True, True, False, False, True, True])

    found = calibration(confidences, is_right)

    gaps = 4 * abs((0.95 * 3 + 1) / 4 - 3 / 4) + 2 * abs((0.55 + 0.54) / 2 - 0.5)
    assert found.ece == pytest.approx(gaps / 6)


@given(b=st.integers(0, 60), c=st.integers(0, 60))
def test_mcnemars_p_is_the_exact_sum(b, c):
    """And is the same when the models change places, where the difference changes its sign."""
    found, turned = Comparison(20, b, c, 5), Comparison(20, c, b, 5)

    exact = min(1.0, 2 * sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    assert found.p_value == pytest.approx(exact, rel=1e-9)
    assert found.p_value == turned.p_value and found.difference == -turned.difference
    low, high = found.interval
    assert low <= found.difference <= high or b + c == 0
    assert low == pytest.approx(-turned.interval[1])


def test_intervals_of_classes_are_wilsons():
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_a_report_that_cannot_be_written_is_one_line(run, spec, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="cannot be written"):
        wc.write_report(str(run), out=str(tmp_path / "file" / "report"), **CPU)

    assert os.listdir(tmp_path) == ["file"]


def test_a_damaged_file_of_predictions_is_made_again(run, spec, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    expected = wc.write_report(str(copy), **CPU)
    (kept,) = (copy / "report").glob("*.parquet")
    kept.write_bytes(kept.read_bytes()[:-50])

    again = wc.write_report(str(copy), **CPU)

    assert again.results == expected.results
    (copy / "metrics.jsonl").write_text('{"step": 1}\n[1]\nnone')
    assert wc.write_report(str(copy), **CPU).results == expected.results


def test_outputs_that_are_no_numbers_are_one_line(run, spec, tmp_path):
    """Nothing is kept of them; predict says the same."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    checkpoint = load_checkpoint(copy / "best.pt")
    weights = {k: v.clone() * float("nan") for k, v in checkpoint["ema"].items()}
    save_checkpoint(copy / "best.pt", {**checkpoint, "ema": weights, "state_dict_ema": None})

    with pytest.raises(CheckpointError, match="not finite"):
        wc.write_report(str(copy), **CPU)
    with pytest.raises(CheckpointError, match="not finite"):
        wc.predict(str(copy), [spec], **CPU)

    assert not list(copy.rglob("*.parquet"))
