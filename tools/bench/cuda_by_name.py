"""Training on tensors that claim to be on CUDA and hold no data, where no GPU is.

Within `without_data` they are made and used; nothing is computed.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils

from wds_convnext.config import TrainConfig
from wds_convnext.training import adamp
from wds_convnext.training.ema import WeightAverage
from wds_convnext.training.optimizer import build_optimizer
from wds_convnext.training.state import StepSums, TrainState

DEVICE = torch.device("cuda")


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Where tensors have no data: lists of them at once as on a GPU, and no kernels of ours."""
    with (
        FakeTensorMode(),
        patch.object(_foreach_utils, "_foreach_supported_types", [Tensor, FakeTensor]),
        patch.object(adamp, "_kernels", lambda device: None),
    ):
        yield


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast for CUDA; `torch.autocast` switches itself off where no GPU is."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def state_on_cuda(config: TrainConfig, plain: nn.Module, *, amp: str) -> TrainState:
    """The state that a run starts from, without data."""

    def fake(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE, memory_format=layout)

    fakes: dict[int, Any] = {id(buffer): fake(buffer) for buffer in plain.buffers()}
    fakes |= {id(p): nn.Parameter(fake(p)) for p in plain.parameters()}
    model = copy.deepcopy(plain, fakes).train()
    average = None
    if config.ema_decay:
        average = WeightAverage(model, decay=config.ema_decay, num_updates=0)
    # "cpu" does not look for a GPU; its operations are the same.
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16")
    return TrainState(model, build_optimizer(model, config), scaler, average, StepSums(DEVICE))


def call_nodes(loss: Tensor) -> None:
    """Add the gradients of a 0-d loss to `grad` of the leaves, as autograd's engine does."""
    waiting_for = _count_edges(loss.grad_fn)
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        # None where no gradient came, as what the node made is not used.
        inputs = gradients.pop(node, None)
        if inputs is not None and hasattr(node, "variable"):  # a leaf
            leaf, [gradient] = node.variable, inputs
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            continue
        results: Any = (None,) * len(node.next_functions) if inputs is None else node(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for (following, number), gradient in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if gradient is not None:
                sums = gradients.setdefault(following, [None] * len(following._input_metadata))
                expected = following._input_metadata[number]
                if gradient.shape != expected.shape:  # it was broadcast in the forward pass
                    gradient = gradient.sum_to_size(expected.shape)
                gradient = gradient.to(expected.dtype)
                before = sums[number]
                sums[number] = gradient if before is None else before + gradient
            waiting_for[following] -= 1
            if not waiting_for[following]:
                ready.append(following)


def _count_edges(root: Any) -> Counter:
    """How many edges lead to each node of a graph."""
    nodes, counts = [root], Counter()
    for node in nodes:  # grows meanwhile
        for following, _ in node.next_functions:
            if following is not None:
                if following not in counts:
                    nodes.append(following)
                counts[following] += 1
    return counts
