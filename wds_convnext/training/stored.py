"""A trained model as it is stored: in a run, a checkpoint, or a folder in the Hub's layout."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from wds_convnext.door import count, read_json, text
from wds_convnext.errors import CheckpointError
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.checkpoint import (
    Facts,
    load_checkpoint,
    step_and_facts,
    taking_over,
)
from wds_convnext.training.model import create_model, named_args, parse_model_args
from wds_convnext.training.runs import CONFIG, WEIGHTS, best_checkpoint

OWN = "wds_convnext"  # the part of an exported config.json that timm does not read
_SHAPE = {
    "architecture": text,
    "num_classes": count,
    "label_names": [text],
    "model_args?": {},
    OWN: {"weights": text, "step": count, "preprocessing": {}, "dataset": text},
}


@dataclass(frozen=True)
class StoredModel:
    """What a model is evaluated, used and exported with. The weights are the average, if any."""

    path: Path  # of the checkpoint, or of the exported folder
    name: str  # timm's
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str  # "ema" or "model"
    step: int
    dataset: str  # that it was trained on, by name
    state: Mapping[str, torch.Tensor] = field(repr=False)  # mapped from the file
    model_args: tuple[str, ...] = ()  # of --model-arg
    facts: Facts | None = field(default=None, repr=False)  # of a checkpoint

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def folder(self) -> Path:
        """Where what is made of it goes: the run's folder, or the exported one."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def val_shards(self) -> str | None:
        """What it was validated on, where it says so."""
        return self.facts.val_shards if self.facts else None

    def build(self) -> nn.Module:
        """The model in evaluation mode, on the CPU.

        Raises:
            CheckpointError: if the weights are not of this model.
        """
        model = create_model(self.name, num_classes=self.num_classes, model_args=self.model_args)
        with taking_over():
            model.load_state_dict(self.state)
        return model.eval()

    def digest(self) -> str:
        """Identifies what the model does to pixels: weights, preprocessing and class names.

        A checkpoint and what was exported from it have the same one.
        """
        architecture = self.name.partition(".")[0]  # an export does not keep timm's tag
        facts = [architecture, self.preprocessing.to_dict(), self.class_names]
        # Values, not their text: config.json has a tuple as a list.
        facts += [parse_model_args(self.model_args)] if self.model_args else []
        digest = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(self.state):
            tensor = self.state[name].detach().contiguous()
            digest.update(struct.pack("<q", len(name)) + name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def open_model(named: str | None) -> StoredModel:
    """The model of a run's folder, a checkpoint or an exported folder; None: of the newest run.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    path = best_checkpoint(named)
    return _open_exported(path) if path.is_dir() else _open_checkpoint(path)


def _open_checkpoint(path: Path) -> StoredModel:
    checkpoint = load_checkpoint(path)
    step, facts = step_and_facts(checkpoint, path)
    average = checkpoint.get("ema")
    with taking_over():
        state = checkpoint["model"] | (average or {})  # an average holds no buffers
    return StoredModel(
        path=path,
        name=facts.model,
        class_names=facts.class_names,
        preprocessing=facts.preprocessing,
        weights="ema" if average else "model",
        step=step,
        dataset=facts.dataset,
        state=state,
        model_args=tuple(facts.config.get("model_arg", ())),
        facts=facts,
    )


def _open_exported(folder: Path) -> StoredModel:
    from safetensors import SafetensorError  # a dependency of timm
    from safetensors.torch import load_file

    try:
        content: dict[str, Any] = read_json(folder / CONFIG, _SHAPE)
        own = content[OWN]
        return StoredModel(
            path=folder,
            name=content["architecture"],
            class_names=tuple(content["label_names"]),
            preprocessing=Preprocessing.from_dict(own["preprocessing"]),
            weights=own["weights"],
            step=own["step"],
            dataset=own["dataset"],
            state=load_file(folder / WEIGHTS),
            model_args=named_args(content.get("model_args") or {}),
        )
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder}: {CONFIG} or {WEIGHTS} is not as wds-convnext export wrote it ({reason}). "
            "Export the run again."
        ) from None
