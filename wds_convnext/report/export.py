"""`wds-convnext export`: a run's model as files that others load, compared with it before use."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wds_convnext.config import ExportConfig
from wds_convnext.errors import DataError, UsageError, WdsConvnextError, printable
from wds_convnext.files import sync_folder, temporary_name, unwritable
from wds_convnext.pool import num_cores
from wds_convnext.progress import Progress
from wds_convnext.report.card import model_card
from wds_convnext.report.classifier import Classifier, one_machine
from wds_convnext.report.formats import (
    Run,
    require_onnx,
    write_hub_layout,
    write_onnx,
    write_pt2,
)
from wds_convnext.report.kept import FOLDER, predictions_of
from wds_convnext.shards.classes import with_classes
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.training.augment import Normalizer
from wds_convnext.training.scores import EvalResult
from wds_convnext.training.stored import OWN, StoredModel, open_model

_TOLERANCE = 1e-4  # of logits, and a tenth of it relative to their size
_CHECK_BATCH = 16


@dataclass(frozen=True)
class Check:
    """How an exported file compares with the model that it was made from."""

    what: str
    num_samples: int
    num_equal: int  # samples with the same top-1
    largest_difference: float  # of logits

    def __str__(self) -> str:
        return (
            f"{self.what}: top-1 equal on {self.num_equal:,} of {self.num_samples:,} images, "
            f"logits within {self.largest_difference:.1e}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What was written where, and how it compares."""

    folder: Path
    files: tuple[str, ...]
    checks: tuple[Check, ...]
    result: EvalResult
    split: str

    def __str__(self) -> str:
        low, high = self.result.top1_interval
        lines = [
            f"{self.folder}: {', '.join(self.files)}",
            *map(str, self.checks),
            f"top-1 {self.result.top1:.2%} (95 % interval {low:.2%} to {high:.2%}), "
            f"{self.result.num_samples:,} samples of {self.split}",
            f'next: timm.create_model("local-dir:{self.folder}", pretrained=True)',
            f"      wds-convnext predict {self.folder} IMAGES",
        ]
        return "\n".join(printable(line, limit=2000) for line in lines)


def export(run: str | None, config: ExportConfig | None = None, **options: Any) -> ExportReport:
    """Write a model in the Hub's layout, and if asked for as ONNX and for torch.export.

    Each file is read back and compared with the model on images of a split; the folder is there
    only when all are equal.

    Args:
        run: a run's folder (its best checkpoint) or a checkpoint; None for the newest run.
        config, options: where to, which files, on which shards.
    Raises:
        UsageError: if there are no shards to compare on, or the folder holds something.
        WdsConvnextError: if a file gives other results than the model.
    """
    config = ExportConfig.of(config, options)
    target = Path(config.require_target())
    if config.onnx:
        require_onnx()
    stored = open_model(run)
    if stored.facts is None:
        raise UsageError(f"{stored.path}: is an export already. Export the run that it came from.")
    _check_target(target, overwrite=config.overwrite)
    spec = config.shards or stored.val_shards
    if spec is None:
        raise UsageError(
            f"{stored.path}: names no validation shards. Give --shards to compare the files on."
        )
    dataset = open_dataset(spec, use="validation", jobs=num_cores(), quiet=config.quiet)
    dataset = with_classes(dataset, stored.class_names, of=str(stored.path))
    machine = one_machine(config.device, config.amp)
    kept_in = stored.folder / FOLDER
    result = predictions_of(Classifier(stored, machine), dataset, kept_in, config).result()
    with _folder_in_place(target) as folder:
        runs = _write(stored, folder, config)
        checks = _compare(stored, runs, dataset, config)
        card = model_card(stored, dataset, result, checks=[str(c) for c in checks])
        (folder / "README.md").write_text(card)
        files = tuple(sorted(path.name for path in folder.iterdir()))
    return ExportReport(target, files, checks, result, f"{dataset.name}, {dataset.split}")


def _write(stored: StoredModel, folder: Path, config: ExportConfig) -> dict[str, Run]:
    model = write_hub_layout(stored, folder)
    runs: dict[str, Run] = {"timm": model}
    size = stored.preprocessing.image_size
    try:
        if config.pt2:
            runs["torch.export"] = write_pt2(model, folder, size)
        if config.onnx:
            runs["onnxruntime"] = write_onnx(model, folder, size)
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        which = "--onnx" if "torch.export" in runs or not config.pt2 else "--pt2"
        raise WdsConvnextError(
            f"{which}: {stored.name} cannot be exported ({str(error).splitlines()[0]}). "
            "Leave it out."
        ) from None
    return runs


@torch.no_grad()
def _compare(
    stored: StoredModel, runs: Mapping[str, Run], dataset: Dataset, config: ExportConfig
) -> tuple[Check, ...]:
    """Run the model and what was made of it on the same images, on the CPU in float32."""
    model = stored.build()
    pixels = stored.preprocessing
    normalize = Normalizer(pixels.mean, pixels.std, torch.device("cpu"))
    num_samples = min(config.num_checked, len(dataset))
    numbers = (np.arange(num_samples) * len(dataset) // num_samples).tolist()
    num_equal, largest = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
    images = _images(dataset, numbers, pixels.eval_transform())
    num_done = 0
    with Progress("Comparing", total=num_samples, quiet=config.quiet) as progress:
        while some := list(islice(images, _CHECK_BATCH)):
            batch = normalize(torch.stack(some))
            expected = model(batch)
            for name, run in runs.items():
                found = run(batch)
                difference = (found - expected).abs()
                largest[name] = max(largest[name], float(difference.max()))
                num_equal[name] += int((found.argmax(1) == expected.argmax(1)).sum())
                if not (difference <= _TOLERANCE + _TOLERANCE / 10 * expected.abs()).all():
                    raise WdsConvnextError(
                        f"{name}: its logits differ from those of the model by up to "
                        f"{largest[name]:.1e}, so nothing was exported. Leave that format out."
                    )
            num_done += len(some)
            progress.add(len(some))
    if num_done == 0:
        raise DataError(f"{dataset.shards[0].path}: none of its images decodes. Give --shards.")
    return tuple(Check(name, num_done, num_equal[name], largest[name]) for name in runs)


def _images(
    dataset: Dataset, numbers: list[int], transform: Callable[[bytes], torch.Tensor]
) -> Iterator[torch.Tensor]:
    with closing(SampleReader(dataset)) as reader:
        for number in numbers:
            with suppress(DataError):
                yield transform(reader.read(number)[0])


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an export that may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        is_ours = OWN in (target / "config.json").read_text() and (target / "README.md").is_file()
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise UsageError(f"--to {target}: is there, and no export. Name a new folder.")
    if not overwrite:
        raise UsageError(f"--to {target}: holds an export. Name another, or give --overwrite.")


@contextmanager
def _folder_in_place(target: Path) -> Iterator[Path]:
    """A folder that takes the place of `target` when the context ends; an error removes it."""
    temporary = Path(temporary_name(target.absolute()))
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            before = Path(temporary_name(target.absolute()))
            target.rename(before)
            temporary.rename(target)
            shutil.rmtree(before)
        else:
            temporary.rename(target)
        sync_folder(target.absolute())
    except OSError as error:
        raise UsageError(f"--to {unwritable(target, error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
