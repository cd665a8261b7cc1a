"""The parts of a run, made from its config: model, optimizer, step, and the facts about them."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import wds_convnext
from wds_convnext.config import REFERENCE_LR, TrainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.shards.dataset import Dataset
from wds_convnext.stream.order import TrainOrder
from wds_convnext.training.adamp import AdamP, parameter_groups, scaled_lr
from wds_convnext.training.augment import Mixer, Normalizer
from wds_convnext.training.distributed import World
from wds_convnext.training.log import StepSums
from wds_convnext.training.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WeightAverage,
    check_image_size,
    compile_model,
    create_model,
    init_from,
)
from wds_convnext.training.monitor import DeviceTimer, Gauges, peak_flops, training_flops
from wds_convnext.training.step import StepRecipe, TrainState, keep_lr_on_device

CROP_RATIO = 0.875  # of evaluation: Resize(256), CenterCrop(224)


@dataclass(frozen=True)
class Compute:
    """Where and how a model is computed."""

    world: World
    device: torch.device
    amp: str  # off, bf16 or fp16
    compiled: bool = False

    @property
    def autocast(self) -> Callable:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return partial(torch.autocast, self.device.type, dtype=dtype) if dtype else nullcontext


def check_options(config: TrainConfig) -> None:
    """Refuse options that do not fit each other.

    Raises:
        UsageError: for an odd batch that is to be mixed.
    """
    if config.batch_size % 2 and (config.mixup or config.cutmix) and config.mix_prob:
        raise UsageError(
            f"--batch-size {config.batch_size}: mixing blends pairs, so it must be even. "
            f"Use {config.batch_size + 1}, or --mixup 0 --cutmix 0."
        )


def lr_warning(config: TrainConfig, global_batch_size: int) -> str | None:
    """What both scaling rules would make of the ConvNeXt recipe's rate, if it is used unscaled.

    Another rate is taken as chosen for the batch that it is used with.
    """
    reference = config.reference_batch_size
    unscaled = config.scale_lr == "none" and global_batch_size != reference
    if not unscaled or config.lr != REFERENCE_LR:
        return None
    linear, sqrt = (
        scaled_lr(
            config.lr,
            rule=rule,
            global_batch_size=global_batch_size,
            reference_batch_size=reference,
        )
        for rule in ("linear", "sqrt")
    )
    return (
        f"--lr {config.lr:g} belongs to a global batch of {reference}, this run's is "
        f"{global_batch_size}: --scale-lr linear would make it {linear:.2e}, sqrt {sqrt:.2e}."
    )


def fit_to_checkpoint(config: TrainConfig, then: dict, world: World) -> TrainConfig:
    """The config with the batch per process that gives the checkpoint's global batch.

    Raises:
        CheckpointError: if the ranks do not divide it, or the options ask for another one.
    """
    global_batch_size = then["data"]["global_batch_size"]
    if config.batch_size * config.accumulate * world.size == global_batch_size:
        return config
    batch_size, rest = divmod(global_batch_size, config.accumulate * world.size)
    if rest or config.batch_size != then["batch_size"]:
        raise CheckpointError(
            f"--resume: the checkpoint's global batch is {global_batch_size}; {world.size} "
            f"processes with --batch-size {config.batch_size} and --accumulate "
            f"{config.accumulate} do not make it. Choose a product that does, or start afresh "
            "without --resume, in another --out."
        )
    return replace(config, batch_size=batch_size)


def choose_amp(amp: str, device: torch.device) -> str:
    """`off`, `bf16` or `fp16`.

    Raises:
        UsageError: if the device cannot do it.
    """
    if amp == "auto":
        if device.type != "cuda":
            return "off"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UsageError(f"--amp fp16 needs CUDA, found {device.type}. Use bf16 or off.")
    return amp


def build_state(
    config: TrainConfig, num_classes: int, compute: Compute
) -> tuple[TrainState, list[str]]:
    """A fresh state on the device, and sentences about what it started from."""
    torch.manual_seed(config.seed)
    model = create_model(
        config.model, num_classes=num_classes, drop_path_rate=config.drop_path_rate
    )
    check_image_size(model, config.image_size)
    notes = [init_from(model, config.init_from)] if config.init_from else []
    model = model.to(compute.device, memory_format=torch.channels_last)
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    optimizer = AdamP(groups, lr=config.lr)
    keep_lr_on_device(optimizer, compute.device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(compute.device.type, enabled=compute.amp == "fp16"),
        average=WeightAverage(model, decay=config.ema_decay) if config.ema_decay else None,
        sums=StepSums(compute.device),
    )
    return state, notes


def build_recipe(
    config: TrainConfig, state: TrainState, num_classes: int, compute: Compute
) -> StepRecipe:
    """What a step does, with the model wrapped for many processes and compiled as configured."""
    forward, no_sync = state.model, nullcontext
    if compute.world.size > 1:
        ids = [compute.device.index] if compute.device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
        no_sync = forward.no_sync
    return StepRecipe(
        forward=compile_model(forward) if compute.compiled else forward,
        compiled=compute.compiled,
        normalizer=Normalizer(IMAGENET_MEAN, IMAGENET_STD, compute.device),
        mixer=Mixer(
            num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.switch_prob,
            label_smoothing=config.label_smoothing,
        ),
        autocast=compute.autocast,
        no_sync=no_sync,
        clip_grad_norm=config.clip_grad_norm,
        seed=config.seed,
        world=compute.world,
        optimizer_timer=DeviceTimer(compute.device),
        max_skips=config.max_skips if config.on_nonfinite == "skip" else 0,
    )


def build_gauges(
    config: TrainConfig, state: TrainState, recipe: StepRecipe, compute: Compute
) -> Gauges:
    """What the run's speed is held against; a peak is known for half precision on some GPUs."""
    peak = None
    if compute.device.type == "cuda" and compute.amp != "off":
        peak = peak_flops(torch.cuda.get_device_name(compute.device))
    return Gauges(
        training_flops(state.model, config.image_size),
        peak=peak,
        num_devices=compute.world.size,
        optimizer_timer=recipe.optimizer_timer,
    )


