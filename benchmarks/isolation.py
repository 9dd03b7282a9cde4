"""`sagellm bench isolation`: what a step costs more when the model runs in a process of its own."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median

import numpy as np

from ..config import SageLLMConfig
from ..records import Request, SamplingParams, Sequence
from ..runtime.executors import make_lone_executor, start_processes
from .decoding import time_decoding

_BLOCK_SIZE = 16
_PROMPT_TOKENS = 32
_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """Microseconds of a step, of each round; a round of threads and one of processes take turns."""

    model_id: str
    batch: int
    depth: int
    thread_us: list[float]
    process_us: list[float]

    @property
    def overhead_us(self) -> float:
        """Median over the rounds of what the process takes more."""
        return median(process - thread for process, thread in zip(self.process_us, self.thread_us, strict=True))


def measure_isolation(model_id: str, batch: int, steps: int, threads: int, depth: int) -> IsolationReport:
    """Decode `batch` rows for `steps` steps in each round, `depth` steps launched at once."""
    length = _PROMPT_TOKENS + steps + 1
    blocks = -(-length // _BLOCK_SIZE)
    config = SageLLMConfig.model_validate(
        {
            "model": {"model_id": model_id},
            "kv_cache": {"max_tokens": batch * blocks * _BLOCK_SIZE, "block_size": _BLOCK_SIZE},
            "scheduler": {"max_batch_size": batch, "max_decode_batch": batch, "isolation": "process"},
            "backend": {} if model_id == "builtin:null" else {"threads": threads},
        }
    )
    from ..models.resolve import resolve_model

    prompt = np.full(_PROMPT_TOKENS, 97, np.int32)
    sequence = Sequence(Request("bench"), prompt, SamplingParams().with_defaults(temperature=0.0))
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    with ExitStack() as closed:
        (process,) = start_processes(config, resolve_model(config.model))
        closed.enter_context(closing(process))
        thread, _ = make_lone_executor(config, 0)
        closed.enter_context(closing(thread))
        rounds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ROUNDS):
            for executor, times in zip((thread, process), rounds, strict=True):
                times.append(time_decoding(executor, sequence, tables, _BLOCK_SIZE, steps, depth))
    return IsolationReport(model_id, batch, depth, *rounds)
