"""Commands about a training: doctor before it, train, eval and explain after it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wds_convnext.config import DoctorConfig, EvalConfig, ExplainConfig, TrainConfig, local_source
from wds_convnext.errors import UsageError, listing
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
from wds_convnext.progress import say
from wds_convnext.urls import redacted


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
        "--recipe",
        recipe_path,
        "A preset that ships with the package: article, cifar10, digits, finetune.",
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


@click.command(
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
        WdsConvnextError: if shards, files or a model that options name are not there.
    """
    from wds_convnext.shards.expand import expand_spec, local_path, reads_remote
    from wds_convnext.training.modelnames import check_model_name

    if config.model and not config.resume:
        check_model_name(config.model)
    specs = [config.require_shards(), *([config.val_shards] if config.val_shards else [])]
    if any(map(reads_remote, specs)):
        for part in (part for spec in specs for part in spec.split(",")):
            local_path(part.strip())  # refuses credentials; the rest needs the cache of the run
        named = redacted(specs[0])
    else:
        paths = expand_spec(specs[0])
        if config.val_shards:
            expand_spec(config.val_shards, use="validation")
        last = f" to {os.path.basename(paths[-1])}" if len(paths) > 1 else ""
        named = f"{paths[0]}{last} ({len(paths)} shard{'s' * (len(paths) != 1)})"
    if config.init_from and not config.resume and not os.path.isfile(config.init_from):
        raise UsageError(f"--init-from {config.init_from}: no such file. Name a state dict.")
    local = config.pretrained and not config.resume and local_source(config.pretrained)
    if local and not os.path.exists(local):
        raise UsageError(f"--pretrained {config.pretrained}: no such file or folder. Name one.")
    if os.environ.get("RANK", "0") == "0":
        say(f"Training on {named}. Importing torch …")


def _options_of_the_run(ctx: click.Context, options: dict) -> dict:
    """What the resumed run's config.toml says for options that nothing else sets."""
    from wds_convnext.shards.expand import stated_spec
    from wds_convnext.training.runs import resumed_from

    folder, _ = resumed_from(options["resume"], options["out"])
    path = folder / "config.toml"
    if not path.is_file():
        return {}
    content = read_run_toml(path, TrainConfig, warn=warn)
    unset = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.DEFAULT}
    unset -= {"max_steps", "profile"}  # these are about one start of the run
    for name, use in (("shards", "train"), ("val_shards", "validation")):
        if name in unset and name in content:
            content[name] = stated_spec(content[name], folder, use=use)
    return {name: value for name, value in content.items() if name in unset}


@click.command(
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
    """Look at data, options and machine before a training starts.

    It takes the options of train: write doctor in place of train. Every image's header and bytes
    are read, in all splits; each finding says what was found, why it matters and what to do.

    Exit codes: 0 nothing was found; 1 something was; 2 usage or data error, explained in one line.
    """
    if options["resume"]:
        options |= _options_of_the_run(ctx, options)
    from wds_convnext.check.doctor import doctor as examine

    report = examine(spec, DoctorConfig(**options))
    if options["json"]:
        click.echo(json.dumps(report.to_json()))
    else:
        say(str(report))
    sys.exit(1 if report.findings else 0)


@click.command(
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
    from wds_convnext.shards.expand import expand_spec, reads_remote
    from wds_convnext.training.runs import best_checkpoint

    # Looked for before torch is imported, which takes seconds.
    named = [str(best_checkpoint(name)) for name in checkpoints or [config.checkpoint]]
    if config.shards and not reads_remote(config.shards):
        expand_spec(config.shards, use="validation")
    if sys.stderr.isatty():
        warn(f"Evaluating {listing(named)}. Importing torch …")
    from wds_convnext.training.compare import evaluate_checkpoints
    from wds_convnext.training.scores import table

    scores = evaluate_checkpoints(named, config)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if config.json:
        objects = [format_json(score.to_json()) for score in scores]
        click.echo(objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]")
        return
    say("\n".join(scores[0].lines() if len(scores) == 1 else table(scores)))


@click.command(
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
    from wds_convnext.training.runs import named_run

    named = named_run(run)
    if sys.stderr.isatty():
        warn(f"Looking into {named}. Importing torch …")
    from wds_convnext.check.explain import explain as explain_run

    explanation = explain_run(str(named), config)
    if config.json:
        click.echo(format_json(explanation.to_json()))
    else:
        say("\n".join(explanation.lines()))
