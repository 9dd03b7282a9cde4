"""Typed configuration: what a YAML `engine:` section and `SageLLMConfig(...)` hold, validated on construction."""

from .backend import BackendConfig
from .base import Config
from .benchmark import BenchmarkConfig
from .choices import (
    BackendType,
    DType,
    InferenceMode,
    Isolation,
    KVEviction,
    KVGranularity,
    SchedulerMode,
    SchedulerPolicy,
)
from .engine import SageLLMConfig
from .kv_cache import KVCacheConfig
from .model import ModelConfig
from .scheduler import SchedulerConfig

__all__ = [
    "BackendConfig",
    "BackendType",
    "BenchmarkConfig",
    "Config",
    "DType",
    "InferenceMode",
    "Isolation",
    "KVCacheConfig",
    "KVEviction",
    "KVGranularity",
    "ModelConfig",
    "SageLLMConfig",
    "SchedulerConfig",
    "SchedulerMode",
    "SchedulerPolicy",
]
