"""AdamP's step compiles once, as one graph, which does what eager code does."""

import pytest
import torch
from test_adamp import GRADIENTS, clones, gradient, random_params
from torch._dynamo.utils import counters

from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled_run(shapes, *, backend, num_steps=6):
    """Compiled and eager optimizers after the same steps, the fourth of which is skipped.

    Returns the number of graphs compiled in the first step, and afterwards.
    """
    params = random_params(shapes)
    optimizers = []
    for tensors in (params, clones(params)):
        lr = torch.tensor(0.0, dtype=torch.float64)
        optimizers.append(AdamP(tensors, lr=lr, weight_decay=0.05))
    compiled, eager = optimizers
    compiled_step = torch.compile(compiled.step, fullgraph=True, backend=backend)
    rng, num_graphs = torch.Generator().manual_seed(0), []
    for step in range(num_steps):
        kind = list(GRADIENTS)[step % len(GRADIENTS)]
        for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers)):
            p.grad = gradient(kind, p, rng)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(1e-3 * (step + 1))
            optimizer.found_inf = torch.tensor(float(step == 3))
        compiled_step()
        eager.step()
        num_graphs.append(counters["stats"]["unique_graphs"])
    return compiled, eager, num_graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "shapes"),
    [
        ("aot_eager", [(3, 5), (3, 5), (7,), (), (4, 2, 3, 3)]),
        ("inductor", [(3, 5), (3, 5), (7,)]),
    ],
    ids=["traced", "generated"],
)
def test_compiles_once_as_one_graph(backend, shapes):
    """Neither the learning rate, nor the step count, nor a skip makes the compiler start again; the
    code that it generates does what eager code does."""
    torch.compiler.reset()
    counters.clear()

    compiled, eager, num_graphs = compiled_run(shapes, backend=backend)

    assert num_graphs[0] > 0
    assert num_graphs == [num_graphs[0]] * len(num_graphs)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (compiled, eager))):
        # The steps' learning rates add up to 0.017; an update is at most about one of them.
        assert (p - q).abs().max() <= 1e-6 * 0.017
        assert compiled.state[p]["step"] == eager.state[q]["step"] == 5
    torch.compiler.reset()
