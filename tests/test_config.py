"""Configuration: names and defaults that users may rely on, YAML in and out, a clear no to what is not there yet."""



from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from sageLLM import (
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
from sageLLM.config import BackendType, DType, KVEviction
from sageLLM.errors import ConfigError, NotAvailableError

DEFAULTS = {
    ModelConfig: {
        "model_id": "builtin:pydoc-tiny", "num_layers": None, "num_heads": None, "hidden_size": None,
        "vocab_size": None, "max_seq_len": None, "dtype": DType.AUTO, "quantization": None,
        "quantization_config": None, "sparsity_pattern": None, "sparsity_ratio": 0.0, "load_format": "auto",
    },
    KVCacheConfig: {
        "max_tokens": 65536, "block_size": 16, "granularity": KVGranularity.BLOCK, "enable_tiering": False,
        "hbm_ratio": 1.0, "ddr_ratio": 0.0, "nvme_ratio": 0.0, "nvme_path": None, "enable_prefix_caching": True,
        "enable_cross_request_sharing": True, "enable_migration": False, "hot_threshold": 1.0, "cold_timeout_s": 60.0,
        "eviction": KVEviction.LRU, "ttl_s": 0.0,
    },
    SchedulerConfig: {
        "mode": SchedulerMode.HYBRID, "prefill_workers": 1, "decode_workers": 1, "max_batch_size": 64,
        "max_prefill_batch": 8, "max_decode_batch": 64, "request_timeout_s": 60, "queue_timeout_s": 30,
        "first_token_timeout_s": 0,
    },
    BackendConfig: {
        "backend_type": None, "device_ids": [0], "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
    },
    BenchmarkConfig: {
        "enable_profiling": False, "enable_metrics": True, "enable_gates": False, "min_throughput_tps": None,
        "max_ttft_ms": None, "max_tpot_ms": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("cls", DEFAULTS)
def test_the_fields_and_their_defaults(cls):
    config = cls()
    assert {name: getattr(config, name) for name in DEFAULTS[cls]} == DEFAULTS[cls]


def test_the_whole():
    config = SageLLMConfig()
    assert list(SageLLMConfig.model_fields) == [
        "model", "kv_cache", "scheduler", "backend", "benchmark", "inference_mode",
    ]  # fmt: skip
    assert [type(getattr(config, name)) for name in list(SageLLMConfig.model_fields)[:5]] == list(DEFAULTS)
    assert config.inference_mode is InferenceMode.STANDARD


@pytest.mark.parametrize("write", [str.lower, str.upper, str.title])
def test_yaml_writes_enums_in_any_case(tmp_path, write):
    path = tmp_path / "engine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "inference_mode": write("standard"),
                "model": {"dtype": write("bfloat16")},
                "kv_cache": {"granularity": write("block"), "eviction": write("cost")},
                "scheduler": {"mode": write("hybrid")},
                "backend": {"backend_type": write("cpu")},
            }
        )
    )
    config = SageLLMConfig.from_yaml(path)
    assert config.inference_mode is InferenceMode.STANDARD
    assert config.model.dtype is DType.BFLOAT16
    assert config.kv_cache.granularity is KVGranularity.BLOCK
    assert config.kv_cache.eviction is KVEviction.COST
    assert config.scheduler.mode is SchedulerMode.HYBRID
    assert config.backend.backend_type is BackendType.CPU


