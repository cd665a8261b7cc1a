"""torch.compile: what it needs, what it makes of a model, and where it cut it."""

import os
import shutil
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from wds_convnext.errors import UsageError


def has_c_compiler() -> bool:
    """Whether Triton finds the C compiler that it builds the start of its kernels with."""
    return any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang"))))


def require_cuda_graphs(device: torch.device, *, compiled: bool, num_ranks: int) -> None:
    """Refuse CUDA graphs where there can be none.

    Raises:
        UsageError: not on CUDA, without --compile, or in several processes.
    """
    found = None
    if device.type != "cuda":
        found = f"on a GPU, found {device}"
    elif not compiled:
        found = "with --compile, found --no-compile"
    elif num_ranks > 1:  # gradients are summed by DDP's hooks, in the middle of a backward pass
        found = f"in one process, found {num_ranks}"
    if found:
        raise UsageError(f"--cuda-graphs: only {found}. Leave it out.")


def require_compiler(device: torch.device) -> None:
    """Find at once what torch.compile would miss in the middle of the first step.

    Raises:
        UsageError: on CUDA, without a C compiler.
    """
    if device.type == "cuda" and not has_c_compiler():
        raise UsageError(
            "--compile: no C compiler was found (gcc or clang), which torch.compile needs for a "
            "GPU. Install one, name one with CC, or give --no-compile."
        )


def compile_model(model: nn.Module, **options: bool) -> nn.Module:
    """The model compiled for one shape; random masks are those that eager draws for a seed.

    Args:
        options: more of torch._inductor.config's.
    """
    chosen: dict[str, Any] = {"fallback_random": True} | options
    compiled = torch.compile(model, dynamic=False, options=chosen)
    assert isinstance(compiled, nn.Module)  # as what it was made from
    return compiled


def replayed_model(model: nn.Module) -> nn.Module:
    """The model compiled, its kernels recorded as CUDA graphs and replayed.

    What a replay gave is overwritten in later steps. A training step adds up gradients over the
    replays of several batches, so it says itself where it begins (`train_step`); each batch of an
    evaluation is a step of its own.
    """

    def begin_evaluation_step(module: nn.Module, args: tuple) -> None:
        if not module.training:
            torch.compiler.cudagraph_mark_step_begin()

    replayed = compile_model(model, **{"triton.cudagraphs": True})
    replayed.register_forward_pre_hook(begin_evaluation_step)
    return replayed


class Compiled(NamedTuple):
    """What torch.compile has made in this process."""

    num_graphs: int
    cuts: Counter[str]  # why a graph was cut in two, and how often

    def cut_since(self, before: "Compiled", *, most: int) -> str | None:
        """Why more than `most` graphs were made since then; None if they were not.

        Cuts alone mean nothing: of several ranks, DistributedDataParallel's code around the model
        has six.
        """
        if self.num_graphs - before.num_graphs <= most:
            return None
        return next(iter(self.cuts - before.cuts), "no reason given")


def compiled_so_far() -> Compiled:
    """What is compiled by now."""
    from torch._dynamo.utils import counters  # 2 s; who compiles nothing does not pay for it

    return Compiled(counters["stats"]["unique_graphs"], counters["graph_break"].copy())
