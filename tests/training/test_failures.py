"""What a run cannot go on with ends it in one line, with what can be saved saved."""

import errno
import json
import os
import resource
import shutil
import signal
from contextlib import closing, contextmanager

import pytest
import timm
import torch
from conftest import HANG_S, TINY_RUN, train_command, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import run_preloaded
from test_cli import call
from test_stopping import acting_when

from wds_convnext.errors import ShardError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.shards.reader import SampleReader
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.log import RunLog


def train(capsys, shards, out, *flags, **options):
    flat = [part for pair in (TINY_RUN | options).items() for part in pair]
    return call(capsys, "train", "--shards", shards / "train.json", "--out", out, *flags, *flat)


def assert_one_line(code: int, err: str, said: str) -> None:
    """After what warnings there are, the error is the last line."""
    assert code == 2, err
    assert "Traceback" not in err
    assert said in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1"}, "RANK=1: not what torchrun sets"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: not what torchrun sets"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x, WORLD_SIZE=1: not what torchrun sets"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "not what torchrun sets"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: not what torchrun sets"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK=2, WORLD_SIZE=2: not what torchrun sets",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=2: so many"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8: so many"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(
    capsys, monkeypatch, shards, tmp_path, environment, said
):
    """Left by another job, or by another launcher; and nothing is written."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    code, _, err = train(capsys, shards, tmp_path / "run")

    assert_one_line(code, err, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", [{"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}])
def test_one_process_may_be_announced(capsys, monkeypatch, shards, tmp_path, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert train(capsys, shards, tmp_path / "run", "--max-steps", 1)[0] == 0


def test_a_batch_of_one_is_refused_where_statistics_need_more(capsys, shards, tmp_path):
    """And taken where they do not."""
    plain = {"--batch-size": 1, "--mixup": 0, "--cutmix": 0, "--max-steps": 2}
    refused = train(capsys, shards, tmp_path / "one", **plain | {"--model": "test_resnet"})
    code, _, _ = train(capsys, shards, tmp_path / "two", **plain)

    assert_one_line(refused[0], refused[2], "--batch-size 1: the model takes statistics")
    assert code == 0


def test_one_class_is_nothing_to_learn(capsys, tmp_path):
    manifest = write_shards(tmp_path / "data", [8])
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"class_names": ["ant"]}))

    code, _, err = train(capsys, tmp_path / "data", tmp_path / "run")

    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "one class" in err or "outside the 1 class" in err


@contextmanager
def limited(which: int, soft: int):
    """Within this context a limit of this process is lower."""
    before = resource.getrlimit(which)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [2000, 20_000, 200_000])
def test_a_full_disk_is_one_line(capsys, shards, tmp_path, room):
    """In the log, in TensorBoard's file or in a checkpoint; what there was stays."""
    out = tmp_path / "run"
    with limited(resource.RLIMIT_FSIZE, room):
        code, _, err = train(capsys, shards, out, **{"--log-every": 1})

    assert_one_line(code, err, "Free some space.")
    assert json.loads((out / "status.json").read_text())["status"] == "failed"


def test_a_folder_that_is_deleted_is_one_line(capsys, shards, tmp_path):
    """Not a traceback about status.json."""
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    with acting_when(metrics.exists, lambda: os.rename(out, tmp_path / "gone")):
        code, _, err = train(capsys, shards, out, **{"--epochs": 100})

    assert_one_line(code, err, "Its folder is gone.")


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_cannot_be_read_ends_a_run_that_is_saved(capsys, shards, tmp_path, workers):
    """The state is whole when a batch cannot be had; with the data again it goes on."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    metrics = out / "metrics.jsonl"
    options = {"--epochs": 100, "--save-every": 10**6, "--workers": workers, "--log-every": 1}
    with acting_when(
        lambda: metrics.exists() and metrics.stat().st_size,
        lambda: os.truncate(data / "train-002.tar", 512),
    ):
        code, _, err = train(capsys, data, out, **options)

    assert_one_line(code, err, "train-002.tar")
    step = load_checkpoint(out / "last.pt")["step"]
    assert step >= 1
    shutil.copy(shards / "train-002.tar", data / "train-002.tar")
    resumed = train(capsys, data, out, "--resume", **options | {"--max-steps": step + 3})
    assert resumed[0] == 0, resumed


@pytest.mark.parametrize(("stale", "is_one_line"), [(1, False), (2, True)])
def test_a_file_that_is_stale_is_opened_again_once(tmp_path, monkeypatch, stale, is_one_line):
    """ESTALE: the file server began again. Stale again right after, it is a line for the user."""
    dataset = open_dataset(str(write_shards(tmp_path, [4])))
    answers, pread = [errno.ESTALE] * stale, os.pread

    def server(*args):
        if answers:
            raise OSError(number := answers.pop(), os.strerror(number))
        return pread(*args)

    with closing(SampleReader(dataset)) as reader:
        expected = reader.read(2)
        opened = reader.num_opened
        monkeypatch.setattr(os, "pread", server)
        if is_one_line:
            with pytest.raises(ShardError, match="train-000.tar: byte .* cannot be read .*Stale"):
                reader.read(2)
        assert reader.read(2) == expected
        assert reader.num_opened == opened + 1


OUT_OF_MEMORY = """
import resource, sys
from wds_convnext.cli import main
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 500_000_000, -1))
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "options",
    [
        {"--workers": 0, "--image-size": 1024, "--batch-size": 256},  # in the loader
        {"--workers": 1, "--image-size": 1024, "--batch-size": 256},  # its workers' slots
        {"--workers": 0, "--image-size": 320, "--batch-size": 64},  # in the step
    ],
    ids=["loader", "workers", "step"],
)
def test_out_of_memory_is_one_line(shards, tmp_path, options):
    """With what to do; in a process that may take 500 MB more."""
    arguments = train_command(shards, tmp_path / "run", **options)[3:]

    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    program = ["-c", OUT_OF_MEMORY, *arguments]
    result = run_preloaded(program, cwd=None, env=environment, timeout=HANG_S)

    assert_one_line(result.returncode, result.stderr, "memory")
    assert "--batch-size" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("limit", [64, 128])
