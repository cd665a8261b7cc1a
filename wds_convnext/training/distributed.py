"""The processes of a run, their devices, and what they tell each other.

Sums and gathers are the identity in one process.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from wds_convnext.config.groups.running import MachineOptions
from wds_convnext.errors import TrainingError, UsageError, WdsConvnextError
from wds_convnext.options import warn
from wds_convnext.training.compiler import require_compiler, require_cuda_graphs
from wds_convnext.training.precision import (
    CPU_CONVOLUTIONS,
    TORCHS_CONVOLUTIONS,
    fit_convolutions_to_a_cpu,
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0


@dataclass(frozen=True)
class Machine:
    """Where and how a model is computed, seen from one process."""

    world: World
    device: torch.device
    amp: str  # off, bf16 or fp16
    compiled: bool = False
    cuda_graphs: bool = False  # whether the compiled model is replayed from some

    @classmethod
    def of(
        cls,
        world: World,
        device: torch.device,
        *,
        amp: str,
        compile: bool | None = False,
        cuda_graphs: bool = False,
    ) -> "Machine":
        """The machine in the precision asked for, compiling or not (None: on CUDA).

        Raises:
            UsageError: if the device cannot do it.
        """
        compiled = device.type == "cuda" if compile is None else compile
        if cuda_graphs:
            require_cuda_graphs(device, compiled=compiled, num_ranks=world.size)
        if compiled:
            require_compiler(device)
        if amp == "bf16" and device.type == "cuda" and world.is_main and not _has_bf16():
            name = torch.cuda.get_device_name(device)
            warn(f"--amp bf16: {name} only emulates it, which is slow. Use --amp fp16.")
        return cls(world, device, choose_amp(amp, device), compiled, cuda_graphs)

    @classmethod
    def for_training(cls, world: World, device: torch.device, options: MachineOptions) -> "Machine":
        """The machine as the options of a training ask for it.

        Raises:
            UsageError: if the device cannot do it.
        """
        return cls.of(
            world,
            device,
            amp=options.amp,
            compile=options.compile,
            cuda_graphs=options.cuda_graphs,
        )

    def place(self, model: nn.Module) -> nn.Module:
        """The model, moved to the device and made ready for its precision there."""
        if self._is_half_on_cpu:
            fit_convolutions_to_a_cpu(model)
        return model.to(self.device)

    @property
    def convolutions(self) -> str:
        """How they are computed, as a fact of a run."""
        return CPU_CONVOLUTIONS if self._is_half_on_cpu else TORCHS_CONVOLUTIONS

    @property
    def _is_half_on_cpu(self) -> bool:
        return self.device.type == "cpu" and self.amp != "off"

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return partial(torch.autocast, self.device.type, dtype=dtype) if dtype else nullcontext


def join_world(device_name: str, *, timeout_s: float = 600) -> tuple[World, torch.device]:
    """Join the process group that torchrun announced, if any, and choose this rank's device.

    Args:
        device_name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        timeout_s: how long a collective may wait before the run ends with an error.

    Raises:
        UsageError: if the device is not there.
    """
    world = announced_world()
    device = _choose_device(device_name, world)
    if world.size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"rank {world.rank}: the {world.size} processes of the run do not find each other "
                f"({str(error).splitlines()[0]}). {_TORCHRUN}"
            ) from None
    return world, device


_TORCHRUN = (
    "Start several processes with torchrun; for one, unset RANK, WORLD_SIZE and LOCAL_RANK, which "
    "another job has left."
)
# What other launchers announce to each of the processes that they start; srun and mpirun.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def announced_world() -> World:
    """What torchrun says in the environment, or one process.

    Raises:
        UsageError: if it makes no sense, or another launcher has started several processes.
    """
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if said["WORLD_SIZE"] is None:
        for name in _TASK_COUNTS:
            if os.environ.get(name, "1") != "1":
                raise UsageError(
                    f"{name}={os.environ[name]}: so many processes were started, but not by "
                    "torchrun, so each would train alone. Start one torchrun on each machine."
                )
    rank, size, local_rank = (
        int(text or default) if (text or default).isdecimal() else -1
        for text, default in zip(said.values(), ("0", "1", "0"))
    )
    needs = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if -1 in (rank, size, local_rank) or rank >= size or (size > 1 and needs):
        found = ", ".join(f"{name}={text}" for name, text in said.items() if text is not None)
        raise UsageError(f"{found}: not what torchrun sets. {_TORCHRUN}")
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    local_size = min(size, max(1, int(here))) if here.isdecimal() else size
    return World(rank, size, local_rank, local_size)


def _choose_device(name: str, world: World) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and world.size == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device. Use auto, cpu, cuda or mps.") from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        wanted = device.index if device.index is not None else world.local_rank
        if wanted >= found:
            raise UsageError(
                f"--device {name}: process {wanted} on this machine needs its own GPU, "
                f"{found} found. Use --device cpu, or fewer processes."
            )
        device = torch.device("cuda", wanted)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has none. Use --device cpu.")
    return device


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_amp(amp: str, device: torch.device) -> str:
    """`off`, `bf16` or `fp16`.

    Raises:
        UsageError: if the device cannot do it.
    """
    if amp == "auto":
        if device.type != "cuda":
            return "off"
        return "bf16" if _has_bf16() else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs CUDA, found {device.type}. Use bf16 or off.")
    return amp


def is_lost_peer(error: RuntimeError | MemoryError) -> bool:
    """Whether a collective failed because another process is gone or did not come."""
    reason = str(error)
    return isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory, of the device or of the machine, was asked for in vain."""
    is_of_torch = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
    return is_of_torch or isinstance(error, MemoryError)


def leave_world(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place; the same on every rank."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: Item, world: World) -> Item:
    """The main rank's value, on every rank (plain Python values)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def decided_by_main(decide: Callable[[], Item], world: World) -> Item:
    """What a function gives (plain values), or raises, on the main rank, which alone calls it."""
    outcome: list[Item] | WdsConvnextError = []
    if world.is_main:
        try:
            outcome = [decide()]
        except WdsConvnextError as error:
            outcome = error
    outcome = broadcast_object(outcome, world)
    if isinstance(outcome, WdsConvnextError):
        raise outcome
    return outcome[0]


def gather_lists(items: list[Item], world: World) -> list[Item]:
    """The lists of all ranks joined, in the order of ranks; the same on every rank."""
    if world.size == 1:
        return items
    lists: list[list[Item]] = [[]] * world.size
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
