"""`wds-convnext cache`."""

import json

import pytest
from click.testing import CliRunner
from conftest import write_shards

from wds_convnext.check.cache import plan_cache
from wds_convnext.cli import commands
from wds_convnext.errors import UsageError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [2] * 40)
    write_shards(folder, [4], split="validation")
    return folder


def test_a_cache_of_all_shards_fetches_each_once(shards):
    report = plan_cache(str(shards), batch_size=2, shuffle_buffer=1, workers=1)

    largest = report.cases[-1]
    assert largest.cache_bytes == report.data_bytes > report.live_bytes
    assert sum(largest.num_requests) == 41
    assert sum(largest.fetched_bytes) == report.data_bytes
    assert largest.fetched_bytes[1:] == [0, 0, 0]


def test_ours_fetches_less_than_lru_where_the_cache_is_smaller(shards):
    report = plan_cache(str(shards), batch_size=2, shuffle_buffer=1, workers=0, cache_size="400kB")

    (case,) = report.cases
    assert report.live_bytes <= 400_000 < report.data_bytes
    assert case.fetched_bytes[0] <= report.data_bytes
    assert all(ours < lru for ours, lru in zip(case.fetched_bytes[1:], case.lru_bytes[1:]))


def test_a_cache_that_is_too_small_names_the_sizes_and_a_buffer(shards):
    args = ["cache", str(shards), "--batch-size", "2", "--workers", "0", "--cache-size", "340kB"]

    result = CliRunner().invoke(commands, args)

    assert result.exit_code == 0
    assert "cache of 340 kB\n  too small for this order. Use a larger one, or --shuffle-buffer" in (
        result.output
    )


def test_a_node_reads_its_lanes(shards):
    args = ["cache", str(shards), "--batch-size", "32", "--shuffle-buffer", "1", "--json"]
    args += ["--ranks", "2", "--nodes", "2", "--workers", "0"]

    report = json.loads(CliRunner().invoke(commands, args).output)

    assert 0 < report["node_bytes"] < report["data_bytes"]


def test_ranks_that_nodes_do_not_share_evenly_are_refused(shards):
    with pytest.raises(UsageError, match="--ranks 3: not the same number"):
        plan_cache(str(shards), ranks=3, nodes=2)
