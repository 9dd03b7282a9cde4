"""The whole: what a pipeline writes under `engine:`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ..errors import ConfigError
from .backend import BackendConfig
from .base import Config
from .benchmark import BenchmarkConfig
from .choices import Inference, InferenceMode, KVGranularity, SchedulerMode, SchedulerPolicy
from .kv_cache import KVCacheConfig
from .model import ModelConfig
from .problems import Contradiction, not_available, to_config_error
from .scheduler import SchedulerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


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

    def contradictions(self) -> Iterator[Contradiction]:
        mode, kv_cache, scheduler = self.inference_mode, self.kv_cache, self.scheduler
        strict = scheduler.mode is SchedulerMode.STRICT
        if strict and mode is not InferenceMode.STANDARD:
            option = f"inference_mode {mode} with scheduler.mode strict"
            yield not_available("inference_mode", option, "use scheduler.mode hybrid")
        if mode is InferenceMode.DECODE_ONLY and kv_cache.nvme_path is None:
            text = "inference_mode decode_only imports KV from files: give kv_cache.enable_tiering, nvme_path and "
            yield Contradiction(f"{text}nvme_tokens", ("inference_mode",))
        moves = mode is not InferenceMode.STANDARD and kv_cache.nvme_path is not None
        for option, asked in (
            ("kv_cache.granularity", kv_cache.granularity is not KVGranularity.BLOCK and not kv_cache.enable_tiering),
            ("scheduler.on_transfer_failure", scheduler.on_transfer_failure == "fail" and not moves),
        ):
            if asked and not strict:
                text = f"{option} is for KV that moves between workers: write scheduler.mode: strict"
                yield Contradiction(f"{text}, or leave it out", (option, "scheduler.mode"))
        devices, workers = self.backend.device_ids, scheduler.num_workers
        if len(devices) not in (1, workers):
            wanted = f"one, or {workers}: one for each worker, those for prefill first" if workers > 1 else "one"
            against = ("scheduler.prefill_workers", "scheduler.decode_workers", "scheduler.mode")
            text = f"backend.device_ids: found {devices}, give {wanted}"
            yield Contradiction(text, ("backend.device_ids", *against))
        if scheduler.preemption == "swap" and not kv_cache.tier_tokens[0]:
            text = "scheduler.preemption swap keeps KV in DDR: give kv_cache.enable_tiering and ddr_tokens"
            yield Contradiction(text, ("scheduler.preemption",))
        if scheduler.policy is SchedulerPolicy.LONGEST_PREFIX and not kv_cache.caches_prefixes:
            text = "scheduler.policy longest_prefix needs prefixes to be cached: leave kv_cache.enable_prefix_caching "
            keys = ("scheduler.policy", "kv_cache.enable_prefix_caching", "kv_cache.enable_cross_request_sharing")
            yield Contradiction(text + "and enable_cross_request_sharing true, or write another policy", keys)

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
        except ValidationError as error:
            explained = to_config_error(cls, error, "engine")
            raise type(explained)("\n".join(f"{where}: {line}" for line in str(explained).splitlines())) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, enums by their YAML names: `SageLLMConfig(**config.to_dict()) == config`."""
        return self.model_dump(mode="json")
