"""Answers that come as server-sent events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from pydantic_core import to_json

from .usage import usage_of

if TYPE_CHECKING:
    from ....records import Request
    from .call import Call
    from .errors import HTTPError
    from .logprobs import LogprobReader
    from .replies import Replies, Reply

_KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class EventWriter(Protocol):
    """Writes an endpoint's events."""

    def take(self, index: int, reply: Reply) -> bytes:
        """The events of what a reply, the index-th of its call, has got since the last time."""
        ...

    def finish(self, replies: list[Reply]) -> bytes:
        """The last events, when all replies have ended."""
        ...

    def fail(self, failure: HTTPError) -> bytes:
        """The last events, when one of them has failed."""
        ...


class ChunkWriter:
    """Writes the chunks of completions, a stream of which ends with `[DONE]`, after an event `{"error": ...}` if it
    failed. The parts of a chunk that do not change are made once for a call."""

    def __init__(self, call: Call, kind: str, request: Request, include_usage: bool) -> None:
        head = {
            "id": call.request_id,
            "object": kind,
            "created": int(time.time()),
            "model": call.service.model_name,
        }
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._tokenizer = call.service.tokenizer if request.sampling.logprobs is not None else None
        self._readers: dict[int, LogprobReader] = {}  # of the choices that have begun
        self._include_usage = include_usage

    def finish(self, replies: list[Reply]) -> bytes:
        if not self._include_usage:
            return DONE
        usage = usage_of([reply.completion for reply in replies if reply.completion is not None])
        return b'%b],"usage":%b}\n\n%b' % (self._head, to_json(usage), DONE)

    def fail(self, failure: HTTPError) -> bytes:
        return b"data: " + failure.body + b"\n\n" + DONE


async def stream_replies(call: Call, replies: Replies, writer: EventWriter) -> None:
    """Answer with a stream. What is pending goes out in one write, however much it is.

    Between its beginning and its end no task runs for it: events are written as they come, unless the client reads too
    slowly. Then they wait in the replies, which are bounded.

    A failure before the first event is an answer of its own; after it, the end of the stream.

    Raises:
        HTTPError: a request failed, or was not taken, before there was anything to stream.
        ClientGoneError: the client has closed its connection.
    """
    with replies:
        await replies.news()
        if (failure := replies.failure) is not None:
            raise failure
        await call.begin_stream()

        def take() -> bytes:
            if len(replies.replies) == 1:
                return writer.take(0, replies.replies[0])
            return b"".join([writer.take(index, reply) for index, reply in enumerate(replies.replies)])

        def push() -> bool:
            if call.connection.is_stalled or replies.failure is not None or replies.have_ended:
                return False
            if data := take():
                call.connection.write_chunk(data)
            return True

        replies.push_to(push)
        while True:
            data = take()
            if (failure := replies.failure) is not None:
                await call.stream(data + writer.fail(failure), more=False)
                return
            if replies.have_ended:
                await call.stream(data + writer.finish(replies.replies), more=False)
                return
            if data or replies.is_silent:
                await call.stream(data or _KEEP_ALIVE)
            replies.is_silent = False
            await replies.news()
