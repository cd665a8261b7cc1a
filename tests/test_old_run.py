"""A run written by version 0.1.0, before there was an index: it reads and resumes bit for bit.

`fixtures/run_0_1_0` holds parquet files, the shards that were made of them, and a run of 9 steps
of which the checkpoint of step 5 was kept; `final.pt` is what it had become after step 9. It was
trained with torch 2.15 on one thread of a CPU with AVX2.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import tiny_model  # noqa: F401  (registers the fixture's model)
import torch
from conftest import run
from test_cli import call
from timm.optim import AdamP

HERE = Path(__file__).parent
OLD = HERE / "fixtures" / "run_0_1_0"
# What three steps of timm give, in bits, on the machine of the fixture. It depends on the kernels
# of ATen, MKL and oneDNN, each of which looks at the CPU by itself: MKL_CBWR=COMPATIBLE or
# ONEDNN_MAX_CPU_ISA=SSE41 alone change it.
THREE_STEPS_THERE = "dfb03b45ded2d6d4"
# On other CPUs sums are added in another order: 4 steps moved weights by at most 3.4e-5 between
# AVX2 and no vector instructions, while the steps themselves move them by 0.01. Ten times that.
ELSEWHERE = 4e-4


@pytest.fixture
def old(tmp_path):
    """A copy of the fixture that may be written to."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def tiny_command(*args) -> list[str]:
    """A command in a process that knows the fixture's model."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tiny_model\n"
    code += "from wds_convnext.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, args)]


def resume(old: Path, *args) -> None:
    run(
        tiny_command(
            "train", "--resume", old / "run", "--shards", old / "data" / "train.json", *args
        ),
        cwd=old,
    )


def rounds_as_the_machine_of_the_fixture() -> bool:
    """Whether timm's model and optimizer, without any code of ours, give the same bits as there."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = timm.create_model("tiny_convnext", num_classes=4)
    model.load_state_dict(torch.load(OLD / "final.pt", weights_only=True)["model"])
    model = model.to(memory_format=torch.channels_last)
    images = torch.linspace(-2, 2, 4 * 3 * 32 * 32).sin().view(4, 3, 32, 32)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = AdamP(model.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    torch.set_num_threads(num_threads)
    weights = [p.detach().contiguous().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(weights)).hexdigest().startswith(THREE_STEPS_THERE)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.bits), 2])
def test_it_resumes_as_it_would_have_gone_on(old, workers):
    """Weights, their average and the sums: to the last bit where the CPU rounds the same."""
    expected = torch.load(OLD / "final.pt", weights_only=True)
    in_bits = rounds_as_the_machine_of_the_fixture()

    resume(old, "--workers", workers)

    found = torch.load(old / "run" / "last.pt", weights_only=True)
    assert found["step"] == expected["step"] == 9
    for part in ("model", "ema", "sums"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            if in_bits:
                assert torch.equal(found[part][name], tensor), name
            else:
                torch.testing.assert_close(found[part][name], tensor, rtol=1e-3, atol=ELSEWHERE)


def test_its_metrics_are_those_of_the_whole_run(old):
    """The lines after the checkpoint are cut off and written again."""
    path = old / "run" / "metrics.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]

    resume(old)

    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for one, two in zip(before, after):
        for name in {"train/loss", "train/lr", "val/loss", "val/accuracy"} & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_its_shards_read_as_complete(old):
    """The conversion of the same files by today's code finds nothing to do."""
    output = run(tiny_command("shards", old / "pictures", "--out", old / "data"), cwd=old).stdout

    assert "train: already complete" in output and "validation: already complete" in output


def test_its_shards_verify_against_their_input(old):
    """Every row, once, with the same bytes and label."""
    run(tiny_command("verify", old / "data", "--against", old / "pictures"), cwd=old)


def test_its_relative_paths_are_found_from_another_directory(old, tmp_path, monkeypatch, capsys):
    """They begin where it was started, which is above its folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    explained = call(capsys, "explain", old / "run", "--step", 5)
    output = run(tiny_command("train", "--resume", old / "run")).stdout

    assert explained[0] == 0, explained
    assert "Resumed at step 5." in output
    assert f'shards = "{old}/data/train.json"' in (old / "run" / "config.toml").read_text()
