"""Damaged and forged files of every kind end in a value or in one line, at once: a short run."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import HANG_S

FUZZ = Path(__file__).parents[1] / "tools" / "fuzz.py"


def test_no_damaged_file_is_a_traceback_or_a_hang():
    """The cases are the same each time; the tool runs more of them for longer."""
    command = [sys.executable, FUZZ, "--iterations", "25", "--seed", "7", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)

    found = json.loads(done.stdout)
    assert len(found) == 15
    for kind in found:
        assert kind["iterations"] == 25, kind
        assert kind["exceptions"] == kind["hangs"] == [], kind
    assert done.returncode == 0
