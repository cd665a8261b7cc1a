"""Remote shards in a run: one cache per node, its plan, and how far each rank is."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from wds_convnext.config.remote import RemoteConfig
from wds_convnext.errors import UsageError, WdsConvnextError
from wds_convnext.progress import Progress
from wds_convnext.shards.dataset import Dataset
from wds_convnext.shards.expand import reads_remote
from wds_convnext.shards.index import HAS_CHECKSUM
from wds_convnext.shards.spec import Shard
from wds_convnext.storage.cache import Cache, Clock, caching, current_cache
from wds_convnext.storage.layout import rounded
from wds_convnext.storage.schedule import Plan
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.plan import Ranks, RunPlan, evaluation_uses, largest_buffer
from wds_convnext.stream.workers import batches_ahead, num_workers
from wds_convnext.training.distributed import World, gather_lists

if TYPE_CHECKING:
    from wds_convnext.training.run import Run

Value = TypeVar("Value")

_EARLY_SAMPLES = 4096  # that are fetched one by one while their shards are not whole
_BLOCKS = 8192  # bytes that a file may take more than it has


class Pace:
    """What tells the cache how far this rank is, and people how far the first shards are.

    Args:
        start: the time at which the batches begin.
        first_bytes: of the shards that the first batch waits for.
        quiet: show nothing.
    """

    def __init__(self, cache: Cache, clock: Clock, *, start: int, first_bytes: int, quiet: bool):
        self._cache, self._clock, self._start = cache, clock, start
        self._total, self._quiet = first_bytes / 1e6, quiet
        self._before = cache.counts()[0]
        self._progress: Progress | None = None
        self._has_begun = False

    def over(self, batches: Iterator[Value]) -> Iterator[Value]:
        """The batches; when one is handed over, the uses that end with it are past."""
        for time, batch in enumerate(batches, self._start + 1):
            self._clock.report(time)
            self._end_progress()
            yield batch
        self._clock.close()

    def wait(self) -> None:
        """Show how far the first shards are; called while a batch is awaited."""
        if self._has_begun:
            return
        if self._progress is None:
            self._progress = Progress(
                "Fetching the first shards", total=self._total, unit="MB", quiet=self._quiet
            )
        self._progress.show(min(self._total, (self._cache.counts()[0] - self._before) / 1e6))

    def _end_progress(self) -> None:
        self._has_begun = True
        if self._progress is not None:
            self._progress.close()
            self._progress = None


@contextmanager
def node_cache(settings: RemoteConfig, specs: Sequence[str], world: World) -> Iterator[None]:
    """One cache for the ranks of a node, of which the first one opens it.

    Args:
        specs: of shards. If no rank finds remote ones, nothing is written.
    Raises:
        UsageError: on all ranks, if a cache cannot be opened.
    """
    if not _any_remote(specs, world) or world.local_size == 1:
        with caching(settings):
            yield
        return
    with ExitStack() as stack:
        own, reasons = "", []
        if world.local_rank == 0:
            try:
                own = str(stack.enter_context(caching(settings)).path)
            except WdsConvnextError as error:
                reasons = [str(error)]
        if reasons := gather_lists(reasons, world):
            raise UsageError(reasons[0])
        paths = gather_lists([own], world)
        if world.local_rank:
            shared = Path(paths[world.rank - world.local_rank])
            stack.enter_context(caching(settings, shared=shared))
        yield


def _any_remote(specs: Sequence[str], world: World) -> bool:
    """On all ranks alike, since a local manifest that names URLs may stand on some nodes only."""
    return any(gather_lists([any(map(reads_remote, specs))], world))


def first_on_each_node(open: Callable[[], Value], specs: Sequence[str], world: World) -> Value:
    """What a function gives that opens remote shards; the other ranks find what the first fetched.

    Raises:
        WdsConvnextError: on all ranks, if it fails on one.
    """
    if not _any_remote(specs, world) or world.local_size == 1:
        return open()
    value: list[Value] = []
    for is_turn in (world.local_rank == 0, world.local_rank > 0):
        failure: list[WdsConvnextError] = []
        if is_turn:
            try:
                value = [open()]
            except WdsConvnextError as error:
                failure = [error]
        if failures := gather_lists(failure, world):
            raise failures[0]
    return value[0]


def follow_run(run: "Run", *, is_fresh: bool) -> tuple[list[str], Pace | None, Pace | None]:
    """Let the cache fetch ahead after the run's order.

    Args:
        is_fresh: the run may still get other options.
    Returns:
        Sentences about it; the pace of the training, and of the evaluation after it. None for local
        shards.
    Raises:
        UsageError: if the cache is smaller than what is needed at one time.
    """
    world, config = run.machine.world, run.config
    val_data = run.validation.stream.dataset if run.validation else None
    shards = [*run.train_data.shards, *(val_data.shards if val_data else ())]
    if not any(shard.is_remote for shard in shards):
        return [], None, None
    first = world.rank - world.local_rank
    plan = RunPlan(
        run.order,
        Ranks(config.batch_size, first, first + world.local_size, world.size),
        run.schedule,
        EvalOrder(val_data.sizes) if val_data else None,
    )
    uses = plan.uses(from_step=run.state.step)
    cache = current_cache()
    sizes = np.array([s.is_remote * ((s.num_bytes or 0) + _BLOCKS) for s in shards], np.int64)
    ahead = batches_ahead(num_workers(config.workers, ranks=world.local_size))
    needed = uses.begun(ahead).peak_bytes(sizes)
    reasons = []
    if world.local_rank == 0 and needed > cache.room:
        reasons = [_too_small(cache, needed, plan, sizes, ahead=ahead, is_fresh=is_fresh)]
    if reasons := gather_lists(reasons, world):
        raise UsageError(reasons[0])
    start = plan.start(run.state.step, validates_first=run.state.owes_validation)
    early = None
    if not run.state.owes_validation:
        room = cache.room - needed
        early = first_ranges(run, plan, ahead=ahead, max_bytes=room)
    pace = _follow(cache, uses, shards, start=start, world=world, ahead=ahead, early=early)
    end = int(plan.time_of(run.schedule.last_step))
    last_pace = Pace(cache, cache.clock(world.local_rank), start=end, first_bytes=0, quiet=True)
    gb = [f"{value / 1e9:.3g} GB" for value in (sizes.sum(), cache.num_bytes, needed)]
    notes = [
        f"Remote shards: {gb[0]}, through a cache of {gb[1]} in {cache.path}; {gb[2]} are needed "
        "at one time."
    ]
    if world.local_size < world.size:
        epoch = uses.first < plan.time_of(run.order.num_steps(1)) + start
        read = sizes[np.unique(uses.object[epoch])].sum()
        notes.append(f"Of these, this node reads {read / 1e9:.3g} GB in an epoch.")
    return notes, pace, last_pace


def follow_evaluation(dataset: Dataset, batch_size: int, world: World) -> Pace | None:
    """Let the cache fetch ahead for one evaluation; None for local shards."""
    if not any(shard.is_remote for shard in dataset.shards):
        return None
    ranks = Ranks(batch_size, 0, world.size, world.size)
    uses = Plan.of(*evaluation_uses(EvalOrder(dataset.sizes), ranks))
    # Ranks begin together: one that is ahead must not report to the clock of the pass before.
    gather_lists([], world)
    return _follow(current_cache(), uses, dataset.shards, start=0, world=world)


def first_ranges(run: "Run", plan: RunPlan, *, ahead: int, max_bytes: int) -> np.ndarray:
    """What the first batches read of remote shards, as `Cache.follow` takes it.

    Args:
        ahead: batches before its own at which a batch's samples are fetched.
        max_bytes: of all of them together; those of later batches are left out.
    """
    index, shards, ranks = run.train_data.index, run.train_data.shards, plan.ranks
    found, num_bytes = list[tuple[int, int, int, int]](), 0
    first_batch = run.state.step * plan.accumulate
    last_batch = run.schedule.last_step * plan.accumulate
    num_batches = max(ahead, _EARLY_SAMPLES // (ranks.batch_size * (ranks.stop - ranks.first)))
    assert index is not None
    for batch in range(first_batch, min(first_batch + num_batches, last_batch)):
        step, micro = divmod(batch, plan.accumulate)
        time = int(plan.time_of(step)) + micro - ahead
        for rank in range(ranks.first, ranks.stop):
            refs = run.order.micro_batch(
                batch, batch_size=ranks.batch_size, rank=rank, world_size=ranks.world_size
            )
            for number in refs.number.tolist():
                shard, sample = run.train_data.locate(number)
                record = index.record(shard, sample)
                if not shards[shard].is_remote or not record.flags & HAS_CHECKSUM:
                    continue
                num_bytes += rounded(record.num_bytes)
                if num_bytes > max_bytes:
                    return _table(found, ahead)
                found.append((time, shard, record.start, record.num_bytes))
    return _table(found, ahead)


def _table(ranges: list[tuple[int, int, int, int]], ahead: int) -> np.ndarray:
    """Ranges as `Cache.follow` takes them; a last one without bytes ends them after their batch."""
    if ranges:
        time, shard, *_ = ranges[-1]
        ranges = [*ranges, (time + ahead + 1, shard, 0, 0)]
    return np.array(ranges, np.int64).reshape(-1, 4).T


def _follow(
    cache: Cache,
    uses: Plan,
    shards: Sequence[Shard],
    *,
    start: int,
    world: World,
    ahead: int = 0,
    early: np.ndarray | None = None,
) -> Pace:
    """Let the cache follow the uses of shards, which readers begin so much ahead of their time."""
    here = np.array([shard.is_remote for shard in shards])[uses.object]
    plan = Plan(uses.object[here], uses.first[here], uses.last[here])
    paths = [shard.path for shard in shards]
    # What a reader may ask for counts as needed, so it is not evicted for what comes later.
    cache.follow(plan.begun(ahead), paths, start=start, num_ranks=world.local_size, first=early)
    gather_lists([], world)  # the first rank of each node has written the clock
    first = np.unique(plan.object[(plan.first <= start) & (start <= plan.last)]).tolist()
    absent = (shards[n].num_bytes or 0 for n in first if not os.path.exists(shards[n].path))
    return Pace(
        cache,
        cache.clock(world.local_rank),
        start=start,
        first_bytes=sum(absent),
        quiet=not world.is_main,
    )


def fetched() -> dict[str, float]:
    """What this node's cache has fetched and served by now, for the log; empty for local shards.

    `hits` is the share of reads that found their bytes, `wait_s` the sum over all readers.
    """
    cache = current_cache()
    if not cache.is_used:
        return {}
    num_bytes, _, num_retries, num_published, num_evicted = cache.counts()
    num_found, num_waits, seconds = cache.reads()
    num_reads = num_found + num_waits
    return {
        "remote/fetched_gb": num_bytes / 1e9,
        "remote/hits": num_found / num_reads if num_reads else 1.0,
        "remote/waits": num_waits,
        "remote/wait_s": seconds,
        "remote/shards": num_published,
        "remote/evicted": num_evicted,
        "remote/retries": num_retries,
    }


def _too_small(
    cache: Cache, needed: int, plan: RunPlan, sizes: np.ndarray, *, ahead: int, is_fresh: bool
) -> str:
    buffer = largest_buffer(plan, sizes, cache.room, ahead=ahead) if is_fresh else None
    advice = f", or --shuffle-buffer {buffer}" if buffer else ""
    gb = [f"{n / 1e9:.3g} GB" for n in (cache.num_bytes, needed, cache.num_bytes - cache.room)]
    return (
        f"--cache-size: {gb[0]} in {cache.path}, but this order needs {gb[1]} of shards at one "
        f"time, and {gb[2]} of indexes. Use a larger one, a --cache-dir with more space{advice}."
    )
