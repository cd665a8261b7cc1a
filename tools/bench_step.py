"""Training steps side by side in one process: time, launches, host syncs, images/s, MFU.

    python tools/bench_step.py --json steps.json                   # one GPU, under 10 minutes
    python tools/bench_step.py --shards 'data/train-<000..012>.tar' # and ours fed by the loader

Contenders, each with its own model, on the same synthetic batches in host memory:

- article: its loop as written: float32 batches copied while the host waits, fp16, GradScaler,
  timm's AdamP, isfinite and three `.item()` (its progress bar and TensorBoard are left out);
- timm, AdamP: train.py of timm 1.0 with --amp-dtype bfloat16 --torchcompile --channels-last
  --clip-grad 1, its PrefetchLoader, its Mixup on the device, its `loss.item()`;
- timm, AdamW: the same with PyTorch's fused AdamW, the lower bound of any optimizer;
- ours: `train_step` on `prefetch_to_device`'s batches;
- ours, compiled AdamP (only if asked for: --contenders): with `torch.compile` on the optimizer.

Rounds go through all contenders in turn, so that a drift of the machine's speed hits all of them.
A step's time is a round's time over its steps, the device waited for at both ends. `rest` is the
step without its optimizer: copy, mixing, forward, backward, clipping. Launches are kernels on a
GPU, ATen operations on a CPU; syncs are what `torch.cuda.set_sync_debug_mode` warns of, on a CPU
the reads of a value by the host. What a device cannot tell is n/a.
"""

import itertools
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
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

from wds_convnext.build import Compute, build_recipe, build_state, choose_amp
from wds_convnext.config import TrainConfig
from wds_convnext.device import prefetch_to_device
from wds_convnext.distributed import World
from wds_convnext.gauges import DeviceTimer, peak_flops, training_flops
from wds_convnext.model import create_model
from wds_convnext.order import TrainOrder
from wds_convnext.reader import open_shards
from wds_convnext.step import train_step
from wds_convnext.stream import Batch, ShardStream, make_loader
from wds_convnext.transforms import TrainTransform

NUM_CLASSES = 100
DROP_PATH_RATE = 0.2
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    model: str
    batch_size: int
    image_size: int
    compute: Compute

    @property
    def device(self) -> torch.device:
        return self.compute.device

    def host_batches(self) -> list[Batch]:
        """A few different uint8 batches, in memory that a GPU copies from directly."""
        rng = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        batches = []
        for _ in range(4):
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
            labels = torch.randint(0, NUM_CLASSES, (self.batch_size,), generator=rng)
            tensors = images, labels, torch.ones(self.batch_size, dtype=torch.bool)
            if self.device.type == "cuda":
                tensors = tuple(tensor.pin_memory() for tensor in tensors)
            batches.append(Batch(*tensors, []))
        return batches

    def compile(self, model: nn.Module) -> Callable:
        return torch.compile(model) if self.compute.compiled else model


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
    device, autocast = setting.device, setting.compute.autocast
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
    compile_optimizer: bool = False,
) -> Callable[[], None]:
    """`train_step` as `wds-convnext train` calls it."""
    config = TrainConfig(
        model=setting.model, image_size=setting.image_size, batch_size=setting.batch_size
    )
    state, _ = build_state(config, NUM_CLASSES, setting.compute)
    recipe = build_recipe(config, state, NUM_CLASSES, setting.compute)
    recipe = replace(recipe, optimizer_timer=timer)
    if compile_optimizer:
        state.optimizer.step = torch.compile(state.optimizer.step, fullgraph=True)
    batches = batches or itertools.cycle(setting.host_batches())
    on_device = prefetch_to_device(batches, setting.device)

    def step() -> None:
        train_step(state, [next(on_device)], lr=1e-4, recipe=recipe)

    return step


