"""`sagellm bench kv-tiers`: the time to the first token of a prompt whose prefix is in the pool, in DDR or in files.

A random checkpoint, one request at a time. The prefix is put out of the pool by taking all of its blocks, and out of
main memory by a restart of the engine and by telling the kernel to forget the files.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoints import write_checkpoint
from .workloads import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine import SageLLMEngine
    from ..kv_runtime.tiers import KVTiers
    from ..runtime.services import EngineServices

_OWN = 16  # tokens of a prompt behind the prefix
_NOBODY = ("", "")


@dataclass(frozen=True, slots=True)
class TierTimes:
    """Median seconds to the first token, by where the prefix was; and what a prompt costs that no tier has.

    `lookup_s` is to find that out, `naming_s` to name its blocks when they enter the prefix tree, `saving_s` to save as
    many blocks of others as it takes: the first two on the flow's thread, the last on the device's.
    """

    recomputed: float
    hbm: float
    ddr: float
    nvme: float
    prefix_bytes: int
    lookup_s: float
    naming_s: float
    saving_s: float

    @property
    def miss_share(self) -> float:
        """What a miss costs, as a share of the time to compute it."""
        return (self.lookup_s + self.naming_s + self.saving_s) / self.recomputed


def measure_kv_tiers(
    shape: str, prefix_tokens: int, threads: int, runs: int, report: Callable[[str], None]
) -> TierTimes:
    """Measure each `runs` times, but compute the prefix once."""
    rng = random.Random(0)
    prefix = [rng.randrange(SHAPES[shape]["vocab_size"] - 1000) for _ in range(prefix_tokens)]

    def prompt() -> list[int]:
        return [*prefix, *(rng.randrange(1000) for _ in range(_OWN))]

    with tempfile.TemporaryDirectory() as scratch:
        report("writing a random checkpoint ...")
        folder = write_checkpoint(shape, Path(scratch) / "model")
        config = _config(folder, Path(scratch) / "kv", prefix_tokens, threads)
        with _start(config) as engine:
            services = engine.services
            (tiers,) = services.tiers
            _time_first_token(engine, prompt()[-64:])
            report(f"computing {prefix_tokens} tokens ...")
            recomputed = _time_first_token(engine, prompt())
            hbm = [_time_first_token(engine, prompt()) for _ in range(runs)]
            saving = _empty_pool(services)
            lookup, naming = _time_miss(tiers, prefix_tokens)
            report("from DDR ...")
            ddr = []
            for _ in range(runs):
                ddr.append(_time_first_token(engine, prompt()))
                _empty_pool(services)
            prefix_bytes = prefix_tokens // services.kv.block_size * services.executors[0].block_io.block_bytes  # type: ignore[attr-defined]
        nvme = []
        for run in range(runs):
            report(f"from files, after restart {run + 1} ...")
            _forget_files(Path(scratch) / "kv")
            with _start(config) as engine:
                _time_first_token(engine, prompt()[-64:])
                nvme.append(_time_first_token(engine, prompt()))
                found = engine.get_stats()["kv_tiers"]["nvme_hit_tokens"]
            if found < prefix_tokens // 16 * 16:
                report(f"only {found} of {prefix_tokens} tokens came from files")
    return TierTimes(recomputed, median(hbm), median(ddr), median(nvme), prefix_bytes, lookup, naming, saving)


def _config(folder: Path, files: Path, prefix_tokens: int, threads: int) -> dict[str, Any]:
    pool = prefix_tokens + 4096
    return {
        "model": {"model_id": str(folder), "dtype": "bfloat16"},
        "backend": {"backend_type": "cpu", "threads": threads},
        "kv_cache": {
            "max_tokens": pool,
            "enable_tiering": True,
            "ddr_tokens": 2 * pool,
            "nvme_tokens": 4 * pool,
            "nvme_path": str(files),
        },
        "scheduler": {"max_batch_size": 4, "request_timeout_s": 0, "queue_timeout_s": 0},
    }


def _start(config: dict[str, Any]) -> SageLLMEngine:
    from ..config import SageLLMConfig
    from ..engine import SageLLMEngine

    return SageLLMEngine(SageLLMConfig.model_validate(config))


def _time_first_token(engine: SageLLMEngine, prompt: list[int]) -> float:
    from ..generation import GenerateRequest

    call = GenerateRequest(prompt_tokens=prompt, max_new_tokens=1, temperature=0.0, ignore_eos=True)
    output = engine.generate(call)
    if output.error:
        raise RuntimeError(output.error)
    return output.metrics.ttft_ms / 1000


def _empty_pool(services: EngineServices) -> float:
    """Have the prefix tree give up everything; return how many seconds it took to save."""
    kv, (tiers,) = services.kv, services.tiers
    blocks = kv.allocate(kv.available())
    assert blocks is not None
    begin = time.perf_counter()
    tiers.flush()
    seconds = time.perf_counter() - begin
    kv.release(blocks)
    return seconds


def _time_miss(tiers: KVTiers, prefix_tokens: int) -> tuple[float, float]:
    """Seconds to look for a prompt that is nowhere, and to name its blocks."""
    from ..kv_runtime.tiers.block_key import prefix_keys

    lookups, namings = [], []
    for run in range(5):
        tokens = np.random.default_rng(run).integers(0, 1000, prefix_tokens).astype(np.int32)
        begin = time.perf_counter()
        tiers.fetcher.is_coming(tiers.wish(tokens, _NOBODY, prefix_tokens))
        lookups.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        prefix_keys(_NOBODY, tokens, 16)
        namings.append(time.perf_counter() - begin)
    return median(lookups), median(namings)


def _forget_files(folder: Path) -> None:
    """Have the kernel write the files and drop them from its cache."""
    for path in folder.rglob("*.kv"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
