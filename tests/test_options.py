"""Options: one per field; command line over environment, over file, over recipe, over default."""

import json
import math
import os
import shlex
import tomllib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import wds_convnext
from wds_convnext.cli import commands
from wds_convnext.config import (
    BenchConfig,
    ByteSize,
    Config,
    DoctorConfig,
    EvalConfig,
    ExplainConfig,
    IndexConfig,
    InspectConfig,
    ShardsConfig,
    TrainConfig,
    VerifyConfig,
    option,
)
from wds_convnext.config.fields import expectation, flag_of, python_type, value_type
from wds_convnext.errors import UsageError
from wds_convnext.options import (
    PER_CALL,
    GroupedCommand,
    add_options,
    format_toml,
    read_run_toml,
    read_toml,
    recipe_path,
    toml_layer,
)

RECIPES = sorted((Path(wds_convnext.__file__).parent / "recipes").glob("*.toml"))
CONFIGS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "explain": ExplainConfig,
    "shards": ShardsConfig,
    "verify": VerifyConfig,
    "inspect": InspectConfig,
    "index": IndexConfig,
    "bench": BenchConfig,
    "doctor": DoctorConfig,
}


@dataclass(frozen=True)
class TinyConfig(Config):
    """One option of each kind."""

    shards: str | None = option(None, "What to read.", group="Data")
    lr: float = option(0.5, "How fast.", group="Learning", type=click.FloatRange(min=0))
    image_size: int = option(224, "How large.", group="Data")
    workers: int | None = option(None, "How many.", group="Machine")
    compile: bool | None = option(None, "Whether to compile.", group="Machine")
    quiet: bool = option(False, "Whether to say less.", group="Machine")
    resume: str | None = option(None, "Which run.", group="Run", flag_value="newest")


def tiny_command(folder: Path) -> click.Command:
    """A command of these options that prints its config; recipes are files in a folder."""

    def layer(name, path_of):
        callback = toml_layer(TinyConfig, path_of)
        return click.option(name, is_eager=True, expose_value=False, callback=callback)

    @click.command(cls=GroupedCommand, context_settings={"auto_envvar_prefix": "TINY"})
    @add_options(TinyConfig)
    @layer("--recipe", lambda name: folder / f"{name}.toml")
    @layer("--config", Path)
    def command(**options):
        click.echo(repr(TinyConfig(**options)))

    return command


def parse(folder: Path, args: list[str], **env) -> TinyConfig:
    """The config that a command line gives."""
    result = CliRunner().invoke(tiny_command(folder), ["--shards", "s", *args], env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return eval(result.stdout)


SOURCES = {
    "command line": (["--lr", "1"], {}),
    "environment": ([], {"TINY_LR": "2"}),
    "config": (["--config", "{}/mine.toml"], {}),
    "recipe": (["--recipe", "small"], {}),
}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["--lr", "--min-crop", "--ema-decay", "--mixup", "--hflip"])
def test_numbers_are_finite(name, value):
    """A nan lies in every range of click's, and a run with it would train on nothing."""
    with pytest.raises(UsageError, match=f"^{name} {value}: expected a number [^.]*[0-9]"):
        commands(["train", "--shards", "s", name, value], standalone_mode=False)


@pytest.mark.parametrize("strongest", range(5))
@pytest.mark.parametrize("reverse", [False, True])
def test_the_strongest_source_wins(tmp_path, strongest, reverse):
    """Command line, environment, --config, --recipe, default; wherever they stand in the line."""
    (tmp_path / "mine.toml").write_text("lr = 3")
    (tmp_path / "small.toml").write_text("lr = 4")
    given_sources = list(SOURCES.values())[strongest:]
    args = [source[0] for source in given_sources]
    env = {key: value for source in given_sources for key, value in source[1].items()}

    config = parse(
        tmp_path,
        [arg.format(tmp_path) for part in (args[::-1] if reverse else args) for arg in part],
        **env,
    )

    assert config.lr == [1, 2, 3, 4, 0.5][strongest]


