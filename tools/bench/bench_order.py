"""What the order of samples costs: to build, to seek, per sample, in memory; and its locality.

Runs in a process that has imported numpy and nothing else, like a loader worker's share of it.
"""

import resource
import statistics
import sys
import time

import numpy as np

from wds_convnext.stream.order import TrainOrder

CASES = (  # what, samples, shards, buffer
    ("ImageNet-1k, windows", 1_281_167, 1_024, 100_000),
    ("ImageNet-21k, windows", 14_000_000, 10_000, 1_000_000),
    ("ImageNet-21k, uniform", 14_000_000, 10_000, 14_000_000),
    ("a billion, windows", 1_000_000_000, 100_000, 1_000_000),
    ("a billion, uniform", 1_000_000_000, 100_000, 1_000_000_000),
)
LOCALITY = (  # samples, shards, global batch, buffer, ranks
    (50_000, 13, 160, 100_000, 1),
    (1_281_167, 1_024, 1_024, 100_000, 1),
    (1_281_167, 1_024, 1_024, 100_000, 8),
    (14_000_000, 10_000, 4_096, 100_000, 1),
    (14_000_000, 10_000, 4_096, 100_000, 8),
    (14_000_000, 10_000, 4_096, 100_000, 32),
    (14_000_000, 10_000, 4_096, 14_000_000, 32),
)
BATCH = 256


def make_order(num_samples: int, num_shards: int, batch: int, buffer: int) -> TrainOrder:
    sizes = np.full(num_shards, num_samples // num_shards)
    sizes[: num_samples % num_shards] += 1
    return TrainOrder(sizes, 0, batch, buffer)


def peak_mb() -> float:
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_costs() -> None:
    """One row per case: seconds to the first batch, ms to a far batch, us per sample."""
    print(f"{'':24}{'first batch':>12}{'far batch':>12}{'per sample':>14}{'peak':>10}")
    for what, num_samples, num_shards, buffer in CASES:
        started = time.perf_counter()
        order = make_order(num_samples, num_shards, BATCH, buffer)
        order.global_batch(0)
        first_s = time.perf_counter() - started
        steps = np.random.default_rng(0).integers(0, num_samples // BATCH - 1, 51)
        times = []
        for step in steps:
            started = time.perf_counter()
            order.global_batch(int(step))
            times.append(time.perf_counter() - started)
        seek_s = statistics.median(times)
        print(
            f"{what:24}{first_s * 1e3:>9.1f} ms{seek_s * 1e3:>9.2f} ms"
            f"{seek_s / BATCH * 1e6:>11.2f} us{peak_mb():>7.0f} MB"
        )


def measure_locality() -> None:
    """Shards that rank 0 opens in 1,000 steps, of all that there are."""
    print(f"\n{'samples':>12}{'shards':>8}{'batch':>7}{'buffer':>12}{'ranks':>7}{'opened':>9}")
    for num_samples, num_shards, batch, buffer, ranks in LOCALITY:
        order = make_order(num_samples, num_shards, batch, buffer)
        opened, ends = set(), np.cumsum(order.sizes)
        for step in range(1000):
            refs = order.micro_batch(step, batch_size=batch // ranks, rank=0, world_size=ranks)
            opened.update(np.searchsorted(ends, refs.number, side="right").tolist())
        print(
            f"{num_samples:>12,}{num_shards:>8,}{batch:>7,}{buffer:>12,}{ranks:>7}{len(opened):>9,}"
        )


if __name__ == "__main__":
    measure_costs()
    measure_locality()