def batches_from_shards(setting: Setting, spec: str, workers: int) -> Iterator[Batch]:
    """Batches as training reads, decodes and crops them; labels folded into NUM_CLASSES."""
    shard_set = open_shards(spec)
    order = TrainOrder(
        shard_set.sizes, seed=0, global_batch_size=setting.batch_size, shuffle_buffer=100_000
    )
    transform = TrainTransform(setting.image_size)
    stream = ShardStream(shard_set, order, batch_size=setting.batch_size, transform=transform)
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
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    launches: int | None = None
    syncs: int | None = None
    top_kernels: list[dict] = field(default_factory=list)  # of one step; empty on a CPU
    failed: str | None = None

    def attempt(self, action: Callable[["Contender"], None]) -> None:
        """Do something with a contender that still runs; running out of memory ends it."""
        if self.failed:
            return
        try:
            with torch.backends.cudnn.flags(benchmark=self.cudnn_benchmark):
                action(self)
        except torch.cuda.OutOfMemoryError:
            self.failed = "out of memory"

    def start(self, device: torch.device) -> None:
        """Build, compile and settle."""
        self.timer = DeviceTimer(device)
        self.step = self.make(self.timer)
        for _ in range(4):
            self.step()
        wait_for(device)

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


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contenders_of(setting: Setting, shards: str | None, workers: int) -> dict[str, Contender]:
    """All of them, by name."""

    def ours(**options):
        return lambda timer: our_step(setting, timer, **options)

    def timms(**options):
        return lambda timer: timm_step(setting, timer, **options)

    fused = {"fused": True} if setting.device.type == "cuda" else {}
    all_of_them = [
        Contender("article", lambda timer: article_step(setting, timer), cudnn_benchmark=True),
        Contender("timm, AdamP", timms(opt="adamp"), cudnn_benchmark=True),
        Contender("timm, AdamW", timms(opt="adamw", **fused), cudnn_benchmark=True),
        Contender("ours", ours()),
        Contender("ours, compiled AdamP", ours(compile_optimizer=True)),
    ]
    if shards:
        batches = batches_from_shards(setting, shards, workers)
        all_of_them.append(Contender("ours, from shards", ours(batches=batches)))
    return {contender.name: contender for contender in all_of_them}


def summarise(contender: Contender, ours: Contender, setting: Setting, flops: int) -> dict:
    """A row of the table: medians over rounds; None where the device cannot tell."""
    row = {"contender": contender.name, "failed": contender.failed}
    if contender.failed or not contender.step_ms:
        return row
    step_ms = statistics.median(contender.step_ms)
    optimizer_ms = statistics.median(contender.optimizer_ms) if contender.optimizer_ms else None
    images_per_s = 1e3 * setting.batch_size / step_ms
    peak = None
    if setting.device.type == "cuda" and setting.compute.amp != "off":
        peak = peak_flops(torch.cuda.get_device_name(setting.device))
    paired = zip(contender.step_ms, ours.step_ms)
    return row | {
        "step_ms": step_ms,
        "step_ms_rounds": contender.step_ms,
        "optimizer_ms": optimizer_ms,
        "rest_ms": optimizer_ms and step_ms - optimizer_ms,
        "images_per_s": images_per_s,
        "mfu": peak and images_per_s * flops / peak,
        "launches": contender.launches,
        "syncs": contender.syncs,
        "times_ours": statistics.median(one / other for one, other in paired)
        if ours.step_ms
        else None,
        "top_kernels": contender.top_kernels,
    }


COLUMNS = {
    "step_ms": ("step ms", "{:.1f}"),
    "spread": ("min..max", "{}"),
    "optimizer_ms": ("optimizer ms", "{:.1f}"),
    "rest_ms": ("rest ms", "{:.1f}"),
    "images_per_s": ("images/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.0%}"),
    "launches": ("launches", "{:,}"),
    "syncs": ("syncs", "{}"),
    "times_ours": ("x ours", "{:.2f}"),
}


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [" | ".join(["contender", *(title for title, _ in COLUMNS.values())])]
    lines.append(" | ".join(["---"] + ["---:"] * len(COLUMNS)))
    for row in rows:
        rounds = row.get("step_ms_rounds")
        row = row | ({"spread": f"{min(rounds):.1f}..{max(rounds):.1f}"} if rounds else {})
        missing = row["failed"] or "n/a"
        cells = [
            missing if row.get(name) is None else style.format(row[name])
            for name, (_, style) in COLUMNS.items()
        ]
        lines.append(" | ".join([row["contender"], *cells]))
    return "\n".join(f"| {line} |" for line in lines)


