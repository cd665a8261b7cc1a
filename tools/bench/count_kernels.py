"""Kernels that torch.compile makes of a model for an H100, counted without a GPU.

    python tools/bench/count_kernels.py --model convnext_base --batch-size 160

Inductor writes its code for tensors that claim to be on CUDA, and is stopped before it builds it.
What asks a device meanwhile is answered from a table, or left out: padding of matrix products and
folding of constants run operations to decide. So counts on a GPU may differ a little. Launches are
those of Triton kernels, calls those of cuBLAS, cuDNN and PyTorch's own kernels; once without and
once with `combo_kernels`, which puts independent kernels into one launch.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import click
import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
from cuda_by_name import DEVICE, autocast, grad, state_on_cuda, without_data

from wds_convnext.config import TrainConfig
from wds_convnext.training.model import model_for

H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
)
KERNEL = re.compile(r"async_compile\.triton\(")
LAUNCH = re.compile(r"^ +triton_\w+\.run\(", re.MULTILINE)
CALL = re.compile(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops)\.\w", re.MULTILINE)


class CodeIsWritten(Exception):
    """Ends a compilation; its argument is the code."""


@contextlib.contextmanager
def as_on_an_h100() -> Iterator[None]:
    """Where Inductor writes code for one, and its autograd works without a device."""

    def answer(value):
        return staticmethod(lambda *args, **options: value)

    def stop(graph: GraphLowering) -> None:
        raise CodeIsWritten(graph.codegen()[0].value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_data())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder))
        for place, name, value in [
            (torch.autograd, "grad", grad),
            (torch.cuda, "get_device_properties", answer(H100)),
            (CudaInterface, "get_device_properties", answer(H100)),
            (CudaInterface.Worker, "get_device_properties", answer(H100)),
            (CudaInterface, "get_compute_capability", answer(90)),
            (CudaInterface, "is_available", answer(True)),
            (CudaInterface, "is_bf16_supported", answer(True)),
            (torch.utils._triton, "triton_hash_with_backend", answer("")),
            (GraphLowering, "_compile_to_module", stop),
        ]:
            stack.enter_context(patch.object(place, name, value))
        yield


def written_code(config: TrainConfig, *, combo_kernels: bool) -> list[str]:
    """Inductor's code for a model's forward pass in training, and for its backward pass."""
    code = []

    def note(graph, inputs, **how):
        try:
            compile_fx.compile_fx_inner(graph, inputs, **how)
        except Exception as error:
            reason = getattr(error, "inner_exception", error)
            if not isinstance(reason, CodeIsWritten):
                raise
            code.append(reason.args[0])
        return graph

    options = {
        "fallback_random": True,  # as our runs have it
        "combo_kernels": combo_kernels,
        "shape_padding": False,
        "joint_graph_constant_folding": False,
        "force_disable_caches": True,
        "compile_threads": 1,
    }
    with torch.device("meta"):
        plain = model_for(config, num_classes=1000)
    with (
        torch._inductor.config.patch(options),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        as_on_an_h100(),
        autocast(torch.bfloat16),
    ):
        compiled = torch.compile(
            state_on_cuda(config, plain, amp="bf16").model,
            backend=lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=note),
            fullgraph=True,
            dynamic=False,
        )
        shape = config.batch_size, 3, config.image_size, config.image_size
        compiled(torch.empty(shape, device=DEVICE).to(memory_format=torch.channels_last))
    return code


@click.command()
@click.option("--model", default="convnext_base", show_default=True)
@click.option("--batch-size", default=160, show_default=True)
@click.option("--image-size", default=224, show_default=True)
def main(model: str, batch_size: int, image_size: int) -> None:
    """Print launches and calls of a training step's forward and backward pass."""
    config = TrainConfig(
        model=model, batch_size=batch_size, image_size=image_size, drop_path_rate=0.1
    )
    click.echo(f"{model}, {image_size} px, batch {batch_size}, bf16: counted, not measured\n")
    click.echo("| combo_kernels | pass | kernels written | launches | calls |")
    click.echo("|---|---|---:|---:|---:|")
    for combo_kernels in (False, True):
        torch.compiler.reset()
        passes = zip(
            ("forward", "backward"), written_code(config, combo_kernels=combo_kernels), strict=True
        )
        for name, code in passes:
            counts = (len(pattern.findall(code)) for pattern in (KERNEL, LAUNCH, CALL))
            cells = " | ".join(map(str, counts))
            click.echo(f"| {'with' if combo_kernels else 'without'} | {name} | {cells} |")


if __name__ == "__main__":
    main()
