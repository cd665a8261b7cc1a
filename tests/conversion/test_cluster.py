"""A conversion on a real scheduler and workers of Dask gives the bytes of one process."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import HANG_S
from parquet_sets import read_folder, write_small_source
from test_conversion import ENVIRONMENT, convert

from wds_convnext.check.verify import verify
from wds_convnext.errors import UsageError

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The engine's name; two workers, in a folder of their own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder, dask = tmp_path_factory.mktemp("dask"), [sys.executable, "-m", "dask"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    worker = [*dask, "worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-dashboard"]
    commands = [[*dask, "scheduler", *place], worker, worker]
    with open(folder / "log", "wb") as log:
        processes = [
            subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)
            for command in commands
        ]
    yield f"dask://127.0.0.1:{port}"
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(HANG_S)
def test_dask_gives_the_bytes_of_one_process_and_verifies_them(scheduler, tmp_path, monkeypatch):
    """Relative paths, too, though the workers run in another folder."""
    write_small_source(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "straight")
    monkeypatch.chdir(tmp_path)
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            convert("source", "out", jobs=None, engine=scheduler)
            break
        except UsageError as error:  # the scheduler is starting
            assert "no scheduler answers" in str(error)
            assert time.monotonic() < deadline

    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "straight")
    assert not verify("out", against="source", engine=scheduler, quiet=True).problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "ray://there"}, "no engine that is known"),
        ({"engine": "dask://127.0.0.1:1"}, "no scheduler answers there"),
        ({"engine": "dask://h:1", "jobs": 2}, "--jobs and --engine exclude each other"),
        ({"part": "1/2", "finish": True}, "--part and --finish exclude each other"),
        ({"part": "1/2", "val_fraction": 0.1}, "each part would read all images"),
        ({"part": "3/2"}, "expected one of several parts, from 1/16 to 16/16"),
    ],
)
def test_an_engine_or_part_that_cannot_be_is_one_line(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("wds_convnext.engine.CONNECT_S", 0.5)
    write_small_source(tmp_path / "source")

    with pytest.raises(UsageError, match=message):
        convert(str(tmp_path / "source"), tmp_path / "out", **({"jobs": None} | options))


def test_a_list_of_relative_paths_is_refused_where_others_read_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with ThreadPoolExecutor(1) as executor, pytest.raises(UsageError, match="absolute paths"):
        convert("a.parquet,b.parquet", tmp_path / "out", executor=executor)
