"""`--pretrained`: where others' weights come from, and the pixels that they were trained on.

Four kinds of source: a tag of timm's, a repository of the Hub, a folder in its layout, a file.
The first two are fetched into huggingface_hub's cache; no file is ever trusted to run code.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from wds_convnext.config import DEFAULT_MODEL, TrainConfig, local_source
from wds_convnext.door import check_shape, parse_json, read_bounded, text
from wds_convnext.errors import CheckpointError, UsageError, did_you_mean, sentence
from wds_convnext.stream.transforms import Preprocessing
from wds_convnext.training.model import init_from, named_args, parse_model_args
from wds_convnext.training.weights import read_file

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)

_MAX_CONFIG = 1 << 22  # bytes of a config.json; one with 21,000 class names has 1 MB
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pth")
_PIXELS = ("image_size", "crop", "crop_mode", "interpolation", "mean", "std")  # options


@dataclass(frozen=True)
class Source:
    """Weights of others, not yet read, and what is known of them."""

    name: str  # as --pretrained was given
    path: str | None = None  # of the weights, a file or a folder
    repository: str | None = None  # of the Hub, owner/name or owner/name@revision
    url: str | None = None  # where the weights are, if not on the Hub
    model: str | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)  # by their options' names
    model_args: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None


def with_pretrained(config: AnyTrainConfig) -> AnyTrainConfig:
    """The config with what its --pretrained implies for options that are not given.

    These are the model and its arguments, and the pixels. A config that has them all, as a run's
    own has, is given back as it is, and nothing is looked up.

    Raises:
        UsageError: if the source is not known or another model's.
        CheckpointError: if it cannot be fetched or read.
    """
    missing = [name for name in ("model", *_PIXELS) if getattr(config, name) is None]
    if config.pretrained is None or not missing:
        return config
    source = find_source(config.pretrained, config.model)
    model_args = config.model_arg or source.model_args
    implied = {"model": source.model or config.model or DEFAULT_MODEL, **source.pixels}
    img_size = parse_model_args(model_args).get("img_size")
    if isinstance(img_size, int):
        implied["image_size"] = img_size
    filled = {name: implied[name] for name in missing if name in implied}
    return replace(config, model_arg=model_args, **filled)


def load_pretrained(
    model: nn.Module, config: TrainConfig, *, class_names: tuple[str, ...] | None
) -> str:
    """Start from the weights of a config's --pretrained, as `init_from` does.

    Returns:
        A sentence on what was loaded, what is fresh and what was left out.
    """
    assert config.pretrained is not None
    source = find_source(config.pretrained, config.model)
    return init_from(
        model,
        _weights_file(source),
        class_names=class_names,
        source=source.name,
        trained_for=source.class_names,
    )


def absolute_source(name: str) -> str:
    """A source as a resume from another working directory can use it."""
    path = local_source(name)
    return name if path is None else os.path.abspath(path)


def find_source(name: str, model: str | None) -> Source:
    """What `--pretrained NAME` means next to `--model MODEL`.

    Raises:
        UsageError: if it is not known, or the model is another.
        CheckpointError: if its config cannot be fetched or read.
    """
    path = local_source(name)
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        config = _fetch(name, repository, "config.json")
        if config is None:
            raise CheckpointError(
                f"--pretrained {name}: the repository has no config.json, so it is not a timm "
                "model's. Give the file of its weights, with --model."
            )
        source = replace(_from_config(name, config), repository=repository)
    elif path is None:
        source = _from_tag(name, model)
    elif os.path.isfile(path):
        source = _from_file(path, model)
    elif os.path.isdir(path):
        source = replace(_from_config(name, os.path.join(path, "config.json")), path=path)
    else:
        raise CheckpointError(f"--pretrained {name}: no such file or folder. Name one that is.")
    if model and source.model and model.partition(".")[0] != source.model.partition(".")[0]:
        raise UsageError(
            f"--pretrained {name}: weights of {source.model}, and --model is {model}. Leave "
            "--model out, or give weights of that model."
        )
    return source


def _from_tag(name: str, model: str | None) -> Source:
    """A tag of timm's, whole (`resnet50.a1_in1k`) or a model's default."""
    import timm
    from timm.models import get_pretrained_cfg

    whole = (model or DEFAULT_MODEL) if name == "default" else name
    known = timm.list_pretrained()
    if not timm.is_model(whole) or ("." in whole and whole not in known):
        hint = did_you_mean(whole, known)
        raise UsageError(
            f"--pretrained {name}: {whole} is neither a file nor a tag of timm's.{hint} Tags are "
            "those of timm.list_pretrained()."
        )
    stated = get_pretrained_cfg(whole)
    if stated is None or not stated.has_weights:
        raise UsageError(
            f"--pretrained {name}: timm has no weights for {whole}. Give a file, or another model."
        )
    tagged = whole if "." in whole else f"{whole}.{stated.tag}"
    return Source(
        tagged,
        repository=stated.hf_hub_id,
        url=stated.url if isinstance(stated.url, str) else None,
        model=whole,
        pixels=pixels_of_timm(stated.to_dict(), name),
    )


def _from_file(name: str, model: str | None) -> Source:
    """A file of weights: a checkpoint of ours says what it was trained on, of others the model."""
    from timm.models import get_pretrained_cfg, is_model

    import wds_convnext.training.thumbnet  # noqa: F401  registers it with timm

    facts = read_file(name, option="--pretrained").get("facts")
    if isinstance(facts, dict) and isinstance(facts.get("model"), str):
        try:
            stored = Preprocessing.from_dict(facts["preprocessing"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"--pretrained {name}: its preprocessing cannot be read ({error}). Give the file "
                "to --init-from, and the pixels as options."
            ) from None
        config = facts.get("config")
        given = config.get("model_arg", ()) if isinstance(config, dict) else ()
        return Source(
            name,
            path=name,
            model=facts["model"],
            pixels=_as_options(stored),
            model_args=tuple(map(str, given)),
        )
    named = model or DEFAULT_MODEL
    try:
        stated = get_pretrained_cfg(named) if is_model(named) else None
    except RuntimeError as error:  # a tag that is none of this model's
        raise UsageError(f"--model {named}: {sentence(error)}") from None
    pixels = pixels_of_timm(stated.to_dict(), name) if stated else {}
    return Source(name, path=name, pixels=pixels)


def _from_config(name: str, path: str) -> Source:
    """What a config.json of the Hub's layout says, also in its old form without nesting."""
    try:
        content = parse_json(read_bounded(path, max_bytes=_MAX_CONFIG), {"architecture": text})
        stated = content.get("pretrained_cfg", content)
        arguments = content.get("model_args") or {}
        names = content.get("label_names") or stated.get("label_names")
        check_shape(stated, {})
        check_shape(arguments, {})
        check_shape(names or [], [text])
    except OSError as error:
        raise CheckpointError(
            f"--pretrained {name}: {path}: {error.strerror}. Give a folder with config.json and "
            "model.safetensors, or a file of weights."
        ) from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"--pretrained {name}: {path} is not a model's config ({error}). Give the file of "
            "weights, with --model."
        ) from None
    return Source(
        name,
        model=content["architecture"],
        pixels=pixels_of_timm(stated, name),
        model_args=named_args(arguments),
        class_names=tuple(names) if names else None,
    )


