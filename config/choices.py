"""The values that a field may be chosen from; YAML writes them in any case."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator


class KVGranularity(StrEnum):
    """The unit in which KV is addressed and moved."""

    BLOCK = "block"
    TOKEN = "token"
    LAYER = "layer"
    HEAD = "head"


class KVEviction(StrEnum):
    """Which cached prefix is given up first: least recently, least frequently used, or cheapest to recompute."""

    LRU = "lru"
    LFU = "lfu"
    COST = "cost"


class SchedulerMode(StrEnum):
    """How prefill and decode share workers."""

    HYBRID = "hybrid"
    TIME_SHARE = "time_share"
    STRICT = "strict"


class SchedulerPolicy(StrEnum):
    """Whose turn it is to run, and who gives way when KV blocks run out."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    FAIR_SHARE = "fair_share"
    LONGEST_PREFIX = "longest_prefix"
    DEADLINE = "deadline"
    SHORTEST_JOB = "shortest_job"


class Isolation(StrEnum):
    """Where a worker's model runs: on a thread of this process, or in a process of its own."""

    THREAD = "thread"
    PROCESS = "process"


class InferenceMode(StrEnum):
    """Which part of inference this engine does."""

    STANDARD = "standard"
    PREFILL_ONLY = "prefill_only"
    DECODE_ONLY = "decode_only"


class DType(StrEnum):
    """Element type of the weights; `auto` is what the checkpoint says."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class BackendType(StrEnum):
    """A kind of device."""

    CPU = "cpu"
    CUDA = "cuda"


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Granularity = Annotated[KVGranularity, BeforeValidator(_lower)]
Eviction = Annotated[KVEviction, BeforeValidator(_lower)]
Mode = Annotated[SchedulerMode, BeforeValidator(_lower)]
Policy = Annotated[SchedulerPolicy, BeforeValidator(_lower)]
Inference = Annotated[InferenceMode, BeforeValidator(_lower)]
Isolated = Annotated[Isolation, BeforeValidator(_lower)]
Dtype = Annotated[DType, BeforeValidator(_lower)]
Backend = Annotated[BackendType | None, BeforeValidator(_lower)]
