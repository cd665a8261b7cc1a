"""What a step gets and when a sample comes: compared with what a run was really trained on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_model  # noqa: F401  (registers the model)
import torch
from click.testing import CliRunner
from conftest import encode_image, write_shards, write_tar
from PIL import Image

import wds_convnext as wc
from wds_convnext.check.explain import find_sample, load_step
from wds_convnext.cli import commands
from wds_convnext.config import ExplainConfig
from wds_convnext.errors import CheckpointError, UsageError
from wds_convnext.training import loop
from wds_convnext.training.augment import build_transform
from wds_convnext.training.checkpoint import load_checkpoint, save_checkpoint
from wds_convnext.training.recorded import open_recorded_run
from wds_convnext.training.step import augment_on_device

SIZES = [9, 1, 11]  # of the shards; the second sample of the first does not decode
NUMBERS = (0, 1, 9, 20)  # of samples that are looked up
BATCH, ACCUMULATE, EPOCHS, TRAINED = 4, 2, 3, 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, and of each step that was trained its batches and their mixed images."""
    folder, steps = tmp_path_factory.mktemp("trained"), []
    shards = write_shards(folder / "data", SIZES)
    members = [
        member
        for i in range(9)
        for member in (
            (f"{i:04d}.jpg", b"no image" if i == 1 else encode_image(i)),
            (f"{i:04d}.cls", str(i % 4).encode()),
        )
    ]
    write_tar(folder / "data" / "train-000.tar", members)
    for stale in ("train-000.idx", "train.json", "train.index"):
        (folder / "data" / stale).unlink(missing_ok=True)
    wc.index(str(folder / "data"), jobs=1)

    def recording(state, batches, *, lr, recipe):
        keys = [(recipe.seed, state.step, micro, 0) for micro in range(len(batches))]
        mixed = [augment_on_device(b, key=k, recipe=recipe)[0] for b, k in zip(batches, keys)]
        steps.append(([batch.images.clone() for batch in batches], batches, mixed))
        return train_step(state, batches, lr=lr, recipe=recipe)

    train_step = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", recording)
        wc.train(
            shards=str(shards),
            model="tiny_convnext",
            image_size_schedule="0:32,0.25:48",
            batch_size=BATCH,
            accumulate=ACCUMULATE,
            epochs=EPOCHS,
            max_steps=TRAINED,
            max_bad_samples=1.0,
            shuffle_buffer=8,
            mix_prob=0.8,
            random_erasing=0.5,
            workers=0,
            device="cpu",
            seed=3,
            out=str(folder / "run"),
        )
    return folder / "run", steps


def recorded(folder):
    return open_recorded_run(str(folder), warn=pytest.fail)


def test_a_step_is_explained_as_it_was_trained(trained):
    """Images before mixing and labels, bit for bit; samples that do not decode are replaced."""
    folder, steps = trained
    run, replaced = recorded(folder), []

    for step, (images, batches, _) in enumerate(steps):
        for (explained, pixels), expected, batch in zip(
            load_step(run, step), images, batches, strict=True
        ):
            assert torch.equal(pixels, expected)
            assert [sample.label for sample in explained.samples] == batch.labels.tolist()
            bad = [bad for sample in explained.samples for bad in sample.in_place_of]
            assert [b["key"] for b in bad] == [b["key"] for b in batch.bad_samples]
            replaced += bad
    assert len(steps) == TRAINED and {b["key"] for b in replaced} == {"0001"}


