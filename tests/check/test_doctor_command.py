"""The doctor as a command: it takes what train takes, and tells by its exit code."""

import json
import subprocess
import sys

import pytest
from test_doctor import SMALL, plain, write_split

from wds_convnext.check.doctor import doctor
from wds_convnext.check.machine import MACHINE_RULES
from wds_convnext.check.rules import DATA_RULES
from wds_convnext.cli import commands, main
from wds_convnext.errors import ShardError, UsageError


def test_what_train_refuses_the_doctor_refuses(tmp_path):
    """No such shards, no shards, shards twice, no such model, a size without a step: one line."""
    write_split(tmp_path, "train", plain(0))

    with pytest.raises(ShardError, match="no shard matches"):
        doctor(str(tmp_path / "gone.tar"), quiet=True)
    with pytest.raises(UsageError, match="--shards is missing"):
        doctor(quiet=True)
    with pytest.raises(UsageError, match="exclude each other"):
        doctor(str(tmp_path), shards=str(tmp_path), quiet=True)
    with pytest.raises(UsageError, match="no such model. Did you mean convnext_base"):
        doctor(str(tmp_path), model="convnext_bsae", **SMALL, batch_size=2, quiet=True)
    with pytest.raises(UsageError, match="no step of the run's 120 has 8 px"):
        doctor(
            str(tmp_path),
            **SMALL | {"image_size": 32},
            batch_size=2,
            image_size_schedule="0:8,0.001:32",
            quiet=True,
        )


@pytest.mark.slow
def test_the_command_takes_the_options_of_train_and_tells_by_its_exit_code(
    capsys, shards, tmp_path
):
    """Text: a line per rule that finds nothing, three for a finding. JSON says the same."""
    args = ["--shards", str(shards / "train.json"), "--model", "test_convnext", "--lr", "0.001"]
    args += ["--image-size", "32", "--batch-size", "4", "--workers", "0", "--jobs", "1"]
    args += ["--device", "cpu", "--out", str(tmp_path)]

    with pytest.raises(SystemExit) as text_stop:
        main(["doctor", *args])
    text = capsys.readouterr().out
    with pytest.raises(SystemExit) as json_stop:
        main(["doctor", *args, "--json"])
    report = json.loads(capsys.readouterr().out)

    assert text_stop.value.code == json_stop.value.code == 1
    lines = text.splitlines()
    assert lines[0].startswith("pictures: 50 train, 13 validation, 11 test; 4 classes")
    starts = [line[:4] for line in lines[3:-2]]
    assert starts.count("!!  ") == 1 and starts.count("    ") == 2
    assert starts.count("ok  ") == len(DATA_RULES) + len(MACHINE_RULES) - 1
    assert max(map(len, lines)) <= 80
    assert report["ok"] is False
    assert [c["rule"] for c in report["checks"] if c["findings"]] == ["image_sizes"]
    assert list(tmp_path.iterdir()) == []


def test_variables_of_train_count_and_those_of_doctor_are_refused(monkeypatch):
    """What train would take from the environment is looked at."""
    monkeypatch.setenv("WDS_CONVNEXT_TRAIN_LR", "fast")
    with pytest.raises(UsageError, match="WDS_CONVNEXT_TRAIN_LR = fast: expected a number"):
        commands(["doctor", "data"], standalone_mode=False)

    monkeypatch.setenv("WDS_CONVNEXT_TRAIN_LR", "0.1")
    monkeypatch.setenv("WDS_CONVNEXT_DOCTOR_LR", "0.1")
    with pytest.raises(UsageError, match="WDS_CONVNEXT_DOCTOR_LR: no option has this variable"):
        commands(["doctor", "data"], standalone_mode=False)


def test_torch_is_imported_after_the_rules_about_data():
    """By the modules of these rules it is not, so a finding in the data costs no wait."""
    code = "import sys, wds_convnext.check.doctor; print('torch' in sys.modules)"

    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout

    assert printed == b"False\n"
