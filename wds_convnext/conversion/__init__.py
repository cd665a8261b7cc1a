"""Any source of images to tar shards: all splits, checked before the first byte is written."""

import os
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from wds_convnext.config import ShardsConfig
from wds_convnext.conversion.conversion import Conversion
from wds_convnext.conversion.fraction import Fractions, choose_base, divide, with_counts
from wds_convnext.conversion.opening import find_class_names, find_openers, open_splits
from wds_convnext.conversion.parts import PartReport
from wds_convnext.conversion.report import SplitReport
from wds_convnext.conversion.source import Count, Opener, SourceSplit
from wds_convnext.engine import open_engine, shared_path
from wds_convnext.errors import UsageError, WdsConvnextError
from wds_convnext.files import free_bytes
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.naming import is_held_out


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote and found; as text, a paragraph for each split.

    `left_out` says by name why other splits of the source were not converted.
    """

    out: str
    splits: tuple[SplitReport | PartReport, ...]
    left_out: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        lines = [line for split in self.splits for line in split.lines()]
        lines += [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
        lines.append(f"{self.seconds:.1f} s")
        whole = [split for split in self.splits if isinstance(split, SplitReport)]
        if len(whole) < len(self.splits):
            lines.append("next, when all parts are done: --finish in place of --part")
            return "\n".join(lines)
        lines.append(f"next: wds-convnext verify {quote(self.out)}")
        trainable = [split for split in whole if not is_held_out(split.split)]
        if trainable:
            first = max(trainable, key=lambda split: split.num_bytes)
            manifest = quote(f"{Path(self.out, first.split)}.json")
            lines.append(f"      wds-convnext train --shards {manifest}")
        return "\n".join(lines)


def convert(
    source: str | os.PathLike | SourceSplit | Iterable[SourceSplit],
    config: ShardsConfig | None = None,
    *,
    executor: Executor | None = None,
    quiet: bool = False,
    **options: Any,
) -> ConversionReport:
    """Convert images and labels to tar shards, a manifest and sidecars.

    Args:
        source: what SRC is on the command line (`wds-convnext shards --help`); or a source of
            one's own, a split or several, see `source.SourceSplit`.
        config: what to write where, and how.
        executor: runs the work in place of processes of this machine, on machines that see the
            same folders. Nothing but values and names of functions is sent.
        options: fields of `ShardsConfig` by name: `out="data", num_shards=4`.
            By default there is a process per CPU core, so that a script has to call this under
            `if __name__ == "__main__":`, or with `jobs=1`.
    Raises:
        UsageError: if the options do not fit each other, the input or what OUT holds.
        DataError: if the input is damaged, or has unusable rows and `on_bad` is "error".
    """
    started = time.monotonic()
    config = ShardsConfig.of(config, options)
    out = config.out
    try:
        with open_engine(config.engine, executor) as engine:
            if engine is not None:
                config = replace(config, out=os.path.abspath(out))
                if isinstance(source, str | os.PathLike):
                    source = shared_path(os.fspath(source), is_shared=True)
            reports, left_out = _convert(source, config, engine, quiet)
    except OSError as error:
        where = error.filename or out
        raise WdsConvnextError(
            f"{where}: {error.strerror or error}. Nothing in {out} reads as complete that is not; "
            "fix it and run the same command again: it goes on where it stopped."
        ) from None
    return ConversionReport(out, tuple(reports), left_out, time.monotonic() - started)


def _convert(
    source: Any, config: ShardsConfig, engine: Executor | None, quiet: bool
) -> tuple[list[SplitReport | PartReport], dict[str, str]]:
    """The reports on all splits, and why others are left out."""
    splits, left_out, class_names = _opened(source, config, quiet)
    _refuse_own_input(config.out, splits)
    if config.val_fraction or config.test_fraction:
        with Workers(config.jobs, executor=engine) as workers:
            splits, left_out = _divided(splits, left_out, class_names, config, workers, quiet)
    conversions = [
        Conversion(split, class_names, config, executor=engine, quiet=quiet) for split in splits
    ]
    todo = [
        c for c in conversions if not c.staging.is_complete(c.identity, overwrite=config.overwrite)
    ]
    _check_space(config.out, sum(conversion.num_bytes for conversion in todo))
    return [c.run() if c in todo else c.report_complete() for c in conversions], left_out


Opened = tuple[list[SourceSplit], dict[str, str], tuple[str, ...]]


def _opened(source: Any, config: ShardsConfig, quiet: bool) -> Opened:
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    with Progress("list", unit="files", quiet=quiet) as progress:
        found = find_openers(source, progress.add)
    is_named = config.label_column is not None or not isinstance(source, str)
    with Workers(config.jobs if found.may_die else 1) as workers:
        progress = Progress("open", quiet=True)
        (opened,) = workers.run(_open, [(found.openers, config, is_named)], progress=progress)
    return opened


def _open(task: tuple[dict[str, Opener], ShardsConfig, bool], count: Count) -> Opened:
    """The splits of a source, those left out, and the class names."""
    openers, config, is_named = task
    splits, left_out = open_splits(openers, image=config.image_column, label=config.label_column)
    names = find_class_names(splits, is_label_named=is_named)
    return splits, left_out, names


def _divided(
    splits: list[SourceSplit],
    left_out: dict[str, str],
    class_names: tuple[str, ...],
    config: ShardsConfig,
    workers: Workers,
    quiet: bool,
) -> tuple[list[SourceSplit], dict[str, str]]:
    """The splits, with validation and test taken from the training split, and those left out."""
    fractions = Fractions(config.val_fraction or 0.0, config.test_fraction or 0.0)
    base = choose_base(splits, fractions)
    parts = divide(base, fractions, workers=workers, quiet=quiet)
    counted: list[SourceSplit] = [with_counts(part, class_names) for part in parts.values()]
    asked = {base.name: 1.0, **vars(fractions)}
    none = f"none of the {base.num_rows:,} rows of {base.name} is in this fraction"
    empty = {name: none for name, share in asked.items() if share and name not in parts}
    return counted + [split for split in splits if split is not base], left_out | empty


def _refuse_own_input(out: str, splits: list[SourceSplit]) -> None:
    for path in (path for split in splits for path in split.files if path.endswith(".tar")):
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(out):
            raise UsageError(f"--out {out}: holds {path}, which is read. Write to another folder.")


def _check_space(out: str, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        raise UsageError(
            f"{out}: {free / 1e9:.1f} GB are free, and the shards and what is needed to shuffle "
            f"them take {needed / 1e9:.1f} GB. Free some space, write elsewhere, "
            "or do without the shuffle (--no-shuffle), which halves it."
        )
