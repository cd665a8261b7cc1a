"""Predictions as text, CSV, JSON lines or parquet, written as they come."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wds_convnext.errors import UsageError, printable
from wds_convnext.files import replacing, unwritable
from wds_convnext.progress import say
from wds_convnext.report.classifier import Prediction

Write = Callable[[Sequence[Prediction]], None]

_NAME_WIDTH = 48


def write_table(predictions: Sequence[Prediction]) -> None:
    """Print a line for each image: its name, then probability and class, the likeliest first."""
    names = [printable(prediction.image, limit=200) for prediction in predictions]
    width = min(_NAME_WIDTH, max(map(len, names), default=0))
    for name, prediction in zip(names, predictions):
        guesses = [f"{g.probability:7.2%} {printable(g.class_name)}" for g in prediction.guesses]
        if prediction.error is not None:
            guesses = [f"not read: {prediction.error}"]
        say(f"{name:{width}}  " + "  ".join(guesses))


def write_json_lines(predictions: Sequence[Prediction]) -> None:
    """Print a JSON object for each image."""
    for prediction in predictions:
        say(json.dumps(prediction.to_json()), wrap=False)


@contextmanager
def writing(path: str, *, top: int) -> Iterator[Write]:
    """A function that writes predictions to a file, which is there when the context ends.

    Args:
        path: its ending says the format: .csv, .jsonl or .parquet.
        top: classes per image.
    Raises:
        UsageError: if the ending is another, or the file cannot be written.
    """
    write_to = FORMATS[check_suffix(path)]
    try:
        with replacing(path) as file, write_to(file, top) as write:
            yield write
    except OSError as error:
        raise UsageError(f"--out {unwritable(path, error)}") from None


def check_suffix(path: str) -> str:
    """The ending of a file for predictions.

    Raises:
        UsageError: if there is no format of it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"--out {path}: expected a file that ends in {', '.join(FORMATS)}.")
    return suffix


@contextmanager
def _csv(file: BinaryIO, top: int) -> Iterator[Write]:
    # Names of files may be bytes that are no text: they are written as they are.
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    writer = csv.writer(text)
    ranks = range(1, top + 1)
    columns = [f"{what}_{rank}" for rank in ranks for what in ("class", "probability")]
    writer.writerow(["image", "label", *columns, "error"])

    def write(predictions: Sequence[Prediction]) -> None:
        for prediction in predictions:
            cells = [cell for g in prediction.guesses for cell in (g.class_name, g.probability)]
            cells += [""] * (len(columns) - len(cells))
            writer.writerow(
                [prediction.image, prediction.label or "", *cells, prediction.error or ""]
            )

    yield write
    text.detach()  # flushes; the file is the caller's


@contextmanager
def _jsonl(file: BinaryIO, top: int) -> Iterator[Write]:
    def write(predictions: Sequence[Prediction]) -> None:
        lines = (json.dumps(prediction.to_json()).encode() + b"\n" for prediction in predictions)
        file.writelines(lines)

    yield write


@contextmanager
def _parquet(file: BinaryIO, top: int) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("image", pa.string()),
            ("label", pa.string()),
            ("classes", pa.list_(pa.string())),
            ("numbers", pa.list_(pa.int32())),
            ("probabilities", pa.list_(pa.float32())),
            ("error", pa.string()),
        ]
    )
    rows: list[Prediction] = []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            columns = {
                "image": [_utf8(p.image) for p in rows],
                "label": [p.label for p in rows],
                "classes": [[g.class_name for g in p.guesses] for p in rows],
                "numbers": [[g.number for g in p.guesses] for p in rows],
                "probabilities": [[g.probability for g in p.guesses] for p in rows],
                "error": [p.error for p in rows],
            }
            writer.write_table(pa.table(columns, schema=schema))
            rows.clear()

        def write(predictions: Sequence[Prediction]) -> None:
            rows.extend(predictions)
            if len(rows) >= _ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()


_ROW_GROUP = 10_000


def _utf8(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


FORMATS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
