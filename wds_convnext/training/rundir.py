"""The folder of a run: choosing it, resuming from it, its checkpoints, its status.

`runs/<name>/` holds config.toml, metrics.jsonl, bad_samples.jsonl, TensorBoard events, last.pt,
best.pt, the newest step-*.pt, and status.json, which says why the run is not running.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from wds_convnext.options import format_toml
from wds_convnext.training.checkpoint import Facts, load_checkpoint, save_checkpoint
from wds_convnext.training.distributed import World, broadcast_object

if TYPE_CHECKING:
    from wds_convnext.training.run import Run

RUNS = Path("runs")
_WRITTEN_BY_A_RUN = (
    "config.toml",
    "metrics.jsonl",
    "bad_samples.jsonl",
    "status.json",
    "trace.json",
    "last.pt",
    "best.pt",
    "step-*.pt",
    "events.out.tfevents.*",
)
# Options that may differ on a resume without changing what is computed.
_FREE_OPTIONS = (
    "shards",
    "val_shards",
    "workers",
    "batch_size",
    "device",
    "amp",
    "compile",
    "max_steps",
    "save_every",
    "keep",
    "check_shards",
    "profile",
    "out",
    "resume",
    "overwrite",
)


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Only the main rank writes to it."""

    path: Path
    world: World
    keep: int = 2  # checkpoints by step's number that stay

    def prepare(self, config: TrainConfig, *, fresh: bool) -> None:
        """Make the folder ready: clear what a former run left there, write config.toml."""
        if not self.world.is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in _files_of_a_run(self.path) if fresh else _half_written(self.path):
                path.unlink()
            write_atomically(self.path / "config.toml", format_toml(config).encode())
        except OSError as error:
            raise UsageError(
                f"--out {self.path}: {error.strerror}. Choose another folder."
            ) from None

    def save(self, run: "Run", *, is_best: bool = False) -> None:
        """Write a checkpoint by its step's number, and give it the names last.pt and best.pt."""
        if not self.world.is_main:
            return
        numbered = self.path / f"step-{run.state.step:09d}.pt"
        save_checkpoint(numbered, {**run.state.state_dict(), "facts": run.facts.to_dict()})
        try:
            # last.pt comes last: a kill in between must not leave it with the accuracy of a best.pt
            # that is not there. A resume from the one before makes the same best.pt again.
            for name in (["best.pt"] if is_best else []) + ["last.pt"]:
                link_checkpoint(numbered, self.path / name)
            prune_steps(self.path, keep=self.keep)
        except OSError as error:
            raise CheckpointError(unwritable(error.filename, error)) from None

    @contextlib.contextmanager
    def status(self, run: "Run") -> Iterator["Status"]:
        """Within this context the run is running; status.json says so, and then how it ended."""
        status = Status()
        self._write_status(status="running", step=run.state.step)
        try:
            yield status
        except BaseException as error:
            reason = str(error) or type(error).__name__
            with contextlib.suppress(CheckpointError):  # where the disk is full, or the folder gone
                self._write_status(status="failed", step=run.state.step, reason=reason)
            raise
        ended = "finished" if status.reason == "finished" else "stopped"
        self._write_status(status=ended, step=run.state.step, reason=status.reason)

    def _write_status(self, **content) -> None:
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


def choose(
    config: TrainConfig, world: World, *, warn: Callable
) -> tuple[RunDir, dict[str, Any] | None]:
    """The run's folder, and the checkpoint to resume from, if there is one to resume.

    Raises:
        UsageError: if the folder already holds a run that is neither resumed nor overwritten.
        CheckpointError: if there is nothing whole to resume from.
    """
    if config.resume is not None:
        folder, path = resumed_from(config.resume, config.out)
        if config.out and not path and not any(folder.glob("*.pt")):
            return RunDir(folder, world, config.keep), None  # one command for every start of a job
        checkpoint = load_checkpoint(path) if path else load_newest(folder, warn=warn)
        return RunDir(folder, world, config.keep), checkpoint
    named = time.strftime(f"{config.model}-%Y%m%d-%H%M%S")
    folder = Path(config.out) if config.out else RUNS / broadcast_object(named, world)
    if _files_of_a_run(folder) and not config.overwrite:
        raise UsageError(
            f"{folder}: already holds a run. Continue it with --resume {folder}, replace it with "
            "--overwrite, or choose another --out."
        )
    return RunDir(folder, world, config.keep), None