TIERING = {"enable_tiering": True}


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (TIERING, "say how large the tiers are, ddr_tokens: 262144 for example"),
        ({"ddr_tokens": 4096}, "ddr_tokens is for enable_tiering: true"),
        ({"nvme_path": "/kv"}, "nvme_path is for enable_tiering: true"),
        ({"hbm_ratio": 0.5, "ddr_ratio": 0.5}, "hbm_ratio is for enable_tiering: true.*\n.*ddr_ratio is for enable"),
        ({**TIERING, "ddr_tokens": 4}, "ddr_tokens: 4 tokens are less than one block: write at least block_size, 16"),
        ({**TIERING, "nvme_tokens": 4096}, "nvme_tokens goes together with nvme_path, which is not given"),
        ({**TIERING, "ddr_tokens": 4096, "nvme_path": "/kv"}, "nvme_path goes together with nvme_tokens, which is not"),
        (
            {**TIERING, "ddr_tokens": 4096, "hbm_ratio": 0.5, "ddr_ratio": 0.5},
            "found hbm_ratio and ddr_tokens: write .* not both",
        ),
        (
            {**TIERING, "hbm_ratio": 0.5, "ddr_ratio": 0.2},
            "hbm_ratio 0.5, ddr_ratio 0.2, nvme_ratio 0: write shares that",
        ),
        ({**TIERING, "hbm_ratio": 0, "ddr_ratio": 1}, "write shares that add up to 1"),
        ({"enable_migration": True}, "enable_migration is for enable_tiering: true"),
        ({"demote_to": 0.7}, "demote_to is for enable_tiering: true"),
        ({**TIERING, "ddr_tokens": 4096, "hot_threshold": 2.0}, "hot_threshold is for enable_migration: true"),
        ({**TIERING, "ddr_tokens": 4096, "cold_timeout_s": 5}, "cold_timeout_s is for enable_migration: true"),
        ({**TIERING, "ddr_tokens": 4096, "demote_to": 0.95}, "write them in ascending order"),
        ({**TIERING, "nvme_tokens": 4096, "nvme_path": "/kv", "enable_migration": True}, "the pool and DDR: give ddr"),
        ({**TIERING, "ddr_tokens": 4096, "ttl_s": 60}, "ttl_s 60 forgets what enable_tiering keeps"),
        (
            {**TIERING, "ddr_tokens": 4096, "enable_prefix_caching": False},
            "enable_tiering is for cached prefixes, but enab",
        ),
        (
            {"eviction": "lfu", "enable_prefix_caching": False},
            "eviction is for cached prefixes, but enable_prefix_caching",
        ),
        (
            {"max_pinned_ratio": 0.1, "enable_cross_request_sharing": False},
            "max_pinned_ratio is for cached prefixes, but",
        ),
    ],
)
def test_tiers_that_cannot_be(asked, problem):
    with pytest.raises(ConfigError, match=f"^KVCacheConfig: .*{problem}"):
        KVCacheConfig(**asked)


def test_decode_only_needs_files(tmp_path):
    with pytest.raises(ConfigError, match="decode_only imports KV from files: give"):
        SageLLMConfig(inference_mode="DECODE_ONLY")
    files = {**TIERING, "nvme_tokens": 4096, "nvme_path": tmp_path}
    for mode in ("decode_only", "PREFILL_ONLY"):
        assert SageLLMConfig(inference_mode=mode, kv_cache=files, scheduler={"on_transfer_failure": "fail"})


def test_swap_needs_a_tier():
    with pytest.raises(ConfigError, match="swap keeps KV in DDR: give kv_cache.enable_tiering and ddr_tokens"):
        SageLLMConfig(scheduler={"preemption": "swap"})
    assert SageLLMConfig(scheduler={"preemption": "swap"}, kv_cache={**TIERING, "ddr_tokens": 4096})


def test_the_sizes_of_tiers(tmp_path):
    assert KVCacheConfig().tier_tokens == (0, 0)
    assert KVCacheConfig(**TIERING, ddr_tokens=4096, granularity="token").tier_tokens == (4096, 0)
    assert KVCacheConfig(**TIERING, nvme_tokens=8192, nvme_path=tmp_path).tier_tokens == (0, 8192)
    ratios = {"hbm_ratio": 0.1, "ddr_ratio": 0.3, "nvme_ratio": 0.6, "max_tokens": 1600}
    assert KVCacheConfig(**TIERING, **ratios, nvme_path=tmp_path).tier_tokens == (4800, 9600)


@pytest.mark.parametrize("policy", SchedulerPolicy)
def test_a_policy_is_written_in_any_case(policy):
    assert SchedulerConfig().policy is SchedulerPolicy.FCFS
    for text in (policy.value, policy.name):
        assert SchedulerConfig(policy=text).policy is policy


@pytest.mark.parametrize(
    ("scheduler", "problem"),
    [
        ({"policy": "lifo"}, "'fcfs', 'priority'"),
        ({"tenant_weights": {"a": 2}}, "policy fcfs ignores tenant_weights: leave it out, or write policy: fair_share"),
        ({"policy": "fair_share", "tenant_weights": {"a": 0}}, "greater than 0"),
        (
            {"policy": "deadline", "max_overtakes": 3},
            "ignores max_overtakes: .* write policy: longest_prefix or shortest_job",
        ),
        ({"policy": "shortest_job", "max_overtakes": 0}, "greater than 0"),
    ],
)
def test_a_policy_and_a_parameter_that_it_ignores_are_an_error(scheduler, problem):
    with pytest.raises(ConfigError, match=problem):
        SchedulerConfig(**scheduler)