def test_the_sheet_shows_what_the_model_saw(trained, tmp_path):
    """Normalized, mixed and denormalized; a pixel is a square of 3x3 or, of 48x48, 2x2."""
    folder, steps = trained
    assert {mixed[0].shape[-1] for _, _, mixed in steps} == {32, 48}
    for step, (_, _, mixed) in enumerate(steps):
        wc.explain(str(folder), step=step, sheet=str(tmp_path / "sheet.png"))

        sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
        mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        height = sheet.shape[0] // ACCUMULATE
        for micro, images in enumerate(mixed):
            for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                left, top = i * 98, micro * height + 16
                side = 96 // len(image)
                seen = sheet[top : top + 96 : side, left : left + 96 : side]
                expected = ((image * std + mean) * 255).clip(0, 255)  # noise goes beyond
                assert np.abs(seen - expected).max() <= 0.51


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 2), (2, 1), (4, 1), (2, 2), (1, 1)])
def test_a_layout_divides_the_step_as_ranks_do(trained, ranks, accumulate):
    """Any ranks and accumulation: what the public stream of each rank gives."""
    run = recorded(trained[0])
    batch_size = BATCH * ACCUMULATE // ranks // accumulate
    run = replace(
        run,
        facts=replace(run.facts, batch_size=batch_size),
        config=replace(run.config, accumulate=accumulate, mixup=0, cutmix=0),
    )
    transform = wc.Preprocessing(48).train_transform(color_jitter=0.4)

    explained = list(load_step(run, 4))

    assert [(b.rank, b.micro_batch) for b, _ in explained] == list(np.ndindex(ranks, accumulate))
    for batch, images in explained:
        stream = wc.ShardStream(
            run.dataset,
            run.order,
            batch_size=batch_size,
            transform=transform,
            rank=batch.rank,
            world_size=ranks,
            start=4 * accumulate + batch.micro_batch,
        )
        assert torch.equal(images, next(iter(wc.make_loader(stream, workers=0))).images)


def explained_with(folder, **options):
    """Step 2 of a run with other options: what is explained, and that it is the stream's pixels."""
    run = recorded(folder)
    run = replace(run, config=replace(run.config, **options))
    stream = wc.ShardStream(
        run.dataset,
        run.order,
        batch_size=BATCH,
        transform=build_transform(run.config, run.facts.preprocessing),
        start=4,
    )

    (batch, images), *_ = load_step(run, 2)

    assert torch.equal(images, next(iter(wc.make_loader(stream, workers=0))).images)
    return batch


def test_a_padded_crop_is_explained_where_it_is_cut_out(trained):
    """Of images of 24x20, whose short side is resized to 48: place and size of what is cut."""
    batch = explained_with(trained[0], crop_padding=4, padding_mode="reflect")

    assert {sample.image_size for sample in batch.samples} == {(48, 57)}
    places = {(sample.crop.top, sample.crop.left) for sample in batch.samples}
    assert len(places) > 1 and all(-4 <= x <= 4 + 9 for place in places for x in place)


@pytest.mark.parametrize(("policy", "number"), [("rand-m9-n2", 2), ("3a", 1), ("trivial", 1)])
def test_a_policys_operations_are_named(trained, policy, number):
    batch = explained_with(trained[0], auto_augment=policy)

    for sample in batch.samples:
        assert len(sample.operations) == number
        assert all(
            f"  {name} {magnitude:.3f}" in str(sample) for name, magnitude in sample.operations
        )
    assert len({str(sample.operations) for sample in batch.samples}) > 1


def test_erased_rectangles_are_named(trained):
    """About half of the samples; those of the run whose sheets are compared."""
    run = recorded(trained[0])
    samples = [s for step in range(TRAINED) for b, _ in load_step(run, step) for s in b.samples]

    erased = [sample for sample in samples if sample.erasure]

    assert 0.2 < len(erased) / len(samples) < 0.8
    for sample in erased:
        top, left, height, width, _ = sample.erasure
        assert f"erased {width}x{height} at {left},{top}" in str(sample)


def test_mixing_ends_with_the_step_that_begins_the_last_epochs(trained):
    """21 samples an epoch and 8 a step: of 8 steps the last epoch has those from the sixth on."""
    run = recorded(trained[0])
    mixed = replace(run, config=replace(run.config, mix_prob=1.0))
    off = replace(run, config=replace(mixed.config, mixing_off_epochs=1))

    mixings = [next(load_step(off, step))[0].mix for step in range(run.num_steps)]

    assert [mix.share == 1 for mix in mixings] == [False] * 6 + [True] * 2
    assert mixings[5] == next(load_step(mixed, 5))[0].mix


