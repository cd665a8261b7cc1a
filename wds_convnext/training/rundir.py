"""The folder of a run: its files, checkpoints and status.

`runs/<name>/` holds config.toml, metrics.jsonl, bad_samples.jsonl, TensorBoard events, last.pt,
best.pt, the newest step-*.pt, and status.json, which says why the run is not running.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError, UsageError, sentence
from wds_convnext.files import (
    replacing,
    sync_folder,
    temporary_name,
    unwritable,
    write_atomically,
)
from wds_convnext.options import format_toml, read_run_toml
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.distributed import World, decided_by_main
from wds_convnext.training.runs import files_of_a_run, half_written
from wds_convnext.training.saving import Writer, copy_to_host

if TYPE_CHECKING:
    from wds_convnext.training.run import Run


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Only the main rank writes to it."""

    path: Path
    world: World
    keep: int = 2  # checkpoints by step's number that stay
    resumed: Path | None = None  # the checkpoint that the run goes on from
    writer: Writer = field(default_factory=Writer)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint that the run goes on from; None for a run that starts.

        Raises:
            CheckpointError: if it is damaged, or not there for this rank.
        """
        if self.resumed is None:
            return None
        if not self.resumed.exists():
            raise CheckpointError(
                f"rank {self.world.rank}: {self.resumed} is not there, though rank 0 resumes from "
                "it. All machines must share the folder of the run."
            )
        return load_checkpoint(self.resumed)

    def stated_batch(self) -> int | None:
        """The batch per process in the config.toml of the run that goes on; None without one."""
        path = self.resumed and self.resumed.parent / "config.toml"
        if path is None or not path.is_file():
            return None
        return read_run_toml(path, TrainConfig, warn=lambda text: None).get("batch_size")

    def prepare(self, run: "Run") -> list[str]:
        """Make the folder ready: clear what a former run left there, write config.toml.

        What is later than the run's step is moved into a folder of its own. Gives sentences.
        """
        notes, has_best = decided_by_main(partial(self._prepare, run), self.world)
        if not has_best:
            run.state.best_top1 = -1.0  # of weights that are not here: the next are the best
        return notes

    def _prepare(self, run: "Run") -> tuple[list[str], bool]:
        is_fresh = self.resumed is None
        try:
            for path in files_of_a_run(self.path) if is_fresh else half_written(self.path):
                path.unlink()
            notes = [] if is_fresh else self._go_back_to(run.state.step)
            write_atomically(self.path / "config.toml", format_toml(run.config).encode())
        except OSError as error:
            raise unusable(self.path, error) from None
        return notes, (self.path / "best.pt").exists()

    def _go_back_to(self, step: int) -> list[str]:
        last, best = self.path / "last.pt", self.path / "best.pt"
        others = [*step_checkpoints(self.path), last]
        later = [p for p in others if p != self.resumed and p.exists() and _step_of(p) > step]
        if later and best.exists() and _step_of(best) > step:
            later.append(best)
        notes = []
        if later:
            aside = make_new(self.path / f"after-step-{step}")
            for path in later:
                path.rename(aside / path.name)
            for path in self.path.glob("*.jsonl"):  # which are cut back
                shutil.copy2(path, aside)
            names = ", ".join(path.name for path in later)
            notes.append(f"Went back to step {step}: {names} are now in {aside}.")
        # A kill before the next checkpoint must not lose where this start began.
        if self.resumed and not last.exists():
            link_checkpoint(self.resumed, last)
        return notes

    def save(self, run: "Run", *, by_step: bool = True, is_best: bool = False) -> None:
        """Begin to write a checkpoint as last.pt, and under the names of its step and of the best.

        What the run changes from here on is not in it.

        Raises:
            CheckpointError: if the one before, for which this waits, could not be written.
        """
        if not self.world.is_main:
            return
        self.writer.wait()  # before the copy: memory holds one of them at most
        # last.pt comes last: a kill in between must not leave it with the accuracy of a best.pt
        # that is not there. A resume from the one before makes the same best.pt again.
        names = [f"step-{run.state.step:09d}.pt"] * by_step + ["best.pt"] * is_best + ["last.pt"]
        content = copy_to_host({**run.state.state_dict(), "facts": run.facts.to_dict()})
        self.writer.start(partial(self._write, names, content))

    def _write(self, names: list[str], content: dict[str, Any]) -> None:
        first, *others = (self.path / name for name in names)
        save_checkpoint(first, content)
        try:
            for path in others:
                link_checkpoint(first, path)
            prune_steps(self.path, keep=self.keep)
        except OSError as error:
            raise CheckpointError(unwritable(error.filename, error)) from None

    def wait(self) -> None:
        """Wait, on all ranks, for the checkpoint that is being written.

        Raises:
            CheckpointError: on all ranks, if it could not be.
        """
        decided_by_main(self.writer.wait, self.world)

    @contextlib.contextmanager
    def status(self, run: "Run") -> Iterator["Status"]:
        """Within this context the run is running; status.json says so, and then how it ended."""
        status = Status()
        self._write_status(status="running", step=run.state.step)
        try:
            with self.writer:  # what it writes is whole before the status says how the run ended
                yield status
        except BaseException as error:
            reason = str(error) or type(error).__name__
            with contextlib.suppress(CheckpointError):  # where the disk is full, or the folder gone
                self._write_status(status="failed", step=run.state.step, reason=reason)
            raise
        ended = "finished" if status.reason == "finished" else "stopped"
        self._write_status(status=ended, step=run.state.step, reason=status.reason)

    def _write_status(self, **content: str | int | None) -> None:
        if self.world.is_main:
            path = self.path / "status.json"
            try:
                write_atomically(path, json.dumps(content).encode() + b"\n")
            except OSError as error:
                raise CheckpointError(unwritable(path, error)) from None


@dataclass
class Status:
    """Why a run ended: "finished", the name of a signal, or None while nothing is known."""

    reason: str | None = None


def make_new(folder: Path) -> Path:
    """Make a folder of this name that was not there, or of this name with -1, -2 …"""
    folder.parent.mkdir(parents=True, exist_ok=True)
    named, number = folder, 0
    while True:
        try:
            named.mkdir()
            return named
        except FileExistsError:
            number += 1
            named = folder.with_name(f"{folder.name}-{number}")


def unusable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {folder}: {error.strerror}. Choose another folder.")


def link_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a checkpoint a second name, atomically; it costs no space where links are known."""
    temporary = temporary_name(target)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        with open(source, "rb") as original, replacing(target) as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
        return
    os.replace(temporary, target)
    # If both were names of one file already, a rename does nothing.
    Path(temporary).unlink(missing_ok=True)
    sync_folder(target)


def prune_steps(folder: str | os.PathLike, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints named by step (`step-000001000.pt`)."""
    for path in step_checkpoints(folder)[keep:]:
        path.unlink()


def step_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run named by step, newest first."""
    names = [p for p in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name)]
    return sorted(names, reverse=True)


def _step_of(path: Path) -> float:
    """The step of a checkpoint; infinity for a damaged one, which nothing goes on from."""
    if path.name.startswith("step-"):
        return int(path.stem.removeprefix("step-"))
    try:
        return load_checkpoint(path)["step"]
    except CheckpointError:
        return math.inf


def load_newest(
    folder: str | os.PathLike, *, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run that is whole; damaged ones are passed over, with a warning.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(folder)
    for path in (folder / "last.pt", *step_checkpoints(folder), folder / "best.pt"):
        if path.exists():
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                warn(f"{sentence(error)} Trying the one before it.")
    raise CheckpointError(
        f"{folder}: holds no whole checkpoint to resume from. "
        "Start from scratch with --overwrite, or in another folder with --out."
    )
