"""A run by the command line: what train leaves, what eval says of it, and how it is resumed."""

import json
import shutil

import pytest
import torch
from conftest import CLASS_NAMES, TINY_RUN, sample_members, write_parquet, write_tar

from wds_convnext.cli import main
from wds_convnext.conversion import convert


def call(capsys, *args) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a command, in this process."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def train_args(shards, out, **options) -> list:
    flat = [part for pair in (TINY_RUN | options).items() for part in pair]
    return ["train", "--shards", shards / "train.json", "--out", out, *flat]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in train_args(shards, out, **{"--epochs": 2})])
    assert stop.value.code == 0
    return out


def test_a_folder_that_holds_a_run_is_left_alone(capsys, shards, finished):
    """Without --resume or --overwrite: refused, and not a byte changes."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}

    code, _, err = call(capsys, *train_args(shards, finished))

    assert code == 2
    assert f"already holds a run. Continue it with --resume {finished}" in err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(capsys, shards, tmp_path, finished):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "step-000000999.pt").write_bytes((finished / "last.pt").read_bytes())

    code, _, _ = call(
        capsys, *train_args(shards, out, **{"--epochs": 1, "--max-steps": 2}), "--overwrite"
    )

    assert code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "step-000000999.pt").exists()


def test_a_run_prints_and_logs_what_the_article_did(shards, finished):
    """Its scalars under its names (TensorBoard's begin with eval), its lines, and images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(finished)).Reload().Tags()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]

    article = {"train/loss", "train/lr", "train/epoch_loss", "val/loss", "val/accuracy"}
    assert {name.replace("val/", "eval/") for name in article} <= set(tags["scalars"])
    assert {"utilization/images_per_s", "utilization/data_wait"} <= set(tags["scalars"])
    assert tags["images"]
    assert article <= {key for line in lines for key in line}
    assert json.loads((finished / "status.json").read_text())["status"] == "finished"


def test_checkpoints_hold_clean_timm_keys_and_what_is_needed_to_use_them(finished):
    """Loadable without this package, by timm's own names."""
    import timm

    content = torch.load(finished / "best.pt", weights_only=True)
    model = timm.create_model("test_convnext", num_classes=4)

    model.load_state_dict(content["model"])
    assert content["facts"]["class_names"] == CLASS_NAMES
    assert content["facts"]["preprocessing"]["image_size"] == 32


def test_eval_reports_the_best_checkpoint_on_its_validation_split(capsys, finished):
    """As text and as JSON; the numbers are those of the validation that chose it."""
    code, out, _ = call(capsys, "eval", "--checkpoint", finished, "--device", "cpu")
    _, as_json, _ = call(capsys, "eval", "--checkpoint", finished, "--device", "cpu", "--json")
    result = json.loads(as_json)
    best = torch.load(finished / "best.pt", weights_only=True)

    assert code == 0
    assert "top-1" in out and "95 % interval" in out and "validation split, 13 samples" in out
    assert result["num_samples"] == 13
    assert result["top1"] == best["best_top1"]
    assert result["model"] == "test_convnext"


def test_eval_without_options_takes_the_newest_run(capsys, finished, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(finished)
    monkeypatch.chdir(tmp_path)

    code, out, _ = call(capsys, "eval", "--device", "cpu")

    assert code == 0
    assert "runs/one/best.pt" in out


def test_eval_of_another_data_set_is_refused(capsys, finished, tmp_path):
    write_parquet(tmp_path / "in", "test", [6], classes=["a", "b", "c"])
    convert(str(tmp_path / "in"), out=str(tmp_path / "out"), jobs=1, quiet=True)

    code, _, err = call(
        capsys, "eval", "--checkpoint", finished, "--shards", tmp_path / "out" / "test.json"
    )

    assert code == 2
    assert "its 3 classes are not the 4" in err


def test_a_folder_of_raw_shards_trains_and_evaluates(capsys, tmp_path):
    """Its training and its validation split, though neither has a label of each class.

    Nothing names the classes, so each split's labels count, and the test split is left alone.
    """
    members = sample_members(8)
    write_tar(tmp_path / "train-000.tar", members[4:])  # labels 2, 3, 0, 1, …
    write_tar(tmp_path / "valid-000.tar", [*members[:6], ("9.jpg", members[0][1]), ("9.cls", b"4")])
    write_tar(tmp_path / "test-000.tar", members[:4])
    options = {"--shards": tmp_path, "--epochs": 1}

    trained, out, _ = call(capsys, *train_args(tmp_path, tmp_path / "run", **options))
    shards = {"folder": tmp_path, "test": tmp_path / "test-000.tar"}
    results = {
        name: call(capsys, "eval", "--checkpoint", tmp_path / "run", "--shards", spec, "--json")
        for name, spec in shards.items()
    }

    assert trained == 0
    assert "5 classes" in out
    assert [json.loads(out)["split"] for _, out, _ in results.values()] == ["valid", "test"]
    assert [json.loads(out)["num_samples"] for _, out, _ in results.values()] == [4, 2]


def test_eval_of_a_damaged_checkpoint_is_refused(capsys, finished, tmp_path):
    data = bytearray((finished / "best.pt").read_bytes())
    data[1000] ^= 4
    (tmp_path / "best.pt").write_bytes(data)

    code, _, err = call(capsys, "eval", "--checkpoint", tmp_path / "best.pt")

    assert code == 2
    assert "best.pt: damaged" in err


def test_a_resume_takes_the_runs_own_options(capsys, finished, tmp_path):
    """Only --resume is given: everything else comes from the run's config.toml."""
    shutil.copytree(finished, tmp_path / "run")

    code, out, _ = call(capsys, "train", "--resume", tmp_path / "run", "--epochs", 3)

    assert code == 0
    assert "test_convnext" in out and "3 epochs" in out and "Resumed at step 13." in out
    assert "Train Epoch: 2" in out and "Train Epoch: 1" not in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('workers = "0"', "workers = 0: expected an integer from 0 to 256."),
        ("save_every = 0", "save_every = 0: expected an integer >= 1."),
        ("lr = -0.01", "lr = -0.01: expected a number > 0."),
        ('amp = "fp32"', "amp = fp32: expected auto, bf16, fp16 or off."),
        ("clip_grad_norm = -1.0", "clip_grad_norm = -1.0: expected a number >= 0."),
        ("epochs = 2.5", "epochs = 2.5: expected an integer >= 1."),
        ('compile = "no"', "compile = no: expected true or false."),
    ],
)
def test_a_resume_checks_what_the_runs_file_says(capsys, finished, tmp_path, line, said):
    """By type and range, in one line that names the file; nothing changes."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    name = line.split()[0]
    kept = [old for old in path.read_text().splitlines() if old.split()[0] != name]
    path.write_text("\n".join([*kept, line, ""]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    code, _, err = call(capsys, "train", "--resume", tmp_path / "run")

    assert code == 2
    assert err == f"UsageError: {path}: {said}\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_runs_file_of_a_newer_version_redirects_nothing(capsys, finished, tmp_path):
    """`out` in it is ignored; an option that is not known here is named in a warning."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    added = f'out = "{tmp_path}/elsewhere"\noverwrite = true\nfuture = 3\n'
    path.write_text(path.read_text() + added)

    code, out, err = call(capsys, "train", "--resume", tmp_path / "run", "--epochs", 3)

    assert code == 0
    assert "Resumed at step 13." in out
    assert f"{path}: ignored future, which this version has no option for.\n" in err
    assert not (tmp_path / "elsewhere").exists()


def test_resume_starts_a_run_where_there_is_none(capsys, shards, tmp_path):
    """With --out, one command line serves for every start of a job."""
    arguments = train_args(shards, tmp_path / "run", **{"--max-steps": 1})

    first, out, _ = call(capsys, *arguments, "--resume")
    second, again, _ = call(capsys, *arguments, "--resume")

    assert first == second == 0
    assert "Resumed" not in out and "Resumed at step 1." in again


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--ema-decay", 0.9), "the checkpoint has --ema-decay 0, this run 0.9"),
        (("--model", "test_convnext2"), "the checkpoint is of model test_convnext"),
    ],
)
def test_a_resume_as_something_else_is_one_line(capsys, finished, option, said):
    """An average that begins in mid-run, another model: refused, and nothing changes."""
    before = {path.name: path.read_bytes() for path in finished.iterdir()}

    code, _, err = call(capsys, "train", "--resume", finished, *option)

    assert code == 2
    assert said in err and len(err.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
