"""Losses: torch's and DeiT III's, weighted by class; their options and their resume."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run, train_command, write_shards
from timm.loss import BinaryCrossEntropy

from wds_convnext.config import TrainConfig
from wds_convnext.errors import UsageError
from wds_convnext.shards.opening import open_dataset
from wds_convnext.training.loss import Loss, class_weights

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 0])
ONE_HOT = F.one_hot(LABELS, 4).float()
MIXED = torch.lerp(ONE_HOT.flip(0), ONE_HOT, 0.7)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0])


def test_cross_entropy_of_hard_targets_is_torchs():
    torch.testing.assert_close(Loss()(LOGITS, ONE_HOT), F.cross_entropy(LOGITS, LABELS))


def test_bce_takes_both_classes_of_a_mixed_image_as_present():
    """As DeiT III: targets.gt(0), then BCEWithLogitsLoss; timm's with a threshold of 0."""
    expected = torch.nn.BCEWithLogitsLoss()(LOGITS, MIXED.gt(0.0).float())

    loss = Loss("bce")(LOGITS.bfloat16(), MIXED)

    torch.testing.assert_close(Loss("bce")(LOGITS, MIXED), expected)
    torch.testing.assert_close(
        expected, BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(LOGITS, MIXED)
    )
    assert loss.dtype == torch.float32


def test_class_weights_multiply_the_terms_of_classes():
    """Of cross-entropy the mean over samples, not over weights: torch's for soft targets."""
    terms = -(MIXED * LOGITS.log_softmax(1) * WEIGHTS).sum(1)
    each = F.binary_cross_entropy_with_logits(LOGITS, (MIXED > 0).float(), reduction="none")

    torch.testing.assert_close(Loss("ce", WEIGHTS)(LOGITS, MIXED), terms.mean())
    torch.testing.assert_close(Loss("bce", WEIGHTS)(LOGITS, MIXED), (each * WEIGHTS).mean())


def test_balanced_weights_are_one_in_the_mean_over_samples(tmp_path):
    """Inverse to sizes; 21 samples of four classes, numbered from 0 on."""
    dataset = open_dataset(str(write_shards(tmp_path, [13, 8])))

    weights = np.array(class_weights(TrainConfig(class_weights="balanced"), dataset))

    sizes = np.bincount(dataset.labels)
    assert len(set(sizes)) > 1
    np.testing.assert_allclose(weights * sizes, 21 / 4)
    assert weights[dataset.labels].mean() == pytest.approx(1)
    assert class_weights(TrainConfig(), dataset) is None


def test_a_file_of_weights_is_read_by_class_name(tmp_path):
    dataset = open_dataset(str(write_shards(tmp_path, [13, 8])))
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"dog": 4, "ant": 0.5, "bee": 1, "cat": 2}))

    assert class_weights(TrainConfig(class_weights=str(path)), dataset) == [0.5, 1, 2, 4]
    path.write_text(json.dumps({"ant": 1}))
    with pytest.raises(UsageError, match=f"--class-weights {path}: does not name class bee"):
        class_weights(TrainConfig(class_weights=str(path)), dataset)
    with pytest.raises(UsageError, match="--class-weights balance: No such file"):
        class_weights(TrainConfig(class_weights="balance"), dataset)


def test_bce_smooths_no_labels():
    assert TrainConfig(loss="bce").label_smoothing == 0
    assert TrainConfig().label_smoothing == 0.1
    with pytest.raises(UsageError, match="--loss bce and --label-smoothing 0.1"):
        TrainConfig(loss="bce", label_smoothing=0.1)
    with pytest.raises(UsageError, match="--mixing-off-epochs 5: expected at most --epochs 4"):
        TrainConfig(epochs=4, mixing_off_epochs=5)


@pytest.mark.slow
def test_other_weights_on_a_resume_are_said(shards, tmp_path):
    """The options are the same, but the file is not: the run goes on, with a warning."""
    path = tmp_path / "weights.json"
    options = {"--loss": "bce", "--class-weights": path}
    command = train_command(shards, tmp_path / "run", **options)
    path.write_text(json.dumps({"ant": 1, "bee": 1, "cat": 2, "dog": 2}))
    run([*command, "--max-steps", "2"])
    path.write_text(json.dumps({"ant": 1, "bee": 1, "cat": 2, "dog": 3}))

    other = run([*command, "--max-steps", "3", "--resume"])

    assert "Resuming with class_weights" in other.stderr
