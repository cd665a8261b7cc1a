"""The options of the commands about runs that were trained."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import Config, option
from wds_convnext.errors import UsageError


@dataclass(frozen=True)
class ExplainConfig(Config):
    """What `wds-convnext explain` is asked."""

    step: int | None = option(
        None,
        "Name what this step gets; the first is step 0.",
        group="Question",
        type=click.IntRange(min=0),
    )
    key: str | None = option(
        None,
        "Name the steps that get this sample: its key, or its number in the data set.",
        group="Question",
    )
    shards: str | None = option(
        None,
        "Where the training shards are now. Default: where the run had them.",
        group="Question",
    )
    sheet: str | None = option(
        None,
        "Draw the step's images as the model sees them, augmented and mixed, to this PNG file.",
        group="Output",
        is_output=True,
    )
    json: bool = option(False, "Print one JSON object.", group="Output")

    def require_one(self) -> None:
        """Refuse a question that is none, or more than one.

        Raises:
            UsageError: unless either a step or a key is named; for a sheet without a step.
        """
        if (self.step is None) == (self.key is None):
            found = "neither is" if self.step is None else "both are"
            raise UsageError(f"--step, --key: {found} given, expected one. Give --step 0.")
        if self.sheet is not None and self.step is None:
            raise UsageError(f"--sheet {self.sheet}: it shows a step. Give --step.")