def test_layers_fill_what_stronger_ones_leave_open(tmp_path):
    """A file does not replace a recipe, it lies over it."""
    (tmp_path / "mine.toml").write_text("lr = 3\ncompile = false")
    (tmp_path / "small.toml").write_text("lr = 4\nimage_size = 32\nworkers = 2\ncompile = true")

    config = parse(
        tmp_path,
        ["--config", f"{tmp_path}/mine.toml", "--recipe", "small", "--workers", "0"],
        TINY_IMAGE_SIZE="64",
    )

    assert config == TinyConfig(shards="s", lr=3.0, image_size=64, workers=0, compile=False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], TinyConfig(shards="s")),
        (["--compile"], TinyConfig(shards="s", compile=True)),
        (["--no-compile"], TinyConfig(shards="s", compile=False)),
        (["--quiet"], TinyConfig(shards="s", quiet=True)),
        (["--resume"], TinyConfig(shards="s", resume="newest")),
        (["--resume", "runs/a"], TinyConfig(shards="s", resume="runs/a")),
        (["--image-size", "32"], TinyConfig(shards="s", image_size=32)),
    ],
)
def test_every_kind_of_option_parses(tmp_path, args, expected):
    """Numbers, switches that are open by default, flags, options whose value may be left out."""
    assert parse(tmp_path, args) == expected


def test_help_lists_options_under_their_groups(tmp_path):
    """The whole text, once."""
    result = CliRunner().invoke(tiny_command(tmp_path), ["--help"])

    assert (
        result.output
        == """\
Usage: command [OPTIONS]

Data:
  --shards TEXT         What to read.
  --image-size INTEGER  How large.  [default: 224]

Learning:
  --lr FLOAT RANGE  How fast.  [default: 0.5; at least 0]

Machine:
  --workers INTEGER         How many.
  --compile / --no-compile  Whether to compile.
  --quiet                   Whether to say less.

Run:
  --resume TEXT  Which run.

Other:
  --recipe TEXT
  --config TEXT
  --help         Show this message and exit.
"""
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learning_rate = 1", "no option is called 'learning_rate'. See --help."),
        (b"imagesize = 1", "no option is called 'imagesize'. Did you mean image_size? See --help."),
        (b"lr = 1\n[train]\nworkers = 1", "no option is called 'train'. See --help."),
        (b"lr = ", "not TOML: Invalid value (at end of document)."),
        (b"lr = 1\nlr = 2", "not TOML: Cannot overwrite a value"),
        (b"lr = " + b"[" * 9999, "nested too deeply. Options are lines of key = value."),
        (b'shards = "\xe4"', "not TOML: 'utf-8' codec can't decode byte 0xe4 in position 10"),
    ],
)
def test_a_file_with_a_fault_ends_in_one_line(tmp_path, content, message):
    """A key that no option has, with the nearest; what is no TOML; what is no UTF-8."""
    path = tmp_path / "mine.toml"
    path.write_bytes(content)

    with pytest.raises(UsageError) as error:
        parse(tmp_path, ["--config", str(path)])

    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    """Missing, or a folder."""
    with pytest.raises(UsageError, match="Give a TOML file of options"):
        parse(tmp_path, ["--config", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('lr = "fast"', "lr = fast: expected a number >= 0"),
        ("lr = -1", "lr = -1: expected a number >= 0"),
        ("lr = true", "lr = true: expected a number >= 0"),
        ('image_size = "large"', "image_size = large: expected an integer"),
        ('image_size = "3"', "image_size = 3: expected an integer"),
        ("image_size = 1.5", "image_size = 1.5: expected an integer"),
        ("image_size = 32.0", "image_size = 32.0: expected an integer"),
        ("workers = [2]", "workers = [2]: expected an integer"),
        ("quiet = 3", "quiet = 3: expected true or false"),
        ('compile = "no"', "compile = no: expected true or false"),
        ("lr" + ".a" * 5000 + " = 1", "lr = (dict): expected a number >= 0"),
        ("shards = 2026-11-25", 'shards = "2026-11-25": expected text'),
    ],
)
def test_values_in_files_are_checked_by_type_and_range(tmp_path, line, expected):
    """One line that names the file, the option, the value, and what is expected."""
    path = tmp_path / "mine.toml"
    path.write_text(line)

    for read in (read_toml, partial(read_run_toml, warn=pytest.fail)):
        with pytest.raises(UsageError) as error:
            read(path, TinyConfig)
        assert str(error.value) == f"{path}: {expected}."


