"""`wds-convnext doctor`: what is wrong with data, options and machine before a GPU is paid for.

Every sample is looked at once, at the speed of the disk, in 35 bytes of memory for each (116 where
every image comes twice). Then come the rules: those about data and options, then, after torch is
imported, those about the model and the machine.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

from wds_convnext.check.case import Case, Finding, Rule, Split
from wds_convnext.check.rules import DATA_RULES
from wds_convnext.check.splits import find_shard_splits
from wds_convnext.check.survey import survey_shards
from wds_convnext.config import DoctorConfig
from wds_convnext.errors import UsageError, printable
from wds_convnext.pool import Workers, num_cores
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.naming import is_held_out
from wds_convnext.shards.opening import open_dataset, open_splits
from wds_convnext.shards.spec import total_bytes
from wds_convnext.storage.cache import caching
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training.sampling import build_weighting
from wds_convnext.training.schedule import image_sizes


@dataclass(frozen=True)
class Check:
    """What one rule found; `law` says what holds where it found nothing."""

    rule: str
    law: str
    findings: tuple[Finding, ...]
    note: str | None

    @classmethod
    def of(cls, rule: Rule, case: Case) -> "Check":
        """Apply a rule to a case."""
        found = list(rule(case))
        notes = [finding.found for finding in found if finding.is_note]
        findings = tuple(finding for finding in found if not finding.is_note)
        law = (rule.__doc__ or "").splitlines()[0]
        return cls(rule.__name__, law, findings, notes[0] if notes else None)

    def lines(self) -> list[str]:
        """One line, or three for each finding."""
        if not self.findings:
            return [f"ok  {self.note or self.law}"]
        parts = [part for finding in self.findings for part in _marked(finding)]
        return [printable(part, limit=2000) for part in parts]

    def to_json(self) -> dict[str, Any]:
        findings = [
            {"found": f.found, "why": f.why, "advice": f.advice, "samples": f.samples}
            for f in self.findings
        ]
        return {"rule": self.rule, "law": self.law, "note": self.note, "findings": findings}


def _marked(finding: Finding) -> list[str]:
    return [f"!!  {finding.found}", f"    {finding.why}", f"    {finding.advice}"]


@dataclass(frozen=True)
class DoctorReport:
    """What every rule found, as text and as JSON."""

    case: Case
    checks: tuple[Check, ...]
    seconds: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(finding for check in self.checks for finding in check.findings)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text."""
        config, order, train = self.case.config, self.case.order, self.case.train.dataset
        counts = ", ".join(f"{len(s.dataset):,} {s.name}" for s in self.case.splits)
        num_bytes = sum(total_bytes(split.dataset.shards) for split in self.case.splits)
        num_found = len(self.findings)
        return [
            printable(
                f"{train.name}: {counts}; {train.num_classes} classes, {num_bytes / 1e6:,.1f} MB"
            ),
            f"{config.model} at {config.image_size} px, {config.epochs} epochs of "
            f"{order.num_samples / order.global_batch_size:.1f} steps",
            "",
            *(line for check in self.checks for line in check.lines()),
            "",
            f"{num_found or 'no'} finding{'s' * (num_found != 1)} of {len(self.checks)} rules, "
            f"{self.seconds:.1f} s",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.findings,
            "splits": [
                {"split": split.name, "num_samples": len(split.dataset)}
                for split in self.case.splits
            ],
            "checks": [check.to_json() for check in self.checks],
            "seconds": round(self.seconds, 1),
        }


def doctor(
    spec: str | None = None,
    config: DoctorConfig | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> DoctorReport:
    """Look at a training before it is started: its data, its options, this machine.

    Args:
        spec: the training shards; may be given as `shards`, too.
        config: the training, and how to look at it.
        options: fields of `DoctorConfig` by name, which are those of `TrainConfig` and a few more:
            `epochs=100, model="convnext_tiny", step=True`.
            By default there is a process per CPU core, so that a script has to call this under
            `if __name__ == "__main__":`, or with `jobs=1, workers=0`.
    Raises:
        ShardError: if the spec names nothing, or a shard is missing or damaged.
        DataError: if a label is no class number.
        UsageError: if options do not fit each other, the model or the machine.
    """
    started = time.monotonic()
    config = DoctorConfig.of(config, options)
    if spec is not None:
        if config.shards is not None:
            raise UsageError(f"{spec} and --shards {config.shards} exclude each other. Give one.")
        config = replace(config, shards=spec)
    config.require_shards()
    if config.pretrained is not None:
        from wds_convnext.training.pretrained import with_pretrained  # and torch with it

        config = with_pretrained(config)
    with caching(config):
        case, checks = _check(config, quiet=quiet)
    return DoctorReport(case, tuple(checks), time.monotonic() - started)


def _check(config: DoctorConfig, *, quiet: bool) -> tuple[Case, list[Check]]:
    case = _examine(config, quiet=quiet)
    checks = [Check.of(rule, case) for rule in DATA_RULES]
    from wds_convnext.check.machine import MACHINE_RULES  # and torch with it, which takes seconds

    checks += [Check.of(rule, case) for rule in MACHINE_RULES]
    return case, checks


def _examine(config: DoctorConfig, *, quiet: bool) -> Case:
    """Open the splits of a training, and look at every sample."""
    jobs = config.jobs or num_cores()
    shards = config.require_shards()
    train_data, val_data, _ = open_splits(shards, config.val_shards, jobs=jobs, quiet=quiet)
    datasets = [train_data] + ([val_data] if val_data else [])
    datasets += _other_splits(datasets)
    order = TrainOrder(
        train_data.sizes,
        seed=config.seed,
        global_batch_size=config.batch_size * config.accumulate * config.ranks,
        shuffle_buffer=config.shuffle_buffer,
        weighting=build_weighting(config, train_data),
        repeats=config.repeated_augmentation,
    )
    image_sizes(config, order)  # refused as by train, before every sample is read
    with Workers(jobs) as workers:
        splits = [
            Split(
                dataset,
                survey_shards(
                    dataset.shards,
                    dataset.label_field,
                    title=f"doctor: {dataset.split}",
                    workers=workers,
                    quiet=quiet,
                ),
            )
            for dataset in datasets
        ]
    return Case(config, order, tuple(splits), quiet)


def _other_splits(datasets: list[Dataset]) -> list[Dataset]:
    """The other held-out splits of the same classes that stand next to the training shards."""
    train_data = datasets[0]
    known = {os.path.realpath(shard.path) for dataset in datasets for shard in dataset.shards}
    found = []
    for split in find_shard_splits(os.path.dirname(train_data.shards[0].path) or "."):
        is_known = not known.isdisjoint(map(os.path.realpath, split.paths))
        if is_known or not is_held_out(split.name) or split.manifest_error or split.is_interrupted:
            continue
        other = open_dataset(split.manifest_path if split.manifest else ",".join(split.paths))
        if other.is_counted and train_data.is_counted:
            if other.num_classes <= train_data.num_classes:
                found.append(replace(other, class_names=train_data.class_names))
        elif other.class_names == train_data.class_names:
            found.append(other)
    return found
