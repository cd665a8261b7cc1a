"""The page about one model: training, confusion, classes, mistakes, calibration, facts."""

import json
import math
from typing import Any

import numpy as np

from wds_convnext.report import page
from wds_convnext.report.evaluated import Evaluated, facts_table, left_out, shown_pictures
from wds_convnext.report.figures import MAX_ROWS, accuracies, curves, matrix, reliability, render
from wds_convnext.report.measures import (
    calibration,
    confused_pairs,
    confusion,
    fit_temperature,
    similar_first,
)
from wds_convnext.training.scores import EvalResult, wilson_interval
from wds_convnext.training.stored import StoredModel

_MAX_PAIRS, _PER_PAIR, _MAX_MISTAKES = 12, 6, 48


def report_page(found: Evaluated, result: EvalResult, files: dict[str, bytes]) -> str:
    """The page; its charts go to `files`, too."""
    stored, dataset = found.stored, found.dataset
    calibrated, ece = _calibration(found, files)
    counts = confusion(found.predictions)
    low, high = result.top1_interval
    tiles = {
        "top-1": (f"{result.top1:.2%}", f"95 % interval {low:.2%} to {high:.2%}"),
        "top-5": (f"{result.top5:.2%}", f"{stored.num_classes:,} classes"),
        "loss": (f"{result.loss:.4f}", "cross-entropy, nats"),
        "calibration error": (f"{ece:.2%}", "ECE, 15 bins"),
        "samples": (f"{result.num_samples:,}", left_out(found)),
    }
    sections = {
        "Training": _training(stored, files),
        "Confusion": _confusion(found, counts, files),
        "Most confused pairs": _pairs(found, counts),
        "Classes": _classes(found, counts, files),
        "Most confident mistakes": _mistakes(found, files),
        "Calibration": calibrated,
        "Facts": facts_table([found]),
    }
    title = f"{stored.name} on {dataset.name}, {dataset.split} split"
    subtitle = f"{stored.path}, step {stored.step:,}"
    kept = {heading: content for heading, content in sections.items() if content}
    return page.page(title, subtitle, kept, head=page.tiles(tiles))


def _draw(figure: Any, name: str, files: dict[str, bytes]) -> str:
    files[f"{name}.png"], svg = render(figure, name)
    return svg


def _training(stored: StoredModel, files: dict[str, bytes]) -> str:
    """The curves of metrics.jsonl, where the model has one."""
    values: dict[str, list[tuple[float, float]]] = {}
    try:
        lines = (stored.folder / "metrics.jsonl").read_text().splitlines()
        for line in lines:
            entry = json.loads(line)
            for name, value in entry.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values.setdefault(name, []).append((entry["step"], value))
    except (OSError, ValueError, KeyError, AttributeError):
        values = {}
    found = []
    losses = {"training": "train/loss", "validation": "val/loss"}
    if shown := {k: values[v] for k, v in losses.items() if v in values}:
        found.append(_draw(curves("Loss", shown, unit="nats"), "loss", files))
    if "val/accuracy" in values:
        shown = {"top-1": values["val/accuracy"]}
        figure = curves("Validation top-1", shown, unit="%")
        found.append(_draw(figure, "accuracy", files))
    if "train/lr" in values:
        figure = curves("Learning rate", {"lr": values["train/lr"]}, unit="")
        found.append(_draw(figure, "lr", files))
    return page.charts(found) if found else ""


def _confusion(found: Evaluated, counts: np.ndarray, files: dict[str, bytes]) -> str:
    order = similar_first(counts)
    names = [found.class_names[i] for i in order]
    figure = matrix(counts[np.ix_(order, order)], names)
    svg = _draw(figure, "confusion", files)
    words = (
        "Rows are labels, columns predictions; a cell's color is its share of the row (its cube "
        "root, so that few errors show), right ones in blue. Classes that are confused stand side "
        "by side."
    )
    if len(names) > MAX_ROWS:
        words += " Neighbors in this order are put together; the pairs below name single classes."
    return page.paragraph(words) + page.wide(svg, width=round(figure.get_figwidth() * 88))


