"""What a line of input may say: our own request lines, and the lines of OpenAI's batch files.

    {"prompt": "2+2?", "max_new_tokens": 8, "temperature": 0}
    {"messages": [{"role": "user", "content": "2+2?"}], "id": "q1", "stop": "\\n"}
    {"prompt": "a sentence", "pooling": "mean"}
    {"custom_id": "q1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 8}}

A field that is null counts as absent. `max_tokens` and `max_completion_tokens` mean `max_new_tokens`, `id` means
`request_id`. What an output must conform to is said as in guide_fields.py. With `pooling` the answer is the prompt's
embedding, and what shapes an output is refused. In a batch line the fields of openai_fields.py and vllm_fields.py are
accepted where they change nothing.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from ...errors import RequestError
from ...records import GuideKind, Pooling, Request, SamplingParams
from .form_errors import explain
from .guide_fields import GuideFields, guide_from_fields
from .openai_fields import Null, Off, OpenAIFields, only
from .tool_fields import CalledTool, ToolFields, tools_from_fields
from .vllm_fields import VLLMChatFields, VLLMCompletionFields, VLLMFields

if TYPE_CHECKING:
    from ...records import SourcePosition

STRICT = ConfigDict(extra="forbid", strict=True)

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]


@with_config(STRICT)
class TextPart(TypedDict, total=False):
    """What is to be cached needs no hint: all is that prompts have in common."""

    type: Required[Literal["text"]]
    text: Required[str]
    cache_control: dict[str, Any] | None
    prompt_cache_breakpoint: Any


def text_or_list(value: Any) -> str:
    """Which branch of a union a value belongs to, so that only that one's errors are told."""
    return "list" if isinstance(value, list) else "str"


_Parts = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[TextPart], Tag("list")],
    Discriminator(text_or_list),
]


@with_config(ConfigDict(extra="allow", strict=True))
class Message(TypedDict, total=False):
    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: _Parts | None
    tool_calls: list[CalledTool] | None
    tool_call_id: str | None


Messages = Annotated[list[Message], Field(min_length=1)]


class OutputFields(TypedDict, total=False):
    """How one output is sampled."""

    min_tokens: Annotated[int, Field(ge=0)] | None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    top_k: Annotated[int, Field(ge=-1)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    logit_bias: dict[Token, Finite] | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
    stop: Text | list[Text] | None
    stop_token_ids: list[Token] | None
    ignore_eos: bool | None


class SamplingFields(OutputFields, total=False):
    n: Annotated[int, Field(ge=1, le=128)] | None
    prompt_logprobs: Alternatives | None


_SAMPLING = frozenset(SamplingFields.__annotations__)
_GUIDES = frozenset(GuideFields.__annotations__)
_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
_OF_OUTPUTS = _SAMPLING | _GUIDES | {"max_new_tokens", "max_tokens", "max_completion_tokens", "logprobs", "stream"}


class ServiceFields(TypedDict, total=False):
    """Whose request it is, how soon it is wanted, and what is kept of it."""

    tenant: str | None
    cache_salt: str | None
    pin: bool | None
    unpin: bool | None
    priority: int | None
    deadline_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class RequestFields(SamplingFields, GuideFields, ToolFields, ServiceFields, total=False):
    messages: Messages | None
    chat_template_kwargs: dict[str, Any] | None
    prompt_tokens: Tokens | None
    max_new_tokens: Count | None
    max_tokens: Count | None
    max_completion_tokens: Count | None
    stream: bool | None


@with_config(STRICT)
class RequestLine(RequestFields, total=False):
    """A line of our own."""

    request_id: Text | int | None
    id: Text | int | None
    prompt: str | None
    logprobs: Alternatives | None
    pooling: Literal["mean", "last"] | None


@with_config(STRICT)
class BatchBody(RequestFields, OpenAIFields, VLLMFields, total=False):
    """The `body` of a batch line: the request of OpenAI's chat or text completions."""

    prompt: str | Tokens | None
    logprobs: bool | Alternatives | None
    top_logprobs: Alternatives | None
    stream_options: Null


@with_config(STRICT)
class StreamOptions(TypedDict, total=False):
    """`include_obfuscation` asks for padding that hides lengths; chunks have none, so only false is taken."""

    include_usage: bool | None
    include_obfuscation: Off
    continuous_usage_stats: Annotated[Any, only(False, why="usage comes once, at the end: write include_usage")]


@with_config(STRICT)
class ChatBody(RequestFields, OpenAIFields, VLLMChatFields, total=False):
    """The body of POST /v1/chat/completions."""

    logprobs: bool | None
    top_logprobs: Alternatives | None
    stream_options: StreamOptions | None


@with_config(STRICT)
class CompletionBody(RequestFields, OpenAIFields, VLLMCompletionFields, total=False):
    """The body of POST /v1/completions. A list of prompts gives `n` choices for each of them, in order."""

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=2048)] | None
    logprobs: Alternatives | None
    stream_options: StreamOptions | None


