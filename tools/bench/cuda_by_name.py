"""Training on tensors that claim to be on CUDA and hold no data, where no GPU is.

Within `without_data` they are made and used; nothing is computed.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
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


def backward(loss: Tensor) -> None:
    """What `loss.backward()` does, which would ask the device: a 0-d loss, real tensors or not."""
    with torch.no_grad():
        for node, [gradient] in call_nodes([loss], [torch.ones_like(loss)]).items():
            leaf = node.variable
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], **_: Any
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` gives."""
    edges = [get_gradient_edge(tensor) for tensor in inputs]
    found = call_nodes(outputs, grad_outputs, until={edge.node for edge in edges})
    return tuple(found[edge.node][edge.output_nr] if edge.node in found else None for edge in edges)


def call_nodes(
    outputs: Sequence[Tensor], given: Sequence[Tensor | None], *, until: Collection = ()
) -> dict[Any, list[Tensor | None]]:
    """Call the nodes of a graph one by one, in the order of autograd's engine.

    Args:
        given: the gradients of the outputs.
        until: nodes that are not called.
    Returns:
        What these nodes would have been called with, and the graph's leaves.
    """
    gradients: dict[Any, list[Tensor | None]] = {}
    for tensor, gradient in zip(outputs, given, strict=True):
        edge = get_gradient_edge(tensor)
        _inputs_of(edge.node, gradients)[edge.output_nr] = gradient
    roots = list(gradients)
    waiting_for = _count_edges(roots)
    ready = [node for node in roots if not waiting_for[node]]
    found = {}
    while ready:
        node = ready.pop()
        # None where no gradient came, as what the node made is not used.
        inputs = gradients.pop(node, None)
        if node in until or hasattr(node, "variable"):  # a leaf
            if inputs is not None:
                found[node] = inputs
            continue
        results: Any = (None,) * len(node.next_functions) if inputs is None else node(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for (following, number), gradient in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if gradient is not None:
                expected = following._input_metadata[number]
                if gradient.shape != expected.shape:  # it was broadcast in the forward pass
                    gradient = gradient.sum_to_size(expected.shape)
                gradient = gradient.to(expected.dtype)
                sums = _inputs_of(following, gradients)
                before = sums[number]
                sums[number] = gradient if before is None else before + gradient
            waiting_for[following] -= 1
            if not waiting_for[following]:
                ready.append(following)
    return found


def _inputs_of(node: Any, gradients: dict[Any, list[Tensor | None]]) -> list[Tensor | None]:
    return gradients.setdefault(node, [None] * len(node._input_metadata))


def _count_edges(roots: list) -> Counter:
    """How many edges lead to each node of a graph."""
    nodes, counts = list(roots), Counter()
    for node in nodes:  # grows meanwhile
        for following, _ in node.next_functions:
            if following is not None:
                if following not in counts and following not in roots:
                    nodes.append(following)
                counts[following] += 1
    return counts
