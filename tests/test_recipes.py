"""Recipes: readable, valid and found by name; the article's is the defaults."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import wds_convnext
from wds_convnext.cli import commands
from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.options import read_toml, recipe_path

RECIPES = sorted((Path(wds_convnext.__file__).parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_ships_is_readable_and_valid(path):
    """Found by its name; every key is an option, and every value passes that option's check."""
    content = read_toml(recipe_path(path.stem), TrainConfig)

    options = {parameter.name: parameter for parameter in commands.commands["train"].params}
    context = click.Context(commands.commands["train"])
    assert content
    for key, value in content.items():
        assert options[key].type_cast_value(context, value) == value, key


def test_the_articles_recipe_is_the_defaults():
    """`train` with no other option is the article's run."""
    content = read_toml(recipe_path("article"), TrainConfig)

    defaults = TrainConfig()
    assert content == {key: getattr(defaults, key) for key in content}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar",
            "--recipe cifar: no such recipe. Did you mean cifar10? Own files go to --config.",
        ),
        (
            "zzz",
            "--recipe zzz: no such recipe. There are "
            f"{', '.join(path.stem for path in RECIPES)}. Own files go to --config.",
        ),
        ("../article", "--recipe ../article: no such recipe. Did you mean article?"),
    ],
)
def test_an_unknown_recipe_names_those_there_are(name, message):
    """The nearest, or all."""
    with pytest.raises(UsageError) as error:
        recipe_path(name)

    assert str(error.value).startswith(message)


def test_the_help_names_every_recipe():
    """A recipe that is added is added there, too."""
    result = CliRunner().invoke(commands, ["train", "--help"])

    assert result.exit_code == 0
    assert all(path.stem in result.output for path in RECIPES)
