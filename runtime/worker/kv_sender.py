"""Sends computed KV to other workers' pools while later layers are still being computed."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...config import KVGranularity
from ...kv_runtime.granularity import copy_kv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..scheduler.plan import KVExport

log = logging.getLogger("sageLLM")


class KVSender:
    """Copies between pools [N, L, 2, K, P, D] on a thread (and on a CUDA device a stream) of its own, in order.

    In units of LAYER a layer is sent as soon as it is computed, in other units all of them at the end of the step.
    """

    def __init__(self, pool: Tensor, peers: Sequence[Tensor], granularity: KVGranularity, timeout_s: float) -> None:
        self._pool = pool
        self.peers = peers
        self.granularity = granularity
        self.timeout_s = timeout_s or None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sagellm-kv-sender")
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]

    def begin(self, exports: list[KVExport]) -> Sending:
        """What one step exports."""
        return Sending(self, exports)

    def submit(self, job: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run a job after those before it, once what is queued on the device by now has been computed."""
        if self._stream is None:
            return self._thread.submit(job, *arguments)
        computed = torch.cuda.current_stream(self._pool.device).record_event()
        return self._thread.submit(self._run_on_stream, computed, job, *arguments)

    def _run_on_stream(self, computed: torch.cuda.Event, job: Callable[..., None], *arguments: Any) -> None:
        with self.stream():
            torch.cuda.current_stream().wait_event(computed)
            job(*arguments)

    def stream(self) -> AbstractContextManager[Any]:
        """The stream that copies are queued on."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copy(self, export: KVExport, layer: int | None) -> None:
        """Copy an export's KV, of one layer or of all."""
        copy_kv(
            self.granularity, self._pool, self.peers[export.peer], export.source_blocks, export.target_blocks,
            export.start, export.end, layer,
        )  # fmt: skip

    def synchronize(self) -> None:
        """Wait until what was copied lies there."""
        if self._stream is not None:
            self._stream.synchronize()
            for device in {peer.device for peer in self.peers if peer is not None} - {self._pool.device}:
                torch.cuda.current_stream(device).synchronize()

    def close(self) -> None:
        """Wait for the copies and end the thread."""
        self._thread.shutdown()


class Sending:
    """The exports of one step. Made, told of layers and ended on the device thread, read on any."""

    def __init__(self, sender: KVSender, exports: list[KVExport]) -> None:
        self._sender = sender
        self._exports = exports
        self._failed: dict[int, str] = {}
        self._end: Future[None] | None = None

    def send_layer(self, layer: int) -> None:
        """A layer's KV is computed."""
        if self._sender.granularity is KVGranularity.LAYER:
            self._sender.submit(self._copy_all, layer)

    def end(self, computed: bool) -> None:
        """No more layers come; `computed` if the step went well."""
        if computed and self._sender.granularity is not KVGranularity.LAYER:
            self._sender.submit(self._copy_all, None)
        self._end = self._sender.submit(self._finish)

    def _copy_all(self, layer: int | None) -> None:
        for index, export in enumerate(self._exports):
            if index not in self._failed:
                try:
                    self._sender.copy(export, layer)
                except Exception as error:
                    log.warning("KV could not be handed over", exc_info=True)
                    self._failed[index] = f"{type(error).__name__}: {error}"

    def _finish(self) -> None:
        try:
            self._sender.synchronize()
        except Exception as error:
            self._failed = {index: f"{type(error).__name__}: {error}" for index in range(len(self._exports))}
        finally:
            for export in self._exports:
                export.done()

    def failed(self) -> dict[int, str]:
        """Wait for the copies; the exports, by index, that failed or did not end in time, and why."""
        assert self._end is not None
        try:
            self._end.result(self._sender.timeout_s)
        except TimeoutError:
            late = f"the transfer took more than {self._sender.timeout_s} s"
            return {index: self._failed.get(index, late) for index in range(len(self._exports))}
        return self._failed
