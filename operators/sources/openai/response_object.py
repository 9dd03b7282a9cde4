"""A response as OpenAI's API tells it, and the items of its output."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from ....records import FinishReason
from .logprobs import chat_logprobs, visible_logprobs

if TYPE_CHECKING:
    from ....records import Choice, Completion, ToolCall
    from .call import Call
    from .errors import HTTPError

Status = Literal["in_progress", "completed", "incomplete"]


class OutputLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[dict[str, Any]]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[OutputLogprob]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCall(TypedDict):
    """`arguments` is a JSON object, as text."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputTokensDetails(TypedDict):
    cached_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """`cached_tokens` of the input were not computed again."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class Response(TypedDict):
    """Nothing of it is stored. What is null was not asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | FunctionCall]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    temperature: float | None
    top_p: float | None
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    truncation: Literal["disabled"]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None


def begin_response(call: Call, body: dict[str, Any]) -> Response:
    """A response that has only begun, with the fields of its call's checked body."""
    text = body.get("text") or {}
    return {
        "id": call.request_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": call.service.model_name,
        "output": [],
        "usage": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "top_logprobs": body.get("top_logprobs") or 0,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tools": [_TOOL | tool for tool in body.get("tools") or []],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "metadata": body.get("metadata") or {},
        "user": body.get("user"),
        "safety_identifier": body.get("safety_identifier"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "truncation": "disabled",
        "store": False,
        "background": False,
        "previous_response_id": None,
    }


_TOOL: dict[str, Any] = {"description": None, "parameters": None, "strict": False}


def end_response(begun: Response, completion: Completion, output: list[OutputMessage | FunctionCall]) -> Response:
    """The response as its completion leaves it."""
    cut = completion.choices[0].finish_reason is FinishReason.LENGTH
    usage: ResponseUsage = {
        "input_tokens": completion.prompt_length,
        "input_tokens_details": {"cached_tokens": completion.metrics.prefix_hit_tokens},
        "output_tokens": completion.output_length,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": completion.prompt_length + completion.output_length,
    }
    return {
        **begun,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": usage,
    }


def fail_response(begun: Response, failure: HTTPError, output: list[OutputMessage | FunctionCall]) -> Response:
    """The response that a failure ended."""
    code = "server_error" if failure.status >= 500 else "invalid_prompt"
    return {**begun, "status": "failed", "error": {"code": code, "message": failure.message}, "output": output}


def output_of(call: Call, choice: Choice) -> list[OutputMessage | FunctionCall]:
    """The items of a finished choice: its text, if there is any or nothing else, and its calls."""
    items: list[OutputMessage | FunctionCall] = []
    if choice.text or not choice.tool_calls:
        entries = visible_logprobs(choice)
        logprobs = [] if entries is None else chat_logprobs(entries, call.service.tokenizer)["content"]
        status: Status = "incomplete" if choice.finish_reason is FinishReason.LENGTH else "completed"
        items.append(message_item(new_id("msg"), status, [text_part(choice.text, logprobs)]))
    return [*items, *(call_item(new_id("fc"), called, "completed") for called in choice.tool_calls)]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def text_part(text: str, logprobs: list[OutputLogprob]) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def message_item(item_id: str, status: Status, content: list[OutputText]) -> OutputMessage:
    return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": content}


def call_item(item_id: str, called: ToolCall, status: Status) -> FunctionCall:
    """A call; one in progress has no arguments yet."""
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": called.id,
        "name": called.name,
        "arguments": "" if status == "in_progress" else called.arguments,
        "status": status,
    }
