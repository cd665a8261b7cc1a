"""The step changes what it should and reads nothing back; the loop around it keeps its word."""

import contextlib
import copy
import itertools
import json
import math
import re
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_RUN
from timm.models.convnext import ConvNeXtBlock
from timm.optim import AdamP as TimmAdamP
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from wds_convnext import step as step_module
from wds_convnext import train as train_module
from wds_convnext.build import Compute, build_recipe, build_state
from wds_convnext.config import TrainConfig
from wds_convnext.distributed import World
from wds_convnext.errors import TrainingError
from wds_convnext.gauges import DeviceTimer, Gauges, peak_flops, training_flops
from wds_convnext.metrics import RunLog
from wds_convnext.model import compile_model, create_model
from wds_convnext.optim import lr_at, parameter_groups
from wds_convnext.order import TrainOrder
from wds_convnext.reader import SampleReader, open_shards
from wds_convnext.run import run_training
from wds_convnext.step import eager_loss, keep_lr_on_device, train_step
from wds_convnext.stream import Batch, ShardStream
from wds_convnext.transforms import TrainTransform

NUM_CLASSES = 4
ORDER = {"seed": 0, "global_batch_size": 8, "shuffle_buffer": 16}
NO_MIXING = {"mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0}


def tiny_config(**options) -> TrainConfig:
    """TINY_RUN as a config of the trainer itself; options by their names in it."""
    tiny = {flag.removeprefix("--").replace("-", "_"): value for flag, value in TINY_RUN.items()}
    numbers = {name: int(value) for name, value in tiny.items() if value.isdigit()}
    return TrainConfig(**tiny | numbers | {"warmup_epochs": 1.0} | options)


def make_step(**options):
    """A fresh state and the recipe of its steps, on the CPU in float32."""
    config, compute = tiny_config(**options), Compute(World(), torch.device("cpu"), "off")
    state, _ = build_state(config, NUM_CLASSES, compute)
    return state, build_recipe(config, state, NUM_CLASSES, compute)


def make_batch(seed: int, *, batch_size: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), generator=rng)
    return Batch(images, labels, torch.ones(batch_size, dtype=torch.bool), [])


def cut(batch: Batch, num_parts: int) -> list[Batch]:
    return [Batch(*tensors, []) for tensors in zip(*(t.chunk(num_parts) for t in batch[:3]))]


@pytest.fixture
def one_thread():
    """More would split sums otherwise for tensors stacked than for tensors alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def trained(state) -> dict:
    """A copy of weights, optimizer state and average: what a step that failed must not change."""
    kept = ("model", "optimizer", "ema")
    content = copy.deepcopy({name: state.state_dict()[name] for name in kept})
    del content["optimizer"]["param_groups"]  # the learning rate is set, not trained
    return content


def assert_equal(one: dict, other: dict) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def poison(monkeypatch):
    """A function: make the images of these steps NaN."""
    clean = step_module.augment_on_device

    def at(*steps: int) -> None:
        def augment(batch, *, key, recipe):
            images, targets = clean(batch, key=key, recipe=recipe)
            return images * (math.nan if key[1] in steps else 1), targets

        monkeypatch.setattr(step_module, "augment_on_device", augment)

    return at


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value on the device."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_reads += function._schema.name.removeprefix("aten::") in self.WAITING
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "options",
    [{}, {"ema_decay": 0.9}, {"clip_grad_norm": 0.0}, {"on_nonfinite": "skip"}],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_reads_nothing_from_the_device(options, accumulate):
    """Whole steps, their host reads counted; the count of one deliberate read shows it counts."""
    state, recipe = make_step(**options)
    batches = cut(make_batch(0), accumulate)

    with HostReads() as of_steps:
        for _ in range(3):
            train_step(state, batches, lr=1e-3, recipe=recipe)
    with HostReads() as of_one_read:
        float(state.sums.interval[0])

    assert of_steps.num_reads == 0
    assert of_one_read.num_reads == 1


def test_under_a_grad_scaler_too_a_step_reads_nothing():
    state, recipe = make_step()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    with HostReads() as reads:
        for _ in range(3):
            train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)

    assert reads.num_reads == 0


def test_accumulated_batches_equal_one_large_batch():
    """One clip, one update. Compared are loss, gradient norm and first moment, a tenth of the
    clipped gradient: an update divides by the gradient's size, and so by its rounding."""
    large, recipe = make_step(**NO_MIXING)
    small, _ = make_step(**NO_MIXING)
    batch = make_batch(0, batch_size=16)

    loss = train_step(large, [batch], lr=1e-3, recipe=recipe)
    recipe = replace(recipe, forward=small.model)
    loss_of_parts = train_step(small, cut(batch, 4), lr=1e-3, recipe=recipe)

    torch.testing.assert_close(loss_of_parts, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(small.sums.interval, large.sums.interval, rtol=1e-5, atol=0)
    moments = [
        torch.cat([s["exp_avg"].flatten() for s in state.optimizer.state.values()])
        for state in (large, small)
    ]
    assert (moments[1] - moments[0]).abs().max() < 1e-5 * moments[0].abs().max()
    assert small.step == large.step == 1


def test_from_a_nonfinite_step_on_nothing_changes(poison):
    """Weights, moments, step counts and average are those before it, also after later steps."""
    poison(2)
    state, recipe = make_step(ema_decay=0.9)
    for number in range(2):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)
    before = trained(state)

    for number in range(2, 5):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)

    assert_equal(trained(state), before)
    assert state.sums.read().failed_step == 2


