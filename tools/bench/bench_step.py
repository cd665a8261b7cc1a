"""Training steps side by side in one process: time, launches, host syncs, images/s, MFU.

    python tools/bench/bench_step.py --json steps.json    # one GPU, about 10 minutes
    python tools/bench/bench_step.py --shards data/train.json    # and ours fed by the loader

The package need not be installed. A bare machine (Python 3.12 with torch, torchvision, timm and
click, no network) gets what it lacks in a folder of 24 MB, which `make carried` fills, and a shard
that `wds-convnext shards CIFAR10_PARQUET --out cifar` writes:

    PYTHONPATH=carried python tools/bench/bench_step.py --json steps.json
    PYTHONPATH=carried python tools/bench/train_on_gpu.py cifar/train-000.tar

Contenders (`bench_step_contenders`), each with its own model, on the same synthetic batches in
host memory:

- article: its loop as written: float32 batches copied while the host waits, fp16, GradScaler,
  timm's AdamP, isfinite and three `.item()` (its progress bar and TensorBoard are left out);
- timm, AdamP: train.py of timm 1.0 with --amp-dtype bfloat16 --torchcompile --channels-last
  --clip-grad 1, its PrefetchLoader, its Mixup on the device, its `loss.item()`;
- timm, AdamW: the same with PyTorch's fused AdamW, the lower bound of any optimizer;
- ours: `train_step` on `prefetch_to_device`'s batches, channels_last as our loader makes them;
- ours, cudnn.benchmark, with which timm and the article train, and we do not;
- ours, AdamP by operations: without the kernels of `adamp_triton`;
- compiled, ours with Inductor's `combo_kernels`; on a GPU, ours with `--cuda-graphs`.

Rounds go through all contenders in turn, so that a drift of the machine's speed hits all of them.
A step's time is a round's time over its steps, the device waited for at both ends. `rest` is the
step without its optimizer: copy, mixing, forward, backward, clipping. Launches are kernels on a
GPU, ATen operations on a CPU; syncs are what `torch.cuda.set_sync_debug_mode` warns of, on a CPU
the reads of a value by the host. What a device cannot tell is n/a.

A contender that fails leaves its row out and says why. GB is the most memory of a contender's own
tensors, MHz the SM clock after a round. By default, on a GPU: convnext_base at batch 160, the
article's; --model and --batch-size may be given several times and are measured one after the other.
JSON is written after each contender's start and each round. Once --minutes are over nothing is
started, nor is what would not end by then if it takes as long to compile as the slowest so far;
what was started is measured at least once.
"""

import contextlib
import gc
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
from bench_step_contenders import (
    NUM_CLASSES,
    Contender,
    Setting,
    article_step,
    batches_from_shards,
    our_step,
    timm_step,
)

from wds_convnext.training.distributed import Machine, World, choose_amp
from wds_convnext.training.model import create_model
from wds_convnext.training.monitor import peak_flops, training_flops


def contenders_of(setting: Setting, shards: str | None, workers: int) -> dict[str, Contender]:
    """All of them, by name."""

    def ours(**options):
        return lambda timer: our_step(setting, timer, **options)

    def timms(**options):
        return lambda timer: timm_step(setting, timer, **options)

    fused = {"fused": True} if setting.device.type == "cuda" else {}
    all_of_them = []  # the first to be started last: what is on trial gives way
    if setting.machine.compiled and setting.device.type == "cuda":
        graphed = replace(setting, machine=replace(setting.machine, cuda_graphs=True))
        all_of_them.append(Contender("ours, CUDA graphs", lambda timer: our_step(graphed, timer)))
    if setting.machine.compiled:
        all_of_them.append(Contender("ours, combo_kernels", ours(combo_kernels=True)))
    all_of_them += [
        Contender("article", lambda timer: article_step(setting, timer), cudnn_benchmark=True),
        Contender("timm, AdamP", timms(opt="adamp"), cudnn_benchmark=True),
        Contender("timm, AdamW", timms(opt="adamw", **fused), cudnn_benchmark=True),
        Contender("ours", ours()),
        Contender("ours, cudnn.benchmark", ours(), cudnn_benchmark=True),
        Contender("ours, AdamP by operations", ours(), kernels=False),
    ]
    if shards:
        batches = batches_from_shards(setting, shards, workers)
        all_of_them.append(Contender("ours, from shards", ours(batches=batches)))
    return {contender.name: contender for contender in all_of_them}


