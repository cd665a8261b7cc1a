"""The stream of batches: the only module that knows order, reading and decoding.

Worker w of W makes the batches w, w + W, w + 2W, … whole; the DataLoader hands them over
round-robin, so what the trainer sees does not depend on W. Images cross to the trainer as uint8;
float batches are four times the bytes.
"""

import atexit
import math
import multiprocessing
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from wds_convnext.errors import DataError, ShardError, TrainingError, WdsConvnextError
from wds_convnext.order import EvalOrder, SampleRefs, TrainOrder
from wds_convnext.reader import SampleReader
from wds_convnext.rng import uniform
from wds_convnext.shards import ShardSet

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_MAX_REPLACEMENTS = 64
_WORKER_DIED = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")


class Batch(NamedTuple):
    """One batch of one rank."""

    images: torch.Tensor  # uint8 (B, 3, S, S)
    labels: torch.Tensor  # int64 (B,)
    is_real: torch.Tensor  # bool (B,); False for the padding of a last evaluation batch
    bad_samples: list  # one dict (shard, key, offset, epoch, reason) per replaced sample


class ShardStream(IterableDataset):
    """Batches of one rank, in the order's order; endless for training, finite for evaluation.

    Args:
        shard_set: the shards to read.
        order: which sample comes when.
        transform: (encoded bytes, draws) -> uint8 (3, S, S); see `transforms`.
        batch_size: samples per batch and rank.
        start: number of the first batch to make (to resume).
        decode: False gives samples as webdataset's dicts (`__key__`, `__url__`, one entry per
            member, bytes) instead of batches: a first stage for `webdataset.DataPipeline`.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        order: TrainOrder | EvalOrder,
        *,
        batch_size: int,
        transform=None,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        decode: bool = True,
    ):
        super().__init__()
        if decode and transform is None:
            raise ValueError("decoding needs a transform")
        self.shard_set = shard_set
        self.order = order
        self.transform = transform
        self.place = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
        self.start = start
        self.decode = decode
        self.stop = None
        if isinstance(order, EvalOrder):
            self.stop = order.num_micro_batches(batch_size=batch_size, world_size=world_size)

    def __iter__(self) -> Iterator[Batch | dict]:
        worker = get_worker_info()
        index, stride = self.start, 1
        if worker is not None:
            index, stride = self.start + worker.id, worker.num_workers
        shard_set = self.shard_set
        reader = SampleReader(shard_set.shards, label_field=shard_set.label_field)
        with closing(reader):
            while self.stop is None or index < self.stop:
                refs = self.order.micro_batch(index, **self.place)
                if self.decode:
                    yield self._load(reader, refs)
                else:
                    yield from self._raw_samples(reader, refs)
                index += stride

    def _load(self, reader: SampleReader, refs: SampleRefs) -> Batch:
        size = self.transform.image_size
        images = _zeros((len(refs), 3, size, size), shared=get_worker_info() is not None)
        labels = torch.zeros(len(refs), dtype=torch.int64)
        draws = [None] * len(refs)
        if self.transform.NUM_DRAWS:
            draws = uniform(self.order.sample_keys(refs), self.transform.NUM_DRAWS)
        bad_samples = []
        for i in refs.is_real.nonzero()[0]:
            place = int(refs.shard[i]), int(refs.sample[i])
            loaded, reasons = self._load_first_good(reader, *place, draws[i])
            bad_samples += [{**reason, "epoch": int(refs.epoch[i])} for reason in reasons]
            if loaded is None:
                refs.is_real[i] = False
            else:
                images[i], labels[i] = loaded
        return Batch(images, labels, torch.from_numpy(refs.is_real), bad_samples)

    def _load_first_good(self, reader: SampleReader, shard: int, sample: int, draws):
        """(image, label), and why samples before it in its shard could not be used.

        In training a sample that does not decode is replaced by the next of its shard that does,
        which depends on the shard alone: the stream is the same for any number of workers. In
        evaluation nothing takes its place, and None is returned.
        """
        reasons = []
        shard_samples = self.shard_set.shards[shard].num_samples
        attempts = 1 if self.stop is not None else min(shard_samples, _MAX_REPLACEMENTS)
        for attempt in range(attempts):
            candidate = (sample + attempt) % shard_samples
            data, label = reader.read(shard, candidate)
            if not 0 <= label < self.shard_set.num_classes:
                where = reader.describe(shard, candidate)
                raise ShardError(
                    f"{where['shard']}, key {where['key']}: label {label} is outside the "
                    f"{self.shard_set.num_classes} classes. Run make shards again."
                )
            try:
                return (self.transform(data, draws), label), reasons
            except DataError as error:
                reasons.append({**reader.describe(shard, candidate), "reason": str(error)})
        if self.stop is not None:
            return None, reasons
        raise TrainingError(
            f"{reasons[0]['shard']}: no sample that decodes from {reasons[0]['key']} to "
            f"{reasons[-1]['key']} ({reasons[0]['reason']}). Write the shard again."
        )

    def _raw_samples(self, reader: SampleReader, refs: SampleRefs) -> Iterator[dict]:
        for shard, sample in zip(refs.shard[refs.is_real], refs.sample[refs.is_real]):
            yield reader.read_raw(int(shard), int(sample))


def make_loader(stream: ShardStream, *, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Iterate over a stream's batches, made by `workers` processes (0: in this one).

    Raises:
        WdsConvnextError: what a worker met, as it was raised there.
        TrainingError: if a worker process died.
    """
    with warnings.catch_warnings():
        # More workers than cores are refused, or meant, before this.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _ErrorsAsItems(stream),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_stop_signals,
            # fork shares the imports' memory and starts in 0.1 s; workers never touch CUDA.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
    try:
        for item in _iterate(loader):
            if isinstance(item, WdsConvnextError):
                raise item
            yield item
    except (RuntimeError, EOFError, ConnectionError) as error:
        # EOFError and ConnectionError: it died while it handed a batch over.
        if type(error) is RuntimeError and not _WORKER_DIED.match(str(error)):
            raise
        raise TrainingError(
            f"A loader worker died ({str(error) or type(error).__name__}). The usual cause is "
            "memory: use fewer --workers or a smaller --batch-size. The last checkpoint is whole."
        ) from None


def _iterate(loader: DataLoader) -> Iterator:
    """`iter(loader)`, with a worker's death met where an item is awaited, and nowhere else.

    PyTorch's handler of SIGCHLD raises at whatever line this process is, so also inside an
    optimizer update. Without it, waiting looks every 5 s whether the workers live.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    # At exit multiprocessing waits for its children after a SIGTERM, which these ignore: without
    # this a process that ends by a traceback never ends. Registered last, it is called first.
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)
    return items


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _zeros(shape: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    """A blank uint8 tensor; in shared memory, filled in place there, it is handed over uncopied."""
    if not shared:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # fresh pages are zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _ErrorsAsItems(IterableDataset):
    """Hands a worker's error over as an item: DataLoader would wrap it into its traceback."""

    def __init__(self, stream: ShardStream):
        super().__init__()
        self.stream = stream

    def __iter__(self):
        try:
            yield from self.stream
        except WdsConvnextError as error:
            yield error


def _ignore_stop_signals(worker_id: int) -> None:
    """The trainer decides when to stop; a signal to its whole process group must not kill these."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
