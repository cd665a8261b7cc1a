"""What a user sees: one line for what they can fix, exit code 2, and nothing written."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import CLASS_NAMES, HANG_S, TINY_RUN, sample_members, write_parquet, write_tar

from wds_convnext.cli import main
from wds_convnext.conversion import convert
from wds_convnext.errors import UsageError
from wds_convnext.training.modelnames import check_model_name, model_names


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--shards": "nowhere/train-<000..002>.tar"}, "there is no folder nowhere"),
        ({"--shards": "{shards}/train-<000..007>.tar"}, "train-003.tar"),
        ({"--shards": "{shards}/trian-*.tar"}, "Did you mean"),
        ({"--shards": "{other}"}, "holds no train split, but validation"),
        ({"--val-shards": "{other}/validation.json"}, "classes are not the"),
        ({"--model": "convnext_bsae"}, "Did you mean convnext_base"),
        ({"--batch-size": 7}, "must be even"),
        ({"--workers": 200}, "--workers 200: this machine has"),
        ({"--image-size": 8}, "--image-size 8: the model cannot take it"),
        ({"--init-from": "nothing.pt"}, "nothing.pt: no such file"),
        ({"--device": "gpu"}, "--device gpu: no such device"),
        ({"--amp": "fp16"}, "--amp fp16 needs CUDA"),
        ({"--recipe": "artcle"}, "Did you mean article"),
        ({"--config": "{config}"}, "no option is called 'epoch'. Did you mean epochs"),
        ({"--resume": "nothing"}, "nothing: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, shards, tmp_path, options, said):
    """What was found and what to do, on standard error; no folder is made."""
    write_parquet(tmp_path / "other", "validation", [4], classes=["emu", "fox", "gnu", "hen"])
    convert(str(tmp_path / "other"), out=str(tmp_path / "other"), jobs=1, quiet=True)
    (tmp_path / "config.toml").write_text("epoch = 5\n")
    places = {"shards": shards, "other": tmp_path / "other", "config": tmp_path / "config.toml"}
    options = {key: str(value).format(**places) for key, value in options.items()}

    code, out, err = call(capsys, *train_args(shards, tmp_path / "run", **options))

    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert re.fullmatch(r"(Training on .* Importing torch …\n)?", out)  # what came before it
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://b/x", "hf://datasets/x", "host:/x"])
@pytest.mark.parametrize(
    "args", [["train", "--out"], ["shards", "in", "--out"], ["inspect", "in", "--sheet"]]
)
def test_what_cannot_be_written_to_is_refused(capsys, tmp_path, monkeypatch, args, url):
    """A URL never becomes a folder of that name."""
    monkeypatch.chdir(tmp_path)

    code, _, err = call(capsys, *args, url)

    assert code == 2
    assert f"{args[-1]} {url}: expected a local path" in err
    assert list(tmp_path.iterdir()) == []


def test_eval_of_a_damaged_checkpoint_is_refused(capsys, finished, tmp_path):
    data = bytearray((finished / "best.pt").read_bytes())
    data[1000] ^= 4
    (tmp_path / "best.pt").write_bytes(data)

    code, _, err = call(capsys, "eval", "--checkpoint", tmp_path / "best.pt")

    assert code == 2
    assert "best.pt: damaged" in err


def test_shards_of_a_missing_source_are_one_line(capsys, tmp_path):
    code, _, err = call(capsys, "shards", tmp_path / "nothing", "--out", tmp_path / "out")

    assert code == 2
    assert "nothing: there is no such file or folder. Expected parquet files" in err
    assert not (tmp_path / "out").exists()


def test_help_is_complete_grouped_and_instant(capsys):
    """Every heading; and in a process of its own it takes no torch."""
    code, out, _ = call(capsys, "train", "--help")
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom wds_convnext.cli import commands\n"
            "commands(['train', '--help'], standalone_mode=False)\n"
            "print([m for m in ('torch', 'timm', 'webdataset', 'pyarrow') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG_S,
    )

    assert code == 0
    for heading in ("Data:", "Augmentation:", "Model:", "Optimization:", "Machine:", "Run:"):
        assert heading in out
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_fits_80_columns(capsys, monkeypatch):
    """Each with its whole sentence."""
    monkeypatch.setenv("COLUMNS", "80")

    code, out, _ = call(capsys, "--help")

    assert code == 0 and "  predict  " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in out.partition("Commands:")[2]


def test_names_of_models_are_known_without_importing_them():
    """Exactly timm's and ours; a tag, and a name that timm still maps to another, are taken."""
    names, _ = model_names()
    packages = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}

    assert names - {"thumbnet"} == {n for n, where in packages.items() if where.startswith("timm.")}
    check_model_name("thumbnet")
    check_model_name("convnext_tiny.fb_in22k")
    check_model_name("convnext_tiny_in22ft1k")
    with pytest.raises(UsageError, match="timm has no such model. Did you mean convnext_base"):
        check_model_name("convnext_bas")


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


def test_train_without_shards_says_so(capsys, tmp_path):
    code, _, err = call(capsys, "train", "--out", tmp_path / "run")

    assert code == 2
    assert "--shards is missing" in err


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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--shards", "nowhere/*.tar"], "there is no folder nowhere"),
        (["train", "--shards", "a.tar", "--val-shards", "c.tar"], "c.tar: no shard matches"),
        (["train", "--shards", "a.tar", "--init-from", "w.pt"], "--init-from w.pt: no such file"),
        (["train", "--shards", "a.tar", "b.tar", "c.tar"], "b.tar, c.tar: 2 arguments too many"),
        (["train", "--shards", "a.tar", "--lr", "-1"], "--lr -1: expected a number > 0"),
        (["train", "--shards", "a.tar", "--model", "convnxt_base"], "mean convnext_base"),
        (["--foo"], "--foo: no such option. See "),
        (["train", "--shard", "a.tar"], "--shard: no such option. Did you mean --shards"),
        (["train", "--lr"], "Option '--lr' requires an argument. See "),
        (["inspect"], "Missing argument 'SHARDS'. See "),
        (["trian"], "trian: no such command. Did you mean train"),
        (["verify", "a.tar", "b.tar"], "quote it: 'data/train-{000..012}.tar'"),
        (["train", "--resume", "gone"], "--resume gone: no such file or folder"),
        (["train", "--resume"], "runs/: no run here"),
        (["eval", "gone"], "gone: no such file or folder"),
        (["eval", "a.tar", "--shards", "nowhere/*.tar"], "there is no folder nowhere"),
        (["explain", "gone", "--step", "0"], "gone: no such file or folder"),
    ],
)
def test_a_typo_is_answered_before_torch_is_imported(args, said, tmp_path):
    (tmp_path / "a.tar").touch()
    code = "import sys; sys.modules['torch'] = None; from wds_convnext.cli import main; main()"

    result = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True
    )

    assert result.returncode == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""
