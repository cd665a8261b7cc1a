"""`wds-convnext cache`: what a training needs at one time, and what each epoch would fetch.

Nothing is simulated sample by sample: the plan that the run itself follows is looked at.
"""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from wds_convnext.config import CacheConfig
from wds_convnext.errors import printable
from wds_convnext.pool import num_cores
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.opening import open_splits
from wds_convnext.storage.cache import caching
from wds_convnext.storage.schedule import Plan, simulate
from wds_convnext.stream.order import EvalOrder, TrainOrder, ValidationSchedule
from wds_convnext.stream.plan import Ranks, RunPlan, largest_buffer
from wds_convnext.stream.workers import batches_ahead, num_workers


@dataclass(frozen=True)
class CacheCase:
    """A cache of some size: what is fetched into it, and what an LRU cache of that size fetches.

    Lists have an entry per epoch; they are None where the cache is smaller than the live set.
    """

    cache_bytes: int
    fetched_bytes: list[int] | None
    lru_bytes: list[int] | None
    num_requests: list[int] | None  # one per shard; a request that fails part way is made again


@dataclass(frozen=True)
class CacheReport:
    """What a training asks of a cache. Bytes are those of one node."""

    dataset: str
    num_shards: int  # of training and validation
    data_bytes: int  # of these
    node_bytes: int  # of the shards that the ranks of one node read in an epoch
    live_bytes: int
    first_batch_shards: int
    first_batch_bytes: int
    first_samples_bytes: int  # of its samples alone
    cases: tuple[CacheCase, ...]
    fitting_buffer: int | None  # the largest shuffle buffer that fits the smallest case
    config: CacheConfig

    def lines(self) -> list[str]:
        """The report as text."""
        config = self.config
        one_of = f" on {config.nodes} nodes" if config.nodes > 1 else ""
        lines = [
            f"{self.dataset}: {self.num_shards:,} shards, {_size(self.data_bytes)}; "
            f"{config.ranks} x {config.batch_size} samples a batch{one_of}, shuffle buffer "
            f"{config.shuffle_buffer:,}",
            f"needed at one time (the smallest cache): {_size(self.live_bytes)}",
            f"the first batch needs: {_size(self.first_samples_bytes)} by ranges, of "
            f"{self.first_batch_shards:,} shards with {_size(self.first_batch_bytes)}",
        ]
        if config.nodes > 1:
            lines.insert(1, f"read by one node in the first epoch: {_size(self.node_bytes)}")
        for case in self.cases:
            lines += ["", f"cache of {_size(case.cache_bytes)}"]
            if case.fetched_bytes is None or case.lru_bytes is None or case.num_requests is None:
                lines.append("  too small for this order. " + self._advice())
                continue
            lines.append("  epoch     fetched   LRU would  requests")
            rows = zip(case.fetched_bytes, case.lru_bytes, case.num_requests)
            lines += [
                f"  {epoch:>5}  {_size(ours):>10}  {_size(lru):>10}  {requests:>8,}"
                for epoch, (ours, lru, requests) in enumerate(rows)
            ]
        return [printable(line, limit=2000) for line in lines]

    def _advice(self) -> str:
        if self.fitting_buffer is None:
            return "Use a larger one, or write smaller shards."
        return f"Use a larger one, or --shuffle-buffer {self.fitting_buffer}."

    def to_json(self) -> dict:
        return asdict(self)


def plan_cache(spec: str, config: CacheConfig | None = None, **options: Any) -> CacheReport:
    """What a training on these shards asks of a cache.

    Args:
        spec: shards, as for training.
        config: which training, and how large the cache.
        options: fields of `CacheConfig` by name: `ranks=8, cache_size="50GB"`.
    Raises:
        ShardError: if the spec names nothing, or a manifest or index does not fit.
        UsageError: if there are to be more workers than make sense.
    """
    config = CacheConfig.of(config, options)
    # --cache-size is a question here, not the limit of what is fetched now: a few small files.
    with caching(replace(config, cache_size=None)):
        train_data, val_data, _ = open_splits(
            spec, config.val_shards, jobs=num_cores(), quiet=False
        )
    shards = [*train_data.shards, *(val_data.shards if val_data else ())]
    sizes = np.array([shard.num_bytes or os.path.getsize(shard.path) for shard in shards], np.int64)
    local_ranks = config.ranks // config.nodes
    order = TrainOrder(
        train_data.sizes,
        config.seed,
        config.batch_size * config.accumulate * config.ranks,
        config.shuffle_buffer,
    )
    run = RunPlan(
        order,
        Ranks(config.batch_size, 0, local_ranks, config.ranks),
        ValidationSchedule(order, config.val_every, order.num_steps(config.epochs)),
        EvalOrder(val_data.sizes) if val_data else None,
    )
    ahead = batches_ahead(num_workers(config.workers, ranks=local_ranks))
    uses = run.uses().begun(ahead)
    live_bytes = uses.peak_bytes(sizes)
    first = order.global_batch(0).take(slice(local_ranks * config.batch_size))
    first_shards = np.unique(np.searchsorted(np.cumsum(order.sizes), first.number, side="right"))
    epoch_starts = run.time_of(np.array([order.num_steps(epoch) for epoch in range(config.epochs)]))
    epoch_of_use = np.searchsorted(epoch_starts, uses.first + ahead, side="right") - 1
    chosen = [config.cache_size] if config.cache_size is not None else []
    cache_sizes = chosen or sorted({live_bytes, max(live_bytes, sizes.sum() // 2), sizes.sum()})
    cases = tuple(_case(uses, sizes, int(size), epoch_of_use) for size in cache_sizes)
    is_too_small = min(cache_sizes) < live_bytes
    return CacheReport(
        dataset=train_data.name,
        num_shards=len(shards),
        data_bytes=int(sizes.sum()),
        node_bytes=int(sizes[np.unique(uses.object[epoch_of_use == 0])].sum()),
        live_bytes=live_bytes,
        first_batch_shards=len(first_shards),
        first_batch_bytes=int(sizes[first_shards].sum()),
        first_samples_bytes=_bytes_of(train_data, first.number),
        cases=cases,
        fitting_buffer=(
            largest_buffer(run, sizes, int(min(cache_sizes)), ahead=ahead) if is_too_small else None
        ),
        config=config,
    )


def _bytes_of(dataset: Dataset, numbers: np.ndarray) -> int:
    """Bytes of samples, with all of their members."""
    assert dataset.index is not None
    places = map(dataset.locate, numbers.tolist())
    return sum(dataset.index.record(shard, sample).num_bytes for shard, sample in places)


def _case(uses: Plan, sizes: np.ndarray, cache_bytes: int, epoch_of_use: np.ndarray) -> CacheCase:
    by_policy = []
    for is_lru in (False, True):
        try:
            is_missing = simulate(uses, sizes, cache_bytes, lru=is_lru)
        except ValueError:
            return CacheCase(cache_bytes, None, None, None)
        weights = np.where(is_missing, sizes[uses.object], 0)
        counts = (np.bincount(epoch_of_use, of) for of in (weights, is_missing))
        by_policy.append([count.astype(np.int64).tolist() for count in counts])
    (fetched, num_requests), (lru, _) = by_policy
    return CacheCase(cache_bytes, fetched, lru, num_requests)


def _size(num_bytes: int) -> str:
    """A number of bytes with three digits and a decimal unit."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.3g} {unit}"
