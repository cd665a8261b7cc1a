"""An option's value is checked alike wherever it comes from, and becomes that of its field."""

import json
import math
import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import click
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_options import TinyConfig

from wds_convnext.cli import commands
from wds_convnext.config import (
    BenchConfig,
    ByteSize,
    DoctorConfig,
    EvalConfig,
    ExplainConfig,
    IndexConfig,
    InspectConfig,
    ShardsConfig,
    TrainConfig,
    VerifyConfig,
)
from wds_convnext.config.fields import expectation, flag_of, python_type, value_type
from wds_convnext.errors import UsageError
from wds_convnext.options import PER_CALL, read_run_toml, read_toml

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


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["--lr", "--min-crop", "--ema-decay", "--mixup", "--hflip"])
def test_numbers_are_finite(name, value):
    """A nan lies in every range of click's, and a run with it would train on nothing."""
    with pytest.raises(UsageError, match=f"^{name} {value}: expected a number [^.]*[0-9]"):
        commands(["train", "--shards", "s", name, value], standalone_mode=False)


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
