"""Train image classifiers from WebDataset tar shards: exact order, flat memory, resumable.

The public names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wds_convnext.check.bench import bench
    from wds_convnext.check.doctor import doctor
    from wds_convnext.check.explain import explain
    from wds_convnext.check.index import index
    from wds_convnext.check.inspect import inspect
    from wds_convnext.check.verify import verify
    from wds_convnext.config import (
        BenchConfig,
        DoctorConfig,
        EvalConfig,
        ExplainConfig,
        ExportConfig,
        IndexConfig,
        InspectConfig,
        PredictConfig,
        ReportConfig,
        ShardsConfig,
        TrainConfig,
        VerifyConfig,
    )
    from wds_convnext.conversion import convert
    from wds_convnext.conversion.source import RowBatch, SourceSplit
    from wds_convnext.errors import WdsConvnextError
    from wds_convnext.report.classifier import Classifier, Guess, Prediction, load_classifier
    from wds_convnext.report.export import export
    from wds_convnext.report.predict import predict
    from wds_convnext.report.write import write_report
    from wds_convnext.shards.dataset import Dataset, Sample
    from wds_convnext.shards.opening import open_dataset
    from wds_convnext.stream.loader import make_loader
    from wds_convnext.stream.order import EvalOrder, TrainOrder
    from wds_convnext.stream.stream import Batch, ShardStream
    from wds_convnext.stream.transforms import EvalTransform, Preprocessing, TrainTransform
    from wds_convnext.training.adamp import AdamP
    from wds_convnext.training.evaluate import EvalResult, evaluate
    from wds_convnext.training.train import train

__version__ = "0.1.0"

_MODULES = {
    "check.bench": ["bench"],
    "check.doctor": ["doctor"],
    "check.explain": ["explain"],
    "check.index": ["index"],
    "check.inspect": ["inspect"],
    "check.verify": ["verify"],
    "config": [
        "BenchConfig",
        "DoctorConfig",
        "EvalConfig",
        "ExplainConfig",
        "ExportConfig",
        "IndexConfig",
        "InspectConfig",
        "PredictConfig",
        "ReportConfig",
        "ShardsConfig",
        "TrainConfig",
        "VerifyConfig",
    ],
    "conversion": ["convert"],
    "conversion.source": ["RowBatch", "SourceSplit"],
    "errors": ["WdsConvnextError"],
    "report.classifier": ["Classifier", "Guess", "Prediction", "load_classifier"],
    "report.export": ["export"],
    "report.predict": ["predict"],
    "report.write": ["write_report"],
    "shards.dataset": ["Dataset", "Sample"],
    "shards.opening": ["open_dataset"],
    "stream.order": ["EvalOrder", "TrainOrder"],
    "stream.loader": ["make_loader"],
    "stream.stream": ["Batch", "ShardStream"],
    "stream.transforms": ["EvalTransform", "Preprocessing", "TrainTransform"],
    "training.adamp": ["AdamP"],
    "training.evaluate": ["EvalResult", "evaluate"],
    "training.train": ["train"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
