"""What the documents print is run as it is printed; what they point to is there."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HANG_S, encode_image, write_parquet, write_tar
from parquet_sets import image_table, save_to_disk, sorted_rows
from preloaded import run_preloaded

from wds_convnext.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "using.md"  # has a test of its own
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


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The sources that the data page names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "pictures", "train", [5])
    for number, name in enumerate(["cat", "dog", "cat"]):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(encode_image(number))
    shutil.make_archive("photos", "zip", ".", "photos")
    shutil.make_archive("photos", "gztar", ".", "photos")
    members = [(f"{i}.{kind}", data) for i in range(2)
               for kind, data in (("jpg", encode_image(i)), ("cls", str(i).encode()))]  # fmt: skip
    (tmp_path / "others").mkdir()
    write_tar(tmp_path / "others" / "train-000.tar", members)
    write_parquet(tmp_path / "datasets--owner--insects/snapshots/0123", "train", [4])
    save_to_disk(tmp_path / "saved", image_table(*sorted_rows(4)))
    (tmp_path / "datasets--owner--insects/refs").mkdir()
    (tmp_path / "datasets--owner--insects/refs/main").write_text("0123")
    tables = tmp_path / "tables"
    shutil.copytree(tmp_path / "photos", tables / "photos")
    (tables / "labels.csv").write_text("image,label\nphotos/cat/0.jpg,cat\nphotos/dog/1.jpg,dog\n")
    (tables / "train.jsonl").write_text('{"file": "photos/cat/0.jpg", "species": "cat"}\n')


def test_the_commands_of_the_data_page_run_as_printed(sources, capsys):
    """Every source is converted and verified, and nothing is found."""
    page = (ROOT / "docs" / "data.md").read_text()
    blocks = re.findall(r"```\n(wds-convnext shards .*?)```", page, re.DOTALL)
    for line in "".join(blocks).splitlines():
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(line, comments=True)[1:], "--jobs", "1"])
        assert ended.value.code == 0, capsys.readouterr().err
    assert "wds-convnext verify" in "".join(blocks)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
