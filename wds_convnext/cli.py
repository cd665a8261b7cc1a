"""The command line. torch is imported inside the commands, so that --help is instant."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wds_convnext import __version__, errors
from wds_convnext.config import (
    BenchConfig,
    DoctorConfig,
    EvalConfig,
    ExplainConfig,
    IndexConfig,
    InspectConfig,
    ShardsConfig,
    TrainConfig,
    VerifyConfig,
)
from wds_convnext.errors import UsageError, WdsConvnextError
from wds_convnext.files import format_json
from wds_convnext.options import (
    Command,
    GroupedCommand,
    GroupedOption,
    add_options,
    read_run_toml,
    recipe_path,
    toml_layer,
    warn,
)
from wds_convnext.progress import outlasting_output


@click.group(
    context_settings={
        "auto_envvar_prefix": "WDS_CONVNEXT",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    }
)
@click.version_option(__version__, package_name="wds-convnext")
def commands() -> None:
    """Train image classifiers from WebDataset tar shards."""


def add_train_options(config_class: type[TrainConfig]) -> Callable[[Command], Command]:
    """A decorator that gives a command the options of a training, and those for presets."""

    def preset(name: str, path_of: Callable[[str], Path], help: str) -> Callable:
        return click.option(
            name,
            cls=GroupedOption,
            group="Presets",
            is_eager=True,
            expose_value=False,
            callback=toml_layer(config_class, path_of),
            help=help,
        )

    recipe = preset(
        "--recipe", recipe_path, "A preset that ships with the package: article, cifar10, digits."
    )
    config = preset(
        "--config",
        Path,
        "A TOML file of these options (image_size = 224). Stronger than --recipe, weaker than "
        "the environment (WDS_CONVNEXT_TRAIN_IMAGE_SIZE) and the command line.",
    )

    def decorate(command: Command) -> Command:
        return add_options(config_class)(recipe(config(command)))

    return decorate


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext train --shards 'data/train-<000..012>.tar'
wds-convnext train --shards data/train.json --model convnext_tiny --epochs 100
wds-convnext train --recipe cifar10 --shards cifar/train.json
wds-convnext train --resume runs/convnext_base-20261125-101500
""",
)
@add_train_options(TrainConfig)
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Train a classifier on tar shards.

    With no option but --shards it is the article's run: convnext_base, 300 epochs.

    Exit codes: 0 finished; 75 stopped by SIGINT, SIGTERM, SIGHUP or SIGUSR1 with last.pt saved,
    to be continued with --resume; 2 usage or data error, explained in one line; 130 stopped at
    once by a second Ctrl-C.
    """
    if options["resume"]:
        options |= _options_of_the_run(ctx, options)
    config = TrainConfig(**options)
    _say_what_is_read(config)  # before torch is imported, which takes seconds
    from wds_convnext.training.train import train as run_training

    sys.exit(run_training(config))


def _say_what_is_read(config: TrainConfig) -> None:
    """The first line of a run: what its options name, so that a typo costs no time.

    Raises:
        WdsConvnextError: if shards or files that options name are not there.
    """
    from wds_convnext.shards.expand import expand_spec

    paths = expand_spec(config.require_shards())
    if config.val_shards:
        expand_spec(config.val_shards, use="validation")
    if config.init_from and not config.resume and not os.path.isfile(config.init_from):
        raise UsageError(f"--init-from {config.init_from}: no such file. Name a state dict.")
    if os.environ.get("RANK", "0") == "0":
        last = f" to {os.path.basename(paths[-1])}" if len(paths) > 1 else ""
        shards = f"{len(paths)} shard{'s' * (len(paths) != 1)}"
        click.echo(f"Training on {paths[0]}{last} ({shards}). Importing torch …")


def _options_of_the_run(ctx: click.Context, options: dict) -> dict:
    """What the resumed run's config.toml says for options that nothing else sets."""
    from wds_convnext.training.claim import resumed_from

    folder, _ = resumed_from(options["resume"], options["out"])
    path = folder / "config.toml"
    if not path.is_file():
        return {}
    content = read_run_toml(path, TrainConfig, warn=warn)
    unset = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.DEFAULT}
    unset -= {"max_steps", "profile"}  # these are about one start of the run
    return {name: value for name, value in content.items() if name in unset}


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext doctor data/train.json
wds-convnext doctor --recipe cifar10 --shards cifar/train.json --step
wds-convnext doctor data/train.json --model convnext_tiny --ranks 8 --json
""",
    # It looks at what train would do.
    context_settings={"auto_envvar_prefix": "WDS_CONVNEXT_TRAIN"},
)
@click.argument("spec", metavar="[SHARDS]", required=False)
@add_train_options(DoctorConfig)
@click.pass_context
def doctor(ctx: click.Context, spec: str | None, **options: Any) -> None:
    """Look at a training before it is started: its data, its options, this machine.

    It takes the options of train: write doctor in place of train. Every image's header and bytes
    are read, in all splits; each finding says what was found, why it matters and what to do.

    Exit codes: 0 nothing was found; 1 something was; 2 usage or data error, explained in one line.
    """
    if options["resume"]:
        options |= _options_of_the_run(ctx, options)
    from wds_convnext.check.doctor import doctor as examine

    report = examine(spec, DoctorConfig(**options))
    click.echo(json.dumps(report.to_json()) if options["json"] else report)
    sys.exit(1 if report.findings else 0)


@commands.command(
    name="eval",
    cls=GroupedCommand,
    examples="""
