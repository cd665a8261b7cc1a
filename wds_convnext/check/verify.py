"""Whether shards are what their manifest says, and hold what their input holds.

A tar file carries no checksum over its data, so nothing else would notice a flipped bit. What is
found is listed and does not stop the search; the report is empty only if everything fits.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from wds_convnext.check.against import compare_with_input, open_inputs, splits_without_shards
from wds_convnext.check.problems import Problem
from wds_convnext.check.shard import CheckShard, ShardFindings, check_shard
from wds_convnext.check.splits import (
    ShardSplit,
    find_duplicate_keys,
    find_shard_splits,
)
from wds_convnext.config import VerifyConfig
from wds_convnext.conversion.opening import find_openers
from wds_convnext.conversion.source import SourceSplit
from wds_convnext.engine import open_engine, shared_path
from wds_convnext.errors import UsageError, printable
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.shards.expand import reads_remote
from wds_convnext.shards.scan import MAX_CLASSES
from wds_convnext.shards.spec import Shard, index_path
from wds_convnext.storage.cache import caching
from wds_convnext.urls import redacted

_MAX_SHOWN = 10  # problems of a split, as text


@dataclass(frozen=True)
class SplitVerdict:
    """What was checked of one split and found wrong. `notes` say what could not be checked."""

    split: str
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        found = len(self.problems)
        verdict = f"{found} problem{'s' * (found != 1)}" if found else "no problem found"
        head = (
            f"{self.split}: {self.num_samples:,} samples, "
            f"{self.num_shards} shard{'s' * (self.num_shards != 1)}, "
            f"{self.num_bytes / 1e6:,.1f} MB: {verdict}"
        )
        shown = [*map(str, self.problems[:_MAX_SHOWN])]
        if found > _MAX_SHOWN:
            shown.append(f"and {found - _MAX_SHOWN:,} more problems: --json lists them")
        lines = (head, *(f"  {line}" for line in (*shown, *self.notes)))
        return [printable(line, limit=2000) for line in lines]


@dataclass(frozen=True)
class VerifyReport:
    """What was found in every split."""

    splits: tuple[SplitVerdict, ...]
    seconds: float

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(problem for split in self.splits for problem in split.problems)

    def __str__(self) -> str:
        lines = [line for split in self.splits for line in split.lines()]
        return "\n".join([*lines, f"{self.seconds:.1f} s"])

    def to_json(self) -> dict:
        splits = [
            vars(split) | {"problems": [problem._asdict() for problem in split.problems]}
            for split in self.splits
        ]
        return {"ok": not self.problems, "splits": splits, "seconds": round(self.seconds, 1)}


def verify(
    spec: str,
    config: VerifyConfig | None = None,
    *,
    source: SourceSplit | Iterable[SourceSplit] | None = None,
    executor: Executor | None = None,
    quiet: bool = False,
    **options: Any,
) -> VerifyReport:
    """Compare shards with their manifests, their sidecars and, if given, their input.

    Checked are: every listed shard is there, its size, SHA-256 and number of samples; that its
    sidecar equals a walk of the tar; that keys are unique over the split, and labels are classes.
    Memory: 8 bytes a sample, with `against` 60.

    Args:
        spec: as for training; a folder stands for all splits in it.
        config: what to compare.
        source: a source of one's own, as it was given to `convert`, in place of `against`.
        executor: runs the work in place of processes of this machine.
        options: fields of `VerifyConfig` by name: `deep=True, against="pictures"`.
            By default there is a process per CPU core, so that a script has to call this under
            `if __name__ == "__main__":`, or with `jobs=1`.
    Raises:
        ShardError: if the spec names nothing.
        UsageError: if `against` names no input of these splits.
    """
    started = time.monotonic()
    config = VerifyConfig.of(config, options)
    with caching(config):
        verdicts = _verify(spec, config, source, executor, quiet=quiet)
    return VerifyReport(tuple(verdicts), time.monotonic() - started)


def _verify(
    spec: str,
    config: VerifyConfig,
    source: SourceSplit | Iterable[SourceSplit] | None,
    executor: Executor | None,
    *,
    quiet: bool,
) -> list[SplitVerdict]:
    is_shared = config.engine is not None or executor is not None
    if is_shared and reads_remote(spec):
        raise UsageError(
            f"{redacted(spec)}: an engine's machines have no cache of remote shards. Do it with a "
            "local copy."
        )
    against = config.against and shared_path(config.against, is_shared=is_shared)
    against = "the source" if source is not None else against
    splits = find_shard_splits(shared_path(spec, is_shared=is_shared))
    openers = {}
    if against:
        with Progress("list", unit="files", quiet=quiet) as progress:
            openers = find_openers(against if source is None else source, progress.add).openers
    with (
        open_engine(config.engine, executor) as engine,
        Workers(config.jobs, executor=engine) as workers,
    ):
        inputs = {}
        if against:
            inputs = open_inputs(against, openers, splits, workers=workers, quiet=quiet)
        verdicts = [
            _verify_split(
                split, inputs.get(split.name), deep=config.deep, workers=workers, quiet=quiet
            )
            for split in splits
        ]
    if against and os.path.isdir(spec):
        for name, num_rows in splits_without_shards(openers, inputs, splits).items():
            problem = Problem(
                os.path.join(spec, f"{name}.json"),
                f"missing, and {against} has {num_rows:,} rows of this split",
            )
            verdicts.append(SplitVerdict(name, 0, 0, 0, (problem,), ()))
    return verdicts


def _verify_split(
    split: ShardSplit, source: SourceSplit | None, *, deep: bool, workers: Workers, quiet: bool
) -> SplitVerdict:
    problems, notes = _compare_listing(split)
    tasks = [_task(split, path, deep) for path in _checkable(split)]
    num_images = sum(max(0, task.shard.num_samples) for task in tasks)
    progress = Progress(f"{split.name}: verify", total=num_images, quiet=quiet)
    findings = workers.run(check_shard, tasks, progress=progress)
    problems += [problem for finding in findings for problem in finding.problems]
    problems += _repeated_keys([task.shard.path for task in tasks], findings)
    if source is not None:
        more_problems, more_notes = compare_with_input(split, source, workers=workers, quiet=quiet)
        problems, notes = problems + more_problems, notes + more_notes
    return SplitVerdict(
        split=split.name,
        num_shards=len(tasks),
        num_samples=sum(finding.num_samples for finding in findings),
        num_bytes=sum(finding.num_bytes for finding in findings),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _compare_listing(split: ShardSplit) -> tuple[list[Problem], list[str]]:
    """Problems and notes of a manifest as such: shards that it lists and shards that are there."""
    if split.manifest_error:
        return [Problem.of(split.manifest_path, split.manifest_error)], []
    problems, notes = [], []
    if split.is_interrupted:
        what = "none, and the conversion was interrupted. Run the same conversion again"
        problems.append(Problem(split.manifest_path, what))
    elif split.manifest is None:
        notes.append("no manifest, so sizes and checksums were not compared (wds-convnext index)")
    listed = split.listed
    problems += [
        Problem(path, "missing. Copy it again, or write it again")
        for path in sorted({*listed, *split.paths} - set(split.present))
        if not os.path.isfile(path)
    ]
    if split.manifest:
        if len(listed) < len(split.manifest.shards):
            problems.append(Problem(split.manifest_path, "lists a shard twice. Write it again"))
        problems += [
            Problem(path, f"not listed in {split.manifest_path}. Move it away")
            for path in split.paths
            if path not in listed
        ]
        if not split.is_whole:
            unnamed = len(listed.keys() - set(split.paths))
            notes.append(f"{unnamed} more shards of the manifest were not named, nor checked")
    return problems, notes


def _checkable(split: ShardSplit) -> list[str]:
    return [path for path in split.present if not split.manifest or path in split.listed]


def _task(split: ShardSplit, path: str, deep: bool) -> CheckShard:
    manifest, index = split.manifest, index_path(split.manifest_path)
    if manifest is None:
        return CheckShard(Shard(path, -1), False, MAX_CLASSES, "label", deep, index)
    return CheckShard(
        split.listed[path], True, manifest.num_classes, manifest.label_field, deep, index
    )


def _repeated_keys(paths: list[str], findings: list[ShardFindings]) -> list[Problem]:
    repeated = find_duplicate_keys(paths, [finding.key_hashes for finding in findings])
    return [
        Problem(where[-1], f"key {key} comes {len(where)} times: in {_counts(where)}")
        for key, where in repeated
    ]


def _counts(paths: list[str]) -> str:
    return ", ".join(
        path + (f" ({number} times)" if number > 1 else "")
        for path, number in Counter(paths).items()
    )
