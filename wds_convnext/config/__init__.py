"""One frozen dataclass per command; `options` derives click's options from its fields."""

from wds_convnext.config.data import (
    BenchConfig,
    CacheConfig,
    IndexConfig,
    InspectConfig,
    ShardsConfig,
    VerifyConfig,
)
from wds_convnext.config.fields import ByteSize, Config, option
from wds_convnext.config.groups.optimization import REFERENCE_BATCH_SIZE, REFERENCE_LR
from wds_convnext.config.models import ExportConfig, PredictConfig, ReportConfig
from wds_convnext.config.runs import EvalConfig, ExplainConfig
from wds_convnext.config.training import (
    DEFAULT_MODEL,
    WARMUP_EPOCHS,
    DoctorConfig,
    TrainConfig,
    local_source,
)

__all__ = [
    "DEFAULT_MODEL",
    "REFERENCE_BATCH_SIZE",
    "REFERENCE_LR",
    "BenchConfig",
    "ByteSize",
    "CacheConfig",
    "Config",
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
    "WARMUP_EPOCHS",
    "VerifyConfig",
    "local_source",
    "option",
]
