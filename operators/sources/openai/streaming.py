"""Answers that come as server-sent events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .call import Call
    from .errors import HTTPError
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
    failed."""

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
