"""The options of the commands that use a trained model: predict, report and export."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import COUNT, WORKERS, Config, option
from wds_convnext.errors import UsageError


@dataclass(frozen=True)
class UseConfig(Config):
    """How a model is computed; in the same batches and precision as in `eval`."""

    batch_size: int = option(160, "Images per batch.", group="Machine", type=COUNT)
    workers: int | None = option(
        None,
        "Processes that decode images. Default: one per CPU core, at most 16.",
        group="Machine",
        type=WORKERS,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", group="Machine")
    amp: str = option(
        "auto",
        "Mixed precision, as in training.",
        group="Machine",
        type=click.Choice(["auto", "bf16", "fp16", "off"]),
    )
    quiet: bool = option(False, "Show no progress.", group="Output")


@dataclass(frozen=True)
class PredictConfig(UseConfig):
    """What `wds-convnext predict` says of each image, and where."""

    top: int = option(5, "Classes per image, the likeliest first.", group="Output", type=COUNT)
    out: str | None = option(
        None,
        "Write to this file, in the format of its ending: .csv, .jsonl or .parquet.",
        group="Output",
        is_output=True,
    )
    json: bool = option(False, "Print a JSON object per image, not a table.", group="Output")


@dataclass(frozen=True)
class ReportConfig(UseConfig):
    """What `wds-convnext report` looks at, and where it writes."""

    shards: str | None = option(
        None,
        "Shards to report on. Default: those that the (first) run was validated on.",
        group="Evaluation",
    )
    out: str | None = option(
        None,
        "Folder for page and pictures. Default: report/ in the run's.",
        group="Output",
        is_output=True,
    )


@dataclass(frozen=True)
class ExportConfig(UseConfig):
    """Which files `wds-convnext export` writes, and what they are compared on."""

    to: str | None = option(
        None, "Folder for the files; a new one.", group="Output", is_output=True
    )
    onnx: bool = option(False, "Also model.onnx (needs the extra onnx).", group="Output")
    pt2: bool = option(False, "Also model.pt2, of torch.export.", group="Output")
    overwrite: bool = option(False, "Replace an export that is there.", group="Output")
    shards: str | None = option(
        None,
        "Shards to evaluate and compare on. Default: those that the run was validated on.",
        group="Comparison",
    )
    num_checked: int = option(
        500,
        "Images that the files are compared with the run on, evenly spread; on the CPU.",
        group="Comparison",
        type=COUNT,
    )

    def require_target(self) -> str:
        """The folder.

        Raises:
            UsageError: if none is given.
        """
        if self.to is None:
            raise UsageError("--to is missing. Name a folder for the files.")
        return self.to
