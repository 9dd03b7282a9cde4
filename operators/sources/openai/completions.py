"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from pydantic_core import to_json
from typing_extensions import TypedDict

from ....errors import RequestError
from ..request_format import CompletionBody, parse_json, request_from_body
from .endpoint import Endpoint
from .logprobs import LogprobReader, completion_logprobs, prompt_logprobs, visible_logprobs
from .replies import Replies
from .streaming import ChunkWriter, stream_replies
from .usage import Usage, usage_of

if TYPE_CHECKING:
    from ....records import Completion, Request, TokenDelta, TokenLogprobs
    from .call import Call
    from .replies import Reply


_DEFAULT_LENGTH = 16  # as OpenAI's


class CompletionLogprobs(TypedDict):
    """`text_offset` counts characters. Half a character is `bytes:\\xe4`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """The choices of the first prompt come first. `prompt_logprobs` is there if it was asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


async def answer(call: Call) -> None:
    call.name_after("cmpl-")
    body = parse_json(CompletionBody, await call.read_json())
    call.service.check_model(body.get("model"))
    options = body.get("stream_options")
    requests = [request_from_body(one, call.request_id, max_new_tokens=_DEFAULT_LENGTH) for one in _split(body)]
    replies = Replies(call, requests)
    if requests[0].stream:
        include_usage = bool(options and options.get("include_usage"))
        await stream_replies(call, replies, CompletionChunks(call, requests[0], include_usage))
        return
    if options is not None:
        raise RequestError("stream_options needs stream: true", "stream_options")
    with replies:
        completions = await replies.completions()
    await call.answer(200, to_json(_to_object(call, completions)))


def _split(body: dict[str, Any]) -> list[dict[str, Any]]:
    """A body for each prompt."""
    if body.get("messages") is not None:
        raise RequestError("found messages: write prompt, or call /v1/chat/completions", "messages")
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or isinstance(prompt[0], int):
        return [body]
    return [{**body, "prompt": one} for one in prompt]


def _to_object(call: Call, completions: list[Completion]) -> TextCompletion:
    choices = []
    for position, completion in enumerate(completions):
        prompt = prompt_logprobs(completion.prompt_logprobs, call.service.tokenizer)
        for choice in completion.choices:
            entries = visible_logprobs(choice)
            told: Any = {
                "index": position * len(completion.choices) + choice.index,
                "text": choice.text,
                "logprobs": None if entries is None else completion_logprobs(entries, call.service.tokenizer),
                "finish_reason": choice.finish_reason,
            }
            if prompt is not None:
                told["prompt_logprobs"] = prompt
            choices.append(told)
    return {
        "id": call.request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": call.service.model_name,
        "choices": choices,
        "usage": usage_of(completions),
    }


class CompletionChunks(ChunkWriter):
    """Writes `text_completion` events."""

    def __init__(self, call: Call, request: Request, include_usage: bool) -> None:
        super().__init__(call, "text_completion", request, include_usage)
        self._n = request.sampling.n
        self._lengths: dict[int, int] = {}  # characters of text so far

    def take(self, index: int, reply: Reply) -> bytes:
        deltas, reply.deltas = reply.deltas, []
        first = index * self._n
        parts = [self._of_delta(first + delta.choice, delta) for delta in deltas]
        if reply.completion is not None:
            for choice in reply.completion.choices:
                at = first + choice.index
                reader = self._readers.get(at)
                logprobs = b"null" if reader is None else self._logprobs(at, reader.read_rest(choice))
                parts.append(self._chunk(at, b'""', logprobs, to_json(choice.finish_reason)))
        return b"".join(parts)

    def _of_delta(self, at: int, delta: TokenDelta) -> bytes:
        logprobs = b"null"
        if self._tokenizer is not None:
            reader = self._readers.get(at)
            if reader is None:
                reader = self._readers[at] = LogprobReader(delta.sequence)
            logprobs = self._logprobs(at, reader.read(delta.sequence.choices[delta.choice], delta.tokens))
        if not delta.text and logprobs == b"null":
            return b""
        return self._chunk(at, to_json(delta.text), logprobs, b"null")

    def _logprobs(self, at: int, entries: list[TokenLogprobs]) -> bytes:
        if not entries:
            return b"null"
        assert self._tokenizer is not None
        told = completion_logprobs(entries, self._tokenizer, self._lengths.get(at, 0))
        self._lengths[at] = told["text_offset"][-1] + len(told["tokens"][-1])
        return to_json(told)

    def _chunk(self, at: int, text: bytes, logprobs: bytes, reason: bytes) -> bytes:
        form = b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b'
        return form % (self._head, at, text, logprobs, reason, self._tail)


ENDPOINT = Endpoint(
    "POST",
    "/v1/completions",
    "Continue texts",
    answer,
    TextCompletion,
    CompletionBody,
    streams=True,
)
