"""How a terminal record looks as a line of JSON.

    {"request_id", "text", "output_tokens", "finish_reason", "usage", "metrics", "src"}      a Completion
    {"request_id", "embedding", "finish_reason", "usage", "metrics", "src"}                  a Completion with pooling
    {"src", "line", "error", "raw"}                                                          a DeadLetter
    {"kv_event", "seq", "at", ...}                                                           a KVEvent

A completion of n > 1 has `choices` too, its first one is also at the top. `logprobs` and `prompt_logprobs` are there
if the request asked for them: one `{"token", "logprob", "top": [[token, logprob], ...]}` per position, null for the
first prompt token. `tool_calls`, as OpenAI writes them, is there if the request has tools. `embedding` is null where
the request ended before. A logprob of minus infinity is null. Every other line has `src`, null if the record came from
no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from ...records import Completion, DeadLetter, KVEvent, KVEventKind

if TYPE_CHECKING:
    from ...records import Choice, Request, TokenLogprobs, ToolCall


def dump_line(record: Completion | DeadLetter | KVEvent) -> bytes:
    """The record as one line, newline included."""
    if isinstance(record, Completion):
        fields = completion_fields(record)
    elif isinstance(record, DeadLetter):
        fields = dead_letter_fields(record)
    else:
        fields = kv_event_fields(record)
    return to_json(fields, inf_nan_mode="null") + b"\n"


def completion_fields(completion: Completion) -> dict[str, Any]:
    request, choices = completion.request, completion.choices
    if request.pooling is None:
        fields = {"request_id": request.request_id, **_choice_fields(choices[0], request)}
    else:
        embedding = None if completion.embedding is None else completion.embedding.tolist()
        fields = {
            "request_id": request.request_id,
            "embedding": embedding,
            "finish_reason": _finish_reason(choices[0]),
        }
    if len(choices) > 1:
        fields["choices"] = [{"index": choice.index, **_choice_fields(choice, request)} for choice in choices]
    if completion.prompt_logprobs is not None:
        fields["prompt_logprobs"] = _dump_logprobs(completion.prompt_logprobs)
    fields["usage"] = completion.usage._asdict()
    fields["metrics"] = completion.metrics.to_dict()
    fields["src"] = None if request.src is None else request.src.to_dict()
    return fields


def dead_letter_fields(letter: DeadLetter) -> dict[str, Any]:
    src, raw = letter.src, letter.raw
    fields: dict[str, Any] = {"src": None, "line": None, "error": letter.error, "raw": raw}
    if letter.request is not None:
        src = src or letter.request.src
        fields |= {"raw": raw or letter.request.raw, "request_id": letter.request.request_id}
    if src is not None:
        fields |= {"src": src.to_dict(), "line": src.line}
    return fields


def kv_event_fields(event: KVEvent) -> dict[str, Any]:
    fields: dict[str, Any] = {"kv_event": event.kind.value, "worker": event.worker, "seq": event.seq, "at": event.at}
    if event.kind is KVEventKind.LOST:
        return {**fields, "lost": event.lost}
    if event.kind is KVEventKind.CLEARED:
        return fields
    if event.tier != "hbm":
        return {**fields, "tier": event.tier, "block_hashes": event.block_hashes}
    fields |= {"tenant": event.tenant, "tier": event.tier, "start": event.start, "block_hashes": event.block_hashes}
    if event.kind is KVEventKind.STORED and event.tokens is not None:
        fields |= {"parent_hash": event.parent_hash, "block_size": event.block_size, "tokens": event.tokens.tolist()}
    return fields


def _choice_fields(choice: Choice, request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": choice.text,
        "output_tokens": choice.output_tokens,
        "finish_reason": _finish_reason(choice),
    }
    if request.tools:
        fields["tool_calls"] = [call_fields(call) for call in choice.tool_calls]
    if choice.logprobs is not None:
        fields["logprobs"] = _dump_logprobs(choice.logprobs)
    return fields


def _finish_reason(choice: Choice) -> str | None:
    return None if choice.finish_reason is None else choice.finish_reason.value


def call_fields(call: ToolCall) -> dict[str, Any]:
    """As OpenAI writes a call."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _dump_logprobs(logprobs: list[TokenLogprobs] | list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    return [
        None if entry is None else {"token": entry.token, "logprob": entry.logprob, "top": entry.top}
        for entry in logprobs
    ]
