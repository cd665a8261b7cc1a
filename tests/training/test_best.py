"""best.pt holds the weights whose accuracy was reported: for us, and for timm alone."""

import json
import re
from contextlib import nullcontext

import pytest
import timm
import torch
from test_train import make_batch, make_step, run_config

from wds_convnext.config import EvalConfig
from wds_convnext.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.ema import WeightAverage, decay_at, warmup_note
from wds_convnext.training.model import create_model
from wds_convnext.training.step import train_step
from wds_convnext.training.train import train


@pytest.mark.parametrize(
    ("name", "ema_decay"), [("test_resnet", 0.0), *((n, 0.9) for n in timm.list_models("test_*"))]
)
def test_a_checkpoint_gives_the_logits_that_were_validated(tmp_path, name, ema_decay):
    """Weights and buffers, to the bit: as `eval` loads them, and as timm does."""
    size = 160 if "vit" in name or "max" in name or "coat" in name else 64
    state, recipe = make_step(model=name, image_size=size, ema_decay=ema_decay, drop_path_rate=0.0)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, size, size), dtype=torch.uint8, generator=rng)
    for _ in range(2):
        train_step(state, [make_batch(0)._replace(images=images)], lr=1e-3, recipe=recipe)
    pixels = torch.randn(2, 3, size, size, generator=rng)
    state.model.eval()
    with torch.no_grad(), state.average.applied() if state.average else nullcontext():
        validated = state.model(pixels)
    path = tmp_path / "best.pt"
    save_checkpoint(path, state.state_dict())

    ours = create_model(name, num_classes=4).eval()
    load_weights(ours, load_checkpoint(path))
    theirs = timm.create_model(name, num_classes=4, checkpoint_path=str(path)).eval()

    for model in (ours, theirs):
        with torch.no_grad():
            logits = model.to(memory_format=torch.channels_last)(pixels)
        torch.testing.assert_close(logits, validated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"model": "test_resnet", "ema_decay": 0.9}, {}], ids=str)
def test_eval_of_best_is_the_validation_that_chose_it(shards, tmp_path, capsys, options):
    """To the sample: printed during the run, at its end, and by `eval` of the folder."""
    train(run_config(shards, tmp_path, val_every=1, lr=0.02, **options))

    printed = capsys.readouterr().out
    result, _ = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path / "run"), device="cpu"))
    chosen = re.findall(r"Best Accuracy: ([\d.]+%)", printed)[-1]
    assert f"Final Model Accuracy: {chosen} " in printed
    assert f"{result.top1:.2%}" == chosen
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["best_top1"] == result.top1


def test_best_is_evaluated_at_its_own_image_size(shards, tmp_path, capsys):
    """Also at the end of a run that was resumed with another."""
    train(run_config(shards, tmp_path, val_every=1, epochs=1))
    result, _ = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path / "run"), device="cpu"))
    content = load_checkpoint(tmp_path / "run" / "last.pt") | {"best_top1": 1.0}  # never beaten
    save_checkpoint(tmp_path / "run" / "last.pt", content)
    capsys.readouterr()

    train(run_config(shards, tmp_path, val_every=1, epochs=2, image_size=96, resume="newest"))

    assert f"Final Model Accuracy: {result.top1:.2%} " in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_no_best(shards, tmp_path, capsys, monkeypatch):
    """A model that gives NaN always guesses the first class. The log stays JSON, as in RFC 8259."""
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", not_a_number)

    train(run_config(shards, tmp_path, max_steps=1))

    assert not (tmp_path / "run" / "best.pt").exists()
    assert "no candidate for best.pt" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["val/loss"] for record in records if "val/loss" in record] == [None]


def test_the_decay_rises_as_tensorflows_does():
    """min(decay, (1 + t) / (10 + t)): 0.1 at first, then monotone, and for ever at the decay."""
    assert [decay_at(t, 0.5) for t in (0, 2, 8, 9, 10**6)] == [0.1, 0.25, 0.5, 0.5, 0.5]
    assert decay_at(89_989, 0.9999) < 0.9999 == decay_at(89_990, 0.9999)
    assert warmup_note(0.9999, 89_991) is None
    assert warmup_note(0.9999, 60).endswith("at the end 0.870.")


def test_an_average_over_few_steps_forgets_the_starting_weights():
    """0.9999 on 60 steps, the weights at 0, then at 1: hardly anything is left of the 0."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.9999, num_updates=0)
    torch.nn.init.ones_(model.weight)

    for _ in range(60):
        average.update(frozen=torch.tensor(False))

    assert average.num_updates == 60
    assert average.state_dict()["weight"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("num_updates", [3, None])
def test_a_state_goes_on_where_its_decay_was(num_updates):
    """Runs of 0.1.0 have no count, and a constant decay: they keep it."""
    content = make_step(ema_decay=0.9)[0].state_dict() | {"step": 3, "ema_updates": num_updates}
    if num_updates is None:
        del content["ema_updates"]
    state, _ = make_step(ema_decay=0.9)

    state.load_state_dict(content)

    assert state.average.num_updates == num_updates


def not_a_number(logits, targets, weight=None, reduction="mean"):
    """In place of the validation's loss alone: the model's is a mean."""
    shape = () if reduction == "mean" else targets.shape
    return torch.full(shape, float("nan")) if reduction == "none" else logits.sum() * 0
