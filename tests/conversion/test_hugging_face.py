"""Data sets of Hugging Face: saved to disk, in the Hub's cache, or behind a URL."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from parquet_sets import image_table, save_to_disk, sorted_rows, write_split
from test_conversion import convert, samples_of

from wds_convnext.check.verify import verify
from wds_convnext.errors import DataError, UsageError
from wds_convnext.shards.dataset import read_manifest

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def saved(tmp_path) -> Path:
    """A DatasetDict of two splits, and the same as parquet files in `in`."""
    train, test = image_table(*sorted_rows(20)), image_table(*sorted_rows(4, start=50))
    save_to_disk(tmp_path / "saved/train", train)
    save_to_disk(tmp_path / "saved/test", test, split="test", num_files=1)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_split(tmp_path / "in", "train", train, num_files=2)
    write_split(tmp_path / "in", "test", test)
    return tmp_path / "saved"


def shards_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


@pytest.mark.parametrize("options", [{}, {"num_shards": 3, "shuffle": False}])
def test_a_saved_data_set_gives_the_shards_of_the_same_parquet_files(saved, tmp_path, options):
    """Splits, class names, order and bytes."""
    convert(tmp_path / "in", tmp_path / "expected", **options)

    convert(saved, tmp_path / "out", **options)

    assert shards_in(tmp_path / "out") == shards_in(tmp_path / "expected")
    assert read_manifest(tmp_path / "out/train.json").class_names == ("ant", "bee", "cat", "dog")
    against = verify(str(tmp_path / "out"), against=str(saved), jobs=1, quiet=True)
    assert against.problems == ()


def test_one_split_alone_is_called_as_it_was(saved, tmp_path):
    """The folder of a Dataset, not of a DatasetDict."""
    convert(saved / "test", tmp_path / "out")

    assert len(samples_of(tmp_path / "out", "test")) == 4


def test_a_damaged_saved_data_set_is_one_line(saved, tmp_path):
    """A file cut short; a list of files that names another folder's; none at all."""
    data = saved / "train/data-00000-of-00002.arrow"
    whole = data.read_bytes()
    data.write_bytes(whole[:-700])
    with pytest.raises(DataError, match="data-00000-of-00002.arrow: not readable as an Arrow"):
        convert(saved, tmp_path / "out")
    (saved / "train/state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(UsageError, match="state.json: not what save_to_disk writes .*expected the"):
        convert(saved, tmp_path / "out")
    (saved / "train/state.json").unlink()
    with pytest.raises(UsageError, match="state.json: not what save_to_disk writes .No such file"):
        convert(saved, tmp_path / "out")


def write_cache(folder: Path, table: pa.Table) -> Path:
    """A cache folder of the Hub with two revisions; `main` is the second."""
    for number, revision in enumerate(("aaaa" * 10, SHA)):
        rows = table.slice(0, 8 + 4 * number)
        write_split(folder / "snapshots" / revision / "data", "train", rows)
    (folder / "refs/pr").mkdir(parents=True)
    (folder / "refs/pr/1").write_text("aaaa" * 10)
    (folder / "refs/main").write_text(SHA)
    return folder


def test_of_a_cache_folder_one_revision_is_read(tmp_path):
    """That of main; two of them must not be added together."""
    table = image_table(*sorted_rows(12))
    cache = write_cache(tmp_path / "datasets--owner--insects", table)

    convert(cache, tmp_path / "out", shuffle=False)

    assert len(samples_of(tmp_path / "out")) == 12
    assert read_manifest(tmp_path / "out/train.json").name == "insects"
    (cache / "refs/main").write_text("ffff")
    with pytest.raises(UsageError, match="revision 'ffff' is not in .*snapshots"):
        convert(cache, tmp_path / "other")
    (cache / "refs/main").rename(cache / "refs/v1")
    with pytest.raises(UsageError, match=r"which revision\? It has the refs pr/1, v1"):
        convert(cache, tmp_path / "other")


@pytest.fixture
def hub(tmp_path):
    """A stand-in for the Hub: one data set with a config in a folder, and other files."""
    files = tmp_path / "repo"
    write_split(files / "small", "train", image_table(*sorted_rows(6)))
    write_split(files / "large", "train", image_table(*sorted_rows(12)))
    (files / "README.md").write_text("not to be downloaded")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET(with_body=False)

        def do_GET(self, with_body=True):
            path = self.path.partition("?")[0]
            asked.append(path)
            names = [str(f.relative_to(files)) for f in sorted(files.rglob("*")) if f.is_file()]
            body, headers = b"", {}
            if path in (f"/api/datasets/owner/insects/revision/{r}" for r in ("main", "v1", SHA)):
                siblings = [{"rfilename": name} for name in names]
                facts = {"id": "owner/insects", "sha": SHA, "siblings": siblings}
                body = json.dumps(facts).encode()
            elif path == f"/api/datasets/owner/insects/tree/{SHA}":
                body = json.dumps(
                    [{"type": "file", "path": n, "oid": SHA, "size": (files / n).stat().st_size}
                     for n in names]
                ).encode()  # fmt: skip
            elif (name := path.partition(f"/resolve/{SHA}/")[2]) in names:
                body = (files / name).read_bytes()
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
            else:
                headers = {"X-Error-Code": "RepoNotFound"}
            self.send_response(200 if body else 404)
            for key, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(key, str(value))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_url_of_the_hub_is_downloaded_and_read(hub, tmp_path):
    """One config at one revision, its parquet files only; what is not there is one line."""
    endpoint, asked = hub
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    code = (
        "from wds_convnext.conversion import convert\n"
        "from wds_convnext.errors import UsageError\n"
        "options = dict(jobs=1, quiet=True, shuffle=False)\n"
        "convert('hf://datasets/owner/insects@v1/small', out='out', **options)\n"
        "for url in ('hf://datasets/owner/none', 'hf://owner/x', 'hf://datasets/owner/insects/no'):\n"
        "    try: convert(url, out='other', **options)\n"
        "    except UsageError as error: print(error)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert len(samples_of(tmp_path / "out")) == 6
    assert read_manifest(tmp_path / "out/train.json").name == "insects"
    assert not any("README" in path or "large" in path for path in asked)
    missing, wrong, empty = done.stdout.splitlines()
    assert missing.startswith("hf://datasets/owner/none: not downloaded (")
    assert wrong.startswith("hf://owner/x: not hf://datasets/OWNER/NAME")
    assert empty.startswith("hf://datasets/owner/insects/no: no parquet files.")