def summarize(contender: Contender, ours: Contender, setting: Setting, flops: int) -> dict:
    """A row of the table: medians over rounds; None where the device cannot tell."""
    row = {"contender": contender.name, "failed": contender.failed}
    if contender.failed or not contender.step_ms:
        return row
    step_ms = statistics.median(contender.step_ms)
    optimizer_ms = statistics.median(contender.optimizer_ms) if contender.optimizer_ms else None
    images_per_s = 1e3 * setting.batch_size / step_ms
    peak = None
    if setting.device.type == "cuda" and setting.machine.amp != "off":
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
        "memory_gb": contender.memory_gb,
        "clock_mhz": statistics.median(contender.clock_mhz) if contender.clock_mhz else None,
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
    "memory_gb": ("GB", "{:.1f}"),
    "clock_mhz": ("MHz", "{:.0f}"),
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


class Deadline:
    """The end of --minutes, counted from now."""

    def __init__(self, minutes: float):
        self._end = time.perf_counter() + 60 * minutes
        self._longest_start_s = 0.0

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self._end

    def leaves_time_to_start(self) -> bool:
        """Whether a contender would start by then, if as slow as the slowest so far."""
        return time.perf_counter() + self._longest_start_s <= self._end

    def note_start(self, seconds: float) -> None:
        self._longest_start_s = max(self._longest_start_s, seconds)


def run_rounds(
    contenders: list[Contender],
    device: torch.device,
    rounds: int,
    steps: int,
    deadline: Deadline,
    report: Callable[[], None],
) -> None:
    """Start and count all, then measure in turn, until the rounds or the time are over.

    Ours is last in the table and first to start: without it the others are compared with nothing.
    """
    for contender in reversed(contenders):
        if not deadline.leaves_time_to_start():
            contender.failed = "no time left"
        contender.attempt(lambda one: one.start(device))
        contender.attempt(lambda one: one.count(device))
        deadline.note_start(contender.start_s)
        report()
    for number in range(rounds):
        if number > 0 and deadline.is_over:
            return
        for contender in contenders:
            contender.attempt(lambda one: one.measure(device, steps))
        report()


def measure_setting(
    setting: Setting,
    names: list[str] | None,
    *,
    shards: str | None,
    workers: int,
    rounds: int,
    steps: int,
    deadline: Deadline,
    report: Callable[[dict], None],
) -> dict:
    """Measure the contenders of these names, or all; `report` gets what is known so far."""
    torch.compiler.reset()  # it gives up compiling a forward that too many models share
    gc.collect()  # the models of the setting before
    torch.cuda.empty_cache()
    known = contenders_of(setting, shards, workers)
    chosen = [known[name] for name in names or known]
    flops = training_flops(create_model(setting.model, num_classes=NUM_CLASSES), setting.image_size)

    def result() -> dict:
        return {
            "model": setting.model,
            "batch_size": setting.batch_size,
            "image_size": setting.image_size,
            "flops_per_image": flops,
            "compiled": setting.machine.compiled,
            "rows": [summarize(one, known["ours"], setting, flops) for one in chosen],
        }

    run_rounds(chosen, setting.device, rounds, steps, deadline, lambda: report(result()))
    return result()


def versions(device: torch.device, amp: str) -> str:
    """What the figures depend on, in one line."""
    name, cudnn, triton = "CPU", None, None
    if device.type == "cuda":
        name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return (
        f"{name}, torch {torch.__version__}, timm {timm.__version__}, cuDNN {cudnn}, "
        f"Triton {triton}, {amp}"
    )


@click.command()
@click.option("--model", "models", multiple=True, help="[GPU: convnext_base]")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, help="[GPU: 160; CPU: 16]")
@click.option("--image-size", type=int, help="[GPU: 224; CPU: 32]")
@click.option("--contenders", help="Names, separated by semicolons.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", type=int, help="Per round. [GPU: 20; CPU: 3]")
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
    deadline = Deadline(minutes)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    compile = on_gpu if compile is None else compile
    machine = Machine(World(), device, choose_amp("auto", device), compile)
    about = versions(device, machine.amp)
    report = {"about": about, "results": []}

    def write(unfinished: dict | None = None) -> None:
        if json_path:
            results = report["results"] + ([unfinished] if unfinished else [])
            json_path.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")

    for model, batch_size in itertools.product(
        models or (("convnext_base",) if on_gpu else ("test_convnext",)),
        batch_sizes or ((160,) if on_gpu else (16,)),
    ):
        result = measure_setting(
            Setting(model, batch_size, image_size or (224 if on_gpu else 32), machine),
            [name.strip() for name in contenders.split(";")] if contenders else None,
            shards=shards,
            workers=workers,
            rounds=rounds,
            steps=steps or (20 if on_gpu else 3),
            deadline=deadline,
            report=write,
        )
        click.echo(
            f"\n{model}, {result['image_size']} px, batch {batch_size}, "
            f"{result['flops_per_image'] / 1e9:.3g} GFLOP per image; {about}, "
            f"{'compiled' if compile else 'not compiled'}; medians of {rounds} rounds\n\n"
            f"{format_table(result['rows'])}"
        )
        report["results"].append(result)
        write()


if __name__ == "__main__":
    main()