def test_skipping_leaves_out_a_nonfinite_step_and_goes_on(poison):
    """The skipped step changes nothing and is in no mean; the next one trains."""
    poison(1)
    state, recipe = make_step(ema_decay=0.9, on_nonfinite="skip")
    loss = train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)
    skipped = trained(state)
    interval = state.sums.read()
    train_step(state, [make_batch(2)], lr=1e-3, recipe=recipe)

    assert_equal(skipped, before)
    assert (interval.num_steps, interval.num_skipped, interval.last_failed) == (2, 1, 1)
    assert interval.loss == pytest.approx(loss.item())
    assert state.sums.read().failed_step == -1
    weight = "head.fc.weight"
    assert not torch.equal(state.model.state_dict()[weight], before["model"][weight])


def test_skipping_ends_at_max_skips_in_a_row(poison):
    """Two in a row are allowed: 1 and 2 pass, then 4, 5 and 6 end the run at 6."""
    poison(1, 2, 4, 5, 6)
    state, recipe = make_step(on_nonfinite="skip", max_skips=2)

    failed_steps = []
    for number in range(8):
        train_step(state, [make_batch(number)], lr=1e-3, recipe=recipe)
        failed_steps.append(state.sums.read().failed_step)

    assert failed_steps == [-1] * 6 + [6, 6]


def test_our_adamp_gives_the_learning_curve_of_timms(shards, one_thread):
    """Forty whole steps on real images, mixing and stochastic depth on: the same losses."""
    train_set = open_shards(str(shards / "train.json"))
    stream = ShardStream(
        train_set,
        TrainOrder(train_set.sizes, **ORDER),
        batch_size=8,
        transform=TrainTransform(32),
    )
    batches = list(itertools.islice(stream, 40))
    ours, recipe = make_step()
    timms, recipe_of_timms = make_step()
    groups = parameter_groups(timms.model, weight_decay=0.05)
    timms.optimizer = TimmAdamP(groups, lr=1e-3)
    keep_lr_on_device(timms.optimizer, torch.device("cpu"))

    losses = [train_step(ours, [batch], lr=1e-2, recipe=recipe) for batch in batches]
    of_timms = [train_step(timms, [batch], lr=1e-2, recipe=recipe_of_timms) for batch in batches]

    assert losses == of_timms
    assert torch.stack(losses).std() > 0.01


def test_running_statistics_do_not_take_up_a_skipped_step(poison):
    """A model with BatchNorm: its buffers stay finite, and as they were."""
    poison(1)
    state, recipe = make_step(model="test_efficientnet", on_nonfinite="skip")
    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)

    assert any(name.endswith("running_mean") for name in before["model"])
    assert_equal(trained(state), before)


def test_an_overflow_of_the_scaled_gradient_only_skips():
    """GradScaler's own event: nothing changes, the scale is halved, and the run goes on."""
    state, recipe = make_step(ema_decay=0.9)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = state.model.head.fc.weight
    weight.register_hook(lambda grad: grad * math.inf if state.step == 1 else grad)
    train_step(state, [make_batch(0)], lr=1e-3, recipe=recipe)
    before = trained(state)

    train_step(state, [make_batch(1)], lr=1e-3, recipe=recipe)
    skipped, scale = trained(state), state.scaler.get_scale()
    train_step(state, [make_batch(2)], lr=1e-3, recipe=recipe)

    assert_equal(skipped, before)
    assert scale == 512.0
    interval = state.sums.read()
    assert (interval.num_steps, interval.num_skipped, interval.failed_step) == (3, 1, -1)
    assert not torch.equal(weight, before["model"]["head.fc.weight"])


def keys_of_step(shards, step: int) -> list[str]:
    train_set = open_shards(str(shards / "train.json"))
    refs = TrainOrder(train_set.sizes, **ORDER).global_batch(step)
    with closing(SampleReader(train_set.shards)) as reader:
        return [reader.describe(*map(int, place))["key"] for place in zip(refs.shard, refs.sample)]


