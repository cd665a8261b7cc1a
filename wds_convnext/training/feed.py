"""From a stream to the step: loader workers, and the copy to the device."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

import torch

from wds_convnext.storage.layout import checking_while_waiting
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.stream import Batch, ShardStream, Stream
from wds_convnext.stream.workers import num_workers
from wds_convnext.training.allocator import give_back_freed_memory, keep_freed_memory
from wds_convnext.training.distributed import Machine
from wds_convnext.training.remote import Pace
from wds_convnext.training.stopping import StopVote


@contextmanager
def loading(
    stream: Stream,
    workers: int | None,
    machine: Machine,
    *,
    vote: StopVote | None = None,
    pace: Pace | None = None,
) -> Iterator[Iterator[Batch]]:
    """A stream's batches on the device; the workers end with the context.

    Args:
        vote: what ends the batches, and a wait for one, when the run is to stop.
        pace: what is told how far this rank is, where shards are remote.
    """
    workers = num_workers(workers, ranks=machine.world.local_size)
    if isinstance(stream, ShardStream) and stream.stop is not None:
        workers = min(workers, stream.stop)

    def while_waiting() -> None:
        if vote:
            vote.request.check()
        if pace:
            pace.wait()

    if workers and machine.device.type == "cpu":
        give_back_freed_memory()
    batches = make_loader(
        stream,
        workers=workers,
        pin_memory=machine.device.type == "cuda",
        while_waiting=while_waiting,
    )
    with closing(batches), checking_while_waiting(while_waiting):
        paced = pace.over(batches) if pace else batches
        on_device = prefetch_to_device(paced, machine.device)
        yield vote.agreed(on_device) if vote else on_device


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their tensors on the device; on CUDA the next is copied while one is used.

    On a CPU the process keeps freed memory from the first batch on.
    """
    if device.type != "cuda":
        for number, batch in enumerate(batches):
            if number == 0 and device.type == "cpu":
                keep_freed_memory()  # now: the first loader's workers are forked, and keep nothing
            yield _to(batch, device)
        return
    copying = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(copying):
            coming = _to(batch, device)
        if ready is not None:
            yield ready
        ready = _take(coming, copying, device)  # what is queued by now does not wait for it
    if ready is not None:
        yield ready


def _to(batch: Batch, device: torch.device) -> Batch:
    is_async = device.type == "cuda"  # elsewhere memory may be used again before it is copied
    moved = {name: t.to(device, non_blocking=is_async) for name, t in batch.tensors.items()}
    return Batch(bad_samples=batch.bad_samples, **moved)


def _take(batch: Batch, copying: torch.cuda.Stream, device: torch.device) -> Batch:
    current = torch.cuda.current_stream(device)
    current.wait_stream(copying)
    for tensor in batch.tensors.values():
        tensor.record_stream(current)
    return batch