wds-convnext eval
wds-convnext eval runs/big --shards 'data/test-<000..001>.tar' --json
wds-convnext eval runs/small runs/big --shards data/test.json
wds-convnext eval runs/big --image-size 288 --crop 1 --tta flip
""",
)
@click.argument("checkpoints", nargs=-1)
@add_options(EvalConfig)
def evaluate(checkpoints: tuple[str, ...], **options: Any) -> None:
    """Evaluate checkpoints on tar shards.

    With no option: the newest run's best checkpoint, on the shards it was validated on. CHECKPOINTS
    are files or run folders (their best.pt); several are compared in one table, on one split: that
    of --shards, else the one that the first was validated on.
    """
    config = EvalConfig(**options)
    if checkpoints and config.checkpoint is not None:
        raise UsageError(
            f"--checkpoint {config.checkpoint}: {checkpoints[0]} is named as well. Name all "
            "checkpoints without the option."
        )
    from wds_convnext.training.evaluate import evaluate_checkpoints
    from wds_convnext.training.scores import table

    scores = evaluate_checkpoints(checkpoints or [config.checkpoint], config)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if config.json:
        objects = [format_json(score.to_json()) for score in scores]
        click.echo(objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]")
        return
    click.echo("\n".join(scores[0].lines() if len(scores) == 1 else table(scores)))


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext explain runs/big --step 1234 --sheet step.png
wds-convnext explain runs/big --key n01532829_37
""",
)
@click.argument("run", required=False)
@add_options(ExplainConfig)
def explain(run: str | None, **options: Any) -> None:
    """Say what a training step gets, or in which steps a sample comes.

    RUN is a run's folder or a checkpoint. Default: the newest run under runs/.

    A step's samples are named with shard, key, label, crop, flip, color factors and mixing; with
    --key, a sample's step, rank and position in every epoch. All of it follows from the run's
    options, so steps to come are named as well. Which step gets a sample, and what is drawn for it,
    never changes; rank, position and mixing are as they were when the checkpoint was written.
    """
    config = ExplainConfig(**options)
    config.require_one()  # before torch is imported, which takes seconds
    from wds_convnext.check.explain import explain as explain_run

    explanation = explain_run(run, config)
    if config.json:
        click.echo(format_json(explanation.to_json()))
    else:
        click.echo("\n".join(explanation.lines()))


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext shards mini-imagenet --out data
wds-convnext shards photos.parquet --out data --label-column species --on-bad skip
""",
)
@click.argument("src")
@add_options(ShardsConfig)
def shards(src: str, **options: Any) -> None:
    """Convert parquet files of images to tar shards, with manifest and offsets.

    SRC is a folder of files named {split}-00000-of-00013.parquet (every split in it is converted),
    a glob, or a comma list of files. Running the same command again finishes what was interrupted.
    """
    from wds_convnext.conversion import convert

    click.echo(convert(src, ShardsConfig(**options)))


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext verify data
wds-convnext verify data --against mini-imagenet
""",
)
@click.argument("shards")
@add_options(VerifyConfig)
def verify(shards: str, **options: Any) -> None:
    """Check shards against their manifest, their offsets and, if given, their input.

    SHARDS is as for training; a folder stands for all splits in it.

    Exit codes: 0 everything fits; 1 problems were found, one per line; 2 usage or data
    error, explained in one line.
    """
    from wds_convnext.check.verify import verify as verify_shards

    config = VerifyConfig(**options)
    report = verify_shards(shards, config)
    click.echo(json.dumps(report.to_json()) if config.json else report)
    sys.exit(1 if report.problems else 0)


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext inspect data --sheet sheet.png
wds-convnext inspect 'data/train-<000..012>.tar' --shuffle-buffer 10000
""",
)
@click.argument("shards")
@add_options(InspectConfig)
def inspect(shards: str, **options: Any) -> None:
    """Describe shards: counts, classes, image sizes, and how well training will mix the labels.

    SHARDS is as for training; a folder stands for all splits in it. Parquet files (a folder, a
    glob, a file) are described, too: schema, rows, row groups, compression.
    """
    from wds_convnext.check.inspect import inspect as inspect_shards

    config = InspectConfig(**options)
    summaries = inspect_shards(shards, config)
    if config.json:
        click.echo(json.dumps({"splits": [summary.to_json() for summary in summaries]}))
    else:
        click.echo("\n".join(line for summary in summaries for line in summary.lines()))


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext bench data/train.json --target-images-per-s 2000
""",
)
@click.argument("shards")
@add_options(BenchConfig)
def bench(shards: str, **options: Any) -> None:
    """Measure the loader alone, on these shards and this machine.

    SHARDS is as for training. For each number of workers: images per second, CPU time, memory and
    the wait for the first batch; then where the time of one image goes.
    """
    from wds_convnext.check.bench import bench as bench_loader

    config = BenchConfig(**options)
    report = bench_loader(shards, config)
    click.echo(json.dumps(report.to_json()) if config.json else "\n".join(report.lines()))


