"""What a call of POST /v1/responses may say, and the request that it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import Discriminator, Field, Tag, with_config
from typing_extensions import TypedDict

from ....errors import RequestError
from ....records import NO_LIMIT
from ..guide_fields import Source  # noqa: TC001 - pydantic reads it
from ..openai_fields import Null, Off, UsualTier, UsualVerbosity, only
from ..request_format import (
    STRICT,
    Alternatives,
    Count,
    OutputFields,
    ServiceFields,
    Text,
    request_from_body,
    text_or_list,
)
from ..tool_fields import FunctionName  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from ....records import Request

_STATELESS = "nothing is stored here: leave it out, and write in input what the model shall know"
Unstored = Annotated[Any, only(False, why="nothing is stored here: write false, or leave it out")]
Stateless = Annotated[Any, only(why=_STATELESS)]
Untruncated = Annotated[Any, only("disabled", why="what is too long is refused: write disabled, or leave it out")]


@with_config(STRICT)
class ContentPart(TypedDict, total=False):
    """`annotations` and `logprobs` are those of an earlier response; they say nothing to the model."""

    type: Required[Literal["input_text", "output_text"]]
    text: Required[str]
    annotations: list[Any] | None
    logprobs: list[Any] | None


_Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[ContentPart], Tag("list")],
    Discriminator(text_or_list),
]
_Status = Literal["in_progress", "completed", "incomplete"]


@with_config(STRICT)
class MessageItem(TypedDict, total=False):
    """A message, also one of an earlier response."""

    type: Literal["message"] | None
    role: Required[Literal["system", "developer", "user", "assistant"]]
    content: Required[_Content]
    id: str | None
    status: _Status | None
    phase: str | None


@with_config(STRICT)
class FunctionCallItem(TypedDict, total=False):
    """A call that the model has made; `arguments` is a JSON object, as text."""

    type: Required[Literal["function_call"]]
    call_id: Required[Text]
    name: Required[FunctionName]
    arguments: Required[str]
    id: str | None
    status: _Status | None


@with_config(STRICT)
class FunctionOutputItem(TypedDict, total=False):
    """What came of a call."""

    type: Required[Literal["function_call_output"]]
    call_id: Required[Text]
    output: Required[_Content]
    id: str | None
    status: _Status | None


_ITEMS = {None: "MessageItem", "message": "MessageItem", "function_call": "FunctionCallItem",
          "function_call_output": "FunctionOutputItem"}  # fmt: skip


def _kind_of_item(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else ""
    return _ITEMS.get(kind) if kind is None or isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[FunctionCallItem, Tag("FunctionCallItem")]
    | Annotated[FunctionOutputItem, Tag("FunctionOutputItem")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item",
        custom_error_message="Input should be a message, a function_call or a function_call_output",
    ),
]
_Items = Annotated[list[Item], Field(min_length=1)]


@with_config(STRICT)
class TextFormat(TypedDict, total=False):
    """`name`, `schema`, `description` and `strict` are of type json_schema; an output always conforms."""

    type: Required[Literal["text", "json_object", "json_schema"]]
    name: str | None
    schema: dict[str, Any] | None
    description: str | None
    strict: bool | None


@with_config(STRICT)
class TextConfig(TypedDict, total=False):
    format: TextFormat | None
    verbosity: UsualVerbosity


@with_config(STRICT)
class FunctionTool(TypedDict, total=False):
    type: Required[Literal["function"]]
    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


@with_config(STRICT)
class FunctionChoice(TypedDict):
    type: Literal["function"]
    name: FunctionName


@with_config(STRICT)
class Reasoning(TypedDict, total=False):
    """Reasoning is not told apart from the text, and its length is the model's business."""

    effort: Null
    summary: Null
    generate_summary: Null


@with_config(STRICT)
class EventOptions(TypedDict, total=False):
    include_obfuscation: Off