def _pairs(found: Evaluated, counts: np.ndarray) -> str:
    predictions = found.predictions
    pairs = confused_pairs(counts, _MAX_PAIRS)
    if not pairs:
        return page.paragraph("No class is taken for another.")
    rows = []
    for pair in [pair for pair in pairs if pair.num_samples > 1] or pairs:
        is_of = (predictions.labels == pair.label) & (predictions.guesses == pair.guess)
        numbers = np.flatnonzero(is_of)
        numbers = numbers[np.argsort(-predictions.confidences[numbers], kind="stable")]
        names = [found.class_names[number] for number in (pair.label, pair.guess)]
        rows.append(
            page.pair(
                f"{names[0]} → {names[1]}",
                f"{pair.num_samples:,} of its samples, {pair.share:.1%}",
                found.pictures.urls(numbers[:_PER_PAIR].tolist()),
                is_small=found.is_small,
            )
        )
    return page.paragraph("Label → prediction, the surest mistakes first.") + page.pairs(rows)


def _classes(found: Evaluated, counts: np.ndarray, files: dict[str, bytes]) -> str:
    totals, right = counts.sum(axis=1), counts.diagonal()
    guessed = counts.sum(axis=0)
    there = np.flatnonzero(totals)
    shares = right[there] / totals[there]
    intervals = [wilson_interval(share, n) for share, n in zip(shares, totals[there])]
    lows, highs = np.array(intervals).T
    names = [found.class_names[i] for i in there]
    svg = _draw(accuracies(names, shares, lows, highs), "classes", files)
    wrong = counts - np.diag(right)
    rows = []
    for place in np.argsort(shares, kind="stable"):
        i = int(there[place])
        taken_for = int(wrong[i].argmax())
        most = f"{found.class_names[taken_for]} ({wrong[i, taken_for]:,})" if wrong[i].any() else ""
        precision = f"{right[i] / guessed[i]:.1%}" if guessed[i] else "–"
        rows.append(
            (
                found.class_names[i],
                f"{totals[i]:,}",
                f"{right[i]:,}",
                f"{shares[place]:.1%}",
                f"{lows[place]:.1%} to {highs[place]:.1%}",
                precision,
                most,
            )
        )
    headings = ("class", "samples", "right", "accuracy", "95 % interval", "precision", "taken for")
    listed = page.table(headings, rows, numbers=(1, 2, 3, 4, 5))
    missing = len(totals) - len(there)
    words = "Intervals are Wilson's. Precision: how much of what is predicted to be the class is."
    if missing:
        words += f" {missing:,} classes have no sample in this split."
    return page.paragraph(words) + page.charts([svg]) + listed


def _mistakes(found: Evaluated, files: dict[str, bytes]) -> str:
    predictions = found.predictions
    wrong = np.flatnonzero(predictions.is_read & ~predictions.is_right)
    if not len(wrong):
        return page.paragraph("There are none.")
    order = np.argsort(-predictions.confidences[wrong], kind="stable")
    numbers = wrong[order][:_MAX_MISTAKES].tolist()
    notes = [f"{predictions.confidences[number]:.1%}" for number in numbers]
    shown = shown_pictures(found, numbers, notes)
    captions = [(picture.label, f"{picture.guess} {picture.note}") for picture in shown]
    title = "Most confident mistakes: label, below it prediction and confidence"
    files["mistakes.png"] = found.pictures.sheet(numbers, title, captions)
    words = f"{len(wrong):,} samples are wrong"
    words += f", these {len(numbers)} with the most confidence" if len(numbers) < len(wrong) else ""
    words += (
        ". Under each its label, and the prediction with its confidence. Look for wrong labels."
    )
    return page.paragraph(words) + page.pictures(shown, is_small=found.is_small)


def _calibration(found: Evaluated, files: dict[str, bytes]) -> tuple[str, float]:
    """The diagram with what is said of it, and the calibration error."""
    predictions = found.predictions
    read = predictions.is_read
    measured = calibration(predictions.confidences[read], predictions.is_right[read])
    svg = _draw(reliability(measured), "calibration", files)
    words = (
        f"Expected calibration error {measured.ece:.2%} over 15 bins of equal width, all samples."
    )
    if fitted := fit_temperature(predictions):
        words += (
            f" Logits divided by {fitted.value:.3f} have the least loss on {fitted.num_fitted:,} "
            "samples of even numbers; on those of odd numbers the error is "
            f"{fitted.ece_before:.2%} before and {fitted.ece_after:.2%} after."
        )
    return page.charts([svg, page.paragraph(words)]), measured.ece
