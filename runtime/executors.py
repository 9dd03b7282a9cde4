"""Builds the executors of an engine: one for each worker, those of mode strict's prefill workers first."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ..backends.host import memory_bytes
from ..config import BackendType, KVGranularity
from ..errors import ConfigError
from .memory import check_kv_pool, check_slots

if TYPE_CHECKING:
    from ..backends.base import Backend
    from ..config import BackendConfig, SageLLMConfig
    from ..models.decoder import DecoderModel
    from ..models.guide_compiler import GuideCompiler
    from ..models.resolve import ResolvedModel
    from .worker.executor import Executor
    from .worker.process.remote_executor import RemoteExecutor
    from .worker.torch_executor import AllocateKV


def make_executors(
    config: SageLLMConfig, model: ResolvedModel, backend: Backend | None, guides: GuideCompiler
) -> list[Executor]:
    """Load the model on `backend` and on the other devices that are asked for, and allocate every worker's KV pool.

    Without a backend it is the null model.

    Raises:
        ConfigError: the slots or the KV pools do not fit into memory, or a device cannot be had.
    """
    scheduler, kv = config.scheduler, config.kv_cache
    check_slots(scheduler.num_slots, model.architecture.max_seq_len, kv.block_size, scheduler.num_workers)
    if backend is None:
        _refuse_device(config.backend)
        check_kv_pool(kv, 0, memory_bytes()[0], scheduler.num_workers)
        return [_make_null(config) for _ in range(scheduler.num_workers)]
    first, *others = config.backend.device_ids
    devices = [first, *others] if others else [first] * scheduler.num_workers
    backends = {first: backend}
    loaded = {}
    for device in dict.fromkeys(devices):
        on_device = backends.get(device) or _detect(config.backend, device)
        loaded[device] = (_load(config, model, on_device, devices.count(device)), on_device)
    return [_make_executor(config, *loaded[device], guides) for device in devices]


def start_processes(config: SageLLMConfig, model: ResolvedModel) -> list[RemoteExecutor]:
    """Start a process for each worker, and wait until all have loaded the model.

    Raises:
        ModelError, ConfigError: what `make_executors` raises there.
        ExecutorLostError: a process has ended, or is not ready in half an hour.
    """
    from .worker.process.remote_executor import RemoteExecutor

    scheduler, max_seq_len = config.scheduler, model.architecture.max_seq_len
    check_slots(scheduler.num_slots, max_seq_len, config.kv_cache.block_size, scheduler.num_workers)
    processes = [RemoteExecutor(config, worker) for worker in range(scheduler.num_workers)]
    try:
        for process in processes:
            process.wait_until_ready()
    except BaseException:
        for process in processes:
            process.close()
        raise
    return processes


def make_lone_executor(
    config: SageLLMConfig, worker: int, allocate_kv: AllocateKV | None = None
) -> tuple[Executor, str]:
    """The executor of one worker with a model of its own, and the name of its backend; see `TorchExecutor`.

    Raises:
        ModelError: the model cannot be found, read or built.
        ConfigError: as `make_executors`.
    """
    from ..models.guide_compiler import GuideCompiler
    from ..models.resolve import resolve_model
    from ..models.tokenizer import load_tokenizer

    model, devices = resolve_model(config.model), config.backend.device_ids
    if model.weights == "null":
        _refuse_device(config.backend)
        check_kv_pool(config.kv_cache, 0, memory_bytes()[0])
        return _make_null(config), "null"
    backend = _detect(config.backend, devices[worker if len(devices) > 1 else 0])
    guides = GuideCompiler(model, partial(load_tokenizer, model))
    return _make_executor(config, _load(config, model, backend, 1), backend, guides, allocate_kv), backend.name


def _make_null(config: SageLLMConfig) -> Executor:
    from .worker.executor import NullExecutor

    return NullExecutor(config.scheduler.num_slots)


def _detect(config: BackendConfig, device: int) -> Backend:
    from ..backends import detect_backend

    return detect_backend(config.model_copy(update={"device_ids": [device]}))


def _load(config: SageLLMConfig, resolved: ResolvedModel, backend: Backend, num_pools: int) -> DecoderModel:
    """The model, where so many KV pools fit beside it."""
    from ..models.weights import load_model

    model = load_model(resolved, backend)
    block_bytes = prod(model.kv_shape(1, config.kv_cache.block_size)) * model.kv_dtype.itemsize
    check_kv_pool(config.kv_cache, block_bytes, backend.memory_bytes()[0], num_pools)
    return model


def _make_executor(
    config: SageLLMConfig,
    model: DecoderModel,
    backend: Backend,
    guides: GuideCompiler,
    allocate_kv: AllocateKV | None = None,
) -> Executor:
    from .worker.torch_executor import TorchExecutor

    kv, scheduler = config.kv_cache, config.scheduler
    unit = KVGranularity.LAYER if kv.granularity is KVGranularity.BLOCK else kv.granularity
    return TorchExecutor(
        model,
        backend,
        kv.max_tokens // kv.block_size,
        kv.block_size,
        scheduler.num_slots,
        unit,
        scheduler.transfer_timeout_s,
        kv.granularity,
        allocate_kv,
        guides,
    )


def _refuse_device(backend: BackendConfig) -> None:
    asks = backend.device_ids != [0] or backend.threads or backend.cpu_kernels != "auto"
    if backend.backend_type is BackendType.CUDA or asks:
        raise ConfigError(
            "backend: builtin:null runs on no device: leave backend_type, device_ids, threads and cpu_kernels out"
        )
