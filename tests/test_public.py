"""The public names: loaded on first use, documented, each what its docstring says."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import wds_convnext as wc
from wds_convnext.errors import UsageError


def python(code: str) -> bytes:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout


def test_importing_the_package_imports_nothing_else():
    """No torch, no numpy, no click; `dir` shows the names all the same."""
    code = "import sys, wds_convnext as wc; print(len(dir(wc)) > 25, *sys.modules)"

    shown, *modules = python(code).decode().split()

    assert shown == "True"
    assert not {"torch", "numpy", "click", "wds_convnext.cli"} & set(modules)


def test_data_comes_without_torch():
    code = "import sys, wds_convnext as wc; wc.open_dataset, wc.convert, wc.verify; "

    assert python(code + "print('torch' in sys.modules)") == b"False\n"


def test_type_checkers_see_the_names_that_there_are():
    """The imports under TYPE_CHECKING and the names loaded on first use are the same."""
    tree = ast.parse(Path(wc.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    seen = {
        name.name: n.module
        for n in imports
        if n.module.startswith("wds_convnext")
        for name in n.names
    }

    assert {*seen, "__version__"} == set(wc.__all__)
    assert all(getattr(wc, name) is getattr(import_module(m), name) for name, m in seen.items())


def test_no_module_hides_a_public_name():
    """A submodule becomes an attribute of its package when it is imported."""
    for module in pkgutil.walk_packages(wc.__path__, "wds_convnext."):
        if not module.name.endswith("__main__"):
            import_module(module.name)

    for name in wc.__all__:
        assert not inspect.ismodule(getattr(wc, name)), name


@pytest.mark.parametrize("name", [name for name in wc.__all__ if name != "__version__"])
def test_each_public_name_is_documented(name):
    assert len(inspect.getdoc(getattr(wc, name))) > 20


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_datasets'"):
        wc.open_datasets  # noqa: B018


class AlwaysAnt(nn.Module):
    """Says class 0, whatever it sees."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.eye(num_classes)[0])

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_a_model_is_evaluated_on_a_split_in_one_line(shards):
    result = wc.evaluate(AlwaysAnt(4), f"{shards}/validation.json", workers=0, quiet=True)

    labels = wc.open_dataset(f"{shards}/validation.json").labels
    assert result.num_samples == len(labels) == 13
    assert result.top1 == (labels == 0).mean()


def test_a_model_of_fewer_classes_is_refused(shards):
    with pytest.raises(UsageError, match="the model has 3 classes, and the split 4"):
        wc.evaluate(AlwaysAnt(3), f"{shards}/validation.json", workers=0, quiet=True)


def test_training_without_shards_is_refused():
    with pytest.raises(UsageError, match="--shards is missing"):
        wc.train(epochs=1)
