"""From config dataclasses to click options, help under headings, and TOML.

Precedence is click's own: command line, then environment (`WDS_CONVNEXT_TRAIN_LR`), then its
`default_map`, which TOML files fill, then the field's default.
"""

import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from importlib import resources
from pathlib import Path
from textwrap import indent
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.types import OptionHelpExtra

from wds_convnext import progress
from wds_convnext.config.fields import (
    Config,
    FiniteRange,
    check_value,
    flag_of,
    is_repeated,
    python_type,
    refusal,
    value_type,
)
from wds_convnext.config.remote import REMOTE
from wds_convnext.door import read_bounded
from wds_convnext.errors import UsageError, did_you_mean, listing, printable
from wds_convnext.urls import redacted

_MAX_TOML = 1 << 20  # bytes
# TOML layers, weakest first.
LAYERS = ("recipe", "config")
# Where a run is written and whether it replaces another: no file may say so.
PER_CALL = ("out", "resume", "overwrite")

Command = TypeVar("Command", bound=Callable[..., Any])


def add_options(config_class: type[Config]) -> Callable[[Command], Command]:
    """A decorator that gives a click command one option per field of a config dataclass."""

    def decorate(command: Command) -> Command:
        for spec in reversed(fields(config_class)):
            command = _click_option(spec)(command)
        return command

    return decorate


def _click_option(spec: Field) -> Callable[[Command], Command]:
    settings: dict[str, Any] = {
        "help": spec.metadata["help"],
        "default": spec.default,
        "show_default": spec.default not in (None, ()) and spec.default is not False,
        "cls": ConfigOption,
        "group": spec.metadata["group"],
        "spec": spec,
    }
    flag = flag_of(spec.name)
    if python_type(spec) is bool:
        both = flag if spec.default is False else f"{flag}/{flag.replace('--', '--no-', 1)}"
        return click.option(both, spec.name, is_flag=True, **settings)
    if spec.metadata["flag_value"] is not None:
        settings |= {"is_flag": False, "flag_value": spec.metadata["flag_value"]}
    if is_repeated(spec):
        settings["multiple"] = True
    kind = value_type(spec)
    # INTEGER, not INTEGER RANGE: the range itself stands after the help text.
    metavar = {click.IntRange: "INTEGER", FiniteRange: "FLOAT"}.get(type(kind))
    return click.option(flag, spec.name, type=kind, metavar=metavar, **settings)


