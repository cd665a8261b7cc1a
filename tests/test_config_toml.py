"""A run's config.toml reads back as written, in other versions too, and redirects nothing."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.options import PER_CALL, format_toml, read_run_toml, read_toml


@pytest.mark.parametrize("name", PER_CALL)
def test_no_file_says_where_a_run_is_written_or_what_it_replaces(tmp_path, name):
    """Refused in a file that a user gives; a run's own config.toml is not listened to."""
    path = tmp_path / "config.toml"
    path.write_text(f'epochs = 3\n{name} = "elsewhere"\n')

    with pytest.raises(UsageError) as error:
        read_toml(path, TrainConfig)
    found = read_run_toml(path, TrainConfig, warn=pytest.fail)

    assert str(error.value) == f"{path}: {name} is of one call. Give --{name} with the command."
    assert found == {"epochs": 3}


def test_a_runs_file_of_another_version_is_read_with_a_warning(tmp_path):
    """What this version does not know is named, and left out."""
    path = tmp_path / "config.toml"
    path.write_text('epochs = 3\nfuture = "x"\n[table]\npast = 1\n')
    warnings = []

    assert read_run_toml(path, TrainConfig, warn=warnings.append) == {"epochs": 3}
    assert warnings == [f"{path}: ignored future, table, which this version has no option for."]


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    shards=texts,
    val_shards=st.none() | texts,
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    mixup=st.floats(0, allow_infinity=False),
    epochs=st.integers(1),
    workers=st.none() | st.integers(0, 256),
    compile=st.none() | st.booleans(),
)
def test_a_config_reads_back_as_written(tmp_path_factory, **values):
    """Any text, number or switch; what is None is left to the default."""
    path = tmp_path_factory.getbasetemp() / "config.toml"
    config = TrainConfig(**values)

    path.write_text(format_toml(config), encoding="utf-8", newline="")

    assert TrainConfig(**read_toml(path, TrainConfig)) == config


def test_what_belongs_to_one_call_is_not_written():
    """A config read back neither resumes nor deletes a run."""
    texts = [
        format_toml(TrainConfig(shards="s", **option))
        for option in ({"resume": "runs/a"}, {"overwrite": True})
    ]

    assert all(tomllib.loads(text).keys().isdisjoint({"resume", "overwrite"}) for text in texts)