@with_config(STRICT)
class BatchLine(TypedDict, total=False):
    custom_id: Required[Text]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: Required[BatchBody]


@cache  # built at the first line, not at import: it takes tens of milliseconds
def _adapter(form: Any) -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(form)


def parse_request(line: bytes, default_id: str, src: SourcePosition | None = None) -> Request:
    """Read one request from one line of JSON. `default_id` is its id if the line gives none.

    Raises:
        RequestError: the line is no request; the message names each field that is wrong and what to write instead.
    """
    batch = (b'"body"' in line or b'"custom_id"' in line) and _is_batch_line(line)
    data = parse_json(BatchLine if batch else RequestLine, line)
    return _from_batch_line(data, src) if batch else _from_request_line(data, default_id, src)


def parse_json(form: Any, data: bytes) -> dict[str, Any]:
    """Read JSON that must have the form of a TypedDict of this module.

    Raises:
        RequestError: it has not; the message names each field that is wrong, and `param` the first of them.
    """
    try:
        return _adapter(form).validate_json(data)
    except ValidationError as error:
        raise explain(error, data, form) from None


def request_from_fields(fields: dict[str, Any], default_id: str) -> Request:
    """Make a request of the fields of a line that a program gives as Python values.

    Raises:
        RequestError: as `parse_request`.
    """
    try:
        data = _adapter(RequestLine).validate_python(fields)
    except ValidationError as error:
        raise explain(error, fields, RequestLine) from None
    return _from_request_line(data, default_id, None)


def _is_batch_line(line: bytes) -> bool:
    try:
        data = from_json(line)
    except ValueError:
        return False
    return isinstance(data, dict) and not {"body", "custom_id"}.isdisjoint(data)


def _from_request_line(data: dict[str, Any], default_id: str, src: SourcePosition | None) -> Request:
    request_id = _one_of(data, "request_id", "id")
    return _build(data, default_id if request_id is None else str(request_id), data.get("logprobs"), src)


def _from_batch_line(data: dict[str, Any], src: SourcePosition | None) -> Request:
    body = data["body"]
    chat = body.get("messages") is not None
    url = data.get("url")
    if url is not None and chat != (url == "/v1/chat/completions"):
        raise RequestError(f"url {url} takes body.{'prompt' if chat else 'messages'}, found another kind of body")
    return request_from_body(body, data["custom_id"], src)


def request_from_body(
    body: dict[str, Any],
    request_id: str,
    src: SourcePosition | None = None,
    max_new_tokens: int | None = None,
) -> Request:
    """Make a request of a checked body of OpenAI's chat or text completions, with one prompt. `max_new_tokens` is for
    those that do not say how long an output may be.

    Raises:
        RequestError: fields do not go together.
    """
    if isinstance(body.get("prompt"), list):
        if body.get("prompt_tokens") is not None:
            raise RequestError("found prompt and prompt_tokens: write one of them", "prompt")
        body["prompt_tokens"] = body.pop("prompt")
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if top and logprobs is not True:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if isinstance(logprobs, bool):
        logprobs = (top or 0) if logprobs else None
    if max_new_tokens is not None and _length_of(body) is None:
        body["max_new_tokens"] = max_new_tokens
    return _build(body, request_id, logprobs, src)


def _length_of(data: dict[str, Any]) -> Any:
    return _one_of(data, "max_new_tokens", "max_tokens", "max_completion_tokens")