def test_few_open_files_are_enough(tmp_path, limit):
    """300 shards and `ulimit -n 64`: fewer are kept open."""
    dataset = open_dataset(str(write_shards(tmp_path, [1] * 300)))

    with limited(resource.RLIMIT_NOFILE, limit + len(os.listdir("/dev/fd"))):
        readers = [SampleReader(dataset) for _ in range(2)]  # of training and of validation
        for number in range(300):
            assert all(reader.read(number)[1] == number % 4 for reader in readers)
        for reader in readers:
            reader.close()


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("failures") / "run"
    flat = [str(part) for pair in (TINY_RUN | {"--max-steps": 2}).items() for part in pair]
    from wds_convnext.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["train", "--shards", str(shards / "train.json"), "--out", str(out), *flat])
    assert stop.value.code == 0
    return out


ODD = ["nothing", 3, "text", [], {}, [1], {"a": "b"}, torch.ones(2)]


@pytest.mark.parametrize("field", ["model", "optimizer", "step", "facts", "sums", "scaler"])
def test_a_checkpoint_with_odd_content_is_one_line(capsys, shards, finished, tmp_path, field):
    """A field missing or of another type: resumed or refused, evaluated or refused."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = {k: v for k, v in load_checkpoint(finished / "last.pt").items() if k != "format"}
    for value in ODD:
        content = {k: v for k, v in whole.items() if k != field}
        save_checkpoint(out / "odd.pt", content | ({} if value == "nothing" else {field: value}))
        shutil.copy(out / "odd.pt", out / "last.pt")
        for path in out.glob("step-*"):
            path.unlink()
        resumed = train(capsys, shards, out, "--resume", **{"--max-steps": 2})
        evaluated = call(capsys, "eval", "--checkpoint", out / "odd.pt", "--device", "cpu")
        for code, _, err in (resumed, evaluated):
            assert code in (0, 2), (value, err)
            assert code == 0 or len(err.strip().splitlines()) <= 3, (value, err)


LINES = b"".join(b'{"step": %d, "train/loss": 1.5}\n' % step for step in range(1, 9))


@settings(max_examples=50)
@given(data=st.data())
def test_metrics_that_are_damaged_are_left_out(tmp_path_factory, data):
    """Bits flipped, bytes cut, lines of other JSON: what is left is whole, and of steps done."""
    content = bytearray(LINES)
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    odd = [b"5", b"null", b"[]", b'{"step": "x"}', b'{"step": 1e3}', b"[" * 10**5, b"\xff\xfe"]
    content += data.draw(st.sampled_from(odd)) + b"\n" + LINES[: data.draw(st.integers(0, 40))]
    folder = tmp_path_factory.mktemp("log")
    (folder / "metrics.jsonl").write_bytes(content)

    RunLog(folder, start_step=5).close()

    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    assert all(type(line["step"]) is int and line["step"] <= 5 for line in kept)


def test_a_resume_needs_no_start_weights_and_takes_shards_that_were_indexed_since(
    capsys, shards, tmp_path, monkeypatch
):
    """The checkpoint has the weights; the files are the same. From another directory, too."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    for path in [*data.glob("*.json"), *data.glob("*.index")]:
        path.unlink()
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_convnext", num_classes=4).state_dict(), "start.pt")
    flat = [part for pair in (TINY_RUN | {"--init-from": "start.pt"}).items() for part in pair]
    spec = "data/train-000.tar,data/train-001.tar,data/train-002.tar"
    places = ["--shards", spec, "--val-shards", "data/validation-000.tar,data/validation-001.tar"]
    started = call(capsys, "train", *places, "--out", "run", *flat, "--max-steps", 7)
    os.unlink("start.pt")
    indexed = call(capsys, "index", data)
    monkeypatch.chdir("/")

    resumed = call(capsys, "train", "--resume", tmp_path / "run")
    evaluated = call(capsys, "eval", "--checkpoint", tmp_path / "run", "--device", "cpu")

    assert started[0] == indexed[0] == 0, (started, indexed)
    assert resumed[0] == 0 and "Resumed at step 7." in resumed[1], resumed
    assert evaluated[0] == 0 and "13 samples" in evaluated[1]