@with_config(STRICT)
class ResponseBody(OutputFields, ServiceFields, total=False):
    """The body of POST /v1/responses."""

    model: str | None
    input: Required[
        Annotated[Annotated[str, Tag("str")] | Annotated[_Items, Tag("list")], Discriminator(text_or_list)]
    ]
    instructions: str | None
    max_output_tokens: Count | None
    text: TextConfig | None
    guided_regex: Source | None
    guided_grammar: Source | None
    chat_template_kwargs: dict[str, Any] | None
    tools: list[FunctionTool] | None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None
    parallel_tool_calls: bool | None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None
    top_logprobs: Alternatives | None
    stream: bool | None
    stream_options: EventOptions | None
    metadata: dict[str, str] | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    service_tier: UsualTier
    truncation: Untruncated
    store: Unstored
    previous_response_id: Stateless
    conversation: Stateless
    background: Off
    prompt: Null
    reasoning: Reasoning | None
    max_tool_calls: Null


_SAME = frozenset({*OutputFields.__annotations__, *ServiceFields.__annotations__, "guided_regex", "guided_grammar",
                   "chat_template_kwargs", "parallel_tool_calls", "stream"})  # fmt: skip


def request_from_response_body(body: dict[str, Any], request_id: str) -> Request:
    """Make a request of a checked body.

    Raises:
        RequestError: fields do not go together.
    """
    if body.get("stream_options") is not None and not body.get("stream"):
        raise RequestError("stream_options needs stream: true", "stream_options")
    chat = {name: value for name, value in body.items() if name in _SAME}
    chat["messages"] = _to_messages(body)
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    chat["tools"] = [_nested(tool) for tool in body.get("tools") or []]
    choice = body.get("tool_choice")
    chat["tool_choice"] = _nested(choice) if isinstance(choice, dict) else choice
    chat["response_format"] = _response_format(body)
    if "message.output_text.logprobs" in (body.get("include") or ()):
        if chat["tools"]:
            raise RequestError("include: found logprobs of texts and tools: a call has none, write one", "include")
        chat |= {"logprobs": True, "top_logprobs": body.get("top_logprobs")}
    elif body.get("top_logprobs"):
        raise RequestError('top_logprobs needs include: ["message.output_text.logprobs"]', "top_logprobs")
    return request_from_body(chat, request_id, max_new_tokens=NO_LIMIT)


def _nested(function: dict[str, Any]) -> dict[str, Any]:
    """A flat tool, or choice of one, as chat completions have it."""
    return {"type": "function", "function": {name: value for name, value in function.items() if name != "type"}}


def _response_format(body: dict[str, Any]) -> dict[str, Any] | None:
    given = (body.get("text") or {}).get("format")
    if given is None or given["type"] == "text":
        return None
    other = next((name for name in ("guided_regex", "guided_grammar") if body.get(name) is not None), None)
    if other is not None:
        told = f"found text.format and {other}: an output conforms to one of them, write one"
        raise RequestError(told, "text.format")
    if given["type"] == "json_object":
        return {"type": "json_object"}
    if given.get("schema") is None:
        raise RequestError("text.format of type json_schema: found no schema, write one", "text.format.schema")
    return {"type": "json_schema", "json_schema": {"schema": given["schema"]}}


def _to_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation as chat completions have it: the calls of an answer belong to its message.

    Raises:
        RequestError: an output belongs to no call.
    """
    given, instructions = body["input"], body.get("instructions")
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    calls: set[str] = set()
    for index, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else given):
        kind = item.get("type")
        if kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            called = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(called)
            calls.add(item["call_id"])
        elif kind == "function_call_output":
            if item["call_id"] not in calls:
                told = f"no function_call {item['call_id']!r:.40} comes before this output: write it into input, too"
                raise RequestError(f"input.{index}.call_id: {told}", f"input.{index}.call_id")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text_of(item["output"])})
        else:
            messages.append({"role": item["role"], "content": _text_of(item["content"])})
    return messages


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