class GroupedOption(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class ConfigOption(GroupedOption):
    """An option for a config's field, which refuses a value in the config's own words."""

    def __init__(self, *args: Any, spec: Field, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spec = spec

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        extra = super().get_help_extra(ctx)
        if isinstance(self.type, click.IntRange | click.FloatRange):
            extra.pop("range", None)
            if words := _range_in_words(self.type):
                extra["range"] = words
        return extra

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter:
            where = flag_of(self.name)
            if ctx.get_parameter_source(self.name) is ParameterSource.ENVIRONMENT:
                where = f"{_variable(ctx, self)} ="
            raise UsageError(refusal(self.spec, value, where)) from None


def _range_in_words(kind: click.IntRange | click.FloatRange) -> str:
    """ "8 to 4096", "at least 1", "more than 0"; nothing where the range is a formality."""
    low, high = kind.min, kind.max
    if high is None:
        return f"{'more than' if kind.min_open else 'at least'} {low}"
    if high > 2**31:
        return ""
    return f"{low} to {f'less than {high}' if kind.max_open else high}"


class GroupedCommand(click.Command):
    """A command whose help lists its options under their headings, and its examples last.

    Environment variables with its prefix are named where they take effect, and refused where they
    mean nothing.
    """

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write(indent(self.examples.strip(), "  ") + "\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True  # they are refused here, with advice
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            raise in_one_line(error, ctx) from None
        if ctx.args:
            what = "argument" if len(ctx.args) == 1 else "arguments"
            raise UsageError(
                f"{listing(ctx.args, limit=3)}: {len(ctx.args)} {what} too many. If the shell made "
                "them of a pattern, quote it: 'data/train-{000..012}.tar'."
            )
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        check_environment(ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # the text has the rest
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for last in (REMOTE, "Other"):
            groups[last] = groups.pop(last, [])
        for group, records in groups.items():
            if not records:
                continue
            with formatter.section(group):
                formatter.write_dl(records)


def in_one_line(error: click.UsageError, ctx: click.Context) -> UsageError:
    """What click found wrong with a command's arguments, in our words where we have better."""
    text = error.format_message()
    if isinstance(error, click.NoSuchOption):
        known = [name for parameter in ctx.command.get_params(ctx) for name in parameter.opts]
        text = f"{error.option_name}: no such option.{did_you_mean(error.option_name, known)}"
    return UsageError(f"{text} See {ctx.command_path} --help.")


def warn(text: str) -> None:
    """A line on stderr; of a run's many processes, from the first."""
    if os.environ.get("RANK", "0") == "0":
        progress.warn(printable(text, limit=2000))


def _variable(ctx: click.Context, parameter: click.Parameter) -> str:
    return f"{ctx.auto_envvar_prefix}_{parameter.name}".upper()


def check_environment(ctx: click.Context) -> None:
    """Name the environment variables that set an option of this command, on stderr.

    Raises:
        UsageError: if a variable begins as ours do, and is none of any command.
    """
    root = ctx.find_root()
    contexts = [root, ctx]
    for name, command in getattr(root.command, "commands", {}).items():
        settings = command.context_settings
        contexts.append(click.Context(command, parent=root, info_name=name, **settings))
    known = {
        _variable(context, parameter): parameter
        for context in contexts
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Option)
    }
    for name in sorted(os.environ):
        if name.startswith(f"{root.auto_envvar_prefix}_") and name not in known:
            raise UsageError(f"{name}: no option has this variable.{did_you_mean(name, known)}")
    used = [
        f"{_variable(ctx, parameter)}={redacted(os.environ[_variable(ctx, parameter)])}"
        for parameter in ctx.command.get_params(ctx)
        if ctx.get_parameter_source(parameter.name) is ParameterSource.ENVIRONMENT
    ]
    if used:
        warn(f"From the environment: {' '.join(used)}")


def toml_layer(
    config_class: type[Config], path_of: Callable[[str], Path]
) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """A callback for an eager option, named as in LAYERS, whose value leads to a TOML file."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            layers = ctx.meta.setdefault("wds_convnext.layers", {})
            layers[parameter.name] = read_toml(path_of(value), config_class)
            ctx.default_map = {
                key: option for name in LAYERS for key, option in layers.get(name, {}).items()
            }
        return value

    return callback


def read_toml(path: Path, config_class: type[Config]) -> dict[str, Any]:
    """The options in a TOML file that a user wrote.

    Raises:
        UsageError: if it cannot be read, has a key that is no option of the command or that only
            the command line may give, or a value that its option does not take.
    """
    content = _parse_toml(path)
    specs = {spec.name: spec for spec in fields(config_class)}
    for key in content:
        if key not in specs:
            hint = did_you_mean(key, specs)
            raise UsageError(f"{path}: no option is called {key!r}.{hint} See --help.")
        if key in PER_CALL:
            raise UsageError(f"{path}: {key} is of one call. Give {flag_of(key)} with the command.")
    return _check_values(path, content, specs)


def read_run_toml(
    path: Path, config_class: type[Config], *, warn: Callable[[str], None]
) -> dict[str, Any]:
    """The options in a run's config.toml, which an older or a newer version may have written.

    What this version does not know is left out with a warning; so is what is of one call.

    Raises:
        UsageError: if it cannot be read, or has a value that its option does not take.
    """
    content = _parse_toml(path)
    specs = {spec.name: spec for spec in fields(config_class) if spec.name not in PER_CALL}
    unknown = [key for key in content if key not in specs and key not in PER_CALL]
    if unknown:
        warn(f"{path}: ignored {listing(unknown)}, which this version has no option for.")
    known = {key: value for key, value in content.items() if key in specs}
    return _check_values(path, known, specs)


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded(path, max_bytes=_MAX_TOML).decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Give a TOML file of options.") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path}: not TOML: {error}.") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply. Options are lines of key = value.") from None


def _check_values(path: Path, content: dict, specs: dict[str, Field]) -> dict[str, Any]:
    return {
        key: check_value(specs[key], value, f"{path}: {key} =") for key, value in content.items()
    }


def recipe_path(name: str) -> Path:
    """The file of a recipe that ships with the package.

    Raises:
        UsageError: if there is no such recipe.
    """
    folder = Path(str(resources.files("wds_convnext") / "recipes"))
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        hint = did_you_mean(name, known) or f" There are {', '.join(known)}."
        raise UsageError(f"--recipe {name}: no such recipe.{hint} Own files go to --config.")
    return folder / f"{name}.toml"


def format_toml(config: Config) -> str:
    """A config as TOML that `--config` reads back; options that are not set are left out."""
    lines = []
    for name, value in asdict(config).items():
        if name in PER_CALL or value in (None, ()):
            continue
        if isinstance(value, str | tuple):
            value = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        elif isinstance(value, bool):
            value = str(value).lower()
        lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"
