"""Where a split's shards stand until all of them are complete, and how they are published.

The folder `OUT/train.partial/` holds the plan (the options and the files to be written), the
shards that are finished or under way, and a record for each finished step. A conversion that
dies is taken up from the records. Shards move to OUT when all are complete, the manifest last.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from wds_convnext.conversion.records import PUBLISHING, finished_path
from wds_convnext.door import count, parse_json, read_bounded, read_json, text
from wds_convnext.errors import ShardError, UsageError, WdsConvnextError
from wds_convnext.files import sync_folder, write_atomically
from wds_convnext.rng import derive_key
from wds_convnext.shards.dataset import Dataset, read_manifest
from wds_convnext.shards.spec import index_path, sources_path, staging_path

_LOCK_WAIT_S = 5.0  # the workers of a killed conversion end within this time
_SUFFIXES = (".part", ".npy", ".done", ".tmp")  # of the files in a staging folder


class Staging:
    """The staging folder of one split, locked for this conversion and its worker processes.

    Args:
        joins: others may be at work there, on the same plan.
    """

    def __init__(self, out: str | os.PathLike, split: str, *, joins: bool = False):
        self.out = Path(out)
        self.split = split
        self.joins = joins
        self.manifest_path = self.out / f"{split}.json"
        self.folder = Path(staging_path(self.manifest_path))
        self.bad_rows_name = f"{split}.bad.jsonl"
        self.index_name = os.path.basename(index_path(self.manifest_path))
        self.sources_name = os.path.basename(sources_path(self.manifest_path))
        self._lock: int | None = None
        self._is_alone = False
        self._plan_id = ""

    def is_complete(self, options: dict, *, overwrite: bool) -> bool:
        """Whether OUT already holds the split, converted with these options.

        Raises:
            UsageError: if it holds the split, whole or begun, with others, and not `overwrite`.
            ShardError: if its manifest is damaged or a shard is missing or of another size.
        """
        if overwrite:
            return False
        begun = self._read_plan().get("options") or options
        if not self.manifest_path.exists() and begun == options:
            return False
        manifest = read_manifest(self.manifest_path) if self.manifest_path.exists() else None
        if manifest is None or manifest.options != options:
            raise UsageError(
                f"{self.out}: holds {self.split} with other options or from other files. "
                "Write to another folder, or replace it with --overwrite."
            )
        for shard in manifest.shards:
            if not _has_size(shard.path, shard.num_bytes):
                raise ShardError(
                    f"{shard.path}: missing or changed since it was written. Copy it again, "
                    "or move away what is there and run again with --overwrite."
                )
        return True

    def begin(
        self,
        options: dict,
        files: list[str],
        *,
        overwrite: bool = False,
        must_be_begun: bool = False,
    ) -> bool:
        """Lock the folder and make it ready for a plan, keeping finished steps of the same plan.

        Args:
            options: what the bytes of the files depend on.
            files: names of the files that will be written to OUT.
            must_be_begun: whether another has to have made it ready for this plan before.
        Returns:
            False if there is nothing to do: another conversion has just finished the same.
        Raises:
            UsageError: if another conversion is at work, or OUT holds files of these names that
                were not written by this tool.
            ShardError: if the plan that an earlier conversion left is damaged.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock()
        started = {}
        try:
            started = self._read_plan()
            # Asked again, now that no other conversion can finish meanwhile.
            if self.is_complete(options, overwrite=overwrite):
                self.remove()
                return False
            replaces = self._own_files(started)
            self._refuse_foreign(files, replaces)
            if started.get("options") != options and must_be_begun:
                raise UsageError(
                    f"{self.out}: nothing of {self.split} is begun with these options and this "
                    "input. Give the options of the parts."
                )
            if started.get("options") != options and not self._is_alone:
                raise UsageError(
                    f"{self.folder}: a conversion with other options is at work. Wait for it."
                )
        except WdsConvnextError:
            self.close() if (self.folder / "plan.json").exists() else self.remove()
            raise
        self._plan_id = f"{derive_key(json.dumps(options, sort_keys=True)):016x}"[:8]
        if started.get("options") != options:
            # First no plan, so that no record is trusted while some of its files are gone.
            self._write_plan(None, replaces)
            self._remove_written()
            self._write_plan(options, replaces)
            (self.folder / PUBLISHING).unlink(missing_ok=True)
        if self._is_alone:
            for path in self.folder.glob("*.tmp"):  # of those that were killed
                path.unlink()
            self._share()
        return True

    def _write_plan(self, options: dict | None, replaces: set[str]) -> None:
        plan = {"options": options, "replaces": sorted(replaces)}
        write_atomically(self.folder / "plan.json", json.dumps(plan, indent=1).encode())

    def lock(self) -> None:
        """Hold the folder: exclusively until it is ready, then together with worker processes.

        If it may join others, it holds the folder together with them from the start.
        """
        deadline = time.monotonic() + _LOCK_WAIT_S
        if self.folder.is_symlink():
            raise UsageError(f"{self.folder}: a link, so not followed. Remove it.")
        while True:
            self.folder.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(self.folder / "lock", flags)
            for kind in [fcntl.LOCK_EX] + [fcntl.LOCK_SH] * self.joins:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
                    self._is_alone = kind == fcntl.LOCK_EX
                    return
            self.close()
            if time.monotonic() > deadline:
                raise UsageError(f"{self.folder}: another conversion is at work. Wait for it.")
            time.sleep(0.1)

    def _share(self) -> None:
        assert self._lock is not None
        fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def worker_lock(self) -> Callable[[], None]:
        """A function that keeps the folder locked for as long as the calling process lives."""
        return partial(_share_lock, str(self.folder / "lock"))

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def staged(self, name: str) -> str:
        """Where a file stands before it moves to OUT.

        The plan is part of the name: a machine that was taken for lost while it worked on an
        earlier plan can still finish a file, or a record of one, and must not pass it for ours.
        """
        return str(self.folder / f"{name}.{self._plan_id}.part")

    def publish(self, manifest: Dataset, files: list[str]) -> None:
        """Move complete files to OUT, in place of an earlier conversion's; the manifest last.

        Raises:
            ShardError: if a file is missing or a shard not of its size.
        """
        marker = self.folder / PUBLISHING
        replaces = set(self._read_plan().get("replaces", ()))
        sizes = {shard.name: shard.num_bytes for shard in manifest.shards}
        for name in files:
            path = finished_path(self.staged(name))
            if not os.path.isfile(path) or os.path.getsize(path) != sizes.get(
                name, os.path.getsize(path)
            ):
                raise ShardError(
                    f"{path}: missing or changed since it was written. "
                    "Run the same command again: it is written again."
                )
        if not marker.exists():
            self._refuse_foreign(files, replaces)
            write_atomically(marker, json.dumps(files).encode())
        self.manifest_path.unlink(missing_ok=True)
        sync_folder(self.manifest_path)
        for name in sorted(replaces - set(files)):
            (self.out / name).unlink(missing_ok=True)
        for name in files:
            if os.path.exists(self.staged(name)):
                os.replace(self.staged(name), self.out / name)
        sync_folder(self.manifest_path)
        manifest.write_manifest(self.manifest_path)
        self.remove()

    def remove(self) -> None:
        """Remove the staging folder, except for files that are not of its making."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        sync_folder(self.folder / "plan.json")
        self._remove_written()
        for name in (PUBLISHING, "lock"):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()
        self.close()

    def _remove_written(self) -> None:
        for path in self.folder.iterdir():
            if path.suffix in _SUFFIXES:
                path.unlink()

    def _own_files(self, started: dict) -> set[str]:
        """The names of files in OUT that an earlier conversion of this split wrote."""
        publishing = self._read(PUBLISHING, [self._own_name])
        own = {*started.get("replaces", ()), *publishing}
        if self.manifest_path.exists():
            manifest = read_manifest(self.manifest_path)
            if "source_digest" in manifest.options:
                for shard in manifest.shards:
                    if _has_size(shard.path, shard.num_bytes) or not os.path.exists(shard.path):
                        own |= {shard.name, shard.name.removesuffix(".tar") + ".idx"}
                own |= {self.manifest_path.name, self.bad_rows_name}
                own |= {self.index_name, self.sources_name}
        return {name for name in own if not self._own_name(name)}

    def _own_name(self, name: object) -> str:
        """Whether a conversion of this split writes files of a name, as a shape of `door`.

        Only these are ever deleted, so that no file that names others leads to another's data.
        """
        pattern = rf"{re.escape(self.split)}(-\d+\.(tar|idx)|\.json|\.index|\.sources|\.bad\.jsonl)"
        is_own = isinstance(name, str) and re.fullmatch(pattern, name, re.ASCII)
        return "" if is_own else f"the name of a file of {self.split}"

    def _read_plan(self) -> dict:
        return self._read("plan.json", {"options?": {}, "replaces": [self._own_name]})

    def _read(self, name: str, shape: Any) -> Any:
        """The content of a file of the staging folder; nothing if there is none."""
        path = self.folder / name
        try:
            return read_json(path, shape)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ShardError(
                f"{path}: not what a conversion leaves ({reason}). "
                f"Delete {self.folder} and run again."
            ) from None

    def _refuse_foreign(self, files: list[str], own: set[str]) -> None:
        for name in (*files, self.manifest_path.name):
            if name not in own and (self.out / name).exists():
                raise UsageError(
                    f"{self.out / name}: not written by this tool, so it is not replaced. "
                    "Write to another folder, or move it away."
                )


def read_bad_rows(path: str | os.PathLike) -> list[dict]:
    """The rows that a conversion could not use, as it listed them: `row`, `reason` and more.

    Raises:
        ShardError: if the file is damaged.
    """
    try:
        lines = read_bounded(path).splitlines()
        return [parse_json(line, {"row": count, "reason": text}) for line in lines]
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(
            f"{path}: not a list of unusable rows ({reason}). Convert again with --overwrite."
        ) from None


def _has_size(path: str, num_bytes: int | None) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == num_bytes


def _share_lock(path: str) -> None:
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
