"""AdamP's projection fires where timm's does, and makes the update orthogonal."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_adamp import assert_same_bits, clones, gradient, random_params, train, without_component
from timm.optim import AdamP as TimmAdamP

from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


def firing_view(p, grad, *, delta):
    """By which view AdamP's projection fires, in the words of the paper; None if by neither."""
    for name, rows in ("channel", len(p)), ("layer", 1):
        p_rows, g_rows = p.detach().reshape(rows, -1), grad.reshape(rows, -1)
        cosines = F.cosine_similarity(g_rows, p_rows, eps=1e-8).abs()
        if cosines.max() < delta / math.sqrt(p_rows.shape[1]):
            return name
    return None


@pytest.mark.parametrize(
    ("kind", "view"),
    [
        ("orthogonal to the rows", "channel"),
        ("orthogonal to the whole", "layer"),
        ("parallel", None),
    ],
)
def test_projection_makes_the_update_orthogonal(kind, view):
    """The update loses its component along what the gradient is orthogonal to, or nothing."""
    p, same_shape = random_params([(6, 3, 4, 4)] * 2)
    optimizer = AdamP([p, same_shape], lr=1e-3)
    before = p.detach().clone()
    p.grad = gradient(kind, p, torch.Generator().manual_seed(1))
    same_shape.grad = same_shape.detach().clone()  # does not fire, in the same stack
    fired = firing_view(p, p.grad, delta=0.1)

    optimizer.step()

    update = (p.detach() - before).double()
    rows = F.cosine_similarity(update.reshape(6, -1), before.double().reshape(6, -1)).abs()
    whole = F.cosine_similarity(update.reshape(1, -1), before.double().reshape(1, -1)).abs()
    assert fired == view
    assert (rows.max() < 1e-4) == (view == "channel")
    assert (whole.max() < 1e-4) == (view is not None)


@pytest.mark.parametrize("kind", ["orthogonal to the rows", "orthogonal to the whole"])
def test_a_firing_projection_lowers_weight_decay(kind):
    """Where the projection fires, the weight decay is multiplied by wd_ratio."""
    params = random_params([(6, 3, 4, 4)])
    decayed, undecayed = clones(params), clones(params)
    optimizers = [AdamP(decayed, lr=0.1, weight_decay=0.5), AdamP(undecayed, lr=0.1)]

    train(optimizers, [kind])

    decay = undecayed[0] - decayed[0]
    assert torch.allclose(decay, 0.1 * 0.5 * 0.1 * params[0], atol=1e-6)


@pytest.mark.bits
@pytest.mark.parametrize("nearly", [0.985, 0.9999, 1.0001, 1.015])
@pytest.mark.parametrize("shape", [(1, 40_000), (200, 200), (4, 3, 100, 100), (3, 70)])
def test_a_cosine_close_to_the_threshold_is_decided_as_by_timm(shape, nearly):
    """By the whole tensor, where one dot product would decide it otherwise now and then."""
    (p,) = random_params([shape])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    across = without_component(noise, p, 1)
    cosine = nearly * 0.1 / math.sqrt(p.numel())
    ours, timms = AdamP([p], weight_decay=0.05), TimmAdamP(clones([p]), weight_decay=0.05)
    along = p.detach() * (cosine / math.sqrt(1 - cosine**2) * across.norm() / p.detach().norm())

    for optimizer in (ours, timms):
        optimizer.param_groups[0]["params"][0].grad = across + along
        optimizer.step()

    assert_same_bits(ours, timms)
