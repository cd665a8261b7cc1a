"""The folder of a run: finding it, refusing to spoil it, its checkpoints, its status.

`runs/<name>/` holds config.toml, metrics.jsonl, bad_samples.jsonl, TensorBoard events, last.pt,
best.pt, the newest step-*.pt, and status.json, which says why the run is not running.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wds_convnext.config import TrainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.files import write_atomically
from wds_convnext.options import format_toml
from wds_convnext.training.checkpoint import (
    link_checkpoint,
    load_checkpoint,
    load_newest,
    prune_steps,
    save_checkpoint,
)
from wds_convnext.training.distributed import World, broadcast_object

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


def choose(config: TrainConfig, world: World, *, warn: Callable) -> tuple[Path, dict | None]:
    """The run's folder, and the checkpoint to resume from, if there is one to resume.

    Raises:
        UsageError: if the folder already holds a run that is neither resumed nor overwritten.
        CheckpointError: if there is nothing whole to resume from.
    """
    if config.resume is not None:
        folder, path = resumed_from(config.resume, config.out)
        if config.out and not path and not any(folder.glob("*.pt")):
            return folder, None  # so that one command line serves for every start of a job
        return folder, load_checkpoint(path) if path else load_newest(folder, warn=warn)
    named = time.strftime(f"{config.model}-%Y%m%d-%H%M%S")
    folder = Path(config.out) if config.out else RUNS / broadcast_object(named, world)
    if _files_of_a_run(folder) and not config.overwrite:
        raise UsageError(
            f"{folder}: already holds a run. Continue it with --resume {folder}, replace it with "
            "--overwrite, or choose another --out."
        )
    return folder, None


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


def check_resumable(then: dict, now: dict, *, warn: Callable) -> None:
    """Compare what a checkpoint was trained on and with to what it is resumed with.

    Raises:
        CheckpointError: if the stream of samples or the model would be another.
    """
    for what in ("model", "num_classes", "class_names"):
        if then[what] != now[what]:
            raise CheckpointError(
                f"--resume: the checkpoint is of {what} {_short(then[what])}, this run has "
                f"{_short(now[what])}. Start afresh without --resume, in another --out."
            )
    if bool(then["config"]["ema_decay"]) != bool(now["config"]["ema_decay"]):
        raise CheckpointError(
            f"--resume: the checkpoint has --ema-decay {then['config']['ema_decay']:g}, this run "
            f"{now['config']['ema_decay']:g}: an average cannot begin or end in mid-run. Resume "
            "with the same, or start afresh without --resume, in another --out."
        )
    differing = [key for key in then["data"] if then["data"][key] != now["data"].get(key)]
    if differing:
        told = ", ".join(f"{k} {then['data'][k]} (now {now['data'].get(k)})" for k in differing)
        raise CheckpointError(
            f"--resume: the checkpoint's stream of samples had {told}. Resume with the same, or "
            "start afresh without --resume, in another --out."
        )
    for part, without in (("environment", ()), ("config", _FREE_OPTIONS)):
        for key, value in then[part].items():
            if key not in without and now[part].get(key) != value:
                warn(
                    f"Resuming with {key} {now[part].get(key)}, the checkpoint had {value}: "
                    "the run goes on, but not bit for bit as it would have."
                )


def _short(value) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def prepare(folder: Path, config: TrainConfig, *, fresh: bool) -> None:
    """Make the folder ready: clear what a former run left there, write config.toml."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _files_of_a_run(folder) if fresh else _half_written(folder):
            path.unlink()
        write_atomically(folder / "config.toml", format_toml(config).encode())
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}. Choose another folder.") from None


def _files_of_a_run(folder: Path) -> list[Path]:
    whole = [path for pattern in _WRITTEN_BY_A_RUN for path in folder.glob(pattern)]
    return whole + _half_written(folder)


def _half_written(folder: Path) -> list[Path]:
    """Temporary files that a kill left behind."""
    return [path for pattern in _WRITTEN_BY_A_RUN for path in folder.glob(pattern + ".tmp")]


def save(folder: Path, name: str, *, state, facts: dict, keep: int, world: World) -> None:
    """Write checkpoint `last` or `best`; `last` also under its step's number, `keep` of these."""
    if not world.is_main:
        return
    content = {**state.state_dict(), "facts": facts}
    if name == "last":
        numbered = folder / f"step-{state.step:09d}.pt"
        save_checkpoint(numbered, content)
        link_checkpoint(numbered, folder / "last.pt")
        prune_steps(folder, keep=keep)
    else:
        save_checkpoint(folder / f"{name}.pt", content)


@dataclass
class Status:
    """Why a run ended: "finished", the name of a signal, or None while nothing is known."""

    reason: str | None = None


@contextlib.contextmanager
def status(folder: Path, state, world: World) -> Iterator[Status]:
    """Within this context a run is running; status.json says so, and afterwards how it ended."""
    status = Status()
    _write_status(folder, world, status="running", step=state.step)
    try:
        yield status
    except BaseException as error:
        told = str(error) or type(error).__name__
        _write_status(folder, world, status="failed", step=state.step, reason=told)
        raise
    ended = "finished" if status.reason == "finished" else "stopped"
    _write_status(folder, world, status=ended, step=state.step, reason=status.reason)


def _write_status(folder: Path, world: World, **content) -> None:
    if world.is_main:
        write_atomically(folder / "status.json", json.dumps(content).encode() + b"\n")
