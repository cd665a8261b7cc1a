"""An export gives what its run gives: by timm, ONNX, torch.export, and by eval and predict."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import timm
from conftest import encode_image, write_tar
from PIL import Image

import wds_convnext as wc
from wds_convnext.config import EvalConfig
from wds_convnext.errors import CheckpointError, UsageError, WdsConvnextError
from wds_convnext.report.card import command_of, escape
from wds_convnext.report.formats import crop_pct
from wds_convnext.training.compare import evaluate_checkpoint
from wds_convnext.training.stored import open_model

CPU = {"device": "cpu", "workers": 0, "quiet": True}


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """The report of an export in all formats, of a copy of the run."""
    folder = tmp_path_factory.mktemp("exported")
    run = shutil.copytree(trained_run, folder / "run")
    return wc.export(str(run), to=str(folder / "model"), onnx=True, pt2=True, **CPU)


def test_all_formats_agree_with_the_run(exported, shards):
    """On every image of the validation split; the accuracy is eval's."""
    assert [check.what for check in exported.checks] == ["timm", "torch.export", "onnxruntime"]
    num_samples = len(wc.open_dataset(str(shards / "validation.json")))
    for check in exported.checks:
        assert check.num_equal == check.num_samples == num_samples
        assert check.largest_difference < 1e-4


def test_eval_and_predict_take_the_folder(exported, trained_run, shards, tmp_path):
    """And say of it the same as of the run; it is the same model by its digest."""
    spec = str(shards / "validation.json")
    results, lines = [], []
    for number, model in enumerate((trained_run, exported.folder)):
        config = EvalConfig(checkpoint=str(model), shards=spec, device="cpu", workers=0)
        results.append(evaluate_checkpoint(config)[0])
        out = tmp_path / f"{number}.jsonl"
        wc.predict(str(model), [spec], out=str(out), **CPU)
        lines.append(out.read_text())

    assert results[0] == results[1] == exported.result
    assert lines[0] == lines[1]
    assert open_model(str(trained_run)).digest() == open_model(str(exported.folder)).digest()


def test_a_tagged_model_with_arguments_is_exported_with_them(shards, tmp_path):
    """And with the pixels of its own options."""
    wc.train(
        shards=str(shards / "train.json"),
        out=str(tmp_path / "run"),
        model="test_vit.r160_in1k",
        model_arg=["img_size=32", "num_heads=2", "global_pool=avg"],
        image_size=32,
        crop_mode="squash",
        interpolation="bicubic",
        mean="0.5,0.5,0.5",
        drop_path_rate=0.0,
        max_steps=0,
        device="cpu",
        workers=0,
    )

    done = wc.export(str(tmp_path / "run"), to=str(tmp_path / "model"), **CPU)

    assert [check.largest_difference < 1e-4 for check in done.checks] == [True]
    one, two = open_model(str(tmp_path / "run")), open_model(str(done.folder))
    assert one.digest() == two.digest()
    assert one.preprocessing == two.preprocessing
    assert two.preprocessing.crop_mode == "squash"


def test_timm_makes_the_same_pixels_and_names(exported):
    """Within 2 of 255, from its own transform of what config.json says."""
    model = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    data = encode_image(5, size=(61, 44), format="PNG")
    classifier = wc.load_classifier(exported.folder, device="cpu")

    theirs = timm.data.create_transform(**config)(Image.open(io.BytesIO(data)))

    pixels = classifier.preprocessing
    ours = pixels.eval_transform()(data).numpy()
    mean, std = (np.array(v)[:, None, None] for v in (pixels.mean, pixels.std))
    difference = np.abs(ours - (theirs.numpy() * std + mean) * 255)
    assert difference.max() <= 2.01
    assert tuple(model.pretrained_cfg["label_names"]) == classifier.class_names


@pytest.mark.parametrize("size", [32, 64, 100, 224, 255, 384])
@pytest.mark.parametrize("ratio", [0.5, 0.875, 0.9, 0.95, 1.0])
def test_timm_resizes_to_the_same_size(size, ratio):
    """timm rounds down where we round."""
    pixels = wc.Preprocessing(image_size=size, crop_ratio=ratio)

    assert int(np.floor(size / crop_pct(pixels))) == round(size / ratio)


def test_the_card_states_facts_and_no_paths(exported, trained_run):
    card = (exported.folder / "README.md").read_text()
    config = json.loads((exported.folder / "config.json").read_text())

    low, high = exported.result.top1_interval
    assert f"{exported.result.top1:.2%} (95 % interval {low:.2%} to {high:.2%})" in card
    assert "--model test_convnext" in card and "--image-size 32" in card
    for text in (card, json.dumps(config)):
        assert str(trained_run) not in text and "/tmp" not in text and str(os.getcwd()) not in text
    assert config["label_names"] == ["ant", "bee", "cat", "dog"]


def test_what_comes_from_data_is_text_in_the_card():
    hostile = "<script>x</script> [a](javascript:b) |`\n# c"

    assert escape(hostile) == (r"&lt;script&gt;x&lt;/script&gt; \[a\](javascript:b) \|\`\\n\# c")
    assert "```" not in command_of({"model": "a```b; rm"})
    assert "'a'" not in command_of({"model": "a"})


def test_a_folder_that_holds_something_is_not_replaced(exported, tmp_path):
    run = exported.folder.parent / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")

    with pytest.raises(UsageError, match="is there, and no export"):
        wc.export(str(run), to=str(tmp_path / "full"), overwrite=True, **CPU)
    with pytest.raises(UsageError, match="holds an export"):
        wc.export(str(run), to=str(exported.folder), **CPU)
    with pytest.raises(UsageError, match="--to is missing"):
        wc.export(str(run), **CPU)
    with pytest.raises(UsageError, match="is an export already"):
        wc.export(str(exported.folder), to=str(tmp_path / "new"), **CPU)

    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_an_export_is_replaced_whole(exported, tmp_path):
    shutil.copytree(exported.folder, tmp_path / "model")
    run = exported.folder.parent / "run"

    report = wc.export(str(run), to=str(tmp_path / "model"), overwrite=True, num_checked=3, **CPU)

    assert report.files == ("README.md", "config.json", "model.safetensors")
    assert sorted(os.listdir(tmp_path / "model")) == sorted(report.files)
    assert os.listdir(tmp_path) == ["model"]
    assert report.checks[0].num_samples == 3


def test_without_an_image_to_compare_on_nothing_is_exported(exported, tmp_path):
    members = [("1.jpg", b"no image"), ("1.cls", b"0"), ("2.jpg", b"none"), ("2.cls", b"3")]
    path = write_tar(tmp_path / "val.tar", members)

    with pytest.raises(WdsConvnextError, match="No sample of the split decodes"):
        run = str(exported.folder.parent / "run")
        wc.export(run, to=str(tmp_path / "model"), shards=path, **CPU)

    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["config", "weights", "names", "missing"])
def test_a_damaged_export_is_one_line(exported, tmp_path, damage):
    folder = shutil.copytree(exported.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if damage == "config":
        (folder / "config.json").write_text("[]")
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"none")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "config.json").write_text(json.dumps(config | {"label_names": ["a"]}))

    with pytest.raises(CheckpointError) as caught:
        wc.load_classifier(folder, device="cpu")

    assert len(str(caught.value).splitlines()) == 1
