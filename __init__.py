"""sageLLM: LLM inference as a dataflow. Names are imported on first use, so that `import sageLLM` costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        BackendConfig,
        BenchmarkConfig,
        InferenceMode,
        KVCacheConfig,
        KVGranularity,
        ModelConfig,
        SageLLMConfig,
        SchedulerConfig,
        SchedulerMode,
        SchedulerPolicy,
    )
    from .engine import SageLLMEngine
    from .errors import SageLLMError
    from .generation import GenerateOutput, GenerateRequest

_HOMES = {
    "BackendConfig": ".config",
    "BenchmarkConfig": ".config",
    "GenerateOutput": ".generation",
    "GenerateRequest": ".generation",
    "InferenceMode": ".config",
    "KVCacheConfig": ".config",
    "KVGranularity": ".config",
    "ModelConfig": ".config",
    "SageLLMConfig": ".config",
    "SageLLMEngine": ".engine",
    "SageLLMError": ".errors",
    "SchedulerConfig": ".config",
    "SchedulerMode": ".config",
    "SchedulerPolicy": ".config",
}
_SUBMODULES = ("accel", "backends", "benchmarks", "graph", "kv_runtime", "models", "operators", "runtime")

__version__ = "0.1.0"
__all__ = [
    "BackendConfig",
    "BenchmarkConfig",
    "GenerateOutput",
    "GenerateRequest",
    "InferenceMode",
    "KVCacheConfig",
    "KVGranularity",
    "ModelConfig",
    "SageLLMConfig",
    "SageLLMEngine",
    "SageLLMError",
    "SchedulerConfig",
    "SchedulerMode",
    "SchedulerPolicy",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
