"""Commands that use a trained model: predict, report and export."""

import sys
from typing import Any

import click

from wds_convnext.config import ExportConfig, PredictConfig, ReportConfig
from wds_convnext.options import GroupedCommand, add_options
from wds_convnext.progress import say, warn


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext predict runs/big cat.jpg holiday/ album.zip
wds-convnext predict runs/big data/test.json --out predictions.parquet
wds-convnext predict runs/big - --out predictions.csv < list.txt
""",
)
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@add_options(PredictConfig)
def predict(model: str, images: tuple[str, ...], **options: Any) -> None:
    """Say what images show, with eval's pixels and weights.

    MODEL is a run's folder (its best checkpoint), a checkpoint or an exported folder. IMAGES are
    files, folders, zips, shards, or - for a list of files on stdin, ended by line ends or NULs.

    Exit codes: 0 every image was read; 1 some could not be read and are listed, the others were
    predicted; 2 usage or data error, explained in one line.
    """
    config = PredictConfig(**options)
    from wds_convnext.training.runs import best_checkpoint

    named = str(best_checkpoint(model))  # looked for before torch is imported, which takes seconds
    from wds_convnext.report.predict import predict as predict_images

    report = predict_images(named, images, config)
    if report.num_bad or config.out is not None:
        (say if config.out is not None else warn)(str(report))
    sys.exit(1 if report.num_bad else 0)


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext export runs/big --to exported
wds-convnext export runs/big --to exported --onnx --pt2 --shards data/test.json
""",
)
@click.argument("run")
@add_options(ExportConfig)
def export(run: str, **options: Any) -> None:
    """Write a model as files for others, after comparing them.

    RUN is a run's folder (its best checkpoint) or a checkpoint. The folder has model.safetensors
    and config.json as on the Hugging Face Hub, and a model card, README.md.
    """
    config = ExportConfig(**options)
    config.require_target()
    from wds_convnext.training.runs import best_checkpoint

    named = str(best_checkpoint(run))  # looked for before torch is imported, which takes seconds
    from wds_convnext.report.export import export as export_model

    say(str(export_model(named, config)))


@click.command(
    cls=GroupedCommand,
    examples="""
wds-convnext report runs/big
wds-convnext report runs/big --shards data/test.json --out test-report
wds-convnext report runs/small runs/big
""",
)
@click.argument("run")
@click.argument("other", required=False)
@add_options(ReportConfig)
def report(run: str, other: str | None, **options: Any) -> None:
    """Show what a model gets right and wrong, as a page.

    RUN is a run's folder (its best checkpoint), a checkpoint or an exported folder. With OTHER, the
    page compares the two on the same samples: McNemar's test, and the images that changed.
    Predictions are kept in the runs' folders, so that nothing is computed twice.
    """
    config = ReportConfig(**options)
    from wds_convnext.training.runs import best_checkpoint

    # Looked for before torch is imported, which takes seconds.
    named = str(best_checkpoint(run))
    other = other and str(best_checkpoint(other))
    from wds_convnext.report.write import write_report

    say(str(write_report(named, other, config)))
