"""What goes for what, and what is kept for the first batches: the fetcher's decisions."""

import struct

import numpy as np
import pytest

from wds_convnext.storage.early import Early
from wds_convnext.storage.layout import Object, early_path, rounded
from wds_convnext.storage.needs import Needs

NUM_BYTES = 10_000


@pytest.fixture
def needs(tmp_path):
    """Objects 0 (in use from 0 to 5), 1 (at 6), 2 (at 7), 3 (never), at time 2."""
    object, first, last = [0, 1, 2], [0, 6, 7], [5, 6, 7]
    np.save(tmp_path / "plan.npy", np.array([object, first, last]))
    (tmp_path / "clock").write_bytes(struct.pack("<q", 2))
    found = Needs(tmp_path)
    found.load(4)
    found.update(4)
    return found


def test_what_is_in_use_goes_last_and_for_a_reader_alone(needs):
    """What stays goes before it; else what is needed last is the first to go."""
    needs.staying = {1}

    assert needs.to_go([0, 1, 2, 3], before=-1) == [3, 2, 1, 0]
    assert needs.to_go([0, 1, 2, 3], before=2) == [3, 2]
    assert needs.to_go([0, 1, 2, 3], before=7) == [3]


def test_room_is_kept_once_for_each_range_and_not_for_what_is_whole(tmp_path):
    """Also by a fetcher that takes over from one that died with half of the ranges there."""
    (tmp_path / "first").mkdir()
    (tmp_path / "origin").mkdir()
    objects = [
        Object(f"https://host/{n}.tar", str(tmp_path / "origin" / f"{n}.tar"), 10**6, None)
        for n in range(2)
    ]
    ranges = [(0, n, at * NUM_BYTES, NUM_BYTES) for n in range(2) for at in range(4)]
    np.save(tmp_path / "first.npy", np.array([*ranges, (9, 0, 0, 0)]).T)
    for _, n, start, num_bytes in ranges[:2]:
        with open(early_path(objects[n].path, start), "wb") as file:
            file.write(bytes(num_bytes))
    with open(early_path(objects[0].path, 2 * NUM_BYTES) + ".part", "wb") as file:
        file.write(bytes(5000))

    def reserved(present: set[int]) -> int:
        early = Early(tmp_path, lend=None)
        early.load(objects, present)
        return early.reserved_bytes

    assert 8 * NUM_BYTES < reserved(set()) <= 8 * rounded(NUM_BYTES)
    assert 4 * NUM_BYTES < reserved({1}) <= 4 * rounded(NUM_BYTES)
