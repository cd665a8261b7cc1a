"""The comparison of training steps runs on a CPU and counts what it says it counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent / "tools" / "bench_step.py"


def test_the_table_has_every_contender_and_only_ours_never_syncs(tmp_path):
    """One round of one step each; what a CPU cannot tell is n/a in the table, null in JSON."""
    arguments = ["--device", "cpu", "--rounds", 1, "--steps", 1, "--json", tmp_path / "steps.json"]
    result = subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    [content] = json.loads((tmp_path / "steps.json").read_text())["results"]
    syncs = {row["contender"]: row["syncs"] for row in content["rows"]}

    assert list(syncs) == ["article", "timm, AdamP", "timm, AdamW", "ours"]
    assert [name for name in syncs if syncs[name] == 0] == ["ours"]
    assert all(row["mfu"] is None and row["optimizer_ms"] > 0 for row in content["rows"])
    assert "| ours |" in result.stdout and "n/a" in result.stdout
