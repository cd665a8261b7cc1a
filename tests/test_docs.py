"""What the documents print is run as it is printed; what they point to is there."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HANG_S
from preloaded import run_preloaded

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the examples have no main guard")
@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run_as_printed(code, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")

    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    result = run_preloaded(["-c", code], cwd=tmp_path, env=environment, timeout=HANG_S)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