def pixels_of_timm(stated: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options for the pixels that a timm pretrained_cfg states; what it leaves out as timm.

    Raises:
        CheckpointError: if this version cannot make such pixels.
    """
    try:
        channels, height, width = stated.get("input_size", (3, 224, 224))
        crop = float(stated.get("crop_pct") or 0.875)
        mode = stated.get("crop_mode") or "center"
        side = math.floor(height / crop)
        if round(height / crop) != side:
            crop = height / (side + 0.25)  # timm rounds down, `EvalTransform` to the nearest
        pixels = Preprocessing(
            int(height),
            crop,
            mode,
            stated.get("interpolation") or "bicubic",
            tuple(map(float, stated.get("mean") or Preprocessing.mean)),  # type: ignore[arg-type]
            tuple(map(float, stated.get("std") or Preprocessing.std)),  # type: ignore[arg-type]
        )
        if channels != 3 or height != width:
            raise ValueError(f"input_size {channels}x{height}x{width}, expected 3 and a square")
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(
            f"--pretrained {name}: other pixels than are made here ({error}). Give the file of "
            "weights to --init-from, and the pixels as options."
        ) from None
    return _as_options(pixels)


def _as_options(pixels: Preprocessing) -> dict[str, Any]:
    """The values of the options that make such pixels."""
    return {
        "image_size": pixels.image_size,
        "crop": pixels.crop_ratio,
        "crop_mode": pixels.crop_mode,
        "interpolation": pixels.interpolation,
        "mean": ",".join(f"{value:.9g}" for value in pixels.mean),
        "std": ",".join(f"{value:.9g}" for value in pixels.std),
    }


def _weights_file(source: Source) -> str:
    """The local file of a source's weights, fetched if need be."""
    if source.path is not None:
        if not os.path.isdir(source.path):
            return source.path
        found = [os.path.join(source.path, name) for name in _WEIGHTS]
        if existing := [path for path in found if os.path.isfile(path)]:
            return existing[0]
        raise CheckpointError(
            f"--pretrained {source.name}: {source.path} holds none of {', '.join(_WEIGHTS)}."
            " Name a file of weights."
        )
    if source.repository is None:
        raise CheckpointError(
            f"--pretrained {source.name}: these weights are not on the Hub. Fetch {source.url} and "
            f"give the file: --model {source.model} --pretrained FILE."
        )
    for name in _WEIGHTS:
        if path := _fetch(source.name, source.repository, name, model=source.model):
            return path
    raise CheckpointError(
        f"--pretrained {source.name}: {source.repository} holds none of {', '.join(_WEIGHTS)}. "
        "Fetch its weights, and give the file."
    )


def _fetch(name: str, repository: str, file: str, *, model: str | None = None) -> str | None:
    """A file of the Hub, from its cache or fetched into it; None if the repository has none such.

    Raises:
        CheckpointError: if it is neither there nor to be had: which file to fetch by hand.
    """
    try:
        from huggingface_hub import errors, hf_hub_download, hf_hub_url
    except ImportError:
        raise CheckpointError(
            f"--pretrained {name}: huggingface_hub is not installed. Install wds-convnext[data]."
        ) from None
    repository, _, revision = repository.partition("@")
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # it reports each of its five retries
    try:
        return hf_hub_download(repository, file, revision=revision or None)
    except errors.LocalEntryNotFoundError:
        reason = "no connection to the Hub, and not in its cache"
    except errors.EntryNotFoundError:
        return None  # from a repository that is there
    except errors.RepositoryNotFoundError:
        reason = "the Hub has no such repository, or does not show it to everyone"
    except Exception as error:  # of the client, of its HTTP library, of the file system
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
    finally:
        client.setLevel(level)
    try:
        wanted = hf_hub_url(repository, file, revision=revision or None)
    except Exception:  # a name that is none of the Hub's
        wanted = f"{file} of {repository}"
    advice = "a folder with it and the weights, as --pretrained local-dir:FOLDER"
    if model:
        advice = f"--model {model} --pretrained {file}"
    raise CheckpointError(
        f"--pretrained {name}: {reason}. Fetch {wanted} by other means and give it: {advice}."
    )