def test_a_samples_steps_are_those_whose_batches_have_it(trained):
    """Of a sample, by key: all steps of the run, and no other; each at its place."""
    run = recorded(trained[0])
    found = []
    for step in range(run.num_steps):
        refs = run.order.global_batch(step)
        for place, (number, epoch) in enumerate(zip(refs.number.tolist(), refs.epoch.tolist())):
            micro, position = divmod(place, BATCH)
            if number in NUMBERS:
                found.append((number, epoch, step, micro, position, step < TRAINED))

    explained = [
        (number, v.epoch, v.step, v.micro_batch, v.position, v.is_done)
        for number in NUMBERS
        for v in wc.explain(str(trained[0]), key=f"{number:04d}").visits
    ]

    assert sorted(explained) == sorted(found)


def test_draws_and_mixing_are_named(trained):
    """As text and as JSON, of a checkpoint; what the JSON says is what was drawn."""
    path = str(trained[0] / "last.pt")

    shown = CliRunner().invoke(commands, ["explain", path, "--step", "2"]).output
    told = CliRunner().invoke(commands, ["explain", path, "--step", "2", "--json"]).output

    batches = json.loads(told)["batches"]
    assert f"Step 2 of 0 to 7, done: epoch {2 * 8 // 21}" in shown
    assert f"{path}, saved when 5 steps were done: 1 rank x 2 batches x 4 samples." in shown
    for (batch, _), said in zip(load_step(recorded(trained[0]), 2), batches, strict=True):
        assert said == json.loads(json.dumps(batch.to_json()))
        for position, sample in enumerate(said["samples"]):
            assert f"{sample['key']}  {sample['label']} {sample['class_name']}" in shown
            assert list(sample["color_factors"]) != [] and sample["image_size"] == [20, 24]
            assert sample["partner"] == (None if said["mixing"] == "none" else 3 - position)


def test_a_key_wins_over_a_number(tmp_path):
    """Keys of digits: 0003 is a key, 3 is a number; one that two samples have is refused."""
    members = [
        (f"{key}.{kind}", data)
        for key in ("7", "0003", "a b", "x/7")
        for kind, data in (("jpg", encode_image(1)), ("cls", b"0"))
    ]
    tars = [write_tar(tmp_path / f"t-{i}.tar", members[2 * i :]) for i in range(2)]
    dataset = wc.open_dataset(tars[0], use="training")

    assert [find_sample(dataset, key) for key in ("7", "0003", "3", "a b", "x/7")] == [
        0,
        1,
        3,
        2,
        3,
    ]
    with pytest.raises(UsageError, match="samples 1, 4 have it"):
        find_sample(wc.open_dataset(",".join(tars)), "0003")
    for key in ("4", "-1", "b", "", "\udc80"):
        with pytest.raises(UsageError, match="Give the key that stands in the shard"):
            find_sample(dataset, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither is given"),
        ({"step": 0, "key": "1"}, "both are given"),
        ({"key": "1", "sheet": "s.png"}, "--sheet s.png: it shows a step. Give --step."),
        ({"step": 8}, "--step 8: the run has steps 0 to 7, in 3 epochs."),
        ({"step": 0, "sheet": "no/s.png"}, "--sheet no/s.png: No such file"),
    ],
)
def test_questions_without_an_answer_are_refused(trained, options, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        wc.explain(str(trained[0]), ExplainConfig(**options))


def test_other_shards_are_refused(trained, tmp_path):
    """Their steps would be others; the same shards may lie elsewhere."""
    other = write_shards(tmp_path, [20, 1])

    with pytest.raises(UsageError, match="not the shards that .* was trained on"):
        wc.explain(str(trained[0]), step=0, shards=str(other))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        wc.explain(str(tmp_path), step=0)


def test_facts_that_are_not_there_are_named(trained, tmp_path):
    content = load_checkpoint(trained[0] / "last.pt")
    save_checkpoint(tmp_path / "x.pt", {"step": 1, "model": content["model"], "facts": {}})

    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        wc.explain(str(tmp_path / "x.pt"), step=0)
