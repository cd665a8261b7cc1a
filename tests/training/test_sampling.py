"""Weighted runs: what the options come to, and that a resume has the same weights or is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import write_shards
from test_cli import call, train_args

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.training.checkpoint import load_checkpoint
from wds_convnext.training.sampling import build_weighting, describe


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """24 samples of class 0 and 1 in turn, next to 8 of all four classes."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: write_shards(folder / name, sizes) for name, sizes in
            {"large": [10, 14], "small": [8]}.items()}  # fmt: skip


def weighting(**options):
    config = TrainConfig(**options)
    return build_weighting(config, open_dataset(config.require_shards()))


def write_weights(path, weights) -> str:
    path.write_text(json.dumps(weights, ensure_ascii=False))
    return str(path)


def test_classes_have_equal_shares_or_those_of_a_file(uneven, tmp_path):
    shards = str(uneven["large"])
    weights = write_weights(tmp_path / "w.json", {"ant": 0, "bee": 1, "cat": 2, "dog": 3})

    assert weighting(shards=shards) is None
    assert weighting(shards=shards, balance="classes").shares.tolist() == [6, 6, 6, 6]
    assert weighting(shards=shards, balance=weights).shares.tolist() == [0, 4, 8, 12]
    assert weighting(shards=shards, balance=weights, epoch_samples=60).epoch_size == 60
    assert weighting(shards=shards, epoch_samples=5).shares.tolist() == [5]
    assert "a sample comes 0 to 2 times" in describe(weighting(shards=shards, balance=weights))


def test_the_root_of_class_sizes_lies_between_sizes_and_equality(tmp_path):
    dataset = open_dataset(str(write_shards(tmp_path, [9])))  # classes of 3, 2, 2 and 2 samples
    shares = build_weighting(TrainConfig(balance="sqrt", epoch_samples=1000), dataset).shares

    assert shares.sum() == 1000
    assert np.allclose(
        shares / 1000, np.sqrt([3, 2, 2, 2]) / np.sqrt([3, 2, 2, 2]).sum(), atol=1e-3
    )


def test_sets_of_a_mixture_have_their_shares(uneven):
    mixed = weighting(mixture=f"{uneven['large']}=1,{uneven['small']}=3")

    assert mixed.sizes.tolist() == [24, 8] and mixed.shares.tolist() == [8, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "clases"}, "clases: No such file"),
        ({"balance": {"ant": 1, "bee": 1, "cat": 1}}, "does not name class dog"),
        ({"balance": {"ant": 1, "bee": 1, "cat": 1, "dog": 1, "eel": 1}}, "no class eel"),
        ({"balance": {"ant": -1, "bee": 1, "cat": 1, "dog": 1}}, "weight -1 of ant"),
        ({"balance": {"ant": "1", "bee": 1, "cat": 1, "dog": 1}}, "weight '1' of ant"),
        ({"balance": {"ant": 0, "bee": 0, "cat": 0, "dog": 0}}, "all weights are 0"),
        ({"balance": [1, 2]}, "expected an object"),
        ({"balance": {"ant": 1, "bee": 1, "cat": 1, "dog": 1e-9}}, "dog would get none"),
        ({"mixture": "a.json"}, "does not name a set and its weight"),
        ({"mixture": "a.json=2,a.json=1"}, "does not name a set and its weight once"),
        ({"mixture": "a.json=0"}, "does not name a set and its weight"),
        ({"mixture": "a.json=nan"}, "does not name a set and its weight"),
        ({"mixture": "a.json=1", "balance": "classes"}, "exclude each other"),
        ({"mixture": "a.json=1", "shards": "b.json"}, "Leave --shards out"),
        ({"epoch_samples": 0}, "epoch-samples"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(uneven, tmp_path, options, message):
    if not isinstance(options.get("balance", ""), str):
        options = options | {"balance": write_weights(tmp_path / "w.json", options["balance"])}
    if "mixture" not in options:
        options = options | {"shards": str(uneven["large"])}

    with pytest.raises(UsageError, match=message) as failure:
        weighting(**options)

    assert "\n" not in str(failure.value)


def test_a_weighted_run_resumes_bit_for_bit_and_with_the_same_weights_only(
    shards, tmp_path, capsys
):
    weights = write_weights(tmp_path / "w.json", {"ant": 1, "bee": 2, "cat": 3, "dog": 0})
    options = {"--balance": weights, "--epochs": 1, "--epoch-samples": 60, "--save-every": 100}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert call(capsys, *train_args(shards, straight, **options))[0] == 0
    assert call(capsys, *train_args(shards, resumed, **options), "--max-steps", 3)[0] == 0

    code, _, error = call(capsys, "train", "--resume", resumed, "--balance", "classes")
    assert code == 2 and "--balance, --mixture, --epoch-samples" in error
    assert call(capsys, "train", "--resume", resumed)[0] == 0

    one, two = (load_checkpoint(folder / "last.pt") for folder in (straight, resumed))
    assert one["step"] == two["step"] == 8  # of 60 samples, 8 at a time
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    code, out, _ = call(capsys, "explain", straight, "--step", 1, "--json")
    assert code == 0 and {s["class_name"] for s in json.loads(out)["batches"][0]["samples"]} <= {
        "ant", "bee", "cat",
    }  # fmt: skip
