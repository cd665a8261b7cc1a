"""From config dataclasses to click options, help under headings, and TOML.

Precedence is click's own: command line, then environment (`WDS_CONVNEXT_TRAIN_LR`), then its
`default_map`, which TOML files fill, then the field's default.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import click

from wds_convnext.errors import UsageError, did_you_mean

# TOML layers, weakest first.
LAYERS = ("recipe", "config")


def add_options(config_class: type) -> Callable:
    """A decorator that gives a click command one option per field of a config dataclass."""

    def decorate(command):
        for spec in reversed(fields(config_class)):
            command = _click_option(spec)(command)
        return command

    return decorate


def _click_option(spec: Field) -> Callable:
    name = spec.name.replace("_", "-")
    types = [t for t in get_args(spec.type) if t is not type(None)]
    value_type = types[0] if get_origin(spec.type) is UnionType else spec.type
    settings = {
        "help": spec.metadata["help"],
        "default": spec.default,
        "show_default": spec.default not in (None, False),
        "cls": GroupedOption,
        "group": spec.metadata["group"],
    }
    if value_type is bool:
        both = f"--{name}" if spec.default is False else f"--{name}/--no-{name}"
        return click.option(both, spec.name, is_flag=True, **settings)
    if spec.metadata["flag_value"] is not None:
        settings |= {"is_flag": False, "flag_value": spec.metadata["flag_value"]}
    return click.option(
        f"--{name}", spec.name, type=spec.metadata["type"] or value_type, **settings
    )


class GroupedOption(click.Option):
    """An option that knows under which heading of the help it stands."""

    def __init__(self, *args, group: str = "Options", **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        groups["Other"] = groups.pop("Other", [])  # last
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def toml_layer(config_class: type, path_of: Callable[[str], Path]) -> Callable:
    """A callback for an eager option, named as in LAYERS, whose value leads to a TOML file."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: str | None):
        if value is not None:
            layers = ctx.meta.setdefault("wds_convnext.layers", {})
            layers[parameter.name] = read_toml(path_of(value), config_class)
            # As text, as on the command line: click would cut a number 1.5 for an int to 1.
            ctx.default_map = {
                k: str(v) for name in LAYERS for k, v in layers.get(name, {}).items()
            }
        return value

    return callback


def read_toml(path: Path, config_class: type) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        UsageError: if it cannot be read, or has a key that is no option of the command.
    """
    known = [spec.name for spec in fields(config_class)]
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Give a TOML file of options.") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path}: not TOML: {error}.") from None
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known)
            raise UsageError(f"{path}: no option is called {key!r}.{hint} See --help.")
    return content


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


def format_toml(config) -> str:
    """A config as TOML that `--config` reads back; options that are None are left out."""
    lines = []
    for name, value in asdict(config).items():
        if name in ("out", "resume", "overwrite") or value is None:
            continue
        if isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        elif isinstance(value, bool):
            value = str(value).lower()
        lines.append(f"{name} = {value}")
    return "\n".join(lines) + "\n"