@pytest.mark.parametrize("switch", ["enable_prefix_caching", "enable_cross_request_sharing"])
def test_longest_prefix_without_a_prefix_cache_is_an_error(switch):
    with pytest.raises(ConfigError, match="longest_prefix needs prefixes to be cached: leave kv_cache.enable_pre"):
        SageLLMConfig(scheduler={"policy": "longest_prefix"}, kv_cache={switch: False})


def test_there_and_back(tmp_path):
    config = SageLLMConfig(
        model=ModelConfig(model_id="some/model", dtype="float32", max_seq_len=128),
        kv_cache=KVCacheConfig(max_tokens=4096, block_size=8, enable_prefix_caching=False),
        scheduler=SchedulerConfig(
            max_batch_size=3, request_timeout_s=0, policy="fair_share", tenant_weights={"gold": 2.5}
        ),
        backend=BackendConfig(backend_type="cpu", threads=2),
        benchmark=BenchmarkConfig(enable_gates=True, max_ttft_ms=100),
    )
    assert SageLLMConfig(**config.to_dict()) == config
    path = tmp_path / "engine.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert SageLLMConfig.from_yaml(path) == config
    path.write_text(yaml.safe_dump({"name": "p", "operators": {}, "edges": [], "engine": config.to_dict()}))
    assert SageLLMConfig.from_yaml(path) == config, "a pipeline file holds the same under `engine:`"


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "engine.yaml"
    for text in ("", "engine:\n", "model:\n"):
        path.write_text(text)
        assert SageLLMConfig.from_yaml(path) == SageLLMConfig()


LATER = [
    (ModelConfig, {"quantization": "int8"}, "model.quantization"),
    (ModelConfig, {"quantization_config": {"bits": 4}}, "model.quantization_config"),
    (ModelConfig, {"sparsity_pattern": "2:4"}, "model.sparsity_pattern"),
    (ModelConfig, {"sparsity_ratio": 0.5}, "model.sparsity_ratio"),
    (BackendConfig, {"tensor_parallel_size": 2}, "backend.tensor_parallel_size"),
    (BackendConfig, {"pipeline_parallel_size": 2}, "backend.pipeline_parallel_size"),
    (BenchmarkConfig, {"enable_profiling": True}, "benchmark.enable_profiling"),
    (
        SageLLMConfig,
        {"inference_mode": "prefill_only", "scheduler": {"mode": "strict"}},
        "inference_mode prefill_only with scheduler.mode strict",
    ),
]


@pytest.mark.parametrize(("cls", "asked", "named"), LATER)
def test_what_a_later_version_brings_is_refused_by_name(cls, asked, named):
    with pytest.raises(NotAvailableError) as raised:
        cls(**asked)
    assert named in str(raised.value)
    assert "is not available yet; " in str(raised.value), "what to write instead"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {dtype: float12}", "model.dtype"),
        ("modle: {}", "modle"),
        ("kv_cache: {max_tokens: 0}", "kv_cache.max_tokens"),
        (
            "kv_cache: {max_tokens: 8, block_size: 16}",
            "max_tokens 8 is less than one block: write at least block_size, 16",
        ),
        ("kv_cache: {eviction: fifo}", "kv_cache.eviction"),
        ("kv_cache: {ttl_s: -1}", "kv_cache.ttl_s"),
        (
            "kv_cache: {ttl_s: 60, enable_prefix_caching: false}",
            "ttl_s is for cached prefixes, but enable_prefix_caching is false",
        ),
        ("benchmark: {max_ttft_ms: 3}", "write enable_gates: true"),
        ("[]", "write a mapping"),
        ("engine: 3", "write a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("scheduler: {prefill_workers: 2}", "prefill_workers is for mode: strict"),
        ("scheduler: {mode: hybrid, decode_workers: 2}", "decode_workers is for mode: strict"),
        ("scheduler: {transfer_timeout_s: 1}", "transfer_timeout_s is for mode: strict"),
        ("scheduler: {on_transfer_failure: fail}", "on_transfer_failure is for KV that moves"),
        ("inference_mode: prefill_only\nscheduler: {on_transfer_failure: fail}", "on_transfer_failure is for KV that"),
        ("kv_cache: {granularity: head}", "granularity is for KV that moves"),
        ("backend: {device_ids: [0, 1]}", "device_ids: found [0, 1], give one\n"),
        ("scheduler: {mode: strict}\nbackend: {device_ids: [0, 1, 2]}", "give one, or 2: one for each worker"),
    ],
)
def test_a_wrong_file_says_which_file_and_what(tmp_path, text, problem):
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        SageLLMConfig.from_yaml(path)
    assert problem in f"{raised.value}\n"
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        SageLLMConfig.from_yaml(tmp_path / "nothing.yaml")


