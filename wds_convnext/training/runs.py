"""Which run, and which of its checkpoints, a user means. Answered before torch is imported."""

from pathlib import Path

from wds_convnext.errors import CheckpointError

RUNS = Path("runs")
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of an exported folder, as on the Hub
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


def resumed_from(resume: str, out: str | None) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint (None: the newest whole one) that `--resume` means.

    The run may go on elsewhere, in --out; its options are those of this folder.
    """
    if resume == "newest":
        return Path(out) if out else newest_run(), None
    path = Path(resume)
    if path.is_dir():
        return path, None
    if not path.is_file():
        raise CheckpointError(f"--resume {resume}: no such file or folder. Give a run's folder.")
    return path.parent, path


def newest_run() -> Path:
    """The folder under runs/ that a run has written to last."""
    written = {
        folder: max(path.stat().st_mtime for path in files)
        for folder in RUNS.glob("*")
        if (files := files_of_a_run(folder))
    }
    if not written:
        raise CheckpointError(f"{RUNS}/: no run here. Train one first, or name its folder or file.")
    return max(written, key=written.__getitem__)


def named_run(named: str | None) -> Path:
    """The file or folder of this name, which is there; None: the newest run's."""
    path = newest_run() if named is None else Path(named)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder. Name a checkpoint or a run's folder."
        )
    return path


def best_checkpoint(named: str | None) -> Path:
    """The checkpoint file that `eval --checkpoint` means: a file, a run's best.pt, the newest's.

    A run that was not validated has no best.pt: its last.pt is meant. An exported folder is given
    back as it is.
    """
    path = named_run(named)
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    which = "the newest run, " if named is None else ""
    raise CheckpointError(
        f"{path}: {which}holds no best.pt and no last.pt. Name one of its .pt files, or another "
        "run."
    )


def files_of_a_run(folder: Path) -> list[Path]:
    whole = [path for pattern in _WRITTEN_BY_A_RUN for path in folder.glob(pattern)]
    return whole + half_written(folder)


def half_written(folder: Path) -> list[Path]:
    """Temporary files that a kill left behind; of version 0.1.0 too, whose names are shorter."""
    return [
        path
        for pattern in _WRITTEN_BY_A_RUN
        for suffix in (".tmp", ".????????.tmp")
        for path in folder.glob(pattern + suffix)
    ]
