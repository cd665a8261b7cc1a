"""TensorBoard's view of a run: curves in groups, cards of text, hyperparameters, a labeled batch.

TensorBoard sorts groups by name: `eval/` (in metrics.jsonl `val/`, as in the article), `train/`,
and last `utilization/`, the gauges of the machine (in metrics.jsonl under `train/`).
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from wds_convnext.config import TrainConfig
from wds_convnext.options import format_toml
from wds_convnext.training.batchsheet import BatchSheet
from wds_convnext.training.checkpoint import Facts

_GAUGES = {"images_per_s", "data_wait", "tflops_per_s", "mfu", "optimizer_ms", "memory_gb"}
_TUNED = {"Pixels", "Augmentation", "Model", "Optimization"}  # groups of options
_ALSO_TUNED = {"shuffle_buffer", "seed"}
_JUDGED_BY = ("eval/accuracy", "eval/loss", "train/epoch_loss")


def tag(name: str) -> str:
    """A metric's name in TensorBoard."""
    group, _, rest = name.partition("/")
    return f"{'utilization' if rest in _GAUGES else 'eval' if group == 'val' else group}/{rest}"


class Board:
    """Writes events to a run's folder. What is later than `start_step` there is hidden.

    Raises:
        OSError: from any method, if they cannot be written.
    """

    def __init__(self, folder: Path, *, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # 1 s; workers never pay for it

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def introduce(self, step: int, *, config: TrainConfig, facts: Facts, introduction: str) -> None:
        """Cards of text with the options and facts of a run, and its hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config.toml", _as_code(format_toml(config)), step)
        rows = {"classes": facts.num_classes, **asdict(facts.data), **facts.environment}
        lines = [f"{name} = {value}" for name, value in rows.items()]
        self._writer.add_text("facts", _as_code(f"{introduction}\n\n" + "\n".join(lines)), step)
        tuned = {
            spec.name: " ".join(value) if isinstance(value, tuple) else value
            for spec in fields(config)
            if spec.metadata["group"] in _TUNED or spec.name in _ALSO_TUNED
            for value in [getattr(config, spec.name)]
        }
        # Into the run's own events: `add_hparams` would make a second run of them. Without a
        # session's end TensorBoard takes it as running, and shows it all the same.
        experiment, start, _ = hparams(tuned, dict.fromkeys(_JUDGED_BY, 0.0))
        file_writer: Any = self._writer.file_writer  # whose type is stated as None
        file_writer.add_summary(experiment)
        file_writer.add_summary(start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the curves of these metrics."""
        for name, value in values.items():
            self._writer.add_scalar(tag(name), value, step)

    def batch(self, step: int, sheet: BatchSheet) -> None:
        """A labeled batch as the model sees it."""
        pixels = np.asarray(sheet.image)
        self._writer.add_image("train/samples", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _as_code(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