def _build(data: dict[str, Any], request_id: str, logprobs: int | None, src: SourcePosition | None) -> Request:
    prompt, messages, tokens = data.get("prompt"), data.get("messages"), data.get("prompt_tokens")
    if (prompt is None) + (messages is None) + (tokens is None) != 2:
        given = [name for name in ("prompt", "messages", "prompt_tokens") if data.get(name) is not None]
        told = f"found {' and '.join(given) or 'no prompt'}: write one of prompt, messages, prompt_tokens"
        raise RequestError(told, given[0] if given else "prompt")
    sampling = {name: value for name, value in data.items() if name in _SAMPLING and value is not None}
    if "stop" in sampling:
        stop = sampling["stop"]
        sampling["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    max_new_tokens = _length_of(data)
    if max_new_tokens is not None:
        sampling["max_new_tokens"] = max_new_tokens
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    params = SamplingParams(**sampling) if "logit_bias" in sampling else _shared_params(tuple(sampling.items()))
    if params.min_tokens > params.max_new_tokens:
        raise RequestError(
            f"min_tokens {params.min_tokens} is more than max_new_tokens {params.max_new_tokens}", "min_tokens"
        )
    pooling = data.get("pooling")
    if pooling is not None:
        _refuse_output(data)
    tools, tool_choice = tools_from_fields(data)
    if tools and messages is None:
        raise RequestError("found tools without messages: tools are for chats, write messages", "tools")
    guide = None if _GUIDES.isdisjoint(data) else guide_from_fields(**{name: data.get(name) for name in _GUIDES})
    if tools and guide is not None and guide.kind in (GuideKind.REGEX, GuideKind.GRAMMAR):
        told = f"found tools and a {guide.kind} to conform to: write one, or a response_format"
        raise RequestError(told, "tools")
    variables = data.get("chat_template_kwargs")
    if variables:
        _check_variables(variables, messages)
    return Request(
        request_id,
        prompt,
        None if messages is None else plain_messages(messages),
        tokens,
        params,
        guide,
        template_variables=variables,
        stream=bool(data.get("stream")),
        pooling=None if pooling is None else Pooling(pooling),
        tools=tools,
        tool_choice=tool_choice,
        tenant=data.get("tenant") or "",
        cache_salt=data.get("cache_salt") or "",
        pin=bool(data.get("pin")),
        unpin=bool(data.get("unpin")),
        priority=data.get("priority") or 0,
        deadline_ms=data.get("deadline_ms"),
        src=src,
    )


def _check_variables(variables: dict[str, Any], messages: list[Any] | None) -> None:
    field = "chat_template_kwargs"
    if messages is None:
        raise RequestError(f"{field} are for chats: write messages, or leave it out", field)
    if own := sorted(_OWN_VARIABLES.intersection(variables)):
        raise RequestError(f"{field}: found {own[0]}, which has a field of its own or is fixed: leave it out", field)


def _refuse_output(data: dict[str, Any]) -> None:
    """Whoever asks for an embedding may not ask for an output."""
    given = sorted(name for name in _OF_OUTPUTS if data.get(name) is not None and data[name] is not False)
    if given:
        raise RequestError(
            f"found pooling and {', '.join(given)}: an embedding has no output to shape, leave them out", given[0]
        )
    if data.get("messages") is not None:
        raise RequestError(
            "found pooling and messages: write prompt or prompt_tokens, embeddings know no template", "messages"
        )


@lru_cache(maxsize=256)  # most lines of a file sample alike, and equal parameters may be one object
def _shared_params(sampling: tuple[tuple[str, Any], ...]) -> SamplingParams:
    return SamplingParams(**dict(sampling))


def _one_of(data: dict[str, Any], *names: str) -> Any:
    given = [name for name in names if name in data and data[name] is not None]
    if len(given) > 1:
        raise RequestError(f"found {' and '.join(given)}: they mean the same, write one", given[0])
    return data[given[0]] if given else None


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages, as chat templates expect them.

    Raises:
        RequestError: a message has no content.
    """
    return [_plain_message(message, index) for index, message in enumerate(messages)]


def _plain_message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Chat templates expect text: join the parts of a content list with newlines."""
    content = message.get("content")
    if content is None and not (message["role"] == "assistant" and message.get("tool_calls")):
        raise RequestError(
            f"messages.{index}: a message of {message['role']} has no content: write a text (only an assistant's with "
            "tool_calls may be without)",
            f"messages.{index}.content",
        )
    if isinstance(content, list):
        message["content"] = "\n".join(part["text"] for part in content)
    return message
