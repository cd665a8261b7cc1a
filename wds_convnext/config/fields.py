"""What the config dataclasses are made of: fields that are also options, and types of values."""

import math
import re
from dataclasses import field
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of numbers without nan, which lies in all of click's, and without infinity."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


FRACTION = FiniteRange(0, 1)
COUNT = click.IntRange(min=1)
NON_NEGATIVE = FiniteRange(min=0)
POSITIVE = FiniteRange(min=0, min_open=True)
SEED = click.IntRange(0, 2**63 - 1)
WORKERS = click.IntRange(0, 256)
IMAGE_SIZE = click.IntRange(8, 4096)


def option(default: Any, help: str, *, group: str, type: Any = None, flag_value=None) -> Any:
    """A dataclass field that is also a click option."""
    metadata = {"help": help, "group": group, "type": type, "flag_value": flag_value}
    return field(default=default, metadata=metadata, kw_only=True)


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 500MB, 1.5GB, 4096; decimal units."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([\d.]+)\s*([kMGT]?)i?B?", value.strip(), re.IGNORECASE)
        try:
            power = " kmgt".index(match[2].lower() or " ")
            return int(float(match[1]) * 1000**power)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no size. Write 500MB or 1.5GB.", param, ctx)
