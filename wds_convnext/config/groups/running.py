"""Options of the machine and the run's folder."""

from dataclasses import dataclass

import click

from wds_convnext.config.fields import COUNT, SEED, Config, option


@dataclass(frozen=True)
class MachineOptions(Config):
    """Where it runs."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", group="Machine")
    amp: str = option(
        "auto",
        "Mixed precision: auto takes bf16 where the GPU has it, else fp16; none on a CPU.",
        group="Machine",
        type=click.Choice(["auto", "bf16", "fp16", "off"]),
    )
    compile: bool | None = option(None, "Compile the model. Default: on CUDA.", group="Machine")
    cuda_graphs: bool = option(
        False,
        "Replay the compiled model as CUDA graphs: less work for the host. Unmeasured.",
        group="Machine",
    )
    profile: bool = option(
        False,
        "Write trace.json of the sixth to eighth step into the run's folder (for Perfetto).",
        group="Machine",
    )


@dataclass(frozen=True)
class RunOptions(Config):
    """The run's folder, and what is written when."""

    seed: int = option(
        0,
        "Decides order, augmentation, mixing and starting weights.",
        group="Run",
        type=SEED,
    )
    out: str | None = option(
        None, "Folder of the run. Default: runs/<model>-<time>.", group="Run", is_output=True
    )
    log_every: int = option(20, "Steps between log lines.", group="Run", type=COUNT)
    val_every: int = option(
        10,
        "Epochs between validations; the last epoch is always validated.",
        group="Run",
        type=COUNT,
    )
    save_every: int = option(1000, "Steps between checkpoints.", group="Run", type=COUNT)
    keep: int = option(
        2, "Checkpoints kept besides last.pt and best.pt.", group="Run", type=click.IntRange(min=0)
    )
    resume: str | None = option(
        None,
        "Continue a run: its folder or a checkpoint; alone, the run in --out or the newest.",
        group="Run",
        flag_value="newest",
    )
    overwrite: bool = option(
        False, "Delete the run that --out holds, and start from scratch.", group="Run"
    )