@click.command()
@click.option("--model", "models", multiple=True, help="[GPU: convnext_base, convnext_tiny]")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, help="[GPU: 160; CPU: 16]")
@click.option("--image-size", type=int, help="[GPU: 224; CPU: 32]")
@click.option("--contenders", help="Names, separated by semicolons.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", type=int, help="Per round. [GPU: 10; CPU: 3]")
@click.option("--shards", help="Also ours fed by the loader, from these.")
@click.option("--workers", default=14, show_default=True, help="Of the loader, for --shards.")
@click.option("--compile/--no-compile", default=None, help="[GPU: compile]")
@click.option("--device", default="auto", show_default=True)
@click.option("--minutes", default=9.0, show_default=True, help="Start nothing after so long.")
@click.option("--json", "json_path", type=Path, help="Write everything measured there.")
def main(
    models,
    batch_sizes,
    image_size,
    contenders,
    rounds,
    steps,
    shards,
    workers,
    compile,
    device,
    minutes,
    json_path,
):
    """Compare training steps on synthetic batches."""
    deadline = time.perf_counter() + 60 * minutes
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    compile = on_gpu if compile is None else compile
    compute = Compute(World(), device, choose_amp("auto", device), compile)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    about = f"{name}, torch {torch.__version__}, timm {timm.__version__}, {compute.amp}"
    report = {"device": name, "about": about, "results": []}
    for model, batch_size in itertools.product(
        models or (("convnext_base", "convnext_tiny") if on_gpu else ("test_convnext",)),
        batch_sizes or (160 if on_gpu else 16,),
    ):
        torch.compiler.reset()  # it gives up compiling a forward that too many models share
        setting = Setting(model, batch_size, image_size or (224 if on_gpu else 32), compute)
        known = contenders_of(setting, shards, workers)
        names = [name.strip() for name in contenders.split(";")] if contenders else list(known)
        if not contenders:
            names.remove("ours, compiled AdamP")  # compiles for minutes
        chosen = [known[name] for name in names]
        flops = training_flops(create_model(model, num_classes=NUM_CLASSES), setting.image_size)
        run_rounds(chosen, device, rounds, steps or (10 if on_gpu else 3), deadline)
        rows = [summarise(one, known["ours"], setting, flops) for one in chosen]
        click.echo(
            f"\n{model}, {setting.image_size} px, batch {batch_size}, {flops / 1e9:.3g} GFLOP per "
            f"image; {about}, {'compiled' if compile else 'not compiled'}; medians of "
            f"{rounds} rounds\n\n{format_table(rows)}"
        )
        report["results"].append(
            {"model": model, "batch_size": batch_size, "image_size": setting.image_size}
            | {"flops_per_image": flops, "compiled": compile, "rows": rows}
        )
        if json_path:
            json_path.write_text(json.dumps(report, indent=1) + "\n")


def run_rounds(
    contenders: list[Contender],
    device: torch.device,
    rounds: int,
    steps: int,
    deadline: float,
) -> None:
    """Start all, count all, then measure in turn, until the rounds or the time are over."""
    for contender in contenders:
        if time.perf_counter() > deadline:
            contender.failed = "no time left"
        contender.attempt(lambda one: one.start(device))
        contender.attempt(lambda one: one.count(device))
    for _ in range(rounds):
        if time.perf_counter() > deadline:
            return
        for contender in contenders:
            contender.attempt(lambda one: one.measure(device, steps))


if __name__ == "__main__":
    main()
