"""A model with its predictions, and the parts that a page shows of one or of two."""

from collections.abc import Sequence
from dataclasses import dataclass

from wds_convnext.report import page
from wds_convnext.report.kept import Predictions
from wds_convnext.report.pictures import SMALL, Pictures
from wds_convnext.shards.dataset import Dataset
from wds_convnext.training.stored import StoredModel


@dataclass(frozen=True)
class Evaluated:
    """A model with its predictions for a split."""

    stored: StoredModel
    dataset: Dataset
    predictions: Predictions

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.stored.class_names

    @property
    def pictures(self) -> Pictures:
        return Pictures(self.dataset, self.stored.preprocessing.eval_transform())

    @property
    def is_small(self) -> bool:
        """Whether the page shows its images pixel by pixel."""
        return self.stored.preprocessing.image_size <= SMALL


def left_out(found: Evaluated) -> str:
    """What is said of samples that do not decode."""
    num_bad = int((~found.predictions.is_read).sum())
    return f"{num_bad:,} do not decode, left out" if num_bad else "all of the split"


def shown_pictures(
    found: Evaluated, numbers: Sequence[int], notes: Sequence[str]
) -> list[page.Picture]:
    """Samples with label, prediction and a note."""
    predictions, names = found.predictions, found.class_names
    return [
        page.Picture(
            url,
            names[predictions.labels[number]],
            names[predictions.guesses[number]],
            note,
            f"sample {number}: {found.pictures.name(number)}",
        )
        for url, number, note in zip(found.pictures.urls(numbers), numbers, notes)
    ]


def facts_table(all_found: Sequence[Evaluated]) -> str:
    """What was computed on what, a column for each model."""
    columns = []
    for found in all_found:
        stored, pixels = found.stored, found.stored.preprocessing
        numbers = sum(t.numel() for t in stored.state.values() if t.is_floating_point())
        facts = stored.facts
        columns.append(
            {
                "model": stored.name,
                "parameters and buffers": f"{numbers:,}",
                "weights": "moving average" if stored.weights == "ema" else "as trained",
                "file": stored.path,
                "digest of weights and pixels": stored.digest(),
                "step": f"{stored.step:,}",
                "trained on": stored.dataset,
                "image size": f"{pixels.image_size} px, {pixels.crop_mode} {pixels.crop_ratio:g}, "
                f"{pixels.interpolation}",
                "mean, std": f"{_numbers(pixels.mean)}; {_numbers(pixels.std)}",
                "evaluated on": f"{found.dataset.name}, {found.dataset.split}",
                "digest of the split": found.dataset.digest,
                "precision": found.predictions.about["precision"],
                **{f"trained with {k}": v for k, v in (facts.environment if facts else {}).items()},
            }
        )
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    headings = ("", *(f"model {letter}" for letter in "AB"[: len(columns)]))
    return page.table(headings if len(columns) > 1 else ("", "value"), rows)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