def describe(
    config: TrainConfig,
    train_data: Dataset,
    val_spec: str | None,
    order: TrainOrder,
    compute: Compute,
) -> dict:
    """The facts that a checkpoint carries besides its state; plain values."""
    return {
        "model": config.model,
        "num_classes": train_data.num_classes,
        "class_names": list(train_data.class_names),
        "dataset": train_data.name,
        "val_shards": val_spec and os.path.abspath(val_spec),
        "batch_size": config.batch_size,
        "preprocessing": {
            "image_size": config.image_size,
            "crop_ratio": CROP_RATIO,
            "interpolation": "bilinear, antialiased",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "data": {
            "shards": train_data.digest,
            "seed": config.seed,
            "global_batch_size": order.global_batch_size,
            "shuffle_buffer": order.shuffle_buffer,
            "num_lanes": order.num_lanes,
        },
        "environment": {
            "wds_convnext": wds_convnext.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "numpy": np.__version__,
            "device": compute.device.type,
            "amp": compute.amp,
            "compiled": compute.compiled,
            "num_threads": torch.get_num_threads(),
            "world_size": compute.world.size,
        },
        "config": asdict(config),
    }


def introduce(
    config: TrainConfig,
    state: TrainState,
    train_data: Dataset,
    val_data: Dataset | None,
    order: TrainOrder,
    compute: Compute,
    gauges: Gauges,
) -> str:
    """What is about to be trained, on what, where."""
    num_parameters = sum(p.numel() for p in state.model.parameters())
    if val_data is None:
        validation = "no validation shards found (name some with --val-shards)"
    else:
        validation = f"{len(val_data):,} for validation"
    amp = "float32" if compute.amp == "off" else compute.amp
    return (
        f"{config.model}, {num_parameters / 1e6:.1f} M parameters, on {train_data.name}: "
        f"{len(train_data):,} samples in {len(train_data.shards)} shards, {validation}, "
        f"{train_data.num_classes} classes\n"
        f"{config.epochs} epochs of {order.num_samples / order.global_batch_size:.1f} steps, "
        f"global batch {order.global_batch_size}, on {compute.world.size} x {compute.device}, "
        f"{amp}, {'compiled' if compute.compiled else 'not compiled'}\n"
        f"{gauges.flops_per_image / 1e9:.3g} GFLOP per training image; peak of the device "
        + (f"{gauges.peak / 1e12:.0f} TFLOP/s" if gauges.peak else "not known")
    )