def run_config(shards, tmp_path, **options) -> TrainConfig:
    return tiny_config(shards=str(shards / "train.json"), out=str(tmp_path / "run"), **options)


@pytest.mark.parametrize("save_every", [1000, 1])
def test_a_run_that_fails_names_the_step_and_its_samples(shards, tmp_path, poison, save_every):
    """With shard and key; and no checkpoint is written from a frozen state."""
    poison(4)
    config = run_config(shards, tmp_path, log_every=100, save_every=save_every)

    with pytest.raises(TrainingError, match="step 4 is not finite") as failure:
        run_training(config)

    keys = keys_of_step(shards, 4)
    assert len(keys) == 8
    assert all(f"tar, key {key}" in str(failure.value) for key in keys)
    assert not (tmp_path / "run" / "step-000000005.pt").exists()
    assert (tmp_path / "run" / "step-000000004.pt").exists() == (save_every == 1)


def test_a_run_that_skips_says_which_samples(shards, tmp_path, capsys, poison):
    """One line with the step and its keys; the run finishes, and metrics.jsonl has the count."""
    poison(4)
    config = run_config(shards, tmp_path, on_nonfinite="skip", epochs=1)

    assert run_training(config) == 0

    line = next(line for line in capsys.readouterr().out.splitlines() if "step 4 is" in line)
    assert all(key in line for key in keys_of_step(shards, 4))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(line).get("train/skipped_steps", 0) for line in metrics]
    assert sum(skipped) == 1


def test_every_step_uses_the_learning_rate_of_the_formula(shards, tmp_path, monkeypatch):
    """The optimizer's own value at each step of a run, over warm-up and cosine, to its last."""
    used = []

    def recorded(state, batches, **how):
        loss = train_step(state, batches, **how)
        used.append(state.optimizer.param_groups[1]["lr"].item())
        return loss

    monkeypatch.setattr(train_module, "train_step", recorded)
    run_training(run_config(shards, tmp_path, lr=1e-2, min_lr=1e-5, warmup_lr=1e-4))

    expected = [
        lr_at(step, lr=1e-2, total_steps=25, warmup_steps=6, warmup_lr=1e-4, min_lr=1e-5)
        for step in range(25)
    ]
    assert used == expected
    assert used[0] == 1e-4 and used[6] == 1e-2 and used[-1] == 1e-5


@pytest.mark.parametrize(
    ("rule", "peak"),
    [("none", 4e-3), ("linear", 4e-3 * 8 / 4096), ("sqrt", 4e-3 * (8 / 4096) ** 0.5)],
)
def test_the_peak_learning_rate_follows_the_batch_by_the_rule_that_is_asked_for(
    shards, tmp_path, capsys, rule, peak
):
    """The peak is scaled, both ends are not; without a rule, a warning gives both values."""
    used = run_config(shards, tmp_path, scale_lr=rule, max_steps=1)

    rate = train_module.lr_schedule(used, TrainOrder(np.array([50]), **ORDER))
    run_training(used)

    assert rate(6) == pytest.approx(peak)
    assert (rate(0), rate(24)) == (used.warmup_lr, used.min_lr)
    warning = capsys.readouterr().err
    if rule == "none":
        assert "7.81e-06" in warning and "1.77e-04" in warning and "4096" in warning
    else:
        assert warning == ""


def test_a_learning_rate_of_ones_own_is_not_warned_about(shards, tmp_path, capsys):
    """What --lr 1e-3 was chosen for, nobody but the user knows."""
    run_training(run_config(shards, tmp_path, lr=1e-3, max_steps=1))

    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_two_epochs_with_evaluation_compile_two_graphs(shards, tmp_path, monkeypatch):
    """One for training and one for evaluation, though batches straddle epochs, the last of an
    evaluation is padded, mixing changes from step to step, and an average is swapped in."""
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, *, dynamic, **_: compile(model, backend=counter, dynamic=dynamic),
    )
    graphs = []

    def recorded(state, batches, **how):
        loss = train_step(state, batches, **how)
        graphs.append(counter.frame_count)
        return loss

    monkeypatch.setattr(train_module, "train_step", recorded)
    run_training(run_config(shards, tmp_path, compile=True, epochs=2, val_every=1, ema_decay=0.9))

    assert graphs[0] == 1
    assert counter.frame_count == 2


