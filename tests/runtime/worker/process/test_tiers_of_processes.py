"""Tiers below the pool of a worker process: this process maps the pool and copies."""

from __future__ import annotations

import os
import random
import signal

import pytest

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine

from .conftest import processes_of

_CHANCE = random.Random(5)
PREFIXES = [[_CHANCE.randrange(5, 300) for _ in range(48)] for _ in range(5)]
PROMPTS = [PREFIXES[turn % 5] + [_CHANCE.randrange(5, 300) for _ in range(6)] for turn in range(15)]


def config(model, scheduler, **kv_cache):
    patient = {"queue_timeout_s": 0, "request_timeout_s": 0}  # a process may take long to start where tests run
    return SageLLMConfig(
        model={"model_id": str(model)},
        kv_cache={"block_size": 4, **kv_cache},
        scheduler={"max_batch_size": 4, "max_step_tokens": 32, **patient, **scheduler},
        backend={"backend_type": "cpu", "threads": 1},
    )


def ask(engine, prompts):
    requests = [GenerateRequest(prompt_tokens=prompt, max_new_tokens=12, temperature=0, ignore_eos=True)
                for prompt in prompts]  # fmt: skip
    return [output.output_tokens for output in engine.generate(requests)]


@pytest.mark.timeout(300)
def test_what_comes_up_tells_the_same_also_from_a_pool_that_was_lost(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = checkpoint_folder("qwen3")
    with SageLLMEngine(config(folder, {})) as engine:
        expected = ask(engine, PROMPTS)
    tiny = config(
        folder, {"isolation": "process", "preemption": "swap"}, max_tokens=128, enable_tiering=True, ddr_tokens=2048
    )
    with SageLLMEngine(tiny) as engine:
        engine._services.tiers[0].fetcher.cost = None  # whatever this machine thinks is faster
        found = ask(engine, PROMPTS[:10])
        hits = engine.get_stats()["kv_tiers"]["ddr_hit_tokens"]
        for pid in processes_of():
            os.kill(pid, signal.SIGKILL)
        found += ask(engine, PROMPTS[10:])
        assert found == expected
        assert 0 < hits < engine.get_stats()["kv_tiers"]["ddr_hit_tokens"]
        services = engine._services
        services.tiers[0].check_integrity()
        services.kv.check_integrity(owners=[])
        assert services.leases.free_slots == services.leases.num_slots
