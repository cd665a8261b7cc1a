"""A folder is a layer: it imports from the root's small modules and from layers above it only."""

import ast
from pathlib import Path

import pytest

import wds_convnext

ROOT = Path(wds_convnext.__file__).parent
LAYERS = ["storage", "shards", "stream", "training", "conversion", "check", "report"]
ABOVE_ALL = {"cli", "commands", "__main__", "__init__"}  # may import everything


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own, *inner = path.relative_to(ROOT).with_suffix("").parts
    if own in ABOVE_ALL:
        return
    allowed = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else []
    tree = ast.parse(path.read_text())
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]:
        package, _, rest = node.module.partition(".")
        if package == "wds_convnext" and (layer := rest.split(".")[0]) in LAYERS:
            assert layer in allowed, f"line {node.lineno}: {node.module}"
