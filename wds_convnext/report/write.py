"""`wds-convnext report`: what a model gets right and wrong, as a page and as pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wds_convnext.config import ReportConfig
from wds_convnext.errors import UsageError, printable
from wds_convnext.files import unwritable, write_atomically
from wds_convnext.pool import num_cores
from wds_convnext.report.classifier import Classifier, one_machine
from wds_convnext.report.comparing import compare_page
from wds_convnext.report.evaluated import Evaluated
from wds_convnext.report.figures import require_matplotlib
from wds_convnext.report.kept import FOLDER, predictions_of
from wds_convnext.report.sections import report_page
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.opening import open_dataset
from wds_convnext.training.scores import EvalResult
from wds_convnext.training.stored import open_model


@dataclass(frozen=True)
class Written:
    """What a report found, and where it stands."""

    path: Path
    files: tuple[str, ...]
    results: tuple[EvalResult, ...]
    summary: str

    def __str__(self) -> str:
        lines = [self.summary, f"{self.path} ({', '.join(self.files)})"]
        return "\n".join(printable(line, limit=2000) for line in lines)


def write_report(
    run: str | None,
    other: str | None = None,
    config: ReportConfig | None = None,
    **options: Any,
) -> Written:
    """Write a report of a model on a split, or of how another differs from it.

    Args:
        run, other: runs, checkpoints or exported folders; None for the newest run, and for none.
        config, options: on which shards, where to.
    Raises:
        UsageError: if matplotlib or the shards are missing, or the folder cannot be written to.
        CheckpointError, ShardError: if model or shards are not whole, or of other classes.
    """
    config = ReportConfig.of(config, options)
    require_matplotlib()
    models = [open_model(named) for named in ([run] if other is None else [run, other])]
    spec = config.shards or models[0].val_shards
    if spec is None:
        raise UsageError(f"{models[0].path}: names no validation shards. Give --shards.")
    if config.out is None and models[0].facts is None:
        raise UsageError(f"{models[0].path}: is an export, which stays as it is. Give --out.")
    folder = Path(config.out) if config.out else models[0].folder / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before anything is computed
    except OSError as error:
        raise UsageError(unwritable(folder, error)) from None
    dataset = open_dataset(spec, use="validation", jobs=num_cores(), quiet=config.quiet)
    machine = one_machine(config.device, config.amp)
    found = []
    for stored in models:
        split = with_classes(dataset, stored.class_names, of=str(stored.path))
        kept_in = folder if stored.facts is None else stored.folder / FOLDER
        predictions = predictions_of(Classifier(stored, machine), split, kept_in, config)
        found.append(Evaluated(stored, split, predictions))
    results = tuple(each.predictions.result() for each in found)
    files: dict[str, bytes] = {}
    if other is None:
        name, summary = "report.html", _summary(results[0])
        content = report_page(found[0], results[0], files)
    else:
        name = "comparison.html"
        content, summary = compare_page(found[0], found[1], results, files)
    _write_all(folder, files | {name: content.encode()})
    return Written(folder / name, tuple(sorted(files)), results, summary)


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file whole; the page, which is the last, when the others are there."""
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise UsageError(unwritable(folder, error)) from None


def _summary(result: EvalResult) -> str:
    low, high = result.top1_interval
    return (
        f"top-1 {result.top1:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"{result.num_samples:,} samples"
    )
