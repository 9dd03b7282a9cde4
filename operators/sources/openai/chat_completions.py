"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from pydantic_core import to_json
from typing_extensions import TypedDict

from ....errors import RequestError
from ....records import NO_LIMIT, FinishReason
from ..request_format import ChatBody, parse_json, request_from_body
from .endpoint import Endpoint
from .logprobs import LogprobReader, chat_logprobs, prompt_logprobs, visible_logprobs
from .replies import Replies
from .streaming import ChunkWriter, stream_replies
from .usage import Usage, usage_of

if TYPE_CHECKING:
    from ....records import Choice, Completion, Request, TokenDelta, ToolCall
    from .call import Call
    from .replies import Reply


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class PositionLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[PositionLogprobs]
    refusal: None


class FunctionCallObject(TypedDict):
    """`arguments` is a JSON object, as text."""

    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCallObject


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(TypedDict):
    """`prompt_logprobs` is there if it was asked for: an object for each prompt token, null for the first."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


async def answer(call: Call) -> None:
    call.name_after("chatcmpl-")
    body = parse_json(ChatBody, await call.read_json())
    call.service.check_model(body.get("model"))
    if body.get("messages") is None:
        raise RequestError("missing field 'messages'", "messages")
    request = request_from_body(body, call.request_id, max_new_tokens=NO_LIMIT)
    replies = Replies(call, [request])
    options = body.get("stream_options")
    if request.stream:
        await stream_replies(call, replies, ChatChunks(call, request, bool(options and options.get("include_usage"))))
        return
    if options is not None:
        raise RequestError("stream_options needs stream: true", "stream_options")
    with replies:
        (completion,) = await replies.completions()
    await call.answer(200, to_json(_to_object(call, completion)))


def _to_object(call: Call, completion: Completion) -> ChatCompletion:
    answer: ChatCompletion = {
        "id": call.request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": call.service.model_name,
        "choices": [_to_choice(call, choice) for choice in completion.choices],
        "usage": usage_of([completion]),
    }
    found = prompt_logprobs(completion.prompt_logprobs, call.service.tokenizer)
    if found is not None:
        answer["prompt_logprobs"] = found
    return answer


def _to_choice(call: Call, choice: Choice) -> Any:
    entries = visible_logprobs(choice)
    message: AssistantMessage = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [_call_object(called) for called in choice.tool_calls]
    return {
        "index": choice.index,
        "message": message,
        "logprobs": None if entries is None else chat_logprobs(entries, call.service.tokenizer),
        "finish_reason": _finish_reason(choice),
    }


def _call_object(called: ToolCall) -> ToolCallObject:
    return {"id": called.id, "type": "function", "function": {"name": called.name, "arguments": called.arguments}}


def _finish_reason(choice: Choice) -> str | None:
    if choice.tool_calls and choice.finish_reason is FinishReason.STOP:
        return "tool_calls"
    return choice.finish_reason


class ChatChunks(ChunkWriter):
    """Writes `chat.completion.chunk` events."""

    def __init__(self, call: Call, request: Request, include_usage: bool) -> None:
        super().__init__(call, "chat.completion.chunk", request, include_usage)
        self._begins: list[bytes] = []  # of chunks of text, for each choice that has begun
        self._end = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._calls: dict[int, int] = {}  # how many each choice has made

    def take(self, index: int, reply: Reply) -> bytes:
        deltas, reply.deltas = reply.deltas, []
        parts: list[bytes] = []
        for delta in deltas:
            if self._tokenizer is None:
                if delta.text:
                    parts += self._role(delta.choice)
                    parts += (self._begins[delta.choice], to_json(delta.text), self._end)
                if delta.tool_calls:
                    parts += self._calls_of(delta, b"null")
                continue
            logprobs = self._logprobs_of(delta)
            if delta.tool_calls:
                parts += self._calls_of(delta, logprobs)
                logprobs = b"null"
            if delta.text or logprobs != b"null":
                parts += self._role(delta.choice)
                parts.append(self._chunk(delta.choice, b'{"content":%b}' % to_json(delta.text), logprobs, b"null"))
        if reply.completion is not None:
            for choice in reply.completion.choices:
                logprobs = b"null"
                if self._tokenizer is not None and choice.index in self._readers:
                    rest = self._readers[choice.index].read_rest(choice)
                    logprobs = to_json(chat_logprobs(rest, self._tokenizer)) if rest else b"null"
                parts += self._role(choice.index)
                parts.append(self._chunk(choice.index, b"{}", logprobs, to_json(_finish_reason(choice))))
        return b"".join(parts)

    def _role(self, choice: int) -> list[bytes]:
        """A choice begins after those before it: the client's helper for streams wants the first one first."""
        begun = range(len(self._begins), choice + 1)
        self._begins += [b'%b{"index":%d,"delta":{"content":' % (self._head, index) for index in begun]
        return [self._chunk(index, b'{"role":"assistant","content":""}', b"null", b"null") for index in begun]

    def _chunk(self, choice: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        form = b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}%b'
        return form % (self._head, choice, delta, logprobs, reason, self._tail)

    def _calls_of(self, delta: TokenDelta, logprobs: bytes) -> list[bytes]:
        begun = self._calls.get(delta.choice, 0)
        self._calls[delta.choice] = begun + len(delta.tool_calls)
        calls = [{"index": begun + at, **_call_object(called)} for at, called in enumerate(delta.tool_calls)]
        data = b'{"tool_calls":%b}' % to_json(calls)
        return [*self._role(delta.choice), self._chunk(delta.choice, data, logprobs, b"null")]

    def _logprobs_of(self, delta: TokenDelta) -> bytes:
        assert self._tokenizer is not None
        reader = self._readers.get(delta.choice)
        if reader is None:
            reader = self._readers[delta.choice] = LogprobReader(delta.sequence)
        entries = reader.read(delta.sequence.choices[delta.choice], delta.tokens)
        return to_json(chat_logprobs(entries, self._tokenizer)) if entries else b"null"


ENDPOINT = Endpoint(
    "POST",
    "/v1/chat/completions",
    "Answer a conversation",
    answer,
    ChatCompletion,
    ChatBody,
    streams=True,
)
