"""The engines that are compared: each loads a checkpoint folder once and then runs workloads."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Protocol

from .measurement import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    from .workloads import Workload


class Contender(Protocol):
    """One engine with one model loaded."""

    name: str

    def run(self, workload: Workload) -> tuple[Measurement, list[list[int]]]:
        """Run all requests of a workload at once; also return the output tokens of each."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


# As many at once as the peer's static batch has.
_WIDE = {"max_batch_size": 256, "max_decode_batch": 256, "max_prefill_batch": 256}


class SageLLM:
    """This engine, through its Python API: the whole standard pipeline is on the path."""

    name = "sageLLM"

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        from ..config import SageLLMConfig
        from ..engine import SageLLMEngine

        self._engine = SageLLMEngine(
            SageLLMConfig.model_validate(
                {
                    "model": {"model_id": str(folder), "dtype": dtype},
                    "backend": {"backend_type": "cpu", "threads": threads},
                    "kv_cache": {"max_tokens": 32768},
                    "scheduler": {**_WIDE, "request_timeout_s": 0, "queue_timeout_s": 0},
                }
            )
        )
        self._engine.initialize()

    def run(self, workload: Workload) -> tuple[Measurement, list[list[int]]]:
        from ..generation import GenerateRequest

        calls = [
            GenerateRequest(prompt_tokens=prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
            for prompt, length in workload.requests
        ]
        start = time.perf_counter()
        outputs = self._engine.generate(calls)
        seconds = time.perf_counter() - start
        failed = [output.error for output in outputs if output.error]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        return (
            Measurement(
                self.name,
                workload.name,
                seconds,
                sum(len(output.output_tokens) for output in outputs),
                len(outputs),
                statistics.median(output.metrics.ttft_ms for output in outputs),
                statistics.fmean(output.metrics.tpot_ms for output in outputs),
            ),
            [output.output_tokens for output in outputs],
        )

    def close(self) -> None:
        self._engine.shutdown()


class Transformers:
    """Hugging Face transformers' `generate` with one static batch: its fastest offline path on a CPU."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if threads:
            torch.set_num_threads(threads)
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, workload: Workload) -> tuple[Measurement, list[list[int]]]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        first_token: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                first_token.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        prompts = torch.tensor([prompt for prompt, _ in workload.requests])
        length = workload.requests[0][1]
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        end = time.perf_counter()
        made = tokens[:, prompts.shape[1] :]
        ttft = (first_token[0] - start) * 1000
        tpot = (end - first_token[0]) * 1000 / max(length - 1, 1)
        return (
            Measurement(self.name, workload.name, end - start, made.numel(), len(prompts), ttft, tpot),
            made.tolist(),
        )

    def close(self) -> None:
        del self._model


PEERS: dict[str, type[Contender]] = {"transformers": Transformers}
