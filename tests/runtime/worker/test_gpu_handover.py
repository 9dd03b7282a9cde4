"""Mode strict on GPUs: one for both workers, or one for each."""

from __future__ import annotations

import pytest
import torch

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine

PROMPTS = [[*range(5, 5 + length)] for length in (1, 15, 16, 17, 40, 100)]


@pytest.mark.parametrize("devices", [[0], [0, 1]])
@pytest.mark.parametrize(
    ("unit", "isolation"), [("block", "thread"), ("token", "thread"), ("head", "thread"), ("block", "process")]
)
@pytest.mark.timeout(300)  # processes that load torch
def test_the_same_tokens_as_hybrid(checkpoint_folder, devices, unit, isolation):
    if torch.cuda.device_count() < len(devices):
        pytest.skip(f"needs {len(devices)} CUDA devices")

    def run(**options):
        config = SageLLMConfig.model_validate(
            {
                "model": {"model_id": str(checkpoint_folder("qwen3"))},
                "backend": {"backend_type": "cuda", "device_ids": devices if "scheduler" in options else [0]},
                **options,
            }
        )
        with SageLLMEngine(config) as engine:
            requests = [GenerateRequest(prompt_tokens=prompt, max_new_tokens=20, temperature=0.0) for prompt in PROMPTS]
            return [output.output_tokens for output in engine.generate(requests * 2)]

    kv = {"max_tokens": 4096, "granularity": unit}
    strict = {"mode": "strict", "max_step_tokens": 32, "on_transfer_failure": "fail", "isolation": isolation}
    assert run(kv_cache=kv, scheduler=strict) == run()
