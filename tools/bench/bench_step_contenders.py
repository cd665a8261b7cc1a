"""What `bench_step` compares, and how one of them is timed and counted.

The article's, timm's and our step, each with its own model.
"""

import itertools
import subprocess
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import timm
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import AdamP as TimmAdamP
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wds_convnext.config import TrainConfig
from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream.loader import make_loader
from wds_convnext.stream.order import TrainOrder
from wds_convnext.stream.stream import Batch, ShardStream
from wds_convnext.stream.transforms import Preprocessing, TrainTransform
from wds_convnext.training import adamp
from wds_convnext.training.compiler import compile_model
from wds_convnext.training.distributed import Machine
from wds_convnext.training.feed import prefetch_to_device
from wds_convnext.training.monitor import DeviceTimer
from wds_convnext.training.state import build_state
from wds_convnext.training.step import build_recipe, train_step

NUM_CLASSES = 100
DROP_PATH_RATE = 0.2
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    model: str
    batch_size: int
    image_size: int
    machine: Machine

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def host_batches(self, memory_format=torch.contiguous_format) -> list[Batch]:
        """A few different uint8 batches, in memory that a GPU copies from directly.

        Args:
            memory_format: of the images: `contiguous_format` from PyTorch's loaders,
                `channels_last` from ours. The pixels are the same.
        """
        rng = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        batches = []
        for _ in range(4):
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
            labels = torch.randint(0, NUM_CLASSES, (self.batch_size,), generator=rng)
            images = images.contiguous(memory_format=memory_format)
            tensors = images, labels, torch.ones(self.batch_size, dtype=torch.bool)
            if self.device.type == "cuda":
                tensors = tuple(tensor.pin_memory() for tensor in tensors)
            batches.append(Batch(*tensors, []))
        return batches

    def compile(self, model: nn.Module) -> Callable:
        return torch.compile(model) if self.machine.compiled else model


def article_step(setting: Setting, timer: DeviceTimer) -> Callable[[], None]:
    """The article's train_epoch, line by line."""
    device = setting.device
    fp16 = device.type == "cuda"
    mixup = Mixup(**MIX, prob=1.0, switch_prob=0.5, mode="batch", num_classes=1000)
    model = timm.create_model(setting.model, drop_path_rate=DROP_PATH_RATE).to(device)
    forward = setting.compile(model)
    optimizer = TimmAdamP(model.parameters(), lr=4e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=93_900, warmup_t=1_565, warmup_lr_init=1e-6, warmup_prefix=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    criterion = SoftTargetCrossEntropy().to(device)
    floats = [(batch.images / 255, batch.labels) for batch in setting.host_batches()]
    if fp16:
        floats = [(images.pin_memory(), labels) for images, labels in floats]
    batches, steps, losses = itertools.cycle(floats), itertools.count(), []
    model.train()

    def step() -> None:
        inputs, targets = (tensor.to(device) for tensor in next(batches))
        inputs, targets = mixup(inputs, targets)
        with torch.autocast(device.type, enabled=fp16):
            loss = criterion(forward(inputs), targets)
        if not torch.isfinite(loss):
            return
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with timer.span():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step(next(steps))
        losses[:] = loss.item(), loss.item(), loss.item()  # sum, TensorBoard, progress bar

    return step


def timm_step(setting: Setting, timer: DeviceTimer, **optimizer_options) -> Callable[[], None]:
    """The update of timm's train.py, one process, without accumulation."""
    device, autocast = setting.device, setting.machine.autocast
    mixup = Mixup(**MIX, num_classes=NUM_CLASSES)
    model = timm.create_model(
        setting.model, num_classes=NUM_CLASSES, drop_path_rate=DROP_PATH_RATE
    ).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, lr=1e-4, weight_decay=0.05, **optimizer_options)
    forward = setting.compile(model)
    criterion = SoftTargetCrossEntropy().to(device)
    pairs = [(batch.images, batch.labels) for batch in setting.host_batches()]
    batches = iter(PrefetchLoader(itertools.cycle(pairs), device=device))
    model.train()

    def step() -> None:
        inputs, targets = mixup(*next(batches))
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = criterion(forward(inputs), targets)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=1.0, mode="norm")
        with timer.span():
            optimizer.step()
        loss.item()
        optimizer.zero_grad()

    return step


def our_step(
    setting: Setting,
    timer: DeviceTimer,
    *,
    batches: Iterator[Batch] | None = None,
    **compiler_options: bool,
) -> Callable[[], None]:
    """`train_step` as `wds-convnext train` calls it, if no options of Inductor are given."""
    config = TrainConfig(
        model=setting.model, image_size=setting.image_size, batch_size=setting.batch_size
    )
    state, _ = build_state(config, num_classes=NUM_CLASSES, machine=setting.machine)
    recipe = build_recipe(
        config,
        state,
        num_classes=NUM_CLASSES,
        machine=setting.machine,
        preprocessing=Preprocessing(config.image_size),
    )
    recipe = replace(recipe, optimizer_timer=timer)
    if compiler_options:
        recipe = replace(recipe, forward=compile_model(state.model, **compiler_options))
    batches = batches or itertools.cycle(setting.host_batches(torch.channels_last))
    on_device = prefetch_to_device(batches, setting.device)

    def step() -> None:
        train_step(state, [next(on_device)], lr=1e-4, recipe=recipe)

    return step


