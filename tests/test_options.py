"""Where options come from: command line over environment, over file, over recipe, over default."""

from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from wds_convnext.cli import commands
from wds_convnext.config import Config, option
from wds_convnext.errors import UsageError
from wds_convnext.options import GroupedCommand, add_options, toml_layer


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
