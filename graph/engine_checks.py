"""What the engine is asked for in its section, the stages of the pipeline do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import InferenceMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..config import SageLLMConfig
    from .operator_spec import OperatorSpec
    from .problems import Problems

_STAGES = {"looked_up": "kv_lookup", "committed": "kv_commit"}  # by what they provide


def check_engine(engine: SageLLMConfig, specs: Iterable[OperatorSpec], problems: Problems) -> None:
    """Note every setting for which the pipeline, which has operators of these types, lacks the stage."""
    provided = frozenset[str]().union(*(spec.provides for spec in specs))
    _check_figures(engine, "measured" in provided, problems)
    if "prefilled" not in provided:
        return  # nothing is computed here
    for key, why, needed in _kv_settings(engine):
        for fact in needed:
            if fact not in provided:
                stage = _STAGES[fact]
                text = f"{why} in the stage {stage}, which the pipeline lacks: add `{stage}:`, or leave {key[-1]} out"
                problems.add(("engine", *key), text, at_key=True)


def _check_figures(engine: SageLLMConfig, measured: bool, problems: Problems) -> None:
    if engine.benchmark.enable_gates and not measured:
        text = "enable_gates needs the figures of a 'metrics' stage; add `metrics:` behind detokenize"
        problems.add(("engine", "benchmark", "enable_gates"), text)
    if measured and not engine.benchmark.enable_metrics:
        text = "enable_metrics is false, but there is a 'metrics' stage; leave one of them out"
        problems.add(("engine", "benchmark", "enable_metrics"), text)


def _kv_settings(engine: SageLLMConfig) -> Iterator[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Each setting that asks for a stage: its key, what happens there, and what that stage provides."""
    kv_cache, mode = engine.kv_cache, engine.inference_mode
    if mode is InferenceMode.DECODE_ONLY:
        yield ("inference_mode",), "inference_mode decode_only imports KV", ("looked_up",)
    elif mode is InferenceMode.PREFILL_ONLY and kv_cache.nvme_path is not None:
        yield ("inference_mode",), "inference_mode prefill_only exports KV", ("committed",)
    elif engine.scheduler.preemption != "swap":  # which has a use of its own for tiers
        for name in kv_cache.changed("enable_tiering"):
            yield ("kv_cache", name), f"{name} keeps prefixes that are cached", ("committed",)
            yield ("kv_cache", name), f"{name} brings up prefixes that are looked up", ("looked_up",)
    for name in kv_cache.changed("eviction", "ttl_s", "max_pinned_ratio"):
        yield ("kv_cache", name), f"{name} is for prefixes that are cached", ("committed",)
