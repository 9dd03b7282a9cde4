"""Typed configuration: what a YAML `engine:` section and `SageLLMConfig(...)` hold, validated on construction."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError, NotAvailableError


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

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every configuration object: unknown fields are errors, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


def _refuse(asked: bool, option: str, instead: str) -> None:
    if asked:
        raise NotAvailableError(f"{option} is not available yet; {instead}")


class ModelConfig(Config):
    """Which model, and its dimensions where no checkpoint gives them.

    `model_id` is a Hugging Face folder, a hub id (then `revision` may say which), `builtin:pydoc-tiny` or
    `builtin:null`. The five dimensions are needed only for an id that resolves to nothing: they build random weights,
    as `load_format: dummy` does for a checkpoint's dimensions; `seed` is that of random weights.
    """

    model_id: str = "builtin:pydoc-tiny"
    revision: str | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    hidden_size: Positive | None = None
    vocab_size: Positive | None = None
    max_seq_len: Positive | None = None
    dtype: Dtype = DType.AUTO
    seed: int = 0
    quantization: str | None = None
    quantization_config: dict[str, Any] | None = None
    sparsity_pattern: str | None = None
    sparsity_ratio: Ratio = 0.0

    @model_validator(mode="after")
    def _available(self) -> ModelConfig:
        _refuse(self.quantization is not None, "model.quantization", "leave it out to run the checkpoint's own dtype")
        _refuse(self.quantization_config is not None, "model.quantization_config", "leave it out")
        _refuse(self.sparsity_pattern is not None, "model.sparsity_pattern", "leave it out")
        _refuse(self.sparsity_ratio > 0, "model.sparsity_ratio", "leave it at 0")
        return self


class KVCacheConfig(Config):
    """The paged KV pool and its prefix tree. `max_tokens` bounds the pool; `block_size` is in tokens.

    `eviction` says which prefix is given up for room: the least recently used one, the least frequently used one, or
    the one that is cheapest to recompute for what it holds and how often it was used. A prefix that nobody used for
    `ttl_s` seconds is forgotten even if there is room; 0 is never. Neither holds for the prompts that requests with
    `pin` keep cached, together in at most the share `max_pinned_ratio` of the pool.

    `granularity` is the unit in which KV moves between workers (BLOCK and LAYER send a layer as soon as it is computed,
    TOKEN and HEAD all layers at the end of a step) and between tiers.

    With `enable_tiering`, what the pool gives up is kept in main memory (DDR), and what that gives up in files below
    `nvme_path` (NVME), which outlive the process. `max_tokens` is the pool's size, HBM; the other sizes are either
    `ddr_tokens` and `nvme_tokens`, or `hbm_ratio`, `ddr_ratio` and `nvme_ratio`, the tiers' shares of all, which add
    up to 1. Without DDR, what goes to files is buffered in main memory, at most 256 blocks. KV is brought
    up only where that is estimated to be faster than to compute it.

    DDR whose blocks are more than the share `demote_above` in no file has them written, the coldest first, until the
    share is `demote_to`. With `enable_migration` the pool's blocks go to DDR by the same marks, before they are given
    up, and while less than `promote_below` of the pool is used hot prefixes come up: those that prompts asked for
    `hot_threshold` times a second. After `cold_timeout_s` seconds without, a block is cold.
    """

    max_tokens: Positive = 65536
    block_size: Positive = 16
    granularity: Granularity = KVGranularity.BLOCK
    enable_tiering: bool = False
    hbm_ratio: Ratio = 1.0
    ddr_ratio: Ratio = 0.0
    nvme_ratio: Ratio = 0.0
    ddr_tokens: Positive | None = None
    nvme_tokens: Positive | None = None
    nvme_path: Path | None = None
    enable_prefix_caching: bool = True
    enable_cross_request_sharing: bool = True
    eviction: Eviction = KVEviction.LRU
    ttl_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_pinned_ratio: Ratio = 0.5
    enable_migration: bool = False
    demote_above: Ratio = 0.9
    demote_to: Ratio = 0.8
    promote_below: Ratio = 0.5
    hot_threshold: Annotated[float, Field(gt=0)] = 1.0
    cold_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _available(self) -> KVCacheConfig:
        if self.ttl_s and not (self.enable_prefix_caching and self.enable_cross_request_sharing):
            raise ValueError(f"ttl_s {self.ttl_s} is for prefixes, but none are cached: leave it out, or cache them")
        if self.max_tokens < self.block_size:
            raise ValueError(f"max_tokens {self.max_tokens} is less than one block of {self.block_size} tokens")
        return self

    @model_validator(mode="after")
    def _tiers(self) -> KVCacheConfig:
        ratios = (self.hbm_ratio, self.ddr_ratio, self.nvme_ratio)
        sizes = {"ddr_tokens": self.ddr_tokens, "nvme_tokens": self.nvme_tokens}
        if not self.enable_tiering:
            given = [name for name, size in sizes.items() if size] + ["nvme_path"] * (self.nvme_path is not None)
            given += ["hbm_ratio, ddr_ratio and nvme_ratio"] * (ratios != (1.0, 0.0, 0.0))
            if given:
                raise ValueError(f"{given[0]} is for enable_tiering: true: write that, or leave it out")
            return self
        if not (self.enable_prefix_caching and self.enable_cross_request_sharing):
            raise ValueError("enable_tiering keeps prefixes, but none are cached: leave it out, or cache them")
        if self.ttl_s:
            raise ValueError(f"ttl_s {self.ttl_s} forgets what enable_tiering keeps: leave one of them out")
        if ratios != (1.0, 0.0, 0.0):
            if any(sizes.values()):
                raise ValueError("found ratios and ddr_tokens or nvme_tokens: write sizes in one of these ways")
            if not self.hbm_ratio or abs(sum(ratios) - 1) > 1e-6:
                raise ValueError(f"hbm_ratio, ddr_ratio, nvme_ratio: found {ratios}, write shares that add up to 1")
        ddr, nvme = self.tier_tokens
        if not ddr and not nvme:
            raise ValueError("enable_tiering: say how large the tiers are, ddr_tokens: 262144 for example")
        for name, tokens in (("ddr", ddr), ("nvme", nvme)):
            if 0 < tokens < self.block_size:
                raise ValueError(f"{name}: {tokens} tokens are less than one block of {self.block_size}")
        if bool(nvme) != (self.nvme_path is not None):
            raise ValueError("nvme_path and nvme_tokens (or nvme_ratio) go together: give both, or neither")
        return self

    @model_validator(mode="after")
    def _migration(self) -> KVCacheConfig:
        for switch, names in (
            ("enable_migration", ("hot_threshold", "cold_timeout_s", "promote_below")),
            ("enable_tiering", ("enable_migration", "demote_above", "demote_to")),
        ):
            for name in names:
                if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, switch):
                    raise ValueError(f"{name} is for {switch}: true: write that, or leave it out")
        if self.enable_migration and not self.tier_tokens[0]:
            raise ValueError("enable_migration moves blocks between the pool and DDR: give ddr_tokens, or leave it out")
        if not self.promote_below <= self.demote_to <= self.demote_above:
            found = f"promote_below {self.promote_below}, demote_to {self.demote_to}, demote_above {self.demote_above}"
            raise ValueError(f"found {found}: write them in ascending order")
        return self

    @property
    def watermarks(self) -> tuple[float, float, float]:
        """Shares at which blocks begin to move down, stop to, and stop to move up."""
        return self.demote_above, self.demote_to, self.promote_below

    @property
    def tier_tokens(self) -> tuple[int, int]:
        """How many tokens DDR and NVME hold; 0 is no such tier."""
        if not self.enable_tiering:
            return 0, 0
        if self.ddr_tokens or self.nvme_tokens:
            return self.ddr_tokens or 0, self.nvme_tokens or 0
        whole = self.max_tokens / self.hbm_ratio
        return round(whole * self.ddr_ratio), round(whole * self.nvme_ratio)


class SchedulerConfig(Config):
    """What may run at once, and how long a request may wait. Batch sizes are in sequences, budgets in tokens.

    `max_batch_size` bounds the sequences that hold a lease, `max_decode_batch` those that get a token in one step,
    `max_prefill_batch` those whose prompt is computed in one step (in a pipeline, `max_batch` of the stage `decode` or
    `prefill` comes before them); `max_step_tokens` bounds the tokens of one step and so the size of a prompt chunk
    (None: 4096 on a GPU, 512 on a CPU and more there for a small model).
    `mode` `hybrid` mixes decoding rows and prompt chunks in one step; `time_share` takes turns: `prefill_steps` steps
    of prompts (by default 1), then `decode_steps` of decoding rows (4). `strict` computes prompts on `prefill_workers`
    and decodes on `decode_workers`, each with a KV pool and `max_batch_size` slots of its own; KV that is not handed
    over within `transfer_timeout_s` (0 is no limit), or cannot be, is computed again by the decode worker, or the
    request fails, as `on_transfer_failure` says.
    `launch_ahead` plans and launches a step before the previous one's tokens are read.
    `tpot_slo_ms` is the longest that a step with decoding rows is to take: it gets the most prompt, in whole KV blocks,
    with which that holds by an estimate that follows the measured steps (`time_share`: the mean over a turn; without
    decoding rows, `max_step_tokens`). Where no block fits, one step in four takes one all the same.
    `preemption` says what becomes of the KV of a sequence that gives way when blocks run out: `recompute` drops it,
    `swap` keeps it in DDR until its turn comes again.

    `isolation` `process` runs the model of each worker in a process of its own: if it dies, or a step takes more than
    `step_timeout_s` (None: 120; 0: any time), another one is started and computes again what was under way.

    `queue_timeout_s` is the longest wait for a lease, `first_token_timeout_s` the longest time from arrival to the
    first token, `request_timeout_s` to the last; 0 is no limit. They hold for requests that somebody waits for (library
    calls, sockets), and each is a finish reason of its own. Lines of a file wait as long as it takes.

    `policy` orders what waits. `tenant_weights`, for FAIR_SHARE, are the tenants' shares, 1 where none is given. There
    who holds less than its share of `max_batch_size` gets a lease even if others hold them all, so up to twice as many
    may; no step decodes more than `max_batch_size`.
    `max_overtakes`, for LONGEST_PREFIX and SHORTEST_JOB, is by how many later ones a sequence may be overtaken at most
    (None: 64).
    """

    mode: Mode = SchedulerMode.HYBRID
    policy: Policy = SchedulerPolicy.FCFS
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    max_overtakes: Positive | None = None
    prefill_workers: Positive = 1
    decode_workers: Positive = 1
    preemption: Literal["recompute", "swap"] = "recompute"
    isolation: Isolated = Isolation.THREAD
    step_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_batch_size: Positive = 64
    max_prefill_batch: Positive = 8
    max_decode_batch: Positive = 64
    max_step_tokens: Positive | None = None
    prefill_steps: Positive | None = None
    decode_steps: Positive | None = None
    on_transfer_failure: Literal["recompute", "fail"] = "recompute"
    transfer_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    launch_ahead: bool = True
    tpot_slo_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    request_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    queue_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    first_token_timeout_s: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _available(self) -> SchedulerConfig:
        if self.mode is not SchedulerMode.TIME_SHARE and (self.prefill_steps or self.decode_steps):
            raise ValueError("prefill_steps and decode_steps are for mode: time_share: write that, or leave them out")
        if self.mode is not SchedulerMode.STRICT:
            for name in ("prefill_workers", "decode_workers", "transfer_timeout_s"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for mode: strict: write that, or leave it out")
        return self

    @model_validator(mode="after")
    def _heeded(self) -> SchedulerConfig:
        if self.step_timeout_s is not None and self.isolation is Isolation.THREAD:
            raise ValueError("step_timeout_s is for isolation: process: a thread that hangs cannot be ended")
        policy = self.policy
        if self.tenant_weights and policy is not SchedulerPolicy.FAIR_SHARE:
            raise ValueError(f"policy {policy.name} ignores tenant_weights: leave them out, or write policy FAIR_SHARE")
        bounded = (SchedulerPolicy.LONGEST_PREFIX, SchedulerPolicy.SHORTEST_JOB)
        if self.max_overtakes is not None and policy not in bounded:
            instead = "leave it out, or write policy LONGEST_PREFIX or SHORTEST_JOB"
            raise ValueError(f"policy {policy.name} ignores max_overtakes: {instead}")
        return self

    @property
    def num_workers(self) -> int:
        """Step loops, each with a KV pool of its own."""
        return self.prefill_workers + self.decode_workers if self.mode is SchedulerMode.STRICT else 1

    @property
    def num_slots(self) -> int:
        """Sequences that may hold a lease on one worker."""
        return self.max_batch_size * (2 if self.policy is SchedulerPolicy.FAIR_SHARE else 1)

    @property
    def time_shares(self) -> tuple[int, int] | None:
        """Steps of prompts and of decoding rows that take turns; None where they share each step."""
        if self.mode is not SchedulerMode.TIME_SHARE:
            return None
        return self.prefill_steps or 1, self.decode_steps or 4


class BackendConfig(Config):
    """The device. `backend_type` None detects one: CUDA where there is one, else CPU.

    `device_ids` says which CUDA device, or, one for each worker of scheduler.mode strict, which; `threads` how many
    of the CPU's threads; 0 is every core.
    """

    backend_type: Backend = None
    device_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    threads: Annotated[int, Field(ge=0)] = 0
    cpu_kernels: Literal["auto", "torch"] = "auto"
    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1

    @model_validator(mode="after")
    def _available(self) -> BackendConfig:
        _refuse(self.tensor_parallel_size > 1, "backend.tensor_parallel_size > 1", "use 1")
        _refuse(self.pipeline_parallel_size > 1, "backend.pipeline_parallel_size > 1", "use 1")
        return self


class BenchmarkConfig(Config):
    """What is measured. Gates turn a run into a failure: throughput in output tokens/s, latencies in ms (mean)."""

    enable_profiling: bool = False
    enable_metrics: bool = True
    enable_gates: bool = False
    min_throughput_tps: Annotated[float, Field(ge=0)] | None = None
    max_ttft_ms: Annotated[float, Field(ge=0)] | None = None
    max_tpot_ms: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _available(self) -> BenchmarkConfig:
        _refuse(self.enable_profiling, "benchmark.enable_profiling", "leave it false")
        gates = (self.min_throughput_tps, self.max_ttft_ms, self.max_tpot_ms)
        if not self.enable_gates and any(gate is not None for gate in gates):
            raise ValueError("a gate is set but enable_gates is false: set enable_gates: true, or leave the gate out")
        if self.enable_gates and not self.enable_metrics:
            raise ValueError("enable_gates needs enable_metrics: true")
        return self


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
            _refuse(strict, f"inference_mode {mode.name} with scheduler.mode strict", "use mode hybrid")
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