def values_outside(spec) -> st.SearchStrategy:
    """Values that a field does not take, as Python and TOML have them."""
    kind = value_type(spec)
    if isinstance(kind, click.IntRange):
        below = st.integers(-(2**70), kind.min - 1)
        return below if kind.max is None else below | st.integers(kind.max + 1, 2**70)
    if isinstance(kind, click.FloatRange):
        outside = st.floats(max_value=kind.min, exclude_max=not kind.min_open)
        if kind.max is not None:
            outside |= st.floats(min_value=kind.max, exclude_min=not kind.max_open)
        return outside | st.sampled_from([math.nan, math.inf, -math.inf])
    if isinstance(kind, click.Choice):
        return letters.filter(lambda text: text not in kind.choices)
    if isinstance(kind, ByteSize):
        return letters | st.integers(-(2**70), 0)
    return letters  # of a switch


letters = st.text("abcdefxyz-", min_size=1).map(lambda text: f"w{text}")
BOUNDED = [
    pytest.param(command, config_class, spec, id=f"{command}-{spec.name}")
    for command, config_class in CONFIGS.items()
    for spec in fields(config_class)
    if type(value_type(spec)) is not type(click.STRING)
]


@pytest.mark.parametrize(("command", "config_class", "spec"), BOUNDED)
@settings(max_examples=8)
@given(data=st.data())
def test_a_value_outside_is_refused_alike_everywhere(
    tmp_path_factory, command, config_class, spec, data
):
    """By Python, TOML, a run's config.toml, the environment and the command line: one sentence."""
    value = data.draw(values_outside(spec))
    path = tmp_path_factory.getbasetemp() / "outside.toml"
    path.write_text(f"{spec.name} = {json.dumps(value) if isinstance(value, str) else value}")
    prefix = "train" if command == "doctor" else command
    variable = f"WDS_CONVNEXT_{prefix}_{spec.name}".upper()
    positional = [] if command in ("train", "eval") else ["source"]
    expected = f"expected {expectation(spec)}."
    attempts = {
        "Python": lambda: config_class(**{spec.name: value}),
        "options": lambda: config_class.of(None, {spec.name: value}),
        "--config": lambda: read_toml(path, config_class),
        "config.toml": lambda: read_run_toml(path, config_class, warn=pytest.fail),
        "environment": lambda: commands([command, *positional], standalone_mode=False),
        "command line": lambda: commands(
            [command, *positional, f"{flag_of(spec.name)}={value}"], standalone_mode=False
        ),
    }
    if spec.name in PER_CALL:
        del attempts["--config"], attempts["config.toml"]
    if python_type(spec) is bool:
        del attempts["command line"]  # a switch takes no value

    for name, attempt in attempts.items():
        env = {variable: str(value)} if name == "environment" else {}
        with pytest.raises(UsageError) as error, patch.dict(os.environ, env):
            attempt()
        assert str(error.value).endswith(expected), name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_every_field_refuses_a_value_of_another_type(config_class):
    """An object, a list; text for a number; None where there is no None."""
    for spec in fields(config_class):
        wrong = [object(), ["a"]]
        wrong += [None] if type(None) not in get_args(spec.type) else []
        wrong += ["7"] if isinstance(value_type(spec), click.IntRange | click.FloatRange) else []
        for value in wrong:
            with pytest.raises(UsageError, match=f"^{flag_of(spec.name)} .*: expected"):
                config_class(**{spec.name: value})


