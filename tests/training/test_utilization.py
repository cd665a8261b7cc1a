"""How well a run uses its device: FLOPs, peak, time and memory, and where they are shown."""

import json
import re
import time
from dataclasses import replace

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import run_config

from wds_convnext.training.board import tag
from wds_convnext.training.log import RunLog
from wds_convnext.training.monitor import DeviceTimer, Gauges, peak_flops, training_flops
from wds_convnext.training.train import train


@pytest.mark.parametrize(("model", "gmacs"), [("convnext_tiny", 4.47), ("convnext_base", 15.38)])
def test_flops_are_three_forward_passes_of_the_published_count(model, gmacs):
    """timm's results table, 224 px, six FLOPs per multiply-add; it counts norms as well."""
    with torch.device("meta"):
        network = timm.create_model(model)

    assert training_flops(network, 224) == pytest.approx(6e9 * gmacs, rel=5e-3)


@pytest.mark.parametrize("name", ["coat_lite_tiny", "test_vit", "test_resnet", "test_convnext"])
def test_counting_flops_leaves_the_model_as_it_was(name):
    """Also where a model keeps a module under two names, as CoaT does: every tensor stays."""
    model = timm.create_model(name, num_classes=4)
    size = model.pretrained_cfg["input_size"][1]
    before = [*model.state_dict().items()]

    assert training_flops(model, size) > 0

    after = [*model.state_dict().items()]
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one.data_ptr() == two.data_ptr() for (_, one), (_, two) in zip(after, before))
    assert model.training
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 4)


def test_flops_that_cannot_be_counted_are_unknown():
    """A model that looks at its values has none without data."""

    class Looks(torch.nn.Module):
        def forward(self, images):
            return images if images.sum().item() else -images

    assert training_flops(Looks(), 8) is None
    gauges = Gauges(
        {8: None}, peak=1e12, num_devices=1, optimizer_timer=DeviceTimer(torch.device("cpu"))
    )
    assert set(gauges.read(100.0, {8: 1})) == {"train/memory_gb"}


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
    """1,000 images/s of 1 GFLOP on two devices of 1 TFLOP/s are half of each one's peak; that
    GFLOP is the mean over steps of two image sizes."""
    timer, flops = DeviceTimer(torch.device("cpu")), {16: 4 * 10**8, 32: 16 * 10**8}
    gauges = Gauges(flops, peak=None, num_devices=2, optimizer_timer=timer)
    unknown = gauges.read(1000.0, {16: 5, 32: 5})
    started = time.perf_counter()
    with timer.span():
        time.sleep(0.01)
    elapsed_ms = 1e3 * (time.perf_counter() - started)
    known = replace(gauges, peak=1e12).read(1000.0, {16: 5, 32: 5})

    assert unknown.keys() == {"train/tflops_per_s", "train/memory_gb"}
    assert known["train/tflops_per_s"] == 0.5 and known["train/mfu"] == 0.5
    assert 10 <= known["train/optimizer_ms"] <= elapsed_ms
    assert 0.1 < known["train/memory_gb"] < 1000


def test_a_gpu_that_is_not_the_current_one_is_timed_on_its_own_stream(monkeypatch):
    """As with `--device cuda:1` in one process; PyTorch's default is the current device's."""
    streams = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda stream=None: streams.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with DeviceTimer(torch.device("cuda:1")).span():
        pass

    assert streams == ["stream of cuda:1"] * 2


def test_the_progress_line_and_a_trace_show_where_time_goes(shards, tmp_path, capsys):
    """Rate, wait and the time left in 80 columns; trace.json has three optimizer steps."""
    train(run_config(shards, tmp_path, profile=True, epochs=2))

    lines = [line for line in capsys.readouterr().out.splitlines() if " images/s" in line]
    assert len(lines) == 6  # after steps 3, 6, 9 and 12, and where epochs end: 7 and 13
    expected = r"Epoch \d, \d+/\d+: \d+ images/s, wait \d+%, \d\d:\d\d left, loss \d\.\d{4}"
    assert all(re.fullmatch(expected, line) for line in lines)
    assert "00:00 left" in lines[-1]
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "Optimizer.step#AdamP.step" for e in events) == 3


def test_readings_are_shown_and_kept(tmp_path, capsys):
    """In metrics.jsonl, in TensorBoard in a group of their own, and in the line."""
    values = dict.fromkeys(["loss", "avg_loss", "lr", "images_per_s", "data_wait"], 0.5)
    log = RunLog(tmp_path, start_step=0)
    log.interval(
        3,
        {f"train/{name}": value for name, value in values.items()},
        readings={"train/mfu": 0.41, "train/memory_gb": 12.5},
        epoch=0,
        num_steps=93_900,
        seconds_left=26_123.4,
    )
    log.close()

    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {"train/mfu": 0.41, "train/memory_gb": 12.5}.items() <= json.loads(line).items()
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = json.loads(line).keys() - {"step", "epoch", "time"}
    assert set(events.Tags()["scalars"]) == set(map(tag, logged))
    [mfu] = events.Scalars("utilization/mfu")
    assert (mfu.step, mfu.value) == (3, pytest.approx(0.41))
    [line] = capsys.readouterr().out.splitlines()
    assert line == "Epoch 0, 3/93900: 0 images/s, wait 50%, MFU 41%, 7:15:23 left, loss 0.5000"
    assert len(line) < 80