def batches_from_shards(setting: Setting, spec: str, workers: int) -> Iterator[Batch]:
    """Batches as training reads, decodes and crops them; labels folded into NUM_CLASSES."""
    dataset = open_dataset(spec)
    order = TrainOrder(
        dataset.sizes, seed=0, global_batch_size=setting.batch_size, shuffle_buffer=100_000
    )
    transform = TrainTransform(setting.image_size)
    stream = ShardStream(dataset, order, batch_size=setting.batch_size, transform=transform)
    pin_memory = setting.device.type == "cuda"
    for batch in make_loader(stream, workers=workers, pin_memory=pin_memory):
        yield batch._replace(labels=batch.labels % NUM_CLASSES)


class HostReads(TorchDispatchMode):
    """Counts operations, and those among them that make the host wait for a value."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.num_operations = self.num_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_operations += 1
        self.num_reads += function._schema.name.removeprefix("aten::") in self.WAITING
        return function(*args, **kwargs or {})


@dataclass
class Contender:
    """One kind of step, and what was measured of it; times in ms, one per round."""

    name: str
    make: Callable[[DeviceTimer], Callable[[], None]]
    cudnn_benchmark: bool = False  # as its own script sets it
    kernels: bool = True  # whether ours may take AdamP's kernels
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    launches: int | None = None
    syncs: int | None = None
    memory_gb: float | None = None  # the most at once, of tensors; None on a CPU
    clock_mhz: list[float] = field(default_factory=list)  # after each round, where it can be asked
    top_kernels: list[dict] = field(default_factory=list)  # of one step; empty on a CPU
    failed: str | None = None  # why it is not measured
    step: Callable[[], None] | None = None  # once started
    start_s: float = 0.0  # what building, compiling and settling took

    def attempt(self, action: Callable[["Contender"], None]) -> None:
        """Do something with a contender that still runs; whatever it raises ends it alone."""
        if self.failed:
            return
        # Not `cudnn.flags(benchmark=...)`: that switches cuDNN itself off unless asked otherwise.
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        adamp.KERNEL_DEVICES = {"cuda"} if self.kernels else set()
        adamp._kernels.cache_clear()
        adamp.HOST_DEVICES = ()  # on a CPU, too, it is a GPU's step that is counted
        try:
            action(self)
        except torch.cuda.OutOfMemoryError:
            self.failed, self.step = "out of memory", None
        except Exception as error:  # a compiler's, cuDNN's: the others are measured all the same
            reason = str(error).strip().splitlines()
            self.failed, self.step = (
                f"{type(error).__name__}: {reason[0][:200] if reason else ''}",
                None,
            )
            traceback.print_exc()

    def start(self, device: torch.device) -> None:
        """Build, compile and settle."""
        start = time.perf_counter()
        held = memory_held(device)
        self.timer = DeviceTimer(device)
        self.step = self.make(self.timer)
        for _ in range(4):
            self.step()
        wait_for(device)
        self.start_s = time.perf_counter() - start
        if device.type == "cuda":
            self.memory_gb = (torch.cuda.max_memory_allocated(device) - held) / 1e9

    def count(self, device: torch.device) -> None:
        """Launches and syncs of one step."""
        if device.type != "cuda":
            with HostReads() as counted:
                self.step()
            self.launches, self.syncs = counted.num_operations, counted.num_reads
            return
        self.syncs = count_sync_warnings(self.step)
        wait_for(device)
        with torch.profiler.profile() as profiler:
            self.step()
            wait_for(device)
        kernels = [
            event
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation
            and not event.name.startswith(("Memcpy", "Memset"))
        ]
        self.launches = len(kernels)
        times, counts = Counter(), Counter()
        for event in kernels:
            times[event.name] += event.time_range.elapsed_us() / 1e3
            counts[event.name] += 1
        self.top_kernels = [
            {"kernel": name, "ms": ms, "launches": counts[name]}
            for name, ms in times.most_common(20)
        ]

    def measure(self, device: torch.device, num_steps: int) -> None:
        """One round."""
        wait_for(device)
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        wait_for(device)
        self.step_ms.append(1e3 * (time.perf_counter() - start) / num_steps)
        self.clock_mhz += clock_mhz(device)
        optimizer_ms = self.timer.last_ms()
        if optimizer_ms is not None:
            self.optimizer_ms.append(optimizer_ms)


def count_sync_warnings(step: Callable[[], None]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def memory_held(device: torch.device) -> int:
    """Bytes that other contenders hold; the peak is counted from here on."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def clock_mhz(device: torch.device) -> list[float]:
    """The clock of the multiprocessors as nvidia-smi gives it; nothing where it cannot be asked."""
    if device.type != "cuda":
        return []
    query = ["--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        command = ["nvidia-smi", f"--id={device.index or 0}", *query]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return [float(output)]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
