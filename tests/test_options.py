"""Options: one per field; command line over environment, over file, over recipe, over default."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import wds_convnext
from wds_convnext.cli import commands
from wds_convnext.config import BenchConfig, ByteSize, EvalConfig, ShardsConfig, TrainConfig, option
from wds_convnext.errors import UsageError
from wds_convnext.options import (
    GroupedCommand,
    add_options,
    format_toml,
    read_toml,
    recipe_path,
    toml_layer,
)

RECIPES = sorted((Path(wds_convnext.__file__).parent / "recipes").glob("*.toml"))
CONFIGS = [TrainConfig, EvalConfig, ShardsConfig, BenchConfig]


@dataclass(frozen=True)
class TinyConfig:
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
    return eval(result.output)


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
    result = CliRunner().invoke(commands, ["train", "--shards", "s", name, value])

    assert result.exit_code == 2
    assert "is not in the range" in result.output or "no finite number" in result.output


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
  --lr FLOAT RANGE  How fast.  [default: 0.5; x>=0]

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
    "line",
    [
        'lr = "fast"',
        "lr = -1",
        "lr = true",
        'image_size = "large"',
        "image_size = 1.5",
        "workers = [2]",
        "quiet = 3",
    ],
)
def test_values_in_files_are_checked_as_on_the_command_line(tmp_path, line):
    """Types and ranges; the message names the option."""
    (tmp_path / "mine.toml").write_text(line)

    result = CliRunner().invoke(
        tiny_command(tmp_path), ["--shards", "s", "--config", f"{tmp_path}/mine.toml"]
    )

    assert result.exit_code == 2
    assert f"Invalid value for '--{line.split()[0].replace('_', '-')}'" in result.output


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

    defaults = {spec.name: spec.default for spec in fields(TrainConfig)}
    assert content == {key: defaults[key] for key in content}


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


def test_the_help_names_every_recipe():
    """A recipe that is added is added there, too."""
    result = CliRunner().invoke(commands, ["train", "--help"])

    assert result.exit_code == 0
    assert all(path.stem in result.output for path in RECIPES)


texts = st.text(st.characters(exclude_categories=["Cs"]))
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    shards=texts,
    val_shards=st.none() | texts,
    lr=finite,
    mixup=finite,
    epochs=st.integers(),
    workers=st.none() | st.integers(),
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
    text = format_toml(TrainConfig(shards="s", resume="runs/a", overwrite=True))

    assert tomllib.loads(text).keys().isdisjoint({"resume", "overwrite"})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_option_says_what_it_is_for(config_class):
    """A sentence of help, under a heading; options have defaults that their own check accepts."""
    for spec in fields(config_class):
        assert spec.metadata["help"].endswith("."), spec.name
        assert spec.metadata["group"], spec.name
        kind = spec.metadata["type"]
        if kind is not None and spec.default is not None:
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


@pytest.mark.parametrize("text", ["", "big", "1.2.3GB", "MB", "-5MB", "5XB"])
def test_what_is_no_size_is_refused(text):
    """With an example."""
    with pytest.raises(click.BadParameter, match="Write 500MB or 1.5GB"):
        ByteSize().convert(text, None, None)
