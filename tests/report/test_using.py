"""The commands and the program of docs/using.md, run as they are printed."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import encode_image

from wds_convnext.cli import commands

PAGE = Path(__file__).parents[2] / "docs" / "using.md"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture
def place(trained_run, shards, tmp_path, monkeypatch) -> Path:
    """The folder that the page speaks of."""
    shutil.copytree(shards, tmp_path / "data")
    for name in ("holiday", "photos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(encode_image(1))
    (tmp_path / "cat.jpg").write_bytes(encode_image(2))
    with zipfile.ZipFile(tmp_path / "album.zip", "w") as archive:
        archive.writestr("1.jpg", encode_image(3))
    for name in ("big", "small"):
        shutil.copytree(trained_run, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WDS_CONVNEXT_PREDICT_WORKERS", "0")
    return tmp_path


def test_the_commands_run_as_printed(place):
    """One after another, in order; a pipe's first part in a shell."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    assert len(lines) >= 3

    for line in lines:
        *before, command = line.split(" | ")
        piped = None
        if before:
            piped = subprocess.run(before[0], shell=True, check=True, capture_output=True).stdout
        name, *arguments = shlex.split(command, comments=True)
        result = CliRunner().invoke(commands, arguments, input=piped)
        assert (name, result.exit_code) == ("wds-convnext", 0), f"{line}: {result.output}"


@pytest.mark.skipif(sys.platform != "linux", reason="the examples have no main guard")
def test_the_program_runs_as_printed(place, capsys):
    (code,) = blocks("python")

    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})

    assert len(capsys.readouterr().out.splitlines()) == 2
