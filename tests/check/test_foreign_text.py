"""Names of any bytes in shards and manifests: every command prints lines, and nothing else."""

import json
import os

import pytest
from conftest import command, encode_image, run, write_shards, write_tar

from wds_convnext.check.verify import verify

KEYS = ["plain", "esc\x1b[2J\x1b]0;title\x07", "line\nbreak", "caf\udce9", "\u202egnp", "tab\t"]
CLASSES = ["ant", "\x1b[31mbee", "cat\ncat: 9,999 problems", "\u202egod"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard whose names hold escapes, line breaks and bytes that are not UTF-8; two are wrong."""
    folder = tmp_path_factory.mktemp("data")
    members = []
    for number, key in enumerate(KEYS):
        members.append((f"{key}.jpg", encode_image(number)[: 200 if number in (1, 3) else None]))
        members.append((f"{key}.cls", b"%d" % (number % 4)))
    write_tar(folder / "train-000.tar", members)
    (folder / "names.txt").write_text("\n".join(name.split("\n")[0] for name in CLASSES))
    run(command("index", folder, "--class-names", folder / "names.txt", "--jobs", 1))
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {"class_names": CLASSES}))
    return folder


@pytest.mark.parametrize(
    ("args", "encoding"),
    [
        (["verify", "--deep"], "ascii"),
        (["verify", "--json"], "utf-8"),
        (["inspect"], "utf-8"),
        (["index"], "utf-8"),
    ],
)
def test_no_command_prints_what_a_terminal_would_act_on(folder, args, encoding):
    """Also where the terminal cannot show a character."""
    name, *options = args
    done = run(command(name, folder, *options, "--jobs", 1), check=False, PYTHONIOENCODING=encoding)

    printed = done.stdout + done.stderr
    assert "Traceback" not in printed
    assert done.returncode == ("--deep" in args)
    assert all(line.isprintable() for line in printed.split("\n"))
    if "--deep" in args:
        assert r"key caf\xe9: " in printed
        assert r"key esc\x1b[2J\x1b]0;title\x07: " in printed
        assert "2 problems" in printed


def test_a_folder_whose_name_is_no_text_is_no_traceback(tmp_path):
    """The command line hands such a name on as it is."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J"
    os.mkdir(folder)
    done = run(command("verify", os.fsdecode(folder)), check=False)

    assert done.returncode == 2
    assert r"caf\xe9\x1b[2J" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


def test_a_flood_of_problems_is_ten_lines_and_a_count(tmp_path):
    """All of them are in --json."""
    manifest = write_shards(tmp_path, [1])
    content = json.loads(manifest.read_text())
    content["shardlist"] += [{"url": f"train-{i:03d}.tar", "nsamples": 1} for i in range(1, 2001)]
    manifest.write_text(json.dumps(content))

    report = verify(str(tmp_path), jobs=1, quiet=True)

    lines = str(report).splitlines()
    assert lines[0].endswith("2000 problems")
    assert lines[10].startswith(f"  {tmp_path}/train-010.tar: missing")
    assert lines[11] == "  and 1,990 more problems: --json lists them"
    assert len(lines) == 13
    assert len(report.to_json()["splits"][0]["problems"]) == 2000
