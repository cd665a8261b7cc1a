"""One display of progress: a bar on a terminal, plain lines elsewhere, nothing if quiet."""

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import HANG_S

from wds_convnext import progress as module
from wds_convnext.progress import Progress, fit_terminal, say, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test itself lets pass."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_line_has_counts_bytes_rate_and_the_time_left(capsys, clock):
    """Golden text, on stderr alone."""
    progress = Progress("train: copy", total=4000)

    clock.now += 10
    progress.add(1000, 500_000_000)

    captured = capsys.readouterr()
    line = "train: copy: 1,000 of 4,000 images, 50 MB/s, 100 images/s, 30 s left\n"
    assert (captured.out, captured.err) == ("", line)


def test_a_line_comes_every_ten_seconds(capsys, clock):
    """However often something is counted."""
    progress = Progress("pass", total=1000)

    for _ in range(35):
        clock.now += 1
        progress.add(1)

    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "done", "line"),
    [
        ({"unit": "shards", "total": 13}, 4, "4 of 13 shards, 0.4 shards/s, 22 s left"),
        ({"total": None}, 500, "500 images, 50 images/s"),
        ({"total": 0}, 500, "500 images, 50 images/s"),
        ({"total": 1000, "initial": 400}, 500, "500 of 1,000 images, 10 images/s, 50 s left"),
        ({"total": 10}, 0, "0 of 10 images, 0 images/s, ? s left"),
        ({"total": 10}, 20, "20 of 10 images, 2 images/s, 0 s left"),
    ],
)
def test_any_unit_and_any_total(capsys, clock, options, done, line):
    """Also none, a start in the middle, nothing done yet, and more than was expected."""
    progress = Progress("pass", **options)

    clock.now += 10
    progress.show(done)

    assert capsys.readouterr().err == f"pass: {line}\n"


def test_a_note_stays_until_the_next(capsys, clock):
    progress = Progress("bench", total=5, unit="measurements")

    progress.show(1, note="2 workers")
    clock.now += 10
    progress.show(2)

    assert ", 2 workers, 0.2 measurements/s," in capsys.readouterr().err


def test_quiet_says_nothing_and_counts(capsys, clock):
    with Progress("pass", total=10, quiet=True) as progress:
        clock.now += 60
        progress.add(3, 100)

    assert (progress.done, progress.num_bytes, progress.has_bar) == (3, 100, False)
    assert capsys.readouterr() == ("", "")


def test_tracked_items_are_all_there_and_counted_once_they_are_done(capsys, clock):
    """With their own length, or the one that is given for an iterator."""
    for items, total in ((["a", "b"], None), (iter(["a", "b"]), 2)):
        found = []
        for item in track(items, "Reading labels", unit="shards", total=total):
            clock.now += 10
            found.append(item)

        assert found == ["a", "b"]
        assert capsys.readouterr().err.splitlines() == [
            "Reading labels: 1 of 2 shards, 0.1 shards/s, 10 s left",
            "Reading labels: 2 of 2 shards, 0.1 shards/s, 0 s left",
        ]


PROGRAM = """
import time
from wds_convnext.progress import Progress, say, track
with Progress("train: copy", total=4, unit="images") as progress:
    assert progress.has_bar
    for number in range(4):
        time.sleep(0.15)
        progress.add(1, 10_000_000)
        progress.show(progress.done, progress.num_bytes, note="warm")
    say("a line")
for _ in track(range(3), "Checking", unit="shards"):
    time.sleep(0.15)
"""


def read_all(reader):
    """What was written to a pseudo-terminal whose other side is closed."""
    parts = []
    try:
        while part := os.read(reader, 1 << 16):
            parts.append(part)
    except OSError:  # EIO: Linux's end of file
        pass
    os.close(reader)
    return b"".join(parts).decode()


def test_on_a_terminal_there_is_a_bar_and_lines_are_above_it():
    """With counts, rate, time left, bytes and note; nothing is left of it in the end."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 100))  # a new pseudo-terminal has no rows: no bar fits

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stderr=terminal, stdout=subprocess.PIPE, text=True
    )

    os.close(terminal)
    shown = read_all(reader)
    assert (done.returncode, done.stdout) == (0, "a line\n"), shown
    frames = shown.split("\r")
    bar = (
        r"train: copy:  75%\|[^|]+\| 3/4 "
        r"\[00:00<00:00, \d\.\d\d images/s, \d+ MB/s, warm\]"
    )
    assert any(re.fullmatch(bar, frame.strip()) for frame in frames), frames
    assert any(re.match(r"Checking:  67%\|[^|]+\| 2/3 \[", frame) for frame in frames)
    assert not frames[-1].strip() and "\n" not in shown


def test_on_a_terminal_a_long_line_breaks_between_words():
    """And nowhere else; a word that is wider than the terminal, as a path may be, stays whole."""
    path = "/data/" + "x" * 50
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 40))
    with os.fdopen(terminal, "w") as stream:
        text = fit_terminal(
            f"{path}: no such file. Name one that is there, or make it.\n"
            "next: wds-convnext train --shards data/train.json --epochs 3",
            stream,
        )
    os.close(reader)

    assert text.splitlines() == [
        f"{path}:",
        "    no such file. Name one that is",
        "    there, or make it.",
        "next: wds-convnext train --shards data/train.json --epochs 3",  # to be copied
    ]
    assert fit_terminal("word " * 50, io.StringIO()) == "word " * 50


def test_say_is_a_line_on_stdout(capsys):
    say("Best Accuracy: 50.00%")

    assert capsys.readouterr() == ("Best Accuracy: 50.00%\n", "")


OUTLASTING = """
import sys
from wds_convnext.progress import Progress, outlasting_output, say
with outlasting_output():
    for _ in range(3):
        say("x" * 10_000)
        print("y", file=sys.stderr, flush=True)
    Progress("Work", total=2).add(1)
    sys.exit(75)
"""


@pytest.mark.parametrize("stdout", ["gone", "closed", "full"])
@pytest.mark.parametrize("stderr", ["gone", "closed", "full"])
def test_output_that_cannot_be_written_is_dropped(stdout, stderr):
    """A pipe without a reader, no stream at all, a full disk: the exit code is the program's."""
    reader, pipe = os.pipe()
    os.close(reader)
    where = {"gone": f">&{pipe}", "closed": ">&-", "full": ">/dev/full"}
    script = f'"$@" 1{where[stdout]} 2{where[stderr]}'
    command = ["bash", "-c", script, "bash", sys.executable, "-c", OUTLASTING]

    code = subprocess.call(command, pass_fds=[pipe], timeout=HANG_S)

    os.close(pipe)
    assert code == 75
