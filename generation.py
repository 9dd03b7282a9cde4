"""What a program asks of the engine and gets: GenerateRequest, GenerateOutput, and the records that flow for them."""

from __future__ import annotations

import operator
import uuid
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .operators.sources.request_format import request_from_fields
from .records import Choice, Completion, DeadLetter, FinishReason, Pooling, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from .records import TokenLogprobs, ToolCall


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


def to_record(request: GenerateRequest, stream: bool = False) -> Request:
    """The record of what should be a GenerateRequest.

    Raises:
        RequestError: it is none, or a bad one.
    """
    if not isinstance(request, GenerateRequest):
        raise RequestError(f"found {request!r:.60}: write a GenerateRequest, as in GenerateRequest(prompt='...')")
    return request.to_record(stream)


def to_pooled_record(prompt: str | Sequence[int], pooling: Pooling | str) -> Request:
    """The record of a request for an embedding.

    Raises:
        RequestError: the prompt is no text and no list of ids, or there is no such pooling.
    """
    given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_tokens": _to_ids("prompts", prompt)}
    request = request_from_fields({**given, "pooling": pooling}, uuid.uuid4().hex)
    request.interactive = True
    return request


def to_record_or_letter(request: GenerateRequest) -> Request | DeadLetter:
    """As `to_record`, of one in a list: a bad one does not keep the others from being sent.

    Raises:
        RequestError: it is no GenerateRequest.
    """
    try:
        return to_record(request)
    except RequestError as error:
        if not isinstance(request, GenerateRequest):
            raise
        return DeadLetter(str(error), request=Request(request.request_id))


def to_output(record: Completion | DeadLetter, strict: bool) -> GenerateOutput:
    """What came of a request.

    Raises:
        RequestError: it failed, and `strict` is set; else the output has an `error`.
    """
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


def to_embedding(record: Completion | DeadLetter) -> NDArray[np.float32]:
    """The embedding [hidden] that a request asked for.

    Raises:
        RequestError: it failed, or ended before it had one.
    """
    if isinstance(record, DeadLetter):
        raise RequestError(record.error)
    if record.embedding is None:
        raise RequestError(f"the request ended with {record.finish_reason}")
    return record.embedding
