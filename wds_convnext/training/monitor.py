"""What the machine gives: FLOP/s and their share of the peak, optimizer time, memory, a trace."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wds_convnext.training.distributed import Machine

# Dense TFLOP/s in half precision with float32 accumulation, from NVIDIA's data sheets.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that a GPU of this name can do in half precision; None if it is not in the table."""
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tflops * 1e12
    return None


@torch.no_grad()
def training_flops(model: nn.Module, image_size: int) -> int | None:
    """FLOPs of training on one image: three times the forward pass's; None if uncountable.

    A multiply-add is 2; convolutions and matrix products are counted, elementwise work is not.
    Counted without computing, on a copy whose tensors have no data. (Three times, because the
    counter takes the backward pass of a depthwise convolution for a dense one's: torch 2.15.)
    """
    tensors = [*model.parameters(), *model.buffers()]
    without_data = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in model.parameters():
        without_data[id(parameter)] = nn.Parameter(without_data[id(parameter)], False)
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        copy = deepcopy(model, without_data).eval()
        with FlopCounterMode(display=False) as counter:
            copy(image)
    except Exception:  # whatever a model's code raises on tensors without data
        return None
    return 3 * counter.get_total_flops()


class DeviceTimer:
    """Times a part of a step on the device, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._span: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Time what is done within this context; the last one counts."""
        start = self._mark()
        yield
        self._span = start, self._mark()

    def last_ms(self) -> float | None:
        """Milliseconds of the last span; to be asked when the device is done with it."""
        if self._span is None or self.device.type not in ("cpu", "cuda"):
            return None
        start, end = self._span
        return start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)

    def _mark(self) -> Any:  # an event of CUDA, else seconds
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@dataclass(frozen=True)
class Gauges:
    """Turns a rate of images into what it means for the machine.

    Args:
        flops: of training on an image of each size, see `training_flops`; None if not known.
        peak: FLOP/s of one device; None where it is not known.
        num_devices: that share the images.
    """

    flops: Mapping[int, int | None]
    peak: float | None
    num_devices: int
    optimizer_timer: DeviceTimer

    def read(self, images_per_s: float, steps_of: Mapping[int, int]) -> dict[str, float]:
        """Per device: TFLOP/s, share of the peak, optimizer time, peak memory; known ones only.

        Args:
            steps_of: how many of the steps with that rate had which image size.
        """
        work = [count * (self.flops[size] or 0) for size, count in steps_of.items()]
        per_image = sum(work) / sum(steps_of.values())
        flops = images_per_s * per_image / self.num_devices or None
        readings = {
            "train/tflops_per_s": flops and flops / 1e12,
            "train/mfu": flops / self.peak if flops and self.peak else None,
            "train/optimizer_ms": self.optimizer_timer.last_ms(),
            "train/memory_gb": peak_memory(self.optimizer_timer.device) / 1e9,
        }
        return {name: value for name, value in readings.items() if value is not None}


def build_gauges(
    model: nn.Module, *, sizes: Iterable[int], machine: Machine, timer: DeviceTimer
) -> Gauges:
    """What a run's speed is held against; a peak is known for half precision on some GPUs."""
    peak = None
    if machine.device.type == "cuda" and machine.amp != "off":
        peak = peak_flops(torch.cuda.get_device_name(machine.device))
    return Gauges(
        {size: training_flops(model, size) for size in sizes},
        peak=peak,
        num_devices=machine.world.size,
        optimizer_timer=timer,
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of tensors on a GPU, else of everything in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def tracing(path: Path | None) -> Iterator[Callable[[], None]]:
    """Write a Chrome trace of the sixth to eighth step; gives a function to call after each step.

    The first steps compile and settle, so they are left out. A run that ends within the traced
    steps leaves what there is. Without a path nothing is traced.
    """
    if path is None:
        yield lambda: None
        return
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
