"""Which folder a run has for itself, and which checkpoint it goes on from."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.training.distributed import World, decided_by_main
from wds_convnext.training.lock import locked
from wds_convnext.training.rundir import RunDir, load_newest, make_new, unusable
from wds_convnext.training.runs import RUNS, files_of_a_run, resumed_from


@contextlib.contextmanager
def claim(config: TrainConfig, world: World, *, warn: Callable[[str], None]) -> Iterator[RunDir]:
    """The folder of a run, which no other run can have within this context.

    Raises:
        UsageError: if it holds a run that is running, or neither resumed nor overwritten.
        CheckpointError: if there is nothing whole to resume from.
    """
    with contextlib.ExitStack() as held:
        folder, resumed = decided_by_main(partial(_choose, config, held, warn=warn), world)
        yield RunDir(folder, world, config.keep, resumed)


def _choose(
    config: TrainConfig, held: contextlib.ExitStack, *, warn: Callable[[str], None]
) -> tuple[Path, Path | None]:
    """The run's folder, which is locked as long as `held` lasts, and what it resumes from."""
    if config.resume is None:
        folder = _hold(Path(config.out) if config.out else None, config.model, held, warn=warn)
        if not config.overwrite:
            _refuse_another_run(folder)
        return folder, None
    own, path = resumed_from(config.resume, config.out)
    folder = _hold(Path(config.out) if config.out else own, config.model, held, warn=warn)
    if folder.resolve() != own.resolve():
        _refuse_another_run(folder)
    elif config.out and not path and not any(folder.glob("*.pt")):
        return folder, None  # one command for every start of a job
    return folder, path or load_newest(own, warn=warn)[0]


def _hold(
    folder: Path | None,
    model: str | None,
    held: contextlib.ExitStack,
    *,
    warn: Callable[[str], None],
) -> Path:
    """Lock a folder (None: a new one under runs/); one made here is removed if it stays empty."""
    is_new = folder is None or not folder.exists()
    try:
        if folder is None:
            folder = make_new(RUNS / time.strftime(f"{model}-%Y%m%d-%H%M%S"))
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            held.callback(_remove_empty, folder)
        held.enter_context(locked(folder, warn=warn))
    except OSError as error:
        raise unusable(folder or RUNS, error) from None
    return folder


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _refuse_another_run(folder: Path) -> None:
    if files_of_a_run(folder):
        raise UsageError(
            f"{folder}: already holds a run. Continue it with --resume {folder}, replace it with "
            "--overwrite, or choose another --out."
        )
