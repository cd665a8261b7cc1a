"""Which columns of a table hold the images, or their paths, and the labels.

One rule for both: the column that is named; else the one that Hugging Face's features state
(`Image`, `ClassLabel`) or that is called as such columns usually are; else an error that lists the
candidates. A column of bytes that is the only one holds the images; where none holds bytes, a text
of a usual name holds their paths. A number or a text that is the only one may be an identifier or a
caption, so it is never taken for the label, except next to a path in a table of two columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from wds_convnext.conversion.source import NoLabels
from wds_convnext.door import parse_json
from wds_convnext.errors import UsageError, did_you_mean

# In order of preference.
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes")
_PATH_NAMES = (
    *("image", "img", "path", "file_name", "filename", "file", "image_path", "img_path"),
    *("file_path", "filepath", "image_file", "image_name", "picture", "fname"),
)
_LABEL_NAMES = (
    *("label", "labels", "class", "target", "cls", "fine_label", "category", "y"),
    *("label_id", "class_id", "class_label", "label_idx", "class_idx", "class_name", "label_name"),
)


@dataclass(frozen=True)
class Columns:
    """Where image and label stand in a row. `class_names` is None if the metadata has none."""

    image: str
    image_is_struct: bool
    label: str
    class_names: tuple[str, ...] | None
    image_is_path: bool = False

    def __str__(self) -> str:
        kind = " (a struct)" if self.image_is_struct else " (paths)" if self.image_is_path else ""
        return f"images in {self.image}{kind}, labels in {self.label}"

    @property
    def leaves(self) -> list[str]:
        """The parquet columns to read."""
        return [self.image + ".bytes" if self.image_is_struct else self.image, self.label]


def find_columns(
    path: str,
    schema: pa.Schema,
    *,
    image: str | None = None,
    label: str | None = None,
    paths: Sequence[str] = (),
) -> Columns:
    """Which columns of a file hold the image and the label: as named, or by the rule above.

    Args:
        paths: columns that hold paths of images, as their content shows.
    Raises:
        UsageError: if a named column is missing or of another type, or none or several fit.
        NoLabels: if that is so of the label only.
    """
    features = _features(schema)
    images = [f.name for f in schema if _holds_images(f.type)]
    texts = [f.name for f in schema if _is_text(f.type)]
    is_path = bool(paths) or image in texts or not images
    if is_path:
        usual = [name for name in texts if name.lower() in _PATH_NAMES]
        images = [image] if image in texts else [*paths] or usual
    image = _named(path, schema, "image", image, images) or _found(
        images, features, "Image", _PATH_NAMES if is_path else _IMAGE_NAMES
    )
    if image is None and len(images) == 1:
        image = images[0]
    if image is None:
        raise UsageError(_refusal(path, schema, "image", images))
    labels = [f.name for f in schema if _holds_labels(f.type) and f.name != image]
    label = _named(path, schema, "label", label, labels) or _found(
        labels, features, "ClassLabel", _LABEL_NAMES
    )
    if label is None and is_path and len(schema) == 2 and len(labels) == 1:
        (label,) = labels
    if label is None:
        raise NoLabels(_refusal(path, schema, "label", labels), reason="it has no label column")
    for name in (image, label):
        if schema.names.count(name) > 1:
            raise UsageError(f"{path}: there are several columns {name}; {_listed(schema)}.")
    names = features.get(label, {}).get("names")
    return Columns(
        image,
        pa.types.is_struct(schema.field(image).type),
        label,
        tuple(map(str, names)) if names and isinstance(names, list) else None,
        is_path,
    )


def _features(schema: pa.Schema) -> dict:
    try:
        shape: dict[str, dict[str, dict]] = {"info": {"features": {}}}
        stated = parse_json((schema.metadata or {})[b"huggingface"], shape)["info"]["features"]
        return {name: feature for name, feature in stated.items() if isinstance(feature, dict)}
    except (KeyError, ValueError):
        return {}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    is_view = pa.types.is_binary_view(kind)
    return is_view or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_labels(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    is_view = pa.types.is_string_view(kind)
    return is_view or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _named(
    path: str, schema: pa.Schema, role: str, named: str | None, fitting: Sequence[str]
) -> str | None:
    """The column that the user named for a role, if one was."""
    if named is None or named in fitting:
        return named
    found = "is not of a type for it" if named in schema.names else "is not there"
    hint = did_you_mean(named, fitting)
    text = f"{path}: --{role}-column {named} {found}; {_listed(schema)}.{hint}"
    if role == "label":
        raise NoLabels(text, reason=f"it has no label column {named}")
    raise UsageError(text)


def _found(
    fitting: Sequence[str], features: dict, feature_type: str, usual_names: Sequence[str]
) -> str | None:
    """The column that the metadata states, or of a usual name; None if that leaves a choice."""
    stated = [c for c in fitting if features.get(c, {}).get("_type") == feature_type]
    if both := _usual(stated, usual_names):
        return both
    usual = _usual(fitting, usual_names)
    if len(stated) == 1 and usual is None:
        return stated[0]
    return None if stated else usual


def _usual(columns: Sequence[str], usual_names: Sequence[str]) -> str | None:
    """The first of the usual names that a column has."""
    return next((c for name in usual_names for c in columns if c.lower() == name), None)


def _refusal(path: str, schema: pa.Schema, role: str, fitting: Sequence[str]) -> str:
    """One line: why no column can be taken for a role, and what there is."""
    advice = f"Name one with --{role}-column."
    if len(fitting) > 1:
        problem = f"several {role} columns fit ({', '.join(fitting)})"
    elif fitting:
        problem = f"no column is called as labels are; {fitting[0]} may be something else"
    elif role == "image":
        problem = "no image column"
        advice = "Images are bytes (binary, or a struct with bytes) or paths of files (text)."
    else:
        problem = "no label column"
        advice = "Labels are integers or strings, one for each row."
    return f"{path}: {problem}; {_listed(schema)}. {advice}"


def _listed(schema: pa.Schema) -> str:
    return "columns: " + ", ".join(f"{field.name} ({field.type})" for field in schema)
