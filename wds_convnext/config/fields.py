"""What the config dataclasses are made of: fields that are also options, and types of values.

A config checks its values when it is made, whether they come from the command line, the
environment, a TOML file or Python: a config that exists is one that its command accepts.
"""

import json
import keyword
import math
import numbers
import operator
import os
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType
from typing import Any, Self, get_args

import click

from wds_convnext.errors import UsageError, did_you_mean
from wds_convnext.urls import redacted

# rand, rand-m9, rand-m9-n2: magnitude 0 to 30, 1 to 9 operations.
RAND_AUGMENT = re.compile(r"rand(?:-m([12]?\d|30))?(?:-n([1-9]))?")


class FiniteRange(click.FloatRange):
    """A range of numbers without nan, which lies in all of click's, and without infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Channels(click.ParamType):
    """Three numbers, of red, green and blue in [0, 1]: 0.485,0.456,0.406."""

    name = "r,g,b"
    expected = "three numbers, e.g. 0.5,0.5,0.5"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r} is not three numbers; write e.g. 0.5,0.5,0.5", param, ctx)
        return ",".join(f"{number:.9g}" for number in numbers)


class AutoAugment(click.ParamType):
    """An augmentation policy: none, trivial, 3a, or RandAugment as timm writes it."""

    name = "policy"
    expected = "none, trivial, 3a or rand-m9-n2 (magnitude 0 to 30, 1 to 9 operations)"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("none", "trivial", "3a") and not RAND_AUGMENT.fullmatch(value):
            self.fail(f"{value!r} is no policy", param, ctx)
        return value


class KeyValue(click.ParamType):
    """An argument for a function by its name: KEY=VALUE, the value a Python literal or text."""

    name = "key=value"
    expected = "KEY=VALUE, e.g. drop_rate=0.2; in TOML and Python a list of these"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        key, separator, _ = value.partition("=")
        if not separator or not key.isidentifier() or keyword.iskeyword(key):
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return value


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 500MB, 1.5GB, 4096; decimal units."""

    name = "size"
    expected = "a size, e.g. 500MB"

    def convert(
        self, value: int | str, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            value = str(value)
        match = re.fullmatch(r"([\d.]+)\s*([kMGT]?)i?B?", value.strip(), re.IGNORECASE)
        number, unit = match.groups() if match else ("0", "")
        try:
            num_bytes = int(float(number) * 1000 ** " kmgt".index(unit.lower() or " "))
        except (ValueError, OverflowError):
            num_bytes = 0
        if num_bytes < 1:
            self.fail(f"{value!r} is not a size; write e.g. 500MB", param, ctx)
        return num_bytes


class PartOf(click.ParamType):
    """One of some equal parts, as 3/16; the first is 1."""

    name = "k/n"
    expected = "one of several parts, from 1/16 to 16/16"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
        number, of = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= of:
            self.fail(f"{value!r} is no part; write e.g. 3/16, from 1/16 to 16/16", param, ctx)
        return f"{number}/{of}"


FRACTION = FiniteRange(0, 1)
SHARE = FiniteRange(0, 1, min_open=True, max_open=True)
COUNT = click.IntRange(min=1)
NON_NEGATIVE = FiniteRange(min=0)
POSITIVE = FiniteRange(min=0, min_open=True)
SEED = click.IntRange(0, 2**63 - 1)
WORKERS = click.IntRange(0, 256)
IMAGE_SIZE = click.IntRange(8, 4096)
QUALITY = click.IntRange(1, 100)
DECODER = click.Choice(["auto", "nvimgcodec", "simplejpeg", "pillow"])

_PLAIN_TYPES = {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}


def option(
    default: Any,
    help: str,
    *,
    group: str,
    type: click.ParamType | None = None,
    flag_value: str | None = None,
    is_output: bool = False,
) -> Any:
    """A dataclass field that is also a click option; one whose default is () may be repeated.

    Args:
        is_output: something is written to the path that it holds. A URL is refused: without that,
            `s3://bucket/run` would be a folder `s3:` in the working directory.
    """
    metadata = {
        "help": help,
        "group": group,
        "type": type,
        "flag_value": flag_value,
        "is_output": is_output,
    }
    return field(default=default, metadata=metadata, kw_only=True)


def flag_of(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def python_type(spec: Field) -> type:
    """bool, int, float or str: that of a field's values, None aside."""
    parts = (*get_args(spec.type), spec.type)
    return next(part for part in parts if isinstance(part, type) and part is not NoneType)


def is_repeated(spec: Field) -> bool:
    """Whether an option may be given several times; its value is then a tuple."""
    return isinstance(spec.default, tuple)


def value_type(spec: Field) -> click.ParamType:
    """The click type that converts and checks a field's values."""
    return spec.metadata["type"] or _PLAIN_TYPES[python_type(spec)]


@dataclass(frozen=True)
class Config:
    """Base of the configs. Making one checks each value, and converts it to its field's type.

    Raises:
        UsageError: if a value is of another type or outside its range.
    """

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            object.__setattr__(self, spec.name, check_value(spec, value, flag_of(spec.name)))

    @classmethod
    def of(cls, config: Self | None, options: dict[str, Any]) -> Self:
        """The config that a public function was given: whole, as options by name, or both.

        Raises:
            UsageError: if an option has no such name, or its value is refused.
        """
        known = [spec.name for spec in fields(cls)]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f" There are {', '.join(known)}."
                raise UsageError(f"{name}: there is no such option.{hint}")
        # Not replace(cls(), …): options that follow from others, as warm-up, would be set already.
        return cls(**options) if config is None else replace(config, **options)


def check_value(spec: Field, value: Any, where: str) -> Any:
    """A value from Python or TOML as a field holds it.

    Args:
        where: what the message names before the value; `--lr`, or `mine.toml: lr =`.
    Raises:
        UsageError: if it is of another type or outside the field's range.
    """
    if value is None and type(None) in get_args(spec.type):
        return None
    if is_repeated(spec):
        if not isinstance(value, list | tuple):
            raise UsageError(refusal(spec, value, where))
        return tuple(_check_one(spec, part, where) for part in value)
    return _check_one(spec, value, where)


def _check_one(spec: Field, value: Any, where: str) -> Any:
    kind, plain = value_type(spec), python_type(spec)
    try:
        if isinstance(kind, ByteSize) and isinstance(value, str):
            return kind.convert(value, None, None)
        value = kind.convert(_CASTS[plain](value), None, None)
        if spec.metadata["is_output"] and re.match(r"[A-Za-z][\w.+@-]+:/", value):
            raise ValueError(value)
        return value
    except (TypeError, ValueError, OverflowError, click.BadParameter):
        raise UsageError(refusal(spec, value, where)) from None


def refusal(spec: Field, value: Any, where: str) -> str:
    """The sentence that refuses a value: where, what was found, what is expected."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # nested thousands deep, in itself, or huge
        text = f"({type(value).__name__})"
    text = redacted(text)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, str) and (not text.strip() or not text.isprintable()):
        text = repr(text)
    return f"{where} {text}: expected {expectation(spec)}."


def expectation(spec: Field) -> str:
    """What a field takes, as a phrase: "a number > 0", "auto, bf16, fp16 or off"."""
    kind = value_type(spec)
    if expected := getattr(kind, "expected", None):  # our own types say it themselves
        return str(expected)
    if spec.metadata["is_output"]:
        return "a local path, since nothing is written to remote stores. Copy it there afterwards"
    if isinstance(kind, click.Choice):
        return f"{', '.join(kind.choices[:-1])} or {kind.choices[-1]}"
    if isinstance(kind, click.IntRange | click.FloatRange):
        noun = "an integer" if isinstance(kind, click.IntRange) else "a number"
        if None not in (kind.min, kind.max) and not (kind.min_open or kind.max_open):
            return f"{noun} from {kind.min} to {kind.max}"
        low = f"{'>' if kind.min_open else '>='} {kind.min}" if kind.min is not None else ""
        high = f"{'<' if kind.max_open else '<='} {kind.max}" if kind.max is not None else ""
        return f"{noun} {' and '.join(filter(None, (low, high)))}"
    nouns = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return nouns[python_type(spec)]


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _as_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if operator.index(value).bit_length() > 63:
        raise OverflowError
    return operator.index(value)


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


# Strict, where click takes 1.5 for the integer 1 and "no" for a true value.
_CASTS: dict[type, Callable[[Any], Any]] = {
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: os.fspath,
}
