"""The whole: what a pipeline writes under `engine:`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from ..errors import ConfigError, NotAvailableError
from .backend import BackendConfig
from .base import Config, refuse
from .benchmark import BenchmarkConfig
from .choices import Inference, InferenceMode, KVGranularity, SchedulerMode, SchedulerPolicy
from .kv_cache import KVCacheConfig
from .model import ModelConfig
from .scheduler import SchedulerConfig


class SageLLMConfig(Config):
    """Everything an engine needs; the same object a pipeline's `engine:` section becomes.

    With `inference_mode` PREFILL_ONLY each output ends with its first token; where there is a `kv_cache.nvme_path` the
    prompt's KV, its whole blocks, is written there before that token is given out. DECODE_ONLY fetches it from there,
    and what is missing is computed, or fails the request, as `scheduler.on_transfer_failure` says.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    kv_cache: KVCacheConfig = Field(default_factory=KVCacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    backend: BackendConfig = Field(default_factory=BackendConfig)
    benchmark: BenchmarkConfig = Field(default_factory=BenchmarkConfig)
    inference_mode: Inference = InferenceMode.STANDARD

    @model_validator(mode="after")
    def _available(self) -> SageLLMConfig:
        mode = self.inference_mode
        if mode is not InferenceMode.STANDARD:
            strict = self.scheduler.mode is SchedulerMode.STRICT
            refuse(strict, f"inference_mode {mode.name} with scheduler.mode strict", "use mode hybrid")
        if mode is InferenceMode.DECODE_ONLY and self.kv_cache.nvme_path is None:
            raise ValueError("inference_mode DECODE_ONLY imports KV from files: give enable_tiering, nvme_path")
        if self.scheduler.mode is not SchedulerMode.STRICT:
            for moved, option in (
                (
                    self.kv_cache.granularity is not KVGranularity.BLOCK and not self.kv_cache.enable_tiering,
                    "kv_cache.granularity",
                ),
                (
                    self.scheduler.on_transfer_failure == "fail"
                    and (mode is InferenceMode.STANDARD or self.kv_cache.nvme_path is None),
                    "scheduler.on_transfer_failure",
                ),
            ):
                if moved:
                    raise ValueError(f"{option} is for KV that moves between workers: write scheduler.mode: strict")
        if len(self.backend.device_ids) not in (1, self.scheduler.num_workers):
            wanted = f"one, or {self.scheduler.num_workers}, one for each worker, those for prefill first"
            raise ValueError(f"backend.device_ids: found {self.backend.device_ids}, give {wanted}")
        if self.scheduler.preemption == "swap" and not self.kv_cache.tier_tokens[0]:
            raise ValueError("scheduler.preemption swap keeps KV in DDR: give kv_cache.enable_tiering, ddr_tokens")
        caches = self.kv_cache.enable_prefix_caching and self.kv_cache.enable_cross_request_sharing
        if self.scheduler.policy is SchedulerPolicy.LONGEST_PREFIX and not caches:
            raise ValueError(
                "scheduler.policy LONGEST_PREFIX needs prefixes to be cached: leave kv_cache.enable_prefix_caching and "
                "enable_cross_request_sharing true, or write another policy"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> SageLLMConfig:
        """Read a YAML file that holds the sections `model`, `kv_cache`, ...; a pipeline's `engine:` key works too.

        Raises:
            ConfigError: the file cannot be read, is not YAML, or holds unknown or mistyped fields.
            NotAvailableError: it asks for something this version cannot serve.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        where = str(path)
        if isinstance(data, dict) and "engine" in data:
            data, where = data["engine"], f"{path}: engine"
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: found {type(data).__name__}, write a mapping with `model:`, `kv_cache:`, ...")
        try:
            return cls.model_validate({name: section for name, section in data.items() if section is not None})
        except NotAvailableError as error:
            raise NotAvailableError(f"{where}: {error}") from error
        except ValidationError as error:
            lines = [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ConfigError("\n".join(lines)) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, enums by their YAML names: `SageLLMConfig(**config.to_dict()) == config`."""
        return self.model_dump(mode="json")
