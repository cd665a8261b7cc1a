"""Tasks run in order of results, in one process or several, and say how far they are."""

import re

import pytest

from wds_convnext import pool as parallel
from wds_convnext.errors import DataError
from wds_convnext.pool import Progress, Workers


def double(task, count):
    count(1, 1_000_000)
    if task < 0:
        raise DataError(f"task {task}")
    return 2 * task


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_in_the_order_of_the_tasks_and_counted(jobs):
    """Whoever does them; the same processes serve pass after pass."""
    with Workers(jobs) as workers:
        for num_tasks in (5, 3):
            progress = Progress("pass", num_images=num_tasks, quiet=True)
            results = workers.run(double, list(range(num_tasks)), progress=progress)

            assert results == [2 * task for task in range(num_tasks)]
            assert (progress.images, progress.num_bytes) == (num_tasks, num_tasks * 1_000_000)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_raises_comes_out_unchanged(jobs):
    """So that a user reads what is wrong, not where."""
    with Workers(jobs) as workers, pytest.raises(DataError, match="^task -1$"):
        workers.run(double, [1, -1, 2], progress=Progress("pass", num_images=3, quiet=True))


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines(capsys, monkeypatch):
    """Images, MB/s, images/s and the time left, on stderr."""
    monkeypatch.setattr(parallel, "_LINE_EVERY_S", 0)
    progress = Progress("train: copy", num_images=1000)

    progress.add(250, 50_000_000)
    progress.close()

    captured = capsys.readouterr()
    assert captured.out == ""
    line = r"train: copy: 250 of 1,000 images, \d+ MB/s, \d+ images/s, \d+ s left\n"
    assert re.fullmatch(line, captured.err)
