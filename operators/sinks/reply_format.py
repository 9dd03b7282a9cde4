"""What a connection is told of its requests: one object for each event.

    {"event": "delta", "request_id", "choice", "text", "tokens"}                     of requests with stream: true
    {"event": "done", "request_id", "text", "output_tokens", "finish_reason", "usage", "metrics", ...}
    {"event": "timeout" | "cancelled", "request_id", ...}                            what there was by then, if anything
    {"event": "error", "request_id", "error"}
    {"event": "shed", "request_id", "error", "queue_depth", "retry_after_s"}

A delta has `tool_calls` too if calls end in it, which the request's `tools` let the model make.

Each request has exactly one event that is no delta, its last. What belongs to no request has the `request_id` null:

    {"event": "error", "request_id": null, "error", "message"}                       the number of the message, from 1
    {"event": "keepalive", "request_id": null}

A result's fields are those of result_format.py, but for `src`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...records import Completion, DeadLetter
from ...runtime.flow.ledger import Outcome
from .result_format import call_fields, completion_fields

if TYPE_CHECKING:
    from ...records import TokenDelta

TERMINAL = frozenset({"done", "error", "cancelled", "shed", "timeout"})


def delta_fields(delta: TokenDelta) -> dict[str, Any]:
    """A step's new tokens of one choice."""
    fields: dict[str, Any] = {
        "event": "delta",
        "request_id": delta.request_id,
        "choice": delta.choice,
        "text": delta.text,
        "tokens": delta.tokens,
    }
    if delta.tool_calls:
        fields["tool_calls"] = [call_fields(call) for call in delta.tool_calls]
    return fields


def end_fields(request_id: str, record: Completion | DeadLetter | None, outcome: Outcome) -> dict[str, Any]:
    """The end of a request. Without a record it ended elsewhere: in a filter, or in another sink."""
    if isinstance(record, Completion):
        event = "timeout" if outcome is Outcome.SHED else outcome.value
        fields = {"event": event, **completion_fields(record)}
        del fields["src"]
        if outcome is Outcome.ERROR:
            fields["error"] = "the request could not be computed to its end"
        return fields
    if outcome is Outcome.CANCELLED:
        return {"event": "cancelled", "request_id": request_id}
    if isinstance(record, DeadLetter):
        return error_fields(request_id, record.error)
    if outcome is Outcome.DONE:
        return {"event": "done", "request_id": request_id, "result": None}
    return error_fields(request_id, f"the request ended with {outcome} where no edge leads to a reply_sink")


def error_fields(request_id: str | None, error: str, message: int | None = None) -> dict[str, Any]:
    """An error of a request, or of the message with that number, or of the connection."""
    fields: dict[str, Any] = {"event": "error", "request_id": request_id, "error": error}
    return fields if message is None else {**fields, "message": message}


def shed_fields(request_id: str, error: str, queue_depth: int, retry_after_s: int) -> dict[str, Any]:
    """A request that was not taken; after so many seconds it may be."""
    return {
        "event": "shed",
        "request_id": request_id,
        "error": error,
        "queue_depth": queue_depth,
        "retry_after_s": retry_after_s,
    }


KEEPALIVE: dict[str, Any] = {"event": "keepalive", "request_id": None}
