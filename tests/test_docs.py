"""What the documents print is run as it is printed; what they point to is there."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HANG_S, encode_image
from preloaded import run_preloaded

from wds_convnext.conversion import convert
from wds_convnext.shards.opening import open_dataset

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "data.md"  # has a test of its own
    for number, code in enumerate(python_blocks(page))
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


def test_the_folder_that_the_data_page_makes_converts(tmp_path, monkeypatch):
    """Its splits, classes and images are those of the class folders."""
    monkeypatch.chdir(tmp_path)
    names = ["cat", "dog", "cat"]
    for number, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(encode_image(number))

    exec(python_blocks(ROOT / "docs" / "data.md")[0], {})
    convert("pictures", out="data", jobs=1, shuffle=False, quiet=True)

    dataset = open_dataset("data/train.json")
    found = [(dataset.class_names[sample.label], sample.image) for sample in dataset]
    assert found == [("cat", encode_image(0)), ("cat", encode_image(2)), ("dog", encode_image(1))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
