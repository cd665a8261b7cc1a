"""No step of AdamP waits for the device: nothing is read back, nothing made on the host."""

from collections import Counter

import pytest
import torch
from test_adamp import SHAPES, clones, random_params, train
from timm.optim import AdamP as TimmAdamP
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


class OpCounter(TorchDispatchMode):
    """Counts operations, and those among them that involve a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.ops, self.cpu_ops = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.ops[func._schema.name] += 1
        self.cpu_ops[func._schema.name] += any(x.device.type == "cpu" for x in tensors)
        return result


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)])
def test_no_step_reads_a_value_back(lr):
    """No value goes to the host; timm's step reads two for each tensor that has rows."""
    params = random_params(SHAPES)
    ours, timms = AdamP(params, lr=lr, weight_decay=0.05), TimmAdamP(clones(params))
    ours.found_inf, ours.grad_scale = torch.zeros(()), torch.ones(())
    train([ours, timms], ["parallel"])

    with OpCounter() as our_count:
        ours.step()
    with OpCounter() as timm_count:
        timms.step()

    assert our_count.ops["aten::_foreach_mul_"] > 0
    assert our_count.ops["aten::_local_scalar_dense"] == 0
    assert timm_count.ops["aten::_local_scalar_dense"] >= 2 * sum(len(s) > 1 for s in SHAPES)


def on_fake_gpu(optimizer_class, *, lr):
    """Count the operations of two steps on tensors that claim to be on CUDA and hold no values."""
    with FakeTensorMode(), torch.device("cuda"):
        params = [torch.empty(shape, requires_grad=True) for shape in SHAPES]
        optimizer = optimizer_class(params, weight_decay=0.05)
        optimizer.param_groups[0]["lr"] = torch.empty(()) if lr == "tensor" else lr
        optimizer.found_inf, optimizer.grad_scale = torch.empty(()), torch.empty(())
        for p in params:
            p.grad = torch.empty_like(p)
        with OpCounter() as count:
            optimizer.step()
            optimizer.step()
    return count


@pytest.mark.parametrize("lr", [1e-3, "tensor"])
def test_steps_stay_on_the_gpu(lr):
    """A GPU is never waited for: no value is needed on the host, no tensor made there."""
    count = on_fake_gpu(AdamP, lr=lr)

    assert count.ops["aten::_foreach_mul_"] > 0
    assert count.cpu_ops.total() == 0
    with pytest.raises(DataDependentOutputException):
        on_fake_gpu(TimmAdamP, lr=lr)
