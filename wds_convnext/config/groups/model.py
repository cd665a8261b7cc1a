"""Options of the model and its starting weights."""

from dataclasses import dataclass

from wds_convnext.config.fields import FRACTION, Config, FiniteRange, KeyValue, option


@dataclass(frozen=True)
class ModelOptions(Config):
    """The model, and the weights that it starts from."""

    model: str | None = option(
        None,
        "Any timm model, by name. Default: that of --pretrained, else convnext_base.",
        group="Model",
    )
    model_arg: tuple[str, ...] = option(
        (),
        "An argument for timm's model, KEY=VALUE, such as drop_rate=0.2 or img_size=64. May be "
        "repeated.",
        group="Model",
        type=KeyValue(),
    )
    drop_path_rate: float = option(
        0.2, "Stochastic depth: the last block's drop rate.", group="Model", type=FRACTION
    )
    pretrained: str | None = option(
        None,
        "Start from weights that others trained, with the pixels they were trained on: a tag of "
        "timm's (convnext_tiny.fb_in22k_ft_in1k), hf-hub:owner/name, local-dir:folder, a "
        ".safetensors or .pth file; alone, the default tag of --model.",
        group="Model",
        flag_value="default",
    )
    init_from: str | None = option(
        None,
        "Start from the weights in a file, and from nothing else of it: pixels are those of the "
        "options.",
        group="Model",
    )
    freeze: str | None = option(
        None,
        "Keep the parameters as they are whose name this regular expression finds, and their "
        "BatchNorm in evaluation mode: '^(stem|stages.[01])'.",
        group="Model",
    )
    ema_decay: float = option(
        0.0,
        "Decay of an average of the weights, which is then validated and evaluated; 0 for none.",
        group="Model",
        type=FiniteRange(0, 1, max_open=True),
    )