class Scaled(nn.Module):
    """A model whose logits come out multiplied."""

    def __init__(self, model: nn.Module, factor: float):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images):
        return self.factor * self.model(images)


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0, False), (30.0, True), (math.nan, True)])
def test_a_compiled_model_that_computes_something_else_is_noticed(
    shards, tmp_path, capsys, monkeypatch, factor, is_wrong
):
    """Logits of another size, or NaN, on the first batch; a faithful one is not warned about."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: Scaled(model, factor))
    with contextlib.suppress(TrainingError):  # NaN ends the run as well
        run_training(run_config(shards, tmp_path, compile=True, max_steps=1))

    assert ("Do not trust this run" in capsys.readouterr().out) == is_wrong


@pytest.mark.parametrize("autocast", [True, False])
def test_blocks_hand_on_half_precision_under_autocast_and_nothing_else_changes(autocast):
    """Every block's output is bf16 under autocast; in float32 the model is timm's bit for bit, and
    under autocast near it; the state dict is timm's."""
    torch.manual_seed(0)
    ours = create_model("test_convnext", num_classes=NUM_CLASSES).eval()
    plain = timm.create_model("test_convnext", num_classes=NUM_CLASSES).eval()
    plain.load_state_dict(ours.state_dict())
    dtypes = []
    for module in ours.modules():
        if isinstance(module, ConvNeXtBlock):
            module.register_forward_hook(lambda block, args, output: dtypes.append(output.dtype))
    images = torch.randn(2, 3, 32, 32)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, of_timm = ours(images), plain(images)

    assert set(dtypes) == {torch.bfloat16 if autocast else torch.float32}
    tolerance = 2**-6 if autocast else 0  # bf16 has 8 bits
    torch.testing.assert_close(logits, of_timm, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_real_compiler_agrees_with_eager_also_on_dropped_paths():
    """inductor, stochastic depth on, LayerScale at 1 so that blocks count: with the same seed the
    same paths are dropped and the loss is the same; with another seed it is not."""
    state, recipe = make_step(**NO_MIXING | {"drop_path_rate": 0.5})
    for name, parameter in state.model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1.0)
    recipe = replace(recipe, forward=compile_model(state.model))
    batches = [make_batch(0)]

    of_another_seed = eager_loss(state, batches, replace(recipe, seed=1))
    eager = eager_loss(state, batches, recipe)
    loss = train_step(state, batches, lr=1e-3, recipe=recipe)

    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    assert abs(of_another_seed - eager) > 1e-3


@pytest.mark.parametrize(("model", "gmacs"), [("convnext_tiny", 4.47), ("convnext_base", 15.38)])
def test_flops_are_three_forward_passes_of_the_published_count(model, gmacs):
    """timm's results table, 224 px, six FLOPs per multiply-add; it counts norms as well."""
    with torch.device("meta"):
        network = timm.create_model(model)

    assert training_flops(network, 224) == pytest.approx(6e9 * gmacs, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_not_known(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_readings_are_per_device_and_only_what_is_known():
    """1,000 images/s of 1 GFLOP on two devices of 1 TFLOP/s are half of each one's peak."""
    timer = DeviceTimer(torch.device("cpu"))
    unknown = Gauges(10**9, peak=None, num_devices=2, optimizer_timer=timer).read(1000.0)
    with timer.span():
        time.sleep(0.01)
    known = Gauges(10**9, peak=1e12, num_devices=2, optimizer_timer=timer).read(1000.0)

    assert unknown.keys() == {"train/tflops_per_s", "train/memory_gb"}
    assert known["train/tflops_per_s"] == 0.5 and known["train/mfu"] == 0.5
    assert 10 <= known["train/optimizer_ms"] < 1000
    assert 0.1 < known["train/memory_gb"] < 1000


def test_the_progress_line_and_a_trace_show_where_time_goes(shards, tmp_path, capsys):
    """TFLOP/s, optimizer time and memory in each line; trace.json has three optimizer steps."""
    run_training(run_config(shards, tmp_path, profile=True, epochs=2))

    lines = [line for line in capsys.readouterr().out.splitlines() if " images/s" in line]
    assert all(re.search(r"TFLOP/s, optimizer=[\d.]+ms, [\d.]+ GB$", line) for line in lines)
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "Optimizer.step#AdamP.step" for e in events) == 3


def test_readings_are_shown_and_kept(tmp_path, capsys):
    """In metrics.jsonl under their names, and in the line."""
    values = dict.fromkeys(["loss", "avg_loss", "lr", "images_per_s", "data_wait"], 0.5)
    log = RunLog(tmp_path, start_step=0)
    log.interval(
        3,
        {f"train/{name}": value for name, value in values.items()},
        readings={"train/mfu": 0.41, "train/memory_gb": 12.5},
        epoch=0,
        num_steps=7,
    )
    log.close()

    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {"train/mfu": 0.41, "train/memory_gb": 12.5}.items() <= json.loads(line).items()
    assert "mfu=41%, 12.50 GB" in capsys.readouterr().out
