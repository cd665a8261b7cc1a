"""AdamP in what torch builds around an optimizer: closures, DDP, GradScaler, frozen parameters."""

import copy
import math

import pytest
import torch
from test_adamp import clones, random_params, train
from timm.optim import AdamP as TimmAdamP
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wds_convnext.training.adamp import AdamP

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.bits
def test_frozen_and_missing_gradients_and_empty_tensors_stay():
    """They keep their bits and get no state; the others follow timm."""
    params = random_params([(3, 5), (3, 5), (0, 5), (0,), (4,)])
    params[1].requires_grad_(False)
    params[4].grad = None
    ours, timms = AdamP(params[:2]), TimmAdamP(clones(params[:2])[:1])
    ours.add_param_group({"params": params[2:]})
    before = [p.detach().clone() for p in params]

    for p in (params[0], timms.param_groups[0]["params"][0], params[2], params[3]):
        p.grad = torch.ones_like(p)
    ours.step()
    timms.step()

    assert torch.equal(params[0], timms.param_groups[0]["params"][0])
    assert not torch.equal(params[0], before[0])
    assert all(map(torch.equal, params[1:], before[1:]))
    assert list(ours.state) == [params[0]]


def test_closure_is_called_with_gradients_enabled():
    """The loss of the closure is returned, and its gradient used."""
    (p,) = random_params([(3, 5)])
    before = p.detach().clone()
    optimizer = AdamP([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(p, before)


@pytest.fixture
def process_group():
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.bits
@pytest.mark.usefixtures("process_group")
def test_trains_in_ddp():
    """DDP's gradients, views of its buckets, give the bits of the plain module."""
    plain = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    wrapped = DistributedDataParallel(copy.deepcopy(plain), gradient_as_bucket_view=True)
    models = plain, wrapped
    optimizers = [AdamP(model.parameters(), weight_decay=0.05) for model in models]

    for seed in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(
                torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
            ).norm().backward()
            optimizer.step()

    assert all(map(torch.equal, plain.parameters(), wrapped.parameters()))


def test_found_inf_keeps_parameters_that_are_not_finite():
    """A parameter that is already lost is left as it is too."""
    params = random_params([(3, 5), (4,)])
    params[0].data[0, 0], params[1].data[1] = math.inf, math.nan
    optimizer = AdamP(params)
    optimizer.found_inf = torch.ones(())
    before = clones(params)

    train([optimizer], ["random"])

    for p, q in zip(params, before):
        assert torch.equal(p.nan_to_num(nan=7.0), q.nan_to_num(nan=7.0))


@pytest.mark.bits
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_scales_and_skips(unscale_first):
    """Under GradScaler the weights are those without it; an overflow is a skip, not a step.

    The scale is a power of two, so that dividing by it is exact.
    """
    params = random_params([(3, 5), (3, 5), (7,)])
    twins = clones(params)
    scaled, plain = AdamP(params), AdamP(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    for factor in (1.0, 0.3, math.inf, 0.7):
        scaled.zero_grad()
        scaler.scale(sum((p.square() * factor).sum() for p in params)).backward()
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if math.isfinite(factor):
            plain.zero_grad()
            sum((p.square() * factor).sum() for p in twins).backward()
            plain.step()

    assert all(map(torch.equal, params, twins))
    assert scaled.state[params[0]]["step"] == 3
    assert scaler.get_scale() == 2.0**9
