"""The model card of an export: Markdown from facts, with everything from data escaped."""

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wds_convnext.config import TrainConfig
from wds_convnext.config.fields import flag_of
from wds_convnext.errors import printable
from wds_convnext.options import PER_CALL
from wds_convnext.shards.dataset import Dataset
from wds_convnext.training.scores import EvalResult
from wds_convnext.training.stored import StoredModel

# Options whose values are paths: of what was trained where is nobody's business.
_PATHS = {"shards", "val_shards", "init_from", "pretrained", *PER_CALL}
_MAX_CLASSES = 50


def model_card(
    stored: StoredModel, dataset: Dataset, result: EvalResult, *, checks: Sequence[str]
) -> str:
    """What the model is, how it was trained, what it is worth, and how it is used."""
    assert stored.facts is not None
    facts, pixels = stored.facts, stored.preprocessing
    low, high = result.top1_interval
    num_parameters = sum(
        tensor.numel() for tensor in stored.state.values() if tensor.is_floating_point()
    )
    names = [escape(name) for name in stored.class_names[:_MAX_CLASSES]]
    more = stored.num_classes - len(names)
    rows = {
        "architecture": f"{stored.name} (timm), {num_parameters / 1e6:.2f} million numbers",
        "weights": "moving average" if stored.weights == "ema" else "as trained",
        "steps": f"{stored.step:,}, global batch {facts.data.global_batch_size}",
        "trained on": f"{stored.dataset} (digest {facts.data.shards})",
        "classes": f"{stored.num_classes:,}",
        "image size": f"{pixels.image_size} px, {pixels.crop_mode} crop {pixels.crop_ratio:g}, "
        f"{pixels.interpolation}",
        "mean": ", ".join(f"{value:g}" for value in pixels.mean),
        "standard deviation": ", ".join(f"{value:g}" for value in pixels.std),
        "evaluated on": f"{dataset.name}, {dataset.split} split (digest {dataset.digest})",
        "samples": f"{result.num_samples:,}",
        "top-1": f"{result.top1:.2%} (95 % interval {low:.2%} to {high:.2%})",
        "top-5": f"{result.top5:.2%}",
        "loss": f"{result.loss:.4f}",
    }
    versions = {k: v for k, v in facts.environment.items() if isinstance(v, str | int | float)}
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm]",
        "---",
        "",
        f"# {escape(stored.name)}, trained on {escape(stored.dataset)}",
        "",
        *_table(rows),
        "",
        "The split above may be the one that the checkpoint was chosen by.",
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        *["import wds_convnext.training.thumbnet"] * (stored.name == "thumbnet"),
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
        'names = model.pretrained_cfg["label_names"]',
        "```",
        "",
        "Or `wds-convnext predict FOLDER IMAGES`. A `model.onnx` or `.pt2` that is there takes",
        "float32 (N, 3, size, size), (pixel / 255 - mean) / standard deviation, and gives logits.",
        "",
        "## Compared with the run",
        "",
        *[f"- {escape(check)}" for check in checks],
        "",
        "## Recipe",
        "",
        "```",
        command_of(facts.config),
        "```",
        "",
        *_table(versions),
        "",
        "## Classes",
        "",
        ", ".join(names) + (f" and {more:,} more, in `config.json`" if more > 0 else ""),
    ]
    return "\n".join(lines) + "\n"


def command_of(config: Mapping[str, Any]) -> str:
    """The command that trains so: what is not a default, without paths."""
    words = ["wds-convnext", "train"]
    for spec in fields(TrainConfig):
        value = config.get(spec.name, spec.default)
        if value == spec.default or value is None or spec.name in _PATHS:
            continue
        flag = flag_of(spec.name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            words += [word for part in value for word in (flag, shlex.quote(str(part)))]
        else:
            words += [flag, shlex.quote(str(value))]
    return printable(" ".join([*words, "--shards", "SHARDS"]), limit=4000).replace("```", "'''")


def _table(rows: Mapping[str, Any]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {escape(str(name))} | {escape(str(value))} |" for name, value in rows.items()),
    ]


def escape(text: str) -> str:
    """Text that Markdown and HTML take as text."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(printable(text, limit=200)))
