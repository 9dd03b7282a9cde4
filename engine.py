"""The library's front door: SageLLMEngine builds the standard pipeline and runs it on a thread of its own."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import Future, wait
from contextlib import aclosing
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, overload

import anyio

from .config import SageLLMConfig
from .errors import EngineClosedError, NotAvailableError, RequestError
from .generation import (
    GenerateOutput,
    GenerateRequest,
    to_embedding,
    to_output,
    to_pooled_record,
    to_record,
    to_record_or_letter,
)
from .records import Completion, DeadLetter, Pooling, Request, TokenDelta
from .runtime.calls import Caller, EndCaller, FutureCaller, letter_of
from .runtime.flow.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from .runtime.flow.flow import Flow
    from .runtime.flow.ledger import Outcome
    from .runtime.services import EngineServices


class _StreamCaller(Caller):
    """Passes deltas and the end to one mailbox, read in the caller's own event loop."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.mailbox: Mailbox[TokenDelta | Completion | DeadLetter] = Mailbox()

    def receive_delta(self, delta: TokenDelta) -> None:
        self.mailbox.put([delta])

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        self.mailbox.put([record or letter_of(self.request, outcome)])


class SageLLMEngine:
    """Generates with one model. Thread-safe: calls that run at the same time are batched together.

        with SageLLMEngine(SageLLMConfig()) as engine:
            print(engine.generate(GenerateRequest(prompt="...", max_new_tokens=20)).text)
    """

    def __init__(self, config: SageLLMConfig | None = None) -> None:
        """Note the configuration; `initialize` loads the model.

        Raises:
            NotAvailableError: the configuration sets gates, which only `sagellm run` checks.
        """
        self.config = config or SageLLMConfig()
        if self.config.benchmark.enable_gates:
            raise NotAvailableError(
                "benchmark.enable_gates is not available in SageLLMEngine; leave it out and compare the outputs' "
                "metrics, or write the pipeline as YAML and use `sagellm run`"
            )
        self._thread: threading.Thread | None = None
        self._services: EngineServices | None = None
        self._flow: Flow | None = None
        self._started: Future[None] = Future()
        self._is_over = False  # the thread has ended, or is about to
        self._lock = threading.Lock()

    # -- life --------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Load the model and start the pipeline; when it runs already, or starts on another thread, wait for that.

        An engine that has failed starts afresh.

        Raises:
            ModelError: the model cannot be found, read or built.
            ConfigError: the device or the KV pool cannot be had.
        """
        with self._lock:
            if self._is_over:
                self._forget()
                gc.collect()  # weights and KV pool of the failed one lie in cycles: there is no room for them twice
            if self._thread is None:
                self._started = Future()
                self._thread = threading.Thread(target=self._run, name="sagellm-engine", daemon=True)
                self._thread.start()
            started = self._started
        try:
            started.result()
        except BaseException:  # also KeyboardInterrupt, which leaves the thread loading
            self.shutdown()
            raise

    def _run(self) -> None:
        reason = "the engine was shut down"
        try:
            anyio.run(self._serve)
        except BaseException as error:
            clear_frames(error.__traceback__)  # a caller may keep the error, but not the weights with it
            reason = f"the engine failed: {_first_cause(error)} (initialize() starts it afresh)"
            if not self._started.done():
                self._started.set_exception(error)
        self._is_over = True
        if self._services is not None:
            self._services.calls.fail_all(reason)

    async def _serve(self) -> None:
        from . import operators  # noqa: F401 - registers the built-in stages
        from .graph import build_pipeline
        from .runtime.assembly import assemble
        from .runtime.services import EngineServices

        pipeline = build_pipeline(standard_pipeline(self.config), base_dir=Path.cwd())
        services = EngineServices(pipeline.engine)
        services.load()  # nothing else runs on this loop yet
        flow = assemble(pipeline, services)
        self._services, self._flow = services, flow
        async with services.running():
            self._started.set_result(None)
            await flow.run()

    def shutdown(self, cancel: bool = False) -> None:
        """Finish what is in flight, or `cancel` it, then stop; later calls raise EngineClosedError. Twice is once."""
        with self._lock:
            if self._thread is None:
                return
            wait([self._started])  # while the model loads there is nothing to close yet
            if self._services is not None:
                self._services.calls.close("the engine was shut down")
                if cancel:
                    self._services.cancel(self._services.calls.open_requests())
            self._forget()

    def _forget(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = self._services = self._flow = None
        self._is_over = False

    def __enter__(self) -> SageLLMEngine:
        self.initialize()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    # -- calls -------------------------------------------------------------------------------------------------------

    @overload
    def generate(self, request: GenerateRequest) -> GenerateOutput: ...
    @overload
    def generate(self, request: Sequence[GenerateRequest]) -> list[GenerateOutput]: ...
    def generate(self, request: GenerateRequest | Sequence[GenerateRequest]) -> GenerateOutput | list[GenerateOutput]:
        """Generate for one request, or for a list: then one output each, in order, failed ones with `error` set.

        An interrupted call (Ctrl-C) cancels its requests.

        Raises:
            RequestError: a single request is bad or failed; for a list only if something in it is no GenerateRequest.
            EngineClosedError: the engine is not initialized, was shut down, or has failed.
        """
        if isinstance(request, (GenerateRequest, str, dict)):
            return to_output(self._compute([to_record(request)])[0], strict=True)
        results = [to_record_or_letter(each) for each in request]
        return [to_output(record, strict=False) for record in self._compute(results)]

    def embed(
        self, prompts: Sequence[str | Sequence[int]], pooling: Pooling | str = Pooling.MEAN
    ) -> list[NDArray[np.float32]]:
        """The embeddings [hidden] of texts, or of lists of token ids, in order: each of length 1, as OpenAI's are.

        `pooling` "mean" takes the mean of the hidden states of all tokens, "last" that of the last token. An
        interrupted call cancels its requests.

        Raises:
            RequestError: a prompt or `pooling` is bad, or a prompt failed.
            EngineClosedError: the engine is not initialized, was shut down, or has failed.
        """
        if isinstance(prompts, str):
            raise RequestError(f"found {prompts!r:.60}: write a list of texts, as in embed(['...'])")
        records = self._compute([to_pooled_record(prompt, pooling) for prompt in prompts])
        return [to_embedding(record) for record in records]

    def _compute(self, results: list[Request | DeadLetter]) -> list[Completion | DeadLetter]:
        services = self.services
        good = [record for record in results if isinstance(record, Request)]
        callers = [FutureCaller(record) for record in good]
        try:
            for record, caller in zip(good, callers, strict=True):
                record.caller = caller
            services.calls.submit(good)
            ends = {id(caller.request): caller.future.result() for caller in callers}
        except BaseException:  # KeyboardInterrupt: nobody waits for them any more
            services.cancel(good)
            raise
        return [ends[id(result)] if isinstance(result, Request) else result for result in results]

    def submit(self, calls: Sequence[tuple[Request, Callable[[Completion | DeadLetter], None]]]) -> None:
        """Hand over requests and return at once; each one's function is called with its end.

        That happens exactly once, in the order in which they end, on the engine's thread: the function must neither
        block nor raise. A request that is shut down or fails ends with a DeadLetter. The scheduler's timeouts hold for
        requests that are `interactive`.

        Raises:
            EngineClosedError: the engine is not initialized, was shut down, or has failed; then no function is called.
        """
        services = self.services
        for request, on_end in calls:
            request.caller = EndCaller(request, on_end)
        services.calls.submit([request for request, _ in calls])

    def cancel(self, requests: Sequence[Request]) -> None:
        """End requests that were submitted, soon; those that have ended stay as they are. From any thread.

        Raises:
            EngineClosedError: the engine is not running.
        """
        self.services.cancel([*requests])

    @property
    def services(self) -> EngineServices:
        """What the running stages share: tokenizer, KV cache, leases, worker.

        Raises:
            EngineClosedError: the engine is not initialized or was shut down.
        """
        if self._services is None:
            raise EngineClosedError("the engine is not running: call initialize(), or use it as a context manager")
        return self._services

    async def generate_async(self, request: GenerateRequest) -> GenerateOutput:
        """Generate for one request without blocking the event loop; cancelling the task cancels the request.

        Raises:
            RequestError: the request is bad or failed.
            EngineClosedError: the engine is not running.
        """
        async with aclosing(self._follow(to_record(request))) as records:
            async for record in records:
                if not isinstance(record, TokenDelta):
                    return to_output(record, strict=True)
        raise EngineClosedError("the engine was shut down")

    async def generate_stream(self, request: GenerateRequest) -> AsyncGenerator[int, None]:
        """Yield the first choice's token ids as they are chosen; leaving the loop early cancels the request.

        Raises:
            RequestError: the request is bad or failed.
            EngineClosedError: the engine is not running.
        """
        async with aclosing(self._follow(to_record(request, stream=True))) as records:
            async for record in records:
                if not isinstance(record, TokenDelta):
                    to_output(record, strict=True)
                elif record.choice == 0:
                    for token in record.tokens:
                        yield token

    async def _follow(self, request: Request) -> AsyncGenerator[TokenDelta | Completion | DeadLetter, None]:
        services = self.services
        caller = request.caller = _StreamCaller(request)
        services.calls.submit([request])
        ended = False
        try:
            async for records in caller.mailbox:
                for record in records:
                    ended = not isinstance(record, TokenDelta)
                    yield record
                    if ended:
                        return
        finally:
            if not ended:
                services.cancel([request])
            caller.mailbox.close()

    # -- looking in --------------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """`initialized`, `backend`, `kv_pool`, `kv_cache` (`cache_hits`, ...), `worker` and `requests` counters."""
        services, flow = self._services, self._flow
        running = services is not None and not self._is_over
        stats: dict[str, Any] = {"initialized": running, "backend": None, "kv_pool": {}, "kv_cache": {}}
        if services is not None and flow is not None:
            stats |= services.get_stats()
            stats["backend"] = services.backend_name
            stats["requests"] = flow.ledger.counters()
        return stats


def standard_pipeline(config: SageLLMConfig) -> dict[str, Any]:
    """The pipeline that the engine runs, in the form of a YAML file."""
    stages = ["call_source", "tokenize", "guide", "kv_lookup", "schedule", "prefill", "kv_commit", "decode"]
    stages += ["detokenize", *["metrics"] * config.benchmark.enable_metrics, "reply_sink"]
    failing = ("tokenize", "guide", "schedule", "prefill", "decode", "detokenize")
    return {
        "name": "engine",
        "engine": config.to_dict(),
        "operators": {stage: {} for stage in stages},
        "edges": [" -> ".join(stages), *(f"{stage}.error -> reply_sink" for stage in failing)],
    }


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
