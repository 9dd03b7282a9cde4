"""The library's front door: SageLLMEngine builds the standard pipeline and runs it on a thread of its own."""

from __future__ import annotations

import gc
import operator
import threading
import uuid
from concurrent.futures import Future, wait
from contextlib import aclosing
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, overload

import anyio

from .config import SageLLMConfig
from .errors import EngineClosedError, NotAvailableError, RequestError
from .operators.sources.request_format import request_from_fields
from .records import Choice, Completion, DeadLetter, FinishReason, Pooling, Request, TokenDelta
from .runtime.calls import Caller, EndCaller, FutureCaller, letter_of
from .runtime.flow.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from .records import TokenLogprobs, ToolCall
    from .runtime.flow.flow import Flow
    from .runtime.flow.ledger import Outcome
    from .runtime.services import EngineServices


@dataclass(slots=True)
class GenerateRequest:
    """One call: exactly one of `prompt_tokens`, `prompt` and `messages`. `None` is the model's own default.

    What the output must conform to is one of `response_format` (in OpenAI's form), `guided_regex` and `guided_grammar`
    (Lark, as llguidance reads it), or none of them.
    """

    request_id: str = ""
    prompt_tokens: list[int] | None = None
    max_new_tokens: int = 128
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    stop_sequences: list[str] | str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    top_k: int | None = 0
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float | None = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tenant: str = ""
    cache_salt: str = ""
    pin: bool = False
    unpin: bool = False
    priority: int = 0
    deadline_ms: float | None = None
    tools: list[dict[str, Any]] | None = None  # with messages, in OpenAI's form
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None

    def to_record(self, stream: bool = False) -> Request:
        """The record that flows, checked as a line of a file is.

        Raises:
            RequestError: none or more than one of `prompt_tokens`, `prompt`, `messages` is given, or a field has a
                wrong type or value; the message names each.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        fields["request_id"] = self.request_id or None
        fields["stop"] = fields.pop("stop_sequences")
        for name in ("prompt_tokens", "stop_token_ids"):
            if fields[name] is not None:
                fields[name] = _to_ids(name, fields[name])
        if isinstance(fields["stop"], tuple):
            fields["stop"] = [*fields["stop"]]
        request = request_from_fields(fields, uuid.uuid4().hex)
        request.stream, request.interactive = stream, True
        return request


def _to_ids(name: str, tokens: Any) -> list[int]:
    """Token ids from whatever holds integers: a list, a tuple, an array, a tensor."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise RequestError(f"{name}: found {tokens!r:.60}, write a list of token ids") from error


@dataclass(slots=True)
class GenerateMetrics:
    """Measured on this request. `throughput_tps` is its output tokens (of all choices) over its time in the engine."""

    throughput_tps: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    queue_ms: float = 0.0
    e2e_ms: float = 0.0
    prefix_hit_tokens: int = 0


@dataclass(slots=True)
class GenerateOutput:
    """The first choice's tokens, text, finish reason and tool calls; `choices` has all of them. `error` is set when it
    failed."""

    request_id: str
    output_tokens: list[int]
    finish_reason: str
    metrics: GenerateMetrics = field(default_factory=GenerateMetrics)
    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


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
            return _to_output(self._compute([_to_record(request)])[0], strict=True)
        results = [_to_record_or_letter(each) for each in request]
        return [_to_output(record, strict=False) for record in self._compute(results)]

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
        records = self._compute([_to_pooled_record(prompt, pooling) for prompt in prompts])
        return [_to_embedding(record) for record in records]

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
        async with aclosing(self._follow(_to_record(request))) as records:
            async for record in records:
                if not isinstance(record, TokenDelta):
                    return _to_output(record, strict=True)
        raise EngineClosedError("the engine was shut down")

    async def generate_stream(self, request: GenerateRequest) -> AsyncGenerator[int, None]:
        """Yield the first choice's token ids as they are chosen; leaving the loop early cancels the request.

        Raises:
            RequestError: the request is bad or failed.
            EngineClosedError: the engine is not running.
        """
        async with aclosing(self._follow(_to_record(request, stream=True))) as records:
            async for record in records:
                if not isinstance(record, TokenDelta):
                    _to_output(record, strict=True)
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


def _to_record(request: GenerateRequest, stream: bool = False) -> Request:
    if not isinstance(request, GenerateRequest):
        raise RequestError(f"found {request!r:.60}: write a GenerateRequest, as in GenerateRequest(prompt='...')")
    return request.to_record(stream)


def _to_pooled_record(prompt: str | Sequence[int], pooling: Pooling | str) -> Request:
    given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_tokens": _to_ids("prompts", prompt)}
    request = request_from_fields({**given, "pooling": pooling}, uuid.uuid4().hex)
    request.interactive = True
    return request


def _to_record_or_letter(request: GenerateRequest) -> Request | DeadLetter:
    """A bad request in a list does not keep the others from being sent."""
    try:
        return _to_record(request)
    except RequestError as error:
        if not isinstance(request, GenerateRequest):
            raise
        return DeadLetter(str(error), request=Request(request.request_id))


def _to_output(record: Completion | DeadLetter, strict: bool) -> GenerateOutput:
    if isinstance(record, DeadLetter):
        if strict:
            raise RequestError(record.error)
        return GenerateOutput(record.request_id or "", [], FinishReason.ERROR.value, error=record.error)
    first, measured = record.choices[0], record.metrics
    reason = first.finish_reason or FinishReason.ERROR
    seconds = measured.e2e_ms / 1000
    metrics = GenerateMetrics(
        throughput_tps=record.output_length / seconds if seconds else 0.0,
        ttft_ms=measured.ttft_ms,
        tpot_ms=measured.tpot_ms,
        queue_ms=measured.queue_ms,
        e2e_ms=measured.e2e_ms,
        prefix_hit_tokens=measured.prefix_hit_tokens,
    )
    return GenerateOutput(
        record.request_id,
        first.output_tokens,
        reason.value,
        metrics,
        first.text,
        record.choices,
        record.prompt_logprobs,
        tool_calls=first.tool_calls,
    )


def _to_embedding(record: Completion | DeadLetter) -> NDArray[np.float32]:
    if isinstance(record, DeadLetter):
        raise RequestError(record.error)
    if record.embedding is None:
        raise RequestError(f"the request ended with {record.finish_reason}")
    return record.embedding


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