def test_values_become_those_of_their_field():
    """numpy's numbers, whole numbers for fractions, paths, sizes as text."""
    config = TrainConfig(epochs=np.int64(3), lr=1, mixup=np.float32(0.5), out=Path("run"))

    assert [type(value) for value in (config.epochs, config.lr, config.mixup, config.out)] == [
        int,
        float,
        float,
        str,
    ]
    assert ShardsConfig(shard_size="1.5GB").shard_size == 1_500_000_000


def test_a_function_takes_a_config_its_options_or_both():
    """Options are laid over the config; a name that is no option is refused with the nearest."""
    assert ShardsConfig.of(None, {}) == ShardsConfig()
    assert ShardsConfig.of(None, {"seed": 3}) == ShardsConfig(seed=3)
    assert ShardsConfig.of(ShardsConfig(seed=3), {"out": "x"}) == ShardsConfig(seed=3, out="x")
    with pytest.raises(UsageError, match="^num_shard: there is no such option. Did you mean num_s"):
        ShardsConfig.of(None, {"num_shard": 3})
    with pytest.raises(UsageError, match="--num-shards and --shard-size exclude each other"):
        ShardsConfig.of(ShardsConfig(num_shards=3), {"shard_size": "1GB"})


@pytest.mark.parametrize("name", PER_CALL)
def test_no_file_says_where_a_run_is_written_or_what_it_replaces(tmp_path, name):
    """Refused in a file that a user gives; a run's own config.toml is not listened to."""
    path = tmp_path / "config.toml"
    path.write_text(f'epochs = 3\n{name} = "elsewhere"\n')

    with pytest.raises(UsageError) as error:
        read_toml(path, TrainConfig)
    found = read_run_toml(path, TrainConfig, warn=pytest.fail)

    assert str(error.value) == f"{path}: {name} is of one call. Give --{name} with the command."
    assert found == {"epochs": 3}


def test_a_runs_file_of_another_version_is_read_with_a_warning(tmp_path):
    """What this version does not know is named, and left out."""
    path = tmp_path / "config.toml"
    path.write_text('epochs = 3\nfuture = "x"\n[table]\npast = 1\n')
    warnings = []

    assert read_run_toml(path, TrainConfig, warn=warnings.append) == {"epochs": 3}
    assert warnings == [f"{path}: ignored future, table, which this version has no option for."]


def test_a_misspelt_variable_is_refused(monkeypatch):
    """By every command, with the nearest; before the command does anything."""
    monkeypatch.setenv("WDS_CONVNEXT_TRAIN_BATCHSIZE", "3")

    for command in ("train", "inspect"):
        with pytest.raises(UsageError) as error:
            commands([command, *["s"] * (command == "inspect")], standalone_mode=False)
        assert str(error.value).startswith(
            "WDS_CONVNEXT_TRAIN_BATCHSIZE: no option has this variable. "
            "Did you mean WDS_CONVNEXT_TRAIN_BATCH_SIZE"
        )


def test_variables_that_take_effect_are_named(tmp_path):
    """Those of this command that nothing stronger replaces, on stderr."""
    env = {"TINY_LR": "2", "TINY_IMAGE_SIZE": "64"}

    result = CliRunner().invoke(tiny_command(tmp_path), ["--lr", "1"], env=env)

    assert result.stderr == "From the environment: TINY_IMAGE_SIZE=64\n"
    assert eval(result.stdout) == TinyConfig(lr=1.0, image_size=64)


def test_the_help_shows_a_default_of_zero_and_no_range_as_a_type():
    """And -h is --help."""
    result = CliRunner().invoke(commands, ["eval", "-h"])

    text = " ".join(result.output.split())
    assert (
        "--max-bad-samples FLOAT Share of samples that may fail to decode. [default: 0.0;" in text
    )
    assert "RANGE" not in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_readable_and_valid(path):
    """Found by its name; every key is an option, and every value passes that option's check."""
    content = read_toml(recipe_path(path.stem), TrainConfig)

    options = {parameter.name: parameter for parameter in commands.commands["train"].params}
    context = click.Context(commands.commands["train"])
    assert content
    for key, value in content.items():
        assert options[key].type_cast_value(context, value) == value, key


