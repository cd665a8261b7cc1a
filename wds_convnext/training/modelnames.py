"""Names of timm's models, without importing them: that takes seconds, and a typo should not."""

import re
from importlib.util import find_spec
from pathlib import Path

from wds_convnext.errors import UsageError, did_you_mean


def model_names() -> tuple[set[str], set[str]]:
    """The names of timm's models and ours, and the keys of its maps: deprecated names, too."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        raise UsageError("timm is not installed. Install it: pip install timm.")
    files = [*Path(spec.origin).parent.glob("models/*.py"), Path(__file__).with_name("thumbnet.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = re.findall(r"^@register_model\s+def (\w+)", source, re.MULTILINE)
    return set(names), set(re.findall(r"^\s+'(\w+)': ", source, re.MULTILINE))


def check_model_name(name: str) -> None:
    """Look for a model, with or without a tag, in the source of timm.

    Raises:
        UsageError: if no file of timm's models names it.
    """
    known, keys = model_names()
    base = name.partition(".")[0]
    if base not in known | keys:
        raise UsageError(f"--model {name}: timm has no such model.{did_you_mean(base, known)}")
