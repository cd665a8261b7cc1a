"""The page that compares two models on the same samples."""

import numpy as np

from wds_convnext.errors import UsageError
from wds_convnext.report import page
from wds_convnext.report.evaluated import Evaluated, facts_table, shown_pictures
from wds_convnext.report.measures import Comparison, compare
from wds_convnext.training.scores import EvalResult

_MAX_SHOWN = 36
_MAX_CLASSES = 30


def compare_page(
    first: Evaluated,
    second: Evaluated,
    results: tuple[EvalResult, ...],
    files: dict[str, bytes],
) -> tuple[str, str]:
    """The page and a line that sums it up; sheets of pictures go to `files`.

    Raises:
        UsageError: if there is no sample that both could read.
    """
    counts = compare(first.predictions, second.predictions)
    if not counts.num_samples:
        raise UsageError("There is no sample that both models could read.")
    summary = _summary(counts)
    tiles = {
        f"model {letter}": (f"{result.top1:.2%}", f"{found.stored.name}, {found.stored.path}")
        for letter, result, found in zip("AB", results, (first, second))
    }
    low, high = counts.interval
    tiles["B less A"] = (
        f"{100 * counts.difference:+.2f} points",
        f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}",
    )
    tiles["p"] = (f"{counts.p_value:.3g}", "McNemar's exact test, two-sided")
    tiles["samples"] = (f"{counts.num_samples:,}", "the same for both")
    sections = {
        "Who is right": _agreement(counts),
        "Right in B alone": _changed(first, second, "b-alone", files),
        "Right in A alone": _changed(second, first, "a-alone", files),
        "Classes": _classes(first, second),
        "Facts": facts_table([first, second]),
    }
    title = f"A and B on {first.dataset.name}, {first.dataset.split} split"
    return page.page(title, summary, sections, head=page.tiles(tiles)), summary


def _summary(counts: Comparison) -> str:
    low, high = counts.interval
    return (
        f"B less A: {100 * counts.difference:+.2f} points (95 % interval {100 * low:+.2f} to "
        f"{100 * high:+.2f}), McNemar p = {counts.p_value:.3g}, {counts.num_samples:,} samples"
    )


def _agreement(counts: Comparison) -> str:
    rows = [
        ("A right", f"{counts.both:,}", f"{counts.only_first:,}"),
        ("A wrong", f"{counts.only_second:,}", f"{counts.neither:,}"),
    ]
    words = (
        "Only samples on which one model alone is right say which is better. Were both as good, "
        f"{counts.only_second:,} against {counts.only_first:,} or a more uneven split would come "
        f"with probability {counts.p_value:.3g}."
    )
    return page.table(("", "B right", "B wrong"), rows, numbers=(1, 2)) + page.paragraph(words)


def _changed(wrong: Evaluated, right: Evaluated, name: str, files: dict[str, bytes]) -> str:
    """The samples that one model alone has right, the surest mistakes of the other first."""
    is_changed = wrong.predictions.is_read & ~wrong.predictions.is_right
    is_changed &= right.predictions.is_read & right.predictions.is_right
    numbers = np.flatnonzero(is_changed)
    if not len(numbers):
        return page.paragraph("There are none.")
    confidences = wrong.predictions.confidences
    order = np.argsort(-confidences[numbers], kind="stable")
    shown = numbers[order][:_MAX_SHOWN].tolist()
    notes = [f"{confidences[number]:.1%}" for number in shown]
    pictures = shown_pictures(wrong, shown, notes)
    captions = [(picture.label, f"{picture.guess} {picture.note}") for picture in pictures]
    title = "Label, below it the other model's prediction and confidence"
    files[f"{name}.png"] = wrong.pictures.sheet(shown, title, captions)
    words = f"{len(numbers):,} samples"
    words += f", the other model's surest {len(shown)}" if len(shown) < len(numbers) else ""
    words += ". Under each its label, and what the other model says and how sure it is."
    return page.paragraph(words) + page.pictures(pictures, is_small=wrong.is_small)


def _classes(first: Evaluated, second: Evaluated) -> str:
    """The classes that changed most, in samples."""
    both = first.predictions.is_read & second.predictions.is_read
    labels, size = first.predictions.labels[both], len(first.class_names)
    totals = np.bincount(labels, minlength=size)
    right = [
        np.bincount(labels, found.predictions.is_right[both], minlength=size).astype(int)
        for found in (first, second)
    ]
    change = right[1] - right[0]
    order = np.argsort(-np.abs(change), kind="stable")[:_MAX_CLASSES]
    rows = [
        (
            first.class_names[i],
            f"{totals[i]:,}",
            f"{right[0][i] / totals[i]:.1%}",
            f"{right[1][i] / totals[i]:.1%}",
            f"{change[i]:+,}",
        )
        for i in order
        if change[i]
    ]
    if not rows:
        return page.paragraph("No class has more or fewer right samples.")
    headings = ("class", "samples", "A", "B", "more right in B")
    return page.table(headings, rows, numbers=(1, 2, 3, 4))
