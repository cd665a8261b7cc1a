"""The help: every option under its heading with a sentence, every example a command line."""

import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from click.testing import CliRunner
from conftest import HANG_S
from test_cli import call
from test_option_values import CONFIGS
from test_options import tiny_command

from wds_convnext.cli import commands


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


def test_the_help_shows_a_default_of_zero_and_no_range_as_a_type():
    """And -h is --help."""
    result = CliRunner().invoke(commands, ["eval", "-h"])

    text = " ".join(result.output.split())
    assert (
        "--max-bad-samples FLOAT Share of samples that may fail to decode. [default: 0.0;" in text
    )
    assert "RANGE" not in text


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


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_every_option_says_what_it_is_for(config_class):
    """A sentence of help, under a heading; options have defaults that their own check accepts."""
    for spec in fields(config_class):
        assert spec.metadata["help"].endswith("."), spec.name
        assert spec.metadata["group"], spec.name
        kind = spec.metadata["type"]
        if kind is not None and spec.default not in (None, ()):
            assert kind.convert(spec.default, None, None) == spec.default, spec.name


def test_help_is_complete_grouped_and_instant(capsys):
    """Every heading; and in a process of its own it takes no torch."""
    code, out, _ = call(capsys, "train", "--help")
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom wds_convnext.cli import commands\n"
            "commands(['train', '--help'], standalone_mode=False)\n"
            "print([m for m in ('torch', 'timm', 'webdataset', 'pyarrow') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )

    assert code == 0
    for heading in ("Data:", "Augmentation:", "Model:", "Optimization:", "Machine:", "Run:"):
        assert heading in out
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_fits_80_columns(capsys, monkeypatch):
    """Each with its whole sentence."""
    monkeypatch.setenv("COLUMNS", "80")

    code, out, _ = call(capsys, "--help")

    assert code == 0 and "  predict  " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.partition("Commands:")[2]
