"""Tasks run in one process or several, their results in order, and are counted."""

import pytest

from wds_convnext.errors import DataError
from wds_convnext.pool import Workers
from wds_convnext.progress import Progress


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
            progress = Progress("pass", total=num_tasks, quiet=True)
            results = workers.run(double, list(range(num_tasks)), progress=progress)

            assert results == [2 * task for task in range(num_tasks)]
            assert (progress.done, progress.num_bytes) == (num_tasks, num_tasks * 1_000_000)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_raises_comes_out_unchanged(jobs):
    """So that a user reads what is wrong, not where."""
    with Workers(jobs) as workers, pytest.raises(DataError, match="^task -1$"):
        workers.run(double, [1, -1, 2], progress=Progress("pass", total=3, quiet=True))