def test_values_are_fixed_once_validated():
    with pytest.raises(ValidationError):
        SageLLMConfig().inference_mode = InferenceMode.STANDARD


def test_the_turns_of_time_sharing():
    assert SchedulerConfig().time_shares is None
    assert SchedulerConfig(mode="time_share").time_shares == (1, 4)
    assert SchedulerConfig(mode="TIME_SHARE", prefill_steps=2, decode_steps=3).time_shares == (2, 3)
    with pytest.raises(
        ConfigError, match="decode_steps is for mode: time_share: write that, or leave decode_steps out"
    ):
        SchedulerConfig(decode_steps=3)


def test_only_a_process_that_hangs_can_be_ended():
    assert SchedulerConfig(isolation="PROCESS", step_timeout_s=5).step_timeout_s == 5
    with pytest.raises(ConfigError, match="step_timeout_s is for isolation: process"):
        SchedulerConfig(step_timeout_s=5)


@pytest.mark.parametrize(("field", "default"), [("max_prefill_batch", 8), ("max_decode_batch", 64)])
def test_no_step_takes_more_rows_than_run_at_once(field, default):
    assert getattr(SchedulerConfig(max_batch_size=256), field) == default
    assert getattr(SchedulerConfig(max_batch_size=3), field) == 3, "a default gives way"
    assert getattr(SchedulerConfig(max_batch_size=3, **{field: 3}), field) == 3
    with pytest.raises(ConfigError, match=f"{field} is 4, but 3 run at once: write at most that, or raise max_batch"):
        SchedulerConfig(max_batch_size=3, **{field: 4})


def test_under_fair_share_twice_as_many_may_compute_their_prompts():
    assert SchedulerConfig(policy="fair_share", max_batch_size=4, max_prefill_batch=8).max_prefill_batch == 8
    with pytest.raises(ConfigError, match="max_decode_batch is 8, but 4 run at once"):
        SchedulerConfig(policy="fair_share", max_batch_size=4, max_decode_batch=8)


def test_gates_that_are_on_need_a_gate():
    assert BenchmarkConfig(enable_gates=True, max_ttft_ms=0).enable_gates
    with pytest.raises(ConfigError, match="no gate: write one of min_throughput_tps, max_ttft_ms, max_tpot_ms, or"):
        BenchmarkConfig(enable_gates=True)


def test_everything_that_is_wrong_is_told_at_once_in_the_words_of_a_pipeline():
    with pytest.raises(ConfigError) as raised:
        SageLLMConfig(
            modle={},
            model={"dtype": "floot", "quantization": "int8"},
            kv_cache={"ttl_s": 5, "enable_prefix_caching": False, "eviction": "cost"},
            scheduler={"max_batch_size": "many"},
            backend={"tensor_parallel_size": 2},
        )
    told = str(raised.value)
    assert type(raised.value) is ConfigError
    assert raised.value.__suppress_context__, "pydantic's own words are not shown with it"
    lines = [
        "SageLLMConfig has no field 'modle'; did you mean 'model'?",
        "SageLLMConfig, field 'model.dtype': found 'floot', input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "SageLLMConfig.kv_cache: ttl_s is for cached prefixes, but enable_prefix_caching is false",
        "SageLLMConfig.kv_cache: eviction is for cached prefixes, but enable_prefix_caching is false",
        "SageLLMConfig, field 'scheduler.max_batch_size': found 'many', input should be a valid integer",
        "backend.tensor_parallel_size > 1 is not available yet; use 1",
    ]
    assert [line for line in lines if line not in told] == []
    assert "; write `dtype: <auto | float32 | bfloat16 | float16>`" in told


def test_a_section_that_is_wrong_is_not_judged_with_the_others():
    """The KV cache is refused; that swap needs its tiers would be said of something that nobody wrote."""
    with pytest.raises(ConfigError) as raised:
        SageLLMConfig(
            kv_cache={**TIERING, "ddr_tokens": 4096, "enable_prefix_caching": False}, scheduler={"preemption": "swap"}
        )
    assert "\n" not in str(raised.value)