def test_the_articles_recipe_is_the_defaults():
    """`train` with no other option is the article's run."""
    content = read_toml(recipe_path("article"), TrainConfig)

    defaults = TrainConfig()
    assert content == {key: getattr(defaults, key) for key in content}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar",
            "--recipe cifar: no such recipe. Did you mean cifar10? Own files go to --config.",
        ),
        (
            "zzz",
            "--recipe zzz: no such recipe. There are "
            f"{', '.join(path.stem for path in RECIPES)}. Own files go to --config.",
        ),
        ("../article", "--recipe ../article: no such recipe. Did you mean article?"),
    ],
)
def test_an_unknown_recipe_names_those_there_are(name, message):
    """The nearest, or all."""
    with pytest.raises(UsageError) as error:
        recipe_path(name)

    assert str(error.value).startswith(message)


def examples_in_help() -> list[tuple[str, str]]:
    return [
        (name, line)
        for name, c in commands.commands.items()
        for line in c.examples.strip().split("\n")
    ]


@pytest.mark.parametrize(("name", "line"), examples_in_help())
def test_examples_in_the_help_are_command_lines(name, line):
    program, command, *args = shlex.split(line)

    assert (program, command) == ("wds-convnext", name)
    assert line in CliRunner().invoke(commands, [name, "-h"]).output
    commands.commands[name].make_context(name, args)  # raises where click would refuse them


def test_the_help_names_every_recipe():
    """A recipe that is added is added there, too."""
    result = CliRunner().invoke(commands, ["train", "--help"])

    assert result.exit_code == 0
    assert all(path.stem in result.output for path in RECIPES)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    shards=texts,
    val_shards=st.none() | texts,
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    mixup=st.floats(0, allow_infinity=False),
    epochs=st.integers(1),
    workers=st.none() | st.integers(0, 256),
    compile=st.none() | st.booleans(),
)
def test_a_config_reads_back_as_written(tmp_path_factory, **values):
    """Any text, number or switch; what is None is left to the default."""
    path = tmp_path_factory.getbasetemp() / "config.toml"
    config = TrainConfig(**values)

    path.write_text(format_toml(config), encoding="utf-8", newline="")

    assert TrainConfig(**read_toml(path, TrainConfig)) == config


def test_what_belongs_to_one_call_is_not_written():
    """A config read back neither resumes nor deletes a run."""
    texts = [
        format_toml(TrainConfig(shards="s", **option))
        for option in ({"resume": "runs/a"}, {"overwrite": True})
    ]

    assert all(tomllib.loads(text).keys().isdisjoint({"resume", "overwrite"}) for text in texts)


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_every_option_says_what_it_is_for(config_class):
    """A sentence of help, under a heading; options have defaults that their own check accepts."""
    for spec in fields(config_class):
        assert spec.metadata["help"].endswith("."), spec.name
        assert spec.metadata["group"], spec.name
        kind = spec.metadata["type"]
        if kind is not None and spec.default not in (None, ()):
            assert kind.convert(spec.default, None, None) == spec.default, spec.name


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("500MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        ("2 k", 2000),
        ("1t", 10**12),
    ],
)
def test_a_size_is_written_as_people_write_it(text, num_bytes):
    """Decimal units."""
    assert ByteSize().convert(text, None, None) == num_bytes


@pytest.mark.parametrize("text", ["", "big", "1.2.3GB", "MB", "-5MB", "5XB", "0MB", "9" * 400])
def test_what_is_no_size_is_refused(text):
    """With an example."""
    with pytest.raises(click.BadParameter, match="is not a size; write e.g. 500MB"):
        ByteSize().convert(text, None, None)