@commands.command(
    cls=GroupedCommand,
    examples="""
wds-convnext index others/
wds-convnext index others/ --label-field class_id --class-names names.txt
""",
)
@click.argument("shards")
@add_options(IndexConfig)
def index(shards: str, **options: Any) -> None:
    """Write manifest and sidecars for shards that others made.

    Labels are class numbers, in .cls members or in a field of .json members. Shards are left as
    they are; damaged ones, and keys that come twice, are refused by name.
    """
    from wds_convnext.check.index import index as index_shards

    config = IndexConfig(**options)
    report = index_shards(shards, config)
    click.echo(json.dumps(report.to_json()) if config.json else report)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a usage or data error is one line and exit code 2."""
    # On a CPU the trainer shares the cores with its loader. With two busy processes next to it,
    # 2 cores, a step took 2.5 s with libgomp's default spinning, 0.35 s with this, 0.1 s alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with outlasting_output():
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a name may not fit its encoding
        try:
            try:
                commands(args)
            except OSError as error:
                if error.filename is None:
                    raise
                advice = "Check that it is there and that you may read or write it"
                raise UsageError(f"{error.filename}: {error.strerror}. {advice}.") from None
        except WdsConvnextError as error:
            kind = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
            click.echo(f"{kind.__name__}: {error}", err=True)
            sys.exit(2)
