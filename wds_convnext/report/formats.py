"""The files of an exported model: weights and config.json as on the Hub, ONNX, torch.export."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wds_convnext.errors import UsageError
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.model import parse_model_args
from wds_convnext.training.runs import CONFIG, WEIGHTS
from wds_convnext.training.stored import OWN, StoredModel

ONNX, PT2 = "model.onnx", "model.pt2"
Run = Callable[[torch.Tensor], torch.Tensor]  # float32 (B, 3, S, S), normalized -> logits


def write_hub_layout(stored: StoredModel, folder: Path) -> nn.Module:
    """Write weights and config.json; gives the model as timm makes it from these files."""
    import timm
    from safetensors.torch import save_file

    # Copies, as safetensors takes no tensors that share memory.
    state = {name: tensor.clone().contiguous() for name, tensor in stored.state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    content = _config(stored)
    (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes it private
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _config(stored: StoredModel) -> dict[str, Any]:
    model: Any = stored.build()
    made_for = model.pretrained_cfg
    pixels, size = stored.preprocessing, stored.preprocessing.image_size
    own = {
        "weights": stored.weights,
        "step": stored.step,
        "preprocessing": pixels.to_dict(),
        "dataset": stored.dataset,
    }
    return {
        "architecture": stored.name.partition(".")[0],
        "num_classes": stored.num_classes,
        "num_features": model.num_features,
        "model_args": parse_model_args(stored.model_args),
        "label_names": list(stored.class_names),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": bool(made_for.get("fixed_input_size", False)),
            "interpolation": pixels.interpolation,
            "crop_pct": crop_pct(pixels),
            "crop_mode": pixels.crop_mode,
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": stored.num_classes,
            "first_conv": made_for.get("first_conv"),
            "classifier": made_for.get("classifier"),
        },
        OWN: own,
    }


def crop_pct(pixels: Preprocessing) -> float:
    """The crop ratio with which timm, which rounds down, resizes to the same size in pixels."""
    side = round(pixels.image_size / pixels.crop_ratio)
    ratio = pixels.crop_ratio
    if math.floor(pixels.image_size / ratio) != side:
        ratio = pixels.image_size / (side + 0.5)
    return ratio


def write_pt2(model: nn.Module, folder: Path, image_size: int) -> Run:
    """Write a program of torch.export, for any number of images; gives it as read back."""
    with _quietly():
        exported = torch.export.export(
            model, (_example(image_size),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
        torch.export.save(exported, folder / PT2)
        return torch.export.load(folder / PT2).module()


def write_onnx(model: nn.Module, folder: Path, image_size: int) -> Run:
    """Write an ONNX file, for any number of images; gives it as onnxruntime runs it on the CPU.

    Raises:
        UsageError: if the packages of the extra are not installed.
    """
    require_onnx()
    import onnxruntime

    with _quietly():
        torch.onnx.export(
            model,
            (_example(image_size),),
            folder / ONNX,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def require_onnx() -> None:
    """Refuse an export to ONNX without its packages.

    Raises:
        UsageError: if one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--onnx: {error.name} is not installed. pip install 'wds-convnext[onnx]'."
        ) from None


def _example(image_size: int) -> torch.Tensor:
    return torch.zeros(2, 3, image_size, image_size)  # of one image, the batch would be fixed


@contextmanager
def _quietly() -> Iterator[None]:
    """What exporters print and warn of is about themselves; files are checked by running them."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