def resumed_from(resume: str, out: str | None) -> tuple[Path, Path | None]:
    """The folder and the checkpoint (None: the newest whole one) that `--resume` means."""
    if resume == "newest":
        return Path(out) if out else newest_run("last.pt"), None
    path = Path(resume)
    if path.is_dir():
        return Path(out) if out else path, None
    if not path.is_file():
        raise CheckpointError(f"--resume {resume}: no such file or folder. Give a run's folder.")
    return Path(out) if out else path.parent, path


def newest_run(holding: str) -> Path:
    """The folder under runs/ whose file of that name was written last."""
    found = sorted(RUNS.glob(f"*/{holding}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(
            f"{RUNS}/: no run with a {holding} here. Train one first, or name its folder or file."
        )
    return found[-1].parent


def best_checkpoint(named: str | None) -> Path:
    """The checkpoint file that `eval --checkpoint` means: a file, a run's best.pt, the newest's."""
    path = newest_run("best.pt") if named is None else Path(named)
    if not path.is_dir():
        return path
    if not (path / "best.pt").is_file():
        raise CheckpointError(f"{path}: holds no best.pt. Name one of its .pt files.")
    return path / "best.pt"


def fit_to_checkpoint(config: TrainConfig, then: Facts, world: World) -> TrainConfig:
    """The config with the batch per process that gives the checkpoint's global batch.

    Raises:
        CheckpointError: if the ranks do not divide it, or the options ask for another one.
    """
    global_batch_size = then.data.global_batch_size
    if config.batch_size * config.accumulate * world.size == global_batch_size:
        return config
    batch_size, rest = divmod(global_batch_size, config.accumulate * world.size)
    if rest or config.batch_size != then.batch_size:
        raise CheckpointError(
            f"--resume: the checkpoint's global batch is {global_batch_size}; {world.size} "
            f"processes with --batch-size {config.batch_size} and --accumulate "
            f"{config.accumulate} do not make it. Choose a product that does, or start from "
            "scratch without --resume, in another --out."
        )
    return replace(config, batch_size=batch_size)


def check_resumable(then: Facts, now: Facts, *, warn: Callable) -> None:
    """Compare what a checkpoint was trained on and with to what it is resumed with.

    Raises:
        CheckpointError: if the stream of samples or the model would be another.
    """
    differences = list(then.differences(now))
    for part, name, old, new in differences:
        if part in ("model", "class_names"):
            raise CheckpointError(
                f"--resume: the checkpoint is of {name} {_short(old)}, this run has "
                f"{_short(new)}. Start from scratch without --resume, in another --out."
            )
        if name == "ema_decay" and bool(old) != bool(new):
            raise CheckpointError(
                f"--resume: the checkpoint has --ema-decay {old:g}, this run {new:g}: an average "
                "cannot begin or end in mid-run. Resume with the same, or start from scratch "
                "without --resume, in another --out."
            )
    of_data = [f"{d.name} {d.then} (now {d.now})" for d in differences if d.part == "data"]
    if of_data:
        raise CheckpointError(
            f"--resume: the checkpoint's stream of samples had {', '.join(of_data)}. Resume with "
            "the same, or start from scratch without --resume, in another --out."
        )
    for part, name, old, new in differences:
        # The image size is an option as well, and one warning is enough.
        is_pixels = part == "preprocessing" and name != "image_size"
        if is_pixels or part == "environment" or (part == "config" and name not in _FREE_OPTIONS):
            warn(
                f"Resuming with {name} {new}, the checkpoint had {old}: "
                "the run goes on, but not bit for bit as it would have."
            )


def _short(value) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _files_of_a_run(folder: Path) -> list[Path]:
    whole = [path for pattern in _WRITTEN_BY_A_RUN for path in folder.glob(pattern)]
    return whole + _half_written(folder)


def _half_written(folder: Path) -> list[Path]:
    """Temporary files that a kill left behind; of version 0.1.0 too, whose names are shorter."""
    return [
        path
        for pattern in _WRITTEN_BY_A_RUN
        for suffix in (".tmp", ".????????.tmp")
        for path in folder.glob(pattern + suffix)
    ]


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


def load_newest(folder: str | os.PathLike, *, warn: Callable) -> dict[str, Any]:
    """The newest checkpoint of a run that is whole; damaged ones are passed over, with a warning.

    Raises:
        CheckpointError: if there is none.
    """
    last = Path(folder) / "last.pt"
    candidates = ([last] if last.exists() else []) + step_checkpoints(folder)
    for path in candidates:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{sentence(error)} Trying the one before it.")
    raise CheckpointError(
        f"{folder}: holds no whole checkpoint to resume from. "
        "Start from scratch with --overwrite, or in another folder with --out."
    )
