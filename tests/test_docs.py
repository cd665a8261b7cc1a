"""What the documents print is run as it is printed; what they point to is there."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HANG_S, encode_image, write_parquet, write_tar
from hub import serving
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


@pytest.fixture
def weights(shards, tmp_path, monkeypatch):
    """What the page on fine-tuning starts from, the tag on a local stand-in for the Hub."""
    import torch
    from safetensors.torch import save_file

    from wds_convnext.training.model import create_model

    shutil.copytree(shards, tmp_path / "data")
    repository = tmp_path / "hub/timm/convnext_atto.d2_in1k"
    repository.mkdir(parents=True)
    model = create_model("convnext_atto", num_classes=1000)
    config = {"architecture": "convnext_atto", "num_classes": 1000}
    (repository / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), repository / "model.safetensors")
    shutil.copytree(repository, tmp_path / "exported")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    short = {"MAX_STEPS": 1, "IMAGE_SIZE": 32, "BATCH_SIZE": 8, "WORKERS": 0, "DEVICE": "cpu"}
    for name, value in short.items():
        monkeypatch.setenv(f"WDS_CONVNEXT_TRAIN_{name}", str(value))
    with serving(tmp_path / "hub") as environment:
        endpoint = environment["HF_ENDPOINT"]
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield


@pytest.mark.slow
def test_the_commands_on_fine_tuning_run_as_printed(weights, capsys):
    """For one step each; each starts from the weights that it names."""
    page = (ROOT / "docs" / "finetuning.md").read_text()
    lines = "".join(re.findall(r"```\n(wds-convnext .*?)```", page, re.DOTALL)).splitlines()
    assert len(lines) >= 6

    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line, comments=True)[1:])
        printed = capsys.readouterr()
        assert ended.value.code == 0, f"{line}: {printed.err}"
        assert "Started from " in printed.out


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
