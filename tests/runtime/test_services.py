"""What the operators of one pipeline share."""

from __future__ import annotations

import pytest

from sageLLM.backends import host, torch_ops
from sageLLM.config import KVCacheConfig, SageLLMConfig
from sageLLM.errors import ConfigError
from sageLLM.runtime import executors, memory
from sageLLM.runtime.services import EngineServices


@pytest.mark.parametrize("backend", [{"backend_type": "cuda"}, {"device_ids": [1]}, {"threads": 2}])
def test_the_null_model_refuses_a_device(backend):
    config = SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}, "backend": backend})
    with pytest.raises(ConfigError, match="leave backend_type, device_ids, threads and cpu_kernels out"):
        EngineServices(config).load()


def test_the_null_model_refuses_an_slo():
    config = SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}, "scheduler": {"tpot_slo_ms": 20}})
    with pytest.raises(ConfigError, match=r"leave scheduler\.tpot_slo_ms out"):
        EngineServices(config).load()


@pytest.mark.parametrize("model", ["builtin:null", "builtin:pydoc-tiny"])
@pytest.mark.parametrize(
    ("section", "option", "found"),
    [
        ("kv_cache", "max_tokens", 100_000_000_000),
        ("kv_cache", "max_tokens", 10**15),
        ("scheduler", "max_batch_size", 100_000_000),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_with_what_would(monkeypatch, model, section, option, found):
    monkeypatch.setattr(host, "memory_bytes", lambda: (8 << 30, 16 << 30))
    for module in (executors, memory, torch_ops):
        monkeypatch.setattr(module, "memory_bytes", host.memory_bytes)
    values = {"model": {"model_id": model}, "backend": {"backend_type": "cpu"}, section: {option: found}}
    refusal = rf"^{section}.{option}: found {found}, which needs .* are 8.0 GiB free"
    with pytest.raises(ConfigError, match=refusal) as told:
        EngineServices(SageLLMConfig.model_validate(values)).load()
    most = int(str(told.value).rpartition("write at most ")[2])
    assert 0 < most < found


def test_where_nothing_fits_no_number_is_advised():
    with pytest.raises(ConfigError, match="0.5 GiB free: free some, or use a smaller model"):
        memory.check_kv_pool(KVCacheConfig(), block_bytes=1 << 30, free=1 << 29)
    memory.check_kv_pool(KVCacheConfig(max_tokens=65536, block_size=16), block_bytes=1024, free=1 << 23)


def test_ddr_tiers_that_do_not_fit_are_told_in_the_tokens_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: (10 << 20, 10 << 20))
    with pytest.raises(ConfigError, match=r"ddr_tokens: found 81920, .* write at most 73728"):
        memory.check_host_tier(5120, 16, block_bytes=1024, num_pools=2)
    memory.check_host_tier(73728 // 16, 16, block_bytes=1024, num_pools=2)
