"""The conversion of one split: which rows go to which shard, and the passes that bring them there.

In stored order a shard is a range of rows, copied in one pass. Shuffled, the labels are counted,
the rows are scattered into spill files, and each shard collects its own. Every step is a pure
function of the input and the options and leaves a record, so the bytes do not depend on the
number of processes or on interruptions. See `staging` for what is on the disk meanwhile.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from wds_convnext.config import ShardsConfig
from wds_convnext.conversion.layout import TAR_BYTES, shard_edges, unit_edges
from wds_convnext.conversion.parts import Part, PartReport, await_records, finished_records
from wds_convnext.conversion.passes import (
    NO_LABEL,
    CollectShard,
    CopyRows,
    CountLabels,
    Rows,
    SpillRows,
    Task,
    run_task,
)
from wds_convnext.conversion.report import SplitReport, kind_of
from wds_convnext.conversion.scatter import Scatter
from wds_convnext.conversion.shrink import Shrink, Shrunk
from wds_convnext.conversion.source import SourceSplit
from wds_convnext.conversion.staging import Staging, read_bad_rows
from wds_convnext.errors import DataError, sentence
from wds_convnext.files import write_atomically
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress
from wds_convnext.rng import derive_key
from wds_convnext.shards.dataset import Dataset, read_manifest
from wds_convnext.shards.image import ImageSurvey
from wds_convnext.shards.index import RECORD, index_content, mark_decoded
from wds_convnext.shards.naming import is_held_out
from wds_convnext.shards.spec import Shard

FORMAT_VERSION = 1  # of the bytes written: the same input, options and version give the same


class Conversion:
    """The conversion of one split: `run` it, or `report_complete` if an earlier run has."""

    def __init__(
        self,
        split: SourceSplit,
        class_names: tuple[str, ...],
        config: ShardsConfig,
        *,
        executor: Executor | None = None,
        quiet: bool,
    ):
        self.split = split
        self.class_names = class_names
        self.config = replace(config, shuffle=config.shuffle and not is_held_out(split.name))
        self.executor = executor
        self.quiet = quiet
        self.part = Part.parse(config.part) if config.part else None
        self.edges = shard_edges(split, config)
        self.staging = Staging(config.out, split.name, joins=bool(self.part or config.finish))
        self.survey = ImageSurvey()
        self.bad: list[tuple[int, str]] = []
        self.shrunk = Shrunk()
        self.shrink = Shrink.of(config)

    @property
    def names(self) -> list[str]:
        """The shards' names, without an extension."""
        num_shards = len(self.edges) - 1
        width = max(3, len(str(num_shards - 1)))
        return [f"{self.split.name}-{i:0{width}d}" for i in range(num_shards)]

    def run(self) -> SplitReport | PartReport:
        """Write the shards, or this part's, beginning where an earlier run has stopped."""
        files = [name + extension for name in self.names for extension in (".tar", ".idx")]
        files.append(self.staging.index_name)
        if self.shrink:
            files.append(self.staging.sources_name)
        config = self.config
        if not self.staging.begin(
            self.identity, files, overwrite=config.overwrite, must_be_begun=config.finish
        ):
            return self.report_complete()
        lock = self.staging.worker_lock()
        try:
            with Workers(config.jobs, on_start=lock, executor=self.executor) as self.workers:
                records = self._shuffled() if config.shuffle else self._in_order()
            if records is None:
                return PartReport(self.split.name, str(config.part))
            shards = tuple(
                Shard(f"{name}.tar", record["num_samples"], record["num_bytes"], record["sha256"])
                for name, record in zip(self.names, records)
            )
            self._publish(shards, files)
        finally:
            self.staging.close()
        skipped = Counter(kind_of(reason) for _, reason in self.bad)
        return SplitReport(
            self.split.name,
            shards,
            self.class_names,
            self.split.columns,
            self.survey,
            skipped,
            self.split.notes,
            self.shrunk,
        )

    def report_complete(self) -> SplitReport:
        """The report on a split that an earlier run has written."""
        if self.staging.folder.exists():
            self.staging.lock()
            self.staging.remove()
        manifest = read_manifest(self.staging.manifest_path)
        listed = read_bad_rows(self.staging.out / self.staging.bad_rows_name)
        skipped = Counter(kind_of(entry["reason"]) for entry in listed)
        return SplitReport(
            self.split.name,
            manifest.shards,
            manifest.class_names,
            self.split.columns,
            skipped=skipped,
            notes=self.split.notes,
            already_complete=True,
        )

    @property
    def num_bytes(self) -> int:
        """Disk space that is needed at the peak, about."""
        num_bytes = self.split.num_bytes
        if self.shrink:
            num_bytes = min(num_bytes, self.split.num_rows * self.shrink.most_bytes)
        num_bytes += TAR_BYTES * self.split.num_rows
        written = sum(path.lstat().st_size for path in self.staging.folder.glob("*"))
        return max(0, (2 if self.config.shuffle else 1) * num_bytes - written)

    @cached_property
    def identity(self) -> dict:
        """What the bytes of the shards depend on; stands in the manifest as its options."""
        return {
            "source_digest": self.split.digest,
            "class_digest": f"{derive_key(*self.class_names):016x}",
            "format_version": FORMAT_VERSION,
            "columns": list(self.split.columns),
            "num_shards": len(self.edges) - 1,
            "edges": None if self.config.shuffle else self.edges,
            "shuffle": self.config.shuffle,
            "seed": self.config.seed if self.config.shuffle else None,
            "check": self.config.check,
        } | self._identity_if_set

    @property
    def _identity_if_set(self) -> dict:
        """Keys of options that came later: a folder of before has none, and stays complete."""
        keys = {}
        if self.shrink:
            keys["shrink"] = self.shrink.identity
        if self.split.selection:
            keys["selection"] = self.split.selection
        return keys

    def _in_order(self) -> list[dict] | None:
        tasks = [
            CopyRows(self._rows(start, stop), *self._shard_paths(name))
            for name, start, stop in zip(self.names, self.edges, self.edges[1:])
        ]
        records = self._run_last("copy", tasks)
        if records is None:
            return None
        self._keep_findings(records)
        self._settle_bad()
        return records

    def _shuffled(self) -> list[dict] | None:
        edges = unit_edges(self.split)
        for attempt in range(2):
            excluded = frozenset(row for row, _ in self.bad)
            units = [self._rows(*edge, excluded) for edge in zip(edges, edges[1:])]
            # "v2": an older version's have no sources, and are not taken up.
            paths = [self.staging.staged(f"{attempt}-{i:03d}.v2.spill") for i in range(len(units))]
            counts = self._count_labels(units, paths)
            scatter = Scatter(
                counts.sum(axis=0), len(self.names), self.config.seed, self.split.name
            )
            before = np.cumsum(counts, axis=0) - counts
            tasks = [
                SpillRows(rows, path, scatter, counts_before)
                for rows, path, counts_before in zip(units, paths, before)
            ]
            spilled = self._run("scatter", tasks)
            self._keep_findings(spilled)
            self._settle_bad()
            if all(row in excluded or reason == NO_LABEL for row, reason in self.bad):
                break
            # A bad image leaves a hole in its shard: scatter once more, now without it.
            for path in paths:
                Path(path).unlink(missing_ok=True)
        collecting = [
            CollectShard(tuple(paths), shard, *self._shard_paths(name))
            for shard, name in enumerate(self.names)
        ]
        return self._run_last("collect", collecting)

    def _count_labels(self, units: list[Rows], paths: list[str]) -> np.ndarray:
        tasks = [CountLabels(rows, f"{path}.labels") for rows, path in zip(units, paths)]
        records = self._run("labels", tasks)
        return np.array([record["class_counts"] for record in records], dtype=np.int64)

    def _rows(self, start: int, stop: int, excluded: frozenset = frozenset()) -> Rows:
        return Rows(
            self.split.part(start, stop),
            self.class_names,
            start,
            stop,
            decode=self.config.check == "decode",
            excluded=excluded,
            shrink=self.shrink,
        )

    def _shard_paths(self, name: str) -> tuple[str, str, str]:
        staged = self.staging.staged
        return staged(f"{name}.tar"), staged(f"{name}.idx"), staged(f"{name}.records")

    def _run(self, title: str, tasks: Sequence[Task]) -> list[dict]:
        """The records of all tasks of a pass."""
        title = f"{self.split.name}: {title}"
        if self.config.finish:
            return finished_records(tasks, title=title)
        do = partial(self._do, title, num_steps=len(tasks))
        if self.part is None:
            return do(tasks)
        do(self.part.share(tasks))
        progress = Progress(f"{title}, all parts", total=len(tasks), unit="steps", quiet=self.quiet)
        with progress:
            at_once = self.workers.jobs
            return await_records(self.part, tasks, do, at_once=at_once, progress=progress)

    def _run_last(self, title: str, tasks: Sequence[Task]) -> list[dict] | None:
        """As `_run`; None for a part, since after the last pass nothing needs the others'."""
        if self.part is None:
            return self._run(title, tasks)
        self._do(f"{self.split.name}: {title}", self.part.share(tasks), num_steps=len(tasks))
        return None

    def _do(self, title: str, tasks: Sequence[Task], *, num_steps: int) -> list[dict]:
        num_rows = self.split.num_rows * len(tasks) // num_steps
        progress = Progress(title, total=num_rows, quiet=self.quiet)
        return self.workers.run(run_task, tasks, progress=progress)

    def _keep_findings(self, records: list[dict]) -> None:
        self.survey, self.shrunk = ImageSurvey(), Shrunk()
        for record in records:
            self.survey.merge(record["survey"])
            self.shrunk = self.shrunk.plus(record.get("shrunk", Shrunk()))
            self.bad += [tuple(entry) for entry in record["bad"]]

    def _settle_bad(self) -> None:
        """List the unusable rows, if any, and stop if they are not to be skipped."""
        if not self.bad:
            return
        self.bad.sort()
        lines = []
        for row, reason in self.bad:
            file, row_in_file = self.split.locate(row)
            place = {"row": self.split.key(row), "file": file}
            if row_in_file is not None:
                place["row_in_file"] = row_in_file
            lines.append(json.dumps(place | {"reason": reason}) + "\n")
        listing = self.staging.staged(self.staging.bad_rows_name)
        write_atomically(listing, "".join(lines).encode())
        if self.config.on_bad != "skip" or len(self.bad) == self.split.num_rows:
            row, reason = self.bad[0]
            raise DataError(
                f"{self.split.name}: {len(self.bad):,} of {self.split.num_rows:,} rows are "
                f"unusable, the first is {self.split.place(row)}: "
                f"{sentence(reason)} All are listed in {listing}. "
                "Fix them, or leave them out with --on-bad skip."
            )

    def _publish(self, shards: tuple[Shard, ...], files: list[str]) -> None:
        write_atomically(self.staging.staged(self.staging.index_name), self._index(shards))
        if self.shrink:
            sources = (sources for _, sources in self._records(shards))
            write_atomically(self.staging.staged(self.staging.sources_name), sources)
        manifest = Dataset(
            name=self.split.dataset,
            split=self.split.name,
            shards=shards,
            class_names=self.class_names,
            source=tuple(Path(file).name for file in self.split.files),
            options=self.identity,
        )
        extra = [self.staging.bad_rows_name] if self.bad else []
        self.staging.publish(manifest, files + extra)

    def _index(self, shards: tuple[Shard, ...]) -> Iterator[bytes]:
        """The content of the split's index file."""
        records = (records for records, _ in self._records(shards))
        if self.config.check == "decode":  # so a row that does not decode is no sample
            records = (mark_decoded(packed) for packed in records)
        return index_content(records, [shard.name for shard in shards], shards, checksums=True)

    def _records(self, shards: tuple[Shard, ...]) -> Iterator[tuple[bytes, bytes]]:
        """What each shard left: the records of its samples, and the digests of their sources."""
        for name, shard in zip(self.names, shards):
            left = Path(self.staging.staged(f"{name}.records")).read_bytes()
            end = shard.num_samples * RECORD.itemsize
            yield left[:end], left[end:]
